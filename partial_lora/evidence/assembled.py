"""A table of methods by tasks put together: what is read of its numbers, and what has to be said of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import pandas as pd

from partial_lora.comparison import MARGIN
from partial_lora.evidence import differences, pivot
from partial_lora.evidence.across import EXAMPLES, NOTHING, SEEDS
from partial_lora.evidence.artefact import Artefact
from partial_lora.evidence.recorded import Evidence
from partial_lora.report import origin
from partial_lora.runs import NONE

_INTERVAL = (
    "Differences are paired by seed and test example, with 95 % intervals of a bootstrap over both within each task; "
    f"better: the interval is above zero; matches: it is above −{100 * MARGIN:g} point; worse: it is below zero, and "
    "not above that; undecided: else, and of one seed always."
)
_AVERAGE = "An average over tasks is of these tasks alone, each counting alike."
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
    said = [*notes, *_notes(numbers), *left_out(runs, evidence)]
    return Artefact(name, title, claim, verdict, numbers, shown, tuple(said), tuple(missing), of_runs(runs))


def of_runs(runs: pd.DataFrame) -> str:
    """What made the runs of a table; nothing of none."""
    return origin(runs.fillna(dict.fromkeys(("preset", "commit", "device"), NONE))) if len(runs) else ""


def _notes(numbers: pd.DataFrame) -> list[str]:
    compared = differences.of_differences(numbers)
    scores = numbers[numbers["part"] == pivot.PART]
    notes = [_BEST] if len(scores) and scores["best"].any() else []
    if len(compared):
        notes += [_INTERVAL, *([_AVERAGE] if (compared["task"] == differences.AVERAGE).any() else [])]
        over = {word for words in compared["over"] for word in words.split("; ")}
        notes += [said for word, said in _OVER.items() if word in over]
    if at_ceiling := pivot.saturated(numbers):
        tasks = ", ".join(at_ceiling)
        notes.append(f"Every adapter is at 98 % or above on {tasks}: such a task tells little apart.")
    return notes


def left_out(runs: pd.DataFrame, evidence: Evidence) -> list[str]:
    """The notes of the evidence that are of a table's tasks, or of tasks that no table has any runs of."""
    tasks = set(runs["task"]) | set(runs["mixture"]) | (set(evidence.runs["task"]) - set(evidence.kept["task"]))
    return [note for note in evidence.notes if any(task and task in note for task in tasks)]
