"""What moving W inside kept rows I and columns J does to the loss, to first order: the gradient's mass there decides.

L is differentiable and beta-smooth in W on the segment that is walked: |grad L(W + D) - grad L(W)| <= beta |D|.
"""

from __future__ import annotations

import numpy as np

from partial_lora.theory.arguments import positive, share
from partial_lora.theory.rows_columns import shares

Selection = tuple[np.ndarray, np.ndarray]


def mass(gradient: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> float:
    """The share of |G|^2 that lies on rows x columns."""
    return float(shares(gradient)[np.ix_(rows, columns)].sum())


def expected_mass(keep_rows: float, keep_columns: float) -> float:
    """E of that share over random rows and columns: p q, for every G fixed before they are drawn."""
    return share("keep_rows", keep_rows) * share("keep_columns", keep_columns)


def top(gradient: np.ndarray, kept_rows: int, kept_columns: int) -> Selection:
    """The rows and, apart from them, the columns of largest norm; may hold less than p q, even nothing."""
    squares = shares(gradient)
    return largest(squares.sum(1), kept_rows), largest(squares.sum(0), kept_columns)


def top_in_turn(gradient: np.ndarray, kept_rows: int, kept_columns: int) -> Selection:
    """The rows of largest norm, then the columns of largest norm within these rows; never holds less than p q."""
    squares = shares(gradient)
    rows = largest(squares.sum(1), kept_rows)
    return rows, largest(squares[rows].sum(0), kept_columns)


def largest(values: np.ndarray, kept: int) -> np.ndarray:
    """The indices of the largest values, ascending; of equal ones the lower index."""
    return np.sort(np.argsort(-values, kind="stable")[:kept])


def guaranteed_decrease(
    gradient: np.ndarray, rows: np.ndarray, columns: np.ndarray, smoothness: float, rank: int | None = None
) -> float:
    """What step() lowers the loss by at least: |G_IJ|^2 / (2 beta), of which a rank r leaves the r largest squares.

    L(W + D) <= L(W) + <G, D> + beta |D|^2 / 2, at D = - [G_IJ]_r / beta.
    """
    values = np.linalg.svd(gradient[np.ix_(rows, columns)], compute_uv=False)[:rank]
    return float((values**2).sum() / (2 * positive("smoothness", smoothness)))


def step(
    gradient: np.ndarray, rows: np.ndarray, columns: np.ndarray, smoothness: float, rank: int | None = None
) -> np.ndarray:
    """The move that the guarantee speaks of: minus the block of the gradient, or its best part of rank r, over beta."""
    left, values, right = np.linalg.svd(gradient[np.ix_(rows, columns)], full_matrices=False)
    move = np.zeros_like(gradient, dtype=np.float64)
    move[np.ix_(rows, columns)] = -(left[:, :rank] * values[:rank]) @ right[:rank] / positive("smoothness", smoothness)
    return move


def start_gradient(rank: int, variance: float, keep_rows: float, keep_columns: float) -> float:
    """E |dL/dB|^2 / |G|^2 of an adapter at its start, B = 0 and A of independent entries: rank variance p q.

    There dL/dB = G A^T and dL/dA = 0, so the first step lowers the loss by what B alone sees. Scaling is left out.
    """
    return rank * positive("variance", variance) * expected_mass(keep_rows, keep_columns)


def start_gradients(
    gradient: np.ndarray, selections: list[Selection], rank: int, variance: float, *, rng: np.random.Generator
) -> np.ndarray:
    """|dL/dB|^2 / |G|^2 for a draw of A in each of the selections (draws,)."""
    found = []
    for rows, columns in selections:
        factor = rng.standard_normal((rank, len(columns))) * variance**0.5
        found.append(((gradient[np.ix_(rows, columns)] @ factor.T) ** 2).sum() / (gradient**2).sum())
    return np.array(found)


def contraction(least_mass: float, convexity: float, smoothness: float, steps: int) -> float:
    """What is left of the excess loss after `steps` restricted steps: (1 - kappa mu / beta)^steps.

    Holds where |grad L|^2 >= 2 mu (L - min L) (Polyak and Lojasiewicz) and the block holds a share of at least kappa of
    the gradient at every iterate. Then another solution as good as the best one lies inside the mask.
    """
    return (1 - least_mass * positive("convexity", convexity) / positive("smoothness", smoothness)) ** steps


def spread_gradient(rows: int, columns: int, *, rng: np.random.Generator) -> np.ndarray:
    """A gradient whose mass is spread out: independent normal entries. There is little to select."""
    return rng.standard_normal((rows, columns))


def concentrated_gradient(rows: int, columns: int, *, rng: np.random.Generator, sigma: float = 1.0) -> np.ndarray:
    """A gradient with a few large rows and columns: scales exp(sigma * normal) of each, times normal entries."""
    scales = [np.exp(sigma * rng.standard_normal(size)) for size in (rows, columns)]
    return scales[0][:, None] * rng.standard_normal((rows, columns)) * scales[1]
