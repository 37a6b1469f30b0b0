"""Methods beside each other: scores by task, paired differences on each task and over all, and verdicts on claims."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import pandas as pd

from partial_lora.report.pairs import Pair, average, between, by_seed, is_best, over_tasks
from partial_lora.report.records import LEVEL, NONE, point_order
from partial_lora.report.statistics import MARGIN, Estimate, by_sides, together
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
HOLDS, FAILS, OPEN = "holds", "does not hold", "undecided"
NO_RUNS = "no runs of both"
WORSE = "undecided (worse, perhaps by less than a point)"


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
            pairs = [Pair(*map(by_seed, both), both[0]["metric"].iloc[0]) for both in parts]
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
            if is_best(by_seed(own), map(by_seed, others), own["metric"].iloc[0]):
                best.add((*row, task))
    return best


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
