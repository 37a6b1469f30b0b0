"""Figures of one run, drawn from its record alone: where the adapter is sparse, and how training went.

Drawn without a display and without matplotlib's global state. Lightness, markers and dashes tell things apart, colour
only helps: the figures survive a grey print and every kind of colour vision.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from partial_lora.results import write_atomic

_TRAIN = {"color": "#0072B2", "linestyle": "-"}  # Okabe and Ito's palette
_VALIDATION = {"color": "#D55E00", "linestyle": "--", "marker": "o", "markersize": 4}
_AXES = (("rows", "rows of B (outputs)"), ("columns", "columns of A (inputs)"))
_CELL = 0.52  # inches, wide enough for two digits
_MOST_LABELLED = 24  # positions in depth; more than that leave no room for numbers in the cells
_MOST_MARKED = 40  # points of a line

Sparsity = Mapping[str, Mapping[str, float]]


def sparsity_by_depth(result: Mapping, path: Path) -> Path | None:
    """Draw the share of rows and columns removed from every module: kind of module against depth.

    Two panels, rows of B and columns of A; a cell is one module and holds its sparsity in percent. Gives the file
    written, in the format of its suffix, or None for a run without an adapter.
    """
    sparsity = result["sparsity"]
    if not sparsity:
        return None
    kinds, depths, grids = _grid(sparsity)
    labelled = len(depths) <= _MOST_LABELLED
    cell = _CELL if labelled else 0.26
    size = max(5.5, cell * len(depths) + 2.6), 2 * (0.36 * len(kinds) + 0.55) + 1.0
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(2, 1, sharex=True)
    # One scale from 0 to 1 for every run, so that two figures can be held side by side.
    scale = Normalize(0, 1)
    for axes, (axis, title) in zip(panels, _AXES, strict=True):
        image = axes.imshow(np.ma.masked_invalid(grids[axis]), cmap="Blues", norm=scale, aspect="auto")
        axes.set_facecolor("none")
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_yticks(range(len(kinds)), kinds, fontsize=9)
        axes.set_xticks(*_depth_ticks(depths, labelled), fontsize=9)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xticks(np.arange(len(depths) + 1) - 0.5, minor=True)
        axes.set_yticks(np.arange(len(kinds) + 1) - 0.5, minor=True)
        axes.grid(which="minor", color="white", linewidth=1.5)
        axes.tick_params(which="minor", length=0)
        if labelled:
            _write_cells(axes, grids[axis])
    panels[-1].set_xlabel("depth (block)")
    bar = figure.colorbar(image, ax=panels, pad=0.02, fraction=0.05, aspect=30, format=PercentFormatter(1))
    bar.set_label("sparsity (share removed)")
    bar.outline.set_visible(False)
    figure.suptitle(_title("Sparsity by depth", result), fontsize=11)
    return _save(figure, path)


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
    _mark_best(below, validation)
    test = result.get("metrics", {}).get("test", {}).get(primary)
    if test is not None:
        below.axhline(test, color="0.25", linestyle=":", linewidth=1.5, label=f"test, once at the end: {test:.2%}")
    below.set_ylabel(primary)
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
    figure.suptitle(_title("Training", result), fontsize=11)
    return _save(figure, path)


def place(module: str) -> tuple[str, tuple[int, ...]]:
    """The kind of a module and its place in depth: "m.blocks.3.attn.qkv" is ("m.blocks.attn.qkv", (3,))."""
    parts = module.split(".")
    return ".".join(part for part in parts if not part.isdigit()), tuple(int(part) for part in parts if part.isdigit())


def _grid(sparsity: Sparsity) -> tuple[list[str], list[tuple[int, ...]], dict[str, np.ndarray]]:
    """Kinds of modules in the model's order, places in depth, and per axis the sparsities, NaN where is no module."""
    places = {module: place(module) for module in sparsity}
    kinds = list(dict.fromkeys(kind for kind, _ in places.values()))
    depths = sorted({depth for _, depth in places.values()})
    grids = {axis: np.full((len(kinds), len(depths)), np.nan) for axis, _ in _AXES}
    for module, (kind, depth) in places.items():
        for axis, grid in grids.items():
            grid[kinds.index(kind), depths.index(depth)] = sparsity[module][axis]
    return _without_common_start(kinds), depths, grids


def _without_common_start(kinds: Sequence[str]) -> list[str]:
    """Names without the leading parts that all of them share; every name keeps at least its last part."""
    split = [kind.split(".") for kind in kinds]
    shared = 0
    while all(len(parts) > shared + 1 for parts in split) and len({parts[shared] for parts in split}) == 1:
        shared += 1
    return [".".join(parts[shared:]) for parts in split]


def _depth_ticks(depths: Sequence[tuple[int, ...]], labelled: bool) -> tuple[list[int], list[str]]:
    step = 1 if labelled else max(1, len(depths) // 16)
    shown = list(range(0, len(depths), step))
    return shown, [".".join(map(str, depths[index])) or "–" for index in shown]


def _write_cells(axes: Axes, grid: np.ndarray) -> None:
    for (row, column), value in np.ndenumerate(grid):
        if not np.isnan(value):
            ink = "white" if value > 0.66 else "black"
            axes.text(column, row, f"{100 * value:.0f}", ha="center", va="center", fontsize=9, color=ink)


def _primary(result: Mapping) -> str:
    """The name of the metric that selects: the record's own word for it."""
    metrics = result.get("metrics") or {}
    return next((split["primary"] for name in ("validation", "test") if (split := metrics.get(name))), "accuracy")


def _series(history: Sequence[Mapping], key: str) -> list[tuple[int, float]]:
    """(step, value) of every entry of Trainer's log that has this key, in order of steps, the latest for each step."""
    return sorted({entry["step"]: entry[key] for entry in history if key in entry}.items())


def _line(axes: Axes, points: Sequence[tuple[int, float]], label: str, style: Mapping) -> None:
    if points:
        steps, values = zip(*points, strict=True)
        marked = {"marker": "."} if len(points) <= _MOST_MARKED else {"marker": None, "linewidth": 1}
        axes.plot(steps, values, label=label, **{"linewidth": 1.7, **marked, **style})


def _mark_best(axes: Axes, points: Sequence[tuple[int, float]]) -> None:
    """Ring the step whose checkpoint training ends with: the first of the best on validation."""
    if points:
        step, best = max(points, key=lambda point: point[1])
        label = f"best on validation: {best:.2%}, step {step}"
        axes.plot([step], [best], "o", markersize=10, markerfacecolor="none", color="black", label=label)


def _title(what: str, result: Mapping) -> str:
    config = result["config"]
    names = [config["method"]["name"], config["model"]["name"], config["task"]["name"]]
    line = f"{what}: {', '.join(names)}, seed {result['seed']}"
    sparsity = result.get("parameters", {}).get("adapter_sparsity")
    return line if sparsity is None else f"{line}\nadapter sparsity {sparsity:.1%}"


def _save(figure: Figure, path: Path) -> Path:
    """Write a figure whole or not at all; the same figure gives the same bytes on any day."""
    path = Path(path)
    content = io.BytesIO()
    metadata = {"Date": None} if path.suffix == ".svg" else None
    with rc_context({"svg.hashsalt": "partial-lora"}):
        figure.savefig(content, format=path.suffix.removeprefix("."), dpi=150, metadata=metadata)
    write_atomic(path, content.getvalue())
    return path
