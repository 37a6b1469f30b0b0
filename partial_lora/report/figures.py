"""Figures of one run, drawn from its record alone: how training went. Where it is sparse: calibration_figures.py.

Drawn without a display and without matplotlib's global state. Lightness, markers and dashes tell things apart, colour
only helps: the figures survive a grey print and every kind of colour vision.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter

from partial_lora.calibration.search import Curve, curve_of, line
from partial_lora.files import write_atomic
from partial_lora.masks import AXES
from partial_lora.report import records
from partial_lora.report.records import NONE, Predictions, Run, grid, method_of, place, without_common_start
from partial_lora.report.statistics import MARGIN
from partial_lora.report.summary import measured
from partial_lora.runs.directory import CALIBRATION
from partial_lora.tasks.metrics import LOWER_IS_BETTER, SHARES

_TRAIN = {"color": "#0072B2", "linestyle": "-"}  # Okabe and Ito's palette
_VALIDATION = {"color": "#D55E00", "linestyle": "--", "marker": "o", "markersize": 4}
_MOST_MARKED = 40  # points of a line


def training_curve(result: Mapping, path: Path) -> Path | None:
    """Draw the losses and the validation metric over the optimizer steps of a run.

    Above, training and validation loss; below, the primary metric on validation, its best value marked, and the test
    value of the run as a line. Gives the file written, in the format of its suffix, or None where nothing was logged.
    """
    history = result["history"]
    primary = _primary(result)
    loss = _series(history, "loss")
    validation_loss, validation = _series(history, "eval_loss"), _series(history, f"eval_{primary}")
    if not loss and not validation:
        return None
    figure = Figure(figsize=(7, 5.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    _line(above, loss, "training", _TRAIN)
    _line(above, validation_loss, "validation", _VALIDATION)
    above.set_ylabel("loss")
    if all(value >= 0 for _, value in loss + validation_loss):
        above.set_ylim(bottom=max(0, above.get_ylim()[0]))  # the margin must not suggest losses below zero
    _line(below, validation, "validation", _VALIDATION)
    _mark_best(below, validation, primary)
    test = result.get("metrics", {}).get("test", {}).get(primary)
    if test is not None:
        label = f"test, once at the end: {measured(primary, test)}"
        below.axhline(test, color="0.25", linestyle=":", linewidth=1.5, label=label)
    below.set_ylabel(primary)
    if primary in SHARES:
        below.yaxis.set_major_formatter(PercentFormatter(1))
    below.set_xlabel("optimizer step")
    below.set_xlim(left=0)
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="0.9")
        axes.set_axisbelow(True)
        if axes.lines:
            axes.legend(frameon=False, fontsize=9)
    figure.suptitle(titled("Training", result), fontsize=11)
    return save(figure, path)


def _primary(result: Mapping) -> str:
    """The name of the metric that selects: the record's own word for it."""
    metrics = result.get("metrics") or {}
    return next((split["primary"] for name in ("validation", "test") if (split := metrics.get(name))), "accuracy")


def _series(history: Sequence[Mapping], key: str) -> list[tuple[int, float]]:
    """(step, value) of every entry of Trainer's log that has this key, in order of steps, the latest for each step."""
    return sorted({entry["step"]: entry[key] for entry in history if entry.get(key) is not None}.items())


def _line(axes: Axes, points: Sequence[tuple[int, float]], label: str, style: Mapping) -> None:
    if points:
        steps, values = zip(*points, strict=True)
        marked = {"marker": "."} if len(points) <= _MOST_MARKED else {"marker": None, "linewidth": 1}
        axes.plot(steps, values, label=label, **{"linewidth": 1.7, **marked, **style})


def _mark_best(axes: Axes, points: Sequence[tuple[int, float]], primary: str) -> None:
    """Ring the step whose checkpoint training ends with: the first of the best on validation."""
    if points:
        best_of = min if primary in LOWER_IS_BETTER else max
        step, best = best_of(points, key=lambda point: point[1])
        label = f"best on validation: {measured(primary, best)}, step {step}"
        axes.plot([step], [best], "o", markersize=10, markerfacecolor="none", color="black", label=label)


def titled(what: str, result: Mapping) -> str:
    """What a figure shows, and of which run; the share the adapter goes without where it is known."""
    config = result["config"]
    names = [method_of(result), config["model"]["name"], config["task"]["name"]]
    line = f"{what}: {', '.join(names)}, seed {result['seed']}"
    sparsity = result.get("parameters", {}).get("adapter_sparsity")
    return line if sparsity is None else f"{line}\nadapter sparsity {sparsity:.1%}"


def save(figure: Figure, path: Path) -> Path:
    """Write a figure whole or not at all; the same figure gives the same bytes on any day."""
    path = Path(path)
    content = io.BytesIO()
    metadata = {"Date": None} if path.suffix == ".svg" else None
    with rc_context({"svg.hashsalt": "partial-lora"}):
        figure.savefig(content, format=path.suffix.removeprefix("."), dpi=150, metadata=metadata)
    write_atomic(path, content.getvalue())
    return path


# --- How the figures of a report look: a colour and a marker for every method, panels side by side, one legend.

MOST = 9  # panels of a figure
_BLUE, _VERMILLION, _GREEN, _ORANGE = "#0072B2", "#D55E00", "#009E73", "#E69F00"  # Okabe and Ito's palette
_SKY, _PURPLE, _BLACK, _GREY = "#56B4E9", "#CC79A7", "#000000", "#808080"
COLOURS = (_BLUE, _VERMILLION, _GREEN, _ORANGE, _PURPLE, _SKY, _BLACK, _GREY)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_PANEL_LOOKS = {  # a marker each, so that colour is never what tells two apart
    "partial": (_BLUE, "o"),
    "targeted": (_VERMILLION, "^"),
    "lora": (_BLACK, "s"),
    "uniform": (_GREEN, "D"),
    "shuffled": (_ORANGE, "<"),
    "inverted": (_SKY, ">"),
    "low_rank": (_PURPLE, "v"),
    "flow": (_GREEN, "p"),
    "random_weights": (_SKY, "P"),
    "dora": (_VERMILLION, "d"),
    "vera": (_PURPLE, "h"),
    "adalora": (_BLACK, "8"),
    "lorafa": (_GREY, "H"),
    "full": (_ORANGE, "*"),
    "probe": (_GREY, "X"),
}
_DASHES = {"threshold": "-", "budget": "--", "–": "-."}


@dataclass(frozen=True)
class Drawing:
    """A figure, and how many it draws of the places, calibrations or models (`what`) that there are."""

    figure: Figure
    drawn: int
    whole: int
    what: str = "places"

    @property
    def cut(self) -> str:
        """What is to be said where not all is drawn; else nothing."""
        if self.drawn >= self.whole:
            return ""
        return f"{self.drawn} of {self.whole} {self.what} are drawn; --where chooses others."


@dataclass(frozen=True)
class Look:
    """How a method at an operating point is drawn: markers are filled but for a budget, whose lines are dashed."""

    color: str
    marker: str
    linestyle: str
    filled: bool

    @property
    def markers(self) -> dict:
        face = self.color if self.filled else "white"
        return {"marker": self.marker, "markerfacecolor": face, "markeredgecolor": self.color, "markeredgewidth": 1.3}


def look(method: str, point: str) -> Look:
    kind, (name, _, masks) = point.partition(" ")[0], method.partition(" ")
    color, marker = _PANEL_LOOKS.get(name, (_GREY, MARKERS[sum(name.encode()) % len(MARKERS)]))
    if masks:  # of single entries: the method's colour, and a star of as many points as its place in the list
        marker = (4 + list(_PANEL_LOOKS).index(name) if name in _PANEL_LOOKS else 3, 1, 0)
    return Look(color, marker, _DASHES.get(kind, "-"), kind != "budget")


def panels(count: int, *, wide: float, high: float, across: int = 3, least: float = 5.5) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, and these in reading order."""
    across = min(across, count) if count != 4 else 2
    down = -(-count // across)
    figure = Figure(figsize=(max(least, wide * across), high * down + 0.9), layout="constrained")
    drawn = figure.subplots(down, across, squeeze=False)
    for axes in drawn.flat[count:]:
        axes.set_visible(False)
    return figure, list(drawn.flat[:count])


def lists(lengths: Sequence[int], *, wide: float) -> tuple[Figure, list[Axes]]:
    """A figure of lists in two columns, each list as high as its rows need and below the shorter column."""
    heights = [0.27 * length + 1.0 for length in lengths]
    columns: list[list[int]] = [[] for _ in range(min(2, len(lengths)))]
    for number in range(len(lengths)):
        min(columns, key=lambda column: sum(heights[each] for each in column)).append(number)
    filled = [sum(heights[each] for each in column) for column in columns]
    figure = Figure(figsize=(max(5.5, wide * len(columns)), max(filled)), layout="constrained")
    drawn: dict[int, Axes] = {}
    grid = figure.add_gridspec(1, len(columns))
    for index, (column, full) in enumerate(zip(columns, filled, strict=True)):
        ratios = [*(heights[each] for each in column), max(max(filled) - full, 1e-3)]
        inner = grid[index].subgridspec(len(ratios), 1, height_ratios=ratios)
        drawn |= {number: figure.add_subplot(inner[row]) for row, number in enumerate(column)}
    return figure, [drawn[number] for number in range(len(lengths))]


def plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)


def legend(figure: Figure, methods: Sequence[tuple[str, str]], *, lines: bool) -> None:
    """One entry for every method and operating point, below the panels."""
    handles = []
    for method, point in methods:
        own = look(method, point)
        line = {"linestyle": own.linestyle if lines else "", "color": own.color, "markersize": 6}
        handles.append(Line2D([], [], label=named(method, point), **line, **own.markers))
    room = figure.get_figwidth() * 12  # letters in a line, about
    across = max(1, int(room // (max(len(handle.get_label()) for handle in handles) + 9)))
    if handles:
        figure.legend(
            handles=handles, loc="outside lower center", ncols=min(across, len(handles)), fontsize=8, frameon=False
        )


def named(method: str, point: str) -> str:
    return method if point == "–" else f"{method}, {point}"


def heat(axes: Axes, values: np.ndarray, *, low: float, high: float, form: str, size: float = 8) -> None:
    """A matrix as shades with its numbers in the cells: in grey a light cell is low, a dark one high."""
    shades = np.clip((values - low) / ((high - low) or 1), 0, 1)
    axes.imshow(np.ma.masked_invalid(shades), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if not np.isnan(value):
            ink = "white" if shades[row, column] > 0.66 else "black"
            said = axes.text(column, row, format(value, form), ha="center", va="center", fontsize=size, color=ink)
            said.set_in_layout(False)  # inside its cell, and there are hundreds
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=8)


# --- The numbers behind a report's figures: fronts, bands over seeds, how far sparsities and predictions agree.

History = Sequence[Mapping]
Band = list[tuple[int, float, float, float]]  # step, mean, lowest, highest


def front(points: Iterable[tuple[float, float]], metric: str) -> list[tuple[float, float]]:
    """The points (size, score) that no other is both as small as and better than, by size."""
    sign = -1 if metric in LOWER_IS_BETTER else 1
    kept: list[tuple[float, float]] = []
    for size, score in sorted(points, key=lambda point: (point[0], -sign * point[1])):
        if not kept or sign * score > sign * kept[-1][1]:
            kept.append((size, score))
    return kept


def band(histories: Sequence[History], key: str) -> Band:
    """What a key of Trainer's log was at the steps that all of the histories have: mean, lowest, highest over them."""
    logged = [values for history in histories if (values := dict(points(history, key)))]
    if not logged:
        return []
    steps = sorted(set.intersection(*(set(values) for values in logged)))
    found = []
    for step in steps:
        values = [each[step] for each in logged]
        found.append((step, float(np.mean(values)), min(values), max(values)))
    return found


def points(history: History, key: str) -> list[tuple[int, float]]:
    """(step, value) of every entry of Trainer's log that has a key, but for values that were no finite number."""
    logged = ((entry["step"], entry[key]) for entry in history if entry.get(key) is not None)
    return [(step, value) for step, value in logged if isfinite(value)]


def selected(record: Mapping) -> str:
    """What validation logged beside its loss that is the metric of the test, or else its loss."""
    metric = record["metrics"]["test"]["primary"]
    return metric if any(f"eval_{metric}" in entry for entry in record["history"]) else "loss"


def importance(run: Run) -> str:
    """The measure by which a run's modules were calibrated."""
    return (run.record["config"].get("importance") or {}).get("name", NONE)


def maps(found: Sequence[Run]) -> dict[tuple[str, str, str, str], dict[str, dict[str, float]]]:
    """The sparsities of every calibration, by (task, model, importance, operating point): a mean over its runs.

    Of the methods that share a calibration those of `partial` count, if there are any: another may move them.
    """
    grouped: dict[tuple[str, str, str, str], list[Run]] = {}
    for run in found:
        if run.record["calibration"] is not None and run.record.get("sparsity"):
            key = (run.row["task"], run.row["model"], importance(run), run.row["operating_point"])
            grouped.setdefault(key, []).append(run)
    averaged = {}
    for key, runs in grouped.items():
        usual = [run for run in runs if run.row["method"] == "partial"] or runs
        modules = usual[0].record["sparsity"]
        alike = [run.record["sparsity"] for run in usual if run.record["sparsity"].keys() == modules.keys()]
        averaged[key] = {
            module: {axis: float(np.mean([each[module][axis] for each in alike])) for axis in AXES}
            for module in modules
        }
    return averaged


def sparsity_agreement(found: Sequence[Run]) -> dict[str, tuple[list[str], np.ndarray]]:
    """By model, names of its calibrations and the correlation of their sparsities (Pearson, all modules and axes).

    Models with a single calibration are left out; sparsities that are all the same correlate with nothing (NaN).
    """
    vectors: dict[tuple, list[tuple[str, np.ndarray]]] = {}
    for (task, model, measure, point), sparsity in maps(found).items():
        values = np.array([sparsity[module][axis] for module in sorted(sparsity) for axis in AXES])
        vectors.setdefault((model, tuple(sorted(sparsity))), []).append((f"{task}, {measure}, {point}", values))
    matrices = {}
    for (model, _), each in vectors.items():
        if len(each) > 1:
            with np.errstate(invalid="ignore", divide="ignore"):
                matrices[model] = ([name for name, _ in each], np.corrcoef([values for _, values in each]))
    return matrices


def prediction_agreement(part: pd.DataFrame, predictions: Predictions) -> np.ndarray | None:
    """How often every two rows of a grouped table say the same of a test example, over the seeds that both have.

    NaN where two have no seed in common; None where fewer than two have predictions of classes.
    """
    said = []
    for group, seeds in zip(part["group"], part["seeds"], strict=True):
        of_group = {seed: predictions.outputs(group, seed) for seed in map(int, seeds.split())}
        said.append({seed: each for seed, each in of_group.items() if each is not None})
    if sum(bool(each) for each in said) < 2:
        return None
    matrix = np.full((len(said), len(said)), np.nan)
    for row, one in enumerate(said):
        for column, other in enumerate(said):
            shares = [
                float(np.mean(one[seed] == other[seed]))
                for seed in one.keys() & other.keys()
                if len(one[seed]) == len(other[seed])
            ]
            if shares:
                matrix[row, column] = np.mean(shares)
    return matrix


def calibrations(found: Sequence[Run], results_dir: Path) -> dict[str, dict]:
    """{baseline, curves} of calibration.json files by "task, model, importance": those of runs, then those alone.

    curves: `kind_curves`. One of each is read, whatever the operating point: they share their curves. A file that
    cannot be read is none.
    """
    contents: dict[str, dict] = {}
    places = [
        (f"{run.row['task']}, {run.row['model']}, {importance(run)}", run.directory)
        for run in found
        if run.record["calibration"] is not None
    ]
    for file in sorted(results_dir.glob(f"calibrations/*/*/*/{CALIBRATION}")):
        task, model, measure = file.parts[-4:-1]
        places.append((f"{task}, {model}, {measure.rpartition('-')[0]}", file.parent))
    for title, directory in places:
        if title in contents:
            continue
        try:
            content = json.loads((directory / CALIBRATION).read_text(encoding="utf-8"))
            contents[title] = {"baseline": float(content["baseline"]), "curves": kind_curves(content["modules"])}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            continue
    return contents


def kind_curves(modules: Mapping[str, Mapping]) -> dict[tuple[str, str], list[tuple[float, float, float]]]:
    """The curves of a calibration by (kind of module, axis): (level, lowest, highest), medians over depth.

    lowest and highest are the bounds within which scores are known; a level of which no score is bounded on both sides
    is left out.
    """
    places = {name: place(name)[0] for name in modules}
    kinds = list(dict.fromkeys(places.values()))
    names = dict(zip(kinds, without_common_start(kinds), strict=True))
    bounds: dict[tuple[str, str], dict[float, list[tuple[float, float]]]] = {}
    for name, axes in modules.items():
        for axis in AXES:
            for level, (low, high) in curve_of(axes.get(axis, {}).get("curve", [])).items():
                if np.isfinite(low) and np.isfinite(high):
                    bounds.setdefault((names[places[name]], axis), {}).setdefault(level, []).append((low, high))
    return {
        key: [
            (level, median(low for low, _ in each), median(high for _, high in each))
            for level, each in sorted(found.items())
        ]
        for key, found in bounds.items()
    }


# --- Figures over many runs: accuracy against size, methods with their intervals, differences, training with bands.

_LOOKS = ["method", "operating_point"]
_WHERE = ["task", "model", "metric"]
_PLACE = ["task", "model", "operating_point", "metric"]
_MOST_ROWS, _MOST_LINES = 48, 12  # of a panel
_FAR = 3  # times the usual distance from zero: a row all of which is farther is not drawn, but said
_VERDICTS = {"better": (">", True), "matches": ("o", True), "worse": ("<", True), "undecided": ("o", False)}
_NO_VERDICT = ("D", False)


def pareto(table: pd.DataFrame) -> Drawing:
    """Test score against trainable parameters, adapter and head together; the line joins what nothing beats.

    table: of `grouping.group`.
    """
    whole = _parts(table)
    parts = whole[:MOST]
    figure, drawn = panels(len(parts), wide=3.9, high=2.9)
    for axes, ((task, model, metric), part) in zip(drawn, parts, strict=True):
        sizes = part["adapter_parameters"] + part["head_parameters"]
        best = front(zip(sizes, part["test_mean"], strict=True), metric)
        ends = [*best, (float(sizes.max()) * 1.4, best[-1][1])]
        axes.plot(*zip(*ends, strict=True), color="0.6", linewidth=1, drawstyle="steps-post", zorder=1)
        for key, alike in part.assign(size=sizes).groupby(_LOOKS, sort=False):
            _marked(axes, alike["size"], alike["test_mean"], key, yerr=alike["test_std"], markersize=7)
        axes.set_xscale("log")
        least, most = max(1, sizes.min()), max(1, sizes.max())
        room = max(1.6, (10 * least / most) ** 0.5)  # at least a decade, so that its ticks have names
        axes.set_xlim(least / room, most * room)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_xlabel("trainable parameters", fontsize=9)
        _scored(axes, metric, "y")
        _titled(axes, task, model)
        plain(axes)
    legend(figure, _methods(part for _, part in parts), lines=False)
    return Drawing(figure, len(parts), len(whole))


def methods(table: pd.DataFrame, frame: pd.DataFrame) -> Drawing:
    """Every method's mean test score with its 95 % interval over seeds, and the seeds as ticks.

    table: of `grouping.group`; frame: the runs.
    """
    whole = _parts(table)
    parts = whole[:MOST]
    figure, drawn = lists([min(_MOST_ROWS, len(part)) for _, part in parts], wide=4.6)
    seeds = {group: of["test"].tolist() for group, of in frame.groupby("group")}
    for axes, ((task, model, metric), of_place) in zip(drawn, parts, strict=True):
        part = of_place.head(_MOST_ROWS)
        part = part.assign(place=range(len(part)))
        ticks = [(test, row.place) for row in part.itertuples() if row.n > 1 for test in seeds[row.group]]
        if ticks:
            axes.plot(*zip(*ticks, strict=True), "|", color="0.55", markersize=9, zorder=1)
        for key, alike in part.groupby(_LOOKS, sort=False):
            _marked(axes, alike["test_mean"], alike["place"], key, xerr=alike["test_half"], markersize=6.5)
        again = part.duplicated(_LOOKS, keep=False)
        names = [
            named(row.method, row.operating_point) + (f", {row.id}" if twice else "")
            for row, twice in zip(part.itertuples(), again, strict=True)
        ]
        _listed(axes, names, metric)
        _titled(axes, task, model, part, of_place)
    return Drawing(figure, len(parts), len(whole))


def differences(compared: pd.DataFrame) -> Drawing | None:
    """How far every other method is from `partial`, with 95 % intervals; the shaded strip still "matches".

    Where less is better there is no strip, and better is on the left. What is far from all others is a number at the
    end of the axis.

    compared: of `comparison_table.table`; None where it has no differences.
    """
    if "difference" not in compared or compared["difference"].isna().all():
        return None
    known = compared[compared["difference"].notna()]
    whole = list(known.groupby([*_PLACE, "reference"], sort=False))
    parts = whole[:MOST]
    several = known.groupby(_PLACE)["reference"].nunique() > 1
    figure, drawn = lists([min(_MOST_ROWS, len(part)) for _, part in parts], wide=4.6)
    for axes, ((task, model, point, metric, reference), of_place) in zip(drawn, parts, strict=True):
        part = of_place.head(_MOST_ROWS)
        axes.axvline(0, color="0.3", linewidth=1)
        if metric not in LOWER_IS_BETTER:  # where nothing matches
            axes.axvspan(-MARGIN, 0, facecolor="0.9", edgecolor="0.75", hatch="///", linewidth=0, zorder=0)
        for height, row in enumerate(part.itertuples()):
            marker, filled = _VERDICTS.get(row.verdict, _NO_VERDICT)
            color = look(row.method, row.operating_point).color
            ends = [[row.difference - row.low], [row.high - row.difference]]
            style = {"color": color, "markerfacecolor": color if filled else "white", "capsize": 3, "markersize": 7}
            axes.errorbar(row.difference, height, xerr=ends, marker=marker, linestyle="", **style)
        _reach(axes, part)
        again = part["method"].duplicated(keep=False)
        ids = (", " + part["group"].str.rpartition("-")[2]).where(again, "")
        _listed(axes, list(part["method"] + ids + ": " + part["verdict"]), metric, said="difference from partial in ")
        against = f"\nagainst {reference.rpartition('-')[2]}" if several[task, model, point, metric] else ""
        _titled(axes, task, f"{model}, {point}{against}", part, of_place)
    return Drawing(figure, len(parts), len(whole))


def _reach(axes: Axes, part: pd.DataFrame) -> None:
    """Leave out of the axis the rows that would press all others together; their numbers stand at its end."""
    ends = part[["low", "high"]].abs()
    reach = _FAR * float(ends.max(axis=1).median())
    far = (part["low"] > reach) | (part["high"] < -reach)
    near = part.loc[~far, ["low", "high"]]
    if near.empty or not far.any():
        return
    room = 0.06 * (near["high"].max() - min(0, near["low"].min()))
    left, right = min(0, near["low"].min()) - room, max(0, near["high"].max()) + room
    axes.set_xlim(left, right)
    for height, (row, is_far) in enumerate(zip(part.itertuples(), far, strict=True)):
        if is_far:
            on_left = row.difference < 0
            value = f"{100 * row.difference:+.1f}" if row.metric in SHARES else f"{row.difference:+.3g}"
            said = f"◂ {value}" if on_left else f"{value} ▸"
            color, side = look(row.method, row.operating_point).color, "left" if on_left else "right"
            axes.text(left if on_left else right, height, said, color=color, ha=side, va="center", fontsize=8)


def training(found: Sequence[Run]) -> Drawing | None:
    """Training loss above, validation's metric below, over optimizer steps; of each task and model a pair of panels.

    Lines are means over seeds, bands reach from the lowest seed to the highest.
    """
    places: dict[tuple[str, str], dict[str, list[Run]]] = {}
    for run in found:
        of_place = places.setdefault((run.row["task"], run.row["model"]), {})
        of_place.setdefault(run.row["group"], []).append(run)
    shown = list(places.items())[: MOST // 2]
    across = min(3, len(shown)) if len(shown) != 4 else 2
    figure, drawn = panels(2 * across * -(-len(shown) // across), wide=3.9, high=2.1, across=across)
    used: list[tuple[str, str]] = []
    for number, ((task, model), groups) in enumerate(shown):
        above = number // across * 2 * across + number % across
        pair = drawn[above], drawn[above + across]
        pair[1].sharex(pair[0])
        metric = selected(next(iter(groups.values()))[0].record)
        lines = list(groups.values())[:_MOST_LINES]
        for runs in lines:
            key = (runs[0].row["method"], runs[0].row["operating_point"])
            for axes, logged in zip(pair, ("loss", f"eval_{metric}"), strict=True):
                _banded(axes, band([run.record["history"] for run in runs], logged), key)
            used.append(key)
        pair[0].set_ylabel("training loss", fontsize=9)
        pair[0].tick_params(labelbottom=False)
        _scored(pair[1], metric, "y", said="validation ")
        pair[1].set_xlabel("optimizer step", fontsize=9)
        _titled(pair[0], task, model, lines, groups)
        for axes in pair:
            plain(axes)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    for axes in drawn:
        axes.set_visible(bool(axes.lines))
    legend(figure, list(dict.fromkeys(used)), lines=True)
    return Drawing(figure, len(shown), len(places)) if any(axes.lines for axes in drawn) else None


def _marked(axes: Axes, x: pd.Series, y: pd.Series, key: tuple[str, str], **style) -> None:
    """Marks of one method at one operating point, with bars where a spread is known."""
    own = look(*key)
    axes.errorbar(x, y, color=own.color, linestyle="", capsize=3, **own.markers, **style)


def _banded(axes: Axes, points: Sequence[tuple[int, float, float, float]], key: tuple[str, str]) -> None:
    if not points:
        return
    own = look(*key)
    steps, means, low, high = zip(*points, strict=True)
    every = max(1, len(steps) // 8)
    axes.plot(
        steps,
        means,
        color=own.color,
        linestyle=own.linestyle,
        linewidth=1.4,
        markevery=every,
        markersize=4,
        **own.markers,
    )
    if low != high:
        axes.fill_between(steps, low, high, color=own.color, alpha=0.18, linewidth=0)


def _parts(table: pd.DataFrame) -> list[tuple[tuple[str, str, str], pd.DataFrame]]:
    return list(table.groupby(_WHERE, sort=False))


def _methods(parts: Iterable[pd.DataFrame]) -> list[tuple[str, str]]:
    shown = pd.concat(list(parts))
    return list(dict.fromkeys(zip(shown["method"], shown["operating_point"], strict=True)))


def _listed(axes: Axes, names: Sequence[str], metric: str, said: str = "test ") -> None:
    """Rows of names from top to bottom, a score along the bottom."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    _scored(axes, metric, "x", said=said)
    plain(axes)
    axes.xaxis.set_major_locator(MaxNLocator(5))


def _scored(axes: Axes, metric: str, axis: str, said: str = "test ") -> None:
    getattr(axes, f"set_{axis}label")(f"{said}{metric}", fontsize=9)
    if metric in SHARES:
        of_points = said.startswith("difference")
        getattr(axes, f"{axis}axis").set_major_formatter(PercentFormatter(1, symbol="" if of_points else "%"))
        if of_points:
            axes.set_xlabel(f"{said}{metric} (points)", fontsize=9)


def _titled(axes: Axes, task: str, model: str, drawn: Sized = (), whole: Sized = ()) -> None:
    """Name the place, and say where not all there is of it is drawn."""
    some = f" ({len(drawn)} of {len(whole)})" if len(drawn) < len(whole) else ""
    axes.set_title(f"{task}, {model}{some}", fontsize=10, loc="left")


def write(drawing: Drawing | None, folder: Path, stem: str) -> list[Path]:
    """A figure as folder/stem.png and .svg; nothing of None."""

    if drawing is None:
        return []
    drawing.figure.get_layout_engine().execute(drawing.figure)  # once, for it takes as long as to draw
    drawing.figure.set_layout_engine(None)
    return [save(drawing.figure, folder / f"{stem}.{form}") for form in ("png", "svg")]


# --- Figures of where adapters are sparse, over many runs: heat maps, curves by kind of module, matrices of agreeme

_MOST_MAPS = 5
_MOST_NUMBERED = 24  # positions in depth
_MOST_MAP_ROWS, _MOST_MATRICES = 12, 4
_AXES = {"rows": "rows of B", "columns": "columns of A"}


def sparsity(found: Sequence[Run]) -> Drawing | None:
    """Sparsity in percent, kind of module against depth: a line of two panels for every calibration."""
    whole = list(maps(found).items())
    shown = whole[:_MOST_MAPS]
    if not shown:
        return None
    grids = [grid(of) for _, of in shown]
    deepest, most = max(len(depths) for _, depths, _ in grids), max(len(kinds) for kinds, _, _ in grids)
    wide = max(3.2, min(0.4 * deepest, 10) + 0.9)
    figure, drawn = panels(2 * len(shown), wide=wide, high=0.27 * most + 1.0, across=2)
    for index, ((key, _), (kinds, depths, cells)) in enumerate(zip(shown, grids, strict=True)):
        task, model, measure, point = key
        for side, (axis, said) in enumerate(_AXES.items()):
            axes = drawn[2 * index + side]
            form = ".0f" if len(depths) <= _MOST_NUMBERED else ""
            _map(axes, 100 * cells[axis], form)
            axes.set_yticks(range(len(kinds)), kinds if side == 0 else [""] * len(kinds))
            step = max(1, len(depths) // 12)
            ticks = range(0, len(depths), step)
            axes.set_xticks(ticks, [".".join(map(str, depths[index])) or "–" for index in ticks])
            above = f"{task}, {model}\n{measure}, {point}: " if side == 0 else "\n"
            axes.set_title(above + said, fontsize=9, loc="left")
        if index == len(shown) - 1:
            for axes in drawn[-2:]:
                axes.set_xlabel("depth (block)", fontsize=9)
    figure.suptitle("Sparsity in percent: the darker, the less is kept", fontsize=10)
    return Drawing(figure, len(shown), len(whole), "calibrations")


def _map(axes: Axes, values, form: str) -> None:
    if form:
        heat(axes, values, low=0, high=100, form=form, size=7.5)
    else:
        axes.imshow(values, cmap="Blues", vmin=0, vmax=100, aspect="auto")
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0, labelsize=8)


def curve_lines(calibrations: Mapping[str, Mapping]) -> Drawing | None:
    """What is left of the few-shot score as modules are zeroed: by kind of module, medians over depth.

    calibrations: of `series.calibrations`, by a title each. Where evaluation was cut short a score is known
    within bounds: a band between these, and the line in their middle. The level line is the intact model.
    """
    whole = [(title, content["baseline"], content["curves"]) for title, content in calibrations.items()]
    whole = [each for each in whole if each[2]]
    shown = whole[: MOST // 2]
    if not shown:
        return None
    figure, drawn = panels(2 * len(shown), wide=3.7, high=2.5, across=2)
    handles: dict[str, Line2D] = {}
    for number, (title, baseline, lines) in enumerate(shown):
        pair = dict(zip(_AXES, drawn[2 * number : 2 * number + 2], strict=True))
        pair["columns"].sharey(pair["rows"])
        kinds = list(dict.fromkeys(kind for kind, _ in lines))
        for (kind, axis), points in lines.items():
            handles.setdefault(kind, _curve(pair[axis], points, kinds.index(kind)))
        for axis, axes in pair.items():
            axes.axhline(baseline, color="0.4", linewidth=1, linestyle="-.")
            axes.set_xlim(0, 1)
            axes.xaxis.set_major_formatter(PercentFormatter(1))
            axes.set_xlabel(f"share of {_AXES[axis]} zeroed", fontsize=9)
            axes.set_title(title if axis == "rows" else "", fontsize=9, loc="left")
            plain(axes)
        pair["rows"].set_ylabel("few-shot score", fontsize=9)
    across = max(1, int(figure.get_figwidth() * 12 // (max(map(len, handles)) + 9)))
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=across, fontsize=8, frameon=False
    )
    return Drawing(figure, len(shown), len(whole), "calibrations")


def _curve(axes: Axes, points: Sequence[tuple[float, float, float]], number: int) -> Line2D:
    levels, low, high = zip(*points, strict=True)
    middle = [(one + other) / 2 for one, other in zip(low, high, strict=True)]
    color = COLOURS[number % len(COLOURS)]
    axes.fill_between(levels, low, high, color=color, alpha=0.05, linewidth=0)
    marks = {"marker": MARKERS[number % len(MARKERS)], "markersize": 4.5, "markevery": max(1, len(levels) // 6)}
    dash = ("-", "--", "-.", ":")[number % 4]
    return axes.plot(levels, middle, color=color, linestyle=dash, linewidth=1.3, **marks)[0]


def sparsity_alike(found: Sequence[Run]) -> Drawing | None:
    """How far calibrations of one model choose alike: correlation of their sparsities over modules and axes."""
    whole = [(model, *each) for model, each in sparsity_agreement(found).items()]
    cut = [
        (model + _some_modules(names), names[:_MOST_MAP_ROWS], matrix[:_MOST_MAP_ROWS, :_MOST_MAP_ROWS])
        for model, names, matrix in whole[:_MOST_MATRICES]
    ]
    figure = _matrices(cut, low=0, title="Correlation of sparsities")
    return figure and Drawing(figure, len(cut), len(whole), "models")


def predictions_alike(table: pd.DataFrame, predictions: Predictions) -> Drawing | None:
    """How often two methods say the same of a test example; where they disagree they are different adapters indeed."""
    places = [
        (key, part)
        for key, part in table.groupby(["task", "model"], sort=False)
        if sum(predictions.exist(row.group, map(int, row.seeds.split())) for row in part.itertuples()) > 1
    ]
    shown = []
    for (task, model), part in places[:_MOST_MATRICES]:
        few = part.head(_MOST_MAP_ROWS)
        matrix = prediction_agreement(few, predictions)
        if matrix is not None:
            names = [named(row.method, row.operating_point) for row in few.itertuples()]
            shown.append((f"{task}, {model}{_some_modules(part)}", names, 100 * matrix))
    lows = [float(matrix[matrix == matrix].min()) for _, _, matrix in shown]
    figure = _matrices(shown, low=min(lows, default=0), high=100, form=".0f", title="Same predictions, in percent")
    return figure and Drawing(figure, len(shown), len(places))


def _some_modules(whole: Sized) -> str:
    """What a title adds where not all rows are drawn."""
    return f" ({_MOST_MAP_ROWS} of {len(whole)})" if len(whole) > _MOST_MAP_ROWS else ""


def _matrices(shown: Sequence, *, low: float, high: float = 1, form: str = ".2f", title: str) -> Figure | None:
    if not shown:
        return None
    most = max(len(names) for _, names, _ in shown)
    side = 0.46 * most + 2.6
    figure, drawn = panels(len(shown), wide=side, high=side - 0.6, across=2, least=4.5)
    for axes, (name, names, matrix) in zip(drawn, shown, strict=True):
        heat(axes, matrix, low=low, high=high, form=form)
        axes.set_xticks(range(len(names)), names, rotation=40, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(names)), names)
        axes.set_title(name, fontsize=10, loc="left")
    figure.suptitle(title, fontsize=10)
    return figure


# --- Figures of a calibration: how sparse each module became, and the curves that say why.

FORMATS = (".png", ".svg")
_CURVE_AXES = (("rows", "rows of B (outputs)"), ("columns", "columns of A (inputs)"))
_CURVE_LOOKS = {  # Okabe and Ito's palette; of the two, rows are the darker, and their marker shows behind the other
    "rows": {
        "color": "#0072B2",
        "linestyle": "-",
        "hatch": None,
        "chosen": {"color": "#0072B2", "marker": "o", "markersize": 7},
    },
    "columns": {
        "color": "#D55E00",
        "linestyle": "--",
        "hatch": "////",
        "chosen": {"color": "#D55E00", "marker": "D", "markersize": 4},
    },
}
_MARKED = {"linestyle": "", "markeredgecolor": "black", "zorder": 3, "clip_on": False}
_CELL = 0.52  # inches, wide enough for two digits
_MOST_LABELLED = 24  # positions in depth; more than that leave no room for numbers in the cells
_MOST_PANELS = 12  # positions in depth whose curves are drawn


def draw_calibration(result: Mapping, modules: Mapping[str, Mapping] | None, directory: Path) -> list[Path]:
    """Every figure of a calibration, as PNG and SVG, in a directory; gives the files written.

    result: the record of the run. modules: of `Calibration`, with their curves; None for a run without a calibration.
    """
    drawn = []
    for suffix in FORMATS:
        drawn.append(sparsity_by_depth(result, directory / f"sparsity{suffix}"))
        if modules:
            drawn.append(draw_curves(result, modules, directory / f"curves{suffix}"))
    return [path for path in drawn if path is not None]


def sparsity_by_depth(result: Mapping, path: Path) -> Path | None:
    """Draw the share of rows and columns removed from every module: kind of module against depth.

    Two panels side by side, rows of B and columns of A; a cell is one module and holds its sparsity in percent. Gives
    the file written, in the format of its suffix, or None for a run without an adapter.
    """
    sparsity = result["sparsity"]
    if not sparsity:
        return None
    kinds, depths, grids = grid(sparsity)
    labelled = len(depths) <= _MOST_LABELLED
    cell = _CELL if labelled else 0.2
    size = 2 * max(2.4, cell * len(depths)) + 2.9, max(2.4, 0.42 * len(kinds) + 1.4)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    # One scale from 0 to 1 for every run, so that two figures can be held side by side.
    scale = Normalize(0, 1)
    for axes, (axis, title) in zip(panels, _CURVE_AXES, strict=True):
        image = axes.imshow(np.ma.masked_invalid(grids[axis]), cmap="Blues", norm=scale, aspect="auto")
        axes.set_facecolor("none")
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_yticks(range(len(kinds)), kinds, fontsize=9)
        axes.set_xticks(*_depth_ticks(depths, labelled), fontsize=9)
        axes.set_xlabel("depth (block)")
        axes.spines[:].set_visible(False)
        axes.set_xticks(np.arange(len(depths) + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(len(kinds) + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1.5)
        axes.tick_params(which="both", length=0)
        if labelled:
            _write_cells(axes, grids[axis])
    bar = figure.colorbar(image, ax=panels, pad=0.02, fraction=0.05, aspect=20, format=PercentFormatter(1))
    bar.set_label("sparsity (share removed)")
    bar.outline.set_visible(False)
    figure.suptitle(titled("Sparsity by depth", result), fontsize=11)
    return save(figure, path)


def draw_curves(result: Mapping, modules: Mapping[str, Mapping], path: Path) -> Path:
    """Draw what is left of the score as each module's rows and columns are zeroed: kind of module against depth.

    A panel is one module. What is known of a score is drawn: a line where it is known, a band between its bounds where
    the evaluation was cut short; and a marker at the sparsity that was chosen, on the line that had to be held. Of many
    depths a dozen are drawn. Gives the file written, in the format of its suffix.
    """
    calibration = result["calibration"]
    kinds, depths, _ = grid(
        {name: {axis: axes[axis]["sparsity"] for axis, _ in _CURVE_AXES} for name, axes in modules.items()}
    )
    shown = [depths[round(index)] for index in np.linspace(0, len(depths) - 1, min(len(depths), _MOST_PANELS))]
    named = dict(zip(dict.fromkeys(place(name)[0] for name in modules), range(len(kinds)), strict=True))
    figure = Figure(figsize=(max(6.5, 1.05 * len(shown) + 3.2), 1.0 * len(kinds) + 1.9), layout="constrained")
    panels = figure.subplots(len(kinds), len(shown), sharex=True, sharey=True, squeeze=False)
    low, high = _limits(calibration, modules)
    held = _held(calibration)
    # A curve of a cumulative calibration starts where the choices before it have left the score.
    alone = calibration.get("scope", "independent") == "independent"
    start: Curve = {0.0: (calibration["baseline"],) * 2} if alone else {}
    for axes in panels.flat:
        axes.set_visible(False)
    for name, found in modules.items():
        kind, depth = place(name)
        if depth not in shown:
            continue
        axes = panels[named[kind], shown.index(depth)]
        axes.set_visible(True)
        axes.axhline(calibration["baseline"], color="0.5", linewidth=0.8, linestyle="-.")
        axes.axhline(held, color="0.25", linewidth=0.8, linestyle=":")
        for axis, _ in _CURVE_AXES:
            _draw_curve(axes, start | curve_of(found[axis].get("curve", [])), _CURVE_LOOKS[axis], (low, high))
            axes.plot([found[axis]["sparsity"]], [held], **_CURVE_LOOKS[axis]["chosen"], **_MARKED)
        axes.set_xlim(0, 1)
        axes.set_ylim(low, high)
        axes.set_xticks([0, 0.5, 1], ["0", ".5", "1"], fontsize=7)
        axes.tick_params(length=2, labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        if depth == shown[0]:
            axes.set_ylabel(kinds[named[kind]], fontsize=8)
    for column, depth in enumerate(shown):
        panels[0, column].set_title(_depth_name(depth), fontsize=8)
    figure.supxlabel("share of the module's rows or columns that is zeroed", fontsize=9)
    figure.supylabel("few-shot score of the frozen model", fontsize=9)
    figure.suptitle(titled(f"Calibration curves by depth{_some(depths, shown)}", result), fontsize=11)
    figure.legend(handles=_legend(), loc="outside right center", fontsize=8, frameon=False)
    return save(figure, path)


def _draw_curve(axes: Axes, points: Curve, look: Mapping, limits: tuple[float, float]) -> None:
    """One curve, as the band between what its points are at least and at most; a score that is no number is a gap."""
    if not points:
        return
    edges = np.clip(np.asarray(list(points.values())), *limits)
    axes.fill_between(list(points), *edges.T, facecolor=look["color"], alpha=0.3, hatch=look["hatch"], linewidth=0)
    axes.plot(list(points), edges, color=look["color"], linestyle=look["linestyle"], linewidth=1)


def _held(calibration: Mapping) -> float:
    """The score that a level had to hold to pass, the baseline where that is not known or none would do."""
    baseline, threshold = calibration["baseline"], calibration["threshold"]
    if threshold is None:
        return baseline
    chance = calibration.get("chance") if calibration.get("above_chance") else None
    held = line(baseline=baseline, threshold=threshold, chance=chance)
    return held if math.isfinite(held) else baseline


def _limits(calibration: Mapping, modules: Mapping[str, Mapping]) -> tuple[float, float]:
    """From the lowest to the highest number there is to draw, and a little more."""
    values = [calibration["baseline"], _held(calibration)]
    for found in modules.values():
        for axis, _ in _CURVE_AXES:
            for bounds in curve_of(found[axis].get("curve", [])).values():
                values += bounds
    finite = [value for value in values if math.isfinite(value)]
    margin = 0.06 * (max(finite) - min(finite) or 1.0)
    return min(finite) - margin, max(finite) + margin


def _legend() -> list:
    handles: list = []
    for axis, look in _CURVE_LOOKS.items():
        handles.append(
            Patch(facecolor=look["color"], alpha=0.4, hatch=look["hatch"], label=f"{axis}: score, or bounds")
        )
        handles.append(Line2D([], [], label=f"{axis}: sparsity chosen", **look["chosen"], **_MARKED))
    intact = Line2D([], [], color="0.5", linewidth=0.8, linestyle="-.", label="intact model")
    return [*handles, intact, Line2D([], [], color="0.25", linewidth=0.8, linestyle=":", label="to be held")]


def _some(depths: Sequence, shown: Sequence) -> str:
    return "" if len(shown) == len(depths) else f" ({len(shown)} of {len(depths)})"


def _depth_name(depth: tuple[int, ...]) -> str:
    return ".".join(map(str, depth)) or "–"


def _depth_ticks(depths: Sequence[tuple[int, ...]], labelled: bool) -> tuple[list[int], list[str]]:
    step = 1 if labelled else max(1, len(depths) // 16)
    shown = list(range(0, len(depths), step))
    return shown, [_depth_name(depths[index]) for index in shown]


def _write_cells(axes: Axes, cells: np.ndarray) -> None:
    for (row, column), value in np.ndenumerate(cells):
        if not np.isnan(value):
            ink = "white" if value > 0.66 else "black"
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=9, color=ink)


# --- The figures of a report, each with what it shows in words.


@dataclass(frozen=True)
class Shown:
    """A figure as files (PNG, SVG), its title, what is to be seen in a sentence or two, and what is not drawn."""

    title: str
    said: str
    files: tuple[Path, ...]
    cut: str = ""


def draw_gallery(
    found: Sequence[Run], table: pd.DataFrame, compared: pd.DataFrame, predictions: Predictions, results_dir: Path
) -> list[Shown]:
    """Draw into results_dir/report/figures all figures that the runs have something for.

    table: of `grouping.group`; compared: of `comparison_table.table`.
    """
    folder = Path(results_dir) / "report" / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "pareto": (
            "Accuracy and size",
            "Test score against trainable parameters, head included: means over seeds, with one standard deviation. "
            "The grey line joins what nothing smaller is better than.",
            lambda: pareto(table),
        ),
        "methods": (
            "Methods",
            "Mean test score with its 95 % interval over seeds (Student's t); ticks are seeds. A single seed has no "
            "interval.",
            lambda: methods(table, records.table(list(found))),
        ),
        "differences": (
            "Differences from partial",
            "At the same operating point, with 95 % intervals of a paired bootstrap over examples and seeds."
            + _matching(compared),
            lambda: differences(compared),
        ),
        "training": (
            "Training",
            "Training loss and what validation measured; bands reach from the lowest seed to the highest.",
            lambda: training(found),
        ),
        "sparsity": (
            "Sparsity",
            "Share of rows and columns removed from every module, in percent: kind of module against depth.",
            lambda: sparsity(found),
        ),
        "calibration": (
            "Calibration curves",
            "What is left of the few-shot score when a module's least important rows or columns are zeroed: medians "
            "over depth. Where evaluation was cut short a score is known within bounds, the band around the line.",
            lambda: curve_lines(calibrations(found, Path(results_dir))),
        ),
        "sparsity_agreement": (
            "Agreement of sparsities",
            "Correlation (Pearson) of what two calibrations of a model removed, over all modules, rows and columns.",
            lambda: sparsity_alike(found),
        ),
        "prediction_agreement": (
            "Agreement of predictions",
            "How often two methods say the same of a test example, means over the seeds that both have.",
            lambda: predictions_alike(table, predictions),
        ),
    }
    drawn = []
    for stem, (title, said, make) in figures.items():
        for old in folder.glob(f"{stem}.*"):  # of an earlier report, which may have been of other runs
            old.unlink()
        drawing = make()
        files = write(drawing, folder, stem)
        if files:
            drawn.append(Shown(title, f"{said} {drawing.cut}".strip(), tuple(files), drawing.cut))
    return drawn


def _matching(compared: pd.DataFrame) -> str:
    """What the hatched strip of the differences means, and what there is in its place where less is better."""
    metrics = set(compared["metric"]) if len(compared) else set()
    said = ""
    if metrics - LOWER_IS_BETTER:
        said += " An interval that begins in the hatched strip, less than a point below zero, or to the right of it "
        said += "matches."
    if lower := sorted(metrics & LOWER_IS_BETTER):
        said += f" Of {' and '.join(lower)} less is better: below zero is better, and nothing matches."
    return said


def analyses(results_dir: Path) -> list[Shown]:
    """The figures that `scripts/analyses.py` has left beside the runs."""
    shown = []
    for file in sorted(Path(results_dir).glob("analyses/*/*/*/figure.svg")):
        what, task, name = file.parts[-4:-1]
        shown.append(Shown(f"Analysis of calibration: {what}", f"{task}, {name.rpartition('-')[0]}.", (file,)))
    return shown
