"""How a run ends, as its parent sees it, and what its parent hears."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from partial_lora import files
from partial_lora.runs import directory, launch, sweep


@pytest.mark.parametrize(
    ("record", "status"),
    [
        ({"status": "finished"}, "finished"),  # in spite of it
        ({"status": "failed", "error": "checkpoint-3 cannot be written"}, "failed"),
        ({"status": "failed", "error": "interrupted"}, "interrupted"),
        ({"status": "running"}, "interrupted"),
    ],
)
def test_how_a_run_ended_is_what_its_record_says_of_it(tmp_path: Path, record: dict, status: str) -> None:
    files.write_json(tmp_path / "result.json", record)
    assert launch._outcome(tmp_path, 143).status == status


def test_who_is_not_to_hear_of_a_hangup_does_not(monkeypatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup has it
    try:
        with launch._stop_requests():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_who_has_a_run_does_not_wait_for_itself(tmp_path: Path) -> None:
    own = sweep.Ledger.new(tmp_path)
    other = sweep.Ledger(own.folder)
    with own.claimed(tmp_path / "run"):
        assert not own.is_under_way(tmp_path / "run")
    script = "import sys, time; from pathlib import Path; from partial_lora.runs.sweep import Ledger\n"
    script += "with Ledger(Path(sys.argv[1])).claimed(Path(sys.argv[2])): print('held', flush=True); time.sleep(60)"
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(own.folder), str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline() == "held\n"
        assert other.is_under_way(tmp_path / "run")
    finally:
        holder.kill()
        holder.wait()


def test_a_number_that_is_none_is_none_in_a_record() -> None:
    assert directory.finite([{"grad_norm": math.inf, "loss": 0.5}, (math.nan, "x")]) == [
        {"grad_norm": None, "loss": 0.5},
        [None, "x"],
    ]
