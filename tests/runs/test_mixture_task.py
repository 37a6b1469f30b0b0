"""A run of several tasks is asked about one of them: what it then says is what it said of that member's own rows."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import finished_runs
import mixed_runs
import numpy as np
import pandas
import pytest
from datasets import Image
from scipy.special import softmax

from partial_lora import cli
from partial_lora import tasks as tasks_of
from partial_lora.errors import PartialLoraError
from partial_lora.runs import build, config, export
from partial_lora.runs.finished import FinishedRun, one_task
from partial_lora.runs.predict import Predictor


@pytest.fixture(autouse=True)
def same_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARTIAL_LORA_CACHE", finished_runs.cache())


@pytest.fixture
def said(capsys) -> Callable[..., list[dict]]:
    """What --json says of inputs, on a command line."""

    def do(run: FinishedRun, *arguments: str) -> list[dict]:
        capsys.readouterr()  # what its training said, where this is the first that asks for it
        assert cli.predict([str(run.directory), "--device", "cpu", "--json", *arguments]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return [json.loads(line) for line in out.splitlines()]

    return do


@pytest.fixture
def evaluated(capsys) -> Callable[..., dict]:
    def do(run: FinishedRun, *arguments: str) -> dict:
        capsys.readouterr()
        assert cli.evaluate([str(run.directory), "--json", *arguments]) == 0
        return json.loads(capsys.readouterr().out)

    return do


def recorded(run: FinishedRun, member: str) -> pandas.DataFrame:
    """What the run's own evaluation said of a member's test rows."""
    frame = pandas.read_parquet(run.directory / "predictions.parquet")
    return frame[frame["member"] == member].drop(columns="member").reset_index(drop=True)


def rows_of(run: FinishedRun, member: str) -> tasks_of.Task:
    """A member's rows, as its group of settings names them."""
    return build.task_of(dataclasses.replace(run.config, task=run.config.task.members[member]))


def classes_agree(found: list[dict], run: FinishedRun, member: str, labels: list[str]) -> None:
    """Labels, probabilities and what is called probable are those of the record."""
    own = recorded(run, member)
    assert own["prediction"].nunique() > 1  # it has learned something, so that a mistake would show
    assert [each["label"] for each in found] == list(own["prediction_name"])
    chances = softmax(np.stack(own["logits"]), axis=-1)
    assert chances.shape[1] == len(labels)
    assert all(set(each["scores"]) == set(labels) for each in found)
    np.testing.assert_allclose([[each["scores"][label] for label in labels] for each in found], chances, atol=1e-5)


# Predictions


def test_texts_and_pairs_are_answered_each_by_its_member_s_head(said) -> None:
    run = mixed_runs.text_mixture()
    films, colours = (rows_of(run, member).test for member in ("films", "colours"))
    found = said(run, "--member", "films", *films["text"])
    assert [list(each) for each in found] == [["input", "member", "label", "score", "scores"]] * len(films)
    assert {each["member"] for each in found} == {"films"}
    classes_agree(found, run, "films", ["good", "bad"])
    lines = [f"{first}\t{second}" for first, second in zip(colours["text"], colours["text_pair"], strict=True)]
    found = said(run, "--member", "colours", *lines)
    assert [each["input"] for each in found] == lines
    classes_agree(found, run, "colours", ["blue", "green", "red"])
    with pytest.raises(PartialLoraError, match="expected two texts with a tab between them"):
        cli.predict([str(run.directory), "--member", "colours", "one text"])


def test_images_are_answered_by_either_head(said, tmp_path: Path) -> None:
    run = mixed_runs.image_mixture()
    classes_agree(
        said(run, "--member", "colours", *finished_runs.photographs(tmp_path)),
        run,
        "colours",
        list(finished_runs.COLOURS),
    )
    rows, paths = rows_of(run, "digits").test.cast_column("image", Image()), []
    for number, image in enumerate(rows["image"]):
        paths.append(str(tmp_path / f"digit{number:02}.png"))
        image.save(paths[-1])
    classes_agree(said(run, "--member", "digits", *paths), run, "digits", [str(digit) for digit in range(10)])


def test_questions_are_read_as_their_member_s_are(said) -> None:
    run = mixed_runs.choice_mixture()
    asked = [(row["question"], row["options"]) for row in finished_runs.questions(9, 100)]
    blanks = [(row["sentence"], [row["option1"], row["option2"]]) for row in mixed_runs.blanks(6, 100)]
    for member, questions in (("asked", asked), ("blanks", blanks)):
        own = recorded(run, member)
        found = said(run, "--member", member, *["\t".join([prompt, *options]) for prompt, options in questions])
        for each, (_, options), row in zip(found, questions, own.itertuples(), strict=True):
            assert each["label"] == options[row.prediction]
            np.testing.assert_allclose([each["scores"][option] for option in options], row.scores, atol=1e-5)
    with pytest.raises(PartialLoraError, match="expected a _ in the prompt"):
        Predictor(run, device="cpu", member="blanks").predict([asked[0]])


def test_texts_are_as_long_as_their_member_s_are() -> None:
    run = mixed_runs.generation_mixture()
    for member, first, most in (("long", 100, 12), ("short", 200, 5)):
        prompts, own = [row["prompt"] for row in finished_runs.exchanges(5, first)], recorded(run, member)
        found = Predictor(run, device="cpu", member=member).predict(prompts)
        assert [each.label for each in found] == list(own["prediction"])
        assert max(len(each.label) for each in found) == most  # bytes, one a token


# Refusals


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "the run is of several tasks, one of which is to be named: choose --member films or colours"),
        (["--member", "film"], "--member film: no member of the run's mixture, expected --member films or colours"),
    ],
)
def test_a_member_of_a_mixture_has_to_be_named(arguments, words) -> None:
    run = mixed_runs.text_mixture()
    for command, inputs in ((cli.predict, ["a text"]), (cli.evaluate, ["task.test_samples=4"])):
        with pytest.raises(PartialLoraError, match=words) as refusal:
            command([str(run.directory), *inputs, *arguments])
        assert "\n" not in str(refusal.value)
    with pytest.raises(PartialLoraError, match=words):
        Predictor(run, device="cpu", member=arguments[1] if arguments else None)


def test_a_run_of_one_task_has_no_members() -> None:
    run = mixed_runs.text_mixture()
    alone = dataclasses.replace(run.config, task=run.config.task.members["films"])
    single = dataclasses.replace(run, config=alone)
    with pytest.raises(PartialLoraError, match="--member films: the run is of one task, films; leave it out"):
        Predictor(single, device="cpu", member="films")
    assert one_task(single).member is None


def test_a_mixture_is_refused_before_torch_is_there() -> None:
    script = (
        "import sys\nfrom partial_lora import cli\nfrom partial_lora.errors import PartialLoraError\n"
        "try:\n    cli.predict([sys.argv[1], 'a text'])\n"
        "except PartialLoraError as error:\n    print(error)\nprint('torch' in sys.modules)\n"
    )
    directory = str(mixed_runs.text_mixture().directory)
    done = subprocess.run([sys.executable, "-c", script, directory], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-2].endswith("choose --member films or colours")
    assert done.stdout.splitlines()[-1] == "False"


def test_members_are_listed_and_labels_that_are_not_recorded_are_missed() -> None:
    run = mixed_runs.text_mixture()
    films = run.config.task.members["films"]
    for names, listed in ((["a"], "--member a"), (["a", "b", "c"], "--member a, b or c")):
        several = finished_runs.changed(run, "task", members=dict.fromkeys(names, films))
        with pytest.raises(PartialLoraError, match=f"choose {listed}$"):
            one_task(several)
    without = dataclasses.replace(run, result={key: value for key, value in run.result.items() if key != "labels"})
    with pytest.raises(PartialLoraError, match="no labels of films in it; train the run again"):
        one_task(without, "films")


def test_a_key_that_came_after_the_run_has_its_default_in_a_member_too() -> None:
    run = mixed_runs.text_mixture()
    older = config.plain(run.config)
    del older["task"]["members"]["films"]["label_noise"]
    before = dataclasses.replace(run, config=config.load(older))
    assert one_task(before, "films").config.task == run.config.task.members["films"]


# Evaluations, and what is exported


@pytest.mark.parametrize(
    "of", [mixed_runs.text_mixture, mixed_runs.image_mixture, mixed_runs.choice_mixture, mixed_runs.generation_mixture]
)
def test_a_member_is_evaluated_as_the_run_itself_did(of, evaluated) -> None:
    run = of()
    for member in run.config.task.members:
        found = evaluated(run, "--member", member)
        own = {name: value for name, value in found["metrics"].items() if name != "primary"}
        expected = {name: run.result["metrics"]["test"][f"{member}/{name}"] for name in own}
        assert own == pytest.approx(expected, abs=1e-6)
        assert found["member"] == found["task"]["name"] == member
        frames = pandas.read_parquet(Path(found["folder"]) / "predictions.parquet"), recorded(run, member)
        found, own = (frame.drop(columns="logits", errors="ignore") for frame in frames)
        pandas.testing.assert_frame_equal(found, own, atol=1e-5)


def test_training_rows_of_a_member_are_those_that_were_trained_on(evaluated) -> None:
    run = mixed_runs.text_mixture()
    assert evaluated(run, "--member", "colours", "--split", "train")["examples"] == 21
    assert evaluated(run, "--member", "films", "--split", "train")["examples"] == 21  # of 43: mixing is equal


def test_other_rows_are_told_apart_by_the_head_of_the_member_that_is_named(evaluated) -> None:
    run = mixed_runs.text_mixture()
    files = finished_runs.files({"test": finished_runs.sentences(3, 300)}, "mixed-more")
    found = evaluated(run, "--member", "films", f"task.data_files.test={files['test']}")
    assert (found["examples"], found["labels"]) == (6, ["good", "bad"])
    other = ("task=text_table", finished_runs.override(finished_runs.sentence_files()))
    again = evaluated(run, "--member", "films", *other)
    assert again["metrics"]["accuracy"] == run.result["metrics"]["test"]["films/accuracy"]
    assert Path(again["folder"]).name.startswith("films-text_table-test-")
    with pytest.raises(PartialLoraError, match="the run does not know bad, good and the task lacks blue, green, red"):
        evaluated(run, "--member", "colours", *other)
    with pytest.raises(PartialLoraError, match="choose --member films or colours"):
        evaluated(run, *other)


def test_a_model_without_heads_answers_another_task_as_none_of_its_members(evaluated) -> None:
    run = mixed_runs.choice_mixture()
    other = ("task=choice_table", *finished_runs.CHOICE, finished_runs.override(finished_runs.question_files()))
    found = evaluated(run, *other, "task.test_samples=3")
    assert (found["examples"], "member" in found) == (3, False)
    with pytest.raises(PartialLoraError, match="--member asked: the run's model has no heads"):
        evaluated(run, "--member", "asked", *other)


def test_a_causal_mixture_is_merged_and_proven(tmp_path: Path) -> None:
    run = mixed_runs.choice_mixture()
    done = export.export(run, "merged", tmp_path / "merged", check=True)
    assert "transformers alone: logits differ by at most" in done.proof
    assert (done.folder / "tokenizer.json").is_file()
    assert "input_ids" in export._inputs(mixed_runs.text_mixture())  # as texts of its first member
