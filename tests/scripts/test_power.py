"""Power against simulation, and steps of literal histories."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import power
import pytest
from checkout import RESULTS, needs_results
from interval_coverage import fitted
from recorded_runs import leave

from partial_lora.launching.packs import RUNS_TABLE
from partial_lora.report.statistics import estimate

VARIANCES = (0.02**2, 0.1**2, 0.3**2)


def test_the_power_is_how_often_simulated_intervals_lie_above_the_margin() -> None:
    draw, generator = fitted(VARIANCES, 300), np.random.default_rng(0)
    found = [estimate(draw(generator, 6)) for _ in range(600)]
    above = np.mean([one.interval()[0] > -0.03 for one in found])
    assert power.power(VARIANCES, 300, 6, 0.03, 0.05) == pytest.approx(above, abs=0.07)
    expected, _ = power.error(VARIANCES, 300, 6)
    assert expected == pytest.approx(np.std([one.difference for one in found]), rel=0.1)


def test_the_seeds_needed_are_the_fewest_with_enough_power() -> None:
    few, more = (power.needed(VARIANCES, 300, margin, 0.05) for margin in (0.04, 0.02))
    assert few < more
    assert power.power(VARIANCES, 300, few, 0.04, 0.05) >= 0.8 > power.power(VARIANCES, 300, few - 1, 0.04, 0.05)
    assert power.needed(VARIANCES, 300, 0.04, 0.05 / 12) > few
    assert power.needed((0.5**2, 0.1, 0.1), 300, 0.01, 0.05) is None


def test_a_set_has_stopped_where_the_last_quarter_of_its_longest_runs_gained_less_than_a_point(tmp_path) -> None:
    for name, steps, last in (("cpu", 8, 0.9), ("longer", 16, 0.805)):
        folder = leave(tmp_path / name, "lora", wrong=20)
        record = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        points = {steps // 2: 0.7, 3 * steps // 4: 0.8, steps: last}
        record["history"] = [{"step": step, "eval_accuracy": value} for step, value in points.items()]
        (folder / "result.json").write_text(json.dumps(record), encoding="utf-8")
    (row,) = power.steps_by_set([tmp_path / "cpu", tmp_path / "longer"]).to_dict("records")
    assert (row["steps"], row["gain"], row["stopped"]) == (16, pytest.approx(0.005), True)


def test_where_one_source_varies_the_degrees_of_freedom_are_its_own() -> None:
    assert power.error((1.0, 0.0, 1e-9), 300, 6)[1] == pytest.approx(5, rel=1e-3)
    assert power.error((0.0, 1.0, 1e-9), 300, 6)[1] == pytest.approx(299, rel=1e-3)


@needs_results
@pytest.mark.parametrize("task", ["digits", "gtsrb", "sst2", "trec"])
def test_the_test_rows_that_are_counted_with_are_those_of_the_runs(task: str) -> None:
    runs = pd.read_parquet(RESULTS / "decided" / RUNS_TABLE, columns=["task", "examples"])
    assert set(runs[runs["task"] == task]["examples"]) == {power.TEST_ROWS[task]}


@needs_results
def test_the_page_has_the_steps_of_the_records_that_are_there() -> None:
    page = (RESULTS / "power" / "power.md").read_text("utf-8")
    shown = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    for row in power.steps_by_set(RESULTS / name for name in power.HISTORIES).itertuples():
        gain = f"{100 * row.gain:.1f}".removesuffix(".0")
        assert [row.set, row.records, str(row.steps), str(row.methods), gain, str(row.stopped)] in shown
