"""The records of finished runs, as rows of a table.

Nothing here is typed by hand and nothing is measured again: every number is one of a result.json.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from pyarrow.parquet import ParquetFile
from scipy.special import stdtrit  # scipy.stats takes half a second to import

from partial_lora.errors import PartialLoraError
from partial_lora.files import flatten
from partial_lora.masks import AXES, Sparsity
from partial_lora.runs import identity
from partial_lora.runs.directory import ADAPTER, PREDICTIONS, RESULT
from partial_lora.runs.rates import NO_POINT, said

# --- The conditions of a run: the settings in which two methods have to agree before one is said to be the better.

_OF_METHODS = ("method.", "calibration.", "mask.", "importance.")  # what makes a method that method
_SAID = {"method.name", "calibration.threshold", "calibration.budget"}
_PER_METHOD = {"trainer.learning_rate", "trainer.tuned", "trainer.tuned_elsewhere"}  # what each may have its own of
_PRECISION = "trainer.mixed_precision"
_MOST_NAMED = 4


def conditions(record: Mapping) -> dict[str, object]:
    """All that may not differ between runs that are compared, by full key, where it is not the schema's default.

    Left out are what defines a method (its own group, importance, calibration and mask), its learning rate, the seed,
    and what changes no result. Keys that are newer than a record are what the schema has. The precision is the one that
    was computed in: `trainer.mixed_precision=auto` depends on the device.
    """
    found = {
        key: value
        for key, plain, value in _changed(record["config"])
        if plain not in (*_PER_METHOD, _PRECISION) and not plain.startswith(_OF_METHODS)
    }
    computed_in = precision(record)
    return found if computed_in == "fp32" else found | {_PRECISION: computed_in}


def precision(record: Mapping) -> str:
    """Return the number format that a run was computed in: "fp32", "bf16" or "fp16"."""
    computed_in = record.get("mixed_precision") or "no"  # records that are older than the field are of fp32
    return "fp32" if computed_in == "no" else computed_in


def of_method(settings: Mapping) -> dict[str, object]:
    """What makes a method that method, beside its name and operating point, where it is not the schema's default."""
    return {
        key: value for key, plain, value in _changed(settings) if plain.startswith(_OF_METHODS) and plain not in _SAID
    }


def _changed(settings: Mapping) -> Iterator[tuple[str, str, object]]:
    """(key, the schema's key, value) of every setting that computes something and is not the schema's default."""
    standard, names = _defaults(), list(settings["task"].get("members") or ())
    if names:
        yield "task.members", "task.members", names
    for key, value in flatten(settings).items():
        plain = identity.plain(key, names)
        if plain not in identity.NOT_SETTINGS and value != standard.get(plain):
            yield key, plain, identity.wherever(plain, value)


def digest(found: Mapping[str, object]) -> str:
    """Eight hex digits that runs under the same conditions share."""
    return hashlib.sha256(json.dumps(found, sort_keys=True, default=str).encode()).hexdigest()[:8]


def differences(one: Mapping[str, object], other: Mapping[str, object]) -> str:
    """In what two conditions differ, in words: "trainer.epochs 50 against 2"; the first few of many."""
    defaults = _defaults()
    values = {key: tuple(each.get(key, defaults.get(key)) for each in (one, other)) for key in sorted({*one, *other})}
    said = [f"{key} {_word(ours)} against {_word(theirs)}" for key, (ours, theirs) in values.items() if ours != theirs]
    more = [f"{len(said) - _MOST_NAMED} more"] if len(said) > _MOST_NAMED else []
    return ", ".join(said[:_MOST_NAMED] + more)


@cache
def _defaults() -> Mapping[str, object]:
    return identity.defaults()


def _word(value: object) -> str:
    return "null" if value is None else format(value, "g") if isinstance(value, float) else str(value)


# --- Where a module is in a model: its kind and its place in depth, read off its name.


def place(module: str) -> tuple[str, tuple[int, ...]]:
    """The kind of a module and its place in depth: "m.blocks.3.attn.qkv" is ("m.blocks.attn.qkv", (3,))."""
    parts = module.split(".")
    return ".".join(part for part in parts if not part.isdigit()), tuple(int(part) for part in parts if part.isdigit())


def grid(sparsity: Sparsity) -> tuple[list[str], list[tuple[int, ...]], dict[str, np.ndarray]]:
    """Kinds of modules in the model's order, places in depth, and per axis the sparsities, NaN where is no module."""
    places = {module: place(module) for module in sparsity}
    kinds = list(dict.fromkeys(kind for kind, _ in places.values()))
    depths = sorted({depth for _, depth in places.values()})
    grids = {axis: np.full((len(kinds), len(depths)), np.nan) for axis in AXES}
    for module, (kind, depth) in places.items():
        for axis, cells in grids.items():
            cells[kinds.index(kind), depths.index(depth)] = sparsity[module][axis]
    return without_common_start(kinds), depths, grids


def without_common_start(kinds: Sequence[str]) -> list[str]:
    """Names without the leading parts that all of them share; every name keeps at least its last part."""
    split = [kind.split(".") for kind in kinds]
    shared = 0
    while all(len(parts) > shared + 1 for parts in split) and len({parts[shared] for parts in split}) == 1:
        shared += 1
    return [".".join(parts[shared:]) for parts in split]


# --- What of a record reports read, and of which shape it has to be: a foreign one is named before it is used.


def check(result: Mapping) -> None:
    """Raises ValueError, naming the field, where a record has one of another shape than a run writes.

    Fields that earlier versions did not write may be absent or null.
    """
    for field in _NEEDED:
        if not any(True for _ in _at(result, field.split("."))):
            raise ValueError(f"foreign, no {field.rpartition('.')[2]} in it")
    for field, holds, expected in _FIELDS:
        for value in _at(result, field.split(".")):
            if not holds(value):
                raise ValueError(f"foreign, its {field} is not {expected}")


def _at(value: object, parts: list[str]) -> Iterator[object]:
    """What a record has at a dotted name, if anything; `*` is every value of a mapping or list."""
    if not parts:
        yield value
    elif parts[0] == "*":
        inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
        for each in inner:
            yield from _at(each, parts[1:])
    elif isinstance(value, Mapping) and parts[0] in value:
        yield from _at(value[parts[0]], parts[1:])


def _mapping(value: object) -> bool:
    return isinstance(value, Mapping)


def _text(value: object) -> bool:
    return isinstance(value, str)


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _texts(value: object) -> bool:
    return isinstance(value, list) and all(map(_text, value))


def _or_null(holds: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or holds(value)


def _entry(value: object) -> bool:
    """An entry of Trainer's log: what is drawn over steps has a step and is a number, or null where it was none."""
    if not isinstance(value, Mapping):
        return False
    drawn = [each for key, each in value.items() if key in ("loss", "num_input_tokens_seen") or key.startswith("eval_")]
    return not drawn or (_number(value.get("step")) and all(each is None or _number(each) for each in drawn))


def _sparsities(value: object) -> bool:
    return isinstance(value, Mapping) and all(_number(value.get(axis)) for axis in AXES)


_NEEDED = ("history", "parameters.base", "versions")  # beside what a row of the table is made of
_FIELDS: tuple[tuple[str, Callable[[object], bool], str], ...] = (
    ("seed", _count, "a whole number"),
    ("config", _mapping, "a mapping"),
    *((f"config.{group}", _mapping, "a mapping") for group in ("task", "model", "method", "trainer", "importance")),
    *((f"config.{group}", _mapping, "a mapping") for group in ("calibration", "mask")),
    *((f"config.{group}.name", _text, "a name") for group in ("task", "model", "method", "importance")),
    ("config.mask.granularity", _text, "a word"),
    ("config.calibration.threshold", _or_null(_number), "a number"),
    ("config.calibration.budget", _or_null(_number), "a number"),
    ("config.trainer.batch_size", _or_null(_number), "a number"),
    ("versions", _mapping, "a mapping"),
    ("versions.*", _text, "a version"),
    ("git_commit", _or_null(_text), "a word"),
    ("device", _or_null(_text), "a word"),
    ("preset", _or_null(_text), "a word"),
    ("tuning", _text, "a word"),
    ("started", _or_null(_text), "a time"),
    ("peak_memory_bytes", _or_null(_number), "a number"),
    ("mixed_precision", _or_null(_text), "a word"),
    ("seconds.*", _or_null(_number), "a number"),
    *((f"parameters.{name}", _count, "a count") for name in ("base", "adapter_dense", "adapter_trainable", "head")),
    ("parameters.adapter_final", _count, "a count"),
    ("parameters.adapter_sparsity", _or_null(_number), "a number"),
    ("sparsity", _or_null(_mapping), "a mapping"),
    ("sparsity.*", _sparsities, f"numbers for {' and '.join(AXES)}"),
    ("calibration", _or_null(_mapping), "a mapping"),
    ("calibration.baseline", _or_null(_number), "a number"),
    ("calibration.joint", _or_null(_number), "a number"),
    ("calibration.threshold", _or_null(_number), "a number"),
    ("calibration.budget", _or_null(_number), "a number"),
    ("calibration.warnings", _or_null(_texts), "a list of sentences"),
    ("calibration.reliability", _or_null(_mapping), "a mapping"),
    ("calibration.reliability.spearman_brown", _or_null(_number), "a number"),
    ("cost", _or_null(_mapping), "a mapping"),
    ("cost.*", _or_null(_number), "a number"),
    ("files", _or_null(_mapping), "a mapping"),
    ("files.*", _or_null(_number), "a size"),
    ("metrics.test", _mapping, "a mapping"),
    ("metrics.test.primary", _text, "the name of a metric"),
    ("history", lambda value: isinstance(value, list), "a list"),
    ("history.*", _entry, "an entry of a log: numbers at a step"),
)


NONE = NO_POINT  # for what does not apply
ROWS_COLUMNS = "rows_columns"  # the granularity of masks that goes without saying
_RUNS = "runs/*/*/*/seed*"  # runs/task/model/method-id/seedK


@dataclass(frozen=True)
class Run:
    """A finished run: its directory, its record, and the numbers of it that tables have (`row`)."""

    directory: Path
    record: dict
    row: dict


def collect(results_dir: Path) -> tuple[pd.DataFrame, list[str]]:
    """The finished runs under a results directory, a row each, and what was left out, a line each (`read`)."""
    found, problems = read(results_dir)
    return table(found), problems


def one(directory: Path) -> Run:
    """The finished run of a directory; raises PartialLoraError, naming its record, where there is none."""
    directory = Path(directory)
    try:
        return run_of(record(directory), directory)
    except ValueError as error:
        raise PartialLoraError(f"{directory / RESULT}: {error}") from error


def run_of(result: dict, directory: Path) -> Run:
    """A record as a run, wherever its directory is; raises ValueError for a record that lacks or garbles something."""
    place = Path(directory).resolve()
    return Run(Path(directory), result, {"group": place.parent.name} | row(result, Path(f"seed{result.get('seed')}")))


def table(found: list[Run]) -> pd.DataFrame:
    """The rows of runs."""
    return pd.DataFrame([run.row for run in found])


def read(results_dir: Path) -> tuple[list[Run], list[str]]:
    """The finished runs under a results directory, and what was left out, a line each.

    A row's group is the folder that runs of other seeds share. Left out and named is a run that failed, has not
    finished or only calibrated, and a result.json that is broken, foreign or copied from another run. Raises
    PartialLoraError where the directory holds no runs at all.
    """
    results_dir = Path(results_dir)
    directories = sorted(path for path in results_dir.glob(_RUNS) if path.is_dir())
    if not directories:
        raise PartialLoraError(f"{results_dir}: expected runs in {results_dir}/runs; `partial-lora train` makes them")
    found, problems = [], []
    for directory in directories:
        try:
            result = record(directory)
            group = {"group": str(directory.parent.relative_to(results_dir))}
            found.append(Run(directory, result, group | row(result, directory)))
        except ValueError as error:
            problems.append(f"{directory.relative_to(results_dir)}/{RESULT}: {error}")
    return found, problems


def record(directory: Path) -> dict:
    """The record of a finished run; raises ValueError that says what is there instead."""
    try:
        result = json.loads((directory / RESULT).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError("missing, the run never started or was interrupted") from error
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise ValueError("broken, not JSON") from error
    if not isinstance(result, dict) or "status" not in result:
        raise ValueError("foreign, no record of a run")
    if result["status"] != "finished":
        detail = f": {result['error']}" if result.get("error") else ""
        raise ValueError(f"{result['status']}{detail}")
    if not result.get("metrics"):
        raise ValueError("calibrated only, nothing was trained")
    return result


def row(result: Mapping, directory: Path) -> dict:
    """One run as a row of plain numbers; raises ValueError for a record that lacks or garbles one.

    conditions: what runs have in common that may be compared (`conditions.digest`).
    """
    try:
        config, test, parameters = result["config"], result["metrics"]["test"], result["parameters"]
        seconds, calibration = result["seconds"], result["calibration"]
        # What AdaLoRA has left is its size, as in its paper; that it began with more shows in its bytes.
        dense, size = parameters["adapter_dense"], parameters.get("adapter_final", parameters["adapter_trainable"])
        check(result)
        found = {
            "seed": result["seed"],
            "task": config["task"]["name"],
            "model": config["model"]["name"],
            "method": method_of(result),
            "operating_point": operating_point(result),
            "metric": test["primary"],
            "test": float(test[test["primary"]]),
            "adapter_parameters": size,
            "adapter_dense": dense,
            "share_of_dense": size / dense if dense else math.nan,
            "head_parameters": parameters["head"],
            "adapter_sparsity": number(parameters["adapter_sparsity"]),
            "adapter_bytes": _adapter_bytes(result),
            "calibrate_seconds": _calibrate_seconds(result),
            "calibration_reused": bool(calibration and calibration.get("cached")),
            "train_seconds": number(seconds["train"]),
            "evaluate_seconds": number(seconds["evaluate"]),
            "learning_rate": float(config["trainer"]["learning_rate"]),
            "tuning": result.get("tuning", "untuned"),
            "conditions": digest(conditions(result)),
            "preset": result.get("preset") or NONE,
            "commit": _code(result),
            "device": result.get("device") or NONE,
            "precision": precision(result),
        }
    except KeyError as error:
        raise ValueError(f"foreign, no {error.args[0]} in it") from error
    except (TypeError, AttributeError) as error:
        raise ValueError(f"foreign, not the fields of a run ({error})") from error
    if not math.isfinite(found["test"]):
        raise ValueError(f"broken, its test {found['metric']} is {found['test']}")
    if directory.name != f"seed{found['seed']}":
        raise ValueError(f"a copy of another run, its seed is {found['seed']}")
    return found


def method_of(result: Mapping) -> str:
    """What a run's method is called: one whose masks are of single entries is another than that of rows and columns."""
    name = result["config"]["method"]["name"]
    masks = result["config"].get("mask", {}).get("granularity", ROWS_COLUMNS)
    return name if masks == ROWS_COLUMNS or result.get("calibration") is None else f"{name} ({masks})"


def operating_point(result: Mapping) -> str:
    """Where on the curve of accuracy against size a run was put: "threshold 0.9", "budget 0.13", or "–"."""
    if result["calibration"] is None:
        return NONE
    chosen = result["config"]["calibration"]
    if chosen.get("file"):  # the file's own point, whatever the settings beside it say
        chosen = result["calibration"]
    return said(chosen)


def _adapter_bytes(result: Mapping) -> float:
    """What the adapter's tensors weigh on disk; NaN for records made before that was kept."""
    kept = (result.get("cost") or {}).get("adapter_bytes")
    if kept is None:
        sizes = (result.get("files") or {}).items()
        kept = sum(size for name, size in sizes if name.startswith(f"{ADAPTER}/") and name.endswith(".safetensors"))
    return number(kept or None)


def _calibrate_seconds(result: Mapping) -> float:
    """What calibrating cost; NaN where nothing was calibrated, and where an earlier run had paid for it."""
    calibration = result["calibration"]
    if calibration is None or calibration.get("cached"):
        return math.nan
    return number(result["seconds"]["calibrate"])


def _code(result: Mapping) -> str:
    """What the run was computed by: the commit of a checkout, else the version of the installed package."""
    return (result.get("git_commit") or "")[:12] or f"partial-lora {result['versions']['partial-lora']}"


def number(value: float | None) -> float:
    """A number as a float; NaN for one that does not apply, which averages leave out."""
    return math.nan if value is None else float(value)


# --- Runs averaged: over their seeds, or over all that share what the reader names.

SAME = ("task", "model", "method", "operating_point", "metric", "learning_rate", "tuning")
SAME += ("conditions", "precision", "group")
_WHOLE = ("adapter_dense", "head_parameters")
_AVERAGED = (
    "adapter_parameters",
    *_WHOLE,
    "share_of_dense",
    "adapter_sparsity",
    "adapter_bytes",
    "calibrate_seconds",
    "train_seconds",
    "evaluate_seconds",
)
_LEVEL = 0.95


def group(frame: pd.DataFrame, by: Sequence[str] = ()) -> pd.DataFrame:
    """Runs that differ in nothing but their seed (one folder method-id), as one row: mean, standard deviation, n.

    by: columns of the frame instead; runs of one metric and precision that agree in these are a row. The deviation is
    the sample's (n - 1), NaN for a single run; test_half is half the 95 % interval of the mean by Student's t. Rows are
    in the order of task, model, operating point, method, or of the keys.
    """
    if frame.empty:
        return frame
    same = [*by, "metric", "precision"] if by else list(SAME)
    same = list(dict.fromkeys(same))
    rest = [name for name in SAME if name not in same and name != "group"]
    table = (
        frame.groupby(same, sort=False, dropna=False)
        .agg(
            n=("seed", "size"),
            seeds=("seed", lambda seeds: " ".join(str(seed) for seed in sorted(set(seeds)))),
            test_mean=("test", "mean"),
            test_std=("test", "std"),
            **{name: (name, "mean") for name in _AVERAGED},
            **{name: (name, _one) for name in rest},
            calibrations_reused=("calibration_reused", "sum"),
            **({} if "commit" in same else {"commit": ("commit", distinct)}),
        )
        .reset_index()
    )
    for name in () if by else _WHOLE:
        table[name] = table[name].round().astype(int)  # the same for every seed, so the mean is whole
    halves = [half_interval(std, n) for std, n in zip(table["test_std"], table["n"], strict=True)]
    table.insert(table.columns.get_loc("test_std") + 1, "test_half", halves)
    if by:
        return table.sort_values(list(by), kind="stable", key=_sortable).reset_index(drop=True)
    table["id"] = table["group"].str.rpartition("-")[2]
    order = table.assign(_point=table["operating_point"].map(point_order))
    order = order.sort_values(["task", "model", "_point", "method", "learning_rate", "id"], kind="stable")
    return table.loc[order.index].reset_index(drop=True)


def half_interval(std: float, n: int) -> float:
    """Half the 95 % interval of a mean of n values, by Student's t; NaN of a single one."""
    if n < 2 or math.isnan(std):
        return math.nan
    return float(stdtrit(n - 1, (1 + _LEVEL) / 2) * std / math.sqrt(n))


def distinct(values: pd.Series) -> str:
    """All different values, in order, as words."""
    return ", ".join(sorted({str(value) for value in values}))


def _one(values: pd.Series) -> object:
    """The value that all share; "–" (of numbers NaN) where they differ."""
    if values.nunique(dropna=False) == 1:
        return values.iloc[0]
    return math.nan if pd.api.types.is_numeric_dtype(values) else NONE


def _sortable(values: pd.Series) -> pd.Series:
    """Numbers by size where all are numbers, words otherwise."""
    numbers = pd.to_numeric(values, errors="coerce")
    return values.astype(str) if numbers.isna().any() else numbers


def point_order(point: str) -> tuple[int, float]:
    """Methods without a calibration first, then thresholds from high to low, then budgets from large to small."""
    kind, _, value = point.partition(" ")
    return ((NONE, "threshold", "budget").index(kind), -float(value.replace(",", "") or 0))


# --- Which runs a report is about, and what it groups them by: keys of the command line, values of the records.

_WORDS = ("task", "model", "method", "operating_point", "metric", "seed", "learning_rate", "tuning", "preset", "commit")
_WORDS += ("device",)


def where(found: Sequence[Run], conditions: Sequence[str]) -> list[Run]:
    """The runs that meet all conditions KEY=VALUE; KEY=A,B is met by either.

    A key is a column of the table (task, method, operating_point, seed …) or one of a run's settings, as on the command
    line of a run (method.rank, calibration.threshold, …). Raises PartialLoraError for a condition of another form and a
    key that no run has.
    """
    kept = list(found)
    for condition in conditions:
        key, equals, values = condition.partition("=")
        if not equals or not key or not values:
            raise PartialLoraError(f"--where {condition}: expected KEY=VALUE, such as --where task=digits")
        _check(found, key, "--where")
        whole = [run for run in kept if _plain(value_of(run, key)) == _plain(values)]  # "budget 120,000" is one value
        wanted = [_plain(value) for value in values.split(",")]
        kept = whole or [run for run in kept if _plain(value_of(run, key)) in wanted]
    if conditions and not kept:
        raise PartialLoraError(f"--where {' '.join(conditions)}: no finished run is like that")
    return kept


def keys(found: Sequence[Run], said: str) -> list[str]:
    """The keys of --by KEY,KEY; raises PartialLoraError for one that no run has."""
    named = [key.strip() for key in said.split(",") if key.strip()]
    if not named:
        raise PartialLoraError(f"--by {said}: expected KEY,KEY, such as --by task,method")
    for key in named:
        _check(found, key, "--by")
    return list(dict.fromkeys(named))


def value_of(run: Run, key: str) -> object:
    """What a run has for a key; "–" where its record has no such setting."""
    if key in _WORDS:
        return run.row[key]
    here: object = run.record["config"]
    for part in key.split("."):
        here = here.get(part, NONE) if isinstance(here, Mapping) else NONE
    if isinstance(here, Mapping):  # a group of settings is called by its name
        here = here.get("name", NONE)
    return NONE if here is None else here


def _plain(value: object) -> str:
    """A value as it is compared: numbers by what they are, so that 1e-3 is 0.001; all else as it is written."""
    try:
        return repr(float(str(value).replace("–", "")))
    except ValueError:
        return str(value).lower() if isinstance(value, bool) else str(value)


def _check(found: Sequence[Run], key: str, option: str) -> None:
    if key in _WORDS or any(value_of(run, key) != NONE for run in found) or any(_has(run, key) for run in found):
        return
    known = sorted({*_WORDS, *(name for run in found for name in flatten(run.record["config"]))})
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.5) or list(_WORDS[:4])
    raise PartialLoraError(f"{option} {key}: no run has such a key; perhaps {', '.join(near)}")


def _has(run: Run, key: str) -> bool:
    return key in flatten(run.record["config"])


# --- What runs predicted, for those who compare them: every file is read once, and of it no more than is compared.

_COMPARED = {"label", "prediction", "prediction_norm", "exact_match", "rouge_l", "member"}
_OF_ALL_TOGETHER = {"f1", "matthews", "pearson", "spearman"}  # metrics that also ask how many outputs there are


class Predictions:
    """The predictions of the runs under a results directory, a row a test example."""

    def __init__(self, results_dir: Path) -> None:
        self._place = Path(results_dir)
        self._read: dict[tuple[str, int, bool], pd.DataFrame] = {}

    def of(self, group: str, seeds: Iterable[int], metric: str) -> dict[int, pd.DataFrame]:
        """What the runs of a folder predicted, by seed: the columns that `metric` is computed from.

        Raises PartialLoraError where a run has none, ValueError where its file is broken.
        """
        return {seed: self._frame(group, seed, whole=metric in _OF_ALL_TOGETHER) for seed in seeds}

    def said(self, group: str, seed: int) -> np.ndarray | None:
        """The prediction for every example (N,); None where there is none to be read."""
        try:
            return self._frame(group, seed, whole=False)["prediction"].to_numpy()
        except (PartialLoraError, ValueError, KeyError):
            return None

    def kept(self, group: str, seeds: Iterable[int]) -> bool:
        """Whether any of these runs has kept its predictions."""
        return any(self._file(group, seed).is_file() for seed in seeds)

    def _frame(self, group: str, seed: int, *, whole: bool) -> pd.DataFrame:
        key = (group, seed, whole)
        if key not in self._read:
            self._read[key] = self._read_anew(*key)
        return self._read[key]

    def _read_anew(self, group: str, seed: int, whole: bool) -> pd.DataFrame:
        try:
            with ParquetFile(self._file(group, seed)) as file:  # pandas' own reader takes ten times as long
                columns = None if whole else [name for name in file.schema_arrow.names if name in _COMPARED]
                return file.read(columns, use_threads=False).to_pandas()
        except FileNotFoundError as error:
            advice = "train it again with overwrite=true"
            raise PartialLoraError(f"{group}/seed{seed} has no {PREDICTIONS}; {advice}") from error
        except OSError as error:
            raise ValueError(f"{group}/seed{seed}/{PREDICTIONS} cannot be read: {error}") from error

    def _file(self, group: str, seed: int) -> Path:
        return self._place / group / f"seed{seed}" / PREDICTIONS
