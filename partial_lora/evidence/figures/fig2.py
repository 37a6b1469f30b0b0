"""Figure 2: where calibration leaves adapters sparse: by depth and kind of module, over tasks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, PercentFormatter

from partial_lora.errors import PartialLoraError
from partial_lora.evidence.figures import frames, panels
from partial_lora.evidence.recorded import BESIDE
from partial_lora.places import AXES, grid
from partial_lora.runs import NONE, Run, read

NEEDS = "calibrated runs at a threshold"
POINT = "threshold 0.9"
_SAID = {"rows": "rows of B", "columns": "columns of A"}
_MOST_MODELS, _MOST_TASKS = 3, 9


def numbers(found: Sequence[Run], results_dir: Path) -> pd.DataFrame:
    """The sparsity of every module and axis: mean, lowest and highest over a task's seeds.

    kind: the module's name without its place; depth: its block, counted from 0. All runs that share a calibration
    have its sparsities but for controls that move them, so those of partial count, if there are any.
    """
    found = [*found, *(run for name in BESIDE.get(results_dir.name, ()) for run in _runs(results_dir.parent / name))]
    known = frames.usual(frames.frame(found))
    known = known[known["point"].str.startswith("threshold")]
    point = POINT if (known["point"] == POINT).any() or known.empty else known["point"].mode().iloc[0]
    rows, notes = [], []
    if point != POINT and not known.empty:
        notes.append(f"no runs at {POINT}: drawn at {point}")
    for (task, model, _), part in frames.places(known[known["point"] == point]):
        usual = part[part["method"] == "partial"]
        usual = usual if len(usual) else part[part["method"].isin(("targeted", "flow"))]
        if usual.empty:
            notes.append(f"missing: {task}, {model}, runs of partial, targeted or flow")
            continue
        one, said = frames.settled(usual)
        notes += said
        sparsities = [each for run in one["run"] if (each := found[run].record.get("sparsity"))]
        rows += [{"task": task, "model": model, "point": point} | row for row in _cells(sparsities)]
    tasks = {row["task"] for row in rows}
    if len(tasks) == 1:
        notes.append(f"missing: tasks other than {tasks.pop()}")
    return frames.noted(pd.DataFrame(rows), notes)


def _runs(place: Path) -> list[Run]:
    try:
        return read(place)[0]
    except PartialLoraError:  # there are none
        return []


def _cells(sparsities: Sequence[dict]) -> list[dict]:
    """A row for every kind of module, depth and axis."""
    if not sparsities:
        return []
    alike = [each for each in sparsities if each.keys() == sparsities[0].keys()]
    grids = [grid(each) for each in alike]
    kinds, depths, _ = grids[0]
    rows = []
    for axis in AXES:
        for line, kind in enumerate(kinds):
            for place, depth in enumerate(depths):
                values = [float(cells[axis][line, place]) for _, _, cells in grids]
                if values[0] == values[0]:
                    spread = {"mean": sum(values) / len(values), "low": min(values), "high": max(values)}
                    number = ".".join(map(str, depth)) or NONE
                    rows.append(
                        {"kind": kind, "axis": axis, "depth": place, "block": number, "n": len(values)} | spread
                    )
    return rows


def draw(table: pd.DataFrame) -> Figure:
    """Of every model: means over tasks by depth, a line a kind; bands over tasks; tasks beside."""
    models = list(table.groupby("model", sort=False))[:_MOST_MODELS]
    figure, drawn = panels.panels(3 * len(models), wide=4.0, high=3.0, across=3)
    for number, (model, part) in enumerate(models):
        pair, beside = drawn[3 * number : 3 * number + 2], drawn[3 * number + 2]
        kinds = list(part["kind"].unique())
        for axes, axis in zip(pair, AXES, strict=True):
            for place, kind in enumerate(kinds):
                _by_depth(axes, part[(part["axis"] == axis) & (part["kind"] == kind)], place)
            axes.set_title(f"{model}: {_SAID[axis]}", fontsize=10, loc="left")
            axes.set_xlabel("depth (block)", fontsize=9)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            _of_shares(axes)
        pair[0].set_ylabel(f"sparsity at {part['point'].iloc[0]}", fontsize=9)
        _by_task(beside, part)
        handles = [Line2D([], [], label=kind, **_style(place)) for place, kind in enumerate(kinds)]
        pair[0].legend(handles=handles, fontsize=6.5, frameon=False, loc="best")
    panels.above(figure, "Lines: means over tasks; bands: from the lowest task to the highest")
    return figure


def _style(place: int) -> dict:
    color, marker = panels.COLOURS[place % len(panels.COLOURS)], panels.MARKERS[place % len(panels.MARKERS)]
    return {"color": color, "marker": marker, "linestyle": ("-", "--", "-.", ":")[place % 4], "markersize": 4}


def _by_depth(axes: Axes, part: pd.DataFrame, place: int) -> None:
    over = part.groupby("depth")["mean"].agg(["mean", "min", "max"])
    style = _style(place)
    axes.plot(over.index, over["mean"], linewidth=1.3, **style)
    if part["task"].nunique() > 1:
        axes.fill_between(over.index, over["min"], over["max"], color=style["color"], alpha=0.1, linewidth=0)


def _by_task(axes: Axes, part: pd.DataFrame) -> None:
    """The mean over depth of every kind and axis, a row a task."""
    tasks = list(part["task"].unique())[:_MOST_TASKS]
    for place, kind in enumerate(part["kind"].unique()):
        for axis, shift in zip(AXES, (-0.15, 0.15), strict=True):
            of_kind = part[(part["kind"] == kind) & (part["axis"] == axis)].groupby("task")["mean"].mean()
            style = _style(place) | {"linestyle": "", "markersize": 5.5}
            face = style["color"] if axis == "rows" else "white"
            rows = [number + shift for number in range(len(tasks))]
            axes.plot([of_kind.get(task) for task in tasks], rows, markerfacecolor=face, **style)
    axes.set_yticks(range(len(tasks)), tasks)
    axes.set_ylim(len(tasks) - 0.5, -0.5)
    axes.set_title("means over depth; open: columns", fontsize=10, loc="left")
    _of_shares(axes, "x")


def _of_shares(axes: Axes, axis: str = "y") -> None:
    getattr(axes, f"set_{axis}lim")(-0.02, 1)
    getattr(axes, f"{axis}axis").set_major_formatter(PercentFormatter(1))
    panels.plain(axes)
