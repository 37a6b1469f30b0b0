"""The packing of a study: its finished runs, read from their folders and an earlier pack, become two tables.

Both are sorted, and byte for byte the same when they are made twice. The table of predictions is written first: what
it has beyond the table of runs is never read.
"""

from __future__ import annotations

import io
import json
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa
from pyarrow import parquet

from partial_lora.errors import PartialLoraError
from partial_lora.files import one_writer, write_atomic
from partial_lora.report import examples, race, records
from partial_lora.runs import directory, packs
from partial_lora.runs.directory import PREDICTIONS, RESULT
from partial_lora.runs.packs import COLUMN, DYNAMICS, TYPED, Pack

_KEPT = ("index", "label", "prediction", "label_name", "prediction_name", "prediction_norm", "exact_match", "rouge_l")
_OF_TYPE = {"double": "_number", "float": "_number", "string": "_text"}
_OF_DEFAULTS = {"group", "conditions"}  # columns of `records.row` that hold only under the defaults of one version


@dataclass(frozen=True)
class Packed:
    """A pack that was written: its runs, those that were not in it before, what it left out, and what was removed."""

    runs: int
    added: int
    left_out: list[records.LeftOut]
    removed: list[Path]


def pack(results_dir: Path, *, remove: bool = False) -> Packed:
    """Write the finished runs of a results directory into its pack, which keeps what it has.

    remove: then remove the folders of packed runs, weights included, once the pack has been read back and holds what
    they hold. Raises PartialLoraError for a directory without runs, and where the pack that is there cannot be read.
    """
    results_dir = Path(results_dir)
    with one_writer(results_dir / packs.RUNS_TABLE, "write"):
        earlier = packs.pack_of(results_dir)
        runs, left_out = records.read(results_dir)
        kept = [_kept(run.directory) for run in runs]
        rows = [_row(run, results_dir, table) for run, table in zip(runs, kept, strict=True)]
        predictions = [
            table.add_column(0, "run", pa.array([row["run"]] * len(table)).dictionary_encode())
            for row, table in sorted(zip(rows, kept, strict=True), key=lambda pair: pair[0]["run"])
            if table is not None
        ]
        if predictions:
            _write(pa.concat_tables(predictions, promote_options="default"), results_dir / packs.PREDICTIONS_TABLE)
        frame = pd.DataFrame(rows).sort_values("run", ignore_index=True)
        _write(pa.Table.from_pandas(frame, preserve_index=False), results_dir / packs.RUNS_TABLE)
        before = set(earlier.paths) if earlier else set()
        removed = _remove([run for run in runs if run.directory.is_dir()], results_dir) if remove else []
    return Packed(len(rows), len(set(frame["run"]) - before), left_out, removed)


def _row(run: records.Run, results_dir: Path, predicted: pa.Table | None) -> dict:
    """Return a run's row of runs.parquet."""
    record = run.record
    metrics = {
        f"{split}_{name}": float(value)
        for split, scores in record["metrics"].items()
        for name, value in scores.items()
        if isinstance(value, (int, float)) and "/" not in name  # of a mixture each member has its own, in the record
    }
    versions = {f"version_{name}": version for name, version in record["versions"].items()}
    return {
        "run": run.directory.relative_to(results_dir).as_posix(),
        **{name: value for name, value in run.row.items() if name not in _OF_DEFAULTS},
        "form": race.form_of(record["config"]),
        "size": race.size_in(record),
        **dict(sorted(metrics.items())),
        **versions,
        "started": record.get("started"),
        "examples": 0 if predicted is None else len(predicted),
        **{column: _json(run.directory, name) for name, column in COLUMN.items()},
    }


def _json(place: Path, name: str) -> str | None:
    """Return a JSON file of a run in one line, as it was written."""
    try:
        content = json.loads((place / name).read_text(encoding="utf-8"))
    except FileNotFoundError:
        content = packs.stored(place, name)
    return None if content is None else json.dumps(content, separators=(",", ":"))


def _kept(place: Path) -> pa.Table | None:
    """Return the columns of a run's predictions that comparisons and pages read; None without predictions.

    The loss of every example, and the number of classes, stand for the logits.
    """
    file = place / PREDICTIONS
    table = examples.read(file) if file.is_file() else packs.predictions_of(place)
    if table is None or not len(table):
        return None
    columns = {"index": table["index"].cast(pa.int32())} if "index" in table.column_names else {}
    for name in (*_KEPT, "member"):
        if name in table.column_names and name not in columns:
            columns[name] = table[name]
    columns = {_typed(name, column): _plain(column) for name, column in columns.items()}
    columns["loss"] = pa.array(examples.losses_of(table), pa.float32())
    if "classes" in table.column_names:
        columns["classes"] = table["classes"]
    elif "logits" in table.column_names and "member" not in table.column_names:
        columns["classes"] = pa.array([len(table["logits"][0])] * len(table), pa.int32())
    return pa.table(columns)


def _plain(column: pa.ChunkedArray) -> pa.ChunkedArray:
    return column.cast(pa.string()) if pa.types.is_large_string(column.type) else column


def _typed(name: str, column: pa.ChunkedArray) -> str:
    """Return what a column of labels is called in a table of runs whose labels are of other types."""
    kind = _OF_TYPE.get(str(_plain(column).type), "")
    return f"{name}{kind}" if f"{name}{kind}" in TYPED else name


def _write(table: pa.Table, file: Path) -> None:
    buffer = io.BytesIO()
    table = table.replace_schema_metadata(packs.VERSION)
    parquet.write_table(table, buffer, compression="zstd", compression_level=15, data_page_size=2**24)
    write_atomic(file, buffer.getvalue())


def _remove(runs: list[records.Run], results_dir: Path) -> list[Path]:
    """Remove the folders of runs, each compared with the pack as it is read back; return them.

    Raises PartialLoraError, and removes nothing more, where a run is not in the pack as it is in its folder.
    """
    written = Pack(results_dir)
    for run in runs:
        place, path = run.directory, run.directory.relative_to(results_dir).as_posix()
        with directory.locked(place):
            loose, predicted = json.loads((place / RESULT).read_text(encoding="utf-8")), written.predictions(path)
            own = _kept(place)
            alike = own is None if predicted is None else own is not None and _kept_alike(own, predicted)
            if (
                written.json(path) != loose
                or not alike
                or (written.json(path, DYNAMICS) is None) != (not (place / DYNAMICS).is_file())
            ):
                raise PartialLoraError(f"{place}: the pack does not hold what is there; nothing more is removed")
            shutil.rmtree(place)
        with suppress(OSError):  # not empty
            for parent in list(place.parents)[:4]:
                parent.rmdir()
    latest = results_dir / directory.LATEST
    if latest.is_symlink() and not latest.exists():
        latest.unlink()
    return [run.directory for run in runs]


def _kept_alike(own: pa.Table, packed: pa.Table) -> bool:
    renamed = own.rename_columns([TYPED.get(name, name) for name in own.column_names])
    return renamed.select(packed.column_names).to_pydict() == packed.to_pydict()
