"""How important each row and each column of a pre-trained weight is: larger = keep.

A measure is a pure function of one weight W (m, n) that gives row scores (m,) and column scores (n,). Every measure
takes the full name of the module and a seed, whether it needs them or not, and its own options by name. Measures that
need examples too are functions of the model, its modules and batches, and give the scores of all modules at once.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from partial_lora.calibration.leverage import svd
from partial_lora.calibration.pruning import imp
from partial_lora.calibration.saliency import Batch, Loss, Scores, activation, snip, task_loss
from partial_lora.errors import PartialLoraError
from partial_lora.masks import random_keys

logger = logging.getLogger(__name__)


def magnitude(weight: Tensor, *, module: str = "", seed: int = 0) -> Scores:
    """Squared norms of the rows and of the columns: the control that looks at size alone."""
    squares = weight.detach().double().square()
    return squares.sum(1), squares.sum(0)


def random(weight: Tensor, *, module: str = "", seed: int = 0) -> Scores:
    """An order drawn at random: the control that looks at nothing.

    The rows (columns) that score highest are those that a random mask of the same seed, module and axis keeps.
    """
    rows, columns = weight.shape
    return _drawn(rows, seed, module, "rows"), _drawn(columns, seed, module, "columns")


def _drawn(size: int, seed: int, module: str, axis: str) -> Tensor:
    """size for the smallest key, down to 1 for the largest: keys have more digits than a float64 holds."""
    order = np.argsort(random_keys(size, mask_seed=seed, module=module, axis=axis), kind="stable")
    scores = torch.empty(size, dtype=torch.float64)
    scores[torch.from_numpy(order)] = torch.arange(size, 0, -1, dtype=torch.float64)
    return scores


MEASURES: dict[str, Callable[..., Scores]] = {"svd": svd, "magnitude": magnitude, "random": random}
NEEDS_DATA: dict[str, Callable[..., dict[str, Scores]]] = {"snip": snip, "imp": imp, "activation": activation}
# The keys of the group `importance` that each measure takes.
OPTIONS = {
    "svd": ("k", "energy"),
    "magnitude": (),
    "random": (),
    "snip": (),
    "imp": ("rounds", "fraction", "steps", "learning_rate"),
    "activation": (),
}

Importance = str | Callable[..., Scores] | Mapping[str, Scores]


def scores_of(module: str, weight: Tensor, importance: Importance, *, seed: int, options: Mapping) -> Scores:
    """Row scores (m,) and column scores (n,) of a module's weight (m, n), on the CPU.

    importance: a measure by name or as a function, or the scores themselves, {module: (rows, columns)}. Raises
    PartialLoraError, naming the module, for scores that are missing, of another shape or not finite.
    """
    if isinstance(importance, Mapping):
        if module not in importance:
            raise PartialLoraError(f"importance: expected scores of {module}, found none")
        rows, columns = importance[module]
    else:
        measure = MEASURES[name_of(importance)] if isinstance(importance, str) else importance
        rows, columns = measure(weight.detach(), module=module, seed=seed, **options)
    return _checked(module, weight, rows, columns)


def data_scores(
    name: str,
    model: nn.Module,
    modules: Mapping[str, nn.Linear],
    batches: Sequence[Batch],
    *,
    seed: int,
    options: Mapping | None = None,
    loss: Loss | None = None,
) -> dict[str, Scores]:
    """Row scores (m,) and column scores (n,) of each module's weight (m, n) by a measure that needs data, on the CPU.

    name: a key of NEEDS_DATA. model: with a head for the task; given back bit for bit. modules: those of the model that
    are scored, by full name. batches: the fit draw; each holds the model's inputs by name and "labels" (batch,).
    loss: `loss(model, batch) -> scalar`, the mean over the batch; by default the model's own, else cross entropy.
    Raises PartialLoraError where there is nothing to score by, and, naming the module, for scores that are not finite.
    """
    if name not in NEEDS_DATA:
        raise PartialLoraError(f"importance={name}: expected one of {', '.join(NEEDS_DATA)}, which need data")
    if not batches:
        raise PartialLoraError(f"importance={name}: the fit draw is empty, expected at least 1 example")
    found = NEEDS_DATA[name](model, modules, batches, loss=loss or task_loss, seed=seed, **(options or {}))
    scores = {module: _checked(module, modules[module].weight, *pair) for module, pair in found.items()}
    for module, axes in scores.items():
        if any(len(axis) > 1 and (axis == axis[0]).all() for axis in axes):
            logger.warning(
                "importance=%s: all rows or all columns of %s score alike: it does not rank them", name, module
            )
    return scores


def _checked(module: str, weight: Tensor, rows: object, columns: object) -> Scores:
    rows, columns = torch.as_tensor(rows).detach().cpu(), torch.as_tensor(columns).detach().cpu()
    if (rows.shape, columns.shape) != (weight.shape[:1], weight.shape[1:]):
        raise PartialLoraError(
            f"importance: expected scores of {tuple(weight.shape)} rows and columns of {module}, "
            f"found {tuple(rows.shape)} and {tuple(columns.shape)}"
        )
    if not (torch.isfinite(rows).all() and torch.isfinite(columns).all()):
        raise PartialLoraError(f"importance: the scores of {module} are not finite")
    return rows, columns


def name_of(importance: Importance) -> str:
    """What a record says of an importance. Raises PartialLoraError for a name that no weight-only measure has."""
    if isinstance(importance, Mapping):
        return "given"
    if callable(importance):
        return getattr(importance, "__qualname__", type(importance).__qualname__)
    if importance in NEEDS_DATA:
        raise PartialLoraError(
            f"importance={importance}: needs examples, which are not at hand here; give what data_scores returns"
        )
    if importance not in MEASURES:
        raise PartialLoraError(f"importance={importance}: expected one of {', '.join(MEASURES)}")
    return importance
