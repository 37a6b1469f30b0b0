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

from partial_lora import tasks
from partial_lora.errors import PartialLoraError
from partial_lora.runs import config, schema

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
FOLDER = config.conf_dir() / "task"
NAMES = sorted(file.stem for file in FOLDER.glob("*.yaml") if file.stem != "mixture")  # which has no rows of its own
OWN = ("image_folder", "image_table", "text_table", "choice_table", "text_generation", "flowers17", "signdigits")
GLUE = ("cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sst2", "stsb")
SIZES = {  # of the shared rows: train, validation, test, classes
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
}
COMMONSENSE = {  # of the shared rows: train, validation, test; of the others there are none
    "arc_easy": (2025, 226, 2376),
    "arc_challenge": (1007, 112, 1172),
    "boolq": (8484, 943, 3270),
    "openbookqa": (4461, 496, 500),
    "piqa": (1204, 134, 500),
    "social_iqa": (1263, 141, 550),
}
FAIR = {"arc_easy": (2, 6), "arc_challenge": (2, 6), "openbookqa": (4, 4), "social_iqa": (3, 3)}  # options; else 2


def settings(name: str) -> dict:
    """The group `task` as it is composed, checked by the schema."""
    composed = OmegaConf.merge(OmegaConf.structured(schema.TaskConfig), OmegaConf.load(FOLDER / f"{name}.yaml"))
    return dataclasses.asdict(OmegaConf.to_object(composed))


def load(chosen: dict) -> tasks.Task:
    return tasks.load(**{name: chosen[name] for name in tasks.SETTINGS})


def shared(name: str) -> dict[str, str]:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"the real rows of {name} are not on this machine (looked in {folder})")
    return {file.stem: str(file) for file in sorted(folder.glob("*.parquet"))}


@pytest.mark.parametrize("name", NAMES)
def test_a_task_is_called_as_its_file_is_and_its_rows_are_pinned(name: str) -> None:
    chosen = settings(name)
    assert chosen["name"] == name
    if chosen["path"] not in ("files", "bundled:digits"):
        assert re.fullmatch(r"[\w.-]+/[\w.-]+", chosen["path"])
        assert re.fullmatch(r"[0-9a-f]{40}", chosen["revision"])


@pytest.mark.parametrize("name", GLUE)
def test_glue_reports_on_rows_with_labels_that_select_nothing(name: str, tmp_path: Path) -> None:
    chosen = settings(name)
    features = datasets.Features({column: datasets.Value("string") for column in chosen["text_columns"]})
    features["label"] = datasets.Value("float32")
    if name != "stsb":
        features["label"] = datasets.ClassLabel(names=[f"class {number}" for number in range(chosen["classes"])])
    splits = {"train": 60, "validation": 12, "test": 9}
    if name == "mnli":
        splits = {"train": 60, "validation_matched": 12, "validation_mismatched": 15, "test_matched": 9}
    (tmp_path / name).mkdir()
    for split, count in splits.items():
        data = {column: [f"{split} {row}" for row in range(count)] for column in chosen["text_columns"]}
        data["label"] = [row % max(2, chosen["classes"]) if "test" not in split else -1 for row in range(count)]
        rows = datasets.Dataset.from_dict(data, features=features)
        rows.to_parquet(tmp_path / name / f"{split}-00000-of-00001.parquet")
    configs = [{"split": split, "path": f"{name}/{split}-*"} for split in splits]
    (tmp_path / "README.md").write_text(f"---\nconfigs:\n- config_name: {name}\n  data_files: {configs}\n---\n")
    task = load(chosen | {"path": str(tmp_path), "revision": None})
    assert [len(split) for split in (task.train, task.validation, task.test)] == [54, 6, 12]
    assert all(text.startswith("validation ") or "_matched" in text for text in task.test["text"])
    assert all(text.startswith("train ") for text in task.validation["text"])
    assert len(task.labels) == (0 if name == "stsb" else chosen["classes"])
    if name != "stsb":
        other = "test_matched" if name == "mnli" else "test"
        with pytest.raises(PartialLoraError, match="9 rows of the test split have no label"):
            load(chosen | {"path": str(tmp_path), "revision": None, "test_split": other})


@pytest.mark.parametrize("name", SIZES)
def test_real_rows_load_under_the_hub_s_own_names_of_columns(name: str) -> None:
    chosen = settings(name) | {"data_files": shared(name)}
    task = load(chosen)
    counted = (len(task.train), len(task.validation), len(task.test), len(task.labels))
    assert counted == SIZES[name]
    assert chosen["classes"] == max(1, len(task.labels))
    inputs = {"image": ["image"], "text": ["text", "text_pair"][: len(chosen["text_columns"])]}[task.modality]
    assert task.train.column_names == [*inputs, "label"]
    assert task.metrics == tuple(chosen["metrics"] or ["accuracy"])


@pytest.mark.parametrize("name", COMMONSENSE)
def test_real_questions_load_and_their_right_options_are_spread(name: str) -> None:
    task = load(settings(name) | {"data_files": shared(name)})
    assert (len(task.train), len(task.validation), len(task.test)) == COMMONSENSE[name]
    assert (task.kind, task.metrics) == ("choice", ("accuracy", "accuracy_norm"))
    counts = [len(options) for options in task.test["options"]]
    fewest, most = FAIR.get(name, (2, 2))
    assert fewest <= min(counts) <= max(counts) <= most
    assert max(Counter(task.test["label"]).values()) < 0.65 * len(task.test)
    for row in task.test.select(range(50)):
        assert len(row["prompts"]) == len(row["options"])
        assert all(option.startswith(" ") and option.strip() for option in row["options"])
        assert all(prompt == prompt.rstrip() for prompt in row["prompts"])


def test_real_solutions_come_to_a_number() -> None:
    task = load(settings("gsm8k") | {"data_files": shared("gsm8k")})
    assert (len(task.train), len(task.validation), len(task.test)) == (6725, 748, 1319)
    responses = task.test["response"][:]
    assert [tasks.final_number(text) for text in responses] == [
        Decimal(text.split("####")[1].replace(",", "").strip()) for text in responses
    ]
    assert (settings("gsm8k")["stop"], task.metrics) == (["Question:"], ("exact_match", "perplexity"))


def test_benchmarks_are_never_put_into_a_chat() -> None:
    for name in NAMES:
        chosen = settings(name)
        if chosen["kind"] != "label":
            assert chosen["chat_template"] is (None if chosen["path"] == "files" else False)
            assert (chosen["format"] is None) == (chosen["path"] == "files")


def test_real_tables_need_no_name_of_a_column() -> None:
    images, texts = shared("gtsrb"), shared("sst2")
    assert len(load(settings("image_table") | {"data_files": images}).labels) == 43
    assert load(settings("text_table") | {"data_files": texts}).labels == ("negative", "positive")


@pytest.mark.parametrize("name", OWN)
def test_a_task_of_files_asks_for_them_in_one_line(name: str) -> None:
    with pytest.raises(PartialLoraError, match=rf"^task={name} .*task\.data_files") as refusal:
        load(settings(name))
    assert "\n" not in str(refusal.value)


def test_a_hub_that_is_not_there_is_named_at_once(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)

    def retried(*arguments: object, **named: object) -> None:
        raise AssertionError("asked the hub for rows, although it does not answer")

    def unreachable(*arguments: object, **named: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", retried)
    monkeypatch.setattr("partial_lora.tasks.sources.HfApi.dataset_info", unreachable)
    with pytest.raises(PartialLoraError, match=r"task=sst2: cannot fetch nyu-mll/glue .*no route to host.*task=digits"):
        load(settings("sst2"))
    (tmp_path / "nyu-mll___glue").mkdir()
    with pytest.raises(AssertionError, match="asked the hub"):
        load(settings("sst2"))


def test_a_subset_that_is_not_there_is_named(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"sentence": ["a"], "label": [0]}).to_parquet(tmp_path / "train.parquet")
    with pytest.raises(PartialLoraError, match=r"task=sst2: cannot read .*task\.subset=sst2") as refusal:
        load(settings("sst2") | {"path": str(tmp_path), "revision": None})
    assert "\n" not in str(refusal.value)
