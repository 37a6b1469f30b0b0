from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path

import huggingface_hub.constants
import pytest
from tiny_vit import HEAD, load, pretrained

from partial_lora import progress
from partial_lora.errors import PartialLoraError
from partial_lora.models import hub, weights_digest


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

    monkeypatch.setattr(hub, "snapshot_download", download)
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
    with hub._Events(total=0, unit="B", desc="Downloading") as bar:
        bar.total = 1000  # the client learns of sizes file by file
        bar.update(400)
        bar.update(600)
        bar.refresh()
    with hub._Events([1, 2], desc="Fetching 2 files") as files:
        list(files)
    events = [json.loads(line) for line in (tmp_path / "events").read_text().splitlines()]
    assert {event["stage"] for event in events} == {"download"}
    assert (events[-1]["done"], events[-1]["total"]) == (1000, 1000)
    assert capfd.readouterr().err == ""
