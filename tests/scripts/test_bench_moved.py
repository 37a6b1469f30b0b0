"""What has moved since the committed figures, and the figures that each benchmark gives to compare."""

from __future__ import annotations

import json

import bench_calibration_page
import bench_moved
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
    assert bench_moved.moved(before, now) == ["down", "up"]
    page = bench_moved.section(before, now)
    assert "2 of 4" in page
    assert "| up " in page
    assert "| touches" not in page
    assert "|" not in bench_moved.section(before, before)
    assert "|" not in bench_moved.section(None, now)


@pytest.mark.parametrize("repetitions", [6, 200])
def test_the_interval_of_a_ratio_of_medians_holds_it(repetitions) -> None:
    random, held = np.random.default_rng(0), 0
    for _ in range(60):
        machine = random.uniform(1, 3, repetitions)  # slow for both at once
        one, other = machine * random.normal(1, 0.1, repetitions), 2 * machine * random.normal(1, 0.1, repetitions)
        ratio, low, high = bench_moved.ratio_of_medians(one, other)
        assert ratio == np.median(one) / np.median(other)
        held += low <= 0.5 <= high
    assert held >= 52


def test_what_is_committed_is_read_from_there(tmp_path) -> None:
    assert bench_moved.committed(tmp_path / "adapter.json") is None
    assert bench_moved.committed(BENCH / "no.json") is None


FIGURES = {
    "adapter": bench_report.figures,
    "calibration": bench_calibration_page.figures,
    "serving": lambda record: bench_serving.figures(record["cases"]),
}


@needs_results
@pytest.mark.parametrize("name", FIGURES)
def test_the_records_here_have_figures_to_compare(name) -> None:
    found = FIGURES[name](json.loads((BENCH / f"{name}.json").read_text()))
    assert found
    assert all(low <= ratio <= high for ratio, low, high in found.values())
    assert not bench_moved.moved(found, found)


# Whole runs


def record() -> dict:
    """One of bench_runs.py, of which every variant takes twice as long as the one before it."""
    made = {"command": "python scripts/bench_runs.py all", "repeats": 3, "cpus": 2}
    spent = {"seconds": 8.0, "processor_seconds": 8.0, "of_training": 1.0}
    sweeps = {"fresh": [spent] * 3, "fork": [spent | {"seconds": 2.0}] * 3}
    commands = {name: [spent] * 3 for name in bench_runs.COMMANDS}
    steps = {loop: [{"step": 2.0**at, "peak": 2**20}] * 3 for at, loop in enumerate(bench_runs.LOOPS)}
    ways = {
        way: {how: [{"step": 2.0**at}] * 3 for how in ("alone", "two")} for at, way in enumerate(bench_runs.WAITING)
    }
    weighed = dict.fromkeys(("saved", "optimizer", "file", "peak", "parameters"), 1e6)
    methods = {name: [weighed | {"step": 2.0**at}] * 3 for at, name in enumerate(("low_rank", "lora", "oft"))}
    long = {
        variant: [weighed | {"step": 2.0**at, "first": 9.0}] * 3 for at, variant in enumerate(bench_runs.LONG_TITLES)
    }
    compiled = {
        variant: [{key: run[key] for key in run if key != "saved"} for run in runs] for variant, runs in long.items()
    }
    found = {
        "starts": {"runs": 4, "sweeps": sweeps, "commands": commands},
        "steps": {"job": steps},
        "methods": {"job": methods},
        "long": {"plain": long, "torch.compile": compiled},
        "threads": {"job": ways},
    }
    return {part: {"made": made, "found": each} for part, each in found.items()}


def test_whole_runs_are_compared_with_what_they_are_measured_beside() -> None:
    figures = {what: ratio for what, (ratio, _, _) in bench_runs.figures(record()).items()}
    assert figures["a forked run / a fresh one"] == 0.25
    assert [figures[f"job: {bench_runs.LOOP_TITLES[loop]} / bare loop"] for loop in bench_runs.LOOPS[1:]] == [2, 4, 8]
    assert [figures[f"job: {method} / low_rank"] for method in ("lora", "oft")] == [2, 4]
    long = {what: ratio for what, ratio in figures.items() if what.startswith("a long text, plain")}
    assert list(long.values()) == [0.5, 2]
    assert [figures[f"job, two: {way} / one thread"] for way in list(bench_runs.WAITING)[1:]] == [2, 4, 8, 16]


def test_the_page_of_whole_runs_has_every_variant_that_was_measured() -> None:
    page = bench_runs.page(record())
    for each in (*bench_runs.COMMANDS, *bench_runs.LOOP_TITLES.values(), *bench_runs.WAITING, "trainer.start=fork"):
        assert f"| {each} |" in page
    assert "| job | oft | 1,000,000 | 4.000 | 4.00 | 1.0 | 1.0 | 1.0 | 1.0 |" in page
    assert "| torch.compile | LoRA, rank 2 | 1,000,000 | 2.00 | 1.00 | 9.0 | – | 1.0 |" in page
    assert bench_runs.page({"steps": record()["steps"]}).count("\n## ") == 1


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


def test_a_quick_one_does_not_take_the_place_of_the_results() -> None:
    with pytest.raises(SystemExit):
        bench_runs.main(["steps", "--quick"])
