"""Scores of a frozen model: under its name, by characters; a set without a file is refused."""

from __future__ import annotations

import json
import types
from pathlib import Path

import pandas as pd
import pytest
import torch
import zero_shot
from datasets import Dataset

from partial_lora.models.config import ModelConfig
from partial_lora.settings.schema import Config


def test_a_record_names_its_model(tmp_path: Path, monkeypatch, capsys) -> None:
    frame = pd.DataFrame({"label": [0, 1], "prediction": [0, 0], "prediction_norm": [0, 1]})
    judged = types.SimpleNamespace(predictions=frame, metrics={"accuracy": 0.5, "accuracy_norm": 1.0})
    model = types.SimpleNamespace(eval=lambda: None)
    loop = {"accuracy": 0.5, "accuracy_norm": 1.0, "chosen": [0, 0], "chosen_by_length": [0, 1]}
    monkeypatch.setattr(zero_shot, "OUT", tmp_path / "zero_shot.json")
    monkeypatch.setattr(zero_shot, "config_of", lambda task, file: Config(model=ModelConfig(name=f"lm-{file}")))
    monkeypatch.setattr(zero_shot.build, "model_of", lambda *arguments: model)
    monkeypatch.setattr(zero_shot, "scored", lambda config, model: (judged, None))
    monkeypatch.setattr(zero_shot, "literally", lambda *arguments: dict(loop))
    zero_shot.main(["piqa=a", "boolq=b"])
    records = json.loads((tmp_path / "zero_shot.json").read_text())
    assert {task: record["model"] for task, record in records.items()} == {"piqa": "lm-a", "boolq": "lm-b"}
    assert records["piqa"]["first"]["same_choices"] == 2


def test_the_literal_loop_divides_by_characters(monkeypatch) -> None:
    """Three tokens each, as likely: of two characters in four bytes, and of three in three."""
    row = {"prompts": ["?", "?"], "options": [" éé", " abc"], "label": 1}
    tokens = {"?": [0], "? éé": [0, 1, 1, 1], "? abc": [0, 2, 2, 2]}
    monkeypatch.setattr(zero_shot, "LITERAL", 1)
    monkeypatch.setattr(zero_shot.build, "task_of", lambda config: types.SimpleNamespace(test=Dataset.from_list([row])))
    model = lambda input_ids: types.SimpleNamespace(logits=torch.zeros(1, input_ids.shape[1], 3))  # noqa: E731
    answers = zero_shot.literally(Config(), model, lambda text: {"input_ids": tokens[text]})
    assert answers["chosen_by_length"] == [1]


@pytest.mark.parametrize("words", [[], ["piqa"]])
def test_a_set_without_its_file_is_refused(words: list[str], capsys) -> None:
    with pytest.raises(SystemExit) as end:
        zero_shot.main(words)
    assert end.value.code == 2
    assert "TASK=FILE" in capsys.readouterr().err
