"""Parameters and bytes, predicted from shapes, against what real tiny models hold and keep."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator

import pytest
import torch
from configured import load, settings
from peft import LoraConfig, get_peft_model
from peft.utils.constants import DUMMY_TARGET_MODULES
from rich.console import Console
from safetensors.torch import load_file
from torch import nn

from partial_lora import models
from partial_lora.adapter import PartialLoraConfig
from partial_lora.budget import kept_parameters, masked_units, saturated
from partial_lora.building import peak, size
from partial_lora.errors import PartialLoraError
from partial_lora.masks import kept_count
from partial_lora.models.skeleton import Skeleton, skeleton, skeleton_of
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


def counted(model):
    return cost.measured(model, "head", dense=DENSE)


def test_parameters_are_counted_that_the_masks_keep():
    for share in (0.0, 0.33, 0.87, 0.999):
        rows_columns = sum(4 * (kept_count(m, share) + kept_count(n, share)) for m, n in SHAPES.values())
        entries = sum(kept_count(4 * m, share) + kept_count(4 * n, share) for m, n in SHAPES.values())
        for granularity, expected in (("rows_columns", rows_columns), ("element", entries)):
            assert kept_parameters(*masked_units(SHAPES, 4, granularity), share) == expected


def test_describe_on_the_meta_device_agrees_with_the_model_that_trains():
    with torch.device("meta"):
        outline = skeleton_of(Model())
    described = size.describe(outline, target_modules=TARGETS, head="head", rank=3, sparsity=0.0)
    found = counted(adapted())
    expected = {"base": BASE, "adapter_dense": DENSE, "adapter_trainable": DENSE, "head": HEAD}
    assert found == expected | {"adapter_sparsity": 0.0, "adapted_modules": 4, "saturated_modules": 0}
    assert {key: described[key] for key in found} == found


def test_what_is_described_of_a_masked_adapter_is_what_is_measured_on_it():
    sparsity = {name: {"rows": 0.9, "columns": 0.5} for name in SHAPES}
    described = size.describe(skeleton_of(Model()), target_modules=TARGETS, head="head", rank=3, sparsity=sparsity)
    trainable = 2 * 3 * ((3 + 5) + (1 + 5))
    assert described["adapter_trainable"] == trainable
    assert described["adapter_sparsity"] == pytest.approx(1 - trainable / DENSE)
    assert described["adapter_bytes"] == 4 * (DENSE + HEAD)  # zeros are written out
    assert described["compact_bytes"] == described["gradient_bytes"] == 4 * (trainable + HEAD)
    assert described["optimizer_bytes"] == 2 * described["gradient_bytes"]
    options = {"r": 3, "target_modules": TARGETS, "modules_to_save": ["head"]}
    found = counted(get_peft_model(Model(), PartialLoraConfig(**options, sparsity=sparsity, mask_seed=0)))
    assert found == {key: described[key] for key in found}


def test_predicted_bytes_are_those_of_peft_and_adamw(tmp_path):
    model = adapted()
    described = size.describe(skeleton_of(Model()), target_modules=TARGETS, head="head", rank=3, sparsity=0.0)
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
    probe = adapted(target_modules=DUMMY_TARGET_MODULES)
    expected = {"base": BASE, "adapter_dense": 0, "adapter_trainable": 0, "head": HEAD, "adapter_sparsity": None}
    expected |= {"adapted_modules": 0, "saturated_modules": 0}
    assert counted(probe) == expected


def test_measured_without_peft():
    model = Model().requires_grad_(False)
    model.head.requires_grad_(True)
    found = counted(model)
    assert (found["base"], found["head"], found["adapter_dense"]) == (BASE, HEAD, 0)


def reached(model) -> dict[str, tuple[int, int]]:
    """The numbers that each module trains, and the entries of W in the rows and columns that these touch."""
    found = {}
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            factors = layer.lora_B["default"], layer.lora_A["default"]
            trained = [each for factor in factors for each in factor.parameters() if each.requires_grad]
            for each in trained:
                nn.init.constant_(each, 1.0)
            b, a = (factor.weight != 0 for factor in factors)
            found[name] = sum(each.numel() for each in trained), int(b.any(1).sum() * a.any(0).sum())
    return found


@pytest.mark.parametrize(
    ("masks", "granularity"),
    [
        ({}, "rows_columns"),
        ({"granularity": "units"}, "units"),
        ({"granularity": "element"}, "element"),
        ({"columns": "frozen"}, "rows"),
    ],
)
@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_modules_are_saturated_that_train_as_many_numbers_as_they_reach(masks, granularity, rank, share):
    options = {"r": rank, "target_modules": TARGETS, "modules_to_save": ["head"], "sparsity": share}
    model = get_peft_model(Model(), PartialLoraConfig(**options, **masks))
    literal = {name for name, (trained, block) in reached(model).items() if trained >= block}
    assert counted(model)["saturated_modules"] == len(literal)
    predicted = set(saturated(SHAPES, rank, share, granularity))
    # Rows and columns of single entries are random, so that fewer may be touched than there are entries.
    assert predicted <= literal if granularity == "element" and share else predicted == literal


def test_measured_counts_only_what_trains():
    model = adapted()
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    assert counted(model)["adapter_trainable"] == 2 * 3 * (30 + 10)


def test_a_second_adapter_is_neither_base_nor_counted():
    model = adapted(target_modules=["qkv"])
    before = counted(model)
    model.add_adapter("other", LoraConfig(r=5, target_modules=TARGETS, modules_to_save=["head"]))
    assert counted(model) == before


def test_a_stray_trainable_parameter_is_named():
    model = adapted()
    model.get_base_model().patch.proj.bias.requires_grad_(True)
    with pytest.raises(PartialLoraError, match=r"patch\.proj\.bias"):
        counted(model)


def test_a_head_that_is_not_there_is_named():
    with pytest.raises(PartialLoraError, match=r"model\.head=classifier"):
        skeleton_of(Model()).targets(TARGETS, "classifier")


def test_the_table_has_the_numbers_within_80_columns():
    masked = size.describe(skeleton_of(Model()), target_modules=TARGETS, head="head", rank=3, sparsity=0.87)
    probe = cost.describe_adapted(adapted(target_modules=DUMMY_TARGET_MODULES), "head", dense=0)
    for info in (masked, probe):
        console = Console(file=io.StringIO(), width=80)
        console.print(size.table(info))
        lines = console.file.getvalue().splitlines()
        assert f"{info['base']:,}" in lines[0]
        assert f"{info['adapter_dense']:,}" in lines[2]
        assert (len(lines), max(map(len, lines)) <= 80) == (10, True)  # no row wraps
        console.print(size.table(info, masked=False))
        assert len(console.file.getvalue().splitlines()) == 10 + 9  # there is no compact file


# Memory of a training step

GEOMETRY = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 4, "vocab_size": 300}
BATCH, LENGTH, RANK = 3, 24, 4


def model_args(name: str) -> dict:
    return settings(name)["model_args"] | GEOMETRY


def bare(name: str, args: dict) -> Skeleton:
    """The skeleton of a causal model."""
    return skeleton(family="causal", architecture=settings(name)["architecture"], model_args=args, outputs=2)


def described(name: str, sparsity: float, targets: list[str] | None = None) -> tuple[Skeleton, dict, dict]:
    """The model's skeleton, the shapes of its targets and its counts."""
    model = bare(name, model_args(name))
    adapted = {"target_modules": targets or settings(name)["target_modules"], "head": None}
    shapes = model.targets(**adapted)
    return model, shapes, size.describe(model, **adapted, rank=RANK, sparsity=sparsity)


def held(model: nn.Module) -> int:
    """Bytes of all weights, and of all that a quantised one is read by."""
    total = 0
    for parameter in model.parameters():
        total += parameter.numel() * parameter.element_size()
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            total += sum(each.numel() * each.element_size() for each in (state.absmax, state.code))
        scales = getattr(parameter, "SCB", None)
        if scales is not None:
            total += scales.numel() * scales.element_size()
    return total


@pytest.mark.parametrize(
    ("name", "dtype", "quantization"),
    [
        ("tiny_llama", "float32", None),
        ("tiny_llama", "bfloat16", "nf4"),
        ("tiny_llama", "bfloat16", "int8"),
        ("tiny_qwen", "bfloat16", None),
        ("tiny_qwen", "float32", "nf4"),
    ],
)
def test_frozen_weights_take_the_bytes_that_are_counted(name, dtype, quantization):
    model = load(name, model_args=model_args(name), dtype=dtype, quantization=quantization)
    assert peak.weight_bytes(bare(name, model_args(name)), dtype, quantization) == held(model)


def kept(
    name: str, sparsity: float, dtype: str, quantization: str | None, targets: list[str], checkpoints: bool
) -> int:
    """Bytes of what autograd keeps of a step, each piece of memory once, without the model itself."""
    base = load(name, model_args=model_args(name), dtype=dtype, quantization=quantization)
    config = PartialLoraConfig(r=RANK, target_modules=targets, sparsity=sparsity, mask_seed=0)
    model = get_peft_model(base, config).train()
    if checkpoints:
        models.enable_gradient_checkpointing(model)
    own = {each.untyped_storage().data_ptr() for each in [*model.parameters(), *model.buffers()]}
    pieces: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            pieces[storage.data_ptr()] = storage.nbytes()
        return tensor

    words = torch.randint(4, 260, (BATCH, LENGTH), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(words)
    mask[0, 10:] = 0
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = model(input_ids=words, attention_mask=mask, labels=words, use_cache=False).loss
    for tensor in unseen(loss):
        pack(tensor)
    return sum(pieces.values())


def unseen(loss: torch.Tensor) -> Iterator[torch.Tensor]:
    """What bitsandbytes' functions keep by themselves, past autograd."""
    seen, left = set(), [loss.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        left += [function for function, _ in node.next_functions]
        kept = (getattr(node, "A", None), *getattr(node, "tensors", ()))  # of MatMul8bitFp; of MatMul8bitLt
        yield from (each for each in kept if each is not None)


CASES = [
    ("tiny_llama", 0.0, "float32", None, False),
    ("tiny_llama", 0.87, "bfloat16", None, True),
    ("tiny_llama", 0.3, "bfloat16", None, False),
    ("tiny_llama", 0.87, "bfloat16", "nf4", True),
    ("tiny_llama", 0.87, "bfloat16", "int8", True),
    ("tiny_llama", 0.0, "float32", "int8", False),
    ("tiny_llama", 0.0, "bfloat16", "nf4", False),
    ("tiny_qwen", 0.87, "bfloat16", None, False),
]


@pytest.mark.parametrize(("name", "sparsity", "dtype", "quantization", "few"), CASES)
def test_activations_are_within_a_twentieth_of_what_autograd_keeps(name, sparsity, dtype, quantization, few):
    targets = ["q_proj", "v_proj"] if few else settings(name)["target_modules"]
    model, shapes, counts = described(name, sparsity, targets)
    found = peak.activations(
        model,
        shapes,
        rank=RANK,
        density=counts["adapter_trainable"] / counts["adapter_dense"],
        size=getattr(torch, dtype).itemsize,
        quantization=quantization,
        batch_size=BATCH,
        length=LENGTH,
    )
    plain, checkpointed = (kept(name, sparsity, dtype, quantization, targets, checkpoints=c) for c in (False, True))
    assert found.blocks * found.block + found.after == pytest.approx(plain, rel=0.05)
    assert found.blocks * found.entering + found.after == pytest.approx(checkpointed, rel=0.05)


def estimate(name: str, *, sparsity: float = 0.87, **changes: object) -> dict:
    model = bare(name, settings(name)["model_args"])
    adapted = {"target_modules": settings(name)["target_modules"], "head": None}
    shapes = model.targets(**adapted)
    counts = size.describe(model, **adapted, rank=16, sparsity=sparsity)
    asked = {"shapes": shapes, "counts": counts, "rank": 16, "batch_size": 4, "length": 512}
    asked |= {"dtype": "bfloat16", "quantization": None}
    return peak.peak_memory(model, **(asked | changes))


def test_peak_is_the_sum_of_its_parts_and_counts_each_once():
    found = estimate("llama2_7b")
    counted = ("weights", "adapter", "gradients", "optimizer")
    assert found["peak"] == sum(found[key] for key in (*counted, "activations"))
    assert found["peak_checkpointed"] == sum(found[key] for key in (*counted, "activations_checkpointed"))
    assert found["weights"] == 2 * 6_738_415_616
    assert found["gradients"] == found["adapter"]
    assert found["optimizer"] == 2 * found["adapter"]
    assert found["activations_checkpointed"] < found["activations"] / 5
    quantised = estimate("llama2_7b", quantization="nf4")
    linears = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    rest = 6_738_415_616 - linears
    assert quantised["weights"] == 2 * rest + linears // 2 + 4 * (linears // 64) + 32 * 7 * 64
    whole = 2 * 4096 * 11008  # the largest matrix, while a product is computed
    assert quantised["peak"] == sum(quantised[key] for key in (*counted, "activations")) + whole
    assert estimate("llama2_7b", quantization="int8")["weights"] > quantised["weights"]


def test_checkpoints_of_a_model_with_few_words_peak_inside_a_block():
    """Where log-probabilities are small, the most is kept when a block has been computed again."""
    model, shapes, _ = described("tiny_llama", 0.0)
    one = {"rank": RANK, "density": 1.0, "size": 4, "quantization": None, "batch_size": 1, "length": 10}
    found = peak.activations(model, shapes, **one)
    assert found.block > found.after + found.gradient
    assert found.peak_checkpointed == found.blocks * found.entering + found.block + found.logits
    words = dataclasses.replace(model, config={**model.config, "vocab_size": 10**5})
    many = peak.activations(words, shapes, **one)
    assert many.peak_checkpointed == many.blocks * many.entering + many.after + many.logits + many.gradient


def test_modules_whose_weight_is_read_without_a_call_are_found() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.called, self.read = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.linear(self.called(x), self.read.weight, self.read.bias)

    for config in (
        PartialLoraConfig(r=2, target_modules=["called", "read"], sparsity=0.5),
        LoraConfig(target_modules="all-linear"),
    ):
        model = get_peft_model(Reads(), config)
        unreached = cost.Unreached(model)
        unreached.on_pre_optimizer_step(None, None, None)
        assert unreached.names == []  # no gradient is here to be seen: DeepSpeed keeps them elsewhere
        model(torch.ones(3, 6)).sum().backward()
        unreached.on_pre_optimizer_step(None, None, None)
        assert unreached.names == ["read"]
