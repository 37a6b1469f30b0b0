"""Figures of one run and over many runs, drawn from records alone: the same records give the same bytes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, PercentFormatter

from partial_lora.calibration.level_search import Curve, curve_of, line
from partial_lora.files import grouped, read_json
from partial_lora.launching.directory import CALIBRATION, EXAMPLE, PICTURE
from partial_lora.masks import AXES, Sparsity
from partial_lora.report import seed_groups, tables
from partial_lora.report.depth import depth_name, depth_of, grid, without_common_start
from partial_lora.report.drawing import (
    BLUE,
    COLOURS,
    MARKERS,
    VERMILLION,
    fitted,
    heat,
    legend_below,
    legend_of_methods,
    lists,
    look,
    panels,
    plain,
    save,
    save_both,
    scored,
    sized,
    words_of,
)
from partial_lora.report.examples import are_of, hardest, rgb, shortened
from partial_lora.report.predictions import read_all
from partial_lora.report.records import Run
from partial_lora.report.rows import NONE, method_of, panel_of, task_of
from partial_lora.report.summary import measured
from partial_lora.tasks.metrics import LOWER_IS_BETTER

MOST = 9  # panels of a figure
FRONT = (
    "Each mark is a row, the mean over its seeds with one standard deviation; the head is counted, too. The grey line "
    "joins the rows that no smaller row beats."
)
_MOST_ROWS, _MOST_LINES, _MOST_MARKS = 48, 12, 8  # of a panel, of a line
_MOST_LETTERS = 40  # of the name of a row
_MOST_MAPS = 5
_MOST_NUMBERED = 24  # positions in depth; more than that leave no room for numbers in the cells
_MOST_DEPTHS = 12  # positions in depth whose curves are drawn
_MOST_IMAGES, _ACROSS, _MOST_WRONG = 24, 8, 8
_FAR = 3  # times the usual distance from zero: a row that lies wholly beyond is a number at the end of the axis

_VERDICTS = {"better": (">", True), "as good": ("o", True), "worse": ("<", True), "open": ("o", False)}
_CURVES = {  # rows are darker than columns, and their larger marker shows behind the other
    "rows": ({"color": BLUE, "linestyle": "-"}, None, {"color": BLUE, "marker": "o", "markersize": 7}),
    "columns": (
        {"color": VERMILLION, "linestyle": "--"},
        "////",
        {"color": VERMILLION, "marker": "D", "markersize": 4},
    ),
}
_CHOSEN = {"linestyle": "", "markeredgecolor": "black", "zorder": 3, "clip_on": False}
_INTACT = {"color": "0.5", "linewidth": 0.8, "linestyle": "-."}
_HELD = {"color": "0.25", "linewidth": 0.8, "linestyle": ":"}
_AXES = {"rows": "rows of B", "columns": "columns of A"}

History = Sequence[Mapping]
Band = list[tuple[int, float, float, float]]  # step, mean, lowest, highest


@dataclass(frozen=True)
class Drawing:
    """A figure, and how many it draws of the places, sets or calibrations (`what`) that there are.

    names: what its elements show under the pointer, by id.
    """

    figure: Figure
    drawn: int = 1
    whole: int = 1
    what: str = "places"
    names: Mapping[str, str] = field(default_factory=dict)

    @property
    def cut(self) -> str:
        """A sentence where not all is drawn, else nothing."""
        if self.drawn >= self.whole:
            return ""
        return f"{self.drawn} of {self.whole} {self.what} are drawn; --where chooses others."


def titled(what: str, result: Mapping) -> str:
    """Return what a figure shows, and of which run; also the adapter's sparsity where it is known."""
    names = [method_of(result), result["config"]["model"]["name"], task_of(result)]
    words = f"{what}: {', '.join(names)}, seed {result['seed']}"
    sparsity = result.get("parameters", {}).get("adapter_sparsity")
    return words if sparsity is None else f"{words}\nadapter sparsity {sparsity:.1%}"


def _titled(axes: Axes, place: str, drawn: Sized = (), whole: Sized = ()) -> None:
    """Name the place, and how many of its rows or lines are drawn if not all."""
    some = f" ({len(drawn)} of {len(whole)})" if len(drawn) < len(whole) else ""
    axes.set_title(f"{place}{some}", fontsize=10, loc="left")


# Training


def points(history: History, key: str) -> list[tuple[int, float]]:
    """Return (step, value) of every entry of Trainer's log that has a key and a finite number there."""
    logged = ((entry["step"], entry[key]) for entry in history if entry.get(key) is not None)
    return [(step, value) for step, value in logged if math.isfinite(value)]


def band(histories: Sequence[History], key: str) -> Band:
    """Return mean, lowest and highest of a key of Trainer's log at the steps that all of the histories have."""
    logged = [values for history in histories if (values := dict(points(history, key)))]
    steps = sorted(set.intersection(*map(set, logged))) if logged else []
    at_step = ((step, [log[step] for log in logged]) for step in steps)
    return [(step, float(np.mean(values)), min(values), max(values)) for step, values in at_step]


def selected(record: Mapping) -> str:
    """Return the metric of the test where validation logged it, else "loss"."""
    metrics = record.get("metrics") or {}
    metric = next((split["primary"] for name in ("test", "validation") if (split := metrics.get(name))), "accuracy")
    return metric if any(f"eval_{metric}" in entry for entry in record["history"]) else "loss"


def _banded(axes: Axes, line: Band, *, color: str, **style) -> None:
    """Draw the means over steps as a line, and from the lowest to the highest a band."""
    if line:
        steps, means, low, high = zip(*line, strict=True)
        axes.plot(steps, means, color=color, markevery=max(1, len(steps) // _MOST_MARKS), **style)
        if low != high:
            axes.fill_between(steps, low, high, color=color, alpha=0.18, linewidth=0)


def draw_predictions(result: Mapping, folder: Path, rows) -> Path | None:
    """Draw test images of a run with its predictions, and write the first image of the split as a file of its own.

    Its worst mistakes come first, in red and with their label; other images follow in the order of the split.

    rows: the task's test split. Gives the file; None, and writes nothing, where the rows are no longer at hand, have no
    images or are not of classes.
    """
    tables = read_all([folder])
    if rows is None or "image" not in rows.column_names or not tables or "label_name" not in tables[0].column_names:
        return None
    table = tables[0].to_pandas()
    if not are_of(rows, table["label"].tolist()):
        return None
    wrong = [example.index for example in hardest(tables, _MOST_WRONG) if example.label != example.predicted[0]]
    indices = [*wrong, *(index for index in range(len(rows)) if index not in wrong)][:_MOST_IMAGES]
    down = -(-len(indices) // _ACROSS)
    figure = Figure(figsize=(9, 1.3 * down + 0.6), layout="constrained")
    for number, index in enumerate(indices, 1):
        axes = figure.add_subplot(down, _ACROSS, number)
        axes.set_axis_off()
        axes.imshow(rgb(rows[index]["image"]))
        label, predicted = str(table["label_name"][index]), str(table["prediction_name"][index])
        right = label == predicted
        words = predicted if right else f"{predicted}, not {label}"
        axes.set_title(words.replace("$", r"\$"), fontsize=9, color="black" if right else VERMILLION)
    right = (table["label"] == table["prediction"]).sum()
    figure.suptitle(titled(f"{right} of {len(table)} test images are right", result), fontsize=10)
    rgb(rows[0]["image"]).save(folder / EXAMPLE)
    return save(figure, folder / PICTURE)


def training(runs: Sequence[Run]) -> Drawing | None:
    """Draw training loss above and validation's metric below, in a pair of panels for each task and model.

    Lines are means over seeds, bands reach from the lowest seed to the highest.
    """
    places = grouped(runs, lambda run: (run.row["task"], run.row["model"]))
    parts = list(places.items())[: MOST // 2]
    across = min(3, len(parts)) if len(parts) != 4 else 2
    figure, drawn = panels(2 * across * -(-len(parts) // across), wide=3.9, high=2.1, across=across)
    used: list[tuple[str, str]] = []
    for number, ((task, model), of_place) in enumerate(parts):
        above = number // across * 2 * across + number % across
        pair = drawn[above], drawn[above + across]
        pair[1].sharex(pair[0])
        metric = selected(of_place[0].record)
        folders = list(grouped(of_place, lambda run: run.row["group"]).values())
        for of_folder in folders[:_MOST_LINES]:
            used.append((of_folder[0].row["method"], of_folder[0].row["operating_point"]))
            its_look, histories = look(*used[-1]), [run.record["history"] for run in of_folder]
            style = {"color": its_look.color, "linestyle": its_look.linestyle, **its_look.markers}
            for axes, key in zip(pair, ("loss", f"eval_{metric}"), strict=True):
                _banded(axes, band(histories, key), linewidth=1.4, markersize=4, **style)
        pair[0].set_ylabel("training loss", fontsize=9)
        pair[0].tick_params(labelbottom=False)
        scored(pair[1], metric, f"validation {metric}")
        pair[1].set_xlabel("optimizer step", fontsize=9)
        _titled(pair[0], f"{task}, {model}", folders[:_MOST_LINES], folders)
        for axes in pair:
            plain(axes)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    for axes in drawn:
        axes.set_visible(bool(axes.lines))
    legend_of_methods(figure, used, lines=True)
    return Drawing(figure, len(parts), len(places)) if any(axes.lines for axes in drawn) else None


def draw_training(run: Run) -> list[Path]:
    """Draw loss and validation score of one run into its directory; gives the files, none of a run that logged none."""
    drawing = training([run])
    return save_both(drawing.figure, run.directory, "training") if drawing else []


# Scores


def front(points: Iterable[tuple[float, float]], metric: str) -> list[tuple[float, float]]:
    """Return the points (cost, score) for which no point at that cost or less has a better score, by cost."""
    sign = -1 if metric in LOWER_IS_BETTER else 1
    best: list[tuple[float, float]] = []
    for cost, score in sorted(points, key=lambda point: (point[0], -sign * point[1])):
        if not best or sign * score > sign * best[-1][1]:
            best.append((cost, score))
    return best


def pareto(of_place: pd.DataFrame) -> Drawing:
    """Draw test score against trainable parameters, adapter and head together; the line joins what nothing beats.

    Rows under other conditions than most are small grey dots, and the axis of scores does not reach out for them.

    of_place: of `folders.group`, the rows of a task, model and metric.
    """
    of_place = of_place.assign(size=of_place["adapter_parameters"] + of_place["head_parameters"])
    part, others = of_place[of_place["usual"]], of_place[~of_place["usual"]]
    figure, (axes,) = panels(1, wide=3.9, high=2.9, least=4.4)
    metric, names = part["metric"].iloc[0], {}
    best = front(zip(part["size"], part["test_mean"], strict=True), metric)
    ends = [*best, (float(of_place["size"].max()) * 1.4, best[-1][1])]
    axes.plot(*zip(*ends, strict=True), color="0.6", linewidth=1, drawstyle="steps-post", zorder=1)
    axes.plot(others["size"], others["test_mean"], ".", color="0.6", markersize=5, zorder=1)
    for row in part.itertuples():
        its_look = look(row.method, row.operating_point)
        style = {"color": its_look.color, "linestyle": "", "capsize": 3, "elinewidth": 1, "markersize": 7}
        mark, *_ = axes.errorbar(row.size, row.test_mean, yerr=row.test_std, **style, **its_look.markers)
        mark.set_gid(f"row-{row.Index}")
        score, size = measured(metric, row.test_mean, row.test_std), f"{row.adapter_parameters:,.0f} parameters"
        names[f"row-{row.Index}"] = f"{words_of(row)}: {score} (n={row.n}), {size}"
    spread = part["test_std"].fillna(0)
    sized(axes, of_place["size"])
    fitted(axes, [*(part["test_mean"] - spread), *(part["test_mean"] + spread)])
    scored(axes, metric)
    _titled(axes, ", ".join(part[["task", "model"]].iloc[0]))
    plain(axes)
    legend_of_methods(figure, list(zip(part["method"], part["operating_point"], strict=True)), lines=False)
    return Drawing(figure, names=names)


def methods(of_place: pd.DataFrame, frame: pd.DataFrame) -> Drawing:
    """Draw every method's mean test score with its 95 % interval over seeds, and the seeds as ticks.

    Rows under other conditions than most are left out. The axis reaches as far as the seeds do, and half as far again
    for the intervals.

    of_place: as of `pareto`; frame: the runs.
    """
    usual = of_place[of_place["usual"]]
    part = usual.head(_MOST_ROWS)
    part = part.assign(place=range(len(part)))
    figure, (axes,) = lists([len(part)])
    seeds = {key: runs["test"].tolist() for key, runs in frame.groupby(["group", "precision"])}
    rows = [(row, seeds[row.group, row.precision]) for row in part.itertuples()]
    ticks = [(score, row.place) for row, scores in rows if row.n > 1 for score in scores]
    if ticks:
        axes.plot(*zip(*ticks, strict=True), "|", color="0.55", markersize=9, zorder=1)
    for key, of_method in part.groupby(["method", "operating_point"], sort=False):
        its_look = look(*key)
        style = {"color": its_look.color, "linestyle": "", "capsize": 3, "markersize": 6.5, **its_look.markers}
        axes.errorbar(of_method["test_mean"], of_method["place"], xerr=of_method["test_half"], **style)
    tests = np.array([score for _, scores in rows for score in scores])
    half, room = part["test_half"].fillna(0), 0.5 * (tests.max() - tests.min())
    low, high = (part["test_mean"] - half).min(), (part["test_mean"] + half).max()
    fitted(axes, [max(low, tests.min() - room), min(high, tests.max() + room)], "x")
    _listed(axes, [shortened(words_of(row), _MOST_LETTERS) for row in part.itertuples()])
    scored(axes, part["metric"].iloc[0], axis="x")
    _titled(axes, ", ".join(part[["task", "model"]].iloc[0]), part, usual)
    return Drawing(figure)


@dataclass(frozen=True)
class Intervals:
    """Differences of methods from one, a row each (method, verdict, difference, low, high). margin: in their unit."""

    title: str
    label: str
    margin: float
    rows: pd.DataFrame


def intervals(sets: Sequence[Intervals]) -> Drawing | None:
    """Draw how far methods are from one, with intervals; in the shaded strip a method is still as good.

    What is far from all others is a number at the end of the axis.
    """
    parts = [one for one in sets if len(one.rows)][:MOST]
    if not parts:
        return None
    figure, drawn = lists([min(_MOST_ROWS, len(one.rows)) for one in parts])
    for axes, one in zip(drawn, parts, strict=True):
        part = one.rows.head(_MOST_ROWS)
        axes.axvline(0, color="0.3", linewidth=1)
        axes.axvspan(-one.margin, 0, facecolor="0.9", edgecolor="0.75", hatch="///", linewidth=0, zorder=0)
        for height, row in enumerate(part.itertuples()):
            marker, filled = _VERDICTS[row.verdict]
            ends = [[row.difference - row.low], [row.high - row.difference]]
            color = _color(row.method)
            style = {"color": color, "markerfacecolor": color if filled else "white", "capsize": 3, "markersize": 7}
            axes.errorbar(row.difference, height, xerr=ends, marker=marker, linestyle="", **style)
        _cut_off(axes, part)
        _listed(axes, [f"{shortened(row.method, _MOST_LETTERS)}: {row.verdict}" for row in part.itertuples()])
        axes.set_xlabel(one.label, fontsize=9)
        _titled(axes, one.title, part, one.rows)
    return Drawing(figure, len(parts), len(sets), "sets")


def _color(method: str) -> str:
    name, _, point = method.partition(", ")
    return look(name, point or NONE).color


def _cut_off(axes: Axes, part: pd.DataFrame) -> None:
    """Leave out of the axis the rows that would press all others together; their numbers stand at its end."""
    reach = _FAR * float(part[["low", "high"]].abs().max(axis=1).median())
    far = (part["low"] > reach) | (part["high"] < -reach)
    near = part.loc[~far, ["low", "high"]]
    if near.empty or not far.any():
        return
    room = 0.06 * (near["high"].max() - min(0, near["low"].min()))
    left, right = min(0, near["low"].min()) - room, max(0, near["high"].max()) + room
    axes.set_xlim(left, right)
    for height, (row, is_far) in enumerate(zip(part.itertuples(), far, strict=True)):
        if is_far:
            value = f"{row.difference:+.3g}"
            text, end, side = (f"◂ {value}", left, "left") if row.difference < 0 else (f"{value} ▸", right, "right")
            axes.text(end, height, text, color=_color(row.method), ha=side, va="center", fontsize=8)


def _listed(axes: Axes, names: Sequence[str]) -> None:
    """Name rows from top to bottom."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)
    plain(axes)
    axes.xaxis.set_major_locator(MaxNLocator(5))


# Sparsities


def maps(runs: Sequence[Run]) -> dict[tuple[str, str, str, str], Sparsity]:
    """Return the sparsities of every calibration, by (task, model, importance, point): a mean over its runs.

    Of the methods that share a calibration, runs of `partial` count if there are any: others may move sparsities. Of
    these count the ones under the usual conditions that are no variants, again if there are any.
    """
    every = seed_groups.folders(runs)
    usual = seed_groups.usual_conditions(every)
    calibrated = [
        folder for folder in every if folder.runs[0].record["calibration"] and folder.runs[0].record.get("sparsity")
    ]
    averaged = {}
    for key, group in grouped(calibrated, lambda folder: _calibration(folder.runs[0])).items():
        group = [folder for folder in group if folder.row["method"] == "partial"] or group
        plain = [
            folder
            for folder in group
            if folder.row["conditions"] == usual[panel_of(folder.row)].row["conditions"] and not folder.is_variant
        ]
        averaged[key] = mean_sparsity([run.record["sparsity"] for folder in plain or group for run in folder.runs])
    return averaged


def _calibration(run: Run) -> tuple[str, str, str, str]:
    measure = (run.record["config"].get("importance") or {}).get("name", NONE)
    return run.row["task"], run.row["model"], measure, run.row["operating_point"]


def mean_sparsity(sparsities: Sequence[Sparsity]) -> Sparsity:
    """Return the mean sparsity of every module and axis, over those that have the modules of the first."""
    comparable = [modules for modules in sparsities if modules.keys() == sparsities[0].keys()]
    return {
        module: {axis: float(np.mean([modules[module][axis] for modules in comparable])) for axis in AXES}
        for module in (comparable[0] if comparable else ())
    }


def sparsity(runs: Sequence[Run]) -> Drawing | None:
    """Draw sparsity in percent, kind of module against depth: two panels for every calibration."""
    whole = maps(runs)
    sparsities = {
        f"{task}, {model}\n{measure}, {point}: ": modules
        for (task, model, measure, point), modules in list(whole.items())[:_MOST_MAPS]
    }
    return Drawing(_sparsity_maps(sparsities), len(sparsities), len(whole), "calibrations") if sparsities else None


def sparsity_by_depth(result: Mapping) -> Figure | None:
    """Draw the share of rows and columns that a run removed from every module; None for a run without an adapter."""
    if not result["sparsity"]:
        return None
    figure = _sparsity_maps({"": result["sparsity"]})
    figure.suptitle(titled("Sparsity in percent", result), fontsize=11)
    return figure


def _sparsity_maps(sparsities: Mapping[str, Sparsity]) -> Figure:
    """Draw sparsities by title: rows of B above columns of A, a cell a module, white where there is none."""
    grids = [grid(modules) for modules in sparsities.values()]
    deepest, most = max(len(depths) for _, depths, _ in grids), max(len(kinds) for kinds, _, _ in grids)
    wide = max(3.2, min(0.4 * deepest, 10) + 0.9)
    figure, drawn = panels(2 * len(grids), wide=wide, high=0.27 * most + 0.6, across=1)
    for index, (title, (kinds, depths, cells)) in enumerate(zip(sparsities, grids, strict=True)):
        form = ".0f" if len(depths) <= _MOST_NUMBERED else ""
        ticks = range(0, len(depths), max(1, len(depths) // _MOST_DEPTHS))
        for side, (axis, name) in enumerate(_AXES.items()):
            axes = drawn[2 * index + side]
            heat(axes, 100 * cells[axis], high=100, form=form, size=7.5)
            axes.set_yticks(range(len(kinds)), kinds)
            axes.set_xticks(ticks, [depth_name(depths[tick]) for tick in ticks])
            axes.set_title(("" if side else title) + name, fontsize=9, loc="left")
    drawn[-1].set_xlabel("depth (block)", fontsize=9)
    figure.suptitle("Sparsity in percent: the darker, the less is kept", fontsize=10)
    return figure


# Calibration curves


def draw_calibration(result: Mapping, modules: Mapping[str, Mapping] | None, directory: Path) -> list[Path]:
    """Draw every figure of a run's calibration, as PNG and SVG, in its directory; gives the files.

    result: the record of the run. modules: of `Calibration`, with their curves; None for a run without a calibration.
    """
    figures = {
        "sparsity": sparsity_by_depth(result),
        "curves": curves_by_depth(result, modules) if modules else None,
    }
    return [path for stem, figure in figures.items() if figure for path in save_both(figure, directory, stem)]


def curves_by_depth(result: Mapping, modules: Mapping[str, Mapping]) -> Figure:
    """Draw what is left of the score as each module's rows and columns are zeroed: kind of module against depth.

    A panel is one module. A line shows a score that is known, a band the bounds of a score whose evaluation was cut
    short; a marker shows the sparsity that was chosen, at the score that had to be held. Of many depths a dozen are
    drawn.
    """
    calibration = result["calibration"]
    shares = {name: {axis: content[axis]["sparsity"] for axis in AXES} for name, content in modules.items()}
    kinds, depths, _ = grid(shares)
    drawn_depths = [depths[round(index)] for index in np.linspace(0, len(depths) - 1, min(len(depths), _MOST_DEPTHS))]
    lines = dict(zip(dict.fromkeys(depth_of(name)[0] for name in modules), range(len(kinds)), strict=True))
    figure = Figure(figsize=(max(6.5, 1.05 * len(drawn_depths) + 3.2), 1.0 * len(kinds) + 1.9), layout="constrained")
    drawn = figure.subplots(len(kinds), len(drawn_depths), sharex=True, sharey=True, squeeze=False)
    held = _held(calibration)
    # A curve of a cumulative calibration starts where the choices before it have left the score.
    alone = calibration.get("scope", "independent") == "independent"
    start: Curve = {0.0: (calibration["baseline"],) * 2} if alone else {}
    curves = {
        (name, axis): start | curve_of(content[axis].get("curve", []))
        for name, content in modules.items()
        for axis in AXES
    }
    bounds = [bound for curve in curves.values() for pair in curve.values() for bound in pair]
    finite = [bound for bound in (calibration["baseline"], held, *bounds) if math.isfinite(bound)]
    margin = 0.06 * (max(finite) - min(finite) or 1.0)
    low, high = min(finite) - margin, max(finite) + margin
    for axes in drawn.flat:
        axes.set_visible(False)
    for name, content in modules.items():
        kind, depth = depth_of(name)
        if depth not in drawn_depths:
            continue
        axes = drawn[lines[kind], drawn_depths.index(depth)]
        axes.set_visible(True)
        axes.axhline(calibration["baseline"], **_INTACT)
        axes.axhline(held, **_HELD)
        for axis, (style, hatch, chosen) in _CURVES.items():
            if curve := curves[name, axis]:  # a score that is no number is a gap
                edges = np.clip(np.asarray(list(curve.values())), low, high)
                axes.fill_between(list(curve), *edges.T, facecolor=style["color"], alpha=0.3, hatch=hatch, linewidth=0)
                axes.plot(list(curve), edges, linewidth=1, **style)
            axes.plot([content[axis]["sparsity"]], [held], **chosen, **_CHOSEN)
        axes.set_xlim(0, 1)
        axes.set_ylim(low, high)
        axes.set_xticks([0, 0.5, 1], ["0", ".5", "1"], fontsize=7)
        axes.tick_params(length=2, labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
        if depth == drawn_depths[0]:
            axes.set_ylabel(kinds[lines[kind]], fontsize=8)
    for column, depth in enumerate(drawn_depths):
        drawn[0, column].set_title(depth_name(depth), fontsize=8)
    figure.supxlabel("share of the module's rows or columns that is zeroed", fontsize=9)
    figure.supylabel("few-shot score of the frozen model", fontsize=9)
    some = f" ({len(drawn_depths)} of {len(depths)})" if len(drawn_depths) < len(depths) else ""
    figure.suptitle(titled(f"Calibration curves by depth{some}", result), fontsize=11)
    handles: list = []
    for axis, (style, hatch, chosen) in _CURVES.items():
        handles.append(Patch(facecolor=style["color"], alpha=0.4, hatch=hatch, label=f"{axis}: score, or bounds"))
        handles.append(Line2D([], [], label=f"{axis}: sparsity chosen", **chosen, **_CHOSEN))
    handles += [Line2D([], [], label="intact model", **_INTACT), Line2D([], [], label="to be held", **_HELD)]
    figure.legend(handles=handles, loc="outside right center", fontsize=8, frameon=False)
    return figure


def _held(calibration: Mapping) -> float:
    """Return the score that a level had to hold to pass; the baseline where it is not known or no score would do."""
    baseline, threshold = calibration["baseline"], calibration["threshold"]
    if threshold is None:
        return baseline
    chance = calibration.get("chance") if calibration.get("above_chance") else None
    held = line(baseline=baseline, threshold=threshold, chance=chance)
    return held if math.isfinite(held) else baseline


def calibrations(runs: Sequence[Run], results_dir: Path | None) -> dict[str, dict]:
    """Return {baseline, curves} of calibration.json files by "task, model, importance": runs', then those without runs.

    results_dir: where those without runs are; None for runs' alone.
    curves: `kind_curves`. One of each is read, whatever the operating point: they share their curves. A file that
    cannot be read is skipped.
    """
    places = [
        (", ".join(_calibration(run)[:3]), run.directory) for run in runs if run.record["calibration"] is not None
    ]
    for file in sorted(results_dir.glob(f"calibrations/*/*/*/{CALIBRATION}")) if results_dir else ():
        task, model, measure = file.parts[-4:-1]
        places.append((f"{task}, {model}, {measure.rpartition('-')[0]}", file.parent))
    contents: dict[str, dict] = {}
    for title, directory in places:
        if title not in contents:
            try:
                content = read_json(directory / CALIBRATION)
                contents[title] = {"baseline": float(content["baseline"]), "curves": kind_curves(content["modules"])}
            except (OSError, ValueError, KeyError, TypeError, AttributeError):
                continue
    return contents


def kind_curves(modules: Mapping[str, Mapping]) -> dict[tuple[str, str], list[tuple[float, float, float]]]:
    """Return the curves of a calibration by (kind of module, axis): (level, lowest, highest), medians over depth.

    lowest and highest are the bounds within which scores are known; a level of which no score is bounded on both sides
    is left out.
    """
    places = {name: depth_of(name)[0] for name in modules}
    kinds = list(dict.fromkeys(places.values()))
    names = dict(zip(kinds, without_common_start(kinds), strict=True))
    bounds: dict[tuple[str, str], dict[float, list[tuple[float, float]]]] = {}
    for name, axes in modules.items():
        for axis in AXES:
            for level, (low, high) in curve_of(axes.get(axis, {}).get("curve", [])).items():
                if np.isfinite(low) and np.isfinite(high):
                    bounds.setdefault((names[places[name]], axis), {}).setdefault(level, []).append((low, high))
    return {
        key: [(level, *map(median, zip(*pairs, strict=True))) for level, pairs in sorted(by_level.items())]
        for key, by_level in bounds.items()
    }


def curve_lines(calibrations: Mapping[str, Mapping]) -> Drawing | None:
    """Draw what is left of the few-shot score as modules are zeroed: by kind of module, medians over depth.

    calibrations: of `calibrations`, by a title each. Where evaluation was cut short a score is known within bounds: a
    band between these, and the line in their middle. The level line is the intact model.
    """
    whole = [(title, entry["baseline"], entry["curves"]) for title, entry in calibrations.items() if entry["curves"]]
    parts = whole[: MOST // 2]
    if not parts:
        return None
    figure, drawn = panels(2 * len(parts), wide=3.7, high=2.5, across=2)
    handles: dict[str, Line2D] = {}
    for number, (title, baseline, curves) in enumerate(parts):
        pair = dict(zip(_AXES, drawn[2 * number : 2 * number + 2], strict=True))
        pair["columns"].sharey(pair["rows"])
        kinds = list(dict.fromkeys(kind for kind, _ in curves))
        for (kind, axis), curve in curves.items():
            levels, low, high = zip(*curve, strict=True)
            at = kinds.index(kind)
            style = {"color": COLOURS[at % len(COLOURS)], "linestyle": ("-", "--", "-.", ":")[at % 4], "linewidth": 1.3}
            style |= {"marker": MARKERS[at % len(MARKERS)], "markersize": 4.5, "markevery": max(1, len(levels) // 6)}
            pair[axis].fill_between(levels, low, high, color=style["color"], alpha=0.05, linewidth=0)
            (drawn_line,) = pair[axis].plot(levels, np.mean([low, high], axis=0), label=kind, **style)
            handles.setdefault(kind, drawn_line)
        for axis, axes in pair.items():
            axes.axhline(baseline, color="0.4", linewidth=1, linestyle="-.")
            axes.set_xlim(0, 1)
            axes.xaxis.set_major_formatter(PercentFormatter(1))
            axes.set_xlabel(f"share of {_AXES[axis]} zeroed", fontsize=9)
            axes.set_title(title if axis == "rows" else "", fontsize=9, loc="left")
            plain(axes)
        pair["rows"].set_ylabel("few-shot score", fontsize=9)
    legend_below(figure, list(handles.values()))
    return Drawing(figure, len(parts), len(whole), "calibrations")


# The figures of a report, each with what it shows in words


@dataclass(frozen=True)
class Shown:
    """A figure as files (PNG, SVG), its title, what is to be seen in a sentence or two, and what is not drawn.

    place: the task, model and metric that it is of, None for one of all.
    """

    title: str
    caption: str
    files: tuple[Path, ...]
    cut: str = ""
    place: tuple[str, str, str] | None = None


def draw_gallery(every: Sequence[Run], results_dir: Path, is_choice: bool = False) -> list[Shown]:
    """Draw into results_dir/report/figures all figures that runs have something for, without searches for a rate.

    is_choice: runs are some of the folder's, so that calibrations without runs are not drawn.
    """
    runs = [run for best in seed_groups.without_searches(seed_groups.folders(every)) for run in best.runs]
    frame = seed_groups.table(runs)
    table = seed_groups.group(frame)
    searched = " Of each row the best learning rate on validation is drawn." if len(runs) < len(every) else ""
    folder = Path(results_dir) / "report" / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    drawings: dict[str, tuple] = {}
    for number, (place, part) in enumerate(tables.places(table), start=1):
        drawings[f"pareto-{number}"] = (
            pareto(part),
            f"Test {place[2]} against trainable parameters",
            f"{FRONT} Grey dots were trained under other conditions.{searched}",
            place,
        )
        drawings[f"methods-{number}"] = (
            methods(part, frame),
            "Test score of each row",
            "The mean test score with its 95 % interval over seeds (Student's t). Small ticks are the seeds. One seed "
            "has no interval. An interval without an end goes on beyond the panel." + searched,
            place,
        )
    drawings |= {
        "training": (
            training(runs),
            "Loss and validation score during training",
            "Lines are means over seeds. Bands reach from the lowest seed to the highest." + searched,
        ),
        "sparsity": (
            sparsity(runs),
            "What calibration removed",
            "The share of rows and columns that each module goes without, in percent, by kind of module and depth.",
        ),
        "calibration": (
            curve_lines(calibrations(runs, None if is_choice else Path(results_dir))),
            "Calibration curves",
            "The few-shot score when the least important rows or columns of a module are zeroed: medians over depth. "
            "The band shows the bounds where an evaluation stopped early.",
        ),
    }
    for old in (*folder.glob("*.png"), *folder.glob("*.svg")):  # from an earlier report, perhaps of other runs
        old.unlink()
    gallery = []
    for stem, (drawing, title, caption, *places) in drawings.items():
        if drawing is not None:
            files = tuple(save_both(drawing.figure, folder, stem, drawing.names))
            gallery.append(Shown(title, f"{caption} {drawing.cut}".strip(), files, drawing.cut, *places))
    return gallery
