from __future__ import annotations

import hashlib
import json
import logging
import socket
from pathlib import Path
from types import SimpleNamespace

import configured
import huggingface_hub.constants
import pytest
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file
from tiny_vit import HEAD, load, pretrained

from partial_lora import progress
from partial_lora.errors import PartialLoraError
from partial_lora.models import fetch, tokenizer, weights_digest
from partial_lora.models.texts import byte_tokenizer


def serve(monkeypatch: pytest.MonkeyPatch, download) -> None:
    """A hub that answers, and what it does when it is asked for files."""
    monkeypatch.setattr(HfApi, "model_info", lambda *arguments, **settings: None)
    monkeypatch.setattr(fetch, "snapshot_download", download)


@pytest.fixture
def folder(tmp_path) -> Path:
    return pretrained(tmp_path / "pretrained")


def test_hub_out_of_reach_is_said_with_the_model_that_needs_none(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    settings = {"name": "vit_b16", "architecture": "vit_base_patch16_224", "model_args": {}, "image_size": 224}
    with pytest.raises(PartialLoraError, match=r"model=vit_b16: .*timm/vit_b.*augreg_in21k.*model=vit_s14") as caught:
        load(weights="timm/vit_base_patch16_224.augreg_in21k", **settings)
    assert "\n" not in str(caught.value)


def test_a_hub_that_takes_calls_and_says_nothing_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(fetch, "_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(fetch, "HfApi", lambda: HfApi(endpoint=endpoint))
        with pytest.raises(PartialLoraError, match=r"model=tiny_vit: cannot download someone/x .*timed out") as caught:
            load(weights="someone/x")
    assert "model.weights" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_in_the_cache_needs_no_hub_that_answers(repository, monkeypatch):
    def silence(*arguments: object, **settings: object) -> None:
        raise ConnectionError("nobody there")

    asked = []
    download = fetch.snapshot_download
    monkeypatch.setattr(HfApi, "model_info", silence)
    monkeypatch.setattr(fetch, "snapshot_download", lambda repo, **wanted: asked.append(wanted) or download(repo))
    load(weights="someone/tiny")
    assert all(wanted["local_files_only"] for wanted in asked)
    assert asked


def test_a_revision_is_the_one_that_is_fetched_and_no_part_of_the_name(repository, monkeypatch):
    asked = []
    download = fetch.snapshot_download
    monkeypatch.setattr(fetch, "snapshot_download", lambda repo, **wanted: asked.append(wanted) or download(repo))
    commit = "0123456789abcdef0123456789abcdef01234567"
    model = load(weights=f"someone/tiny@{commit}")
    assert {wanted["revision"] for wanted in asked} == {commit}
    assert model.name_or_path == model.config.name_or_path == "someone/tiny"
    load(weights="someone/tiny")
    assert asked[-1]["revision"] is None


def test_name_that_no_repository_can_have_is_said():
    with pytest.raises(PartialLoraError, match=r"model=tiny_vit: cannot download /no/such/folder from the model hub"):
        load(weights="/no/such/folder")


@pytest.fixture
def repository(folder, tmp_path, monkeypatch) -> Path:
    """The folder's model as a repository of the hub, stored as the hub's client stores it; gives the stored weights."""
    content = (folder / "model.safetensors").read_bytes()
    blob = tmp_path / "blobs" / hashlib.sha256(content).hexdigest()
    snapshot = tmp_path / "snapshot"

    def download(repo: str, **settings: object) -> str:
        assert repo == "someone/tiny"
        blob.parent.mkdir(exist_ok=True)
        snapshot.mkdir(exist_ok=True)
        (snapshot / "config.json").write_text((folder / "config.json").read_text())
        if not blob.exists():
            blob.write_bytes(content)
            (snapshot / "model.safetensors").symlink_to(blob)
        return str(snapshot)

    serve(monkeypatch, download)
    download("someone/tiny")
    return blob


def test_hub_model_is_loaded_and_known_by_its_repository(repository, folder):
    model = load(weights="someone/tiny")
    assert weights_digest(model, HEAD) == weights_digest(load(weights=str(folder)), HEAD)
    assert model.name_or_path == model.config.name_or_path == "someone/tiny"


def test_broken_file_of_the_hub_is_named_and_downloaded_again(repository, folder, caplog):
    damaged = bytearray(repository.read_bytes())
    damaged[-3] ^= 1
    repository.write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        model = load(weights="someone/tiny")
    assert "model.safetensors" in caplog.text
    assert weights_digest(model, HEAD) == weights_digest(load(weights=str(folder)), HEAD)


def test_hub_bars_become_events(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv(progress.VARIABLE, str(tmp_path / "events"))
    monkeypatch.delenv("RANK", raising=False)
    with fetch._Events(total=0, unit="B", desc="Downloading") as bar:
        bar.total = 1000  # the client learns of sizes file by file
        bar.update(400)
        bar.update(600)
        bar.refresh()
    with fetch._Events([1, 2], desc="Fetching 2 files") as files:
        list(files)
    events = [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()]
    assert {event["stage"] for event in events} == {"download"}
    assert (events[-1]["done"], events[-1]["total"]) == (1000, 1000)
    assert capfd.readouterr().err == ""


class Hub:
    """A repository as the hub and its client would have it: files by name, and what was asked for."""

    def __init__(self, root: Path, source: Path) -> None:
        self.source, self.snapshot, self.asked = source, root / "snapshot", []

    def __call__(self, repo: str, *, allow_patterns: list[str], **settings: object) -> str:
        self.asked.append(repo)
        self.snapshot.mkdir(exist_ok=True)
        for name in filter_repo_objects([file.name for file in self.source.iterdir()], allow_patterns=allow_patterns):
            content = (self.source / name).read_bytes()
            blob = self.snapshot.parent / "blobs" / hashlib.sha256(content).hexdigest()
            blob.parent.mkdir(exist_ok=True)
            if not (self.snapshot / name).exists():
                blob.write_bytes(content)
                (self.snapshot / name).symlink_to(blob)
        return str(self.snapshot)

    @property
    def fetched(self) -> set[str]:
        return {file.name for file in self.snapshot.iterdir()}


@pytest.fixture
def text_hub(tmp_path, monkeypatch) -> Hub:
    """A BERT with its tokenizer, and with what other libraries and older versions have beside it."""
    source = tmp_path / "source"
    configured.load("tiny_bert", seed=4).bert.save_pretrained(source)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "owl"]
    (source / "vocab.txt").write_text("\n".join(words) + "\n")
    (source / "tokenizer_config.json").write_text("{}")
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    for other in ("tf_model.h5", "open_clip_model.safetensors", "README.md", "modeling.py", "rust_model.ot"):
        (source / other).write_bytes(b"of no use")
    served = Hub(tmp_path, source)
    serve(monkeypatch, served)
    return served


def test_text_model_and_its_tokenizer_come_of_one_repository(text_hub):
    model = configured.load("tiny_bert", weights="someone/bert")
    assert text_hub.fetched == {"config.json", "model.safetensors", "vocab.txt", "tokenizer_config.json"}
    assert model.name_or_path == model.config.name_or_path == "someone/bert"
    expected = configured.load("tiny_bert", weights=str(text_hub.source))
    assert weights_digest(model, "classifier") == weights_digest(expected, "classifier")
    assert tokenizer(name="bert", weights="someone/bert")("owl")["input_ids"] == [2, 5, 3]
    assert set(text_hub.asked) == {"someone/bert"}


def test_pickle_is_fetched_only_where_the_repository_has_nothing_better(text_hub, caplog):
    expected = configured.load("tiny_bert", weights=str(text_hub.source))
    (text_hub.source / "model.safetensors").unlink()
    with caplog.at_level(logging.INFO):
        model = configured.load("tiny_bert", weights="someone/bert")
    assert "pytorch_model.bin" in text_hub.fetched
    assert "someone/bert has no safetensors" in caplog.text
    assert weights_digest(model, "classifier") == weights_digest(expected, "classifier")
    (text_hub.snapshot / "pytorch_model.bin").resolve().write_bytes(b"broken")
    with caplog.at_level(logging.WARNING):
        again = configured.load("tiny_bert", weights="someone/bert")
    assert "pytorch_model.bin in the hub's cache is broken" in caplog.text
    assert weights_digest(again, "classifier") == weights_digest(expected, "classifier")


def test_image_model_is_never_read_of_a_pickle(text_hub, folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    text_hub.source = folder
    with pytest.raises(PartialLoraError, match="model=tiny_vit: cannot read the weights in"):
        load(weights="someone/vit")
    assert text_hub.fetched == {"config.json"}


@pytest.mark.parametrize(
    ("name", "repository", "instead"),
    [
        ("bert_base", "google-bert/bert-base-uncased", "minilm_l6"),
        ("deberta_v3_base", "microsoft/deberta-v3-base", "minilm_l6"),
        ("convnext_tiny", "timm/convnext_tiny.fb_in22k", "vit_s14"),
        ("llama2_7b", "meta-llama/Llama-2-7b-hf", "smollm2_135m"),
        ("llama3_1_8b", "meta-llama/Llama-3.1-8B", "smollm2_135m"),
        ("qwen2_5_14b", "Qwen/Qwen2.5-14B", "smollm2_135m"),
        ("qwen2_5_0_5b", "Qwen/Qwen2.5-0.5B", "smollm2_135m"),
        ("clip_vit_b16", "timm/vit_base_patch16_clip_224.openai", "vit_s14"),
    ],
)
def test_every_model_of_the_hub_names_one_that_needs_none(tmp_path, monkeypatch, name, repository, instead):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(PartialLoraError, match=rf"model={name}: .*{repository}.*model={instead}, ") as caught:
        configured.load(name)
    assert "\n" not in str(caught.value)
    if instead != "vit_s14":
        family = "causal" if instead == "smollm2_135m" else "encoder"
        with pytest.raises(PartialLoraError, match=rf"model={name}: .*{repository}.*model={instead}, "):
            tokenizer(name=name, weights=repository, family=family)


def test_clip_without_its_text_tower_names_an_image_model(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(PartialLoraError, match=r"model=tiny_clip: .*openai/clip-vit-base-patch16.*model=vit_s14, "):
        configured.load("tiny_clip", text_weights="openai/clip-vit-base-patch16", text_args={})


@pytest.fixture
def causal_hub(tmp_path, monkeypatch) -> Hub:
    """A Llama with its tokenizer and chat template, the same weights as a pickle, and those of another library."""
    source = tmp_path / "source"
    configured.load("tiny_llama").save_pretrained(source)
    byte_tokenizer().save_pretrained(source)
    (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "consolidated.safetensors").write_bytes(b"of no use")
    served = Hub(tmp_path, source)
    serve(monkeypatch, served)
    return served


def test_causal_model_comes_with_its_chat_template_and_never_of_a_pickle(causal_hub):
    model = configured.load("tiny_llama", weights="someone/llama")
    assert "chat_template.jinja" in causal_hub.fetched
    assert not causal_hub.fetched & {"pytorch_model.bin", "consolidated.safetensors"}
    assert model.name_or_path == "someone/llama"
    read = tokenizer(name="llama", weights="someone/llama", family="causal")
    assert read.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    (causal_hub.source / "model.safetensors").unlink()
    (causal_hub.snapshot / "model.safetensors").unlink()
    with pytest.raises(PartialLoraError, match="model=tiny_llama: cannot read the weights in"):
        configured.load("tiny_llama", weights="someone/llama")
    assert "pytorch_model.bin" not in causal_hub.fetched


def refusal(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind("refused\nin several lines", response=response)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("kind", "status"), [(GatedRepoError, 401), (GatedRepoError, 403), (HfHubHTTPError, 401), (HfHubHTTPError, 403)]
)
def test_gated_repository_says_how_its_licence_is_accepted(monkeypatch, kind, status, wrapped):
    def refuse(repo: str, **settings: object) -> str:
        if not wrapped:
            raise refusal(kind, status)
        raise LocalEntryNotFoundError("nothing in the cache") from refusal(kind, status)

    serve(monkeypatch, refuse)
    page = r"https://huggingface\.co/meta-llama/Llama-2-7b-hf"
    expected = rf"model=llama2_7b: .*licence.*{page}.*hf auth login.*HF_TOKEN.*model=smollm2_135m, "
    with pytest.raises(PartialLoraError, match=expected) as caught:
        configured.load("llama2_7b")
    assert "\n" not in str(caught.value)


def test_repository_that_is_not_there_is_not_taken_for_a_gated_one(monkeypatch):
    def refuse(repo: str, **settings: object) -> str:
        raise refusal(RepositoryNotFoundError, 401)

    serve(monkeypatch, refuse)
    with pytest.raises(PartialLoraError, match=r"no such repository, or no access to it.*model=smollm2_135m"):
        configured.load("llama2_7b")
