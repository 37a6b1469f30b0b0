"""How important each row and each column of a pre-trained weight is: larger = keep.

A measure is a pure function of one weight W (m, n) that gives row scores (m,) and column scores (n,). Every measure
takes the full name of the module and a seed, whether it needs them or not, and its own options by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from partial_lora.errors import PartialLoraError
from partial_lora.masks import random_keys

Scores = tuple[Tensor, Tensor]


def svd(weight: Tensor, *, module: str = "", seed: int = 0, k: int | None = None, energy: float = 0.9) -> Scores:
    """Leverage scores: how much of the leading k-dimensional subspace of W lies in each row and column.

    W ~ P_k L_k Q_k': row i scores |P_k[i, :]|^2, column j scores |Q_k[j, :]|^2, so either sums to k. Without `k`, k is
    the smallest that holds `energy` of the squared spectrum; at full rank every row of a square matrix scores 1.
    Source: the paper's importance; what decides k is DESIGN section 3. Raises PartialLoraError for a k above the rank.
    """
    if weight.shape[0] < weight.shape[1]:
        columns, rows = svd(weight.T, module=module, seed=seed, k=k, energy=energy)
        return rows, columns
    # Q_k and L_k from the n x n matrix W'W, then P_k = W Q_k / L_k: tens of times faster than the SVD of W, and in
    # float64 the squaring costs no digit that W has.
    wide = weight.detach().double()
    squares, right = torch.linalg.eigh(wide.T @ wide)
    squares, right = squares.flip(0).clamp(min=0), right.flip(1)
    k = leading_rank(squares, energy) if k is None else k
    if not 1 <= k <= len(squares) or squares[k - 1] <= 1e-14 * squares[0]:
        raise PartialLoraError(
            f"importance.k={k}: expected 1 to the rank of {module or 'the weight'} {tuple(weight.shape)}"
        )
    leading = right[:, :k]
    left = wide @ leading / squares[:k].sqrt()
    return left.square().sum(1), leading.square().sum(1)


def leading_rank(squares: Tensor, energy: float) -> int:
    """The smallest k whose k largest squared singular values (given from large to small) hold `energy` of them all."""
    held = squares.cumsum(0)
    return min(int((held < energy * held[-1]).sum()) + 1, len(squares))


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


MEASURES = {"svd": svd, "magnitude": magnitude, "random": random}

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
        measure = MEASURES[importance] if isinstance(importance, str) else importance
        rows, columns = measure(weight.detach(), module=module, seed=seed, **options)
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
    """What a record says of an importance. Raises PartialLoraError for a name that is none."""
    if isinstance(importance, Mapping):
        return "given"
    if callable(importance):
        return getattr(importance, "__qualname__", type(importance).__qualname__)
    if importance not in MEASURES:
        raise PartialLoraError(f"importance={importance}: expected one of {', '.join(MEASURES)}")
    return importance
