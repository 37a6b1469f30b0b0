"""`partial-lora evaluate`: a run's own numbers again, other rows of its labels, and nothing it recorded changes."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import datasets
import finished_runs
import numpy as np
import pandas
import pytest
from finished_runs import files, override, pictures
from refusals import refusal

from partial_lora import cli
from partial_lora.finished import evaluate as evaluate_run
from partial_lora.finished.run import FinishedRun, finished_run
from partial_lora.finished.target_task import evaluation_settings
from partial_lora.launching import directory as results
from partial_lora.settings import identity, versions


@pytest.fixture(scope="module")
def run() -> FinishedRun:
    return finished_runs.image_run()


@pytest.fixture
def evaluate(run, capsys):
    """Give what --json says of a command line."""

    def do(*arguments: str, of: FinishedRun = run) -> dict:
        capsys.readouterr()  # what its training printed, where this is the first test that needs it
        assert cli.evaluate([str(of.directory), "--json", *arguments]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return json.loads(out)

    return do


def predictions(folder: Path | str) -> pandas.DataFrame:
    return pandas.read_parquet(Path(folder) / results.PREDICTIONS)


def refused(run: FinishedRun, begins: str, *arguments: str) -> None:
    with refusal(begins):
        cli.evaluate([str(run.directory), *arguments])


def snapshot(run: FinishedRun) -> dict[str, bytes]:
    """All files of a run but its evaluations."""
    every = [path for path in run.directory.rglob("*") if path.is_file()]
    return {str(path): path.read_bytes() for path in every if evaluate_run.FOLDER not in path.parts}


@pytest.mark.parametrize("of", ["image_run", "text_run", "pair_run", "choice_run", "generation_run"])
def test_without_overrides_it_is_what_the_run_recorded(of, evaluate) -> None:
    own = getattr(finished_runs, of)()
    before = snapshot(own)
    evaluations = {split: evaluate("--split", split, of=own) for split in ("test", "validation")}
    for split, evaluation in evaluations.items():
        assert evaluation["metrics"] == pytest.approx(own.result["metrics"][split], abs=1e-6)
    assert bool(evaluations["test"]["labels"]) == (of in ("image_run", "text_run"))
    recorded, again = predictions(own.directory), predictions(evaluations["test"]["folder"])
    if "logits" in recorded:
        np.testing.assert_allclose(np.stack(again.pop("logits")), np.stack(recorded.pop("logits")), atol=1e-5)
    pandas.testing.assert_frame_equal(again, recorded, atol=1e-6)
    # On validation texts are judged by their likelihood, and none is written.
    written = (Path(evaluations["validation"]["folder"]) / results.PREDICTIONS).exists()
    assert written == (of != "generation_run")
    assert snapshot(own) == before


def test_the_folder_is_named_by_the_question_and_holds_its_answer(run, evaluate) -> None:
    evaluation = evaluate("--split", "train")
    folder = Path(evaluation.pop("folder"))
    assert folder.parent == run.directory / "evaluations"
    assert folder.name.startswith("cifar10-train-")
    assert json.loads((folder / "evaluation.json").read_text()) == evaluation
    assert {file.name for file in folder.iterdir()} == {"evaluation.json", "predictions.parquet"}
    assert evaluation["examples"] == len(predictions(folder)) == 54
    assert evaluation["labels"] == list(finished_runs.COLOURS)
    assert evaluate("--split", "train", "task.cache_bytes=0", "task.test_samples=9")["folder"] != str(folder)
    assert evaluate("--split", "train")["folder"] == str(folder)


def test_a_person_reads_a_table(run, capsys) -> None:
    assert cli.evaluate([str(run.directory)]) == 0
    out = capsys.readouterr().out
    for part in (
        f"{run.result['metrics']['test']['accuracy']:.4f}",
        "21 examples",
        f"wrote {run.directory}/evaluations/",
    ):
        assert part in out


def test_labels_in_another_order_are_matched_by_name(run, evaluate) -> None:
    rows = {"train": (20, 0), "test": (7, 100)}
    turned = {split: pictures(*each, ("blue", "red", "green")) for split, each in rows.items()}
    evaluation = evaluate(override(files(turned, "turned")))
    assert evaluation["metrics"] == pytest.approx(run.result["metrics"]["test"], abs=1e-6)
    columns = ["label", "label_name", "prediction_name"]
    pandas.testing.assert_frame_equal(predictions(evaluation["folder"])[columns], predictions(run.directory)[columns])


def test_other_rows_of_the_run_s_own_columns_are_one_key(run, evaluate, tmp_path) -> None:
    pictures(2, 300).to_parquet(str(tmp_path / "more.parquet"))
    evaluation = evaluate(f"task.data_files.test={tmp_path}/more.parquet", "trainer.eval_batch_size=4")
    assert evaluation["examples"] == 6
    assert list(predictions(evaluation["folder"])["label_name"]) == [*finished_runs.COLOURS] * 2


def test_rows_that_the_run_was_trained_on_are_counted(run, evaluate, tmp_path) -> None:
    pictures(3, 18).to_parquet(str(tmp_path / "mixed.parquet"))  # six are in the run's file, whence validation has some
    (line,) = evaluate(f"task.data_files.test={tmp_path}/mixed.parquet")["warnings"]
    assert re.match("[3-6] of 9 rows", line)
    assert evaluate()["warnings"] == evaluate("--split", "train")["warnings"] == []


def test_another_task_is_taken_whole(run, evaluate) -> None:
    """Nothing of the run's own task is mixed into the group file that is named in its place."""
    evaluation = evaluate("task=digits", override(finished_runs.picture_files()))
    assert evaluation["task"]["path"] == "bundled:digits"
    assert evaluation["task"]["revision"] is None  # cifar10 has one
    assert evaluation["metrics"] == pytest.approx(run.result["metrics"]["test"], abs=1e-6)


def test_another_task_has_its_files_out_of_a_folder_of_tasks(run, tmp_path) -> None:
    """Files come out of the folder that is named, else out of the run's own where that has the task."""
    train = tmp_path / "cifar100" / "train.parquet"
    train.parent.mkdir()
    pictures(6, 0).to_parquet(str(train))
    inside = dataclasses.replace(run, config=dataclasses.replace(run.config, data_dir=str(tmp_path)))
    for of, given in ((run, [f"data_dir={tmp_path}"]), (inside, [])):
        assert evaluation_settings(of, ["task=cifar100", *given])[0].data_files == {"train": str(train)}
    assert evaluation_settings(inside, ["task=cifar10"])[0].data_files is None
    with refusal(f"data_dir={tmp_path}: "):
        evaluation_settings(run, ["task=cifar10", f"data_dir={tmp_path}"])


def test_a_harness_with_rows_of_its_own_needs_none_of_the_runs_files(run, tmp_path) -> None:
    task = dataclasses.replace(run.config.task, data_files={"train": f"{tmp_path}/gone.parquet"})
    elsewhere = dataclasses.replace(run, config=dataclasses.replace(run.config, task=task))
    with refusal("task.data_files.train=", "gone.parquet"):
        evaluation_settings(elsewhere, [])
    evaluation_settings(elsewhere, [], reads_rows=False)


def test_a_causal_run_answers_other_questions_and_writes_texts(evaluate) -> None:
    own = finished_runs.choice_run()
    rows = [
        {"question": "red?", "choices": {"text": ["a rose", "coal", n], "label": ["A", "B", "C"]}, "answerKey": "A"}
        for n in ("milk", "the night sky", "snow")
    ]
    evaluation = evaluate(
        "task=arc_challenge", override(finished_runs.tables({"train": rows * 4, "test": rows}, "arc")), of=own
    )
    answered = predictions(evaluation["folder"])
    assert (evaluation["examples"], len(answered), set(answered["label"])) == (3, 3, {0})
    assert evaluation["metrics"]["accuracy"] == np.mean(answered["prediction"] == 0)
    assert answered["scores"].map(len).tolist() == [3, 3, 3]
    other = ("task=text_generation", *finished_runs.GENERATION, override(finished_runs.exchange_files()))
    evaluation = evaluate(*other, "task.max_new_tokens=4", of=own)
    assert list(evaluation["metrics"]) == ["primary", "perplexity", "loss", "rouge_l"]
    assert predictions(evaluation["folder"])["prediction"].str.len().max() <= 4


# Refusals


@pytest.mark.parametrize(
    ("argument", "key"),
    [
        *((each, each.partition("=")[0]) for each in ("model.image_size=64", "seed=1", "trainer.epochs=9")),
        *((each, each.partition("=")[0]) for each in ("+task.extra=1", "hydra.mode=null", "task.colour=red")),
        # Splits that are cut in another way would hold rows that it was trained on.
        *((f"task.{key}", f"task.{key.partition('=')[0]}") for key in ("validation_share=0.2", "split_seed=1")),
        ("task.train_samples=9", "task.train_samples"),
        ("task=nothing", "task=nothing"),
        ("task=[cifar10,digits]", "task"),
        ("task.test_samples=none", "task.test_samples"),
        ("trainer.eval_batch_size=0", "trainer.eval_batch_size"),
        ("trainer.device=tpu", "trainer.device"),
        ("task.data_files.test=nowhere.parquet", "task.data_files.test=nowhere.parquet"),
        ("task", "'task'"),
    ],
)
def test_what_a_finished_run_keeps_and_what_is_wrong_is_refused_by_its_key(run, argument, key) -> None:
    refused(run, re.escape(key), argument)


def test_a_task_of_other_labels_inputs_or_answers_is_refused_by_both(run) -> None:
    refused(run, "task=digits: .*0, 1, 2, 3, 4, 5, 6, 7, 8, 9", "task=digits")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["red", "pink"])})
    pink = pictures(6, 0).filter(lambda label: label < 2, input_columns="label").cast(features)
    refused(run, "task=cifar10: .* pink .* blue, green", override(files({"train": pink, "test": pink}, "pink")))
    questions = ("task=choice_table", *finished_runs.CHOICE, override(finished_runs.question_files()))
    sentences = ("task=text_table", override(finished_runs.sentence_files()))
    refused(run, "model=.*task=", "task.modality=text")
    refused(finished_runs.pair_run(), ".*labels.*numbers", *sentences)
    refused(finished_runs.text_run(), ".*choice", *questions)
    refused(finished_runs.choice_run(), ".*label", *sentences)


def test_an_unfinished_evaluation_has_no_record(run, evaluate, monkeypatch) -> None:
    folder = Path(evaluate()["folder"])
    monkeypatch.setattr(evaluate_run, "write_json", lambda path, content: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        cli.evaluate([str(run.directory)])
    assert not (folder / "evaluation.json").exists()


def with_files(run: FinishedRun, folder: Path, data_files: object) -> FinishedRun:
    """A copy of a run in a folder as `train` names it, with other files of its rows."""
    settings = finished_runs.changed(run, "task", data_files=data_files).config
    directory = folder / f"{run.method}-{identity.run_id(settings)}" / "seed0"
    shutil.copytree(run.directory, directory)
    record = json.loads((directory / results.RESULT).read_text())
    of_files = {"config": versions.plain(settings), "digests": identity.digests(versions.plain(settings))}
    (directory / results.RESULT).write_text(json.dumps(record | of_files))
    return finished_run(directory)


def test_rows_that_have_changed_since_the_training_are_refused(run, evaluate, tmp_path) -> None:
    usual = finished_runs.picture_files()
    data = {split: shutil.copy(path, tmp_path) for split, path in usual.items()}
    own = with_files(run, tmp_path, data)
    assert evaluate(of=own)["metrics"] == pytest.approx(run.result["metrics"]["test"], abs=1e-6)
    pictures(21, 0).to_parquet(data["train"])  # three rows more: validation would be cut anew
    other_test = f"task.data_files.test={usual['test']}"
    for harmless in ((), ("task.test_samples=9",), ("task.cache_bytes=0",), (other_test, "--split=validation")):
        refused(own, "task.data_files", *harmless)
    assert evaluate(other_test, of=own)["examples"] == 21


def test_rows_that_have_moved_are_told_by_one_key_and_known_by_their_content(run, evaluate, tmp_path) -> None:
    rows = Path(shutil.copy(finished_runs.picture_files()["train"], tmp_path / "rows.parquet"))
    own = with_files(run, tmp_path, str(rows))  # its test split is cut from them
    before = evaluate(of=own)["metrics"]
    moved = rows.rename(tmp_path / "moved.parquet")
    with refusal(f"task.data_files={rows}: ", "task.data_files=PATH"):
        cli.evaluate([str(own.directory)])
    assert evaluate(f"task.data_files={moved}", of=own)["metrics"] == before
    pictures(24, 0).to_parquet(str(moved))
    refused(own, "task.data_files.train", f"task.data_files={moved}")


def test_a_test_split_is_not_cut_from_other_training_rows(run, tmp_path) -> None:
    pictures(24, 0).to_parquet(str(tmp_path / "more.parquet"))  # those that were trained on, and more
    (tmp_path / "photos" / "a").mkdir(parents=True)
    own = with_files(run, tmp_path, {"train": finished_runs.picture_files()["train"]})  # its test split is cut from it
    for files_of in (f".train={tmp_path}/more.parquet", f"={tmp_path}/more.parquet", f"={tmp_path}/photos"):
        refused(own, "task.data_files.train", f"task.data_files{files_of}")
    for split in ("train", "Test"):  # with a test split of its own it is cut from nothing
        shutil.copytree(tmp_path / "photos", tmp_path / "splits" / split)
    evaluation_settings(own, [f"task.data_files={tmp_path}/splits"])
    test = f"task.data_files.test={finished_runs.picture_files()['test']}"
    refused(own, "task.data_files.test", test, "--split=validation")  # else it were cut from the run's test rows, too


def test_the_own_task_by_name_is_cut_as_the_run_cut_it(run, evaluate, tmp_path) -> None:
    train = {"train": finished_runs.picture_files()["train"]}  # its test split is cut from it
    own, by_name = with_files(run, tmp_path, train), ("task=cifar10", override(train))
    for more in ((), ("task.train_samples=30",)):  # test rows come off before these are counted
        assert evaluate(*by_name, *more, of=own)["examples"] == evaluate(of=own)["examples"]
    challenge = evaluation_settings(own, ["task=arc_challenge", "task.split_seed=1"])[0]  # from where arc_easy is, too
    easy = evaluation_settings(own, ["task=arc_easy"])[0]
    assert len({evaluate_run._source(task, "test") for task in (easy, challenge)}) == 2
    refused(own, "task.split_seed", *by_name, "task.split_seed=1")


def test_labels_that_were_renamed_are_not_taken_for_the_run_s(run) -> None:
    renamed = files({"train": pictures(20, 0), "test": pictures(7, 100)}, "renamed")
    for path in renamed.values():
        rows = datasets.Dataset.from_parquet(path)
        features = rows.features | {"label": datasets.ClassLabel(names=["red", "green", "zebra"])}
        rows.cast(datasets.Features(features)).to_parquet(path)
    moved = finished_runs.changed(run, "task", data_files=renamed)  # the same settings as its own record has
    with refusal("", "zebra", "blue"):
        evaluate_run.evaluate_run(moved, moved.config.task, split="test", device="cpu", batch_size=64)


def test_a_file_for_one_split_goes_with_one_path_for_all(run, tmp_path) -> None:
    one = finished_runs.changed(run, "task", data_files=str(tmp_path))
    task, _ = evaluation_settings(one, [f"task.data_files.test={tmp_path}"])
    assert task.data_files == {"train": str(tmp_path), "test": str(tmp_path)}
    odd = tmp_path / "a, [b] (1)"
    odd.mkdir()
    for path in (odd, f"'{odd}'"):
        task, _ = evaluation_settings(one, [f"task.data_files.test={path}"])
        assert task.data_files["test"] == str(odd)
    hub = finished_runs.changed(run, "task", data_files=None)
    with refusal("task.data_files.test: "):
        evaluation_settings(hub, [f"task.data_files.test={tmp_path}"])


def test_a_folder_of_splits_keeps_them_where_another_folder_is_named_for_one(run, evaluate, tmp_path) -> None:
    def photos(part: str, count: int, first: int) -> None:
        for number, row in enumerate(pictures(count, first).cast_column("image", datasets.Image(decode=False))):
            file = tmp_path / part / finished_runs.COLOURS[row["label"]] / f"{number:02}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(row["image"]["bytes"])

    for part, count, first in (("own/train", 4, 0), ("own/val", 2, 50), ("own/test", 2, 100), ("new", 3, 200)):
        photos(part, count, first)
    own, new = with_files(run, tmp_path, str(tmp_path / "own")), f"task.data_files.test={tmp_path / 'new'}"
    done = evaluate(new, of=own)
    assert (done["examples"], done["labels"]) == (9, list(finished_runs.COLOURS))
    assert evaluate(new, "--split=validation", of=own)["examples"] == 6
    photos("own/train", 5, 0)
    refused(own, "task.data_files", new, "--split=validation")
    assert evaluate(new, of=own)["examples"] == 9
