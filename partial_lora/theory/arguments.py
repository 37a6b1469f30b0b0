"""What an argument of a statement has to be, said in one line where it is not."""

from __future__ import annotations

import math

from partial_lora.errors import PartialLoraError


def share(name: str, value: float) -> float:
    """A rate above 0 and at most 1: what is kept, of which there is always something."""
    if not 0 < value <= 1:
        raise PartialLoraError(f"{name}={value}: expected a share above 0 and at most 1")
    return float(value)


def failure(name: str, value: float) -> float:
    """A probability of failure: above 0 and below 1."""
    if not 0 < value < 1:
        raise PartialLoraError(f"{name}={value}: expected a probability above 0 and below 1")
    return float(value)


def positive(name: str, value: float) -> float:
    """A finite number above 0."""
    if not 0 < value < math.inf:
        raise PartialLoraError(f"{name}={value}: expected a finite number above 0")
    return value


def count(name: str, value: int, at_most: int | None = None) -> int:
    """A whole number of at least 1, and no larger than `at_most`."""
    if value != int(value) or value < 1 or (at_most is not None and value > at_most):
        limit = "" if at_most is None else f" to {at_most}"
        raise PartialLoraError(f"{name}={value}: expected a whole number from 1{limit}")
    return int(value)
