"""Methods beside each other: scores by task, paired differences on each task and on average, and verdicts on claims.

Seeds and test examples are drawn again as report/statistics.py does for one task: examples within each task, seeds
once for all, since a seed draws the same masks and the same order on every task. The tasks themselves are not drawn: an
average is of these tasks, and says nothing of others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import pandas as pd
from scipy.special import ndtri, stdtrit

from evidence.runs import Outcome
from partial_lora.errors import PartialLoraError
from partial_lora.report.records import LEVEL, NONE, point_order
from partial_lora.report.statistics import MARGIN, Comparison, bootstrap, by_example, compare, judge
from partial_lora.tasks.metrics import LOWER_IS_BETTER, SHARES

SCORE, DIFFERENCE, AVERAGE = "score", "difference", "average"
WHERE = ["model", "mixture", "importance", "operating_point"]
ROW = [*WHERE, "method"]
DIFFERENCES = (
    *("part", *WHERE, "first", "second", "task", "metric", "tasks"),
    *("difference", "low", "high", "seeds", "examples", "over", "verdict"),
)
BOTH, SEEDS, EXAMPLES = "seeds and examples", "seeds", "examples"
HOLDS, FAILS, OPEN = "holds", "does not hold", "undecided"
WORSE = "undecided (worse, perhaps by less than a point)"


@dataclass(frozen=True)
class Pair:
    """Two methods' runs on one task, by seed, and the metric that they are compared by."""

    first: Mapping[int, Outcome]
    second: Mapping[int, Outcome]
    metric: str

    @property
    def seeds(self) -> set[int]:
        return self.first.keys() & self.second.keys()


@dataclass(frozen=True)
class Difference:
    """The first method's score less the second's, and its 95 % interval; NaN where there is nothing to draw.

    over: what was drawn again: seeds and examples; examples, of one seed; seeds, where predictions were not kept
    (Student's t). seeds: that both have, the fewest of a task; examples: of all tasks together. verdict: in the words
    of report/statistics.py; of one seed nothing is decided, since how much seeds differ is not known.
    """

    difference: float
    low: float
    high: float
    seeds: int
    examples: int
    over: str
    verdict: str


@dataclass(frozen=True)
class _Drawn:
    difference: float
    draws: np.ndarray | None
    seeds: int
    examples: int
    over: str


def between(pairs: Sequence[Pair], *, draws: int = 10_000) -> Difference:
    """The difference on one task. Of several pairs on it (other importance measures, say) it is the mean over them.

    Raises PartialLoraError where there is no seed that all have.
    """
    return _judged([_drawn(pairs, np.random.default_rng(0), draws)], pairs[0].metric)


def average(tasks: Mapping[str, Sequence[Pair]], *, draws: int = 10_000) -> Difference:
    """The mean over tasks of the differences on each, all tasks counting alike.

    Of tasks that are not drawn by example (other metrics, predictions that were not kept) each is drawn by itself.
    Raises PartialLoraError as `between`, and where a metric is one of which less is better.
    """
    if falling := sorted({pair.metric for pairs in tasks.values() for pair in pairs} & LOWER_IS_BETTER):
        raise PartialLoraError(f"{falling[0]}: no average over tasks, since less of it is better")
    shares = _seed_shares([_in_common(pairs) for pairs in tasks.values()], draws)
    # A stream of its own for each task: with one for all, lucky examples would be so on every task at once.
    each = [
        _drawn(pairs, np.random.default_rng([0, place]), draws, own)
        for place, (pairs, own) in enumerate(zip(tasks.values(), shares, strict=True))
    ]
    return _judged(each, next(iter(tasks.values()))[0].metric)


def _seed_shares(of_tasks: Sequence[Sequence[int]], draws: int) -> list[np.ndarray]:
    """For each task the share of its seeds in every draw (draws, seeds): one draw of all seeds serves all tasks.

    A draw that has none of a task's seeds is made again. How many a draw has of a task that has not all seeds varies,
    which widens what such a task adds to an interval by about a tenth.
    """
    every = sorted(set().union(*of_tasks))
    columns = [[every.index(seed) for seed in seeds] for seeds in of_tasks]
    stream, counts = np.random.default_rng(0), np.empty((0, len(every)))
    while len(counts) < draws:
        more = stream.multinomial(len(every), np.full(len(every), 1 / len(every)), size=draws)
        usable = np.all([more[:, own].sum(axis=1) > 0 for own in columns], axis=0)
        counts = np.concatenate([counts, more[usable]])
    of_task = [counts[:draws, own] for own in columns]
    return [own / own.sum(axis=1, keepdims=True) for own in of_task]


def _in_common(pairs: Sequence[Pair]) -> list[int]:
    seeds = sorted(set.intersection(*(pair.seeds for pair in pairs)))
    if not seeds:
        raise PartialLoraError("no seed in common")
    return seeds


def _judged(each: Sequence[_Drawn], metric: str) -> Difference:
    difference, seeds = float(np.mean([one.difference for one in each])), min(one.seeds for one in each)
    low = high = math.nan
    judged = "undecided"
    if all(one.draws is not None for one in each):
        spread = np.mean([one.draws for one in each], axis=0)
        low, high, judged = judge(spread, metric, seeds)
    over = "; ".join(sorted({one.over for one in each}))
    return Difference(difference, low, high, seeds, sum(one.examples for one in each), over, judged)


def _drawn(
    pairs: Sequence[Pair], stream: np.random.Generator, draws: int, of_seeds: np.ndarray | None = None
) -> _Drawn:
    seeds = _in_common(pairs)
    over = BOTH if len(seeds) > 1 else EXAMPLES
    known = _by_example(pairs, seeds)
    if isinstance(known, np.ndarray):
        return _Drawn(float(known.mean()), bootstrap(known, stream, draws, of_seeds), len(seeds), known.shape[1], over)
    shares = stream.permutation((np.arange(draws) + 0.5) / draws)
    if known is not None:  # an interval alone: drawn from the normal that has it
        deviation = (known.high - known.low) / (2 * ndtri((1 + LEVEL) / 2))
        normal = known.difference + deviation * ndtri(shares)
        return _Drawn(known.difference, normal, len(seeds), known.examples, over)
    scores = np.mean([[pair.first[seed].score - pair.second[seed].score for seed in seeds] for pair in pairs], axis=0)
    mean = float(scores.mean())
    if len(seeds) == 1:
        return _Drawn(mean, None, 1, 0, NONE)
    error = scores.std(ddof=1) / np.sqrt(len(seeds))
    return _Drawn(mean, mean + error * stdtrit(len(seeds) - 1, shares), len(seeds), 0, SEEDS)


def _by_example(pairs: Sequence[Pair], seeds: Sequence[int]) -> np.ndarray | Comparison | None:
    """Differences by example (seeds, examples), the mean over pairs; of one pair whose metric is no mean over examples
    its comparison; None where predictions were not kept, or are of other examples."""
    arrays = []
    for pair in pairs:
        sides = [{seed: side[seed].predictions for seed in seeds} for side in (pair.first, pair.second)]
        if any(frame is None for side in sides for frame in side.values()):
            return None
        try:
            array = by_example(*(list(side.values()) for side in sides), pair.metric)
            if array is None:
                return compare(*sides, pair.metric, draws=1_000) if len(pairs) == 1 else None
        except (PartialLoraError, ValueError, KeyError):
            return None
        arrays.append(array)
    return np.mean(arrays, axis=0) if len({each.shape for each in arrays}) == 1 else None


def differences(runs: pd.DataFrame, pairs: Iterable[tuple[str, str]]) -> pd.DataFrame:
    """For each pair of methods, its first less its second, wherever both have runs.

    They are paired at one model, importance measure and operating point; a method that is not calibrated stands at all
    of them.
    """
    rows = []
    for first, second in pairs:
        for where, own in runs[runs["method"] == first].groupby(WHERE, sort=False):
            model, mixture, measure, point = where
            other = runs[(runs["model"] == model) & (runs["mixture"] == mixture) & (runs["method"] == second)]
            other = other[other["importance"].isin([measure, NONE]) & other["operating_point"].isin([point, NONE])]
            rows += paired_rows([(own, other)], dict(zip(WHERE, where, strict=True)), first, second)
    return pd.DataFrame(rows, columns=list(DIFFERENCES))


def paired_rows(
    sides: Sequence[tuple[pd.DataFrame, pd.DataFrame]], where: Mapping[str, str], first: str, second: str
) -> list[dict]:
    """A row for each task on which all sides share a seed, and one for the average over these if they are several.

    sides: runs of a method and of another; of several the difference is the mean over them, on every task.
    """
    tasks: dict[str, list[Pair]] = {}
    for task in dict.fromkeys(sides[0][0]["task"]):
        parts = [[side[side["task"] == task] for side in both] for both in sides]
        if all(len(side) for both in parts for side in both):
            pairs = [Pair(*map(_by_seed, both), both[0]["metric"].iloc[0]) for both in parts]
            if set.intersection(*(pair.seeds for pair in pairs)):
                tasks[task] = pairs
    named = {"part": DIFFERENCE, **where, "first": first, "second": second}
    rows = [
        named | {"task": task, "metric": pairs[0].metric, "tasks": 1, **asdict(between(pairs))}
        for task, pairs in tasks.items()
    ]
    if len(tasks) > 1 and not {pairs[0].metric for pairs in tasks.values()} & LOWER_IS_BETTER:
        of_all = {"task": AVERAGE, "metric": AVERAGE, "tasks": len(tasks)}
        rows.append(named | of_all | asdict(average(tasks)))
    return rows


def _by_seed(runs: pd.DataFrame) -> dict[int, Outcome]:
    return dict(zip(runs["seed"], runs["outcome"], strict=True))


# Scores of methods by tasks


def scores(runs: pd.DataFrame) -> pd.DataFrame:
    """A row for each method and task: metric, n, mean and standard deviation over seeds, parameters; and averages.

    A method's average is over all tasks of its model (and mixture) that any method there has, NaN where it lacks one:
    averages over different tasks cannot be set beside each other. Its deviation is over seeds, of the mean over tasks
    of one seed (NaN where tasks have fewer than two in common), its n the fewest. best: better than every other of its
    point (`best`).
    """
    columns = {"mean": ("test", "mean"), "std": ("test", "std"), "n": ("seed", "size"), "metric": ("metric", "first")}
    columns |= {"parameters": ("adapter_parameters", "mean"), "share": ("share_of_dense", "mean")}
    table = ordered(runs.groupby([*ROW, "task"], sort=False).agg(**columns).reset_index()).assign(part=SCORE)
    marked = best(runs)
    table["best"] = [key in marked for key in zip(*(table[name] for name in (*ROW, "task")), strict=True)]
    averages = []
    for _, place in table.groupby(["model", "mixture"], sort=False):
        tasks = set(place["task"])
        if len(tasks) == 1 or set(place["metric"]) & LOWER_IS_BETTER:
            continue
        for row, own in place.groupby(ROW, sort=False):
            whole = math.nan if set(own["task"]) != tasks else 1.0
            of_row = runs[(runs[ROW] == list(row)).all(axis=1)]
            of_seeds = of_row.pivot(index="seed", columns="task", values="test").dropna().mean(axis=1)
            averages.append(
                dict(zip(ROW, row, strict=True))
                | {"task": AVERAGE, "metric": AVERAGE, "part": SCORE, "best": False, "n": own["n"].min()}
                | {name: whole * own[name].mean() for name in ("mean", "parameters", "share")}
                | {"std": whole * of_seeds.std()}
            )
    return pd.concat([table, pd.DataFrame(averages, columns=table.columns)], ignore_index=True)


def best(runs: pd.DataFrame) -> set[tuple[str, ...]]:
    """(*ROW, task) of those that are better than every other of the same model, task and point.

    Better is a 95 % interval, over test examples and seeds, that is above zero. Beside every point stand those that are
    not calibrated, and these are set beside all. What has kept no predictions, or nothing beside it, is not marked.
    """
    best = set()
    for (*_, task), part in runs.groupby(["model", "mixture", "task"], sort=False):
        rows = dict(iter(part.groupby(ROW, sort=False)))
        sign = -1 if part["metric"].iloc[0] in LOWER_IS_BETTER else 1
        for row, own in rows.items():
            others = [rows[key] for key in rows if key != row and (NONE in (key[3], row[3]) or key[3] == row[3])]
            others.sort(key=lambda each: -sign * each["test"].mean())  # the likeliest to refute come first
            if others and all(_beats(own, other, sign) for other in others):
                best.add((*row, task))
    return best


def _beats(own: pd.DataFrame, other: pd.DataFrame, sign: int) -> bool:
    pair = Pair(_by_seed(own), _by_seed(other), own["metric"].iloc[0])
    if sign * own["test"].mean() <= sign * other["test"].mean() or not pair.seeds:
        return False
    interval = between([pair], draws=2_000)
    return interval.over == BOTH and min(sign * interval.low, sign * interval.high) > 0


def ordered(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows by model, mixture and operating point, and then by method."""
    points = rows["operating_point"].map(point_order)
    by = ["model", "mixture", "_point", "importance", "method"]
    return rows.assign(_point=points).sort_values(by, kind="stable").drop(columns="_point")


def part_of(numbers: pd.DataFrame, part: str) -> pd.DataFrame:
    """The rows of one part of a table's numbers; none where it has none."""
    if part == DIFFERENCE and "difference" not in numbers:
        return pd.DataFrame(columns=list(DIFFERENCES))
    return numbers[numbers["part"] == part] if "part" in numbers else numbers.iloc[:0]


def in_points(row: Mapping) -> bool:
    return row["metric"] in SHARES or row["metric"] == AVERAGE


def interval(row: Mapping) -> str:
    """A difference with its interval: of shares in points, of other metrics as it is."""
    scale, form = (100, "+.2f") if in_points(row) else (1, "+.4f")
    difference = f"{scale * row['difference']:{form}}"
    if math.isnan(row["low"]):
        return difference
    return f"{difference} [{scale * row['low']:{form}}, {scale * row['high']:{form}}]"


# Verdicts


@dataclass(frozen=True)
class Verdict:
    """Verdict on a claim: it holds, it does not, or it is undecided; the place, and the numbers."""

    claim: str
    where: str
    verdict: str
    found: str


def as_good(row: Mapping | None) -> str:
    """The claim that the first of a pair is as good as the second, to within a point; refuted where it is worse by one.

    Of a metric of which less is better a point says nothing: refuted where it is worse.
    """
    if row is None or row["verdict"] not in ("better", "matches", "worse"):
        return OPEN
    if row["verdict"] != "worse":
        return HOLDS
    return FAILS if row["metric"] in LOWER_IS_BETTER or row["high"] < -MARGIN else WORSE


def better(row: Mapping | None) -> str:
    """The claim that the first is better; refuted where it is not so by as much as a point.

    Of a metric of which less is better, better is below zero, and a point says nothing: refuted where it is worse.
    """
    if row is None or row["seeds"] < 2 or math.isnan(row["low"]):
        return OPEN
    falls = row["metric"] in LOWER_IS_BETTER
    low, high = (-row["high"], -row["low"]) if falls else (row["low"], row["high"])
    if low > 0:
        return HOLDS
    return FAILS if high < (0 if falls else MARGIN) else OPEN


def judged(
    numbers: pd.DataFrame, first: str, second: str, points: Iterable[str], judge: Callable = as_good
) -> list[Verdict]:
    """A verdict for each model, mixture and measure of importance at each point; one that is open where there is none.

    It is of the average over tasks or of the only one: one of several never stands for the others.
    """
    claim = (
        f"{first} is better than {second}" if judge is better else f"{first} is as good as {second}, to within a point"
    )
    rows = part_of(numbers, DIFFERENCE)
    rows = rows[(rows["first"] == first) & (rows["second"] == second)]
    verdicts = []
    for point in points:
        at_point = rows[rows["operating_point"] == point]
        for where, own in at_point.groupby(WHERE, sort=False):
            one = own if len(own) == 1 else own[own["task"] == AVERAGE]
            row = one.iloc[0].to_dict() if len(one) else None
            finding = "no average over tasks" if row is None else _finding(row)
            verdicts.append(Verdict(claim, ", ".join(filter(None, where)), judge(row), finding))
        if at_point.empty:
            verdicts.append(Verdict(claim, point, judge(None), "no runs of both"))
    return verdicts


def _finding(row: Mapping) -> str:
    where = row["task"] if row["tasks"] == 1 else f"average of {row['tasks']:.0f} tasks, at least"
    where += f"{',' * (row['tasks'] == 1)} {counted(row['seeds'], 'seed')}"
    return f"{interval(row)}{' points' if in_points(row) else ''}, {where}"


def counted(n: float, what: str) -> str:
    return f"{n:.0f} {what}{'' if n == 1 else 's'}"
