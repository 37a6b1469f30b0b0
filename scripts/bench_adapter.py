"""Is the adapter cheaper than dense LoRA, in time and in memory? The benchmark behind `make bench`.

`python scripts/bench_adapter.py` measures, side by side in one process, (a) the frozen floor, (b) dense LoRA, (c) and
(d) Partial-LoRA in both granularities and (e) SHiRA, and writes adapter.json (every repetition) and adapter.md (tables,
aims) into results/bench. --profile shows instead where the time goes.
"""

from __future__ import annotations

import argparse
import gc
import os
import random
import shlex
import sys
import time
from collections.abc import Sequence
from itertools import product

import bench_measure as measure
import bench_profile
import bench_record
import bench_report
import torch
from bench_models import MODELS, PARTIAL, QUICK_MODELS, SEED, SELDOM, VARIANTS, Model, build_variant

from partial_lora.adapter import module_masks
from partial_lora.files import write_atomic, write_json

SPARSITY = 0.87
EVERY = 3  # repetitions for one of SELDOM


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line, read and checked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 16, 64])
    parser.add_argument("--repeats", type=int, default=28)
    parser.add_argument("--profile", action="store_true", help="write profile.md, seconds by operation, instead")
    options = bench_record.parsed(parser, argv)
    if min(*options.ranks, options.repeats) < 1:
        parser.error("--ranks and --repeats are whole numbers of at least 1")
    return options


def main(argv: Sequence[str]) -> None:
    """Measure, or profile, and write record and page."""
    options = arguments(argv)
    command = shlex.join(["python", "scripts/bench_adapter.py", *argv]) if argv else "make bench"
    torch.set_num_threads(1)
    gc.freeze()  # what the imports have made need not be walked through at every collection
    head = {"command": command, "machine": bench_record.describe_machine(measure.keep_freed_memory())}
    if options.profile:
        options.out.mkdir(parents=True, exist_ok=True)
        profiles = {**head, "profiles": _profiles(options)}
        write_json(options.out / "profile.json", profiles)
        write_atomic(options.out / "profile.md", bench_profile.page(profiles))
        return
    settings = {"sparsity": SPARSITY, "repeats": options.repeats, "every": EVERY, "quick": options.quick}
    cells = _cells(options)
    result = {**head, "settings": settings, "cells": cells, "aims": bench_report.judge(cells)}
    bench_record.write(options.out, "adapter", result, bench_report.page, bench_report.figures)


def _cells(options: argparse.Namespace) -> list[dict]:
    """Every model at every rank."""
    todo, cells = list(product(options.models, options.ranks)), []
    for model, rank in todo:
        cell = measure_cell(options, model, rank)
        cell["ratios"] = bench_report.ratios(cell["variants"])
        cells.append(cell)
        print(f"{len(cells)} of {len(todo)}: {bench_report.line(cell)}", flush=True)
    return cells


def build_cell(model: Model, rank: int) -> tuple[dict, measure.Batch]:
    """All variants over the same frozen weights, each after one step, and their batch."""
    torch.manual_seed(SEED)
    base, batch = model.build(), model.batch()
    variants = {}
    for name in VARIANTS:
        before = measure.alive()
        built = build_variant(name, base, model, rank, SPARSITY)
        optimizer = measure.optimizer_of(built)
        state = measure.state_bytes(built, optimizer, batch, before)
        variants[name] = {"model": built, "optimizer": optimizer, "state": state}
    return variants, batch


def measure_cell(options: argparse.Namespace, model_name: str, rank: int) -> dict:
    """Everything about one model at one rank: bytes once, seconds in shuffled rounds."""
    load, started = os.getloadavg()[0], time.perf_counter()
    model = (QUICK_MODELS if options.quick else MODELS)[model_name]
    variants, batch = build_cell(model, rank)
    measured = {
        name: {
            **variant["state"],
            "kept_entries": kept_entries(variant["model"]) if name in PARTIAL else None,
            "saved_bytes": measure.saved_bytes(variant["model"], batch),
            "file_bytes": measure.file_bytes(variant["model"], compact=name in PARTIAL),
            "repetitions": [],
            "seconds": {stage: [] for stage in measure.STAGES},
        }
        for name, variant in variants.items()
    }
    shuffle = random.Random(f"{SEED}/{model_name}/{rank}")
    gc.disable()
    for repetition in range(-1, options.repeats):  # the first is thrown away
        gc.collect()
        names = [name for name in variants if name not in SELDOM or repetition < 0 or repetition % EVERY == 0]
        for name in shuffle.sample(names, len(names)):
            spent = measure.step(variants[name]["model"], variants[name]["optimizer"], batch)
            if repetition >= 0:
                measured[name]["repetitions"].append(repetition)
                for stage, seconds in spent.items():
                    measured[name]["seconds"][stage].append(seconds)
    gc.enable()
    return {
        "model": model_name,
        "rank": rank,
        "title": model.title,
        "unit": model.unit,
        "units": model.units,
        "modules": len(module_masks(variants["lora"]["model"])),
        "load": [load, os.getloadavg()[0]],
        "wall_seconds": time.perf_counter() - started,
        "variants": measured,
    }


def kept_entries(model: torch.nn.Module) -> int:
    """The entries of A and B that the masks keep, counted on the masks."""
    rank = model.peft_config["default"].r
    return sum(
        (len(masks.rows.kept) + len(masks.columns.kept)) * (1 if masks.element else rank)
        for masks in module_masks(model).values()
    )


def _profiles(options: argparse.Namespace) -> list[dict]:
    profiles = []
    for name, rank in product(options.models, options.ranks):
        model = (QUICK_MODELS if options.quick else MODELS)[name]
        profile = bench_profile.profile(*build_cell(model, rank))
        profiles.append({"model": name, "title": model.title, "rank": rank, **profile})
        print(f"{name} rank {rank}: profiled", flush=True)
    return profiles


if __name__ == "__main__":
    main(sys.argv[1:])
