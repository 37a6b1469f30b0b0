"""Leverage scores: how much of the leading singular subspace of a weight lies in each of its rows and columns.

Two ways to the same scores. The exact one decomposes W'W in float64. Randomized subspace iteration only ever holds the
subspace it looks for; it pays where that is narrow, and gives way to the exact one where it is not, or where it cannot
tell that its scores are within 1e-3.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from partial_lora.errors import PartialLoraError
from partial_lora.masks import random_keys

# Up to here the exact way takes 2 seconds on 2 cores, and the other saves little.
EXACT_SIZE = 2048
# For 14336 x 4096, on 2 cores: exact 15 to 19 s; 5 to 9 iterations on n / 8 = 512 dimensions 6 s, on twice as many as
# long as exact.
WIDEST = 1 / 8
FIRST_WIDTH = 128
ITERATIONS = 12
# What is still to come in the scores when the iteration stops, by its own estimate. That is up to 4 times too low, as
# the fast part of the change dies first; 1e-3 is promised.
TOLERANCE = 3e-5

Scores = tuple[Tensor, Tensor]


def svd(weight: Tensor, *, module: str = "", seed: int = 0, k: int | None = None, energy: float = 0.9) -> Scores:
    """Leverage scores: squared norms of the rows of the k leading left and right singular vectors.

    W ~ P_k L_k Q_k': row i scores |P_k[i, :]|^2, column j scores |Q_k[j, :]|^2, so either sums to k. Without `k`, k is
    the smallest that holds `energy` of the squared spectrum; at full rank every row of a square matrix scores 1.
    The scores of a weight with more than EXACT_SIZE rows and columns may differ from the exact ones by 1e-3 (a score
    is at most 1); `seed` and `module` decide the random start and nothing else.
    Source: the paper's importance; what decides k is DESIGN section 3. Raises PartialLoraError for a k above the rank,
    and for a weight that is zero or not finite.
    """
    if weight.shape[0] < weight.shape[1]:
        columns, rows = svd(weight.T, module=module, seed=seed, k=k, energy=energy)
        return rows, columns
    weight = weight.detach()
    largest = float(weight.abs().max())
    if not 0 < largest < math.inf:
        raise PartialLoraError(f"importance=svd: {module or 'the weight'} is zero or not finite, so it has no spectrum")
    if k is not None and not 1 <= k <= weight.shape[1]:
        raise above_rank(k, module, weight)
    scores = None
    if weight.shape[1] > EXACT_SIZE:
        start = int(random_keys(1, mask_seed=seed, module=module, axis="svd")[0])
        scores = randomized(weight, torch.Generator().manual_seed(start), k=k, energy=energy)
    scores = exact(weight, k=k, energy=energy) if scores is None else scores
    if scores is None:
        raise above_rank(k, module, weight)
    return scores


def exact(weight: Tensor, *, k: int | None = None, energy: float = 0.9) -> Scores | None:
    """Leverage scores of W (m, n), m >= n, from the eigenvectors of W'W; None for a k above the rank.

    Q_k and L_k from the n x n matrix, then P_k = W Q_k / L_k: tens of times faster than the SVD of W, and in float64
    the squaring costs no digit that W has.
    """
    squares, right = torch.linalg.eigh(_lower_gram(weight))
    squares, right = squares.flip(0).clamp(min=0), right.flip(1)
    k = leading_rank(squares, energy) if k is None else k
    if squares[k - 1] <= 1e-14 * squares[0]:
        return None
    leading = right[:, :k] / squares[:k].sqrt()
    rows = [(part.double() @ leading).square().sum(1) for part in weight.split(4096)]
    return torch.cat(rows), right[:, :k].square().sum(1)


def _lower_gram(weight: Tensor, width: int = 512) -> Tensor:
    """The lower triangle of W'W in float64, all that eigh reads; few rows of W at a time are held in float64."""
    size = weight.shape[1]
    gram = torch.zeros(size, size, dtype=torch.float64, device=weight.device)
    for part in weight.split(4096):
        rows = part.double()
        for first in range(0, size, width):
            gram[first:, first : first + width] += rows[:, first:].T @ rows[:, first : first + width]
    return gram


def leading_rank(squares: Tensor, energy: float) -> int:
    """The smallest k whose k largest squared singular values (given from large to small) hold `energy` of them all."""
    held = squares.cumsum(0)
    return min(int((held < energy * held[-1]).sum()) + 1, len(squares))


def randomized(weight: Tensor, generator: torch.Generator, *, k: int | None, energy: float) -> Scores | None:
    """Leverage scores of W (m, n), m >= n, within 1e-3 of the exact ones, or None where the exact way is the better.

    Subspace iteration from a random start until the scores settle: how much is still to come is extrapolated from their
    last two changes, which shrink geometrically. The subspace has twice k dimensions or more, and as many as allowed
    where the scores settle too slowly. Without `k` it grows until half of it holds `energy` of the squared norm of W:
    what a subspace holds is never more than what as many singular vectors hold, so that much is proven. None where even
    WIDEST * n dimensions are too few or settle too slowly, and where rounding in float32 could decide k, or which of
    two directions is the k-th.
    Source: Halko, Martinsson and Tropp 2011 (arXiv 0909.4061), algorithms 4.4 and 5.1.
    """
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    weight = (weight / weight.abs().max()).float()
    widest = int(WIDEST * weight.shape[1])
    wanted = energy * float(torch.linalg.vector_norm(weight, dtype=torch.float64) ** 2)
    width = FIRST_WIDTH if k is None else max(FIRST_WIDTH, oversampled(k))
    if width > widest:
        return None
    basis = torch.empty(weight.shape[1], 0, device=weight.device)
    while True:
        added = torch.randn(len(basis), width - basis.shape[1], generator=generator).to(weight.device)
        basis, settling, wider = torch.cat([basis, added], 1), Settling(), widest
        for step, (left, spectrum, right) in enumerate(_iterate(weight, basis)):
            held = spectrum.square().cumsum(0)
            rank = int((held < wanted).sum()) + 1 if k is None else k
            if oversampled(rank) > width:
                if step < 2:
                    continue
                if held[-1] + (widest // 2 - width) * spectrum[-1] ** 2 < wanted:
                    return None  # not even the widest could hold it: no later direction holds more than the last one
                wider = 2 * width
                break
            scores = left[:, :rank].square().sum(1), right[:, :rank].square().sum(1)
            settling.see(rank, scores)
            if settling.hopeless(ITERATIONS - step):
                break
            if settling.done():
                near = k is None and (held[max(rank - 2, 0) : rank] - wanted).abs().min() < 1e-6 * wanted
                if near or spectrum[rank - 1] - spectrum[rank] < 1e-5 * spectrum[0]:
                    return None
                return scores[0].double(), scores[1].double()
        if width == widest:
            return None
        basis, width = right, min(wider, widest)


def oversampled(k: int) -> int:
    """Dimensions of the subspace in which k are looked for: they settle as (s_2k / s_k)^2 to the number of steps."""
    return 2 * k + 16


def _iterate(weight: Tensor, basis: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Left vectors (m, l), singular values (l,) and right vectors (n, l) of W seen in ever better subspaces.

    Orthogonal again after either product, or float32 would keep the strongest direction alone.
    """
    for _ in range(ITERATIONS):
        left, _ = torch.linalg.qr(weight @ basis)
        basis, small = torch.linalg.qr(weight.T @ left)  # W ~ left left' W = left small' basis'
        inner_right, spectrum, inner_left = torch.linalg.svd(small.double())
        yield left @ inner_left.T.float(), spectrum, basis @ inner_right.float()


class Settling:
    """How far a sequence of scores still has to go, if its changes shrink as the last two did."""

    def __init__(self) -> None:
        self._last: tuple[int, Scores] | None = None
        self._changes: list[float] = []

    def see(self, rank: int, scores: Scores) -> None:
        if self._last is not None and self._last[0] == rank:
            pairs = zip(scores, self._last[1], strict=True)
            self._changes.append(max(float((one - other).abs().max()) for one, other in pairs))
        else:
            self._changes = []
        self._last = rank, scores

    def left(self, steps: int = 0) -> float:
        """An estimate of what would still change after so many further steps; infinite where nothing tells."""
        if len(self._changes) < 2:
            return math.inf
        before, change = self._changes[-2:]
        if change <= 1e-7:
            return 0.0
        rate = change / before
        return change * rate ** (steps + 1) / (1 - rate) if rate < 1 else math.inf

    def done(self) -> bool:
        return self.left() <= TOLERANCE

    def hopeless(self, steps: int) -> bool:
        """Whether so many further steps will not do: said only once the rate can be trusted."""
        return len(self._changes) > 3 and self.left(steps) > 10 * TOLERANCE


def above_rank(k: int | None, module: str, weight: Tensor) -> PartialLoraError:
    return PartialLoraError(
        f"importance.k={k}: expected 1 to the rank of {module or 'the weight'} {tuple(weight.shape)}"
    )
