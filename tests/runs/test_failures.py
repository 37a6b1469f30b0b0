"""Which of several processes is said to have failed first."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from partial_lora import files
from partial_lora.runs import directory, launch
from partial_lora.runs.launch import Cluster, Failure


@pytest.fixture
def told(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv(launch.VARIABLE, str(tmp_path))
    return tmp_path


def say(monkeypatch, rank: int, reason: str, second: float) -> None:
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(time, "time", lambda: second)
    launch.report_failure(reason)


def test_the_first_to_fail_is_the_cause(told: Path, monkeypatch) -> None:
    say(monkeypatch, 0, "a connection was closed", 101.0)
    say(monkeypatch, 1, "out of memory", 100.5)
    launch.report_exits({0: (1, 101), 1: (1, 100)})
    assert launch.first_failure(told) == launch.Failure(1, "out of memory")


def test_a_process_that_was_killed_is_the_cause_of_what_its_peers_say(told: Path, monkeypatch) -> None:
    say(monkeypatch, 0, "a connection was closed", 100.2)
    launch.report_exits({0: (1, 103), 1: (-signal.SIGKILL, 100)})
    assert launch.first_failure(told) == launch.Failure(1, "was ended by SIGKILL", explained=False)


@pytest.mark.parametrize("code", [-signal.SIGTERM, 128 + signal.SIGTERM, -signal.SIGKILL])
def test_what_the_launcher_ends_after_a_failure_is_not_its_cause(told: Path, monkeypatch, code: int) -> None:
    say(monkeypatch, 0, "diverged", 100.2)
    launch.report_exits({0: (1, 100), 1: (code, 131 if code == -signal.SIGKILL else 100)})
    assert launch.first_failure(told) == launch.Failure(0, "diverged")


def test_a_process_that_leaves_without_a_word_is_named(told: Path) -> None:
    launch.report_exits({1: (3, 100)})
    assert launch.first_failure(told) == launch.Failure(1, "ended with code 3 and did not say why", explained=False)


def test_nobody_said_anything(told: Path, monkeypatch) -> None:
    assert launch.first_failure(told) is None
    monkeypatch.delenv(launch.VARIABLE)
    launch.report_failure("nobody listens")
    assert list(told.iterdir()) == []


@pytest.mark.parametrize(
    ("status", "failure", "recorded"),
    [
        ("running", Failure(0, "was ended by SIGKILL", explained=False), "process 0 of 2 was ended by SIGKILL"),
        ("running", None, "the worker was ended by SIGKILL before it could say why"),
        ("failed", Failure(1, "was ended by SIGKILL", explained=False), "process 1 of 2 was ended by SIGKILL"),
        ("failed", Failure(1, "OSError: disk full"), "process 1 of 2 failed: OSError: disk full"),
        ("failed", Failure(0, "ValueError: no"), "its own account"),
        ("failed", None, "its own account"),
        ("finished", Failure(1, "was ended by SIGABRT", explained=False), None),
        (None, Failure(None, "accelerate launch: no such port"), "accelerate launch: no such port"),
    ],
)
def test_the_record_of_a_run_says_what_it_failed_of(status, failure, recorded, tmp_path: Path) -> None:
    (tmp_path / directory.CONFIG).write_text("seed: 3\n")
    if status is not None:
        own = {"error": "its own account"} if status == "failed" else {}
        files.write_json(tmp_path / directory.RESULT, {"status": status, "seed": 3, **own})
    launch._record_failure(tmp_path, failure, Cluster(processes=2), -signal.SIGKILL)
    result = directory.read_result(tmp_path)
    assert (result["status"], result["seed"]) == ("finished" if status == "finished" else "failed", 3)
    assert result.get("error") == recorded
