"""A model in parts trains, goes on, is judged and is saved as a whole one is."""

from __future__ import annotations

from pathlib import Path

import pytest
import sharded_worker
import torch
from peft import PeftModel
from safetensors.torch import load_file
from sharded_worker import STEPS

from partial_lora import models
from partial_lora.launching import directory
from partial_lora.models.config import ModelConfig
from partial_lora.training import checkpoints, fsdp


@pytest.fixture(scope="module")
def found(tmp_path_factory, port: int) -> tuple[Path, list[dict]]:
    folder = tmp_path_factory.mktemp("sharded")
    sharded_worker.start(folder, port)
    return folder, [load_file(folder / f"found_{rank}.safetensors") for rank in range(sharded_worker.WORLD)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> dict:
    """What one process alone finds with the whole model."""
    training = sharded_worker.trainer(
        sharded_worker.adapted(), tmp_path_factory.mktemp("alone"), processes=1, sharded=False
    )
    training.train()
    assert training.state.global_step == STEPS
    return {
        "values": checkpoints.trainable(training.model),
        "logits": training.predict(sharded_worker.rows(13)).predictions,
    }


def test_training_in_parts_from_a_checkpoint_on_is_that_of_one_process(found, alone) -> None:
    for process in found[1]:
        for name, value in alone["values"].items():
            torch.testing.assert_close(process[name], value, atol=1e-5, rtol=0)
        torch.testing.assert_close(process["logits"], torch.tensor(alone["logits"]), atol=1e-5, rtol=0)


def test_a_process_holds_its_share(found) -> None:
    assert [float(process["share"]) for process in found[1]] == pytest.approx([0.5, 0.5], abs=0.05)


def test_the_adapter_is_saved_whole_for_plain_peft(found, alone) -> None:
    torch.manual_seed(0)
    settings = {"name": "tiny", "weights": "random", "architecture": "vit_tiny_patch16_224", "image_size": 16}
    base = models.load(ModelConfig(model_args=sharded_worker.TINY, **settings), ["a", "b", "c"])
    model = PeftModel.from_pretrained(base, found[0] / "adapter").eval()
    with torch.no_grad():
        logits = model(sharded_worker.rows(13)["pixel_values"][:]).logits
    torch.testing.assert_close(logits, torch.tensor(alone["logits"]), atol=1e-5, rtol=0)


def test_a_checkpoint_in_parts_is_one_that_a_single_process_goes_on_from(found, alone) -> None:
    training = sharded_worker.trainer(sharded_worker.adapted(seed=3), found[0] / "early", processes=1, sharded=False)
    training.train(found[0] / "early" / directory.CHECKPOINTS / f"checkpoint-{sharded_worker.HALF}")
    for name, value in checkpoints.trainable(training.model).items():
        torch.testing.assert_close(value, alone["values"][name], atol=1e-5, rtol=0)


def test_a_model_that_is_whole_is_saved_as_it_is() -> None:
    model = sharded_worker.adapted()
    assert not fsdp.is_sharded_model(model)
    assert fsdp.adapter_state(model) is None
