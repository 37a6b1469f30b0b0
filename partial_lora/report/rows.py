"""One run as a row of a table: plain numbers and words out of its record, and the settings that make it comparable."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from partial_lora.launching import run_record
from partial_lora.methods import called
from partial_lora.settings import identity, schema
from partial_lora.settings.rates import Validation
from partial_lora.settings.versions import wherever
from partial_lora.tasks.image_folders import FILES
from partial_lora.tasks.kinds import kind_in
from partial_lora.tasks.metrics import LOWER_IS_BETTER

NONE = "–"  # for what does not apply
COSTS = ("adapter_bytes", "optimizer_bytes", "step_seconds", "saved_activation_bytes")
PLACE = ("task", "model")
BLOCK = (*PLACE, "operating_point", "metric", "conditions")  # rows that share these compete for the best
_ROWS_COLUMNS = "rows_columns"  # the granularity of masks that a method's name leaves out


def row(result: Mapping) -> dict:
    """Return one run as a row of plain numbers; raises ValueError for a record that lacks one or has another shape.

    conditions: eight hex digits, the same for runs that may be compared (`conditions`).
    """
    if found := run_record.fault(result):
        raise ValueError(f"foreign, {found}")
    try:
        kind_in(result["config"]["task"])  # which there has to be
        return _row(result)
    except (KeyError, TypeError, AttributeError) as error:  # what a report reads of it, but not by itself
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
        "conditions": identity.short_digest(conditions(result)),
        "preset": result.get("preset") or NONE,
        # What computed it: the commit of a checkout, else the version of the installed package.
        "commit": (result.get("git_commit") or "")[:12] or f"partial-lora {result['versions']['partial-lora']}",
        "device": result.get("device") or NONE,
        "precision": precision(result),
    }


def validation_by_rate(rows: Iterable[Mapping]) -> dict[float, dict[int, Validation]]:
    """Return the validation of runs of one metric, by learning rate and seed (`rates.ranked`)."""
    tried: dict[float, dict[int, Validation]] = {}
    for run in rows:
        sign = -1 if run["metric"] in LOWER_IS_BETTER else 1
        validation = sign * run["validation"], -run["validation_loss"]
        tried.setdefault(run["learning_rate"], {})[run["seed"]] = None if math.isnan(validation[0]) else validation
    return tried


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
    unmasked = result.get("calibration") is None and result.get("fixed") is None
    if unmasked or called(name).size == "budget":  # whose masks are its own
        return name
    words = [mask.get("granularity", _ROWS_COLUMNS), mask.get("columns", "masked"), mask.get("rows", "masked")]
    masks = " ".join(word for word in words if word not in (_ROWS_COLUMNS, "masked"))
    return f"{name} ({masks})" if masks else name


def came_to(result: Mapping) -> dict[str, float | None]:
    """Return the keys of the trainer that a run set for itself, `trainer.learning_rate=auto`, and what they came to."""
    return {key: value for key, value in (result.get("training") or {}).items() if key.endswith("learning_rate")}


def operating_point(result: Mapping) -> str:
    """Return where on the curve of accuracy against size a run was put: "threshold 0.9", "budget 0.13", or "–"."""
    if result["calibration"] is None:
        return point_of(result["fixed"]) if result.get("fixed") else NONE
    settings = result["config"]["calibration"]
    source = result["calibration"] if settings.get("file") else settings  # a file has its own point
    return point_of(source)


def point_of(calibration: Mapping) -> str:
    """Return the point of {"threshold", "budget", "sparsity"}: the budget, a share or a count of parameters, if any.

    A fixed sparsity goes before a threshold. Sparsities of single modules are named by a digest.
    """
    sparsity, budget = calibration.get("sparsity"), calibration.get("budget")
    if isinstance(sparsity, Mapping):
        digest = hashlib.sha256(json.dumps(sparsity).encode()).hexdigest()[:6]
        return f"sparsity of modules {digest}"
    key = "budget" if budget is not None else "threshold" if sparsity is None else "sparsity"
    value = calibration[key]
    if value is None:  # of a file that does not say it
        return NONE
    return f"{key} {value:g}" if value <= 1 else f"{key} {value:,.0f}"


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


def precision(result: Mapping) -> str:
    """Return the number format that a run was computed in: "fp32", "bf16" or "fp16"."""
    computed_in = result["mixed_precision"]
    return "fp32" if computed_in == "no" else computed_in


def number(value: float | None) -> float:
    """Return a number as a float; NaN for one that does not apply, which averages leave out."""
    return math.nan if value is None else float(value)


def panel_of(row: Mapping) -> tuple[str, str, str]:
    """Return the panel in which a row is read beside others: task, model and metric."""
    return row["task"], row["model"], row["metric"]


# Runs under the same conditions may stand beside each other; they differ in what makes a method.

_OF_METHOD = ("method.", "calibration.", "mask.", "importance.", "trainer.loraplus_ratio")
_NAMED = ("method.name", "calibration.threshold", "calibration.budget", "calibration.sparsity")  # have columns already
_RATE = "trainer.learning_rate"  # every method may have its own
_PRECISION = "trainer.mixed_precision"
_LENGTH = ("trainer.epochs", "trainer.max_steps", "trainer.batch_size")


def conditions(result: Mapping) -> dict[str, object]:
    """Return the settings that may not differ between runs that are compared, by full key, where they are no defaults.

    Left out are what defines a method (its own group, importance, calibration, mask and LoRA+), its learning rate, the
    seed, and what changes no result. The precision is the one that the run used: `trainer.mixed_precision=auto` depends
    on the device.
    """
    shared = {
        key: value
        for key, plain, value in _settings(result["config"])
        if plain not in (_RATE, _PRECISION) and not plain.startswith(_OF_METHOD)
    }
    computed_in = precision(result)
    return shared if computed_in == "fp32" else shared | {_PRECISION: computed_in}


def differing(shared: Mapping, others: Mapping) -> list[tuple[str, object, object]]:
    """Return where the `conditions` of two runs differ: key and both values; the length of training comes first."""
    names, differences = [*shared.get("task.members", ()), *others.get("task.members", ())], []
    standard = schema.defaults() if shared != others else {}
    for key in sorted({*shared, *others}, key=lambda key: (key not in _LENGTH, key)):
        default = standard.get(identity.task_key(key, names))
        values = shared.get(key, default), others.get(key, default)
        if values[0] != values[1]:
            differences.append((key, *values))
    return differences


def as_typed(value: object) -> str:
    """Return the value of a setting as it is written on the command line."""
    if isinstance(value, list):
        return f"[{','.join(map(as_typed, value))}]"
    if isinstance(value, float):
        return f"{value:g}"
    return value if isinstance(value, str) else json.dumps(value)


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
        yield key, plain, wherever(plain, value)
