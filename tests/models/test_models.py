from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_vit import HEAD, TINY, load, pretrained
from transformers import TimmWrapperForImageClassification

from partial_lora.errors import PartialLoraError
from partial_lora.models import images as timm
from partial_lora.models import weights_digest


@pytest.fixture
def folder(tmp_path) -> Path:
    return pretrained(tmp_path / "pretrained")


def test_weights_of_a_folder_are_loaded_whole_under_a_new_head(folder):
    model = load(weights=str(folder))
    saved = load_file(folder / "model.safetensors")
    state = model.state_dict()
    assert set(state) == set(saved)
    for name, value in saved.items():
        if name.startswith(f"{HEAD}."):
            assert state[name].shape[0] == 3
        else:
            assert torch.equal(state[name], value), name
    assert not model.training
    assert model.name_or_path == str(folder)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_head_for_as_many_classes_as_the_old_one_is_new_all_the_same(folder):
    labels = [f"new {index}" for index in range(7)]
    torch.manual_seed(0)
    head = load(weights=str(folder), labels=labels).timm_model.head
    assert not torch.equal(head.weight, load_file(folder / "model.safetensors")[f"{HEAD}.weight"])
    assert head.weight.std() < 0.05


def test_head_depends_on_the_generator_alone(folder):
    def head(seed: int, weights: str) -> torch.Tensor:
        torch.manual_seed(seed)
        return load(weights=weights).timm_model.head.weight

    assert torch.equal(head(1, "random"), head(1, str(folder)))
    assert torch.equal(head(1, "random"), head(1, "random"))
    assert not torch.equal(head(1, "random"), head(2, "random"))
    torch.manual_seed(1)
    expected = torch.nn.init.normal_(torch.empty(3, 32), std=0.02)
    assert torch.equal(head(1, str(folder)), expected)


def test_loading_takes_only_the_head_from_the_generator(folder):
    def next_number(weights: str) -> torch.Tensor:
        torch.manual_seed(4)
        load(weights=weights)
        return torch.rand(1)

    assert torch.equal(next_number("random"), next_number(str(folder)))


def test_random_weights_are_the_same_whatever_the_seed():
    torch.manual_seed(1)
    one = load()
    torch.manual_seed(2)
    two = load()
    assert weights_digest(one, HEAD) == weights_digest(two, HEAD)
    assert not torch.equal(one.timm_model.head.weight, two.timm_model.head.weight)


def test_labels_survive_saving(folder, tmp_path):
    model = load(weights=str(folder))
    model.save_pretrained(tmp_path / "saved")
    again = TimmWrapperForImageClassification.from_pretrained(tmp_path / "saved")
    assert again.config.id2label == model.config.id2label == {0: "cat", 1: "dog", 2: "owl"}
    assert model.config.label2id == {"cat": 0, "dog": 1, "owl": 2}
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(images).logits, model(images).logits)


def rewrite(folder: Path, change) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_weight_is_named(folder):
    rewrite(folder, lambda state: state.pop("timm_model.blocks.2.mlp.fc1.weight"))
    with pytest.raises(
        PartialLoraError, match=r"model=tiny_vit: timm_model\.blocks\.2\.mlp\.fc1\.weight is missing in"
    ):
        load(weights=str(folder))


def test_weight_of_another_shape_is_named(folder):
    with pytest.raises(PartialLoraError, match=r"timm_model\.pos_embed is of another shape in"):
        load(weights=str(folder), model_args={**TINY["model_args"], "img_size": 64}, image_size=64)


def test_another_architecture_than_the_weights_have_is_refused(folder):
    with pytest.raises(
        PartialLoraError, match=r"model\.architecture=vit_small_patch16_224: .* is a vit_tiny_patch16_224"
    ):
        load(weights=str(folder), architecture="vit_small_patch16_224")


def test_weights_cut_short_are_named(folder):
    os.truncate(folder / "model.safetensors", 5000)
    with pytest.raises(PartialLoraError, match="model=tiny_vit: cannot read the weights in") as caught:
        load(weights=str(folder))
    assert "\n" not in str(caught.value)


def test_native_size_of_a_model_may_be_left_where_it_is_dynamic(folder):
    model = load(weights=str(folder), model_args={**TINY["model_args"], "dynamic_img_size": True}, image_size=48)
    assert model(torch.zeros(1, 3, 48, 48)).logits.shape == (1, 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 40}, r"model\.image_size=40: model=tiny_vit takes images of 32 pixels only"),
        (
            {"image_size": 50, "model_args": {**TINY["model_args"], "dynamic_img_size": True}},
            r"model\.image_size=50: expected a multiple of 8, the patch size of model=tiny_vit",
        ),
        ({"architecture": "vit_of_nobody"}, r"model\.architecture=vit_of_nobody: timm has no such model"),
        ({"model_args": {"depht": 3}}, r"model\.model_args=.*depht"),
        ({"weights": "bundled:nothing"}, r"model\.weights=bundled:nothing: expected one of bundled:vit_s14"),
        ({"labels": ["cat"]}, r"expected at least two labels"),
    ],
)
def test_settings_that_fit_no_model_are_named_in_one_line(changes, message):
    with pytest.raises(PartialLoraError, match=message) as caught:
        load(**changes)
    assert "\n" not in str(caught.value)


def test_convolutional_network_takes_any_size_and_its_head_is_found():
    model = load(architecture="resnet18", model_args={}, image_size=37)
    assert timm.head_name(model) == "timm_model.fc"
    assert model(torch.zeros(2, 3, 37, 37)).logits.shape == (2, 3)


def test_empty_has_the_shapes_of_the_loaded_model_and_no_memory():
    empty = timm.empty_timm(architecture=TINY["architecture"], model_args=TINY["model_args"], num_labels=3)
    assert {tensor.device.type for tensor in empty.state_dict().values()} == {"meta"}
    shapes = {name: tensor.shape for name, tensor in empty.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in load().state_dict().items()}


def test_digest_tells_every_weight_but_the_heads():
    model = load(architecture="resnet18", model_args={})  # batch norm: buffers count too
    digest = weights_digest(model, "timm_model.fc")
    for name, tensor in list(model.state_dict().items())[::7] + list(model.state_dict().items())[-2:]:
        changed = copy.deepcopy(model)
        flat = changed.state_dict()[name].view(-1)
        flat[-1] += 1
        assert (weights_digest(changed, "timm_model.fc") == digest) == name.startswith("timm_model.fc."), name
        assert tensor.shape == changed.state_dict()[name].shape
    assert weights_digest(model, "timm_model.f") != digest  # a module's name, not any prefix


def test_digest_is_the_same_in_another_process():
    script = "import sys, json; from partial_lora.models import images, weights_digest; s = json.loads(sys.argv[1]);"
    script += f"print(weights_digest(images.load_timm(**s), {HEAD!r}))"
    command = [sys.executable, "-c", script, json.dumps(TINY)]
    other = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == weights_digest(load(), HEAD)
