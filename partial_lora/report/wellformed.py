"""What of a record reports read, and of which shape it has to be: a foreign one is named before it is used."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from partial_lora.report.places import AXES


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
