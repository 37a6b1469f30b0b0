"""Score what a fine-tuned language model forgets: text of another kind and questions, before and after.

    python scripts/forgetting.py results/language

Of every form and size the runs at the best learning rate are scored on the sets of OTHER, as `partial-lora evaluate`
scores them, and so is the frozen model, which is the zero. Scores are in forgetting.csv and are not made again; what
changed is in results/claims/language.md. A pack holds no adapters: score, then pack.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.utils.data import DataLoader

from partial_lora import cli
from partial_lora.building import build
from partial_lora.calibration.peers import Alone
from partial_lora.errors import PartialLoraError
from partial_lora.files import write_atomic
from partial_lora.finished.evaluate import evaluate_run
from partial_lora.finished.run import finished_run
from partial_lora.report import ranking, records
from partial_lora.settings.compose import composed
from partial_lora.settings.schema import Config
from partial_lora.training import objectives

FROZEN, ROWS, BATCH = "frozen", 200, 16
_PIQA = (
    "task=text_generation",
    "task.name=piqa",
    "task.prompt_columns=[goal]",
    "task.response_column=sol1",
    "task.metrics=[perplexity]",
)
OTHER = {  # by set: the metric, and the settings of the task; {data} is the folder of data sets
    "piqa": (
        "loss",
        (*_PIQA, "task.data_files={{train: {data}/piqa/train.parquet, test: {data}/piqa/test.parquet}}"),
    ),
    "arc_easy": ("accuracy_norm", ("task=arc_easy", "data_dir={data}")),
}
COLUMNS = ["run", "form", "size", "seed", "learning_rate", "set", "metric", "value"]


@cli.script
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    options = parser.parse_args(arguments)
    runs = records.read(options.results)[0]
    if not runs:
        raise PartialLoraError(f"{options.results}: no finished runs there: `make language` makes them")
    file = options.results / "forgetting.csv"
    known = pd.read_csv(file, dtype={"size": str}) if file.is_file() else pd.DataFrame(columns=COLUMNS)
    best = ranking.at_best_rates(ranking.rows_of(runs)).to_dict("records")
    paths = {row["run"].directory.relative_to(options.results).as_posix() for row in best}
    known = known[known["run"].isin({FROZEN, *paths})]  # another rate may be the best now
    _write(known, file)
    for row in scores(best, options.results, set(zip(known["run"], known["set"], strict=True))):
        known = pd.concat([known, pd.DataFrame([row])], ignore_index=True)
        _write(known, file)
        print(*row.values(), flush=True)
    print(file)


def _write(known: pd.DataFrame, file: Path) -> None:
    write_atomic(file, known.to_csv(index=False, float_format="%.6g"))


def scores(best: Sequence[dict], out: Path, known: set[tuple[str, str]]) -> Iterator[dict]:
    """Yield the rows of the csv that are not known: the frozen model's, and those of runs at the best rates."""
    own = best[0]["run"].record["config"]
    model = (f"model={own['model']['name']}", f"model.dtype={own['model']['dtype']}", f"task.test_samples={ROWS}")
    tasks = {
        name: (metric, composed(*model, *(word.format(data=own["data_dir"]) for word in words)))
        for name, (metric, words) in OTHER.items()
    }
    frozen, base = {"run": FROZEN, "form": FROZEN, "size": "own", "seed": 0, "learning_rate": 0.0}, None
    for name, (metric, config) in tasks.items():
        if (FROZEN, name) not in known:
            base = base or build.model_of(config.model, (), ()).eval()
            yield frozen | {"set": name, "metric": metric, "value": scored(config, base).metrics[metric]}
    for row in best:
        path = row["run"].directory.relative_to(out).as_posix()
        told = {"run": path} | {key: row[key] for key in ("form", "size", "seed", "learning_rate")}
        for name, (metric, config) in tasks.items():
            if (path, name) not in known:
                run = finished_run(row["run"].directory)
                _, found = evaluate_run(run, config.task, split="test", device="cpu", batch_size=BATCH)
                yield told | {"set": name, "metric": metric, "value": found["metrics"][metric]}


def scored(config: Config, model: torch.nn.Module) -> objectives.Judged:
    """Return the judgement of a model's answers on the test split: the model as it is, without an adapter."""
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


if __name__ == "__main__":
    sys.exit(main())
