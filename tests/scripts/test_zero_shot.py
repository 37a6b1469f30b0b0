"""Scores of a frozen model, under its name."""

from __future__ import annotations

import json
import types
from pathlib import Path

import pandas as pd
import zero_shot

from partial_lora.models.config import ModelConfig
from partial_lora.settings.schema import Config
from partial_lora.tasks.config import TaskConfig


def test_a_record_names_its_model(tmp_path: Path, monkeypatch, capsys) -> None:
    frame = pd.DataFrame({"label": [0, 1], "prediction": [0, 0], "prediction_norm": [0, 1]})
    judged = types.SimpleNamespace(predictions=frame, metrics={"accuracy": 0.5, "accuracy_norm": 1.0})
    model = types.SimpleNamespace(eval=lambda: None)
    monkeypatch.setattr(zero_shot, "OUT", tmp_path / "zero_shot.json")

    def made(experiment: str, task: str) -> Config:
        return Config(model=ModelConfig(name="lm"), task=TaskConfig(name=task, path="files"))

    monkeypatch.setattr(zero_shot, "composed", made)
    monkeypatch.setattr(zero_shot.build, "model_of", lambda *arguments: model)
    monkeypatch.setattr(zero_shot, "scored", lambda config, model: judged)
    for task in ("piqa", "boolq"):
        zero_shot.main([task])
    records = json.loads((tmp_path / "zero_shot.json").read_text())
    assert {task: record["model"] for task, record in records.items()} == {"piqa": "lm", "boolq": "lm"}
    assert records["piqa"]["package"] == judged.metrics
