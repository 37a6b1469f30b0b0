"""Coordinate check: does a training step move the outputs as far at every density?

    python scripts/density.py model=vit_s14 task=digits model.image_size=56
    python scripts/density.py --draw         # the table and the figure from what was measured

The head is fitted on the fit draw and frozen, and the adapter of each form trains at one learning rate at uniform
densities. Measured is the root mean square change of the logits of held-out training rows after 1, 10 and 75 steps. A
form that knows its density has a slope of 0 of log change against log density: the rate that suits dense LoRA suits it
at every size (Yang and Hu 2022, arXiv 2203.03466; for sparse layers Dey et al. 2024, arXiv 2405.15743).

Rows are added to coordinates.csv one by one, so that a check that was stopped goes on.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice, repeat
from pathlib import Path

import analyses  # before torch, which then finds its threads counted
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from peft import get_peft_model
from torch import Tensor

from partial_lora import cli
from partial_lora.adapter import PartialLoraConfig
from partial_lora.calibration import few_shot
from partial_lora.errors import PartialLoraError
from partial_lora.files import write_atomic
from partial_lora.masks import AS_PEFT
from partial_lora.report.drawing import save
from partial_lora.report.records import half_interval
from partial_lora.settings import compose, stored
from partial_lora.settings.schema import Config

OUT = Path("results/density")
LEARNING_RATE = 1e-4  # so small that a step's change of the outputs is of the first order
DENSITIES = (1.0, 0.25, 0.05, 0.01)
STEPS = (1, 10, 75)
BATCH = 8
HELD_OUT = 64  # rows
FORMS: dict[str, dict] = {
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
FIELDS = ("task", "model", "form", "density", "seed", "learning_rate", "step", "change")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is not measured yet, and draw; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--draw", action="store_true", help="only the table and the figure")
    options, overrides = parser.parse_known_args(arguments)
    path = OUT / "coordinates.csv"

    def work(composed: Config) -> int:
        OUT.mkdir(parents=True, exist_ok=True)
        measure(Check(stored.plain(composed)), path, range(options.seeds))
        return 0

    def command() -> int:
        code = 0 if options.draw else compose.compose("density", overrides, work)
        if code == 0:
            draw(pd.read_csv(path), OUT)
        return code

    return cli.guarded(command)


class Check(analyses.Subject):
    """A model with a fitted, frozen head, and the rows to train on and to look at."""

    def batches(self, seed: int) -> Iterator[Mapping[str, Tensor]]:
        """Return batches of the training rows without end, in an order of the seed's, and never the held-out rows."""
        rows = np.random.default_rng(seed).permutation(len(self.task.train))[HELD_OUT:]
        size = len(rows) - len(rows) % BATCH
        inputs = self.transform.batches(self.task.train.select(rows[:size]), BATCH)
        return chain.from_iterable(repeat(list(inputs)))

    def held_out(self, seed: int) -> Mapping[str, Tensor]:
        """Return the rows whose logits are looked at."""
        rows = np.random.default_rng(seed).permutation(len(self.task.train))[:HELD_OUT]
        (batch,) = self.transform.batches(self.task.train.select(rows), HELD_OUT)
        return batch


def measure(check: Check, path: Path, seeds: Sequence[int]) -> None:
    """Add a row for every form, density, seed and number of steps that the file does not have.

    Raises PartialLoraError where the file is of another task, model or learning rate: one slope over both would mean
    nothing.
    """
    done, place = set(), (check.config.task.name, check.config.model.name)
    if path.exists():
        known = pd.read_csv(path)
        for own, column in zip((*place, LEARNING_RATE), ("task", "model", "learning_rate"), strict=True):
            if set(known[column]) - {own}:
                raise PartialLoraError(f"{path}: {column} is {known[column][0]} there, not {own}: move it away")
        done = {(row.form, row.density, row.seed) for row in known.itertuples() if row.step == max(STEPS)}
    else:
        path.write_text(",".join(FIELDS) + "\n", encoding="utf-8")
    for seed in seeds:
        fit = check.transform.batches(check.task.train.select(check.draws(seed=seed).fit), BATCH)
        with few_shot.few_shot_head(check.model, check.config.model.head, fit):
            for density in DENSITIES:
                for form, settings in FORMS.items():
                    if (form, density, seed) in done or (density == 1 and form != next(iter(FORMS))):
                        continue  # at density 1 all of them are plain LoRA, but for a frozen A
                    changes = changes_of_outputs(check, settings, density, seed)
                    with path.open("a", newline="", encoding="utf-8") as file:
                        csv.writer(file).writerows(
                            (*place, form, density, seed, LEARNING_RATE, step, change)
                            for step, change in changes.items()
                        )
                    print(f"{form}, density {density}, seed {seed}: {changes}", flush=True)


def changes_of_outputs(check: Check, settings: Mapping, density: float, seed: int) -> dict[int, float]:
    """Train an adapter and return the root mean square change of the logits after each of `STEPS`."""
    torch.manual_seed(seed)
    own = check.config.method
    adapter = PartialLoraConfig(
        r=own.rank,
        lora_alpha=own.alpha,
        target_modules=list(check.shapes),
        sparsity=1 - density,
        mask_seed=seed,
        **settings,
    )
    adapted = get_peft_model(check.model, adapter)
    try:
        optimizer = torch.optim.AdamW([each for each in adapted.parameters() if each.requires_grad], LEARNING_RATE)
        held_out, changes = check.held_out(seed), {}

        def outputs() -> Tensor:
            with torch.inference_mode():
                return adapted.eval()(**held_out).logits

        before = outputs()
        for step, batch in enumerate(islice(check.batches(seed), max(STEPS)), start=1):
            adapted.train()(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if step in STEPS:
                changes[step] = (outputs() - before).square().mean().sqrt().item()
        return changes
    finally:
        adapted.unload()


def slopes(measured: pd.DataFrame) -> pd.DataFrame:
    """Return for every form and step the slope of log change against log density, and its 95 % interval over seeds."""
    plain = measured[measured["density"] == 1]
    rows = []
    for form in FORMS:
        own, row = measured[measured["form"] == form], {"form": form}
        for step in STEPS:
            fits = []
            for seed, part in own[own["step"] == step].groupby("seed"):
                at_one = plain[(plain["seed"] == seed) & (plain["step"] == step)]
                points = part if "frozen" in form else pd.concat([at_one, part[part["density"] < 1]])
                if len(points) > 1:
                    fits.append(np.polyfit(np.log(points["density"]), np.log(points["change"]), 1)[0])
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
        for form in FORMS:
            own = measured[(measured["step"] == step) & (measured["form"] == form)]
            plain = measured[(measured["density"] == 1) & (measured["step"] == step)]
            whole = own if "frozen" in form else pd.concat([plain, own[own["density"] < 1]])
            mean = whole.groupby("density")["change"].apply(lambda each: np.exp(np.log(each).mean()))
            axes.plot(mean.index, mean, marker="o", markersize=3, label=form)
        axes.set(xscale="log", yscale="log", xlabel="density", title=f"after {step} step{'s' * (step > 1)}")
    figure.axes[0].set_ylabel("change of the logits (root mean square)")
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=7)
    save(figure, out / "coordinates.svg")


if __name__ == "__main__":
    sys.exit(main())
