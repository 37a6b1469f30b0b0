"""Packs: two tables that hold what a folder of runs holds, read wherever runs are read."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from pyarrow import parquet
from recorded_runs import EXAMPLES, LABEL, leave, measure, place, record
from refusals import refusal

from partial_lora import cli
from partial_lora.files import write_json
from partial_lora.launching import packs
from partial_lora.launching.directory import PREDICTIONS, RESULT
from partial_lora.report import predictions, records
from partial_lora.report.write_pack import pack


def tables_of(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in (packs.RUNS_TABLE, packs.PREDICTIONS_TABLE)]


@pytest.fixture
def study(tmp_path: Path) -> Path:
    """Runs of two methods, three seeds each, one without predictions, one measured, and one of a mixture."""
    for seed in range(3):
        leave(tmp_path, "lora", wrong=10 + seed, seed=seed, id="0a")
        run = leave(tmp_path, "partial", wrong=20 + 2 * seed, seed=seed, id="0b")
        measure(run, 0.9, 0.8)
        write_json(run / packs.FORGETTING, {"version": packs.OF_FORGETTING, "sets": {"piqa": {"before": [3.5]}}})
    leave(tmp_path, "targeted", 0.5, id="0c")
    leave(tmp_path, members={"a": 3, "b": 30}, id="0d")
    return tmp_path


def test_what_is_packed_reads_as_it_did_in_its_folders(study: Path) -> None:
    runs, _ = records.read(study)
    loose = {run.directory: json.loads((run.directory / RESULT).read_text()) for run in runs}
    predicted = {path: table.to_pydict() for path in loose for table in predictions.read_all([path])}
    done = pack(study, remove=True)
    assert (done.runs, done.added, len(done.removed), done.left_out) == (8, 8, 8, [])
    assert not (study / "runs").exists()
    again, _ = records.read(study)
    assert [run.row for run in again] == [run.row for run in runs]
    stored = packs.pack_of(study)
    assert {path: stored.json(path.relative_to(study).as_posix()) for path in loose} == loose
    assert packs.packed(runs[3].directory, packs.DYNAMICS)["metrics"]["train"]["accuracy"] == 0.9
    assert [packs.forgetting(runs[place].directory) for place in (0, 3)] == [{}, {"piqa": {"before": [3.5]}}]
    for path, columns in predicted.items():
        kept = packs.predictions_of(path).to_pydict()
        assert {name: kept[name] for name in columns} == columns


def test_a_pack_names_files_and_does_not_say_where_they_lay(tmp_path: Path) -> None:
    """And reads as its folders do: of a task's rows the folder's name stays, by which two tasks are told apart."""
    rows = {"train": "/home/me/signs/train.parquet", "test": "/home/me/signs/test.parquet"}
    places = {"task.data_files.train": rows["train"], "model.weights": "/home/me/base"}
    warned = [f"task.data_files.train={rows['train']}: odd", "1/2 of the rows"]
    settings = {"task__path": "files", "task__data_files": rows, "model__weights": "../base"}
    left = leave(tmp_path, **settings, places=places, warnings=warned, digests={})
    before = records.one(left).row
    pack(tmp_path, remove=True)
    stored = packs.packed(left)
    assert "/home/me" not in json.dumps(stored)
    assert stored["config"]["task"]["data_files"] == {"train": "signs/train.parquet", "test": "signs/test.parquet"}
    assert stored["config"]["model"]["weights"] == "base"
    assert stored["warnings"] == ["task.data_files.train=train.parquet: odd", "1/2 of the rows"]
    assert ("places" in stored, records.one(left).row) == (False, before)


def test_a_pack_is_the_same_when_it_is_made_twice_and_keeps_what_it_has(study: Path) -> None:
    pack(study)
    first = tables_of(study)
    pack(study)
    assert tables_of(study) == first
    shutil.rmtree(study / "runs" / "digits" / "vit" / "lora-0a")
    added = leave(study, "lora", wrong=9, seed=3, id="0a")
    assert (pack(study).runs, pack(study).added) == (9, 0)
    assert len([run for run in records.read(study)[0] if run.row["method"] == "lora"]) == 4
    shutil.rmtree(added)
    assert packs.packed(added)["metrics"]["test"]["accuracy"] == 1 - 9 / EXAMPLES


def test_a_pack_whose_numbers_have_another_width_takes_new_runs(study: Path) -> None:
    pack(study, remove=True)
    file = study / packs.PREDICTIONS_TABLE
    table = parquet.read_table(file)
    index = table.column_names.index("label")
    wide = pa.int64() if table.schema.field(index).type == pa.int32() else pa.int32()
    parquet.write_table(table.set_column(index, table.column_names[index], table[index].cast(wide)), file)
    leave(study, "lora", wrong=9, seed=3, id="0a")
    assert pack(study).runs == 9


def test_a_loose_run_wins_and_one_that_is_broken_takes_nothing_from_the_pack(study: Path) -> None:
    pack(study)
    folder = study / "runs" / "digits" / "vit" / "lora-0a" / "seed0"
    changed = record("lora", 0.25)
    (folder / RESULT).write_text(json.dumps(changed))
    assert records.one(folder).row["test"] == 0.25
    (folder / PREDICTIONS).write_bytes(b"torn")
    done = pack(study)
    assert [(each.path, each.is_broken) for each in done.left_out] == [
        (f"{folder.relative_to(study)}/{PREDICTIONS}", True)
    ]
    (folder / RESULT).write_text("torn")
    assert pack(study).runs == 8
    shutil.rmtree(folder)
    assert records.one(folder).row["test"] == 0.95
    assert packs.predictions_of(folder).num_rows == EXAMPLES


def test_columns_are_those_of_records_and_one_line_of_pandas_reads_them(study: Path) -> None:
    pack(study)
    frame, predictions = (pd.read_parquet(study / name) for name in (packs.RUNS_TABLE, packs.PREDICTIONS_TABLE))
    row = records.read(study)[0][0].row
    assert {*row} - {*frame} == {"group", "conditions"}  # the second holds under the defaults of one version
    assert {"run", "form", "size", "test_loss", "version_partial-lora", "examples", "record"} <= {*frame}
    assert {"run", "label", "prediction", "loss"} <= {*predictions}
    assert not {"logits", "scores"} & {*predictions}
    assert list(frame["run"]) == sorted(frame["run"])


def test_losses_and_classes_stand_for_logits_and_labels_are_of_any_type(tmp_path: Path) -> None:
    logits = np.random.default_rng(0).normal(size=(EXAMPLES, 4)).astype(np.float32)
    kinds = {
        "0a": {"label": LABEL, "prediction": logits.argmax(1), "label_name": "x", "logits": list(logits)},
        "0b": {"label": LABEL / 3, "prediction": LABEL / 4, "score": LABEL / 4},
        "0c": {"label": ["yes"] * EXAMPLES, "prediction": ["no"] * EXAMPLES, "rouge_l": 0.0, "exact_match": 0.0},
        "0d": {"label": ["yes"] * EXAMPLES, "loss": 0.5},  # of a run that wrote no texts
    }
    losses = {}
    for id, columns in kinds.items():
        folder = place(tmp_path, record("lora"), id=id)
        frame = pd.DataFrame({"index": np.arange(EXAMPLES), **columns})
        frame.to_parquet(folder / PREDICTIONS)
        losses[folder] = predictions.losses_of(predictions.read(folder / PREDICTIONS))
    pack(tmp_path, remove=True)
    for folder, expected in losses.items():
        kept = packs.predictions_of(folder)
        columns = kinds[folder.parent.name[-2:]]
        np.testing.assert_allclose(predictions.losses_of(kept), expected, rtol=1e-6)
        for name in columns.keys() & {"label", "prediction"}:
            assert kept[name].to_pylist() == list(columns[name])
        assert ("classes" in kept.column_names) == ("logits" in columns)
    assert packs.predictions_of(folder.parents[1] / "lora-0a" / "seed0")["classes"][0].as_py() == 4


@pytest.mark.parametrize(
    ("column", "value"),
    [
        *(("run", path) for path in ("runs/../../../seed0", "/runs/a/b/c/seed0", "elsewhere", 5)),
        *(("record", text) for text in ("{", "[1]", "[" * 99_999, 5)),
    ],
)
def test_a_pack_that_somebody_else_has_written_is_read_as_data(study: Path, column: str, value: object) -> None:
    """No path in it leads out of the results directory."""
    pack(study)
    file = study / packs.RUNS_TABLE
    table = parquet.read_table(file).slice(0, 1)
    changed = table.set_column(table.column_names.index(column), column, pa.array([value]))
    parquet.write_table(changed.replace_schema_metadata(table.schema.metadata), file)
    (study / "runs").rename(study / "gone")
    with refusal(f"{file}: "):
        [packs.recorded(place) for place in packs.directories(study)]


@pytest.mark.parametrize("name", [packs.RUNS_TABLE, packs.PREDICTIONS_TABLE])
@pytest.mark.parametrize("content", ["truncated", "foreign", "empty", "other"])
def test_a_table_that_is_broken_or_foreign_is_named_and_nothing_is_lost(study: Path, name: str, content: str) -> None:
    pack(study)
    file = study / name
    whole = file.read_bytes()
    broken = {"truncated": whole[: len(whole) // 2], "empty": b"", "foreign": b"text,label\n"}
    if content == "other":
        parquet.write_table(pa.table({"run": ["a"]}), file)
    else:
        file.write_bytes(broken[content])
    before = file.read_bytes()
    with refusal(f"{file}: "):
        pack(study, remove=True)
    assert file.read_bytes() == before
    assert len(list(study.glob("runs/*/*/*/*/result.json"))) == 8


def test_predictions_of_another_pack_are_refused(study: Path) -> None:
    pack(study)
    file = study / packs.PREDICTIONS_TABLE
    parquet.write_table(parquet.read_table(file).slice(5), file)
    folder = study / "runs" / "digits" / "vit" / "lora-0a" / "seed0"
    with refusal(f"{file}: ", "lora-0a"):
        packs.predictions_of(folder)
    with refusal(f"{file}: "):
        pack(study)


def test_a_folder_is_removed_only_if_the_pack_holds_what_is_there(study: Path, monkeypatch) -> None:
    monkeypatch.setattr("partial_lora.report.write_pack._write", lambda table, file: None)
    with refusal(str(study)):
        pack(study, remove=True)
    assert len(list(study.glob("runs/*/*/*/*/result.json"))) == 8


def test_of_a_linked_folder_the_link_is_removed(study: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    run = next(study.glob("runs/*/*/*/seed*"))
    elsewhere = run.rename(tmp_path_factory.mktemp("disk") / run.name)
    run.symlink_to(elsewhere)
    pack(study, remove=True)
    assert (run.is_symlink(), (elsewhere / RESULT).is_file()) == (False, True)
    assert not list(study.glob("runs/*/*/*/*"))


def test_a_folder_in_which_nothing_has_finished_gets_no_pack(tmp_path: Path) -> None:
    place(tmp_path, record(status="running"), id="0f")
    with refusal(re.escape(f"{tmp_path}: "), "0f"):
        pack(tmp_path)
    assert packs.pack_of(tmp_path) is None
    leave(tmp_path, "lora", wrong=1)
    assert pack(tmp_path).added == 1


def test_the_command_says_what_it_left_out_and_runs_lists_both(study: Path, capsys: pytest.CaptureFixture) -> None:
    place(study, record(seed=9, status="failed", error="CUDA out of memory"), id="0f")
    assert cli.main(["pack", str(study), "--remove"]) == 0
    captured = capsys.readouterr()
    assert "8 runs, 8 new" in captured.out
    assert "0f" in captured.err
    leave(study, "lora", wrong=1, seed=4, id="0a")
    assert cli.main(["runs", str(study)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 10
    assert cli.main(["pack", str(study / "nowhere")]) == 2
