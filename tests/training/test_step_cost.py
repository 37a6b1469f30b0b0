"""Cost of training: watched in the steps themselves, on a GPU by events that nothing waits for."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from configured import inputs
from method_settings import adapted
from transformers import TrainerControl, TrainerState

from partial_lora.training.cost import Cost


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
