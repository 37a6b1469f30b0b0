"""Labels of a csv file, where everything is a text: which of them are numbers."""

from __future__ import annotations

import re
from collections.abc import Sequence

_TRUTHS = {"True": True, "TRUE": True, "true": True, "False": False, "FALSE": False, "false": False}
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE | re.ASCII)
_PLAIN = re.compile(r"[+-]?(0|[1-9]\d*)(\.\d*)?", re.ASCII)  # what a number is written like that is read back as it was
_CODE = re.compile(r"[+-]?0\d", re.ASCII)  # 007
_UNKNOWN = re.compile(r"[+-]?(nan|inf|infinity)", re.IGNORECASE)  # among numbers: a missing one; among words: a word
_WHOLE, _FLOAT = 2**63, 2**53  # from here on, whole numbers do not fit a column, and floats are no longer exact


def labels(cells: Sequence[str | None], regression: bool | None) -> list[str | bool | int | float | None]:
    """What the texts of a column stand for: all true or false, all numbers, or all words, as they are written.

    Numbers where nothing is lost by it: no code has a leading zero, and no two texts of a class are the same number.
    Fractions may be written as they like (0.5 and 0.50), since they are no classes; so may all numbers where
    `regression` says that they are real. None is a cell without anything in it, and stays.
    """
    texts = {cell: cell.strip() for cell in cells if cell is not None}
    if texts and texts.keys() <= _TRUTHS.keys():
        return [_TRUTHS.get(cell) for cell in cells]
    numbers = _numbers(set(texts.values()))
    if not numbers or not (regression or _lossless(numbers, regression)):
        return list(cells)
    return [None if cell is None else numbers[texts[cell]] for cell in cells]


def _numbers(texts: set[str]) -> dict[str, int | float]:
    """The numbers that texts are written as, all whole or all floats; none where one is a word, or all are unknown."""
    if not all(_NUMBER.fullmatch(text) or _UNKNOWN.fullmatch(text) for text in texts):
        return {}
    if all(_UNKNOWN.fullmatch(text) for text in texts):
        return {}
    try:
        whole = {text: int(text) for text in texts}
    except ValueError:
        return {text: float(text) for text in texts}
    return whole if all(abs(number) < _WHOLE for number in whole.values()) else {text: float(text) for text in texts}


def _lossless(numbers: dict[str, int | float], regression: bool | None) -> bool:
    known = {text: number for text, number in numbers.items() if not _UNKNOWN.fullmatch(text)}
    if any(_CODE.match(text) for text in known):
        return False
    if regression is None and any(number % 1 for number in known.values()):
        return True
    exact = all(isinstance(number, int) or abs(number) < _FLOAT for number in known.values())
    return exact and all(map(_PLAIN.fullmatch, known)) and len(set(known.values())) == len(known)
