"""Runs that are forked from a process which has imported everything: trainer.start=fork."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from commands import environment, here, is_alive, until
from safetensors.torch import load_file

from partial_lora.launching import directory, fork
from partial_lora.launching.cluster import cluster_of
from partial_lora.launching.fork import can_fork, take_threads
from partial_lora.settings.compose import composed
from partial_lora.settings.schema import Config

TINY = ("model=tiny_vit", "trainer.device=cpu", "method=lora", "task.train_samples=100")
FORK = "trainer.start=fork"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("forked")


@pytest.fixture(scope="module")
def run(place: Path) -> dict[tuple[int, float], Path]:
    """The directories of four runs of a sweep, by steps and rate; the last was under way when the sweep was killed."""
    rates = "trainer.learning_rate=1e30,0.05"  # the first diverges
    sweep = subprocess.Popen(
        [sys.executable, "-m", "partial_lora", "train", "-m", *TINY, FORK, "trainer.max_steps=8,100000", rates],
        cwd=place,
        env=environment(place),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    until(lambda: (8, 0.05) in runs(place) and under_way(runs(place).get((100000, 0.05))), sweep, seconds=240)
    found = runs(place)
    (place / "command").write_bytes(Path(f"/proc/{worker(found[100000, 0.05])}/cmdline").read_bytes())
    (place / "session").write_text(str(os.getsid(worker(found[100000, 0.05]))))
    sweep.kill()
    sweep.wait()
    return found


def runs(place: Path) -> dict[tuple[int, float], Path]:
    paths = {path.parent: json.loads(path.read_text()) for path in place.glob("results/runs/*/*/*/*/result.json")}
    trainers = {path: result["config"]["trainer"] for path, result in paths.items()}
    return {(each["max_steps"], each["learning_rate"]): path for path, each in trainers.items()}


def under_way(run: Path | None) -> bool:
    return run is not None and "step 1 of 100000" in (run / "train.log").read_text()


def worker(run: Path) -> int:
    return int(re.search(r"worker: pid (\d+)", (run / ".lock").read_text())[1])


def test_it_ends_as_one_of_a_fresh_interpreter_bit_for_bit(place: Path, run) -> None:
    assert (
        here(place, "train", *TINY, "trainer.max_steps=8", "trainer.learning_rate=0.05", "results_dir=fresh").returncode
        == 0
    )
    (fresh,) = place.glob("fresh/runs/*/*/*/*/result.json")
    forked = run[8, 0.05]
    assert fresh.parent.parent.name == forked.parent.name  # how a run starts enters no id
    first, second = (json.loads((each / "result.json").read_text()) for each in (fresh.parent, forked))
    assert first["metrics"] == second["metrics"]
    assert pd.read_parquet(fresh.parent / "predictions.parquet").equals(pd.read_parquet(forked / "predictions.parquet"))
    first, second = (load_file(each / "adapter" / "adapter_model.safetensors") for each in (fresh.parent, forked))
    assert all(first[name].equal(second[name]) for name in first.keys() | second.keys())


def test_one_that_fails_touches_no_other_and_its_log_is_its_own(run) -> None:
    results = {key: json.loads((path / "result.json").read_text())["status"] for key, path in run.items()}
    assert results[8, 1e30] == results[100000, 1e30] == "failed"
    assert results[8, 0.05] == "finished"
    logs = {key: (path / "train.log").read_text() for key, path in run.items()}
    assert "step 8 of 8" in logs[8, 0.05]
    assert "step 8 of 8" not in logs[8, 1e30]


def test_it_has_a_session_of_its_own_and_ends_with_the_sweep(place: Path, run) -> None:
    assert b"forkserver" in (place / "command").read_bytes()
    pid = worker(run[100000, 0.05])
    assert int((place / "session").read_text()) == pid
    until(lambda: not is_alive(pid))
    assert json.loads((run[100000, 0.05] / "result.json").read_text())["error"] == "interrupted"
    assert (run[100000, 0.05] / "checkpoints").is_dir()  # it ended after a step, and can be gone on from


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ((FORK,), True),
        ((), False),
        ((FORK, "trainer.num_processes=2"), False),
        ((FORK, "trainer.report_to=tensorboard"), False),
        ((FORK, "model=tiny_llama", "task=arc_easy", "model.quantization=nf4"), False),
    ],
)
def test_what_cannot_be_forked_gets_a_fresh_interpreter(overrides: tuple, expected: bool) -> None:
    config: Config = composed("model=tiny_vit", "trainer.device=cpu", *overrides)
    assert can_fork(config, cluster_of(config.trainer, config.model.quantization)) is expected


def test_the_process_that_forks_is_started_once_and_other_variables_stay(monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(fork, "_STARTED", [])
    monkeypatch.setattr(fork, "ensure_running", lambda: seen.append(dict(os.environ)))
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    before = dict(os.environ)
    for _ in range(2):
        fork.ready({"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", directory.VARIABLE: "of one run"})
    assert seen == [before | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}]
    assert dict(os.environ) == before


def test_it_computes_with_the_threads_of_its_own_environment() -> None:
    before = torch.get_num_threads()
    try:
        take_threads({"OMP_NUM_THREADS": str(before + 1)})
        assert torch.get_num_threads() == before + 1
        take_threads({"OMP_NUM_THREADS": "2,1"})  # of nested regions, which OpenMP reads by itself
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)
