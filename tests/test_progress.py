"""How far a run is: told by the worker, read and drawn by the parent."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from partial_lora import progress
from partial_lora.cli import Bars


@pytest.fixture
def events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "events"
    monkeypatch.setenv(progress.VARIABLE, str(path))
    monkeypatch.setattr(progress, "_last", {})
    return path


def test_the_first_and_the_last_event_of_a_stage_always_arrive(events: Path, monkeypatch) -> None:
    """Events between the two are one in 0.1 s: here every seventh."""
    clock = itertools.count()
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock) / 64))
    for done in range(1, 1001):
        progress.emit("train", done, 1000, loss=0.5)
    read = list(progress.Reader(events))
    assert read[0] == {"stage": "train", "done": 1, "total": 1000, "loss": 0.5}
    assert [each["done"] for each in read] == [*range(1, 1000, 7), 1000]


def test_a_reader_gives_each_event_once_and_waits_for_the_rest_of_half_a_line(events: Path) -> None:
    reader = progress.Reader(events)
    assert list(reader) == []
    progress.emit("train", 1, 2)
    with events.open("a") as file:
        file.write('{"stage": "tr')
    assert [event["done"] for event in reader] == [1]
    with events.open("a") as file:
        file.write('ain", "done": 2, "total": 2}\n')
    assert [event["done"] for event in reader] == [2]
    assert list(reader) == []


def test_other_ranks_and_a_place_that_is_gone_are_silent(events: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    progress.emit("train", 2, 2)
    assert not events.exists()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv(progress.VARIABLE, str(events / "gone" / "events"))
    progress.emit("train", 2, 2)
    assert not events.exists()


def drawn(terminal: bool) -> str:
    written = io.StringIO()
    console = Console(file=written, force_terminal=terminal, width=120)
    with Bars(console) as bars:
        bars.update({"stage": "download", "done": 45_000_000, "total": 90_000_000})
        bars.update({"stage": "calibrate", "done": 0, "total": 96, "expected": 222.0})
        for done in (1, 95, 96):
            event = {"stage": "calibrate", "done": done, "total": 96, "module": "blocks.0.qkv", "axis": "rows"}
            bars.update(event | {"sparsity": 0.35})
        bars.update({"stage": "train", "done": 0, "total": 9, "note": "9 steps"})
        bars.update({"stage": "train", "done": 1, "total": 9, "loss": 1.25, "validation": {"accuracy": 0.9}})
    return written.getvalue()


def test_a_terminal_shows_counts_modules_and_losses() -> None:
    shown = drawn(terminal=True)
    for part in (
        "45/90 MB",
        "calibrate: about 4 min",
        "train: 9 steps",
        "96/96",
        "blocks.0.qkv rows 0.35",
        "loss 1.250",
        "validation accuracy 0.9000",
    ):
        assert part in shown


def test_a_log_shows_when_a_stage_begins_and_ends() -> None:
    assert drawn(terminal=False).split("\n") == [
        *("download …", "calibrate: about 4 min", "calibrate …", "calibrate done", "train: 9 steps", "train …", "")
    ]


def test_a_log_says_every_half_minute_how_far_a_stage_is_and_the_time_that_is_left() -> None:
    written, seconds = io.StringIO(), iter((0, 20, 40, 60, 100, 120))
    with Bars(Console(file=written, width=30), clock=lambda: next(seconds)) as bars:
        for done in (1, 2, 3, 4, 5, 9):
            bars.update({"stage": "train", "done": done, "total": 9, "loss": 1.25})
    assert written.getvalue().splitlines() == [
        "train …",
        "train 3/9, loss 1.250, 0:02:00 left",
        "train 5/9, loss 1.250, 0:01:40 left",
        "train done",
    ]


def test_a_log_of_a_stage_without_a_known_end_says_how_far_it_is() -> None:
    written, seconds = io.StringIO(), iter((0, 20, 40))
    with Bars(Console(file=written, width=30), clock=lambda: next(seconds)) as bars:
        for done in (1, 2, 3):
            bars.update({"stage": "predict", "done": done, "total": None})
    assert written.getvalue().splitlines() == ["predict …", "predict 3/?"]
