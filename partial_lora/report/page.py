"""Pages over runs: one file that needs nothing else, neither a network nor another file.

What is shown is gathered here; how it is shown is in templates/. Figures are the files of figures.py, taken in.
"""

from __future__ import annotations

import base64
import json
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import pandas as pd
import pyarrow as pa
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from partial_lora.errors import one_line
from partial_lora.files import flatten, grouped, read_json, write_atomic
from partial_lora.launching.directory import (
    CALIBRATION,
    CURVES,
    EXAMPLE,
    PAGE,
    PREDICTIONS,
    RESULT,
    SPARSITY,
    TRAINING,
)
from partial_lora.report import EXAMPLES, figures, tables
from partial_lora.report.classes import MOST, Classes, counted
from partial_lora.report.drawing import words_of
from partial_lora.report.examples import Example, hardest, rows_of, with_inputs
from partial_lora.report.predictions import Predictions, read_all
from partial_lora.report.records import LeftOut, Run, run_of
from partial_lora.report.rows import NONE, number, panel_of, warnings_of
from partial_lora.report.seed_groups import OF_SEED, folders, without_searches
from partial_lora.report.statistics import over_examples
from partial_lora.report.summary import cell, measured, named_in_full, next_commands, percent
from partial_lora.tasks.metrics import SHARES

logger = logging.getLogger(__name__)

_OF_RUN = {  # of a run's own figures: the file, its title and what it shows
    TRAINING: ("Loss and validation score during training", "By optimizer step."),
    SPARSITY: ("What calibration removed", "The share of rows and columns that each module goes without, in percent."),
    CURVES: ("Calibration curves", None),  # its words have the calibration's scores
}
_FEW = 8  # rows that need no filter
_SCORES = ("precision (%)", "recall (%)", "F1 (%)")


def write(
    results_dir: Path,
    *,
    runs: Sequence[Run],
    table: pd.DataFrame,
    by: tuple[Sequence[str], pd.DataFrame] | None,
    predictions: Predictions,
    gallery: Sequence[figures.Shown],
    command: str,
    origin: str,
    left_out: Sequence[LeftOut],
    examples: int,
) -> Path:
    """Write results_dir/report/index.html, a tab a task: the best of every method, and all else folded.

    table: of `folders.group`. by: the keys of another grouping and its table, which then opens the page. examples: how
    many of the hardest to show, 0 for none.
    """
    titles = {row.group: words_of(row) for row in table.itertuples()}
    groups = list(grouped(runs, lambda run: run.row["group"]).values())
    run_sections = sections(groups, examples, titles=titles)
    by_group = list(zip(groups, run_sections, strict=True))
    ids = {group[0].row["group"]: section["id"] for group, section in by_group}
    parts = tables.places(table)
    names = _tab_names([place for place, _ in parts])
    searched = {folder.name for folder in without_searches(folders(runs))}
    best = tables.best_of_each(table[table["group"].isin(searched)])
    intervals = {index: tables.interval(row, predictions) for index, row in best.iterrows()}
    tabs, firsts = [], []
    for count, (name, (place, part)) in enumerate(zip(names, parts, strict=True), start=1):
        rows = [best.loc[index] for index in best.index if index in part.index]
        firsts.append(rows[0])
        tabs.append(
            _tab(
                f"tab-{count}",
                name,
                title=f"{place[0]} · {place[1]}",
                leads=_leads(rows[0], part, intervals),
                tables=[_headline(rows, intervals, ids)],
                figures=[_figure(shown) for shown in gallery if shown.place == place],
                folded=_all_rows(part, ids),
                sections=[section for group, section in by_group if panel_of(group[0].row) == place],
            )
        )
    more = [_figure(shown) for shown in gallery if shown.place is None]
    if by or len(tabs) > 1:
        overview = [_averages(*by)] if by else [_matrix(best, intervals, parts, names)]
        leads = [
            Markup('<a href="#{}">{}</a> {}').format(tab["id"], tab["name"], _in_words(row, intervals))
            for tab, row in zip(tabs, firsts, strict=True)
        ]
        tabs.insert(0, _tab("tab-0", "All tasks", leads=[] if by else leads, tables=overview))
    tabs[0]["more"] = more
    count = len({run.row["group"] for run in runs})
    unfinished = sum(not run.is_broken for run in left_out)
    content = {
        "title": f"Report: {Path(results_dir).resolve().name}",
        "line": f"{len(runs):,} finished {_plural(len(runs), 'run')} of {count:,} {_plural(count, 'configuration')}.",
        "unfinished": f"{unfinished:,} {_plural(unfinished, 'run')} did not finish." if unfinished else "",
        "tabs": tabs,
        "about": {
            "command": command,
            "origin": origin,
            "lists": {
                "Not finished": [run for run in left_out if not run.is_broken],
                "Records that cannot be read": [run for run in left_out if run.is_broken],
            },
            "shared": run_sections[0]["shared"] if run_sections else {},
        },
    }
    return _written(Path(results_dir) / "report" / PAGE, "page.html", content)


def write_tables(
    results_dir: Path,
    ranked: Mapping[str, pd.DataFrame],
    gallery: Sequence[figures.Shown],
    *,
    folded: Mapping[str, pd.DataFrame],
    command: str,
    origin: str,
    refused: Sequence[str],
    leads: Sequence[str],
) -> Path:
    """Write results_dir/report/index.html out of rankings by title, "TASK, SIZE", figures, and tables that are folded.

    Each of several tasks has a tab with its rankings; the first tab says which form is first in each.
    """
    by_task = grouped(ranked.items(), lambda item: item[0].partition(",")[0])
    several = len(by_task) > 1
    rankings = [[_table(title, part) for title, part in items] for items in by_task.values()]
    firsts = [(title, part.iloc[0]) for title, part in ranked.items()] if several else []
    tab = _tab(
        "tab-0",
        "All tasks" if several else next(iter(by_task)),
        leads=[
            *leads,
            *(Markup("<b>{}:</b> {} {}").format(title, row["method"], row["test"]) for title, row in firsts),
        ],
        tables=[] if several else rankings[0],
        figures=[_figure(shown) for shown in gallery],
        folded=[_table(title, part, filtered=True) for title, part in folded.items()],
    )
    of_task = [
        _tab(f"tab-{count}", task, tables=ranking)
        for count, (task, ranking) in enumerate(zip(by_task, rankings, strict=True), start=1)
    ]
    content = {
        "title": f"Report: {Path(results_dir).resolve().name}",
        "line": origin,
        "unfinished": "",
        "tabs": [tab, *(of_task if several else ())],
        "about": {"command": command, "origin": origin, "lists": {"Left out": refused}, "shared": {}},
    }
    return _written(Path(results_dir) / "report" / PAGE, "page.html", content)


def write_run(run: Run, rows=None, examples: int = EXAMPLES) -> Path:
    """Write RUN/index.html, the page of one run. rows: its task's test split where that is at hand."""
    config, metric, test = run.record["config"], run.row["metric"], run.record["metrics"]["test"]
    predicted = (read_all([run.directory]) or [None])[0]
    caption = f"test {metric}"
    if ends := over_examples(predicted, metric):
        low, high = (measured(metric, end) for end in ends)
        caption += f"; 95 % interval {low} to {high} over {len(predicted):,} test examples, for this seed alone"
    (section,) = sections([[run]], examples, rows)
    drawn = {file.name for file in run.directory.glob("*.svg")}
    curves = _curves_of(run.record["calibration"] or {})
    place, example = _place_of(run.directory), run.directory / EXAMPLE
    classes = None if predicted is None else counted(predicted)
    content = {
        "title": named_in_full(run.record),
        "score": measured(metric, run.row["test"]),
        "said": caption,
        "commands": next_commands(
            place,
            config,
            example=f"{place}/{EXAMPLE}" if example.is_file() else None,
        ),
        "metrics": _of_splits(run.record["metrics"]) if len(test) > 3 else None,
        "classes": _of_classes(classes) if classes else None,
        "matrix": classes if classes and len(classes.names) <= MOST else None,
        "section": section,
        "figures": [
            (title, words or curves, _uri(run.directory / name))
            for name, (title, words) in _OF_RUN.items()
            if name in drawn
        ],
        "origin": f"Commit: {run.row['commit']}. Device: {run.row['device']}.",
    }
    return _written(run.directory / PAGE, "run.html", content)


def _curves_of(calibration: Mapping) -> str:
    """Return what a calibration's curves show, and its scores."""
    words = "The few-shot score of the frozen model as each module's rows or columns are zeroed"
    intact, joint = (number(calibration.get(key)) for key in ("baseline", "joint"))
    if not math.isnan(intact):
        words += f", from {intact:.4f} with none"
    if not math.isnan(joint):
        words += (
            f". With all sparsities at once it is {joint:.4f}: that says how much modules depend on each other, and "
        )
        words += "nothing of the adapter, which leaves the frozen weights whole"
    return f"{words}."


def draw_run(directory: Path, settings: Mapping) -> None:
    """Draw a finished run's figures and page, or a calibration's figures, out of the files in its directory.

    settings: the run's, unredacted, where its record may have redacted paths. The run does not depend on a drawing, so
    errors are only logged. The file that `directory.is_drawn` looks for is written last.
    """
    try:
        record = read_json(directory / RESULT)
        calibration = directory / CALIBRATION
        modules = read_json(calibration)["modules"] if calibration.is_file() else None
        figures.draw_calibration(record, modules, directory)
        if record["metrics"]:
            run, rows = run_of(record, directory), rows_of(settings, fetch=True)
            figures.draw_training(run)
            figures.draw_predictions(record, directory, rows)
            write_run(run, rows)
    except Exception as error:
        logger.warning("%s: no page could be made (%s)", directory, type(error).__name__, exc_info=True)


# What a report opens with


def _tab(id: str, name: str, **parts: object) -> dict:
    """Return a tab of a page; parts that are not given are empty."""
    empty = {part: [] for part in ("leads", "tables", "figures", "folded", "more", "sections")}
    return empty | {"id": id, "name": name, "title": name} | parts


def _tab_names(places: Sequence[tuple[str, str, str]]) -> list[str]:
    """Return the name of each place: its task, with model and metric where the task alone is not unique."""
    names = [task for task, *_ in places]
    for parts in (2, 3):
        names = [
            name if names.count(name) == 1 else ", ".join(place[:parts])
            for name, place in zip(names, places, strict=True)
        ]
    return names


def _leads(best: pd.Series, part: pd.DataFrame, intervals: Mapping) -> list[str]:
    """Return the answer of a task in words: what scores highest, and what is smaller and nearly as good."""
    answers = [("Highest of the methods at their best", best)]
    if (small := tables.smallest_within(part, best)) is not None:
        answers.append(("Smallest that is less than a point below it", small))
    return [Markup("<b>{}:</b> {}").format(what, _in_words(row, intervals)) for what, row in answers]


def _in_words(row: pd.Series, intervals: Mapping) -> str:
    """Return a row with its score, interval, seeds and size in words."""
    score, ends = measured(row["metric"], row["test_mean"]), intervals.get(row.name)
    between = f"95 % interval {_bare(row['metric'], ends[0])} to {_bare(row['metric'], ends[1])}, " if ends else ""
    share = "" if row["share_of_dense"] != row["share_of_dense"] else f", {row['share_of_dense']:.1%} of dense LoRA"
    return f"{words_of(row)}: {score} ({between}n={row['n']}), {row['adapter_parameters']:,.0f} parameters{share}"


def _headline(rows: Sequence[pd.Series], intervals: Mapping, ids: Mapping) -> dict:
    """Return the table of a task's methods at their best, each with its interval."""
    metric = rows[0]["metric"]
    cells = []
    for row in rows:
        ends = intervals[row.name]
        details = [word for word in (row["operating_point"], row["differs"]) if word != NONE]
        between = NONE
        if ends:
            over = Markup("<small>over test examples</small>") if ends[2] == "examples" else ""
            numbers = f"{_bare(metric, ends[0])} to {_bare(metric, ends[1])}"
            between = Markup("{}{}").format(numbers, over)
        cells.append(
            {
                "method": Markup('<a href="#{}">{}</a><small>{}</small>').format(
                    ids[row["group"]], row["method"], ", ".join(details)
                ),
                f"test {metric}" + (" (%)" if metric in SHARES else ""): _bare(metric, row["test_mean"]),
                "95 % interval": between,
                "n": str(row["n"]),
                "trainable parameters": f"{row['adapter_parameters']:,.0f}",
                "of dense LoRA": cell(row["share_of_dense"], ".1%"),
            }
        )
    notes = [
        "Of each method's rows the one with the best mean score on validation is shown, however many seeds (n) it has; "
        "its score is on the test split. The figures and the folded table have all rows. Whether one is better than "
        "another is not said here: `partial-lora compare FOLDER` judges it."
    ]
    return _table("The best of each method", pd.DataFrame(cells, dtype=object), notes)


def _bare(metric: str, value: float) -> str:
    """Return a score without its unit, which the heading has."""
    return measured(metric, value).removesuffix(" %")


def _beginning(table: pd.DataFrame, first: Sequence[str]) -> pd.DataFrame:
    """Return a table with these of its columns first."""
    return table[[*(name for name in first if name in table), *(name for name in table if name not in first)]]


def _linked(rows: pd.DataFrame, ids: Mapping[str, str]) -> pd.Series:
    """Return the methods of rows, each a link to its runs."""
    links = zip(rows["group"], rows["method"], strict=True)
    return _markup([Markup('<a href="#{}">{}</a>').format(ids[group], method) for group, method in links], rows)


def _markup(cells: Sequence[str], table: pd.DataFrame) -> pd.Series:
    """Return cells as a column of a table; pandas' own type of strings would forget which are markup."""
    return pd.Series(cells, index=table.index, dtype=object)


def _all_rows(part: pd.DataFrame, ids: Mapping) -> list[dict]:
    """Return the table of all rows of a task."""
    table = tables.readable(part).drop(columns=["task", "model"]).astype(object)
    table["method"] = _linked(part, ids)
    notes = tables.notes(part)
    title = f"All {len(part)} rows" if len(part) > 1 else "The row with all its numbers"
    return [_table(title, _beginning(table, ("method", "operating point", "differs in")), notes, filtered=True)]


def _averages(by: Sequence[str], table: pd.DataFrame) -> dict:
    """Return the table of runs averaged over all that the reader's keys do not tell apart."""
    readable = tables.readable(table, by=by)
    notes = tables.notes(table, by=by)
    return _table(f"By {', '.join(by)}", readable, notes, filtered=len(table) > _FEW)


def _matrix(best: pd.DataFrame, intervals: Mapping, parts: Sequence, names: Sequence[str]) -> dict:
    """Return the table of the best of every method, a row, at every task, a column; methods of most tasks first."""
    columns, count = {}, Counter(best["method"])
    methods = sorted(count, key=lambda method: -count[method])
    for name, (place, part) in zip(names, parts, strict=True):
        metric, of_task = place[2], best.loc[[index for index in best.index if index in part.index]]
        cells = {}
        for row in of_task.itertuples():
            ends = intervals[row.Index]
            half = f" ± {_bare(metric, (ends[1] - ends[0]) / 2)}" if ends else ""
            score = _bare(metric, row.test_mean)
            cells[row.method] = Markup('{}{} <small class="n">n={}</small>').format(score, half, row.n)
        columns[f"{name}, {metric}" + (" (%)" if metric in SHARES else "")] = [
            cells.get(method, NONE) for method in methods
        ]
    notes = [
        "Of each method's rows the one with the best mean score on validation is shown. ± is half of the "
        "95 % interval over seeds (n); with n=1 over test examples. The tabs say at which size each was trained."
    ]
    frame = pd.DataFrame({"method": methods} | columns, dtype=object)
    return _table("The best of each method at each task", frame, notes)


def _table(title: str, frame: pd.DataFrame, notes: Sequence[str] = (), *, filtered: bool = False) -> dict:
    """Return a table as a page shows it: what is the same in all rows is said below it, in place of a column."""
    constant = {
        name: frame[name].iloc[0]
        for name in frame.columns[2:]
        if len(frame) > 2 and frame[name].astype(str).nunique() == 1 and not name.startswith(("test", "n"))
    }
    words = ", ".join(f"{name} {value}" for name, value in constant.items() if value != NONE)
    varying = frame.drop(columns=list(constant))
    return {
        "title": title,
        "columns": [(name, name in tables.WORDS) for name in varying.columns],
        "rows": varying.values.tolist(),
        "notes": [*([f"The same in all rows: {words}."] if words else []), *notes],
        "filtered": filtered and len(varying) > _FEW,
    }


def _plural(count: int, word: str) -> str:
    return word if count == 1 else f"{word}s"


# What is shown of a run alone


def _place_of(directory: Path) -> str:
    """Return where a run lies as one would type it: from here, or from where its results directory is."""
    place = directory.resolve()
    if place.is_relative_to(Path.cwd()):
        return str(place.relative_to(Path.cwd()))
    return str(Path(*place.parts[-6:]))  # results/runs/task/model/method-id/seed0


def _of_splits(metrics: Mapping[str, Mapping]) -> dict:
    """Return the table of all metrics of validation and test, members of a mixture each with its own."""
    splits = [name for name in ("validation", "test") if metrics.get(name)]
    names = [name for name in metrics["test"] if name != "primary"]
    cells = {
        split: [
            NONE if (value := metrics[split].get(name)) is None else measured(name.rpartition("/")[2], value)
            for name in names
        ]
        for split in splits
    }
    return _table("All scores", pd.DataFrame({"metric": names} | cells))


def _of_classes(classes: Classes) -> dict:
    """Return the table of every class with its scores."""
    rows = [
        {"class": name, "test examples": f"{examples:,.0f}"}
        | {score: cell(100 * value, ".1f") for score, value in zip(_SCORES, values, strict=True)}
        for name, examples, *values in classes.scores()
    ]
    pairs = [f"{count} of {name} as {predicted}" for name, predicted, count in classes.confused()]
    notes = [f"Most often mistaken: {', '.join(pairs)}."] if pairs else ["No test example is mistaken."]
    return _table("Each class", pd.DataFrame(rows), notes, filtered=len(rows) > MOST)


def sections(groups: Sequence[Sequence[Run]], examples: int, rows=None, titles: Mapping[str, str] = {}) -> list[dict]:
    """Return what the page shows of the runs of every folder, which differ in their seed alone.

    titles: by folder; the page of a run shows none.
    """
    settings = [_words(runs[0].record["config"]) for runs in groups]
    shared = set.intersection(*(set(values.items()) for values in settings)) if len(groups) > 1 else set()
    splits: dict[str, object] = {}
    parts = []
    for place, (runs, values) in enumerate(zip(groups, settings, strict=True), start=1):
        worst, problems = _examples(runs, examples, splits, rows)
        warnings = [warning for run in runs for warning in warnings_of(run.record)]
        parts.append(
            {
                "id": f"run-{place}",
                "title": titles.get(runs[0].row["group"]),
                "path": runs[0].row["group"],
                "facts": _facts(runs),
                "own": {key: value for key, value in values.items() if (key, value) not in shared},
                "shared": {key: value for key, value in values.items() if (key, value) in shared},
                "seeds": [_of_seed(run) for run in runs],
                "warnings": [*dict.fromkeys(warnings), *problems],
                "examples": worst,
            }
        )
    return parts


def _examples(runs: Sequence[Run], count: int, splits: dict[str, object], rows) -> tuple[list[Example], list[str]]:
    """Return the hardest examples with their inputs, or why there are none; `splits` keeps the rows that were read."""
    try:
        predicted = read_all([run.directory for run in runs]) if count else []
        worst = hardest(predicted, count)
        if not worst:
            return [], []
        config = runs[0].record["config"]
        key = json.dumps(config["task"], sort_keys=True)
        if rows is None and key not in splits:
            splits[key] = rows_of(config)
        split = splits[key] if rows is None else rows
        return (worst if split is None else with_inputs(worst, split, predicted[0]["label"].to_pylist())), []
    except (ValueError, TypeError, LookupError, AttributeError, pa.ArrowException) as error:  # a file of other columns
        return [], [f"The hardest examples cannot be told from {PREDICTIONS}: {one_line(error)}"]


def _facts(runs: Sequence[Run]) -> dict[str, str]:
    """Return what is known of the runs in numbers; a number that differs between them is a mean, and says so."""
    row = pd.DataFrame([run.row for run in runs])
    first = runs[0].row
    spread = row["test"].std() if len(runs) > 1 else float("nan")
    trainable = f"{row['adapter_parameters'].mean():,.0f}"
    if first["adapter_dense"]:
        trainable += f" ({percent(row['share_of_dense'].mean())} % of the dense adapter)"
    facts = {
        f"test {first['metric']}": measured(first["metric"], row["test"].mean(), spread),
        "seeds": ", ".join(str(run.row["seed"]) for run in runs),
        "adapter, trainable": trainable + _mean_of(row["adapter_parameters"]),
        "head, trainable": f"{first['head_parameters']:,}",
    }
    if row["adapter_bytes"].notna().any():
        facts["adapter on disk"] = f"{row['adapter_bytes'].mean() / 1e3:,.0f} KB" + _mean_of(row["adapter_bytes"])
    return facts


def _mean_of(values: pd.Series) -> str:
    """Return what follows a mean of values that differ."""
    return f", mean of {values.count()} seeds" if values.nunique() > 1 else ""


def _of_seed(run: Run) -> dict[str, str]:
    return {
        "seed": str(run.row["seed"]),
        "test": measured(run.row["metric"], run.row["test"]),
        "train": f"{run.row['train_seconds']:,.1f} s",
        "started (UTC)": str(run.record.get("started") or NONE)[:16].replace("T", " "),
        "commit": run.row["commit"],
    }


def _words(config: Mapping) -> dict[str, str]:
    """Return settings by their full keys, as words, without those in which runs of one folder may differ."""
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in flatten(config).items()
        if key not in OF_SEED
    }


def _uri(file: Path) -> str:
    """Return a figure that lies in a run's folder, as an image: of markup by others a page shows none."""
    return f"data:image/svg+xml;base64,{base64.b64encode(file.read_bytes()).decode()}"


def _figure(shown: figures.Shown) -> tuple[str, str, Markup]:
    """Return title, caption and SVG of a figure that was drawn just now, which is that of its file."""
    return shown.title, shown.caption, Markup(shown.files[-1].read_text(encoding="utf-8"))


@cache
def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("partial_lora.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _written(path: Path, template: str, content: Mapping) -> Path:
    write_atomic(path, _templates().get_template(template).render(content))
    return path
