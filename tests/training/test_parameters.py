"""Counts of parameters: predicted, and on models that train."""

from __future__ import annotations

import io

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from partial_lora.adapter import PartialLoraConfig
from partial_lora.errors import PartialLoraError
from partial_lora.masks import kept_count
from partial_lora.training import cost


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(10, 30)
        self.proj = nn.Linear(10, 10)

    def forward(self, x):
        return self.proj(self.qkv(x)[..., :10])


class Model(nn.Module):
    """Two blocks, a convolution with a name that looks like a target, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.ModuleDict({"proj": nn.Conv2d(3, 10, 2)})
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(10, 4)

    def forward(self, x):
        return self.head(self.blocks(x))


TARGETS = ["qkv", "blocks.0.proj", "blocks.1.proj"]
SHAPES = {
    f"blocks.{depth}.{name}": shape for depth in (0, 1) for name, shape in (("qkv", (30, 10)), ("proj", (10, 10)))
}
HEAD = 10 * 4 + 4
BASE = (3 * 10 * 4 + 10) + 2 * (30 * 10 + 30 + 10 * 10 + 10)
DENSE = 2 * (3 * (30 + 10) + 3 * (10 + 10))  # two blocks at rank 3


def adapted(**options):
    torch.manual_seed(0)
    return get_peft_model(
        Model(), LoraConfig(**{"r": 3, "target_modules": TARGETS, "modules_to_save": ["head"]} | options)
    )


def test_adapter_parameters_by_hand():
    assert cost.adapter_parameters({"a": (30, 10), "b": (10, 10)}, 3, 0.0) == {"dense": 180, "trainable": 180}
    sparsity = {"a": {"rows": 0.9, "columns": 0.5}, "b": {"rows": 0.0, "columns": 0.8}}
    # a keeps 3 rows and 5 columns, b 10 rows and 2 columns
    assert cost.adapter_parameters({"a": (30, 10), "b": (10, 10)}, 3, sparsity)["trainable"] == 3 * (8 + 12)


def test_adapter_parameters_count_what_the_masks_keep():
    for share in (0.05, 0.33, 0.87, 0.999):
        count = sum(4 * (kept_count(m, share) + kept_count(n, share)) for m, n in SHAPES.values())
        assert cost.adapter_parameters(SHAPES, 4, share)["trainable"] == count


def test_single_entries_are_counted_alike():
    for share in (0.0, 0.33, 0.87, 0.999):
        count = sum(kept_count(4 * m, share) + kept_count(4 * n, share) for m, n in SHAPES.values())
        assert cost.adapter_parameters(SHAPES, 4, share, "element")["trainable"] == count


@pytest.mark.parametrize("change", [{"blocks.0.qkv": None}, {"blocks.7.qkv": {"rows": 0.5, "columns": 0.5}}])
def test_a_sparsity_for_other_modules_is_refused_by_name(change):
    sparsity = {name: {"rows": 0.5, "columns": 0.5} for name in SHAPES} | change
    sparsity = {name: each for name, each in sparsity.items() if each}
    with pytest.raises(PartialLoraError, match=next(iter(change)).replace(".", r"\.")):
        cost.adapter_parameters(SHAPES, 4, sparsity)


@pytest.mark.parametrize("targets", [TARGETS, r"blocks\.\d\.(qkv|proj)", ("qkv", "0.proj", "1.proj")])
def test_target_shapes_are_the_modules_peft_adapts(targets):
    names = {name.removesuffix(".lora_A") for name, _ in adapted().get_base_model().named_modules() if "lora_A" in name}
    shapes = cost.target_shapes(Model(), targets, "head")
    assert shapes == SHAPES
    assert set(shapes) == {name for name in names if not name.endswith("default")}


def test_the_head_is_never_a_target():
    assert "head" not in cost.target_shapes(Model(), ["qkv", "head"], "head")


@pytest.mark.parametrize(("targets", "named"), [(["proj"], "patch.proj is a Conv2d"), (["fc9"], "fc9")])
def test_targets_that_cannot_be_adapted_are_refused_by_name(targets, named):
    with pytest.raises(PartialLoraError, match=named):
        cost.target_shapes(Model(), targets, "head")


def test_describe_on_the_meta_device_agrees_with_the_model_that_trains():
    with torch.device("meta"):
        outline = Model()
    described = cost.describe(outline, target_modules=TARGETS, head="head", rank=3, sparsity=0.0)
    found = cost.measured(adapted(), "head")
    assert found == {
        "base": BASE,
        "adapter_dense": DENSE,
        "adapter_trainable": DENSE,
        "head": HEAD,
        "adapter_sparsity": 0.0,
    }
    assert {key: described[key] for key in found} == found
    assert described["targets"] == 4


def test_describe_masked():
    sparsity = {name: {"rows": 0.9, "columns": 0.5} for name in SHAPES}
    described = cost.describe(Model(), target_modules=TARGETS, head="head", rank=3, sparsity=sparsity)
    trainable = 2 * 3 * ((3 + 5) + (1 + 5))
    assert described["adapter_trainable"] == trainable
    assert described["adapter_sparsity"] == pytest.approx(1 - trainable / DENSE)
    assert described["adapter_bytes"] == 4 * (DENSE + HEAD)  # zeros are written out
    assert described["compact_bytes"] == described["gradient_bytes"] == 4 * (trainable + HEAD)
    assert described["optimizer_bytes"] == 2 * described["gradient_bytes"]


def test_predicted_bytes_are_those_of_peft_and_adamw(tmp_path):
    model = adapted()
    described = cost.describe(Model(), target_modules=TARGETS, head="head", rank=3, sparsity=0.0)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(tensor.nbytes for tensor in saved.values()) == described["adapter_bytes"]
    optimizer = torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
    model(torch.randn(2, 10)).sum().backward()
    optimizer.step()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    moments = [state[key] for state in optimizer.state.values() for key in ("exp_avg", "exp_avg_sq")]
    assert sum(gradient.nbytes for gradient in gradients) == described["gradient_bytes"]
    assert sum(moment.nbytes for moment in moments) == described["optimizer_bytes"]


def test_a_probe_has_no_adapter():
    described = cost.describe(Model(), target_modules=TARGETS, head="head", rank=3, sparsity=None)
    probe = adapted(target_modules=DUMMY_TARGET_MODULES)
    expected = {"base": BASE, "adapter_dense": 0, "adapter_trainable": 0, "head": HEAD, "adapter_sparsity": None}
    assert cost.measured(probe, "head") == expected
    assert {key: described[key] for key in expected} == expected


def test_measured_without_peft():
    model = Model().requires_grad_(False)
    model.head.requires_grad_(True)
    found = cost.measured(model, "head")
    assert (found["base"], found["head"], found["adapter_dense"]) == (BASE, HEAD, 0)


class Kept(nn.Module):
    """Part of an adapter whose one parameter holds the kept rows, and whose weight is the dense view."""

    def __init__(self, dense: torch.Tensor, kept: int, dim: int) -> None:
        super().__init__()
        self.shape = dense.shape
        self.kept = nn.Parameter(dense.narrow(dim, 0, kept).clone())

    @property
    def weight(self):
        return torch.zeros(self.shape)


def test_measured_counts_the_entries_that_exist_not_the_config():
    model = adapted()
    layer = model.get_base_model().blocks[0].qkv
    layer.lora_B["default"] = Kept(layer.lora_B["default"].weight.data, 6, 0)
    layer.lora_A["default"] = Kept(layer.lora_A["default"].weight.data, 4, 1)
    found = cost.measured(model, "head")
    removed = 3 * (24 + 6)
    assert (found["adapter_dense"], found["adapter_trainable"]) == (DENSE, DENSE - removed)
    assert found["adapter_sparsity"] == pytest.approx(removed / DENSE)


def test_measured_on_a_masked_adapter_is_what_was_described():
    sparsity = {name: {"rows": 0.9, "columns": 0.5} for name in SHAPES}
    options = {"r": 3, "target_modules": TARGETS, "modules_to_save": ["head"]}
    model = get_peft_model(Model(), PartialLoraConfig(**options, sparsity=sparsity, mask_seed=0))
    described = cost.describe(Model(), target_modules=TARGETS, head="head", rank=3, sparsity=sparsity)
    found = cost.measured(model, "head")
    assert found == {key: described[key] for key in found}


def test_measured_counts_only_what_trains():
    model = adapted()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    assert cost.measured(model, "head")["adapter_trainable"] == 2 * 3 * (30 + 10)


def test_a_second_adapter_is_neither_base_nor_counted():
    model = adapted(target_modules=["qkv"])
    before = cost.measured(model, "head")
    model.add_adapter("other", LoraConfig(r=5, target_modules=TARGETS, modules_to_save=["head"]))
    assert cost.measured(model, "head") == before


def test_a_stray_trainable_parameter_is_named():
    model = adapted()
    model.get_base_model().patch.proj.bias.requires_grad_(True)
    with pytest.raises(PartialLoraError, match=r"patch\.proj\.bias trains"):
        cost.measured(model, "head")


def test_a_head_that_is_not_there_is_named():
    with pytest.raises(PartialLoraError, match=r"model\.head=classifier"):
        cost.measured(Model(), "classifier")


@pytest.mark.parametrize("sparsity", [0.87, None])
def test_table_says_the_numbers_within_80_columns(sparsity):
    info = cost.describe(Model(), target_modules=TARGETS, head="head", rank=3, sparsity=sparsity)
    console = Console(file=io.StringIO(), width=80)
    console.print(cost.table(info))
    text = console.file.getvalue()
    assert f"{info['base']:,}" in text
    assert f"{info['adapter_dense']:,}" in text
    assert all(len(line) <= 80 for line in text.splitlines())
    assert len(text.splitlines()) == 10  # no row wraps


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1,023 B"), (1024, "1.0 KiB"), (3 << 19, "1.5 MiB"), (5 << 40, "5,120.0 GiB")],
)
def test_sizes(count, text):
    assert cost._size(count) == text
