"""Training: what selects, what stops, and steps that do not depend on how many processes share them."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from partial_lora import evaluation, fit, models
from partial_lora.errors import PartialLoraError

TINY = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
BATCH = 8


def rows(count: int) -> datasets.Dataset:
    generator = torch.Generator().manual_seed(count)
    labels = torch.arange(count) % 3
    pixels = torch.randn(count, 3, 16, 16, generator=generator) + labels[:, None, None, None]
    table = datasets.Dataset.from_dict({"pixel_values": pixels.numpy(), "labels": labels.tolist()})
    return table.with_format("torch")


@pytest.fixture
def adapted() -> PeftModel:
    torch.manual_seed(0)
    settings = {"name": "tiny", "weights": "random", "architecture": "vit_tiny_patch16_224", "image_size": 16}
    model = models.load(model_args=TINY, labels=["a", "b", "c"], **settings)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["attn.qkv"], modules_to_save=["timm_model.head"]))


def trainer(model: PeftModel, directory: Path, count: int = 20, **changes: object):
    settings = {
        "world_size": 1,
        "epochs": 3.0,
        "max_steps": None,
        "save_steps": None,
        "batch_size": BATCH,
        "eval_batch_size": 5,
        "learning_rate": 1e-2,
        "weight_decay": 0.0,
        "warmup": 0.1,
        "max_grad_norm": 1.0,
        "num_workers": 0,
    } | changes
    return fit.trainer(
        model,
        train=rows(count),
        validation=rows(12),
        directory=directory,
        metrics=evaluation.classification_metrics,
        primary="accuracy",
        device="cpu",
        precision="no",
        seed=0,
        **settings,
    )


def trained_state(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def test_every_step_has_a_whole_batch_and_evaluation_sees_every_row(adapted: PeftModel, tmp_path: Path) -> None:
    training = trainer(adapted, tmp_path, count=20)
    seen = []
    hook = adapted.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["pixel_values"])) if module.training else None,
        with_kwargs=True,
    )
    training.train()
    hook.remove()
    assert seen == [BATCH] * (3 * (20 // BATCH))
    assert len(training.predict(rows(12)).predictions) == 12


def test_fewer_rows_than_a_batch_still_train(adapted: PeftModel, tmp_path: Path) -> None:
    before = trained_state(adapted)
    assert trainer(adapted, tmp_path, count=5).train().global_step == 3
    assert any(not torch.equal(value, before[name]) for name, value in trained_state(adapted).items())


def test_the_checkpoint_that_did_best_on_validation_is_what_is_left(adapted: PeftModel, tmp_path: Path) -> None:
    training = trainer(adapted, tmp_path, epochs=6.0, learning_rate=0.3)
    training.train()
    measured = [entry["eval_accuracy"] for entry in training.state.log_history if "eval_accuracy" in entry]
    assert len(measured) == 6
    assert min(measured) < max(measured)  # else anything would do
    assert training.evaluate()["eval_accuracy"] == max(measured)


def test_a_bounded_run_ends_with_a_look_at_validation(adapted: PeftModel, tmp_path: Path) -> None:
    training = trainer(adapted, tmp_path, max_steps=5, save_steps=2)
    training.train()
    steps = [entry["step"] for entry in training.state.log_history if "eval_accuracy" in entry]
    assert steps == [2, 4, 5]


def test_a_loss_that_is_not_finite_stops_before_anything_moves(adapted: PeftModel, tmp_path: Path) -> None:
    with torch.no_grad():
        adapted.get_base_model().timm_model.norm.weight[0] = float("nan")
    before = trained_state(adapted)
    with pytest.raises(PartialLoraError, match=r"not finite at step 1 .* lower trainer\.learning_rate") as stop:
        trainer(adapted, tmp_path).train()
    assert "\n" not in str(stop.value)
    assert all(torch.equal(value, before[name]) for name, value in trained_state(adapted).items())
    assert not list((tmp_path / fit.CHECKPOINTS).glob("*"))


def test_a_batch_that_does_not_divide_among_the_accelerators_is_refused(adapted: PeftModel, tmp_path: Path) -> None:
    with pytest.raises(PartialLoraError, match=r"trainer\.batch_size=8: expected a multiple of the 3 processes"):
        trainer(adapted, tmp_path, world_size=3)


@pytest.mark.parametrize(("amx", "chosen"), [(True, "bf16"), (False, "no")])
def test_bf16_is_chosen_where_the_processor_is_made_for_it(monkeypatch, amx: bool, chosen: str) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert fit.mixed_precision("auto", "cpu") == chosen
    assert fit.mixed_precision("no", "cpu") == "no"
    assert fit.mixed_precision("bf16", "cpu") == "bf16"
