"""What runs predicted, for those who compare them: every file is read once, and of it no more than is compared."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from pyarrow.parquet import ParquetFile

from partial_lora.errors import PartialLoraError
from partial_lora.runs.results import PREDICTIONS

_COMPARED = {"label", "prediction", "prediction_norm", "exact_match", "rouge_l", "member"}
_OF_ALL_TOGETHER = {"f1", "matthews", "pearson", "spearman"}  # metrics that also ask how many outputs there are


class Predictions:
    """The predictions of the runs under a results directory, a row a test example."""

    def __init__(self, results_dir: Path) -> None:
        self._place = Path(results_dir)
        self._read: dict[tuple[str, int, bool], pd.DataFrame] = {}

    def of(self, group: str, seeds: Iterable[int], metric: str) -> dict[int, pd.DataFrame]:
        """What the runs of a folder predicted, by seed: the columns that `metric` is computed from.

        Raises PartialLoraError where a run has none, ValueError where its file is broken.
        """
        return {seed: self._frame(group, seed, whole=metric in _OF_ALL_TOGETHER) for seed in seeds}

    def said(self, group: str, seed: int) -> np.ndarray | None:
        """The prediction for every example (N,); None where there is none to be read."""
        try:
            return self._frame(group, seed, whole=False)["prediction"].to_numpy()
        except (PartialLoraError, ValueError, KeyError):
            return None

    def kept(self, group: str, seeds: Iterable[int]) -> bool:
        """Whether any of these runs has kept its predictions."""
        return any(self._file(group, seed).is_file() for seed in seeds)

    def _frame(self, group: str, seed: int, *, whole: bool) -> pd.DataFrame:
        key = (group, seed, whole)
        if key not in self._read:
            self._read[key] = self._read_anew(*key)
        return self._read[key]

    def _read_anew(self, group: str, seed: int, whole: bool) -> pd.DataFrame:
        try:
            with ParquetFile(self._file(group, seed)) as file:  # pandas' own reader takes ten times as long
                columns = None if whole else [name for name in file.schema_arrow.names if name in _COMPARED]
                return file.read(columns, use_threads=False).to_pandas()
        except FileNotFoundError as error:
            advice = "train it again with overwrite=true"
            raise PartialLoraError(f"{group}/seed{seed} has no {PREDICTIONS}; {advice}") from error
        except OSError as error:
            raise ValueError(f"{group}/seed{seed}/{PREDICTIONS} cannot be read: {error}") from error

    def _file(self, group: str, seed: int) -> Path:
        return self._place / group / f"seed{seed}" / PREDICTIONS
