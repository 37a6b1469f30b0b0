"""The words of a verdict: who leads, what is decided of the others, and what would decide the rest."""

from __future__ import annotations

import math
from copy import deepcopy

import numpy as np
import pandas as pd
import pytest
import yaml
from peft import LoraConfig, PeftConfig, get_peft_model
from recorded_runs import leave, record
from schemas import marked
from torch import nn

from partial_lora import PartialLoraConfig
from partial_lora.compare import take, verdict
from partial_lora.compare.candidates import Candidate, Entrant
from partial_lora.compare.options import Options
from partial_lora.files import read_json
from partial_lora.report import sequential
from partial_lora.report.forgetting import LESS, MORE, Changes
from partial_lora.report.sequential import AS_GOOD, LEADS, OPEN, WORSE, Decision, Decisions

SPARSE = PartialLoraConfig(r=2, target_modules=["0"], sparsity=0.5)


def group(*methods: str, **known: object) -> list[Entrant]:
    """Methods at their best rates. known: of each candidate."""
    return [Entrant(Candidate(method, "0.13", (), **known), best=1e-3) for method in methods]


def test_a_leader_is_not_among_those_that_are_open_while_looks_go_on() -> None:
    decisions = {
        "lori, 0.13": Decision(OPEN, "lori, 0.13", seeds=2),
        "oft, 0.13": Decision(OPEN, "lori, 0.13", 0.01, -0.05, 0.07, 2),
    }
    found = Decisions("lori, 0.13", decisions, dict.fromkeys(decisions, 3))
    first, *others = verdict.sentences_on(group("lori", "oft"), found, "accuracy", 0.01, 1)
    assert first.startswith("lori leads")
    (line,) = others
    assert line.startswith("oft: ")
    assert "3 seeds" in line


def test_a_method_that_lacks_seeds_is_not_decided() -> None:
    found = Decisions("lori, 0.13", {}, dict.fromkeys(("lori, 0.13", "oft, 0.13"), 8))
    first, other = verdict.sentences_on(group("lori", "oft"), found, "accuracy", 0.01, 1)
    assert first.startswith("lori leads")
    assert other.startswith("oft: ")
    assert "8 seeds" in other


def test_what_is_decided_is_said_of_each_method_and_the_rest_has_the_margin_that_it_meets() -> None:
    of = {
        "lori": Decision(LEADS, "lori, 0.13", seeds=5),
        "dora": Decision(WORSE, "lori, 0.13", 0.06, 0.02, 0.1, 2),
        "oft": Decision(AS_GOOD, "lori, 0.13", 0.002, -0.005, 0.009, 5),
        "hira": Decision(OPEN, "lori, 0.13", 0.01, -0.02, 0.0431, 5),
    }
    found = Decisions("lori, 0.13", {f"{method}, 0.13": decision for method, decision in of.items()}, {})
    noise = 0.01 * np.random.default_rng(0).normal(size=(4, 3, 30))
    by_row = {
        f"{method}, 0.13": dict(enumerate(shift + own))
        for method, shift, own in zip(of, (0.5, 0.6, 0.1, 0.5), noise, strict=True)
    }
    forgotten = {"piqa": Changes("loss", 3.7, by_row)}
    first, *others, last = verdict.sentences_on(group(*of), found, "accuracy", 0.01, 1, forgotten)
    assert last.startswith("On piqa")
    lines = {line.split()[0].rstrip(":"): line for line in others}
    assert lines.keys() == {"dora", "oft", "hira"}
    assert [word for line in lines.values() for word in (LESS, MORE) if word in line] == [MORE, LESS]
    assert LESS in lines["oft"]
    assert "dropped after 2 seeds" in lines["dora"]
    assert "margin=4.4" in lines["hira"]
    assert "not all is decided" in first


@pytest.mark.parametrize(
    ("costs", "named"),
    [
        ({"served": 100, "step_seconds": 1.0}, [False, False]),
        ({"served": 91, "step_seconds": 0.91}, [False, False]),
        ({"served": 89, "step_seconds": 1.0}, [True, False]),
        ({"served": 100, "step_seconds": 0.89}, [False, True]),
        ({"served": 50, "step_seconds": None}, [True, False]),
    ],
)
def test_what_is_as_good_is_named_with_what_it_takes_a_tenth_less_of(costs, named) -> None:
    def candidate(method, served, step_seconds):
        return group(method, served=served, timed=step_seconds and {"cost": {"step_seconds": step_seconds}})[0]

    leader, other = candidate("lori", 100, 1.0), candidate("oft", **costs)
    decisions = {
        "lori, 0.13": Decision(LEADS, "lori, 0.13", seeds=5),
        "oft, 0.13": Decision(AS_GOOD, "lori, 0.13", 0.001, -0.005, 0.009, 5),
    }
    found = Decisions("lori, 0.13", decisions, {})
    _, line = verdict.sentences_on([leader, other], found, "accuracy", 0.01, 1)
    assert [word in line for word in ("file", "step")] == named


def test_seeds_that_would_decide_take_the_time_of_runs_side_by_side_and_intervals_end_at_their_metric() -> None:
    timed = {"seconds": {"train": 3600.0}, "cost": {"step_seconds": 0.0}, "training": {"steps": 1}, "history": []}
    compared = group("lori", "oft", timed=timed)

    def line(seeds: int, jobs: int) -> str:
        decisions = {
            "lori, 0.13": Decision(LEADS, "lori, 0.13", seeds=seeds),
            "oft, 0.13": Decision(OPEN, "lori, 0.13", 0.01, -1.97, 1.99, seeds, wants=seeds + 2),
        }
        return verdict.sentences_on(compared, Decisions("lori, 0.13", decisions, {}), "accuracy", 1.0, jobs)[1]

    assert "4.0 hours" in line(3, 1)
    assert "2.0 hours" in line(3, 2)
    assert "[−100.0, 100.0]" in line(3, 1)
    assert "[" not in line(2, 1)  # of two seeds it is no news


@pytest.mark.parametrize(("wrong", "learnt"), [(20, True), (140, False)])
def test_a_leader_that_test_rows_do_not_tell_from_guessing_is_not_to_be_taken(
    wrong: int, learnt: bool, tmp_path
) -> None:
    """Of four classes of one size; nor do more seeds go to what has learnt nothing."""
    compared = group("lori", "oft")
    for one in compared:
        for seed in range(2):
            place = leave(tmp_path, one.candidate.method, wrong=wrong + seed, seed=seed, trainer__learning_rate=1e-3)
            one.records[place] = read_json(place / "result.json")
    found, (first, *others) = verdict.judged(compared, Options(methods=["lori", "oft"], margin=0.1, rates=3, jobs=1))
    assert ("guessing" in first, bool(others), bool(found.next_seeds)) == (not learnt, learnt, learnt)
    at = pd.DataFrame({"label": [1.0, 2.0, 6.0], "prediction": [1.0, 2.0, 6.0]})
    assert verdict.guessing(at, "mse").mean() == pytest.approx(at["label"].var(ddof=0))
    assert verdict.guessing(at, "spearman").mean() == pytest.approx(0)


def test_gaps_are_foretold_in_points_for_two_methods_and_not_of_responses() -> None:
    def lines(metrics: dict, methods: tuple[str, ...] = ("lori", "oft")) -> list[str]:
        record = {"metrics": {"test": metrics}, "config": {"task": {}}, "seconds": {"train": 1.0}, "cost": {}}
        timed = record | {"training": {"steps": 3}, "history": [{"step": 3}]}
        candidates = [one.candidate for one in group(*methods, steps=9, tested=100, timed=timed)]
        return verdict.prospects(candidates, Options(methods=list(methods), rates=3, jobs=1))

    scores = {"primary": "accuracy", "accuracy": 0.5}
    expected, gaps = lines(scores)
    assert expected.startswith("expected: ")
    for seeds in (3, 5, 8):
        assert f"{100 * sequential.shows(2, 100, seeds):.1f} points by {seeds} seeds" in gaps
    assert len(lines(scores, ("lori",))) == 1
    assert len(lines({"primary": "perplexity", "perplexity": 9.0})) == 1


def test_perplexities_are_compared_by_the_loss_of_every_response(tmp_path) -> None:
    compared, written = [], {}
    for method, shift in (("lori", 0.0), ("oft", 0.2)):
        (one,) = group(method)
        for seed in range(2):
            told = pd.DataFrame({"label": ["a", "b"], "loss": [1.0 + shift, 2.0 + seed], "tokens": [3.0, 1.0]})
            loss = (told["loss"] * told["tokens"]).sum() / 4
            written[method, seed] = loss
            scores = {"test": {"primary": "perplexity", "perplexity": math.exp(loss)}}
            run = record(method, seed=seed, trainer__learning_rate=1e-3, metrics=scores)
            place = tmp_path / "runs" / "task" / "model" / method / f"seed{seed}"
            place.mkdir(parents=True)
            told.to_parquet(place / "predictions.parquet")
            one.records[place] = run
        compared.append(one)
    outputs, metric, _ = verdict.outputs_of(compared, tmp_path)
    assert metric == "perplexity"
    for (method, seed), loss in written.items():
        assert outputs[f"{method}, 0.13"][seed].shape == (2,)
        assert outputs[f"{method}, 0.13"][seed].mean() == pytest.approx(-loss)


def test_predictions_that_are_broken_are_named_and_scores_are_compared(tmp_path, caplog) -> None:
    compared = group("lori", "oft")
    for one in compared:
        for seed in range(2):
            place = leave(tmp_path, one.candidate.method, wrong=20, seed=seed, trainer__learning_rate=1e-3)
            one.records[place] = read_json(place / "result.json")
    assert verdict.outputs_of(compared, tmp_path)[0]["oft, 0.13"][0].shape == (200,)
    (place / "predictions.parquet").write_bytes(b"PAR1")
    for _ in range(2):  # looks
        assert verdict.outputs_of(compared, tmp_path)[0]["oft, 0.13"][0].shape == (1,)
    (said,) = caplog.messages
    assert "predictions.parquet" in said


def test_a_winner_of_peft_trains_anew_and_a_masked_one_leaves_no_file_of_dense_lora(tmp_path) -> None:
    base = nn.Sequential(nn.Linear(6, 4))
    for method, config in (("lora", LoraConfig(r=2, target_modules=["0"])), ("partial", SPARSE)):
        place = tmp_path / method
        get_peft_model(deepcopy(base), config).save_pretrained(place / "adapter")
        done = {place: record(method=method, trainer__learning_rate=1e-3) | {"started": "", "seconds": {"train": 1.0}}}
        taken = take.write(Entrant(Candidate(method, "0.13", ()), best=1e-3, records=done), tmp_path / "take")
        if method == "lora":
            model = get_peft_model(deepcopy(base), PeftConfig.from_pretrained(taken))
            assert [name for name, each in model.named_parameters() if each.requires_grad]
    assert not (taken / "adapter_config.json").exists()
    assert yaml.safe_load((taken / "config.yaml").read_text())["method"]["name"] == "partial"
    assert marked(taken / "config.yaml") == []
