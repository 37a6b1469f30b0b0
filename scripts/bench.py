"""Benchmarks behind `make bench`: steps and bytes of adapters, whole runs.

    python scripts/bench.py adapter        # a training step beside dense LoRA's and SHiRA's, on one thread; an hour
    python scripts/bench.py methods        # a step of every method at one size, one thread, and what it keeps
    python scripts/bench.py long           # one text of 2,048 tokens, with gradient checkpointing and compiled, too
    python scripts/bench.py growth         # what building, saving and loading cost with more and more modules

Variants take turns. Every repetition is in OUT/NAME.json, the tables are in NAME.md. --page makes the page of a record
again.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
import json
import os
import platform
import random
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, cycle, product
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
from data_sets import folder
from peft import LoraConfig, PeftModel, ShiraConfig, get_peft_model
from peft.tuners.shira.layer import ShiraLayer
from scipy.stats import bootstrap, trim_mean
from tabulate import tabulate
from torch import Tensor, nn

from partial_lora import cli
from partial_lora.adapter import PartialLoraConfig, load_compact, module_masks
from partial_lora.adapter.compact import write_compact
from partial_lora.errors import require
from partial_lora.files import write_atomic, write_json
from partial_lora.launching import directory
from partial_lora.masks import kept_count
from partial_lora.settings.compose import composed
from partial_lora.settings.versions import plain as as_plain
from partial_lora.training.cost import Storages, kept_by_forward, storages, tensors_in, total

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "results" / "bench"
ENOUGH = 8  # repetitions; an interval resampled from fewer would claim more than it knows
CONFIDENCE = 0.95
SEED = 0


# --- What all have in common.


def machine() -> dict:
    """Return the machine, the versions and the commit that numbers are made with."""
    made = directory.new({"seed": 0})
    names = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    known = [line.partition(":")[2].strip() for line in names if line.startswith("model name")]
    return {
        "cpu": known[0] if known else platform.processor() or platform.machine(),
        "cpus": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        **{key: made[key] for key in ("versions", "git_commit", "started")},
    }


def where(of: Mapping, loads: Sequence[float]) -> str:
    """Return the lines of a page on the machine."""
    lines = [
        f"{of['cpu']}, {of['cpus']} CPUs, {of['capability']}",
        ", ".join(f"{name} {version}" for name, version in of["versions"].items()),
        f"commit {of['git_commit']}; started {of['started']}",
        f"load average {min(loads):.2f} to {max(loads):.2f}, of which the benchmark is 1",
    ]
    return "\n".join(f"- {line}" for line in lines)


def table(rows: Sequence[Mapping | Sequence[str]], heads: Sequence[str] | str = "keys") -> str:
    """Rows of texts as a Markdown table: by column, or below these heads."""
    return tabulate(rows, heads, tablefmt="github", disable_numparse=True)


# --- Adapter: a training step of every variant on two models, and the bytes that it holds.

SPARSITY, EVERY = 0.87, 3  # EVERY: repetitions for one of SELDOM
NAMES = {
    "floor": "frozen floor",
    "dense": "dense LoRA (PEFT)",
    "rows_columns": "ours, rows and columns",
    "element": "ours, element",
    "shira": "SHiRA (PEFT)",
}
REFERENCES = ("dense", "floor")  # what ratios are taken against
PARTIAL = ("rows_columns", "element")
SELDOM = ("element", "shira")  # which fewer repetitions tell precisely enough
Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Model:
    """A model class at one size.

    title: what it is and what a step works on. build: gives the model, with random weights. batch: the arguments of a
    forward pass. targets: the modules that get an adapter. first_block: the module whose input the frozen floor's
    backward pass reaches.
    """

    title: str
    build: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Tensor]]
    targets: tuple[str, ...]
    first_block: str


def _vit(title: str, *, labels: int, images: int, **size) -> Model:
    from transformers import TimmWrapperConfig, TimmWrapperForImageClassification

    pixels = size.get("img_size", 224)

    def build() -> nn.Module:
        config = TimmWrapperConfig(architecture="vit_base_patch16_224", num_labels=labels, model_args=size)
        return TimmWrapperForImageClassification(config)

    def batch() -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(SEED)
        images_ = torch.randn(images, 3, pixels, pixels, generator=generator)
        return {"pixel_values": images_, "labels": torch.randint(0, labels, (images,), generator=generator)}

    targets = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")  # "proj" alone would also be the patch embedding's
    first = "timm_model.blocks.0"
    title = f"{title}, {images} images of {pixels} px a step"
    return Model(title, build, batch, targets, first)


def _llama(title: str, *, tokens: int, **size) -> Model:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(use_cache=False, max_position_embeddings=tokens, **size)  # training has no use for a cache

    def batch() -> dict[str, Tensor]:
        ids = torch.randint(0, config.vocab_size, (1, tokens), generator=torch.Generator().manual_seed(SEED))
        return {"input_ids": ids, "labels": ids}

    targets = tuple(f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down"))
    first = "model.layers.0"
    title = f"{title}, one text of {tokens} tokens a step"
    build = partial(LlamaForCausalLM, copy.deepcopy(config))
    return Model(title, build, batch, targets, first)


_WIDE = {"vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 3584, "num_hidden_layers": 8}
_WIDE |= {"num_attention_heads": 16, "num_key_value_heads": 8}
_TINY = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
_TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2}
_LLAMA = partial(_llama, "Llama, 8 layers, d = 1024", **_WIDE)
MODELS = {"vit_b16": partial(_vit, "ViT-B/16", labels=10, images=4), "llama_8l": partial(_LLAMA, tokens=512)}
LONG = partial(_LLAMA, tokens=2048)
# The same classes at a size for tests; their times mean nothing.
_SMALL = {"img_size": 32, "embed_dim": 64, "depth": 2, "num_heads": 2}
QUICK_MODELS = {
    "vit_b16": partial(_vit, "A tiny ViT", labels=4, images=2, **_SMALL),
    "llama_8l": partial(_llama, "A tiny Llama", tokens=16, **_TINY),
}
QUICK_LONG = partial(_llama, "A tiny Llama", tokens=64, **_TINY)


def floor(base: nn.Module, model: Model, rank: int) -> nn.Module:
    """No adapter; the backward pass goes down to the input of the first block."""

    def from_here(module: nn.Module, args: tuple) -> None:
        args[0].requires_grad_(True)  # what comes before is frozen, so this is a leaf

    base.get_submodule(model.first_block).register_forward_pre_hook(from_here)
    return base


def dense(base: nn.Module, model: Model, rank: int) -> nn.Module:
    return get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(model.targets)))


def masked(granularity: str, base: nn.Module, model: Model, rank: int) -> nn.Module:
    """Partial-LoRA that keeps rows of B and columns of A, or single entries."""
    usual = {"r": rank, "lora_alpha": 2 * rank, "target_modules": list(model.targets)}
    return get_peft_model(base, PartialLoraConfig(sparsity=SPARSITY, granularity=granularity, **usual))


def shira(base: nn.Module, model: Model, rank: int) -> nn.Module:
    """PEFT's SHiRA (random single entries of W) with as many entries in every module as rows and columns keep there.

    SHiRA's own number is r (in + out) with a whole r, which misses that of masks by several per cent; so it is built
    with r = 1, and its vector of values and their positions are then replaced by ones of the right length.
    """
    wrapped = get_peft_model(base, ShiraConfig(r=1, random_seed=SEED, target_modules=list(model.targets)))
    generator = torch.Generator().manual_seed(SEED)
    for layer in wrapped.modules():
        if isinstance(layer, ShiraLayer):
            kept = rank * sum(kept_count(size, SPARSITY) for size in (layer.in_features, layer.out_features))
            entries = layer.in_features * layer.out_features
            chosen = torch.randperm(entries, generator=generator)[:kept].sort().values
            positions = torch.stack([chosen // layer.in_features, chosen % layer.in_features])
            layer.shira_weight["default"] = nn.Parameter(torch.zeros(kept))
            layer.shira_indices["default"] = positions.int()  # as SHiRA holds them
    return wrapped


VARIANTS: dict[str, Callable[[nn.Module, Model, int], nn.Module]] = {
    "floor": floor,
    "dense": dense,
    **{name: partial(masked, name) for name in PARTIAL},
    "shira": shira,
}


def built(name: str, base: nn.Module, model: Model, rank: int) -> nn.Module:
    """Return a variant over the frozen tensors of a base, in memory once; every variant draws from the same seed."""
    torch.manual_seed(SEED)
    base.requires_grad_(False)
    tensors = chain(base.parameters(), base.buffers())
    shared = copy.deepcopy(base, {id(tensor): tensor for tensor in tensors})
    return VARIANTS[name](shared, model, rank).train()


# glibc's malloc gives large blocks back to the kernel when they are freed and asks for them again at the next step, and
# clearing their pages then costs more than what is compared here. So it is told to keep what it has, as the caching
# allocator of a GPU does. (name: parameter of mallopt, value)
_MALLOC = {"M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, 2**31 - 1), "M_TOP_PAD": (-2, 2**26)}


def keep_freed_memory() -> list[str]:
    """Tell the C library's allocator to keep freed memory; gives the settings it took, none where it has no mallopt."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return []
    return [f"{name}={value}" for name, (parameter, value) in _MALLOC.items() if mallopt(parameter, value)]


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer | None:
    """AdamW over what trains; None for a floor, where nothing does."""
    parameters = trainable(model)
    return torch.optim.AdamW(parameters, lr=1e-4, fused=True) if parameters else None


def step(model: nn.Module, optimizer: torch.optim.Optimizer | None, batch: Batch) -> float:
    """Train on `batch` once; return the processor seconds of this process."""
    began = process_time()
    model(**batch).loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    return process_time() - began


def saved_bytes(model: nn.Module, batch: Batch) -> int:
    """Bytes that one forward pass keeps for its backward pass, the loss itself apart; after a first step."""
    with kept_by_forward() as kept:
        loss = model(**batch).loss
    return kept.bytes - total(storages([loss]), without={})


def state_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None, batch: Batch) -> dict[str, int]:
    """Return what trains, and the bytes that training holds of it from step to step. Takes a training step."""
    model(**batch).loss.backward()
    parameters = trainable(model)
    gradients = storages(parameter.grad for parameter in parameters)
    state: Storages = {}
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
        state = storages(tensors_in(optimizer.state.values()))
    return {
        "trainable_parameters": sum(parameter.numel() for parameter in parameters),
        "gradient_bytes": total(gradients, without={}),
        "optimizer_bytes": total(state, without={}),
    }


def file_bytes(model: nn.Module, *, compact: bool) -> dict[str, int | None]:
    """Bytes of the adapter on disk: what save_pretrained writes (dense), and the folder of kept values only (compact).

    None for a form that the variant does not have.
    """
    if not trainable(model):
        return {"dense": None, "compact": None}
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(f"{folder}/dense")
        if compact:
            write_compact(model, f"{folder}/compact")
        return {
            "dense": Path(folder, "dense", "adapter_model.safetensors").stat().st_size,
            "compact": sum(file.stat().st_size for file in Path(folder, "compact").iterdir()) if compact else None,
        }


def adapter(options: argparse.Namespace) -> dict:
    torch.set_num_threads(1)
    gc.freeze()  # what the imports have made need not be walked through at every collection
    of = machine() | {"malloc": keep_freed_memory()}
    cells = []
    for name, rank in product(MODELS, options.ranks):
        cells.append(cell_of(name, (QUICK_MODELS if options.quick else MODELS)[name](), rank, options.repeats))
        print(f"{name} rank {rank}: {cells[-1]['wall_seconds']:.0f} s", flush=True)
    settings = {"sparsity": SPARSITY, "repeats": options.repeats, "every": EVERY, "quick": options.quick}
    return {"command": options.command, "machine": of, "settings": settings, "cells": cells}


def cell_of(name: str, model: Model, rank: int, repeats: int) -> dict:
    """Everything about one model at one rank: bytes once, seconds in shuffled rounds."""
    load, started = os.getloadavg()[0], time.perf_counter()
    torch.manual_seed(SEED)
    base, batch = model.build(), model.batch()
    variants, measured = {}, {}
    for variant in VARIANTS:
        own = built(variant, base, model, rank)
        variants[variant] = own, optimizer_of(own)
        measured[variant] = {
            **state_bytes(*variants[variant], batch),
            "saved_bytes": saved_bytes(own, batch),
            "file_bytes": file_bytes(own, compact=variant in PARTIAL),
            "repetitions": [],
            "seconds": [],
        }
    shuffle = random.Random(f"{SEED}/{name}/{rank}")
    gc.disable()
    for repetition in range(-1, repeats):  # the first is thrown away
        gc.collect()
        names = [variant for variant in variants if variant not in SELDOM or repetition < 0 or repetition % EVERY == 0]
        for variant in shuffle.sample(names, len(names)):
            spent = step(*variants[variant], batch)
            if repetition >= 0:
                measured[variant]["repetitions"].append(repetition)
                measured[variant]["seconds"].append(spent)
    gc.enable()
    return {
        "model": name,
        "rank": rank,
        "title": model.title,
        "modules": len(module_masks(variants["dense"][0])),
        "load": [load, os.getloadavg()[0]],
        "wall_seconds": time.perf_counter() - started,
        "variants": measured,
        "ratios": ratios(measured),
    }


def ratio(values: np.ndarray, dense: np.ndarray, floor: np.ndarray) -> dict[str, float | None]:
    """mean(values - floor) / mean(dense - floor), and the interval that holds it: {ratio, low, high}.

    All are seconds of the same repetitions (repetitions,). Differences are taken within a repetition, where a machine
    that is slow for a while is slow for all; the quotient is taken of their means, since a single repetition's may have
    next to nothing below the line. The means leave out the quarter at either end: nearly as deaf to outliers as a
    median, with intervals a tenth narrower. These are percentile bootstraps over whole repetitions, None of too few.
    """

    def quotient(values: np.ndarray, dense: np.ndarray, floor: np.ndarray, axis: int = -1) -> np.ndarray:
        return trim_mean(values - floor, 0.25, axis=axis) / trim_mean(dense - floor, 0.25, axis=axis)

    samples, low, high = (values, dense, floor), None, None
    if len(values) >= ENOUGH:
        settings = {"method": "percentile", "confidence_level": CONFIDENCE, "rng": np.random.default_rng(0)}
        low, high = map(float, bootstrap(samples, quotient, paired=True, **settings).confidence_interval)
    return {"ratio": float(quotient(*samples)), "low": low, "high": high}


def ratios(variants: Mapping[str, Mapping]) -> dict[str, dict[str, dict]]:
    """Every variant against dense LoRA: {variant: {name: {ratio, low, high}}}.

    step: t / t_lora. overhead: (t - floor) / (t_lora - floor). saved: (b - floor) / (b_lora - floor) of the bytes saved
    for the backward pass, which are the same every time.
    """
    seconds = {name: np.array(variant["seconds"]) for name, variant in variants.items()}
    saved = {name: variant["saved_bytes"] for name, variant in variants.items()}
    against = {}
    for name, variant in variants.items():
        dense, floor = (seconds[reference][variant["repetitions"]] for reference in REFERENCES)
        bytes_saved = (saved[name] - saved["floor"]) / (saved["dense"] - saved["floor"])
        against[name] = {
            "step": ratio(seconds[name], dense, np.zeros_like(dense)),
            "overhead": ratio(seconds[name], dense, floor),
            "saved": dict.fromkeys(("ratio", "low", "high"), bytes_saved),
        }
    return against


def adapter_page(result: Mapping) -> str:
    made = f"Made by `{result['command']}`; every number of every repetition is in adapter.json."
    parts = ["# The adapter against dense LoRA", made]
    for model in dict.fromkeys(cell["model"] for cell in result["cells"]):
        cells = [cell for cell in result["cells"] if cell["model"] == model]
        title = f"## {cells[0]['title']}, {cells[0]['modules']} adapted modules"
        parts += [title, "Time:", _table(cells, _times), "Memory and files, MiB:", _table(cells, _memory)]
    loads = [load for cell in result["cells"] for load in cell["load"]]
    parts += ["## How it is measured", _method(result), "## Where", where(result["machine"], loads)]
    return "\n\n".join(parts)


def _table(cells: Sequence[Mapping], columns: Callable[[Mapping, Mapping, Mapping], Mapping]) -> str:
    """One row for each rank and variant, with the columns made of (cell, variant, its ratios)."""
    return table(
        [
            {"rank": cell["rank"], "variant": NAMES[name], **columns(cell, variant, cell["ratios"][name])}
            for cell in cells
            for name, variant in cell["variants"].items()
        ]
    )


def _interval(measured: Mapping) -> str:
    if measured["low"] == measured["high"]:  # exact, or none
        return f"{measured['ratio']:.3f}"
    return f"{measured['ratio']:.3f} [{measured['low']:.3f}, {measured['high']:.3f}]"


def _times(cell: Mapping, variant: Mapping, own: Mapping) -> dict:
    return {
        "step, s": f"{np.median(variant['seconds']):.3f}",
        "step / LoRA": _interval(own["step"]),
        "overhead": _interval(own["overhead"]),
    }


def _memory(cell: Mapping, variant: Mapping, own: Mapping) -> dict:
    def mib(number: int | None) -> str:
        return "" if number is None else f"{number / 2**20:.2f}"

    return {
        "trainable": f"{variant['trainable_parameters']:,}",
        "saved": mib(variant["saved_bytes"]),
        "saved above floor": _interval(own["saved"]),
        "gradients": mib(variant["gradient_bytes"]),
        "Adam": mib(variant["optimizer_bytes"]),
        "file": mib(variant["file_bytes"]["dense"]),
        "compact": mib(variant["file_bytes"]["compact"]),
    }


def _method(result: Mapping) -> str:
    settings = result["settings"]
    lines = [
        f"Sparsity {settings['sparsity']}, no dropout, fp32, alpha 2 × rank, AdamW (fused), one thread, random weights,"
        " the head frozen; the same frozen tensors and batch for all. A step is forward and backward pass, optimizer"
        f" and zeroing of gradients, in processor time; {settings['repeats']} repetitions in shuffled order,"
        f" {' and '.join(NAMES[name] for name in SELDOM)} in one of {settings['every']}; freed memory is kept.",
        'Overhead is (t - floor) / (t_LoRA - floor), "saved above floor" (b - floor) / (b_LoRA - floor): quotients of'
        " two interquartile means of differences within a repetition, with a bootstrap over repetitions. The frozen"
        " floor's backward pass goes down to the input of the first block.",
        "Saved: memory that one forward pass keeps for its backward pass. File: what save_pretrained writes. Compact:"
        " the whole folder of kept values. SHiRA has as many entries in every module as rows and columns keep there.",
    ]
    return "\n".join(f"- {line}" for line in lines)


# --- Whole runs, each in a process of its own.

RANK, LOW_RANK = 16, 2  # of an adapter on a long text
JOBS = {
    "vit_s14, digits": ("model=vit_s14", "task=digits"),
    "minilm_l6, trec": ("model=minilm_l6", "task=trec"),
}
SIZE = 0.13  # of dense LoRA's parameters
METHODS = ("dense", "lora", "partial", "entries", "random_weights", "lokr", "loha", "hira", "dora", "vera", "pissa")
METHODS += ("psoft", "oft", "unilora", "fourierft", "randlora", "gralora", "lori", "lorafa", "paca")
WAYS = ("plain", "gradient checkpointing", "torch.compile")
LONG_TITLES = {
    "dense": "LoRA, rank 16",
    "lora": "LoRA, rank 2",
    "rows_columns": f"rows and columns at {1 - SPARSITY:.0%}, rank 16",
}
# OpenMP's, and what keeps a script from importing what lies beside it.
_LEFT_OUT = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "PYTHONSAFEPATH")


def in_turns(options: argparse.Namespace, cells: Mapping[str, Mapping[str, list]]) -> dict[str, dict[str, list]]:
    """Return what `work` measures of each variant of each job, by repetition, each in a process of one thread."""
    variables = {key: value for key, value in os.environ.items() if key not in _LEFT_OUT} | {"OMP_NUM_THREADS": "1"}
    found = {name: {variant: [] for variant in variants} for name, variants in cells.items()}
    for _, (name, variants) in product(range(options.repeats), cells.items()):
        for variant, job in variants.items():
            command = [sys.executable, __file__, "worker", variant, str(options.steps), *job]
            done = subprocess.run(command, env=variables, stdout=subprocess.PIPE, text=True, check=True)
            found[name][variant].append(json.loads(done.stdout.splitlines()[-1]))
    return found


def methods(options: argparse.Namespace) -> dict:
    """Measure a step of every method, each with as many parameters."""
    size = [f"calibration.budget={SIZE}"]
    sized = {method: [] if method == "dense" else size for method in METHODS}
    return in_turns(options, {name: {each: [*job, *own] for each, own in sized.items()} for name, job in JOBS.items()})


def long(options: argparse.Namespace) -> dict:
    """Measure a step on one long text, in each of WAYS."""
    size = "quick" if options.quick else "full"
    return in_turns(options, {way: {each: [way, size] for each in LONG_TITLES} for way in WAYS})


def work(variant: str, steps: int, job: Sequence[str]) -> dict[str, float]:
    """Train for some steps in this process; return a step's median seconds, the peak in bytes, what is kept."""
    return _on_a_long_text(variant, steps, *job) if job[0] in WAYS else _in_a_run(variant, steps, job)


def _in_a_run(method: str, steps: int, job: Sequence[str]) -> dict[str, float]:
    """Train a method on a job; one share everywhere takes no calibration."""
    from partial_lora.train import run

    usual = ["trainer.batch_size=16", "trainer.device=cpu", "method.rank=16", "calibration=fixed", f"method={method}"]
    usual += [f"trainer.max_steps={steps}", f"trainer.save_steps={steps}", "trainer.learning_rate=1e-3"]
    usual += [f"task.train_samples={16 * 25}", "task.test_samples=64"]
    config = composed(*usual, *job, *([] if "task=digits" in job else [f"data_dir={folder()}"]))
    record = directory.new(as_plain(config))
    with tempfile.TemporaryDirectory() as place:
        run(config, Path(place), record, "train")
    cost, trained = record["cost"], record["parameters"]["adapter_trainable"]
    kept = {"saved": "saved_activation_bytes", "optimizer": "optimizer_bytes", "file": "adapter_bytes"}
    weighed = {name: cost[key] for name, key in kept.items()} | {"peak": record["peak_memory_bytes"]}
    return {"step": cost["step_seconds"], "parameters": trained} | weighed


def _on_a_long_text(variant: str, steps: int, way: str, size: str) -> dict[str, float]:
    torch.manual_seed(SEED)
    model = (QUICK_LONG if size == "quick" else LONG)()
    batch, rank = model.batch(), LOW_RANK if variant == "lora" else RANK
    own = built("dense" if variant == "lora" else variant, model.build(), model, rank)
    optimizer = optimizer_of(own)
    if way == "gradient checkpointing":
        own.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    elif way == "torch.compile":
        own.compile()
    began = time.perf_counter()
    step(own, optimizer, batch)
    first = time.perf_counter() - began
    times = [step(own, optimizer, batch) for _ in range(steps)]
    parameters = sum(each.numel() for each in trainable(own))
    measured = {"step": statistics.median(times), "first": first, "parameters": parameters, "peak": _peak()}
    # What autograd is handed can be counted only where Python hands it over; a compiled forward pass does not.
    return measured | ({"saved": saved_bytes(own, batch)} if way != "torch.compile" else {})


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def methods_page(found: Mapping) -> list[str]:
    rows = []
    for job, each in found.items():
        reference = median(each["lora"], "step")
        for method, runs in each.items():
            seconds, parameters = median(runs, "step"), f"{median(runs, 'parameters'):,.0f}"
            weighed = [f"{median(runs, key) / 1e6:,.1f}" for key in ("saved", "optimizer", "file", "peak")]
            rows.append([job, method, parameters, f"{seconds:.3f}", f"{seconds / reference:.2f}", *weighed])
    kept = ("kept for the backward pass, MB", "optimizer, MB", "adapter's file, MB", "peak memory, MB")
    heads = ["model, task", "method", "adapter's parameters", "seconds a step", "of lora's", *kept]
    return [f"## A step of every method, at {SIZE} of dense LoRA's parameters, one thread", table(rows, heads)]


def long_page(found: Mapping) -> list[str]:
    rows = []
    for way, each in found.items():
        reference = median(each["lora"], "step")
        for variant, runs in each.items():
            seconds = median(runs, "step")
            weighed = [f"{median(runs, key) / 1e6:,.1f}" if key in runs[0] else "–" for key in ("saved", "peak")]
            share, first = f"{seconds / reference:.2f}", f"{median(runs, 'first'):.1f}"
            title, parameters = LONG_TITLES[variant], f"{median(runs, 'parameters'):,.0f}"
            rows.append([way, title, parameters, f"{seconds:.2f}", share, first, *weighed])
    heads = ["", "adapter", "its parameters", "seconds a step", "of rank 2's", "first step, seconds"]
    heads += ["kept for the backward pass, MB", "peak memory, MB"]
    return ["## One text of 2,048 tokens a step, Llama of 8 layers, d = 1024, one thread", table(rows, heads)]


def median(measured: Sequence[Mapping], key: str) -> float:
    return statistics.median(each[key] for each in measured)


SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def growth(options: argparse.Namespace) -> dict:
    """Measure what is done once for an adapter, in processor seconds of this process, on one thread.

    The modules have 16 x 16 weights and each its own share, as a calibration gives it: this is the cost of the modules,
    not of their numbers.
    """
    torch.set_num_threads(1)
    found = {}
    for size in (14,) if options.quick else options.modules:
        blocks = [nn.ModuleDict({name: nn.Linear(16, 16, bias=False) for name in SEVEN}) for _ in range(size // 7)]
        base = nn.Sequential(*blocks)
        every = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
        settings = {"r": 4, "lora_alpha": 4, "target_modules": list(SEVEN)}
        shares = dict(zip(every, cycle((0.5, 0.75, 0.87)), strict=False))
        configs = {"lora": LoraConfig(**settings), "ours": PartialLoraConfig(**settings, sparsity=shares)}
        found[len(every)] = {name: [] for name in configs}
        for _, (name, config) in product(range(options.repeats), configs.items()):
            with tempfile.TemporaryDirectory() as place:
                found[len(every)][name].append(_life(base, config, place, compact=name == "ours"))
    return found


def _life(base: nn.Module, config: LoraConfig, place: str, *, compact: bool) -> dict[str, float]:
    """Build, save and load an adapter; return the processor seconds of each."""
    seconds = {}

    def timed(name: str, action: Callable) -> Any:
        gc.collect()
        began = process_time()
        done = action()
        seconds[name] = process_time() - began
        return done

    bases = [copy.deepcopy(base) for _ in range(3)]
    model = timed("get_peft_model", lambda: get_peft_model(bases[0], copy.deepcopy(config)))
    timed("save_pretrained", lambda: model.save_pretrained(place))
    timed("from_pretrained", lambda: PeftModel.from_pretrained(bases[1], place, is_trainable=True))
    if compact:
        timed("write_compact", lambda: write_compact(model, place))
        timed("load_compact", lambda: load_compact(bases[2], place))
    return seconds


BESIDE = {"write_compact": "save_pretrained", "load_compact": "from_pretrained"}  # what it is compared with


def growth_page(found: Mapping) -> list[str]:
    rows = []
    for size, each in found.items():
        for action in each["ours"][0]:
            ours, lora = median(each["ours"], action), median(each["lora"], BESIDE.get(action, action))
            rows.append([f"{int(size):,}", action, f"{lora:.2f}", f"{ours:.2f}", f"{ours / lora:.2f}"])
    heads = ["modules", "", "plain LoRA, processor seconds", "ours", "of plain LoRA's"]
    note = "write_compact is compared with save_pretrained of plain LoRA, load_compact with from_pretrained."
    return ["## What is done once, by the number of modules (16 x 16)", table(rows, heads), note]


OF_RUNS = {"methods": (methods, methods_page), "long": (long, long_page), "growth": (growth, growth_page)}


def runs_page(record: Mapping) -> str:
    parts = ["# Whole runs"]
    for part in (part for part in OF_RUNS if part in record):
        made = record[part]["made"]
        command = f"Made by `{made['command']}`: medians of {made['repeats']}, {made['cpus']} cores."
        parts += [*OF_RUNS[part][1](record[part]["found"]), command]
    return "\n\n".join(parts)


# --- The command.

PAGES = {"adapter": adapter_page, "runs": runs_page}  # by the name of the files


@cli.script
def main(words: Sequence[str] | None = None) -> None:
    words = list(sys.argv[1:] if words is None else words)
    if words[:1] == ["worker"]:
        _, variant, count, *job = words
        print(json.dumps(work(variant, int(count), job)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["adapter", *OF_RUNS])
    parser.add_argument("--repeats", type=int, help="adapter 28, others 5")
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 16, 64], help="of adapter")
    parser.add_argument("--steps", type=int, default=20, help="of whole runs")
    parser.add_argument("--modules", nargs="+", type=int, default=[500, 2000, 8000, 20000], help="of growth")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--quick", action="store_true", help="something tiny: a test, no measurement")
    parser.add_argument("--page", action="store_true", help="make the page of the record that is there")
    options = parser.parse_args(words)
    if options.quick and options.out == OUT:
        parser.error("--quick measures nothing that is worth keeping: give another folder with --out")
    what, options.command = options.what, shlex.join(["python", "scripts/bench.py", *words])
    name = "runs" if what in OF_RUNS else what
    options.repeats = options.repeats or (5 if what in OF_RUNS else 28)
    options.out.mkdir(parents=True, exist_ok=True)
    file = options.out / f"{name}.json"
    record = json.loads(file.read_text()) if file.is_file() else {}
    require(bool(record) or not options.page, "--page", file, "a record, which the same command without --page makes")
    if not options.page and what in OF_RUNS:
        made = {"command": options.command, "repeats": options.repeats, "cpus": os.cpu_count()}
        record[what] = {"made": made, "found": OF_RUNS[what][0](options)}
    elif not options.page:
        record = adapter(options)
    write_json(file, record)
    write_atomic(options.out / f"{name}.md", f"{PAGES[name](record).rstrip()}\n")
    print(f"wrote {options.out / name}.md")


if __name__ == "__main__":
    sys.exit(main())
