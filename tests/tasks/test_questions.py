"""Questions with options and prompts with responses: known data sets, the user's tables, one line for what is wrong."""

from __future__ import annotations

import itertools
import json
import logging
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
from refusals import refusal

from partial_lora import tasks
from partial_lora.tasks.config import TaskConfig
from partial_lora.tasks.prompt_formats import CHOICES

SCHOOL = {"choices": {"text": ["cold", "heat", "mud"], "label": ["1", "2", "3"]}, "answerKey": "2"}
OPTIONS = [" cold", " heat", " mud"]
ROWS = {  # a row of each layout, and what lm-evaluation-harness makes of it: prompts, options, the right one's place
    "arc": ({"question": "What melts ice?"} | SCHOOL, (["Question: What melts ice?\nAnswer:"] * 3, OPTIONS, 1)),
    "boolq": (
        {"question": "is ice cold", "passage": "Ice -- It is.", "answer": True},
        (["Ice -- It is.\nQuestion: is ice cold?\nAnswer:"] * 2, [" no", " yes"], 1),
    ),
    "hellaswag": (
        {"activity_label": "Cars", "ctx_a": "[header] How to [title] Go on. [step] Now, the  man", "ctx_b": "HE Then"}
        | {"endings": ["runs [substeps] off. ", "sings.", "[title] stops.", "goes"], "label": "0"},
        (["Cars: How to. Go on. Now, the man He then"] * 4, [" runs off.", " sings.", "  stops.", " goes"], 0),
    ),
    "openbookqa": ({"question_stem": "Ice is melted by"} | SCHOOL, (["Ice is melted by"] * 3, OPTIONS, 1)),
    "piqa": (
        {"goal": "Melt ice", "sol1": "Heat it.", "sol2": "Cool it.", "label": 0},
        (["Question: Melt ice\nAnswer:"] * 2, [" Heat it.", " Cool it."], 0),
    ),
    "social_iqa": (
        {"context": "Al fell.", "question": "What then?"}
        | {"answerA": "left", "answerB": "right", "answerC": "up", "label": "3"},
        (["Q: Al fell. What then?\nA:"] * 3, [" left", " right", " up"], 2),
    ),
    "winogrande": (
        {"sentence": "Ann met Eve because _ was late.", "option1": "Ann", "option2": "Eve", "answer": "2"},
        (["Ann met Eve because Ann", "Ann met Eve because Eve"], [" was late."] * 2, 1),
    ),
}
OTHERWISE = {  # rows of the same that came by another way
    "openbookqa": {"question": "Ice is melted by"} | SCHOOL,
    "social_iqa": {"question": "Al fell. What then?", "answerKey": "C"}
    | {"choices": {"text": ["left", "right", "up"], "label": ["A", "B", "C"]}},
}


def load(folder: Path, rows: list[dict], name: str = "rows.json", **settings: object) -> tasks.Task:
    file = folder / name
    if file.suffix == ".csv":
        pd.DataFrame(rows).to_csv(file, index=False)
    elif file.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(file))
    else:
        file.write_text(json.dumps(rows))
    own = {"name": "own", "path": "files", "modality": "text", "data_files": {"train": str(file), "test": str(file)}}
    return tasks.load(TaskConfig(**own | settings))


def refused(key: str, *arguments: object, **settings: object) -> None:
    with refusal(key):
        load(*arguments, **settings)


def choice(layout: str) -> dict:
    return {"kind": "choice", "format": layout}


@pytest.mark.parametrize("layout", CHOICES)
def test_rows_are_put_as_lm_evaluation_harness_puts_them(tmp_path: Path, layout: str, caplog) -> None:
    row, (prompts, options, label) = ROWS[layout]
    task = load(tmp_path, [row] * 10, **choice(layout))
    assert [len(split) for split in (task.train, task.validation, task.test)] == [9, 1, 10]
    assert task.test[3] == {"prompts": prompts, "options": options, "label": label}
    assert (task.kind, task.labels, task.metrics) == ("choice", (), ("accuracy", "accuracy_norm"))
    assert task.train.features["label"] == datasets.Value("int64")
    if layout in OTHERWISE:
        assert load(tmp_path, [OTHERWISE[layout]] * 10, **choice(layout)).test[3] == task.test[3]
    assert not caplog.text
    if layout == "boolq":
        with caplog.at_level(logging.WARNING):
            row = load(tmp_path, [{"question": "is ice cold", "answer": False}] * 10, **choice(layout)).test[0]
        assert row == {"prompts": ["Question: is ice cold?\nAnswer:"] * 2, "options": [" no", " yes"], "label": 0}
        assert "task=own: " in caplog.text
        assert "passage" in caplog.text


@pytest.mark.parametrize(
    ("layout", "changed", "reason"),
    [
        ("arc", {"answerKey": "D"}, "task=own: row 2 .*'D'.* 1, 2, 3"),
        ("arc", {"answerKey": None}, "task=own: row 2 .*answerKey"),
        ("arc", {"choices": {"text": ["a"], "label": ["2"]}}, "task=own: row 2 .*1 options"),
        ("arc", {"choices": {"text": ["a", ""], "label": ["1", "2"]}}, "task=own: row 2 .*option 2 of 2"),
        ("hellaswag", {"label": ""}, "task=own: row 2 .* 0, 1, 2, 3"),  # as the hub has the rows of its test split
    ],
)
def test_what_is_wrong_with_a_known_row_is_named(tmp_path: Path, layout: str, changed: dict, reason: str) -> None:
    row = ROWS[layout][0]
    refused(reason, tmp_path, [row, row | changed], **choice(layout))


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        (choice("piqa"), r"task=own: task\.format=piqa .*goal.*question, choices"),
        (choice("x"), r"task\.format=x: .*arc, boolq"),
        ({"kind": "generation", "format": "arc"}, r"task\.format=arc: .*gsm8k"),
        (choice("arc") | {"metrics": ["f1"]}, r"task\.metrics=.*f1"),
    ],
)
def test_a_format_that_rows_do_not_have_is_named(tmp_path: Path, settings: dict, key: str) -> None:
    refused(key, tmp_path, [ROWS["arc"][0]] * 4, **settings)


def test_columns_of_a_format_that_are_of_another_type_are_named(tmp_path: Path) -> None:
    row = ROWS["arc"][0] | {"choices": "a, b"}  # as a table that was saved as csv has them
    refused("task=own: row 1 .*task.format=arc", tmp_path, [row] * 4, **choice("arc"))


# A table of the user's own

COLUMNS = {"kind": "choice", "prompt_columns": ["q"], "option_columns": ["a", "b"], "answer_column": "right"}


def question(right: object, **changed: object) -> dict:
    return {"q": "Which?", "a": "red", "b": "blue", "right": right} | changed


@pytest.mark.parametrize("name", ["rows.json", "rows.csv"])
@pytest.mark.parametrize(
    ("answers", "labels"), [(["red", "blue"], [0, 1]), (["B", "A"], [1, 0]), (["b", "a"], [1, 0]), ([1, 0], [1, 0])]
)
def test_answers_are_texts_letters_or_places(tmp_path: Path, name: str, answers: list, labels: list) -> None:
    task = load(tmp_path, [question(answer) for answer in answers * 5], name, **COLUMNS)
    assert task.test["label"][:] == labels * 5
    assert task.test[0]["prompts"] == ["Which?"] * 2
    assert task.test[0]["options"] == [" red", " blue"]


def test_a_letter_that_has_two_capitals_is_no_place(tmp_path: Path) -> None:
    letters = [question("ß", a="ß", b="ŉ"), question("ŉ", a="ß", b="ŉ")]
    assert load(tmp_path, letters * 5, **COLUMNS).test["label"][:2] == [0, 1]


def test_a_column_of_numbers_is_read_in_one_way_for_all_rows(tmp_path: Path, caplog) -> None:
    sums = [{"q": f"{first}+1?", "a": first, "b": first + 1, "right": first + 1} for first in range(5)] * 2
    assert set(load(tmp_path, sums, **COLUMNS).test["label"]) == {1}  # as texts, though some would be places too
    both = [{"q": "?", "a": 1, "b": 0, "right": first % 2} for first in range(6)] * 2
    assert load(tmp_path, both, **COLUMNS).test["label"][:4] == [1, 0, 1, 0]  # a text is the surer reading
    places = [{"q": "?", "a": 7, "b": first, "right": first % 2} for first in range(6)] * 2
    assert load(tmp_path, places, **COLUMNS).test["label"][:6] == [0, 1, 0, 1, 0, 1]
    assert not caplog.text
    later = [question(place, c="green") for place in (1, 2)] * 5  # places that never are the first one's
    load(tmp_path, later, **COLUMNS | {"option_columns": ["a", "b", "c"]})
    assert "task=own: no answer in right" in caplog.text


def test_options_come_as_a_list_and_prompts_in_several_columns(tmp_path: Path) -> None:
    rows = [
        {"rule": "Pick one. ", "q": "Which? ", "all": ["red", "blue", "green"], "right": "green"},
        {"rule": None, "q": "And now?", "all": ["3", "4"], "right": "3"},
    ] * 5
    task = load(tmp_path, rows, **COLUMNS | {"prompt_columns": ["rule", "q"], "option_columns": ["all"]})
    assert task.test.to_list()[:2] == [
        # The prompt ends in the space that would set an option off.
        {"prompts": ["Pick one. \nWhich? "] * 3, "options": ["red", "blue", "green"], "label": 2},
        {"prompts": ["And now?"] * 2, "options": [" 3", " 4"], "label": 0},
    ]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (question("green"), r"'green'.*task\.answer_column"),
        (question(None), "column right"),
        (question("red", a=" "), "option 1 of 2"),
        (question("red", b=None), "option 2 of 2"),
        (question("red", q=""), r"task\.prompt_columns=q"),
        (question("blue", a="blue"), "'blue'"),  # it is two of them
    ],
)
def test_what_is_wrong_with_a_question_is_named(tmp_path: Path, row: dict, reason: str) -> None:
    rows = [question("red"), question("blue"), row]
    refused(f"task=own: row 3 of the train split.*{reason}", tmp_path, rows, **COLUMNS)


@pytest.mark.parametrize("key", ["prompt_columns", "option_columns", "answer_column"])
def test_a_column_that_is_missing_is_named(tmp_path: Path, key: str) -> None:
    rows, several = [question("red")] * 4, key != "answer_column"
    refused(rf"task\.{key}=z: .* q, a, b, right", tmp_path, rows, **COLUMNS | {key: ["z"] if several else "z"})
    refused(rf"task\.{key}: ", tmp_path, rows, **COLUMNS | {key: [] if several else None})


# Prompts and responses

WRITTEN = {"kind": "generation", "prompt_columns": ["rule", "q"], "response_column": "reply"}
SUM = {"rule": "Add.", "q": "1+1?", "reply": "It is 2."}


def test_prompts_and_responses_are_a_table_s_or_solutions_in_words_that_keep_their_last_line(tmp_path: Path) -> None:
    rows = [
        {"rule": "Be short.", "q": "Why?", "reply": "Because.\nSo."},
        {"rule": None, "q": "How many?", "reply": " 12 "},
    ] * 5
    task = load(tmp_path, rows, **WRITTEN)
    assert task.test.to_list()[:2] == [
        {"prompt": "Be short.\nWhy?", "response": "Because.\nSo."},
        {"prompt": "How many?", "response": "12"},
    ]
    assert [len(split) for split in (task.train, task.validation)] == [9, 1]
    assert (task.kind, task.labels, task.metrics) == ("generation", (), ("rouge_l", "perplexity"))
    rows = [{"question": "1+1?", "answer": "It is <<1+1=2>>2.\n#### 2"}] * 10
    task = load(tmp_path, rows, kind="generation", format="gsm8k", answer="number")
    assert task.test[0] == {"prompt": "Question: 1+1?\nAnswer:", "response": "It is <<1+1=2>>2.\n#### 2"}
    assert task.metrics == ("exact_match", "perplexity")


@pytest.mark.parametrize(
    ("changed", "settings", "key"),
    [
        ({"reply": None}, {}, "task=own: row 2 .*column reply"),
        ({"reply": " "}, {}, "task=own: row 2 .*response"),
        ({"rule": None, "q": ""}, {}, "task=own: row 2 .*prompt"),
        ({"reply": "It is two."}, {"answer": "number"}, r"task=own: row 2 .*task\.answer=number"),
        ({}, {"response_column": None}, r"task\.response_column: "),
        ({}, {"prompt_columns": ["z"]}, r"task\.prompt_columns=z: "),
    ],
)
def test_what_is_wrong_with_a_completion_is_named(tmp_path: Path, changed: dict, settings: dict, key: str) -> None:
    refused(key, tmp_path, [SUM, SUM | changed, SUM, SUM], **WRITTEN | settings)


CHAT = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "It is 2."}]


@pytest.mark.parametrize("name", ["rows.json", "rows.parquet"])
@pytest.mark.parametrize("settings", [{}, {"messages_column": "messages"}])
def test_conversations_end_with_their_last_answer(tmp_path: Path, name: str, settings: dict) -> None:
    chat = [*CHAT, {"role": "user", "content": "And one?"}, {"role": "assistant", "content": " 3 "}]
    rows = [{"messages": [*chat, {"role": "user", "content": "Thanks."}], "id": 1}, {"messages": CHAT, "id": 2}] * 5
    task = load(tmp_path, rows, name, kind="generation", **settings)
    several = "user: 1+1?\nassistant: It is 2.\nuser: And one?"
    assert task.test.to_list()[:2] == [
        {"prompt": several, "response": " 3 ", "messages": chat},
        {"prompt": "1+1?", "response": "It is 2.", "messages": CHAT},
    ]
    assert tasks.shared_inputs(task.test, task.train) == len(task.test)


SHAREGPT = [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "It is 2."}]
SAID = {"prompt": "1+1?", "response": "It is 2."}
LAID_OUT = {
    "ShareGPT": ({"id": "a", "conversations": SHAREGPT}, SAID | {"messages": CHAT}),
    "conversations of messages": ({"conversations": CHAT}, SAID | {"messages": CHAT}),
    "Alpaca": (
        {"instruction": "Add.", "input": "1+1?", "output": "It is 2.", "text": "Add."},
        SAID | {"prompt": "Add.\n1+1?"},
    ),
    "Alpaca without input": ({"instruction": "1+1?", "output": "It is 2."}, SAID),
    "completion": ({"prompt": "1+1?", "completion": "It is 2."}, SAID),
    "response": ({"prompt": "1+1?", "response": "It is 2."}, SAID),
    "messages in two columns": ({"prompt": CHAT[:1], "completion": CHAT[1:]}, SAID | {"messages": CHAT}),
}


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        *itertools.product(LAID_OUT, ["rows.jsonl", "rows.parquet"]),
        *((layout, "rows.csv") for layout, (row, _) in LAID_OUT.items() if {*map(type, row.values())} == {str}),
    ],
)
def test_the_columns_of_a_table_say_how_it_is_read(tmp_path: Path, caplog, layout: str, name: str) -> None:
    row, expected = LAID_OUT[layout]
    with caplog.at_level(logging.INFO):
        task = load(tmp_path, [row] * 5, name, kind="generation")
    assert task.train.to_list()[0] == expected
    assert [message for message in caplog.messages if all(column in message for column in {*row} - {"id", "text"})]


def test_numbers_of_a_csv_file_stay_as_they_are_written(tmp_path: Path) -> None:
    task = load(tmp_path, [{"prompt": "pi?", "completion": "3.140"}] * 5, "rows.csv", kind="generation")
    assert task.train["response"] == ["3.140"] * len(task.train)


def test_a_table_of_no_known_layout_is_refused(tmp_path: Path) -> None:
    refused(
        r"task\.prompt_columns: .*question, answer", tmp_path, [{"question": "?", "answer": "!"}] * 5, kind="generation"
    )


@pytest.mark.parametrize(
    ("messages", "key"),
    [
        (CHAT[:1], "task=own: row 2 .*assistant"),
        (CHAT[1:], "task=own: row 2 .*prompt"),
        ([], "task=own: row 2 .*assistant"),
        (None, "task=own: row 2 .*column messages"),
        ([{"role": "user"}, *CHAT], "task=own: row 2 .*message 1"),
        ([*CHAT, {"role": "assistant", "content": " "}], "task=own: row 2 .*message 3"),
        ([{"role": None, "content": "a"}, *CHAT], "task=own: row 2 .*message 1"),
    ],
)
def test_what_is_wrong_with_a_conversation_is_named(tmp_path: Path, messages: list | None, key: str) -> None:
    refused(key, tmp_path, [{"messages": CHAT}, {"messages": messages}] + [{"messages": CHAT}] * 3, kind="generation")


def test_a_column_of_conversations_is_checked(tmp_path: Path) -> None:
    refused(r"task\.messages_column=z: ", tmp_path, [{"messages": CHAT}] * 4, kind="generation", messages_column="z")
    texts = [{"messages": "1+1? 2."}] * 4
    refused("task=own: row 1 .*role", tmp_path, texts, kind="generation")


def test_draws_are_shared_out_by_the_right_one_s_place_and_responses_have_none(tmp_path: Path) -> None:
    task = load(tmp_path, [question(answer) for answer in ["red"] * 300 + ["blue"] * 100], **COLUMNS)
    draws = tasks.few_shot_draws(tasks.strata(task.test), seed=0, share=0.01)
    for rows in (draws.fit, draws.scored):
        assert np.bincount(np.asarray(task.test["label"])[rows]).tolist() == [96, 32]
    replies = load(tmp_path, [{"rule": "", "q": str(row), "reply": "yes"} for row in range(400)], **WRITTEN)
    for settings in ({"share": 0.01}, {"shots": 4}):
        draws = tasks.few_shot_draws(tasks.strata(replies.test), seed=0, **settings)
        assert (len(draws.fit), len(draws.scored), len(set(draws.fit) & set(draws.scored))) == (128, 128, 0)
