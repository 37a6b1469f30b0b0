"""Judgement of finished scores: who is told apart from the leader, who is as good, and what would decide the rest.

The statistics are those of a comparison that looks once (sequential.py): a difference over seeds and test rows, what
seeds move it by pooled over all methods, and one error of 5 % for all pairs, since the leader is chosen by the same
scores. A method that all are compared with can be named in place of the leader; then there are as many comparisons as
other methods.

A single seed says nothing of how far seeds move a method. Over its rows an interval is of the models at hand alone. Of
a single seed without rows there is a bound: the scores are shares of n rows, each right or wrong, and two methods are
right on the same rows more or less often. How often is not known; the bound is given for rows that have nothing in
common, and each method with the correlation from which on it would be told apart.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from rich.table import Table

from partial_lora.compare.scores import PERPLEXITY, Found, Scores
from partial_lora.errors import require, shortlist
from partial_lora.files import grouped, write_atomic, write_json
from partial_lora.report import figures, page, tables
from partial_lora.report.drawing import save_both
from partial_lora.report.examples import shortened
from partial_lora.report.rows import NONE
from partial_lora.report.sequential import (
    AS_GOOD,
    LEADS,
    NOTHING,
    OPEN,
    WORSE,
    Outputs,
    Seeds,
    Spread,
    seeds_wanted,
    verdict_of,
)
from partial_lora.report.statistics import LEVEL, Estimate
from partial_lora.tasks.metrics import standard_error

BETTER, REFERENCE = "better", "reference"
BOTH, SEEDS, ROWS, BOUND, NOTHING_KNOWN = "seeds and rows", "seeds", "rows of one seed", "binomial bound", "nothing"
CORRELATIONS = (0.0, 0.25, 0.5, 0.75)  # of right answers on the same rows, for which a bound is given
_MOST_NAMED = 8
_ABOUT = {
    BOTH: "Intervals are over seeds and test rows.",
    SEEDS: "Without scores by test row intervals are over seeds alone.",
    ROWS: "There is one seed. Intervals are over test rows alone: they are of these trained models. Another seed may "
    "move a method by more.",
}


@dataclass(frozen=True)
class Line:
    """Judgement of a method.

    score: its mean, of a perplexity the logarithm. rows: of test, 0 where unknown. difference: its score less that of
    the leader or reference, upward, with the ends of its interval. basis: what the interval is over. seeds_wanted,
    rows_wanted: how many would decide what is open; None: no number of seeds up to 64, or of rows, would. correlation:
    of a bound, that of the rows from which on it would be told apart; None: from none that these scores allow.
    """

    method: str
    score: float
    seeds: int
    rows: int
    verdict: str
    basis: str
    difference: float = 0.0
    low: float = 0.0
    high: float = 0.0
    seeds_wanted: int | None = None
    rows_wanted: int | None = None
    correlation: float | None = None


@dataclass(frozen=True)
class Judgement:
    """Judgement of a set: the leader or reference first, then all others, the best first.

    margin: in points. comparisons: for which all intervals together err in 5 %. is_led: the first is the leader.
    """

    scores: Scores
    margin: float
    comparisons: int
    lines: list[Line]
    is_led: bool = True

    @property
    def first(self) -> Line:
        return self.lines[0]

    @property
    def others(self) -> list[Line]:
        return self.lines[1:]

    @property
    def is_decided(self) -> bool:
        return all(line.verdict != OPEN for line in self.others)

    def untold(self, correlation: float | None) -> int:
        """Return how many are not told apart by a bound at a correlation of rows; None: the most that scores allow."""
        most = math.inf if correlation is None else correlation
        return sum(line.correlation is None or line.correlation > most for line in self.others if line.basis == BOUND)


def every(found: Found, margin: float, reference: str | None = None) -> list[Judgement]:
    """Return what is judged of all sets, of a reference those that have it.

    Raises PartialLoraError for a reference that no set has.
    """
    if reference is None:
        return [judged(one, margin) for one in found.sets]
    named = [(one, _named(one.by_row, reference)) for one in found.sets]
    known = shortlist(sorted({name for one in found.sets for name in one.by_row}), between="; ")
    require(any(name for _, name in named), "reference", reference, f"one of the methods: {known}")
    for one, name in named:
        if name is None:
            found.left_out.append(f"{one.title}: no {reference} among {shortlist(sorted(one.by_row), between='; ')}")
    return [judged(one, margin, name) for one, name in named if name]


def _named(methods: Collection[str], reference: str) -> str | None:
    """Return the method of a name: "lora" also of the only one that is called "lora, SOMETHING"; None without one."""
    alike = [name for name in methods if name.partition(", ")[0] == reference]
    return reference if reference in methods else alike[0] if len(alike) == 1 else None


def judged(scores: Scores, margin: float, reference: str | None = None) -> Judgement:
    """Return what scores decide about their methods. margin: in points. reference: a method in place of the leader."""
    outputs = scores.upward
    means = {name: float(np.mean([one.mean() for one in seeds.values()])) for name, seeds in outputs.items()}
    first = reference or max([name for name in outputs if len(outputs[name]) > 1] or outputs, key=means.__getitem__)
    outputs = _in_common(outputs, first)
    comparisons = len(outputs) - 1 if reference else math.comb(len(outputs), 2)
    look = _Look(scores, outputs, first, 1 - (1 - LEVEL) / comparisons, margin * scores.point)
    others = [look.line(name) for name in sorted(outputs, key=means.__getitem__, reverse=True) if name != first]
    if len(outputs[first]) > 1:  # beside the seeds of others a single one decides nothing
        others = [replace(one, verdict=OPEN, seeds_wanted=2) if one.seeds == 1 else one for one in others]
    lines = [Line(**look.known(first), verdict=REFERENCE if reference else LEADS, basis=NONE), *others]
    return Judgement(scores, margin, comparisons, lines, reference is None)


def _in_common(outputs: Outputs, first: str) -> Outputs:
    """Return outputs whose seeds pair: as they are numbered or, where they are of one method alone, in their order."""
    shared = outputs[first].keys()
    pairs = all(len(seeds.keys() & shared) == min(len(seeds), len(shared)) for seeds in outputs.values())
    if pairs:
        return outputs
    return {name: dict(enumerate(seeds[seed] for seed in sorted(seeds))) for name, seeds in outputs.items()}


@dataclass(frozen=True)
class _Look:
    """A look at all methods of a set beside the first. level: of each interval; margin: in units of a score."""

    scores: Scores
    outputs: Outputs
    first: str
    level: float
    margin: float

    @cached_property
    def moved(self) -> Seeds:
        """By how much seeds move a difference, over all methods with several."""
        own = self.outputs[self.first]
        return Seeds.of({name: seeds for name, seeds in self.outputs.items() if len(seeds.keys() & own.keys()) > 1})

    def known(self, name: str) -> dict:
        """Return what is known of a method before it is judged."""
        seeds, sign = self.outputs[name], -1 if self.scores.lower_is_better else 1
        rows = max(map(len, seeds.values()))
        score = sign * float(np.mean([one.mean() for one in seeds.values()]))
        rows = rows if rows > 1 else self.scores.rows.get(name) or 0
        return {"method": name, "score": score, "seeds": len(seeds), "rows": rows}

    def line(self, name: str) -> Line:
        """Return what is judged of a method beside the first."""
        own, others = self.outputs[self.first], self.outputs[name]
        pairs = [(own[seed], others[seed]) for seed in sorted(own.keys() & others.keys())]
        if len({len(side) for pair in pairs for side in pair}) > 1:  # not all have rows, or not the same
            pairs = [tuple(side.mean(keepdims=True) for side in pair) for pair in pairs]
        d = np.stack([one - other for one, other in pairs])
        seeds, rows = d.shape
        if d.size == 1:
            errs = float(self.scores.lower_is_better)  # an error rate counts as the share of what is right, less 1
            return _bound(self.known(name), *(errs + float(side[0]) for side in pairs[0]), self.level, self.margin)
        if seeds > 1:
            pair, freedom = self.moved.pair(Spread.of(d), seeds)
        else:
            pair, freedom = Spread(float(d.mean()), 0.0, float(d.var(ddof=1)) / rows, rows), 1.0
        estimate = pair.estimate(seeds, freedom)
        low, high = estimate.interval(self.level)
        wanted, verdict = {}, verdict_of(low, high, self.margin) if estimate.error > NOTHING else OPEN
        if verdict == OPEN and estimate.error > NOTHING:
            needed = _error_needed(estimate, high - estimate.difference, self.margin)
            left = needed**2 - pair.of_seed / seeds  # what rows may still add to the variance
            if rows > 1 and left > 0:
                wanted["rows_wanted"] = _two_digits(rows * pair.of_rows / left)
            if seeds > 1:
                wanted["seeds_wanted"] = seeds_wanted(pair, freedom / (seeds - 1), self.level, self.margin)
        basis = ROWS if seeds == 1 else BOTH if rows > 1 else SEEDS
        return _turned(self.known(name), verdict, basis, estimate.difference, low, high, **wanted)


def _error_needed(estimate: Estimate, half: float, margin: float) -> float:
    """Return the standard error at which an interval, of this half width now, would lie on one side of 0 or margin."""
    return max(abs(estimate.difference), margin - estimate.difference) / (half / estimate.error)


def _turned(known: Mapping, verdict: str, basis: str, difference: float, low: float, high: float, **more) -> Line:
    """Return a line out of the difference of the leader, or reference, less the method."""
    verdict = BETTER if high < 0 else verdict
    return Line(**known, verdict=verdict, basis=basis, difference=-difference, low=-high, high=-low, **more)


def _bound(known: Mapping, first: float, own: float, level: float, margin: float) -> Line:
    """Return what shares of n rows alone say: an interval for rows that have nothing in common."""
    rows, shares = known["rows"], (first, own)
    if not rows or not all(0 <= share <= 1 for share in shares):
        return Line(**known, verdict=OPEN, basis=NOTHING_KNOWN, difference=own - first, low=-math.inf, high=math.inf)
    errors = [standard_error(share, rows) for share in shares]
    estimate = Estimate(first - own, math.hypot(*errors), rows - 1.0)
    low, high = estimate.interval(level)
    verdict, most = verdict_of(low, high, margin), _most_alike(*shares, rows)
    times = (high - estimate.difference) / estimate.error
    alike = (estimate.error**2 - (estimate.difference / times) ** 2) / (2 * math.prod(errors))
    more = {"correlation": max(0.0, alike) if alike <= most else None}
    if verdict == OPEN:
        needed = _error_needed(estimate, high - estimate.difference, margin)
        more["rows_wanted"] = _two_digits(rows * (estimate.error / needed) ** 2) if needed else None
    return _turned(known, verdict, BOUND, estimate.difference, low, high, **more)


def _most_alike(first: float, second: float, rows: int) -> float:
    """Return the highest correlation of right answers that two shares allow: one is right wherever the other is."""
    low, high = ((share * rows + 1) / (rows + 2) for share in sorted((first, second)))
    return math.sqrt(low * (1 - high) / (high * (1 - low)))


def _two_digits(count: float) -> int | None:
    """Return a number of rows rounded up to two digits, as far as it can be known; None for one that nobody has."""
    if count > 1e9:
        return None
    unit = 10 ** max(0, math.floor(math.log10(max(1, count))) - 1)
    return math.ceil(count / unit) * unit


# --- In words.


def score_in_words(scores: Scores, value: float) -> str:
    if scores.metric == PERPLEXITY:
        return f"{math.exp(value):.4g}"
    return f"{value / scores.point:.2f}" if scores.point != 1 else f"{value:.4g}"


def _apart(scores: Scores, line: Line) -> str:
    """Return a difference with its interval, in points or in the score's own unit."""
    values = (line.difference, line.low, line.high)
    form = "+.1f" if scores.point != 1 else "+.3g"
    number, low, high = (f"{value / scores.point:{form}}".replace("-", "−") for value in values)
    return f"{number} [{low}, {high}]" if math.isfinite(line.low) else number


def would_decide(line: Line) -> str:
    """Return what would decide a line: seeds or rows; a dash where it is decided."""
    if line.verdict != OPEN:
        return NONE
    ways = []
    if line.seeds_wanted and line.seeds_wanted > line.seeds:
        ways.append(f"{line.seeds_wanted} seeds")
    if line.rows_wanted:
        ways.append(f"{line.rows_wanted:,} rows")
    return " or ".join(ways) or ("the number of test rows" if line.basis == NOTHING_KNOWN else "nothing likely")


def sentences(judgement: Judgement) -> list[str]:
    """Return the judgement in a few sentences: who is first, who is told apart from it, and what is open."""
    scores, first = judgement.scores, judgement.first
    by_verdict = grouped(judgement.others, lambda line: line.verdict)
    unit = f"of {scores.metric}" if scores.point == 1 else "point" if judgement.margin == 1 else "points"
    about = f"{first.method} ({score_in_words(scores, first.score)} {scores.metric}, {_counted(first.seeds, 'seed')})"
    others = _counted(len(judgement.others), "other")
    lines = [f"{'First' if judgement.is_led else 'Beside'}: {about}, and {others}."]
    for verdict, words in (
        (BETTER, "Better than it"),
        (WORSE, "Told apart from it, worse"),
        (AS_GOOD, f"As good within {judgement.margin:g} {unit}"),
        (OPEN, "Not decided"),
    ):
        if of_one := by_verdict.get(verdict):
            names = [
                line.method + (f" ({would_decide(line)} would decide)" if verdict == OPEN and len(of_one) < 4 else "")
                for line in of_one
            ]
            lines.append(f"{words} ({len(of_one)}): {shortlist(names, _MOST_NAMED, '; ')}.")
    bases = {line.basis for line in judgement.others}
    lines += [words for basis, words in _ABOUT.items() if basis in bases]
    if BOUND in bases:
        counts = ", ".join(f"{judgement.untold(at)} at a correlation of {at:g}" for at in CORRELATIONS[1:])
        lines.append(
            f"There is one seed and no score by row. The intervals are a binomial bound, over {first.rows:,} test rows "
            f"alone: nothing is known of other seeds. Not told apart from the first are {judgement.untold(0.0)} if "
            f"right answers fall on rows independently, {counts}, and {judgement.untold(None)} if they agree as much "
            "as the scores allow."
        )
    if NOTHING_KNOWN in bases:
        lines.append("Of a single score nothing else is known; rows=N, the number of test rows, gives a bound.")
    if judgement.comparisons == 1:
        return [*lines, "The interval errs in 5 %."]
    many = f"all {judgement.comparisons:,} pairs" if judgement.is_led else f"{judgement.comparisons} comparisons"
    return [*lines, f"Together the intervals of {many} err in 5 %."]


def _counted(count: int, word: str) -> str:
    return f"{count:,} {word}" + "s" * (count != 1)


def table(judgement: Judgement) -> pd.DataFrame:
    """Return a judgement as it is read, a method a row."""
    scores, lines = judgement.scores, judgement.lines
    columns = {
        "method": [line.method for line in lines],
        "test": [score_in_words(scores, line.score) for line in lines],
        "seeds": [str(line.seeds) for line in lines],
        "rows": [f"{line.rows:,}" if line.rows else NONE for line in lines],
        f"from {judgement.first.method}": [NONE, *(_apart(scores, line) for line in judgement.others)],
        "verdict": [line.verdict for line in lines],
        "would decide": [would_decide(line) for line in lines],
    }
    if any(line.basis == BOUND for line in lines):
        told = [NONE if line.correlation is None else f"{line.correlation:.2f}" for line in lines]
        columns["told apart from a correlation of rows on"] = told
    return pd.DataFrame(columns)


def on_screen(judgement: Judgement) -> Table:
    """Return the table for a terminal of 80 columns; rows and what would decide are in files and page."""
    view = table(judgement).iloc[:, [0, 1, 2, 4, 5]]
    return tables.drawn(_title(judgement), view.rename(columns={view.columns[3]: "difference"}))


def _title(judgement: Judgement) -> str:
    return f"{judgement.scores.title}, {judgement.scores.metric}"


def as_json(judgements: Sequence[Judgement], found: Found) -> dict:
    """Return judgements as plain data; an interval without an end, and what is not known, is null."""
    return {
        "sets": [
            {
                "set": each.scores.title,
                "metric": each.scores.metric,
                "lower_is_better": each.scores.lower_is_better,
                "margin": each.margin * each.scores.point,
                "first": each.first.method,
                "comparisons": each.comparisons,
                "decided": each.is_decided,
                "methods": [_plain(line) for line in each.lines],
            }
            for each in judgements
        ],
        "left_out": list(found.left_out),
    }


def _plain(line: Line) -> dict[str, object]:
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in asdict(line).items()
    }


# --- Files.


def intervals(judgement: Judgement) -> figures.Intervals:
    """Return what a figure shows of a judgement, in points or in the score's own unit."""
    scores, first = judgement.scores, judgement.first
    unit = "points" if scores.point != 1 else scores.metric
    rows = [
        (line.method, line.verdict, *(value / scores.point for value in (line.difference, line.low, line.high)))
        for line in judgement.others
        if math.isfinite(line.low)
    ]
    frame = pd.DataFrame(rows, columns=["method", "verdict", "difference", "low", "high"])
    return figures.Intervals(_title(judgement), f"{unit} from {shortened(first.method, 40)}", judgement.margin, frame)


def write(judgements: Sequence[Judgement], found: Found, out: Path, *, command: str) -> list[Path]:
    """Write what was judged into a folder: verdict.md, .csv and .json, a figure of intervals, and a page of all."""
    folder = out / "report"
    folder.mkdir(parents=True, exist_ok=True)
    by_title = {_title(judgement): table(judgement) for judgement in judgements}
    parts = [f"    {command}"]
    for judgement, (title, frame) in zip(judgements, by_title.items(), strict=True):
        said = "\n".join(f"- {line}" for line in sentences(judgement))
        parts.append(f"## {title}\n\n{said}\n\n{tables.tabulated(frame, 'pipe')}")
    if found.left_out:
        parts.append("Left out:\n\n" + "\n".join(f"- {line}" for line in found.left_out))
    write_atomic(out / "verdict.md", "\n\n".join(parts) + "\n")
    numbers = pd.DataFrame(
        {"set": judgement.scores.title, "metric": judgement.scores.metric} | asdict(line)
        for judgement in judgements
        for line in judgement.lines
    )
    write_atomic(out / "verdict.csv", f"# {command}\n" + numbers.to_csv(index=False))
    gallery, drawn = [], figures.intervals([intervals(judgement) for judgement in judgements])
    if drawn is not None:
        files = save_both(drawn.figure, folder, "intervals")
        caption = (
            "Each line is the interval of a difference, all of them together at 95 %. To the left of 0 a method is "
            "worse; one whose line ends in the hatched strip, within the margin, or to the right of it, is as good."
        )
        gallery.append(figures.Shown("Differences", f"{caption} {drawn.cut}".strip(), tuple(files), drawn.cut))
    leads = [
        f"{_title(judgement)}: {line}" if len(judgements) > 1 else line
        for judgement in judgements
        for line in sentences(judgement)[: None if len(judgements) == 1 else 2]
    ]
    notes = [*dict.fromkeys(line for judgement in judgements for line in sentences(judgement)[1:])]
    whole = page.write_tables(
        out,
        by_title,
        gallery,
        folded={},
        command=command,
        origin=f"Margin: {judgements[0].margin:g}. {notes[-1]}",
        refused=found.left_out,
        leads=leads,
    )
    files = [out / name for name in ("verdict.md", "verdict.csv", "verdict.json")]
    files += [*(file for shown in gallery for file in shown.files), whole]
    write_json(out / "verdict.json", as_json(judgements, found))
    return files
