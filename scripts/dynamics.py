"""Measure how far training has moved finished runs: train beside test accuracy, and linear CKA after each block.

    python scripts/dynamics.py results/cpu/runs/digits/vit_s14/partial-1a2b3c4d/seed0
    python scripts/dynamics.py results/cpu --figure fig3        # the runs that figure shows; fig7 likewise
    python scripts/dynamics.py results/cpu --where task=digits --where method=lora,partial

Writes RUN/dynamics.json, which the figures read; a run that has one is left alone. The weights have to be at hand: of a
run that is only a record this says so, and ends with 3 once the others are done. About 20 seconds a run on one core.
"""

from __future__ import annotations

import argparse
import sys
from itertools import chain
from pathlib import Path

from evidence.dynamics import DYNAMICS, measure, read_dynamics

from partial_lora.errors import PartialLoraError
from partial_lora.finished.run import finished_run
from partial_lora.launching import imports
from partial_lora.report import records

FIGURES = ("fig3", "fig7")
MISSING = 3  # how the command ends where some could not be measured; a traceback ends with 1


def chosen(place: Path, where: list[str], figure: str | None) -> list[Path]:
    """The directories of runs to measure: the one named, or those under a results directory."""
    if not (place / "runs").is_dir():
        return [place]
    directories = [run.directory for run in records.where(records.read(place)[0], where)]
    if figure is None:
        return directories
    from evidence.figures import measured_runs  # and matplotlib

    return [run.directory for run in measured_runs(figure, place, directories)]


def main(arguments: list[str]) -> int:
    """Measure every run that has not been; gives the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("places", nargs="+", type=Path, metavar="DIR", help="a run, or a results directory")
    parser.add_argument("--figure", choices=FIGURES, help="of a results directory, the runs that it shows")
    parser.add_argument("--where", action="append", default=[], metavar="KEY=VALUE", help="of a results directory")
    options = parser.parse_args(arguments)
    imports.refuse_hub_code()
    missing = False
    try:
        each = [chosen(place, options.where, options.figure) for place in options.places]
    except PartialLoraError as error:
        print(error, file=sys.stderr)
        return 2
    for directory in chain.from_iterable(each):
        if read_dynamics(directory):
            continue
        try:
            run = finished_run(directory)
            import datasets  # and torch, for those who measure

            datasets.disable_progress_bars()
            content = measure(run)
            last = list(content["cka"].values())[-1]
            print(f"{directory / DYNAMICS}: CKA after the last block {last:.3f}", flush=True)
        except PartialLoraError as error:
            missing = True
            print(error, file=sys.stderr)
    return MISSING if missing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
