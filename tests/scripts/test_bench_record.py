"""What has moved since the committed figures, and the figures that each benchmark gives to compare."""

from __future__ import annotations

import json

import bench_adapter
import bench_calibration
import bench_record
import bench_report
import bench_runs
import bench_serving
import numpy as np
import pytest
from checkout import RESULTS, needs_results

BENCH = RESULTS / "bench"


def test_a_ratio_has_moved_where_the_intervals_have_nothing_in_common() -> None:
    before = {
        "same": (1.0, 0.9, 1.1),
        "touches": (1.0, 0.9, 1.1),
        "up": (1.0, 0.9, 1.1),
        "down": (1, 1, 1),
        "gone": (1, 1, 1),
    }
    now = {
        "down": (0.9, 0.9, 0.9),
        "up": (1.3, 1.2, 1.4),
        "touches": (1.2, 1.1, 1.3),
        "same": (1, 1, 1),
        "new": (5, 5, 5),
    }
    assert bench_record.moved(before, now) == ["down", "up"]
    page = bench_record.section(before, now)
    assert "2 of 4" in page
    assert "| up " in page
    assert "| touches" not in page
    assert "|" not in bench_record.section(before, before)
    assert "|" not in bench_record.section(None, now)


@pytest.mark.parametrize("repetitions", [6, 200])
def test_the_interval_of_a_ratio_of_medians_holds_it(repetitions) -> None:
    random, held = np.random.default_rng(0), 0
    for _ in range(60):
        machine = random.uniform(1, 3, repetitions)  # slow for both at once
        one, other = machine * random.normal(1, 0.1, repetitions), 2 * machine * random.normal(1, 0.1, repetitions)
        ratio, low, high = bench_record.ratio_of_medians(one, other)
        assert ratio == np.median(one) / np.median(other)
        held += low <= 0.5 <= high
    assert held >= 52


def test_what_is_committed_is_read_from_there(tmp_path) -> None:
    assert bench_record.committed(tmp_path / "adapter.json") is None
    assert bench_record.committed(BENCH / "no.json") is None


FIGURES = {
    "adapter": bench_report.figures,
    "calibration": bench_calibration.figures,
    "serving": bench_serving.figures,
    "runs": bench_runs.figures,
}


PAGES = {
    "adapter": bench_report.page,
    "calibration": bench_calibration.page,
    "serving": bench_serving.page,
    "runs": bench_runs.page,
}


@needs_results
@pytest.mark.parametrize("name", FIGURES)
def test_the_records_here_have_figures_to_compare_and_their_pages_are_of_them(name) -> None:
    record = json.loads((BENCH / f"{name}.json").read_text())
    found = FIGURES[name](record)
    assert found
    assert all(low <= ratio <= high for ratio, low, high in found.values())
    assert not bench_record.moved(found, found)
    now, committed = (
        text.partition("## Since the figures")[0].rstrip()
        for text in (PAGES[name](record), (BENCH / f"{name}.md").read_text(encoding="utf-8"))
    )
    assert now == committed


# Whole runs


def test_whole_runs_are_compared_with_what_they_are_measured_beside() -> None:
    """Every variant takes twice as long as the one before it."""
    methods = {name: [{"step": 2.0**at}] * 3 for at, name in enumerate(("low_rank", "lora", "oft"))}
    ways = {
        way: {how: [{"step": 2.0**at}] * 3 for how in ("alone", "two")} for at, way in enumerate(bench_runs.WAITING)
    }
    record = {part: {"found": {"job": each}} for part, each in {"methods": methods, "threads": ways}.items()}
    figures = {what: ratio for what, (ratio, _, _) in bench_runs.figures(record).items()}
    assert [figures[f"job: {method} / low_rank"] for method in ("lora", "oft")] == [2, 4]
    assert [figures[f"job, two: {way} / one thread"] for way in list(bench_runs.WAITING)[1:]] == [2, 4, 8, 16]


@pytest.mark.parametrize("loop", ["bare", "trainer"])
def test_a_step_is_timed_in_other_loops(loop) -> None:
    measured = bench_runs.work(loop, 3, bench_runs.TINY_JOBS["tiny_vit, digits"])
    assert measured["step"] > 0
    assert measured["peak"] > 2**20


@pytest.mark.parametrize("variant", bench_runs.LONG_TITLES)
def test_a_step_on_a_long_text_keeps_less_with_gradient_checkpointing(variant) -> None:
    plain, checkpointed = (bench_runs.work(variant, 1, [way, "quick"]) for way in bench_runs.WAYS[:2])
    assert plain["parameters"] == checkpointed["parameters"] > 0
    assert 0 < checkpointed["saved"] < plain["saved"] / 2


@pytest.mark.parametrize(
    ("script", "words"),
    [(bench_adapter, []), (bench_calibration, []), (bench_runs, ["steps"]), (bench_serving, [])],
)
def test_a_quick_one_does_not_take_the_place_of_the_results(script, words) -> None:
    with pytest.raises(SystemExit):
        script.main([*words, "--quick"])
