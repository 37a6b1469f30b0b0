"""Every task's config: composes, is pinned, and loads the real rows where these are at hand."""

from __future__ import annotations

import dataclasses
import os
import re
from collections import Counter
from decimal import Decimal
from pathlib import Path

import datasets
import pyarrow.parquet as pq
import pytest
from checkout import ROOT
from omegaconf import OmegaConf
from refusals import refusal

from partial_lora import tasks
from partial_lora.settings import schema
from partial_lora.tasks.config import TaskConfig

DATA = Path(os.environ.get("DATA", ROOT.parent / "shared" / "data")).absolute()
FOLDER = schema.conf_dir() / "task"
NAMES = sorted(file.stem for file in FOLDER.glob("*.yaml") if file.stem != "mixture")  # which has no rows of its own
GLUE = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb")
# Of the real rows: how many classes, or the fewest and the most options.
LABELS = {"cifar10": 10, "gtsrb": 43, "flowers17": 17, "signdigits": 10, "sst2": 2, "cola": 2, "mrpc": 2, "stsb": 0}
LABELS |= {"qnli": 2, "rte": 2, "trec": 6, "imdb": 2, "arc_easy": (2, 6), "arc_challenge": (2, 6), "boolq": (2, 2)}
LABELS |= {"openbookqa": (4, 4), "piqa": (2, 2), "social_iqa": (3, 3), "gsm8k": 0}


def settings(name: str) -> dict:
    """The group `task` as it is composed, checked by the schema."""
    composed = OmegaConf.merge(OmegaConf.structured(TaskConfig), OmegaConf.load(FOLDER / f"{name}.yaml"))
    return dataclasses.asdict(OmegaConf.to_object(composed))


def load(name: str, **changes: object) -> tasks.Task:
    return tasks.load(TaskConfig(**settings(name) | changes))


def refused(key: str, name: str, **changes: object) -> None:
    with refusal(key):
        load(name, **changes)


def files(name: str) -> dict[str, str]:
    if not (DATA / name).is_dir():
        pytest.skip(f"no rows of {name} (`make data SETS={name}`, where the hub has them, then `DATA=data make test`)")
    return {file.stem: str(file) for file in sorted((DATA / name).glob("*.parquet"))}


def sizes(task: tasks.Task) -> tuple[int, ...]:
    return len(task.train), len(task.validation), len(task.test)


@pytest.mark.parametrize("name", NAMES)
def test_a_task_is_called_as_its_file_is_and_its_rows_are_pinned(name: str) -> None:
    chosen = settings(name)
    of_files = chosen["path"] == "files"
    assert chosen["name"] == name
    if of_files:
        refused(rf"task\.data_files: task={name} ", name)
    elif chosen["path"] != "bundled:digits":
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", chosen["path"])
        assert re.fullmatch(r"[0-9a-f]{40}", chosen["revision"])
    if chosen["kind"] != "label":  # benchmarks are never put into a chat
        assert chosen["chat_template"] is (None if of_files else False)
        assert (chosen["format"] is None) == of_files


@pytest.mark.parametrize("name", GLUE)
def test_glue_reports_on_rows_with_labels_that_select_nothing(name: str, tmp_path: Path) -> None:
    chosen = settings(name)
    classes = 0 if name == "stsb" else chosen["classes"]
    features = datasets.Features({column: datasets.Value("string") for column in chosen["text_columns"]})
    features["label"] = datasets.ClassLabel(classes) if classes else datasets.Value("float32")
    splits = {"train": 60, "validation": 12, "test": 9}
    if name == "mnli":
        splits = {"train": 60, "validation_matched": 12, "validation_mismatched": 15, "test_matched": 9}
    (tmp_path / name).mkdir()
    for split, count in splits.items():
        data = {column: [f"{split} {row}" for row in range(count)] for column in chosen["text_columns"]}
        data["label"] = [row % max(2, classes) if "test" not in split else -1 for row in range(count)]
        rows = datasets.Dataset.from_dict(data, features=features)
        rows.to_parquet(tmp_path / name / f"{split}-00000-of-00001.parquet")
    configs = [{"split": split, "path": f"{name}/{split}-*"} for split in splits]
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: {name}\n  data_files: {configs}\n---\n")
    here = {"path": str(tmp_path), "revision": None}
    task = load(name, **here)
    assert sizes(task) == (54, 6, 12)
    assert all(text.startswith("validation ") or "_matched" in text for text in task.test["text"])
    assert all(text.startswith("train ") for text in task.validation["text"])
    assert len(task.labels) == classes
    if classes:
        other = "test_matched" if name == "mnli" else "test"
        refused("task=.* 9 rows of the test split", name, **here, test_split=other)


@pytest.mark.parametrize("name", LABELS)
def test_real_rows_load_under_the_hub_s_own_names_of_columns(name: str) -> None:
    chosen, last, of = settings(name), LABELS[name], files(name)
    task, rows = load(name, data_files=of), {split: pq.read_metadata(file).num_rows for split, file in of.items()}
    cut = len(task.validation) if "validation" not in of else 0
    assert sizes(task) == (rows["train"] - cut, rows.get("validation", cut), rows["test"])
    assert cut == 0 or cut / rows["train"] == pytest.approx(0.1, rel=0.02)
    if chosen["kind"] == "label":
        assert (len(task.labels), chosen["classes"]) == (last, max(1, last))
        inputs = {"image": ["image"], "text": ["text", "text_pair"][: len(chosen["text_columns"])]}[task.modality]
        assert task.train.column_names == [*inputs, "label"]
        assert task.metrics == tuple(chosen["metrics"] or ["accuracy"])
    elif chosen["kind"] == "choice":
        assert task.metrics == ("accuracy", "accuracy_norm")
        options = [len(each) for each in task.test["options"]]
        assert last[0] <= min(options) <= max(options) <= last[1]
        assert max(Counter(task.test["label"]).values()) < 0.65 * len(task.test)  # the right ones are spread
        for row in task.test.select(range(50)):
            assert len(row["prompts"]) == len(row["options"])
            assert all(option.startswith(" ") and option.strip() for option in row["options"])
            assert all(prompt == prompt.rstrip() for prompt in row["prompts"])
    else:
        numbers = [Decimal(text.split("####")[1].replace(",", "").strip()) for text in task.test["response"]]
        assert [tasks.final_number(text) for text in task.test["response"]] == numbers
        assert (chosen["stop"], task.metrics) == (["Question:"], ("exact_match", "perplexity"))


def test_real_tables_need_no_name_of_a_column() -> None:
    images, texts = files("gtsrb"), files("sst2")
    assert len(load("image_table", data_files=images).labels) == 43
    assert load("text_table", data_files=texts).labels == ("negative", "positive")


def test_a_hub_that_is_not_there_is_named_at_once(monkeypatch, tmp_path: Path) -> None:
    def unreachable(*arguments: object, **settings: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("rows of the hub were read"))
    monkeypatch.setattr("partial_lora.tasks.sources.HfApi.dataset_info", unreachable)
    refused(r"task=sst2: .*nyu-mll/glue .*no route to host.*task=digits", "sst2")
    (tmp_path / "nyu-mll___glue").mkdir()
    with pytest.raises(pytest.fail.Exception):  # out of the hub's own cache
        load("sst2")


def test_a_subset_that_is_not_there_is_named(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"sentence": ["a"], "label": [0]}).to_parquet(tmp_path / "train.parquet")
    refused(rf"task=sst2: .*{tmp_path}.*task\.subset=sst2", "sst2", path=str(tmp_path), revision=None)
