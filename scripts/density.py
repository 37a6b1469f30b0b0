"""Moves of the outputs at every density: a coordinate check of the forms of mask.

    python scripts/density.py task=digits model.image_size=56 --seeds 2
    python scripts/density.py --draw     # table and figure of what was measured

Does a step move the outputs as far at every density? The fitted head is frozen, and the adapter of each form trains at
one learning rate at uniform densities. Measured is the root mean square change of the logits of held-out training rows
after 1, 10 and 75 steps. A form that knows its density has a slope of 0 of log change against log density: the rate
that suits dense LoRA suits it at every size (Yang and Hu 2022, arXiv 2203.03466; for sparse layers Dey et al. 2024,
arXiv 2405.15743). The rows are written to results/density/coordinates.csv.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice, product, repeat
from pathlib import Path

from partial_lora.launching.cluster import openmp

os.environ.update(openmp())  # before torch is imported

import numpy as np
import pandas as pd
import torch
from analyses import Subject
from matplotlib.figure import Figure
from peft import get_peft_model
from scipy.stats import gmean
from torch import Tensor

from partial_lora import cli
from partial_lora.adapter import PartialLoraConfig
from partial_lora.building import build
from partial_lora.calibration import few_shot
from partial_lora.files import write_atomic
from partial_lora.masks import AS_PEFT
from partial_lora.report.drawing import save
from partial_lora.report.statistics import half_interval
from partial_lora.settings import compose, versions
from partial_lora.settings.schema import Config

OUT = Path("results/density")
LEARNING_RATE = 1e-4  # so small that a step's change of the outputs is of the first order
DENSITIES = (1.0, 0.25, 0.05, 0.01)
STEPS = (1, 10, 75)
HELD_OUT = 64  # rows
MASKS: dict[str, dict] = {
    "rows and columns, as PEFT draws A": {**AS_PEFT},
    "A drawn for the kept columns": {"row_exponent": 0},
    "… scaled by p^-0.5": {"row_exponent": 0.5},
    "… scaled by p^-1": {},
    "entries, as PEFT draws A": {"granularity": "element"},
    "entries, A drawn for the kept ones": {"granularity": "element", "fan_in": "kept"},
    "… entries, scaled by p^-1": {"granularity": "element", "fan_in": "kept", "row_exponent": 1.0},
    "units, A drawn for the kept columns": {"granularity": "units", "row_exponent": 0},
    "frozen A": {"columns": "frozen", "row_exponent": 0},
    "frozen A, scaled by p^-1": {"columns": "frozen"},
}


def batches_of(subject: Subject, rows: np.ndarray, size: int) -> Iterator[Mapping[str, Tensor]]:
    return subject.transform.batches(subject.task.train.select(rows), size)


def endless(subject: Subject, seed: int) -> Iterator[Mapping[str, Tensor]]:
    """Return batches of the training rows without end, in an order of the seed's, and never the held-out rows."""
    rows = np.random.default_rng(seed).permutation(len(subject.task.train))[HELD_OUT:]
    return chain.from_iterable(repeat(list(batches_of(subject, rows[: len(rows) - len(rows) % 8], 8))))


def held_out(subject: Subject, seed: int) -> Mapping[str, Tensor]:
    """Return the rows whose logits are looked at."""
    rows = np.random.default_rng(seed).permutation(len(subject.task.train))[:HELD_OUT]
    (batch,) = batches_of(subject, rows, HELD_OUT)
    return batch


def measure(subject: Subject, seeds: Sequence[int]) -> pd.DataFrame:
    """Return a row for every form, density, seed and number of steps."""
    one = {"task": subject.config.task.name, "model": subject.config.model.name}
    rows = []
    for seed in seeds:
        fit = batches_of(subject, subject.draws(seed=seed).fit, 8)
        with few_shot.few_shot_head(subject.model, build.new_head_of(subject.config.model), fit):
            for density, (form, settings) in product(DENSITIES, MASKS.items()):
                if density == 1 and form != next(iter(MASKS)):
                    continue  # at density 1 all of them are plain LoRA, but for a frozen A
                cell = one | {"form": form, "density": density, "seed": seed, "learning_rate": LEARNING_RATE}
                changes = changes_of_outputs(subject, settings, density, seed)
                rows += [cell | {"step": step, "change": change} for step, change in changes.items()]
                print(f"{form}, density {density}, seed {seed}: {changes}", flush=True)
    return pd.DataFrame(rows)


def changes_of_outputs(subject: Subject, settings: Mapping, density: float, seed: int) -> dict[int, float]:
    """Train an adapter and return the root mean square change of the logits after each of `STEPS`."""
    torch.manual_seed(seed)
    own = subject.config.method
    adapter = PartialLoraConfig(
        r=own.nominal_rank,
        lora_alpha=own.alpha,
        target_modules=list(subject.shapes),
        sparsity=1 - density,
        mask_seed=seed,
        **settings,
    )
    adapted = get_peft_model(subject.model, adapter)
    try:
        optimizer = torch.optim.AdamW([each for each in adapted.parameters() if each.requires_grad], LEARNING_RATE)
        rows, changes = held_out(subject, seed), {}

        def outputs() -> Tensor:
            with torch.inference_mode():
                return adapted.eval()(**rows).logits

        before = outputs()
        for step, batch in enumerate(islice(endless(subject, seed), max(STEPS)), start=1):
            adapted.train()(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step in STEPS:
                changes[step] = (outputs() - before).square().mean().sqrt().item()
        return changes
    finally:
        adapted.unload()


def points_of(measured: pd.DataFrame, form: str, step: int) -> pd.DataFrame:
    """Return the rows of a form after some steps; at density 1 all forms are plain LoRA, but for a frozen A."""
    at_step = measured[measured["step"] == step]
    own = at_step[at_step["form"] == form]
    return own if "frozen" in form else pd.concat([at_step[at_step["density"] == 1], own[own["density"] < 1]])


def slopes(measured: pd.DataFrame) -> pd.DataFrame:
    """Return for every form and step the slope of log change against log density, and its 95 % interval over seeds."""
    rows = []
    for form in MASKS:
        row = {"form": form}
        for step in STEPS:
            fits = [
                np.polyfit(np.log(points["density"]), np.log(points["change"]), 1)[0]
                for _, points in points_of(measured, form, step).groupby("seed")
                if len(points) > 1
            ]
            half = half_interval(np.std(fits, ddof=1) if len(fits) > 1 else math.nan, len(fits))
            row[f"step {step}"] = f"{np.mean(fits):+.2f} ± {half:.2f}"
        rows.append(row)
    return pd.DataFrame(rows)


def draw(measured: pd.DataFrame, out: Path) -> None:
    """Write coordinates.md, the slopes, and coordinates.svg, the changes against the density."""
    table = slopes(measured)
    text = "Slope of log change of the logits against log density; mean over seeds, 95 % interval (Student's t).\n\n"
    write_atomic(out / "coordinates.md", text + table.to_markdown(index=False) + "\n")
    print(table.to_string(index=False))
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axes, step in zip(figure.subplots(1, len(STEPS), sharey=False), STEPS, strict=True):
        for form in MASKS:
            mean = points_of(measured, form, step).groupby("density")["change"].apply(gmean)
            axes.plot(mean.index, mean, marker="o", markersize=3, label=form)
        axes.set(xscale="log", yscale="log", xlabel="density", title=f"after {step} step{'s' * (step > 1)}")
    figure.axes[0].set_ylabel("change of the logits (root mean square)")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    save(figure, out / "coordinates.svg")


@cli.script
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure unless only a drawing is asked for, and draw; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draw", action="store_true", help="only the table and the figure")
    options, overrides = parser.parse_known_args(arguments)
    path = OUT / "coordinates.csv"

    def work(config: Config) -> int:
        OUT.mkdir(parents=True, exist_ok=True)
        measured = measure(Subject(versions.plain(config)), range(options.seeds))
        write_atomic(path, measured.to_csv(index=False))
        return 0

    code = 0 if options.draw else compose.compose("density", ["trainer.device=cpu", *overrides], work)
    if code == 0:
        draw(pd.read_csv(path), OUT)
    return code


if __name__ == "__main__":
    sys.exit(main())
