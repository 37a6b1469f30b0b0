"""The figure of an analysis, drawn from analysis.json alone.

Lightness, markers, dashes and hatches tell things apart and colour only helps, as in the figures of a run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

from partial_lora.analysis_tables import is_reference, number, point_name, spread
from partial_lora.figures import save
from partial_lora.places import place
from partial_lora.report_panels import plain

_BLUE, _VERMILLION, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "0.35"  # Okabe and Ito's palette
_ROWS = {"color": _BLUE, "marker": "o", "label": "rows"}
_COLUMNS = {"color": _VERMILLION, "marker": "s", "markerfacecolor": "none", "label": "columns"}
_AXES = {"rows": _ROWS, "columns": _COLUMNS}
_ACROSS = 5  # panels in one line


def draw(analysis: Mapping, path: Path) -> Path:
    """Draw a finished analysis; gives the file written, in the format of its suffix."""
    return save(_DRAWN[analysis["what"]](analysis), Path(path))


def _agreement(analysis: Mapping) -> Figure:
    """Above, every two measures at each sparsity; below, module by module at the first of the sparsities."""
    summary, measures = analysis["summary"], analysis["config"]["analysis"]["measures"]
    point, lines = next(iter(summary.items()))
    across = min(_ACROSS, len(lines))
    down = -(-len(lines) // across)
    wide = max(7.0, 2.9 * len(summary), 2.3 * across)
    figure = Figure(figsize=(wide, 3.4 + 1.9 * down + 0.6), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=[3.4, 1.9 * down + 0.4])
    panels = above.subplots(1, len(summary), squeeze=False)[0]
    for axes, (name, of_point) in zip(panels, summary.items(), strict=True):
        _matrix(axes, measures, of_point, point_name(name))
    above.suptitle(_title("Agreement of the chosen rows and columns (Jaccard)", analysis), fontsize=11)
    _modules(below, lines, analysis["parts"][point]["comparisons"], across, down)
    below.suptitle(f"Module by module at {point_name(point)}, beyond chance: 1 the same choice, 0 chance", fontsize=10)
    return figure


def _matrix(axes: Axes, measures: Sequence[str], lines: Sequence[Mapping], title: str) -> None:
    values = np.full((len(measures) - 1, len(measures) - 1), np.nan)
    for line in lines:
        row, column = measures.index(line["second"]) - 1, measures.index(line["first"])
        values[row, column] = np.nan if line["beyond_chance"] is None else line["beyond_chance"]
        ink = "white" if (line["beyond_chance"] or 0) > 0.55 else "black"
        axes.text(column, row, number(line["jaccard"]), ha="center", va="center", fontsize=9, color=ink)
    axes.imshow(np.ma.masked_invalid(values), cmap="Blues", norm=Normalize(0, 1), aspect="auto")
    axes.set_xticks(range(len(measures) - 1), measures[:-1], fontsize=8, rotation=30, ha="right")
    axes.set_yticks(range(len(measures) - 1), measures[1:], fontsize=8)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title(f"{title}\nby chance {number(lines[0]['chance'])}", fontsize=9)


def _modules(
    below: SubFigure, lines: Sequence[Mapping], comparisons: Sequence[Mapping], across: int, down: int
) -> None:
    depths = sorted({place(line["module"])[1] for line in comparisons})
    panels = below.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    for axes in panels.flat[len(lines) :]:
        axes.set_visible(False)
    for axes, pair in zip(panels.flat, lines, strict=False):
        axes.axhline(0, color=_GREY, linewidth=1, linestyle=":")
        for axis, style in _AXES.items():
            told = [
                line
                for line in comparisons
                if (line["first"], line["second"], line["axis"]) == (pair["first"], pair["second"], axis)
                and line["kept"] < line["size"]
            ]
            places = [depths.index(place(line["module"])[1]) for line in told]
            beyond = [(line["jaccard"] - line["chance"]) / (1 - line["chance"]) for line in told]
            axes.plot(places, beyond, linestyle="none", markersize=4, **style)
        axes.set_title(f"{pair['first']}, {pair['second']}", fontsize=9)
        plain(axes)
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    panels[0][0].set_ylim(top=1.05)
    handles = panels[0][0].get_legend_handles_labels()
    below.legend(*handles, loc="outside lower right", ncols=2, frameon=False, fontsize=8, handletextpad=0.1)
    below.supxlabel("depth (block)", fontsize=9)


def _reliability(analysis: Mapping) -> Figure:
    """The sparsities of one half against those of the other, and the correlations of every split."""
    figure = Figure(figsize=(10.5, 3.9), layout="constrained")
    rows, columns, splits = figure.subplots(1, 3, width_ratios=[1, 1, 0.9])
    for axes, axis in ((rows, "rows"), (columns, "columns")):
        pairs: Counter = Counter()
        for part in analysis["parts"].values():
            first, second = (half["sparsity"] for half in part["halves"])
            pairs.update((first[module][axis], second[module][axis]) for module in first)
        x, y = zip(*pairs, strict=True)
        sizes = 160 * np.asarray(list(pairs.values())) / max(pairs.values())
        axes.plot([0, 1], [0, 1], color=_GREY, linewidth=1, linestyle=":")
        style = _AXES[axis]
        axes.scatter(x, y, s=sizes, marker=style["marker"], color=style["color"], alpha=0.55, linewidths=0)
        axes.set_title(f"{axis}: r = {spread(analysis['summary'][axis])}", fontsize=10)
        axes.set(xlabel="sparsity, first half", ylabel="sparsity, second half", xlim=(-0.05, 1), ylim=(-0.05, 1))
        axes.set_aspect("equal")
        plain(axes)
    kinds = {
        "pearson": ("Pearson", _BLUE, "o"),
        "spearman": ("Spearman", _VERMILLION, "s"),
        "spearman_brown": ("Spearman-\nBrown", _GREEN, "^"),
    }
    for x, (key, (_, color, marker)) in enumerate(kinds.items()):
        values = [part["reliability"][key] for part in analysis["parts"].values()]
        there = [value for value in values if value is not None]
        splits.plot([x] * len(there), there, linestyle="none", marker=marker, color=color, alpha=0.8)
        mean = analysis["summary"][key]["mean"]
        if mean is not None:
            splits.plot([x - 0.25, x + 0.25], [mean, mean], color="black", linewidth=1.5)
    splits.set_xticks(range(len(kinds)), [name for name, _, _ in kinds.values()], fontsize=9)
    splits.set_xlim(-0.6, len(kinds) - 0.4)
    splits.set_ylim(min(0, splits.get_ylim()[0]), 1.02)
    splits.set_title(f"each split, and the mean of {len(analysis['parts'])}", fontsize=10)
    splits.set_ylabel("correlation of the two halves")
    plain(splits)
    figure.suptitle(_title("Split-half reliability", analysis) + "; larger marks: more modules", fontsize=11)
    return figure


def _stability(analysis: Mapping) -> Figure:
    """Agreement between seeds and with the reference, and density: over the number of shots, and over wrong labels."""
    summary = analysis["summary"]
    lines, usual = summary["conditions"], summary["reference"]["shots"]
    sides = (
        ("shots", "shots (scored examples a class)", [line for line in lines if line["noise"] == 0]),
        ("noise", f"share of wrong labels, {usual} shots", [line for line in lines if line["shots"] == usual]),
    )
    figure = Figure(figsize=(8, 7.2), layout="constrained")
    panels = figure.subplots(3, 2, sharex="col", sharey="row")
    for column, (key, label, found) in enumerate(sides):
        x = [line[key] for line in found]
        for row, measure in enumerate(("pearson", "mean_absolute")):
            for other, name, style in (
                ("between_seeds", "between seeds", {"color": _BLUE, "marker": "o", "linestyle": "-"}),
                (
                    "to_reference",
                    f"with {usual} shots, no noise",
                    {"color": _VERMILLION, "marker": "s", "linestyle": "--"},
                ),
            ):
                compared = [line for line in found if other != "to_reference" or not is_reference(line, summary)]
                told = [(line[key], line[other][measure]) for line in compared if line[other][measure] is not None]
                if told:
                    panels[row][column].plot(*zip(*told, strict=True), label=name, **style)
        density = [line["density"]["mean"] for line in found]
        error = [line["density"]["deviation"] or 0 for line in found]
        style = {"color": _GREEN, "marker": "^", "linestyle": "-", "capsize": 3}
        panels[2][column].errorbar(x, density, yerr=error, label="mean ± sd over seeds", **style)
        panels[2][column].set_xlabel(label)
        if key == "shots":
            panels[2][column].set_xscale("log", base=2)
            panels[2][column].xaxis.set_major_formatter(ScalarFormatter())
            panels[2][column].xaxis.set_minor_locator(NullLocator())
        panels[2][column].set_xticks(x)
    for axes, label in zip(panels[:, 0], ("Pearson correlation", "mean absolute difference", "density"), strict=True):
        axes.set_ylabel(label)
    for axes in panels[[0, 2], 0]:
        axes.legend(frameon=False, fontsize=8)
    for axes in panels.flat:
        plain(axes)
    panels[0][0].set_ylim(top=1.03)
    panels[1][0].set_ylim(bottom=0)
    panels[2][0].set_ylim(0, 1.05)
    figure.suptitle(_title("Stability of the sparsities", analysis), fontsize=11)
    return figure


def _cost(analysis: Mapping) -> Figure:
    """What the searches evaluate and take, and what each measure of importance takes."""
    summary = analysis["summary"]
    searches = {name: cost for name, cost in summary["searches"].items() if cost is not None}
    timed = {name: cost["seconds"] for name, cost in searches.items() if cost["seconds"] is not None}
    figure = Figure(figsize=(10.5, 3.2), layout="constrained")
    panels = figure.subplots(1, 3)
    _bars(
        panels[0], {name: cost["sample_blocks"] for name, cost in searches.items()}, ",.0f", "sample-block evaluations"
    )
    _bars(panels[1], timed, ",.1f", "seconds of the search")
    _bars(panels[2], summary["importance"], ",.1f", "seconds of the importance")
    figure.suptitle(_title("Cost of a calibration", analysis), fontsize=11)
    return figure


def _bars(axes: Axes, values: Mapping[str, float], form: str, label: str) -> None:
    names = list(values)
    bars = axes.barh(names, list(values.values()), color=_BLUE, height=0.6)
    axes.bar_label(bars, [format(value, form) for value in values.values()], padding=3, fontsize=9)
    axes.invert_yaxis()
    axes.margins(x=0.3)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.set_xlabel(label)
    plain(axes)


def _title(what: str, analysis: Mapping) -> str:
    config = analysis["config"]
    return f"{what}: {config['model']['name']}, {config['task']['name']}"


_DRAWN = {"agreement": _agreement, "reliability": _reliability, "stability": _stability, "cost": _cost}
