"""Weights of the model hub: which files are fetched, a hub that does not answer or refuses, files that are broken."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import socket
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
import torch
from configured import OTHERS, digest, load, refused, settings
from huggingface_hub import HfApi
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from refusals import refusal
from safetensors.torch import load_file

from partial_lora import progress
from partial_lora.finished.run import at_commits
from partial_lora.models import fetch, tokenizer
from partial_lora.models.config import ModelConfig
from partial_lora.models.language import byte_tokenizer
from partial_lora.settings.schema import Config

TOKENIZER = {
    "tiny_vit": set(),
    "tiny_bert": {"vocab.txt", "tokenizer_config.json"},
    "tiny_llama": {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"},
}
INSTEAD = {"encoder": "minilm_l6", "causal": "smollm2_135m"}


class Hub:
    """A repository as the hub and its client would have it: files by name, and the settings of every download."""

    def __init__(self, root: Path, source: Path) -> None:
        self.source, self.snapshot, self.calls = source, root / "snapshots" / "0a1b", []

    def __call__(self, repo: str, *, allow_patterns: list[str], **settings: object) -> str:
        self.calls.append({"repo": repo} | settings)
        self.snapshot.mkdir(parents=True, exist_ok=True)
        for name in filter_repo_objects([file.name for file in self.source.iterdir()], allow_patterns=allow_patterns):
            content = (self.source / name).read_bytes()
            blob = self.source.parent / "blobs" / hashlib.sha256(content).hexdigest()
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
            (source / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "owl"]) + "\n")
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


@pytest.mark.parametrize("name", TOKENIZER)
def test_a_model_and_its_tokenizer_come_of_one_repository_and_bear_its_name(hub, name):
    served = hub(name)
    model = load(name, weights="someone/tiny@0123456")
    assert served.fetched - {"generation_config.json"} == {"config.json", "model.safetensors"} | TOKENIZER[name]
    assert {(call["repo"], call["revision"]) for call in served.calls} == {("someone/tiny", "0123456")}
    assert model.name_or_path == model.config.name_or_path == "someone/tiny"
    assert digest(model, name) == digest(load(name, weights=str(served.source)), name)
    if name == "tiny_bert":
        assert tokenizer(name="bert", weights="someone/tiny")("owl")["input_ids"] == [2, 5, 3]
    if name == "tiny_llama":
        read = tokenizer(name="llama", weights="someone/tiny", family="causal")
        assert read.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "hi"
    assert served.calls[-1]["revision"] == ("0123456" if name == "tiny_vit" else None)


def test_a_finished_run_has_its_model_at_the_commit_that_it_was_trained_over(hub, tmp_path):
    hub("tiny_bert")
    of_hub = ModelConfig(family="clip", weights="someone/tiny@main", text_weights="someone/clip")
    assert fetch.commits(of_hub) == {"model.weights": "0a1b", "model.text_weights": "0a1b"}
    assert [fetch.commits(ModelConfig(weights=place)) for place in ("random", "bundled:vit_s14", str(tmp_path))] == [
        {}
    ] * 3
    pinned = at_commits(Config(model=of_hub), fetch.commits(of_hub)).model
    assert (pinned.weights, pinned.text_weights) == ("someone/tiny@0a1b", "someone/clip@0a1b")
    assert at_commits(Config(model=of_hub), {}).model == of_hub


@pytest.mark.parametrize("name", TOKENIZER)
def test_a_pickle_of_an_encoder_is_fetched_where_there_is_nothing_better_and_of_others_never(hub, caplog, name):
    served = hub(name)
    (served.source / "model.safetensors").unlink()
    if name == "tiny_bert":
        with caplog.at_level(logging.INFO):
            load(name, weights="someone/tiny")
        assert "someone/tiny" in caplog.text
    else:
        refused(f"model={name}: ", name, weights="someone/tiny")
        assert "pytorch_model.bin" not in served.fetched


def test_a_full_disk_is_no_hub_that_is_not_there(hub, monkeypatch):
    hub("tiny_vit")

    def download(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/cache/blob")

    monkeypatch.setattr(fetch, "snapshot_download", download)
    refused("/cache/blob: .*HF_HOME", "tiny_vit", weights="someone/tiny")


@pytest.mark.parametrize(("name", "file"), [("tiny_vit", "model.safetensors"), ("tiny_bert", "pytorch_model.bin")])
def test_a_broken_file_is_named_and_downloaded_again(hub, caplog, name, file):
    served = hub(name)
    if file != "model.safetensors":
        (served.source / "model.safetensors").unlink()
    expected = digest(load(name, weights="someone/tiny"), name)
    stored = (served.snapshot / file).resolve()
    damaged = bytearray(stored.read_bytes())
    damaged[-3] ^= 1
    stored.write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        assert digest(load(name, weights="someone/tiny"), name) == expected
    assert file in caplog.text


def test_the_cache_needs_no_hub_that_answers(hub, monkeypatch):
    def silence(*arguments: object, **settings: object) -> None:
        raise ConnectionError("nobody there")

    served = hub("tiny_vit")
    monkeypatch.setattr(HfApi, "model_info", silence)
    load("tiny_vit", weights="someone/tiny")
    assert [call["local_files_only"] for call in served.calls] == [True]


def test_a_hub_that_takes_calls_and_does_not_answer_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(fetch, "_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        monkeypatch.setattr(fetch, "HfApi", lambda: HfApi(endpoint=endpoint))
        refused(r"model=tiny_vit: .*someone/x .*timed out.*model\.weights", "tiny_vit", weights="someone/x")


def test_a_name_that_no_repository_can_have_is_named():
    refused("model.weights=/no/such/folder: ", "tiny_vit", weights="/no/such/folder")


@pytest.mark.parametrize("name", [name for name in OTHERS if not settings(name)["weights"].startswith("bundled:")])
def test_every_model_of_the_hub_names_one_that_needs_none(tmp_path, monkeypatch, name):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    chosen = settings(name)
    family, repository = chosen.get("family", "timm"), chosen["weights"].partition("@")[0]
    key = rf"model={name}: .*{repository}.*model={INSTEAD.get(family, 'vit_s14')}, "
    refused(key, name)
    if family in INSTEAD:
        with refusal(key):
            tokenizer(name=name, weights=repository, family=family)
    if family == "clip":  # the text tower alone
        tower = {"text_weights": chosen["text_weights"], "text_args": {}}
        refused(rf"model=tiny_clip: .*{chosen['text_weights']}.*model=vit_s14, ", "tiny_clip", **tower)


LICENCE = r"https://huggingface\.co/meta-llama/Llama-2-7b-hf.*hf auth login.*HF_TOKEN"


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    ("kind", "status", "reason"),
    [
        (GatedRepoError, 401, LICENCE),
        (HfHubHTTPError, 401, LICENCE),
        (HfHubHTTPError, 403, LICENCE),
        (RepositoryNotFoundError, 401, "no such repository"),
    ],
)
def test_a_gated_repository_is_told_from_one_that_is_not_there(hub, monkeypatch, kind, status, reason, wrapped):
    def refuse(repo: str, **settings: object) -> str:
        response = SimpleNamespace(status_code=status, headers={}, request=None)
        refusal = kind("refused\nin several lines", response=response)
        if not wrapped or kind is RepositoryNotFoundError:
            raise refusal
        raise LocalEntryNotFoundError("nothing in the cache") from refusal

    hub("tiny_llama")
    monkeypatch.setattr(fetch, "snapshot_download", refuse)
    refused(rf"model=llama2_7b: .*{reason}.*model=smollm2_135m, ", "llama2_7b")


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
