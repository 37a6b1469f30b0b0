"""What stands between a parent and the several workers of a run: what reaches them, and that none is left behind."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from partial_lora.runs import launch

WORKER = Path(__file__).parents[1].joinpath("launched_worker.py")


def launched(folder: Path, seconds: float, **changes: object) -> subprocess.Popen:
    """Two workers, started as a run's are."""
    shared = launch.Cluster(processes=2, **changes)
    command = launch.command(shared, [str(WORKER), str(folder), str(seconds)])
    told = {launch.VARIABLE: str(folder / "told"), **launch.cluster_environment(shared)}
    (folder / "told").mkdir()
    with open(folder / "log", "wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | told, start_new_session=True)


def said(folder: Path, what: str) -> list[dict]:
    """What both workers said, once they have."""
    end = time.monotonic() + 60
    files = [folder / f"{what}_{rank}.json" for rank in range(2)]
    while not all(file.exists() for file in files):
        assert time.monotonic() < end, (folder / "log").read_text()
        time.sleep(0.05)
    return [json.loads(file.read_text()) for file in files]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_asked_to_stop_again_and_again_workers_have_their_time_to_end_well(tmp_path: Path) -> None:
    launcher = launched(tmp_path, 2.0)
    said(tmp_path, "began")
    for _ in range(3):
        launcher.send_signal(signal.SIGTERM)
        time.sleep(0.5)
    assert launcher.wait(30) == 128 + signal.SIGTERM
    assert said(tmp_path, "ended") == [[signal.SIGTERM], [signal.SIGTERM]]
    assert launch.first_failure(tmp_path / "told") is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a process with its parent")
def test_no_worker_outlives_a_launcher_that_is_killed(tmp_path: Path) -> None:
    launcher = launched(tmp_path, 60.0)
    workers = [each["pid"] for each in said(tmp_path, "began")]
    os.killpg(launcher.pid, signal.SIGKILL)
    launcher.wait()
    end = time.monotonic() + 10
    while any(is_alive(pid) for pid in workers):
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_what_a_file_says_of_deepspeed_reaches_the_workers(tmp_path: Path) -> None:
    file = tmp_path / "accelerate.yaml"
    stage = {"zero_stage": 2, "gradient_accumulation_steps": 1}
    file.write_text(
        yaml.safe_dump({"distributed_type": "DEEPSPEED", "mixed_precision": "fp16", "deepspeed_config": stage})
    )
    launcher = launched(tmp_path, 0.0, kind="deepspeed", file=str(file))
    assert launcher.wait(60) == 0
    for each in said(tmp_path, "began"):
        assert each["WORLD_SIZE"] == "2"
        assert each["ACCELERATE_USE_DEEPSPEED"] == "true"
        assert each["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == "2"
        assert each["ACCELERATE_MIXED_PRECISION"] == "no"  # trainer.mixed_precision says
