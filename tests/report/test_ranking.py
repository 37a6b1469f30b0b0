"""The ranking of methods at equal size: names, best rates, differences of paired seeds, the page."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from recorded_runs import leave, record
from scipy.stats import ttest_1samp

from partial_lora.errors import PartialLoraError
from partial_lora.masks import AS_PEFT
from partial_lora.methods.config import MaskConfig
from partial_lora.report import predictions, ranking, records
from partial_lora.report.pairs import Outcome, Pair, between


def runs(form: str, scores: dict[tuple[float, int], tuple[float, float, float]]) -> list[dict]:
    """Rows of one form. scores: validation, loss and test by learning rate and seed."""
    cost = {"adapter_parameters": 10, "step_seconds": 1.0, "saved_activation_bytes": 1.0, "adapter_bytes": 1}
    common = {"task": "digits", "size": "0.13", "form": form, "metric": "accuracy", "seconds": 1.0} | cost
    return [
        common
        | {"learning_rate": rate, "seed": seed, "validation": validation, "validation_loss": loss, "test": test}
        | {"outcome": Outcome(test, "accuracy", "", seed, None), "run": SimpleNamespace(directory=Path("nowhere"))}
        for (rate, seed), (validation, loss, test) in scores.items()
    ]


def test_the_best_rate_is_of_those_with_all_seeds_and_of_equals_that_of_the_lower_loss() -> None:
    """A rate that went out after the first seed does not win by it, and does not take seeds from the others."""
    early = {(5e-4, 0): (math.nan, 1.0, 0.1), (1e-3, 0): (0.99, 1.0, 0.1)}
    late = {(rate, seed): (0.5 + seed / 10, 5e-3 / rate, 0.2) for rate in (2e-3, 4e-3) for seed in (0, 1)}
    chosen = ranking.at_best_rates(pd.DataFrame(runs("partial", early | late)))
    assert list(chosen["learning_rate"]) == [4e-3, 4e-3]
    assert [set(chosen[key]) for key in ("rates", "spent", "edge")] == [{4}, {6.0}, {True}]
    assert set(ranking.at_best_rates(pd.DataFrame(runs("partial", late)))["edge"]) == {False}  # of a quick search
    failed = {(1e-3, 0): (math.nan, math.nan, 0.1)}
    assert list(ranking.at_best_rates(pd.DataFrame(runs("partial", failed)))["test"]) == [0.1]


def test_a_difference_is_of_runs_of_the_same_seeds() -> None:
    own = {(1e-3, 0): (0.9, 1.0, 0.5), (1e-3, 1): (0.9, 1.0, 0.7), (1e-3, 2): (0.9, 1.0, 0.0)}
    own[1e-3, 3] = (0.9, 1.0, 0.0)
    other = {(2e-3, 0): (0.9, 1.0, 0.4), (2e-3, 1): (0.9, 1.0, 0.5), (2e-3, 2): (0.9, 1.0, -0.15)}
    chosen = pd.DataFrame(runs("partial", own) + runs("lora", other)).assign(
        rates=1, edge=False, spent=1.0, low_1=1e-3, high_1=1e-3, low_2=1e-3, high_2=1e-3
    )
    row = ranking.compared(chosen, "lora").set_index("form").loc["partial"]
    assert (row["difference"], row["paired"], row["seeds"]) == (pytest.approx(0.15), 3, 4)
    assert row["difference_half"] == pytest.approx(4.30265 * 0.05 / 3**0.5, rel=1e-4)  # Student's t, two degrees
    assert (row["over"], row["examples"]) == ("seeds", 0)
    two = ranking.compared(chosen[chosen["seed"] < 2], "lora").set_index("form").loc["partial"]
    assert two["difference"] == pytest.approx(0.15)
    assert two[["half", "difference_half"]].isna().all()  # of two seeds nothing is known


def test_a_difference_of_runs_with_predictions_is_that_of_the_report(tmp_path) -> None:
    for seed in range(3):
        for method, wrong in (("partial", 20 + 9 * seed), ("lora", 60)):
            leave(tmp_path, method, wrong=wrong, seed=seed, budget=0.13)
    leave(tmp_path, "oft", wrong=10, budget=0.13)  # one seed: over examples, which decides nothing
    runs, stored = records.read(tmp_path)[0], predictions.Predictions(tmp_path)
    ranked = ranking.compared(ranking.at_best_rates(ranking.rows_of(runs, stored)), "lora").set_index("form")
    row, alone = ranked.loc["partial, PEFT's draw"], ranked.loc["oft"]
    sides = (
        {run.row["seed"]: Outcome.of(run.row, stored) for run in runs if run.row["method"] == method}
        for method in ("partial", "lora")
    )
    expected = between(Pair(*sides, "accuracy"))
    assert row["difference"] - row["difference_half"] == pytest.approx(expected.low)
    assert (row["over"], row["examples"], row["holds"]) == ("seeds and examples", 200, True)
    assert (alone["over"], alone["difference"], alone["holds"]) == ("examples", 0.25, False)
    assert alone["difference_half"] > 0
    titles = ranking.titled(ranked.reset_index(), "lora")["digits, 13 % of dense LoRA's parameters"]
    assert titles["difference over"].tolist() == ["1 seed, 200 rows", "3 seeds, 200 rows", "–"]


def test_what_holds_after_correction_is_what_scipys_t_test_leaves_after_holm() -> None:
    """Four forms: one is significant after correction, one before it, one not, and one has no spread to judge it by."""
    differences = {
        "sure": [0.10, 0.11, 0.12],
        "alone": [0.08, 0.11, 0.15],
        "unsure": [-0.1, 0.1, 0.2],
        "same": [0.1] * 3,
    }
    base = [0.5, 0.6, 0.55]
    tests = {"lora": base} | {
        form: [one + more for one, more in zip(base, each, strict=True)] for form, each in differences.items()
    }
    rows = [
        run for form, each in tests.items() for run in runs(form, {(1e-3, s): (1, 1, t) for s, t in enumerate(each)})
    ]
    found = ranking.compared(ranking.at_best_rates(pd.DataFrame(rows)), "lora").set_index("form")
    p = {form: ttest_1samp(each, 0).pvalue for form, each in differences.items() if form != "same"}
    assert p["sure"] < 0.05 / 3 < 0.05 / 2 < p["alone"] < 0.05 < p["unsure"]
    assert found["p"].dropna().to_dict() == pytest.approx(p)
    assert found.index[found["holds"]].tolist() == ["sure"]
    shown = ranking.titled(found.reset_index(), "lora")["digits, 13 % of dense LoRA's parameters"]
    assert dict(zip(shown["method"], shown["after correction"], strict=True))["sure"] == "better"


@pytest.mark.parametrize(
    ("mask", "method", "name"),
    [
        ({"fan_in": "kept", "row_exponent": 1.0}, {"name": "partial"}, "partial"),
        ({}, {"name": "partial"}, "partial, PEFT's draw"),
        ({"fan_in": "kept", "row_exponent": 1.0}, {"name": "uniform", "rank": "auto"}, "uniform rank=auto"),
        ({"granularity": "units", "fan_in": "kept"}, {"name": "partial"}, "partial mask=units row_exponent=0"),
        ({"columns": "frozen", "row_exponent": 1.0}, {"name": "partial"}, "partial mask=frozen"),
        ({"granularity": "element"}, {"name": "entries"}, "entries"),
        ({"granularity": "element", "row_exponent": 0.5}, {"name": "entries"}, "entries row_exponent=0.5"),
        ({"row_exponent": 1.0, "column_exponent": 0.5}, {"name": "ticket"}, "ticket"),
    ],
)
def test_what_differs_between_forms_is_in_their_names(mask: dict, method: dict, name: str) -> None:
    assert ranking.form_of({"mask": asdict(MaskConfig()) | AS_PEFT | mask, "method": method}) == name


def rows_of(results: Iterable[dict]) -> pd.DataFrame:
    return ranking.rows_of(records.run_of(result, Path("run")) for result in results)


def ranked(table: pd.DataFrame) -> pd.DataFrame:
    return ranking.compared(ranking.at_best_rates(table), "lora")


def test_costs_are_means_over_the_seeds_that_all_forms_have() -> None:
    every, few = ({(2e-3, seed): (0.9, 1.0, 0.5) for seed in range(seeds)} for seeds in (4, 2))
    table = pd.DataFrame(runs("lora", every) + runs("partial", few))
    table["saved_activation_bytes"] = table["seed"] + 1.0
    assert ranked(table)["saved_bytes"].tolist() == [1.5, 1.5]


def test_a_page_names_its_points_and_has_every_number(tmp_path) -> None:
    scores = {(2e-3, seed): (0.9, 1.0, 0.5 + seed / 10) for seed in range(3)}
    table = pd.DataFrame(runs("partial", scores) + runs("lora", scores))
    settings = {"reference": "lora", "command": "partial-lora compare", "refused": ["oft: not applicable"]}
    alike = ranking.write_page(ranked(table), tmp_path / "alike", **settings).read_text()
    assert "<title>partial, 0.13: " not in alike  # nothing to choose by
    table.loc[table["form"] == "lora", ["adapter_parameters", "step_seconds", "saved_activation_bytes"]] *= 2
    text = ranking.write_page(ranked(table), tmp_path, **settings).read_text()
    assert text.count("<title>partial, 0.13: 60.00 ± 24.84 (3 seeds, learning rate 0.002), 10 parameters") == 3
    assert "oft: not applicable" in text
    one = pd.DataFrame([run for name in ("partial", "lora") for run in runs(name, {(2e-3, 0): (0.9, 1.0, 0.5)})])
    assert (
        ">nan<" not in ranking.write_page(ranked(one), tmp_path / "one", **settings).read_text()
    )  # it has no interval
    two = pd.concat([table, table.assign(task="cars")])
    text = ranking.write_page(ranked(two), tmp_path, **settings).read_text()
    assert [text.index(f'<h2 id="of-tab-{count}">{task}<') for count, task in ((1, "cars"), (2, "digits"))]
    assert "http://" not in text.replace("http://www.w3.org", "")  # nothing is fetched


def test_what_another_form_beats_at_no_higher_cost_is_grey_and_has_no_name(tmp_path) -> None:
    rows = [("a", 0.9, 10), ("b", 0.8, 10), ("c", 0.8, 5), ("d", 0.95, 20), ("e", 0.8, 5)]
    table = pd.DataFrame(rows, columns=["form", "test", "parameters"])
    shared = {"task": "digits", "size": "0.13", "metric": "accuracy", "half": 0.01, "seeds": 3, "learning_rate": 1e-3}
    falling = table.assign(**shared | {"task": "texts", "metric": "perplexity", "test": table["test"] + 1})
    both = pd.concat([table.assign(**shared), falling], ignore_index=True)
    _, svg = ranking.draw_front(both, "parameters", tmp_path, "front")
    drawn = svg.read_text()
    marks = {index: drawn[drawn.index(f'id="front-{index}"') :].partition("/>")[0] for index in both.index}
    assert [index for index, mark in marks.items() if "#bfbfbf" in mark] == [1, 5, 6, 8]
    assert [drawn.count(f">{form}</text>") for form in "abcde"] == [1, 0, 2, 1, 2]


def test_sizes_that_differ_little_stay_apart_and_counts_are_no_shares() -> None:
    """Budgets of 100,000 and 104,000 parameters, of 0.131 and 0.133."""
    budgets = (0.131, 0.133, 100_000, 104_000)
    table = rows_of([record("lora", seed=0, budget=budget) for budget in budgets])
    titles = list(ranking.titled(ranking.compared(ranking.at_best_rates(table), "lora"), "lora"))
    of = [f"{size} of dense LoRA's parameters" for size in ("13.1 %", "13.3 %")]
    assert sorted(titles) == sorted(f"digits, {each}" for each in [*of, "100,000 parameters", "104,000 parameters"])


def results(method: str, test: float, **changes: object) -> list[dict]:
    """Two seeds of a method."""
    return [record(method, test, seed=seed, trainer__learning_rate=1e-3, **changes) for seed in range(2)]


def test_a_size_of_its_own_is_set_beside_the_largest_reference_and_rarer_modules_are_named() -> None:
    few = results("dense", 0.6, model__target_modules=["query", "value"], method__rank=8)
    sized = [results("lora", 0.5, budget=0.13), results("lora", 0.4, budget=0.02)]
    table = rows_of([*few, *results("dense", 0.7), *sized[0], *sized[1]])
    numbers = ranking.compared(ranking.at_best_rates(table), "lora").set_index(["size", "form"])
    assert numbers["difference"].dropna().to_dict() == {
        ("own", "dense"): pytest.approx(0.2),
        ("own", "dense on query, value"): pytest.approx(0.1),
    }


def test_a_reference_with_a_size_of_its_own_is_set_beside_every_size() -> None:
    sized = [*results("partial", 0.6, budget=0.13), *results("partial", 0.5, budget=0.02)]
    table = ranking.at_best_rates(rows_of([*results("dense", 0.7), *sized]))
    assert ranking.compared(table, "dense").set_index("size")["difference"].dropna().to_dict() == {
        "0.13": pytest.approx(-0.1),
        "0.02": pytest.approx(-0.2),
    }
    only = ranking.at_best_rates(rows_of([*results("lora", 0.7, budget=0.02), *sized[:2]]))
    assert ranking.compared(only, "lora")["difference"].isna().all()  # two budgets are not compared


def test_runs_that_differ_in_another_setting_are_not_averaged() -> None:
    table = rows_of([record("partial", budget=0.13), record("partial", budget=0.13, method__rank=64)])
    assert len(ranking.at_best_rates(table)) == 1  # the same numbers: one run under two ids
    table.loc[0, "test"] += 0.01
    with pytest.raises(PartialLoraError, match=r"digits, 0\.13, partial"):
        ranking.at_best_rates(table)


def test_a_window_is_the_rates_around_the_best_that_cost_no_more_than_so_many_points() -> None:
    scores = {1e-3: 0.80, 2e-3: 0.895, 4e-3: 0.90, 8e-3: 0.885, 16e-3: 0.20, 32e-3: 0.90}
    tried = {(rate, 0): (score, 1.0, 0.5) for rate, score in scores.items()} | {(4e-3, 1): (0.5, 1.0, 0.5)}
    cell = pd.DataFrame(runs("partial", tried))
    window = ranking.window(cell, 4e-3)
    assert list(window.values()) == [2e-3, 4e-3, 2e-3, 8e-3]  # of one point, of two; not what lies beyond a gap
    assert np.isnan(list(ranking.window(cell.assign(metric="perplexity"), 4e-3).values())).all()
