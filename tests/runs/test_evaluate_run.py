"""`partial-lora evaluate`: a run's own numbers again, other rows of its labels, and nothing it recorded changes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import datasets
import finished_runs
import numpy as np
import pandas
import pytest
from finished_runs import files, override, pictures

from partial_lora import cli
from partial_lora.errors import PartialLoraError
from partial_lora.runs import config, finished
from partial_lora.runs import directory as results
from partial_lora.runs import evaluate as evaluate_run
from partial_lora.runs.finished import FinishedRun


@pytest.fixture(scope="module")
def run() -> FinishedRun:
    return finished_runs.image_run()


@pytest.fixture(autouse=True)
def surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is made of rows is kept where the runs keep it."""
    monkeypatch.setenv("PARTIAL_LORA_CACHE", finished_runs.cache())


@pytest.fixture
def evaluate(run, capsys):
    """A command line to what --json says."""

    def do(*arguments: str, directory: Path = run.directory) -> dict:
        assert cli.evaluate([str(directory), "--json", *arguments]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return json.loads(out)

    return do


def predictions(folder: Path | str) -> pandas.DataFrame:
    return pandas.read_parquet(Path(folder) / results.PREDICTIONS)


def refused(run: FinishedRun, *arguments: str) -> str:
    with pytest.raises(PartialLoraError) as error:
        cli.evaluate([str(run.directory), *arguments])
    assert "\n" not in str(error.value)
    return str(error.value)


def snapshot(run: FinishedRun) -> dict[str, bytes]:
    """All files of a run but its evaluations."""
    found = [path for path in run.directory.rglob("*") if path.is_file()]
    return {str(path): path.read_bytes() for path in found if evaluate_run.FOLDER not in path.parts}


@pytest.mark.parametrize("split", ["test", "validation"])
def test_without_a_word_it_is_what_the_run_recorded(run, evaluate, split) -> None:
    before = snapshot(run)
    found = evaluate("--split", split)
    assert found["metrics"].keys() == run.result["metrics"][split].keys()
    for name, value in run.result["metrics"][split].items():
        assert found["metrics"][name] == (value if name == "primary" else pytest.approx(value, abs=1e-6))
    assert snapshot(run) == before
    if split == "test":
        own = predictions(run.directory)
        again = predictions(found["folder"])
        pandas.testing.assert_frame_equal(again.drop(columns="logits"), own.drop(columns="logits"), atol=1e-6)
        np.testing.assert_allclose(np.stack(again["logits"]), np.stack(own["logits"]), atol=1e-5)


def test_the_folder_says_what_was_asked_and_holds_what_was_said(run, evaluate) -> None:
    found = evaluate("--split", "train")
    folder = Path(found.pop("folder"))
    assert folder.parent == run.directory / "evaluations"
    assert folder.name.startswith("cifar10-train-")
    assert json.loads((folder / "evaluation.json").read_text()) == found
    assert {file.name for file in folder.iterdir()} == {"evaluation.json", "predictions.parquet"}
    assert found["examples"] == len(predictions(folder)) == 54
    assert found["labels"] == list(finished_runs.COLOURS)
    assert evaluate("--split", "train", "task.cache_bytes=0", "task.test_samples=9")["folder"] != str(folder)
    assert evaluate("--split", "train")["folder"] == str(folder)  # asked again, the same files again


def test_labels_in_another_order_are_matched_by_name(run, evaluate) -> None:
    labels = ("blue", "red", "green")
    other = files(
        {split: pictures(*rows, labels) for split, rows in (("train", (20, 0)), ("test", (7, 100)))}, "turned"
    )
    found = evaluate(override(other))
    assert found["metrics"] == pytest.approx(run.result["metrics"]["test"], abs=1e-6)
    columns = ["label", "label_name", "prediction_name"]
    pandas.testing.assert_frame_equal(predictions(found["folder"])[columns], predictions(run.directory)[columns])


def test_other_rows_of_the_run_s_own_columns_are_one_key(run, evaluate, tmp_path) -> None:
    rows = pictures(2, 300)
    rows.to_parquet(str(tmp_path / "more.parquet"))
    found = evaluate(f"task.data_files.test={tmp_path}/more.parquet", "trainer.eval_batch_size=4")
    assert found["examples"] == 6
    assert list(predictions(found["folder"])["label_name"]) == [*finished_runs.COLOURS] * 2


def test_another_task_is_taken_whole(run, evaluate) -> None:
    """Nothing of the run's own task is mixed into the group file that is named in its place."""
    found = evaluate("task=digits", override(finished_runs.picture_files()))
    assert found["task"]["path"] == "bundled:digits"
    assert found["task"]["revision"] is None  # cifar10 has one
    assert found["metrics"] == pytest.approx(run.result["metrics"]["test"], abs=1e-6)
    assert "the run does not know 0, 1, 2, 3, 4, 5, 6, 7, 8, 9" in refused(run, "task=digits")


def test_labels_that_are_not_the_run_s_are_named(run) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["red", "pink"])})
    rows = pictures(6, 0).filter(lambda label: label < 2, input_columns="label").cast(features)
    said = refused(run, override(files({"train": rows, "test": rows}, "pink")))
    assert "the run does not know pink and the task lacks blue, green" in said


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("model.image_size=64", "model.image_size: a finished run keeps it; expected task=NAME, task.KEY=VALUE"),
        ("seed=1", "seed: a finished run keeps it"),
        ("trainer.epochs=9", "trainer.epochs: a finished run keeps it"),
        ("+task.extra=1", "+task.extra: a finished run keeps it"),
        ("hydra.mode=null", "hydra.mode: a finished run keeps it"),
        ("task.colour=red", "task.colour: no such key"),
        ("task=nothing", "task=nothing: no such file in the group; expected one of"),
        ("task=[cifar10,digits]", "expected one name"),
        ("task.validation_share=0.2", "task.validation_share: a finished run keeps it"),
        ("task.test_samples=none", "task.test_samples"),
        (
            "task.split_seed=1",
            "task.split_seed: a finished run keeps it, else splits would hold rows it was trained on",
        ),
        ("task.train_samples=9", "task.train_samples: a finished run keeps it"),
        ("trainer.eval_batch_size=0", "trainer.eval_batch_size"),
        ("trainer.device=tpu", "trainer.device"),
        ("task.data_files.test=nowhere.parquet", "task.data_files.test=nowhere.parquet: expected an existing file"),
        ("task", "'task': expected KEY=VALUE"),
    ],
)
def test_what_cannot_be_asked_is_refused_by_name(run, argument, said) -> None:
    assert said in refused(run, argument)


def test_a_task_of_texts_is_refused_for_a_model_of_images(run) -> None:
    assert "has texts, and the run's model reads images" in refused(run, "task.modality=text")


def test_an_unfinished_evaluation_has_no_record(run, evaluate, monkeypatch) -> None:
    folder = Path(evaluate()["folder"])
    monkeypatch.setattr(evaluate_run, "write_json", lambda path, content: (_ for _ in ()).throw(OSError("disk full")))
    assert "cannot be written (disk full)" in refused(run)
    assert not (folder / "evaluation.json").exists()


def test_a_person_reads_a_table(run, capsys) -> None:
    assert cli.evaluate([str(run.directory)]) == 0
    out = capsys.readouterr().out
    assert f"{run.result['metrics']['test']['accuracy']:.4f}" in out
    assert "21 examples" in out
    assert f"wrote {run.directory}/evaluations/cifar10-test-" in out


# Texts


@pytest.mark.parametrize("of_texts", [finished_runs.text_run, finished_runs.pair_run])
def test_a_run_of_texts_is_what_it_recorded(evaluate, of_texts) -> None:
    own = of_texts()
    for split in ("test", "validation"):
        found = evaluate("--split", split, directory=own.directory)
        assert found["metrics"] == pytest.approx(own.result["metrics"][split], abs=1e-6)


def test_numbers_are_no_labels() -> None:
    own = finished_runs.pair_run()
    texts = override(finished_runs.sentence_files())
    said = refused(own, "task=text_table", texts)
    assert "has labels, and the run predicts numbers" in said


# Questions and prompts


@pytest.mark.parametrize("of", [finished_runs.choice_run, finished_runs.generation_run])
def test_a_causal_run_is_what_it_recorded(evaluate, of) -> None:
    own = of()
    before = snapshot(own)
    for split, count in (("test", len(predictions(own.directory))), ("validation", 4)):
        found = evaluate("--split", split, directory=own.directory)
        assert found["metrics"] == pytest.approx(own.result["metrics"][split], abs=1e-6)
        assert (found["examples"], found["labels"]) == (count, [])
        if split == "test":
            pandas.testing.assert_frame_equal(predictions(found["folder"]), predictions(own.directory), atol=1e-6)
    assert snapshot(own) == before
    # What is likely is judged without a text being written; every question is answered.
    assert (Path(found["folder"]) / results.PREDICTIONS).exists() == (of is finished_runs.choice_run)


def test_a_causal_run_answers_other_questions_and_writes_texts(evaluate, tmp_path) -> None:
    own = finished_runs.choice_run()
    rows = [
        {
            "question": "what is red?",
            "choices": {"text": ["a rose", "coal", n], "label": ["A", "B", "C"]},
            "answerKey": "A",
        }
        for n in ("milk", "the night sky", "snow")
    ]
    other = finished_runs.tables({"train": rows * 4, "test": rows}, "arc")
    found = evaluate("task=arc_challenge", override(other), directory=own.directory)
    said = predictions(found["folder"])
    assert (found["examples"], len(said), set(said["label"])) == (3, 3, {0})
    assert found["metrics"]["accuracy"] == np.mean(said["prediction"] == 0)
    assert said["scores"].map(len).tolist() == [3, 3, 3]
    given = ("task=text_generation", *finished_runs.GENERATION, "task.max_new_tokens=4")
    found = evaluate(*given, override(finished_runs.exchange_files()), directory=own.directory)
    assert list(found["metrics"]) == ["primary", "perplexity", "loss", "rouge_l"]
    assert predictions(found["folder"])["prediction"].str.len().max() <= 4
    assert "is of kind label" in refused(own, "task=text_table", override(finished_runs.sentence_files()))


def test_a_run_of_labels_answers_no_questions() -> None:
    given = ("task=choice_table", *finished_runs.CHOICE, override(finished_runs.question_files()))
    assert "is of kind choice" in refused(finished_runs.text_run(), *given)


def named_by_its_id(run: FinishedRun, tmp_path: Path, data_files: object) -> FinishedRun:
    """A copy of a run in a folder as `train` names it, with other files of its rows."""
    settings = finished_runs.changed(run, "task", data_files=data_files).config
    directory = tmp_path / f"{run.method}-{config.run_id(settings)}" / "seed0"
    shutil.copytree(run.directory, directory)
    record = json.loads((directory / results.RESULT).read_text())
    (directory / results.RESULT).write_text(json.dumps(record | {"config": config.plain(settings)}))
    return finished.finished_run(directory)


def test_rows_that_have_changed_since_the_training_are_refused(run, evaluate, tmp_path) -> None:
    data = {split: str(tmp_path / f"{split}.parquet") for split in ("train", "test")}
    for split, path in data.items():
        shutil.copy(finished_runs.picture_files()[split], path)
    own = named_by_its_id(run, tmp_path, data)
    assert evaluate(directory=own.directory)["metrics"] == pytest.approx(run.result["metrics"]["test"], abs=1e-6)
    pictures(21, 0).to_parquet(data["train"])  # three rows more: validation would be cut anew
    for harmless in ((), ("task.test_samples=9",), ("task.metrics=[accuracy]",), ("task.cache_bytes=0",)):
        assert "not the rows that the run was trained on" in refused(own, *harmless)
    other = evaluate(f"task.data_files.test={finished_runs.picture_files()['test']}", directory=own.directory)
    assert other["examples"] == run.result["metrics"]["test"].get("examples", 21)
    cut = refused(own, f"task.data_files.test={finished_runs.picture_files()['test']}", "--split=validation")
    assert "not the rows that the run was trained on" in cut


def test_a_test_split_is_not_cut_from_other_training_rows(run, tmp_path) -> None:
    pictures(24, 0).to_parquet(str(tmp_path / "more.parquet"))  # those that were trained on, and more
    trained_on = finished_runs.picture_files()["train"]
    own = named_by_its_id(run, tmp_path, {"train": trained_on})  # its test split was cut from this file
    (tmp_path / "photos" / "a").mkdir(parents=True)
    others = (f"task.data_files.train={tmp_path}/more.parquet", f"task.data_files={tmp_path}/more.parquet")
    for argument in (*others, f"task.data_files={tmp_path}/photos"):
        assert "task.data_files.train: a finished run keeps it, else splits would" in refused(own, argument)


def test_labels_that_were_renamed_are_not_taken_for_the_run_s(run, tmp_path) -> None:
    renamed = files({"train": pictures(20, 0), "test": pictures(7, 100)}, "renamed")
    for path in renamed.values():
        rows = datasets.Dataset.from_parquet(path)
        features = rows.features | {"label": datasets.ClassLabel(names=["red", "green", "zebra"])}
        rows.cast(datasets.Features(features)).to_parquet(path)
    moved = finished_runs.changed(run, "task", data_files=renamed)  # the same settings as its own record has
    with pytest.raises(PartialLoraError, match="the run does not know zebra and the task lacks blue"):
        evaluate_run.evaluate_run(moved, device="cpu")


def test_a_file_for_one_split_goes_with_one_path_for_all(run, tmp_path) -> None:
    one = finished_runs.changed(run, "task", data_files=str(tmp_path))
    task, _ = finished.evaluation_settings(one, [f"task.data_files.test={tmp_path}"])
    assert task.data_files == {"train": str(tmp_path), "test": str(tmp_path)}
    hub = finished_runs.changed(run, "task", data_files=None)
    with pytest.raises(PartialLoraError, match=r"task\.data_files\.test: the run's rows came without files; expected"):
        finished.evaluation_settings(hub, [f"task.data_files.test={tmp_path}"])
