"""The shape of a run's record, as far as reports and finished runs read it."""

from __future__ import annotations

from collections.abc import Mapping

_NUMBER = (int, float)
_MAYBE = (*_NUMBER, None)
_NAMED = {"name": str}
_FILES = ({"*": (int, {"size": int, "sha256": str}, None)}, None)  # of a finished run; earlier records have sizes alone

# Of any record, finished or not.
HEAD = {
    "status": str,
    "files?": _FILES,
    "seconds?": {"*": _NUMBER},
    "versions?": {"*": str},
    "commits?": ({"*": str}, None),
}

# A type; None, for null; (one shape, or another); [of every item]; {key: of its value}, where `key?` may be missing and
# `*` is every key.
RECORD = {
    "config": {
        "task": _NAMED | dict.fromkeys(("modality?", "kind?"), str),
        "model": {**_NAMED, "target_modules?": ([str], None)},
        "method": _NAMED,
        "importance?": ({"name?": str}, None),
        "calibration": dict.fromkeys(("budget?", "threshold?"), _MAYBE),
        "mask?": ({**dict.fromkeys(("granularity?", "rows?", "columns?"), str), "*": (*_MAYBE, str)}, None),
        "trainer": {"learning_rate": (*_NUMBER, str)},
    },
    "seed": int,
    "metrics": {"test": {"primary": str}, "*": ({"*": (*_MAYBE, str)}, None)},
    "parameters": {
        **dict.fromkeys(("adapter_dense", "adapter_trainable", "head"), _NUMBER),
        "adapter_sparsity": _MAYBE,
        "adapter_final?": _NUMBER,
    },
    "seconds": {**dict.fromkeys(("calibrate", "train", "evaluate"), _NUMBER), "*": _NUMBER},
    "calibration": (
        {
            **dict.fromkeys(("baseline?", "joint?", "threshold?", "budget?"), _MAYBE),
            "warnings?": ([str], None),
            "reliability?": ({"spearman_brown?": _MAYBE}, None),
        },
        None,
    ),
    "sparsity": ({"*": {"rows": _NUMBER, "columns": _NUMBER}}, None),
    "history": [{"step": _NUMBER, "*": _MAYBE}],
    "cost?": ({"*": _MAYBE}, None),
    "training?": ({"learning_rate?": _NUMBER}, None),
    "warnings?": [str],
    "versions": {"*": str},
    **dict.fromkeys(("git_commit?", "device?", "preset?", "mixed_precision?", "started?"), (str, None)),
    "labels?": [str],
    "files?": _FILES,
    **dict.fromkeys(("digests?", "commits?", "places?"), ({"*": str}, None)),
}


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
    return None if fits and not isinstance(value, bool) else f"its {key or 'content'} is {value!r:.60}"
