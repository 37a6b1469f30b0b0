"""Figures of where adapters are sparse, over many runs: heat maps, curves by kind of module, matrices of agreement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Sized

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import PercentFormatter

from partial_lora.report.places import grid
from partial_lora.report.predicted import Predictions
from partial_lora.report.report_panels import COLOURS, MARKERS, MOST, Drawing, heat, named, panels, plain
from partial_lora.report.runs import Run
from partial_lora.report.series import maps, prediction_agreement, sparsity_agreement

_MOST_MAPS = 5
_MOST_NUMBERED = 24  # positions in depth
_MOST_ROWS, _MOST_MATRICES = 12, 4
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
    for line, ((key, _), (kinds, depths, cells)) in enumerate(zip(shown, grids, strict=True)):
        task, model, measure, point = key
        for side, (axis, said) in enumerate(_AXES.items()):
            axes = drawn[2 * line + side]
            form = ".0f" if len(depths) <= _MOST_NUMBERED else ""
            _map(axes, 100 * cells[axis], form)
            axes.set_yticks(range(len(kinds)), kinds if side == 0 else [""] * len(kinds))
            step = max(1, len(depths) // 12)
            ticks = range(0, len(depths), step)
            axes.set_xticks(ticks, [".".join(map(str, depths[index])) or "–" for index in ticks])
            above = f"{task}, {model}\n{measure}, {point}: " if side == 0 else "\n"
            axes.set_title(above + said, fontsize=9, loc="left")
        if line == len(shown) - 1:
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


def curves(calibrations: Mapping[str, Mapping]) -> Drawing | None:
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
        (model + _some(names), names[:_MOST_ROWS], matrix[:_MOST_ROWS, :_MOST_ROWS])
        for model, names, matrix in whole[:_MOST_MATRICES]
    ]
    figure = _matrices(cut, low=0, title="Correlation of sparsities")
    return figure and Drawing(figure, len(cut), len(whole), "models")


def predictions_alike(table: pd.DataFrame, predictions: Predictions) -> Drawing | None:
    """How often two methods say the same of a test example; where they disagree they are different adapters indeed."""
    places = [
        (key, part)
        for key, part in table.groupby(["task", "model"], sort=False)
        if sum(predictions.kept(row.group, map(int, row.seeds.split())) for row in part.itertuples()) > 1
    ]
    shown = []
    for (task, model), part in places[:_MOST_MATRICES]:
        few = part.head(_MOST_ROWS)
        matrix = prediction_agreement(few, predictions)
        if matrix is not None:
            names = [named(row.method, row.operating_point) for row in few.itertuples()]
            shown.append((f"{task}, {model}{_some(part)}", names, 100 * matrix))
    lows = [float(matrix[matrix == matrix].min()) for _, _, matrix in shown]
    figure = _matrices(shown, low=min(lows, default=0), high=100, form=".0f", title="Same predictions, in percent")
    return figure and Drawing(figure, len(shown), len(places))


def _some(whole: Sized) -> str:
    """What a title adds where not all rows are drawn."""
    return f" ({_MOST_ROWS} of {len(whole)})" if len(whole) > _MOST_ROWS else ""


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
