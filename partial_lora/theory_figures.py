"""Figures of the theory: bounds over sparsity, and the propagation bound against what was measured, on log axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from partial_lora.figures import save
from partial_lora.theory_report import Report, Setting, over_sparsities

_BLUE, _ORANGE, _GREEN, _GREY = "#0072B2", "#D55E00", "#009E73", "0.35"  # Okabe and Ito's palette
_POINT = {"linestyle": "none", "markersize": 5, "color": "black", "markerfacecolor": "white"}
_LEGEND = {"frameon": False, "fontsize": 8}
_SPARSITIES = np.round(np.arange(0.1, 0.951, 0.05), 2)


def bounds(setting: Setting, reports: Sequence[Report], path: Path) -> Path:
    """Draw what is proved (lines) and simulated (points) over sparsity: rows and columns, entries of B, gradients.

    The sparsities of the reports are marked. Gives the file written, in the format of its suffix.
    """
    values = over_sparsities(setting, _SPARSITIES)
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    axes = figure.subplots(1, 3)
    _errors(axes[0], values)
    _ranks(axes[1], values, setting)
    _masses(axes[2], values)
    for one in axes:
        for given in reports:
            one.axvline(given.setting.sparsity, color="0.8", linewidth=1, zorder=0)
        one.set_xlabel("sparsity")
        one.set_xlim(0.05, 1)
        one.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        _plain(one)
    figure.suptitle(
        f"{setting.rows} × {setting.columns}, target rank {setting.target_rank}, δ = {setting.delta:g}; "
        f"lines are proved, points simulated ({setting.draws} draws)",
        fontsize=11,
    )
    return save(figure, path)


def _errors(axes: Axes, values: Mapping[str, np.ndarray]) -> None:
    x = values["sparsity"]
    axes.plot(x, 1 - values["kept"], color=_BLUE, label="1 − pq, all updates inside the mask")
    axes.plot(x, 1 - values["rows"], color=_ORANGE, linestyle="--", label="1 − p, of outputs, any inputs")
    axes.errorbar(
        x, values["error"], values["error_deviation"], marker="o", label="simulated ± s.d. of masks", **_POINT
    )
    axes.set_title("Rows and columns: least squared error\nagainst a fixed dense target", fontsize=10)
    axes.set_ylim(0, 1.05)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def _ranks(axes: Axes, values: Mapping[str, np.ndarray], setting: Setting) -> None:
    x, t = values["sparsity"], setting.target_rank
    axes.plot(x, values["blocks"] / t, color=_BLUE, linestyle="-.", label="suffices, by blocks")
    axes.plot(x, values["counting"] / t, color=_GREEN, label="suffices, by counting")
    axes.plot(x, values["necessary"] / t, color=_ORANGE, linestyle="--", label="necessary, almost every target")
    axes.plot(x, values["simulated_rank"] / t, marker="o", label=f"simulated: every row of B keeps {t}", **_POINT)
    at = setting.rank / t
    axes.axhline(at, color=_GREY, linestyle=":", linewidth=1.5, label=f"rank {setting.rank}: {at:g} ×")
    axes.set_yscale("log")
    axes.set_title("Single entries of B, A free:\nrank over the target's rank, for exactness", fontsize=10)


def _masses(axes: Axes, values: Mapping[str, np.ndarray]) -> None:
    x = values["sparsity"]
    axes.plot(x, values["kept"], color=_BLUE, label="pq, expected of random masks")
    axes.errorbar(x, values["random"], values["random_deviation"], marker="o", label="random ± s.d. of masks", **_POINT)
    axes.plot(x, values["top_spread"], marker="s", label="top, independent entries", **_POINT)
    axes.plot(x, values["top_concentrated"], marker="^", label="top, a few large rows and columns", **_POINT)
    axes.set_title("The gradient's mass inside the mask:\nwhat one step is guaranteed", fontsize=10)
    axes.set_ylim(0, 1.4)  # room for the legend
    axes.set_yticks(np.linspace(0, 1, 6))
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))


def propagation(record: Mapping, path: Path) -> Path:
    """Draw the bounds and the measured change of the output over the size of the update, a panel for each model."""
    models = record["models"]
    figure = Figure(figsize=(5.6 * len(models), 4.6), layout="constrained")
    for axes, model in zip(figure.subplots(1, len(models), squeeze=False)[0], models, strict=True):
        points = model["points"]
        x = [point["relative_size"] for point in points]
        for key, label, style in (
            ("bound", "proved: constants from known activations", {"color": _BLUE, "marker": "s"}),
            ("slopes", "to first order, largest slopes", {"color": _ORANGE, "marker": "D", "linestyle": "-."}),
            ("secant", "slopes measured afterwards", {"color": _GREEN, "marker": "^", "linestyle": "--"}),
            ("measured", "measured", {"color": "black", "marker": "o", "linestyle": "-"}),
        ):
            middle, low, high = ([point[key][name] for point in points] for name in ("median", "least", "most"))
            axes.plot(x, middle, label=label, markersize=5, **style)
            axes.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
        farthest = model["farthest"]["most"]
        axes.axhline(farthest, color=_GREY, linestyle=":", linewidth=1.8, label="no two outputs are farther apart")
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_xlabel("size of the dense update, |T| / |W|")
        axes.set_title(f"{model['name']}: {model['blocks']} blocks, {model['modules']} modules", fontsize=10)
        _plain(axes)
        axes.get_legend().remove()  # the lines fill the panel
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, **_LEGEND)
    figure.axes[0].set_ylabel("change of the output / its norm")
    figure.suptitle(
        f"A masked adapter in place of a dense one, density {record['density']:g} of rows and columns\n"
        f"median and range of {record['images']} images",
        fontsize=11,
    )
    return save(figure, path)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.legend(**_LEGEND)
