"""The one task that a finished run is asked about: its own or, of a mixture, the member that was named."""

from __future__ import annotations

from dataclasses import dataclass

from partial_lora.errors import PartialLoraError
from partial_lora.runs import results
from partial_lora.runs.config import with_defaults
from partial_lora.runs.finished import FinishedRun


@dataclass(frozen=True)
class AskedTask:
    """A single task, and where its answers are among what the run's model says.

    member: its name in the run's mixture; None where it is the run's own task.
    settings: the run's, with this task's group `task`.
    labels: the names of its classes; none of a regression, a choice or a generation.
    outputs: the places of its classes among the model's logits; None for all that there are.
    """

    member: str | None
    settings: dict
    labels: list[str]
    outputs: list[int] | None


def asked_task(run: FinishedRun, member: str | None = None, *, of_another: bool = False) -> AskedTask:
    """What a run is asked about.

    of_another: another task than the run's is put to it, which a causal language model, having no heads, answers
    without a member being named. Raises PartialLoraError, in one line that lists the members, for a mixture without
    one, a name that is none of them, and a member of a run that is no mixture.
    """
    task = run.settings["task"]
    members = task.get("members") or {}
    if not members:
        if member is not None:
            raise PartialLoraError(f"--member {member}: the run is of one task, {task['name']}; leave it out")
        return AskedTask(None, run.settings, run.labels(), None)
    if member is None and of_another and task["kind"] != "label":
        return AskedTask(None, run.settings, [], None)
    listed = " or ".join(filter(None, [", ".join(list(members)[:-1]), list(members)[-1]]))
    if member is None:
        raise PartialLoraError(
            f"{run.directory}: the run is of several tasks, one of which is to be named: choose --member {listed}"
        )
    if member not in members:
        raise PartialLoraError(f"--member {member}: no member of the run's mixture, expected --member {listed}")
    settings = with_defaults({**run.settings, "task": members[member]})
    if task["kind"] != "label":
        return AskedTask(member, settings, [], None)
    prefix = f"{settings['task']['name']}/"
    own = {place: label for place, label in enumerate(run.result.get("labels", [])) if label.startswith(prefix)}
    if not own:
        raise PartialLoraError(f"{run.directory / results.RESULT}: no labels of {member} in it; train the run again")
    return AskedTask(member, settings, [label.removeprefix(prefix) for label in own.values()], list(own))
