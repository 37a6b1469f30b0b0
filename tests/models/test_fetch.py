"""Weights of the model hub: which files are fetched, a hub that does not answer or refuses, files that are broken."""

from __future__ import annotations

import hashlib
import json
import logging
import socket
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch
from configured import load
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file

from partial_lora import progress
from partial_lora.errors import PartialLoraError
from partial_lora.models import fetch, tokenizer, weights_digest
from partial_lora.models.texts import byte_tokenizer

HEADS = {"tiny_vit": "timm_model.head", "tiny_bert": "classifier", "tiny_llama": ""}
TOKENIZER = {"tiny_vit": set(), "tiny_bert": {"vocab.txt", "tokenizer_config.json"}}
TOKENIZER["tiny_llama"] = {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}


class Hub:
    """A repository as the hub and its client would have it: files by name, and the settings of every download."""

    def __init__(self, root: Path, source: Path) -> None:
        self.source, self.snapshot, self.asked = source, root / "snapshot", []

    def __call__(self, repo: str, *, allow_patterns: list[str], **settings: object) -> str:
        self.asked.append({"repo": repo} | settings)
        self.snapshot.mkdir(exist_ok=True)
        for name in filter_repo_objects([file.name for file in self.source.iterdir()], allow_patterns=allow_patterns):
            content = (self.source / name).read_bytes()
            blob = self.snapshot.parent / "blobs" / hashlib.sha256(content).hexdigest()
            blob.parent.mkdir(exist_ok=True)
            if not (self.snapshot / name).exists():
                blob.write_bytes(content)
                (self.snapshot / name).unlink(missing_ok=True)
                (self.snapshot / name).symlink_to(blob)
        return str(self.snapshot)

    @property
    def fetched(self) -> set[str]:
        return {file.name for file in self.snapshot.iterdir()}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A function: a hub with a model, its tokenizer, the same weights as a pickle, and files of other libraries."""

    def serve(name: str) -> Hub:
        source = tmp_path / "source"
        model = load(name, seed=4)
        (model.bert if name == "tiny_bert" else model).save_pretrained(source)
        if name == "tiny_bert":
            words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "owl"]
            (source / "vocab.txt").write_text("\n".join(words) + "\n")
            (source / "tokenizer_config.json").write_text("{}")
        if name == "tiny_llama":
            byte_tokenizer().save_pretrained(source)
            (source / "chat_template.jinja").write_text("{{ messages[0].content }}")
        torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
        for other in ("tf_model.h5", "open_clip_model.safetensors", "consolidated.safetensors", "modeling.py"):
            (source / other).write_bytes(b"of no use")
        served = Hub(tmp_path, source)
        monkeypatch.setattr(HfApi, "model_info", lambda *arguments, **settings: None)
        monkeypatch.setattr(fetch, "snapshot_download", served)
        return served

    return serve


def refused(match: str, name: str, **changes: object) -> None:
    with pytest.raises(PartialLoraError, match=match) as caught:
        load(name, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", HEADS)
def test_a_model_and_its_tokenizer_come_of_one_repository_and_bear_its_name(hub, name):
    served = hub(name)
    model = load(name, weights="someone/tiny@0123456")
    assert served.fetched - {"generation_config.json"} == {"config.json", "model.safetensors"} | TOKENIZER[name]
    assert {(asked["repo"], asked["revision"]) for asked in served.asked} == {("someone/tiny", "0123456")}
    assert model.name_or_path == model.config.name_or_path == "someone/tiny"
    expected = load(name, weights=str(served.source))
    assert weights_digest(model, HEADS[name]) == weights_digest(expected, HEADS[name])
    if name == "tiny_bert":
        assert tokenizer(name="bert", weights="someone/tiny")("owl")["input_ids"] == [2, 5, 3]
    if name == "tiny_llama":
        read = tokenizer(name="llama", weights="someone/tiny", family="causal")
        assert read.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert served.asked[-1]["revision"] == ("0123456" if name == "tiny_vit" else None)


def test_a_pickle_of_an_encoder_is_fetched_where_there_is_nothing_better_and_of_others_never(hub, caplog, tmp_path):
    for name in HEADS:
        served = hub(name)
        (served.source / "model.safetensors").unlink()
        served.snapshot = tmp_path / f"snapshot-{name}"
        if name != "tiny_bert":
            refused(f"^model={name}: cannot read the weights", name, weights="someone/tiny")
            assert "pytorch_model.bin" not in served.fetched
            continue
        with caplog.at_level(logging.INFO):
            load(name, weights="someone/tiny")
        assert "someone/tiny has no safetensors" in caplog.text


@pytest.mark.parametrize(("name", "file"), [("tiny_vit", "model.safetensors"), ("tiny_bert", "pytorch_model.bin")])
def test_a_broken_file_is_named_and_downloaded_again(hub, caplog, name, file):
    served = hub(name)
    if file != "model.safetensors":
        (served.source / "model.safetensors").unlink()
    expected = weights_digest(load(name, weights="someone/tiny"), HEADS[name])
    stored = (served.snapshot / file).resolve()
    damaged = bytearray(stored.read_bytes())
    damaged[-3] ^= 1
    stored.write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        model = load(name, weights="someone/tiny")
    assert f"{file} in the hub's cache is broken" in caplog.text
    assert weights_digest(model, HEADS[name]) == expected


def test_the_cache_needs_no_hub_that_answers(hub, monkeypatch):
    def silence(*arguments: object, **settings: object) -> None:
        raise ConnectionError("nobody there")

    served = hub("tiny_vit")
    monkeypatch.setattr(HfApi, "model_info", silence)
    load("tiny_vit", weights="someone/tiny")
    assert served.asked
    assert all(asked["local_files_only"] for asked in served.asked)


def test_a_hub_that_takes_calls_and_does_not_answer_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(fetch, "_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(fetch, "HfApi", lambda: HfApi(endpoint=endpoint))
        refused(r"^model=tiny_vit: .*someone/x .*timed out.*model\.weights", "tiny_vit", weights="someone/x")


def test_a_name_that_no_repository_can_have_is_named():
    refused("^model=tiny_vit: .*/no/such/folder", "tiny_vit", weights="/no/such/folder")


@pytest.mark.parametrize(
    ("name", "repository", "instead"),
    [
        ("vit_b16", "timm/vit_base_patch16_224.augreg_in21k", "vit_s14"),
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
    refused(rf"^model={name}: .*{repository}.*model={instead}, ", name)
    if instead != "vit_s14":
        family = "causal" if instead == "smollm2_135m" else "encoder"
        with pytest.raises(PartialLoraError, match=rf"^model={name}: .*{repository}.*model={instead}, "):
            tokenizer(name=name, weights=repository, family=family)
    if name == "clip_vit_b16":  # the text tower alone
        tower = {"text_weights": "openai/clip-vit-base-patch16", "text_args": {}}
        refused(r"^model=tiny_clip: .*openai/clip-vit-base-patch16.*model=vit_s14, ", "tiny_clip", **tower)


def refusal(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind("refused\nin several lines", response=response)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("kind", "status", "reason"),
    [
        *((kind, status, r"licence.*https://huggingface\.co/meta-llama/Llama-2-7b-hf.*hf auth login.*HF_TOKEN")
          for kind in (GatedRepoError, HfHubHTTPError) for status in (401, 403)),
        (RepositoryNotFoundError, 401, "no such repository, or no access"),
    ],
)  # fmt: skip
def test_a_gated_repository_is_told_from_one_that_is_not_there(hub, monkeypatch, kind, status, reason, wrapped):
    def refuse(repo: str, **settings: object) -> str:
        if not wrapped or kind is RepositoryNotFoundError:
            raise refusal(kind, status)
        raise LocalEntryNotFoundError("nothing in the cache") from refusal(kind, status)

    hub("tiny_llama")
    monkeypatch.setattr(fetch, "snapshot_download", refuse)
    refused(rf"^model=llama2_7b: .*{reason}.*model=smollm2_135m, ", "llama2_7b")


def test_the_hubs_bars_become_events(tmp_path, monkeypatch, capfd):
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
