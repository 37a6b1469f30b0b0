"""The figures of a report, each with what it shows in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from partial_lora.report import report_figures, report_maps, runs
from partial_lora.report.predicted import Predictions
from partial_lora.report.runs import Run
from partial_lora.report.series import calibrations
from partial_lora.tasks.metrics import LOWER_IS_BETTER


@dataclass(frozen=True)
class Shown:
    """A figure as files (PNG, SVG), its title, what is to be seen in a sentence or two, and what is not drawn."""

    title: str
    said: str
    files: tuple[Path, ...]
    cut: str = ""


def draw(
    found: Sequence[Run], table: pd.DataFrame, compared: pd.DataFrame, predictions: Predictions, results_dir: Path
) -> list[Shown]:
    """Draw into results_dir/report/figures all figures that the runs have something for.

    table: of `grouping.group`; compared: of `comparison_table.table`.
    """
    folder = Path(results_dir) / "report" / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    figures = {
        "pareto": (
            "Accuracy and size",
            "Test score against trainable parameters, head included: means over seeds, with one standard deviation. "
            "The grey line joins what nothing smaller is better than.",
            lambda: report_figures.pareto(table),
        ),
        "methods": (
            "Methods",
            "Mean test score with its 95 % interval over seeds (Student's t); ticks are seeds. A single seed has no "
            "interval.",
            lambda: report_figures.methods(table, runs.table(list(found))),
        ),
        "differences": (
            "Differences from partial",
            "At the same operating point, with 95 % intervals of a paired bootstrap over examples and seeds."
            + _matching(compared),
            lambda: report_figures.differences(compared),
        ),
        "training": (
            "Training",
            "Training loss and what validation measured; bands reach from the lowest seed to the highest.",
            lambda: report_figures.training(found),
        ),
        "sparsity": (
            "Sparsity",
            "Share of rows and columns removed from every module, in percent: kind of module against depth.",
            lambda: report_maps.sparsity(found),
        ),
        "calibration": (
            "Calibration curves",
            "What is left of the few-shot score when a module's least important rows or columns are zeroed: medians "
            "over depth. Where evaluation was cut short a score is known within bounds, the band around the line.",
            lambda: report_maps.curves(calibrations(found, Path(results_dir))),
        ),
        "sparsity_agreement": (
            "Agreement of sparsities",
            "Correlation (Pearson) of what two calibrations of a model removed, over all modules, rows and columns.",
            lambda: report_maps.sparsity_alike(found),
        ),
        "prediction_agreement": (
            "Agreement of predictions",
            "How often two methods say the same of a test example, means over the seeds that both have.",
            lambda: report_maps.predictions_alike(table, predictions),
        ),
    }
    drawn = []
    for stem, (title, said, make) in figures.items():
        for old in folder.glob(f"{stem}.*"):  # of an earlier report, which may have been of other runs
            old.unlink()
        drawing = make()
        files = report_figures.write(drawing, folder, stem)
        if files:
            drawn.append(Shown(title, f"{said} {drawing.cut}".strip(), tuple(files), drawing.cut))
    return drawn


def _matching(compared: pd.DataFrame) -> str:
    """What the hatched strip of the differences means, and what there is in its place where less is better."""
    metrics = set(compared["metric"]) if len(compared) else set()
    said = ""
    if metrics - LOWER_IS_BETTER:
        said += " An interval that begins in the hatched strip, less than a point below zero, or to the right of it "
        said += "matches."
    if lower := sorted(metrics & LOWER_IS_BETTER):
        said += f" Of {' and '.join(lower)} less is better: below zero is better, and nothing matches."
    return said


def analyses(results_dir: Path) -> list[Shown]:
    """The figures that `scripts/analyses.py` has left beside the runs."""
    shown = []
    for file in sorted(Path(results_dir).glob("analyses/*/*/*/figure.svg")):
        what, task, name = file.parts[-4:-1]
        shown.append(Shown(f"Analysis of calibration: {what}", f"{task}, {name.rpartition('-')[0]}.", (file,)))
    return shown
