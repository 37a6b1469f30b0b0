"""A folder of many tasks' files: who reads what out of it, and that it says nothing of what is computed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from partial_lora.errors import PartialLoraError
from partial_lora.runs import config
from partial_lora.runs.compose import composed


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("sst2/train", "sst2/test", "cola/train", "cola/validation", "mine/train"):
        file = tmp_path / "data" / f"{name}.parquet"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"rows of {name}")
    return tmp_path / "data"


def in_folder(folder: Path, name: str, *splits: str) -> dict[str, str]:
    return {split: str(folder / name / f"{split}.parquet") for split in splits}


def test_a_task_takes_the_splits_that_are_there(folder: Path) -> None:
    assert composed(f"data_dir={folder}", "task=sst2").task.data_files == in_folder(folder, "sst2", "train", "test")
    assert composed(f"data_dir={folder}", "task=cola").task.data_files == in_folder(
        folder, "cola", "train", "validation"
    )


def test_what_is_bundled_and_what_names_files_of_its_own_stay_as_they_are(folder: Path) -> None:
    assert composed(f"data_dir={folder}").task.data_files is None
    own = folder / "mine" / "train.parquet"
    assert composed(f"data_dir={folder}", "task=sst2", f"task.data_files={own}").task.data_files == str(own)


def test_members_of_a_mixture_take_theirs(folder: Path) -> None:
    own = f"{{cola: {{train: {folder}/mine/train.parquet}}}}"
    found = composed(f"data_dir={folder}", "task=mixture", "task.members=[sst2,cola]", f"task.data_files={own}")
    files = {name: member.data_files for name, member in found.task.members.items()}
    assert files == {
        "sst2": in_folder(folder, "sst2", "train", "test"),
        "cola": in_folder(folder, "mine", "train"),
    }


def test_the_id_is_that_of_the_same_files_named_one_by_one(folder: Path) -> None:
    named = "{" + ", ".join(f"{split}: {folder}/sst2/{split}.parquet" for split in ("train", "test")) + "}"
    by_folder = config.run_id(composed(f"data_dir={folder}", "task=sst2"))
    assert by_folder == config.run_id(composed("task=sst2", f"task.data_files={named}"))
    (folder / "sst2" / "train.parquet").write_text("edited rows")
    assert by_folder != config.run_id(composed(f"data_dir={folder}", "task=sst2"))


@pytest.mark.parametrize(
    "overrides", [["task=rte"], ["task=mixture", "task.members=[sst2,rte]"]], ids=["alone", "member"]
)
def test_a_task_without_training_rows_there_is_refused_by_name(folder: Path, overrides: list[str]) -> None:
    with pytest.raises(PartialLoraError, match=r"^data_dir=.*/data: expected .*/data/rte/train\.parquet") as refusal:
        composed(f"data_dir={folder}", *overrides)
    assert "\n" not in str(refusal.value)


def test_a_preset_is_recorded_and_no_setting(tmp_path: Path) -> None:
    from partial_lora.runs import directory

    chosen = composed("preset=paper", "trainer.tuned=null", "task=digits")
    assert directory.new(config.plain(chosen))["preset"] == "paper"
    assert directory.new(config.plain(composed()))["preset"] is None
    assert config.run_id(chosen) == config.run_id(replace(chosen, preset=None))
