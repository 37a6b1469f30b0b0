"""Methods at equal size, each at its best learning rate: a ranking with intervals, and who is on the Pareto front.

Rows are those of `rows.row` with a size and a form, which is a method with what is special about its masks; a cell
is a task, a size and a form.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from rich.console import Group

from partial_lora.errors import PartialLoraError
from partial_lora.files import write_atomic
from partial_lora.launching import packs
from partial_lora.masks import AS_PEFT, MASKED
from partial_lora.methods import called
from partial_lora.report import page, summary, tables
from partial_lora.report.drawing import BLUE, name_beside, panels, plain, save_both, scored, sized
from partial_lora.report.figures import Shown, front
from partial_lora.report.forgetting import changes_of
from partial_lora.report.pairs import Outcome, Pair, between, by_seed
from partial_lora.report.predictions import Predictions
from partial_lora.report.records import Run
from partial_lora.report.rows import NONE, validation_by_rate
from partial_lora.report.statistics import estimate, half_interval, holm
from partial_lora.settings.compose import composed
from partial_lora.settings.rates import ranked
from partial_lora.tasks.metrics import LOWER_IS_BETTER, SHARES

_KINDS = ("granularity", "columns")  # keys of `mask` that the group files of conf/mask set
_PEFTS = {**AS_PEFT, "column_exponent": 0.0}  # draw
CELL = ["task", "size", "form"]
_WINDOW = ("low_1", "high_1", "low_2", "high_2")  # learning rates between which no point is lost, and no two
_NOTHING = 1e-9
CHANGE = ": change of "  # between another set and its metric, in the title of a column
_AVERAGED = {  # columns of rows, and what the ranking calls their means
    "adapter_parameters": "parameters",
    "step_seconds": "step_seconds",
    "saved_activation_bytes": "saved_bytes",
    "adapter_bytes": "file_size",
    "spent": "spent",
}
_COSTS = {  # by column: how an axis calls it, and the unit it is divided by
    "parameters": ("trainable parameters", 1),
    "step_seconds": ("seconds a step", 1),
    "saved_bytes": ("kept for the backward pass, MB", 1e6),
}


def form_of(config: Mapping) -> str:
    """Return the name of a run's form: its method, and what its masks have that the method's own do not.

    That is in the words of the command line without groups: `partial mask=units`, `partial row_exponent=0`. PEFT's
    draw is fan_in=dense without exponents.
    """
    name = config["method"]["name"]
    if not called(name).masked:
        return name
    usual, mask = masks_of(name), config["mask"]
    words = [name, *(f"mask={mask[key]}" for key in _KINDS if mask[key] != usual[key])]
    words += [f"mask.rows={mask['rows']}"] if mask["rows"] != usual["rows"] else []
    words += ["rank=auto"] if config["method"].get("rank") == "auto" else []
    drawn = [key for key in _PEFTS if mask[key] != usual[key]]
    if (mask["rows"], mask["columns"]) != (MASKED, MASKED):  # whose A is not drawn for some inputs
        drawn = [key for key in drawn if key != "fan_in"]
    if drawn and all(mask[key] == draw for key, draw in _PEFTS.items()):
        return f"{' '.join(words)}, PEFT's draw"
    return " ".join([*words, *(f"{key}={str(mask[key]).removesuffix('.0')}" for key in drawn)])


@cache
def masks_of(method: str) -> dict:
    """Return the masks that a method has of itself."""
    return asdict(composed(f"method={method}").mask)


def size_in(result: Mapping) -> str:
    """Return a record's budget in words, a share of dense LoRA's parameters or a number of them, or "own"."""
    budget = result["config"]["calibration"].get("budget")
    if budget is None or not (result.get("calibration") or result.get("fixed")):
        return "own"
    return f"{budget:g}" if budget <= 1 else f"{budget:,.0f}"


def rows_of(runs: Iterable[Run], stored: Predictions | None = None) -> pd.DataFrame:
    """Return the rows of runs, with their predictions. A form names its modules where most of the task adapt others."""
    table = pd.DataFrame(
        [
            run.row
            | {"size": size_in(run.record), "form": form_of(run.record["config"])}
            | {"run": run, "outcome": Outcome.of(run.row, stored)}
            for run in runs
        ]
    )
    return table.assign(form=table["form"] + on_modules(table))


def on_modules(runs: pd.DataFrame) -> pd.Series:
    """Return " on " and a run's modules where most runs of its task adapt others, else nothing."""
    targets = runs["run"].map(lambda run: ", ".join(run.record["config"]["model"]["target_modules"]))
    usual = targets.groupby(runs["task"]).transform(lambda of_task: of_task.mode()[0])
    return (" on " + targets).where(targets != usual, "")


def once(cell: pd.DataFrame, place: Iterable[str]) -> pd.DataFrame:
    """Return the runs of a cell, those that were made under two ids and came to the same scores once.

    Raises PartialLoraError where two with one rate and seed came to different scores: they differ in other settings.
    """
    run = ["learning_rate", "seed"]
    cell = cell.drop_duplicates([*run, "validation", "test"])  # a loss is the same but for rounding
    twins = cell[cell.duplicated(run)]
    if len(twins):
        rate, seed = twins.iloc[0][run]
        raise PartialLoraError(
            f"{', '.join(place)}: two runs with learning rate {rate:g} and seed {seed} differ in other settings: "
            "keep runs of one setting in a results directory of their own"
        )
    return cell


def at_best_rates(table: pd.DataFrame, cells: Sequence[str] = CELL) -> pd.DataFrame:
    """Return the runs of every cell at its best learning rate, and how many rates were tried.

    `edge` is whether that rate is the lowest or highest of three or more. A quick search trains two to the end, which
    say nothing of an edge. `spent` is the seconds of all runs of the cell.
    Raises PartialLoraError as `once`.
    """
    chosen = []
    for place, every in table.groupby(list(cells), sort=False):
        cell = once(every, filter(None, place))
        validation = validation_by_rate(cell.to_dict("records"))
        best = (ranked(validation) or list(validation))[0]  # where every rate failed, any
        tried = sorted(cell["learning_rate"].unique())
        edge = len(tried) > 2 and best in (tried[0], tried[-1])
        runs = cell[cell["learning_rate"] == best].assign(rates=len(tried), edge=edge, spent=cell["seconds"].sum())
        chosen.append(runs.assign(**window(cell, best)))
    return pd.concat(chosen)


def window(cell: pd.DataFrame, best: float) -> dict[str, float]:
    """Return the lowest and the highest learning rate around the best one from which none costs over 1 or 2 points.

    By score on validation of the first seed, which has tried all rates; NaN of a metric that has no points.
    """
    first = cell[cell["seed"] == cell["seed"].min()]
    scores = first.set_index("learning_rate")["validation"].sort_index()
    if first["metric"].iloc[0] not in SHARES or best not in scores:
        return dict.fromkeys(_WINDOW, math.nan)
    ends = []
    for points in (1, 2):
        costly = scores.index[scores < scores[best] - points / 100 - _NOTHING]
        ends.append(scores.index[scores.index > max(costly[costly < best], default=0)].min())
        ends.append(scores.index[scores.index < min(costly[costly > best], default=math.inf)].max())
    return dict(zip(_WINDOW, ends, strict=True))


def compared(chosen: pd.DataFrame, reference: str) -> pd.DataFrame:
    """Return a row for every cell: its mean over seeds and its difference to the reference, with intervals.

    A difference is between runs of the same seeds, at one size. Where one of the two has a size of its own, the
    reference counts at its largest size. Halves of intervals are of 95 %: of a mean by Student's t over seeds, of a
    difference over what `over` says (`pairs.between`). `holds`: the difference holds among all of its task and size
    (`statistics.holm`). Costs are means over the seeds that all forms of a task have, since texts differ by seed in
    length; over all seeds of a form where they share none.
    """
    rows = []
    seeds = chosen.groupby(CELL)["seed"].agg(set)
    shared = {task: set.intersection(*of_task) for task, of_task in seeds.groupby("task")}
    for (task, size, form), cell in chosen.groupby(CELL, sort=False):
        other = chosen[(chosen["task"] == task) & (chosen["form"] == reference)].sort_values("adapter_parameters")
        sizes = list(other["size"])
        beside = sizes[-1:] if size not in sizes and "own" in (size, *sizes) else [size]
        other = other[other["size"].isin(beside)]
        first = cell.iloc[0]
        counted = cell[cell["seed"].isin(shared[task])] if shared[task] else cell
        rows.append(
            {"task": task, "size": size, "form": form}
            | first[["metric", "learning_rate", "edge", "rates", *_WINDOW]].to_dict()
            | {"seeds": len(cell), "test": cell["test"].mean()}
            | {"half": half_interval(cell["test"].std(), len(cell)) if len(cell) != _TOO_FEW else math.nan}
            | _apart(Pair(by_seed(cell), by_seed(other if form != reference else other[:0]), first["metric"]))
            | _changes(cell)
            | counted[list(_AVERAGED)].mean().rename(_AVERAGED).to_dict()
        )
    numbers = pd.DataFrame(rows)
    together = numbers.groupby(["task", "size"])["p"]
    numbers["holds"] = together.transform(lambda p: p <= holm(list(p))).astype(bool)
    order = numbers["test"].where(numbers["metric"].isin(LOWER_IS_BETTER), -numbers["test"])
    return numbers.assign(order=order).sort_values(["task", "size", "order"]).drop(columns="order")


def _changes(cell: pd.DataFrame) -> dict[str, float]:
    """Return by how much a cell's runs change the score of the untouched model on other sets, and half the interval."""
    measured = {seed: packs.forgetting(run.directory) for seed, run in zip(cell["seed"], cell["run"], strict=True)}
    columns = {}
    for name, changes in changes_of({"": measured}).items():
        apart = estimate(np.stack(list(changes.by_row[""].values())))
        low, high = apart.interval()
        columns[title := f"{name}{CHANGE}{changes.metric}"] = apart.difference
        columns[f"{title}, half"] = (high - low) / 2 if len(changes.by_row[""]) != _TOO_FEW else math.nan
    return columns


_TOO_FEW = 2  # seeds: an interval of two is 25 errors wide, and says nothing
_NO_DIFFERENCE = {"difference": math.nan, "difference_half": math.nan, "p": math.nan}
_NO_DIFFERENCE |= {"paired": 0, "examples": 0, "over": NONE}


def _apart(pair: Pair) -> dict:
    """Return the difference of a pair, half its interval, its significance, and what it is over.

    One seed has no significance, nor do seeds and examples that say nothing of chance.
    """
    if not pair.seeds:
        return _NO_DIFFERENCE
    apart = between(pair)
    low, high = apart.estimate.interval()
    p = apart.estimate.p(0, 0) if apart.seeds > 1 and apart.error > 1e-12 else math.nan
    half = (high - low) / 2 if apart.seeds != _TOO_FEW else math.nan
    numbers = {"difference": apart.difference, "difference_half": half, "p": p}
    return numbers | {"paired": apart.seeds, "examples": apart.examples, "over": apart.over}


def titled(numbers: pd.DataFrame, reference: str) -> dict[str, pd.DataFrame]:
    """Return a table as it is read, best first, for every task and size."""
    parts = {}
    for (task, size), part in numbers.groupby(["task", "size"], sort=False):
        rows = list(part.itertuples())
        changed = [name for name in part if CHANGE in name and not name.endswith("half") and part[name].notna().any()]
        columns = {
            "method": part["form"],
            "best rate": [f"{row.learning_rate:g}{' (edge)' if row.edge else ''}" for row in rows],
            "rates within two points": [_between(row.low_2, row.high_2) for row in rows],
            "test": [_score(row.metric, row.test, row.half) for row in rows],
            f"− {reference}": [_score(row.metric, row.difference, row.difference_half, "+") for row in rows],
            **{name: _changes_in(part, name) for name in changed},
            "difference over": [_basis(row.paired, row.examples) for row in rows],
            "after correction": [_verdict(row) for row in rows],
            "seeds": part["seeds"],
            "parameters": [f"{value:,.0f}" for value in part["parameters"]],
            "kept for the backward pass, MB": [summary.cell(value / 1e6, ".1f") for value in part["saved_bytes"]],
            "seconds a step": [summary.cell(value, ".3f") for value in part["step_seconds"]],
        }
        if (part["rates"] == 1).all():  # nothing was searched here
            columns.pop("rates within two points")
        parts[f"{task}, {in_words(size)}"] = pd.DataFrame(columns)
    return parts


def _changes_in(part: pd.DataFrame, title: str) -> list[str]:
    metric = title.partition(CHANGE)[2]
    return [_score(metric, *pair, "+") for pair in zip(part[title], part[f"{title}, half"], strict=True)]


def _between(low: float, high: float) -> str:
    return NONE if math.isnan(low) else f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _basis(seeds: int, examples: int) -> str:
    """Return what a difference is over: "8 seeds, 860 rows", or "3 seeds" where predictions were not kept."""
    parts = [f"{seeds} seed{'s' * (seeds > 1)}"] * (seeds > 0) + [f"{examples:,} rows"] * (examples > 0)
    return ", ".join(parts) or NONE


def _verdict(row) -> str:
    """Return what is left of a difference after correction; a dash where nothing says how far chance goes."""
    if math.isnan(row.p):
        return NONE
    better = (row.difference > 0) != (row.metric in LOWER_IS_BETTER)
    return ("better" if better else "worse") if row.holds else "not significant"


def in_words(size: str) -> str:
    """Return what methods of a size have in common."""
    if size == "own":
        return "sizes of their own"
    try:
        number = float(size.replace(",", ""))
    except ValueError:  # a limit
        return size
    return f"{size} parameters" if number > 1 else f"{100 * number:g} % of dense LoRA's parameters"


def _score(metric: str, value: float, half: float, sign: str = "") -> str:
    if math.isnan(value):
        return NONE
    times, form = (100, f"{sign}.2f") if metric in SHARES else (1, f"{sign}.4g")
    return f"{times * value:{form}}" + ("" if math.isnan(half) else f" ± {times * half:{form.lstrip('+')}}")


_SCORES = [2, 3, 4]  # columns of text that may look like numbers
_JUDGED = ["difference over", "after correction"]  # columns that a verdict takes the place of


def on_screen(numbers: pd.DataFrame, reference: str) -> Group:
    """Return the ranking for a terminal of 80 columns; verdicts and the price of a step are in files and page."""
    shown = {}
    for title, part in titled(numbers, reference).items():
        changed = [name for name in part if CHANGE in name]
        shown[title] = part.drop(columns=[*_JUDGED, *changed, *part.columns[-2:]])
        if changed:
            shown[f"{title}, after training less before"] = part[["method", *changed]]
    return Group(*(tables.drawn(title, part) for title, part in shown.items()))


def _origin(reference: str, *, corrected: bool = True) -> str:
    origin = (
        f"A difference is from {reference}, over the seeds that both have. ± is half of a 95 % interval: of a score "
        "over seeds, of a difference over seeds and test rows, or seeds alone where predictions were not kept. "
    )
    if corrected:
        return f"{origin}'After correction' says what is significant after correction for all comparisons of its table."
    return f"{origin}The verdict accounts for all pairs of methods and for every look at them."


def write(
    runs: Iterable[Run], out: Path, stem: str, reference: str, size: str | None = None
) -> tuple[str, pd.DataFrame]:
    """Write the ranking of a folder's runs (`compared`) as its stem.md and .csv; return it as text, and its numbers.

    size: what all have in common in place of their sizes, as a limit.
    """
    rows = rows_of(runs, Predictions(out))
    numbers = compared(at_best_rates(rows if size is None else rows.assign(size=size)), reference)
    write_atomic(out / f"{stem}.csv", numbers.to_csv(index=False, float_format="%.6g"))
    parts = [
        f"### {title}\n\n{part.to_markdown(index=False, disable_numparse=_SCORES)}"
        for title, part in titled(numbers, reference).items()
    ]
    text = "\n\n".join([_origin(reference), *parts]) + "\n"
    write_atomic(out / f"{stem}.md", text)
    return text, numbers


# --- Who is better at no higher cost.


NOBODY = pd.DataFrame()
_ALIKE = 1.05  # times the least cost, up to which costs count as one


def draw_front(numbers: pd.DataFrame, cost: str, out: Path, stem: str) -> list[Path]:
    """Draw test scores against a cost, a panel below the other for every task; return the files.

    A form that none beats at no higher cost is named; all else is grey. Bars are intervals.
    """
    label, unit = _COSTS[cost]
    measured = numbers.dropna(subset=[cost])
    tasks = sorted(measured["task"].unique())
    figure, drawn = panels(len(tasks), wide=6.25, high=2.8, across=1)
    names = {}
    for axes, task in zip(drawn, tasks, strict=True):
        of_task = measured[measured["task"] == task]
        metric = of_task["metric"].iloc[0]
        best, ahead = front(zip(of_task[cost], of_task["test"], strict=True), metric), []
        for index, row in of_task.iterrows():
            half = 0 if math.isnan(row["half"]) else row["half"]
            leads = (row[cost], row["test"]) in best
            point, color = (row[cost] / unit, row["test"]), BLUE if leads else "0.75"
            axes.errorbar(*point, yerr=half, color=color, linewidth=1, zorder=1 + leads)
            (mark,) = axes.plot(*point, "o", color=color, markersize=6, zorder=2 + leads)
            if leads:
                ahead.append((row["form"], point))
            mark.set_gid(f"{stem}-{index}")
            names[mark.get_gid()] = (
                f"{row['form']}, {row['size']}: {_score(metric, row['test'], row['half'])} "
                f"({row['seeds']} seeds, learning rate {row['learning_rate']:g}), {row['parameters']:,.0f} parameters, "
                f"{label} {row[cost] / unit:.3g}"
            )
        axes.set_title(task, loc="left", fontsize=10)
        axes.set_xlabel(label)
        scored(axes, metric)
        if cost == "parameters":
            sized(axes, of_task[cost])
        else:
            axes.set_xlim(0, 1.05 * of_task[cost].max() / unit)  # the last point is no point of the frame
        plain(axes)
        name_beside(axes, ahead)
    return save_both(figure, out, stem, names)


def _plain(value: float) -> str:
    return summary.cell(value, ",.0f" if abs(value) >= 1000 else ".4g")


def write_page(
    numbers: pd.DataFrame,
    out: Path,
    *,
    reference: str,
    command: str,
    refused: Sequence[str],
    verdict: Sequence[str] = (),
    dropped: pd.DataFrame = NOBODY,
) -> Path:
    """Write out/report/index.html: verdict, ranking, a Pareto figure for every cost, and a table with all numbers.

    dropped: what is known of methods that left a race.
    """
    numbers, figures = numbers.reset_index(drop=True), []
    (out / "report").mkdir(parents=True, exist_ok=True)
    for cost, (label, _) in _COSTS.items():
        least = numbers.groupby("task")[cost].min()
        if (numbers.groupby("task")[cost].max() > _ALIKE * least).any():  # else there is nothing to choose by
            files = draw_front(numbers, cost, out / "report", f"front_{cost}")
            caption = "Grey: another method is as good at no higher cost. Bars are 95 % intervals over seeds."
            figures.append(Shown(f"Test score against {label}", caption, tuple(files)))
    tables_by_title = titled(numbers, reference)
    if verdict:
        tables_by_title = {title: part.drop(columns=_JUDGED) for title, part in tables_by_title.items()}
    origin = _origin(reference, corrected=not verdict)
    left_race = {"Dropped after half a run": dropped} if len(dropped) else {}
    all_numbers = numbers.map(lambda value: _plain(value) if isinstance(value, float) else value)
    return page.write_tables(
        out,
        tables_by_title,
        figures,
        folded=left_race | {"All numbers (times in seconds, sizes in bytes)": all_numbers},
        command=command,
        origin=origin,
        refused=refused,
        leads=verdict,
    )
