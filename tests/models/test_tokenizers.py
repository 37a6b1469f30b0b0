"""The tokenizer that belongs to a model's weights, from each of the files that the hub has it in."""

from __future__ import annotations

import io
import json
import sys

import pytest
import sentencepiece
from configured import load, settings
from refusals import refusal
from transformers import BertTokenizer

from partial_lora import models
from partial_lora.models import language

TEXTS = ["the owl sleeps by day", "the cat and the dog sleep by night", "a day and a night", "owls, cats and dogs"]


def tokenizer(weights: object, family: str = "encoder"):
    return models.tokenizer(name="tiny", weights=str(weights), family=family)


def test_random_weights_read_bytes():
    built = tokenizer("random")
    assert len(built) == language.VOCABULARY == 260
    read = built(["ab", "é!"], padding=True)
    cls, sep, pad = built.cls_token_id, built.sep_token_id, built.pad_token_id
    assert read["input_ids"][0] == [cls, *built.convert_tokens_to_ids(["a", "b"]), sep, pad]
    assert read["attention_mask"] == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]  # é is two bytes
    assert built("ab", "c")["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    every = "".join(map(chr, range(1, 0x500)))
    numbers = built(every)["input_ids"]
    assert max(numbers) < 260
    assert built.decode(numbers, skip_special_tokens=True) == every


@pytest.mark.parametrize("name", ["tiny_bert", "tiny_deberta", "tiny_llama", "tiny_qwen"])
def test_random_models_have_room_for_it_and_share_its_special_tokens(name):
    model, family = load(name), settings(name)["family"]
    read = tokenizer("random", family)
    assert model.config.vocab_size == len(read)
    assert model.config.max_position_embeddings >= 128  # the schema's max_length
    if family == "causal":
        names = ("pad_token_id", "bos_token_id", "eos_token_id")
        assert [getattr(model.config, each) for each in names] == [getattr(read, each) for each in names]
    else:
        batch = read(TEXTS, TEXTS, padding=True, truncation=True, max_length=40, return_tensors="pt")
        assert model(**batch).logits.shape == (4, 3)


def test_sentencepiece_model_of_deberta(tmp_path, monkeypatch):
    """All that microsoft/deberta-v3-base has beside its weights: config.json, spm.model, tokenizer_config.json."""
    written = io.BytesIO()
    special = {"pad_id": 0, "bos_id": 1, "eos_id": 2, "unk_id": 3}
    special |= {"pad_piece": "[PAD]", "bos_piece": "[CLS]", "eos_piece": "[SEP]", "unk_piece": "[UNK]"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 5), model_writer=written, vocab_size=29, minloglevel=3, **special
    )
    load("tiny_deberta").save_pretrained(tmp_path)
    (tmp_path / "spm.model").write_bytes(written.getvalue())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False, "vocab_type": "spm"}))
    own, built = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue()), tokenizer(tmp_path)
    with monkeypatch.context() as without:
        for module in [each for each in sys.modules if each.partition(".")[0] == "sentencepiece"]:
            without.setitem(sys.modules, module, None)
        with refusal("model=tiny: ", tmp_path, "pip install sentencepiece"):
            tokenizer(tmp_path)
    for text in TEXTS:
        assert built(text)["input_ids"] == [1, *own.encode(text), 2]
    pair = built(TEXTS[0], TEXTS[1])["input_ids"]
    assert pair == [1, *own.encode(TEXTS[0]), 2, *own.encode(TEXTS[1]), 2]
    assert (built.pad_token_id, built.mask_token_id) == (0, 29)


@pytest.mark.parametrize("broken", [False, True])
def test_a_tokenizer_that_is_missing_or_broken_is_named(tmp_path, broken):
    load("tiny_bert").save_pretrained(tmp_path)
    if broken:
        BertTokenizer().save_pretrained(tmp_path)
        (tmp_path / "tokenizer.json").write_text("{}")
    with refusal("model=tiny: ", tmp_path):
        tokenizer(tmp_path)


@pytest.mark.parametrize(("own", "expected"), [(None, "[SEP]"), ("[MASK]", "[MASK]")])
def test_padding_is_the_end_of_a_text_where_nothing_else_is(tmp_path, own, expected):
    """Llama's tokenizers have no token for it; one that has keeps its own."""
    load("tiny_llama").save_pretrained(tmp_path)
    built = language.byte_tokenizer()
    built.pad_token = own
    built.save_pretrained(tmp_path)
    read = tokenizer(tmp_path, "causal")
    assert read.pad_token == expected
    assert read(["a", "abc"], padding=True)["attention_mask"] == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
