"""Skeletons of models: those that are stored are those of the models that the libraries build."""

from __future__ import annotations

import functools

import model_table as skeletons
import pytest
from configured import ALL, settings
from transformers import AutoModelForCausalLM, Gemma3Config

from partial_lora import models
from partial_lora.errors import PartialLoraError
from partial_lora.models import skeleton as module
from partial_lora.models.skeleton import key_of, skeleton, skeleton_of

settings_of = functools.cache(skeletons.settings_of)  # composed once for both tests


@pytest.mark.parametrize("name", ALL)
def test_what_is_stored_of_a_model_is_what_is_built(name: str, monkeypatch) -> None:
    """A failure means that timm, transformers or a file of conf/model has changed: `model_table.py --skeletons`."""
    model = settings_of(name)
    geometry = {"family": model.family, "architecture": model.architecture, "model_args": model.model_args}
    built = skeleton_of(models.empty(**geometry, num_labels=7))  # as many as no stored head has
    monkeypatch.setattr(models.family, "empty", None)  # it is not built again
    stored = skeleton(**geometry, outputs=7)
    assert stored == built
    assert list(stored.modules) == list(built.modules)  # in the model's order, as calibration goes


def test_nothing_is_stored_that_no_model_has() -> None:
    every = {key_of(each.family, each.architecture, each.model_args) for each in map(settings_of, ALL)}
    assert module._content(module.FILE).keys() == every


def test_another_geometry_is_built() -> None:
    chosen = settings("tiny_llama")
    args = chosen["model_args"] | {"num_hidden_layers": 2}
    assert key_of("causal", "llama", args) not in module._content(module.FILE)
    found = skeleton(family="causal", architecture="llama", model_args=args, outputs=2)
    assert found == skeleton_of(models.empty(family="causal", architecture="llama", model_args=args))
    with pytest.raises(PartialLoraError, match=r"^model\.model_args\.layers"):
        skeleton(family="causal", architecture="llama", model_args={"layers": 2}, outputs=2)


def test_all_linear_leaves_out_the_tied_output_of_a_model_that_reads_images_too() -> None:
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
    text |= {"num_key_value_heads": 1, "vocab_size": 64}
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Gemma3Config(text_config=text, vision_config=vision | {"image_size": 28, "patch_size": 14})
    found = skeleton_of(AutoModelForCausalLM.from_config(config))
    assert (found.output, found.config["vocab_size"]) == ("lm_head", 64)
    assert "lm_head" not in found.targets("all-linear")


def test_weights_of_4_bits_and_a_model_with_an_adapter_are_refused_with_the_way_out() -> None:
    def refused(modules: dict[str, str]) -> str:
        with pytest.raises(PartialLoraError, match="q_proj") as found:
            module.Skeleton(modules, parameters={}, linears={}, output=None).targets(["q_proj"])
        return str(found.value)

    assert "dequantised" in refused({"": "Model", "q_proj": "Linear4bit"})
    assert "before" in refused({"": "Model", "q_proj": "PartialLinear", "q_proj.lora_A": "ModuleDict"})
    assert "longer names" in refused({"": "Model", "q_proj": "Conv1d"})
