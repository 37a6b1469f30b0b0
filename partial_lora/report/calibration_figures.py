"""Figures of a calibration: how sparse each module became, and the curves that say why.

Both lay modules out alike, kind against depth. Lightness, dashes and hatches tell things apart, colour only helps: the
figures survive a grey print and every kind of colour vision.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import PercentFormatter

from partial_lora.calibration.points import Curve, curve_of
from partial_lora.calibration.search import line
from partial_lora.report.figures import save, titled
from partial_lora.report.places import grid, place

FORMATS = (".png", ".svg")
_AXES = (("rows", "rows of B (outputs)"), ("columns", "columns of A (inputs)"))
_LOOKS = {  # Okabe and Ito's palette; of the two, rows are the darker, and their marker shows behind the other
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

Sparsity = Mapping[str, Mapping[str, float]]


def draw(result: Mapping, modules: Mapping[str, Mapping] | None, directory: Path) -> list[Path]:
    """Every figure of a calibration, as PNG and SVG, in a directory; gives the files written.

    result: the record of the run. modules: of `Calibration`, with their curves; None for a run without a calibration.
    """
    drawn = []
    for suffix in FORMATS:
        drawn.append(sparsity_by_depth(result, directory / f"sparsity{suffix}"))
        if modules:
            drawn.append(curves(result, modules, directory / f"curves{suffix}"))
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
    for axes, (axis, title) in zip(panels, _AXES, strict=True):
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


def curves(result: Mapping, modules: Mapping[str, Mapping], path: Path) -> Path:
    """Draw what is left of the score as each module's rows and columns are zeroed: kind of module against depth.

    A panel is one module. What is known of a score is drawn: a line where it is known, a band between its bounds where
    the evaluation was cut short; and a marker at the sparsity that was chosen, on the line that had to be held. Of many
    depths a dozen are drawn. Gives the file written, in the format of its suffix.
    """
    calibration = result["calibration"]
    kinds, depths, _ = grid(
        {name: {axis: axes[axis]["sparsity"] for axis, _ in _AXES} for name, axes in modules.items()}
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
        for axis, _ in _AXES:
            _draw_curve(axes, start | curve_of(found[axis].get("curve", [])), _LOOKS[axis], (low, high))
            axes.plot([found[axis]["sparsity"]], [held], **_LOOKS[axis]["chosen"], **_MARKED)
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
        for axis, _ in _AXES:
            for bounds in curve_of(found[axis].get("curve", [])).values():
                values += bounds
    finite = [value for value in values if math.isfinite(value)]
    margin = 0.06 * (max(finite) - min(finite) or 1.0)
    return min(finite) - margin, max(finite) + margin


def _legend() -> list:
    handles: list = []
    for axis, look in _LOOKS.items():
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
