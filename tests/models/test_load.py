"""Loading a model of any family: what is loaded, what is drawn and from where, and what is refused in one line."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from configured import LABELS, digest, inputs, load, logits, loud, refused, settings
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import BertModel, DebertaV2Model, LlamaForCausalLM, Qwen2ForCausalLM

from partial_lora import models
from partial_lora.models import vision
from partial_lora.models.config import ModelConfig

VIT, BERT, DEBERTA, LLAMA = (
    settings(name)["model_args"] for name in ("tiny_vit", "tiny_bert", "tiny_deberta", "tiny_llama")
)
WITH_HEAD = ("tiny_vit", "tiny_bert", "tiny_deberta")


@pytest.fixture
def pretrained(tmp_path):
    """A function: the tiny model of a config as the hub has it, for other classes or without any."""

    def save(name: str) -> Path:
        folder = tmp_path / name
        if name == "tiny_vit":
            model = loud(load(name, labels=["old", "older", "oldest"], seed=4))
        elif name in WITH_HEAD:  # the encoder alone, without pooler or classifier of DeBERTa
            model = loud(load(name, seed=4)).base_model
        else:
            model = loud(load(name))
            if name == "tiny_qwen":
                nn.init.normal_(model.lm_head.weight)
                for layer in model.model.layers:
                    nn.init.normal_(layer.self_attn.q_proj.bias)
        model.save_pretrained(folder, max_shard_size="200KB" if name == "tiny_qwen" else "1GB")
        return folder

    return save


def head(model: nn.Module, name: str) -> nn.Linear:
    return model.get_submodule(settings(name)["head"])


def test_weights_of_a_folder_are_loaded_whole_under_a_new_head(pretrained):
    folder = pretrained("tiny_vit")
    model, saved = load("tiny_vit", weights=str(folder)), load_file(folder / "model.safetensors")
    state = model.state_dict()
    assert state.keys() == saved.keys()
    for name, value in saved.items():  # the old head is of as many classes
        assert torch.equal(state[name], value) != (name == "timm_model.head.weight"), name
    assert not model.training
    assert model.name_or_path == folder.name  # no path of this machine
    bert = load("tiny_bert", weights=str(pretrained("tiny_bert")))
    alone = BertModel.from_pretrained(pretrained("tiny_bert")).eval()
    with torch.no_grad():
        assert torch.equal(bert(**inputs("tiny_bert")).logits, bert.classifier(alone(**inputs("tiny_bert"))[1]))


@pytest.mark.parametrize("name", WITH_HEAD)
def test_the_head_alone_comes_of_the_callers_generator(name, pretrained):
    for weights in ("random", str(pretrained(name))):
        one, other, again = (load(name, weights=weights, seed=seed) for seed in (1, 2, 1))
        after = torch.rand(1)
        torch.manual_seed(1)
        expected = nn.init.normal_(torch.empty(3, 32), std=0.02)
        assert torch.equal(torch.rand(1), after)
        assert torch.equal(head(one, name).weight, expected)
        assert torch.equal(head(again, name).weight, expected)
        assert not torch.equal(head(other, name).weight, expected)
        assert not head(one, name).bias.any()
        assert len({digest(model, name) for model in (one, other, again)}) == 1


@pytest.mark.parametrize(("name", "kind"), [("tiny_llama", LlamaForCausalLM), ("tiny_qwen", Qwen2ForCausalLM)])
def test_a_causal_model_is_loaded_whole_and_nothing_is_drawn(pretrained, name, kind, tmp_path):
    folder = pretrained(name)
    model = load(name, weights=str(folder), labels=["a", "b"])
    number = torch.rand(1)
    torch.manual_seed(0)
    assert torch.equal(torch.rand(1), number)
    assert type(model) is kind
    assert torch.equal(logits(model, name), logits(kind.from_pretrained(folder).eval(), name))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (name == "tiny_llama")
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (name == "tiny_qwen")
    for changes in ({}, {"quantization": "nf4"}):  # random weights are those of every run
        assert len({digest(load(name, seed=seed, **changes), name) for seed in (1, 2)}) == 1
    model.save_pretrained(tmp_path / "again")  # nothing of how it is used here, such as without a cache, is saved
    for file in ("config.json", "generation_config.json"):
        assert (tmp_path / "again" / file).read_text() == (folder / file).read_text()
    assert '"use_cache": true' in (folder / "config.json").read_text()


def test_pooler_without_pretrained_weights_is_the_same_in_every_run_and_one_with_them_is_kept(pretrained, tmp_path):
    folder = pretrained("tiny_deberta")
    three = load("tiny_deberta", weights=str(folder), seed=1)
    two = load("tiny_deberta", weights=str(folder), labels=["a", "b"], seed=2)
    assert torch.equal(three.pooler.dense.weight, two.pooler.dense.weight)
    assert 0.01 < float(three.pooler.dense.weight.detach().std()) < 0.03
    assert not three.pooler.dense.bias.any()
    alone = DebertaV2Model.from_pretrained(folder).state_dict()
    assert all(torch.equal(value, alone[key]) for key, value in three.deberta.state_dict().items())
    whole = loud(load("tiny_deberta", seed=4))
    whole.save_pretrained(tmp_path / "whole")
    again = load("tiny_deberta", weights=str(tmp_path / "whole"), seed=5)
    assert torch.equal(again.pooler.dense.weight, whole.pooler.dense.weight)
    assert not torch.equal(again.classifier.weight, whole.classifier.weight)


@pytest.mark.parametrize("name", ["tiny_bert", "tiny_vit"])
def test_labels_survive_saving_and_no_labels_are_one_real_number(name, pretrained, tmp_path):
    folder = str(pretrained(name))
    model = load(name, weights=folder)
    model.save_pretrained(tmp_path / "classes")
    again = type(model).from_pretrained(tmp_path / "classes").eval()
    assert again.config.id2label == model.config.id2label == dict(enumerate(LABELS))
    assert model.config.label2id == {label: number for number, label in enumerate(LABELS)}
    assert torch.equal(logits(again, name), logits(model, name))
    if name == "tiny_bert":  # else the loss is multiplied by the steps of accumulation
        assert model.accepts_loss_kwargs is False
    wanted, classes = torch.tensor([0.5, -1.0, 2.0, 0.0]), torch.tensor([0, 1, 2, 0])
    number = load(name, weights=folder, labels=[])
    output = number(**inputs(name), labels=wanted)
    assert output.logits.shape == (4, 1)
    torch.testing.assert_close(output.loss, nn.functional.mse_loss(output.logits[:, 0], wanted))
    number.save_pretrained(tmp_path / "number")
    output = load(name, weights=str(tmp_path / "number"))(**inputs(name), labels=classes)  # which can learn classes
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits, classes))


@pytest.mark.parametrize("name", [*WITH_HEAD, "tiny_llama", "tiny_qwen"])
def test_empty_has_the_shapes_of_the_loaded_model_and_no_memory(name):
    chosen = {key: settings(name)[key] for key in ("family", "architecture", "model_args") if key in settings(name)}
    empty, loaded = models.empty(**chosen, num_labels=3).state_dict(), load(name).state_dict()
    assert {tensor.device.type for tensor in empty.values()} == {"meta"}
    assert {key: value.shape for key, value in empty.items()} == {key: value.shape for key, value in loaded.items()}


def test_images_of_other_sizes_fit_where_the_architecture_takes_them(pretrained):
    dynamic = {**VIT, "dynamic_img_size": True}
    model = load("tiny_vit", weights=str(pretrained("tiny_vit")), model_args=dynamic, image_size=48)
    assert model(torch.zeros(1, 3, 48, 48)).logits.shape == (1, 3)
    convolutional = load("tiny_vit", architecture="resnet10t", model_args={}, image_size=37)
    assert vision.head_name(convolutional) == "timm_model.fc"
    assert convolutional(torch.zeros(2, 3, 37, 37)).logits.shape == (2, 3)


@pytest.mark.parametrize(
    ("name", "key", "quantization"),
    [
        ("tiny_vit", "timm_model.blocks.2.mlp.fc1.weight", None),
        ("tiny_bert", "bert.encoder.layer.2.output.dense.weight", None),
        ("tiny_deberta", "deberta.encoder.rel_embeddings.weight", None),
        ("tiny_qwen", "model.norm.weight", None),
        ("tiny_qwen", "lm_head.weight", None),
        ("tiny_qwen", "model.layers.2.mlp.down_proj.weight", "nf4"),
    ],
)
def test_a_missing_weight_is_named(pretrained, name, key, quantization):
    folder = pretrained(name)
    stored = key.removeprefix("bert.").removeprefix("deberta.")
    (file,) = [file for file in folder.glob("*.safetensors") if stored in load_file(file)]
    state = {other: value for other, value in load_file(file).items() if other != stored}
    save_file(state, file, metadata={"format": "pt"})
    refused(rf"model={name}: {key} .*{folder}", name, weights=str(folder), quantization=quantization)


def test_broken_weights_are_named(pretrained):
    folder = pretrained("tiny_vit")
    large = {"model_args": {**VIT, "img_size": 64}, "image_size": 64}
    refused(r"model=tiny_vit: .*timm_model\.pos_embed", "tiny_vit", weights=str(folder), **large)
    os.truncate(folder / "model.safetensors", 5000)
    refused(f"model=tiny_vit: .*{folder}", "tiny_vit", weights=str(folder))
    folder = pretrained("tiny_bert")
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "of_nobody"}
    (folder / "config.json").write_text(json.dumps(config))
    refused(rf"model\.weights={folder}", "tiny_bert", weights=str(folder))


@pytest.mark.parametrize("name", ["tiny_bert", "tiny_vit", "tiny_llama"])
def test_a_pickle_of_an_encoder_is_read_without_its_code_and_of_others_not_at_all(name, pretrained, tmp_path):
    class Harmful:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    folder = pretrained(name)
    expected, state = digest(load(name, weights=str(folder)), name), load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    if name == "tiny_bert":
        assert digest(load(name, weights=str(folder)), name) == expected
        torch.save(state | {"harm": Harmful()}, folder / "pytorch_model.bin")
    refused(rf"model={name}: (?!.*weights_only).*{folder}(?!.*weights_only)", name, weights=str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("name", "changes", "key"),
    [
        ("tiny_vit", {"architecture": "vit_small_patch16_224"}, r"model\.architecture=vit_small_patch16_224"),
        ("tiny_bert", {"architecture": "deberta-v2", "model_args": DEBERTA}, r"model\.architecture=deberta-v2"),
        ("tiny_bert", {"model_args": BERT | {"num_hidden_layers": 2}}, r"model\.model_args\.num_hidden_layers=2"),
        ("tiny_bert", {"model_args": BERT | {"num_attention_heads": 4}}, r"model\.model_args\.num_attention_heads=4"),
        ("tiny_llama", {"architecture": "qwen2"}, r"model\.architecture=qwen2"),
        ("tiny_llama", {"model_args": LLAMA | {"tie_word_embeddings": False}}, r"model\.model_args\.tie_word_emb"),
        ("tiny_llama", {"model_args": LLAMA | {"num_key_value_heads": 4}}, r"model\.model_args\.num_key_value_heads=4"),
    ],
)
def test_weights_of_another_geometry_are_refused(pretrained, name, changes, key):
    refused(key, name, **{"weights": str(pretrained(name)), **changes})


@pytest.mark.parametrize(
    ("name", "changes", "key"),
    [
        ("tiny_vit", {"image_size": 40}, r"model\.image_size=40"),
        ("tiny_vit", {"image_size": 50, "model_args": {**VIT, "dynamic_img_size": True}}, r"model\.image_size=50.*8"),
        ("tiny_vit", {"architecture": "vit_of_nobody"}, r"model\.architecture=vit_of_nobody"),
        ("tiny_vit", {"model_args": {"depht": 3}}, r"model\.model_args=.*depht"),
        ("tiny_vit", {"weights": "bundled:nothing"}, r"model\.weights=bundled:nothing.*bundled:vit_s14"),
        ("tiny_vit", {"labels": ["cat"]}, "model=tiny_vit"),
        ("tiny_bert", {"architecture": "berd"}, r"model\.architecture=berd"),
        ("tiny_bert", {"architecture": "vit"}, r"model\.architecture=vit"),
        ("tiny_bert", {"model_args": BERT | {"hiden_size": 3}}, r"model\.model_args\.hiden_size"),
        ("tiny_bert", {"model_args": BERT | {"hidden_size": "wide"}}, r"model\.model_args=.*hidden_size"),
        ("tiny_bert", {"model_args": BERT | {"hidden_act": "swish2"}}, r"model\.model_args=.*swish2"),
        ("tiny_bert", {"model_args": BERT | {"pad_token_id": 500}}, r"model\.model_args="),
        ("tiny_bert", {"model_args": BERT | {"vocab_size": 99}}, r"model\.model_args\.vocab_size=99.*260"),
        ("tiny_llama", {"model_args": LLAMA | {"num_attention_heads": 5}}, r"model\.model_args="),
        ("tiny_deberta", {"attn_implementation": "sdpa"}, r"model\.attn_implementation=sdpa"),
        ("tiny_vit", {"attn_implementation": "flash_attention_2"}, r"model\.attn_implementation=flash_attention_2"),
        ("tiny_convnext", {"attn_implementation": "eager"}, r"model\.attn_implementation=eager"),
    ],
)
def test_settings_that_fit_no_model_are_named(name, changes, key):
    refused(key, name, **changes)


def small(last: str = "2") -> nn.Module:
    """A model with buffers, of the same numbers everywhere."""
    model = nn.Sequential()
    for name, module in {"0": nn.Linear(3, 4), "1": nn.BatchNorm1d(4), last: nn.Linear(4, 2)}.items():
        model.add_module(name, module)
    for number, tensor in enumerate(model.state_dict().values()):
        tensor.copy_(torch.arange(tensor.numel()).view_as(tensor) + number)
    return model


def test_a_digest_tells_every_weight_and_buffer_but_the_heads_and_is_the_same_everywhere():
    digest = models.weights_digest(small(), "2")
    assert digest == "25c2f9332fbe08fb14dfe1018e937dcf38496e3705339ed83fd467b25c9322d4"
    for name in small().state_dict():
        changed = small()
        changed.state_dict()[name].view(-1)[-1] += 1
        assert (models.weights_digest(changed, "2") == digest) == name.startswith("2."), name
    assert models.weights_digest(small("22"), "2") != digest  # a module's name, not any prefix of it


def test_an_encoder_whose_config_has_no_range_of_its_own_gets_a_head_as_berts() -> None:
    widths = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    args = {"vocab_size": 300, "d_model": 64, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, **widths}
    bart = models.load(ModelConfig("bart", "encoder", "random", "bart", args), ["a", "b"])
    head = bart.get_submodule(models.head_name(bart, "encoder"))
    assert 0.01 < float(head.weight.std()) < 0.03
