"""Finished scores of methods, whoever made them, in one shape: what each test row adds, by method and seed.

Read are runs and packs of this project, tables (csv) of (method, seed, score) or (method, seed, row, score or correct),
the results of PEFT's method_comparison (JSON), and the samples of EleutherAI's lm-evaluation-harness (jsonl).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from partial_lora.errors import PartialLoraError, one_line, shortlist
from partial_lora.files import grouped, read_json
from partial_lora.launching.directory import RESULT, RUNS
from partial_lora.launching.packs import PREDICTIONS_TABLE, RUNS_TABLE
from partial_lora.report import filters, records, seed_groups
from partial_lora.report.predictions import Predictions
from partial_lora.report.rows import NONE
from partial_lora.report.statistics import per_example
from partial_lora.tasks.metrics import LOWER_IS_BETTER, METRICS, SHARES

PERPLEXITY = "perplexity"  # of which a hundredth of its logarithm, the loss, is a point
MOST_ROWS = 100_000  # behind a score, as far as its digits can tell
_NAMES = {  # of a table's columns, by what each holds
    "method": ("method", "model", "name"),
    "seed": ("seed",),
    "row": ("row", "doc_id", "example"),
    "score": ("score", "correct", "accuracy"),
    "task": ("task", "set", "dataset"),
    "rows": ("rows",),
}
_SAMPLES = re.compile(r"samples_(?P<task>.+?)(_\d{4}-\d\d-\d\dT[\d.-]+)?\.jsonl")


@dataclass(frozen=True)
class Scores:
    """Scores of methods on one set.

    metric: its name. by_row: method → seed → what each test row adds to the score (N,), the same rows for all; or the
    whole score alone (1,). rows: how many test rows are behind a whole score, by method; None where that is not known.
    All are as they were measured; `upward` has the sign by which more is better.
    """

    title: str
    metric: str
    by_row: Mapping[str, Mapping[int, np.ndarray]]
    lower_is_better: bool = False
    rows: Mapping[str, int | None] = field(default_factory=dict)

    @property
    def upward(self) -> dict[str, dict[int, np.ndarray]]:
        sign = -1 if self.lower_is_better else 1
        return {name: {seed: sign * one for seed, one in seeds.items()} for name, seeds in self.by_row.items()}

    @property
    def point(self) -> float:
        """A point in units of the score: a hundredth of a share, or of a loss whose exponential is measured; else 1."""
        if self.metric in SHARES or self.metric == PERPLEXITY:
            return 0.01
        values = [float(one.mean()) for seeds in self.by_row.values() for one in seeds.values()]
        return 0.01 if self.metric not in METRICS and all(0 <= value <= 1 for value in values) else 1.0


class Found(NamedTuple):
    """Scores that were read, by set, and lines on those that were left out."""

    sets: list[Scores]
    left_out: list[str]


class Score(NamedTuple):
    """A score of a method under a seed: by test row {row: value}, or whole. at: what tells which of two is later."""

    title: str
    metric: str
    method: str
    seed: int
    value: float | Mapping
    rows: int | None = None
    at: str = ""


def read(
    places: Sequence[Path],
    *,
    where: Sequence[str] = (),
    metric: str | None = None,
    lower: bool | None = None,
    rows: int | None = None,
) -> Found:
    """Return the scores of files and folders; sets of the same name and metric are one, whatever files they are of.

    where: conditions on runs of this project (`filters.where`). metric: of those that a file has; by default its first.
    lower: whether less is better, of a metric that this project does not know. rows: behind each whole score, where
    its file does not say it. Raises PartialLoraError for what is
    nothing of the kind, and for two scores of one method and seed.
    """
    found, left_out = [], []
    for kind, files in grouped(_files(places), lambda item: item[0]).items():
        if where and kind is not _of_runs:
            raise PartialLoraError(f"--where {' '.join(where)}: expected finished runs; {files[0][1]} has none")
        sets, lines = kind([file for _, file in files], where=where, metric=metric)
        found += sets
        left_out += lines
    sets = []
    for (title, name), parts in grouped(found, lambda one: (one.title, one.metric)).items():
        methods: dict[str, Mapping] = {}
        for part in parts:
            twice = methods.keys() & part.by_row.keys()
            if twice:
                raise PartialLoraError(f"{title}: {min(twice)} is in two of the files; give one of them")
            methods |= part.by_row
        is_lower = name in LOWER_IS_BETTER if lower is None else lower
        behind = {method: part.rows.get(method) or rows for part in parts for method in part.by_row}
        if len(methods) > 1:
            sets.append(Scores(title, name, _of_the_same_rows(title, methods, left_out), is_lower, behind))
        else:
            left_out.append(f"{title}: {next(iter(methods))} stands alone")
    if not sets:
        why = f" ({left_out[0]})" if left_out else ""
        raise PartialLoraError(f"{shortlist([*map(str, places)])}: expected scores of at least two methods{why}")
    return Found(sets, left_out)


def _of_the_same_rows(title: str, methods: Mapping[str, Mapping], left_out: list[str]) -> dict[str, dict]:
    """Return what is {row: value} as arrays over the rows that all have; what is an array stays one."""
    tables = [one for seeds in methods.values() for one in seeds.values() if isinstance(one, Mapping)]
    if not tables:
        return {name: dict(seeds) for name, seeds in methods.items()}
    shared = set.intersection(*(set(one) for one in tables))
    if len(tables) < sum(map(len, methods.values())) or not shared:
        raise PartialLoraError(f"{title}: expected all scores by test row, of the same rows, or none")
    order = [row for row in tables[0] if row in shared]
    if more := max(map(len, tables)) - len(order):
        left_out.append(f"{title}: {more} rows that not every method has")
    return {
        name: {seed: np.array([one[row] for row in order], float) for seed, one in seeds.items()}
        for name, seeds in methods.items()
    }


# --- What lies at a place, and who reads it.

Reader = Callable[..., tuple[list[Scores], list[str]]]


def _files(places: Iterable[Path]) -> Iterator[tuple[Reader, Path]]:
    """Yield each file, or folder of runs, with the function that reads it."""
    for place in places:
        if not place.exists():
            raise PartialLoraError(f"{place}: expected a file or a folder; there is none")
        if place.is_dir():
            yield from _in_folder(place)
        elif place.name in (RUNS_TABLE, PREDICTIONS_TABLE):
            yield _of_runs, place.parent
        elif place.suffix in _READERS:
            yield _READERS[place.suffix], place
        else:
            raise PartialLoraError(f"{place}: expected {', '.join(_READERS)}, {RUNS_TABLE} or a folder of these")


def _in_folder(place: Path) -> Iterator[tuple[Reader, Path]]:
    if (place / RUNS_TABLE).is_file() or next(place.glob(RUNS), None) or (place / RESULT).is_file():
        yield _of_runs, place
        return
    files = [file for file in sorted(place.rglob("*")) if file.suffix in (".json", ".jsonl") and file.is_file()]
    known = [(_READERS[file.suffix], file) for file in files if file.suffix == ".json" or _SAMPLES.fullmatch(file.name)]
    if any(file.suffix == ".jsonl" for _, file in known):  # beside samples there are their means, in JSON
        known = [(reader, file) for reader, file in known if file.suffix == ".jsonl"]
    if not known:
        raise PartialLoraError(f"{place}: expected finished runs, results of method_comparison or samples of lm-eval")
    yield from known


def _sets_of(scores: Iterable[Score], left_out: list[str]) -> list[Scores]:
    """Return scores by set; of two of one method and seed the later one counts, where they say which that is."""
    sets = []
    for (title, metric), of_set in grouped(scores, lambda one: (one.title, one.metric)).items():
        by_row: dict[str, dict] = {}
        for (method, seed), twins in grouped(of_set, lambda one: (one.method, one.seed)).items():
            twins = sorted(twins, key=lambda one: one.at)
            if len(twins) > 1 and twins[-1].at == twins[-2].at:
                raise PartialLoraError(f"{title}: {method} has two scores of seed {seed}; give each a seed of its own")
            left_out += [f"{title}: {method} of {twin.at}, there is a later one" for twin in twins[:-1]]
            value = twins[-1].value
            by_row.setdefault(method, {})[seed] = value if isinstance(value, Mapping) else np.array([value], float)
        rows = {one.method: one.rows for one in of_set}
        if not any(rows.values()):
            counted = rows_behind([value for one in of_set if isinstance(value := one.value, float)])
            rows = dict.fromkeys(rows, counted)
        sets.append(Scores(title, metric, by_row, rows=rows))
    return sets


def rows_behind(shares: Sequence[float]) -> int | None:
    """Return the number of test rows that shares are of, as far as their digits tell; None where they do not.

    Shares of n rows are fractions of n. Digits of a number that was rounded make a fraction of a power of ten, which
    says nothing.
    """
    rows = 1
    for share in shares:
        near = Fraction(share).limit_denominator(MOST_ROWS) if 0 <= share <= 1 else Fraction(1, MOST_ROWS)
        rows = math.lcm(rows, near.denominator)
        if abs(float(near) - share) > 1e-12 or rows > MOST_ROWS:
            return None
    return rows if 10**9 % rows else None


# --- Runs of this project.


def of_run(row: Mapping, stored: Predictions) -> tuple[np.ndarray, np.ndarray | None, str]:
    """Return a run's score (1,), what each test row adds to it (N,), None without rows, and why there are none.

    row: of `rows.row`. Of a perplexity its logarithm is taken.
    """
    metric = row["metric"]
    whole = np.array([math.log(row["test"]) if metric == PERPLEXITY else row["test"]])
    try:
        of_rows = "loss" if metric == PERPLEXITY else metric
        return whole, per_example(stored.of(row["group"], row["seed"], metric), of_rows), ""
    except (PartialLoraError, KeyError, ValueError) as error:  # not kept, not of this metric, or broken
        return whole, None, str(error) if isinstance(error, ValueError) else ""


def _of_runs(places: Sequence[Path], *, where: Sequence[str], metric: str | None) -> tuple[list[Scores], list[str]]:
    """Return the scores of runs under the same conditions, of each method at its best learning rate on validation."""
    left_out: list[str] = []
    roots = grouped(places, lambda place: place.parents[4] if (place / RESULT).is_file() else place)
    sets = []
    for root, named in roots.items():
        if (named[0] / RESULT).is_file():
            runs = [records.one(place.absolute()) for place in named]
        else:
            runs, broken = records.read(root)
            left_out += [str(run) for run in broken if run.is_broken]
        every = seed_groups.without_searches(seed_groups.folders(filters.where(runs, where)))
        differs, stored = seed_groups.told_apart(every), Predictions(root)
        by_set = grouped(every, lambda one: tuple(one.row[key] for key in ("task", "model", "metric", "conditions")))
        several = [key[:3] for key in by_set]
        for (task, model, name, conditions), of_set in by_set.items():
            if metric not in (None, name):
                left_out.append(f"{task}, {model}: measured by {name}")
                continue
            other = f" ({conditions})" if several.count((task, model, name)) > 1 else ""
            by_row = {}
            for one in of_set:
                words = [word for word in (one.row["operating_point"], differs[one.key]) if word != NONE]
                read = {run.row["seed"]: of_run(run.row, stored) for run in one.runs}
                by_row[", ".join([one.row["method"], *words])] = {
                    seed: whole if rows is None else rows for seed, (whole, rows, _) in read.items()
                }
                left_out += [why for *_, why in read.values() if why]
            sets.append(Scores(f"{task}, {model}{other}", name, by_row))
    return sets, left_out


# --- Files of others.


def _of_tables(files: Sequence[Path], *, where: Sequence[str], metric: str | None) -> tuple[list[Scores], list[str]]:
    scores: list[Score] = []
    for file in files:
        try:
            table = pd.read_csv(file)
        except (ValueError, UnicodeDecodeError) as error:
            raise PartialLoraError(f"{file}: expected a table with a line of names ({one_line(error)})") from error
        lower = {name.lower().strip(): name for name in map(str, table.columns)}
        columns = {key: next((lower[name] for name in names if name in lower), None) for key, names in _NAMES.items()}
        if metric is not None:
            columns["score"] = lower.get(metric.lower())
        for key in ("method", "score"):
            if columns[key] is None:
                has = ", ".join(map(str, table.columns))
                raise PartialLoraError(f"{file}: expected a column {metric or _NAMES[key][0]}; it has {has}")
        scores += _of_table(file, table, columns)
    left_out: list[str] = []
    return _sets_of(scores, left_out), left_out


def _of_table(file: Path, table: pd.DataFrame, columns: Mapping[str, str | None]) -> Iterator[Score]:
    """Yield the scores of a table. A method without seeds has a seed for every line, where it has no rows either."""
    values = {key: table[name] for key, name in columns.items() if name is not None}
    values["score"] = pd.to_numeric(values["score"].replace({True: 1.0, False: 0.0}), errors="coerce")
    if values["score"].isna().any():
        line = int(values["score"].isna().to_numpy().argmax()) + 2
        raise PartialLoraError(f"{file}, line {line}: expected a number for {columns['score']}")
    frame = pd.DataFrame(values)
    frame["task"] = frame["task"].astype(str) if "task" in frame else file.stem
    frame["method"] = frame["method"].astype(str)
    if "seed" not in frame:
        frame["seed"] = 0 if "row" in frame else frame.groupby(["task", "method"]).cumcount()
    name = columns["score"] if columns["score"].lower() != "correct" else "accuracy"
    for (task, method, seed), lines in frame.groupby(["task", "method", "seed"], sort=False):
        counts = int(lines["rows"].iloc[0]) if "rows" in lines and not lines["rows"].isna().any() else None
        if "row" in lines:
            of_rows = dict(zip(lines["row"], lines["score"].astype(float), strict=True))
            if len(of_rows) < len(lines):
                raise PartialLoraError(f"{file}: {method}, seed {seed}: expected each row once")
            yield Score(task, name, method, int(seed), of_rows)
        else:
            for score in lines["score"].astype(float):
                yield Score(task, name, method, int(seed), score, counts)


def _of_peft(files: Sequence[Path], *, where: Sequence[str], metric: str | None) -> tuple[list[Scores], list[str]]:
    """Return the scores that end the training of PEFT's method_comparison, a set for every model that is adapted."""
    scores, left_out = [], []
    for file in files:
        try:
            record = read_json(file)
            info, trained = record["run_info"], record["train_info"]
            config = info["train_config"]
            if trained["status"] != "success":
                left_out.append(f"{file}: {trained['status']}")
                continue
            names = [f"test {metric}"] if metric else []
            seen = next(
                (key.removeprefix("test "), entry[key])
                for entry in reversed(trained["metrics"])
                for key in names or [key for key in entry if key.startswith("test ")]
                if isinstance(entry.get(key), (int, float))
            )
            title = str(config["model_id"]).rpartition("/")[2]
            seed = int(config["seed"])
            scores.append(Score(title, seen[0], info["experiment_name"], seed, float(seen[1]), at=info["created_at"]))
        except StopIteration:
            left_out.append(f"{file}: no score of a test{f' called {metric}' if metric else ''}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            what = f"expected a result of PEFT's method_comparison ({one_line(error)})"
            raise PartialLoraError(f"{file}: {what}") from error
    return _sets_of(scores, left_out), left_out


def _of_samples(files: Sequence[Path], *, where: Sequence[str], metric: str | None) -> tuple[list[Scores], list[str]]:
    """Return the scores of lm-eval's samples: a set for every task, and a method for every folder of a model."""
    scores, left_out = [], []
    for file in files:
        task = (_SAMPLES.fullmatch(file.name) or {"task": file.stem})["task"]
        try:
            samples = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
            filters = list(dict.fromkeys(sample.get("filter") for sample in samples))
            if len(filters) > 1:
                left_out.append(f"{file}: filters {', '.join(map(str, filters[1:]))}; {filters[0]} counts")
            kept = [sample for sample in samples if sample.get("filter") == filters[0]]
            name = metric or next(iter(kept[0].get("metrics") or _numbers(kept[0])))
            values = {(sample["doc_id"], sample.get("doc_hash")): float(sample[name]) for sample in kept}
        except (OSError, ValueError, KeyError, TypeError, IndexError, StopIteration) as error:
            what = f"expected samples of lm-eval{f' with {metric}' if metric else ''}"
            raise PartialLoraError(f"{file}: {what} ({type(error).__name__}: {one_line(error)})") from error
        scores.append(Score(task, name, file.absolute().parent.name, 0, values, at=file.name))
    return _sets_of(scores, left_out), left_out


def _numbers(sample: Mapping) -> Iterator[str]:
    """Yield the metrics of a sample of a version that does not list them."""
    for name, value in sample.items():
        if name != "doc_id" and isinstance(value, (int, float)):
            yield name


_READERS: dict[str, Reader] = {".csv": _of_tables, ".json": _of_peft, ".jsonl": _of_samples}
