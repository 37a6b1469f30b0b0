"""A finished run, as the commands that use one take it; torch is not needed to know what it is."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from partial_lora.errors import PartialLoraError
from partial_lora.runs import directory as results
from partial_lora.runs.config import load
from partial_lora.runs.schema import Config


@dataclass(frozen=True)
class FinishedRun:
    """A run that ended well: its directory, its settings and its record.

    Settings that were recorded before a key was there have its default.
    """

    directory: Path
    config: Config
    result: dict

    @property
    def adapter(self) -> Path:
        """The folder of the trained adapter."""
        return self.directory / results.ADAPTER

    @property
    def method(self) -> str:
        return self.config.method.name

    @property
    def is_masked(self) -> bool:
        """Whether its adapter has masks."""
        return (self.adapter / "partial_lora.json").is_file()

    def labels(self) -> list[str]:
        """The names of the classes, in the order of the logits; of a regression none.

        A record that was made before labels were kept has them in its predictions alone, where a class that no test row
        has and that was never predicted is called by its index.
        """
        if "labels" in self.result:
            return list(self.result["labels"])
        import pandas

        path = self.directory / results.PREDICTIONS
        try:
            frame = pandas.read_parquet(path)
            names = dict(zip(frame["label"], frame["label_name"], strict=True))
            names |= dict(zip(frame["prediction"], frame["prediction_name"], strict=True))
            return [str(names.get(index, index)) for index in range(len(frame["logits"].iloc[0]))]
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            reason = " ".join(str(error).split())
            raise PartialLoraError(f"{path} cannot be read ({reason}): run the training again") from error


def finished_run(directory: Path) -> FinishedRun:
    """The finished run in a directory.

    Raises PartialLoraError, in one line, for a directory that holds no run, a run that failed, was interrupted or has
    only calibrated, and one that has lost files.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise PartialLoraError(f"{directory}: no such directory, expected that of a run (results/runs/…/seed0)")
    if not (directory / results.RESULT).is_file():
        raise PartialLoraError(f"{directory}: expected the directory of a run, with a {results.RESULT} in it")
    result = results.read_result(directory)
    if result is None:
        raise PartialLoraError(f"{directory / results.RESULT}: no record of a run, or a broken one")
    if result["status"] != "finished":
        said = f" ({result['error']})" if result.get("error") else ""
        raise PartialLoraError(f"{directory}: the run is {result['status']}{said}, expected a finished one")
    if not result.get("metrics"):
        raise PartialLoraError(f"{directory}: only calibrated, nothing was trained; `partial-lora train` makes a run")
    lost = results.lost(directory, result)
    if lost:
        raise PartialLoraError(
            f"{directory}: {lost}; the same `partial-lora train` with overwrite=true does the run again"
        )
    settings = result.get("config")
    try:
        _ = settings["model"]["architecture"], settings["method"]["name"], settings["seed"]
        return FinishedRun(directory, load(settings), result)
    except (KeyError, TypeError) as error:
        raise PartialLoraError(f"{directory / results.RESULT}: no settings of a run in it") from error


# --- The one task that a finished run is asked about: its own or, of a mixture, the member that was named.


@dataclass(frozen=True)
class AskedTask:
    """A single task, and where its answers are among what the run's model says.

    member: its name in the run's mixture; None where it is the run's own task.
    config: the run's settings, with this task.
    labels: the names of its classes; none of a regression, a choice or a generation.
    outputs: the places of its classes among the model's logits; None for all that there are.
    """

    member: str | None
    config: Config
    labels: list[str]
    outputs: list[int] | None


def asked_task(run: FinishedRun, member: str | None = None, *, of_another: bool = False) -> AskedTask:
    """What a run is asked about.

    of_another: another task than the run's is put to it, which a causal language model, having no heads, answers
    without a member being named. Raises PartialLoraError, in one line that lists the members, for a mixture without
    one, a name that is none of them, and a member of a run that is no mixture.
    """
    task = run.config.task
    members = task.members or {}
    if not members:
        if member is not None:
            raise PartialLoraError(f"--member {member}: the run is of one task, {task.name}; leave it out")
        return AskedTask(None, run.config, run.labels(), None)
    if member is None and of_another and task.kind != "label":
        return AskedTask(None, run.config, [], None)
    listed = " or ".join(filter(None, [", ".join(list(members)[:-1]), list(members)[-1]]))
    if member is None:
        raise PartialLoraError(
            f"{run.directory}: the run is of several tasks, one of which is to be named: choose --member {listed}"
        )
    if member not in members:
        raise PartialLoraError(f"--member {member}: no member of the run's mixture, expected --member {listed}")
    config = replace(run.config, task=members[member])
    if task.kind != "label":
        return AskedTask(member, config, [], None)
    prefix = f"{config.task.name}/"
    own = {place: label for place, label in enumerate(run.result.get("labels", [])) if label.startswith(prefix)}
    if not own:
        raise PartialLoraError(f"{run.directory / results.RESULT}: no labels of {member} in it; train the run again")
    return AskedTask(member, config, [label.removeprefix(prefix) for label in own.values()], list(own))
