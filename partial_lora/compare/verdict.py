"""Verdict of a comparison in sentences, and what it may be before the first run; report/sequential.py decides."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import numpy as np
import pandas as pd

from partial_lora.compare.candidates import Candidate, Entrant
from partial_lora.compare.options import Options
from partial_lora.compare.rate_search import SURVIVORS
from partial_lora.errors import PartialLoraError
from partial_lora.files import grouped
from partial_lora.launching import directory
from partial_lora.report import forgetting, predictions, records
from partial_lora.report.forgetting import LOSS, Changes
from partial_lora.report.sequential import (
    AS_GOOD,
    LOOKS,
    OPEN,
    WORSE,
    Decision,
    Decisions,
    Outputs,
    decide,
    fallen,
    shows,
)
from partial_lora.report.statistics import estimate, per_example
from partial_lora.tasks.metrics import GUESSES, LOWER_IS_BETTER, SHARES

PERPLEXITY = "perplexity"  # of which a hundredth of its logarithm, the loss, is a point
NOTHING_MEASURED: Mapping[str, Changes] = {}

_warn_once = functools.cache(logging.getLogger(__name__).warning)  # a comparison looks several times


def results_of(places: Iterable[Path]) -> Path:
    """Return the results directory of runs, each in results_dir/runs/task/model/method-id/seed."""
    return next(iter(places)).parents[4]


def outputs_of(group: Sequence[Entrant], out: Path) -> tuple[Outputs, str, np.ndarray | None]:
    """Return what each test row adds to a score (sequential.Outputs), the metric, and what it adds to that of guessing.

    Without rows: whole scores, and None; None, too, for a metric of texts.
    """
    stored, by_row, whole, metric, guess = predictions.Predictions(out), {}, {}, "", None
    for one in group:
        by_row[one.name], whole[one.name] = {}, {}
        for place, record in one.records.items():
            if record["config"]["trainer"]["learning_rate"] != one.best:
                continue
            row = records.run_of(record, place).row
            metric = row["metric"]
            sign, seed = -1 if metric in LOWER_IS_BETTER else 1, record["seed"]
            whole[one.name][seed] = sign * np.array([math.log(row["test"]) if metric == PERPLEXITY else row["test"]])
            try:
                of_rows = "loss" if metric == PERPLEXITY else metric
                frame = stored.of(row["group"], seed, metric)
                by_row[one.name][seed] = sign * per_example(frame, of_rows)
                guess = sign * guessing(frame, metric) if guess is None and metric in GUESSES else guess
            except (PartialLoraError, KeyError, ValueError) as error:  # not kept, not of this metric, or broken
                if isinstance(error, ValueError):
                    _warn_once("%s; methods are compared by their scores alone", str(error))
                by_row[one.name][seed] = np.array([])
    rows = {len(values) for seeds in by_row.values() for values in seeds.values()}
    return (by_row, metric, guess) if len(rows) == 1 and rows != {0} else (whole, metric, None)


def judged(
    group: Sequence[Entrant], options: Options, forgotten: Mapping[str, Changes] = NOTHING_MEASURED
) -> tuple[Decisions, list[str]]:
    """Return what the runs of a group decide so far, and that in sentences. forgotten: on other sets, at the end."""
    outputs, metric, guess = outputs_of(group, results_of(group[0].records))
    found = decide(outputs, options.margin / 100, looks_of(options))
    leader = outputs[found.leader]
    if guess is not None and found.by_method and not beats(leader, guess):
        sign = -1 if metric in LOWER_IS_BETTER else 1
        score, guessed = (_number(sign * float(np.mean(each)), metric) for each in ([*leader.values()], guess))
        unit = " %" if metric in SHARES else f" of {metric}"
        best = next(one.candidate for one in group if one.name == found.leader)
        line = (
            f"No method has learnt anything that {len(guess):,} test rows would show: {best.method} leads with "
            f"{score}{unit}, and guessing {GUESSES[metric]} for each has {guessed}{unit}. Train longer "
            "(trainer.epochs, trainer.max_steps) or take another model; more seeds would not help."
        )
        return replace(found, next_seeds={}), [line]
    lines = [
        f"{name}: seed {seed} ends {_points(below, metric)} below its other seeds; the verdict counts it as it is."
        for (name, seed), below in fallen(outputs).items()
    ]
    return found, [*sentences_on(group, found, metric, options.margin, options.jobs, forgotten), *lines]


def looks_of(options: Options) -> Sequence[int]:
    """Return the numbers of seeds at which a comparison looks at its runs."""
    return LOOKS if options.seeds is None else (options.seeds,)


def guessing(frame: pd.DataFrame, metric: str) -> np.ndarray:
    """Return what every test row adds (rows,) to the score of the best guess that is the same for all of them."""
    labels = frame["label"]
    guess = labels.mean() if GUESSES[metric] == "the mean" else labels.mode()[0]
    return per_example(frame.assign(prediction=guess, prediction_norm=guess), metric)


def beats(by_seed: Mapping[int, np.ndarray], guess: np.ndarray) -> bool:
    """Return whether scores lie above guessing by more than test rows are likely to bring about (95 %)."""
    d = np.mean(list(by_seed.values()), axis=0) - guess
    return estimate(d[None]).interval()[0] > 0


def tells_apart(later: Path, earlier: Path) -> bool:
    """Return whether validation tells two paused runs apart: the loss of the later one is more by more than chance.

    By the losses of the same rows (95 %). Runs whose rows were not kept are told apart by their mean losses alone.
    """
    try:
        tables = [predictions.read(place / directory.VALIDATION) for place in (later, earlier)]
        d = predictions.losses_of(tables[0]) - predictions.losses_of(tables[1])
    except (OSError, ValueError, LookupError):  # none, broken, or of other rows
        return True
    return estimate(d[None]).interval()[0] > 0


def dropped(progress: Sequence[Entrant]) -> pd.DataFrame:
    """Return a row for each method that went no further than half a run."""
    halves = [(one.name, one.dropped) for one in progress if one.dropped]
    return pd.DataFrame(
        [
            {
                "method": name,
                "best rate": f"{half.rate:g}",
                "validation loss": f"{half.loss:.4g}",
                "place": f"{half.place} of {half.methods}",
            }
            for name, half in halves
        ]
    )


def prospects(candidates: Sequence[Candidate], options: Options) -> list[str]:
    """Return lines on what a comparison takes, and what each of its looks would tell apart on those test rows."""
    looks = looks_of(options)
    groups = grouped(candidates, lambda candidate: candidate.group).values()
    means = [(len(group), fmean(candidate.seconds for candidate in group)) for group in groups]
    times = [
        in_time(sum(mean * options.runs_of(methods, seeds) for methods, mean in means) / options.jobs)
        for seeds in looks
    ]
    between = times[0] if times[0] == times[-1] else f"{times[0]} to {times[-1]}, as interim analyses decide or not"
    lines = [f"expected: {between}; jobs={options.jobs}, margin={options.margin:g}"]
    methods = max(SURVIVORS if options.is_race(methods) else methods for methods, _ in means)
    metric = next((each.timed["metrics"]["test"]["primary"] for each in candidates if each.timed), None)
    if methods > 1 and metric in SHARES:
        rows = min(candidate.tested for candidate in candidates)
        gaps = ", ".join(
            f"{100 * shows(methods, rows, seeds, looks):.1f} points by {seeds} seeds ({time})"
            for seeds, time in zip(looks, times, strict=True)
            if seeds > _TOO_FEW
        )
        lines += [f"gaps that would be told apart on {rows:,} test rows: {gaps}"] if gaps else []
    return lines


def in_time(seconds: float) -> str:
    """Return a time with its unit."""
    return f"{seconds / 3600:.1f} hours" if seconds >= 5400 else f"{max(1, round(seconds / 60))} min"


_TOO_FEW = 2  # seeds: their interval may be as wide as the metric


def sentences_on(
    group: Sequence[Entrant],
    found: Decisions,
    metric: str,
    margin: float,
    jobs: int,
    forgotten: Mapping[str, Changes] = NOTHING_MEASURED,
) -> list[str]:
    """Return the verdict on a group, a sentence or two a line. margin: in points. jobs: runs that are made at once."""
    changes = forgetting.judged(forgotten, found.leader)
    by_name = {one.name: one for one in group}
    short = {one.name: one.candidate.method for one in group}
    leader, best = found.leader, by_name[found.leader]
    by_verdict = {verdict: [] for verdict in (WORSE, AS_GOOD, OPEN)}
    for name, decision in found.by_method.items():
        if name != leader:
            by_verdict[decision.verdict].append((name, decision))
    if len(group) == 1:
        alone = f"{short[leader]} stands alone: learning rate {best.best:g}"
        return [alone, *_of_leader(short[leader], leader, forgotten, changes)]
    unjudged = by_name.keys() - found.by_method.keys() - {leader}  # seeds are missing
    lines = [
        f"Take {short[leader]} (learning rate {best.best:g}): nothing is better."
        if not by_verdict[OPEN] and not unjudged
        else f"{short[leader]} leads (learning rate {best.best:g}), and not all is decided."
    ]
    most = max((decision.seeds for decision in found.by_method.values()), default=0)
    for name, decision in by_verdict[WORSE]:
        dropped = "dropped " if decision.seeds < most else ""
        apart = f"{short[decision.against]} by {_apart(decision, metric)}"
        less = _forgets(name, short[leader], forgotten, changes)
        lines.append(f"{short[name]} is worse than {apart}, {dropped}after {_seeds(decision)}{less}.")
    for name, decision in by_verdict[AS_GOOD]:
        cheaper = _cheaper(by_name[name].candidate, by_name[decision.against].candidate)
        alike = f"as good as {short[decision.against]} within {_points(margin / 100, metric)}"
        less = _forgets(name, short[leader], forgotten, changes)
        lines.append(f"{short[name]} is {alike} ({_apart(decision, metric)} below){cheaper}{less}.")
    for name, decision in by_verdict[OPEN]:
        then = _what_decides(decision, by_name[name], by_name[decision.against], found.next_seeds.get(name), jobs)
        if decision.seeds <= _TOO_FEW:
            tell = f"{_seeds(decision)} tell{'s' * (decision.seeds == 1)} nothing yet"
            apart = _points(decision.difference, metric)
        else:
            tell, apart = f"not decided after {_seeds(decision)}", _apart(decision, metric)
        less = _forgets(name, short[leader], forgotten, changes)
        lines.append(f"{short[name]}: {tell}, {apart} below {short[decision.against]}{less}; {then}")
    missing = found.next_seeds
    lines += [f"{short[name]}: not decided, it lacks some of {missing[name]} seeds." for name in sorted(unjudged)]
    return lines + _of_leader(short[leader], leader, forgotten, changes)


def _forgets(name: str, leader: str, forgotten: Mapping[str, Changes], changes: Mapping[str, Mapping]) -> str:
    """Return what a method is told apart by from the leader on other sets."""
    told = [(of_set, changes[of_set][name]) for of_set in changes if name in changes[of_set]]
    parts = [
        f"{change.verdict} of {of_set} than {leader}, by "
        + _interval(abs(change.less), *sorted((abs(change.less_low), abs(change.less_high))), forgotten[of_set].metric)
        for of_set, change in told
        if change.verdict != OPEN
    ]
    return f", and {', and '.join(parts)}" if parts else ""


def _of_leader(method: str, leader: str, forgotten: Mapping[str, Changes], changes: Mapping[str, Mapping]) -> list[str]:
    """Return a line on each other set: what the untouched model scores there, and what the leader changes of it."""
    return [
        f"On {of_set} the untouched model has {_points(forgotten[of_set].before, forgotten[of_set].metric)}; {method} "
        f"changes that by {_interval(change.change, change.low, change.high, forgotten[of_set].metric)}."
        for of_set, by_method in changes.items()
        if (change := by_method.get(leader))
    ]


def _what_decides(decision: Decision, one: Entrant, other: Entrant, next_look: int | None, jobs: int) -> str:
    """Return what would decide what is open: seeds and their time, or a wider margin. next_look: its seeds, if any."""
    if next_look is not None and (decision.wants or 0) <= next_look:
        return f"it goes on to {next_look} seeds."
    if decision.wants is not None and decision.wants > decision.seeds:
        seconds = (one.seconds + other.seconds) * (decision.wants - decision.seeds) / jobs
        return f"some {decision.wants} seeds would decide ({in_time(seconds)} more)."
    if decision.seeds <= _TOO_FEW:
        return "more seeds or test rows would."
    margin = f"margin={100 * decision.high + 0.05:.1f} is met"
    return f"no number of seeds would be likely to decide, more test rows might; {margin}."


def _seeds(decision: Decision) -> str:
    return "1 seed" if decision.seeds == 1 else f"{decision.seeds} seeds"


def _apart(decision: Decision, metric: str) -> str:
    return _interval(decision.difference, decision.low, decision.high, metric)


def _interval(value: float, low: float, high: float, metric: str) -> str:
    if math.isnan(low):
        return _points(value, metric)
    most = 1 if metric in SHARES else math.inf
    low, high = (_number(min(max(end, -most), most), metric) for end in (low, high))
    return f"{_points(value, metric)} [{low}, {high}]"


def _number(value: float, metric: str) -> str:
    text = f"{100 * value:.1f}" if metric in SHARES or metric == PERPLEXITY else f"{value:.3g}"
    return text.replace("-", "−")


def _points(value: float, metric: str) -> str:
    number = _number(value, metric)
    if metric in SHARES:
        return f"{number} point{'' if number == '1.0' else 's'}"
    if metric == LOSS:
        return f"{number} nats"
    return f"{number} % of perplexity" if metric == PERPLEXITY else f"{number} of {metric}"


def _cheaper(candidate: Candidate, leader: Candidate) -> str:
    """Return what a candidate that is as good takes less of than the leader."""
    less = {
        "a smaller file": (candidate.served, leader.served),
        "a faster step": (candidate.step_seconds or 0, leader.step_seconds or 0),
    }
    names = [name for name, (cost, other) in less.items() if 0 < cost < 0.9 * other]
    return f", with {' and '.join(names)}" if names else ""
