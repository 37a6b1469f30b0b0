"""What commands share: parsers and their options, the environment of libraries, the run that a user names."""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn, TextIO

from partial_lora.errors import PartialLoraError, escaped
from partial_lora.finished.run import FinishedRun, finished_run
from partial_lora.launching import cluster, directory, imports

A_RUN = "a finished run: its path, `latest`, or the start of its id (`partial-lora runs` lists them)"


class WantedError(Exception):
    """A parser that was asked for, on its way to who asked."""


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line, as all others are, in place of a page.

    is_wanted: a parser that is about to read words is raised instead, for completion.
    """

    is_wanted = False

    def parse_known_args(self, *arguments, **settings):
        if Parser.is_wanted:
            raise WantedError(self)
        return super().parse_known_args(*arguments, **settings)

    def parse_known_intermixed_args(self, *arguments, **settings):
        if Parser.is_wanted:
            raise WantedError(self)
        return super().parse_known_intermixed_args(*arguments, **settings)

    def _print_message(self, message: str, file: TextIO | None = None) -> None:
        print(message, end="", file=file)  # argparse would say nothing of a disk that is full

    def error(self, message: str) -> NoReturn:
        raise PartialLoraError(f"{message}; `{self.prog} --help` says more")


def parser_for(command: str, description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of a command."""
    return Parser(prog=f"partial-lora {command}", description=description, epilog=epilog)


def parser_of_run(command: str, description: str, epilog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of a command that takes a finished run."""
    parser = parser_for(command, description, epilog)
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help=A_RUN)
    return parser


def parser_of_results(command: str, description: str) -> argparse.ArgumentParser:
    """Return the parser of a command that takes a results directory."""
    parser = parser_for(command, description)
    parser.add_argument("results_dir", nargs="?", default=Path("results"), type=Path, metavar="RESULTS_DIR")
    return parser


def add_member(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--member", metavar="NAME", help="the task that you mean, if the run has several")


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")


def add_where(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--where",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY=VALUE",
        help="take only runs of this task, method, operating_point, seed, … or setting (method.rank=16); A,B: A or B",
    )


def _number(kind: type, fits: Callable[[float], bool], expected: str) -> Callable[[str], float]:
    """Return what reads an option's number. kind: int or float."""

    def read(value: str) -> float:
        with contextlib.suppress(ValueError):
            if fits(number := kind(value)):
                return number
        raise argparse.ArgumentTypeError(f"expected {expected}, not {value!r}")

    return read


whole = _number(int, lambda number: 0 <= number < 2**32, "a whole number of at least 0")
positive = _number(int, lambda number: 1 <= number < 2**32, "a whole number of at least 1")
port_number = _number(int, lambda number: 0 <= number < 2**16, "a port, 0 to 65535")
temperature = _number(float, lambda number: number == 0 or 1e-3 <= number < math.inf, "0, or a number from 0.001 on")
weight = _number(float, math.isfinite, "a finite number")
share = _number(float, lambda number: 0 < number <= 1, "a share above 0 and at most 1")


@contextlib.contextmanager
def libraries() -> Iterator[None]:
    """Import torch, datasets and their kin inside the block, in the environment they need: no bars, OpenMP threads.

    OpenMP's variables are of this process alone: runs that it starts find their own.
    """
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    with imports.variables(cluster.openmp()), imports.importing():
        yield


def named_run(place: Path) -> FinishedRun:
    """Return the finished run that a user names; of `latest`, say on stderr which one it is."""
    run = finished_run(place)
    if place.name == directory.LATEST:
        test, config = run.result["metrics"]["test"], run.config
        score = test.get(test["primary"])
        shown = f"{score:.4f}" if isinstance(score, (int, float)) else "no number"
        of = f"{config.task.name}, {config.model.name}, {config.method.name}, test {test['primary']} {shown}"
        print(escaped(f"{place}: {of} ({run.directory})"), file=sys.stderr)
    return run
