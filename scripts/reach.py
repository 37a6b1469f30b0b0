"""Shares of a real gradient that each form of adapter can reach, and its first step does (docs/evidence/theory.md, 6).

    python scripts/reach.py task=digits                              # or `make reach`: four sets, some minutes each
    python scripts/reach.py task=gtsrb model.image_size=56 data_dir=data
    python scripts/reach.py --draw                                       # the table and the figure of what was measured

The head is fitted on the fit draw; the gradient G of every module's weight is that of other training rows. *Reach* is
the largest share of G's energy, its sum of squares, that a form of 13 % of dense LoRA's parameters can hold once it has
turned to it. *Start* is the share that the change of the weight by the first step of gradient descent holds, where A is
random and B is zero: the square of the cosine between both. Masks are random, of one density everywhere. Shares are
means over four draws. Beside them stand the accuracies of results/forms. Rows go to results/reach/reach.csv set by set.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import analyses  # before torch, which then finds its threads counted
import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import Tensor, nn

from partial_lora import cli
from partial_lora.calibration import few_shot
from partial_lora.calibration.importance import gradients
from partial_lora.files import write_atomic
from partial_lora.masks import kept_count
from partial_lora.models.modes import differentiable
from partial_lora.report.drawing import save
from partial_lora.settings import compose, stored
from partial_lora.settings.schema import Config

OUT, FORMS = Path("results/reach"), Path("results/forms/forms.csv")
RANK, BUDGET = 16, 0.13
LOW = round(RANK * BUDGET)  # the rank of a dense adapter of that size
ROWS, BATCH = 128, 32  # training rows that the gradient is of
SWEEPS = 3
DRAWS = 4  # of masks and of A for every module; one draw of a module with most of the energy would decide a set
Units = list[tuple[np.ndarray, np.ndarray]]  # of each unit of the rank the rows of B and the columns of A that it has


# --- What a form can hold of a gradient, as shares of its energy.


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


# --- Real gradients


def _loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    return model(**batch).loss


class Gradients(analyses.Subject):
    """A frozen model with a fitted head."""

    def of_weights(self) -> dict[str, np.ndarray]:
        """Return the gradient of the mean loss of training rows outside the fit draw for the weight of each module."""
        fit = self.draws().fit
        others = np.random.default_rng(0).permutation(np.setdiff1d(np.arange(len(self.task.train)), fit))[:ROWS]
        modules = {name: self.model.get_submodule(name) for name in self.shapes}
        batches, seen = (self.transform.batches(self.task.train.select(rows), BATCH) for rows in (others, fit))
        sums = {name: np.zeros(shape) for name, shape in self.shapes.items()}
        with few_shot.few_shot_head(self.model, self.config.model.head, seen), differentiable(self.model, modules):
            for batch in batches:
                for name, gradient in gradients(self.model, modules, batch, _loss).items():
                    sums[name] += gradient.double().cpu().numpy() * len(batch["labels"])
        return sums


def measure(subject: Gradients, path: Path) -> None:
    """Add the rows of a task to the file, in place of those it has: shares of all modules' energy, and medians."""
    torch.manual_seed(0)
    task, rows = subject.config.task.name, []
    for module, (name, gradient) in enumerate(subject.of_weights().items()):
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


# --- Beside the accuracies of results/forms


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


def draw(table: pd.DataFrame, out: Path) -> None:
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
        "    python scripts/reach.py --draw",
        "# What share of a real gradient's energy each form can reach, at 13 % of dense LoRA's parameters",
        "Of all modules' energy together, and the median of a module; test: the form's score in results/forms.",
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure a task unless only a drawing is asked for, and draw; return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="only the table and the figure")
    options, overrides = parser.parse_known_args(arguments)
    path = OUT / "reach.csv"

    def work(composed: Config) -> int:
        OUT.mkdir(parents=True, exist_ok=True)
        measure(Gradients(stored.plain(composed)), path)
        return 0

    def command() -> int:
        code = 0 if options.draw else compose.compose("reach", ["preset=cpu", "trainer.tuned=null", *overrides], work)
        if code == 0:
            draw(beside(pd.read_csv(path), pd.read_csv(FORMS)), OUT)
        return code

    return cli.guarded(command)


if __name__ == "__main__":
    sys.exit(main())
