"""The settings by which `compare` judges finished scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from partial_lora.errors import one_of, require
from partial_lora.settings.arguments import is_file, parsed


@dataclass
class Judging:
    """Settings by which finished scores are judged.

    places: files and folders. margin: points within which a method is as good as another. reference: the method that
    others are compared with; None: the best. rows: test rows behind each score, where a file does not say it. metric:
    of those that a file has; None: the first. lower: whether less is better, of a metric that has no name here.
    """

    places: list[Path]
    margin: float = 1.0
    reference: str | None = None
    rows: int | None = None
    metric: str | None = None
    lower: bool | None = None
    results_dir: str = "verdict"

    def __post_init__(self) -> None:
        number = type(self.margin) in (int, float) and 0 < self.margin < math.inf
        require(number, "margin", self.margin, "points, such as 1")
        whole = self.rows is None or (type(self.rows) is int and self.rows > 1)
        require(whole, "rows", self.rows, "a whole number, at least 2")
        one_of("lower", self.lower, None, True, False)

    @classmethod
    def of(cls, arguments: Sequence[str]) -> Judging | None:
        """Return what a command line asks to be judged; None where it names no file or folder of scores."""
        places = [word for word in arguments if _is_place(word)]
        if not places:
            return None
        names, values = [one.name for one in fields(cls)][1:], {}
        for setting in arguments:
            if setting not in places:
                key, _, value = setting.partition("=")
                require(key in names, key, value, f"beside finished scores one of {', '.join(names)}")
                # Names of methods are texts, and may hold what is grammar elsewhere.
                written = None if key in ("reference", "metric", "results_dir") else parsed(setting)
                values[key] = value if written is None else written.value()
        return cls([Path(place) for place in places], **values)


def _is_place(word: str) -> bool:
    """Return whether an argument is a file or folder of scores, not a setting nor a file of settings."""
    return not is_file(word) and ("=" not in word or Path(word).exists())
