"""Every task's config: composes, is pinned, and loads the real rows where these are at hand."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from decimal import Decimal
from pathlib import Path

import datasets
import pytest
from omegaconf import OmegaConf
from refusals import refusal

from partial_lora import tasks
from partial_lora.runs import config, schema

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
FOLDER = config.conf_dir() / "task"
NAMES = sorted(file.stem for file in FOLDER.glob("*.yaml") if file.stem != "mixture")  # which has no rows of its own
GLUE = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb")
SIZES = {  # of the shared rows: train, validation, test, and classes or the fewest and most options
    "cifar10": (4500, 500, 2000, 10),
    "gtsrb": (1548, 172, 860, 43),
    "flowers17": (612, 68, 340, 17),
    "signdigits": (1080, 120, 600, 10),
    "sst2": (9000, 1000, 872, 2),
    "cola": (7695, 856, 1043, 2),
    "mrpc": (3668, 408, 1725, 2),
    "stsb": (5174, 575, 1500, 0),
    "qnli": (3245, 361, 1264, 2),
    "rte": (2241, 249, 277, 2),
    "trec": (4906, 546, 500, 6),
    "imdb": (4491, 499, 1994, 2),
    "arc_easy": (2025, 226, 2376, (2, 6)),
    "arc_challenge": (1007, 112, 1172, (2, 6)),
    "boolq": (8484, 943, 3270, (2, 2)),
    "openbookqa": (4461, 496, 500, (4, 4)),
    "piqa": (1204, 134, 500, (2, 2)),
    "social_iqa": (1263, 141, 550, (3, 3)),
    "gsm8k": (6725, 748, 1319, 0),
}


def settings(name: str) -> dict:
    """The group `task` as it is composed, checked by the schema."""
    composed = OmegaConf.merge(OmegaConf.structured(schema.TaskConfig), OmegaConf.load(FOLDER / f"{name}.yaml"))
    return dataclasses.asdict(OmegaConf.to_object(composed))


def load(name: str, **changes: object) -> tasks.Task:
    chosen = settings(name) | changes
    return tasks.load(**{key: chosen[key] for key in tasks.SETTINGS})


def refused(key: str, name: str, **changes: object) -> None:
    with refusal(key):
        load(name, **changes)


def shared(name: str) -> dict[str, str]:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"the real rows of {name} are not on this machine (looked in {folder})")
    return {file.stem: str(file) for file in sorted(folder.glob("*.parquet"))}


def sizes(task: tasks.Task) -> tuple[int, ...]:
    return len(task.train), len(task.validation), len(task.test)


@pytest.mark.parametrize("name", NAMES)
def test_a_task_is_called_as_its_file_is_and_its_rows_are_pinned(name: str) -> None:
    chosen = settings(name)
    of_files = chosen["path"] == "files"
    assert chosen["name"] == name
    if of_files:
        refused(rf"task={name} .*task\.data_files", name)
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


@pytest.mark.parametrize("name", SIZES)
def test_real_rows_load_under_the_hub_s_own_names_of_columns(name: str) -> None:
    chosen, (*counts, last) = settings(name), SIZES[name]
    task = load(name, data_files=shared(name))
    assert sizes(task) == tuple(counts)
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
    images, texts = shared("gtsrb"), shared("sst2")
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
