"""The identity of a run: what its id depends on, and that a recorded run is found by what it was set to."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from checkout import RESULTS, needs_results
from refusals import refusal

from partial_lora import files
from partial_lora.finished.run import finished_run
from partial_lora.launching import directory, packs, paths
from partial_lora.report import records
from partial_lora.settings import compose, identity, schema, study_commands, versions
from partial_lora.settings.compose import composed


def test_an_id_is_made_of_settings_alone_and_names_the_folder() -> None:
    place = paths.run_directory(composed("seed=2", "results_dir=here"))
    assert place == Path(f"here/runs/digits/vit_s14/partial-{identity.run_id(composed())}/seed2")


def test_images_in_folders_that_are_links_enter_the_id(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"store_{name}").mkdir()
        (tmp_path / f"store_{name}" / "1.png").write_text(name)
        (tmp_path / name).mkdir()
        (tmp_path / name / "cat").symlink_to(tmp_path / f"store_{name}")
    settings = ("model=tiny_vit", "task=image_folder")
    ids = {identity.run_id(composed(*settings, f"task.data_files={tmp_path / name}")) for name in "ab"}
    assert len(ids) == 2


def test_an_id_is_of_what_a_run_computes_from_and_not_of_where_and_on_what_it_happens() -> None:
    usual = identity.run_id(composed("calibration=threshold"))
    where = ("seed=3", "results_dir=/else", "overwrite=true", "keep_records=true")
    where += (
        "trainer.device=cpu",
        "trainer.num_processes=2",
        "calibration.memory=0",
        "task.cache_bytes=0",
        "data_dir=.",
    )
    assert identity.run_id(composed("calibration=threshold", *where)) == usual
    packed = [composed("model=tiny_llama", "task=text_generation", f"trainer.packing={each}") for each in (True, False)]
    assert identity.run_id(packed[0]) == identity.run_id(packed[1])
    what = ("calibration.seed=1", "mask.seed=1", "task.split_seed=1", "trainer.epochs=1", "method=lora")
    what += ("calibration.axes=joint", "calibration.scope=cumulative", "calibration.repair=true", "importance=snip")
    what += ("calibration.chance=majority", "calibration.score=loss", "calibration.reliability=true")
    what += ("importance.rounds=4", "task.label_noise=0.2", "trainer.head_learning_rate=1", "trainer.loraplus_ratio=4")
    ids = {identity.run_id(composed("calibration=threshold", each)) for each in what}
    assert len({usual, identity.run_id(composed()), *ids}) == 2 + len(what)


@pytest.mark.parametrize("method", ["lora", "dense", "full", "vera"])
def test_what_a_method_has_no_use_for_enters_no_id(method: str, tmp_path: Path) -> None:
    given = (f"method={method}", f"results_dir={tmp_path}", "seed=1")
    usual, other = composed(*given), composed(*given, "importance=snip", "mask=element", "calibration.threshold=0.5")
    assert identity.run_id(usual) == identity.run_id(other)
    assert paths.calibration_directory(usual) != paths.calibration_directory(other)
    for key in ("mask.seed=3", "calibration.budget=0.5"):
        assert (identity.run_id(composed(*given, key)) != identity.run_id(usual)) == (method in ("lora", "vera"))


@pytest.mark.parametrize("method", ["partial", "entries", "ticket", "lora"])
def test_what_a_mask_or_a_calibration_is_for_enters_the_id(method: str) -> None:
    usual, other = composed(f"method={method}"), composed(f"method={method}", "calibration.budget=0.5")
    assert identity.run_id(usual) != identity.run_id(other)


@pytest.mark.parametrize("chosen", ["preset=cpu", "preset=paper"])
def test_seeds_that_calibrate_each_for_itself_are_runs_of_one_folder(chosen: str) -> None:
    first, second = (composed(chosen, f"seed={seed}") for seed in (0, 1))
    assert paths.run_directory(first).parent == paths.run_directory(second).parent
    assert [each.calibration_seed for each in (first, second)] == [0, 1]
    assert paths.calibration_directory(first) != paths.calibration_directory(second)  # which have no folder of a seed
    assert identity.run_id(first) != identity.run_id(composed(chosen, "seed=0", "calibration.seed=0"))


@pytest.mark.parametrize("override", ["task.data_files={}", "model.weights={}", "task.path={}"])
def test_a_folder_enters_the_id_by_names_and_contents(tmp_path: Path, override: str) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    (first / "cats").mkdir(parents=True)
    (first / "cats" / "a.png").write_text("pixels")
    (first / "config.json").write_text('{"architecture": "vit_tiny_patch16_224"}')
    shutil.copytree(first, second)

    def ids() -> list[str]:
        return [identity.run_id(composed(override.format(folder))) for folder in (first, second)]

    assert len(set(ids())) == 1
    (second / "cats" / "a.png").rename(second / "cats" / "b.png")
    assert len(set(ids())) == 2
    (second / "cats" / "b.png").rename(second / "cats" / "a.png")
    (second / ".DS_Store").write_text("of no image")
    assert len(set(ids())) == 1
    (second / "cats" / "a.png").write_text("others")
    assert len(set(ids())) == 2


def test_a_folder_called_as_a_word_of_the_settings_is_no_part_of_the_id(tmp_path: Path, monkeypatch) -> None:
    config = composed("model=tiny_bert", "task=text_table")
    known = identity.run_id(config)
    monkeypatch.chdir(tmp_path)
    for name in (config.task.path, config.model.weights):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.csv").write_text("text,label\n")
    assert identity.run_id(config) == known


# A recorded run is found by what it was set to, whatever its folder was called.


def recorded(place: Path, *overrides: str, **changes: object) -> Path:
    """Leave the record of a run in a folder that no id of today names."""
    settings = versions.plain(composed(f"results_dir={place}", *overrides))
    folder = place / "runs" / settings["task"]["name"] / settings["model"]["name"]
    folder = folder / f"{settings['method']['name']}-00000000" / f"seed{settings['seed']}"
    folder.mkdir(parents=True)
    record = directory.new(settings, digests=identity.digests(settings)) | {"status": "finished"} | changes
    (folder / directory.RESULT).write_text(json.dumps(record))
    return folder


def test_a_run_is_found_after_a_default_has_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, stays = recorded(tmp_path), "trainer.warmup_ratio=0.1"
    at_default, other = (
        composed(f"results_dir={tmp_path}", stays),
        composed(f"results_dir={tmp_path}", "trainer.warmup_ratio=0.2"),
    )
    ids = identity.run_id(at_default), identity.run_id(other)
    defaults = {**schema.defaults(), "trainer.warmup_ratio": 0.2}
    monkeypatch.setattr(schema, "defaults", lambda: defaults)
    paths._computed_from.cache_clear()  # as in a new process
    assert paths.run_directory(at_default) == folder != paths.run_directory(other)
    assert (identity.run_id(at_default), identity.run_id(other)) == ids  # so that no folder is taken for another's


@pytest.mark.parametrize("number", [None, files.FORMAT + 1, True, "1"])
def test_what_another_format_has_is_refused_by_file_and_version(tmp_path: Path, number: object) -> None:
    named = ["version 0.20"] if number is None else ["format", "upgrade"]
    folder = recorded(tmp_path / "runs of another", format=number)
    for read in (directory.read_result, finished_run, records.one):
        with refusal(re.escape(str(folder / directory.RESULT)), *named):
            read(folder)
    assert paths.run_directory(composed(f"results_dir={folder.parents[4]}")) != folder  # which would be done again
    (left_out,) = records.read(folder.parents[4])[1]
    assert left_out.is_broken
    own = tmp_path / "config.yaml"
    own.write_text(yaml.safe_dump({"format": number, **versions.plain(composed())}))
    with refusal(re.escape(str(own)), *named):
        composed(str(own))
    own.write_text(versions.as_yaml(versions.plain(composed())))
    assert composed(str(own)) == composed()


def test_other_seeds_join_the_folder_and_a_run_that_has_not_ended_is_found(tmp_path: Path) -> None:
    folder = recorded(tmp_path)
    assert paths.run_directory(composed(f"results_dir={tmp_path}", "seed=4")) == folder.with_name("seed4")
    (folder / directory.RESULT).unlink()
    (folder / directory.CONFIG).write_text(versions.as_yaml(versions.plain(composed())))
    assert paths.run_directory(composed(f"results_dir={tmp_path}")) == folder
    (folder / directory.CONFIG).unlink()
    assert paths.run_directory(composed(f"results_dir={tmp_path}")) != folder


def test_runs_at_other_rates_are_found_and_no_others(tmp_path: Path) -> None:
    found = recorded(tmp_path, "trainer.learning_rate=0.1")
    here = f"results_dir={tmp_path}"
    assert paths.at_other_rates(composed(here, "trainer.learning_rate=0.2")) == [found]
    for other in ("seed=1", "method=lora", "trainer.warmup_ratio=0.2", "method.rank=8"):
        assert paths.at_other_rates(composed(here, "trainer.learning_rate=0.2", other)) == []


@pytest.mark.parametrize("form", [dict, files.flatten])
def test_settings_for_others_name_no_folder_of_this_machine(form) -> None:
    rows = {"path": "owner/rows", "data_files": {"train": "private/patients/x.csv", "test": "/home/me/y.csv"}}
    places = {
        "task": {"path": "members", "members": {"a.b": rows}, "data_files": "private/patients/z.csv"},
        "model": {"weights": "owner/name@refs/pr/1", "text_weights": "../my/weights", "architecture": "timm/vit"},
        "calibration": {"file": "results/runs/calibration.json"},
        "trainer": {"accelerate_config": "my/two.yaml", "args": {"logging_dir": "/home/me/logs"}},
        "data_dir": "private/data",
        "results_dir": ".",
    }
    told = versions.without_places(form(places))
    rows = {"path": "owner/rows", "data_files": {"train": "x.csv", "test": "y.csv"}}
    assert told == form(
        {
            "task": {"path": "members", "members": {"a.b": rows}, "data_files": "z.csv"},
            "model": {"weights": "owner/name@refs/pr/1", "text_weights": "weights", "architecture": "timm/vit"},
            "calibration": {"file": "calibration.json"},
            "trainer": {"accelerate_config": "two.yaml", "args": {"logging_dir": "logs"}},
            "data_dir": "data",
            "results_dir": Path.cwd().name,
        }
    )


def test_a_run_is_found_by_the_content_of_its_files_and_without_digests_by_their_names(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.csv").write_text(f"text,label,{name}")
    given = ("model=tiny_bert", "task=text_table", f"results_dir={tmp_path}")
    first, second = (composed(*given, f"task.data_files={tmp_path / name / 'rows.csv'}") for name in "ab")
    folder = recorded(tmp_path, *given, f"task.data_files={tmp_path / 'a' / 'rows.csv'}")
    moved = tmp_path / "elsewhere.csv"
    shutil.copy(tmp_path / "a" / "rows.csv", moved)
    assert paths.run_directory(composed(*given, f"task.data_files={moved}")) == folder
    assert paths.run_directory(second) != folder
    record = json.loads((folder / directory.RESULT).read_text())
    (folder / directory.RESULT).write_text(json.dumps(record | {"digests": None}))
    assert paths.run_directory(first) == folder != paths.run_directory(second)


@needs_results
def test_every_committed_run_is_found() -> None:
    for table in sorted(RESULTS.glob(f"*/{packs.RUNS_TABLE}")):
        for place in packs.directories(table.parent):
            if place.name == "seed0" and place.parts[-4] == "digits":
                settings = versions.load(packs.packed(place)["config"])
                assert paths.run_directory(dataclasses.replace(settings, results_dir=str(table.parent))) == place


@needs_results
def test_commands_of_a_study_find_its_committed_runs() -> None:
    only = {"preset": {"cpu"}, "task": {"digits"}, "stage": {"point"}, "method": {"partial"}}
    decided = RESULTS / "decided"
    there, found = set(packs.directories(decided)), []
    for words in study_commands.commands("decided", Path("none"), only):
        if words[0] == "train":
            found += [run for _, run in compose.plan([*words[1:], f"results_dir={decided}"]).runs]
    assert {run.calibration.search for run in found} == {"bisect"}
    assert {paths.run_directory(run) for run in found} <= there
