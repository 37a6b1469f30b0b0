"""What the figures of the evidence draw alike: points with their spread, levels to compare with, axes of scores."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from partial_lora.report_panels import COLOURS, MARKERS, MOST, heat, legend, look, panels, plain
from partial_lora.runs import SHARES

__all__ = ["COLOURS", "MARKERS", "MOST", "SHARES", "heat", "legend", "look", "panels", "plain"]
_LETTERS = 14  # of nine points that an inch holds


def swept(axes: Axes, part: pd.DataFrame, method: str, x: str, *, joined: bool) -> None:
    """A method's points over x with one standard deviation; those of thresholds are filled and joined by a line."""
    for kind, of_kind in part.groupby(part["point"].str.split(" ").str[0]):
        own, of_kind = look(method, kind), of_kind.sort_values(x)
        line = own.linestyle if joined and len(of_kind) > 1 else ""
        style = own.markers | {"color": own.color, "linestyle": line, "linewidth": 1.3, "markersize": 6}
        axes.errorbar(of_kind[x], of_kind["mean"], yerr=of_kind["std"], capsize=2, elinewidth=0.9, **style)


def level(axes: Axes, part: pd.DataFrame, method: str) -> None:
    """A method that is the same everywhere, as a level line; its own size where it has one, marked on the line."""
    own = look(method, "–")
    for row in part.itertuples():
        axes.axhline(row.mean, color=own.color, linestyle=":", linewidth=1.1, zorder=0)
        if row.parameters > 0:
            style = own.markers | {"color": own.color, "markersize": 6}
            axes.errorbar([row.parameters], [row.mean], yerr=[row.std], capsize=2, elinewidth=0.9, **style)


def above(figure: Figure, said: str) -> None:
    """What markers, lines and bars mean, over all panels, in as many lines as its width needs."""
    unbroken = said.replace(" %", "\N{NO-BREAK SPACE}%")
    figure.suptitle(textwrap.fill(unbroken, int(_LETTERS * figure.get_figwidth())), fontsize=9)


def numbered(axes: Axes, x: float, y: float, text: str) -> None:
    """A small number to the right of a point."""
    axes.annotate(text, (x, y), (5, 4), textcoords="offset points", fontsize=6.5, color="0.25")


def below(axes: Axes, x: float, text: str) -> None:
    """A small number at the bottom of a panel, below a point."""
    place = axes.get_xaxis_transform()
    axes.text(x, 0.01, text, transform=place, fontsize=6.5, color="0.25", ha="center", va="bottom")


def logarithmic(axes: Axes, axis: str) -> None:
    """An axis of powers of ten whose ticks are plain numbers."""
    getattr(axes, f"set_{axis}scale")("log")
    of = getattr(axes, f"{axis}axis")
    of.set_major_locator(LogLocator(subs=(1, 2, 5)))
    of.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    of.set_minor_formatter(NullFormatter())


def scored(axes: Axes, metric: str, said: str = "test ", axis: str = "y") -> None:
    """An axis of scores: shares in percent."""
    getattr(axes, f"set_{axis}label")(f"{said}{metric}", fontsize=9)
    if metric in SHARES:
        getattr(axes, f"{axis}axis").set_major_formatter(PercentFormatter(1))


def in_points(axes: Axes, metric: str, said: str, axis: str = "y") -> None:
    """An axis of differences of scores: of shares in points."""
    unit = " (points)" if metric in SHARES else ""
    getattr(axes, f"set_{axis}label")(f"{said}{unit}", fontsize=9)
    if metric in SHARES:
        getattr(axes, f"{axis}axis").set_major_formatter(PercentFormatter(1, symbol=""))


def in_thousands(axes: Axes, sizes: Sequence[float]) -> None:
    """A logarithmic axis of parameters with names for its ticks, and room around the sizes."""
    least, most = max(1, min(sizes)), max(1, max(sizes))
    room = max(1.3, (6 * least / most) ** 0.5)
    axes.set_xlim(least / room, most * room)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: said_size(size)))


def said_size(size: float) -> str:
    """A number of parameters in a few letters."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= unit:
            return f"{size / unit:.3g} {letter}"
    return f"{size:.0f}"


def seeds(part: pd.DataFrame) -> str:
    """How many seeds the means are of."""
    least, most = int(part["n"].min()), int(part["n"].max())
    if least == most:
        return f"{most} seed" + "s" * (most > 1)
    return f"{least} to {most} seeds"


def empty(axes: Axes, nothing: bool, said: str = "not measured yet") -> None:
    """Say of a panel that there is nothing in it."""
    if nothing:
        axes.text(0.5, 0.5, said, transform=axes.transAxes, ha="center", va="center", fontsize=9, color="0.4")
        axes.set_yticks([])
        axes.set_xticks([])
