"""What groups of settings stand for."""

from __future__ import annotations

import pytest
import torch
from configured import inputs
from configured import settings as group_file

from partial_lora import methods
from partial_lora.calibration.config import CalibrationConfig
from partial_lora.errors import PartialLoraError
from partial_lora.models.targets import target_linears
from partial_lora.runs import build
from partial_lora.runs.schema import Config, ModelConfig, TaskConfig


def model_config(name: str, **changes: object) -> ModelConfig:
    return ModelConfig(**group_file(name, **changes))


def in_dtype(batch: dict[str, torch.Tensor], dtype: str) -> dict[str, torch.Tensor]:
    kind = getattr(torch, dtype)
    return {name: value.to(kind) if value.is_floating_point() else value for name, value in batch.items()}


@pytest.mark.parametrize(("model", "task"), [("tiny_vit", "text"), ("tiny_bert", "image")])
def test_a_model_that_cannot_read_the_task_is_refused_by_both_names(model: str, task: str) -> None:
    with pytest.raises(PartialLoraError, match=rf"model={model} reads .*, and task=mine has {task}s") as refusal:
        build.check_modality(model_config(model), TaskConfig("mine", modality=task))
    assert "\n" not in str(refusal.value)


def test_texts_longer_than_a_model_has_positions_for_are_refused() -> None:
    longest = model_config("tiny_bert").model_args["max_position_embeddings"]
    build.model_of(model_config("tiny_bert", max_length=longest), ["a", "b"])
    with pytest.raises(PartialLoraError, match=rf"max_length={longest + 1}: expected at most {longest}, the positions"):
        build.model_of(model_config("tiny_bert", max_length=longest + 1), ["a", "b"])
    relative = build.model_of(model_config("tiny_deberta", max_length=10 * longest), ["a", "b"])
    tokens = torch.randint(3, 250, (1, 2 * longest))
    assert relative(input_ids=tokens).logits.shape == (1, 2)


@pytest.mark.parametrize(
    ("modality", "share", "drawn"),
    [
        ("image", 0.03, {"shots": 4, "max_samples": 9}),
        ("text", 0.03, {"share": 0.03, "max_samples": 9}),
        ("text", 0.0, {"shots": 4, "max_samples": 9}),
    ],
)
def test_texts_are_drawn_by_share_unless_that_is_nothing(modality: str, share: float, drawn: dict) -> None:
    calibration = CalibrationConfig(shots=4, share=share, max_samples=9)
    assert build.draw_settings(Config(calibration=calibration, task=TaskConfig(modality=modality))) == drawn


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["tiny_deberta", "tiny_vit"])
def test_what_trains_is_in_float32_whatever_the_frozen_weights_are(name: str, dtype: str) -> None:
    chosen = model_config(name, dtype=dtype)
    model = build.model_of(chosen, ["a", "b"])
    frozen = target_linears(model, **chosen.trained_modules)
    assert {module.weight.dtype for module in frozen.values()} == {getattr(torch, dtype)}
    setting = methods.Setting(**chosen.trained_modules, rank=2, alpha=2.0, dropout=0.0, mask_seed=0)
    adapted = methods.get("lora")(model, setting)
    trained = {name: value for name, value in adapted.named_parameters() if value.requires_grad}
    assert trained
    assert {value.dtype for value in trained.values()} == {torch.float32}
    logits = adapted(**in_dtype(inputs(name), dtype)).logits
    logits.sum().backward()
    assert all(value.grad is not None and value.grad.dtype == torch.float32 for value in trained.values())


def test_a_head_that_does_not_give_the_logits_is_refused() -> None:
    with pytest.raises(PartialLoraError, match=r"model\.head=timm_model\.norm: expected timm_model\.head, which gives"):
        build.model_of(model_config("tiny_vit", head="timm_model.norm"), ["a", "b"])
    with pytest.raises(PartialLoraError, match=r"model\.new_modules: .* has no module of the name pool"):
        build.model_of(model_config("tiny_vit", new_modules=["pool"]), ["a", "b"])
