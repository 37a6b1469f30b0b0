"""Settings: what is refused, by which name, and what a run's id depends on."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path

import pytest

from partial_lora.calibration import importance
from partial_lora.calibration.config import CalibrationConfig, ImportanceConfig
from partial_lora.errors import PartialLoraError
from partial_lora.runs import compose, config, identity
from partial_lora.runs.compose import composed
from partial_lora.runs.schema import Config, MaskConfig, MethodConfig, ModelConfig, TaskConfig
from partial_lora.training.config import TrainerConfig


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        *((CalibrationConfig, "threshold", value) for value in (0.0, 1.01)),
        *((CalibrationConfig, "budget", value) for value in (0.0, 1.5)),
        (CalibrationConfig, "max_sparsity", 1.0),
        (CalibrationConfig, "shots", 0),
        (CalibrationConfig, "share", 0.6),
        (CalibrationConfig, "levels", 0.0),
        (CalibrationConfig, "search", "binary"),
        (CalibrationConfig, "axes", "both"),
        (CalibrationConfig, "scope", "backward"),
        (CalibrationConfig, "chance", "0.1"),
        (CalibrationConfig, "score", "precision"),
        (CalibrationConfig, "memory", -1),
        (CalibrationConfig, "seed", -1),
        (ImportanceConfig, "k", 0),
        (ImportanceConfig, "energy", 1.5),
        (ImportanceConfig, "rounds", 0),
        (ImportanceConfig, "fraction", 1.0),
        (ImportanceConfig, "steps", -1),
        (ImportanceConfig, "learning_rate", 0.0),
        (MaskConfig, "granularity", "block"),
        (MaskConfig, "count", "bernoulli"),
        (MethodConfig, "rank", 0),
        (MethodConfig, "dropout", 1.0),
        (ModelConfig, "image_size", 0),
        (ModelConfig, "target_modules", []),
        (ModelConfig, "mean", [0.5]),
        (ModelConfig, "family", "diffusion"),
        (ModelConfig, "dtype", "int8"),
        (ModelConfig, "prompts", ["a photo"]),
        (ModelConfig, "text_weights", "random"),
        (TaskConfig, "name", "../up"),
        (TaskConfig, "validation_share", 1.0),
        (TaskConfig, "label_noise", 1.5),
        (TaskConfig, "text_columns", ["a", "b", "c"]),
        (TaskConfig, "modality", "sound"),
        (TaskConfig, "metrics", ["bleu"]),
        (TaskConfig, "train_samples", 0),
        (TaskConfig, "data_files", {"training": "rows.parquet"}),
        (TrainerConfig, "learning_rate", 0.0),
        (TrainerConfig, "epochs", float("inf")),
        (TrainerConfig, "mixed_precision", "fp8"),
        (Config, "seed", -1),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_key(kind: type, key: str, value: object) -> None:
    group = kind.__name__.removesuffix("Config").lower()
    with pytest.raises(PartialLoraError) as refusal:
        kind(**{key: value})
    assert str(refusal.value).startswith(f"{group}.{key}=".removeprefix("."))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("calibration.threshold=0", "calibration.threshold"),
        ("calibration.file=/nowhere/calibration.json", "calibration.file"),
        ("data_dir=/nowhere", "data_dir"),
        ("task.data_files={train: /nowhere.parquet, test: /nowhere.parquet}", "task.data_files.train"),
        ("task.data_files=/nowhere", "task.data_files"),
        ("method.name=foo", "method.name"),
        ("importance.name=foo", "importance.name"),
        ("model.family=clip", "model.text_weights"),
        ("+trainer.lr=1", "trainer.lr"),
        ("+learning_rate=1", "learning_rate"),
    ],
)
def test_what_is_wrong_or_not_there_is_refused_before_a_run_starts(override: str, key: str) -> None:
    with pytest.raises(PartialLoraError) as refusal:
        composed(override)
    assert str(refusal.value).startswith(key)
    assert "\n" not in str(refusal.value)


def test_a_run_is_composed_and_resolved_once(monkeypatch: pytest.MonkeyPatch) -> None:
    configs, resolve = [], config.resolve
    monkeypatch.setattr(compose, "resolve", lambda node: configs.append(resolve(node)) or configs[-1])
    assert compose.compose("info", ["-m", "model=tiny_vit", "seed=1,2"], lambda each: each.seed - 1) == 1
    assert [each.seed for each in configs] == [1, 2]


def test_settings_come_back_as_they_were_from_plain_data_even_without_their_files(tmp_path: Path) -> None:
    rows = tmp_path / "rows.csv"
    rows.write_text("text,label")
    chosen = composed("model=tiny_bert", "task=mixture", "task.members=[sst2]", f"task.data_files={{sst2: {rows}}}")
    rows.unlink()
    assert config.load(config.plain(chosen)) == chosen
    older = config.plain(chosen)
    del older["calibration"]["memory"], older["keep_records"]
    assert config.load(older) == chosen


def test_the_batch_has_to_divide_among_the_processes() -> None:
    with pytest.raises(PartialLoraError, match=r"trainer\.batch_size=32.*trainer\.num_processes=3"):
        composed("trainer.num_processes=3")


def test_a_repair_does_not_go_with_a_budget_nor_reliability_with_a_file(tmp_path: Path) -> None:
    assert composed("calibration.repair=true").calibration.repair
    with pytest.raises(PartialLoraError, match=r"^calibration\.repair=True: expected false: calibration\.budget=0\.13"):
        composed("calibration=budget", "calibration.repair=true")
    file = tmp_path / "calibration.json"
    file.write_text("{}")
    with pytest.raises(PartialLoraError, match=r"^calibration\.reliability=True: expected false: a calibration\.file"):
        composed(f"calibration.file={file}", "calibration.reliability=true")


def test_targeted_has_no_importance_of_single_entries() -> None:
    assert composed("mask=element", "mask.count=bernoulli").mask.count == "bernoulli"
    with pytest.raises(PartialLoraError, match=r"^mask\.granularity=element: expected rows_columns"):
        composed("mask=element", "method=targeted")


def test_every_group_file_composes() -> None:
    for folder in config.conf_dir().iterdir():
        if folder.is_dir() and folder.name not in ("experiment", "preset"):
            for file in folder.glob("*.yaml"):
                needed = ["task.members=[sst2,mrpc]"] if file.stem == "mixture" else []
                group = getattr(composed(f"{folder.name}={file.stem}", *needed), folder.name)
                assert getattr(group, "name", file.stem) == file.stem


def test_what_a_measure_takes_is_in_the_schema_with_its_own_defaults() -> None:
    chosen = composed("importance=imp").importance
    for name, options in importance.OPTIONS.items():
        measure = (importance.MEASURES | importance.NEEDS_DATA)[name]
        defaults = {key: value.default for key, value in inspect.signature(measure).parameters.items()}
        assert {key: getattr(chosen, key) for key in options} == {key: defaults[key] for key in options}


def test_the_ids_of_runs_never_change() -> None:
    assert config.run_id(composed()) == "3501512c"
    assert config.run_id(composed("calibration=budget", "method=uniform", "model=tiny_vit")) == "c8c12eb5"


def test_a_new_key_with_a_default_leaves_ids_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    before = config.plain(composed("method.rank=4"))
    after = config.plain(composed("method.rank=4"))
    after["method"]["a_new_key"] = "its default"

    identifier = config.run_id(before)
    defaults = {**identity.defaults(), "method.a_new_key": "its default"}
    monkeypatch.setattr(identity, "defaults", lambda: defaults)
    assert config.run_id(after) == identifier
    after["method"]["a_new_key"] = "another value"
    assert config.run_id(after) != identifier


@pytest.mark.parametrize(
    "override",
    [
        "seed=3",
        "results_dir=/else",
        "overwrite=true",
        "keep_records=true",
        "trainer.tuned_on=mnist",
        "trainer.device=cpu",
        "trainer.num_processes=2",
        "calibration.memory=0",
        "task.cache_bytes=0",
        "data_dir=.",
    ],
)
def test_where_and_on_what_a_run_happens_is_not_in_its_id(override: str) -> None:
    assert config.run_id(composed(override)) == config.run_id(composed())


@pytest.mark.parametrize(
    "override",
    [
        *("calibration.seed=1", "mask.seed=1", "task.split_seed=1", "trainer.epochs=1", "method=lora"),
        *("calibration.axes=joint", "calibration.scope=cumulative", "calibration.repair=true"),
        *("calibration.chance=majority", "calibration.score=loss", "calibration.reliability=true"),
        *("importance=snip", "importance.rounds=4", "task.label_noise=0.2"),
    ],
)
def test_what_a_run_computes_from_is_in_its_id(override: str) -> None:
    assert config.run_id(composed(override)) != config.run_id(composed())


@pytest.mark.parametrize("experiment", ["methods", "tune"])
def test_seeds_that_calibrate_each_for_itself_are_runs_of_one_folder(experiment: str) -> None:
    given = (f"experiment={experiment}", "trainer.tuned=null")
    first, second = (composed(*given, f"seed={seed}") for seed in (0, 1))
    assert config.run_directory(first).parent == config.run_directory(second).parent
    assert [each.calibration_seed for each in (first, second)] == [0, 1]
    assert config.calibration_directory(first) != config.calibration_directory(second)  # which have no folder of a seed
    assert config.run_id(first) != config.run_id(composed(*given, "seed=0", "calibration.seed=0"))


def test_files_enter_the_id_by_content(tmp_path: Path) -> None:
    def identifier(folder: Path) -> str:
        return config.run_id(composed(f"task.data_files={{train: {folder / 'a'}, test: {folder / 'b'}}}"))

    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    (first / "a").write_text("rows")
    (first / "b").write_text("other rows")
    shutil.copytree(first, second)
    assert identifier(first) == identifier(second)
    (second / "b").write_text("edited rows")
    assert identifier(first) != identifier(second)


def test_a_folder_enters_the_id_by_names_and_contents(tmp_path: Path) -> None:
    def identifier(folder: Path) -> str:
        return config.run_id(composed(f"task.data_files={folder}"))

    first, second = tmp_path / "first", tmp_path / "second"
    (first / "cats").mkdir(parents=True)
    (first / "cats" / "a.png").write_text("pixels")
    shutil.copytree(first, second)
    assert identifier(first) == identifier(second)
    (second / "cats" / "a.png").rename(second / "cats" / "b.png")
    assert identifier(first) != identifier(second)
    (second / "cats" / "b.png").rename(second / "cats" / "a.png")
    (second / ".DS_Store").write_text("of no image")
    assert identifier(first) == identifier(second)
    (second / "cats" / "a.png").write_text("others")
    assert identifier(first) != identifier(second)


@pytest.mark.parametrize("key", ["model.weights", "task.path"])
def test_a_folder_in_place_of_a_repository_enters_the_id_by_content(tmp_path: Path, key: str) -> None:
    folders = [tmp_path / name for name in ("first", "second")]
    for folder in folders:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    assert config.run_id(composed(f"{key}={folders[0]}")) == config.run_id(composed(f"{key}={folders[1]}"))
    (folders[1] / "config.json").write_text("{ }")
    assert config.run_id(composed(f"{key}={folders[0]}")) != config.run_id(composed(f"{key}={folders[1]}"))


def test_the_directory_of_a_run() -> None:
    directory = config.run_directory(composed("seed=2", "results_dir=here"))
    assert directory == Path("here/runs/digits/vit_s14/partial-3501512c/seed2")


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("method.ran", "method.rank"),
        ("trainer.learning_rte", "trainer.learning_rate"),
        ("trainer.lr", "trainer.learning_rate"),
        ("lr", "trainer.learning_rate"),
        ("batch_size", "trainer.batch_size"),
        ("trainer.rank", "method.rank"),
    ],
)
def test_the_key_that_was_meant_is_named(key: str, meant: str) -> None:
    assert config.no_such_key(key).startswith(f"{key}: no such key; did you mean {meant}? ")


@pytest.mark.parametrize("key", ["model.colour", "colour", "trainer.name"])
def test_nothing_is_guessed(key: str) -> None:
    assert config.no_such_key(key) == f"{key}: no such key; `partial-lora train --cfg job` lists the keys there are"


def test_other_tools_names_stand_for_keys_that_exist() -> None:
    assert set(config._ELSEWHERE.values()) <= set(identity.defaults())
    assert config.no_such_key("hydra.lr", "hydra").endswith(
        "no such key; `partial-lora train --cfg hydra` lists the keys there are"
    )
