"""A table of methods by tasks put together: what is read of its numbers, and what has to be said of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from partial_lora.comparison import MARGIN
from partial_lora.evidence import differences, pivot
from partial_lora.evidence.across import EXAMPLES, NOTHING, SEEDS
from partial_lora.evidence.artefact import Artefact
from partial_lora.evidence.recorded import Evidence, draw_of
from partial_lora.report import origin
from partial_lora.runs import NONE

_INTERVAL = (
    "Differences are paired by seed and test example, with 95 % intervals of a bootstrap over both within each task; "
    f"better: the interval is above zero; matches: it is above −{100 * MARGIN:g} point; worse: it is below zero, and "
    "not above that; undecided: else, and of one seed always."
)
_EACH = (
    "Each interval is at 95 % by itself, and not corrected for there being {count} of them; of three seeds that differ "
    "much it is too narrow (a simulation, docs/methods.md: it held the truth in 84 to 99 %)."
)
_AVERAGE = (
    "An average over tasks is of these tasks alone, each counting alike; seeds are drawn once for all, since one has "
    "the same masks on each."
)
_OVER = {
    SEEDS: "Where differences are over seeds alone, predictions were not kept (or are of other examples), and the "
    "interval is Student's t.",
    EXAMPLES: "Where differences are over examples alone, there is one seed, and how much seeds differ is not known.",
    NOTHING: "Of one seed without predictions there is no interval.",
}
_BEST = "Bold: better than every other of its task and operating point, by such an interval."


def assembled(
    name: str,
    title: str,
    claim: str,
    verdict: str,
    numbers: pd.DataFrame,
    runs: pd.DataFrame,
    evidence: Evidence,
    missing: Sequence[str],
    notes: Iterable[str] = (),
    shown: Mapping[str, pd.DataFrame] | None = None,
) -> Artefact:
    """The table of scores, sizes and differences of runs (or what is shown in their place), with its notes."""
    if shown is None:
        compared = differences.readable(numbers)
        shown = pivot.readable(numbers) | ({"Differences": compared} if len(compared) else {})
    said = [*notes, *_notes(numbers), *learning_rates(runs), *shared_calibrations(runs), *left_out(runs, evidence)]
    return Artefact(name, title, claim, verdict, numbers, shown, tuple(said), tuple(missing), of_runs(runs))


def of_runs(runs: pd.DataFrame) -> str:
    """What made the runs of a table; nothing of none."""
    return origin(runs.fillna(dict.fromkeys(("preset", "commit", "device"), NONE))) if len(runs) else ""


def _notes(numbers: pd.DataFrame) -> list[str]:
    compared = differences.of_differences(numbers)
    scores = numbers[numbers["part"] == pivot.PART]
    notes = [_BEST] if len(scores) and scores["best"].any() else []
    if len(compared):
        notes += [_INTERVAL, _EACH.format(count=len(compared))]
        notes += [_AVERAGE] if (compared["task"] == differences.AVERAGE).any() else []
        over = {word for words in compared["over"] for word in words.split("; ")}
        notes += [said for word, said in _OVER.items() if word in over]
    if at_ceiling := pivot.saturated(numbers):
        tasks = ", ".join(at_ceiling)
        notes.append(f"Every adapter is at 98 % or above on {tasks}: such a task tells little apart.")
    return notes


def learning_rates(runs: pd.DataFrame) -> list[str]:
    """A line for every rate and task of a model whose runs had several learning rates; tasks that agree share one."""
    notes = []
    for model, of_model in runs.groupby("model", sort=False):
        if of_model["learning_rate"].nunique() < 2:
            continue
        tasks: dict[str, list[str]] = {}
        names = of_model["task"].where(of_model["mixture"] == "", of_model["mixture"])
        for task, part in of_model.groupby(names, sort=False):
            tasks.setdefault(_by_rate(part), []).append(task)
        notes += [f"Learning rates of {model} on {', '.join(on)}: {said}." for said, on in tasks.items()]
    return notes


def _by_rate(runs: pd.DataFrame) -> str:
    who: dict[float, list[str]] = {}
    several = len(set(runs["importance"]) - {NONE}) > 1
    for (method, measure, point), own in runs.groupby(["method", "importance", "operating_point"], sort=False):
        where = ", ".join(word for word in ((measure, point) if several else (point,)) if word != NONE)
        for rate in sorted(set(own["learning_rate"])):
            who.setdefault(rate, []).append(f"{method} ({where})" if where else method)
    return "; ".join(f"{rate:g}: {', '.join(dict.fromkeys(who[rate]))}" for rate in sorted(who))


def shared_calibrations(runs: pd.DataFrame) -> list[str]:
    """A line that names the tasks on which seeds share a calibration, whose variance an interval then lacks."""
    known = runs[runs["importance"] != NONE]
    tasks = known["task"].where(known["mixture"] == "", known["mixture"])
    named = []
    for task, of_task in known.groupby(tasks, sort=False):
        shared = [
            measure
            for (measure, _), own in of_task.groupby(["importance", "method"], sort=False)
            if len(set(map(draw_of, own["config"]))) < own["seed"].nunique()
        ]
        shared = list(dict.fromkeys(shared))
        every = len(shared) == of_task["importance"].nunique()
        named += [task if every else f"{task} ({', '.join(shared)})"] if shared else []
    if not named:
        return []
    return [f"On {', '.join(named)} seeds share a calibration, whose own variance the intervals do not hold."]


def left_out(runs: pd.DataFrame, evidence: Evidence) -> list[str]:
    """The notes of the evidence that are of a table's tasks, or of tasks that no table has any runs of."""
    tasks = set(runs["task"]) | set(runs["mixture"]) | (set(evidence.runs["task"]) - set(evidence.kept["task"]))
    named = [re.compile(rf"(?<![\w+]){re.escape(task)}(?![\w+])") for task in tasks if task]
    return [note for note in evidence.notes if any(name.search(note) for name in named)]
