"""A tiny vision transformer that is right about most of a few random images, and its score the slow way."""

from __future__ import annotations

import copy
import math
from contextlib import contextmanager

import pytest
import timm
import torch
from torch import Tensor, nn

from partial_lora.calibration.importance import svd

TARGETS = ["attn.qkv", "mlp.fc2"]
GRID = {"target_modules": TARGETS, "levels": 0.2, "max_sparsity": 0.8}
VARIANTS = [
    (axes, scope) for axes in ("separate", "joint") for scope in ("independent", "cumulative", "cumulative_backward")
]
BERT, LLAMA = "bert.encoder.layer", "model.layers"


def tiny_vit(depth: int = 2) -> nn.Module:
    """Weights large enough that zeroing some of them changes what it says."""
    torch.manual_seed(0)
    size = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": depth, "num_heads": 2, "num_classes": 4}
    model = timm.create_model("vit_tiny_patch16_224", **size)
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and parameter.ndim == 2:
            nn.init.normal_(parameter, std=0.25)
    return model.eval()


class Named(nn.Module):
    """Takes its inputs by name, as the models of transformers do."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.vit = vit

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.vit(pixel_values)


def scored_draw(model: nn.Module, sizes: tuple[int, ...] = (10, 10, 10, 7), seed: int = 0) -> list[dict[str, Tensor]]:
    """Random images, labelled as the model would label them, but for every eighth."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(sum(sizes), 3, 32, 32, generator=generator)
    with torch.no_grad():
        labels = model(pixel_values=images).argmax(-1)
    labels[::8] = (labels[::8] + 1) % 4
    return [
        {"pixel_values": part, "labels": label}
        for part, label in zip(images.split(sizes), labels.split(sizes), strict=True)
    ]


def full_accuracy(model: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    """The literal twin: every example through the whole model."""
    labels = torch.cat([batch["labels"] for batch in batches])
    with torch.no_grad():
        logits = model(pixel_values=torch.cat([batch["pixel_values"] for batch in batches]))
    return int((logits.argmax(-1) == labels).sum()) / len(labels)


class Counted:
    """A plain score: every call is a full pass. `limit` calls are allowed."""

    def __init__(self, batches, limit=math.inf):
        self.batches, self.calls, self.limit = batches, 0, limit

    def __call__(self, model):
        self.calls += 1
        if self.calls > self.limit:
            raise KeyboardInterrupt
        return full_accuracy(model, self.batches)


def with_zeroed(model, cuts):
    """A copy of the model with, for each (module, axis, level), all but the most important rows or columns zeroed."""
    cut = copy.deepcopy(model)
    for name, axis, level in cuts:
        own = model.get_submodule(name).weight.detach()
        importance = svd(own)[axis == "columns"].numpy()
        size = len(importance)
        most_important_first = sorted(range(size), key=lambda index: (-importance[index], index))
        weight = cut.get_submodule(name).weight.data
        for index in most_important_first[max(1, math.floor((1 - level) * size + 0.5)) :]:
            weight[index if axis == "rows" else (slice(None), index)] = 0
    return cut


def linears(model, part="blocks"):
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and part in name]


def random_model(family: str, labels: int = 3, layers: int = 2) -> nn.Module:
    """A tiny model of transformers with weights so large that zeroing some of them changes what it says."""
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        BertConfig,
        DebertaV2Config,
        LlamaConfig,
    )

    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"num_hidden_layers": layers, "initializer_range": 0.4, "max_position_embeddings": 32}
    if family == "llama":
        model = AutoModelForCausalLM.from_config(LlamaConfig(num_key_value_heads=1, **sizes))
    elif family == "deberta":
        relative = {"relative_attention": True, "position_buckets": 4, "pos_att_type": ["p2c", "c2p"]}
        relative |= {"share_att_key": True, "norm_rel_ebd": "layer_norm", "position_biased_input": False}
        model = AutoModelForSequenceClassification.from_config(DebertaV2Config(**sizes, **relative, num_labels=labels))
    else:
        model = AutoModelForSequenceClassification.from_config(BertConfig(**sizes, num_labels=labels))
    return model.eval()


def word_batches(lengths: tuple[int, ...] = (5, 9), rows: int = 6, labels: int = 3) -> list[dict[str, Tensor]]:
    """Random words, batches of several lengths, the first row of each padded on the right."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for length in lengths:
        words = torch.randint(1, 50, (rows, length), generator=generator)
        mask = torch.ones_like(words)
        mask[0, 3:] = 0
        batches.append({"input_ids": words, "attention_mask": mask, "labels": torch.arange(rows) % labels})
    return batches


# Scored draws: a model, its batches and the name of its blocks


def labelled():
    model = random_model("bert")
    batches = word_batches((7, 7, 7, 5), rows=8)
    with torch.no_grad():
        for batch in batches:  # labelled as the model would, but for every fifth
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            batch["labels"] = model(**inputs).logits.argmax(-1)
            batch["labels"][::5] = (batch["labels"][::5] + 1) % 3
    return model, batches, BERT


def graded():
    model = random_model("bert", labels=1)
    batches = word_batches((7, 7, 5), rows=8)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for batch in batches:
            inputs = {name: value for name, value in batch.items() if name != "labels"}
            batch["labels"] = model(**inputs).logits[:, 0] + torch.randn(8, generator=generator)
    return model, batches, BERT


def texts():
    batches = word_batches((7, 9, 9), rows=6)
    for batch in batches:
        batch["labels"] = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        batch["labels"][1, :4] = -100
    return random_model("llama"), batches, LLAMA


def questions(lengths=(8, 8, 6)):
    """Items of two and of three options, of several lengths, the right one first, second or third."""
    model = random_model("llama")
    generator = torch.Generator().manual_seed(5)
    batches, item = [], 0
    for length in lengths:
        sizes = [3, 2, 3, 3, 2]
        words = torch.randint(1, 50, (sum(sizes), length), generator=generator)
        labels, items, answers = words.clone(), [], []
        for size in sizes:
            items += [item] * size
            answers += [option == item % size for option in range(size)]
            item += 1
        for row in range(len(words)):
            labels[row, : length - 1 - row % 3] = -100
        tensors = {"labels": labels, "items": torch.tensor(items), "answers": torch.tensor(answers)}
        batches.append({"input_ids": words, "attention_mask": torch.ones_like(words), **tensors})
    return model, batches, LLAMA


@contextmanager
def called(model):
    """The names of the modules with weights of their own that compute anything, for as long as the block lasts."""
    ran = set()
    names = {module: name for name, module in model.named_modules() if list(module.parameters(recurse=False))}
    own = {each: each.forward for each in map(type, names)}

    def noted(forward):
        def run(self, *args, **kwargs):
            ran.add(names.get(self))
            return forward(self, *args, **kwargs)

        return run

    with pytest.MonkeyPatch.context() as patch:
        for each, forward in own.items():
            patch.setattr(each, "forward", noted(forward))
        yield ran


class Altered:
    """One module with a few of its rows zeroed, for as long as the block lasts."""

    def __init__(self, model, name, rows=8):
        self.weight, self.rows = model.get_submodule(name).weight.data, rows

    def __enter__(self):
        self.own = self.weight.clone()
        self.weight[: self.rows] = 0

    def __exit__(self, *exception):
        self.weight.copy_(self.own)
