"""Figures of one run, drawn from its record alone: how training went. Where it is sparse: calibration_figures.py.

Drawn without a display and without matplotlib's global state. Lightness, markers and dashes tell things apart, colour
only helps: the figures survive a grey print and every kind of colour vision.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from partial_lora.report.closing import measured
from partial_lora.report.runs import method_of
from partial_lora.sealed import write_atomic
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
