"""Pages over runs: one file that needs nothing else, neither a network nor another file.

What is shown is gathered here; how, is in templates/. A section's lines and cells are SVG and HTML in the page's own
colours: for every configuration of a report a figure of figures.py would take half a second and 100 KB.
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from pathlib import Path

import pandas as pd
import pyarrow as pa
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from partial_lora.files import flatten, write_atomic
from partial_lora.masks import AXES, Sparsity
from partial_lora.report import EXAMPLES
from partial_lora.report.examples import Example, hardest, predictions, rows_of, with_inputs
from partial_lora.report.figures import (
    Shown,
    draw_calibration,
    draw_predictions,
    mean_sparsity,
    points,
    selected,
    training_curve,
)
from partial_lora.report.records import NONE, Run, gathered, grid, number, run_of, warnings_of
from partial_lora.report.summary import measured, percent
from partial_lora.runs.directory import CALIBRATION, CURVES, PAGE, PREDICTIONS, RESULT
from partial_lora.tasks.metrics import SHARES

logger = logging.getLogger(__name__)

_WIDE, _HIGH, _LEFT, _BELOW, _ABOVE = 340, 130, 44, 18, 8  # of a drawing of lines
_DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 4", "10 4")
_OF_SEED = ("seed", "results_dir", "overwrite", "keep_records")  # settings in which runs of one folder may differ


def write(
    results_dir: Path,
    *,
    runs: Sequence[Run],
    tables: Mapping[str, tuple[pd.DataFrame, Sequence[str]]],
    command: str,
    origin: str,
    problems: Sequence[str],
    uncompared: Sequence[str],
    figures: Sequence[Shown],
    examples: int = EXAMPLES,
) -> Path:
    """Write results_dir/report/index.html: sortable tables, figures, and a section for the runs of every folder.

    tables: by title, as they are read, each with its notes. problems: what was left out; uncompared: what could not be
    compared. examples: how many of the hardest to show, 0 for none.
    """
    groups = gathered(runs, lambda run: run.row["group"])
    content = {
        "title": f"Report: {Path(results_dir).resolve().name}",
        "command": command,
        "origin": origin,
        "lists": {"Left out": problems, "Not compared": uncompared},
        "tables": {title: _cells(table) | {"notes": notes} for title, (table, notes) in tables.items()},
        "figures": [(each.title, each.caption, each.inline or _uri(each.files[-1])) for each in figures],
        "sections": sections(list(groups.values()), examples),
    }
    return _written(Path(results_dir) / "report" / PAGE, content)


def write_run(run: Run, rows=None, examples: int = EXAMPLES) -> Path:
    """Write RUN/index.html, the page of one run. rows: its task's test split where that is at hand."""
    curves = run.directory / CURVES  # as the run has drawn them; there are none without a calibration
    shown = [("Calibration curves", "What is left of the few-shot score.", _uri(curves))] if curves.is_file() else []
    content = {
        "title": _title([run]),
        "command": "",
        "origin": f"Commit: {run.row['commit']}. Device: {run.row['device']}. Tuning: {run.row['tuning']}.",
        "lists": {},
        "tables": {},
        "figures": shown,
        "sections": sections([[run]], examples, rows),
    }
    return _written(run.directory / PAGE, content)


def draw_run(directory: Path, settings: Mapping) -> None:
    """Draw a finished run's figures and page, or a calibration's figures, out of the files in its directory.

    settings: those of the run, whose paths are not redacted as in its record. The run does not depend on a drawing, so
    that what goes wrong is only logged. The file by which `directory.is_drawn` knows comes last.
    """
    try:
        record = json.loads((directory / RESULT).read_text(encoding="utf-8"))
        calibration = directory / CALIBRATION
        modules = json.loads(calibration.read_text(encoding="utf-8"))["modules"] if calibration.is_file() else None
        draw_calibration(record, modules, directory)
        if record["metrics"]:
            training_curve(record, directory / "training.png")
            rows = rows_of(settings, fetch=True)
            draw_predictions(record, directory, rows)
            write_run(run_of(record, directory), rows)
    except Exception as error:
        logger.warning("%s: no page could be made (%s: %s)", directory, type(error).__name__, error)


def sections(groups: Sequence[Sequence[Run]], examples: int, rows=None) -> list[dict]:
    """Return what the page shows of the runs of every folder, which differ in their seed alone."""
    settings = [_words(runs[0].record["config"]) for runs in groups]
    shared = set.intersection(*(set(each.items()) for each in settings)) if len(groups) > 1 else set()
    splits: dict[str, object] = {}
    made = []
    for place, (runs, own) in enumerate(zip(groups, settings, strict=True), start=1):
        worst, problems = _examples(runs, examples, splits, rows)
        warnings = [warning for run in runs for warning in warnings_of(run.record)]
        sparsities = [run.record["sparsity"] for run in runs if run.record.get("sparsity")]
        made.append(
            {
                "id": f"run-{place}",
                "title": _title(runs),
                "path": runs[0].row["group"],
                "facts": _facts(runs),
                "own": {key: value for key, value in own.items() if (key, value) not in shared},
                "shared": {key: value for key, value in own.items() if (key, value) in shared},
                "seeds": [_of_seed(run) for run in runs],
                "curves": _training_lines([run.record for run in runs]),
                "map": _sparsity_map(mean_sparsity(sparsities)),
                "warnings": [*dict.fromkeys(warnings), *problems],
                "examples": worst,
            }
        )
    return made


def _examples(runs: Sequence[Run], count: int, splits: dict[str, object], rows) -> tuple[list[Example], list[str]]:
    """Return the hardest examples with their inputs, and why there are none; a task is read once, into `splits`."""
    try:
        tables = predictions([run.directory for run in runs]) if count else []
        worst = hardest(tables, count)
        if not worst:
            return [], []
        config = runs[0].record["config"]
        key = json.dumps(config["task"], sort_keys=True)
        if rows is None and key not in splits:
            splits[key] = rows_of(config)
        split = splits[key] if rows is None else rows
        return (worst if split is None else with_inputs(worst, split, tables[0]["label"].to_pylist())), []
    except (ValueError, TypeError, LookupError, AttributeError, pa.ArrowException) as error:  # a file of other columns
        return [], [f"The hardest examples cannot be told from {PREDICTIONS}: {' '.join(str(error).split())}"]


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
    calibrations = [run.record["calibration"] or {} for run in runs]
    intact, joint = (pd.Series([number(each.get(key)) for each in calibrations]) for key in ("baseline", "joint"))
    if intact.notna().any():
        left = f", {joint.mean():.4f} with all sparsities at once" if joint.notna().any() else ""
        facts["few-shot score"] = f"{intact.mean():.4f} intact{left}" + (_mean_of(intact) or _mean_of(joint))
    return facts


def _mean_of(values: pd.Series) -> str:
    """Return what follows a mean of values that differ."""
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


def _words(config: Mapping) -> dict[str, str]:
    """Return settings by their full keys, as words, without those in which runs of one folder may differ."""
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in flatten(config).items()
        if key not in _OF_SEED
    }


def _training_lines(records: Sequence[Mapping]) -> list[tuple[str, Markup]]:
    """Draw training loss and the metric of validation of runs, titled; none that has no points."""
    metric = selected(records[0])
    drawn = []
    for title, key in (("training loss", "loss"), (f"validation {metric}", f"eval_{metric}")):
        lines = {f"seed {record['seed']}": points(record["history"], key) for record in records}
        lines = {name: line for name, line in lines.items() if line}
        if lines:
            drawn.append((title, _lines(lines, title, ".1%" if key != "loss" and metric in SHARES else ".3g")))
    return drawn


def _lines(lines: Mapping[str, Sequence[tuple[int, float]]], title: str, form: str) -> Markup:
    """Draw lines over steps as SVG; they differ in dashes, and their ends are named for those who hear the page."""
    steps, values = zip(*(point for line in lines.values() for point in line), strict=True)
    left, right, low, high = min(steps), max(steps), min(values), max(values)
    ends = [f"{name} from {line[0][1]:{form}} to {line[-1][1]:{form}}" for name, line in lines.items()]
    label = f"{title}: {'; '.join(ends)}"
    parts = [
        f'<svg viewBox="0 0 {_WIDE} {_HIGH}" role="img" aria-label="{escape(label)}">',
        f'<path class="axis" d="M{_LEFT} {_ABOVE}V{_HIGH - _BELOW}H{_WIDE - 8}"/>',
        f'<text x="{_LEFT - 4}" y="{_ABOVE + 6}" text-anchor="end">{high:{form}}</text>',
        f'<text x="{_LEFT - 4}" y="{_HIGH - _BELOW}" text-anchor="end">{low:{form}}</text>',
        f'<text x="{_LEFT}" y="{_HIGH - 4}">{left:,.0f}</text>',
        f'<text x="{_WIDE - 8}" y="{_HIGH - 4}" text-anchor="end">{right:,.0f} steps</text>',
    ]
    for index, line in enumerate(lines.values()):
        across = [_LEFT + (step - left) / ((right - left) or 1) * (_WIDE - _LEFT - 8) for step, _ in line]
        down = [_HIGH - _BELOW - (value - low) / ((high - low) or 1) * (_HIGH - _BELOW - _ABOVE) for _, value in line]
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(across, down, strict=True))
        dash = _DASHES[(index + index // 6) % len(_DASHES)]  # where colours come again, another dash
        parts.append(f'<polyline class="line{index % 6}" points="{joined}" stroke-dasharray="{dash}"/>')
        parts.append(f'<circle class="line{index % 6}" cx="{across[-1]:.1f}" cy="{down[-1]:.1f}" r="2.5"/>')
    return Markup("".join([*parts, "</svg>"]))


def _sparsity_map(sparsity: Sparsity) -> dict | None:
    """Return {depths, axes: {axis: [(kind, cells by depth)]}}, NaN where is no module; None where nothing is sparse."""
    if not any(of[axis] for of in sparsity.values() for axis in AXES):
        return None
    kinds, depths, grids = grid(sparsity)
    cells = {axis: list(zip(kinds, grids[axis].tolist(), strict=True)) for axis in AXES}
    return {"depths": [".".join(map(str, depth)) or NONE for depth in depths], "axes": cells}


def _cells(table: pd.DataFrame) -> dict:
    """Return columns, and rows of (text, whether it is marked)."""
    rows = [[(str(cell).strip("*"), str(cell).startswith("**")) for cell in line] for line in table.values.tolist()]
    return {"columns": list(table.columns), "rows": rows}


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
