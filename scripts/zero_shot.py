"""Scores of a frozen causal model on multiple choice: the test rows of experiment=causal, scored as a run scores them.

    python scripts/zero_shot.py task=arc_easy data_dir=data

Adds them to results/causal/zero_shot.json, and prints them. Minutes a set on one core. That a run scores as
lm-evaluation-harness does, tests say (tests/tasks/test_prompts.py), and `evaluate --lm-eval` of any run.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from partial_lora import cli, files
from partial_lora.building import build
from partial_lora.peers import Alone
from partial_lora.settings.compose import composed
from partial_lora.settings.schema import Config
from partial_lora.training import objectives

OUT = Path("results/causal/zero_shot.json")


def scored(config: Config, model: torch.nn.Module) -> objectives.Judged:
    """Return this package's judgement of the test split."""
    task = build.task_of(config)
    transform = build.transform_of(config.model, config.task)
    judge = build.judge_of(config, task, transform, Alone())

    def predict(rows):
        answers = []
        for batch in DataLoader(rows, batch_size=32, collate_fn=transform.collate):
            with torch.inference_mode():
                logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            answers.append(judge.reduce(logits, batch["labels"]).numpy())
        return np.concatenate(answers), np.empty(0)

    return judge.judged(predict, model, "test")


@cli.script
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="such as task=arc_easy")
    config = composed("experiment=causal", *parser.parse_args(arguments).settings)
    model = build.model_of(config.model, (), ()).eval()
    judged = scored(config, model)
    package = {key: judged.metrics[key] for key in ("accuracy", "accuracy_norm")}
    record = {"model": config.model.name, "questions": len(judged.predictions), "package": package}
    records = json.loads(OUT.read_text()) if OUT.exists() else {}
    OUT.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(OUT, records | {config.task.name: record})
    print(config.task.name, json.dumps(record, indent=1))


if __name__ == "__main__":
    sys.exit(main())
