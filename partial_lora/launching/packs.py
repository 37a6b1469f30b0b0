"""A study as two tables: `runs.parquet`, a row a run with its whole record, and `predictions.parquet`, a row a test
example.

A results directory may hold runs in folders, packed runs, or both; where both have a run, its folder counts. Packed
runs are called by the path that their folder had below the results directory. Written by `report.write_pack`.

The record of a run, None where there is none, is read by `directory.read_result` out of its folder, by `packed` out of
the pack, and by `recorded` wherever it is.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from partial_lora.errors import PartialLoraError, one_line
from partial_lora.files import FORMAT, other_format, read_json, with_an_end
from partial_lora.launching.directory import RESULT, RUNS, read_result

if TYPE_CHECKING:  # a quarter of a second to import; most results directories have no pack
    import pyarrow as pa


RUNS_TABLE = "runs.parquet"
PREDICTIONS_TABLE = "predictions.parquet"
DYNAMICS = "dynamics.json"  # what scripts/dynamics.py has measured of a run
OF_DYNAMICS = 1  # version of its content: metrics by split (train, test), linear CKA by block
FORGETTING = "forgetting.json"  # what `compare forgets=…` has measured of a run, by set
OF_FORGETTING = 1  # version of its content: id, metric, and what each row adds to it, before and after
_FORMAT, _BEFORE = b"partial_lora_format", b"partial_lora_pack"  # in the metadata of both tables; before 1.0
METADATA = {_FORMAT: str(FORMAT).encode()}
# Of runs.parquet: the content of a JSON file of the run's folder. A pack may lack a column that no run of it has.
COLUMN = {RESULT: "record", DYNAMICS: "dynamics", FORGETTING: "forgetting"}

_OPTIONAL = {COLUMN[DYNAMICS], COLUMN[FORGETTING]}
_RESTORE = "restore it, or pack the runs again"

# A column holds one type, and labels are classes, numbers or texts: each kind has a column, called by its name here.
TYPED = {f"{name}{kind}": name for name in ("label", "prediction") for kind in ("", "_number", "_text")}


class Pack:
    """The packed runs of a results directory, each read when it is asked for.

    Raises PartialLoraError, naming the file, for a table that is broken or was not made by `partial-lora pack`.
    """

    def __init__(self, results_dir: Path) -> None:
        self._results_dir = results_dir
        runs = _table(results_dir / RUNS_TABLE, ["run", "examples", *COLUMN.values()])
        self._runs = runs.to_pydict()
        self._row = {path: row for row, path in enumerate(self._runs["run"])}
        for path in self._row:
            parts = Path(str(path)).parts
            if len(parts) != RUNS.count("/") + 1 or ".." in parts or not Path(*parts).match(RUNS):
                raise PartialLoraError(f"{results_dir / RUNS_TABLE}: {path}: expected a path like {RUNS}; {_RESTORE}")

    @property
    def paths(self) -> list[str]:
        """The paths of the runs below the results directory, in order."""
        return list(self._row)

    def json(self, path: str, name: str = RESULT) -> dict | None:
        """Return what a JSON file of a run's folder held; None where the run is not packed or had no such file."""
        text = self._runs[COLUMN[name]][self._row[path]] if path in self._row and COLUMN[name] in self._runs else None
        try:
            content = None if text is None else json.loads(text)
            if isinstance(content, (dict, type(None))):
                return content
            reason = "no mapping"
        except (ValueError, TypeError, RecursionError) as error:
            reason = one_line(error)
        file = self._results_dir / RUNS_TABLE
        raise PartialLoraError(f"{file}: {name} of {path} cannot be read ({reason}); {_RESTORE}")

    def predictions(self, path: str) -> pa.Table | None:
        """Return what a run predicted, with the columns of its own predictions that are kept; None without any.

        Raises PartialLoraError where the table of predictions is broken or does not belong to that of the runs.
        """
        examples = self._runs["examples"][self._row[path]] if path in self._row else None
        if not examples:
            return None
        start, count = self._places.get(path, (0, 0))
        if count != examples:
            file = self._results_dir / PREDICTIONS_TABLE
            raise PartialLoraError(f"{file}: {count} examples of {path}, expected {examples}; restore the file")
        table = self._predictions.slice(start, count).drop_columns("run")
        table = table.select([name for name in table.column_names if table[name].null_count < count])
        return table.rename_columns([TYPED.get(name, name) for name in table.column_names])

    @functools.cached_property
    def _predictions(self) -> pa.Table:
        return _table(self._results_dir / PREDICTIONS_TABLE)

    @functools.cached_property
    def _places(self) -> Mapping[str, tuple[int, int]]:
        """The first row of each run and the number of its rows, which stand together."""
        from pyarrow import compute

        encoded = compute.run_end_encode(self._predictions["run"].cast("string").combine_chunks())
        ends = [0, *encoded.run_ends.to_pylist()]
        return {path: (ends[row], ends[row + 1] - ends[row]) for row, path in enumerate(encoded.values.to_pylist())}


def _table(file: Path, columns: list[str] | None = None) -> pa.Table:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        schema = parquet.read_schema(with_an_end(file))
        fault = _fault(schema.metadata or {})
        columns = [name for name in columns or schema.names if name in schema.names or name not in _OPTIONAL]
        table = None if fault else parquet.read_table(file, columns=columns)
    except (OSError, ValueError, KeyError, pa.ArrowException) as error:
        reason = f"cannot be read ({one_line(error)})"
        raise PartialLoraError(f"{file}: {reason}; {_RESTORE}") from error
    if fault:
        raise PartialLoraError(f"{file}: {fault}")
    return table


def _fault(metadata: Mapping[bytes, bytes]) -> str | None:
    """Return why a table is not read, by its metadata; None where it is."""
    if not {_FORMAT, _BEFORE} & metadata.keys():
        return "expected a table of `partial-lora pack`; move this file elsewhere"
    number = metadata.get(_FORMAT)
    return other_format(number and (int(number) if number.isdigit() else number.decode(errors="replace")))


def pack_of(results_dir: Path) -> Pack | None:
    """Return the pack of a results directory, None where there is none; read again only once it has changed."""
    file = results_dir / RUNS_TABLE
    try:
        stat = file.stat()
    except OSError:
        return None
    return _pack_of(results_dir.resolve(), stat.st_size, stat.st_mtime_ns)


@functools.lru_cache(maxsize=4)
def _pack_of(results_dir: Path, size: int, changed: int) -> Pack:
    return Pack(results_dir)


def directories(results_dir: Path) -> list[Path]:
    """Return the directories of a results directory's runs, in order: those that are there and those of packed runs."""
    loose, pack = (path for path in results_dir.glob(RUNS) if path.is_dir()), pack_of(results_dir)
    return sorted({*loose, *(results_dir / path for path in (pack.paths if pack else ()))})


def packed(place: Path, name: str = RESULT) -> dict | None:
    """Return a JSON file of a packed run by the directory that the run had; None without one."""
    pack, path = _at(place)
    return None if pack is None else pack.json(path, name)


def _at(place: Path) -> tuple[Pack | None, str]:
    """Return the pack of the results directory that a run's directory lies in, and the run's path below it."""
    depth = RUNS.count("/")
    within = len(place.parents) > depth
    return pack_of(place.parents[depth]) if within else None, "/".join(place.parts[-depth - 1 :])


def recorded(place: Path) -> dict | None:
    """Return the record of a run, out of its folder or else out of the pack; None where neither has one."""
    return read_result(place) or packed(place)


def dynamics(place: Path) -> dict | None:
    """Return what scripts/dynamics.py has measured of a run; None where there is nothing, or something else."""
    return _measured(place, DYNAMICS, OF_DYNAMICS, {"metrics", "cka"})


def forgetting(place: Path, sets: Collection[str] | None = None) -> dict[str, dict]:
    """Return what was measured of a run on other sets, by set: on those of these names, or on all."""
    content = _measured(place, FORGETTING, OF_FORGETTING, {"sets"}) or {"sets": {}}
    return {name: found for name, found in content["sets"].items() if sets is None or name in sets}


def _measured(place: Path, name: str, version: int, keys: set[str]) -> dict | None:
    try:
        content = read_json(place / name)
    except FileNotFoundError:
        content = None if (place / RESULT).is_file() else packed(place, name)  # a packed one may be of another training
    except (OSError, ValueError):
        return None
    is_known = isinstance(content, dict) and content.get("version") == version
    return content if is_known and keys <= content.keys() else None


def predictions_of(place: Path) -> pa.Table | None:
    """Return the predictions of a packed run by the directory that it had; None where there are none."""
    pack, path = _at(place)
    return None if pack is None else pack.predictions(path)
