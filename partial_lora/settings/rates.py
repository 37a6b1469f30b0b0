"""Learning rates: that of `trainer.learning_rate=auto`, and the best of those that were tried."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import replace

from partial_lora.masks import GRANULARITIES, MASKED
from partial_lora.methods import called
from partial_lora.training.config import AUTO, TrainerConfig

# --- The best of the rates that a search tried.

# A run's score and loss on validation, the larger the better; None if it failed.
Validation = tuple[float, float] | None


def ranked(tried: Mapping[float, Mapping[int, Validation]]) -> list[float]:
    """Return the learning rates that compete, the best on validation first, without those at which a seed failed.

    tried: the validation of runs by rate and seed. Only rates with the most seeds compete, since a search goes on with
    the better ones alone. What decides is the mean score over the seeds that these share, of equals the mean loss, and
    then the lower rate.
    """
    most = max(map(len, tried.values()))
    competing = {rate: of_seeds for rate, of_seeds in tried.items() if len(of_seeds) == most}
    shared = set.intersection(*map(set, competing.values()))
    means = {}
    for rate, of_seeds in competing.items():
        validation = [of_seeds[seed] for seed in shared or of_seeds]
        if None not in validation:
            means[rate] = tuple(map(statistics.fmean, zip(*validation, strict=True)))
    return sorted(means, key=lambda rate: (*means[rate], -rate), reverse=True)


# --- The learning rate of a run that has none, `trainer.learning_rate=auto`: by what it trains, and for how long.

_DENSE, _WIDTH = 2e-3, 384  # dense LoRA's best at this width, after 200 to 600 steps of 16 (results/race/race.md)

# Keys of `mask` that decide how far a step moves the outputs.
OF_MASKS = ("granularity", "rows", "columns", "fan_in", "row_exponent", "column_exponent")
_LEAST_DENSITY = 0.12  # of whole rows and columns drawn and scaled for it, down to which dense LoRA's rate serves


def dense_rate(width: int) -> float:
    """Return the learning rate for dense LoRA to try first on a model whose adapted modules have so many inputs.

    Adam moves every number by the rate, so that a sum over twice the inputs moves twice as far: rates of wide models
    are lower, as 2e-4 for the 4,096 of Llama 7B, by which QLoRA (arXiv 2305.14314) trained. Narrower models than
    measured keep the rate.
    """
    return _DENSE * min(1.0, _WIDTH / width)


def width(shapes: Iterable[tuple[int, ...]]) -> int:
    """Return the width of a model: the inputs of the modules that are adapted, of most of them."""
    return statistics.median_low([math.prod(shape[1:]) for shape in shapes])


def starting_rate(
    dense: float,
    density: float,
    *,
    granularity: str = "rows_columns",
    rows: str = MASKED,
    columns: str = MASKED,
    fan_in: str = "dense",
    row_exponent: float = 0.0,
    column_exponent: float = 0.0,
) -> float:
    """Return the learning rate for a masked adapter to try first, from the one that suits dense LoRA.

    At the same rate, Adam's first step moves the outputs p √q times as far as dense LoRA's, with p the density of rows
    and q of columns (docs/evidence/theory.md): the density to the power 1.5. An A that is drawn for the kept columns,
    or whole, takes 0.5 off this power; an exponent takes off itself. A third of what is left is made up for. How that
    and the rules for few rows, entries and groups were found is in docs/concepts/learning-rates.md.

    Args:
        dense: the rate that suits dense LoRA.
        density: the share of dense LoRA's parameters that trains, in (0, 1].
        granularity, rows, columns, fan_in, row_exponent, column_exponent: of `mask`.
    """
    form = GRANULARITIES[granularity]
    if form.tied:
        return dense
    dense *= density**-form.rate_power
    knows_columns = fan_in == "kept" or (rows, columns) != (MASKED, MASKED)
    power = round(1.5 - 0.5 * knows_columns - row_exponent - column_exponent, 9)
    if power <= 0:
        return dense * (1.0 if form.over_entries else min(1.0, math.sqrt(density / _LEAST_DENSITY)))
    return dense * density ** (-power / 3)


def auto(settings: Mapping, *, width: int, density: float) -> float:
    """Return the learning rate of `trainer.learning_rate=auto`: by model, method and size.

    `method.rate_factor` and `method.rate_power` account for the method, `starting_rate` for its masks, the fourth root
    of LoRA+'s ratio for the rate of B. Searches (make race) that a rate is judged by have 200 to 600 steps, which
    `trainer.epochs=null` trains at least.

    Args:
        settings: of the run.
        width: of the model (`width`).
        density: the trainable parameters of the adapter, as a share of dense LoRA's.
    """
    method = settings["method"]
    rate = dense_rate(width) * method.get("rate_factor", 1.0) / settings["trainer"].get("loraplus_ratio", 1.0) ** 0.25
    if called(method["name"]).masked:
        masks = {key: settings["mask"][key] for key in OF_MASKS if key in settings["mask"]}
        return starting_rate(rate, density, **masks)
    return rate * density ** -method.get("rate_power", 0.0) if density else rate  # a probe has no adapter


def trainer_of(
    settings: Mapping, trainer: TrainerConfig, *, width: int, density: float, has_head: bool
) -> TrainerConfig:
    """Return the settings of training with the learning rates that `trainer.learning_rate=auto` comes to.

    The head has dense LoRA's rate, which suits it beside any adapter. settings, width, density: as `auto` takes them.
    """
    if trainer.learning_rate != AUTO:
        return trainer
    rate, dense = auto(settings, width=width, density=density), dense_rate(width)
    head_differs = has_head and rate != dense and not called(settings["method"]["name"]).head_alone
    head = trainer.head_learning_rate or (dense if head_differs else None)
    return replace(trainer, learning_rate=rate, head_learning_rate=head)


def training_of(trainer: TrainerConfig, rows: int, density: float) -> dict[str, float | None]:
    """Return what a record says of a training that begins: its length, its learning rates, the adapter's density."""
    steps = trainer.steps(rows)
    length = {"rows": rows, "steps": steps, "passes": steps / trainer.steps_of_epoch(rows), "density": density}
    return length | {name: getattr(trainer, name) for name in ("learning_rate", "head_learning_rate")}


def in_words(settings: Mapping, training: Mapping) -> str:
    """Return how long a run trains and at which learning rate, and why, in one line.

    settings: of the run. training: of its record.
    """
    trainer, rate = settings["trainer"], f"{training['learning_rate']:.3g}"
    length = f"{training['steps']:,} steps of {trainer['batch_size']}, {training['passes']:.3g} passes over "
    length += f"{training['rows']:,} rows"
    if training.get("head_learning_rate") is not None:
        rate += f", head {training['head_learning_rate']:.3g}"
    if trainer["learning_rate"] == AUTO:
        rate += f" (auto, for {settings['method']['name']} with {training['density']:.2g} of dense LoRA's parameters)"
    return f"{length}; learning rate {rate}"
