"""The benchmark of calibration: what it counts, how it judges, and a run of it on a tiny model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

import bench_calibration
import bench_calibration_page

SIDES = ["scan", "bisect", "literal"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs the benchmark on a tiny model; once it is stopped before the literal reference, then it goes on."""
    out, measured = tmp_path_factory.mktemp("bench"), []
    own, threads = bench_calibration.Question.measured, torch.get_num_threads()

    def measure(self, side, modules):
        measured.append(side)
        if side == "literal" and measured.count(side) == 1:
            raise KeyboardInterrupt
        return own(self, side, modules)

    def start(*words):
        bench_calibration.main(["--quick", "--threads", "1", "--literal", "5", "--out", str(out), *words])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_calibration.Question, "measured", measure)
        with pytest.raises(KeyboardInterrupt):
            start()
        start()
    torch.set_num_threads(threads)
    return out, measured


@pytest.fixture(scope="module")
def result(run):
    return json.loads((run[0] / "calibration.json").read_text(encoding="utf-8"))


def test_a_stopped_run_goes_on_where_it_was(run, result):
    out, measured = run
    assert measured == ["scan", "bisect", "literal", "literal"]
    assert sorted(path.name for path in out.iterdir()) == ["calibration.json", "calibration.md"]
    assert list(result["sides"]) == SIDES


def test_what_is_kept_is_of_all_the_code_that_calibrates(tmp_path, monkeypatch):
    monkeypatch.setattr(bench_calibration, "ROOT", tmp_path)
    inner = tmp_path / "partial_lora" / "tasks" / "draws.py"
    inner.parent.mkdir(parents=True)
    inner.write_text("one")
    before = bench_calibration._digest()
    inner.write_text("other")
    assert bench_calibration._digest() != before


def test_all_sides_are_counted(result):
    scan, bisect, literal = (result["sides"][side] for side in SIDES)
    assert len(result["modules"]) == 12
    assert list(scan["sparsity"]) == list(bisect["sparsity"]) == result["modules"]
    assert len(literal["sparsity"]) == 5
    assert {name.split(".", 3)[3] for name in literal["sparsity"]} == {"attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
    whole = result["blocks"] * result["examples"]
    assert literal["evaluations"]["sample_blocks"] == whole * (literal["evaluations"]["passes"] + 1)
    assert scan["evaluations"]["passes"] == result["literal"]["passes"]  # one for each level, cut short or not
    assert (
        scan["evaluations"]["sample_blocks"] < result["literal"]["sample_blocks"] == result["literal"]["passes"] * whole
    )
    assert bisect["evaluations"]["passes"] == 2 + 24 * 3 + fourth_questions(bisect["sparsity"])


def fourth_questions(sparsity):
    """Of the ten answers to nine levels, which of them halving takes four questions to find."""
    deep = [0.3, 0.4, 0.8, 0.9]
    return sum(round(value, 2) in deep for axes in sparsity.values() for value in axes.values())


def test_another_answer_than_the_reference_is_no_result(result):
    levels = [round(0.1 * number, 1) for number in range(1, 10)]
    sides = json.loads(json.dumps(result["sides"]))
    whole = result["blocks"] * result["examples"]
    assert bench_calibration.literal(sides, levels, whole) == result["literal"]
    name = next(iter(sides["literal"]["sparsity"]))
    sides["scan"]["sparsity"][name]["rows"] += 0.1
    with pytest.raises(SystemExit, match="not the literal reference's"):
        bench_calibration.literal(sides, levels, whole)
    sides = json.loads(json.dumps(result["sides"]))
    sides["literal"]["evaluations"]["passes"] -= 1
    with pytest.raises(SystemExit, match="the literal reference took"):
        bench_calibration.literal(sides, levels, whole)


def test_passes_of_the_reference():
    levels = [0.25, 0.5, 0.75]
    sparsity = {"a": {"rows": 0.0, "columns": 0.25}, "b": {"rows": 0.5, "columns": 0.75}}
    assert bench_calibration.literal_passes(sparsity, levels) == 2 + 1 + 2 + 3 + 3
    assert bench_calibration.spread(48, 6) == [0, 9, 18, 27, 32, 41]
    assert bench_calibration.spread(3, 6) == [0, 1, 2]


def test_how_it_judges():
    def judged(blocks, wall, load=1.0, cpus=2):
        side = {
            "evaluations": {"sample_blocks": blocks},
            "wall_seconds": wall,
            "load": [0.5, load],
            "usable_cpus": cpus,
        }
        result = {"sides": {"scan": side, "bisect": side}, "literal": {"sample_blocks": 300}, "threads": 2}
        return [aim["verdict"] for aim in bench_calibration_page.judge(result)]

    assert judged(100, 100) == ["met", "met", "met", "met"]
    assert judged(150, 150) == ["met", "met", "not met", "not met"]
    assert judged(151, 201) == ["not met"] * 4
    assert judged(100, 201, load=6.0)[1] == "open: the machine was busy (load 6.0)"
    assert judged(100, 201, cpus=1)[3] == "open: 2 threads had 1 processor"


def test_the_page_says_all_of_it(run, result):
    page = (run[0] / "calibration.md").read_text(encoding="utf-8")
    titles = [line for line in page.splitlines() if line.startswith("#")]
    assert titles[1:] == ["## Aims", "## Measured", "## Sparsities", "## How it was measured", "## Where"]
    assert f"{result['literal']['sample_blocks']:,}" in page
    other, of = bench_calibration_page.differing(result)
    assert f"Bisect's differ in {other} of {of}" in page
    assert all(name in page for name in result["sides"]["literal"]["sparsity"])


def test_a_quick_run_is_not_kept_as_a_result():
    with pytest.raises(SystemExit):
        bench_calibration.arguments(["--quick"])
    with pytest.raises(SystemExit):
        bench_calibration.arguments(["--threads", "0"])
