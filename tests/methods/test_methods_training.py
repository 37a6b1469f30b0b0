"""What methods add to training: a penalty on the loss, an optimizer of their own, an allocator that is called."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import peft
import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from configured import inputs
from method_settings import adapted
from peft.optimizers import create_lorafa_optimizer
from peft.tuners.adalora.layer import AdaLoraLayer, RankAllocator
from transformers import TrainerControl, TrainerState

from partial_lora import methods
from partial_lora.errors import PartialLoraError
from partial_lora.methods.controls import PaddedEntries
from partial_lora.methods.peft import Allocate, orthogonality_penalty
from partial_lora.methods.setting import Training
from partial_lora.training.cost import Cost, optimizer_bytes


def test_a_penalty_is_shared_by_the_parts_of_a_step_and_left_out_of_evaluation() -> None:
    weight = torch.nn.Parameter(torch.tensor([3.0]))
    aids = Training(penalty=lambda: weight.square().sum())
    loss = aids.loss(lambda outputs, labels: outputs.sum() * labels, parts=2)
    assert loss(weight * 2, labels=1.0).item() == 6 + 9 / 2
    with torch.no_grad():
        assert loss(weight * 2, labels=1.0).item() == 6
    plain = Training()
    given = print
    assert plain.loss(given) is given


@pytest.mark.parametrize("method", ["partial", "lora", "full", "dora"])
def test_most_methods_add_nothing(method: str) -> None:
    aids = methods.training(method, adapted(method, "tiny_vit")[0])
    assert (aids.callbacks, aids.penalty, aids.final_after(10), aids.summary()) == ((), None, 0, {})


def test_what_needs_whole_parameters_is_refused_where_they_are_shared_out() -> None:
    model, _ = adapted("adalora", "tiny_vit")
    with pytest.raises(PartialLoraError, match=r"trainer\.strategy=fsdp: method=adalora needs whole parameters"):
        methods.training("adalora", model, sharded=True)
    assert methods.training("lora", model, sharded=True).callbacks == ()


def test_the_penalty_is_the_one_of_peft() -> None:
    model, _ = adapted("adalora", "tiny_vit")
    outputs = model.base_model.forward(**inputs("tiny_vit"), labels=torch.tensor([0, 1, 2, 0]))
    plain = torch.nn.functional.cross_entropy(outputs.logits, torch.tensor([0, 1, 2, 0]))
    torch.testing.assert_close(outputs.loss - plain, orthogonality_penalty(model))


def steps_of_adalora(model, count: int, total: int, *, start: int = 0, optimizer=None):
    """Train as Trainer does, with the allocator's callback."""
    callback, state, control = Allocate(model), TrainerState(max_steps=total, global_step=start), TrainerControl()
    trains = [each for each in model.parameters() if each.requires_grad]
    optimizer = optimizer or torch.optim.AdamW(trains, lr=0.05)
    callback.on_train_begin(None, state, control)
    for step in range(start, start + count):
        state.global_step = step
        batch = inputs("tiny_vit", seed=step)
        callback.on_step_begin(None, state, control)
        loss, scaler = model(**batch).logits.square().sum(), getattr(optimizer, "scaler", None)
        (loss if scaler is None else scaler.scale(loss)).backward()
        optimizer.step()
        callback.on_optimizer_step(None, state, control, optimizer=optimizer)
        optimizer.zero_grad()
    return optimizer


def scaled(model) -> AcceleratedOptimizer:
    """AdamW behind a gradient scaler, as Trainer has it in fp16."""
    Accelerator(cpu=True)
    trains = [each for each in model.parameters() if each.requires_grad]
    return AcceleratedOptimizer(torch.optim.AdamW(trains, lr=0.05), scaler=torch.amp.GradScaler("cpu", init_scale=2.0))


def overflowing(model, steps: set[int]) -> None:
    """Have the gradients of these steps be none that fp16 can hold."""
    passes = iter(range(100))
    weight = next(each for name, each in model.named_parameters() if ".lora_A." in name)

    def grown(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("inf") if next(passes) in steps else gradient

    weight.register_hook(grown)


@pytest.mark.parametrize("skipped", [{0}, {0, 1, 4}, {7}, {6, 7, 8}])
def test_a_step_that_the_scaler_skips_tells_the_allocator_nothing(skipped: set[int]) -> None:
    model, _ = adapted("adalora", "tiny_vit")
    overflowing(model, skipped)
    optimizer = steps_of_adalora(model, 10, 10, optimizer=scaled(model))
    held = [each for state in optimizer.state.values() for each in state.values()]
    assert all(torch.isfinite(each).all() for each in [*held, *values(model).values()])
    assert all(state["step"] == 10 - len(skipped) for state in optimizer.state.values())
    said = methods.training("adalora", model).summary()
    assert 0 < said["ranks"] <= said["target_ranks"]


def test_without_one_finite_gradient_there_are_no_ranks_to_choose() -> None:
    model, _ = adapted("adalora", "tiny_vit")
    overflowing(model, set(range(10)))
    with pytest.raises(PartialLoraError, match=r"method=adalora: none of the first 8 steps had finite gradients.*=no"):
        steps_of_adalora(model, 10, 10, optimizer=scaled(model))


def values(model) -> dict[str, torch.Tensor]:
    return {name: each.detach().clone() for name, each in model.named_parameters() if each.requires_grad}


def test_the_allocator_is_called_at_every_step_and_ends_at_the_budget(monkeypatch) -> None:
    called = []
    real = RankAllocator.update_and_allocate
    monkeypatch.setattr(
        RankAllocator,
        "update_and_allocate",
        lambda self, model, step, **more: called.append(step) or real(self, model, step, **more),
    )
    model, setting = adapted("adalora", "tiny_vit")
    steps_of_adalora(model, 10, 10)
    assert called == list(range(8))  # of the last three steps the first chooses, and the others keep to that
    said = methods.training("adalora", model).summary()
    layers = [layer for layer in model.modules() if isinstance(layer, AdaLoraLayer)]
    assert said["target_ranks"] == len(layers) * setting.rank
    assert said["ranks"] <= said["target_ranks"] < sum(len(layer.lora_E["default"]) for layer in layers)
    assert model.peft_config["default"].rank_pattern is None
    # alpha / rank of a rank that is left, whatever the rank it started with
    assert {layer.scaling["default"] / layer.ranknum["default"].item() for layer in layers} == {8.0 / 4}
    with pytest.raises(PartialLoraError, match="method=adalora: expected at least 4 optimizer steps, got 3"):
        steps_of_adalora(model, 1, 3)


@pytest.mark.parametrize("stop", [3, 7, 8])
def test_an_allocator_goes_on_from_the_state_of_the_optimizer(stop: int) -> None:
    whole, _ = adapted("adalora", "tiny_vit")
    steps_of_adalora(whole, 10, 10)
    first, _ = adapted("adalora", "tiny_vit")
    before = steps_of_adalora(first, stop, 10)
    again, _ = adapted("adalora", "tiny_vit")
    again.load_state_dict(first.state_dict())
    optimizer = torch.optim.AdamW([each for each in again.parameters() if each.requires_grad], lr=0.05)
    optimizer.load_state_dict(before.state_dict())
    steps_of_adalora(again, 10 - stop, 10, start=stop, optimizer=optimizer)
    expected, found = values(whole), values(again)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_lorafa_steps_as_the_optimizer_of_peft_does_but_in_full_precision(monkeypatch) -> None:
    monkeypatch.setattr(peft.optimizers.lorafa, "is_bf16_available", lambda: False)
    model, setting = adapted("lorafa", "tiny_vit")
    twin = copy.deepcopy(model.double())  # a gradient near zero would make of the last digits another step of Adam
    (project,) = methods.training("lorafa", model).callbacks
    project.on_train_begin(None, None, None)
    own = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.01, eps=0, weight_decay=0)
    literal = create_lorafa_optimizer(twin, r=setting.rank, lora_alpha=setting.alpha, lr=0.01)
    literal.param_groups[0]["eps"] = 0
    start = {name: each.detach().clone() for name, each in model.named_parameters()}
    for step in range(3):
        for each, optimizer in ((model, own), (twin, literal)):
            batch = {name: values.double() for name, values in inputs("tiny_vit", seed=step).items()}
            each(**batch).logits.square().sum().backward()
            if optimizer is own:
                project.on_pre_optimizer_step(None, None, None)
            optimizer.step()
            optimizer.zero_grad()
    expected, found = dict(twin.named_parameters()), dict(model.named_parameters())
    moved = {name for name in found if not torch.equal(found[name], start[name])}
    assert moved == {name for name in found if ".lora_B." in name or "modules_to_save" in name}
    for name in moved:
        torch.testing.assert_close(found[name], expected[name])
    rows = sum(setting.rank * m for m, _ in setting.shapes.values())
    assert optimizer_bytes(own) == 2 * 8 * (rows + 32 * 3 + 3) + 4 * len(moved)


def test_full_keeps_tied_weights_tied_and_one_model_in_memory() -> None:
    model, _ = adapted("full", "tiny_llama")
    base = model.get_base_model()
    embedding = base.model.modules_to_save["default"].embed_tokens.weight
    assert base.lm_head.modules_to_save["default"].weight is embedding
    assert sum(each.numel() for each in model.parameters()) == 127680
    model(**inputs("tiny_llama")).logits.square().sum().backward()
    assert embedding.grad is not None
    with pytest.raises(PartialLoraError, match=r"method=full: not applicable: expected float32 weights; set model\.dt"):
        methods.get("full")(torch.nn.Linear(2, 2).bfloat16(), None)


def test_what_a_file_is_filled_up_with_does_not_come_back_as_values() -> None:
    held = PaddedEntries({"default": torch.nn.Parameter(torch.tensor([1.0, 2.0]))}, length=5)
    state = held.state_dict()
    assert state["default"].tolist() == [1, 2, 0, 0, 0]
    other = PaddedEntries({"default": torch.nn.Parameter(torch.zeros(2))}, length=5)
    other.load_state_dict(state)
    assert other["default"].tolist() == [1, 2]


def test_the_cost_of_a_step_is_watched_without_another_pass() -> None:
    model, _ = adapted("lora", "tiny_vit")
    cost, control = Cost(model), TrainerControl()
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad])
    arguments = SimpleNamespace(device=torch.device("cpu"))
    kept = []
    for step in range(4):
        state = TrainerState(max_steps=4, global_step=step)
        cost.on_step_begin(arguments, state, control)
        drawn = torch.get_rng_state()
        model(**inputs("tiny_vit")).logits.sum().backward()
        assert torch.equal(torch.get_rng_state(), drawn)
        optimizer.step()
        cost.on_step_end(arguments, state, control, optimizer=optimizer)
        kept.append(cost.measured()["saved_activation_bytes"])
    assert len(passes) == 4
    assert kept[0] is None
    assert kept[1] == kept[3] > 0
    trains = [each for each in model.parameters() if each.requires_grad]
    assert cost.measured()["optimizer_bytes"] == sum(2 * each.nbytes + 4 for each in trains)
    assert len(cost._times) == 3
    assert 0 < cost.measured()["step_seconds"] < 60


def test_on_a_gpu_steps_are_timed_by_its_events_which_nothing_waits_for_in_training(monkeypatch) -> None:
    told = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self, stream) -> None:
            self.place = len(told)
            told.append("recorded")

        def synchronize(self) -> None:
            told.append("waited for")

        def elapsed_time(self, later) -> float:
            return 500.0 * (later.place - self.place)  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    cost, control = Cost(torch.nn.Linear(1, 1)), TrainerControl()
    arguments, optimizer = SimpleNamespace(device=torch.device("cuda")), SimpleNamespace(state={})
    for step in range(3):
        state = TrainerState(max_steps=3, global_step=step)
        cost.on_step_begin(arguments, state, control)
        cost.on_step_end(arguments, state, control, optimizer=optimizer)
    assert told == ["recorded"] * 6
    assert cost.measured()["step_seconds"] == 0.5
