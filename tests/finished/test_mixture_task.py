"""A run of several tasks is used on one of them, and gives what it recorded of that member's own rows."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import finished_runs
import mixed_runs
import numpy as np
import pandas
import pytest
from datasets import Image
from refusals import refusal
from scipy.special import softmax

from partial_lora import cli
from partial_lora.building import build
from partial_lora.finished import export
from partial_lora.finished.predict import Predictor
from partial_lora.finished.run import FinishedRun
from partial_lora.finished.target_task import one_task
from partial_lora.settings import versions


@pytest.fixture
def printed(capsys):
    """Give what a command prints about a run, a line of JSON each."""

    def do(command, run: FinishedRun, *arguments: str) -> list[dict]:
        capsys.readouterr()  # what its training printed, where this is the first test that needs it
        assert command([str(run.directory), "--json", *arguments]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return do


def recorded(run: FinishedRun, member: str) -> pandas.DataFrame:
    """The run's own predictions for a member's test rows."""
    frame = pandas.read_parquet(run.directory / "predictions.parquet")
    return frame[frame["member"] == member].drop(columns="member").reset_index(drop=True)


def rows_of(run: FinishedRun, member: str):
    """A member's test rows, as its group of settings names them."""
    return build.task_of(dataclasses.replace(run.config, task=run.config.task.members[member])).test


# Predictions


@pytest.mark.parametrize(
    ("of", "member", "labels"),
    [
        ("text_mixture", "films", ("good", "bad")),
        ("text_mixture", "colours", ("blue", "green", "red")),
        ("image_mixture", "colours", finished_runs.COLOURS),
        ("image_mixture", "digits", tuple(map(str, range(10)))),
    ],
)
def test_texts_pairs_and_images_are_answered_by_their_member_s_head(of, member, labels, printed, tmp_path) -> None:
    run = getattr(mixed_runs, of)()
    rows = rows_of(run, member)
    if of == "image_mixture":
        rows, words = rows.cast_column("image", Image()), []
        for number, image in enumerate(rows["image"]):
            words.append(str(tmp_path / f"{number:02}.png"))
            image.save(words[-1])
    else:
        words = ["\t".join(row[key] for key in ("text", "text_pair") if key in row) for row in rows]
    predictions = printed(cli.predict, run, "--device", "cpu", "--member", member, *words)
    assert [list(each) for each in predictions] == [["input", "member", "label", "score", "scores"]] * len(rows)
    assert [(each["input"], each["member"]) for each in predictions] == [(each, member) for each in words]
    own = recorded(run, member)
    assert own["prediction"].nunique() > 1  # it has learned something, so that a mistake would show
    assert [each["label"] for each in predictions] == list(own["prediction_name"])
    chances = softmax(np.stack(own["logits"]), axis=-1)
    assert chances.shape[1] == len(labels)
    np.testing.assert_allclose(
        [[each["scores"][label] for label in labels] for each in predictions], chances, atol=1e-5
    )


def test_questions_and_prompts_are_read_and_written_as_their_member_s_are() -> None:
    run = mixed_runs.choice_mixture()
    questions = [(row["question"], row["options"]) for row in finished_runs.questions(9, 100)]
    blanks = [(row["sentence"], [row["option1"], row["option2"]]) for row in mixed_runs.blanks(6, 100)]
    for member, rows in (("questions", questions), ("blanks", blanks)):
        predictions = Predictor(run, device="cpu", member=member).predict(rows)
        for each, (_, options), row in zip(predictions, rows, recorded(run, member).itertuples(), strict=True):
            np.testing.assert_allclose([each.scores[option] for option in options], row.scores, atol=1e-5)
    with refusal("", "_"):  # where the options go
        Predictor(run, device="cpu", member="blanks").predict([questions[0]])
    run = mixed_runs.generation_mixture()
    for member, first, most in (("long", 100, 12), ("short", 200, 5)):
        prompts = [row["prompt"] for row in finished_runs.exchanges(5, first)]
        predictions = Predictor(run, device="cpu", member=member).predict(prompts)
        assert [each.label for each in predictions] == list(recorded(run, member)["prediction"])
        assert max(len(each.label) for each in predictions) == most  # bytes, one a token


# Refusals


@pytest.mark.parametrize("member", [None, "film"])
def test_a_member_of_a_mixture_has_to_be_named(member) -> None:
    run, words = mixed_runs.text_mixture(), ".*--member films or colours$"
    option = [] if member is None else ["--member", member]
    for command in (
        lambda: cli.predict([str(run.directory), "a text", *option]),
        lambda: cli.evaluate([str(run.directory), *option]),
        lambda: Predictor(run, device="cpu", member=member),
    ):
        with refusal(words):
            command()


def test_a_run_of_one_task_has_no_members() -> None:
    run = mixed_runs.text_mixture()
    films = run.config.task.members["films"]
    single = dataclasses.replace(run, config=dataclasses.replace(run.config, task=films))
    assert one_task(single).member is None
    with refusal("--member films: "):
        one_task(single, "films")


def test_a_key_that_came_after_the_run_has_its_default_in_a_member_too() -> None:
    run = mixed_runs.text_mixture()
    older = versions.plain(run.config)
    del older["task"]["members"]["films"]["label_noise"]
    before = dataclasses.replace(run, config=versions.load(older))
    assert one_task(before, "films").config.task == run.config.task.members["films"]


# Evaluations, and what is exported


@pytest.mark.parametrize("of", ["text_mixture", "image_mixture", "choice_mixture", "generation_mixture"])
def test_a_member_is_evaluated_as_the_run_itself_did(of, printed) -> None:
    run, main = getattr(mixed_runs, of)(), {"validation": [], "test": []}
    metrics = run.result["metrics"]
    for member, split in itertools.product(run.config.task.members, main):  # test comes last
        (evaluation,) = printed(cli.evaluate, run, "--member", member, "--split", split)
        own = evaluation["metrics"]
        main[split].append(own[own.pop("primary")])
        expected = {name: metrics[split][f"{member}/{name}"] for name in own}
        assert own == pytest.approx(expected, rel=1e-6, abs=1e-6)
        assert evaluation["member"] == evaluation["task"]["name"] == member
        if split == "validation":
            continue
        frames = pandas.read_parquet(Path(evaluation["folder"]) / "predictions.parquet"), recorded(run, member)
        pandas.testing.assert_frame_equal(
            *(frame.drop(columns="logits", errors="ignore") for frame in frames), atol=1e-5
        )
    for split, each in main.items():
        assert metrics[split][metrics[split]["primary"]] == pytest.approx(np.mean(each), rel=1e-6)
    selects = metrics["validation"]["primary"]  # the best of all that were measured in training
    measured = [entry[f"eval_{selects}"] for entry in run.result["history"] if f"eval_{selects}" in entry]
    best = min(measured) if of == "generation_mixture" else max(measured)
    assert metrics["validation"][selects] == pytest.approx(best, rel=1e-6)


def test_other_rows_are_judged_by_the_head_of_the_member_that_is_named(printed) -> None:
    run = mixed_runs.text_mixture()
    for member in ("colours", "films"):  # of the latter 21 of 43 rows, since mixing is equal
        assert printed(cli.evaluate, run, "--member", member, "--split", "train")[0]["examples"] == 21
    files = finished_runs.files({"test": finished_runs.sentences(3, 300)}, "mixed-more")
    (evaluation,) = printed(cli.evaluate, run, "--member", "films", f"task.data_files.test={files['test']}")
    assert (evaluation["examples"], evaluation["labels"]) == (6, ["good", "bad"])
    other = ("task=text_table", finished_runs.override(finished_runs.sentence_files()))
    (again,) = printed(cli.evaluate, run, "--member", "films", *other)
    assert again["metrics"]["accuracy"] == run.result["metrics"]["test"]["films/accuracy"]
    assert Path(again["folder"]).name.startswith("films-text_table-test-")
    with refusal(".*bad, good.*blue, green, red"):
        cli.evaluate([str(run.directory), "--member", "colours", *other])
    with refusal(".*--member films or colours"):
        cli.evaluate([str(run.directory), *other])


def test_a_model_without_heads_answers_another_task_as_none_of_its_members(printed) -> None:
    run = mixed_runs.choice_mixture()
    other = ("task=choice_table", *finished_runs.CHOICE, finished_runs.override(finished_runs.question_files()))
    (evaluation,) = printed(cli.evaluate, run, *other, "task.test_samples=3")
    assert (evaluation["examples"], "member" in evaluation) == (3, False)
    with refusal("--member questions: "):
        cli.evaluate([str(run.directory), "--member", "questions", *other])


def test_a_mixture_is_merged(tmp_path: Path) -> None:
    folder = export.export(mixed_runs.choice_mixture(), "merged", tmp_path / "merged").folder
    assert (folder / "tokenizer.json").is_file()
    assert "input_ids" in export._samples(mixed_runs.text_mixture()).inputs  # as texts of its first member
