"""How far a run is: told by the worker, read and drawn by the parent."""

from __future__ import annotations

import io
import itertools
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from rich.console import Console

from partial_lora import progress


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
    with progress.Bars(console) as drawing:
        drawing.update({"stage": "download", "done": 45_000_000, "total": 90_000_000})
        drawing.update({"stage": "calibrate", "done": 0, "total": 96, "share": 0.0})
        for done, share in ((1, 0.02), (95, 0.998), (96, 1.0)):
            event = {"stage": "calibrate", "done": done, "total": 96, "share": share, "module": "blocks.0.qkv"}
            drawing.update(event | {"axis": "rows", "sparsity": 0.35})
        drawing.update({"stage": "train", "done": 0, "total": 9, "note": "9 steps"})
        drawing.update({"stage": "train", "done": 1, "total": 9, "loss": 1.25, "validation": {"accuracy": 0.9}})
    return written.getvalue()


def test_a_terminal_shows_counts_modules_and_losses() -> None:
    shown = drawn(terminal=True)
    for part in (
        "45/90 MB",
        "train: 9 steps",
        "100 %",
        "blocks.0.qkv rows 0.35",
        "loss 1.250",
        "validation accuracy 0.9000",
    ):
        assert part in shown


def test_a_log_shows_when_a_stage_begins_and_ends() -> None:
    assert drawn(terminal=False).split("\n") == [
        *("download …", "calibrate …", "calibrate done", "train: 9 steps", "train …", "")
    ]


def lines(*events: tuple[float, dict]) -> list[str]:
    """The plain lines about events of one stage, which come after so many seconds each."""
    written, seconds = io.StringIO(), itertools.accumulate(took for took, _ in events)
    shown = progress.Bars(Console(file=written, width=30))
    with mock.patch.object(progress, "time", SimpleNamespace(monotonic=lambda: next(seconds))):
        for _, event in events:
            shown.update({"stage": "calibrate"} | event)
    return written.getvalue().splitlines()


def test_a_note_of_no_stage_is_a_line_alone() -> None:
    assert lines((0, {"stage": "rows", "done": 0, "total": 0, "note": "read"})) == ["rows: read"]


def seconds_left(line: str) -> float:
    hours, minutes, seconds = line.removesuffix(" left").rpartition(" ")[2].split(":")
    return int(hours) * 3600 + int(minutes) * 60 + int(seconds)


def test_a_log_says_every_half_minute_how_far_a_stage_is_and_the_time_that_is_left() -> None:
    steps = [(20, {"done": done, "total": 9, "loss": 1.25}) for done in (0, 1, 2, 3, 4, 5)]
    assert lines(*steps, (20, {"done": 9, "total": 9})) == [
        "calibrate …",
        "calibrate 2/9, loss 1.250, 0:02:20 left",
        "calibrate 4/9, loss 1.250, 0:01:40 left",
        "calibrate done",
    ]


def test_what_a_stage_is_said_to_take_is_left_until_its_pace_shows() -> None:
    expected = [(0, {"done": 0, "total": 9, "share": 0.0, "left": 100.0}), (40, {"done": 0, "total": 9, "share": 0.0})]
    paced = (40, {"done": 4, "total": 9, "share": 0.5})
    assert [seconds_left(line) for line in lines(*expected, paced)[1:]] == [60, 40]


def test_work_of_unlike_cost_is_weighed_by_its_cost() -> None:
    """Ten units each take a tenth less than the one before: from the first line on the time left is right."""
    costs = [100 - 10 * number for number in range(10)]
    shares = [0.0, *itertools.accumulate(cost / sum(costs) for cost in costs)]
    events = [
        (took, {"done": done, "total": 10, "share": share})
        for done, (took, share) in enumerate(zip((0, *costs), shares, strict=True))
    ]
    said = [seconds_left(line) for line in lines(*events)[1:-1]]
    left = [sum(costs[done:]) for done in range(1, 10)]
    assert said == [left[done - 1] for done in range(1, 10) if costs[done - 1] >= 30]


def test_the_pace_is_that_of_the_last_while() -> None:
    events = [(20 if done < 40 else 5, {"done": done, "total": 300}) for done in range(240)]
    assert seconds_left(lines(*events)[-1]) == 61 * 5  # the last that is said is said at the last event


@pytest.mark.parametrize(
    "events",
    [
        [{"done": done, "total": 96, "share": None} for done in range(9)],  # a scan for a budget
        [{"done": 0, "total": 100, "share": done / 1000} for done in range(4)],  # a minute of it has not passed
        [{"done": done, "total": None} for done in range(9)],
        [{"done": 0, "total": 9}] * 9,  # nothing has been done
    ],
)
def test_what_is_not_known_is_not_said(events: list[dict]) -> None:
    said = lines(*((15.5, event) for event in events))
    assert len(said) > 1
    assert not [line for line in said if "left" in line]


def test_a_stage_that_begins_again_has_its_time_anew() -> None:
    first = [(10, {"done": done, "total": 9}) for done in range(1, 9)]
    again = [(1000, {"done": 1, "total": 9}), *((40, {"done": done, "total": 9}) for done in range(2, 5))]
    assert [seconds_left(line) for line in lines(*first, *again)[-3:]] == [7 * 40, 6 * 40, 5 * 40]


def test_a_log_of_a_stage_without_a_known_end_says_how_far_it_is() -> None:
    assert lines(*((20, {"done": done, "total": None}) for done in (1, 2, 3))) == ["calibrate …", "calibrate 3/?"]
