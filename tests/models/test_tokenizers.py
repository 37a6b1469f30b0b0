"""The tokenizer that belongs to a model's weights, from each of the files that the hub has it in."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece
from configured import load, settings
from transformers import BertTokenizer

from partial_lora import models
from partial_lora.errors import PartialLoraError
from partial_lora.models import texts

TEXTS = ["the owl sleeps by day", "the cat and the dog sleep by night", "a day and a night", "owls, cats and dogs"]


def tokenizer(weights: object):
    return models.tokenizer(name="tiny", weights=str(weights))


def test_random_weights_read_bytes():
    built = tokenizer("random")
    assert len(built) == texts.VOCABULARY == 260 < 300
    read = built(["ab", "é!"], padding=True, return_tensors="pt")
    assert set(read) == {"input_ids", "token_type_ids", "attention_mask"}
    cls, sep, pad = built.cls_token_id, built.sep_token_id, built.pad_token_id
    assert pad == 0
    assert read["input_ids"][0].tolist() == [cls, *built.convert_tokens_to_ids(["a", "b"]), sep, pad]
    assert read["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]  # é is two bytes
    assert built.decode(read["input_ids"][1], skip_special_tokens=True) == "é!"
    assert built("ab", "c")["token_type_ids"] == [0, 0, 0, 0, 1, 1]
    every = "".join(map(chr, range(1, 0x500)))
    numbers = built(every)["input_ids"]
    assert max(numbers) < 260
    assert built.unk_token is None
    assert built.decode(numbers, skip_special_tokens=True) == every


@pytest.mark.parametrize("name", ["tiny_bert", "tiny_deberta"])
def test_random_models_have_room_for_it(name):
    read = tokenizer("random")(TEXTS, TEXTS, padding=True, truncation=True, max_length=40, return_tensors="pt")
    assert load(name)(**read).logits.shape == (4, 3)
    assert settings(name)["model_args"]["vocab_size"] == texts.VOCABULARY
    assert settings(name)["model_args"]["max_position_embeddings"] >= 128  # the schema's max_length


def test_words_of_a_vocabulary_file(tmp_path):
    load("tiny_bert").save_pretrained(tmp_path)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "owl", "sleep", "##s"]
    (tmp_path / "vocab.txt").write_text("\n".join(words) + "\n")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True, "model_max_length": 128}))
    read = tokenizer(tmp_path)("The owl sleeps")["input_ids"]
    assert read == [2, 5, 6, 7, 8, 3]


def test_sentencepiece_model_of_deberta(tmp_path):
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
    own = sentencepiece.SentencePieceProcessor(model_proto=written.getvalue())
    built = tokenizer(tmp_path)
    for text in TEXTS:
        assert built(text)["input_ids"] == [1, *own.encode(text), 2]
    pair = built(TEXTS[0], TEXTS[1])["input_ids"]
    assert pair == [1, *own.encode(TEXTS[0]), 2, *own.encode(TEXTS[1]), 2]
    assert built.pad_token_id == 0
    assert built.mask_token_id == 29


def spoilt(folder: Path, kind: str) -> None:
    load("tiny_bert").save_pretrained(folder)
    if kind == "broken":
        BertTokenizer().save_pretrained(folder)
        (folder / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize(
    ("kind", "message"), [("missing", "has no tokenizer"), ("broken", "cannot read the tokenizer")]
)
def test_a_tokenizer_that_is_missing_or_broken_is_named(tmp_path, kind, message):
    spoilt(tmp_path, kind)
    with pytest.raises(PartialLoraError, match=rf"model=tiny: .*{message}") as caught:
        tokenizer(tmp_path)
    assert "\n" not in str(caught.value)


def test_padding_is_the_end_of_a_text_where_nothing_else_is(tmp_path):
    """Llama's tokenizers have no token for it; one that has keeps its own."""
    for own, expected in ((None, "[SEP]"), ("[MASK]", "[MASK]")):
        load("tiny_llama").save_pretrained(tmp_path)
        built = texts.byte_tokenizer()
        built.pad_token = own
        built.save_pretrained(tmp_path)
        read = models.tokenizer(name="tiny", weights=str(tmp_path), family="causal")
        assert read.pad_token == expected
        masked = read(["a", "abc"], padding=True)["attention_mask"]
        assert masked == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen"])
def test_random_causal_models_share_the_tokens_of_bytes(name):
    read, model = models.tokenizer(name=name, weights="random", family="causal"), load(name)
    config = model.config
    ids = (read.pad_token_id, read.bos_token_id, read.eos_token_id)
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == ids
    assert len(read) == config.vocab_size
