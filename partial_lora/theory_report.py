"""The statements of partial_lora.theory for a module of one size, each number beside its simulation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from partial_lora.masks import kept_count
from partial_lora.theory import Simulated, elements, first_order, rows_columns, subset_sums

EQUAL, AT_LEAST, AT_MOST, NOT_SIMULATED = "equal", "at least", "at most", ""
_PRECISION = 0.01  # of subset sums
_FEW = 20  # draws of what is costly and varies little
_CELLS = 2 * 10**8  # random numbers that a simulation may take, unless that leaves fewer than _FEW draws
_MOST_CELLS = 5 * 10**7  # of one draw; what takes more is not simulated


@dataclass(frozen=True)
class Setting:
    """A module of rows x columns, an adapter's rank, a target's, and the sparsity of rows, columns and B's entries."""

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
        """Rows and columns that stay, by the rule of masks."""
        return kept_count(self.rows, self.sparsity), kept_count(self.columns, self.sparsity)

    @property
    def densities(self) -> tuple[float, float]:
        """p and q as measured."""
        return self.kept[0] / self.rows, self.kept[1] / self.columns

    @property
    def keep(self) -> float:
        """The rate at which single entries of B stay."""
        return 1 - self.sparsity


@dataclass(frozen=True)
class Line:
    """A number that is proved, what is simulated of it, and how the two have to stand: simulated `holds` bound."""

    what: str
    bound: float
    holds: str = NOT_SIMULATED
    simulated: float | None = None
    standard_error: float | None = None


@dataclass(frozen=True)
class Report:
    setting: Setting
    lines: list[Line]
    said: list[str]


def report(setting: Setting) -> Report:
    """All lines of one setting and what they mean in words; the same seed gives the same numbers."""
    lines = [*_rows_and_columns(setting), *_elements(setting), *_first_order(setting), _subset_sums(setting)]
    return Report(setting, lines, [_of_rows_and_columns(setting), _of_elements(setting)])


def _rows_and_columns(setting: Setting) -> list[Line]:
    rng = np.random.default_rng([setting.seed, 1])
    (p, q), (a, b) = setting.densities, setting.kept
    target = _target(setting, rng)
    errors = rows_columns.least_errors(target, a, b, draws=setting.draws, rng=rng)
    squares = Simulated.of((errors - rows_columns.least_error(p, q)) ** 2)
    deviation = squares.mean**0.5
    outputs = rows_columns.shares(target @ rng.standard_normal((setting.columns, 1)))  # one input: columns do not limit
    rows = rows_columns.kept_indicators(setting.rows, a, draws=setting.draws, rng=rng)
    return [
        _line("rows, columns: least squared error against a fixed dense target, 1 - p q", 1 - p * q, EQUAL, errors),
        Line(
            "its standard deviation over masks",
            rows_columns.error_deviation(target, a, b),
            EQUAL,
            deviation,
            squares.standard_error / (2 * deviation) if deviation else 0.0,
        ),
        _line("the same for outputs, whatever enters, 1 - p", 1 - p, AT_LEAST, 1 - (rows @ outputs)[:, 0]),
        Line(
            "log10 P(a random mask of B's entries keeps whole rows)",
            rows_columns.row_mask_probability(setting.rows, setting.rank, setting.keep),
        ),
    ]


def _elements(setting: Setting) -> list[Line]:
    rng = np.random.default_rng([setting.seed, 2])
    t, keep, delta = setting.target_rank, setting.keep, setting.delta
    blocks, enough, needed = ranks(setting)
    exact = elements.exact_probability(setting.rows, setting.rank, t, keep)

    def full(rank: int) -> np.ndarray | None:
        draws = _draws(setting, setting.rows * rank)
        return elements.full_rows(setting.rows, rank, t, keep, draws=draws, rng=rng) if draws else None

    at_rank, draws = full(setting.rank), _draws(setting, setting.rows * blocks)
    at_blocks = subset_sums.kept_groups(setting.rows * t, blocks // t, keep, draws=draws, rng=rng) if draws else None
    at_enough = full(enough)
    lines = [
        _line(f"entries of B: P(every row keeps {t}) at rank {setting.rank}; then exact", exact, EQUAL, at_rank),
        Line(f"rank that suffices, by blocks ({blocks / t:.3g} x target rank)", blocks),
        _line("of masks at that rank, those with an entry in every block", 1 - delta, AT_LEAST, at_blocks),
        Line(f"rank that suffices, by counting ({enough / t:.3g} x target rank)", enough),
        _line(f"of masks at that rank, those with {t} entries in every row", 1 - delta, AT_LEAST, at_enough),
        Line(f"rank that is necessary for almost every target ({needed / t:.3g} x target rank)", needed),
    ]
    draws = _draws(setting, setting.rows * needed)
    if needed > t and draws:
        drawn = (elements.masks(setting.rows, needed - 1, keep, rng=rng) for _ in range(draws))
        within = [elements.deficit(mask, t) <= elements.allowance(needed - 1, t) for mask in drawn]
        what = "of masks one rank lower, those that do not rule almost all targets out"
        lines.append(_line(what, 1 - delta, AT_MOST, np.array(within, dtype=np.float64)))
    return lines


def ranks(setting: Setting) -> tuple[int, int, int]:
    """Ranks that suffice by blocks and by counting, and the one that is necessary."""
    asked = (setting.rows, setting.target_rank, setting.keep, setting.delta)
    return elements.block_rank(*asked), elements.sufficient_rank(*asked), elements.necessary_rank(*asked)


def _first_order(setting: Setting) -> list[Line]:
    rng = np.random.default_rng([setting.seed, 3])
    (p, q), (a, b) = setting.densities, setting.kept
    shape = (setting.rows, setting.columns)
    gradient = first_order.concentrated_gradient(*shape, rng=rng)
    random = 1 - rows_columns.least_errors(gradient, a, b, draws=setting.draws, rng=rng)
    drawn = [(rng.permutation(setting.rows)[:a], rng.permutation(setting.columns)[:b]) for _ in range(setting.draws)]
    variance = 1 / (3 * setting.columns)  # of PEFT's A: uniform up to 1 / sqrt(columns)
    start = first_order.start_gradients(gradient, drawn, setting.rank, variance, rng=rng)
    apart, in_turn, spread = [], [], []
    for _ in range(min(_FEW, setting.draws)):
        gradient = first_order.concentrated_gradient(*shape, rng=rng)
        apart.append(first_order.mass(gradient, *first_order.top(gradient, a, b)))
        in_turn.append(first_order.mass(gradient, *first_order.top_in_turn(gradient, a, b)))
        gradient = first_order.spread_gradient(*shape, rng=rng)
        spread.append(first_order.mass(gradient, *first_order.top_in_turn(gradient, a, b)))
    expected_start = first_order.start_gradient(setting.rank, variance, p, q)
    return [
        _line("gradient's mass on random rows and columns, p q", p * q, EQUAL, random),
        _line("on the top rows, then columns within; concentrated gradients", p * q, AT_LEAST, in_turn),
        _line("the same; gradients of independent entries", p * q, AT_LEAST, spread),
        _line("on the top rows and, apart, columns; concentrated gradients", 0, AT_LEAST, apart),
        _line("|dL/dB|^2 / |G|^2 at B = 0 and PEFT's A, rank p q / (3 columns)", expected_start, EQUAL, start),
    ]


def _subset_sums(setting: Setting) -> Line:
    rng = np.random.default_rng([setting.seed, 4])
    fewest = values = subset_sums.fewest_values(_PRECISION)
    while (subset_sums.worst_distances(values, draws=100, rng=rng) <= _PRECISION).mean() < 0.95:
        values += 1
    what = f"values whose subset sums reach [-1/2, 1/2] within {_PRECISION:g} (simulated: in 95 of 100 draws)"
    return Line(what, fewest, AT_LEAST, values)


def _draws(setting: Setting, cells: int) -> int:
    """How many draws of so many random numbers each: fewer of large ones, none of those that memory may not hold."""
    return 0 if cells > _MOST_CELLS else min(setting.draws, max(_FEW, _CELLS // cells))


def _line(what: str, bound: float, holds: str, values: Sequence[float] | None) -> Line:
    if values is None:
        return Line(what, float(bound))
    simulated = Simulated.share(values) if set(np.unique(values)) <= {0.0, 1.0} else Simulated.of(values)
    return Line(what, float(bound), holds, simulated.mean, simulated.standard_error)


def _target(setting: Setting, rng: np.random.Generator) -> np.ndarray:
    left = rng.standard_normal((setting.rows, setting.target_rank))
    return left @ rng.standard_normal((setting.target_rank, setting.columns))


def _of_rows_and_columns(setting: Setting) -> str:
    precision = rows_columns.least_precision(*setting.densities, setting.delta)
    return (
        f"Rows and columns: for no fixed target is the squared error below {precision:.4f} of its norm with "
        f"probability {1 - setting.delta:g}; a claim for these masks has to be about other solutions."
    )


def _of_elements(setting: Setting) -> str:
    _, enough, needed = ranks(setting)
    start = f"Entries of B, A free: rank {setting.rank} for targets of rank {setting.target_rank} is"
    if setting.rank >= enough:
        return f"{start} enough, with probability {1 - setting.delta:g}."
    if setting.rank >= needed:
        return f"{start} neither proved enough ({enough}) nor proved too little (below {needed})."
    return f"{start} too little for almost every target; {needed} is necessary, {enough} enough."


def over_sparsities(setting: Setting, sparsities: Sequence[float]) -> dict[str, np.ndarray]:
    """What the figure draws over sparsity: per sparsity the measured p q and ranks, means and standard errors."""
    rng = np.random.default_rng([setting.seed, 5])
    target = _target(setting, rng)
    concentrated = first_order.concentrated_gradient(setting.rows, setting.columns, rng=rng)
    spread = first_order.spread_gradient(setting.rows, setting.columns, rng=rng)
    found: dict[str, list] = {}
    for sparsity in sparsities:
        one = replace(setting, sparsity=float(sparsity))
        a, b = one.kept
        errors = rows_columns.least_errors(target, a, b, draws=setting.draws, rng=rng)
        random = rows_columns.least_errors(concentrated, a, b, draws=setting.draws, rng=rng)
        p, q = one.densities
        values = {
            "sparsity": sparsity,
            "kept": p * q,
            "rows": p,
            "error": errors.mean(),
            "error_deviation": errors.std(),
            "random": 1 - random.mean(),
            "random_deviation": random.std(),
            "top_concentrated": first_order.mass(concentrated, *first_order.top_in_turn(concentrated, a, b)),
            "top_spread": first_order.mass(spread, *first_order.top_in_turn(spread, a, b)),
            "simulated_rank": _simulated_rank(one, rng),
        } | dict(zip(("blocks", "counting", "necessary"), ranks(one), strict=True))
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return {name: np.array(values, dtype=np.float64) for name, values in found.items()}


def _simulated_rank(setting: Setting, rng: np.random.Generator) -> float:
    """The rank at which, in a share 1 - delta of the draws, every row of B keeps the target's rank of entries.

    A row goes on until it has kept t entries; the row that takes longest says what rank the draw needs.
    """
    waits = rng.negative_binomial(setting.target_rank, setting.keep, (setting.draws, setting.rows))
    return float(np.quantile(setting.target_rank + waits.max(1), 1 - setting.delta, method="higher"))
