"""The record of a run, as result.json has it, and what is wrong with one that has another shape."""

from __future__ import annotations

from collections.abc import Mapping
from types import NoneType, UnionType
from typing import Annotated, Any, TypedDict, Union, get_args, get_origin, get_type_hints

# A shape: a type; (one shape, or another); [of every item]; {key: of its value}, where `key?` may be missing and `*` is
# every key. None is null.
_NUMBER = (int, float)
_MAYBE = (*_NUMBER, None)
_NAMED = {"name": str}
_SETTINGS = {
    "task": _NAMED | dict.fromkeys(("modality?", "kind?"), str),
    "model": {**_NAMED, "target_modules?": ([str], None)},
    "method": _NAMED,
    "importance?": ({"name?": str}, None),
    "calibration": dict.fromkeys(("budget?", "threshold?"), _MAYBE),
    "mask?": ({**dict.fromkeys(("granularity?", "rows?", "columns?"), str), "*": (*_MAYBE, str)}, None),
    "trainer": {"learning_rate": (*_NUMBER, str)},
}
_METRICS = {"test": {"primary": str}, "*": ({"*": (*_MAYBE, str)}, None)}
_PARAMETERS = {
    **dict.fromkeys(("adapter_dense", "adapter_trainable", "head"), _NUMBER),
    "adapter_sparsity": _MAYBE,
    "adapter_final?": _NUMBER,
}
_CALIBRATION = {
    **dict.fromkeys(("baseline?", "joint?", "threshold?", "budget?"), _MAYBE),
    "warnings?": ([str], None),
    "reliability?": ({"spearman_brown?": _MAYBE}, None),
}
_FILE = (int, {"size": int, "sha256": str}, None)


class _Trained(TypedDict):
    """Fields that every record of a finished training has."""

    config: Annotated[dict, _SETTINGS]  # the settings, as far as a report reads them
    seed: int
    metrics: Annotated[dict, _METRICS]  # by split
    parameters: Annotated[dict, _PARAMETERS]  # `budget.counts_of`
    seconds: Annotated[dict, {**dict.fromkeys(("calibrate", "train", "evaluate"), _NUMBER), "*": _NUMBER}]
    calibration: Annotated[dict | None, (_CALIBRATION, None)]  # `Calibration.summary`
    sparsity: Annotated[Mapping | None, ({"*": {"rows": _NUMBER, "columns": _NUMBER}}, None)]  # by module
    history: Annotated[list, [{"step": _NUMBER, "*": _MAYBE}]]  # Trainer's
    versions: dict[str, str]  # of Python and the libraries


class Record(_Trained, total=False):
    """The record of a run: raw numbers, and enough to know where they come from."""

    format: int
    status: str  # running, paused, finished or failed
    error: str  # why it failed, in one line
    refused: bool  # before anything was calibrated or trained
    killed: bool  # before it could say why
    started: str | None
    attempts: int
    git_commit: str | None
    preset: str | None
    device: str | None
    mixed_precision: str | None  # that was computed in
    digests: dict[str, str] | None  # of the files that settings name, by key
    places: dict[str, str] | None  # of these files, on this machine
    commits: dict[str, str] | None  # of models of the hub
    labels: list[str]
    warnings: list[str]
    shapes: dict[str, list[int]]  # of the modules that were calibrated
    fixed: dict[str, Any]  # what decides the size of a run that is not calibrated
    training: Annotated[dict | None, ({"learning_rate?": _NUMBER}, None)]  # its length and its rates
    resumed_from_step: int | None
    peak_memory_bytes: int | None
    cost: dict[str, float | None] | None  # of a training step, and of what it leaves
    files: Annotated[dict | None, ({"*": _FILE}, None)]  # of a finished run; earlier records have sizes alone


def _shape(hint: Any) -> Any:
    """Return the shape that a type says, or that stands beside it."""
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return inner[1]
    if origin in (Union, UnionType):
        return tuple(_shape(one) for one in inner)
    if origin is list:
        return [_shape(inner[0])]
    if origin is dict:
        return {"*": _shape(inner[1])}
    return {float: _NUMBER, NoneType: None, Any: object}.get(hint, hint)


_FIELDS = {name: _shape(hint) for name, hint in get_type_hints(Record, include_extras=True).items()}
RECORD = {name if name in Record.__required_keys__ else f"{name}?": shape for name, shape in _FIELDS.items()}
# Of any record, finished or not.
HEAD = {"status": str} | {f"{name}?": _FIELDS[name] for name in ("files", "versions", "commits")}
HEAD |= {"seconds?": {"*": _NUMBER}}


def fault(value: object, shape: object = RECORD, key: str = "") -> str | None:
    """Return what in a record has not the shape, in words that name its key; None where all has it."""
    if isinstance(shape, tuple):
        faults = [fault(value, one, key) for one in shape]
        return None if None in faults else faults[0]
    if isinstance(shape, list) and isinstance(value, list):
        return next(filter(None, (fault(item, shape[0], key) for item in value)), None)
    if isinstance(shape, dict) and isinstance(value, Mapping):
        for name, inner in shape.items():
            for each in value if name == "*" else [name.rstrip("?")]:
                path = f"{key}.{each}".lstrip(".")
                if each not in value and not name.endswith("?"):
                    return f"no {path} in it"
                if each in value and (found := fault(value[each], inner, path)):
                    return found
        return None
    fits = value is None if shape is None else isinstance(shape, type) and isinstance(value, shape)
    return (
        None
        if fits and not (isinstance(value, bool) and shape in _NUMBER)
        else f"its {key or 'content'} is {value!r:.60}"
    )
