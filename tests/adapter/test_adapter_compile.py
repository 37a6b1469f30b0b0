"""Masked adapters under torch.compile, torch.export and function transforms: the results of eager PyTorch."""

from __future__ import annotations

import pytest
import torch
from adapter_models import MIXED, adapt, dense_twin, fill, layers, loss_of, timm_images, timm_vit
from peft import PeftModel, get_peft_model
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.pytorch_utils import Conv1D

from partial_lora.adapter import PartialLoraConfig

granularities = pytest.mark.parametrize("granularity", ["rows_columns", "element", "groups"])
TARGETS = ["linear", "transposed", "convolution", "grouped"]


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()


class Net(nn.Module):
    """One layer of each kind that a factor runs in."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.transposed = nn.Linear(12, 16), Conv1D(16, 16)
        nn.init.normal_(self.transposed.weight, std=0.3)
        self.convolution, self.grouped = nn.Conv1d(16, 8, 3, padding=1), nn.Conv1d(8, 8, 1, groups=2)

    def forward(self, x):
        x = self.transposed(torch.tanh(self.linear(x)))
        return self.grouped(torch.tanh(self.convolution(x.transpose(1, 2))))


def config(**settings):
    # One row of sixteen is so little that it is scattered, some modules gather, the others do neither.
    sparsity = {"linear": {"rows": 0.95, "columns": 0.6}, "grouped": 0.25, ".*": {"rows": 0.3, "columns": 0.8}}
    return PartialLoraConfig(**{"r": 8, "target_modules": TARGETS, "sparsity": sparsity, **settings})


def adapted(**settings):
    torch.manual_seed(1)
    return fill(get_peft_model(Net(), config(**settings)))


def batch(length=5, seed=0):
    return torch.randn(2, length, 12, generator=torch.Generator().manual_seed(seed))


def outputs_and_gradients(model, forward):
    model.zero_grad()
    output = forward(batch())
    output.square().sum().backward()
    return {"output": output.detach(), **{n: p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}}


def assert_close(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)


@granularities
def test_one_graph_computes_what_eager_does(granularity):
    model = adapted(granularity=granularity)
    torch.testing.assert_close(model(batch()), dense_twin(model, Net)(batch()))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")  # fullgraph: a break raises
    expected = outputs_and_gradients(model.train(), model)
    assert len(expected) == 1 + 2 * len(TARGETS)
    assert_close(outputs_and_gradients(model, compiled), expected)


def test_dropout_is_compiled_into_the_graph():
    model = adapted(lora_dropout=0.3).train()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    hooks = [layer.get_base_layer().register_forward_hook(lambda *_: None) for layer in layers(model).values()]
    torch.manual_seed(5)
    expected = outputs_and_gradients(model, model)  # hooks keep base and adapter apart, as in the graph
    for hook in hooks:
        hook.remove()
    torch.manual_seed(5)
    assert_close(outputs_and_gradients(model, compiled), expected)


def counted(model):
    counter = CompileCounterWithBackend("eager")
    return torch.compile(model, fullgraph=True, backend=counter), counter


def test_inputs_of_all_other_lengths_are_one_graph():
    model = adapted().eval()
    compiled, counter = counted(model)
    for length in (7, 9, 12):
        torch.testing.assert_close(compiled(batch(length)), model(batch(length)), rtol=1e-5, atol=1e-5)
    assert counter.frame_count == 2  # for one length, and for all


def test_switching_adapters_compiles_no_more_than_plain_lora():
    linear = {"target_modules": ["linear"]}
    model = adapted(sparsity=0.7, **linear)
    model.add_adapter("b", config(sparsity=0.5, mask_seed=3, **linear))
    fill(model, seed=3, adapter_name="b")
    counts = []
    for each in (model, dense_twin(model, Net)):
        torch._dynamo.reset()
        compiled, counter = counted(each.eval())
        seen = []
        for active in ("default", "b", "default", ["default", "b"]):
            each.base_model.set_adapter(active)
            seen.append((compiled(batch()).detach(), each(batch())))
        with each.disable_adapter():
            seen.append((compiled(batch()).detach(), each(batch())))
        for found, expected in seen:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(seen[0][0], seen[2][0])
        assert not any(torch.allclose(seen[0][0], seen[other][0]) for other in (1, 3, 4))
        counts.append(counter.frame_count)
    assert counts[0] <= counts[1]


def test_exported_for_any_batch():
    model = fill(adapt(timm_vit, sparsity=MIXED)).eval()
    exported = torch.export.export(
        model.get_base_model(), (timm_images(1)["x"],), dynamic_shapes=({0: torch.export.Dim("batch")},)
    )
    few = timm_images(2)["x"][:5]
    torch.testing.assert_close(exported.module()(few), model(few), rtol=1e-5, atol=1e-5)


def test_traced_for_torchscript(tmp_path):
    model = fill(adapt(timm_vit, sparsity=MIXED)).eval()
    torch.jit.trace(model.get_base_model(), timm_images(1)["x"], check_trace=False).save(tmp_path / "traced.pt")
    traced = torch.jit.load(tmp_path / "traced.pt")
    torch.testing.assert_close(traced(timm_images(2)["x"]), model(timm_images(2)["x"]))


@granularities
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


@granularities
def test_a_training_step_never_waits_for_a_value(granularity):
    # What reads a value on the host, or has a size that depends on values, could not be recorded as a CUDA graph.
    model = fill(adapt(timm_vit, sparsity=MIXED, granularity=granularity, lora_dropout=0.1)).train()
    with Recorded() as ran:
        loss_of(model, timm_images()).backward()
    waits = {"_local_scalar_dense", "nonzero", "masked_select", "_unique2", "equal", "is_nonzero", "repeat_interleave"}
    assert not ran.names & waits
    assert ran.names & {"index_select", "index_copy"}


class Wrapped(nn.Module):
    """A model of a name that PEFT gives its own: what is saved must not be taken for that."""

    def __init__(self):
        super().__init__()
        self.base_model = nn.ModuleDict({"model": Net()})

    def forward(self, x):
        return self.base_model["model"](x)


def in_part():
    return nn.Sequential(torch.compile(Net(), backend="eager"))


def as_a_whole():
    return torch.compile(Net(), backend="eager")


@pytest.mark.parametrize("build", [Wrapped, in_part, as_a_whole])
@pytest.mark.parametrize("settings", [{}, {"rank_pattern": {"linear": 2, "transposed": 2, "convolution": 4}}])
def test_a_saved_scaling_finds_its_modules_whatever_their_names(tmp_path, build, settings):
    model = fill(get_peft_model(build(), config(**settings))).eval()
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(build(), tmp_path).eval()
    masked = get_peft_model(build(), PartialLoraConfig.from_pretrained(tmp_path)).eval()
    masked.load_adapter(tmp_path, "default")
    for loaded in (plain, masked):
        torch.testing.assert_close(loaded(batch()), model(batch()), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(model(batch()), build()(batch()), atol=1e-2)


def test_calling_with_its_own_state_leaves_a_model_to_its_optimizer():
    model = adapted()
    before = dict(model.named_parameters())
    expected = model(batch())
    torch.testing.assert_close(functional_call(model, dict(model.state_dict()), (batch(),)), expected)
    assert all(parameter is before[name] for name, parameter in model.named_parameters())


@pytest.mark.parametrize(
    "settings",
    [{"granularity": each} for each in ("rows_columns", "element", "groups")]
    + [{"granularity": each, "columns": "frozen"} for each in ("rows_columns", "element")],
)
@pytest.mark.parametrize("sparsity", [0.5, {"rows": 0.5, "columns": 0.0}])
def test_a_convolution_takes_one_example_without_a_batch(settings, sparsity):
    model = nn.Sequential(nn.Conv1d(16, 8, 3, padding=1))
    settings = {**settings, "sparsity": {"0": sparsity}}
    model = fill(get_peft_model(model, PartialLoraConfig(r=4, target_modules=["0"], **settings)))
    x = torch.randn(16, 20, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(x), model(x[None])[0])
