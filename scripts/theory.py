"""Bounds for sparse adapters, each statement a function beside its simulation; docs/evidence/theory.md has the proofs.

    python scripts/theory.py --rows 768 --columns 768 --rank 16 --target-rank 4 --sparsity 0.5 0.87

W (m x n) is frozen and D = B A is added, B (m x r) and A (r x n). Masks keep a of the m rows of B, I, and b of the n
columns of A, J, at densities p = a / m and q = b / n; or they keep the entries of B at a density p. T is a target
update, t its rank, G a gradient, delta a probability of failure; |.| is the Frobenius norm. theory_propagation.py goes
on from errors of modules to the output of a network.
"""

from __future__ import annotations

import argparse
import math
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from scipy.special import bdtr
from scipy.stats import hypergeom
from tabulate import tabulate

from partial_lora import cli
from partial_lora.errors import PartialLoraError
from partial_lora.masks import kept_count

MOST_RANK = 10**6
Selection = tuple[np.ndarray, np.ndarray]  # rows, columns

# ----------------------------------------------------------------------------------------------- rows and columns
# I and J are drawn independently of each other and of T. An adapter moves W inside I x J and nowhere else.


def least_error(p: float, q: float) -> float:
    """Return E min_D |T - D|^2 / |T|^2 for every fixed T and rank r >= t: 1 - p q."""
    assert 0 < min(p, q) <= max(p, q) <= 1
    return 1 - p * q


def least_output_error(p: float) -> float:
    """Return a lower bound on E min_D |(T - D) x|^2 / |T x|^2 for every fixed T and x: 1 - p, as only I can move."""
    assert 0 < p <= 1
    return 1 - p


def least_precision(p: float, q: float, delta: float) -> float:
    """Return the smallest e for which "error at most e with probability at least 1 - delta" can hold of a fixed T.

    An error is never above 1, so 1 - p q = E <= e (1 - delta) + delta.
    """
    assert 0 < delta < 1
    return max(0.0, (least_error(p, q) - delta) / (1 - delta))


def error_deviation(target: np.ndarray, a: int, b: int) -> float:
    """Return the standard deviation over masks of a rows and b columns of the least error against T (m, n), r >= t."""
    squares = shares(target)
    (m, n), (p, q) = squares.shape, (a / squares.shape[0], b / squares.shape[1])
    p_both, q_both = p * (a - 1) / max(1, m - 1), q * (b - 1) / max(1, n - 1)  # P(two given rows, columns are kept)
    rows, columns, entries = ((mass**2).sum() for mass in (squares.sum(1), squares.sum(0), squares))
    second = p_both * q_both + (p - p_both) * q_both * rows + p_both * (q - q_both) * columns
    second += (p - p_both) * (q - q_both) * entries
    return math.sqrt(max(0.0, second - (p * q) ** 2))


def least_errors(target: np.ndarray, a: int, b: int, *, draws: int, rng: Generator) -> np.ndarray:
    """Simulate the least error: one value for every draw of I and J (draws,), r >= t."""
    squares = shares(target)
    rows, columns = (
        indicators(size, kept, draws=draws, rng=rng) for size, kept in zip(squares.shape, (a, b), strict=True)
    )
    return 1 - ((rows @ squares) * columns).sum(1)


def shares(matrix: np.ndarray) -> np.ndarray:
    """Return each entry's share of the squared norm."""
    squares = np.asarray(matrix, dtype=np.float64) ** 2
    assert 0 < squares.sum() < math.inf
    return squares / squares.sum()


def indicators(size: int, kept: int, *, draws: int, rng: Generator) -> np.ndarray:
    """Draw masks of rows or of columns, 1 where kept (draws, size)."""
    keys = rng.random((draws, size))
    drawn = np.zeros((draws, size))
    np.put_along_axis(drawn, np.argpartition(keys, kept - 1, axis=1)[:, :kept], 1.0, axis=1)
    return drawn


def best_update(target: np.ndarray, rows: np.ndarray, columns: np.ndarray, rank: int | None = None) -> np.ndarray:
    """Return the D inside rows x columns nearest to T, of at most this rank (Eckart and Young, in the block).

    Where the rank is at least t, this is T restricted to the block.
    """
    left, values, right = np.linalg.svd(target[np.ix_(rows, columns)], full_matrices=False)
    update = np.zeros_like(target, dtype=np.float64)
    update[np.ix_(rows, columns)] = (left[:, :rank] * values[:rank]) @ right[:rank]
    return update


def another_solution(
    readout: np.ndarray, inputs: np.ndarray, change: np.ndarray, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """Return a D inside rows x columns with V D X = Y, of no larger rank than Y.

    V, `readout` (c, m), follows the module, X, `inputs` (n, N), enters it, and Y, `change` (c, N), is wanted of N
    examples. Exact, for every Y, if and only if the kept columns of V have rank c and the kept rows of X rank N.
    """
    left, right = readout[:, rows], inputs[columns]
    assert np.linalg.matrix_rank(left) == len(readout), "too few independent rows are kept"
    assert np.linalg.matrix_rank(right) == inputs.shape[1], "too few independent columns are kept"
    update = np.zeros((readout.shape[1], inputs.shape[0]))
    update[np.ix_(rows, columns)] = np.linalg.pinv(left) @ change @ np.linalg.pinv(right)
    return update


# ------------------------------------------------------------------------------- where the factor 1/log(1/s) comes from
# One of several random candidates has to be kept, or has to fit. Lueker 1998; Malach et al. 2020 (arXiv 2002.00585);
# Pensia et al. 2020 (arXiv 2006.07990); Gadhikar, Mukherjee and Burkholz 2023 (arXiv 2210.02412).


def group_probability(groups: int, size: int, p: float) -> float:
    """Return P(every group keeps a member), each member kept independently at rate p: (1 - (1 - p)^size)^groups."""
    assert 0 < p <= 1 <= min(groups, size)
    missed = (1 - p) ** size
    return math.exp(groups * math.log1p(-missed)) if missed < 1 else 0.0


def group_size(groups: int, p: float, delta: float) -> int:
    """Return a size at which all groups keep a member with probability at least 1 - delta, by the union bound.

    ceil(log(groups / delta) / log(1 / (1 - p))), so that groups (1 - p)^size <= delta.
    """
    assert 0 < p <= 1 <= groups
    assert 0 < delta < 1
    return 1 if p == 1 else max(1, math.ceil(math.log(groups / delta) / -math.log1p(-p)))


def least_group_size(groups: int, p: float, delta: float) -> int:
    """Return the smallest such size."""
    return smallest(1, lambda size: group_probability(groups, size, p) >= 1 - delta)


def smallest(start: int, holds: Callable[[int], bool]) -> int:
    """Return the smallest number from `start` for which `holds` is true, as it then is for all larger ones."""
    number = start + bisect_left(range(start, MOST_RANK + 1), True, key=holds)
    if number > MOST_RANK:
        raise PartialLoraError(f"no rank up to {MOST_RANK} is enough")
    return number


def row_mask_probability(m: int, r: int, p: float) -> float:
    """Return log10 P(a random mask of B's entries happens to keep whole rows): m log10(p^r + (1 - p)^r)."""
    return m * math.log10(p**r + (1 - p) ** r)


def fewest_values(precision: float) -> int:
    """Return how many values it takes at least for subset sums within `precision` of every point of [-1/2, 1/2].

    n values have 2^n subset sums, each near an interval of length 2 precision: 2^n 2 precision >= 1.
    """
    assert 0 < precision < 1
    return max(0, math.ceil(math.log2(1 / (2 * precision)) - 1e-12))


def worst_distance(values: np.ndarray) -> float:
    """Return how far the worst served point of [-1/2, 1/2] is from the nearest subset sum of `values` (n,)."""
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums, sums + value])
    sums.sort()
    middles = (sums[1:] + sums[:-1]) / 2  # within a gap its middle is worst; outside all sums, an end
    points = np.concatenate([[-0.5, 0.5], middles[(middles > -0.5) & (middles < 0.5)]])
    after = np.searchsorted(sums, points).clip(0, len(sums) - 1)
    return float(np.minimum(abs(points - sums[after]), abs(points - sums[(after - 1).clip(0)])).max())


def worst_distances(number: int, *, draws: int, rng: Generator) -> np.ndarray:
    """Simulate worst_distance of numbers drawn uniformly from [-1, 1] (draws,)."""
    return np.array([worst_distance(rng.uniform(-1, 1, number)) for _ in range(draws)])


# ------------------------------------------------------------------------------------------------------- single entries
# Row i of B keeps the entries S_i, and A is free but for `most_error`. A target is exact where some A and some B inside
# the mask have B A = T.


def block_rank(m: int, t: int, p: float, delta: float) -> int:
    """Return a rank that suffices, by blocks: t ceil(log(m t / delta) / log(1 / (1 - p))).

    The rank is cut into t blocks, each of copies of one row of V in T = C V; a row of B has to keep an entry in each.
    """
    return t * group_size(m * t, p, delta)


def short_row(r: int, t: int, p: float, *, counted_of: int | None = None) -> float:
    """Return P(|S_i| < t), binomial; hypergeometric where exactly a share p of `counted_of` rows of B is kept."""
    assert 0 < p <= 1 <= t <= r
    if counted_of is None:
        return float(bdtr(t - 1, r, p))
    return float(hypergeom.cdf(t - 1, r * counted_of, kept_count(r * counted_of, 1 - p), r))


def exact_probability(m: int, r: int, t: int, p: float) -> float:
    """Return P(every row of B keeps at least t entries): (1 - short_row)^m. Then every target of rank t is exact.

    For t = 1 it is P(exact) itself: a row of B that keeps nothing leaves a row of zeros.
    """
    short = short_row(r, t, p)
    return math.exp(m * math.log1p(-short)) if short < 1 else 0.0


def sufficient_rank(m: int, t: int, p: float, delta: float, *, counted: bool = False) -> int:
    """Return the smallest rank with m short_row <= delta: every T of rank t is exact with probability >= 1 - delta.

    counted: of the whole of B exactly a share p is kept, as `mask.count: exact` does; the union bound is the same.
    """
    assert 0 < delta < 1
    return smallest(t, lambda rank: m * short_row(rank, t, p, counted_of=m if counted else None) <= delta)


def dimension_bound(mask: np.ndarray, t: int) -> int:
    """Return the most dimensions that the C with C V exact can have in this mask (m, r): r (t - 1) + sum min(|S_i|, t).

    Of m t there are; with fewer almost no target of rank t is exact, whatever A and B are.
    """
    (m, r), entries = mask.shape, np.minimum(mask.sum(1), t).sum()
    return min(m * t, r * (t - 1) + int(entries))


def expected_shortage(r: int, t: int, p: float) -> float:
    """Return E max(0, t - |S_i|) = sum over k = 1..t of P(|S_i| < k)."""
    return sum(short_row(r, k, p) for k in range(1, t + 1))


def necessary_rank(m: int, t: int, p: float, delta: float) -> int:
    """Return a rank below which almost every T of rank t is exact with probability below 1 - delta.

    For t = 1 the smallest at which exact_probability is 1 - delta. Else the smallest at which the expected shortage of
    all rows is within r (t - 1) and what chance takes off it: t sqrt(m log(1 / (1 - delta)) / 2), Hoeffding.
    """
    if t == 1:
        return least_group_size(m, p, delta)
    chance = t * math.sqrt(m * -math.log1p(-delta) / 2)
    return smallest(t, lambda rank: m * expected_shortage(rank, t, p) - chance <= rank * (t - 1))


def entry_mask(m: int, r: int, p: float, *, rng: Generator, counted: bool = False) -> np.ndarray:
    """Draw a mask of the entries of B, True where kept (m, r)."""
    keys = rng.random((m, r))
    if not counted:
        return keys < p
    last = kept_count(m * r, 1 - p) - 1
    return keys <= np.partition(keys, last, axis=None)[last]


def most_error(r: int, t: int, p: float, q: float) -> float:
    """Return an upper bound on E min_D |T - D|^2 / |T|^2 where entries of B are masked, and those of A: rank t <= r."""
    assert 0 < min(p, q) <= max(p, q) <= 1 <= t <= r
    return (1 - p * q) / (1 - p * q + (r // t) * p * q)


def shared_directions(
    target: np.ndarray, left: np.ndarray, right: np.ndarray, t: int, p: float, q: float
) -> np.ndarray:
    """Return the D inside the masks of B, `left` (m, r), and A, `right` (r, n), whose mean error is `most_error`.

    Every singular direction of the target (m, n) of rank t has floor(r / t) units of the rank.
    """
    u, values, v = np.linalg.svd(target, full_matrices=False)
    k = left.shape[1] // t
    units = [slice(g * k, (g + 1) * k) for g in range(t)]
    kept = [left[:, own].astype(float) @ right[own] for own in units]
    return sum(values[g] * np.outer(u[:, g], v[g]) * kept[g] for g in range(t)) / (1 - p * q + k * p * q)


# ------------------------------------------------------------------------------- what moving inside the mask does to L
# L is differentiable in W with gradient G and beta-smooth: |grad L(W + D) - grad L(W)| <= beta |D| along the step.


def mass(gradient: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> float:
    """Return the share of |G|^2 on rows x columns; its mean over random I and J is p q, for every fixed G."""
    return float(shares(gradient)[np.ix_(rows, columns)].sum())


def top(gradient: np.ndarray, a: int, b: int) -> Selection:
    """Return the rows and, apart from them, the columns of largest norm; may hold less than p q, even nothing."""
    squares = shares(gradient)
    return largest(squares.sum(1), a), largest(squares.sum(0), b)


def top_in_turn(gradient: np.ndarray, a: int, b: int) -> Selection:
    """Return the rows of largest norm, then the columns of largest norm within these; holds at least p q."""
    squares = shares(gradient)
    rows = largest(squares.sum(1), a)
    return rows, largest(squares[rows].sum(0), b)


def largest(values: np.ndarray, kept: int) -> np.ndarray:
    """Return the indices of the largest values, ascending; of equal ones the lower index."""
    return np.sort(np.argsort(-values, kind="stable")[:kept])


def step(
    gradient: np.ndarray, rows: np.ndarray, columns: np.ndarray, beta: float, rank: int | None = None
) -> np.ndarray:
    """Return D = - [G_IJ]_r / beta, the block of the gradient or its best part of rank r."""
    return -best_update(gradient, rows, columns, rank) / beta


def guaranteed_decrease(
    gradient: np.ndarray, rows: np.ndarray, columns: np.ndarray, beta: float, rank: int | None = None
) -> float:
    """Return what this step lowers L by at least: |[G_IJ]_r|^2 / (2 beta).

    L(W + D) <= L(W) + <G, D> + beta |D|^2 / 2.
    """
    assert beta > 0
    return float((best_update(gradient, rows, columns, rank) ** 2).sum() / (2 * beta))


def contraction(least_mass: float, mu: float, beta: float, steps: int) -> float:
    """Return what is left of L - inf L after `steps` steps inside the mask: (1 - kappa mu / beta)^steps.

    Holds where |grad L|^2 >= 2 mu (L - inf L) (Polyak and Lojasiewicz) and the block has a share of at least kappa of
    the gradient at every iterate. Then another solution as good as the best one lies inside the mask.
    """
    return (1 - least_mass * mu / beta) ** steps


def start_gradient(r: int, variance: float, p: float, q: float) -> float:
    """Return E |dL/dB|^2 / |G|^2 at an adapter's start, B = 0 and A of independent entries: r variance p q.

    There dL/dB = G A^T and dL/dA = 0, so the first step lowers the loss by what B alone sees. Scaling is left out.
    """
    return r * variance * p * q


def start_gradients(
    gradient: np.ndarray, selections: Iterable[Selection], r: int, variance: float, *, rng: Generator
) -> np.ndarray:
    """Simulate |dL/dB|^2 / |G|^2: a draw of A in each of the selections (draws,)."""
    values = []
    for rows, columns in selections:
        factor = rng.standard_normal((r, len(columns))) * variance**0.5
        values.append(((gradient[np.ix_(rows, columns)] @ factor.T) ** 2).sum() / (gradient**2).sum())
    return np.array(values)


def concentrated_gradient(m: int, n: int, *, rng: Generator) -> np.ndarray:
    """Draw a gradient with a few large rows and columns: log-normal scales of each, times normal entries."""
    scales = [np.exp(rng.standard_normal(size)) for size in (m, n)]
    return scales[0][:, None] * rng.standard_normal((m, n)) * scales[1]


# ------------------------------------------------------------------------------------------ bounds beside simulations

PRECISION = 0.01  # of subset sums
FEW = 20  # draws of what is costly and varies little
CELLS = 2 * 10**8  # random numbers that a simulation may take, unless that leaves fewer than FEW draws
MOST_CELLS = 5 * 10**7  # of one draw; what takes more is not simulated


@dataclass(frozen=True)
class Setting:
    """A module of m x n, the ranks of adapter and target, and the sparsity of rows, of columns and of B's entries."""

    rows: int
    columns: int
    rank: int
    target_rank: int
    sparsity: float
    delta: float
    draws: int
    seed: int

    @property
    def kept(self) -> tuple[int, int]:
        """Rows and columns that masks keep, a and b."""
        return kept_count(self.rows, self.sparsity), kept_count(self.columns, self.sparsity)

    @property
    def densities(self) -> tuple[float, float]:
        """p and q as measured."""
        return self.kept[0] / self.rows, self.kept[1] / self.columns

    def target(self, rng: Generator) -> np.ndarray:
        left = rng.standard_normal((self.rows, self.target_rank))
        return left @ rng.standard_normal((self.target_rank, self.columns))


def estimate(values: Iterable[float]) -> tuple[float, float]:
    """Return the mean of independent draws and its standard error."""
    values = np.array(list(values), dtype=np.float64)
    assert len(values) >= 2, "a standard error takes two draws"
    error = float(values.std(ddof=1) / len(values) ** 0.5)
    if set(np.unique(values)) <= {0, 1}:  # a share of draws is not known better than to one draw, even if all agree
        error = max(error, 1 / len(values))
    return float(values.mean()), error


def line(what: str, bound: float, holds: str = "", simulated: float | None = None, error: float | None = None) -> dict:
    """Return a proved number, its simulation, and how they have to stand: simulated equal, at least, at most bound."""
    return {"what": what, "bound": bound, "holds": holds, "simulated": simulated, "standard_error": error}


def lines(setting: Setting) -> list[dict]:
    """Return all numbers of one setting; the same seed gives the same numbers."""
    return [
        *of_rows_and_columns(setting, np.random.default_rng([setting.seed, 1])),
        *of_entries(setting, np.random.default_rng([setting.seed, 2])),
        *of_gradients(setting, np.random.default_rng([setting.seed, 3])),
        of_subset_sums(np.random.default_rng([setting.seed, 4])),
    ]


def of_rows_and_columns(setting: Setting, rng: Generator) -> list[dict]:
    (p, q), (a, b) = setting.densities, setting.kept
    target = setting.target(rng)
    errors = least_errors(target, a, b, draws=setting.draws, rng=rng)
    variance, variance_error = estimate((errors - least_error(p, q)) ** 2)
    deviation = variance**0.5
    deviation_error = variance_error / (2 * deviation) if deviation else 0.0
    outputs = shares(target @ rng.standard_normal((setting.columns, 1)))  # one input: columns do not limit
    of_outputs = 1 - (indicators(setting.rows, a, draws=setting.draws, rng=rng) @ outputs)[:, 0]
    what = "rows, columns: least squared error against a fixed dense target, 1 - p q"
    return [
        line(what, least_error(p, q), "equal", *estimate(errors)),
        line("its standard deviation over masks", error_deviation(target, a, b), "equal", deviation, deviation_error),
        line("the same for outputs, whatever enters, 1 - p", least_output_error(p), "at least", *estimate(of_outputs)),
        line(
            "log10 P(a random mask of B's entries keeps whole rows)",
            row_mask_probability(setting.rows, setting.rank, 1 - setting.sparsity),
        ),
    ]


def of_entries(setting: Setting, rng: Generator) -> list[dict]:
    m, t, p, confidence = setting.rows, setting.target_rank, 1 - setting.sparsity, 1 - setting.delta
    blocks, enough, needed = (rank(m, t, p, setting.delta) for rank in (block_rank, sufficient_rank, necessary_rank))

    def simulated(holds: str, shape: tuple[int, int], condition: Callable[[np.ndarray], bool]) -> tuple:
        """The share of masks with a condition, of fewer masks where they are large."""
        cells = math.prod(shape)
        if cells > MOST_CELLS:
            return ()
        draws = min(setting.draws, max(FEW, CELLS // cells))
        return (holds, *estimate(condition(entry_mask(*shape, p, rng=rng)) for _ in range(draws)))

    def full(mask: np.ndarray) -> bool:
        return (mask.sum(1) >= t).all()

    exact = exact_probability(m, setting.rank, t, p)
    numbers = [
        line(
            f"entries of B: P(every row keeps {t}) at rank {setting.rank}; then exact",
            exact,
            *simulated("equal", (m, setting.rank), full),
        ),
        line(f"rank that suffices, by blocks ({blocks / t:.3g} x target rank)", blocks),
        line(
            "of masks at that rank, those with an entry in every block",
            confidence,
            *simulated("at least", (m * t, blocks // t), lambda mask: mask.any(1).all()),
        ),
        line(f"rank that suffices, by counting ({enough / t:.3g} x target rank)", enough),
        line(
            f"of masks at that rank, those with {t} entries in every row",
            confidence,
            *simulated("at least", (m, enough), full),
        ),
        line(f"rank that is necessary for almost every target ({needed / t:.3g} x target rank)", needed),
        line(
            f"entries of B and of A: least squared error at rank {setting.rank}, at most",
            most_error(setting.rank, t, p, p),
        ),
    ]
    if needed > t and (within := simulated("at most", (m, needed - 1), lambda mask: dimension_bound(mask, t) == m * t)):
        what = "of masks one rank lower, those that do not rule almost all targets out"
        numbers.append(line(what, confidence, *within))
    return numbers


def of_gradients(setting: Setting, rng: Generator) -> list[dict]:
    (p, q), (a, b), (m, n) = setting.densities, setting.kept, (setting.rows, setting.columns)
    gradient = concentrated_gradient(m, n, rng=rng)
    random = 1 - least_errors(gradient, a, b, draws=setting.draws, rng=rng)
    selections = [(rng.permutation(m)[:a], rng.permutation(n)[:b]) for _ in range(setting.draws)]
    variance = 1 / (3 * n)  # of PEFT's A: uniform up to 1 / sqrt(n)
    start = start_gradients(gradient, selections, setting.rank, variance, rng=rng)
    apart, in_turn, spread = [], [], []
    for _ in range(min(FEW, setting.draws)):
        gradient = concentrated_gradient(m, n, rng=rng)
        apart.append(mass(gradient, *top(gradient, a, b)))
        in_turn.append(mass(gradient, *top_in_turn(gradient, a, b)))
        gradient = rng.standard_normal((m, n))
        spread.append(mass(gradient, *top_in_turn(gradient, a, b)))
    expected_start = start_gradient(setting.rank, variance, p, q)
    return [
        line("gradient's mass on random rows and columns, p q", p * q, "equal", *estimate(random)),
        line("on the top rows, then columns within; concentrated gradients", p * q, "at least", *estimate(in_turn)),
        line("the same; gradients of independent entries", p * q, "at least", *estimate(spread)),
        line("on the top rows and, apart, columns; concentrated gradients", 0.0, "at least", *estimate(apart)),
        line(
            "|dL/dB|^2 / |G|^2 at B = 0 and PEFT's A, rank p q / (3 columns)", expected_start, "equal", *estimate(start)
        ),
    ]


def of_subset_sums(rng: Generator) -> dict:
    fewest = number = fewest_values(PRECISION)
    while (worst_distances(number, draws=100, rng=rng) <= PRECISION).mean() < 0.95:
        number += 1
    what = f"values whose subset sums reach [-1/2, 1/2] within {PRECISION:g} (simulated: in 95 of 100 draws)"
    return line(what, fewest, "at least", number)


def table(setting: Setting, numbers: Sequence[dict]) -> str:
    """Return bounds and simulated values side by side, as Markdown."""
    rows = []
    for one in numbers:
        simulated = "" if one["simulated"] is None else f"{one['simulated']:.4g}"
        simulated += "" if one["standard_error"] is None else f" ± {one['standard_error']:.1g}"
        rows.append([one["what"], f"{one['bound']:.4g}", one["holds"], simulated])
    least = least_precision(*setting.densities, setting.delta)
    return (
        f"{setting.rows} x {setting.columns}, rank {setting.rank}, target rank {setting.target_rank}, sparsity "
        f"{setting.sparsity:g}, delta {setting.delta:g}, {setting.draws} draws\n\n"
        f"{tabulate(rows, ('what', 'bound', 'holds', 'simulated'), 'github', disable_numparse=True)}\n\n"
        f"Rows and columns: for no fixed target is the squared error below {least:.4f} of its norm with probability "
        f"{1 - setting.delta:g}; a claim for these masks has to be about other solutions.\n"
    )


# ----------------------------------------------------------------------------------------------------------- command


@cli.script
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=768, metavar="M", help="outputs of the module (768)")
    parser.add_argument("--columns", type=int, default=768, metavar="N", help="inputs of the module (768)")
    parser.add_argument("--rank", type=int, default=16, metavar="R", help="of the adapter (16)")
    parser.add_argument("--target-rank", type=int, default=4, metavar="T", help="of the dense target update (4)")
    removed = "share removed of rows, of columns, and of B's entries; one table each (0.5 0.87)"
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.87], metavar="S", help=removed)
    parser.add_argument("--draws", type=int, default=500, metavar="K", help="of every simulation (500)")
    own = vars(parser.parse_args(arguments))
    for sparsity in own.pop("sparsity"):
        setting = Setting(sparsity=sparsity, delta=0.05, seed=0, **own)
        print(table(setting, lines(setting)))


if __name__ == "__main__":
    sys.exit(main())
