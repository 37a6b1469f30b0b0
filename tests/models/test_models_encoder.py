"""Text encoders: what is loaded, what is drawn and from where, and what is refused."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from configured import inputs, load, loud, settings
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForSequenceClassification, BertModel, DebertaV2Model

from partial_lora import models
from partial_lora.errors import PartialLoraError
from partial_lora.models import texts

BERT, DEBERTA = settings("tiny_bert")["model_args"], settings("tiny_deberta")["model_args"]


@pytest.fixture
def bert(tmp_path) -> Path:
    """A BERT as it is pre-trained: the encoder alone, its names without the classifier's prefix."""
    loud(load("tiny_bert", seed=4)).bert.save_pretrained(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.fixture
def deberta(tmp_path) -> Path:
    """A DeBERTa as it is pre-trained: neither pooler nor classifier."""
    loud(load("tiny_deberta", seed=4)).deberta.save_pretrained(tmp_path / "deberta")
    return tmp_path / "deberta"


def rewrite(folder: Path, change) -> None:
    state = change(load_file(folder / "model.safetensors"))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_an_encoder_alone_fills_the_classifier_around_it(bert):
    model = load("bert_base", weights=str(bert), model_args=BERT)
    alone = BertModel.from_pretrained(bert).eval()
    batch = inputs("tiny_bert")
    with torch.no_grad():
        expected = model.classifier(alone(**batch).pooler_output)
        assert torch.equal(model(**batch).logits, expected)
    assert texts.head_name(model) == "classifier"


def test_head_alone_comes_of_the_callers_generator(bert, deberta):
    for name, folder in (("tiny_bert", bert), ("tiny_deberta", deberta)):
        for weights in ("random", str(folder)):
            one, other, again = (load(name, weights=weights, seed=seed) for seed in (1, 2, 1))
            torch.manual_seed(1)
            expected = nn.init.normal_(torch.empty(3, 32), std=0.02)
            assert torch.equal(one.classifier.weight, expected)
            assert torch.equal(again.classifier.weight, expected)
            assert not torch.equal(other.classifier.weight, expected)
            assert not one.classifier.bias.any()
            digests = {models.weights_digest(model, "classifier") for model in (one, other, again)}
            assert len(digests) == 1
            torch.manual_seed(1)
            nn.init.normal_(torch.empty(3, 32))
            number = torch.rand(1)
            load(name, weights=weights, seed=1)
            assert torch.equal(torch.rand(1), number)


def test_pooler_without_pretrained_weights_is_the_same_in_every_run_and_for_every_task(deberta):
    three = load("tiny_deberta", weights=str(deberta), seed=1)
    two = load("tiny_deberta", weights=str(deberta), labels=["a", "b"], seed=2)
    assert torch.equal(three.pooler.dense.weight, two.pooler.dense.weight)
    assert 0.01 < float(three.pooler.dense.weight.detach().std()) < 0.03
    assert not three.pooler.dense.bias.any()
    alone = DebertaV2Model.from_pretrained(deberta).state_dict()
    for key, value in three.deberta.state_dict().items():
        assert torch.equal(value, alone[key]), key


def test_a_classifiers_own_pooler_is_kept_and_its_head_is_not(tmp_path):
    saved = loud(load("tiny_deberta", seed=4))
    saved.save_pretrained(tmp_path)
    model = load("tiny_deberta", weights=str(tmp_path), seed=5)
    assert torch.equal(model.pooler.dense.weight, saved.pooler.dense.weight)
    assert not torch.equal(model.classifier.weight, saved.classifier.weight)


def test_weights_in_old_names_are_found(bert):
    """BERT's published weights call a layer norm's weight and bias gamma and beta, and have a head of their own."""
    expected = load("bert_base", weights=str(bert), model_args=BERT)

    def old(state: dict) -> dict:
        renamed = {}
        for key, value in state.items():
            for new, past in (("LayerNorm.weight", "LayerNorm.gamma"), ("LayerNorm.bias", "LayerNorm.beta")):
                key = key.replace(new, past)
            renamed[f"bert.{key}"] = value
        return renamed | {"cls.predictions.bias": torch.zeros(260), "bert.embeddings.position_ids": torch.arange(128)}

    rewrite(bert, old)
    model = load("bert_base", weights=str(bert), model_args=BERT)
    assert models.weights_digest(model, "classifier") == models.weights_digest(expected, "classifier")


def test_pickled_weights_are_read_where_there_are_no_others_and_run_no_code(bert, tmp_path):
    expected = load("tiny_bert", weights=str(bert))
    state = load_file(bert / "model.safetensors")
    (bert / "model.safetensors").unlink()
    torch.save(state, bert / "pytorch_model.bin")
    model = load("tiny_bert", weights=str(bert))
    assert models.weights_digest(model, "classifier") == models.weights_digest(expected, "classifier")

    class Harmful:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    torch.save(state | {"harm": Harmful()}, bert / "pytorch_model.bin")
    with pytest.raises(PartialLoraError, match="model=tiny_bert: cannot read the weights in") as caught:
        load("tiny_bert", weights=str(bert))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_no_labels_are_one_real_number(bert):
    model = load("tiny_bert", weights=str(bert), labels=[])
    batch = inputs("tiny_bert")
    wanted = torch.tensor([0.5, -1.0, 2.0, 0.0])
    output = model(**batch, labels=wanted)
    assert output.logits.shape == (4, 1)
    torch.testing.assert_close(output.loss, nn.functional.mse_loss(output.logits[:, 0], wanted))
    images = load("tiny_vit", labels=[])
    output = images(**inputs("tiny_vit"), labels=wanted)
    torch.testing.assert_close(output.loss, nn.functional.mse_loss(output.logits[:, 0], wanted))


def test_weights_of_a_regression_can_learn_classes(bert, tmp_path):
    load("tiny_bert", weights=str(bert), labels=[]).save_pretrained(tmp_path / "regression")
    model = load("tiny_bert", weights=str(tmp_path / "regression"))
    batch, labels = inputs("tiny_bert"), torch.tensor([0, 1, 2, 0])
    output = model(**batch, labels=labels)
    torch.testing.assert_close(output.loss, nn.functional.cross_entropy(output.logits, labels))
    assert model.config.id2label == {0: "cat", 1: "dog", 2: "barn_owl"}


def test_labels_survive_saving_and_the_loss_is_not_multiplied(bert, tmp_path):
    model = load("tiny_bert", weights=str(bert))
    model.save_pretrained(tmp_path / "saved")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved").eval()
    assert again.config.id2label == {0: "cat", 1: "dog", 2: "barn_owl"}
    batch = inputs("tiny_bert")
    with torch.no_grad():
        assert torch.equal(again(**batch).logits, model(**batch).logits)
    assert model.accepts_loss_kwargs is False


def test_empty_has_the_shapes_of_the_loaded_model(deberta):
    shapes = models.empty(family="encoder", architecture="deberta-v2", model_args=DEBERTA, num_labels=3).state_dict()
    loaded = load("tiny_deberta", weights=str(deberta)).state_dict()
    assert {name: value.shape for name, value in shapes.items()} == {name: v.shape for name, v in loaded.items()}


def without(key: str):
    return lambda state: {name: value for name, value in state.items() if name != key}


def test_missing_weight_is_named(bert, deberta):
    rewrite(bert, without("encoder.layer.2.output.dense.weight"))
    with pytest.raises(PartialLoraError, match=r"bert\.encoder\.layer\.2\.output\.dense\.weight is missing in"):
        load("tiny_bert", weights=str(bert))
    rewrite(deberta, without("encoder.rel_embeddings.weight"))
    with pytest.raises(PartialLoraError, match=r"deberta\.encoder\.rel_embeddings\.weight is missing in"):
        load("tiny_deberta", weights=str(deberta))


def changed(**args: object) -> dict:
    return copy.deepcopy(BERT) | args


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "deberta-v2", "model_args": DEBERTA}, r"model\.architecture=deberta-v2: .* is a bert; set"),
        ({"model_args": changed(num_hidden_layers=2)}, r"model\.model_args\.num_hidden_layers=2: .* has 3; set that"),
        ({"model_args": changed(num_attention_heads=4)}, r"model\.model_args\.num_attention_heads=4: .* has 2"),
        ({"architecture": "berd"}, r"model\.architecture=berd: transformers has no such model_type"),
        ({"architecture": "vit"}, r"model\.architecture=vit: transformers has no classifier of sequences"),
        ({"model_args": changed(hiden_size=3)}, r"model\.model_args\.hiden_size: bert takes none of that name"),
        ({"model_args": changed(hidden_size="wide")}, r"model\.model_args=.*: no geometry of bert \(.*hidden_size"),
        ({"model_args": changed(num_attention_heads=5)}, r"model\.model_args=.*: no geometry of bert \(.*multiple"),
        ({"weights": "random", "model_args": changed(vocab_size=99)}, r"vocab_size=99: expected at least 260"),
        ({"labels": ["cat"]}, r"expected at least two labels"),
    ],
)
def test_settings_that_fit_no_model_are_named_in_one_line(bert, changes, message):
    with pytest.raises(PartialLoraError, match=message) as caught:
        load("tiny_bert", **{"weights": str(bert), **changes})
    assert "\n" not in str(caught.value)


def test_folder_that_wants_to_run_code_of_its_own_is_refused(bert, tmp_path):
    config = json.loads((bert / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (bert / "config.json").write_text(json.dumps(config))
    (bert / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(
        PartialLoraError, match=r"model\.weights=.*: expected a config\.json that transformers"
    ) as caught:
        load("tiny_bert", weights=str(bert))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "ran").exists()
