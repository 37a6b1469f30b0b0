"""Additions to training: a penalty on the loss, projected gradients, an allocator; and full with tied weights."""

from __future__ import annotations

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from configured import inputs
from method_settings import adapted
from peft.tuners.adalora.layer import AdaLoraLayer, RankAllocator
from transformers import TrainerControl, TrainerState

from partial_lora import methods
from partial_lora.errors import PartialLoraError
from partial_lora.methods.lora import Allocate, orthogonality_penalty
from partial_lora.methods.setting import Training
from partial_lora.methods.setting import training as training_of


def test_a_penalty_is_shared_by_the_parts_of_a_step_and_left_out_of_evaluation() -> None:
    weight = torch.nn.Parameter(torch.tensor([3.0]))
    added = Training(penalty=lambda: weight.square().sum())
    loss = added.loss(lambda outputs, labels: outputs.sum() * labels, parts=2)
    assert loss(weight * 2, labels=1.0).item() == 6 + 9 / 2
    with torch.no_grad():
        assert loss(weight * 2, labels=1.0).item() == 6
    plain = Training()
    assert plain.loss(print) is print


def test_most_methods_add_nothing() -> None:
    added = training_of("lora", adapted("lora", "tiny_vit")[0])
    assert (added.callbacks, added.penalty, added.final_after(10), added.summary()) == ((), None, 0, {})


def test_what_needs_whole_parameters_is_refused_where_they_are_shared_out() -> None:
    model, _ = adapted("adalora", "tiny_vit")
    with pytest.raises(PartialLoraError, match=r"^trainer\.strategy=fsdp: method=adalora"):
        training_of("adalora", model, sharded=True)
    assert training_of("lora", model, sharded=True).callbacks == ()


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


@pytest.mark.parametrize("skipped", [{0, 1, 4}, {6, 7, 8}])
def test_a_step_that_the_scaler_skips_is_not_shown_to_the_allocator(skipped: set[int]) -> None:
    model, _ = adapted("adalora", "tiny_vit")
    overflowing(model, skipped)
    optimizer = steps_of_adalora(model, 10, 10, optimizer=scaled(model))
    held = [each for state in optimizer.state.values() for each in state.values()]
    assert all(torch.isfinite(each).all() for each in [*held, *values(model).values()])
    assert all(state["step"] == 10 - len(skipped) for state in optimizer.state.values())
    counts = training_of("adalora", model).summary()
    assert 0 < counts["ranks"] <= counts["target_ranks"]


def test_without_one_finite_gradient_there_are_no_ranks_to_choose() -> None:
    model, _ = adapted("adalora", "tiny_vit")
    overflowing(model, set(range(10)))
    with pytest.raises(PartialLoraError, match=r"^method=adalora: .*trainer\.mixed_precision=no"):
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
    counts = training_of("adalora", model).summary()
    layers = [layer for layer in model.modules() if isinstance(layer, AdaLoraLayer)]
    assert counts["target_ranks"] == len(layers) * setting.rank
    assert counts["ranks"] <= counts["target_ranks"] < sum(len(layer.lora_E["default"]) for layer in layers)
    assert model.peft_config["default"].rank_pattern is None
    # alpha / rank of a rank that is left, whatever the rank it started with
    assert {layer.scaling["default"] / layer.ranknum["default"].item() for layer in layers} == {8.0 / 4}
    with pytest.raises(PartialLoraError, match=r"^method=adalora: .*3"):
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


def test_full_keeps_tied_weights_tied_and_one_model_in_memory() -> None:
    model, _ = adapted("full", "tiny_llama")
    base = model.get_base_model()
    embedding = base.model.modules_to_save["default"].embed_tokens.weight
    assert base.lm_head.modules_to_save["default"].weight is embedding
    assert sum(each.numel() for each in model.parameters()) == 127680
    model(**inputs("tiny_llama")).logits.square().sum().backward()
    assert embedding.grad is not None
    with pytest.raises(PartialLoraError, match=r"^method=full: .*model\.dtype=float32"):
        methods.METHODS["full"](torch.nn.Linear(2, 2).bfloat16(), None)
