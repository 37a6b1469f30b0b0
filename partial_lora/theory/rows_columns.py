"""Masks of rows and columns: why they cannot approximate a given dense update, and what they can do instead.

m rows of which I are kept (a of them, p = a / m), n columns of which J are kept (b of them, q = b / n), drawn
independently of each other and of the target T. An adapter moves W inside I x J and nowhere else.
"""

from __future__ import annotations

import math

import numpy as np

from partial_lora.errors import PartialLoraError
from partial_lora.theory.arguments import count, share


def least_error(keep_rows: float, keep_columns: float) -> float:
    """E of the least |T - D|^2 / |T|^2 over all D of an adapter with rank >= rank T: 1 - p q, for every fixed T."""
    return 1 - share("keep_rows", keep_rows) * share("keep_columns", keep_columns)


def least_output_error(keep_rows: float) -> float:
    """A lower bound on E |(T - D) x|^2 / |T x|^2 for every fixed T and input x: 1 - p, as kept rows alone can move."""
    return 1 - share("keep_rows", keep_rows)


def least_precision(keep_rows: float, keep_columns: float, delta: float) -> float:
    """The smallest e for which "error at most e with probability at least 1 - delta" can hold for any fixed T.

    An error is never above 1, so 1 - p q = E <= e (1 - delta) + delta.
    """
    return max(0.0, (least_error(keep_rows, keep_columns) - delta) / (1 - delta))


def error_deviation(target: np.ndarray, kept_rows: int, kept_columns: int, *, counted: bool = True) -> float:
    """The standard deviation over masks of the least error against `target` (m, n), whose rank the adapter has.

    counted: exactly that many are kept; else each on its own at the same rate.
    """
    share_of = shares(target)
    pairs = [
        _pair(count("kept", kept, size), size, counted)
        for kept, size in zip((kept_rows, kept_columns), share_of.shape, strict=True)
    ]
    (p, p_both), (q, q_both) = pairs
    rows, columns, entries = ((mass**2).sum() for mass in (share_of.sum(1), share_of.sum(0), share_of))
    second = p_both * q_both + (p - p_both) * q_both * rows + p_both * (q - q_both) * columns
    second += (p - p_both) * (q - q_both) * entries
    return math.sqrt(max(0.0, second - (p * q) ** 2))


def _pair(kept: int, size: int, counted: bool) -> tuple[float, float]:
    """P(one is kept), P(two different ones are kept)."""
    keep = kept / size
    return keep, keep * (kept - 1) / max(1, size - 1) if counted else keep**2


def shares(matrix: np.ndarray) -> np.ndarray:
    """Each entry's share of the squared Frobenius norm."""
    squares = np.asarray(matrix, dtype=np.float64) ** 2
    if squares.ndim != 2 or not 0 < squares.sum() < math.inf:
        raise PartialLoraError("target: expected a finite matrix that is not zero")
    return squares / squares.sum()


def best_update(target: np.ndarray, rows: np.ndarray, columns: np.ndarray, rank: int) -> np.ndarray:
    """The nearest matrix to `target` of this rank that is zero outside rows x columns (Eckart and Young, in the block).

    Where the rank is at least the target's, this is the target restricted to the block.
    """
    left, values, right = np.linalg.svd(target[np.ix_(rows, columns)], full_matrices=False)
    update = np.zeros_like(target, dtype=np.float64)
    update[np.ix_(rows, columns)] = (left[:, :rank] * values[:rank]) @ right[:rank]
    return update


def relative_error(target: np.ndarray, update: np.ndarray) -> float:
    """|T - D|^2 / |T|^2, Frobenius."""
    return float(((target - update) ** 2).sum() / (target**2).sum())


def kept_indicators(size: int, kept: int, *, draws: int, rng: np.random.Generator, counted: bool = True) -> np.ndarray:
    """Random masks, 1 where kept (draws, size)."""
    keys = rng.random((draws, size))
    if not counted:
        return (keys < kept / size).astype(np.float64)
    indicators = np.zeros((draws, size))
    np.put_along_axis(indicators, np.argpartition(keys, kept - 1, axis=1)[:, :kept], 1.0, axis=1)
    return indicators


def least_errors(
    target: np.ndarray, kept_rows: int, kept_columns: int, *, draws: int, rng: np.random.Generator, counted: bool = True
) -> np.ndarray:
    """The error of the best update inside the mask, for every draw of masks (draws,); the adapter has T's rank."""
    share_of = shares(target)
    rows, columns = (
        kept_indicators(size, kept, draws=draws, rng=rng, counted=counted)
        for size, kept in zip(share_of.shape, (kept_rows, kept_columns), strict=True)
    )
    return 1 - ((rows @ share_of) * columns).sum(1)


def row_mask_probability(rows: int, rank: int, keep: float) -> float:
    """P(a random mask of the entries of B happens to keep whole rows), as log10: rows * log10(p^rank + (1-p)^rank)."""
    keep, rank = share("keep", keep), count("rank", rank)
    return count("rows", rows) * math.log10(keep**rank + (1 - keep) ** rank)


def another_solution(
    readout: np.ndarray, inputs: np.ndarray, change: np.ndarray, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """An update D inside rows x columns with readout D inputs = change, of no larger rank than `change`.

    readout (c, m) is what follows the module, inputs (n, N) what enters it, change (c, N) what is wanted of N examples.
    Exact where the kept columns of `readout` have rank c and the kept rows of `inputs` have rank N, which takes c kept
    rows and N kept columns. Raises PartialLoraError where they have not.
    """
    left, right = readout[:, rows], inputs[columns]
    if np.linalg.matrix_rank(left) < len(readout) or np.linalg.matrix_rank(right) < inputs.shape[1]:
        raise PartialLoraError(
            f"no exact solution in this mask: expected {len(readout)} kept rows and {inputs.shape[1]} kept columns, "
            f"independent ones, got {len(rows)} and {len(columns)}"
        )
    update = np.zeros((readout.shape[1], inputs.shape[0]))
    update[np.ix_(rows, columns)] = np.linalg.pinv(left) @ change @ np.linalg.pinv(right)
    return update
