"""Table of the forms of mask at equal size: the best learning rate of each on validation, and its test score.

    python scripts/forms.py results/forms --reference low_rank

The rate is chosen by the mean score on validation over the seeds that all rates of a form have; of equals, the lower
loss. A difference to the reference is of runs of the same seeds, with the 95 % interval of Student's t over seeds.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from scipy import stats

from partial_lora import cli
from partial_lora.errors import PartialLoraError
from partial_lora.report import records
from partial_lora.report.drawing import save_both

CELL = ["task", "size", "form"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write forms.md, forms.csv and the figure into the results directory; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--reference", default="low_rank")
    options = parser.parse_args(arguments)

    def command() -> int:
        runs, skipped = records.read(options.results)
        if not runs:
            raise PartialLoraError(f"{options.results}: no finished runs there: `make forms` makes them")
        table = pd.DataFrame(row_of(run.record) for run in runs)
        chosen = at_best_rates(table)
        numbers = compared(chosen, options.reference)
        numbers.to_csv(options.results / "forms.csv", index=False, float_format="%.6g")
        text = "\n\n".join(markdown(numbers, options.reference)) + "\n"
        (options.results / "forms.md").write_text(text, encoding="utf-8")
        print(text)
        for line in skipped:
            print(line, file=sys.stderr)
        draw(table, options.results)
        return 0

    return cli.guarded(command)


def form_of(config: Mapping) -> str:
    """Return the name of a run's form: its method, and what its masks, its draw and its scaling have of their own."""
    mask, name = config.get("mask") or {}, config["method"]["name"]
    words = [mask[key] for key in ("granularity", "columns") if mask.get(key) not in (None, "rows_columns", "masked")]
    if name == "entries":
        words = []
    if config["method"].get("ranks") == "auto":
        words.append("rank=auto")
    if mask.get("fan_in") == "kept":
        words.append("kept")
    words += [
        f"{axis}^-{mask[key]:g}" for axis, key in (("p", "row_exponent"), ("q", "column_exponent")) if mask.get(key)
    ]
    return " ".join([name, *words])


def row_of(result: Mapping) -> dict:
    """Return what the table needs of a record."""
    config, parameters, test = result["config"], result["parameters"], result["metrics"]["test"]
    validation, dense = result["metrics"]["validation"], parameters["adapter_dense"]
    share = parameters["adapter_trainable"] / dense
    return {
        "task": config["task"]["name"],
        "size": "dense" if share > 0.99 else f"{share:.2g}",
        "form": form_of(config),
        "learning_rate": float(config["trainer"]["learning_rate"]),
        "seed": result["seed"],
        "validation": validation[test["primary"]],
        "loss": validation["loss"],
        "test": test[test["primary"]],
        "parameters": parameters["adapter_trainable"],
        "step_seconds": (result.get("cost") or {}).get("step_seconds"),
        "saved_bytes": (result.get("cost") or {}).get("saved_activation_bytes"),
    }


def validated(cell: pd.DataFrame) -> pd.DataFrame:
    """Return the mean score and loss on validation at every rate of a cell, over the seeds that all its rates have."""
    seeds = set.intersection(*(set(part["seed"]) for _, part in cell.groupby("learning_rate")))
    common = cell[cell["seed"].isin(seeds)] if seeds else cell
    return common.groupby("learning_rate")[["validation", "loss"]].mean()


def at_best_rates(table: pd.DataFrame) -> pd.DataFrame:
    """Return the runs of every cell at the learning rate that is best on validation, and the rates that were tried."""
    chosen = []
    for _, cell in table.groupby(CELL, sort=False):
        means = validated(cell)
        best = means.sort_values(["validation", "loss"], ascending=[False, True]).index[0]
        tried = sorted(means.index)
        edge = len(tried) > 1 and best in (tried[0], tried[-1])
        own = cell[cell["learning_rate"] == best].assign(rates=len(tried), edge=edge)
        chosen.append(own)
    return pd.concat(chosen)


def compared(chosen: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Return a row for every cell: its mean over seeds and its difference to the reference, with intervals."""
    rows = []
    for (task, size, form), cell in chosen.groupby(CELL, sort=False):
        own = cell.set_index("seed")["test"]
        other = chosen[(chosen["task"] == task) & (chosen["size"] == size) & (chosen["form"] == reference)]
        difference = (own - other.set_index("seed")["test"]).dropna()
        first = cell.iloc[0]
        rows.append(
            {"task": task, "size": size, "form": form, "learning_rate": first["learning_rate"], "edge": first["edge"]}
            | {"rates": first["rates"], "seeds": len(own), "test": own.mean(), "half": half_interval(own)}
            | {"difference": difference.mean() if form != reference else math.nan, "paired": len(difference)}
            | {"difference_half": half_interval(difference)}
            | cell[["parameters", "step_seconds", "saved_bytes"]].mean().to_dict()
        )
    return pd.DataFrame(rows).sort_values(["task", "size", "test"], ascending=[True, True, False])


def half_interval(values: pd.Series) -> float:
    """Return half the 95 % interval of a mean (Student's t); NaN for fewer than two values."""
    return stats.t.ppf(0.975, len(values) - 1) * stats.sem(values) if len(values) > 1 else math.nan


def markdown(numbers: pd.DataFrame, reference: str) -> list[str]:
    """Return a title and a table for every task and size."""
    parts = []
    for (task, size), part in numbers.groupby(["task", "size"], sort=False):
        shown = pd.DataFrame(
            {
                "form": part["form"],
                "best rate": [f"{row.learning_rate:g}{' (edge)' if row.edge else ''}" for row in part.itertuples()],
                "test": [_percent(row.test, row.half) for row in part.itertuples()],
                f"− {reference}": [_percent(row.difference, row.difference_half, "+") for row in part.itertuples()],
                "seeds": part["seeds"],
                "parameters": [f"{value:,.0f}" for value in part["parameters"]],
                "kept for the backward pass, MB": [f"{value / 1e6:.1f}" for value in part["saved_bytes"]],
                "seconds a step": [f"{value:.3f}" for value in part["step_seconds"]],
            }
        )
        parts += [f"### {task}, {size} of dense LoRA's parameters", shown.to_markdown(index=False)]
    return parts


def _percent(value: float, half: float, sign: str = "") -> str:
    if math.isnan(value):
        return "–"
    return f"{100 * value:{sign}.2f}" + ("" if math.isnan(half) else f" ± {100 * half:.2f}")


def draw(table: pd.DataFrame, out: Path) -> None:
    """Draw the score on validation against the learning rate, a panel for every task and size."""
    places = list(table.groupby(["task", "size"], sort=True))
    columns = min(3, len(places))
    figure = Figure(figsize=(4.2 * columns + 2.5, 3.2 * math.ceil(len(places) / columns)), layout="constrained")
    panels = figure.subplots(math.ceil(len(places) / columns), columns, squeeze=False)
    forms = {form: f"C{number % 10}" for number, form in enumerate(sorted(table["form"].unique()))}
    for axes, ((task, size), part) in zip(panels.flat, places, strict=False):
        for form, own in part.groupby("form", sort=True):
            means = validated(own)["validation"]
            style = "-" if list(forms).index(form) < 10 else "--"
            axes.plot(means.index, 100 * means, style, color=forms[form], marker="o", markersize=3, label=form)
        axes.set(xscale="log", title=f"{task}, {size}", xlabel="learning rate", ylabel="validation, %")
        rates = sorted(part["learning_rate"].unique())
        axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axes.minorticks_off()
        axes.set_ylim(bottom=max(0, 100 * np.nanquantile(part["validation"], 0.15)))
    for axes in list(panels.flat)[len(places) :]:
        axes.set_visible(False)
    handles = {
        label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside right upper", fontsize=7)
    save_both(figure, out, "forms")


if __name__ == "__main__":
    sys.exit(main())
