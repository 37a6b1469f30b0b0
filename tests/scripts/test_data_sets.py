"""Data sets of the hub as files: what is put where, what is found again, and what is left when it fails."""

from __future__ import annotations

import types
from dataclasses import replace
from pathlib import Path

import data_sets
import datasets
import pytest
from refusals import refusal

from partial_lora import tasks
from partial_lora.settings.compose import composed
from partial_lora.tasks.config import TaskConfig


@pytest.fixture
def rte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TaskConfig:
    """The task rte, of a hub that is a folder here; its card names a licence."""
    names = datasets.ClassLabel(names=["entailment", "not_entailment"])
    features = datasets.Features({name: datasets.Value("string") for name in ("sentence1", "sentence2")})
    for split, count in {"train": 40, "validation": 12, "test": 9}.items():
        texts = [f"{split} {row}" for row in range(count)]
        labels = [row % 2 if split != "test" else -1 for row in range(count)]
        rows = {"sentence1": texts, "sentence2": texts, "label": labels}
        rows = datasets.Dataset.from_dict(rows, datasets.Features(features | {"label": names}))
        rows.to_parquet(tmp_path / "hub" / "glue" / f"{split}.parquet")
    card = types.SimpleNamespace(card_data={"license": ["mit", "other"]})
    monkeypatch.setattr("data_sets.HfApi.dataset_info", lambda *_, **__: card)
    task = composed("task=rte").task
    return replace(task, path=str(tmp_path / "hub" / "glue"), subset=None, revision=None)


def test_a_set_is_put_as_data_dir_reads_it_and_found_again(rte: TaskConfig, tmp_path: Path, monkeypatch) -> None:
    place = tmp_path / "data" / "rte"
    data_sets.put(rte, place)
    assert sorted(file.name for file in place.iterdir()) == ["README.md", "test.parquet", "train.parquet"]
    assert "mit, other" in (place / "README.md").read_text()
    own = composed("task=rte", "model=tiny_bert", f"data_dir={place.parent}").task
    task = tasks.load(own)
    assert (len(task.train), len(task.validation), task.labels) == (36, 4, ("entailment", "not_entailment"))
    assert set(task.test["text"]) == {
        f"validation {row}" for row in range(12)
    }  # GLUE hides the labels of its test rows
    monkeypatch.setattr(data_sets, "read_hub", lambda *_: pytest.fail("it was fetched again"))
    data_sets.put(rte, place)


@pytest.mark.parametrize("name", ["train.parquet", "README.md"])
def test_a_set_that_is_not_what_its_readme_says_is_named_and_left(rte: TaskConfig, tmp_path: Path, name: str) -> None:
    place = tmp_path / "rte"
    data_sets.put(rte, place)
    (place / name).write_text("another's")
    with refusal(f"{place}: .*{name}"):
        data_sets.put(rte, place)
    assert (place / name).read_text() == "another's"


def test_what_cannot_be_fetched_is_a_line_each_and_leaves_nothing(tmp_path: Path, monkeypatch, capsys) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("data_sets.HfApi.dataset_info", unreachable)
    assert data_sets.main(["sst2", "flowers17", "digits", "trec", "--to", str(tmp_path / "data")]) == 1
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[0] for line in said] == ["task=sst2", "task=flowers17", "task=digits", "task=trec"]
    assert not (tmp_path / "data").exists()


def test_a_set_that_fails_half_way_leaves_nothing(rte: TaskConfig, tmp_path: Path, monkeypatch) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(data_sets, "_readme", full)
    with pytest.raises(OSError, match="no space"):
        data_sets.put(rte, tmp_path / "data" / "rte")
    assert list((tmp_path / "data").iterdir()) == []
