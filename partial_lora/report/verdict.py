"""Outcome of a comparison: its verdict in words, and the files to act with."""

from __future__ import annotations

import functools
import logging
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import yaml

from partial_lora.errors import PartialLoraError
from partial_lora.files import read_json, write_atomic, write_json
from partial_lora.launching import directory
from partial_lora.launching.compare import Entry, in_time, runs_of_each
from partial_lora.report import predictions, records
from partial_lora.report.sequential import AS_GOOD, LOOKS, OPEN, WORSE, Outputs, Referee, Standing, referee, shows
from partial_lora.report.statistics import per_example
from partial_lora.settings.comparison import Comparison
from partial_lora.tasks.metrics import LOWER_IS_BETTER, SHARES

PERPLEXITY = "perplexity"  # of which a hundredth of its logarithm, the loss, is a point
TAKE = "take"  # folder of the files to act with

_warn_once = functools.cache(logging.getLogger(__name__).warning)  # a comparison looks several times


def results_of(places: Iterable[Path]) -> Path:
    """Return the results directory of runs, each in results_dir/runs/task/model/method-id/seed."""
    return next(iter(places)).parents[4]


def outputs_of(group: Sequence[Entry], out: Path) -> tuple[Outputs, str]:
    """Return what each test row adds to a score (sequential.Outputs), and the metric; whole scores without rows."""
    stored, by_row, whole, metric = predictions.Predictions(out), {}, {}, ""
    for entry in group:
        by_row[entry.name], whole[entry.name] = {}, {}
        for place, record in entry.done.items():
            if record["config"]["trainer"]["learning_rate"] != entry.best:
                continue
            row = records.run_of(record, place).row
            metric = row["metric"]
            sign, seed = -1 if metric in LOWER_IS_BETTER else 1, record["seed"]
            whole[entry.name][seed] = sign * np.array([math.log(row["test"]) if metric == PERPLEXITY else row["test"]])
            try:
                of_rows = "loss" if metric == PERPLEXITY else metric
                by_row[entry.name][seed] = sign * per_example(stored.of(row["group"], seed, metric), of_rows)
            except (PartialLoraError, KeyError, ValueError) as error:  # not kept, not of this metric, or broken
                if isinstance(error, ValueError):
                    _warn_once("%s; methods are compared by their scores alone", str(error))
                by_row[entry.name][seed] = np.array([])
    rows = {len(values) for seeds in by_row.values() for values in seeds.values()}
    return (by_row if len(rows) == 1 and rows != {0} else whole), metric


def judged(group: Sequence[Entry], comparison: Comparison) -> tuple[Referee, list[str]]:
    """Return what the runs of a group decide so far, and that in words."""
    outputs, metric = outputs_of(group, results_of(group[0].done))
    found = referee(outputs, comparison.margin / 100, LOOKS if comparison.seeds is None else (comparison.seeds,))
    return found, words(group, found, metric, comparison.margin, comparison.jobs)


def prospects(entries: Sequence[Entry], comparison: Comparison) -> list[str]:
    """Return lines on what a comparison takes, and what each of its looks would tell apart on those test rows."""
    alive = [entry for entry in entries if entry.refused is None]
    looks = LOOKS if comparison.seeds is None else (comparison.seeds,)
    once = sum(entry.seconds for entry in alive) / comparison.jobs
    times = [in_time(once * runs_of_each(comparison, seeds)) for seeds in looks]
    between = times[0] if times[0] == times[-1] else f"{times[0]} to {times[-1]}, as looks decide or not"
    lines = [f"expected: {between}; jobs={comparison.jobs}, margin={comparison.margin:g}"]
    methods = max(Counter(entry.group for entry in alive).values())
    metric = next((entry.timed["metrics"]["test"]["primary"] for entry in alive if entry.timed), None)
    if methods > 1 and metric in SHARES:
        rows = min(entry.tested for entry in alive)
        gaps = ", ".join(
            f"{100 * shows(methods, rows, seeds, looks):.1f} points by {seeds} seeds ({time})"
            for seeds, time in zip(looks, times, strict=True)
            if seeds > 2  # of two it is wide
        )
        lines += [f"gaps that would be told apart on {rows:,} test rows: {gaps}"] if gaps else []
    return lines


def words(group: Sequence[Entry], outcome: Referee, metric: str, margin: float, jobs: int) -> list[str]:
    """Return the verdict on a group, a sentence or two a line. margin: in points. jobs: runs that are made at once."""
    entries = {entry.name: entry for entry in group}
    short = {name: entry.method for name, entry in entries.items()}
    leader, by_verdict = outcome.leader, {verdict: [] for verdict in (WORSE, AS_GOOD, OPEN)}
    for name, standing in outcome.standings.items():
        if name != leader:
            by_verdict[standing.verdict].append((name, standing))
    best = entries[leader]
    if len(group) == 1:
        return [f"{short[leader]} stands alone: learning rate {best.best:g}"]
    unjudged = entries.keys() - outcome.standings.keys() - {leader}  # seeds are missing
    lines = [
        f"Take {short[leader]} (learning rate {best.best:g}): nothing is better."
        if not by_verdict[OPEN] and not unjudged
        else f"{short[leader]} leads (learning rate {best.best:g}), and not all is decided."
    ]
    for name, standing in by_verdict[WORSE]:
        dropped = "" if standing.seeds == max(other.seeds for other in outcome.standings.values()) else "dropped"
        seeds = f"{dropped} after {_seeds(standing)}".strip()
        lines.append(f"{short[name]} is worse than {short[standing.against]} by {_apart(standing, metric)}, {seeds}.")
    for name, standing in by_verdict[AS_GOOD]:
        cheaper = _cheaper(entries[name], entries[standing.against])
        apart = f"as good as {short[standing.against]} within {_points(margin / 100, metric)}"
        lines.append(f"{short[name]} is {apart} ({_apart(standing, metric)} below){cheaper}.")
    for name, standing in by_verdict[OPEN]:
        apart = f"{_apart(standing, metric)} below {short[standing.against]}"
        then = _wanted(standing, entries, name, outcome.asks.get(name), jobs)
        lines.append(f"{short[name]}: not decided after {_seeds(standing)}, {apart}; {then}")
    lines += [f"{short[name]}: not decided, it lacks some of {outcome.asks[name]} seeds." for name in sorted(unjudged)]
    return lines


def _wanted(standing: Standing, entries: Mapping[str, Entry], name: str, next_look: int | None, jobs: int) -> str:
    """Return what would decide what is open: seeds and their time, or a wider margin. next_look: its seeds, if any."""
    if next_look is not None and (standing.wants or 0) <= next_look:
        return f"it goes on to {next_look} seeds."
    if standing.wants is not None and standing.wants > standing.seeds:
        pair = (entries[name], entries[standing.against])
        seconds = sum(entry.seconds for entry in pair) * (standing.wants - standing.seeds) / jobs
        return f"some {standing.wants} seeds would decide ({in_time(seconds)} more)."
    if math.isnan(standing.high):
        return "one seed decides nothing."
    margin = f"margin={100 * standing.high + 0.05:.1f} is met"
    return f"no number of seeds would be likely to decide, more test rows might; {margin}."


def _seeds(standing: Standing) -> str:
    return "1 seed" if standing.seeds == 1 else f"{standing.seeds} seeds"


def _apart(standing: Standing, metric: str) -> str:
    points = _points(standing.difference, metric)
    if math.isnan(standing.low):
        return points
    most = 1 if metric in SHARES else math.inf
    low, high = (_number(min(max(end, -most), most), metric) for end in (standing.low, standing.high))
    return f"{points} [{low}, {high}]"


def _number(value: float, metric: str) -> str:
    text = f"{100 * value:.1f}" if metric in SHARES or metric == PERPLEXITY else f"{value:.3g}"
    return text.replace("-", "−")


def _points(value: float, metric: str) -> str:
    number = _number(value, metric)
    if metric in SHARES:
        return f"{number} point{'' if number == '1.0' else 's'}"
    return f"{number} % of perplexity" if metric == PERPLEXITY else f"{number} of {metric}"


def _cheaper(entry: Entry, leader: Entry) -> str:
    """Return what an entry that is as good takes less of than the leader."""
    less = {
        "a smaller file": (entry.served, leader.served),
        "a faster step": (entry.step_seconds or 0, leader.step_seconds or 0),
    }
    names = [name for name, (cost, other) in less.items() if 0 < cost < 0.9 * other]
    return f", with {' and '.join(names)}" if names else ""


# --- Files to act with.


_ARGUMENTS = {  # of transformers, by which key of `trainer` each is set
    "learning_rate": "learning_rate",
    "lr_scheduler_type": "schedule",
    "warmup_steps": "warmup_ratio",  # below 1, a share of the steps
    "per_device_train_batch_size": "batch_size",
    "weight_decay": "weight_decay",
    "max_grad_norm": "max_grad_norm",
}


def write_take(entry: Entry, folder: Path) -> Path:
    """Write into a folder what the best run was made with, for `partial-lora train` and for plain PEFT; return it.

    config.yaml; adapter_config.json, unless the adapter is masked, and training_arguments.json, for transformers'
    Trainer or TRL; and a record like those of PEFT's method_comparison.
    """
    folder.mkdir(parents=True, exist_ok=True)
    place, record = next((place, record) for place, record in entry.done.items() if record is entry.of_seed(0))
    config, trained = record["config"], record.get("training") or {}
    # To train anew, and to the end: its first quarter may have been a trial.
    settings = {key: value for key, value in config.items() if key not in ("results_dir", "keep_records")}
    settings["trainer"] = config["trainer"] | {"until": 1.0}
    write_atomic(folder / directory.CONFIG, yaml.safe_dump(settings, sort_keys=False))
    adapter, copied = place / directory.ADAPTER, folder / "adapter_config.json"
    copied.unlink(missing_ok=True)  # of an earlier winner
    if (adapter / copied.name).is_file() and not (adapter / "partial_lora.json").is_file():  # alone it is dense LoRA
        write_json(copied, read_json(adapter / copied.name) | {"inference_mode": False})  # else PEFT freezes it
    trainer = config["trainer"]
    arguments = {name: trainer[key] for name, key in _ARGUMENTS.items() if key in trainer}
    arguments |= {"max_steps": trained.get("steps") or trainer.get("max_steps"), "seed": record["seed"]}
    write_json(folder / "training_arguments.json", arguments)
    write_json(folder / "method_comparison.json", _of_peft(record, entry, arguments))
    return folder


def _of_peft(record: dict, entry: Entry, arguments: dict) -> dict:
    """Return a record of a run with the keys that PEFT's method_comparison reads; what was not measured is None."""
    metrics, parameters, cost = record["metrics"], record["parameters"], record.get("cost") or {}
    test = {f"test {name}": value for name, value in metrics["test"].items() if name != "primary"}
    seen = {"step": arguments["max_steps"], "train loss": metrics.get("train", {}).get("loss")}
    if arguments["max_steps"]:
        seen["train samples"] = arguments["max_steps"] * arguments["per_device_train_batch_size"]
    return {
        "run_info": {
            "created_at": record["started"],
            "total_time": sum(record["seconds"].values()),
            "experiment_name": f"{entry.method}/{entry.size}",
            "peft_branch": "main",
            "train_config": {"model_id": record["config"]["model"]["name"], **arguments},
            "peft_config": {"peft_type": record["config"]["method"].get("peft_type") or "LORA"},
            "error_msg": "",
        },
        "train_info": {
            **dict.fromkeys(("accelerator_memory_reserved_avg", "accelerator_memory_reserved_99th")),
            "accelerator_memory_max": record["peak_memory_bytes"],
            "train_time": record["seconds"]["train"],
            "file_size": cost.get("adapter_bytes"),
            "num_trainable_params": parameters["adapter_trainable"] + parameters["head"],
            "num_total_params": parameters["base"] + parameters["adapter_trainable"] + parameters["head"],
            "status": "success",
            "metrics": [seen | test],
        },
        "meta_info": {
            "package_info": {f"{name}-version": version for name, version in record["versions"].items()},
            "system_info": {},
        },
    }
