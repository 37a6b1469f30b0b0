"""What `scripts/dynamics.py` leaves beside a run's record: dynamics.json, read without torch."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Mapping, Sequence
from pathlib import Path

from partial_lora.results import ADAPTER
from partial_lora.runs import Run

DYNAMICS = "dynamics.json"
VERSION = 1
Cell = tuple[Hashable, Mapping[int, Run]]  # runs by seed; of cells that stand beside each other the first is the same


def read_dynamics(directory: Path) -> dict | None:
    """The file's content: metrics by split (train, test), `cka` of every block; None where there is none, or another.

    cka: {block: linear CKA between the features after it in the frozen and in the trained model}.
    """
    try:
        content = json.loads((Path(directory) / DYNAMICS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    whole = isinstance(content, dict) and content.get("version") == VERSION and {"metrics", "cka"} <= content.keys()
    return content if whole else None


def to_measure(cells: Sequence[Cell], most: int) -> list[Run]:
    """The runs to measure: of those that stand beside each other the same seeds, at most so many.

    First come the seeds of which most are measured or have their weights: of a record alone nothing can be measured.
    Where no seed is everywhere, none is left out for that.
    """
    chosen = []
    for _, beside in _beside(cells):
        seeds = set.intersection(*map(set, beside)) or set.union(*map(set, beside))
        lacking = {seed: sum(not _at_hand(cell[seed].directory) for cell in beside if seed in cell) for seed in seeds}
        first = sorted(sorted(seeds, key=lambda seed: (lacking[seed], seed))[:most])
        chosen += [cell[seed] for cell in beside for seed in first if seed in cell]
    return chosen


def measured(cells: Sequence[Cell]) -> list[dict[int, dict]]:
    """What was measured in each cell, by seed: of those that stand beside each other the seeds that all have.

    Of cells that have none in common, or nothing at all, each keeps its own.
    """
    read = [
        (place, {seed: content for seed, run in cell.items() if (content := read_dynamics(run.directory))})
        for place, cell in cells
    ]
    common = {
        place: set.intersection(*some) for place, all_of in _beside(read) if (some := [set(c) for c in all_of if c])
    }
    return [
        {seed: content for seed, content in cell.items() if not common.get(place) or seed in common[place]}
        for place, cell in read
    ]


def _beside(cells: Iterable[tuple[Hashable, Mapping]]) -> list[tuple[Hashable, list[Mapping]]]:
    together: dict[Hashable, list[Mapping]] = {}
    for place, cell in cells:
        together.setdefault(place, []).append(cell)
    return list(together.items())


def _at_hand(directory: Path) -> bool:
    return (Path(directory) / ADAPTER).is_dir() or read_dynamics(directory) is not None


def gap(content: dict) -> tuple[float, float]:
    """The main metric on training rows and on test rows."""
    test = content["metrics"]["test"]
    return float(content["metrics"]["train"][test["primary"]]), float(test[test["primary"]])
