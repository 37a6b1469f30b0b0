"""Figures 1 to 7: for each the numbers, out of what runs have left behind, and how they are drawn.

    python scripts/paper_figures.py fig1 fig4 --results results/cpu
    python scripts/paper_figures.py fig3 --results results/cpu --runs    # whose dynamics it shows (scripts/dynamics.py)

Writes RESULTS/figures/NAME.svg and .csv, the numbers. `make reproduce-NAME` trains what a figure is of.
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import textwrap
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from statistics import fmean

import numpy as np
import pandas as pd
from comparable import BESIDE, BUDGET, POINTS, THRESHOLD, analyses, collect, settled, usual
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullFormatter,
    NullLocator,
    PercentFormatter,
    ScalarFormatter,
)

from partial_lora import cli
from partial_lora.errors import one_of, require
from partial_lora.files import grouped, write_atomic
from partial_lora.launching import directory as results
from partial_lora.launching.packs import dynamics
from partial_lora.masks import AXES
from partial_lora.report.depth import grid
from partial_lora.report.drawing import COLOURS, MARKERS, heat, legend, look, panels, plain, save, scored, sized
from partial_lora.report.figures import MOST, band
from partial_lora.report.records import Run
from partial_lora.report.rows import NONE
from partial_lora.report.statistics import half_interval
from partial_lora.report.summary import size_text
from partial_lora.tasks.metrics import SHARES

PLACE = ["task", "model", "metric"]
Numbers = tuple[pd.DataFrame, list[str]]
Cell = tuple[Hashable, Mapping[int, Run]]  # runs by seed; cells with the same first stand beside each other
_DASHES = ("-", "--", "-.", ":")
_MOST_SEEDS = 3  # of a method that are measured for the gap and the drift
_LETTERS = 14  # of nine points that an inch holds


@dataclass(frozen=True)
class Spec:
    """A figure: its numbers out of the usual runs of a results directory, and how they are drawn.

    needs: what there has to be at all. varied: the settings that its runs differ in. beside: whether runs that lie
    beside the preset's are its, too.
    """

    numbers: Callable[[pd.DataFrame, Path], Numbers]
    draw: Callable[[pd.DataFrame], Figure]
    needs: str
    varied: Collection[str] = ()
    beside: bool = False


def make(name: str, results_dir: Path) -> list[Path]:
    """Draw a figure from the runs under results_dir, as its figures/NAME.svg and .csv; gives the files.

    What is left out is printed. Where there is nothing to draw, files of an earlier time go.
    """
    spec, folder = FIGURES[name], results_dir / "figures"
    known, left_out = runs_of(name, results_dir)
    frame, notes = spec.numbers(known, results_dir)
    notes = [f"{name}: {note}" for note in dict.fromkeys(notes)]
    lacking = [f"{name}: no {spec.needs} in {results_dir}; make reproduce-{name}"] if frame.empty else []
    for line in (*notes, *(f"{name}: {note}" for note in left_out), *lacking):
        print(line)
    if frame.empty:
        for old in folder.glob(f"{name}.*"):
            old.unlink()
        return []
    folder.mkdir(parents=True, exist_ok=True)
    file = save(spec.draw(frame), folder / f"{name}.svg")
    above = [shlex.join(["python", "scripts/paper_figures.py", name, "--results", str(results_dir)]), *notes]
    write_atomic(folder / f"{name}.csv", "".join(f"# {line}\n" for line in above) + frame.to_csv(index=False))
    return [file, folder / f"{name}.csv"]


def runs_of(name: str, results_dir: Path) -> tuple[pd.DataFrame, list[str]]:
    """The runs of one task that a figure is of, and what was left out, a line each.

    Mixtures are table 6's: as one more task they would count their members twice.
    """
    spec = FIGURES[name]
    beside = BESIDE.get(results_dir.name, ()) if spec.beside else ()
    runs, problems = collect(results_dir, *(results_dir.parent / each for each in beside))
    runs = runs[runs["mixture"] == ""]
    if "importance.name" not in spec.varied:
        runs = runs[runs["importance"].isin(("svd", NONE))]
    known, notes = usual(runs, spec.varied)
    few = problems[:3] + ([f"and {len(problems) - 3} more"] if len(problems) > 3 else [])
    notes += [f"left out, as no finished runs: {'; '.join(few)}"] if problems else []
    names = {"operating_point": "point", "adapter_parameters": "parameters", "share_of_dense": "share"}
    return known.rename(columns=names | {"adapter_sparsity": "sparsity"}), notes


def measured_runs(name: str, results_dir: Path) -> list[Run]:
    """The runs whose gap and drift a figure shows: the same three seeds of each method."""
    known, _ = runs_of(name, results_dir)
    return to_measure(_by_seed(MEASURED[name](known)), _MOST_SEEDS)


# What scripts/dynamics.py has measured of runs


def gap(content: Mapping) -> tuple[float, float]:
    """The main metric on training rows and on test rows."""
    test = content["metrics"]["test"]
    return float(content["metrics"]["train"][test["primary"]]), float(test[test["primary"]])


def to_measure(cells: Sequence[Cell], most: int) -> list[Run]:
    """The runs to measure: of those that stand beside each other the same seeds, at most so many.

    First come the seeds of which most are measured or have their weights: of a record alone nothing can be measured.
    Where no seed is everywhere, none is left out for that.
    """

    def at_hand(run: Run) -> bool:
        return (run.directory / results.ADAPTER).is_dir() or dynamics(run.directory) is not None

    chosen = []
    for beside in _beside(cells).values():
        seeds = set.intersection(*map(set, beside)) or set.union(*map(set, beside))
        lacking = {seed: sum(not at_hand(cell[seed]) for cell in beside if seed in cell) for seed in seeds}
        first = sorted(sorted(seeds, key=lambda seed: (lacking[seed], seed))[:most])
        chosen += [cell[seed] for cell in beside for seed in first if seed in cell]
    return chosen


def measured(cells: Sequence[Cell]) -> list[dict[int, dict]]:
    """Return the measurements of each cell by seed; cells that stand beside each other have the same seeds.

    Of cells that have none in common, or nothing at all, each keeps its own.
    """
    contents = [
        (place, {seed: content for seed, run in cell.items() if (content := dynamics(run.directory))})
        for place, cell in cells
    ]
    common = {
        place: set.intersection(*seeds)
        for place, beside in _beside(contents).items()
        if (seeds := [set(cell) for cell in beside if cell])
    }
    return [
        {seed: content for seed, content in cell.items() if not common.get(place) or seed in common[place]}
        for place, cell in contents
    ]


def _beside(cells: Iterable[tuple[Hashable, Mapping]]) -> dict[Hashable, list[Mapping]]:
    return {place: [cell for _, cell in of] for place, of in grouped(cells, itemgetter(0)).items()}


# Means over seeds

Group = tuple[dict, pd.DataFrame, list[str]]  # what its runs have in common, one run a seed, notes on others


def groups(known: pd.DataFrame, by: Sequence[str]) -> list[Group]:
    """The runs that agree in the columns `by`, settled."""
    parts = []
    for key, cell in known.groupby(list(by), sort=False, dropna=False):
        one, notes = settled(cell.rename(columns={"point": "operating_point"}))
        parts.append((dict(zip(by, key, strict=True)), one.sort_values("seed"), notes))
    return parts


def _by_seed(parts: Sequence[Group]) -> list[Cell]:
    """The runs of each group by seed; methods and points under one condition stand beside each other."""
    return [
        (
            tuple(value for name, value in where.items() if name not in ("method", "point")),
            dict(zip(one["seed"], one["run"], strict=True)),
        )
        for where, one, _ in parts
    ]


def means(known: pd.DataFrame, by: Sequence[str]) -> Numbers:
    """Means over seeds of the runs that agree in the columns `by`.

    n, seeds; mean, std (the sample's, NaN of one run) and half the 95 % interval (Student's t) of the test score;
    parameters, share of the dense adapter and sparsity as means. Of a task and model all means are over the seeds that
    all of them have, if these are two at least: scores of unlike seeds differ by the seeds, too.
    """
    parts = groups(known, by)
    seeds: dict[tuple, set[int]] = {}
    for where, one, _ in parts:
        place = tuple(where[name] for name in PLACE)
        seeds[place] = seeds.get(place, set(one["seed"])) & set(one["seed"])
    rows = []
    for where, one, _ in parts:
        common = seeds[tuple(where[name] for name in PLACE)]
        one = one[one["seed"].isin(common)] if len(common) > 1 else one
        std = float(one["test"].std())
        rows.append(
            where
            | {"n": len(one), "seeds": " ".join(map(str, one["seed"])), "mean": float(one["test"].mean())}
            | {"std": std, "half": half_interval(std, len(one))}
            | {name: float(one[name].mean()) for name in ("parameters", "share", "sparsity")}
        )
    columns = [*by, "n", "seeds", "mean", "std", "half", "parameters", "share", "sparsity"]
    return pd.DataFrame(rows, columns=columns), [note for *_, notes in parts for note in notes]


def places(table: pd.DataFrame) -> list[tuple[tuple[str, str, str], pd.DataFrame]]:
    """The tables of every task, model and metric: digits, which needs no data set, first, then by name."""
    return sorted(table.groupby(PLACE, sort=True), key=lambda each: (each[0][0] != "digits", each[0]))


def _of_places(table: pd.DataFrame, parts: Iterable[pd.DataFrame]) -> pd.DataFrame:
    return pd.concat([table.iloc[:0], *parts]).reset_index(drop=True)


def _budget(point: str) -> float:
    """The number of a budget; NaN of another point."""
    name, _, number = point.partition(" ")
    return float(number.replace(",", "")) if name == "budget" else math.nan


# What figures draw alike


def swept(axes: Axes, part: pd.DataFrame, method: str, x: str, *, joined: bool) -> None:
    """A method's points over x with one standard deviation; those of thresholds are filled and joined by a line."""
    for kind, of_kind in part.groupby(part["point"].str.split(" ").str[0]):
        own, of_kind = look(method, kind), of_kind.sort_values(x)
        line = own.linestyle if joined and len(of_kind) > 1 else ""
        style = own.markers | {"color": own.color, "linestyle": line, "linewidth": 1.3, "markersize": 6}
        axes.errorbar(of_kind[x], of_kind["mean"], yerr=of_kind["std"], capsize=2, elinewidth=0.9, **style)


def level(axes: Axes, part: pd.DataFrame, method: str) -> None:
    """A method that is the same everywhere, as a level line; its own size where it has one, marked on the line."""
    own = look(method, NONE)
    for row in part.itertuples():
        axes.axhline(row.mean, color=own.color, linestyle=":", linewidth=1.1, zorder=0)
        if row.parameters > 0:
            style = own.markers | {"color": own.color, "markersize": 6}
            axes.errorbar([row.parameters], [row.mean], yerr=[row.std], capsize=2, elinewidth=0.9, **style)


def above(figure: Figure, text: str) -> None:
    """Draw the legend of markers, lines and bars over all panels, in as many lines as its width needs."""
    unbroken = text.replace(" %", "\N{NO-BREAK SPACE}%")
    figure.suptitle(textwrap.fill(unbroken, int(_LETTERS * figure.get_figwidth())), fontsize=9)


def title(axes: Axes, place: tuple[str, str, str], part: pd.DataFrame) -> None:
    """The task, the model and of how many seeds the means are."""
    least, most = int(part["n"].min()), int(part["n"].max())
    seeds = f"{most} seed{'s' * (most > 1)}" if least == most else f"{least} to {most} seeds"
    axes.set_title(f"{place[0]}, {place[1]} ({seeds})", fontsize=10, loc="left")


def empty(axes: Axes, nothing: bool, text: str = "not measured yet") -> None:
    """Write in a panel that there is nothing in it."""
    if nothing:
        axes.text(0.5, 0.5, text, transform=axes.transAxes, ha="center", va="center", fontsize=9, color="0.4")
        axes.set_yticks([])
        axes.set_xticks([])


def _style(place: int) -> dict:
    return {
        "color": COLOURS[place % len(COLOURS)],
        "marker": MARKERS[place % len(MARKERS)],
        "linestyle": _DASHES[place % 4],
    }


# Figure 1: test score against trainable parameters, as the threshold of calibration moves, with controls

_SIZED = ("partial", "uniform", "low_rank", "targeted", "shuffled", "inverted", "random_weights")
_JOINED = ("partial", "uniform", "low_rank")
_NO_POINT = ("lora", "probe")


def fig1(known: pd.DataFrame, results_dir: Path) -> Numbers:
    """Means over seeds of every method and operating point, of the tasks on which partial has three points at least.

    Where none has three, two are enough.
    """
    known = known[known["method"].isin((*_SIZED, *_NO_POINT))]
    table, notes = means(known, [*PLACE, "method", "point"])
    parts = [(part, (part["method"] == "partial").sum()) for _, part in places(table)]
    least = 3 if any(points > 2 for _, points in parts) else 2
    fewer = [part["task"].iloc[0] for part, points in parts if 1 < points < least]
    notes += [f"not drawn: {', '.join(fewer)}, which have two points"] if fewer else []
    table = _of_places(table, [part for part, points in parts if points >= least])
    return table, notes


def draw_fig1(table: pd.DataFrame) -> Figure:
    """A panel a task: the line joins partial's thresholds, open markers are budgets, bars one standard deviation."""
    parts = places(table)[:MOST]
    figure, drawn = panels(len(parts), wide=4.4, high=3.4, least=6.5)
    for axes, (place, part) in zip(drawn, parts, strict=True):
        level(axes, part[part["method"] == "lora"], "lora")
        methods = [method for method in _SIZED if (part["method"] == method).any()]
        for number, method in enumerate(methods):
            own = part[part["method"] == method]
            beside = own["parameters"] * 1.03 ** (number - (len(methods) - 1) / 2)
            swept(axes, own.assign(parameters=beside), method, "parameters", joined=method in _JOINED)
        small = {"fontsize": 6.5, "color": "0.25", "ha": "center", "va": "bottom"}
        for row in part[part["method"] == "partial"].itertuples():
            axes.text(row.parameters, 0.01, row.point.partition(" ")[2], transform=axes.get_xaxis_transform(), **small)
        for row in part[part["method"] == "probe"].itertuples():  # as a line it would leave the others a strip
            text = f"head alone: {row.mean:.1%}" if row.metric in SHARES else f"head alone: {row.mean:.3f}"
            axes.text(0.99, 0.06, text, transform=axes.transAxes, fontsize=7, ha="right", color="0.25")
        sizes = part.loc[part["parameters"] > 0, "parameters"]
        sized(axes, sizes, "trainable parameters of the adapter")
        scored(axes, place[2])
        title(axes, place, part)
        plain(axes)
    there = [method for method in (*_SIZED, "lora") if (table["method"] == method).any()]
    legend(figure, [(method, NONE) for method in there], lines=False)
    above(
        figure,
        "Filled: thresholds, open: budgets (partial's are the numbers below); bars: one standard deviation over seeds; "
        "what has the same size is drawn side by side",
    )
    return figure


# Figure 2: where calibration leaves adapters sparse: by depth and kind of module, over tasks

_AXES = {"rows": "rows of B", "columns": "columns of A"}
_MOST_MODELS, _MOST_TASKS = 3, 9


def fig2(known: pd.DataFrame, results_dir: Path) -> Numbers:
    """The sparsity of every module and axis: mean, lowest and highest over a task's seeds.

    kind: the module's name without its place; depth: its block, counted from 0. All runs that share a calibration
    have its sparsities but for controls that move them, so those of partial count, if there are any.
    """
    rows, notes = [], []
    for (task, model, _), part in places(known[known["point"] == THRESHOLD]):
        own = part[part["method"] == "partial"]
        own = own if len(own) else part[part["method"].isin(("targeted", "flow"))]
        if own.empty:
            continue
        ((_, one, left_out),) = groups(own, PLACE)
        notes += left_out
        sparsities = [each for run in one["run"] if (each := run.record.get("sparsity"))]
        grids = [grid(each) for each in sparsities if each.keys() == sparsities[0].keys()]
        for axis in AXES if grids else ():
            for line, kind in enumerate(grids[0][0]):
                for column, depth in enumerate(grids[0][1]):
                    values = [float(cells[axis][line, column]) for _, _, cells in grids]
                    if math.isnan(values[0]):
                        continue
                    where = {"task": task, "model": model, "point": THRESHOLD, "kind": kind, "axis": axis}
                    where |= {"depth": column, "block": ".".join(map(str, depth)) or NONE, "n": len(values)}
                    spread = {"mean": sum(values) / len(values), "low": min(values), "high": max(values)}
                    rows.append(where | spread)
    return pd.DataFrame(rows), notes


def draw_fig2(table: pd.DataFrame) -> Figure:
    """Of every model: means over tasks by depth, a line a kind; bands over tasks; tasks beside."""
    models = list(table.groupby("model", sort=False))[:_MOST_MODELS]
    figure, drawn = panels(3 * len(models), wide=4.0, high=3.0, across=3)
    for number, (model, part) in enumerate(models):
        pair, beside = drawn[3 * number : 3 * number + 2], drawn[3 * number + 2]
        kinds = list(part["kind"].unique())
        for axes, axis in zip(pair, AXES, strict=True):
            for place, kind in enumerate(kinds):
                own = part[(part["axis"] == axis) & (part["kind"] == kind)]
                over, style = own.groupby("depth")["mean"].agg(["mean", "min", "max"]), _style(place)
                axes.plot(over.index, over["mean"], linewidth=1.3, markersize=4, **style)
                if own["task"].nunique() > 1:
                    axes.fill_between(
                        over.index, over["min"], over["max"], color=style["color"], alpha=0.1, linewidth=0
                    )
            axes.set_title(f"{model}: {_AXES[axis]}", fontsize=10, loc="left")
            axes.set_xlabel("depth (block)", fontsize=9)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.set_ylim(-0.02, 1)
            axes.yaxis.set_major_formatter(PercentFormatter(1))
            plain(axes)
        pair[0].set_ylabel(f"sparsity at {THRESHOLD}", fontsize=9)
        _by_task(beside, part)
        handles = [Line2D([], [], label=kind, markersize=4, **_style(place)) for place, kind in enumerate(kinds)]
        pair[0].legend(handles=handles, fontsize=6.5, frameon=False, loc="best")
    above(figure, "Lines: means over tasks; bands: from the lowest task to the highest")
    return figure


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
    axes.set_xlim(-0.02, 1)
    axes.xaxis.set_major_formatter(PercentFormatter(1))
    plain(axes)


# Figure 3: how training goes, partial beside dense: loss, gradient norm, the gap from train to test, feature drift


def fig3(known: pd.DataFrame, results_dir: Path) -> Numbers:
    """Every quantity as mean, lowest and highest over seeds: loss and gradient norm at each step that was logged;
    the test's metric on training and test rows and their difference; linear CKA after each block (x counts from 1).
    """
    rows, notes = [], []
    parts = _groups_of_fig3(known)
    for (where, one, left_out), contents in zip(parts, measured(_by_seed(parts)), strict=True):
        notes += left_out
        for logged in ("loss", "grad_norm"):
            points = band([run.record.get("history", []) for run in one["run"]], logged)
            rows += [
                where | {"quantity": logged, "x": x, "n": len(one), "mean": mean, "low": low, "high": high}
                for x, mean, low, high in points
            ]
        rows += [where | row for row in _measured_rows(list(contents.values()))]
    columns = [*PLACE, "method", "point", "quantity", "x", "block", "n", "mean", "low", "high"]
    return pd.DataFrame(rows, columns=columns), notes


def _groups_of_fig3(known: pd.DataFrame) -> list[Group]:
    """The runs of every method and point on three tasks that have both, first those of which runs were measured."""
    known = known[known["method"].isin(("lora", "partial")) & known["point"].isin((NONE, *POINTS))]
    both = [part for _, part in places(known) if {"lora", "partial"} <= set(part["method"])]
    both.sort(key=lambda part: not any(dynamics(run.directory) for run in part["run"]))
    by = ["method", "point"]
    return [group for part in both[:3] for group in groups(part.sort_values(by, kind="stable"), [*PLACE, *by])]


def _measured_rows(contents: Sequence[dict]) -> Iterable[dict]:
    if not contents:
        return
    train, test = zip(*map(gap, contents), strict=True)
    gaps = [one - other for one, other in zip(train, test, strict=True)]
    quantities = [({"quantity": name}, values) for name, values in (("train", train), ("test", test), ("gap", gaps))]
    for number, block in enumerate(contents[0]["cka"], start=1):
        values = [value for content in contents if (value := content["cka"].get(block)) is not None]
        quantities.append(({"quantity": "cka", "x": number, "block": block}, values))
    for where, values in quantities:
        if values:
            yield where | {"n": len(values), "mean": fmean(values), "low": min(values), "high": max(values)}


def draw_fig3(table: pd.DataFrame) -> Figure:
    """A row of four panels a task; lines are means over seeds, bands reach from the lowest seed to the highest."""
    parts = places(table)
    figure, drawn = panels(4 * len(parts), wide=3.3, high=2.7, across=4)
    for number, ((task, model, metric), part) in enumerate(parts):
        loss, norm, both, drift = drawn[4 * number : 4 * number + 4]
        for axes, quantity, label in ((loss, "loss", "training loss"), (norm, "grad_norm", "gradient norm")):
            _lines(axes, part[part["quantity"] == quantity])
            axes.set_ylabel(label, fontsize=9)
            axes.set_xlabel("optimizer step", fontsize=9)
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        _gaps(both, part, metric)
        _lines(drift, part[part["quantity"] == "cka"])
        drift.set_ylabel("CKA, frozen and trained features", fontsize=9)
        drift.set_xlabel("block", fontsize=9)
        loss.set_title(f"{task}, {model}", fontsize=10, loc="left")
        for axes in (loss, norm, drift):
            plain(axes)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        empty(both, "train" not in set(part["quantity"]))
        empty(drift, "cka" not in set(part["quantity"]))
    legend(figure, list(dict.fromkeys(zip(table["method"], table["point"], strict=True))), lines=True)
    above(figure, "Means over seeds; bands and bars from the lowest seed to the highest")
    return figure


def _lines(axes: Axes, part: pd.DataFrame) -> None:
    for (method, point), line in part.groupby(["method", "point"], sort=False):
        own = look(method, point)
        style = own.markers | {"color": own.color, "linestyle": own.linestyle, "linewidth": 1.2, "markersize": 4}
        axes.plot(line["x"], line["mean"], markevery=max(1, len(line) // 8), **style)
        if (line["n"] > 1).any():
            axes.fill_between(line["x"], line["low"], line["high"], color=own.color, alpha=0.15, linewidth=0)


def _gaps(axes: Axes, part: pd.DataFrame, metric: str) -> None:
    """Every method's score on training rows and on test rows, joined."""
    shown = part[part["quantity"].isin(("train", "test"))]
    names = list(dict.fromkeys(zip(shown["method"], shown["point"], strict=True)))
    for place, (method, point) in enumerate(names):
        own = look(method, point)
        ends = shown[(shown["method"] == method) & (shown["point"] == point)].set_index("quantity")
        ends = ends.loc[["train", "test"]]
        shift = 0.04 * (place - (len(names) - 1) / 2)
        style = own.markers | {"color": own.color, "linestyle": own.linestyle, "linewidth": 1.2, "markersize": 5}
        bars = [ends["mean"] - ends["low"], ends["high"] - ends["mean"]]
        axes.errorbar([shift, 1 + shift], ends["mean"], yerr=bars, capsize=2, **style)
    axes.set_xticks([0, 1], ["train", "test"])
    axes.set_xlim(-0.3, 1.3)
    scored(axes, metric, metric)
    plain(axes)


# Figure 4: a small dense adapter or a large sparse one: rank against sparsity at equal trainable parameters

_OF_EQUAL_SIZE = ("partial", "low_rank")


def fig4(known: pd.DataFrame, results_dir: Path) -> Numbers:
    """Means over seeds by rank; `level` is the size that runs share: of those of one size there are two ranks at least.

    low_rank is the end of a level where nothing is sparse: dense, of about the rank that its parameters come to.
    """
    known = known[known["method"].isin(_OF_EQUAL_SIZE) & known["point"].str.startswith("budget")]
    of_dense = (known["rank"] * known["share"]).astype(float).round().clip(lower=1).astype(int)
    sparse = known["method"] != "low_rank"
    known = known.assign(rank=known["rank"].where(sparse, of_dense), sparsity=known["sparsity"].where(sparse, 0.0))
    table, notes = means(known, [*PLACE, "method", "point", "rank"])
    parts = []
    for _, part in places(table):
        part = part.assign(level=levels(part["parameters"].tolist()))
        parts += [own for _, own in part.groupby("level") if own["rank"].nunique() > 1]
    table = _of_places(table.assign(level=0.0), parts)
    return table, notes


def levels(sizes: Sequence[float]) -> list[float]:
    """For each size the smallest of those that are the same within five percent, from the smallest on."""
    lowest, level_of = None, {}
    for size in sorted(sizes):
        if lowest is None or size > lowest * 1.05:
            lowest = size
        level_of[size] = lowest
    return [level_of[size] for size in sizes]


def draw_fig4(table: pd.DataFrame) -> Figure:
    """A panel a task: test score over rank, a line for each number of parameters, with the sparsities as numbers."""
    parts = places(table)[:MOST]
    figure, drawn = panels(len(parts), wide=4.6, high=3.4, least=6)
    for axes, (place, part) in zip(drawn, parts, strict=True):
        for number, (size, line) in enumerate(part.groupby("level")):
            line = line.sort_values("rank")
            style = _style(number) | {"linewidth": 1.3, "markersize": 6, "capsize": 2}
            sparse, dense = (line[line["method"] == method] for method in _OF_EQUAL_SIZE)
            label = f"{size_text(size)} parameters"
            axes.errorbar(sparse["rank"], sparse["mean"], yerr=sparse["std"], label=label, **style)
            style |= {"marker": "s", "linestyle": "", "markerfacecolor": "white"}
            axes.errorbar(dense["rank"], dense["mean"], yerr=dense["std"], **style)
            small = {"textcoords": "offset points", "fontsize": 6.5, "color": "0.25"}
            for row in line.itertuples():
                axes.annotate(f"{row.sparsity:.0%}", (row.rank, row.mean), (5, 4), **small)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(sorted(part["rank"].unique())))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("rank", fontsize=9)
        scored(axes, place[2])
        title(axes, place, part)
        axes.legend(fontsize=7.5, frameon=False)
        plain(axes)
    above(figure, "Numbers: adapter sparsity; open squares: dense; bars: one standard deviation")
    return figure


# Figure 5: whether measures of importance choose the same rows and columns, and whether it matters to accuracy

_MEASURES = ("svd", "snip", "imp")  # that targeted has runs with, in table 2
_SPARSITIES = ("calibrated", "0.5")
_MOST_MATRICES = 4


def fig5(known: pd.DataFrame, results_dir: Path) -> Numbers:
    """part "agreement": of every two measures, means over modules and axes of what analyses have found.

    part "accuracy": test scores of targeted by the measure that chose its rows and columns, and of partial, on the
    tasks of these analyses. Analyses are those of results_dir and of the folder beside it.
    """
    columns = ["part", "task", "model", "point", "first", "second", "jaccard", "chance", "beyond_chance"]
    columns += ["metric", "method", "importance", "n", "seeds", "mean", "std", "half"]
    rows = _agreements(results_dir)
    if not rows:
        return pd.DataFrame(columns=columns), []
    known = known[known["method"].isin(("partial", "targeted")) & known["point"].isin(POINTS)]
    known = known[known["task"].isin({row["task"] for row in rows})]
    table, notes = means(known, [*PLACE, "point", "method", "importance"])
    rows += [{"part": "accuracy"} | row for row in table.to_dict("records")]
    return pd.DataFrame(rows, columns=columns), notes


def _agreements(results_dir: Path) -> list[dict]:
    """A row for every two measures of every analysis and point."""
    rows = []
    for analysis, model in analyses(results_dir, "agreement")[0]:
        where = {"part": "agreement", "task": analysis["config"]["task"]["name"], "model": model}
        for point, lines in analysis["summary"].items():
            compared = ("first", "second", "jaccard", "chance", "beyond_chance")
            rows += [where | {"point": point} | {name: line[name] for name in compared} for line in lines]
    return rows


def draw_fig5(table: pd.DataFrame) -> Figure:
    """Matrices of agreement beyond chance, and beside them the accuracy that each measure's choice leads to."""
    agreed, accurate = (table[table["part"] == part] for part in ("agreement", "accuracy"))
    by = agreed.groupby(["task", "model"], sort=False)
    every = [(key, point, own) for key, part in by for point, own in part.groupby("point")]
    shown = ([each for each in every if each[1] in _SPARSITIES] or every)[:_MOST_MATRICES]
    parts = places(accurate)[: MOST - _MOST_MATRICES]
    figure, drawn = panels(len(shown) + len(parts), wide=4.0, high=3.2, least=6)
    for axes, ((task, model), point, part) in zip(drawn, shown, strict=False):
        _matrix(axes, part)
        what = "calibrated sparsities" if point == "calibrated" else f"{float(point):.0%} removed"
        axes.set_title(f"{task}, {model}: {what}", fontsize=9.5, loc="left")
    for axes, ((task, _, metric), part) in zip(drawn[len(shown) :], parts, strict=True):
        _accuracies(axes, part, metric)
        axes.set_title(f"{task}: what each choice leads to", fontsize=9.5, loc="left")
    above(figure, "Agreement of the rows and columns chosen, beyond chance: 1 the same choice, 0 what chance gives")
    return figure


def _matrix(axes: Axes, part: pd.DataFrame) -> None:
    names = list(dict.fromkeys([*part["first"], *part["second"]]))
    values = np.full((len(names), len(names)), np.nan)
    for row in part.itertuples():
        values[names.index(row.second), names.index(row.first)] = row.beyond_chance
    heat(axes, values[1:, :-1], high=1, form=".2f")
    axes.set_xticks(range(len(names) - 1), names[:-1], rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names) - 1), names[1:])


def _accuracies(axes: Axes, part: pd.DataFrame, metric: str) -> None:
    """A row a method and measure, its points side by side with one standard deviation."""
    known = set(zip(part["method"], part["importance"], strict=True))
    chosen = [("partial", measure) for measure in _MEASURES]
    chosen += [("targeted", measure) for measure in dict.fromkeys([*_MEASURES, *part["importance"]])]
    names = [name for name in chosen if name in known]
    points = list(part["point"].unique())
    for row in part.itertuples():
        if (row.method, row.importance) not in names:
            continue
        own = look(row.method, row.point)
        shift = 0.16 * (points.index(row.point) - (len(points) - 1) / 2)
        style = own.markers | {"color": own.color, "capsize": 2, "markersize": 6, "linestyle": ""}
        axes.errorbar([row.mean], [names.index((row.method, row.importance)) + shift], xerr=[row.std], **style)
    axes.set_yticks(range(len(names)), [f"{method}, {measure}" for method, measure in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    scored(axes, metric, axis="x")
    plain(axes)
    axes.set_xlabel(f"test {metric}; filled: threshold, open: budget", fontsize=8)


# Figure 6: past 87 %: what is left of the score when 90, 95, 98 and 99 % of the adapter are removed

_BUDGETS = (0.13, 0.1, 0.05, 0.02, 0.01)
_PAST = ("partial", "targeted", "uniform", "low_rank", "shuffled", "inverted", "random_weights")


def fig6(known: pd.DataFrame, results_dir: Path) -> Numbers:
    """Means over seeds at every budget, of the tasks on which partial has one below 0.13; dense LoRA and the head."""
    sparse = known["method"].isin(_PAST) & (known["point"].map(_budget).astype(float) <= max(_BUDGETS))
    dense = known["method"].isin(_NO_POINT)
    known = pd.concat([known[sparse], known[dense]])
    table, notes = means(known, [*PLACE, "method", "point"])
    table["budget"] = table["point"].map(_budget).astype(float)
    past = (table["method"] == "partial") & (table["budget"] < max(_BUDGETS))
    table = _of_places(table, [part for _, part in places(table) if past[part.index].any()])
    return table, notes


def draw_fig6(table: pd.DataFrame) -> Figure:
    """A panel a task: test score over the share of dense LoRA's parameters that is left, down to the right."""
    parts = places(table)[:MOST]
    figure, drawn = panels(len(parts), wide=4.6, high=3.4, least=6)
    small = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "fontsize": 7, "color": "0.3"}
    for axes, (place, part) in zip(drawn, parts, strict=True):
        for method in _PAST:
            swept(axes, part[part["method"] == method], method, "share", joined=True)
        for method in _NO_POINT:
            own = part[part["method"] == method]
            level(axes, own.assign(parameters=0), method)
            for row in own.itertuples():
                axes.annotate(method, (0.01, row.mean), (0, 2), **small)
        shares = part.loc[~part["method"].isin(_NO_POINT), "share"]
        axes.set_xscale("log")
        axes.set_xlim(shares.max() * 1.4, shares.min() / 1.4)
        axes.xaxis.set_major_locator(FixedLocator(sorted(part.loc[part["method"] == "partial", "budget"].dropna())))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{1 - share:.0%}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("share of dense LoRA's parameters removed", fontsize=9)
        scored(axes, place[2])
        title(axes, place, part)
        plain(axes)
    legend(figure, [(method, "budget") for method in _PAST if (table["method"] == method).any()], lines=False)
    above(
        figure,
        "Dotted: dense LoRA, and the head alone; bars: one standard deviation over seeds; 13 % is of "
        "table 1, with other levels and calibrations",
    )
    return figure


# Figure 7: random against targeted: small and noisy training sets, other masks of one run, the train/test gap

_RANDOM_AND_TARGETED = ("partial", "targeted")
_CONDITION = ["train_samples", "label_noise"]


def fig7(known: pd.DataFrame, results_dir: Path) -> Numbers:
    """Three parts of one frame, all at budget 0.13.

    "difference": partial less targeted in the test score, run by run of the seeds that both have, by training rows and
    share of wrong labels; half: of its 95 % interval over seeds. "masks": a row a run with the most training rows:
    what other masks do to a run (its mask.seed moves alone), and what other seeds do. "gap": the metric on the rows
    that were trained on, with the labels they had, less that on test rows, means over the seeds that were measured.
    """
    conditions = _groups_of_fig7(known)
    notes = [note for *_, left_out in conditions for note in left_out]
    pairs = _pairs(conditions)
    rows = [*pairs, *_masks(known, conditions), *_gaps_of(conditions)] if pairs else []
    columns = ["part", *PLACE, "method", *_CONDITION, "seed", "mask_seed", "n", "seeds", "test"]
    columns += [*_RANDOM_AND_TARGETED, "difference", "half", "train", "gap"]
    return pd.DataFrame(rows, columns=columns), notes


def _groups_of_fig7(known: pd.DataFrame) -> list[Group]:
    """The runs of a method under each condition, whose masks go by their own seed."""
    own = known[known["method"].isin(_RANDOM_AND_TARGETED) & (known["point"] == BUDGET) & (known["mask_seed"] == NONE)]
    by = [*PLACE, "method", *_CONDITION]
    return groups(own.sort_values(by, kind="stable"), by)


def _pairs(conditions: Sequence[Group]) -> list[dict]:
    """A row a condition, of the seeds that all conditions of its place have, if there are two such."""
    by_condition: dict[tuple, dict[str, pd.Series]] = {}
    for where, one, _ in conditions:
        condition = tuple(where[name] for name in (*PLACE, *_CONDITION))
        by_condition.setdefault(condition, {})[where["method"]] = one.set_index("seed")["test"]
    both = {condition: pd.DataFrame(tests).dropna() for condition, tests in by_condition.items() if len(tests) == 2}
    rows = []
    for condition, pairs in both.items():
        if pairs.empty:
            continue
        of_place = [set(own.index) for other, own in both.items() if other[:3] == condition[:3] and len(own)]
        shared = sorted(set.intersection(*of_place))
        pairs = pairs.loc[shared] if len(shared) > 1 else pairs
        each = pairs["partial"] - pairs["targeted"]
        rows.append(
            {"part": "difference", **dict(zip((*PLACE, *_CONDITION), condition, strict=True))}
            | {"n": len(pairs), "seeds": " ".join(map(str, pairs.index))}
            | {method: float(pairs[method].mean()) for method in _RANDOM_AND_TARGETED}
            | {"difference": float(each.mean()), "half": half_interval(float(each.std()), len(each))}
        )
    return rows


def _masks(known: pd.DataFrame, conditions: Sequence[Group]) -> list[dict]:
    """Runs whose mask.seed is set, that of the same seed whose is not, and the runs over seeds they stand beside.

    A mask.seed that is not set is the run's seed; runs with one all have the training rows of the whole.
    """
    known = known[known["method"].isin(_RANDOM_AND_TARGETED) & (known["point"] == BUDGET)]
    rows = []
    for where, over_seeds, _ in conditions:
        most = known.loc[known["task"] == where["task"], "train_samples"].max()
        if where["train_samples"] != most or where["label_noise"] != 0:
            continue
        alike = known[(known[list(where)] == pd.Series(where)).all(axis=1)]
        moved = alike[alike["mask_seed"] != NONE]
        runs = [("over seeds", row.seed, row) for row in over_seeds.itertuples()]
        if len(moved):
            seed = moved["seed"].mode().iloc[0]
            moved = moved[moved["seed"] == seed].drop_duplicates("mask_seed").sort_values("mask_seed")
            runs += [("over masks", row.mask_seed, row) for row in moved.itertuples()]
            if seed not in set(moved["mask_seed"]):
                own = over_seeds[over_seeds["seed"] == seed]
                runs += [("over masks", seed, row) for row in own.itertuples()]
        rows += [
            {"part": part, **where, "seed": row.seed, "mask_seed": mask_seed, "n": 1, "test": row.test}
            for part, mask_seed, row in runs
        ]
    return rows


def _gaps_of(conditions: Sequence[Group]) -> list[dict]:
    rows = []
    for (where, _, _), contents in zip(conditions, measured(_by_seed(conditions)), strict=True):
        if not contents:
            continue
        both = pd.DataFrame({seed: gap(content) for seed, content in contents.items()}, index=["train", "test"]).T
        each = both["train"] - both["test"]
        rows.append(
            {"part": "gap", **where, "n": len(both), "seeds": " ".join(map(str, both.index))}
            | {"train": float(both["train"].mean()), "test": float(both["test"].mean())}
            | {"gap": float(each.mean()), "half": half_interval(float(each.std()), len(each))}
        )
    return rows


def draw_fig7(table: pd.DataFrame) -> Figure:
    """Three panels a task: differences over training rows, the spread over masks and seeds, the gap."""
    parts = [(place, part) for place, part in places(table) if part["label_noise"].nunique() > 1]
    parts = (parts or places(table))[:3]
    figure, drawn = panels(3 * len(parts), wide=4.0, high=3.2, across=3)
    for number, ((task, model, metric), part) in enumerate(parts):
        differences, masks, gaps = drawn[3 * number : 3 * number + 3]
        _draw_differences(differences, part[part["part"] == "difference"], metric)
        differences.set_title(f"{task}, {model}: partial less targeted", fontsize=9.5, loc="left")
        _draw_masks(masks, part[part["part"].isin(("over masks", "over seeds"))], metric)
        masks.set_title("single runs and their deviation", fontsize=9.5, loc="left")
        _draw_gaps(gaps, part[part["part"] == "gap"], metric)
        gaps.set_title("train less test; open: targeted", fontsize=9.5, loc="left")
    above(figure, "At budget 0.13; bars: 95 % intervals over seeds, paired by seed on the left")
    return figure


def _draw_differences(axes: Axes, part: pd.DataFrame, metric: str) -> None:
    axes.axhline(0, color="0.3", linewidth=1)
    noises, sizes = (sorted(part[name].unique()) for name in ("label_noise", "train_samples"))
    for place, noise in enumerate(noises):
        line = part[part["label_noise"] == noise].sort_values("train_samples")
        x = [sizes.index(size) + 0.08 * (place - (len(noises) - 1) / 2) for size in line["train_samples"]]
        style = _style(place) | {"linewidth": 1.2, "markersize": 6, "capsize": 3}
        axes.errorbar(x, line["difference"], yerr=line["half"], label=f"{noise:.0%} of the labels wrong", **style)
    _over_rows(axes, sizes)
    scored(axes, metric, f"difference in test {metric}", points=True)
    plain(axes)
    empty(axes, part.empty, "no pairs yet")
    if len(noises):
        axes.legend(fontsize=7, frameon=False)


def _draw_masks(axes: Axes, part: pd.DataFrame, metric: str) -> None:
    """A column of marks for every method and what moves, the mean as a line and the deviation as its name."""
    names = []
    for x, ((method, moved), own) in enumerate(part.groupby(["method", "part"])):
        style = look(method, NONE)
        shifts = [0.3 * ((index + 0.5) / len(own) - 0.5) for index in range(len(own))]
        face = style.color if moved == "over seeds" else "white"
        style = style.markers | {"linestyle": "", "color": style.color, "markersize": 5, "markerfacecolor": face}
        axes.plot([x + shift for shift in shifts], own["test"], **style)
        axes.plot([x - 0.3, x + 0.3], [own["test"].mean()] * 2, color="black", linewidth=1.2)
        scale = 100 if metric in SHARES else 1
        deviation = f"{scale * own['test'].std():.2f}" if len(own) > 1 else NONE
        names.append(f"{method}\n{moved}\n±{deviation} (n = {len(own)})")
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.6, max(0.6, len(names) - 0.4))
    scored(axes, metric)
    plain(axes)
    axes.tick_params(axis="x", labelsize=7)
    empty(axes, part.empty, "no runs yet")


def _draw_gaps(axes: Axes, part: pd.DataFrame, metric: str) -> None:
    noises, sizes = (sorted(part[name].unique()) for name in ("label_noise", "train_samples"))
    for place, noise in enumerate(noises):
        for side, method in enumerate(_RANDOM_AND_TARGETED):
            line = part[(part["label_noise"] == noise) & (part["method"] == method)].sort_values("train_samples")
            x = [sizes.index(size) + 0.16 * (side - 0.5) for size in line["train_samples"]]
            style = _style(place) | {"linewidth": 1, "markersize": 5.5, "capsize": 2}
            face = style["color"] if method == "partial" else "white"
            axes.errorbar(x, line["gap"], yerr=line["half"], markerfacecolor=face, **style)
    _over_rows(axes, sizes)
    scored(axes, metric, f"{metric}, train less test", points=True)
    plain(axes)
    empty(axes, part.empty)


def _over_rows(axes: Axes, sizes: Sequence[float]) -> None:
    axes.set_xticks(range(len(sizes)), ["all" if math.isinf(size) else f"{size:.0f}" for size in sizes])
    axes.set_xlabel("training rows, validation included", fontsize=9)


_VARIED_IN_FIG7 = ("task.train_samples", "task.label_noise", "mask.seed")
FIGURES = {
    "fig1": Spec(fig1, draw_fig1, "runs of partial at two operating points"),
    "fig2": Spec(fig2, draw_fig2, f"calibrated runs at {THRESHOLD}", beside=True),
    "fig3": Spec(fig3, draw_fig3, "runs of both lora and partial on one task"),
    "fig4": Spec(
        *(fig4, draw_fig4, "runs of partial at several ranks, and of low_rank, with as many trainable parameters"),
        varied=("method.rank",),
    ),
    "fig5": Spec(
        *(fig5, draw_fig5, "finished analysis of agreement (`python scripts/analyses.py agreement`)"),
        varied=("importance.name",),
    ),
    "fig6": Spec(fig6, draw_fig6, "runs of partial at budgets below 0.13", varied=("calibration.max_sparsity",)),
    "fig7": Spec(fig7, draw_fig7, "runs of partial and of targeted at budget 0.13", varied=_VARIED_IN_FIG7),
}
MEASURED = {"fig3": _groups_of_fig3, "fig7": _groups_of_fig7}


@cli.script
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=FIGURES, metavar="NAME", help=", ".join(FIGURES))
    parser.add_argument("--results", type=Path, default=Path("results/cpu"), metavar="RESULTS")
    parser.add_argument("--runs", action="store_true", help="print the runs whose dynamics it shows, and draw nothing")
    options = parser.parse_args(arguments)
    require(options.results.is_dir(), "--results", options.results, "a folder of results")
    for name in dict.fromkeys(options.names):
        if options.runs:
            one_of("--runs", name, *MEASURED)
            print(*(run.directory for run in measured_runs(name, options.results)), sep="\n")
        else:
            print(*(f"wrote {file}" for file in make(name, options.results)), sep="\n")


if __name__ == "__main__":
    sys.exit(main())
