"""The benchmark of calibration: what it counts, how it judges, and a run of it on a tiny model."""

from __future__ import annotations

import copy
import json

import bench_calibration
import pytest
import torch

SIDES = ["scan", "bisect", "literal"]


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The folder of a quick run."""
    out, threads = tmp_path_factory.mktemp("bench"), torch.get_num_threads()
    bench_calibration.main(["--quick", "--threads", "1", "--out", str(out)])
    torch.set_num_threads(threads)
    return out


@pytest.fixture(scope="module")
def result(out):
    return json.loads((out / "calibration.json").read_text(encoding="utf-8"))


def fourth_questions(sparsity):
    """Of the ten answers to nine levels, which of them halving takes four questions to find."""
    deep = [0.3, 0.4, 0.8, 0.9]
    return sum(round(value, 2) in deep for axes in sparsity.values() for value in axes.values())


def test_all_sides_are_counted(result):
    assert list(result["sides"]) == SIDES
    scan, bisect, literal = (result["sides"][side] for side in SIDES)
    assert len(result["modules"]) == 12
    for side in (scan, bisect, literal):
        assert list(side["sparsity"]) == result["modules"]
    whole = result["blocks"] * result["examples"]
    assert literal["evaluations"]["sample_blocks"] == whole * (literal["evaluations"]["passes"] + 1)
    assert scan["evaluations"]["passes"] == result["literal"]["passes"]  # one for each level, cut short or not
    of_reference = result["literal"]["passes"] * whole
    assert scan["evaluations"]["sample_blocks"] < result["literal"]["sample_blocks"] == of_reference
    assert bisect["evaluations"]["passes"] == 2 + 24 * 3 + fourth_questions(bisect["sparsity"])


@pytest.mark.parametrize("wrong", [None, "sparsity", "passes"])
def test_another_answer_than_the_reference_is_no_result(result, wrong):
    sides, levels = copy.deepcopy(result["sides"]), [round(0.1 * number, 1) for number in range(1, 10)]
    if wrong == "sparsity":
        next(iter(sides["literal"]["sparsity"].values()))["rows"] += 0.1
    if wrong == "passes":
        sides["literal"]["evaluations"]["passes"] -= 1
    if wrong is None:
        assert bench_calibration.literal(sides, levels, result["blocks"] * result["examples"]) == result["literal"]
    else:
        with pytest.raises(SystemExit):
            bench_calibration.literal(sides, levels, result["blocks"] * result["examples"])


@pytest.mark.parametrize(
    ("blocks", "seconds", "load", "cpus", "verdicts"),
    [
        (100, 100, 1.0, 2, ["met", "met", "met", "met"]),
        (150, 150, 1.0, 2, ["met", "met", "not met", "not met"]),
        (151, 201, 1.0, 2, ["not met", "not met", "not met", "not met"]),
        (100, 201, 6.0, 2, ["met", "open: the machine was busy (load 6.0)"] * 2),
        (100, 201, 1.0, 1, ["met", "open: 2 threads had 1 processor"] * 2),
    ],
)
def test_how_it_judges(blocks, seconds, load, cpus, verdicts):
    side = {"evaluations": {"sample_blocks": blocks}, "wall_seconds": seconds, "load": [0.5, load], "usable_cpus": cpus}
    result = {"sides": {"scan": side, "bisect": side}, "literal": {"sample_blocks": 300}, "threads": 2}
    assert [aim["verdict"] for aim in bench_calibration.judge(result)] == verdicts
