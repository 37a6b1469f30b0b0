"""Learning rates: of the adapter, of its B (LoRA+) and of what trains whole, in groups of the optimizer."""

from __future__ import annotations

import copy
import itertools
import math
from pathlib import Path

import pytest
import torch
from finished_runs import override, sentence_files, trained
from method_settings import adapted as adapted_by
from peft import LoraConfig, PeftModel
from tiny_trainer import RESUMED, EndAfter, EndedError, adapted, masked, resumable, trained_state, trainer
from torch import Tensor, nn
from transformers import Trainer

from partial_lora import methods
from partial_lora.adapter import PartialLoraConfig
from partial_lora.errors import PartialLoraError
from partial_lora.report import summary
from partial_lora.report.rows import row
from partial_lora.training import cost
from partial_lora.training.config import AUTO, TrainerConfig

RATE, HEAD_RATE, RATIO, DECAY = 2e-3, 3e-2, 8.0, 0.2
OWN = {"learning_rate": RATE, "head_learning_rate": HEAD_RATE, "loraplus_ratio": RATIO}
HEADS = {"heads": ["timm_model.head"]}
STEPS, WARMUP = 10, 0.3


def bare_loop(model: PeftModel, batches: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Train by AdamW, a group for every parameter, with the rates, the decay and the schedule written out."""
    groups = [
        {
            "params": [value],
            "lr": HEAD_RATE if "timm_model.head" in name else RATE * RATIO if ".lora_B." in name else RATE,
            "weight_decay": 0.0 if name.endswith("bias") else DECAY,
        }
        for name, value in model.named_parameters()
        if value.requires_grad
    ]
    optimizer, rates = torch.optim.AdamW(groups, foreach=False), [group["lr"] for group in groups]
    warmup = math.ceil(WARMUP * STEPS)
    model.train()
    for step, (pixels, labels) in enumerate(batches):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (STEPS - warmup)))
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (step / warmup if step < warmup else cosine)
        nn.functional.cross_entropy(model(pixel_values=pixels).logits, labels).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return trained_state(model)


@pytest.mark.parametrize(("schedule", "share"), [("cosine", 0.5), ("linear", 0.5), ("constant_with_warmup", 1.0)])
def test_the_rate_follows_the_schedule_that_is_set(tmp_path: Path, schedule: str, share: float) -> None:
    training = trainer(masked(), tmp_path, learning_rate=1e-2, warmup_ratio=0.2, schedule=schedule)
    training.create_optimizer_and_scheduler(10)
    rates = []
    for _ in range(8):
        rates.append(training.lr_scheduler.get_last_lr()[0])
        training.optimizer.step()
        training.lr_scheduler.step()
    assert rates[0] == 0.0
    assert rates[1:3] == pytest.approx([5e-3, 1e-2])
    assert rates[6] == pytest.approx(share * 1e-2)


@pytest.mark.parametrize(
    ("method", "changes"), [(PartialLoraConfig, {"sparsity": 0.5}), (LoraConfig, {"use_dora": True})]
)
def test_a_training_is_that_of_a_bare_loop_with_a_group_for_every_parameter(tmp_path: Path, method, changes) -> None:
    model = adapted(method=method, **changes)
    twin, pixels, labels = copy.deepcopy(model), [], []
    training = trainer(
        model, tmp_path, max_steps=STEPS, save_steps=STEPS, weight_decay=DECAY, warmup_ratio=WARMUP, **OWN, **HEADS
    )
    loss = training.compute_loss_func

    def noted(outputs, batch, **settings):
        if model.training:
            labels.append(batch)
        return loss(outputs, batch, **settings)

    training.compute_loss_func = noted
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: pixels.append(kwargs["pixel_values"]) if module.training else None,
        with_kwargs=True,
    )
    training.train()
    hook.remove()
    batches = list(zip(pixels, labels, strict=True))
    assert len(batches) == STEPS
    expected = bare_loop(twin, batches)
    found = trained_state(model)
    assert found.keys() == expected.keys()
    assert any(name.endswith("head.modules_to_save.default.bias") for name in found)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=2e-6, rtol=1e-5, msg=name)


def optimizer_of(model: PeftModel, directory: Path, **changes: object) -> torch.optim.Optimizer:
    return trainer(model, directory, weight_decay=DECAY, **changes).create_optimizer()


@pytest.mark.parametrize(
    ("name", "method"),
    [
        *(("tiny_vit", method) for method in sorted(methods.METHODS.keys() - {"peft"})),
        *itertools.product(("tiny_deberta", "tiny_convnext"), ("partial", "lora", "full")),
    ],
)
def test_groups_hold_every_parameter_that_trains_once(tmp_path: Path, name: str, method: str) -> None:
    model, setting = adapted_by(method, name)
    own = OWN | ({"loraplus_ratio": 1.0} if not methods.METHODS[method].product else {})
    groups = optimizer_of(model, tmp_path, **own, heads=setting.whole()).param_groups
    trains = {id(value): key for key, value in model.named_parameters() if value.requires_grad}
    held = [trains[id(value)] for group in groups for value in group["params"]]
    assert sorted(held) == sorted(trains.values())
    counted = cost.measured(model, setting.head, new_modules=setting.new_modules, dense=1)
    sizes = {"adapter": 0, "B": 0, "head": 0}
    for group in groups:
        sizes[group["part"]] += sum(value.numel() for value in group["params"])
        assert group["lr"] == TrainerConfig(**own).learning_rates[group["part"]]
        for value in group["params"]:
            of_b = ".lora_B." in trains[id(value)] and methods.METHODS[method].product
            assert (group["part"] == "B") is of_b, trains[id(value)]
    assert sizes["head"] == counted["head"]
    assert sizes["adapter"] + sizes["B"] == counted["adapter_trainable"]
    one = optimizer_of(model, tmp_path, learning_rate=RATE).param_groups
    decays, before = (
        {id(value): group["weight_decay"] for group in each for value in group["params"]} for each in (groups, one)
    )
    assert decays == before


def test_one_rate_leaves_trainers_own_groups_as_earlier_checkpoints_have_them(tmp_path: Path) -> None:
    training = trainer(masked(), tmp_path, **HEADS)
    own = training.create_optimizer().state_dict()
    training.optimizer = None
    assert own == Trainer.create_optimizer(training).state_dict()
    assert len(own["param_groups"]) == 2


def logged(training) -> list[dict]:
    names = ("step", "loss", "learning_rate", "B_learning_rate", "head_learning_rate")
    return [{name: entry[name] for name in names} for entry in training.state.log_history if "loss" in entry]


def test_a_training_with_several_rates_resumes_as_if_it_had_not_been_ended(tmp_path: Path) -> None:
    settings = RESUMED | OWN | HEADS
    unbroken = trainer(masked(), tmp_path / "unbroken", **settings)
    unbroken.train()
    ended = trainer(masked(), tmp_path, **settings)
    ended.add_callback(EndAfter(5))
    with pytest.raises(EndedError):
        ended.train()
    resumed = trainer(masked(), tmp_path, **settings)
    resumed.train(resumable(tmp_path))
    expected = trained_state(unbroken.model)
    assert all(torch.equal(value, expected[name]) for name, value in trained_state(resumed.model).items())
    assert logged(resumed) == logged(unbroken)


def test_the_history_has_the_rate_of_every_part(tmp_path: Path) -> None:
    training = trainer(masked(), tmp_path, max_steps=STEPS, save_steps=2, warmup_ratio=WARMUP, **OWN, **HEADS)
    training.train()
    entries = logged(training)
    assert [entry["step"] for entry in entries] == [1, 2, 4, 6, 8, 10]
    assert entries[2]["learning_rate"] == RATE  # warm-up has just ended
    for entry in entries:
        assert entry["B_learning_rate"] == pytest.approx(RATIO * entry["learning_rate"])
        assert entry["head_learning_rate"] == pytest.approx(HEAD_RATE / RATE * entry["learning_rate"])
    plain = trainer(masked(), tmp_path / "plain", max_steps=2, save_steps=2)
    plain.train()
    assert not any("B_learning_rate" in entry or "head_learning_rate" in entry for entry in plain.state.log_history)


@pytest.mark.parametrize("own", [{}, {"head_learning_rate": 0.25}, {"loraplus_ratio": 4.0}])
def test_a_loss_that_is_not_finite_names_the_keys_of_the_rates(tmp_path: Path, own: dict) -> None:
    model = adapted()
    with torch.no_grad():
        model.get_base_model().timm_model.norm.weight[0] = float("nan")
    with pytest.raises(PartialLoraError) as stop:
        trainer(model, tmp_path, warmup_ratio=0.0, **own, **HEADS).train()
    said = str(stop.value)
    assert "\n" not in said
    assert "trainer.learning_rate" in said
    for key in ("head_learning_rate", "loraplus_ratio"):
        assert (f"trainer.{key}" in said) is (key in own)


def test_a_model_that_its_last_step_broke_is_no_result(tmp_path: Path) -> None:
    training = trainer(adapted(), tmp_path, max_steps=1, learning_rate=1e38, warmup_ratio=0.0, **HEADS)
    with pytest.raises(PartialLoraError, match=r"trainer\.learning_rate"):
        training.train()


def test_a_rate_of_nothing_is_refused_by_its_key(tmp_path: Path) -> None:
    model = adapted()
    with pytest.raises(PartialLoraError, match=r"^trainer\.head_learning_rate"):
        optimizer_of(model, tmp_path, head_learning_rate=RATE)
    for name, value in model.named_parameters():
        if ".lora_B." in name:
            value.requires_grad_(False)
    with pytest.raises(PartialLoraError, match=r"^trainer\.loraplus_ratio"):
        optimizer_of(model, tmp_path, loraplus_ratio=RATIO)


def test_a_run_that_leaves_its_rate_open_records_what_it_came_to() -> None:
    own = ("model=tiny_bert", "task=text_table", "method=entries", override(sentence_files()), "calibration=fixed")
    run = trained("open", *own, "trainer.learning_rate=auto", "trainer.max_steps=null", "trainer.epochs=2")
    came_to, wished = run.result["training"], run.config.trainer
    assert (wished.learning_rate, wished.head_learning_rate) == (AUTO, None)
    assert came_to["learning_rate"] == row(run.result)["learning_rate"]
    assert came_to["learning_rate"] == pytest.approx(2e-3 * came_to["density"] ** -(2 / 3))
    assert came_to["head_learning_rate"] == 2e-3
    logged = [entry for entry in run.result["history"] if "head_learning_rate" in entry]
    assert logged
    assert came_to["steps"] == run.result["history"][-1]["step"] == 2 * (came_to["rows"] // wished.batch_size)
    shown = summary.summary(run.result)
    lines = dict(zip(*(map(str, column.cells) for column in shown.columns), strict=True))
    assert f"learning rate {came_to['learning_rate']:.3g}, head 0.002 (auto" in lines["training"]
