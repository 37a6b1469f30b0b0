"""What groups of settings stand for."""

from __future__ import annotations

import pytest
import torch
from configured import settings as group_file
from omegaconf import OmegaConf

from partial_lora import loading
from partial_lora.errors import PartialLoraError
from partial_lora.schema import ModelConfig


def model_settings(name: str) -> dict:
    return OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(ModelConfig), group_file(name)))


@pytest.mark.parametrize(("model", "task"), [("tiny_vit", "text"), ("tiny_bert", "image")])
def test_a_model_that_cannot_read_the_task_is_refused_by_both_names(model: str, task: str) -> None:
    given = {"model": model_settings(model), "task": {"name": "mine", "modality": task}}
    with pytest.raises(PartialLoraError, match=rf"model={model} reads .*, and task=mine has {task}s") as refusal:
        loading.check_modality(given)
    assert "\n" not in str(refusal.value)


def test_texts_longer_than_a_model_has_positions_for_are_refused() -> None:
    chosen = model_settings("tiny_bert")
    longest = chosen["model_args"]["max_position_embeddings"]
    loading.model_of(chosen | {"max_length": longest}, ["a", "b"])
    with pytest.raises(PartialLoraError, match=rf"max_length={longest + 1}: expected at most {longest}, the positions"):
        loading.model_of(chosen | {"max_length": longest + 1}, ["a", "b"])
    relative = loading.model_of(model_settings("tiny_deberta") | {"max_length": 10 * longest}, ["a", "b"])
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
    chosen = {"shots": 4, "share": share, "max_samples": 9, "seed": 0}
    assert loading.drawn_by({"calibration": chosen, "task": {"modality": modality}}) == drawn
