"""Methods beside a reference: who is compared with whom, how far apart they are, and what each costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import pandas as pd

from partial_lora.errors import PartialLoraError, one_line, shortlist
from partial_lora.files import flatten, grouped
from partial_lora.report.folders import OF_SEED, Folder, folders, told_apart
from partial_lora.report.pairs import Outcome, Pair, between
from partial_lora.report.predictions import Predictions
from partial_lora.report.records import Run
from partial_lora.report.rows import COSTS, NONE, PLACE, as_typed, conditions, differing, point_order
from partial_lora.report.statistics import MARGIN, reliability, together
from partial_lora.report.summary import measured
from partial_lora.report.tables import cells_of, signed, tabulated, written
from partial_lora.settings import schema
from partial_lora.tasks.metrics import OF_EXAMPLES

REFERENCE = "partial"
_MOST_NAMED = 5
_MOST_DIFFERENCES = 4
_MOST_REFERENCES = 3  # of one place, point, conditions and measure; other methods are compared with each of them


@dataclass(frozen=True)
class Differences:
    """Every other method beside the reference, a row each (`differences`).

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
        """True where anything was compared at all."""
        return "difference" in self.rows and bool(self.rows["difference"].notna().any())


def differences(runs: Sequence[Run], predictions: Predictions) -> Differences:
    """Compare the methods of runs with REFERENCE, in the pairs of `comparison.paired`.

    Numbers are as measured: difference and interval of the metric itself, seconds, bytes (means over seeds), and how
    reliable the sparsities are. Without predictions there are no differences.
    """
    every = folders(runs)
    pairing = paired(every, REFERENCE)
    problems: dict[str, list[str]] = {}
    differs = told_apart(every)
    rows = [_row(*pair, differs) for pair in pairing.pairs]
    predicted = any(predictions.exist(folder.name, folder.seeds) for folder in every)
    if predicted:
        for (folder, base), row in zip(pairing.pairs, rows, strict=True):
            difference = _difference(predictions, (folder, base))
            if isinstance(difference, str):
                # Runs without a common seed are no problem: perhaps they are still to be made.
                kind = problems if set(folder.seeds) & set(base.seeds) else pairing.apart
                kind.setdefault(difference, []).append(folder.name)
            else:
                row |= difference
    if not any(folder.row["method"] == REFERENCE for folder in every):
        pairing.remarks.append(f"none of these runs is of {REFERENCE}")
    elif not predicted:
        pairing.remarks.append("none of these runs has kept its predictions")
    remarks = tuple(pairing.remarks) if len(every) > 1 else ()
    compared = pd.DataFrame(rows)
    if "difference" in compared:
        compared = together(compared, seeds="pairs")
    return Differences(compared, _lines(problems), _lines(pairing.apart), remarks)


# Who is compared with whom


@dataclass
class Pairing:
    """Each folder with the reference that it is compared with, references with themselves first.

    apart: why no pair was made, and the folders that this concerns. remarks: what a reader should know of how the pairs
    were chosen, a line each.
    """

    pairs: list[tuple[Folder, Folder]] = field(default_factory=list)
    apart: dict[str, list[str]] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def paired(every: Sequence[Folder], reference: str) -> Pairing:
    """Return who is compared with whom: `reference` with all others of its `BLOCK`.

    Methods without an operating point are compared at every point, and calibrated methods with references of the same
    measure of importance, the plainest measure first. A variant (`Folder.is_variant`) is a reference only where there
    is no other. Up to three references of a measure are all taken; of more, those nearest to the schema's defaults, if
    these are no more than three.
    """
    pairing = Pairing()
    for of_place in grouped(every, lambda folder: tuple(folder.row[name] for name in PLACE)).values():
        references = [folder for folder in of_place if folder.row["method"] == reference]
        if references and (why := _not_by_examples(references[0])):
            pairing.remarks.append(why)
            continue
        apart: dict[tuple[str, str], list[str]] = {}
        by_point = grouped(references, lambda folder: folder.row["operating_point"])
        for point in sorted(by_point, key=point_order):
            at_point = [folder for folder in of_place if folder.row["operating_point"] in (point, NONE)]
            _pair(at_point, by_point[point], pairing)
            shared = {folder.row["conditions"] for folder in by_point[point]}
            for folder in at_point:
                if folder.row["conditions"] not in shared:
                    apart.setdefault((folder.name, _nearest(folder, by_point[point])), []).append(point)
        for (name, where), points in apart.items():
            what = f"trained under other conditions than {reference} at {' and '.join(points)}: {where}"
            pairing.apart.setdefault(what, []).append(name)
    return pairing


def _pair(folders: Sequence[Folder], references: Sequence[Folder], pairing: Pairing) -> None:
    """Add the pairs of each of the references at a point: itself, and the folders under its conditions and measure."""
    usual = schema.defaults()["importance.name"]
    groups = grouped(references, lambda folder: (folder.row["conditions"], folder.measure))
    # The schema's own measure first, and then the plainest.
    order = sorted(groups, key=lambda key: (key[1] != usual, min(folder.distance for folder in groups[key])))
    for shared, measure in order:
        comparable = [folder for folder in folders if folder.row["conditions"] == shared]
        comparable = [folder for folder in comparable if folder.measure in (None, measure)]
        for base in _references(groups[shared, measure], pairing):
            others = (folder for folder in comparable if folder is not base)
            pairing.pairs += [(folder, base) for folder in (base, *others)]


def _not_by_examples(folder: Folder) -> str | None:
    """Return why a task's runs cannot be compared example by example; None where they can."""
    task, metric = folder.row["task"], folder.row["metric"]
    if folder.config["task"].get("members"):
        return f"{task}: a mixture; `partial-lora evaluate RUN --member NAME` says how each of its members is done"
    if metric not in OF_EXAMPLES:
        return f"{task}: measured by {metric}, which predictions do not say"
    return None


def _references(several: Sequence[Folder], pairing: Pairing) -> Sequence[Folder]:
    """Return the references that others are compared with; where they are some of many, a remark says so."""
    several = [folder for folder in several if not folder.is_variant] or several
    if len(several) <= _MOST_REFERENCES:
        return several
    plainest = [folder for folder in several if folder.distance == min(other.distance for other in several)]
    names = shortlist([folder.name for folder in plainest], _MOST_NAMED)
    if len(plainest) <= _MOST_REFERENCES:
        which = f"{len(several)} whose own settings are further from the defaults"
        pairing.remarks.append(f"{names}: compared with, of {which}")
        return plainest
    settings = [{key: str(value) for key, value in flatten(folder.config).items()} for folder in plainest]
    keys = sorted({key for values in settings for key in values} - set(OF_SEED))
    varied = next((key for key in keys if len({values.get(key) for values in settings}) > 1), None)
    choose = f"choose with --where {varied}=…" if varied else "they have the same settings"
    why = f"{len(plainest)} to compare with, expected at most {_MOST_REFERENCES}; {choose}"
    pairing.apart.setdefault(why, []).append(names)
    return []


def _nearest(folder: Folder, references: Sequence[Folder]) -> str:
    """Return where a folder's conditions differ from those of the nearest reference; the first few of many."""
    settings = conditions(folder.runs[0].record)
    nearest = min((differing(settings, conditions(base.runs[0].record)) for base in references), key=len)
    words = [f"{key} {as_typed(value)} against {as_typed(others)}" for key, value, others in nearest]
    more = len(words) - _MOST_DIFFERENCES
    return ", ".join(words[:_MOST_DIFFERENCES] + ([f"{more} more"] if more > 0 else []))


# Rows


def _lines(reasons: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """Return lines: the names that a reason concerns, then the reason."""
    return tuple(f"{', '.join(dict.fromkeys(names))}: {reason}" for reason, names in reasons.items())


def _difference(predictions: Predictions, pair: tuple[Folder, Folder]) -> dict | str:
    """Return how much better the first of a pair is than the second, or why their examples cannot be compared."""
    if pair[0] is pair[1]:
        return {}
    sides = ({run.row["seed"]: Outcome.of(run.row, predictions) for run in side.runs} for side in pair)
    both = Pair(*sides, pair[1].row["metric"])
    try:
        numbers = asdict(between(both))
        if not numbers["examples"]:
            both.by_example(sorted(both.seeds))  # raises what says why
    except (PartialLoraError, ValueError, KeyError) as error:
        return one_line(error)
    return {
        "pairs" if name == "seeds" else name: numbers[name] for name in numbers if name not in ("over", "up", "down")
    }


def _row(folder: Folder, base: Folder, differs: Mapping[tuple[str, str], str]) -> dict:
    runs = pd.DataFrame([run.row for run in folder.runs])
    averaged = ("adapter_parameters", "share_of_dense", *COSTS)
    return {
        **{name: folder.row[name] for name in ("task", "model")},
        "operating_point": base.row["operating_point"],
        **{name: folder.row[name] for name in ("method", "metric")},
        "differs": differs[folder.key],
        "n": len(runs),
        "test_mean": runs["test"].mean(),
        "test_std": runs["test"].std(),
        **runs[list(averaged)].mean().to_dict(),
        "reliability": reliability(run.record for run in folder.runs),
        "learning_rate": folder.row["learning_rate"],
        "group": folder.name,
        "reference": base.name,
        "reference_differs": differs[base.key],
    }


# Files


def write(compared: Differences, results_dir: Path, *, command: str) -> list[Path]:
    """Write results_dir/report/comparison.md and .csv; gives the files, none where there is nothing to compare.

    Each begins with the command that made it. Where nothing was compared, comparison.md alone says why.
    """
    for stale in (Path(results_dir) / "report").glob("comparison.*"):  # from an earlier report, perhaps of other runs
        stale.unlink()
    if not compared.known and not compared.uncompared:
        return []
    command = " ".join(command.split())  # it may have lines of its own
    parts, files = [f"    {command}"], {}
    if compared.known:
        parts += [tabulated(readable(compared.rows), "pipe"), *notes(compared)]
        files = {"comparison.csv": f"# {command}\n" + compared.rows.to_csv(index=False)}
    if compared.uncompared:
        parts.append("Not compared:\n\n" + "\n".join(f"- {line}" for line in compared.uncompared))
    return written(results_dir, {"comparison.md": "\n\n".join(parts) + "\n"} | files)


def notes(compared: Differences) -> list[str]:
    """Return what a reader of a table of differences has to know, a sentence or two each."""
    rows = compared.rows
    pairs = rows["pairs"].dropna()
    below = {
        f"Differences are from {REFERENCE} at the same operating point and under the same conditions, over the test "
        "examples and seeds of both, with 95 % intervals over both from variance components (of shares in points; "
        f"Student's t). better: the interval is above zero; matches: it is above −{100 * MARGIN:g} point; worse: it is "
        "below zero, and not above that; undecided: else. After correction: what is left of a verdict, corrected for "
        "all of the report (Holm). Reliability is "
        "of the calibrated sparsities: how far those of different seeds correlate, or those of two halves of a draw "
        "(Spearman–Brown).": True,
        "n counts seeds: 1 of 3 is a difference over the one that both have, beside a score over all three.": (
            pairs < rows.loc[pairs.index, "n"]
        ).any(),
        "A difference over one seed has an interval over examples alone: how much seeds vary is not in it.": (
            pairs < 2
        ).any(),
        "Against: what the reference differs in, of which there are several at that operating point; – is the one with "
        "the usual settings.": (rows.groupby([*PLACE, "operating_point"])["reference"].nunique() > 1).any(),
    }
    return [*(note for note, applies in below.items() if applies), *(f"{remark}." for remark in compared.remarks)]


def readable(rows: pd.DataFrame) -> pd.DataFrame:
    """Return a comparison as it is read: words and rounded numbers."""
    at_point = ["task", "model", "operating_point"]
    several = (rows.groupby(at_point)["reference"].nunique() > 1).any()
    some_differ = (rows["differs"] != NONE).any()
    columns = {
        **{name.replace("_", " "): rows[name] for name in (*at_point, "method")},
        "differs in": rows["differs"] if some_differ else None,
        "against": rows["reference_differs"] if several else None,
        "n": [
            str(n) if math.isnan(pairs) or pairs == n else f"{pairs:.0f} of {n}"
            for n, pairs in zip(rows["n"], rows["pairs"], strict=True)
        ],
        "test": [measured(row.metric, row.test_mean, row.test_std) for row in rows.itertuples()],
        "difference [95 %]": [_difference_of(row) for row in rows.itertuples()],
        "verdict": [_verdict(row) for row in rows.itertuples()],
        f"after correction for {rows['among'].iloc[0]}": rows["together"].fillna(NONE),
        "adapter parameters": cells_of(rows["adapter_parameters"], ",.0f"),
        "of dense": cells_of(rows["share_of_dense"], ".1%"),
        "adapter file (KB)": cells_of(rows["adapter_bytes"] / 1e3, ",.0f"),
        "optimizer (KB)": cells_of(rows["optimizer_bytes"] / 1e3, ",.0f"),
        "step (ms)": cells_of(rows["step_seconds"] * 1e3, ",.0f"),
        "activations (MB)": cells_of(rows["saved_activation_bytes"] / 1e6, ",.1f"),
        "learning rate": cells_of(rows["learning_rate"], "g"),
        "reliability": cells_of(rows["reliability"], ".2f"),
        "id": rows["group"].str.rpartition("-")[2] if some_differ else None,
    }
    return pd.DataFrame({name: cells for name, cells in columns.items() if cells is not None})


def in_words(row: tuple) -> str:
    """Return the difference of a row of `differences` with its verdict, in the metric's own unit or in points."""
    difference = _difference_of(row).partition(" ")[0]
    return difference if difference == NONE else f"{difference}, {_verdict(row)}"


def _difference_of(row: tuple) -> str:
    return NONE if math.isnan(row.difference) else signed(row.metric, row.difference, row.low, row.high)


def _verdict(row: tuple) -> str:
    if row.group == row.reference:
        return "reference"
    if not isinstance(row.verdict, str):
        return NONE
    return row.verdict + (f" ({row.reason})" if isinstance(row.reason, str) else "")
