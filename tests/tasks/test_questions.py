"""Questions with options and prompts with responses: known data sets, the user's tables, one line for what is wrong."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest

from partial_lora import tasks
from partial_lora.errors import PartialLoraError
from partial_lora.tasks.questions import CHOICES, COMPLETIONS

SCHOOL = {"choices": {"text": ["cold", "heat", "mud"], "label": ["1", "2", "3"]}, "answerKey": "2"}
SOCIAL = {"answerA": "left", "answerB": "right", "answerC": "up", "label": "3"}
HOW = "Then,  the man"
ROWS = {  # a row of each layout, and what lm-evaluation-harness makes of it: prompts, options, the right one's place
    "arc": (
        {"question": "What melts ice?"} | SCHOOL,
        (["Question: What melts ice?\nAnswer:"] * 3, [" cold", " heat", " mud"], 1),
    ),
    "boolq": (
        {"question": "is ice cold", "passage": "Ice -- It is.", "answer": True},
        (["Ice -- It is.\nQuestion: is ice cold?\nAnswer:"] * 2, [" no", " yes"], 1),
    ),
    "hellaswag": (
        {"activity_label": "Cars", "ctx_a": "[header] How to [title] Go on. [step] Now, the  man", "ctx_b": "HE Then"}
        | {"endings": ["runs [substeps] off. ", "sings.", "[title] stops.", "goes"], "label": "0"},
        (
            ["Cars: How to. Go on. Now, the man He then"] * 4,
            [" runs off.", " sings.", "  stops.", " goes"],
            0,
        ),
    ),
    "openbookqa": (
        {"question_stem": "Ice is melted by"} | SCHOOL,
        (["Ice is melted by"] * 3, [" cold", " heat", " mud"], 1),
    ),
    "piqa": (
        {"goal": "Melt ice", "sol1": "Heat it.", "sol2": "Cool it.", "label": 0},
        (["Question: Melt ice\nAnswer:"] * 2, [" Heat it.", " Cool it."], 0),
    ),
    "social_iqa": (
        {"context": "Al fell.", "question": "What then?"} | SOCIAL,
        (["Q: Al fell. What then?\nA:"] * 3, [" left", " right", " up"], 2),
    ),
    "winogrande": (
        {"sentence": "Ann met Eve because _ was late.", "option1": "Ann", "option2": "Eve", "answer": "2"},
        (["Ann met Eve because Ann", "Ann met Eve because Eve"], [" was late."] * 2, 1),
    ),
}


def table(folder: Path, rows: list[dict], name: str = "rows.json") -> str:
    file = folder / name
    if file.suffix == ".csv":
        pd.DataFrame(rows).to_csv(file, index=False)
    else:
        file.write_text(json.dumps(rows))
    return str(file)


def load(folder: Path, rows: list[dict], name: str = "rows.json", **named: object) -> tasks.Task:
    file = table(folder, rows, name)
    given = {"name": "own", "path": "files", "modality": "text", "data_files": {"train": file, "test": file}}
    return tasks.load(**given | named)


def refused(match: str, *given: object, **named: object) -> None:
    with pytest.raises(PartialLoraError, match=match) as refusal:
        load(*given, **named)
    assert "\n" not in str(refusal.value)


COLUMNS = {"kind": "choice", "prompt_columns": ["q"], "option_columns": ["a", "b"], "answer_column": "right"}


def question(right: object, **changed: object) -> dict:
    return {"q": "Which?", "a": "red", "b": "blue", "right": right} | changed


@pytest.mark.parametrize("layout", CHOICES)
def test_rows_are_put_as_lm_evaluation_harness_puts_them(tmp_path: Path, layout: str) -> None:
    row, (prompts, options, label) = ROWS[layout]
    task = load(tmp_path, [row] * 10, kind="choice", format=layout)
    assert [len(split) for split in (task.train, task.validation, task.test)] == [9, 1, 10]
    assert task.test[3] == {"prompts": prompts, "options": options, "label": label}
    assert (task.kind, task.labels, task.metrics) == ("choice", (), ("accuracy", "accuracy_norm"))
    assert task.train.features["label"] == datasets.Value("int64")


def test_rows_that_came_by_another_way_are_the_same_but_for_what_they_lack(tmp_path: Path, caplog) -> None:
    social, whole = ROWS["social_iqa"]
    same = {"question": "Al fell. What then?", "answerKey": "C"}
    same["choices"] = {"text": [social[f"answer{letter}"] for letter in "ABC"], "label": ["A", "B", "C"]}
    row = load(tmp_path, [same] * 10, kind="choice", format="social_iqa").test[0]
    assert tuple(row.values()) == whole
    book, whole = ROWS["openbookqa"]
    row = load(tmp_path, [{"question": book["question_stem"]} | SCHOOL] * 10, kind="choice", format="openbookqa").test[
        0
    ]
    assert tuple(row.values()) == whole
    assert not caplog.text
    with caplog.at_level(logging.WARNING):
        row = load(tmp_path, [{"question": "is ice cold", "answer": False}] * 10, kind="choice", format="boolq").test[0]
    assert row == {"prompts": ["Question: is ice cold?\nAnswer:"] * 2, "options": [" no", " yes"], "label": 0}
    assert "task=own: there is no column passage" in caplog.text


def test_a_solution_in_words_keeps_its_last_line(tmp_path: Path) -> None:
    rows = [{"question": "1+1?", "answer": "It is <<1+1=2>>2.\n#### 2"}] * 10
    task = load(tmp_path, rows, kind="generation", format="gsm8k", answer="number")
    assert task.test[0] == {"prompt": "Question: 1+1?\nAnswer:", "response": "It is <<1+1=2>>2.\n#### 2"}
    assert (task.kind, task.labels, task.metrics) == ("generation", (), ("exact_match", "perplexity"))
    assert set(COMPLETIONS) == {"gsm8k"}


@pytest.mark.parametrize("name", ["rows.json", "rows.csv"])
@pytest.mark.parametrize(
    ("answers", "labels"),
    [
        (["red", "blue"], [0, 1]),
        (["B", "A"], [1, 0]),
        (["b", "a"], [1, 0]),
        ([1, 0], [1, 0]),
    ],
)
def test_answers_are_texts_letters_or_places(tmp_path: Path, name: str, answers: list, labels: list) -> None:
    task = load(tmp_path, [question(answer) for answer in answers * 5], name, **COLUMNS)
    assert task.test["label"][:] == labels * 5
    assert task.test[0]["prompts"] == ["Which?"] * 2
    assert task.test[0]["options"] == [" red", " blue"]


def test_a_column_of_numbers_is_read_in_one_way_for_all_rows(tmp_path: Path) -> None:
    sums = [{"q": f"{first}+1?", "a": first, "b": first + 1, "right": first + 1} for first in range(5)] * 2
    assert set(load(tmp_path, sums, **COLUMNS).test["label"]) == {1}  # as texts, though some would be places too
    both = [{"q": "?", "a": 1, "b": 0, "right": first % 2} for first in range(6)] * 2
    assert load(tmp_path, both, **COLUMNS).test["label"][:4] == [1, 0, 1, 0]  # a text is the surer reading
    places = [{"q": "?", "a": 7, "b": first, "right": first % 2} for first in range(6)] * 2
    assert load(tmp_path, places, **COLUMNS).test["label"][:6] == [0, 1, 0, 1, 0, 1]


def test_places_that_never_are_the_first_one_s_are_doubted(tmp_path: Path, caplog) -> None:
    load(
        tmp_path, [question(place, c="green") for place in (1, 2)] * 5, **COLUMNS | {"option_columns": ["a", "b", "c"]}
    )
    assert "task=own: no answer in right is 0, which is the place of the first option" in caplog.text


def test_options_come_as_a_list_and_prompts_in_several_columns(tmp_path: Path) -> None:
    rows = [
        {"rule": "Pick one. ", "q": "Which? ", "all": ["red", "blue", "green"], "right": "green"},
        {"rule": None, "q": "And now?", "all": ["3", "4"], "right": "3"},
    ] * 5
    named = COLUMNS | {"prompt_columns": ["rule", "q"], "option_columns": ["all"]}
    first, second = load(tmp_path, rows, **named).test.select([0, 1])
    assert first == {
        "prompts": ["Pick one. \nWhich? "] * 3,
        "options": ["red", "blue", "green"],  # the prompt ends in the space that would set them off
        "label": 2,
    }
    assert second == {"prompts": ["And now?"] * 2, "options": [" 3", " 4"], "label": 0}


def test_what_is_wrong_with_a_question_is_named_in_one_line(tmp_path: Path) -> None:
    good = [question("red"), question("blue")]
    for row, reason in (
        (question("green"), r"'green'.*task\.answer_column"),
        (question(None), "column right"),
        (question("red", a=" "), "option 1 of 2"),
        (question("red", b=None), "option 2 of 2"),
        (question("red", q=""), r"task\.prompt_columns=q"),
        (question("red", a="blue"), "'red'"),
        (question("blue", a="blue"), "'blue'"),  # it is two of them
    ):
        refused(f"^task=own: row 3 of the train split.*{reason}", tmp_path, [*good, row], **COLUMNS)
    lists = [{"q": "Which?", "all": options, "right": "red"} for options in (["red", "blue"], ["red"])]
    refused("^task=own: row 2 of the train split.*1 options", tmp_path, lists, **COLUMNS | {"option_columns": ["all"]})


@pytest.mark.parametrize("key", ["prompt_columns", "option_columns", "answer_column"])
def test_a_column_that_is_missing_is_named(tmp_path: Path, key: str) -> None:
    rows, several = [question("red")] * 4, key != "answer_column"
    refused(rf"^task\.{key}=z: .* q, a, b, right", tmp_path, rows, **COLUMNS | {key: ["z"] if several else "z"})
    refused(rf"^task\.{key}: ", tmp_path, rows, **COLUMNS | {key: [] if several else None})


def test_what_is_wrong_with_a_known_row_is_named_in_one_line(tmp_path: Path) -> None:
    row = ROWS["arc"][0]
    for changed, reason in (
        ({"answerKey": "D"}, "'D'.* 1, 2, 3"),
        ({"answerKey": None}, "column answerKey"),
        ({"choices": {"text": ["a"], "label": ["2"]}}, "1 options"),
        ({"choices": {"text": ["a", ""], "label": ["1", "2"]}}, "option 2 of 2"),
    ):
        refused(f"^task=own: row 2 .*{reason}", tmp_path, [row, row | changed], kind="choice", format="arc")
    refused(r"^task=own: task\.format=piqa .*goal.*question, choices", tmp_path, [row], kind="choice", format="piqa")
    hidden = ROWS["hellaswag"][0] | {"label": ""}  # as the hub has the rows of its test split
    refused("^task=own: row 1 .* 0, 1, 2, 3", tmp_path, [hidden], kind="choice", format="hellaswag")
    refused(r"^task\.format=x: .*arc, boolq", tmp_path, [row], kind="choice", format="x")
    refused(r"^task\.format=arc: .*gsm8k", tmp_path, [row], kind="generation", format="arc")
    refused(r"^task\.metrics: .* f1$", tmp_path, [row] * 4, kind="choice", format="arc", metrics=["f1"])


WRITTEN = {"kind": "generation", "prompt_columns": ["rule", "q"], "response_column": "said"}


def test_prompts_and_responses_of_a_table(tmp_path: Path) -> None:
    rows = [
        {"rule": "Be short.", "q": "Why?", "said": "Because.\nSo."},
        {"rule": None, "q": "How many?", "said": " 12 "},
    ] * 5
    task = load(tmp_path, rows, **WRITTEN)
    assert task.test.to_list()[:2] == [
        {"prompt": "Be short.\nWhy?", "response": "Because.\nSo."},
        {"prompt": "How many?", "response": "12"},
    ]
    assert [len(split) for split in (task.train, task.validation)] == [9, 1]
    assert task.metrics == ("rouge_l", "perplexity")


def test_what_is_wrong_with_a_completion_is_named_in_one_line(tmp_path: Path) -> None:
    good = {"rule": "Add.", "q": "1+1?", "said": "It is 2."}
    for changed, reason in (
        ({"said": None}, "column said"),
        ({"said": " "}, "no response"),
        ({"rule": None, "q": ""}, "no prompt"),
        ({"said": "It is two."}, r"task\.answer=number"),
    ):
        refused(f"^task=own: row 2 .*{reason}", tmp_path, [good, good | changed], answer="number", **WRITTEN)
    refused(r"^task\.response_column: ", tmp_path, [good] * 4, **WRITTEN | {"response_column": None})
    refused(r"^task\.prompt_columns=z: ", tmp_path, [good] * 4, **WRITTEN | {"prompt_columns": ["z"]})


def test_draws_are_shared_out_by_the_right_one_s_place_and_responses_have_none(tmp_path: Path) -> None:
    answers = ["red"] * 300 + ["blue"] * 100
    task = load(tmp_path, [question(answer) for answer in answers], **COLUMNS)
    draws = tasks.few_shot_draws(tasks.strata(task.test), seed=0, share=0.01)
    for rows in (draws.fit, draws.scored):
        assert np.bincount(np.asarray(task.test["label"])[rows]).tolist() == [96, 32]
    said = load(tmp_path, [{"rule": "", "q": str(row), "said": "yes"} for row in range(400)], **WRITTEN)
    draws = tasks.few_shot_draws(tasks.strata(said.test), seed=0, share=0.01)
    assert (len(draws.fit), len(draws.scored), len(set(draws.fit) & set(draws.scored))) == (128, 128, 0)
    assert len(tasks.few_shot_draws(tasks.strata(said.test), seed=0, shots=4).fit) == 128
