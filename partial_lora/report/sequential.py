"""Seeds where they decide: a comparison that looks at its runs after 2, 3, 5 and 8 seeds, and drops what is decided.

At each look every method still in doubt is set beside the leader. Their difference d over the seeds and test rows that
both have is modelled as in `statistics`; but two or three seeds say little of how far seeds move *one* difference, so
what they move is taken from all methods that are in doubt together: the residual of methods and seeds in the table of
scores. It counts for the seeds of three pairs at most, since methods do not all move as far. A pair that moves more
keeps its own variance, and where it is more than chance also its own degrees of freedom: seeds that are far apart do
not borrow the certainty of others.

A method is *worse* where the whole interval lies on the leader's side of 0, *as good* where none of it reaches the
margin. Looking again and again would find something in the end. So each look spends a part of 5 %, growing with its
number (a group-sequential test with spending by the square: Lan and DeMets 1983), on what earlier looks have not found.
All pairs of methods share it, since the leader is chosen by the same scores. `make referee` simulates how often such a
study says something false.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from partial_lora.report.statistics import LEVEL, Estimate, mean_squares

LOOKS = (2, 3, 5, 8)  # seeds
MOST = 64  # seeds: what wants more is not to be decided by seeds
LEADS, WORSE, AS_GOOD, OPEN = "leads", "worse", "as good", "open"

Outputs = Mapping[str, Mapping[int, np.ndarray]]  # by method and seed: what each test row adds to the score, upward


@dataclass(frozen=True)
class Decision:
    """Decision on a method beside the leader.

    verdict: LEADS, WORSE, AS_GOOD or OPEN. against: the leader when it was found. difference: the leader's score less
    its own, with the ends of the interval of that look. seeds: that it has been judged by. wants: seeds that would
    decide what is open, if the difference and its spread are as they seem; None: no number up to 64 would.
    """

    verdict: str
    against: str
    difference: float = 0.0
    low: float = 0.0
    high: float = 0.0
    seeds: int = 0
    wants: int | None = None


@dataclass(frozen=True)
class Decisions:
    """Decisions of the runs so far, by method, and the runs to make next.

    next_seeds: by method, the number of seeds that it needs for the next look; empty at the end.
    """

    leader: str
    by_method: Mapping[str, Decision]
    next_seeds: Mapping[str, int]


@functools.cache
def levels_of(looks: Sequence[int], error: float) -> tuple[float, ...]:
    """Return the significance at which each look may judge a difference, so that all looks together err by `error`.

    What is seen before is a part of what is seen now: standardised differences of n and m > n seeds correlate by
    sqrt(n / m). So a look spends its part only on what earlier looks have not found, and may judge at more than it
    (Armitage, McPherson and Rowe 1969, whose integral is taken over 64 nodes between the bounds of each look).
    """
    from scipy.optimize import brentq
    from scipy.special import ndtr

    nodes, weights = np.polynomial.legendre.leggauss(64)
    levels, at, mass, before = [], np.zeros(1), np.ones(1), 0  # of what no look has found: z and its probability
    for look, seeds in enumerate(looks, start=1):
        spent = error * (look**2 - (look - 1) ** 2) / len(looks) ** 2
        centre, spread = math.sqrt(before / seeds) * at, math.sqrt(1 - before / seeds)
        bound = brentq(lambda z: 2 * mass @ ndtr((centre - z) / spread) - spent, 0, 40)  # noqa: B023
        levels.append(float(2 * ndtr(-bound)))
        z = bound * nodes
        density = np.exp(-(((z[:, None] - centre) / spread) ** 2) / 2) / math.sqrt(2 * math.pi) / spread
        at, mass, before = z, bound * weights * (density @ mass), seeds
    return tuple(levels)


def decide(outputs: Outputs, margin: float, looks: Sequence[int] = LOOKS) -> Decisions:
    """Return what runs decide, look by look; only the seeds of a look count in it, so that it always says the same.

    margin: in units of the score. looks: numbers of seeds; a single one is an ordinary comparison at 5 %.
    """
    decisions: dict[str, Decision] = {}
    levels = levels_of(tuple(looks), (1 - LEVEL) / max(1, math.comb(len(outputs), 2)))
    given_up: set[str] = set()
    leader = max(outputs, key=lambda name: _mean(outputs[name], 1))
    for seeds, level in zip(looks, levels, strict=True):
        alive = [name for name in outputs if decisions.get(name, _UNDECIDED).verdict == OPEN and name not in given_up]
        if len(alive) < 2:
            break
        if any(seed not in outputs[name] for name in alive for seed in range(seeds)):
            return Decisions(leader, decisions, dict.fromkeys(alive, seeds))
        judged = {name: seeds if name in alive else decisions[name].seeds for name in outputs}
        counted = {name: {seed: by_seed[seed] for seed in range(judged[name])} for name, by_seed in outputs.items()}
        leader = max(alive, key=lambda name: _mean(outputs[name], seeds))
        decisions[leader] = Decision(OPEN, leader, seeds=seeds)
        if seeds == 1:  # which decides nothing
            for name in alive:
                apart = _mean(outputs[leader], 1) - _mean(outputs[name], 1)
                decisions[name] = Decision(OPEN, leader, apart, math.nan, math.nan, 1)
            break
        pooled = Seeds.of({name: counted[name] for name in alive})
        if pooled.freedom < ENOUGH:  # what is decided tells of seeds, too
            pooled = Seeds.of(counted)
        for name in alive:
            if name == leader:
                continue
            d = np.stack([counted[leader][seed] - counted[name][seed] for seed in range(seeds)])
            alone = Spread.of(d)
            pair, degrees = pooled.pair(alone, seeds)
            estimate = pair.estimate(seeds, degrees)
            low, high = estimate.interval(1 - level)
            verdict = verdict_of(low, high, margin) if estimate.error > NOTHING else OPEN
            at = Decision(verdict, leader, estimate.difference, low, high, seeds)
            if verdict == OPEN:
                of_seed, last = degrees / (seeds - 1), 1 - levels[-1]
                at = replace(at, wants=seeds_wanted(pair, of_seed, last, margin))
                # By its own spread alone: another method may be what seeds move so far.
                hoped = _ends(alone, of_seed, last, looks[-1])
                if seeds == looks[-1] or not _may_decide(hoped, estimate.error, margin):
                    given_up.add(name)
            decisions[name] = at
    decisions[leader] = Decision(LEADS, leader, seeds=decisions[leader].seeds if leader in decisions else 1)
    return Decisions(leader, decisions, {})


def fallen(outputs: Outputs) -> dict[tuple[str, int], float]:
    """Return the runs, by method and seed, that end far below the other seeds of their method, and by how much.

    Each is tested beside the others of its method, with the spread of all runs but itself (Student's t); all together
    err in 1 %. A run of which there are fewer than two others is not judged. No verdict depends on it: where a method's
    seeds differ so, its interval is as wide (`make referee` has such methods).
    """
    from scipy.special import stdtr

    scores = {name: {seed: float(one.mean()) for seed, one in seeds.items()} for name, seeds in outputs.items()}
    found, runs = {}, sum(map(len, scores.values()))
    for name, seeds in scores.items():
        for seed, score in seeds.items():
            others = [value for other, value in seeds.items() if other != seed]
            kept = [others, *([*own.values()] for other, own in scores.items() if other != name)]
            freedom = sum(len(own) - 1 for own in kept)
            if len(others) < 2:
                continue
            error = math.sqrt(sum(np.var(own) * len(own) for own in kept) / freedom * (1 + 1 / len(others)))
            below = float(np.mean(others)) - score
            if error > NOTHING and stdtr(freedom, -below / error) < _FELL / runs:
                found[name, seed] = below
    return found


# Standard deviations of a difference of shares: what a seed moves it by, and a test row, for one seed and for all.
# Medians over sets (results/referee/spread.csv).
_SEED, _ROW_OF_SEED, _ROW = 0.011, 0.27, 0.055


def shows(methods: int, rows: int, seeds: int, looks: Sequence[int] = LOOKS) -> float:
    """Return the least gap that a look would call one, as seeds and test rows move shares in the records."""
    freedom = min(methods - 1, _PAIRS) * (seeds - 1)
    level = levels_of(tuple(looks), (1 - LEVEL) / math.comb(methods, 2))[looks.index(seeds)]
    usual = Spread(0.0, _SEED**2 + _ROW_OF_SEED**2 / rows, _ROW**2 / rows, rows)
    return usual.estimate(seeds, freedom).interval(1 - level)[1]


_UNDECIDED = Decision(OPEN, "")
NOTHING = 1e-12  # an error that is none: seeds and rows say nothing of chance
TINY = 1e-300  # in place of 0 below a fraction
_MOVES_MORE = 0.1  # chance of a pair's variance being as large, if seeds moved all pairs as far
_FELL = 0.01  # chance that any run is named that has not fallen
HOPE = 0.7  # of an error: with a whole one, a seed more is spent on what eight will not decide (`make referee`)
_PAIRS = 3  # of whose seeds a pooled variance counts, at most: methods do not all move as far
ENOUGH = 4  # degrees of freedom of methods that are still compared


def _mean(by_seed: Mapping[int, np.ndarray], seeds: int) -> float:
    return float(np.mean([by_seed[seed].mean() for seed in range(seeds) if seed in by_seed]))


def verdict_of(low: float, high: float, margin: float) -> str:
    """Return what the interval of the leader's score less a method's own says of the method."""
    if low > 0:
        return WORSE
    return AS_GOOD if high < margin else OPEN


def _ends(pair: Spread, freedom: float, level: float, seeds: int) -> tuple[float, float]:
    """Return the ends of the interval that so many seeds would have. freedom: degrees of it a seed beyond the first."""
    return pair.estimate(seeds, freedom * (seeds - 1)).interval(level)


def _may_decide(ends: tuple[float, float], error: float, margin: float) -> bool:
    """Return whether an interval like this would decide, if the difference was a part of an error more or less."""
    return ends[0] + HOPE * error > 0 or ends[1] - HOPE * error < margin


def seeds_wanted(pair: Spread, freedom: float, level: float, margin: float) -> int | None:
    """Return the fewest seeds whose interval would decide; None where no number up to 64 does.

    freedom: degrees of it a seed beyond the first.
    """
    from scipy.special import stdtrit

    seeds = np.arange(2, MOST + 1)
    parts = [(pair.of_seed / seeds, freedom * (seeds - 1)), (pair.of_rows, max(1, pair.rows - 1))]
    variance = sum(part for part, _ in parts)
    squares = sum(part**2 / degrees for part, degrees in parts)
    half = np.sqrt(variance) * stdtrit(variance**2 / np.maximum(squares, TINY), (1 + level) / 2)
    decides = (pair.difference > half) | (pair.difference + half < margin)
    return int(seeds[decides.argmax()]) if decides.any() else None


@dataclass(frozen=True)
class Seeds:
    """By how much seeds move a difference of two methods: a variance, of all methods together, and its freedom."""

    moved: float
    freedom: float

    @classmethod
    def of(cls, outputs: Outputs) -> Seeds:
        """Return twice the mean square that effects of methods and of seeds leave of the scores, over all runs."""
        seeds = sorted({seed for by_seed in outputs.values() for seed in by_seed})
        cells = [
            (row, seeds.index(seed), by_seed[seed].mean())
            for row, by_seed in enumerate(outputs.values())
            for seed in by_seed
        ]
        effects = np.zeros((len(cells), len(outputs) + len(seeds)))
        for place, (row, column, _) in enumerate(cells):
            effects[place, [row, len(outputs) + column]] = 1
        scores = np.array([score for *_, score in cells])
        freedom = len(cells) - np.linalg.matrix_rank(effects)
        left = scores - effects @ np.linalg.lstsq(effects, scores, rcond=None)[0]
        return cls(float(2 * left @ left / freedom), float(freedom))

    def pair(self, alone: Spread, seeds: int) -> tuple[Spread, float]:
        """Return what moves a difference that has `alone` over so many seeds, and the degrees of freedom of seeds.

        These are of all pairs, at most of three; or its own, if it moves by more than chance has it (F test).
        """
        from scipy.special import fdtrc  # scipy.stats takes half a second to import

        spread, own = replace(alone, of_seed=np.maximum(self.moved, alone.of_seed)), seeds - 1
        chance = fdtrc(own, self.freedom, spread.of_seed / np.maximum(self.moved, TINY))
        return spread, np.minimum(self.freedom, np.where(chance < _MOVES_MORE, own, _PAIRS * own))

    def estimate(self, d: np.ndarray) -> Estimate:
        """Return the mean of a difference d (seeds, rows), with its error."""
        spread, freedom = self.pair(Spread.of(d), len(d))
        return spread.estimate(len(d), freedom)


@dataclass(frozen=True)
class Spread:
    """A difference of two methods and what moves it, as variances: a seed, and the test rows that all seeds share."""

    difference: float
    of_seed: float
    of_rows: float
    rows: int

    @classmethod
    def of(cls, d: np.ndarray) -> Spread:
        """Return that of d (…, seeds, rows)."""
        seeds, rows = d.shape[-2:]
        means = d.mean(axis=-1)
        of_means = means.var(axis=-1, ddof=1)
        if rows == 1:
            return cls(means.mean(axis=-1), of_means, 0.0, 1)
        _, by_row, left = mean_squares(d)
        of_rows = np.maximum(0.0, by_row - left) / (seeds * rows)
        return cls(means.mean(axis=-1), np.maximum(left / rows, of_means), of_rows, rows)

    def estimate(self, seeds: int, freedom: float) -> Estimate:
        """Return the difference over so many seeds, with Satterthwaite's degrees of freedom."""
        parts = [(self.of_seed / seeds, freedom), (self.of_rows, max(1, self.rows - 1))]
        variance = sum(part for part, _ in parts)
        squares = sum(part**2 / degrees for part, degrees in parts)
        return Estimate(self.difference, np.sqrt(variance), variance**2 / np.maximum(squares, TINY))
