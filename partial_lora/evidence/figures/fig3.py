"""Figure 3: how training goes, partial beside dense: loss, gradient norm, the gap from train to test, feature drift."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import fmean

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from partial_lora.evidence.dynamics import Cell, gap, measured, read_dynamics, to_measure
from partial_lora.evidence.figures import frames, panels
from partial_lora.runs import NONE, Run
from partial_lora.series import band

NEEDS = "runs of both lora and partial on one task"
METHODS = ("lora", "partial")
POINTS = (NONE, "threshold 0.9", "budget 0.13")
_LOGGED = ("loss", "grad_norm")
_MOST_SEEDS = 3  # of a method that are measured anew for the gap and the drift
_MOST_TASKS = 3
_COLUMNS = [*frames.PLACE, "method", "point", "quantity", "x", "block", "n", "mean", "low", "high"]


def measured_runs(found: Sequence[Run]) -> list[Run]:
    """The runs whose gap and drift the figure shows, for `scripts/dynamics.py`: three seeds that all of a task have."""
    return to_measure(_cells(found, _groups(found)), _MOST_SEEDS)


def _cells(found: Sequence[Run], groups: Sequence[tuple[tuple, pd.DataFrame, list[str]]]) -> list[Cell]:
    """The runs of each group by seed; methods and points of one task and model stand beside each other."""
    return [(key[:-2], {found[run].row["seed"]: found[run] for run in one["run"]}) for key, one, _ in groups]


def _groups(found: Sequence[Run]) -> list[tuple[tuple, pd.DataFrame, list[str]]]:
    """The runs of every method and point on the tasks that are drawn."""
    known = frames.usual(frames.frame(found))
    known = known[known["method"].isin(METHODS) & known["point"].isin(POINTS)]
    groups = []
    for part in _tasks(found, known)[:_MOST_TASKS]:
        by = part.groupby([*frames.PLACE, "method", "point"], sort=True)
        groups += [(key, *frames.settled(cell)) for key, cell in by]
    return groups


def _tasks(found: Sequence[Run], known: pd.DataFrame) -> list[pd.DataFrame]:
    """The tasks that have both lora and partial, first those of which runs were measured anew."""
    both = [part for _, part in frames.places(known) if {"lora", "partial"} <= set(part["method"])]
    return sorted(both, key=lambda part: not any(read_dynamics(found[run].directory) for run in part["run"]))


def numbers(found: Sequence[Run], results_dir: Path) -> pd.DataFrame:
    """Every quantity as mean, lowest and highest over seeds: loss and gradient norm at each step that was logged;
    the test's metric on training and test rows and their difference; linear CKA after each block (x counts from 1).
    """
    rows, notes, unmeasured = [], [], []
    groups = _groups(found)
    for (key, one, said), contents in zip(groups, measured(_cells(found, groups)), strict=True):
        notes += said
        place = dict(zip((*frames.PLACE, "method", "point"), key, strict=True))
        runs = [found[run] for run in one["run"]]
        for logged in _LOGGED:
            points = band([run.record.get("history", []) for run in runs], logged)
            rows += [
                place | {"quantity": logged, "x": x, "n": len(runs), "mean": mean, "low": low, "high": high}
                for x, mean, low, high in points
            ]
        rows += [place | row for row in _measured(list(contents.values()))]
        if not contents:
            unmeasured.append(f"{place['task']} {place['method']}" + f" {place['point']}" * (place["point"] != NONE))
    if unmeasured and rows:
        notes.append(
            f"missing: dynamics.json of {', '.join(unmeasured)}; scripts/dynamics.py {results_dir} --figure fig3"
        )
    return frames.noted(pd.DataFrame(rows, columns=_COLUMNS), notes)


def _measured(contents: Sequence[dict]) -> Iterable[dict]:
    if not contents:
        return
    train, test = zip(*(gap(content) for content in contents), strict=True)
    differences = [one - other for one, other in zip(train, test, strict=True)]
    for quantity, values in (("train", train), ("test", test), ("gap", differences)):
        yield {"quantity": quantity, **_spread(values)}
    for number, block in enumerate(contents[0]["cka"], start=1):
        values = [content["cka"].get(block) for content in contents]
        values = [value for value in values if value is not None]
        if values:
            yield {"quantity": "cka", "x": number, "block": block, **_spread(values)}


def _spread(values: Sequence[float]) -> dict:
    return {"n": len(values), "mean": fmean(values), "low": min(values), "high": max(values)}


def draw(table: pd.DataFrame) -> Figure:
    """A row of four panels a task; lines are means over seeds, bands reach from the lowest seed to the highest."""
    parts = frames.places(table)
    figure, drawn = panels.panels(4 * len(parts), wide=3.3, high=2.7, across=4)
    for number, ((task, model, metric), part) in enumerate(parts):
        loss, norm, both, drift = drawn[4 * number : 4 * number + 4]
        for axes, quantity, said in ((loss, "loss", "training loss"), (norm, "grad_norm", "gradient norm")):
            _lines(axes, part[part["quantity"] == quantity])
            axes.set_ylabel(said, fontsize=9)
            axes.set_xlabel("optimizer step", fontsize=9)
            panels.logarithmic(axes, "y")
        _gaps(both, part, metric)
        _lines(drift, part[part["quantity"] == "cka"])
        drift.set_ylabel("CKA, frozen and trained features", fontsize=9)
        drift.set_xlabel("block", fontsize=9)
        loss.set_title(f"{task}, {model}", fontsize=10, loc="left")
        for axes in (loss, norm, drift):
            panels.plain(axes)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        panels.empty(both, "train" not in set(part["quantity"]))
        panels.empty(drift, "cka" not in set(part["quantity"]))
    panels.legend(figure, list(dict.fromkeys(zip(table["method"], table["point"], strict=True))), lines=True)
    panels.above(figure, "Means over seeds; bands and bars from the lowest seed to the highest")
    return figure


def _lines(axes: Axes, part: pd.DataFrame) -> None:
    for (method, point), line in part.groupby(["method", "point"], sort=False):
        own = panels.look(method, point)
        style = own.markers | {"color": own.color, "linestyle": own.linestyle, "linewidth": 1.2, "markersize": 4}
        axes.plot(line["x"], line["mean"], markevery=max(1, len(line) // 8), **style)
        if (line["n"] > 1).any():
            axes.fill_between(line["x"], line["low"], line["high"], color=own.color, alpha=0.15, linewidth=0)


def _gaps(axes: Axes, part: pd.DataFrame, metric: str) -> None:
    """Every method's score on training rows and on test rows, joined."""
    shown = part[part["quantity"].isin(("train", "test"))]
    names = list(dict.fromkeys(zip(shown["method"], shown["point"], strict=True)))
    for place, (method, point) in enumerate(names):
        own = panels.look(method, point)
        of = shown[(shown["method"] == method) & (shown["point"] == point)].set_index("quantity")
        of = of.loc[["train", "test"]]
        shift = 0.04 * (place - (len(names) - 1) / 2)
        style = own.markers | {"color": own.color, "linestyle": own.linestyle, "linewidth": 1.2, "markersize": 5}
        ends = [of["mean"] - of["low"], of["high"] - of["mean"]]
        axes.errorbar([shift, 1 + shift], of["mean"], yerr=ends, capsize=2, **style)
    axes.set_xticks([0, 1], ["train", "test"])
    axes.set_xlim(-0.3, 1.3)
    panels.scored(axes, metric, said="")
    panels.plain(axes)
