"""The schema of settings files: it takes all that a run takes, and marks what a run refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from schemas import faults, marked, schema_of
from test_config import OUT_OF_RANGE

from partial_lora import cli
from partial_lora.files import read_yaml
from partial_lora.settings import editor, versions
from partial_lora.settings.compose import composed
from partial_lora.settings.keys import meanings
from partial_lora.settings.schema import SECTIONS, conf_dir

SCHEMA = json.loads((conf_dir() / editor.SCHEMA).read_text("utf-8"))
EXAMPLES = sorted((conf_dir().parent / "examples" / "configs").glob("*.yaml"))


def test_the_schema_that_is_kept_is_the_one_that_is_made(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["schema"]) == 0
    assert json.loads(capsys.readouterr().out) == SCHEMA, "partial-lora schema > conf/schema.json"


def test_own_group_files_become_choices(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "method").mkdir()
    (tmp_path / "method" / "mine.yaml").write_text("# As partial.\ndefaults: [partial]\n")
    assert cli.main(["schema", "--config-dir", str(tmp_path)]) == 0
    assert not [*faults({"method": "mine"}, json.loads(capsys.readouterr().out))]
    assert [*faults({"method": "mine"}, SCHEMA)] == ["method"]
    assert cli.main(["schema", "--config-dir", str(tmp_path / "none")]) == 2
    assert "--config-dir" in capsys.readouterr().err


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_no_example_is_marked(file: Path) -> None:
    assert schema_of(file) == SCHEMA
    assert marked(file) == []


def test_no_file_of_the_package_is_marked() -> None:
    for file in sorted(conf_dir().glob("*/*.yaml")):
        group = None if "@package _global_" in file.read_text("utf-8") else file.parent.name
        content = {key: value for key, value in (read_yaml(file) or {}).items() if key != "defaults"}
        assert [*faults(content, SCHEMA, group)] == [], file


@pytest.mark.parametrize("given", [["task=mixture", "task.members=[sst2,mrpc]", "model=minilm_l6"], ["task=digits"]])
def test_a_record_of_settings_is_not_marked_and_names_no_place(tmp_path: Path, given: list[str]) -> None:
    config = versions.plain(composed(*given))
    file = tmp_path / "results" / "runs" / "seed0" / "config.yaml"
    file.parent.mkdir(parents=True)
    editor.write_settings(file, config, tmp_path / "results")
    assert schema_of(file) == SCHEMA
    assert marked(file) == []
    assert str(tmp_path) not in file.read_text("utf-8")
    assert versions.plain(composed(str(file))) == config


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("trainer.epoch: 5", ".*"),
        ("trainer: {epoch: 5}", "trainer"),
        ("optimizer: sgd", ".*"),
        ("trainer.epochs: many", "trainer.epochs"),
        ("trainer: {packing: 1}", "trainer"),
        ("task.members: {mine: {text_column: a}}", "task.members"),
        ("seed: 1.5", "seed"),
        ("method: partal", "method"),
        ("model: vit_x", "model"),
        ("trainer: adam", "trainer"),
        ("trainer.strategy: pipeline", "trainer.strategy"),
        ("hydra/launcher: slurm", "hydra/launcher"),
    ],
)
def test_a_wrong_key_type_and_choice_are_marked(text: str, at: str) -> None:
    assert [*faults(yaml.safe_load(text), SCHEMA)] == [at]


@pytest.mark.parametrize(
    "text",
    [
        "model: ./mine",
        "model: OWNER/NAME@main",
        "model: {name: mine, weights: ./mine}",
        "task.metrics: f1",
        "task.data_files.train: a.csv",
        "trainer.args.neftune_noise_alpha: 5",
        "trainer.max_steps: ${seed}",
        "trainer.learning_rate: auto",
        "calibration.sparsity: {attn.qkv: 0.9, mlp.fc1: {rows: 0.5, columns: 0.9}}",
        "preset: null",
        "hydra.launcher.n_jobs: 2",
    ],
)
def test_every_way_to_write_a_setting_is_taken(text: str) -> None:
    assert [*faults(yaml.safe_load(text), SCHEMA)] == []


# A run refuses these for what else it is told, for what only a library knows, or for infinity, which is no JSON.
TOGETHER = {
    *("calibration.budget", "mask.count", "model.head", "model.quantization", "model.text_args", "model.text_weights"),
    *("model.name", "model.target_modules", "model.mean", "model.std", "model.prompts", "model.attn_implementation"),
    *("task.name", "task.text_columns", "task.data_files", "task.members"),
    *("trainer.schedule", "trainer.machine_rank", "trainer.loraplus_ratio"),
}


def test_what_is_out_of_range_by_itself_is_marked() -> None:
    values = {f"{group}.{key}": value for group, keys in OUT_OF_RANGE.items() for key, value in keys.items()}
    assert {key for key, value in values.items() if not [*faults({key: value}, SCHEMA)]} == TOGETHER


def test_every_key_is_explained() -> None:
    definitions = SCHEMA["definitions"]
    explained = {
        f"{group}.{key}": of["description"]
        for group in SECTIONS
        for key, of in definitions[group]["properties"].items()
    }
    explained |= {
        key: of["description"] for key, of in SCHEMA["properties"].items() if key in meanings() and "." not in key
    }
    assert explained == meanings() | {"preset": explained["preset"]}
