"""Pages over runs: one file that needs nothing else, neither a network nor another file.

What is shown is gathered here; how, is in templates/.
"""

from __future__ import annotations

import base64
import json
import logging
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean

import pandas as pd
import pyarrow as pa
from jinja2 import Environment, PackageLoader, StrictUndefined

from partial_lora.report import hardest, page_drawings
from partial_lora.report.closing import measured, percent
from partial_lora.report.gallery import Shown
from partial_lora.report.places import AXES
from partial_lora.report.runs import NONE, Run, number, run_of
from partial_lora.runs.results import PREDICTIONS
from partial_lora.sealed import write_atomic

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
        "figures": [(each.title, each.said, _uri(each.files[-1])) for each in figures],
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


def leave(record: Mapping, directory: Path, rows=None) -> None:
    """The page of a run that is about to end; the run does not depend on it, so that what goes wrong is only logged."""
    try:
        write_run(run_of(record, directory), rows)
    except Exception as error:
        logger.warning("%s: no page could be made (%s: %s)", directory, type(error).__name__, error)


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
                "curves": page_drawings.training_lines([run.record for run in runs]),
                "map": page_drawings.sparsity_map(_sparsity(runs)),
                "warnings": [*_warnings(runs), *untold],
                "examples": worst,
            }
        )
    return made


def _examples(
    runs: Sequence[Run], count: int, read: dict[str, object], rows
) -> tuple[list[hardest.Example], list[str]]:
    """The hardest, with their inputs, and what kept them from being told; rows of a task are read once, into `read`."""
    try:
        tables = hardest.predictions([run.directory for run in runs]) if count else []
        worst = hardest.hardest(tables, count)
        if not worst:
            return [], []
        settings = runs[0].record["config"]
        key = json.dumps(settings["task"], sort_keys=True)
        if rows is None and key not in read:
            read[key] = hardest.rows_of(settings)
        found = read.get(key) if rows is None else rows
        return (worst if found is None else hardest.shown(worst, found, tables[0]["label"].to_pylist())), []
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
        loader=PackageLoader("partial_lora"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _written(path: Path, content: Mapping) -> Path:
    write_atomic(path, _templates().get_template("page.html").render(content))
    return path
