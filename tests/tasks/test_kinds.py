"""Kinds of tasks: all that an entry names is there, and a kind like another needs nothing but its entry."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from pkgutil import resolve_name

import pytest

from partial_lora import ranges, tasks
from partial_lora.building import build, info
from partial_lora.calibration.peers import Alone
from partial_lora.finished import inputs, predict
from partial_lora.report.summary import next_commands
from partial_lora.settings.compose import composed
from partial_lora.settings.versions import plain
from partial_lora.tasks.config import TaskConfig
from partial_lora.tasks.kinds import KINDS, Kind, kind_of, kinds_for
from partial_lora.tasks.metrics import FITTING
from partial_lora.training import objectives


@pytest.mark.parametrize("kind", KINDS.values(), ids=lambda kind: kind.name)
def test_all_that_an_entry_names_is_there(kind: Kind) -> None:
    assert callable(resolve_name(f"partial_lora.tasks.{kind.rows}"))
    assert callable(resolve_name(f"partial_lora.tasks.{kind.transform}"))
    fitting = [metric for labels in kind.labelled_by for metric in FITTING[labels]]
    assert {*kind.metrics, *filter(None, [kind.selects])} <= {*fitting}
    assert kind.answers in objectives.JUDGES
    assert kind.reads in inputs.LINES
    assert kind.reads in predict.PREDICTED
    config = composed(f"task={kind.example}", f"model={kind.model}", "task.data_files=null")
    assert kind_of(config.task) is kind
    assert kind in kinds_for(config.model.family)
    assert info.without_task(config) is config


def test_a_kind_like_another_is_an_entry_and_nothing_else(monkeypatch, tmp_path: Path) -> None:
    odd = dataclasses.replace(KINDS["text", "choice"], name="odd one out", metrics=("accuracy",), score="loss")
    monkeypatch.setitem(KINDS, ("text", "oddity"), odd)
    monkeypatch.setattr(ranges, "values_of", ranges.values_of.__wrapped__)  # which has read the kinds before
    rows = tmp_path / "rows.jsonl"
    row = {"question": "which?", "options": ["rose", "tulip", "stone"], "answer": "stone"}
    rows.write_text("".join(f"{json.dumps(row)}\n" for _ in range(9)))
    columns = {"prompt_columns": ["question"], "option_columns": ["options"], "answer_column": "answer"}
    task = TaskConfig("odd", "files", modality="text", kind="oddity", data_files=str(rows), **columns)
    config = dataclasses.replace(composed("model=tiny_llama", "task=arc_easy"), task=task)
    loaded = build.task_of(config)
    assert (loaded.metrics, loaded.labels, loaded.train["label"][0]) == (("accuracy",), (), 2)
    transform = build.transform_of(config.model, task)
    assert isinstance(transform, tasks.ChoiceTransform)
    judge = build.judge_of(config, loaded, transform, Alone())
    assert isinstance(judge, objectives.ByOptions)
    assert (len(judge.train()), len(judge.test())) == (len(loaded.train), 3 * len(loaded.test))  # a row an option
    assert build.calibration_config(config, loaded).score == "loss"
    (read,), _ = inputs.read_inputs(["-"], task, io.BytesIO(b"which?\tone\ttwo\n"))
    assert read.content == ("which?", ("one", "two"))
    assert r"OPTION\tOPTION" in next_commands("latest", plain(config))[0]
    with pytest.raises(Exception, match=r"^task\.modality=image"):
        TaskConfig("odd", "files", kind="oddity")
