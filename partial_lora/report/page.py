"""Pages over runs: one file that needs nothing else, neither a network nor another file.

What is shown is gathered here; how, is in templates/.
"""

from __future__ import annotations

import base64
import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from html import escape
from pathlib import Path
from statistics import fmean

import numpy as np
import pandas as pd
import pyarrow as pa
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from pyarrow.parquet import ParquetFile

from partial_lora.errors import PartialLoraError
from partial_lora.files import write_atomic
from partial_lora.masks import AXES
from partial_lora.report.figures import Shown, draw_calibration, points, selected, training_curve
from partial_lora.report.records import NONE, Run, grid, number, run_of
from partial_lora.report.summary import measured, percent
from partial_lora.runs.directory import CALIBRATION, PREDICTIONS, RESULT
from partial_lora.tasks.metrics import SHARES

# --- Drawings that are part of a page: lines as SVG, sparsities as shaded cells. They take the page's own colours.

_WIDE, _HIGH, _LEFT, _BELOW, _ABOVE = 340, 130, 44, 18, 8
_DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 4", "10 4")

Points = Sequence[tuple[float, float]]


def training_lines(records: Sequence[Mapping]) -> list[tuple[str, Markup]]:
    """The training loss and the metric of validation of runs as small drawings, titled; none that has no points."""
    metric = selected(records[0])
    drawn = []
    for said, key in (("training loss", "loss"), (f"validation {metric}", f"eval_{metric}")):
        lines = {f"seed {record['seed']}": points(record["history"], key) for record in records}
        if any(lines.values()):
            drawn.append((said, lines_drawn(lines, said, share=key != "loss" and metric in SHARES)))
    return drawn


def lines_drawn(lines: Mapping[str, Points], title: str, *, share: bool = False) -> Markup:
    """Lines over steps as SVG; they differ in their dashes, and their ends are named for those who hear the page."""
    every = [point for line in lines.values() for point in line]
    left, right = min(step for step, _ in every), max(step for step, _ in every)
    low, high = min(value for _, value in every), max(value for _, value in every)

    def at(step: float, value: float) -> tuple[float, float]:
        across = (step - left) / ((right - left) or 1)
        up = (value - low) / ((high - low) or 1)
        return _LEFT + across * (_WIDE - _LEFT - 8), _HIGH - _BELOW - up * (_HIGH - _BELOW - _ABOVE)

    form = ".1%" if share else ".3g"
    parts = [
        f'<svg viewBox="0 0 {_WIDE} {_HIGH}" role="img" aria-label="{escape(_said(lines, title, form))}">',
        f'<path class="axis" d="M{_LEFT} {_ABOVE}V{_HIGH - _BELOW}H{_WIDE - 8}"/>',
        f'<text x="{_LEFT - 4}" y="{_ABOVE + 6}" text-anchor="end">{high:{form}}</text>',
        f'<text x="{_LEFT - 4}" y="{_HIGH - _BELOW}" text-anchor="end">{low:{form}}</text>',
        f'<text x="{_LEFT}" y="{_HIGH - 4}">{left:,.0f}</text>',
        f'<text x="{_WIDE - 8}" y="{_HIGH - 4}" text-anchor="end">{right:,.0f} steps</text>',
    ]
    for index, line in enumerate(line for line in lines.values() if line):
        placed = [at(*point) for point in line]
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        dash = _DASHES[(index + index // 6) % len(_DASHES)]  # where colours come again, another dash
        parts.append(f'<polyline class="line{index % 6}" points="{joined}" stroke-dasharray="{dash}"/>')
        parts += [f'<circle class="line{index % 6}" cx="{placed[-1][0]:.1f}" cy="{placed[-1][1]:.1f}" r="2.5"/>']
    return Markup("".join([*parts, "</svg>"]))


def sparsity_map(sparsity: Mapping[str, Mapping[str, float]]) -> dict | None:
    """Rows of cells, kinds of modules by depth, for each axis; None where nothing is sparse.

    {depths, axes: {axis: [(kind, cells)]}}; a cell is a sparsity in [0, 1], None where there is no module.
    """
    if not sparsity or not any(of[axis] for of in sparsity.values() for axis in AXES):
        return None
    kinds, depths, grids = grid(sparsity)
    cells = {
        axis: [
            (kind, [None if value != value else float(value) for value in line])
            for kind, line in zip(kinds, grids[axis], strict=True)
        ]
        for axis in AXES
    }
    return {"depths": [".".join(map(str, depth)) or "–" for depth in depths], "axes": cells}


def _said(lines: Mapping[str, Points], title: str, form: str) -> str:
    ends = [f"{name} from {line[0][1]:{form}} to {line[-1][1]:{form}}" for name, line in lines.items() if line]
    return f"{title}: {'; '.join(ends)}"


# --- The test examples that a run is most wrong about: an image or a text, what it is, and what was said of it.

_SIDE = 112  # pixels of an image at most
_LETTERS = 400  # of a text


@dataclass
class Example:
    """index: the row of the test split. label, said: in words, `said` of every run. loss: its mean over the runs.

    image: a data URI; text: the input in words. Both are empty where the row could not be read back.
    """

    index: int
    label: str
    said: list[str]
    loss: float
    image: str = ""
    text: list[str] = field(default_factory=list)


def predictions(directories: Sequence[Path]) -> list[pa.Table]:
    """What the runs of these directories predicted, of those that kept it and agree about the examples."""
    tables: list[pa.Table] = []
    for directory in directories:
        try:
            with ParquetFile(Path(directory) / PREDICTIONS) as file:  # pandas takes long to make lists of logits
                table = file.read(use_threads=False)
        except (OSError, ValueError):
            continue
        if {"label", "prediction"} <= set(table.column_names) and (
            not tables or table["label"].equals(tables[0]["label"])
        ):
            tables.append(table)
    return tables


def hardest(tables: Sequence[pa.Table], count: int) -> list[Example]:
    """The examples with the highest loss, a mean over runs, those first that are the worst; ties by their order.

    tables: of `predictions`, one row an example. The loss is the label's surprise where classes or options are chosen,
    the squared error of numbers, what a text lacks of ROUGE-L or else of being right. Raises ValueError where the
    columns do not say it.
    """
    if not tables:
        return []
    losses = np.mean([_losses(table) for table in tables], axis=0)
    order = np.argsort(-losses, kind="stable")[:count]
    return [
        Example(
            int(row),
            _named(tables[0], "label", row),
            [_named(table, "prediction", row) for table in tables],
            float(losses[row]),
        )
        for row in order
    ]


def shown(examples: Sequence[Example], rows, labels: Sequence) -> list[Example]:
    """The same with their inputs out of `rows`, the task's test split; unchanged where those are not the same examples.

    labels: what the run's predictions have as labels of all examples.
    """
    column = next((name for name in ("label", "response") if name in rows.column_names), None)
    if len(rows) != len(labels) or (column and not _alike(rows[column], labels)):
        return list(examples)
    for example in examples:
        row = rows[example.index]
        if "image" in row:
            example.image = thumbnail(row["image"])
        example.text = [_short(value) for value in _texts(row)]
        if "options" in row:
            example.label, *example.said = (row["options"][int(place)] for place in (example.label, *example.said))
    return list(examples)


def rows_of(settings: Mapping, *, fetch: bool = False):
    """Return the test split of a run's task where it can be read, without a network unless `fetch`; else None."""
    task = settings["task"]
    local = fetch or task.get("path") == "bundled:digits" or task.get("data_files")
    if task.get("members") or not local:
        return None
    import datasets

    from partial_lora import tasks
    from partial_lora.runs.config import load

    datasets.disable_progress_bars()
    try:
        chosen = load(settings).task
        return tasks.load(**{name: getattr(chosen, name) for name in tasks.SETTINGS}).test
    except (PartialLoraError, OSError, ValueError, KeyError):
        return None


def thumbnail(image) -> str:
    """A small copy of an image as a data URI."""
    small = image.convert("RGB")
    if max(small.size) < _SIDE // 2:  # pixels of a tiny image stay squares
        factor = _SIDE // max(small.size)
        small = small.resize((small.width * factor, small.height * factor), resample=0)
    small.thumbnail((_SIDE, _SIDE))
    stream = io.BytesIO()
    small.save(stream, "WEBP", quality=75)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()


def _losses(table: pa.Table) -> np.ndarray:
    """The loss of every example (N,); of a mixture by member, each with the columns that are its own."""
    columns = table.column_names
    if "member" in columns:
        return _by_member(table)
    if "scores" in columns:
        values, starts = _one_line(table["scores"], table["label"])
        return -np.log(np.maximum(values[starts + _whole(table["label"])], 1e-30))
    if "logits" in columns and "label_name" in columns:
        return _surprise(*_one_line(table["logits"], table["label"]), _whole(table["label"]))
    if "rouge_l" in columns:
        return 1 - _real(table["rouge_l"])
    if pa.types.is_floating(table.schema.field("label").type):
        return (_real(table["prediction"]) - _real(table["label"])) ** 2
    return np.array([said != label for said, label in zip(*_lists(table, "prediction", "label"), strict=True)], float)


def _by_member(table: pa.Table) -> np.ndarray:
    losses, members = np.zeros(len(table)), np.array(table["member"].to_pylist())
    for member in dict.fromkeys(members.tolist()):
        rows = np.flatnonzero(members == member)
        own = table.take(pa.array(rows))
        absent = [name for name in own.column_names if own[name].null_count == len(own)]
        losses[rows] = _losses(own.drop_columns(["member", *absent]))
    return losses


def _one_line(lists: pa.ChunkedArray, label: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """Lists of numbers, however long each is, end to end, and where each begins.

    Raises ValueError where one has no place for its label.
    """
    together = lists.combine_chunks()
    lengths = together.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    own = _whole(label)
    if (own < 0).any() or (own >= lengths).any():
        raise ValueError("a label without an output of its own")
    return together.flatten().to_numpy(zero_copy_only=False).astype(float), np.cumsum(lengths) - lengths


def _surprise(values: np.ndarray, starts: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Minus the logarithm of softmax at the label, of logits end to end."""
    lengths = np.diff(np.append(starts, len(values)))
    shifted = values - np.repeat(np.maximum.reduceat(values, starts), lengths)
    return np.log(np.add.reduceat(np.exp(shifted), starts)) - shifted[starts + label]


def _whole(column: pa.ChunkedArray) -> np.ndarray:
    return column.to_numpy().astype(np.int64)


def _real(column: pa.ChunkedArray) -> np.ndarray:
    return column.to_numpy().astype(float)


def _lists(table: pa.Table, *names: str) -> list[list]:
    return [table[name].to_pylist() for name in names]


def _named(table: pa.Table, column: str, row: int) -> str:
    name = f"{column}_name" if f"{column}_name" in table.column_names else column
    value = table[name][int(row)].as_py()
    if value is None:  # of a mixture whose other members have names
        value = table[column][int(row)].as_py()
    return f"{value:.4g}" if isinstance(value, float) else _short(str(value))


def _alike(labels: Sequence, others: Sequence) -> bool:
    pairs = zip(labels, others, strict=True)
    return all(one == other or (not isinstance(one, str) and abs(one - other) < 1e-6) for one, other in pairs)


def _texts(row: Mapping) -> list[str]:
    if "prompts" in row:
        return [str(row["prompts"][0]), *(f"– {option}" for option in row["options"])]
    return [str(row[name]) for name in ("text", "text_pair", "prompt") if row.get(name)]


def _short(text: str) -> str:
    return text if len(text) <= _LETTERS else text[: _LETTERS - 1] + "…"


logger = logging.getLogger(__name__)

PAGE = "index.html"
EXAMPLES = 6


def write(
    results_dir: Path,
    *,
    found: Sequence[Run],
    tables: Mapping[str, tuple[pd.DataFrame, Sequence[str]]],
    command: str,
    origin: str,
    problems: Sequence[str],
    uncompared: Sequence[str],
    figures: Sequence[Shown],
    examples: int = EXAMPLES,
) -> Path:
    """Write results_dir/report/index.html: sortable tables, figures, and a section for the runs of every folder.

    tables: by title, as they are read, each with what is to be said below it. problems: what was left out; uncompared:
    what could not be compared. examples: how many of the hardest to show, 0 for none.
    """
    groups: dict[str, list[Run]] = {}
    for run in found:
        groups.setdefault(run.row["group"], []).append(run)
    content = {
        "title": f"Report: {Path(results_dir).resolve().name}",
        "command": command,
        "origin": origin,
        "lists": {"Left out": problems, "Not compared": uncompared},
        "tables": {title: _cells(table) | {"notes": notes} for title, (table, notes) in tables.items()},
        "figures": [(each.title, each.caption, _uri(each.files[-1])) for each in figures],
        "sections": sections(list(groups.values()), examples),
    }
    return _written(Path(results_dir) / "report" / PAGE, content)


def write_run(run: Run, rows=None, examples: int = EXAMPLES) -> Path:
    """Write RUN/index.html, the page of one run. rows: its task's test split where that is at hand."""
    content = {
        "title": _title([run]),
        "command": "",
        "origin": f"Commit: {run.row['commit']}. Device: {run.row['device']}. Tuning: {run.row['tuning']}.",
        "lists": {},
        "tables": {},
        "figures": _own_figures(run.directory),
        "sections": sections([[run]], examples, rows),
    }
    return _written(run.directory / PAGE, content)


def draw_run(directory: Path, settings: Mapping) -> None:
    """Draw a finished run's figures and page, or a calibration's figures, out of the files in its directory.

    settings: those of the run, whose paths are not redacted as in its record. The run does not depend on a drawing, so
    that what goes wrong is only logged. The file that `is_drawn` looks for comes last.
    """
    try:
        record = json.loads((directory / RESULT).read_text(encoding="utf-8"))
        calibration = directory / CALIBRATION
        modules = json.loads(calibration.read_text(encoding="utf-8"))["modules"] if calibration.is_file() else None
        draw_calibration(record, modules, directory)
        if record["metrics"]:
            training_curve(record, directory / "training.png")
            write_run(run_of(record, directory), rows_of(settings, fetch=True))
    except Exception as error:
        logger.warning("%s: no page could be made (%s: %s)", directory, type(error).__name__, error)


def is_drawn(directory: Path, stage: str) -> bool:
    """Return whether the drawing of a stage, "train" or "calibrate", came to its end."""
    return (directory / (PAGE if stage == "train" else "curves.svg")).is_file()


def sections(groups: Sequence[Sequence[Run]], examples: int, rows=None) -> list[dict]:
    """What the page says of the runs of every folder, which differ in their seed alone."""
    settings = [_flat(runs[0].record["config"]) for runs in groups]
    shared = set.intersection(*(set(each.items()) for each in settings)) if len(groups) > 1 else set()
    read: dict[str, object] = {}
    made = []
    for place, (runs, flat) in enumerate(zip(groups, settings, strict=True), start=1):
        worst, untold = _examples(runs, examples, read, rows)
        made.append(
            {
                "id": f"run-{place}",
                "title": _title(runs),
                "path": runs[0].row.get("group", str(runs[0].directory)),
                "facts": _facts(runs),
                "own": {key: value for key, value in flat.items() if (key, value) not in shared},
                "shared": {key: value for key, value in flat.items() if (key, value) in shared},
                "seeds": [_of_seed(run) for run in runs],
                "curves": training_lines([run.record for run in runs]),
                "map": sparsity_map(_sparsity(runs)),
                "warnings": [*_warnings(runs), *untold],
                "examples": worst,
            }
        )
    return made


def _examples(runs: Sequence[Run], count: int, read: dict[str, object], rows) -> tuple[list[Example], list[str]]:
    """The hardest, with their inputs, and what kept them from being told; rows of a task are read once, into `read`."""
    try:
        tables = predictions([run.directory for run in runs]) if count else []
        worst = hardest(tables, count)
        if not worst:
            return [], []
        settings = runs[0].record["config"]
        key = json.dumps(settings["task"], sort_keys=True)
        if rows is None and key not in read:
            read[key] = rows_of(settings)
        found = read.get(key) if rows is None else rows
        return (worst if found is None else shown(worst, found, tables[0]["label"].to_pylist())), []
    except (ValueError, TypeError, LookupError, AttributeError, pa.ArrowException) as error:  # a file of other columns
        return [], [f"The hardest examples cannot be told from {PREDICTIONS}: {' '.join(str(error).split())}"]


def _sparsity(runs: Sequence[Run]) -> dict[str, dict[str, float]]:
    """The share that was removed of every module and axis, the mean over the runs."""
    known = [found for run in runs if (found := run.record.get("sparsity"))]
    return {
        module: {axis: fmean(found[module][axis] for found in known if module in found) for axis in AXES}
        for module in dict.fromkeys(module for found in known for module in found)
    }


def _warnings(runs: Sequence[Run]) -> list[str]:
    """What the calibrations of the runs warn of, each once."""
    each = ((run.record["calibration"] or {}).get("warnings") or [] for run in runs)
    return list(dict.fromkeys(warning for of_run in each for warning in of_run))


def _facts(runs: Sequence[Run]) -> dict[str, str]:
    """What is known of the runs in numbers; what differs between them is a mean, and says so."""
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
    calibrations = [run.record["calibration"] or {} for run in runs]
    intact, joint = (pd.Series([number(each.get(key)) for each in calibrations]) for key in ("baseline", "joint"))
    if intact.notna().any():
        left = f", {joint.mean():.4f} with all sparsities at once" if joint.notna().any() else ""
        facts["few-shot score"] = f"{intact.mean():.4f} intact{left}" + (_mean_of(intact) or _mean_of(joint))
    return facts


def _mean_of(values: pd.Series) -> str:
    """What is to be said of a mean of values that differ."""
    return f", mean of {values.count()} seeds" if values.nunique() > 1 else ""


def _of_seed(run: Run) -> dict[str, str]:
    return {
        "seed": str(run.row["seed"]),
        "test": measured(run.row["metric"], run.row["test"]),
        "train": f"{run.row['train_seconds']:,.1f} s",
        "started": str(run.record.get("started") or NONE)[:16].replace("T", " "),
        "commit": run.row["commit"],
    }


def _title(runs: Sequence[Run]) -> str:
    row = runs[0].row
    names = [row["method"], *([] if row["operating_point"] == NONE else [row["operating_point"]])]
    names += [row["model"], row["task"], *([f"seed {row['seed']}"] if len(runs) == 1 else [])]
    return " · ".join(names)


def _flat(config: Mapping, before: str = "") -> dict[str, str]:
    """Settings by their dotted names, as words, without those in which runs of one folder may differ."""
    flat: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{before}{key}.")
        elif before or key not in ("seed", "results_dir", "overwrite", "keep_records"):
            flat[f"{before}{key}"] = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value
    return flat


def _cells(table: pd.DataFrame) -> dict:
    """Columns, and rows of (text, whether it is marked)."""
    rows = [[(str(cell).strip("*"), str(cell).startswith("**")) for cell in line] for line in table.values.tolist()]
    return {"columns": list(table.columns), "rows": rows}


def _own_figures(directory: Path) -> list[tuple[str, str, str]]:
    """The calibration's curves as the run has drawn them; the rest of its figures are part of its section."""
    file = directory / "curves.svg"
    return [("Calibration curves", "What is left of the few-shot score.", _uri(file))] if file.is_file() else []


def _uri(file: Path) -> str:
    kind = {".svg": "image/svg+xml", ".png": "image/png"}[file.suffix]
    return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"


@cache
def _templates() -> Environment:
    return Environment(
        loader=PackageLoader("partial_lora.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _written(path: Path, content: Mapping) -> Path:
    write_atomic(path, _templates().get_template("page.html").render(content))
    return path
