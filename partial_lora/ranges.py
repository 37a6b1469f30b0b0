"""Ranges of settings, as the annotations of their dataclasses have them.

`Annotated[float, "(0, 1]"]` is a number above 0 and at most 1, `Annotated[str, ("ddp", "fsdp")]` one of two words; of a
list they are those of an item. Beside `Any` the annotation has the type, too: `Annotated[Any, float, "(0, inf)",
("auto",)]`. What checks a run, the table of keys in the documentation and an editor's JSON Schema all read them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from partial_lora.errors import in_yaml, require


@dataclass(frozen=True)
class Interval:
    """Numbers between two ends, as an annotation has them: "[1, 2^31)"."""

    text: str

    @property
    def low(self) -> float:
        return _number(self.text[1:-1].split(", ")[0])

    @property
    def high(self) -> float:
        return _number(self.text[1:-1].split(", ")[1])

    def __contains__(self, value: float) -> bool:
        above = self.low <= value if self.text[0] == "[" else self.low < value
        return above and (value <= self.high if self.text[-1] == "]" else value < self.high)

    def __str__(self) -> str:
        if self.high == math.inf:
            return f"of at least {self.low}" if self.text[0] == "[" else f"above {self.low}"
        return f"in {self.text}"

    def as_json(self) -> dict[str, float]:
        """Return the bounds as JSON Schema has them."""
        low = {"minimum" if self.text[0] == "[" else "exclusiveMinimum": self.low}
        high = {"maximum" if self.text[-1] == "]" else "exclusiveMaximum": self.high}
        return low if self.high == math.inf else low | high


def _number(text: str) -> float:
    base, _, power = text.partition("^")
    value = float(base) ** float(power or 1)
    return int(value) if value.is_integer() else value


@dataclass(frozen=True)
class Values:
    """The values that a setting may have.

    kinds: their types, NoneType for null; of a list, those of its items. interval: of numbers; None: all. words: of
    texts; empty: all.
    """

    kinds: tuple[Any, ...]
    is_list: bool
    interval: Interval | None
    words: tuple[str, ...]

    @classmethod
    def of(cls, annotation: Any) -> Values:
        """Return the values that an annotation allows."""
        kind, *notes = get_args(annotation) if get_origin(annotation) is Annotated else (annotation,)
        for note in notes:
            kind = kind if isinstance(note, (str, tuple)) else note
        is_list = get_origin(kind) is list
        kinds = get_args(kind) if is_list or get_origin(kind) in (Union, UnionType) else (kind,)
        interval = next((Interval(note) for note in notes if isinstance(note, str)), None)
        words = next((note for note in notes if isinstance(note, tuple)), ())
        return cls(tuple(get_origin(kind) or kind for kind in kinds), is_list, interval, words)

    def __contains__(self, value: object) -> bool:
        """Return whether a value, of a list each item, is in the interval or one of the words."""
        if self.is_list:
            return all(item in self.words for item in value)
        if isinstance(value, str):
            return value in self.words or (str in self.kinds and not self.words)
        if isinstance(value, Real) and not isinstance(value, bool):
            fits = float in self.kinds or isinstance(value, Integral)
            return fits and self.interval is not None and value in self.interval
        return bool in self.kinds if isinstance(value, bool) else isinstance(value, self.kinds)

    @property
    def types(self) -> str:
        """The types, as the documentation has them; none where any will do."""
        names = (_JSON[kind] for kind in self.kinds if kind in _JSON)
        return "list of " * self.is_list + " or ".join(names)

    @property
    def expected(self) -> str:
        """The interval and the words, as errors have them; none where the types alone decide."""
        number = "a number" if float in self.kinds else "a whole number"
        found = [f"{number} {self.interval}"] if self.interval else []
        found += map(in_yaml, self.words)
        if found and dict in self.kinds:
            found.append("{key: value}")
        if found and type(None) in self.kinds:
            found.append("null")
        return " or ".join(found)

    def as_json(self) -> dict[str, Any]:
        """Return the JSON Schema of the values. A list may be one item, and any value may be `${KEY}`."""
        if Any in self.kinds:
            return {}
        names = [_JSON[kind] for kind in self.kinds if not (kind is str and self.words)]
        bounds = self.interval.as_json() if self.interval else {}
        found = [{"type": names[0] if len(names) == 1 else names, **bounds}] if names else []
        found += [{"enum": list(self.words)}] if self.words else []
        if self.is_list:
            item = found[0]
            found = [{"type": "array", "items": item}, item]
        if str not in self.kinds or self.words:
            found.append({"$ref": "#/definitions/reference"})
        return found[0] if len(found) == 1 else {"anyOf": found}


_JSON = dict(
    zip(
        (float, int, str, bool, dict, list, type(None)),
        ("number", "integer", "string", "boolean", "object", "array", "null"),
        strict=True,
    )
)


@cache
def values_of(kind: type) -> Mapping[str, Values]:
    """Return the values that each field of a dataclass may have."""
    return {name: Values.of(hint) for name, hint in get_type_hints(kind, include_extras=True).items()}


def check(settings: Any, group: str = "") -> None:
    """Raise PartialLoraError, naming the key, for a value that its field's annotation does not allow."""
    for name, values in values_of(type(settings)).items():
        if values.interval or values.words:
            value = getattr(settings, name)
            require(value in values, f"{group}.{name}" if group else name, value, values.expected)
