"""Figures over many runs: accuracy against size, methods with their intervals, differences, training with bands."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Sized
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullFormatter, PercentFormatter

from partial_lora.report.comparison import MARGIN
from partial_lora.report.report_panels import MOST, Drawing, legend, lists, look, named, panels, plain
from partial_lora.report.runs import Run
from partial_lora.report.series import band, front, selected
from partial_lora.tasks.metrics import LOWER_IS_BETTER, SHARES

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
        for place, row in enumerate(part.itertuples()):
            marker, filled = _VERDICTS.get(row.verdict, _NO_VERDICT)
            color = look(row.method, row.operating_point).color
            ends = [[row.difference - row.low], [row.high - row.difference]]
            style = {"color": color, "markerfacecolor": color if filled else "white", "capsize": 3, "markersize": 7}
            axes.errorbar(row.difference, place, xerr=ends, marker=marker, linestyle="", **style)
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
    for place, (row, is_far) in enumerate(zip(part.itertuples(), far, strict=True)):
        if is_far:
            on_left = row.difference < 0
            value = f"{100 * row.difference:+.1f}" if row.metric in SHARES else f"{row.difference:+.3g}"
            said = f"◂ {value}" if on_left else f"{value} ▸"
            color, side = look(row.method, row.operating_point).color, "left" if on_left else "right"
            axes.text(left if on_left else right, place, said, color=color, ha=side, va="center", fontsize=8)


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
    from partial_lora.report.figures import save

    if drawing is None:
        return []
    drawing.figure.get_layout_engine().execute(drawing.figure)  # once, for it takes as long as to draw
    drawing.figure.set_layout_engine(None)
    return [save(drawing.figure, folder / f"{stem}.{form}") for form in ("png", "svg")]
