"""Scores of a frozen causal model on multiple choice: this package's beside a literal loop over the options.

    python scripts/zero_shot.py arc_easy=DATA/arc_easy/test.parquet piqa=DATA/piqa/test.parquet

For each set: the test rows of experiment=causal (results/causal), scored as a run would score them; and the first 100
of them once more, one option at a time, one pass each, straight from the tokenizer and the model. Writes
results/causal/zero_shot.json, a record a set as it is done, and prints both. About 10 minutes a set on one core.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

from partial_lora import files
from partial_lora.building import build
from partial_lora.peers import Alone
from partial_lora.settings.compose import composed
from partial_lora.settings.schema import Config
from partial_lora.training import objectives

OUT = Path("results/causal/zero_shot.json")
LITERAL = 100  # questions of each set


def config_of(task: str, file: str) -> Config:
    """Compose the settings of experiment=causal, with a file of test rows alone."""
    return composed("experiment=causal", f"task={task}", f"task.data_files={{train: {file}, test: {file}}}")


def scored(config: Config, model: torch.nn.Module) -> tuple[objectives.Judged, object]:
    """Return this package's judgement of the test split, and the tokenizer that it reads with."""
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

    return judge.judged(predict, model, "test"), transform.tokenizer


@torch.inference_mode()
def literally(config: Config, model: torch.nn.Module, tokenizer) -> dict:
    """Answer the first questions without anything of this package but the texts."""
    rows = build.task_of(config).test.select(range(LITERAL))
    chosen, chosen_by_length, right = [], [], []
    for row in rows:
        sums, lengths = [], []
        for prompt, option in zip(row["prompts"], row["options"], strict=True):
            context, whole = tokenizer(prompt)["input_ids"], tokenizer(prompt + option)["input_ids"]
            logits = model(input_ids=torch.tensor([whole])).logits[0].float().log_softmax(-1)
            sums.append(sum(logits[at - 1, whole[at]].item() for at in range(len(context), len(whole))))
            lengths.append(len(option.removeprefix(" ")))
        chosen.append(int(np.argmax(sums)))
        chosen_by_length.append(int(np.argmax(np.array(sums) / lengths)))
        right.append(row["label"])
    hits, by_length = np.equal(chosen, right), np.equal(chosen_by_length, right)
    scores = {"accuracy": float(hits.mean()), "accuracy_norm": float(by_length.mean())}
    return scores | {"chosen": chosen, "chosen_by_length": chosen_by_length}


def main(arguments: list[str] | None = None) -> None:
    """Score every TASK=FILE that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", metavar="TASK=FILE")
    sets = [argument.partition("=") for argument in parser.parse_args(arguments).sets]
    for task, _, file in sets:
        if not file:
            parser.error(f"{task}: expected TASK=FILE")
    records = json.loads(OUT.read_text()) if OUT.exists() else {}
    for task, _, file in sets:
        config = config_of(task, file)
        model = build.model_of(config.model, (), ()).eval()
        judged, tokenizer = scored(config, model)
        loop = literally(config, model, tokenizer)
        own = judged.predictions.iloc[:LITERAL]
        agree = np.equal(own["prediction"], loop.pop("chosen")) & np.equal(
            own["prediction_norm"], loop.pop("chosen_by_length")
        )
        records[task] = {
            "model": config.model.name,
            "questions": len(judged.predictions),
            "package": {key: judged.metrics[key] for key in ("accuracy", "accuracy_norm")},
            "first": {
                "questions": LITERAL,
                "package": {
                    "accuracy": float((own["prediction"] == own["label"]).mean()),
                    "accuracy_norm": float((own["prediction_norm"] == own["label"]).mean()),
                },
                "literal": loop,
                "same_choices": int(agree.sum()),
            },
        }
        OUT.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(OUT, records)
        print(task, json.dumps(records[task], indent=1))


if __name__ == "__main__":
    main()
