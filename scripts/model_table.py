"""Every model of conf/model in one table: what is frozen, what trains, what an adapter weighs. Downloads nothing.

    python scripts/model_table.py        # writes results/models/models.md and models.json
    python scripts/model_table.py --kept    # writes results/models/kept.md and kept.json, in minutes
    make models                          # both
    python scripts/model_table.py --skeletons    # writes partial_lora/models/skeletons.json

Skeletons are the models as the installed timm and transformers build them, by which `partial-lora info` counts without
importing either. They are to be made again where a model of conf/model is added or changed; tests/models compare the
file with what is built.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path

import torch
from tabulate import tabulate
from torch import nn

from partial_lora import cli, models
from partial_lora.building import memory
from partial_lora.building.info import outline
from partial_lora.files import read_json, write_atomic, write_json
from partial_lora.methods import called
from partial_lora.models.config import ModelConfig
from partial_lora.models.skeleton import FILE, key_of, skeleton_of
from partial_lora.settings import schema
from partial_lora.settings.compose import composed
from partial_lora.settings.schema import Config
from partial_lora.training.cost import kept_by_forward

FOLDER = Path("results/models")
KINDS = ("bf16", "nf4")  # formats of the weights whose memory is shown
_MIB, _GIB = 2**20, 2**30
_TASKS = {"encoder": "text_table", "causal": "text_generation"}  # of each family; images otherwise
OUTPUTS = 2
# What the tables are of, as their pages say.
COUNTED = """\
The adapter is of rank 16 on all of a model's target modules, at the paper's 87 % (`calibration.budget=0.13`); heads are
for two classes, and causal models have none. The same numbers, one model at a time: `partial-lora info model=NAME`."""
ESTIMATED = """\
Of causal models, GiB at the peak of a training step, estimated from shapes (partial_lora/building/peak.py): frozen
weights, adapter, gradients, AdamW and activations of 4 sequences of 512 tokens. Passes: what a scan over all modules,
both axes and 19 levels can take at most."""
KEPT = """\
What a step keeps for its backward pass, in MB, of fp32: counted on a model without memory
(`partial-lora info --memory`), and measured in a pass of the same model with zeros for weights. Methods have 13 % of
dense LoRA's parameters, `dense` all of them."""


def own_task(name: str) -> tuple[str, str]:
    """The family of a model of conf/model, and the task of one's own data that goes with it."""
    family = composed(f"model={name}").model.family
    return family, _TASKS.get(family, "image_table")


def settings_of(name: str) -> ModelConfig:
    return composed(f"model={name}", f"task={own_task(name)[1]}").model


def empty(model: ModelConfig) -> nn.Module:
    return models.empty(**model.geometry, num_labels=OUTPUTS)


def tree(module: nn.Module) -> dict:
    """A module and those in it, equal ones that follow each other once."""
    node = {"class": type(module).__name__}
    own = {name: list(parameter.shape) for name, parameter in module._parameters.items() if parameter is not None}
    if own:
        node["parameters"] = own
    runs: list[tuple[str, str, dict]] = []  # the names of the first and the last, and what they are
    for name, child in module.named_children():
        below = tree(child)
        if runs and name.isdecimal() and runs[-1][2] == below and int(runs[-1][1]) + 1 == int(name):
            runs[-1] = (runs[-1][0], name, below)
        else:
            runs.append((name, name, below))
    if runs:
        node["modules"] = {first if first == last else f"{first}-{last}": below for first, last, below in runs}
    return node


def stored(model: ModelConfig) -> dict:
    built = empty(model)
    whole, every = skeleton_of(built), dict(built.named_parameters(remove_duplicate=False))
    return {
        "head": model.head,
        "output": whole.output,
        "config": whole.config,
        "shared": sorted(every.keys() - whole.parameters.keys()),
        "tree": tree(built),
    }


def config_of(model: str) -> Config:
    """The settings of a run of this model on the user's own data, with a head for two classes."""
    family, own = own_task(model)
    task = [f"task={own}", "task.classes=2", "calibration=threshold", "calibration.budget=0.13"]
    task += ["trainer.batch_size=4", "model.max_length=512"] if family == "causal" else []
    return composed(f"model={model}", *task)


def table(counts: dict[str, dict]) -> str:
    """One line a model, in the order of their sizes."""
    rows = [
        [
            f"`{name}`",
            f"{each['base']:,}",
            each["adapted_modules"],
            f"{each['adapter_dense']:,}",
            f"{each['adapter_trainable']:,}",
            f"{each['head']:,}",
            f"{each['adapter_bytes'] / _MIB:.2f}",
            f"{each['compact_bytes'] / _MIB:.2f}",
            f"{(each['gradient_bytes'] + each['optimizer_bytes']) / _MIB:.2f}",
        ]
        for name, each in sorted(counts.items(), key=lambda item: item[1]["base"])
    ]
    headers = ["model", "frozen", "modules", "dense", "trainable", "head"]
    headers += ["PEFT file, MiB", "compact file, MiB", "gradients and AdamW, MiB"]
    return tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True, colalign=["left"] + ["right"] * 8)


def memory_table(outlines: dict[str, dict]) -> str:
    """One line a causal model: GiB at the peak of a training step, and the passes of a calibration, at most."""
    rows = []
    for name, each in sorted(outlines.items(), key=lambda item: item[1]["counts"]["base"]):
        held = each["memory"]
        if held:
            peaks = [held[kind][peak] / _GIB for kind in held for peak in ("peak", "peak_checkpointed")]
            rows.append([f"`{name}`", f"{held['bf16']['weights'] / _GIB:.2f}", f"{held['nf4']['weights'] / _GIB:.2f}"])
            rows[-1] += [f"{peak:.2f}" for peak in peaks] + [f"{each['passes']:,}"]
    headers = ["model", "weights, bf16", "weights, nf4", "peak, bf16", "with checkpoints", "peak, nf4"]
    headers += ["with checkpoints", "passes"]
    return tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True, colalign=["left"] + ["right"] * 7)


def outlines() -> dict[str, dict]:
    names = sorted(file.stem for file in (schema.conf_dir() / "model").glob("*.yaml"))
    each = {name: outline(config_of(name)) for name in names}
    return {
        name: {
            "counts": of.counts,
            "memory": {kind: held for kind, held in of.memory.items() if kind in KINDS},
            "passes": of.passes,
        }
        for name, of in each.items()
    }


def page(each: dict[str, dict]) -> str:
    """Both tables, and what they are of."""
    counts = {name: outlined["counts"] for name, outlined in each.items()}
    parts = ["    python scripts/model_table.py", COUNTED, table(counts), ESTIMATED, memory_table(each)]
    return "\n\n".join(parts) + "\n"


# --- What a step keeps.

METHODS = ("dense", "lora", "entries", "partial", "lori", "lorafa", "paca")
STEPS = {
    "`vit_s14`, 16 images of 56 pixels": ("model=vit_s14", "task=digits", "model.image_size=56"),
    "`vit_s14`, 16 images of 224 pixels": ("model=vit_s14", "task=digits", "model.image_size=224"),
    "`minilm_l6`, 16 texts of 64 tokens": ("model=minilm_l6", "task=trec", "model.max_length=64"),
    "`smollm2_135m`, one text of 2,048 tokens": (
        *("model=smollm2_135m", "task=arc_easy", "model.dtype=float32", "model.max_length=2048"),
        "trainer.batch_size=1",
    ),
}


def of_zeros(config: Config) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """Return a model in training with its adapter, and a batch: all numbers are zeros, all sizes those of a run."""
    model, size = memory.adapted(config).to_empty(device="cpu").train(), config.model
    for value in [*model.parameters(), *model.buffers()]:
        value.data.zero_()
    rows = config.trainer.local_batch_size
    if size.modality == "image":
        return model, {"pixel_values": torch.zeros(rows, 3, size.image_size, size.image_size)}
    mask = torch.ones(rows, size.max_length, dtype=torch.long)
    mask[0, -1] = 0  # padding, without which a model may leave the mask out
    return model, {"input_ids": torch.zeros_like(mask), "attention_mask": mask}


def measured(config: Config) -> int:
    """The bytes that a real pass keeps, after a first one, when everything that lasts exists."""
    model, batch = of_zeros(config)
    model(**batch)
    with kept_by_forward() as kept:
        output = model(**batch)
    assert output is not None  # held as long as it is counted
    return kept.bytes


def steps(file: Path) -> dict[str, dict[str, dict]]:
    """What a step of every method keeps, counted and measured; a file holds what is known, and gets what is new."""
    found: dict[str, dict[str, dict]] = read_json(file) if file.is_file() else {}
    for (name, settings), method in product(STEPS.items(), METHODS):
        if method in found.setdefault(name, {}):
            continue
        size = ["calibration=fixed"] if called(method).size == "calibrated" else []
        config = composed("trainer.batch_size=16", *settings, f"method={method}", *size)
        found[name][method] = {**asdict(memory.step_memory(config)), "measured": measured(config)}
        write_json(file, found)
        gc.collect()
    return found


def kept_page(found: dict[str, dict[str, dict]]) -> str:
    """A table a model and size of its inputs."""
    parts = ["    python scripts/model_table.py --kept", KEPT]
    for name, of_methods in found.items():
        floor, checkpointed = of_methods["dense"]["floor"], of_methods["dense"]["checkpointed"]
        parts.append(f"## {name}")
        parts.append(f"The frozen model keeps {floor / 1e6:,.1f}, with gradient checkpoints {checkpointed / 1e6:,.1f}.")
        rows = []
        for method, each in of_methods.items():
            numbers = (each["adapter"], each["floor"] + each["adapter"], each["measured"], each["checkpointed"])
            rows.append([f"`{method}`", *(f"{value / 1e6:,.1f}" for value in numbers)])
        heads = ["method", "the adapter adds", "in all", "measured", "with gradient checkpoints"]
        align = ["left", *["right"] * 4]
        parts.append(tabulate(rows, headers=heads, tablefmt="pipe", disable_numparse=True, colalign=align))
    return "\n\n".join(parts) + "\n"


def write_skeletons() -> None:
    """Write the skeletons of all models, a line each."""
    every = {}
    for file in sorted((schema.conf_dir() / "model").glob("*.yaml")):
        model = settings_of(file.stem)
        every[key_of(model.family, model.architecture, model.model_args)] = stored(model)
    lines = [f"{json.dumps(key)}: {json.dumps(content)}" for key, content in every.items()]
    write_atomic(FILE, "{\n" + ",\n".join(lines) + "\n}\n")


@cli.script
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--kept", action="store_true", help="what a step of training keeps, in place of the table")
    which.add_argument("--skeletons", action="store_true", help="the shapes that the package has of its models")
    options = parser.parse_args(arguments)
    if options.skeletons:
        write_skeletons()
        return
    FOLDER.mkdir(parents=True, exist_ok=True)
    if options.kept:
        found = steps(FOLDER / "kept.json")
        write_atomic(FOLDER / "kept.md", kept_page(found))
        return
    each = outlines()
    write_json(FOLDER / "models.json", each)
    write_atomic(FOLDER / "models.md", page(each))
    print(page(each))


if __name__ == "__main__":
    sys.exit(main())
