"""CLIP as a linear head: the predictions of the whole CLIP, from the image tower and one matrix."""

from __future__ import annotations

import pytest
import torch
from configured import LABELS, inputs, load, refused, settings
from tokenizers import pre_tokenizers
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    TimmWrapperConfig,
    TimmWrapperForImageClassification,
)

from partial_lora.models import vision as clip

PROMPTS = ["a photo of a {}.", "a drawing of many {} on a table"]
ARGS = settings("tiny_clip")["model_args"]
ANIMALS = [*LABELS, "zebra", "ox", "yak", "jaguar", "pig"]


def whole_clip(width: int = 32) -> CLIPModel:
    """A CLIP with random weights, biases and norms, none of which a wrong conversion leaves the same."""
    tower = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**tower, "hidden_size": 24, "vocab_size": 514, "bos_token_id": 512, "eos_token_id": 2}  # as OpenAI's has
    vision = {**tower, "hidden_size": width, "intermediate_size": 128, "num_hidden_layers": 3, "image_size": 32}
    config = CLIPConfig(text_config=text, vision_config={**vision, "patch_size": 8}, projection_dim=16)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        model = CLIPModel(config).eval()
        for name, parameter in model.named_parameters():
            if name != "logit_scale":
                parameter.add_(torch.randn(parameter.shape) * 0.15)
    return model


def as_timm(whole: CLIPModel) -> dict[str, Tensor]:
    """The image tower of transformers' CLIP, by timm's names; literally, one line a weight."""
    theirs = {name.removeprefix("vision_model."): value for name, value in whole.state_dict().items()}
    state = {
        "cls_token": theirs["embeddings.class_embedding"][None, None],
        "pos_embed": theirs["embeddings.position_embedding.weight"][None],
        "patch_embed.proj.weight": theirs["embeddings.patch_embedding.weight"],
        "head.weight": theirs["visual_projection.weight"],
        "head.bias": torch.zeros(16),
    }
    for kind in ("weight", "bias"):
        state[f"norm_pre.{kind}"] = theirs[f"pre_layrnorm.{kind}"]
        state[f"norm.{kind}"] = theirs[f"post_layernorm.{kind}"]
        for layer in range(3):
            here, there = f"blocks.{layer}", f"encoder.layers.{layer}"
            parts = [theirs[f"{there}.self_attn.{part}_proj.{kind}"] for part in "qkv"]
            state[f"{here}.attn.qkv.{kind}"] = torch.cat(parts)
            state[f"{here}.attn.proj.{kind}"] = theirs[f"{there}.self_attn.out_proj.{kind}"]
            state[f"{here}.norm1.{kind}"] = theirs[f"{there}.layer_norm1.{kind}"]
            state[f"{here}.norm2.{kind}"] = theirs[f"{there}.layer_norm2.{kind}"]
            state[f"{here}.mlp.fc1.{kind}"] = theirs[f"{there}.mlp.fc1.{kind}"]
            state[f"{here}.mlp.fc2.{kind}"] = theirs[f"{there}.mlp.fc2.{kind}"]
    return state


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer without any merge: letters, and letters at the end of a word."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    symbols = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={symbol: number for number, symbol in enumerate(symbols)}, merges=[])


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict:
    """One CLIP as the hub has it: its image tower in timm's format, and the whole in transformers'."""
    root, whole = tmp_path_factory.mktemp("clip"), whole_clip()
    config = TimmWrapperConfig(architecture="vit_base_patch16_clip_224", model_args=ARGS, num_labels=16)
    tower = TimmWrapperForImageClassification(config)
    tower.timm_model.load_state_dict(as_timm(whole))  # strict
    tower.save_pretrained(root / "tower")
    whole.save_pretrained(root / "whole")
    clip_tokenizer().save_pretrained(root / "whole")
    return {"weights": str(root / "tower"), "text_weights": str(root / "whole"), "text_args": {}, "model_args": ARGS}


def images(count: int = 300) -> Tensor:
    """Noise in colours of its own each."""
    colours = torch.randn(count, 3, 1, 1, generator=torch.Generator().manual_seed(2))
    return inputs("tiny_clip", rows=count)["pixel_values"] + 3 * colours


@torch.no_grad()
def literal(folder: str, prompts: list[str], labels: list[str]) -> Tensor:
    """Cosine of every image with every class (images, classes)."""
    whole, tokenizer = CLIPModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    seen = whole.get_image_features(pixel_values=images()).pooler_output
    columns = []
    for label in labels:
        vectors = []
        for prompt in prompts:
            words = tokenizer([prompt.format(label.replace("_", " "))], return_tensors="pt")
            vector = whole.get_text_features(**words).pooler_output[0]
            vectors.append(vector / vector.norm())
        mean = torch.stack(vectors).mean(0)
        columns.append(seen @ (mean / mean.norm()) / seen.norm(dim=-1))
    return torch.stack(columns, dim=1)


@pytest.mark.parametrize("prompts", [PROMPTS[:1], PROMPTS])
def test_the_linear_head_predicts_what_the_whole_clip_does(folders, prompts):
    model = load("clip_vit_b16", labels=ANIMALS, **folders, image_size=32, prompts=prompts)
    cosine, whole = literal(folders["text_weights"], prompts, ANIMALS), whole_clip()
    with torch.no_grad():
        logits = model(pixel_values=images()).logits
    assert torch.equal(logits.argmax(-1), cosine.argmax(-1))
    assert len(set(cosine.argmax(-1).tolist())) >= 3
    torch.testing.assert_close(logits / logits.norm(dim=1, keepdim=True), cosine / cosine.norm(dim=1, keepdim=True))
    assert 0.5 < logits.norm() / (whole.logit_scale.exp() * cosine).norm() < 2  # about as large as CLIP's own
    if prompts == PROMPTS[:1]:  # transformers' own processing of several texts at once
        tokenizer = AutoTokenizer.from_pretrained(folders["text_weights"])
        words = tokenizer([PROMPTS[0].format(name.replace("_", " ")) for name in ANIMALS], padding=True)
        tensors = {name: torch.tensor(value) for name, value in words.items()}
        with torch.no_grad():
            own = whole(pixel_values=images(), **tensors).logits_per_image
        assert torch.equal(own.argmax(-1), logits.argmax(-1))


def test_names_are_read_with_spaces_and_every_class_has_its_own_row(folders):
    one = load("tiny_clip", **folders, labels=["barn_owl", "cat", "dog"])
    two = load("tiny_clip", **folders, labels=["dog", "barn owl", "cat"])
    torch.testing.assert_close(one.timm_model.head.weight, two.timm_model.head.weight[[1, 2, 0]], atol=1e-5, rtol=1e-5)
    assert one.config.id2label[0] == "barn_owl"
    assert clip.described(["barn_owl", "cat"], PROMPTS) == [
        ["a photo of a barn owl.", "a drawing of many barn owl on a table"],
        ["a photo of a cat.", "a drawing of many cat on a table"],
    ]
    labels = [f"class number {number}" for number in range(70)]  # embedded in parts
    head = load("tiny_clip", **folders, labels=labels).timm_model.head.weight
    some = load("tiny_clip", **folders, labels=[labels[3], labels[65]]).timm_model.head.weight
    torch.testing.assert_close(head[[3, 65]], some, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("weights", ["random", "folder"])
def test_nothing_is_drawn_from_the_callers_generator(folders, weights):
    changes = folders if weights == "folder" else {}
    one, two = load("tiny_clip", **changes, seed=1), load("tiny_clip", **changes, seed=2)
    number = torch.rand(1)
    torch.manual_seed(2)
    assert torch.equal(torch.rand(1), number)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name
    assert not one.timm_model.head.bias.any()
    assert len(one.timm_model.head.weight.unique(dim=0)) == 3
    assert not one.training


def test_typical_length_is_that_of_what_a_layer_norm_gives():
    torch.manual_seed(0)
    norm, projection = nn.LayerNorm(64), torch.randn(16, 64)
    with torch.no_grad():
        norm.weight.uniform_(0.5, 3)
        norm.bias.normal_()
        lengths = (norm(torch.randn(5000, 64)) @ projection.T).square().sum(-1).mean().sqrt()
    assert clip.typical_length(projection, norm).item() == pytest.approx(lengths.item(), rel=0.03)


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"labels": []}, "model=tiny_clip"),
        ({"labels": ["cat"]}, "model=tiny_clip"),
        ({"text_args": {"hidden_size": 25}}, r"model\.text_args="),
        ({"image_size": 40}, r"model\.image_size=40: .* 32"),
        ({"architecture": "resnet18", "model_args": {}}, r"model\.architecture=resnet18"),
    ],
)
def test_settings_that_make_no_zero_shot_head_are_named(changes, key):
    refused(key, "tiny_clip", **changes)


def test_a_text_tower_that_is_no_clip_or_of_another_one_is_refused(folders, tmp_path):
    whole_clip(width=40).save_pretrained(tmp_path / "other")
    clip_tokenizer().save_pretrained(tmp_path / "other")
    refused(r"model\.text_weights=.* 40, .* 32", "tiny_clip", **folders | {"text_weights": str(tmp_path / "other")})
    load("tiny_bert").save_pretrained(tmp_path / "bert")
    refused(r"model\.architecture=clip: .* bert", "tiny_clip", **folders | {"text_weights": str(tmp_path / "bert")})
