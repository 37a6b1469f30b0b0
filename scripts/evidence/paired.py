"""Methods beside each other: scores by task, paired differences on each task and over all, and verdicts on claims.

On a task a difference and its interval are those of report/statistics.py. Over several sets it is the mean over sets
of which these are a sample, by random effects: sets differ, and a claim is of more than these. The members of a
mixture are no such sample but parts of one task, with the same seeds: their mean has an interval over seeds and
examples.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import pandas as pd

from evidence.runs import Outcome
from partial_lora.errors import PartialLoraError
from partial_lora.report.records import LEVEL, NONE, point_order
from partial_lora.report.statistics import (
    DRAWS,
    MARGIN,
    Comparison,
    Estimate,
    by_example,
    by_sides,
    drawn_again,
    estimate,
    over_sets,
    together,
)
from partial_lora.report.tables import ends, signed
from partial_lora.tasks.metrics import LOWER_IS_BETTER, SHARES

SCORE, DIFFERENCE, AVERAGE, ALL_SETS = "score", "difference", "average", "all sets"
WHERE = ["model", "mixture", "importance", "operating_point"]
ROW = [*WHERE, "method"]
_NUMBERS = ("difference", "low", "high", "bootstrap_low", "bootstrap_high", "error", "freedom")
DIFFERENCES = (
    *("part", *WHERE, "first", "second", "task", "metric", "tasks", "up", "down"),
    *(*_NUMBERS, "seeds", "examples", "over", "verdict", "together", "among"),
)
BOTH, SEEDS, EXAMPLES, SETS = "seeds and examples", "seeds", "examples", "sets"
HOLDS, FAILS, OPEN = "holds", "does not hold", "undecided"
NO_RUNS = "no runs of both"
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


@dataclass(frozen=True, kw_only=True)
class Difference(Comparison):
    """The first method's score less the second's, on one task or over several; NaN where there is no interval.

    bootstrap_low, bootstrap_high: of one task. over: what is taken for chance: seeds and examples; examples, of one
    seed; seeds, where predictions were not kept; sets. seeds: that both have, the fewest of a task; examples: of all
    tasks together; up, down: tasks on which the first is above and below.
    """

    over: str
    up: int
    down: int


def between(pairs: Sequence[Pair], *, draws: int = DRAWS) -> Difference:
    """The difference on one task. Of several pairs on it (other importance measures, say) it is the mean over them.

    Raises PartialLoraError where there is no seed that all have.
    """
    seeds = _in_common(pairs)
    d = differences_by_example(pairs, seeds)
    if d is None:
        return _over_seeds([_scores(pairs, seeds)], pairs[0].metric, predicted=False)
    return _over_seeds([d], pairs[0].metric, predicted=True, drawn=drawn_again(d, draws))


def average(tasks: Mapping[str, Sequence[Pair]]) -> Difference:
    """The mean over tasks that have the same seeds, all tasks counting alike, as of the members of a mixture.

    Raises PartialLoraError where there is no seed that all have, and where a metric is one of which less is better.
    """
    _refuse_falling(tasks)
    seeds = _in_common([pair for pairs in tasks.values() for pair in pairs])
    arrays = [differences_by_example(pairs, seeds) for pairs in tasks.values()]
    known = all(d is not None for d in arrays)
    parts = arrays if known else [_scores(pairs, seeds) for pairs in tasks.values()]
    return _over_seeds(parts, next(iter(tasks.values()))[0].metric, known)


def over_tasks(tasks: Mapping[str, Sequence[Pair]]) -> Difference:
    """The mean over sets of which these tasks are a sample (`statistics.over_sets`). Raises as `average`."""
    _refuse_falling(tasks)
    each = [between(pairs, draws=0) for pairs in tasks.values()]
    found, metric = over_sets([one.estimate for one in each]), next(iter(tasks.values()))[0].metric
    seeds, examples = min(one.seeds for one in each), sum(one.examples for one in each)
    return Difference.of(found, metric, seeds, examples, over=SETS, **_signs(one.difference for one in each))


def _refuse_falling(tasks: Mapping[str, Sequence[Pair]]) -> None:
    if falling := sorted({pair.metric for pairs in tasks.values() for pair in pairs} & LOWER_IS_BETTER):
        raise PartialLoraError(f"{falling[0]}: no average over tasks, since less of it is better")


def _in_common(pairs: Sequence[Pair]) -> list[int]:
    seeds = sorted(set.intersection(*(pair.seeds for pair in pairs)))
    if not seeds:
        raise PartialLoraError("no seed in common")
    return seeds


def _over_seeds(parts: Sequence[np.ndarray], metric: str, predicted: bool, **more: tuple[float, float]) -> Difference:
    """The mean over parts d (seeds, examples); of scores in place of predictions there is one "example" a part."""
    seeds, examples = len(parts[0]), sum(d.shape[1] for d in parts) if predicted else 0
    over = (BOTH if seeds > 1 else EXAMPLES) if predicted else (SEEDS if seeds > 1 else NONE)
    more |= {"over": over, **_signs(d.mean() for d in parts)}
    return Difference.of(estimate(*parts), metric, seeds, examples, **more)


def _signs(differences: Iterable[float]) -> dict[str, int]:
    """Counts of those above zero and those below."""
    each = list(differences)
    return {"up": sum(one > 0 for one in each), "down": sum(one < 0 for one in each)}


def _scores(pairs: Sequence[Pair], seeds: Sequence[int]) -> np.ndarray:
    """Differences of scores (seeds, 1), the mean over pairs."""
    each = [[pair.first[seed].score - pair.second[seed].score for seed in seeds] for pair in pairs]
    return np.mean(each, axis=0)[:, None]


def differences_by_example(pairs: Sequence[Pair], seeds: Sequence[int]) -> np.ndarray | None:
    """Differences by example (seeds, examples), the mean over pairs; None where predictions were not kept, or are of
    other examples."""
    arrays = []
    for pair in pairs:
        sides = [[side[seed].predictions for seed in seeds] for side in (pair.first, pair.second)]
        if any(frame is None for side in sides for frame in side):
            return None
        try:
            arrays.append(by_example(*sides, pair.metric))
        except (PartialLoraError, ValueError, KeyError):
            return None
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
    return together(pd.DataFrame(rows, columns=list(DIFFERENCES)))


def paired_rows(
    sides: Sequence[tuple[pd.DataFrame, pd.DataFrame]], where: Mapping[str, str], first: str, second: str
) -> list[dict]:
    """A row for each task on which all sides share a seed, and one over these if they are several: of a mixture the
    average, else what is to be expected of all sets of which these are a sample.

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
        if where["mixture"]:
            rows.append(named | {"task": AVERAGE, "metric": AVERAGE, "tasks": len(tasks)} | asdict(average(tasks)))
        else:
            rows.append(named | {"task": ALL_SETS, "metric": AVERAGE, "tasks": len(tasks)} | asdict(over_tasks(tasks)))
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
    interval = between([pair], draws=0)
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
    return signed(_unit(row), *(row[name] for name in ("difference", "low", "high")))


def bootstrapped(row: Mapping) -> str:
    """The bootstrap's interval; "–" where there is none."""
    return ends(_unit(row), row["bootstrap_low"], row["bootstrap_high"]) or NONE


def _unit(row: Mapping) -> str:
    """The metric in whose unit a row is; averages are of shares, such as accuracy."""
    return "accuracy" if row["metric"] == AVERAGE else row["metric"]


# Verdicts


@dataclass(frozen=True)
class Claim:
    """A claim about a pair of methods: it holds where the interval is above one number, and fails below another.

    Of a metric of which less is better a point says nothing: both are zero then, and better is below.
    """

    words: str
    holds_above: float
    fails_below: float
    worse: str = WORSE

    def judge(self, found: Estimate, metric: str, levels: tuple[float, float]) -> str:
        above, below = self._bounds(metric)
        low, high = found.upward(metric).ends(levels)
        if low > above:
            return HOLDS
        if high < below:
            return FAILS
        return self.worse if high < 0 else OPEN

    def significances(self, found: Estimate, metric: str) -> tuple[float, float]:
        return found.upward(metric).sides(*self._bounds(metric))

    def _bounds(self, metric: str) -> tuple[float, float]:
        return (0, 0) if metric in LOWER_IS_BETTER else (self.holds_above, self.fails_below)


AS_GOOD = Claim("{first} is as good as {second}, to within a point", -MARGIN, -MARGIN)
BETTER = Claim("{first} is better than {second}", 0, MARGIN)


@dataclass(frozen=True)
class Verdict:
    """Verdict on a claim: it holds, it does not, or it is undecided; the place, and the numbers.

    alone: of the interval by itself; among: of how many claims it is one, and corrected for (Holm), 0 of none.
    """

    claim: str
    where: str
    verdict: str
    found: str
    alone: str = ""
    among: int = 0


def judged(numbers: pd.DataFrame, *claims: tuple[str, str, Claim, str]) -> list[Verdict]:
    """A verdict for each claim (first, second, claim, operating point), model, mixture and measure of importance; one
    that is open where there are no runs.

    It is of all sets (of a mixture of its average) or of the only one: one of several never stands for the others. All
    verdicts are corrected for how many they are.
    """
    rows, verdicts, estimates = part_of(numbers, DIFFERENCE), [], []
    for first, second, claim, point in claims:
        own = rows[(rows["first"] == first) & (rows["second"] == second) & (rows["operating_point"] == point)]
        words = claim.words.format(first=first, second=second)
        for where, each in own.groupby(WHERE, sort=False):
            one = each if len(each) == 1 else each[each["task"].isin([AVERAGE, ALL_SETS])]
            row = one.iloc[0].to_dict() if len(one) else None
            finding = "nothing over all tasks" if row is None else _finding(row)
            verdicts.append(Verdict(words, ", ".join(filter(None, where)), OPEN, finding))
            decidable = row is not None and row["seeds"] > 1 and not math.isnan(row["low"])
            estimates.append((claim, row) if decidable else None)
        if own.empty:
            verdicts.append(Verdict(words, point, OPEN, NO_RUNS))
            estimates.append(None)
    return _corrected(verdicts, estimates)


def _corrected(verdicts: Sequence[Verdict], of: Sequence[tuple[Claim, Mapping] | None]) -> list[Verdict]:
    """Verdicts with what their estimates say, alone and among all that can be decided."""
    known = [
        (claim, Estimate(row["difference"], row["error"], row["freedom"]), row["metric"])
        for claim, row in filter(None, of)
    ]
    levels = iter(by_sides(claim.significances(found, metric) for claim, found, metric in known))
    numbers = iter(known)
    made = []
    for verdict, each in zip(verdicts, of, strict=True):
        if each is None:
            made.append(replace(verdict, alone=OPEN))
            continue
        claim, found, metric = next(numbers)
        alone, among = (claim.judge(found, metric, level) for level in ((1 - LEVEL,) * 2, next(levels)))
        made.append(replace(verdict, verdict=among, alone=alone, among=len(known)))
    return made


def _finding(row: Mapping) -> str:
    where = row["task"]
    if row["tasks"] > 1:
        of = "sets" if row["task"] == ALL_SETS else "tasks"
        where = f"{row['tasks']:.0f} {of} ({row['up']:.0f} up, {row['down']:.0f} down), at least"
    where += f"{',' * (row['tasks'] == 1)} {counted(row['seeds'], 'seed')}"
    return f"{interval(row)}{' points' if in_points(row) else ''}, {where}"


def counted(n: float, what: str) -> str:
    return f"{n:.0f} {what}{'' if n == 1 else 's'}"
