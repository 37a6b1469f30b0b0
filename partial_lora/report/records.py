"""The records of finished runs, read from their folders and packs.

Nothing is typed by hand and nothing is measured again: every number is one of a result.json.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from partial_lora.errors import PartialLoraError
from partial_lora.files import read_json
from partial_lora.launching import packs
from partial_lora.launching.directory import RESULT, UnfinishedError, finished
from partial_lora.report.rows import row


@dataclass(frozen=True)
class Run:
    """A finished run: the directory that it has or had, its record, and its numbers as tables have them (`row`)."""

    directory: Path
    record: dict
    row: dict


@dataclass(frozen=True)
class LeftOut:
    """A record that is not among the runs: its path below the results directory, and why.

    is_broken: the record cannot be read or is not the run's; else the run failed, has not ended or only calibrated.
    """

    path: str
    why: str
    is_broken: bool

    def __str__(self) -> str:
        return f"{self.path}: {self.why}"


def read(results_dir: Path) -> tuple[list[Run], list[LeftOut]]:
    """Return the finished runs of a results directory, packed ones among them, and what was left out.

    A row's group is the folder that runs of other seeds share. A run that failed, has not finished or only calibrated
    is left out, and so is a result.json that is broken, foreign or copied from another run. Raises PartialLoraError
    where the directory holds no runs at all.
    """
    directories = packs.directories(results_dir)
    if not directories:
        raise PartialLoraError(f"{results_dir}: expected runs in {results_dir}/runs; `partial-lora train` makes them")
    runs, problems = [], []
    for directory in directories:
        try:
            run = run_of(_finished(directory), directory)
            if directory.name != f"seed{run.row['seed']}":
                raise ValueError(f"a copy of another run, its seed is {run.row['seed']}")
            runs.append(run)
        except ValueError as error:
            path = f"{directory.relative_to(results_dir)}/{RESULT}"
            problems.append(LeftOut(path, str(error), not isinstance(error, UnfinishedError)))
    runs.sort(key=lambda run: (run.directory.parent, run.row["seed"]))  # seed10 after seed9
    return runs, problems


def one(directory: Path) -> Run:
    """Return the finished run of a directory; raises PartialLoraError, naming its record, where there is none."""
    try:
        return run_of(_finished(directory), directory)
    except ValueError as error:
        raise PartialLoraError(f"{directory / RESULT}: {error}") from error


def run_of(result: dict, directory: Path) -> Run:
    """Return a record as a run of RESULTS_DIR/runs/TASK/MODEL/METHOD-ID/seedN; raises ValueError as `row` does."""
    return Run(directory, result, {"group": "/".join(directory.absolute().parts[-5:-1])} | row(result))


def _finished(directory: Path) -> dict:
    """Return the record of a finished run, in today's terms, out of its folder or else, where that has none, the pack.

    Raises ValueError that says what is there instead, an UnfinishedError for a run that has not finished.
    """
    try:
        result = read_json(directory / RESULT)
    except FileNotFoundError as error:
        result = packs.packed(directory)
        if result is None:
            raise UnfinishedError("missing, the run never started or was interrupted") from error
    except ValueError as error:
        raise ValueError("broken, not JSON") from error
    return finished(result)
