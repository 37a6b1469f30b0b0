"""Claims about methods: scores by task, paired differences on each task and over all, verdicts, and all in words."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace

import pandas as pd

from partial_lora.report import ranking
from partial_lora.report.pairs import Pair, average, between, by_seed, is_best, over_tasks
from partial_lora.report.rows import NONE, point_order
from partial_lora.report.statistics import LEVEL, Estimate, by_sides
from partial_lora.report.summary import cell, percent
from partial_lora.tasks.metrics import LOWER_IS_BETTER, SHARES

SCORE, DIFFERENCE, AVERAGE, ALL_SETS = "score", "difference", "average", "all sets"
WHERE = ["model", "mixture", "importance", "operating_point"]
ROW = [*WHERE, "method"]
_NUMBERS = ("difference", "low", "high", "error", "freedom")
DIFFERENCES = (
    *("part", *WHERE, "first", "second", "task", "metric", "tasks", "up", "down"),
    *(*_NUMBERS, "seeds", "examples", "over"),
)
HOLDS, FAILS, OPEN = "holds", "refuted", "open"
NO_RUNS = "no runs of both"
WORSE = "worse, two points open"
MARGIN = 0.02  # of all claims
FIRST_LOOK = 8  # seeds; what has more of them was looked at twice, and each look has half of the error


def differences(
    runs: pd.DataFrame, pairs: Iterable[tuple[str, str]], not_in_means: Collection[str] = ()
) -> pd.DataFrame:
    """For each pair of methods, its first less its second, wherever both have runs.

    They are paired at one model, measure of importance and operating point; a method that is not calibrated stands at
    all points. There is a row for each task on which both share a seed, and one over these if they are several: of a
    mixture the average, else what is to be expected of all sets of which these are a sample. not_in_means: tasks that
    are in no mean over sets.
    """
    rows = []
    for first, second in pairs:
        for where, own in runs[runs["method"] == first].groupby(WHERE, sort=False):
            model, mixture, measure, point = where
            other = runs[(runs["model"] == model) & (runs["mixture"] == mixture) & (runs["method"] == second)]
            other = other[(other["importance"] == measure) & other["operating_point"].isin([point, NONE])]
            named = {"part": DIFFERENCE, **dict(zip(WHERE, where, strict=True)), "first": first, "second": second}
            tasks = {}
            for task, of_task in own.groupby("task", sort=False):
                pair = Pair(by_seed(of_task), by_seed(other[other["task"] == task]), of_task["metric"].iloc[0])
                if pair.seeds:
                    rows.append(named | {"task": task, "metric": pair.metric, "tasks": 1} | asdict(between(pair)))
                    if task not in not_in_means:
                        tasks[task] = pair
            if len(tasks) > 1 and not {pair.metric for pair in tasks.values()} & LOWER_IS_BETTER:
                over, mean = (AVERAGE, average) if mixture else (ALL_SETS, over_tasks)
                rows.append(named | {"task": over, "metric": AVERAGE, "tasks": len(tasks)} | asdict(mean(tasks)))
    return pd.DataFrame(rows, columns=list(DIFFERENCES))


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
    columns |= {f"share_{end}": ("share_of_dense", end) for end in ("min", "max")}
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


def at_ceiling(table: pd.DataFrame) -> list[str]:
    """Return the tasks of a table of scores on which dense LoRA errs on less than 3 % of test rows."""
    dense = table[(table["part"] == SCORE) & (table["method"] == "dense") & table["metric"].isin(SHARES)]
    return sorted(dense.loc[dense["mean"] > 0.97, "task"].unique())


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
    by = ["model", "mixture", "operating_point", "importance", "method"]
    return rows.sort_values(by, key=in_order)


def in_order(column: pd.Series) -> pd.Series:
    """Return what rows are sorted by: the size of operating points, the words of all other columns."""
    return column.map(point_order) if column.name == "operating_point" else column


def part_of(numbers: pd.DataFrame, part: str) -> pd.DataFrame:
    """The rows of one part of a table's numbers; none where it has none."""
    if part == DIFFERENCE and "difference" not in numbers:
        return pd.DataFrame(columns=list(DIFFERENCES))
    return numbers[numbers["part"] == part] if "part" in numbers else numbers.iloc[:0]


def in_points(row: Mapping) -> bool:
    return row["metric"] in SHARES or row["metric"] == AVERAGE


def interval(row: Mapping) -> str:
    """A difference with its interval, if it has one: of shares in points, of other metrics as it is."""
    scale, form = (100, "+.2f") if _unit(row) in SHARES else (1, "+.4f")
    difference, low, high = (f"{scale * row[name]:{form}}" for name in ("difference", "low", "high"))
    return difference if math.isnan(row["low"]) else f"{difference} [{low}, {high}]"


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

    def judge(self, found: Estimate, metric: str, levels: tuple[float, float]) -> str:
        above, below = self._bounds(metric)
        low, high = found.upward(metric).ends(levels)
        if low > above:
            return HOLDS
        if high < below:
            return FAILS
        return WORSE if high < 0 else OPEN

    def significances(self, found: Estimate, metric: str) -> tuple[float, float]:
        return found.upward(metric).sides(*self._bounds(metric))

    def _bounds(self, metric: str) -> tuple[float, float]:
        return (0, 0) if metric in LOWER_IS_BETTER else (self.holds_above, self.fails_below)


AS_GOOD = Claim("{first} is as good as {second}, to within two points", -MARGIN, -MARGIN)
BETTER = Claim("{first} is better than {second}", 0, MARGIN)


@dataclass(frozen=True)
class Verdict:
    """Verdict on a claim: it holds, is refuted or open; the place, and the numbers.

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
    verdicts are corrected for how many they are, and those of a second look for the first (Bonferroni).
    """
    rows, made = part_of(numbers, DIFFERENCE), []  # with each verdict, what decides it
    for first, second, claim, point in claims:
        own = rows[(rows["first"] == first) & (rows["second"] == second) & (rows["operating_point"] == point)]
        words = claim.words.format(first=first, second=second)
        if own.empty:
            made.append((Verdict(words, point, OPEN, NO_RUNS, OPEN), None))
        for where, each in own.groupby(WHERE, sort=False):
            one = each if len(each) == 1 else each[each["task"].isin([AVERAGE, ALL_SETS])]
            row = one.iloc[0].to_dict() if len(one) else None
            finding = "nothing over all tasks" if row is None else _finding(row)
            verdict, of = Verdict(words, ", ".join(filter(None, where)), OPEN, finding, OPEN), None
            if row is not None and row["seeds"] > 1 and not math.isnan(row["low"]):
                of = claim, _estimate(row), row["metric"], _looks(row)
            made.append((verdict, of))
    known = [of for _, of in made if of]
    sides = ([min(1.0, looks * p) for p in claim.significances(found, metric)] for claim, found, metric, looks in known)
    levels = iter(by_sides(sides))
    return [verdict if of is None else _decided(verdict, *of, next(levels), len(known)) for verdict, of in made]


def _decided(
    verdict: Verdict, claim: Claim, found: Estimate, metric: str, looks: int, levels: tuple[float, float], among: int
) -> Verdict:
    """A verdict with what its estimate says, alone and among all that can be decided."""
    shared = [[level / looks for level in own] for own in ((1 - LEVEL,) * 2, levels)]
    alone, corrected = (claim.judge(found, metric, own) for own in shared)
    return replace(verdict, verdict=corrected, alone=alone, among=among)


def _looks(row: Mapping) -> int:
    return 2 if row["tasks"] == 1 and row["seeds"] > FIRST_LOOK else 1


def _estimate(row: Mapping) -> Estimate:
    return Estimate(row["difference"], row["error"], row["freedom"])


def _finding(row: Mapping) -> str:
    """Return a difference with its interval, which has 95 %, and at a second look 97.5 %."""
    if (looks := _looks(row)) > 1:
        row = {**row, **dict(zip(("low", "high"), _estimate(row).ends(((1 - LEVEL) / looks,) * 2), strict=True))}
    where = row["task"]
    if row["tasks"] > 1:
        of = "sets" if row["task"] == ALL_SETS else "tasks"
        where = f"{row['tasks']:.0f} {of} ({row['up']:.0f} up, {row['down']:.0f} down), at least"
    where += f"{',' * (row['tasks'] == 1)} {counted(row['seeds'], 'seed')}"
    return f"{interval(row)}{' points' if in_points(row) else ''}, {where}"


def counted(n: float, what: str) -> str:
    return f"{n:.0f} {what}{'' if n == 1 else 's'}"


def tabled(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    rows = [asdict(each) | {"verdict": in_words(each)} for each in verdicts]
    return pd.DataFrame(rows, columns=[field.name for field in fields(Verdict)])


def in_words(verdict: Verdict) -> str:
    """A verdict with the number of those it was corrected for."""
    return f"{verdict.verdict}, among {verdict.among}" if verdict.among > 1 else verdict.verdict


# What is read of scores and differences


def readable_scores(numbers: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Two tables for each model (and mixture), of what was scored and of what was trained, methods by tasks."""
    numbers = part_of(numbers, SCORE)
    places = list(ordered(numbers).groupby(["model", "mixture"], sort=False)) if len(numbers) else []
    shown = {}
    for place, part in places:
        where = "" if len(places) == 1 else f", {', '.join(filter(None, place))}"
        tasks = [*dict.fromkeys(part.loc[part["task"] != AVERAGE, "task"])]
        tasks += [AVERAGE] if AVERAGE in set(part["task"]) else []
        tested, trained = [], []
        for row, own in part.groupby(ROW, sort=False):
            by_task = {each["task"]: each for each in own.to_dict("records")}
            counts = own.loc[(own["task"] != AVERAGE) & (own["n"] > 0), "n"]
            ends = dict.fromkeys([f"{counts.min():.0f}", f"{counts.max():.0f}"]) if len(counts) else [NONE]
            named = dict(zip((name.replace("_", " ") for name in ROW), row, strict=True)) | {"n": "–".join(ends)}
            tested.append(named | {task: _score(by_task.get(task)) for task in tasks})
            trained.append(named | {task: _size(by_task.get(task)) for task in tasks})
        shown[f"Test score (of shares in %), mean ± deviation{where}"] = plain(pd.DataFrame(tested))
        shown[f"Trainable adapter parameters (share of dense){where}"] = plain(pd.DataFrame(trained))
    return shown


def _score(row: Mapping | None) -> str:
    if row is None or math.isnan(row["mean"]):
        return NONE
    std = "" if math.isnan(row["std"]) else f" ± {row['std']:.4f}"
    shown = percent(row["mean"], row["std"]) if in_points(row) else f"{row['mean']:.4f}{std}"
    return f"**{shown}**" if row["best"] else shown


def _size(row: Mapping | None) -> str:
    if row is None or math.isnan(row["parameters"]):
        return NONE
    return f"{cell(row['parameters'], ',.0f')} ({cell(row['share'], '.1%')})"


def readable_differences(numbers: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Differences in points with their interval, seeds, and what is taken for chance."""
    paired = part_of(numbers, DIFFERENCE)
    return readable(
        "Differences",
        paired,
        {
            **{name.replace("_", " "): name for name in WHERE},
            "difference": lambda row: f"{row['first']} − {row['second']}",
            "task": _task,
            "points [95 %]": interval,
            "seeds": ("seeds", ".0f"),
            "over": "over",
        },
    )


def _task(row: Mapping) -> str:
    if row["tasks"] == 1:
        return row["task"]
    if row["task"] == ALL_SETS:
        return f"{row['tasks']:.0f} sets ({row['up']:.0f} up, {row['down']:.0f} down)"
    return f"{AVERAGE} of {row['tasks']:.0f}"


Column = str | tuple[str, str] | tuple[str, str, float] | Callable[[Mapping], str]


def readable(title: str, numbers: pd.DataFrame, columns: Mapping[str, Column]) -> dict[str, pd.DataFrame]:
    """{title: rows as they are read}, nothing of none.

    columns: by heading a word of the row, a number with its format and perhaps what it is divided by, or a function.
    """

    def text(row: Mapping, column: Column) -> str:
        if callable(column):
            return column(row)
        if isinstance(column, str):
            return row[column]
        name, form, *unit = column
        return cell(row[name] / (unit or [1])[0], form)

    rows = [{name: text(row, of) for name, of in columns.items()} for row in numbers.to_dict("records")]
    return {title: plain(pd.DataFrame(rows))} if rows else {}


def plain(shown: pd.DataFrame) -> pd.DataFrame:
    """Without the columns of where runs are from that say the same in all rows that say something."""
    where = [name for name in ("model", "mixture", "importance") if name in shown]
    said = {
        name: shown[name] if name == "importance" else shown.loc[~shown[name].isin(["", NONE]), name] for name in where
    }
    same = [name for name, values in said.items() if values.nunique() < 2]
    return shown.drop(columns=same)


# Test loss, and forms in one table


def in_one_table(numbers: pd.DataFrame) -> str:
    """Return, for every task and size, the forms that are better and worse than the reference, and those in between.

    After correction `holds` says so, before it a p below 0.05.
    """
    rows = []
    for (task, size), part in numbers.dropna(subset=["difference"]).groupby(["task", "size"]):
        better = (part["difference"] > 0) != part["metric"].isin({*LOWER_IS_BETTER, "loss"})
        before = (part["p"] < 0.05) & ~part["holds"]
        cells = {
            "better, after correction": better & part["holds"],
            "better, before it": better & before,
            "not significant": ~before & ~part["holds"],
            "worse, before it": ~better & before,
            "worse, after correction": ~better & part["holds"],
        }
        listed = {name: ", ".join(map(_named, part[chosen].itertuples())) or NONE for name, chosen in cells.items()}
        rows.append({"task": task, "size": ranking.in_words(size), **listed})
    return pd.DataFrame(rows).to_markdown(index=False)


def by_loss(chosen: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Return how far every form's test loss is from the reference's, over the seeds that both have, by Student's t.

    chosen: runs at the best rate of their form; those with fewer than three seeds are left out.
    """
    chosen = chosen[chosen.groupby(["task", "size", "form"])["seed"].transform("nunique") > 2]
    names = ["task", "size", "form", "metric", "seeds", "difference", "half", "p", "holds"]
    if chosen.empty:
        return pd.DataFrame(columns=names)
    losses = [run.record["metrics"]["test"]["loss"] for run in chosen["run"]]
    outcomes = [
        replace(outcome, score=loss, metric="loss", stored=None)
        for outcome, loss in zip(chosen["outcome"], losses, strict=True)
    ]
    found = ranking.compared(chosen.assign(test=losses, metric="loss", outcome=outcomes), reference)
    found = found[found["paired"] > 2].assign(seeds=found["paired"], half=found["difference_half"])
    found = found.sort_values(["task", "size", "difference"])
    return found[names]


def _named(row) -> str:
    number = f"{100 * row.difference:+.1f}" if row.metric in SHARES else f"{row.difference:+.3g}"
    return f"{row.form} {number}"
