"""A simulated value: the mean over draws and how far chance moves it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from partial_lora.errors import PartialLoraError


@dataclass(frozen=True)
class Simulated:
    """The mean of independent draws and its standard error."""

    mean: float
    standard_error: float
    draws: int

    @classmethod
    def of(cls, values: np.ndarray) -> Simulated:
        """From one value a draw (draws,); at least two of them, for the standard error."""
        values = np.asarray(values, dtype=np.float64)
        if values.ndim != 1 or len(values) < 2:
            raise PartialLoraError("draws: expected at least 2, for a standard error")
        return cls(float(values.mean()), float(values.std(ddof=1) / len(values) ** 0.5), len(values))

    @classmethod
    def share(cls, values: np.ndarray) -> Simulated:
        """The share of draws that are 1 and not 0; its error is at least that of one draw, or none would seem sure."""
        found = cls.of(values)
        return cls(found.mean, max(found.standard_error, 1 / found.draws), found.draws)
