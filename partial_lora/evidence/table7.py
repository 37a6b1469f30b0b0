"""Table 7, why the count matters: time, memory and bytes against dense LoRA and PEFT's other methods."""

from __future__ import annotations

import json
from collections.abc import Mapping
from statistics import median

import pandas as pd

from partial_lora.closing import cell, measured
from partial_lora.evidence import finding
from partial_lora.evidence.artefact import Artefact, rows_of
from partial_lora.evidence.assembled import left_out, of_runs
from partial_lora.evidence.differences import plain
from partial_lora.evidence.recorded import COSTS, POINTS, Evidence, at_points
from partial_lora.grouping import point_order

TITLE = "Table 7: time, memory and bytes"
CLAIM = "what is saved is counted in trainable parameters."
METHODS = ("lora", "partial", "dora", "vera", "adalora", "lorafa", "random_weights", "low_rank", "full")
BENCH, RUNS = "bench", "runs"
OURS = "rows_columns"
_VARIANTS = {OURS: "partial", "element": "partial (element)", "shira": "SHiRA (PEFT)", "lora": "dense LoRA (PEFT)"}
_STATE = ("gradient_bytes", "optimizer_bytes")
_NOTES = (
    "Benchmark (`make bench`), on a CPU: at sparsity 0.87, processor time of a whole training step against dense "
    "LoRA's, 95 % intervals of a bootstrap over repetitions; saved: what a forward pass keeps for its backward "
    "pass, above the frozen model, against dense LoRA's; state: gradients and Adam.",
    "Runs: as result.json has it (`cost`), means over seeds, of the task that most methods were trained on; times have "
    "in them whatever else the machine did.",
)


def make(evidence: Evidence) -> Artefact:
    """The table of the benchmark and of what runs there are."""
    file = evidence.file("bench", "adapter.json")
    cells = json.loads(file.read_text(encoding="utf-8"))["cells"] if file else []
    runs = most_methods(at_points(evidence.kept, METHODS, POINTS))
    numbers = pd.concat([of_bench(cells), of_costs(runs)], ignore_index=True)
    lacking = [] if file else ["the benchmark of the adapter; make bench"]
    have = set(runs["method"])
    lacking += [f"runs of {method}; make reproduce-table7" for method in METHODS if method not in have]
    shown = shown_bench(numbers) | shown_costs(numbers)
    return Artefact(
        *("table7", TITLE, CLAIM, verdict(numbers), numbers, shown),
        notes=(*_NOTES, *left_out(runs, evidence)),
        missing=tuple(lacking),
        origin=of_runs(runs),
    )


def of_bench(cells: list[Mapping]) -> pd.DataFrame:
    """A row for each model, rank and variant of the benchmark."""
    rows = []
    for at in cells:
        dense = at["variants"]["lora"]
        for variant, said in _VARIANTS.items():
            if variant not in at["variants"]:
                continue
            own, ratios = at["variants"][variant], at["ratios"][variant]
            seconds = map(sum, zip(*own["seconds"].values(), strict=True))
            rows.append(
                {
                    "part": BENCH,
                    "model": at["model"],
                    "rank": at["rank"],
                    "method": said,
                    "parameters": own["trainable_parameters"],
                    "share": own["trainable_parameters"] / dense["trainable_parameters"],
                    "step_seconds": median(seconds),
                    **{name: ratios["step"][key] for name, key in _STEP.items()},
                    "saved": ratios["saved"]["ratio"],
                    "state_bytes": sum(own[name] for name in _STATE),
                    "state": sum(own[name] for name in _STATE) / sum(dense[name] for name in _STATE),
                    "file_bytes": own["file_bytes"]["compact"] or own["file_bytes"]["dense"],
                }
            )
    return pd.DataFrame(rows)


_STEP = {"step": "ratio", "low": "low", "high": "high"}


def most_methods(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs of the task and model that most methods were trained on, the most runs deciding between several."""
    single = runs[runs["mixture"] == ""]
    if single.empty:
        return single
    ranked = single.groupby(["task", "model"], sort=True).agg(n=("method", "nunique"), runs=("seed", "size"))
    task, model = ranked.sort_values(["n", "runs"], ascending=False, kind="stable").index[0]
    return single[(single["task"] == task) & (single["model"] == model)]


def of_costs(runs: pd.DataFrame) -> pd.DataFrame:
    """A row for each method and point: what its runs recorded of their cost."""
    means = {name: (name, "mean") for name in (*COSTS, "peak_memory_bytes")}
    columns = {"mean": ("test", "mean"), "std": ("test", "std"), "n": ("seed", "size"), "metric": ("metric", "first")}
    columns |= {"parameters": ("adapter_parameters", "mean"), "share": ("share_of_dense", "mean")}
    keys = ["task", "model", "operating_point", "method"]
    found = runs.groupby(keys, sort=False).agg(**columns, **means).reset_index()
    order = found["operating_point"].map(point_order)
    found = found.assign(part=RUNS, _order=order).sort_values(["_order", "method"], kind="stable")
    return found.drop(columns="_order")


def shown_bench(numbers: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The benchmark as it is read."""
    rows = [
        {
            "model": row["model"],
            "rank": f"{row['rank']:.0f}",
            "method": row["method"],
            "parameters": cell(row["parameters"], ",.0f"),
            "of dense": cell(row["share"], ".1%"),
            "step (s)": cell(row["step_seconds"], ".3f"),
            "step / LoRA": _ratio(row),
            "saved / LoRA": cell(row["saved"], ".3f"),
            "state (MiB)": cell(row["state_bytes"] / 2**20, ".2f"),
            "file (MiB)": cell(row["file_bytes"] / 2**20, ".2f"),
        }
        for row in rows_of(numbers, BENCH)
    ]
    return {"Benchmark of a training step": pd.DataFrame(rows)} if rows else {}


def _ratio(row: Mapping) -> str:
    if row["low"] != row["low"] or row["low"] == row["high"]:
        return cell(row["step"], ".3f")
    return f"{row['step']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def shown_costs(numbers: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The costs of runs as they are read."""
    rows = [
        {
            "task": row["task"],
            "model": row["model"],
            "operating point": row["operating_point"],
            "method": row["method"],
            "n": f"{row['n']:.0f}",
            "score": measured(row["metric"], row["mean"], row["std"]),
            "parameters": cell(row["parameters"], ",.0f"),
            "of dense": cell(row["share"], ".1%"),
            "adapter file (KB)": cell(row["adapter_bytes"] / 1e3, ",.0f"),
            "optimizer (KB)": cell(row["optimizer_bytes"] / 1e3, ",.0f"),
            "step (ms)": cell(row["step_seconds"] * 1e3, ",.0f"),
            "activations (MB)": cell(row["saved_activation_bytes"] / 1e6, ",.1f"),
            "peak memory (MB)": cell(row["peak_memory_bytes"] / 1e6, ",.0f"),
        }
        for row in rows_of(numbers, RUNS)
    ]
    return {"Runs": plain(pd.DataFrame(rows))} if rows else {}


def verdict(numbers: pd.DataFrame) -> str:
    """Whether a step of partial takes less time than dense LoRA's, and what it saves of memory and bytes."""
    claim = "With 87 % fewer parameters a training step is faster, keeps less and is saved smaller than dense LoRA's"
    rows = [row for row in rows_of(numbers, BENCH) if row["method"] == _VARIANTS[OURS]]
    dense = {(row["model"], row["rank"]): row for row in rows_of(numbers, BENCH) if row["method"] == _VARIANTS["lora"]}
    if not rows:
        return finding.sentence(claim, f"{finding.OPEN}, no benchmark", table="table 7")
    shares = {name: [row[name] for row in rows] for name in ("step", "saved", "state")}
    shares["file"] = [row["file_bytes"] / dense[row["model"], row["rank"]]["file_bytes"] for row in rows]
    smaller = all(share < 1 for name, each in shares.items() if name != "step" for share in each)
    holds = smaller and all(row["high"] < 1 for row in rows)
    fails = any(row["low"] > 1 for row in rows) or not smaller
    found = finding.HOLDS if holds else finding.FAILS if fails else finding.OPEN
    said = {name: f"{min(each):.2f} to {max(each):.2f}" for name, each in shares.items()}
    ends = f"[{min(row['low'] for row in rows):.2f}, {max(row['high'] for row in rows):.2f}]"
    return finding.sentence(
        claim,
        f"{found}, its step takes {said['step']} of dense LoRA's {ends}, saved activations above the frozen "
        f"model's {said['saved']}, gradients and Adam {said['state']}, the compact export {said['file']} (what plain "
        f"PEFT loads has dense LoRA's size; {len(rows)} models and ranks)",
        table="table 7",
    )
