"""The exceptions a user is meant to read, and the checks of a setting's range that raise them."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, get_args, get_origin, get_type_hints


class PartialLoraError(Exception):
    """A mistake in the input or in the surroundings, said in one line.

    The message names the key, file or module, what was expected and what to do. The command line prints it without a
    traceback and exits with a code other than 0.
    """

    def __str__(self) -> str:
        return escaped(super().__str__())  # what a user or a file has written is in it


class UnfitPackageError(PartialLoraError, ImportError):
    """A package is missing, or its version does not work with this one."""


_UNSHOWN = {"Cc", "Cs", "Zl", "Zp"}  # kinds of characters that move a cursor, end a line or cannot be written


def escaped(text: str) -> str:
    """Return the text in one line, whatever is in it: a name of a file may hold what moves a terminal's cursor."""
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in _UNSHOWN and char != "\t" else char
        for char in text
    )


def one_line(error: BaseException, most: int | None = 300) -> str:
    """Return what an exception says, in one line and cut at so many characters; its kind where it says nothing."""
    return (" ".join(str(error).split()) or type(error).__name__)[:most]


def kind_and_line(error: BaseException, most: int | None = 300) -> str:
    """Return an exception's kind and what it says, as `one_line` does: "KIND: MESSAGE"."""
    return f"{type(error).__name__}: {one_line(error, most)}"


def shortlist(names: Sequence[str], most: int = 10, between: str = ", ") -> str:
    """Return the first few names for a message, and how many more there are: "a, b and 7 more"."""
    return between.join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class ProofError(PartialLoraError):
    """A check that was asked for failed: what was made does not do what it should."""


def in_yaml(value: object) -> str:
    """Return a value as a user writes it: null, true and false where Python has words of its own, in lists, too."""
    if isinstance(value, list):
        return f"[{','.join(map(in_yaml, value))}]"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def require(holds: bool, key: str, value: object, expected: str) -> None:
    """Raise PartialLoraError, `key=value: expected ...`, where a condition does not hold."""
    if not holds:
        raise PartialLoraError(f"{key}={in_yaml(value)}: expected {expected}")


def typed(settings: Any, group: str) -> None:
    """Raise PartialLoraError for a value of settings, a dataclass, that is of another type than its field's.

    Numbers become Python's own, which JSON knows, from numpy's.
    """
    for name, kind in get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        if of_type(f"{group}.{name}", value, kind) and not isinstance(value, (int, float)):
            setattr(settings, name, int(value) if isinstance(value, Integral) else float(value))


def of_type(key: str, value: object, kind: Any) -> bool:
    """Return whether a value is a number; raise PartialLoraError for one of another type than an annotation's."""
    kinds = tuple(get_origin(each) or each for each in get_args(kind) or (kind,))
    number = (float in kinds and isinstance(value, Real)) or (int in kinds and isinstance(value, Integral))
    fits = kind is Any or (bool in kinds if isinstance(value, bool) else number or isinstance(value, kinds))
    require(fits, key, value, " or ".join(TYPES[each] for each in kinds if each in TYPES))
    return number


TYPES = {float: "a number", int: "a whole number", str: "a text", bool: "true or false", type(None): "null"}


def one_of(key: str, value: object, *known: object) -> None:
    """Raise PartialLoraError for a value that is none of a few words."""
    require(value in known, key, value, " or ".join(map(in_yaml, known)))
