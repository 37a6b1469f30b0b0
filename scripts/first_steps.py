"""First steps of every form of adapter: shares of a real gradient that it can reach, and moves at every density.

    python scripts/first_steps.py reach task=digits                 # or `make reach`: four sets, some minutes each
    python scripts/first_steps.py reach task=gtsrb model.image_size=56 data_dir=data
    python scripts/first_steps.py density task=digits model.image_size=56 --seeds 2
    python scripts/first_steps.py reach --draw                      # table and figure of what was measured

*Reach* (docs/evidence/theory.md, section 6): the head is fitted on the fit draw; the gradient G of every module's
weight is that of other training rows. Reach is the largest share of G's energy, its sum of squares, that a form of 13 %
of dense LoRA's parameters can hold once it has turned to it. Start is the share that the change of the weight by the
first step of gradient descent holds, where A is random and B is zero: the square of the cosine between both. Masks are
random, of one density everywhere. Shares are means over four draws. Beside them stand the accuracies of results/forms.
Rows go to results/reach/reach.csv set by set.

*Density*, a coordinate check: does a step move the outputs as far at every density? The fitted head is frozen, and the
adapter of each form trains at one learning rate at uniform densities. Measured is the root mean square change of the
logits of held-out training rows after 1, 10 and 75 steps. A form that knows its density has a slope of 0 of log change
against log density: the rate that suits dense LoRA suits it at every size (Yang and Hu 2022, arXiv 2203.03466; for
sparse layers Dey et al. 2024, arXiv 2405.15743). Rows are added to results/density/coordinates.csv form by form, so
that a check that was stopped goes on.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice, repeat
from pathlib import Path

from partial_lora.launching.cluster import openmp

os.environ.update(openmp())  # before torch is imported

import numpy as np
import pandas as pd
import torch
from analyses import Subject
from matplotlib.figure import Figure
from peft import get_peft_model
from scipy.stats import gmean, spearmanr
from torch import Tensor

from partial_lora import cli
from partial_lora.adapter import PartialLoraConfig
from partial_lora.building import build
from partial_lora.calibration import few_shot
from partial_lora.calibration.importance import gradients
from partial_lora.errors import PartialLoraError
from partial_lora.files import write_atomic
from partial_lora.masks import AS_PEFT, kept_count
from partial_lora.models.modes import differentiable
from partial_lora.report.drawing import save
from partial_lora.report.statistics import half_interval
from partial_lora.settings import compose, versions
from partial_lora.settings.schema import Config

REACH, DENSITY, FORMS = Path("results/reach"), Path("results/density"), Path("results/forms/forms.csv")


def batches_of(subject: Subject, rows: np.ndarray, size: int) -> Iterator[Mapping[str, Tensor]]:
    return subject.transform.batches(subject.task.train.select(rows), size)


# --- Reach: what a form can hold of a gradient, as shares of its energy.

RANK, BUDGET = 16, 0.13
LOW = round(RANK * BUDGET)  # the rank of a dense adapter of that size
ROWS = 128  # training rows that the gradient is of
SWEEPS = 3
DRAWS = 4  # of masks and of A for every module; one draw of a module with most of the energy would decide a set
Units = list[tuple[np.ndarray, np.ndarray]]  # of each unit of the rank the rows of B and the columns of A that it has


def directions(gradient: np.ndarray, rank: int) -> float:
    """Return the share in the largest directions (Eckart and Young): what a dense adapter of that rank can hold."""
    energy = np.linalg.svd(gradient, compute_uv=False) ** 2
    return float(energy[:rank].sum() / (gradient**2).sum())


def rows_columns(gradient: np.ndarray, rows: np.ndarray, columns: np.ndarray, rank: int) -> float:
    """Return the share in the largest directions of the block of kept rows and columns."""
    block = gradient[np.ix_(rows, columns)]
    return directions(block, rank) * float((block**2).sum() / (gradient**2).sum())


def units(gradient: np.ndarray, supports: Units) -> float:
    """Return the share that a sum of products of single columns of B and rows of A holds, each within its own support.

    By turns every unit takes the largest direction of what the others leave in its block: a share from below.
    """
    left, held = gradient.copy(), [np.zeros((len(rows), len(columns))) for rows, columns in supports]
    for _ in range(SWEEPS):
        for place, (rows, columns) in enumerate(supports):
            block = left[np.ix_(rows, columns)] + held[place]
            u, s, v = np.linalg.svd(block, full_matrices=False)
            held[place] = s[0] * np.outer(u[:, 0], v[0])
            left[np.ix_(rows, columns)] = block - held[place]
    return 1 - float((left**2).sum() / (gradient**2).sum())


def start(gradient: np.ndarray, supports: Units, generator: np.random.Generator) -> float:
    """Return the share that the first step holds: B moves along its gradient, A is random within the supports."""
    change = np.zeros_like(gradient)
    for rows, columns in supports:
        a = generator.normal(size=len(columns))
        change[np.ix_(rows, columns)] += np.outer(gradient[np.ix_(rows, columns)] @ a, a)
    return float((change * gradient).sum() ** 2 / ((change**2).sum() * (gradient**2).sum()))


def forms(gradient: np.ndarray, seed: int | Sequence[int]) -> Iterator[tuple[str, float, float]]:
    """Yield (form, reach, start) of every form at one gradient (out, in), its masks drawn by the seed."""
    generator, (m, n) = np.random.default_rng(seed), gradient.shape
    sizes = kept_count(m, 1 - BUDGET), kept_count(n, 1 - BUDGET)

    def some(sizes: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        return tuple(np.sort(generator.permutation(size)[:kept]) for size, kept in zip((m, n), sizes, strict=True))

    whole, (rows, columns) = (np.arange(m), np.arange(n)), some(sizes)
    yield "lora", directions(gradient, RANK), start(gradient, [whole] * RANK, generator)
    yield "low_rank", directions(gradient, LOW), start(gradient, [whole] * LOW, generator)
    one_block = [(rows, columns)] * RANK
    yield "rows and columns", rows_columns(gradient, rows, columns, RANK), start(gradient, one_block, generator)
    energy = gradient**2
    top = tuple(np.argsort(energy.sum(axis=1 - axis))[-sizes[axis] :] for axis in (0, 1))
    yield "rows and columns, largest", rows_columns(gradient, *top, RANK), start(gradient, [top] * RANK, generator)
    own = list(zip(*(_in_turn(generator, size, kept) for size, kept in zip((m, n), sizes, strict=True)), strict=True))
    yield "units", units(gradient, own), start(gradient, own, generator)
    counts = zip(*(_dealt(generator, RANK, size, kept) for size, kept in zip((m, n), sizes, strict=True)), strict=True)
    entries = [some(each) for each in counts]
    yield "entries", units(gradient, entries), start(gradient, entries, generator)
    drawn = generator.permutation(m * n)[: RANK * sum(sizes)]
    share = float(energy.ravel()[drawn].sum() / energy.sum())
    yield "random_weights", share, share  # all of them move at once, each along its own gradient


def _in_turn(generator: np.random.Generator, size: int, kept: int) -> np.ndarray:
    """Return the kept entries of each unit (RANK, kept), dealt from one random order, as mask=units deals them."""
    return generator.permutation(size)[np.arange(RANK * kept).reshape(RANK, kept) % size]


def _dealt(generator: np.random.Generator, groups: int, size: int, kept: int) -> np.ndarray:
    """Return how many of groups * kept entries, drawn of groups * size, fall into each group; one at least."""
    return np.maximum(1, generator.multivariate_hypergeometric([size] * groups, groups * kept))


def gradients_of(subject: Subject) -> dict[str, np.ndarray]:
    """Return the gradient of the summed loss of training rows outside the fit draw for the weight of each module."""
    fit = subject.draws().fit
    others = np.random.default_rng(0).permutation(np.setdiff1d(np.arange(len(subject.task.train)), fit))[:ROWS]
    modules = {name: subject.model.get_submodule(name) for name in subject.shapes}
    batches, seen = (batches_of(subject, rows, 32) for rows in (others, fit))
    sums = {name: np.zeros(shape) for name, shape in subject.shapes.items()}
    with (
        few_shot.few_shot_head(subject.model, build.new_head_of(subject.config.model), seen),
        differentiable(subject.model, modules),
    ):
        for batch in batches:
            own = gradients(subject.model, modules, batch, lambda model, batch: model(**batch).loss)
            for name, gradient in own.items():
                sums[name] += gradient.double().cpu().numpy() * len(batch["labels"])
    return sums


def measure_reach(subject: Subject, path: Path) -> None:
    """Add the rows of a task to the file, in place of those it has: shares of all modules' energy, and medians."""
    torch.manual_seed(0)
    task, rows = subject.config.task.name, []
    for module, (name, gradient) in enumerate(gradients_of(subject).items()):
        for draw in range(DRAWS):
            for form, reach, first in forms(gradient, [module, draw]):
                rows.append((form, name, float((gradient**2).sum()), reach, first))
    drawn = pd.DataFrame(rows, columns=["form", "module", "energy", "reach", "start"])
    table = drawn.groupby(["form", "module"], sort=False).mean().reset_index()
    weights = table["energy"] / table.groupby("form")["energy"].transform("sum")
    shares = table.assign(reach=weights * table["reach"], start=weights * table["start"])
    found = shares.groupby("form", sort=False)[["reach", "start"]].sum()
    medians = table.groupby("form", sort=False)[["reach", "start"]].median().add_suffix("_median")
    own = found.join(medians).reset_index().assign(task=task, model=subject.config.model.name)
    known = pd.read_csv(path) if path.exists() else own.iloc[:0]
    whole = pd.concat([known[known["task"] != task], own])
    write_atomic(path, whole.to_csv(index=False, float_format="%.6g"))


NAMES = {"rows and columns": "partial", "rows and columns, largest": "ticket", "units": "partial mask=units"}


def beside(measured: pd.DataFrame, tested: pd.DataFrame) -> pd.DataFrame:
    """Return the measured shares with the test score of each form, and how far it is above low_rank's (same seeds)."""
    tested = tested[tested["size"].isin(["0.13", "own"])]
    scores = tested.assign(above=tested["difference"].where(tested["form"] != "low_rank", 0.0))
    named = measured.assign(name=measured["form"].replace(NAMES))
    found = named.merge(
        scores[["task", "form", "test", "above"]], "left", left_on=["task", "name"], right_on=["task", "form"]
    )
    return measured.assign(test=found["test"].to_numpy(), above=found["above"].to_numpy())


def draw_reach(table: pd.DataFrame, out: Path) -> None:
    """Write reach.md and reach.svg: shares by form and set, and accuracies against both shares."""
    lines = []
    for task, part in table.groupby("task", sort=False):
        equal = part.dropna(subset=["test"]).query("form != 'lora'")
        if len(equal) > 2:
            pair = [spearmanr(equal[name], equal["above"]).statistic for name in ("reach", "start")]
            lines.append(f"- {task}: {len(equal)} forms, reach {pair[0]:+.2f}, start {pair[1]:+.2f}")
    shown = table.assign(
        **{name: [f"{100 * value:.2f}" for value in table[name]] for name in ("reach", "start", "reach_median")},
        test=["–" if np.isnan(value) else f"{100 * value:.2f}" for value in table["test"]],
        above=["–" if np.isnan(value) else f"{100 * value:+.2f}" for value in table["above"]],
    )[["task", "form", "reach", "reach_median", "start", "test", "above"]]
    shown.columns = ["task", "form", "reach (%)", "median module (%)", "start (%)", "test (%)", "− low_rank"]
    parts = [
        "    python scripts/first_steps.py reach --draw",
        "# What share of a real gradient's energy each form can reach, at 13 % of dense LoRA's parameters",
        "Of all modules' energy together, and the median of a module; test: the form's score in results/forms. The "
        "last column is over the seeds that both have, the score over all.",
        shown.to_markdown(index=False, disable_numparse=True),
        "Rank correlation (Spearman's) of each share with the difference to low_rank, over forms of equal size:",
        "\n".join(lines),
    ]
    write_atomic(out / "reach.md", "\n\n".join(parts) + "\n")
    print("\n".join(lines))
    figure = Figure(figsize=(12, 4), layout="constrained")
    left, *others = figure.subplots(1, 3, width_ratios=[1.3, 1, 1])
    names, tasks = list(dict.fromkeys(table["form"])), list(dict.fromkeys(table["task"]))
    colours = {form: f"C{at}" for at, form in enumerate(names)}
    markers = dict(zip(tasks, "osD^v<>", strict=False))
    for task, part in table.groupby("task", sort=False):
        places = [names.index(form) for form in part["form"]]
        left.plot(places, 100 * part["reach"], markers[task], color="C0", alpha=0.8, label=f"reach, {task}")
        left.plot(places, 100 * part["start"], markers[task], color="C1", alpha=0.8, fillstyle="none")
        for axes, share in zip(others, ("reach", "start"), strict=True):
            for row in part.dropna(subset=["above"]).query("form != 'lora'").itertuples():
                axes.plot(100 * getattr(row, share), 100 * row.above, markers[task], color=colours[row.form])
    left.set(yscale="log", ylabel="share of the gradient's energy, %", title="filled: reach; open: first step")
    left.set_xticks(range(len(names)), names, rotation=35, ha="right")
    for axes, share in zip(others, ("reach", "first step"), strict=True):
        axes.axhline(0, color="0.6", linewidth=1)
        axes.set(xlabel=f"{share}, % of the gradient's energy", title="test score − low_rank, points")
    others[0].set_xscale("log")
    handles = [left.plot([], [], markers[task], color="0.3", label=task)[0] for task in tasks]
    handles += [left.plot([], [], "s", color=colours[form], label=form)[0] for form in names if form != "lora"]
    figure.legend(handles=handles, loc="outside lower center", ncols=5, fontsize=8, frameon=False)
    save(figure, out / "reach.svg")


# --- Density.

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
FIELDS = ["task", "model", "form", "density", "seed", "learning_rate", "step", "change"]


def endless(subject: Subject, seed: int) -> Iterator[Mapping[str, Tensor]]:
    """Return batches of the training rows without end, in an order of the seed's, and never the held-out rows."""
    rows = np.random.default_rng(seed).permutation(len(subject.task.train))[HELD_OUT:]
    return chain.from_iterable(repeat(list(batches_of(subject, rows[: len(rows) - len(rows) % 8], 8))))


def held_out(subject: Subject, seed: int) -> Mapping[str, Tensor]:
    """Return the rows whose logits are looked at."""
    rows = np.random.default_rng(seed).permutation(len(subject.task.train))[:HELD_OUT]
    (batch,) = batches_of(subject, rows, HELD_OUT)
    return batch


def measure_density(subject: Subject, path: Path, seeds: Sequence[int]) -> None:
    """Add a row for every form, density, seed and number of steps that the file does not have.

    Raises PartialLoraError where the file is of another task, model or learning rate: one slope over both would mean
    nothing.
    """
    one = {"task": subject.config.task.name, "model": subject.config.model.name, "learning_rate": LEARNING_RATE}
    known = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=FIELDS)
    for column, value in one.items():
        if set(known[column]) - {value}:
            raise PartialLoraError(f"{path}: {column} is {known[column][0]} there, not {value}: move it away")
    done = set(known[["form", "density", "seed"]].itertuples(index=False, name=None))
    for seed in seeds:
        fit = batches_of(subject, subject.draws(seed=seed).fit, 8)
        with few_shot.few_shot_head(subject.model, build.new_head_of(subject.config.model), fit):
            for density in DENSITIES:
                for form, settings in MASKS.items():
                    if (form, density, seed) in done or (density == 1 and form != next(iter(MASKS))):
                        continue  # at density 1 all of them are plain LoRA, but for a frozen A
                    changes = changes_of_outputs(subject, settings, density, seed)
                    cell = one | {"form": form, "density": density, "seed": seed}
                    rows = [cell | {"step": step, "change": change} for step, change in changes.items()]
                    known = pd.concat([known, pd.DataFrame(rows, columns=FIELDS)], ignore_index=True)
                    write_atomic(path, known.to_csv(index=False))
                    print(f"{form}, density {density}, seed {seed}: {changes}", flush=True)


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


def draw_density(measured: pd.DataFrame, out: Path) -> None:
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


# --- The command.


@cli.script
def main(arguments: Sequence[str] | None = None) -> int:
    """Measure unless only a drawing is asked for, and draw; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("reach", "density"))
    parser.add_argument("--seeds", type=int, default=3, help="of density")
    parser.add_argument("--draw", action="store_true", help="only the table and the figure")
    options, overrides = parser.parse_known_args(arguments)
    is_reach = options.what == "reach"
    out = REACH if is_reach else DENSITY
    path = out / ("reach.csv" if is_reach else "coordinates.csv")

    def work(config: Config) -> int:
        out.mkdir(parents=True, exist_ok=True)
        subject = Subject(versions.plain(config))
        measure_reach(subject, path) if is_reach else measure_density(subject, path, range(options.seeds))
        return 0

    usual = ["preset=cpu"] if is_reach else []
    code = 0 if options.draw else compose.compose(options.what, [*usual, "trainer.device=cpu", *overrides], work)
    if code == 0:
        measured = pd.read_csv(path)
        draw_reach(beside(measured, pd.read_csv(FORMS)), out) if is_reach else draw_density(measured, out)
    return code


if __name__ == "__main__":
    sys.exit(main())
