"""The replay of searches on literal records, and the simulation of looks."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import referee
from checkout import RESULTS, needs_results
from recorded_runs import KEPT, leave, record

from partial_lora.compare.rate_search import quick
from partial_lora.report import sequential


def run(rate: float, score: float, losses: tuple[float, ...]) -> dict:
    """The record of a run of four steps, with the loss on validation after each."""
    made = record("lora", score, trainer__learning_rate=rate)
    made["history"] = [{"step": step, "eval_loss": loss} for step, loss in enumerate(losses, start=1)]
    made["metrics"]["validation"] |= {"accuracy": score, "loss": losses[-1]}
    return made | {"training": {"steps": 4}}


def test_a_replayed_search_costs_a_quarter_of_each_rate_and_the_rest_of_two() -> None:
    runs = {1.0: run(1.0, 0.5, (3, 3, 3, 3)), 2.0: run(2.0, 0.9, (2, 2, 2, 2)), 4.0: run(4.0, 0.8, (1, 2, 3, 4))}
    own = {(rate, 0): each for rate, each in runs.items()}
    cell = referee.Cell("race", "digits", "lora", "0.13", own, 2.0, 30.0)
    assert cell.centre == 2.0
    assert cell.replayed(quick(cell.centre, 3)) == (2.0, 0.25 + 1 + 1 + 0.25)  # 8.0, at the edge, was not recorded
    assert cell.lost(4.0) > 0


def test_a_race_loses_what_the_best_method_has_above_those_of_the_least_loss_after_half_a_run() -> None:
    """The best of five, a slow starter, is fourth after half a run; the rate at which it is best looks bad at first."""
    halves = {"a": 1, "b": 2, "c": 3, "late": 4, "e": 5}
    finals = {"a": 0.8, "b": 0.7, "c": 0.6, "late": 0.9, "e": 0.5}
    worse = {1.0: 1, 2.0: 0, 4.0: 2}
    cells = []
    for form, half in halves.items():
        finally_of = {rate: 0.95 if (form, rate) == ("late", 4.0) else finals[form] for rate in worse}
        losses = {rate: (half + more,) * 3 + (1 - finally_of[rate],) for rate, more in worse.items()}
        runs = {(rate, 0): run(rate, finally_of[rate], losses[rate]) for rate in worse}
        cells.append(referee.Cell("race", "digits", form, "0.13", runs, 4.0 if form == "late" else 2.0, 2.0))
    found = referee.races(cells).set_index(["until", "left"])
    assert list(found.loc[(0.5, 3), ["lost", "full"]]) == pytest.approx([10, 15])
    assert list(found.loc[[(0.5, 3), (0.5, 4), (1.0, 1)], "dropped"]) == ["late", "", ""]
    assert found.loc[(0.5, 3), "runs"] == pytest.approx((5 * (0.75 + 0.25) + 3 * (0.5 + 0.75)) / 5)
    assert referee.over_races(found.reset_index()).set_index(["until", "left"]).loc[(0.5, 4), "dropped"] == 0


def test_forms_of_the_one_protocol_are_searches_of_their_own(tmp_path) -> None:
    caps_off = {"calibration__max_sparsity": 0.99}
    for rate, own in ((rate, own) for rate in (1e-3, 2e-3, 4e-3) for own in ({}, caps_off)):
        leave(tmp_path / "decided", budget=0.13, shapes={}, trainer__learning_rate=rate, **KEPT, **own)
    found = {cell.form: (cell.size, len(cell.runs)) for cell in referee.cells(tmp_path, ("decided",))}
    assert found == {"partial": ("0.13", 3), "partial, caps at 0.99": ("0.13", 3)}


PARTS = (0.008, 0.001, 0.006, 900)  # of digits


@pytest.mark.parametrize("looks", referee.PLANS.values())
@pytest.mark.parametrize(
    ("title", "kind"),
    [("one far behind", "normal"), ("six, spread", "normal"), ("six equal", "tailed"), ("twelve equal", "uneven")],
)
def test_many_studies_at_once_are_decided_as_each_by_itself(title: str, kind: str, looks: tuple[int, ...]) -> None:
    outputs = referee.drawn(referee.TRUTHS[title], PARTS, np.random.default_rng(0), kind, 12)
    found = referee.Judged.of(outputs, looks)
    for study, of_study in enumerate(outputs):
        alone = sequential.decide({str(name): dict(enumerate(own)) for name, own in enumerate(of_study)}, 0.01, looks)
        assert alone.leader == str(found.leader[study])
        others = {int(name): one for name, one in alone.by_method.items() if name != alone.leader}
        assert {name: (one.verdict, one.against, one.seeds) for name, one in others.items()} == {
            name: (found.verdict[study, name], str(found.against[study, name]), found.seeds[study, name])
            for name in others
        }


def test_a_study_is_false_that_calls_an_equal_method_worse_or_a_distant_one_as_good() -> None:
    def is_false(verdict: str, truth: tuple[float, float]) -> bool:
        against = np.zeros((1, 2), int)
        judged = referee.Judged(np.zeros(1, int), np.array([[sequential.OPEN, verdict]]), against, against)
        return bool(judged.is_false(truth)[0])

    assert is_false(sequential.WORSE, (0, 0))
    assert not is_false(sequential.WORSE, (0, -1))
    assert is_false(sequential.AS_GOOD, (0, -2))
    assert not is_false(sequential.OPEN, (0, -2))


def test_clear_gaps_are_decided_with_fewer_seeds_than_eight() -> None:
    numbers = referee.simulate({"digits": PARTS}, 2).set_index(["truth", "plan"])
    assert numbers.loc[("clear gaps", "looks"), "seeds a method"] < 8
    assert numbers.loc[("clear gaps", "8 seeds"), "decided"] == 1


@needs_results
def test_gaps_that_seeds_tell_apart_rest_on_the_spread_of_the_committed_studies() -> None:
    table = pd.read_csv(RESULTS / "referee" / "spread.csv")
    medians = table[["seed", "row of one seed", "row"]].median() / 100
    kept = [sequential._SEED, sequential._ROW_OF_SEED, sequential._ROW]
    assert kept == pytest.approx(list(medians), rel=0.05)
