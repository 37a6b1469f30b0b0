"""A run as a command: launched, watched on the terminal, and what is said of it at its end."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from partial_lora.runs import config, launch, results


def directory(settings: Mapping, stage: str) -> Path:
    """Where the files of a stage ("train" or "calibrate") go."""
    return config.run_directory(settings) if stage == "train" else config.calibration_directory(settings)


def run(
    settings: Mapping, stage: str, *, shown: bool = True, asked: Callable[[], Sequence[int]] = tuple
) -> launch.Outcome:
    """Launch a run and say how it ended.

    shown: on the terminal, with bars while it lasts and a table at its end; else silently. asked: the signals that the
    run is to take for received. Raises PartialLoraError as `launch.launch` does, and inside a foreign world.
    """
    launch.refuse_foreign_world()
    place = directory(settings, stage)
    finished = _finished(settings) if stage == "train" else results.is_calibrated
    if not shown:
        return launch.launch(settings, place, stage=stage, watch=_silent, finished=finished, asked=asked)
    from rich.console import Console

    from partial_lora import watch

    console = Console()
    console.print(f"{stage} {place}", highlight=False)
    with watch.Bars(console) as bars:
        outcome = launch.launch(settings, place, stage=stage, watch=bars.update, finished=finished, asked=asked)
    _tell(outcome, stage, console)
    return outcome


def _finished(settings: Mapping) -> Callable[[Path], bool]:
    """What says that a training needs not be run: that it left all its files, or that what it measured is kept."""
    if not settings["keep_records"]:
        return results.is_finished
    return lambda place: results.is_finished(place) or results.is_recorded(place)


def code(outcome: launch.Outcome) -> int:
    """The exit code of a command whose only run ended so."""
    if outcome.status == "interrupted":
        return 128 + signal.Signals[outcome.message]
    return 1 if outcome.status == "failed" else 0


def reason(outcome: launch.Outcome) -> str:
    """Why a run did not end well, in a line that says where to read on."""
    if outcome.status == "interrupted":
        return f"interrupted by {outcome.message}; the same command goes on from there"
    return f"{outcome.message} (log: {outcome.directory / results.LOG})"


def _silent(event: dict) -> None:
    """Show nothing: other runs use the terminal, too."""


def _tell(outcome: launch.Outcome, stage: str, console) -> None:
    """Say how a run ended: why it did not end well, or the short table of its results."""
    from partial_lora.report import report

    if outcome.status in ("interrupted", "failed"):
        print(f"partial-lora: {reason(outcome)}", file=sys.stderr)
        return
    if outcome.status == "skipped":
        console.print("finished before, not run again (overwrite=true runs it again)")
    if outcome.message:  # of one of several machines, whose results another one has
        console.print(outcome.message, highlight=False, soft_wrap=True)
        return
    result = results.read_result(outcome.directory)
    closing = report.summary if stage == "train" else report.calibration_summary
    console.print(closing(result, outcome.directory))
