"""What training needs, estimated from shapes, against the bytes that real tiny models hold and keep."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from configured import load, settings
from peft import get_peft_model
from torch import nn

from partial_lora import models
from partial_lora.adapter import PartialLoraConfig
from partial_lora.errors import PartialLoraError
from partial_lora.training import cost

GEOMETRY = {"hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 4, "vocab_size": 300}
BATCH, LENGTH, RANK = 3, 24, 4


def model_args(name: str) -> dict:
    return settings(name)["model_args"] | GEOMETRY


def described(name: str, sparsity: float, targets: list[str] | None = None) -> tuple[nn.Module, dict, dict]:
    """The model's outline, the shapes of its targets and its counts."""
    chosen = settings(name)
    model = models.empty(family="causal", architecture=chosen["architecture"], model_args=model_args(name))
    adapted = {"target_modules": targets or chosen["target_modules"], "head": None}
    shapes = cost.target_shapes(model, **adapted)
    return model, shapes, cost.describe(model, **adapted, rank=RANK, sparsity=sparsity)


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


@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen"])
def test_frozen_weights_take_the_bytes_that_are_counted(name, dtype, quantization):
    model = load(name, model_args=model_args(name), dtype=dtype, quantization=quantization)
    outline = models.empty(family="causal", architecture=settings(name)["architecture"], model_args=model_args(name))
    assert cost.weight_bytes(outline, dtype, quantization) == held(model)


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
    ("tiny_llama", 0.0, "float32", None),
    ("tiny_llama", 0.0, "bfloat16", None),
    ("tiny_llama", 0.87, "float32", None),
    ("tiny_llama", 0.87, "bfloat16", None),
    ("tiny_llama", 0.3, "bfloat16", None),
    ("tiny_llama", 0.87, "bfloat16", "nf4"),
    ("tiny_llama", 0.87, "bfloat16", "int8"),
    ("tiny_llama", 0.0, "float32", "int8"),
    ("tiny_llama", 0.0, "bfloat16", "nf4"),
    ("tiny_qwen", 0.87, "bfloat16", None),
]


@pytest.mark.parametrize("few", [False, True], ids=["all", "two"])
@pytest.mark.parametrize(("name", "sparsity", "dtype", "quantization"), CASES)
def test_activations_are_within_a_twentieth_of_what_autograd_keeps(name, sparsity, dtype, quantization, few):
    targets = ["q_proj", "v_proj"] if few else settings(name)["target_modules"]
    model, shapes, counts = described(name, sparsity, targets)
    found = cost.activations(
        model.config,
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


def estimate(name: str, *, outline: nn.Module | None = None, sparsity: float = 0.87, **changes: object) -> dict:
    chosen = settings(name)
    model = outline or models.empty(**{key: chosen[key] for key in ("family", "architecture", "model_args")})
    adapted = {"target_modules": chosen["target_modules"], "head": None}
    shapes = cost.target_shapes(model, **adapted)
    counts = cost.describe(model, **adapted, rank=16, sparsity=sparsity)
    asked = {"shapes": shapes, "counts": counts, "rank": 16, "batch_size": 4, "length": 512}
    return cost.peak_memory(model, **(asked | changes))


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


def test_dense_adapters_keep_more_and_longer_batches_in_proportion():
    partial, dense = estimate("llama3_1_8b"), estimate("llama3_1_8b", sparsity=0.0)
    assert partial["activations"] < dense["activations"]
    assert partial["peak"] < dense["peak"]
    assert estimate("llama3_1_8b", batch_size=8)["activations"] == pytest.approx(2 * partial["activations"], rel=1e-6)
    assert estimate("llama3_1_8b", length=1024)["activations"] == pytest.approx(2 * partial["activations"], rel=1e-6)


def test_checkpoints_of_a_model_with_few_words_peak_inside_a_block():
    """Where log-probabilities are small, the most is kept when a block has been computed again."""
    outline, shapes, _ = described("tiny_llama", 0.0)
    one = {"rank": RANK, "density": 1.0, "size": 4, "quantization": None, "batch_size": 1, "length": 10}
    found = cost.activations(outline.config, shapes, **one)
    assert found.block > found.after + found.gradient
    assert found.peak_checkpointed == found.blocks * found.entering + found.block + found.logits
    many = cost.activations(
        outline.config.__class__(**(outline.config.to_dict() | {"vocab_size": 10**5})), shapes, **one
    )
    assert many.peak_checkpointed == many.blocks * many.entering + many.after + many.logits + many.gradient


def test_model_of_another_kind_is_refused_in_one_line():
    outline = models.empty(architecture="vit_tiny_patch16_224", num_labels=2)
    with pytest.raises(PartialLoraError, match=r"memory of its activations is not known") as caught:
        cost.activations(outline.config, {}, rank=4, density=1.0, size=4, quantization=None, batch_size=1, length=1)
    assert "\n" not in str(caught.value)
