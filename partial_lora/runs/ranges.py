"""What a value of a setting has to be, said by its key where it is not."""

from __future__ import annotations

import math
import re

from omegaconf import MISSING

from partial_lora.errors import PartialLoraError


def require(holds: bool, key: str, value: object, expected: str) -> None:
    """Raises PartialLoraError, `key=value: expected ...`, where a condition does not hold."""
    if not holds:
        raise PartialLoraError(f"{key}={value}: expected {expected}")


def positive(key: str, value: float) -> None:
    """A finite number above 0."""
    require(0 < value < math.inf, key, value, "a number above 0")


def plain_name(key: str, value: str) -> None:
    """A name that may become a folder's; a missing one is refused where settings are resolved."""
    plain = re.fullmatch(r"\w[\w.-]*", value) is not None
    require(plain or value == MISSING, key, value, "letters, digits, dots, dashes, underscores")


def one_of(key: str, value: object, *known: str) -> None:
    """One of a few words."""
    require(value in known, key, value, " or ".join(map(str, known)))
