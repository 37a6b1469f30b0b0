"""The packing of a study: its finished runs, read from their folders and an earlier pack, become two tables.

A pack is for others: it names files and folders, and does not say where they lay.

Both are sorted, and byte for byte the same when they are made twice. The table of predictions is written first: what
it has beyond the table of runs is never read.
"""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pyarrow as pa
from pyarrow import parquet

from partial_lora.errors import PartialLoraError, one_line
from partial_lora.files import one_writer, read_json, write_atomic
from partial_lora.launching import directory, packs
from partial_lora.launching.directory import PREDICTIONS, RESULT
from partial_lora.launching.packs import COLUMN, Pack
from partial_lora.report import predictions, ranking, records
from partial_lora.settings.versions import record_for_others
from partial_lora.tasks.metrics import OF_TEXTS

_KEPT = ("index", "label", "prediction", "label_name", "prediction_name", "prediction_norm", "tokens", *OF_TEXTS)
_TYPES = {"large_string": pa.string(), "float": pa.float64(), "int32": pa.int64()}  # one for texts, and one for numbers
_LATER = [name for name in COLUMN if name != RESULT]
_SUFFIX = {"double": "_number", "string": "_text"}
_OF_DEFAULTS = {"group", "conditions"}  # columns of `rows.row` that hold only under the defaults of one version


class Packed(NamedTuple):
    """A pack that was written: its runs, those that were not in it before, what it left out, and what was removed."""

    runs: int
    added: int
    left_out: list[records.LeftOut]
    removed: list[Path]


class Content(NamedTuple):
    """A run as a pack keeps it: its record, and its predictions, each None if absent.

    measured: what was measured of it later, by the name of its file.
    """

    record: dict | None
    measured: dict[str, dict | None]
    predictions: pa.Table | None


def pack(results_dir: Path, *, remove: bool = False) -> Packed:
    """Write the finished runs of a results directory into its pack, which keeps the runs that it has.

    remove: then remove the folders of packed runs, weights included, once the pack has been read back and holds what
    they hold. Raises PartialLoraError for a directory without runs, and where the pack that is there cannot be read.
    """
    runs, left_out = records.read(results_dir)
    with one_writer(results_dir / packs.RUNS_TABLE, "write"):
        earlier = packs.pack_of(results_dir)
        contents = {path: _packed(earlier, path) for path in earlier.paths} if earlier else {}
        before, loose = set(contents), {}
        for run in runs:
            path = run.directory.relative_to(results_dir).as_posix()
            if (run.directory / RESULT).is_file():
                try:
                    contents[path] = _loose(run.directory)
                    loose[path] = run.directory
                except (OSError, ValueError, KeyError, pa.ArrowException) as error:
                    left_out.append(records.LeftOut(f"{path}/{PREDICTIONS}", f"broken, {one_line(error)}", True))
        if not contents:  # a table without a row has no columns, and could not be read
            why = f"; {left_out[0]}" if left_out else ""
            raise PartialLoraError(f"{results_dir}: expected at least one finished run to pack{why}")
        tables = ((path, content.predictions) for path, content in sorted(contents.items()))
        predictions = [_rows(path, table) for path, table in tables if table is not None]
        if predictions:
            _write(pa.concat_tables(predictions, promote_options="permissive"), results_dir / packs.PREDICTIONS_TABLE)
        rows = pd.DataFrame([_row(path, content) for path, content in sorted(contents.items())])
        _write(pa.Table.from_pandas(rows, preserve_index=False), results_dir / packs.RUNS_TABLE)
        if remove:
            _remove(loose, results_dir)
    return Packed(len(contents), len(contents.keys() - before), left_out, list(loose.values()) if remove else [])


def _packed(earlier: Pack, path: str) -> Content:
    measured = {name: earlier.json(path, name) for name in _LATER}
    return Content(_told(earlier.json(path)), measured, earlier.predictions(path))


def _told(record: dict | None) -> dict | None:
    """Return a record without the folders of its machine; one without settings, which is no run's, as it is."""
    return record_for_others(record) if record and isinstance(record.get("config"), Mapping) else record


def _loose(place: Path) -> Content:
    """Return a run out of its folder; raises ValueError, KeyError or OSError where a file of it is broken."""
    parsed = {name: read_json(file) if (file := place / name).is_file() else None for name in COLUMN}
    file = place / PREDICTIONS
    return Content(_told(parsed.pop(RESULT)), parsed, _kept(predictions.read(file)) if file.is_file() else None)


def _kept(table: pa.Table) -> pa.Table:
    """Return the columns of predictions that comparisons and pages read.

    The loss of every example, and the number of classes, stand for the logits.
    """
    names = [name for name in (*_KEPT, "member") if name in table.column_names]
    columns = {name: table[name].cast(_TYPES.get(str(table[name].type), table[name].type)) for name in names}
    columns["loss"] = pa.array(predictions.losses_of(table), pa.float32())
    if "logits" in table.column_names and "member" not in table.column_names:
        columns["classes"] = pa.array([len(table["logits"][0])] * len(table))
    return pa.table(columns)


def _rows(path: str, predictions: pa.Table) -> pa.Table:
    """Return a run's rows of predictions.parquet, labels in the column of their type."""
    typed = {"label", "prediction"}.intersection(predictions.column_names)
    kinds = {name: _SUFFIX.get(str(predictions[name].type), "") for name in typed}
    named = predictions.rename_columns([f"{name}{kinds.get(name, '')}" for name in predictions.column_names])
    return named.add_column(0, "run", pa.array([path] * len(named)).dictionary_encode())


def _row(path: str, content: Content) -> dict:
    record = content.record
    run = records.run_of(record, Path(path))
    metrics = {
        f"{split}_{name}": float(value)
        for split, scores in record["metrics"].items()
        for name, value in scores.items()
        if isinstance(value, (int, float)) and "/" not in name  # of a mixture each member has its own, in the record
    }
    return {
        "run": path,
        **{name: value for name, value in run.row.items() if name not in _OF_DEFAULTS},
        "form": ranking.form_of(record["config"]),
        "size": ranking.size_in(record),
        **dict(sorted(metrics.items())),
        **{f"version_{name}": version for name, version in record["versions"].items()},
        "started": record.get("started"),
        "examples": 0 if content.predictions is None else len(content.predictions),
        COLUMN[RESULT]: _in_one_line(content.record),
        **{COLUMN[name]: _in_one_line(measured) for name, measured in content.measured.items()},
    }


def _in_one_line(content: Mapping | None) -> str | None:
    return None if content is None else json.dumps(content, separators=(",", ":"))


def _write(table: pa.Table, file: Path) -> None:
    buffer = io.BytesIO()
    table = table.replace_schema_metadata(packs.METADATA)
    parquet.write_table(table, buffer, compression="zstd", compression_level=15, data_page_size=2**24)
    write_atomic(file, buffer.getvalue())


def _remove(loose: Mapping[str, Path], results_dir: Path) -> None:
    """Remove the folders of runs, each compared with the pack as it is read back.

    Raises PartialLoraError, and removes nothing more, where a run is not in the pack as it is in its folder.
    """
    stored = Pack(results_dir)
    for path, place in loose.items():
        with directory.locked(place):
            if not _alike(_loose(place), _packed(stored, path)):
                raise PartialLoraError(f"{place}: the pack does not hold what is there; nothing more is removed")
            place.unlink() if place.is_symlink() else shutil.rmtree(place)  # what a link leads to is not the results'
        with suppress(OSError):  # not empty
            for parent in list(place.parents)[:4]:
                parent.rmdir()
    latest = results_dir / directory.LATEST
    if latest.is_symlink() and not latest.exists():
        latest.unlink()


def _alike(first: Content, second: Content) -> bool:
    if (first.record, first.measured) != (second.record, second.measured):
        return False
    if first.predictions is None or second.predictions is None:
        return first.predictions is second.predictions
    frames = [content.predictions.to_pandas().sort_index(axis=1) for content in (first, second)]
    return frames[0].equals(frames[1])
