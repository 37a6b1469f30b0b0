"""The command that measures runs for figures 3 and 7: which it takes, and which it leaves alone."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from evidence_records import dynamics, leave

from partial_lora import runs
from partial_lora.evidence.dynamics import DYNAMICS, measured, read_dynamics, to_measure


@pytest.fixture(scope="module")
def script():
    file = Path(__file__).parents[1] / "scripts" / "dynamics.py"
    spec = importlib.util.spec_from_file_location("dynamics_script", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_measured_run_is_left_alone_and_one_without_weights_is_named(script, tmp_path, capsys) -> None:
    done = leave(tmp_path, "lora", 0.9, measured=dynamics(1.0, 0.9))
    before = (done / DYNAMICS).read_bytes()
    assert script.main([str(tmp_path)]) == 0
    assert (done / DYNAMICS).read_bytes() == before
    record = leave(tmp_path, "partial", 0.9)
    assert script.main([str(tmp_path), "--where", "method=lora"]) == 0
    assert script.main([str(done), str(record)]) == 3
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"{record}: ")
    assert "is missing" in said


def test_a_figure_names_its_runs(script, tmp_path) -> None:
    for seed in range(4):
        leave(tmp_path, "lora", 0.9, seed=seed)
        leave(tmp_path, "partial", 0.9, seed=seed, threshold=0.5)
        leave(tmp_path, "partial", 0.9, seed=seed)
    names = [path.parts[-2:] for path in script.chosen(tmp_path, [], "fig3")]
    assert sorted(names) == [(f"{name}-0.9-None", f"seed{seed}") for name in ("lora", "partial") for seed in range(3)]
    assert script.chosen(tmp_path, [], "fig7") == []


def test_seeds_are_measured_that_all_have_and_whose_weights_are_there(tmp_path) -> None:
    cells = {"lora": range(5), "partial": range(1, 6)}
    for method, seeds in cells.items():
        for seed in seeds:
            known = dynamics(0.9, 0.8) if seed == 3 or (method, seed) == ("lora", 5) else None
            folder = leave(tmp_path, method, 0.9, seed=seed, measured=known)
            (folder / "adapter").mkdir() if seed == 4 else None
    found = runs.read(tmp_path)[0]
    beside = [("digits", {run.row["seed"]: run for run in found if run.row["method"] == name}) for name in cells]
    chosen = [(run.row["method"], run.row["seed"]) for run in to_measure(beside, 3)]
    assert chosen == [("lora", 1), ("lora", 3), ("lora", 4), ("partial", 1), ("partial", 3), ("partial", 4)]
    leave(tmp_path, "lora", 0.9, seed=7, measured=dynamics(0.9, 0.8))
    leave(tmp_path, "lora", 0.9, task="cifar10", seed=7, measured=dynamics(0.9, 0.8))
    found = runs.read(tmp_path)[0]
    cells = [(place, {run.row["seed"]: run for run in found if (run.row["task"], run.row["method"]) == (place, name)})
             for place, name in (("digits", "lora"), ("digits", "partial"), ("cifar10", "lora"))]  # fmt: skip
    assert [sorted(cell) for cell in measured(cells)] == [[3], [3], [7]]


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"version": 0, "metrics": {}, "cka": {}}', '{"version": 1, "cka": {}}']
)
def test_a_broken_or_foreign_file_is_none(content, tmp_path) -> None:
    (tmp_path / DYNAMICS).write_text(content)
    assert read_dynamics(tmp_path) is None
