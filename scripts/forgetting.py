"""Score what a fine-tuned language model forgets: text of another kind and questions, before and after.

    python scripts/forgetting.py results/language

Of every form and size the runs at the best learning rate are scored on the sets of OTHER, as `partial-lora evaluate`
scores them, and so is the frozen model, which is the zero. Scores are in forgetting.csv and are not made again; what
changed is in forgetting.md, ± half of a 95 % interval over seeds. A pack holds no adapters: score, then pack.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pandas as pd
from zero_shot import scored

from partial_lora import cli
from partial_lora.building import build
from partial_lora.errors import PartialLoraError
from partial_lora.files import write_atomic
from partial_lora.finished.evaluate import evaluate_run
from partial_lora.finished.run import finished_run
from partial_lora.report import ranking, records
from partial_lora.report.statistics import half_interval
from partial_lora.settings.compose import composed

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
    for row in scores(best, options.results, set(zip(known["run"], known["set"], strict=True))):
        known = pd.concat([known, pd.DataFrame([row])], ignore_index=True)
        write_atomic(file, known.to_csv(index=False, float_format="%.6g"))
        print(*row.values(), flush=True)
    text = changes(known)
    write_atomic(options.results / "forgetting.md", text)
    print(text)


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


def changes(known: pd.DataFrame) -> str:
    """Return a table of what every form and size changed on every set, a mean over seeds."""
    before = known[known["run"] == FROZEN].set_index("set")["value"]
    after = known[known["run"] != FROZEN]
    rows = []
    for (size, form), cell in after.groupby(["size", "form"], sort=False):
        row = {"size": ranking.in_words(size), "method": form, "seeds": cell["seed"].nunique()}
        for name, (metric, _) in OTHER.items():
            points, unit = (1, "nats") if metric == "loss" else (100, "points")
            each = points * (cell.loc[cell["set"] == name, "value"] - before[name])
            half = half_interval(each.std(), len(each))
            row[f"{name}, {metric}, {unit}"] = f"{each.mean():+.3g}" + f" ± {half:.2g}" * (len(each) > 1)
        rows.append(row)
    levels = ", ".join(f"{name} {before[name]:.4g}" for name in OTHER)
    table = pd.DataFrame(rows).sort_values(["size", "method"]).to_markdown(index=False, disable_numparse=True)
    return f"The change from the frozen model ({levels}), on {ROWS} test rows each. ± is over seeds.\n\n{table}\n"


if __name__ == "__main__":
    sys.exit(main())
