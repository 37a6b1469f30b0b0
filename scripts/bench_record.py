"""Record of a benchmark: its arguments, the machine, its files, and the ratios that have moved since the last commit.

Compared are ratios of what was measured side by side, which depend less on the machine than seconds do. A ratio has
moved where its interval and that of before have nothing in common.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from scipy.stats import bootstrap
from tabulate import tabulate

from partial_lora.files import write_atomic, write_json
from partial_lora.launching import directory

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "results" / "bench"
ENOUGH = 8  # repetitions; an interval resampled from fewer would claim more than it knows

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


def describe_machine(malloc: Sequence[str] = ()) -> dict:
    """Return the machine, the versions and the commit that the numbers were made with."""
    made = directory.new({"seed": 0})
    return {
        "cpu": _cpu_name(),
        "cpus": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "malloc": list(malloc),
        "versions": made["versions"],
        "git_commit": made["git_commit"],
        "uncommitted": _uncommitted(),
        "started": made["started"],
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _uncommitted() -> bool | None:
    """Return True where the measured code or the benchmark differs from the commit; None without git."""
    sources = ("partial_lora/adapter", "partial_lora/masks.py", "scripts/bench_*.py")
    command = ["git", "-C", str(ROOT), "status", "--porcelain", "--", *sources]
    try:
        return bool(subprocess.run(command, capture_output=True, check=True).stdout)
    except (OSError, subprocess.CalledProcessError):
        return None


def where(machine: Mapping, loads: Sequence[float], threads: int, usable: int | None = None) -> str:
    """Return the lines of a page on the machine; usable: its processors that the benchmark could have, if counted."""
    cpus = f"{machine['cpus']} CPUs" if usable is None else f"{usable} of {machine['cpus']} CPUs usable"
    changed = ", with changes not committed" if machine["uncommitted"] else ""
    lines = [
        f"{machine['cpu']}, {cpus}, {machine['capability']}",
        ", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
        f"commit {machine['git_commit']}{changed}; started {machine['started']}",
        f"load average {min(loads):.2f} to {max(loads):.2f}, of which the benchmark is {threads}",
    ]
    return "\n".join(f"- {line}" for line in lines)


def markdown(rows: Sequence[Mapping]) -> str:
    """Rows {column: text} as a Markdown table."""
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


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
