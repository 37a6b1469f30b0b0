"""Which runs are compared with which: those of one place, under the same conditions, with the plainest of a method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

from partial_lora.report.conditions import conditions, differences, of_method
from partial_lora.report.grouping import point_order
from partial_lora.report.runs import NONE, Run
from partial_lora.runs.identity import defaults, flatten

_MOST_REFERENCES = 3  # of one place, each of which every other method is compared with
_COMPARED_BY = {"accuracy", "accuracy_norm", "mse", "exact_match", "rouge_l", "f1", "matthews", "pearson", "spearman"}
_MOST_NAMED = 5

Key = TypeVar("Key")


@dataclass(frozen=True, eq=False)
class Folder:
    """The runs of a folder, which differ in their seed alone."""

    name: str
    runs: Sequence[Run]

    @property
    def row(self) -> dict:
        return self.runs[0].row

    @property
    def settings(self) -> dict:
        return self.runs[0].record["config"]

    @property
    def seeds(self) -> list[int]:
        return [run.row["seed"] for run in self.runs]

    @cached_property
    def conditions(self) -> dict[str, object]:
        return conditions(self.runs[0].record)


@dataclass
class Pairing:
    """Each folder with the reference that it is compared with, references with themselves first.

    apart: why no pair was made, and the folders that this concerns. remarks: what a reader should know of how the pairs
    were chosen, a line each.
    """

    pairs: list[tuple[Folder, Folder]] = field(default_factory=list)
    apart: dict[str, list[str]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def folders(found: Sequence[Run]) -> list[Folder]:
    """Runs by folder, in the order in which these are met; a folder whose seeds differ in precision is several."""
    alike = _gathered(found, lambda run: (run.row["group"], run.row["precision"]))
    return [Folder(name, runs) for (name, _), runs in alike.items()]


def paired(known: Sequence[Folder], reference: str) -> Pairing:
    """Who is compared with whom: `reference` with all others of its task, model, operating point and conditions.

    Methods that are not calibrated are compared at all points, those that are with references of the same measure of
    importance, the plainest measure first. A run that was repaired or whose masks have a seed of their own is no
    reference beside others. Of up to three references of a measure each is taken, of more the one whose own settings
    are nearest to the schema's.
    """
    made = Pairing()
    for place in _gathered(known, lambda each: (each.row["task"], each.row["model"])).values():
        references = [each for each in place if each.row["method"] == reference]
        if references and (why := _not_by_examples(references[0])):
            made.remarks.append(why)
            continue
        apart: dict[tuple[str, str], list[str]] = {}
        by_point = _gathered(references, lambda each: each.row["operating_point"])
        for point, of_point in sorted(by_point.items(), key=lambda item: point_order(item[0])):
            at_point = [each for each in place if each.row["operating_point"] in (point, NONE)]
            alike = _gathered(of_point, lambda each: each.row["conditions"])
            of_measure = _gathered(of_point, lambda each: (each.row["conditions"], _measure(each)))
            for (shared, measure), several in sorted(of_measure.items(), key=_plainness):
                own = [each for each in at_point if each.row["conditions"] == shared]
                own = [each for each in own if each.row["operating_point"] == NONE or _measure(each) == measure]
                several = [each for each in several if not _is_variant(each)] or several
                for base in _chosen(several, made):
                    made.pairs += [(each, base) for each in (base, *(each for each in own if each is not base))]
            for each in at_point:
                if each.row["conditions"] not in alike:
                    apart.setdefault((each.name, _apart(each, of_point)), []).append(point)
        for (name, said), points in apart.items():
            what = f"trained under other conditions than {reference} at {' and '.join(points)}: {said}"
            made.apart.setdefault(what, []).append(name)
    return made


def _measure(folder: Folder) -> str | None:
    return (folder.settings.get("importance") or {}).get("name")


def _is_variant(folder: Folder) -> bool:
    """Whether a run is there to be set beside its like: other masks of one seed, repaired sparsities."""
    settings = folder.settings
    moved = (settings.get("mask") or {}).get("seed") is not None
    return moved or bool((settings.get("calibration") or {}).get("repair"))


def _plainness(item: tuple[tuple[str, str | None], Sequence[Folder]]) -> tuple[bool, int]:
    """What folders of a measure are ordered by: the schema's own measure first, and then the plainest."""
    (_, measure), several = item
    return measure != defaults()["importance.name"], _changes(several)


def _changes(several: Sequence[Folder]) -> int:
    """How many settings of its own the plainest of some folders has that the schema has not."""
    return min(len(of_method(each.settings)) for each in several)


def _gathered(each: Iterable, key: Callable[[object], Key]) -> dict[Key, list]:
    """Things by what they share, in the order in which that is met."""
    gathered: dict[Key, list] = {}
    for one in each:
        gathered.setdefault(key(one), []).append(one)
    return gathered


def _not_by_examples(folder: Folder) -> str | None:
    """Why nothing of a task can be compared example by example; None where it can."""
    task, metric = folder.row["task"], folder.row["metric"]
    if folder.settings["task"].get("members"):
        return f"{task}: a mixture; `partial-lora evaluate RUN --member NAME` says how each of its members is done"
    if metric not in _COMPARED_BY:
        return f"{task}: measured by {metric}, which predictions do not say"
    return None


def _chosen(several: Sequence[Folder], made: Pairing) -> list[Folder]:
    """The references that others are compared with; that they are some of many is remarked."""
    if len(several) <= _MOST_REFERENCES:
        return list(several)
    plainest = [each for each in several if _changes([each]) == _changes(several)]
    names = ", ".join(each.name for each in plainest[:_MOST_NAMED])
    if len(plainest) > _MOST_REFERENCES:
        more = len(plainest) - _MOST_NAMED
        names += f" and {more} more" if more > 0 else ""
        made.apart.setdefault(_too_many(plainest), []).append(names)
        return []
    made.remarks.append(f"{names}: compared with, of {len(several)} whose own settings are further from the defaults")
    return plainest


def _apart(folder: Folder, references: Sequence[Folder]) -> str:
    """In what a folder's conditions differ from those of the reference that is nearest to them."""
    said = [differences(folder.conditions, each.conditions) for each in references]
    return min(said, key=lambda each: each.count(" against "))


def _too_many(references: Sequence[Folder]) -> str:
    settings = [{key: str(value) for key, value in flatten(each.settings).items()} for each in references]
    keys = sorted({key for each in settings for key in each} - {"seed", "results_dir", "overwrite", "keep_records"})
    varied = [key for key in keys if len({each.get(key) for each in settings}) > 1]
    choose = f"choose with --where {varied[0]}=…" if varied else "they have the same settings"
    return f"{len(references)} to compare with, expected at most {_MOST_REFERENCES}; {choose}"
