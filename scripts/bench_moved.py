"""Arguments and files of all benchmarks, and the ratios that have moved since the figures committed last.

Compared are ratios of what was measured side by side, which depend less on the machine than seconds do. A ratio has
moved where its interval and that of before have nothing in common.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.stats import bootstrap
from tabulate import tabulate

from partial_lora.files import write_atomic, write_json

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "results" / "bench"
ENOUGH = 8  # repetitions to resample from

Figures = Mapping[str, tuple[float, float, float]]
"""Ratios and the ends of their intervals: {what: (ratio, low, high)}."""


def parsed(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse a benchmark's arguments, --out and --quick among them."""
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--quick", action="store_true", help="something tiny: a test, no measurement")
    options = parser.parse_args(argv)
    if options.quick and options.out == OUT:
        parser.error("--quick measures nothing that is worth keeping: give another folder with --out")
    return options


def write(
    out: Path, name: str, record: Mapping, page: Callable[[Mapping], str], figures: Callable[[Mapping], Figures]
) -> None:
    """Write out/NAME.json and NAME.md, whose last section says which figures have moved."""
    file, out_page = out / f"{name}.json", out / f"{name}.md"
    before = committed(file)
    out.mkdir(parents=True, exist_ok=True)
    write_json(file, record)
    since = section(None if before is None else figures(before), figures(record))
    write_atomic(out_page, f"{page(record)}\n{since}\n")
    print(f"wrote {out_page}")


def committed(file: Path) -> dict | None:
    """Return a record as it is in the last commit; None where it is in none."""
    if not file.resolve().is_relative_to(ROOT):
        return None
    name = file.resolve().relative_to(ROOT).as_posix()
    shown = subprocess.run(["git", "show", f"HEAD:{name}"], cwd=ROOT, capture_output=True, check=False)
    return json.loads(shown.stdout) if shown.returncode == 0 else None


def ratio_of_medians(values: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """Return the ratio of two medians and its interval, of repetitions that took turns (repetitions,).

    The interval is a percentile bootstrap over repetitions, of 95 %; of fewer than ENOUGH the smallest and the largest
    ratio of a repetition, which hold the median of six as often.
    """
    values, others = np.asarray(values), np.asarray(others)

    def quotient(values: np.ndarray, others: np.ndarray, axis: int = -1) -> np.ndarray:
        return np.median(values, axis=axis) / np.median(others, axis=axis)

    if len(values) < ENOUGH:
        ends = (values / others).min(), (values / others).max()
    else:
        settings = {"paired": True, "method": "percentile", "n_resamples": 999, "rng": np.random.default_rng(0)}
        ends = bootstrap((values, others), quotient, **settings).confidence_interval
    return float(quotient(values, others)), float(ends[0]), float(ends[1])


def moved(before: Figures, now: Figures) -> list[str]:
    """Return what has moved, in the order of `now`."""
    return [
        what for what in now if what in before and (before[what][2] < now[what][1] or now[what][2] < before[what][1])
    ]


def section(before: Figures | None, now: Figures) -> str:
    """Return the page's section on what has moved since `before`, the committed figures, if there are any."""
    heading = "## Since the figures committed last\n\n"
    if before is None:
        return heading + "There are none to compare with."
    found, common = moved(before, now), len(before.keys() & now.keys())
    if not found:
        return f"{heading}None of {common} ratios has moved by more than its interval and that of before."
    rows = [
        [what, *(f"{value:.2f} [{low:.2f}, {high:.2f}]" for value, low, high in (before[what], now[what]))]
        for what in found
    ]
    table = tabulate(rows, headers=["ratio", "before", "now"], tablefmt="github")
    return f"{heading}{len(found)} of {common} ratios have moved by more than their intervals:\n\n{table}"
