"""Methods compared with one of them, under the same conditions: differences with intervals, and what each costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from statistics import stdev

import numpy as np
import pandas as pd

from partial_lora.errors import PartialLoraError
from partial_lora.report.comparison import compared
from partial_lora.report.pairing import Folder, folders, paired
from partial_lora.report.predicted import Predictions
from partial_lora.report.retest import reliability
from partial_lora.report.runs import Run, number

COSTS = ("adapter_bytes", "optimizer_bytes", "step_seconds", "saved_activation_bytes")


@dataclass(frozen=True)
class Differences:
    """Every other method beside the reference, a row each (`table`).

    problems: what should have been compared and could not be, a line each. apart: what is not to be compared, such as
    methods trained under other conditions or with other seeds. remarks: what else there is to say.
    """

    rows: pd.DataFrame
    problems: tuple[str, ...] = ()
    apart: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def uncompared(self) -> tuple[str, ...]:
        """All that was not compared, a line each."""
        return self.problems + self.apart

    @property
    def known(self) -> bool:
        """Whether anything was compared at all."""
        return "difference" in self.rows and bool(self.rows["difference"].notna().any())


def table(found: Sequence[Run], predictions: Predictions, reference: str = "partial") -> Differences:
    """Compare the methods of runs with `reference`, each with its like (`pairing.paired`).

    Numbers are as measured: difference and interval of the metric itself, seconds, bytes (means over seeds), and how
    reliable the sparsities are. Of records alone, without predictions, there are no differences.
    """
    known = folders(found)
    made = paired(known, reference)
    problems: dict[str, list[str]] = {}
    rows = [_row(*pair) for pair in made.pairs]
    kept = any(predictions.kept(each.name, each.seeds) for each in known)
    if kept:
        with ThreadPoolExecutor() as pool:  # most of it is drawing random numbers, which numpy does side by side
            said = pool.map(partial(_difference, predictions), made.pairs)
            for (folder, base), row, difference in zip(made.pairs, rows, said, strict=True):
                if isinstance(difference, str):
                    # Runs of other seeds are not broken: there are no such runs yet, perhaps.
                    kind = problems if set(folder.seeds) & set(base.seeds) else made.apart
                    kind.setdefault(difference, []).append(folder.name)
                else:
                    row |= difference
    if not any(each.row["method"] == reference for each in known):
        made.remarks.append(f"none of these runs is of {reference}")
    elif not kept:
        made.remarks.append("none of these runs has kept its predictions")
    remarks = tuple(made.remarks) if len(known) > 1 else ()
    return Differences(pd.DataFrame(rows), _lines(problems), _lines(made.apart), remarks)


def _lines(named: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """What there is to say, of whom: a line each."""
    return tuple(f"{', '.join(dict.fromkeys(names))}: {what}" for what, names in named.items())


def _difference(predictions: Predictions, pair: tuple[Folder, Folder]) -> dict | str:
    """How much better the first of a pair is than the second; in words why that cannot be said."""
    if pair[0] is pair[1]:
        return {}
    metric = pair[1].row["metric"]
    both = set(pair[0].seeds) & set(pair[1].seeds)  # no matter whether the others' predictions are there
    try:
        found = compared(*(predictions.of(each.name, sorted(both) or each.seeds, metric) for each in pair), metric)
    except (PartialLoraError, ValueError, KeyError) as error:
        return " ".join(str(error).split())
    return {
        **{name: getattr(found, name) for name in ("difference", "low", "high", "verdict", "reason")},
        "pairs": found.seeds,
        "examples": found.examples,
    }


def _row(folder: Folder, base: Folder) -> dict:
    named = folder.row
    tests = [run.row["test"] for run in folder.runs]
    return {
        **{name: named[name] for name in ("task", "model")},
        "operating_point": base.row["operating_point"],
        **{name: named[name] for name in ("method", "metric")},
        "n": len(tests),
        "test_mean": _mean(tests),
        "test_std": stdev(tests) if len(tests) > 1 else np.nan,
        **{name: _mean(run.row[name] for run in folder.runs) for name in ("adapter_parameters", "share_of_dense")},
        **{name: _mean(_cost(run, name) for run in folder.runs) for name in COSTS},
        "reliability": reliability(run.record for run in folder.runs),
        **{name: named[name] for name in ("learning_rate", "tuning")},
        "group": folder.name,
        "reference": base.name,
    }


def _cost(run: Run, name: str) -> float:
    return run.row[name] if name in run.row else number((run.record.get("cost") or {}).get(name))


def _mean(values: Iterable[float]) -> float:
    """The mean of the numbers there are; NaN of none."""
    known = [value for value in values if value == value]
    return float(np.mean(known)) if known else np.nan
