"""Figures 1 to 7: for each the numbers, out of runs of the one protocol (protocol.py), and how they are drawn.

    python scripts/paper_figures.py fig1 fig4 --results results/decided
    python scripts/paper_figures.py fig3 --results results/decided --runs    # whose dynamics it shows (dynamics.py)

Writes RESULTS/figures/NAME.svg and .csv, the numbers. Figure 6 is of the study beside, RESULTS/../race (`make race`).
"""

from __future__ import annotations

import argparse
import math
import shlex
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import protocol
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator, PercentFormatter
from protocol import BUDGET, IMPORTANCE, PARTIAL, THRESHOLD, UNIFORM, USUAL

from partial_lora import cli
from partial_lora.errors import one_of, require
from partial_lora.files import read_json, write_atomic
from partial_lora.launching.directory import ADAPTER
from partial_lora.launching.packs import dynamics
from partial_lora.masks import AXES
from partial_lora.report import ranking, records
from partial_lora.report.depth import grid
from partial_lora.report.drawing import COLOURS, MARKERS, heat, legend_below, look, panels, plain, save, scored, sized
from partial_lora.report.figures import band
from partial_lora.report.pairs import Pair, by_seed, differences_by_example
from partial_lora.report.rows import NONE
from partial_lora.report.statistics import estimate, half_interval

PLACE = ["task", "model", "metric"]
DENSE, LORA = "dense", "lora"
_MOST_TASKS = 3  # of figure 3
_MOST_SEEDS = 3  # of a form that are measured for the gap and the drift
_LETTERS = 14  # of nine points that an inch holds
APART = 1.05  # by which factor forms of one size stand beside each other


@dataclass(frozen=True)
class Spec:
    """A figure: its numbers out of all runs and the results directory, how they are drawn, and what it needs."""

    numbers: Callable[[pd.DataFrame, Path], pd.DataFrame]
    draw: Callable[[pd.DataFrame], Figure]
    needs: str


def make(name: str, runs: pd.DataFrame, results_dir: Path) -> list[Path]:
    """Draw a figure from the runs of a results directory, as its figures/NAME.svg and .csv; gives the files.

    Where there is nothing to draw, what it needs is printed, and files of an earlier time go.
    """
    spec, folder = FIGURES[name], results_dir / "figures"
    numbers = spec.numbers(runs, results_dir)
    if numbers.empty:
        print(f"{name}: nothing to draw in {results_dir}: expected {spec.needs}")
        for old in folder.glob(f"{name}.*"):
            old.unlink()
        return []
    folder.mkdir(parents=True, exist_ok=True)
    file = save(spec.draw(numbers), folder / f"{name}.svg")
    command = shlex.join(["python", "scripts/paper_figures.py", name, "--results", str(results_dir)])
    write_atomic(folder / f"{name}.csv", f"# {command}\n{numbers.to_csv(index=False)}")
    return [file, folder / f"{name}.csv"]


# Runs and means


def runs_of(results_dir: Path) -> tuple[pd.DataFrame, list[str]]:
    """Return the runs of a results directory, and what was left out (`protocol.forms`).

    at_hand: what dynamics.py measures of a run was measured, or can be, since its weights are there. Such runs come
    first: of equal ones that were made twice the first counts.
    """
    runs, problems = protocol.forms(results_dir)
    at_hand = [dynamics(run.directory) is not None or (run.directory / ADAPTER).is_dir() for run in runs["run"]]
    return runs.assign(at_hand=at_hand).sort_values("at_hand", ascending=False, kind="stable"), problems


def best(runs: pd.DataFrame, methods: Sequence[str], points: Sequence[str] = (BUDGET, NONE)) -> pd.DataFrame:
    """Return the usual runs of methods at operating points, masks by svd, each form at its best rate."""
    own = protocol.usual(runs)
    own = own[own["method"].isin(methods) & own["operating_point"].isin(points) & (own["importance"] == "")]
    return protocol.at_best_rates(own)


def means(runs: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """Return means over seeds of the runs of one task that agree in the columns `by`, a row for each.

    n, seeds; mean, std (the sample's, NaN of one run) and half the 95 % interval (Student's t) of the test score;
    parameters, share of the dense adapter and sparsity as means.
    """
    columns = {"n": ("seed", "size"), "seeds": ("seed", _listed), "mean": ("test", "mean"), "std": ("test", "std")}
    averaged = {"parameters": "adapter_parameters", "share": "share_of_dense", "sparsity": "adapter_sparsity"}
    columns |= {name: (column, "mean") for name, column in averaged.items()}
    cells = runs.sort_values([*PLACE, "seed"], kind="stable").groupby([*PLACE, *by], sort=False)
    table = cells.agg(**columns).reset_index()
    return table.assign(half=list(map(half_interval, table["std"], table["n"])))


def _listed(seeds: pd.Series) -> str:
    return " ".join(map(str, seeds))


def places(table: pd.DataFrame) -> list[tuple[tuple[str, str, str], pd.DataFrame]]:
    """Return the tables of every task, model and metric, by name."""
    return list(table.groupby(PLACE))


def with_all(table: pd.DataFrame, methods: Sequence[str]) -> pd.DataFrame:
    """Return the rows of the places that have all of the methods."""
    return table.groupby(PLACE).filter(lambda part: set(methods) <= set(part["method"]))


# What scripts/dynamics.py measures of runs


def in_common(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs of the seeds that all forms of a place have under one condition."""
    place = [*PLACE, "condition"]
    having = runs.groupby([*place, "seed"])["method"].transform("nunique")
    return runs[having == runs.groupby(place)["method"].transform("nunique")]


def to_measure(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs whose dynamics a figure shows: the lowest seeds that all forms of a place have, by condition."""
    runs = in_common(runs)
    return runs[runs.groupby([*PLACE, "condition"])["seed"].rank(method="dense") <= _MOST_SEEDS]


def measured(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs that were measured, of the seeds that all measured forms of a place have, by condition.

    Adds the column dynamics (`quantities`).
    """
    contents = pd.Series([dynamics(run.directory) for run in runs["run"]], runs.index, dtype=object)
    found = runs.assign(dynamics=contents)[contents.notna()]
    return in_common(found.assign(dynamics=[quantities(content) for content in found["dynamics"]]))


def quantities(content: Mapping) -> dict[tuple[str, int, str], float | None]:
    """Return what was measured of a run, by quantity, place on an axis and its name.

    score: the main metric on training rows, labelled as in training (0), and on test rows (1); gap: the first less the
    second. cka: of frozen and trained features after every block, from 1; None where features do not vary.
    """
    primary = content["metrics"]["test"]["primary"]
    train, test = (float(content["metrics"][split][primary]) for split in ("train", "test"))
    found = {("score", 0, "train"): train, ("score", 1, "test"): test, ("gap", 0, ""): train - test}
    return found | {("cka", at, block): value for at, (block, value) in enumerate(content["cka"].items(), start=1)}


# What figures draw alike


def draw_means(
    table: pd.DataFrame, x: str, label: str, text: str, along: Callable[[Axes, pd.DataFrame], None]
) -> Figure:
    """Draw a panel a task: the means of forms over a size x, with one standard deviation, and dense LoRA as a level.

    label, along: the name of the horizontal axis, and what sets it up. text: over all panels. Budgets are open;
    what has several sizes of one kind is joined by a line.
    """
    parts, kinds = places(table), table["operating_point"].str.partition(" ")[0]
    figure, drawn = panels(len(parts), wide=4.5, high=3.2, least=6.5)
    for axes, (place, part) in zip(drawn, parts, strict=True):
        for mean in part.loc[part["method"] == DENSE, "mean"]:
            axes.axhline(mean, color=style(DENSE)["color"], linestyle=":", linewidth=1.1, zorder=1)
        for kind, of_kind in part.groupby(kinds):
            methods = forms_in(of_kind)
            for number, method in enumerate(methods):
                line = of_kind[of_kind["method"] == method].sort_values(x)
                beside = line[x] * APART ** (number - (len(methods) - 1) / 2)
                own = style(method, kind) | {"linewidth": 1.2, "elinewidth": 0.9, "markersize": 6, "capsize": 2}
                axes.errorbar(beside, line["mean"], yerr=line["std"], **own)
        along(axes, part)
        axes.set_xlabel(label, fontsize=9)
        scored(axes, place[2])
        least, most = int(part["n"].min()), int(part["n"].max())
        seeds = f"{most} seed{'s' * (most > 1)}" if least == most else f"{least} to {most} seeds"
        axes.set_title(f"{place[0]}, {place[1]} ({seeds})", fontsize=10, loc="left")
        plain(axes)
    named_below(figure, forms_in(table), NONE if "threshold" in set(kinds) else BUDGET)
    above(figure, f"{text}; bars: one standard deviation over seeds; what has one place is drawn side by side")
    return figure


def named_below(figure: Figure, names: Iterable[str], point: str = BUDGET) -> None:
    """Name the marks of forms below the panels."""
    legend_below(figure, [Line2D([], [], label=name, **style(name, point) | {"linestyle": ""}) for name in names])


def style(form: str, point: str = BUDGET) -> dict:
    """Return how the marks and lines of a form look at a point, which dense LoRA has none of."""
    own = look(form.partition(",")[0], NONE if form == DENSE else point)
    return own.markers | {"color": own.color, "linestyle": own.linestyle}


def forms_in(table: pd.DataFrame) -> list[str]:
    """Return the forms of a table as they stand beside each other."""
    return [method for method in (*_SIZED, DENSE) if (table["method"] == method).any()]


def above(figure: Figure, text: str) -> None:
    """Draw the legend of markers, lines and bars over all panels, in as many lines as its width needs."""
    unbroken = text.replace(" %", "\N{NO-BREAK SPACE}%")
    figure.suptitle(textwrap.fill(unbroken, int(_LETTERS * figure.get_figwidth())), fontsize=9)


def unmeasured(axes: Axes, nothing: bool) -> None:
    """Write in a panel that there is nothing in it, if so."""
    if nothing:
        small = {"ha": "center", "va": "center", "fontsize": 9, "color": "0.4", "transform": axes.transAxes}
        axes.text(0.5, 0.5, "not measured yet", **small)
        axes.set_yticks([])
        axes.set_xticks([])


def ticks(axes: Axes, at: pd.Series, text: Callable[[float, int], str]) -> None:
    """Make the horizontal axis logarithmic, with ticks at these places alone, each named by `text`."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(sorted(at.unique())))
    axes.xaxis.set_major_formatter(FuncFormatter(text))
    axes.xaxis.set_minor_locator(NullLocator())


# Figure 1: test score against trainable parameters, of random rows and columns and what has the same size

_SIZED = (PARTIAL, UNIFORM, "targeted", LORA, "random_weights", "entries")  # as they stand beside each other


def fig1(runs: pd.DataFrame, results_dir: Path) -> pd.DataFrame:
    """Return means of every form at both operating points, of the tasks that have both partial and dense."""
    own = best(runs, (*_SIZED, DENSE), (BUDGET, THRESHOLD, NONE))
    return with_all(means(own, ["method", "operating_point"]), (PARTIAL, DENSE))


def draw_fig1(table: pd.DataFrame) -> Figure:
    """Draw test score over trainable parameters."""
    text, label = f"Open: {BUDGET}, filled: {THRESHOLD}, and dense LoRA", "trainable parameters of the adapter"
    return draw_means(table, "parameters", label, text, lambda axes, part: sized(axes, part["parameters"]))


# Figure 2: where calibration leaves adapters sparse: by depth and kind of module, over tasks

_DASHES = ("-", "--", "-.", ":")
_AXES = {"rows": "rows of B", "columns": "columns of A"}


def fig2(runs: pd.DataFrame, results_dir: Path) -> pd.DataFrame:
    """Return the sparsity of every module and axis in partial at the budget: mean, lowest and highest over seeds.

    kind: the module's name without its place; depth: its block's place, counted from 0.
    """
    rows = []
    for run in best(runs, [PARTIAL], [BUDGET]).itertuples():
        kinds, _, cells = grid(run.run.record["sparsity"])
        for axis in AXES:
            for (line, column), sparsity in np.ndenumerate(cells[axis]):
                rows.append([run.task, run.model, kinds[line], axis, column, sparsity])
    names = ["task", "model", "kind", "axis", "depth"]
    frame = pd.DataFrame(rows, columns=[*names, "sparsity"]).dropna(subset="sparsity")
    spread = {"n": "size", "mean": "mean", "low": "min", "high": "max"}
    return frame.groupby(names, sort=False)["sparsity"].agg(**spread).reset_index()


def draw_fig2(table: pd.DataFrame) -> Figure:
    """Draw two panels a model: means over its tasks by depth, a line a kind, with bands over tasks."""
    models = list(table.groupby("model", sort=False))
    figure, drawn = panels(2 * len(models), wide=4.6, high=3.0, across=2)
    for number, (model, part) in enumerate(models):
        pair, tasks = drawn[2 * number : 2 * number + 2], ", ".join(part["task"].unique())
        looks = {
            kind: {"color": COLOURS[place % 8], "marker": MARKERS[place % 8], "linestyle": _DASHES[place % 4]}
            for place, kind in enumerate(part["kind"].unique())
        }
        for axes, axis in zip(pair, AXES, strict=True):
            for kind, own in looks.items():
                of_kind = part[(part["axis"] == axis) & (part["kind"] == kind)]
                over = of_kind.groupby("depth")["mean"].agg(["mean", "min", "max"])
                axes.plot(over.index, over["mean"], linewidth=1.3, markersize=4, **own)
                axes.fill_between(over.index, over["min"], over["max"], color=own["color"], alpha=0.1, linewidth=0)
            axes.set_title(f"{model} ({tasks}): {_AXES[axis]}", fontsize=10, loc="left")
            axes.set_xlabel("depth (block)", fontsize=9)
            axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
            axes.set_ylim(-0.02, 1)
            axes.yaxis.set_major_formatter(PercentFormatter(1))
            plain(axes)
        pair[0].set_ylabel(f"sparsity at {BUDGET}", fontsize=9)
        handles = [Line2D([], [], label=kind, markersize=4, **own) for kind, own in looks.items()]
        pair[0].legend(handles=handles, fontsize=6.5, frameon=False, loc="best")
    above(figure, "Lines: means over tasks; bands: from the lowest task to the highest")
    return figure


# Figure 3: how training goes, sparse beside dense: loss, gradient norm, the gap from train to test, feature drift

_TRAINED = (DENSE, PARTIAL, UNIFORM)
LOGGED = ("loss", "grad_norm")


def of_fig3(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs of dense, partial and uniform on three tasks that have the first and the last.

    First come tasks of which runs are at hand, and then those with runs of all.
    """
    own = best(runs, _TRAINED)
    parts = [part for _, part in places(with_all(own, (DENSE, UNIFORM)))]
    parts.sort(key=lambda part: (not part["at_hand"].any(), -part["method"].nunique()))
    return pd.concat([own.iloc[:0], *parts[:_MOST_TASKS]])


def fig3(runs: pd.DataFrame, results_dir: Path) -> pd.DataFrame:
    """Return every quantity as mean, lowest and highest over seeds.

    That is loss and gradient norm at each step that was logged, and what was measured (`quantities`).
    """
    rows, own, by = [], of_fig3(runs), [*PLACE, "method"]
    for key, cell in own.groupby(by):
        for logged in LOGGED:
            for step, mean, low, high in band([run.record["history"] for run in cell["run"]], logged):
                rows.append([*key, logged, step, "", len(cell), mean, low, high])
    for key, cell in measured(own).groupby(by):
        for name, values in pd.DataFrame(list(cell["dynamics"]), dtype=float).items():
            if values.notna().any():
                rows.append([*key, *name, values.count(), values.mean(), values.min(), values.max()])
    return pd.DataFrame(rows, columns=[*by, "quantity", "x", "at", "n", "mean", "low", "high"])


def draw_fig3(table: pd.DataFrame) -> Figure:
    """Draw a row of four panels a task; lines are means over seeds, bands reach from the lowest seed to the highest."""
    parts = places(table)
    figure, drawn = panels(4 * len(parts), wide=3.3, high=2.7, across=4)
    for number, ((task, model, metric), part) in enumerate(parts):
        loss, norm, both, drift = drawn[4 * number : 4 * number + 4]
        for axes, quantity, label, along in (
            (loss, "loss", "training loss", "optimizer step"),
            (norm, "grad_norm", "gradient norm", "optimizer step"),
            (both, "score", metric, "rows"),
            (drift, "cka", "CKA, frozen and trained features", "block"),
        ):
            _lines(axes, part[part["quantity"] == quantity])
            axes.set_ylabel(label, fontsize=9)
            axes.set_xlabel(along, fontsize=9)
            axes.set_yscale("log" if quantity in LOGGED else "linear")
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
            plain(axes)
        both.set_xticks([0, 1], ["train", "test"])
        scored(both, metric, metric)
        for axes, quantity in ((both, "score"), (drift, "cka")):
            unmeasured(axes, quantity not in set(part["quantity"]))
        loss.set_title(f"{task}, {model}", fontsize=10, loc="left")
    named_below(figure, forms_in(table))
    above(figure, f"Open: {BUDGET}; means over seeds, with bands from the lowest seed to the highest")
    return figure


def _lines(axes: Axes, part: pd.DataFrame) -> None:
    for method, line in part.groupby("method"):
        own = style(method) | {"linewidth": 1.2, "markersize": 4}
        axes.plot(line["x"], line["mean"], markevery=max(1, len(line) // 8), **own)
        axes.fill_between(line["x"], line["low"], line["high"], color=own["color"], alpha=0.15, linewidth=0)


# Figure 4: a small dense adapter or a large sparse one: rank against sparsity at equal trainable parameters


def fig4(runs: pd.DataFrame, results_dir: Path) -> pd.DataFrame:
    """Return means of as many parameters by rank, of the tasks on which partial or uniform has two ranks at least.

    lora is the end where nothing is sparse: dense, of about the rank that its parameters come to.
    """
    kinds = runs["method"].str.replace(r", rank \d+$", "", regex=True)
    methods = sorted(set(runs.loc[kinds.isin((PARTIAL, UNIFORM)), "method"]))
    own = best(runs, [*methods, LORA], [BUDGET])
    own, dense = own.assign(method=kinds[own.index]), own["method"] == LORA
    of_dense = (own["rank"] * own["share_of_dense"]).round().clip(lower=1)
    own["rank"] = own["rank"].where(~dense, of_dense).astype(int)
    own["adapter_sparsity"] = own["adapter_sparsity"].where(~dense, 0.0)
    table = means(own, ["method", "operating_point", "rank"])
    sparse = table["rank"].where(table["method"] != LORA)
    return table[sparse.groupby([table[name] for name in PLACE]).transform("nunique") > 1]


def draw_fig4(table: pd.DataFrame) -> Figure:
    """Draw test score over rank, with the sparsities as numbers along the bottom."""

    def along(axes: Axes, part: pd.DataFrame) -> None:
        small = {"fontsize": 7, "color": "0.25", "ha": "center", "transform": axes.get_xaxis_transform()}
        for rank, sparsity in part.groupby("rank")["sparsity"].mean().items():
            axes.text(rank, 0.02, f"{sparsity:.0%}", **small)
        ticks(axes, part["rank"], lambda rank, _: f"{rank:g}")
        axes.margins(y=0.15)  # for the numbers

    sizes = table["parameters"]
    text = f"{sizes.min():,.0f} to {sizes.max():,.0f} parameters; numbers: adapter sparsity (lora is dense)"
    return draw_means(table, "rank", "rank", text, along)


# Figure 5: whether measures of importance choose the same rows and columns, and whether it matters to accuracy

_SPARSITIES = ("calibrated", "0.5")


def fig5(runs: pd.DataFrame, results_dir: Path) -> pd.DataFrame:
    """Return two parts. "agreement": of every two measures, means over modules and axes of what analyses have found.

    "accuracy": means of partial and targeted at the budget by the measure that chose shares, rows and columns, of the
    tasks with two measures at least. calibrations: how many the seeds have; with one, their spread has none of its own.
    """
    compared = ["first", "second", "jaccard", "chance", "beyond_chance"]
    files: dict[tuple[str, ...], Path] = {}  # by task and model, of this folder before those of the one that holds it
    for place in (results_dir, results_dir.parent):
        for file in sorted(place.glob("analyses/agreement/*/*/analysis.json")):
            files.setdefault(file.parts[-3:-1], file)
    agreed = [
        {"task": task, "model": model, "sparsities": sparsities} | {name: line[name] for name in compared}
        for (task, model), file in files.items()
        for sparsities, lines in read_json(file)["summary"].items()
        for line in lines
    ]
    own = protocol.usual(runs)
    own = own[own["method"].isin((PARTIAL, "targeted")) & (own["operating_point"] == BUDGET)]
    own = protocol.at_best_rates(own).assign(importance=lambda best: best["importance"].replace("", IMPORTANCE))
    own = own[own.groupby(PLACE)["importance"].transform("nunique") > 1]
    table, by = means(own, ["method", "importance"]), [*PLACE, "method", "importance"]
    draws = own["run"].map(lambda run: protocol.draw_of(run.record)).groupby([own[name] for name in by]).nunique()
    table = table.merge(draws.rename("calibrations").reset_index(), on=by)
    frame = pd.DataFrame(agreed, columns=["task", "model", "sparsities", *compared])
    return pd.concat([frame.assign(part="agreement"), table.assign(part="accuracy")], ignore_index=True)


def draw_fig5(table: pd.DataFrame) -> Figure:
    """Draw matrices of agreement beyond chance, and beside them the accuracy that each measure's choice leads to."""
    agreed, accurate = (table[table["part"] == part] for part in ("agreement", "accuracy"))
    shown = list(agreed[agreed["sparsities"].isin(_SPARSITIES)].groupby(["task", "model", "sparsities"]))
    parts = places(accurate)
    figure, drawn = panels(len(shown) + len(parts), wide=4.0, high=3.2, least=6)
    for axes, ((task, model, sparsities), part) in zip(drawn, shown, strict=False):
        _matrix(axes, part)
        what = "calibrated sparsities" if sparsities == "calibrated" else f"{float(sparsities):.0%} removed"
        axes.set_title(f"{task}, {model}: {what}", fontsize=9.5, loc="left")
    for axes, ((task, model, metric), part) in zip(drawn[len(shown) :], parts, strict=True):
        _accuracies(axes, part, metric)
        axes.set_title(f"{task}, {model}: what each choice leads to", fontsize=9.5, loc="left")
    text = "Agreement of the rows and columns chosen, beyond chance: 1 the same choice, 0 what chance gives"
    words = "; right: one standard deviation over seeds, in brackets how many, and how many calibrations they have"
    above(figure, text + (words if parts else ""))
    return figure


def _matrix(axes: Axes, part: pd.DataFrame) -> None:
    names = list(dict.fromkeys([*part["first"], *part["second"]]))
    values = part.pivot(index="second", columns="first", values="beyond_chance")
    heat(axes, values.reindex(index=names[1:], columns=names[:-1]).to_numpy(), high=1, form=".2f")
    axes.set_xticks(range(len(names) - 1), names[:-1], rotation=30, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(names) - 1), names[1:])


def _accuracies(axes: Axes, part: pd.DataFrame, metric: str) -> None:
    """Draw a row a form and measure, with one standard deviation, and name how many calibrations its seeds have."""
    part = part.sort_values(["method", "importance"])
    for height, row in enumerate(part.itertuples()):
        own = style(row.method) | {"capsize": 2, "markersize": 6, "linestyle": ""}
        axes.errorbar([row.mean], [height], xerr=[row.std], **own)
    names = [f"{row.method}, {row.importance}\n({row.n:.0f}, {row.calibrations:.0f})" for row in part.itertuples()]
    axes.set_yticks(range(len(part)), names)
    axes.set_ylim(len(part) - 0.5, -0.5)
    scored(axes, metric, f"test {metric} at {BUDGET}", axis="x")
    plain(axes)


# Figure 6: past 87 %: what is left of the score when 90, 95, 98 and 99 % of the adapter are removed

_PAST = (PARTIAL, LORA, "random_weights", "entries")


def fig6(runs: pd.DataFrame, results_dir: Path) -> pd.DataFrame:
    """Return means of every form and size of the study race, of the tasks on which partial has less than 13 %.

    budget: the share of dense LoRA's parameters that was asked for, 1 of dense LoRA.
    """
    folder = results_dir.parent / "race"
    if not folder.is_dir():
        return pd.DataFrame()
    chosen = ranking.at_best_rates(ranking.rows_of(records.read(folder)[0]))
    chosen = chosen[np.where(chosen["size"] == "own", chosen["form"] == DENSE, chosen["form"].isin(_PAST))]
    budget = chosen["size"].replace("own", "1").astype(float)
    table = means(chosen.assign(method=chosen["form"], budget=budget), ["method", "operating_point", "budget"])
    past = (table["method"] == PARTIAL) & (table["budget"] < 0.13)
    return table[past.groupby([table[name] for name in PLACE]).transform("any")]


def draw_fig6(table: pd.DataFrame) -> Figure:
    """Draw test score over the share of dense LoRA's parameters that is removed."""

    def along(axes: Axes, part: pd.DataFrame) -> None:
        ticks(axes, part["budget"], lambda share, _: f"{1 - share:.0%}")
        axes.invert_xaxis()

    text = "partial has one share everywhere; fewer steps than in the other figures"
    return draw_means(table, "share", "share of dense LoRA's parameters removed", text, along)


# Figure 7: whether random masks regularise: wrong labels, few rows and many, beside chosen masks and LoRA

_EQUAL = "targeted, equal shares"
_AGAINST = (_EQUAL, DENSE, LORA)
_CONDITIONED = (UNIFORM, *_AGAINST)


def of_fig7(runs: pd.DataFrame) -> pd.DataFrame:
    """Return the runs of those forms under every condition, of the tasks that have two conditions at least.

    Under the usual condition a form may have several rates: the one counts that it has under the others, too.
    """
    own = runs[runs["method"].isin(_CONDITIONED) & runs["operating_point"].isin((BUDGET, NONE))]
    own = own[(own["mixture"] == "") & (own["importance"] == "")]
    elsewhere = own.loc[own["condition"] != USUAL, ["task", "model", "method", "learning_rate"]].drop_duplicates()
    own = protocol.at_best_rates(own.merge(elsewhere))
    return own[own.groupby(PLACE)["condition"].transform("nunique") > 1]


def fig7(runs: pd.DataFrame, results_dir: Path) -> pd.DataFrame:
    """Return three parts, each with half a 95 % interval.

    "difference": uniform less another form in the test score, over the seeds that both have, and test rows; by
    condition. "change": that difference less the one under the usual condition. "gap": a form's metric on training
    rows, labelled as in training, less that on test rows, of runs that were measured; over seeds (Student's t).
    """
    rows, own = [], of_fig7(runs)
    for place, part in places(own):
        sides = {key: by_seed(side) for key, side in part.groupby(["method", "condition"])}
        conditions = _ordered(part["condition"])
        for other, condition in ((other, condition) for other in _AGAINST for condition in conditions):
            both = ((sides.get((form, at), {}) for form in (UNIFORM, other)) for at in (condition, USUAL))
            pairs = [Pair(*each, place[-1]) for each in both]
            rows.append([*place, "difference", condition, UNIFORM, other, *_changed(pairs[:1])])
            if condition != USUAL:
                rows.append([*place, "change", condition, UNIFORM, other, *_changed(pairs)])
    for (*place, condition, method), cell in measured(own).groupby([*PLACE, "condition", "method"]):
        gaps = pd.Series([found["gap", 0, ""] for found in cell["dynamics"]], cell["seed"])
        rows.append([*place, "gap", condition, method, "", *_over_seeds(gaps)])
    names = [*PLACE, "part", "condition", "form", "less", "n", "seeds", "mean", "half"]
    table = pd.DataFrame(rows, columns=names)
    return table[table["n"] > 0]


def _ordered(conditions: pd.Series) -> list[str]:
    """Return the usual condition first and those of several kinds last."""
    return sorted(conditions.unique(), key=lambda words: (words.count(","), words))


def _changed(pairs: Sequence[Pair]) -> tuple[int, str, float, float]:
    """Return number, seeds, mean and half the 95 % interval of a difference, or of the first less the second one."""
    seeds = sorted(set.intersection(*(pair.seeds for pair in pairs)))
    if not seeds:
        return 0, "", math.nan, math.nan
    parts = [differences_by_example(pair, seeds) for pair in pairs]
    if None in (shapes := {None if part is None else part.shape for part in parts}) or len(shapes) > 1:  # no such rows
        parts = [np.array([[pair.first[seed].score - pair.second[seed].score] for seed in seeds]) for pair in pairs]
    found = estimate(parts[0] - parts[1] if len(parts) > 1 else parts[0])
    half = (found.interval()[1] - found.interval()[0]) / 2 if len(seeds) > 1 else math.nan  # one seed decides nothing
    return len(seeds), _listed(seeds), found.difference, half


def _over_seeds(values: pd.Series) -> tuple[int, str, float, float]:
    """Return number, seeds, mean and half the 95 % interval of values by seed, those without a value left out."""
    values = values.dropna().sort_index()
    return len(values), _listed(values.index), values.mean(), half_interval(values.std(), len(values))


def draw_fig7(table: pd.DataFrame) -> Figure:
    """Draw three panels a task over conditions: differences, their changes, the gap."""
    parts = places(table)
    figure, drawn = panels(3 * len(parts), wide=4.0, high=3.2, across=3)
    titles = {"difference": "uniform less other forms", "change": "its change", "gap": "train less test"}
    for number, ((task, model, metric), part) in enumerate(parts):
        for axes, (name, words) in zip(drawn[3 * number :], titles.items(), strict=False):
            _over_conditions(axes, part[part["part"] == name])
            axes.set_title(f"{task}, {model}: {words}", fontsize=9.5, loc="left")
            scored(axes, metric, f"{metric}, train less test" if name == "gap" else f"test {metric}", points=True)
            plain(axes)
            unmeasured(axes, (part["part"] != name).all())
    drawn_forms = {*table["form"], *table["less"]}
    named_below(figure, [form for form in _CONDITIONED if form in drawn_forms])
    text = f"Open: {BUDGET}; left: uniform less the form that is drawn, and how that changes from the usual condition"
    above(figure, f"{text}; bars: 95 % intervals, of the gap over seeds, else over seeds and test rows")
    return figure


def _over_conditions(axes: Axes, part: pd.DataFrame) -> None:
    axes.axhline(0, color="0.3", linewidth=1)
    conditions, shown = _ordered(part["condition"]), part["less"].where(part["less"] != "", part["form"])
    for place, (form, line) in enumerate(part.groupby(shown)):
        shift = 0.12 * (place - (shown.nunique() - 1) / 2)
        own = style(form) | {"markersize": 6, "capsize": 3, "linestyle": ""}
        axes.errorbar([conditions.index(each) + shift for each in line["condition"]], line["mean"], line["half"], **own)
    names = [textwrap.fill(condition or "usual", 11) for condition in conditions]
    axes.set_xticks(range(len(conditions)), names)
    axes.set_xlim(-0.5, max(1, len(conditions)) - 0.5)


FIGURES = {
    "fig1": Spec(fig1, draw_fig1, "a task with runs of both partial and dense"),
    "fig2": Spec(fig2, draw_fig2, f"runs of partial at {BUDGET}"),
    "fig3": Spec(fig3, draw_fig3, "a task with runs of both dense and uniform"),
    "fig4": Spec(fig4, draw_fig4, "runs of partial or uniform at several ranks, with as many parameters"),
    "fig5": Spec(fig5, draw_fig5, "an analysis of agreement (scripts/analyses.py), or runs by two measures"),
    "fig6": Spec(fig6, draw_fig6, "runs of partial below 13 % in the folder race beside it (make race)"),
    "fig7": Spec(fig7, draw_fig7, "runs of uniform with wrong labels, fewer rows or more"),
}
MEASURED = {"fig3": of_fig3, "fig7": of_fig7}


@cli.script
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="+", choices=FIGURES, metavar="NAME", help=", ".join(FIGURES))
    parser.add_argument("--results", type=Path, default=Path("results/decided"), metavar="RESULTS")
    parser.add_argument("--runs", action="store_true", help="print the runs whose dynamics it shows, and draw nothing")
    options = parser.parse_args(arguments)
    require(options.results.is_dir(), "--results", options.results, "a folder of results")
    names = list(dict.fromkeys(options.names))
    for name in names if options.runs else ():
        one_of("--runs", name, *MEASURED)
    runs, problems = runs_of(options.results)
    for line in problems:
        print(line, file=sys.stderr)
    for name in names:
        if options.runs:
            lines = [run.directory for run in to_measure(MEASURED[name](runs))["run"]]
        else:
            lines = [f"wrote {file}" for file in make(name, runs, options.results)]
        print(*lines, sep="\n", end="\n" if lines else "")


if __name__ == "__main__":
    sys.exit(main())
