"""The look of figures: a colour and a marker for every method, panels side by side, one legend, files.

Drawn without a display and without matplotlib's global state. Lightness, markers and dashes tell things apart, colour
only helps: the figures survive a grey print and every kind of colour vision.
"""

from __future__ import annotations

import io
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, PercentFormatter

from partial_lora.files import write_atomic
from partial_lora.report.rows import NONE
from partial_lora.report.summary import size_text
from partial_lora.tasks.metrics import SHARES, within

HUES = {"blue": "#0072B2", "vermillion": "#D55E00", "green": "#009E73", "orange": "#E69F00"}
HUES |= {"purple": "#CC79A7", "sky": "#56B4E9", "black": "#000000", "grey": "#808080"}  # Okabe and Ito's palette
COLOURS, BLUE, VERMILLION = tuple(HUES.values()), HUES["blue"], HUES["vermillion"]
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_LOOKS: dict[str, tuple[str, object]] = {  # a marker each, so that colour is never what tells two apart
    "partial": ("blue", "o"),
    "targeted": ("vermillion", "^"),
    "dense": ("black", "s"),
    "uniform": ("green", "D"),
    "shuffled": ("orange", "<"),
    "inverted": ("sky", ">"),
    "lora": ("purple", "v"),
    "flow": ("green", "p"),
    "random_weights": ("sky", "P"),
    "dora": ("vermillion", "d"),
    "vera": ("purple", "h"),
    "adalora": ("black", "8"),
    "full": ("orange", "*"),
    "probe": ("grey", "X"),
    "entries": ("green", (5, 0, 180)),
    "oft": ("orange", (4, 1, 45)),
    "hira": ("orange", (3, 1, 180)),
    "lori": ("vermillion", (3, 1, 0)),
    "lorafa": ("vermillion", (3, 1, 90)),
    "paca": ("vermillion", (3, 1, 270)),
}
_MASKS = ("(element)", "(frozen)", "(units)", "(groups)")  # as `rows.method_of` calls what is masked
_DASHES = {"threshold": "-", "budget": "--", NONE: "-."}


@dataclass(frozen=True)
class Look:
    """The look of a method at an operating point: markers are filled but for a budget, whose lines are dashed."""

    hue: str
    marker: object
    linestyle: str
    filled: bool

    @property
    def color(self) -> str:
        return HUES[self.hue]

    @property
    def markers(self) -> dict:
        face = self.color if self.filled else "white"
        return {"marker": self.marker, "markerfacecolor": face, "markeredgecolor": self.color, "markeredgewidth": 1.3}


def look(method: str, point: str) -> Look:
    """Return the look of a method at an operating point."""
    kind, (name, _, masks) = point.partition(" ")[0], method.partition(" ")
    hue, marker = _LOOKS.get(name, ("grey", MARKERS[sum(name.encode()) % len(MARKERS)]))
    if masks:  # not of rows and columns: the method's colour, and a star of its own number of points
        points = 4 + list(_LOOKS).index(name) if name in _LOOKS else 3
        marker = (points + 3 * _MASKS.index(masks) if masks in _MASKS else 3, 1, 0)
    return Look(hue, marker, _DASHES.get(kind, "-"), kind != "budget")


def panels(count: int, *, wide: float, high: float, across: int = 3, least: float = 5.5) -> tuple[Figure, list[Axes]]:
    """Return a figure of so many panels, and these in reading order."""
    across = 2 if count == 4 and across > 1 else min(across, count)
    down = -(-count // across)
    figure = Figure(figsize=(max(least, wide * across), high * down + 0.9), layout="constrained")
    drawn = figure.subplots(down, across, squeeze=False)
    for axes in drawn.flat[count:]:
        axes.set_visible(False)
    return figure, list(drawn.flat[:count])


def lists(lengths: Sequence[int]) -> tuple[Figure, list[Axes]]:
    """Return a figure of lists in two columns, each list as high as its rows need and below the shorter column."""
    heights = [0.27 * length + 1.0 for length in lengths]
    columns: list[list[int]] = [[] for _ in range(min(2, len(lengths)))]
    for number in range(len(lengths)):
        min(columns, key=lambda column: sum(heights[place] for place in column)).append(number)
    filled = [sum(heights[place] for place in column) for column in columns]
    figure = Figure(figsize=(max(5.5, 5.2 * len(columns)), max(filled)), layout="constrained")
    drawn: dict[int, Axes] = {}
    outer = figure.add_gridspec(1, len(columns))
    for index, (column, full) in enumerate(zip(columns, filled, strict=True)):
        ratios = [*(heights[place] for place in column), max(max(filled) - full, 1e-3)]
        inner = outer[index].subgridspec(len(ratios), 1, height_ratios=ratios)
        drawn |= {number: figure.add_subplot(inner[row]) for row, number in enumerate(column)}
    return figure, [drawn[number] for number in range(len(lengths))]


def plain(axes: Axes) -> None:
    """Keep of a panel's frame only two edges, with a light grid behind."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="0.9")
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8)


def name_beside(axes: Axes, marks: Sequence[tuple[str, tuple[float, float]]]) -> None:
    """Write the names of marks at the right of a panel whose limits are set, apart, each with a line to its mark."""
    free = 1.0
    for name, mark in sorted(marks, key=lambda item: -item[1][1]):
        height = axes.transAxes.inverted().transform(axes.transData.transform(mark))[1]
        free = min(free, height)
        line = {"arrowstyle": "-", "color": "0.6", "linewidth": 0.6, "shrinkB": 3}
        axes.annotate(name, mark, (1.03, free), textcoords="axes fraction", va="center", fontsize=9, arrowprops=line)
        free -= 0.08


def scored(axes: Axes, metric: str, label: str | None = None, axis: str = "y", *, points: bool = False) -> None:
    """Name an axis of scores, shares in percent; or of their differences, of shares in points.

    It ends about where the metric does: what is longer is cut off there. label: in place of "test METRIC".
    """
    ends = getattr(axes, f"get_{axis}lim")()
    getattr(axes, f"set_{axis}lim")(within(ends, metric, difference=points, room=0.02))
    unit = " (points)" if points and metric in SHARES else ""
    getattr(axes, f"set_{axis}label")(f"{label or f'test {metric}'}{unit}", fontsize=9)
    if metric in SHARES:
        getattr(axes, f"{axis}axis").set_major_formatter(PercentFormatter(1, symbol="" if points else "%"))


def sized(axes: Axes, sizes: Collection[float]) -> None:
    """Make the horizontal axis one of numbers of parameters: logarithmic, wide enough for a few ticks with names."""
    least, most = max(1, min(sizes)), max(1, max(sizes))
    room = max(1.3, (6 * least / most) ** 0.5)
    axes.set_xscale("log")
    axes.set_xlim(least / room, most * room)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if most < 100 * least else (1,)))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda size, _: size_text(size)))
    axes.set_xlabel("trainable parameters", fontsize=9)


def fitted(axes: Axes, values: Collection[float], axis: str = "y") -> None:
    """Fit an axis of scores to the values."""
    low, high = min(values), max(values)
    room = 0.08 * (high - low) or 0.01 * (abs(high) or 1)
    getattr(axes, f"set_{axis}lim")(low - room, high + room)


def legend_of_methods(figure: Figure, used: Sequence[tuple[str, str]], *, lines: bool) -> None:
    """Name every method once below the panels, and how markers at a budget look where there are others, too."""
    methods = dict.fromkeys(method for method, _ in used)
    handles = [_handle(method, replace(look(method, NONE), linestyle="-"), lines) for method in methods]
    if len({look(*pair).filled for pair in used}) > 1:
        handles.append(_handle("empty: budget", Look("grey", "o", _DASHES["budget"], False), lines))
    legend_below(figure, handles)


def _handle(label: str, its_look: Look, lines: bool) -> Line2D:
    style = its_look.linestyle if lines else ""
    return Line2D([], [], label=label, linestyle=style, color=its_look.color, markersize=6, **its_look.markers)


def legend_below(figure: Figure, handles: Sequence[Line2D]) -> None:
    """Name the handles below the panels; the figure grows by the lines for which `panels` leaves no room."""
    if handles:
        room = figure.get_figwidth() * 12  # letters in a line, about
        across = max(1, int(room // (max(len(handle.get_label()) for handle in handles) + 9)))
        down = -(-len(handles) // across)
        figure.set_figheight(figure.get_figheight() + max(0, 0.17 * down - 0.9))
        figure.legend(
            handles=handles, loc="outside lower center", ncols=min(across, len(handles)), fontsize=8, frameon=False
        )


def words_of(row: tuple) -> str:
    """Return the method and operating point of a row of a grouped table, and what tells it from others."""
    return ", ".join([row.method, *(word for word in (row.operating_point, row.differs) if word != NONE)])


def heat(axes: Axes, values: np.ndarray, *, high: float, form: str, size: float = 8) -> None:
    """Draw a matrix as shades with its numbers in the cells: in grey a light cell is low, a dark one high.

    form: the format of the numbers; empty for no numbers.
    """
    shades = np.clip(values / high, 0, 1)
    axes.imshow(np.ma.masked_invalid(shades), cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(values):
        if form and not np.isnan(value):
            ink = "white" if shades[row, column] > 0.66 else "black"
            text = axes.text(column, row, format(value, form), ha="center", va="center", fontsize=size, color=ink)
            text.set_in_layout(False)  # inside its cell, and there are hundreds
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0, labelsize=8)


def save_both(figure: Figure, folder: Path, stem: str, names: Mapping[str, str] = {}) -> list[Path]:
    """Write a figure as folder/stem.png and .svg, for a reader and for a page that takes it in; return the files.

    names: the texts that its elements show under the pointer, by id. stem: different for every figure of a page, so
    that none refers to the shapes of another.
    """
    files = [folder / f"{stem}{suffix}" for suffix in (".png", ".svg")]
    save(figure, files[0])
    content = io.StringIO()
    with rc_context({"svg.hashsalt": stem, "svg.fonttype": "none"}):  # letters as text: a tenth as large
        figure.savefig(content, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    space = "http://www.w3.org/2000/svg"
    ElementTree.register_namespace("", space)
    ElementTree.register_namespace("xlink", "http://www.w3.org/1999/xlink")  # by this name alone HTML knows it
    root = ElementTree.fromstring(content.getvalue())
    root.set("style", f"max-width: {root.get('width')}")
    for element in root.iter(f"{{{space}}}g"):
        if element.get("id") in names:
            ElementTree.SubElement(element, f"{{{space}}}title").text = names[element.get("id")]
    write_atomic(files[1], ElementTree.tostring(root, encoding="unicode"))
    return files


def save(figure: Figure, path: Path) -> Path:
    """Write a figure whole or not at all; the same figure gives the same bytes on any day."""
    _lay_out(figure)
    content = io.BytesIO()
    metadata = {"Date": None} if path.suffix == ".svg" else None
    with rc_context({"svg.hashsalt": "partial-lora"}):
        figure.savefig(content, format=path.suffix.removeprefix("."), dpi=150, metadata=metadata)
    write_atomic(path, content.getvalue())
    return path


def _lay_out(figure: Figure) -> None:
    """Lay a figure out once, and not each time it is drawn: that takes as long as drawing."""
    if engine := figure.get_layout_engine():
        engine.execute(figure)
        figure.set_layout_engine(None)
