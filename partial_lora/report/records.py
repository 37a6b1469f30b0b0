"""The records of finished runs as rows of a table, and the rule for which of them may stand beside each other.

Nothing is typed by hand and nothing is measured again: every number is one of a result.json.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from partial_lora.errors import PartialLoraError, shortlist
from partial_lora.files import flatten, read_json
from partial_lora.launching import packs
from partial_lora.launching.directory import INTERRUPTED, PREDICTIONS, RESULT
from partial_lora.masks import AXES, Sparsity
from partial_lora.methods import called
from partial_lora.settings import identity, schema, stored, tuned
from partial_lora.tasks.folders import FILES
from partial_lora.tasks.metrics import LOWER_IS_BETTER, OF_ALL_TOGETHER, OF_EXAMPLES, OF_TEXTS

if TYPE_CHECKING:  # a second to import; a list of runs and the summary of a run do without
    import pandas as pd

NONE = tuned.NO_POINT  # for what does not apply
LEVEL = 0.95  # of every interval
COSTS = ("adapter_bytes", "optimizer_bytes", "step_seconds", "saved_activation_bytes")
_ROWS_COLUMNS = "rows_columns"  # the granularity of masks that a method's name leaves out

T = TypeVar("T")
Key = TypeVar("Key")


# Runs


@dataclass(frozen=True)
class Run:
    """A finished run: the directory that it has or had, its record, and its numbers as tables have them (`row`)."""

    directory: Path
    record: dict
    row: dict


class UnfinishedError(ValueError):
    """A record of a run that failed, has not ended or only calibrated."""


@dataclass(frozen=True)
class LeftOut:
    """A record that is not among the runs: its path below the results directory, and why.

    is_broken: the record cannot be read or is not the run's; else the run failed, has not ended or only calibrated.
    """

    path: str
    why: str
    is_broken: bool

    def __str__(self) -> str:
        return f"{self.path}: {self.why}"


def read(results_dir: Path) -> tuple[list[Run], list[LeftOut]]:
    """Return the finished runs of a results directory, packed ones among them, and what was left out.

    A row's group is the folder that runs of other seeds share. A run that failed, has not finished or only calibrated
    is left out, and so is a result.json that is broken, foreign or copied from another run. Raises PartialLoraError
    where the directory holds no runs at all.
    """
    results_dir = Path(results_dir)
    directories = packs.directories(results_dir)
    if not directories:
        raise PartialLoraError(f"{results_dir}: expected runs in {results_dir}/runs; `partial-lora train` makes them")
    runs, problems = [], []
    for directory in directories:
        try:
            run = run_of(record(directory), directory, str(directory.parent.relative_to(results_dir)))
            if directory.name != f"seed{run.row['seed']}":
                raise ValueError(f"a copy of another run, its seed is {run.row['seed']}")
            runs.append(run)
        except ValueError as error:
            path = f"{directory.relative_to(results_dir)}/{RESULT}"
            problems.append(LeftOut(path, str(error), not isinstance(error, UnfinishedError)))
    runs.sort(key=lambda run: (run.directory.parent, run.row["seed"]))  # seed10 after seed9
    return runs, problems


def one(directory: Path) -> Run:
    """Return the finished run of a directory; raises PartialLoraError, naming its record, where there is none."""
    directory = Path(directory)
    try:
        return run_of(record(directory), directory)
    except ValueError as error:
        raise PartialLoraError(f"{directory / RESULT}: {error}") from error


def run_of(result: dict, directory: Path, group: str | None = None) -> Run:
    """Return a record as a run, wherever its directory is; raises ValueError as `row` does.

    group: the directory's parent where none is named.
    """
    return Run(directory, result, {"group": group or directory.resolve().parent.name} | row(result))


def table(runs: Sequence[Run]) -> pd.DataFrame:
    """Return the rows of runs; `differs` is what tells them apart, `usual` whether they are under usual conditions."""
    import pandas as pd

    every = folders(runs)
    usual, differs = usual_conditions(every), told_apart(every)
    return pd.DataFrame(
        [
            run.row
            | {
                "differs": differs[run.row["group"], run.row["precision"]],
                "usual": run.row["conditions"] == usual[panel_of(run.row)].row["conditions"],
            }
            for run in runs
        ]
    )


def record(directory: Path) -> dict:
    """Return the record of a finished run, in today's terms; raises ValueError that says what is there instead.

    For a run that has not finished it is an UnfinishedError.
    """
    try:
        result = read_json(directory / RESULT)
    except FileNotFoundError as error:
        result = packs.packed(directory)
        if result is None:
            raise UnfinishedError("missing, the run never started or was interrupted") from error
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ValueError("broken, not JSON") from error
    if not isinstance(result, dict) or "status" not in result:
        raise ValueError("foreign, no record of a run")
    if result["status"] != "finished":
        detail = f": {result['error']}" if result.get("error") else ""
        raise UnfinishedError(INTERRUPTED if result.get("error") == INTERRUPTED else f"{result['status']}{detail}")
    if not result.get("metrics"):
        raise UnfinishedError("calibrated only, nothing was trained")
    history = result.get("history", [])
    if not isinstance(history, list) or not all(isinstance(entry, dict) for entry in history):
        raise ValueError("foreign, its history is no list of steps")
    return stored.upgraded(result)


def row(result: Mapping) -> dict:
    """Return one run as a row of plain numbers; raises ValueError for a record that lacks one or has another shape.

    conditions: eight hex digits, the same for runs that may be compared (`conditions`).
    """
    try:
        return _row(result)
    except KeyError as error:
        raise ValueError(f"foreign, no {error.args[0]} in it") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"foreign, not the fields of a run ({error})") from error


def _on_validation(scores: Mapping, metric: str) -> float:
    """Return the score on validation by which rows of a test metric are chosen, NaN where there is none.

    Validation writes no texts: a generation is chosen by its perplexity, negated where more of `metric` is better.
    """
    chosen = metric if metric in scores else scores.get("primary")
    score = number(scores.get(chosen))
    return score if (chosen in LOWER_IS_BETTER) == (metric in LOWER_IS_BETTER) else -score


def _row(result: Mapping) -> dict:
    config, test, parameters = result["config"], result["metrics"]["test"], result["parameters"]
    validation = result["metrics"].get("validation") or {}
    seconds, calibration, cost = result["seconds"], result["calibration"], result.get("cost") or {}
    metric = test["primary"]
    if test[metric] is None or not math.isfinite(test[metric]):
        raise ValueError(f"broken, its test {metric} is {test[metric]}")
    # AdaLoRA's size is what it has left, as in its paper; that it began with more shows in its bytes.
    dense, size = parameters["adapter_dense"], parameters.get("adapter_final", parameters["adapter_trainable"])
    reused = bool(calibration and calibration.get("cached"))
    shared = json.dumps(conditions(result), sort_keys=True, default=str)
    return {
        "seed": result["seed"],
        "task": task_of(result),
        "model": config["model"]["name"],
        "method": method_of(result),
        "operating_point": operating_point(result),
        "metric": metric,
        "test": float(test[metric]),
        "validation": _on_validation(validation, metric),
        "validation_loss": number(validation.get("loss")),
        "adapter_parameters": size,
        "adapter_dense": dense,
        "share_of_dense": size / dense if dense else math.nan,
        "head_parameters": parameters["head"],
        "adapter_sparsity": number(parameters["adapter_sparsity"]),
        **{name: number(cost.get(name)) for name in COSTS},
        "calibrate_seconds": math.nan if calibration is None or reused else number(seconds["calibrate"]),
        "calibration_reused": reused,
        "train_seconds": number(seconds["train"]),
        "evaluate_seconds": number(seconds["evaluate"]),
        "seconds": sum(seconds.values()),
        "learning_rate": float({**config["trainer"], **came_to(result)}["learning_rate"]),
        "tuning": result.get("tuning", "untuned"),
        "conditions": hashlib.sha256(shared.encode()).hexdigest()[:8],
        "preset": result.get("preset") or NONE,
        # What computed it: the commit of a checkout, else the version of the installed package.
        "commit": (result.get("git_commit") or "")[:12] or f"partial-lora {result['versions']['partial-lora']}",
        "device": result.get("device") or NONE,
        "precision": precision(result),
    }


def warnings_of(record: Mapping) -> list[str]:
    """Return the warnings of a run, about its settings, rows and calibration, a sentence each."""
    return [*record.get("warnings", []), *((record["calibration"] or {}).get("warnings") or [])]


def task_of(result: Mapping) -> str:
    """Return the name of a run's task; of a user's own files with that of the file or folder, where it is another.

    A file that is called as its split is, such as signs/train.parquet, goes by the name of its folder.
    """
    task = result["config"]["task"]
    files = task.get("data_files") if task.get("path") == FILES else None
    path = Path((files.get("train") if isinstance(files, Mapping) else files) or "")
    path = path.parent if path.stem.lower() == "train" else path
    is_told = task["name"] in (path.name, path.stem)
    return task["name"] if is_told or not path.name else f"{task['name']} ({path.name})"


def method_of(result: Mapping) -> str:
    """Return the name of a run's method, with what it masks where that is not rows and columns."""
    name, mask = result["config"]["method"]["name"], result["config"].get("mask") or {}
    masks = "frozen" if mask.get("columns") == "frozen" else mask.get("granularity", _ROWS_COLUMNS)
    unmasked = result.get("calibration") is None and result.get("fixed") is None
    told = masks == _ROWS_COLUMNS or called(name).granularities == (masks,)  # by its name
    return name if told or unmasked else f"{name} ({masks})"


def came_to(result: Mapping) -> dict[str, float | None]:
    """Return the keys of the trainer that a run set for itself, `trainer.learning_rate=auto`, and what they came to."""
    return {key: value for key, value in (result.get("training") or {}).items() if key.endswith("learning_rate")}


def operating_point(result: Mapping) -> str:
    """Return where on the curve of accuracy against size a run was put: "threshold 0.9", "budget 0.13", or "–"."""
    if result["calibration"] is None:
        return tuned.operating_point(result["fixed"]) if result.get("fixed") else NONE
    settings = result["config"]["calibration"]
    own = result["calibration"] if settings.get("file") else settings  # a file has its own point
    return tuned.operating_point(own)


def precision(result: Mapping) -> str:
    """Return the number format that a run was computed in: "fp32", "bf16" or "fp16"."""
    computed_in = result.get("mixed_precision") or "no"  # runs whose records are older than the field used fp32
    return "fp32" if computed_in == "no" else computed_in


def number(value: float | None) -> float:
    """Return a number as a float; NaN for one that does not apply, which averages leave out."""
    return math.nan if value is None else float(value)


def depth_of(module: str) -> tuple[str, tuple[int, ...]]:
    """Return a module's kind and depth, by its name: "m.blocks.3.attn.qkv" is ("m.blocks.attn.qkv", (3,))."""
    parts = module.split(".")
    return ".".join(part for part in parts if not part.isdigit()), tuple(int(part) for part in parts if part.isdigit())


def grid(sparsity: Sparsity) -> tuple[list[str], list[tuple[int, ...]], dict[str, np.ndarray]]:
    """Return kinds of modules in the model's order, depths, and sparsities by axis, NaN where there is no module."""
    places = {module: depth_of(module) for module in sparsity}
    kinds = list(dict.fromkeys(kind for kind, _ in places.values()))
    depths = sorted({depth for _, depth in places.values()})
    grids = {axis: np.full((len(kinds), len(depths)), np.nan) for axis in AXES}
    for module, (kind, depth) in places.items():
        for axis, cells in grids.items():
            cells[kinds.index(kind), depths.index(depth)] = sparsity[module][axis]
    return without_common_start(kinds), depths, grids


def without_common_start(kinds: Sequence[str]) -> list[str]:
    """Return names without the leading parts that all of them share; every name keeps at least its last part."""
    split = [kind.split(".") for kind in kinds]
    shared = 0
    while all(len(parts) > shared + 1 for parts in split) and len({parts[shared] for parts in split}) == 1:
        shared += 1
    return [".".join(parts[shared:]) for parts in split]


# Which runs may stand beside each other: those under the same conditions, which differ in what makes a method.

PLACE = ("task", "model")
BLOCK = (*PLACE, "operating_point", "metric", "conditions")  # rows that share these compete for the best
OF_SEED = ("seed", "results_dir", "overwrite", "keep_records")  # settings in which runs of one folder may differ
_OF_METHOD = ("method.", "calibration.", "mask.", "importance.", "trainer.loraplus_ratio")
_NAMED = ("method.name", "calibration.threshold", "calibration.budget", "calibration.sparsity")  # have columns already
_RATE = ("trainer.learning_rate", "trainer.tuned", "trainer.tuned_elsewhere")  # every method may have its own
_PRECISION = "trainer.mixed_precision"
_MOST_NAMED = 5
_MOST_DIFFERENCES = 4
_MOST_REFERENCES = 3  # of one place, point, conditions and measure; other methods are compared with each of them


def conditions(result: Mapping) -> dict[str, object]:
    """Return the settings that may not differ between runs that are compared, by full key, where they are no defaults.

    Left out are what defines a method (its own group, importance, calibration, mask and LoRA+), its learning rate, the
    seed, and what changes no result. Keys that are newer than a record have the schema's defaults. The precision is the
    one that the run used: `trainer.mixed_precision=auto` depends on the device.
    """
    shared = {
        key: value
        for key, plain, value in _settings(result["config"])
        if plain not in (*_RATE, _PRECISION) and not plain.startswith(_OF_METHOD)
    }
    computed_in = precision(result)
    return shared if computed_in == "fp32" else shared | {_PRECISION: computed_in}


def of_method(config: Mapping) -> dict[str, object]:
    """Return the settings that define a method, beside its name and operating point, where they are no defaults."""
    return {
        key: value for key, plain, value in _settings(config) if plain.startswith(_OF_METHOD) and plain not in _NAMED
    }


def _settings(config: Mapping) -> Iterator[tuple[str, str, object]]:
    """Yield (key, the schema's key, value) of every setting that a run computes from and that is no default."""
    names = list(config["task"].get("members") or ())
    for key, value in identity.computed_from(config).items():
        plain = identity.task_key(key, names)
        yield key, plain, identity.wherever(plain, value)


def differences(own: Mapping[str, object], other: Mapping[str, object]) -> list[str]:
    """Return where two conditions differ: "trainer.epochs 50 against 2"."""
    return [
        f"{key} {tuned.word(value)} against {tuned.word(others)}" for key, value, others in tuned.differing(own, other)
    ]


@dataclass(frozen=True, eq=False)
class Folder:
    """The runs of a folder, which differ in their seed alone."""

    name: str
    runs: Sequence[Run]

    @property
    def row(self) -> dict:
        return self.runs[0].row

    @property
    def config(self) -> dict:
        return self.runs[0].record["config"]

    @property
    def key(self) -> tuple[str, str]:
        """Its name and precision: of one name there are several where seeds differ in precision."""
        return self.name, self.row["precision"]

    @property
    def id(self) -> str:
        """The end of the folder's name, by which a run is found."""
        return self.name.rpartition("-")[2]

    @property
    def seeds(self) -> list[int]:
        return [run.row["seed"] for run in self.runs]

    @property
    def measure(self) -> str | None:
        """The measure of importance that its sparsities were calibrated by."""
        calibrated = self.runs[0].record.get("calibration") is not None
        return (self.config.get("importance") or {}).get("name") if calibrated else None

    @cached_property
    def distance(self) -> int:
        """The number of the method's settings that differ from the schema's defaults."""
        return len(of_method(self.config))

    @property
    def is_variant(self) -> bool:
        """True for a variant of another run: its masks have a seed of their own, or its sparsities were repaired."""
        masks, calibration = (self.config.get(name) or {} for name in ("mask", "calibration"))
        return masks.get("seed") is not None or bool(calibration.get("repair"))


def panel_of(row: Mapping) -> tuple[str, str, str]:
    """Return the panel in which a row is read beside others: task, model and metric."""
    return row["task"], row["model"], row["metric"]


def usual_conditions(every: Iterable[Folder]) -> dict[tuple[str, str, str], Folder]:
    """Return, by panel, a folder under the conditions that most methods share; of equals, those with the most runs."""
    usual = {}
    for place, of_place in gathered(every, lambda each: panel_of(each.row)).items():
        alike = gathered(of_place, lambda each: each.row["conditions"]).values()
        usual[place] = max(
            alike, key=lambda own: (len({each.row["method"] for each in own}), sum(len(each.runs) for each in own))
        )[0]
    return usual


def told_apart(every: Sequence[Folder]) -> dict[tuple[str, str], str]:
    """Return by `Folder.key` the settings that tell it from others that would read alike: "rank=64", or "–".

    They are the conditions that are not usual for its task and model, and the settings of its method that vary among
    the folders of one method at one operating point and are no defaults. The learning rate, or the id, is added where
    nothing else tells two folders apart.
    """
    usual, told = usual_conditions(every), {}
    for place, of_place in gathered(every, lambda each: panel_of(each.row)).items():
        shared = conditions(usual[place].runs[0].record)
        settings = {
            each.key: {key: own for key, own, _ in tuned.differing(conditions(each.runs[0].record), shared)}
            for each in of_place
        }
        alike = gathered(of_place, lambda each: (each.row["method"], each.row["operating_point"])).values()
        for same in alike:
            own = {each.key: of_method(each.config) for each in same}
            for key in sorted({key for each in own.values() for key in each}):
                if len({repr(each.get(key)) for each in own.values()}) > 1:
                    for name, each in own.items():
                        settings[name] |= {key: each[key]} if key in each else {}
        short = _short_keys({key for each in settings.values() for key in each})
        for same in alike:
            words = {
                each: ", ".join(f"{short[key]}={tuned.word(value)}" for key, value in settings[each.key].items())
                for each in same
            }
            for twins in gathered(same, words.get).values():
                by_rate = gathered(twins, lambda each: f"learning_rate={each.row['learning_rate']:g}")
                for rate, of_rate in by_rate.items():
                    for each in of_rate:
                        more = [rate] * (len(by_rate) > 1) + [each.id] * (len(of_rate) > 1)
                        told[each.key] = ", ".join(filter(None, [words[each], *more])) or NONE
    return told


def _short_keys(keys: Iterable[str]) -> dict[str, str]:
    """Return keys without their groups, except where two would be the same or the meaning would be lost."""
    short = {key: key.removesuffix(".name").rpartition(".")[2] for key in keys}
    several = Counter(short.values())
    return {key: key if several[word] > 1 or word == "seed" else word for key, word in short.items()}


@dataclass
class Pairing:
    """Each folder with the reference that it is compared with, references with themselves first.

    apart: why no pair was made, and the folders that this concerns. remarks: what a reader should know of how the pairs
    were chosen, a line each.
    """

    pairs: list[tuple[Folder, Folder]] = field(default_factory=list)
    apart: dict[str, list[str]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def folders(runs: Iterable[Run]) -> list[Folder]:
    """Return runs by folder, in the order of the first; a folder whose seeds differ in precision is several."""
    alike = gathered(runs, lambda run: (run.row["group"], run.row["precision"]))
    return [Folder(name, of_folder) for (name, _), of_folder in alike.items()]


def gathered(each: Iterable[T], key: Callable[[T], Key]) -> dict[Key, list[T]]:
    """Return things by their key, in the order in which the keys first come."""
    groups: dict[Key, list[T]] = {}
    for one in each:
        groups.setdefault(key(one), []).append(one)
    return groups


def paired(every: Sequence[Folder], reference: str) -> Pairing:
    """Return who is compared with whom: `reference` with all others of its `BLOCK`.

    Methods without an operating point are compared at every point, and calibrated methods with references of the same
    measure of importance, the plainest measure first. A variant (`Folder.is_variant`) is a reference only where there
    is no other. Up to three references of a measure are all taken; of more, those nearest to the schema's defaults, if
    these are no more than three.
    """
    pairing, usual = Pairing(), schema.defaults()["importance.name"]
    for of_place in gathered(every, lambda each: tuple(each.row[name] for name in PLACE)).values():
        references = [each for each in of_place if each.row["method"] == reference]
        if references and (why := _not_by_examples(references[0])):
            pairing.remarks.append(why)
            continue
        apart: dict[tuple[str, str], list[str]] = {}
        by_point = gathered(references, lambda each: each.row["operating_point"])
        for point in sorted(by_point, key=point_order):
            at_point = [each for each in of_place if each.row["operating_point"] in (point, NONE)]
            alike = gathered(by_point[point], lambda each: (each.row["conditions"], each.measure))
            # The schema's own measure first, and then the plainest.
            order = sorted(alike, key=lambda key: (key[1] != usual, min(each.distance for each in alike[key])))
            for shared, measure in order:
                own = [each for each in at_point if each.row["conditions"] == shared]
                own = [each for each in own if each.measure in (None, measure)]
                for base in _references(alike[shared, measure], pairing):
                    pairing.pairs += [(each, base) for each in (base, *(each for each in own if each is not base))]
            for each in at_point:
                if all(each.row["conditions"] != shared for shared, _ in alike):
                    apart.setdefault((each.name, _nearest(each, by_point[point])), []).append(point)
        for (name, differing), points in apart.items():
            what = f"trained under other conditions than {reference} at {' and '.join(points)}: {differing}"
            pairing.apart.setdefault(what, []).append(name)
    return pairing


def _not_by_examples(folder: Folder) -> str | None:
    """Return why a task's runs cannot be compared example by example; None where they can."""
    task, metric = folder.row["task"], folder.row["metric"]
    if folder.config["task"].get("members"):
        return f"{task}: a mixture; `partial-lora evaluate RUN --member NAME` says how each of its members is done"
    if metric not in OF_EXAMPLES:
        return f"{task}: measured by {metric}, which predictions do not say"
    return None


def _references(several: Sequence[Folder], pairing: Pairing) -> Sequence[Folder]:
    """Return the references that others are compared with; where they are some of many, a remark says so."""
    several = [each for each in several if not each.is_variant] or several
    if len(several) <= _MOST_REFERENCES:
        return several
    plainest = [each for each in several if each.distance == min(other.distance for other in several)]
    names = shortlist([each.name for each in plainest], _MOST_NAMED)
    if len(plainest) <= _MOST_REFERENCES:
        which = f"{len(several)} whose own settings are further from the defaults"
        pairing.remarks.append(f"{names}: compared with, of {which}")
        return plainest
    settings = [{key: str(value) for key, value in flatten(each.config).items()} for each in plainest]
    keys = sorted({key for each in settings for key in each} - set(OF_SEED))
    varied = next((key for key in keys if len({each.get(key) for each in settings}) > 1), None)
    choose = f"choose with --where {varied}=…" if varied else "they have the same settings"
    why = f"{len(plainest)} to compare with, expected at most {_MOST_REFERENCES}; {choose}"
    pairing.apart.setdefault(why, []).append(names)
    return []


def _nearest(folder: Folder, references: Sequence[Folder]) -> str:
    """Return where a folder's conditions differ from those of the nearest reference; the first few of many."""
    own = conditions(folder.runs[0].record)
    differing = min((differences(own, conditions(each.runs[0].record)) for each in references), key=len)
    more = len(differing) - _MOST_DIFFERENCES
    return ", ".join(differing[:_MOST_DIFFERENCES] + ([f"{more} more"] if more > 0 else []))


def point_order(point: str) -> tuple[int, float]:
    """Order points: methods without one, thresholds from high to low, budgets and sparsities from large to small ones.

    Modules with sparsities of their own come last.
    """
    kind, _, value = point.partition(" ")
    place = (NONE, "threshold", "budget", "sparsity").index(kind)
    if value.startswith("of modules"):
        return place, 1.0
    number = float(value.replace(",", "") or 0)
    return place, number if kind == "sparsity" else -number


# Runs averaged: over their seeds, or over all that share what the reader names.

_SAME = (
    *("task", "model", "method", "operating_point", "metric", "learning_rate", "tuning"),
    *("conditions", "differs", "usual", "precision", "group"),
)
_WHOLE = ("adapter_dense", "head_parameters")
_AVERAGED = (
    *("adapter_parameters", *_WHOLE, "share_of_dense", "adapter_sparsity", "adapter_bytes"),
    *("calibrate_seconds", "train_seconds", "evaluate_seconds"),
)


def group(frame: pd.DataFrame, by: Sequence[str] = ()) -> pd.DataFrame:
    """Return runs that differ in nothing but their seed (one folder method-id) as one row: mean, deviation, n.

    by: columns of the frame instead; runs of one metric and precision that agree in these are a row. The deviation is
    the sample's (n - 1), NaN for a single run; test_half is half the 95 % interval of the mean by Student's t. Rows are
    in the order of task, model, operating point, method, or of the keys.
    """
    if frame.empty:
        return frame
    same = list(dict.fromkeys([*by, "metric", "precision"])) if by else list(_SAME)
    rest = [name for name in _SAME if name not in same and name != "group"]
    table = (
        frame.groupby(same, sort=False, dropna=False)
        .agg(
            n=("seed", "size"),
            seeds=("seed", lambda seeds: " ".join(str(seed) for seed in sorted(set(seeds)))),
            test_mean=("test", "mean"),
            test_std=("test", "std"),
            validation_mean=("validation", "mean"),
            **{name: (name, "mean") for name in _AVERAGED},
            **{name: (name, _shared) for name in rest},
            calibrations_reused=("calibration_reused", "sum"),
            **({} if "commit" in same else {"commit": ("commit", distinct)}),
        )
        .reset_index()
    )
    halves = [half_interval(std, n) for std, n in zip(table["test_std"], table["n"], strict=True)]
    table.insert(table.columns.get_loc("test_std") + 1, "test_half", halves)
    if by:
        return table.sort_values(list(by), kind="stable", key=_sortable).reset_index(drop=True)
    for name in _WHOLE:
        table[name] = table[name].round().astype(int)  # the same for every seed, so the mean is whole
    table["id"] = table["group"].str.rpartition("-")[2]
    order = table.assign(_point=table["operating_point"].map(point_order))
    order = order.sort_values(["task", "model", "_point", "method", "learning_rate", "id"], kind="stable")
    return table.loc[order.index].reset_index(drop=True)


def half_interval(std: float, n: int) -> float:
    """Return half the 95 % interval of a mean of n values, by Student's t; NaN of a single one."""
    from scipy.special import stdtrit  # scipy.stats takes half a second to import

    if n < 2 or math.isnan(std):
        return math.nan
    return float(stdtrit(n - 1, (1 + LEVEL) / 2) * std / math.sqrt(n))


def distinct(values: pd.Series) -> str:
    """Return all different values, in order, as words."""
    return ", ".join(sorted({str(value) for value in values}))


def _shared(values: pd.Series) -> object:
    """Return the value that all share; "–" (of numbers NaN) where they differ."""
    if values.nunique(dropna=False) == 1:
        return values.iloc[0]
    from pandas.api.types import is_numeric_dtype

    return math.nan if is_numeric_dtype(values) else NONE


def _sortable(values: pd.Series) -> pd.Series:
    """Return numbers by size where all are numbers, words otherwise."""
    import pandas as pd

    numbers = pd.to_numeric(values, errors="coerce")
    return values.astype(str) if numbers.isna().any() else numbers


# The reader's choice of runs: --where and --by name columns of the table and settings of a run.

_COLUMNS = (
    *("task", "model", "method", "operating_point", "metric", "seed", "learning_rate", "tuning"),
    *("preset", "commit", "device"),
)


def where(runs: Sequence[Run], conditions: Sequence[str]) -> list[Run]:
    """Return the runs that meet all conditions KEY=VALUE; KEY=A,B is met by either.

    A key is a column of the table (task, method, operating_point, seed …) or one of a run's settings, as on the command
    line of a run (method.rank, calibration.threshold, …). Raises PartialLoraError for a condition of another form and a
    key that no run has.
    """
    chosen = list(runs)
    for condition in conditions:
        key, _, values = condition.partition("=")
        if not key or not values:
            raise PartialLoraError(f"--where {condition}: expected KEY=VALUE, such as --where task=digits")
        _check_key(runs, key, "--where")
        whole = [run for run in chosen if _plain(values) in _words(run, key)]  # "budget 120,000" is one value
        either = {_plain(value) for value in values.split(",")}
        chosen = whole or [run for run in chosen if either & _words(run, key)]
    if conditions and not chosen:
        raise PartialLoraError(f"--where {' '.join(conditions)}: no finished run is like that")
    return chosen


def keys(runs: Sequence[Run], names: str) -> list[str]:
    """Return the keys of --by KEY,KEY; raises PartialLoraError for one that no run has."""
    each = list(dict.fromkeys(key.strip() for key in names.split(",") if key.strip()))
    if not each:
        raise PartialLoraError(f"--by {names}: expected KEY,KEY, such as --by task,method")
    for key in each:
        _check_key(runs, key, "--by")
    return each


def value_of(run: Run, key: str) -> object:
    """Return what a run has for a key; "–" where its record has no such setting."""
    if key in _COLUMNS:
        return run.row[key]
    value: object = run.record["config"]
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    if isinstance(value, Mapping):  # a group of settings is called by its name
        value = value.get("name")
    if isinstance(value, list):  # of which a table could make no rows
        value = tuned.word(value)
    return NONE if value is None else value


def _words(run: Run, key: str) -> set[str]:
    """Return what a run may be called by a key: a task of a user's own files with or without their name."""
    return {_plain(value_of(run, name)) for name in ([key, "task.name"] if key == "task" else [key])}


def _plain(value: object) -> str:
    """Return a value as it is compared: numbers by what they are, so that 1e-3 is 0.001; all else as it is written."""
    try:
        return repr(float(str(value)))
    except ValueError:
        word = str(value).lower() if isinstance(value, bool) else str(value).strip()
        return NONE if word == "null" else word


def _check_key(runs: Sequence[Run], key: str, option: str) -> None:
    known = {*_COLUMNS, *(name for run in runs for name in flatten(run.record["config"]))}
    if key in known or any(value_of(run, key) != NONE for run in runs):
        return
    near = difflib.get_close_matches(key, sorted(known), n=3, cutoff=0.5) or list(_COLUMNS[:4])
    raise PartialLoraError(f"{option} {key}: no run has such a key; perhaps {', '.join(near)}")


# Predictions

_COMPARED = {"label", "prediction", "prediction_norm", *OF_TEXTS, "member"}


class Predictions:
    """The predictions of the runs of a results directory, a row a test example.

    Every file is read once, and only the columns that are compared; those of packed runs come out of the pack.
    """

    def __init__(self, results_dir: Path) -> None:
        self._results_dir = Path(results_dir)
        self._frames: dict[tuple[str, int, bool], pd.DataFrame] = {}

    def of(self, group: str, seeds: Iterable[int], metric: str) -> dict[int, pd.DataFrame]:
        """Return what the runs of a folder predicted, by seed: the columns that `metric` is computed from.

        Raises PartialLoraError where a run has none, ValueError where its file is broken.
        """
        return {seed: self._frame(group, seed, whole=metric in OF_ALL_TOGETHER) for seed in seeds}

    def outputs(self, group: str, seed: int) -> np.ndarray | None:
        """Return the prediction for every example (N,); None where none can be read, and of a regression's numbers."""
        try:
            values = self._frame(group, seed, whole=False)["prediction"].to_numpy()
        except (PartialLoraError, ValueError, KeyError):
            return None
        return None if values.dtype.kind == "f" else values

    def exist(self, group: str, seeds: Iterable[int]) -> bool:
        """Return True where any of these runs has its predictions."""
        files = [self._file(group, seed) for seed in seeds]
        return any(file.is_file() or packs.predictions_of(file.parent) is not None for file in files)

    def _frame(self, group: str, seed: int, *, whole: bool) -> pd.DataFrame:
        from pyarrow.parquet import ParquetFile

        key = (group, seed, whole)
        if key in self._frames:
            return self._frames[key]
        try:
            with ParquetFile(self._file(group, seed)) as file:  # pandas' own reader takes ten times as long
                columns = None if whole else [name for name in file.schema_arrow.names if name in _COMPARED]
                self._frames[key] = file.read(columns, use_threads=False).to_pandas()
        except FileNotFoundError as error:
            packed = packs.predictions_of(self._results_dir / group / f"seed{seed}")
            if packed is None:
                advice = "train it again with overwrite=true"
                raise PartialLoraError(f"{group}/seed{seed} has no {PREDICTIONS}; {advice}") from error
            self._frames[key] = packed.to_pandas()
        except (OSError, ValueError) as error:
            raise ValueError(f"{group}/seed{seed}/{PREDICTIONS} cannot be read: {error}") from error
        return self._frames[key]

    def _file(self, group: str, seed: int) -> Path:
        return self._results_dir / group / f"seed{seed}" / PREDICTIONS
