"""Masked adapters under torch.compile, torch.export and function transforms: the results of eager PyTorch."""

from __future__ import annotations

import shutil

import pytest
import torch
from adapter_models import (
    KINDS,
    MIXED,
    adapt,
    dense_twin,
    fill,
    gpt2,
    layers,
    llama,
    loss_of,
    timm_convnext,
    timm_images,
    timm_vit,
    tokens,
)
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from partial_lora.adapter import PartialLoraConfig
from partial_lora.adapter.factor import FactorA, FactorB
from partial_lora.masks import Mask

GRANULARITIES = ["rows_columns", "element"]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


def gradients(model, batch):
    model.zero_grad()
    loss_of(model, batch).backward()
    return {
        name.replace("_orig_mod.", ""): p.grad.clone() for name, p in model.named_parameters() if p.grad is not None
    }


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)


def inputs(base, seed=0):
    """A batch without labels: GPT-2's own loss breaks the graph, with or without an adapter."""
    batch = KINDS_BY_BASE[base].batch(seed)
    batch.pop("labels", None)
    return batch


KINDS_BY_BASE = {kind.build: kind for kind in KINDS.values()}


@pytest.mark.parametrize(
    ("base", "granularity"),
    [(base, granularity) for base in (llama, timm_convnext) for granularity in GRANULARITIES]
    + [(gpt2, "rows_columns")],
)
def test_one_graph_computes_what_eager_does(base, granularity):
    model = fill(adapt(base, sparsity=0.8, granularity=granularity))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # fullgraph: a break raises

    def outputs(adapted, seed):
        output = adapted(**inputs(base, seed))
        return output if torch.is_tensor(output) else output.logits

    model.train()
    found = {}
    for adapted in (model, compiled):
        model.zero_grad()
        output = outputs(adapted, 0)
        output.square().sum().backward()
        found[adapted] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        found[adapted]["output"] = output.detach()
    assert_close(found[compiled], found[model])
    assert len(found[model]) > 2 * len(layers(model))
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(outputs(compiled, 1), outputs(model, 1), rtol=1e-5, atol=1e-5)


def test_dropout_is_compiled_into_the_graph():
    model = fill(adapt(llama, sparsity=0.8, lora_dropout=0.3)).train()
    for layer in layers(model).values():  # eager draws in the compiled order where base and adapter run apart
        layer.get_base_layer().register_forward_hook(lambda *_: None)
    torch.manual_seed(5)
    expected = gradients(model, tokens())
    for layer in layers(model).values():
        layer.get_base_layer()._forward_hooks.clear()
    torch.manual_seed(5)
    compiled = gradients(torch.compile(model, fullgraph=True, backend="aot_eager"), tokens())
    assert_close(compiled, expected)


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_inductor_computes_what_eager_does():
    block = fill(adapt(timm_vit, sparsity=MIXED)).get_base_model().blocks[0]  # the rest is more of the same to compile
    x = torch.randn(2, 16, 32)
    found = []
    for way in (block, torch.compile(block, fullgraph=True)):
        block.zero_grad()
        output = way(x)
        output.square().sum().backward()
        found.append({"output": output, **{n: p.grad for n, p in block.named_parameters() if p.grad is not None}})
    assert len(found[0]) == 9
    assert_close(found[1], found[0])


def batch_of(length):
    generator = torch.Generator().manual_seed(length)
    return {"input_ids": torch.randint(0, 50, (2, length), generator=generator)}


def counted(model):
    counter = CompileCounterWithBackend("eager")
    return torch.compile(model, fullgraph=True, backend=counter), counter


def test_other_sequence_lengths_are_compiled_once():
    model = fill(adapt(llama, sparsity=0.8)).eval()
    compiled, counter = counted(model)
    for length in (7, 9, 12, 15):
        torch.testing.assert_close(compiled(**batch_of(length)).logits, model(**batch_of(length)).logits)
    assert counter.frame_count == 2  # for one length, and for all


def test_switching_adapters_compiles_no_more_than_plain_lora():
    model = adapt(llama, sparsity=0.8)
    targets = KINDS["llama"].targets
    model.add_adapter("b", PartialLoraConfig(r=2, lora_alpha=4, target_modules=targets, sparsity=0.5, mask_seed=3))
    fill(model)
    counts = []
    for adapted in (model, dense_twin(model, llama)):
        torch._dynamo.reset()
        adapted.eval()
        compiled, counter = counted(adapted)
        seen = []

        def same(compiled=compiled, adapted=adapted, seen=seen):
            seen.append(compiled(**batch_of(8)).logits.detach())
            torch.testing.assert_close(seen[-1], adapted(**batch_of(8)).logits, rtol=1e-5, atol=1e-5)

        for active in ("default", "b", "default", ["default", "b"]):
            adapted.base_model.set_adapter(active)
            same()
        with adapted.disable_adapter():
            same()
        assert torch.equal(seen[0], seen[2])
        assert not any(torch.allclose(seen[0], other) for other in (seen[1], seen[3], seen[4]))
        counts.append(counter.frame_count)
    assert counts[0] <= counts[1]


@pytest.mark.parametrize("element", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
def test_factors_of_convolutions_take_the_same_way_compiled(groups, element):
    torch.manual_seed(0)
    a, b = nn.Conv2d(6, 4, 3, bias=False), nn.Conv2d(4, 6, 1, groups=groups, bias=False)  # as PEFT builds them
    sizes = (b.weight.numel(), a.weight.numel()) if element else (6, 6)
    rows, columns = (
        Mask.random(size, 0.5, mask_seed=0, module="m", axis=axis)
        for size, axis in zip(sizes, ("rows", "columns"), strict=True)
    )
    low, high = FactorA(a, columns, element=element), FactorB(b, rows, element=element)
    x = torch.randn(2, 6, 8, 8)

    def change(x):
        return high.add_to(torch.zeros(2, 6, 6, 6), low.project(x, nn.Identity()), 0.5)

    expected = F.conv2d(F.conv2d(x, low.weight), high.weight, groups=groups) * 0.5
    torch.testing.assert_close(change(x), expected)
    torch.testing.assert_close(torch.compile(change, fullgraph=True, backend="eager")(x), change(x))


def test_exported_for_any_batch():
    model = fill(adapt(timm_vit, sparsity=MIXED)).eval()
    batch = torch.export.Dim("batch")
    exported = torch.export.export(model.get_base_model(), (timm_images(1)["x"],), dynamic_shapes=({0: batch},))
    few = timm_images(2)["x"][:5]
    torch.testing.assert_close(exported.module()(few), model(few), rtol=1e-5, atol=1e-5)


def test_traced_for_torchscript():
    model = fill(adapt(timm_vit, sparsity=MIXED)).eval()
    traced = torch.jit.trace(model.get_base_model(), timm_images(1)["x"], check_trace=False)
    torch.testing.assert_close(traced(timm_images(2)["x"]), model(timm_images(2)["x"]))


def test_functional_call_takes_other_kept_entries():
    model = fill(adapt(timm_vit, sparsity=MIXED)).eval()
    other = fill(adapt(timm_vit, sparsity=MIXED, seed=3), seed=4).eval()
    x = timm_images(1)["x"]
    torch.testing.assert_close(functional_call(model, dict(other.named_parameters()), (x,)), other(x))


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_gradients_of_single_examples_average_to_that_of_the_batch(granularity):
    model = fill(adapt(timm_vit, sparsity=MIXED, granularity=granularity)).eval()
    x, y = timm_images(1)["x"], torch.arange(8) % 4
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    F.cross_entropy(model(x), y).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    def loss(some, image, label):
        return F.cross_entropy(functional_call(model, {**parameters, **some}, (image[None],)), label[None])

    each = vmap(grad(loss), (None, 0, 0))({name: parameters[name] for name in expected}, x, y)
    assert_close({name: gradient.mean(0) for name, gradient in each.items()}, expected)


class Recorded(TorchDispatchMode):
    """The names of the operations that ran inside."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_training_step_never_waits_for_a_value(granularity):
    # What reads a value on the host, or has a size that depends on values, could not be recorded as a CUDA graph.
    model = fill(adapt(timm_vit, sparsity=MIXED, granularity=granularity, lora_dropout=0.1)).train()
    with Recorded() as ran:
        loss_of(model, timm_images()).backward()
    waits = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero", "repeat_interleave"}
    assert not ran.names & waits
    assert ran.names & {"index_select", "index_copy"}
