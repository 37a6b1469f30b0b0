"""Figure 1: test score against trainable parameters, as the threshold of calibration moves, with controls."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from partial_lora.evidence.figures import frames, panels
from partial_lora.runs import Run

NEEDS = "runs of partial at two operating points"
CONTROLS = ("partial", "uniform", "low_rank", "targeted", "shuffled", "inverted", "random_weights")
DENSE = ("lora", "probe")
SWEPT = ("partial", "uniform", "low_rank")
_BESIDE = 1.03  # that much larger than the one before it is drawn what has the same size
THRESHOLDS = {  # of the experiment: for each task what is swept over which
    "digits": (SWEPT, (0.5, 0.7, 0.8, 0.9)),
    "flowers17": (("partial",), (0.7, 0.8, 0.9)),
}


def numbers(found: Sequence[Run], results_dir: Path) -> pd.DataFrame:
    """Means over seeds of every method and operating point, of the tasks on which partial has three points at least.

    Where none has three, two are enough.
    """
    known = frames.usual(frames.frame(found))
    known = known[known["method"].isin((*CONTROLS, *DENSE))]
    table, notes = frames.means(known, [*frames.PLACE, "method", "point"])
    parts = [(part, (part["method"] == "partial").sum()) for _, part in frames.places(table)]
    least = 3 if any(points > 2 for _, points in parts) else 2
    enough = [part for part, points in parts if points >= least]
    fewer = [part["task"].iloc[0] for part, points in parts if 1 < points < least]
    notes += [f"not drawn: {', '.join(fewer)}, which have two points"] if fewer else []
    table = pd.concat([table.iloc[:0], *enough])
    return frames.noted(table, [*notes, *_missing(table, set(known["task"]))])


def _missing(table: pd.DataFrame, tasks: set[str]) -> list[str]:
    """The thresholds that the experiment has for these tasks and the runs lack."""
    notes = []
    for task, (methods, wanted) in THRESHOLDS.items():
        if task not in tasks:
            continue
        of_task = table[table["task"] == task]
        for method in methods:
            there = set(of_task.loc[of_task["method"] == method, "point"])
            lacking = [f"{threshold:g}" for threshold in wanted if f"threshold {threshold:g}" not in there]
            if lacking:
                notes.append(f"missing: {task}, {method}, threshold {', '.join(lacking)}")
    return notes


def draw(table: pd.DataFrame) -> Figure:
    """A panel a task: the line joins partial's thresholds, open markers are budgets, bars one standard deviation."""
    parts = frames.places(table)[: panels.MOST]
    figure, drawn = panels.panels(len(parts), wide=4.4, high=3.4, least=6.5)
    for axes, ((task, model, metric), part) in zip(drawn, parts, strict=True):
        panels.level(axes, part[part["method"] == "lora"], "lora")
        drawn_here = [method for method in CONTROLS if (part["method"] == method).any()]
        for place, method in enumerate(drawn_here):
            own = part[part["method"] == method]
            beside = own["parameters"] * _BESIDE ** (place - (len(drawn_here) - 1) / 2)
            panels.swept(axes, own.assign(parameters=beside), method, "parameters", joined=method in SWEPT)
        for row in part[part["method"] == "partial"].itertuples():
            panels.below(axes, row.parameters, row.point.partition(" ")[2])
        _head_alone(axes, part)
        axes.set_xscale("log")
        panels.in_thousands(axes, part.loc[part["parameters"] > 0, "parameters"])
        axes.set_xlabel("trainable parameters of the adapter", fontsize=9)
        panels.scored(axes, metric)
        axes.set_title(f"{task}, {model} ({panels.seeds(part)})", fontsize=10, loc="left")
        panels.plain(axes)
    there = [method for method in (*CONTROLS, "lora") if (table["method"] == method).any()]
    panels.legend(figure, [(method, "–") for method in there], lines=False)
    panels.above(
        figure,
        "Filled: thresholds, open: budgets (partial's are the numbers below); bars: one standard deviation over seeds; "
        "what has the same size is drawn side by side",
    )
    return figure


def _head_alone(axes: Axes, part: pd.DataFrame) -> None:
    """What no adapter gives, in words: as a line it would leave the others a strip of the panel."""
    for row in part[part["method"] == "probe"].itertuples():
        said = f"{row.mean:.1%}" if row.metric in panels.SHARES else f"{row.mean:.3f}"
        axes.text(0.99, 0.06, f"head alone: {said}", transform=axes.transAxes, fontsize=7, ha="right", color="0.25")
