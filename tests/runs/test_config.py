"""Settings: what is refused, by which name, and what a run's id depends on."""

from __future__ import annotations

import inspect
import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from partial_lora.calibration import importance
from partial_lora.errors import PartialLoraError
from partial_lora.runs import config, schema
from partial_lora.runs.compose import composed


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("calibration.threshold=0", "calibration.threshold"),
        ("calibration.threshold=1.01", "calibration.threshold"),
        ("calibration.max_sparsity=1", "calibration.max_sparsity"),
        ("calibration.budget=0", "calibration.budget"),
        ("calibration.budget=1.5", "calibration.budget"),
        ("calibration.search=binary", "calibration.search"),
        ("calibration.shots=0", "calibration.shots"),
        ("calibration.levels=0", "calibration.levels"),
        ("calibration.file=/nowhere/calibration.json", "calibration.file"),
        ("importance.k=0", "importance.k"),
        ("importance.energy=1.5", "importance.energy"),
        ("importance.rounds=0", "importance.rounds"),
        ("importance.fraction=1", "importance.fraction"),
        ("importance.steps=-1", "importance.steps"),
        ("importance.learning_rate=0", "importance.learning_rate"),
        ("mask.granularity=block", "mask.granularity"),
        ("mask.count=bernoulli", "mask.count"),
        ("method.rank=0", "method.rank"),
        ("method.dropout=1", "method.dropout"),
        ("model.image_size=0", "model.image_size"),
        ("model.target_modules=[]", "model.target_modules"),
        ("seed=-1", "seed"),
        ("task.validation_share=1", "task.validation_share"),
        ("task.label_noise=1.5", "task.label_noise"),
        ("data_dir=/nowhere", "data_dir"),
        ("task.data_files={train: /nowhere.parquet, test: /nowhere.parquet}", "task.data_files.train"),
        ("task.data_files={training: /nowhere.parquet}", "task.data_files"),
        ("trainer.learning_rate=0", "trainer.learning_rate"),
        ("trainer.epochs=inf", "trainer.epochs"),
        ("method.name=foo", "method.name"),
        ("importance.name=foo", "importance.name"),
        ("task.name=../up", "task.name"),
        ("model.mean=[0.5]", "model.mean"),
        ("calibration.share=0.6", "calibration.share"),
        ("task.text_columns=[a,b,c]", "task.text_columns"),
        ("task.modality=sound", "task.modality"),
        ("task.metrics=[bleu]", "task.metrics"),
        ("task.train_samples=0", "task.train_samples"),
        ("task.data_files=/nowhere", "task.data_files"),
        ("model.family=diffusion", "model.family"),
        ("model.dtype=int8", "model.dtype"),
        ("model.prompts=[a photo]", "model.prompts"),
        ("model.text_weights=random", "model.text_weights"),
        ("model.family=clip", "model.text_weights"),
        ("calibration.axes=both", "calibration.axes"),
        ("calibration.scope=backward", "calibration.scope"),
        ("calibration.chance=0.1", "calibration.chance"),
        ("calibration.score=precision", "calibration.score"),
        ("calibration.memory=-1", "calibration.memory"),
        ("calibration.seed=-1", "calibration.seed"),
        ("trainer.mixed_precision=fp8", "trainer.mixed_precision"),
        ("+trainer.lr=1", "trainer.lr"),
        ("+learning_rate=1", "learning_rate"),
    ],
)
def test_a_wrong_value_or_key_is_refused_by_name_in_one_line(override: str, names: str) -> None:
    with pytest.raises(PartialLoraError) as refusal:
        composed(override)
    message = str(refusal.value)
    assert message.startswith(names)
    assert "\n" not in message


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

    defaults = OmegaConf.create(OmegaConf.to_container(OmegaConf.structured(schema.Config)))
    defaults.method.a_new_key = "its default"
    identifier = config.run_id(before)
    monkeypatch.setattr(config.OmegaConf, "structured", lambda _: defaults)
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
