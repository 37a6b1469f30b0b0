"""train and calibrate: one run, or a sweep of them, whose settings Hydra composes from the arguments."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from partial_lora.commands.common import libraries
from partial_lora.launching import directory, launch, packs
from partial_lora.progress import Bars
from partial_lora.settings.compose import compose
from partial_lora.settings.schema import Config
from partial_lora.settings.versions import plain

if TYPE_CHECKING:
    from rich.console import Console


def stage_command(stage: str, arguments: list[str]) -> int:
    """Run `train` or `calibrate`, once or as a sweep; return the exit code."""

    def launched(plan, hydra) -> int:
        from partial_lora.launching import sweep

        return sweep.sweep(plan, stage, run, hydra)

    return compose(stage, arguments, lambda config: run(config, stage).exit_code, sweep=launched)


def run(config: Config, stage: str, *, shown: bool = True, **settings: Any) -> launch.Outcome:
    """Launch a run, draw its figures and page once it has finished, and return how it ended.

    shown: on the terminal, with bars while it lasts and a table at its end; else silently, where other runs use the
    terminal, too. settings: `stop` and `slot` of `launch.launch`. Raises PartialLoraError as `launch.launch` does.
    """
    launch.refuse_foreign_world()
    if not shown:
        return _ended(launch.launch(config, stage, **settings), config, stage)
    from rich.console import Console

    console = Console()
    print(f"{stage} {launch.directory_of(config, stage)}")
    with Bars(console) as bars:
        outcome = launch.launch(config, stage, watch=bars.update, note=bars.note, **settings)
    _print_outcome(_ended(outcome, config, stage), stage, config, console)
    return outcome


def _ended(outcome: launch.Outcome, config: Config, stage: str) -> launch.Outcome:
    """Return how a run ended; link it as `latest` if it was trained, and draw it, unless only its record is left."""
    is_whole = directory.is_finished if stage == "train" else directory.is_calibrated
    if not outcome.exit_code and not outcome.elsewhere and is_whole(outcome.directory):
        if stage == "train":
            directory.link_latest(config.results_dir, outcome.directory)
        if not directory.is_drawn(outcome.directory, stage):
            _draw(outcome.directory, config)
    return outcome


def _draw(place: Path, config: Config) -> None:
    with libraries():  # a drawing that reads the rows of its task needs them, too
        from partial_lora.report import page

        page.draw_run(place, plain(config))


def _print_outcome(outcome: launch.Outcome, stage: str, config: Config, console: Console) -> None:
    """Print why a run did not end well, or the short table of its results and what can be done with them."""
    from partial_lora.report import summary

    if outcome.status in ("interrupted", "failed"):
        print(f"partial-lora: {outcome.reason}", file=sys.stderr)
        return
    if outcome.status == directory.PAUSED:
        print(f"paused (trainer.until={config.trainer.until:g}); the same command without it goes on from there")
        return
    if outcome.status == "skipped":
        print("finished before, not run again (overwrite=true runs it again)")
    if outcome.elsewhere:
        print(outcome.elsewhere)
        return
    closing = summary.summary if stage == "train" else summary.calibration_summary
    console.print(closing(packs.recorded(outcome.directory)))
    print(*_next_steps(outcome.directory, stage, config), sep="\n")


def _next_steps(place: Path, stage: str, config: Config) -> list[str]:
    """Return lines, unbroken: where a run's files are, a path each, and the commands that take the run."""
    drawn = (directory.PAGE, directory.PICTURE) if stage == "train" else (directory.CURVES,)
    lines = [str(place), *(str(place / name) for name in drawn if (place / name).is_file())]
    if stage == "calibrate":
        return [*lines, "next: `partial-lora train` with the same keys uses these sparsities"]
    results = Path(config.results_dir)
    link = results / directory.LATEST
    named = directory.LATEST if results == Path("results") else link
    from partial_lora.report.summary import next_commands

    is_latest = link.resolve() == place.resolve()
    example = place / directory.EXAMPLE
    commands = [f"partial-lora report {shlex.quote(str(results))}"]
    if directory.is_finished(place):  # else its record is all there is
        commands[:0] = next_commands(
            str(named if is_latest else place),
            plain(config),
            example=str((link if is_latest else place) / example.name) if example.is_file() else None,
        )
    return [*lines, f"next: {commands[0]}", *(f"      {command}" for command in commands[1:])]
