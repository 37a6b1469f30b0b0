"""Masks of single entries of B (m x rank), with A (rank x n) free: when is a target of low rank represented exactly?

The target T = C V has rank t, C is (m, t) and V (t, n). Row i of B keeps the entries S_i, each on its own at rate p.
"""

from __future__ import annotations

import math

import numpy as np

from partial_lora.errors import PartialLoraError
from partial_lora.theory.arguments import count, failure, share
from partial_lora.theory.subset_sums import group_size, least_group_size

_MOST_RANK = 1_000_000


def block_rank(rows: int, target_rank: int, keep: float, delta: float) -> int:
    """A sufficient rank, by blocks: t ceil(log(m t / delta) / log(1 / (1 - p))).

    The rank is cut into t blocks, each of copies of one row of V; every row of B has to keep an entry in every block.
    """
    return target_rank * group_size(count("rows", rows) * count("target_rank", target_rank), keep, delta)


def short_row(rank: int, target_rank: int, keep: float, *, rows: int | None = None) -> float:
    """P(one row of B keeps fewer than t of its entries).

    Binomial(rank, p); or, with `rows`, hypergeometric: exactly round(p * rows * rank) entries of all B are kept.
    """
    rank, keep = count("rank", rank), share("keep", keep)
    fewer = range(min(count("target_rank", target_rank), rank + 1))
    if rows is None:
        terms = [_log_choose(rank, k) + _times_log(k, keep) + _times_log(rank - k, 1 - keep) for k in fewer]
    else:
        total = rank * count("rows", rows)
        kept = max(1, math.floor(keep * total + 0.5))
        terms = [_log_choose(rank, k) + _log_choose(total - rank, kept - k) - _log_choose(total, kept) for k in fewer]
    return min(1.0, sum(math.exp(term) for term in terms))


def exact_probability(rows: int, rank: int, target_rank: int, keep: float) -> float:
    """P(every row of B keeps at least t entries): (1 - short_row)^m. Then every target of rank t is exact.

    For t = 1 it is P(exact) itself: a row of B that keeps nothing leaves a row of zeros.
    """
    short = short_row(rank, target_rank, keep)
    return math.exp(count("rows", rows) * math.log1p(-short)) if short < 1 else 0.0


def sufficient_rank(rows: int, target_rank: int, keep: float, delta: float, *, counted: bool = False) -> int:
    """The smallest rank at which m * short_row <= delta: every target of rank t is exact with probability >= 1 - delta.

    counted: of the whole of B exactly a share p is kept, as `mask.count: exact` does; the union bound is the same.
    """
    failure("delta", delta)
    rows_of = rows if counted else None
    low, high = target_rank - 1, target_rank
    while rows * short_row(high, target_rank, keep, rows=rows_of) > delta:
        low, high = high, 2 * high
        if high > _MOST_RANK:
            raise PartialLoraError(
                f"sparsity={1 - keep:g}: no rank up to {_MOST_RANK} is enough for targets of any kind"
            )
    while high - low > 1:  # the probability falls with the rank
        middle = (low + high) // 2
        low, high = (
            (low, middle) if rows * short_row(middle, target_rank, keep, rows=rows_of) <= delta else (middle, high)
        )
    return high


def deficit(mask: np.ndarray, target_rank: int) -> int:
    """Entries that rows of B are short of t, summed: sum_i max(0, t - |S_i|), of a mask (m, rank)."""
    return int(np.maximum(0, target_rank - np.asarray(mask, dtype=bool).sum(1)).sum())


def allowance(rank: int, target_rank: int) -> int:
    """rank (t - 1): with a larger deficit almost no target of rank t is represented exactly, whatever A and B are."""
    return count("rank", rank) * (count("target_rank", target_rank) - 1)


def necessary_rank(rows: int, target_rank: int, keep: float, delta: float) -> int:
    """A rank below which almost every target of rank t is exact with probability below 1 - delta, whatever A and B are.

    For t = 1 the smallest at which exact_probability is 1 - delta. Else the smallest at which the expected deficit is
    within the allowance and what chance takes off it: t sqrt(m log(1 / (1 - delta)) / 2), Hoeffding's inequality.
    """
    rows, failed = count("rows", rows), failure("delta", delta)
    if count("target_rank", target_rank) == 1:
        return least_group_size(rows, keep, delta)
    chance = target_rank * math.sqrt(rows * -math.log1p(-failed) / 2)
    rank = target_rank
    while rows * expected_shortage(rank, target_rank, keep) - chance > allowance(rank, target_rank):
        rank += 1
    return rank


def expected_shortage(rank: int, target_rank: int, keep: float) -> float:
    """E max(0, t - |S_i|) = sum over k = 1..t of P(|S_i| < k)."""
    return sum(short_row(rank, k, keep) for k in range(1, target_rank + 1))


def masks(rows: int, rank: int, keep: float, *, rng: np.random.Generator, counted: bool = False) -> np.ndarray:
    """One random mask of the entries of B, True where kept (m, rank)."""
    keys = rng.random((rows, rank))
    if not counted:
        return keys < keep
    kept = max(1, math.floor(keep * keys.size + 0.5))
    return keys <= np.partition(keys, kept - 1, axis=None)[kept - 1]


def full_rows(
    rows: int, rank: int, target_rank: int, keep: float, *, draws: int, rng: np.random.Generator, counted: bool = False
) -> np.ndarray:
    """1 for every draw of a mask in which each row of B keeps at least t entries, else 0 (draws,)."""
    drawn = (masks(rows, rank, keep, rng=rng, counted=counted) for _ in range(draws))
    return np.array([(mask.sum(1) >= target_rank).all() for mask in drawn], dtype=np.float64)


def exact_factors(
    left: np.ndarray, right: np.ndarray, mask: np.ndarray, *, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """B inside `mask` (m, rank) and A (rank, n) with B A as near to T = left (m, t) right (t, n) as A = G right allows.

    G is Gaussian; exact, almost surely, where every row keeps at least t entries: any t rows of G are a basis.
    """
    mixing = rng.standard_normal((mask.shape[1], left.shape[1]))
    factor = np.zeros(mask.shape)
    for row, kept in enumerate(mask):
        if kept.any():
            factor[row, kept] = np.linalg.lstsq(mixing[kept].T, left[row], rcond=None)[0]
    return factor, mixing @ right


def reachable_dimension(mask: np.ndarray, target_rank: int, *, rng: np.random.Generator) -> int:
    """The dimension of {B G : B inside mask (m, rank), G (rank, t)}: the Jacobian's rank at a random point.

    A target C of rank t outside it is not exact; where it is below m t, almost every C is outside.
    """
    mask = np.asarray(mask, dtype=bool)
    (rows, rank), kept = mask.shape, np.argwhere(mask)
    factor, mixing = rng.standard_normal(mask.shape) * mask, rng.standard_normal((rank, target_rank))
    jacobian = np.zeros((len(kept) + rank * target_rank, rows, target_rank))
    for index, (row, column) in enumerate(kept):
        jacobian[index, row] = mixing[column]
    for column in range(rank):
        for direction in range(target_rank):
            jacobian[len(kept) + column * target_rank + direction, :, direction] = factor[:, column]
    return int(np.linalg.matrix_rank(jacobian.reshape(len(jacobian), -1)))


def _log_choose(of: int, chosen: int) -> float:
    if not 0 <= chosen <= of:
        return -math.inf
    return math.lgamma(of + 1) - math.lgamma(chosen + 1) - math.lgamma(of - chosen + 1)


def _times_log(times: int, value: float) -> float:
    return 0.0 if times == 0 else times * math.log(value) if value > 0 else -math.inf
