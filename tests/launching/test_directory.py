"""What a run leaves behind is whole or absent, and a directory has one writer."""

from __future__ import annotations

import json
import math
import os
import random
from pathlib import Path

import pytest
from refusals import refusal

from partial_lora import files, train
from partial_lora.launching import directory as results
from partial_lora.settings.compose import composed
from partial_lora.settings.versions import plain

FILES = ("config.yaml", "predictions.parquet", "adapter/adapter_config.json", "adapter/adapter_model.safetensors")


def test_a_record_has_none_in_place_of_what_is_no_number() -> None:
    values = [{"grad_norm": math.inf, "loss": 0.5}, (math.nan, "x")]
    assert results.finite(values) == [{"grad_norm": None, "loss": 0.5}, [None, "x"]]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The files of a finished run."""
    for name in FILES:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    files.write_json(tmp_path / "result.json", {"format": 1, "status": "finished"})
    return tmp_path


def test_a_run_is_found_by_its_path_its_id_and_as_the_latest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ("partial-1f0e0000/seed0", "partial-1f0e0000/seed1", "lora-1f330000/seed0")
    first, second, other = runs = [Path("results/runs/digits/vit", name) for name in names]
    for run in runs:
        run.mkdir(parents=True)
        results.link_latest("results", run)
    assert results.find(first) == first
    assert [results.find(name) for name in ("latest", "1f3", "1f0e/seed1")] == [other, other, second]
    for ambiguous in ("1f", "1f0e"):
        with refusal(f"{ambiguous}: ", first, second):
            results.find(ambiguous)
    for name in ("lora", "seed0", "f" * 300):  # no id; whoever needs a run says so
        assert results.find(name) == Path(name)
    Path("results").rename("other")
    assert [str(results.find(name)) for name in ("other/latest", "other/1f3")] == [
        "other/runs/digits/vit/lora-1f330000/seed0",  # which it names, also after another run has ended
        "other/runs/digits/vit/lora-1f330000/seed0",
    ]
    assert results.find("latest") == Path("latest")
    Path("results/latest").mkdir(parents=True)  # copied, with what the link led to
    assert results.find("latest") == Path("results/latest")
    results.link_latest("results", Path("results/runs/digits/vit/lora-1f330000/seed0"))
    assert [each.name for each in Path("results").iterdir()] == ["latest"]


def test_only_a_whole_finished_run_counts_as_finished(run: Path) -> None:
    assert results.is_finished(run)
    whole = (run / "result.json").read_text()
    for broken in ("", whole[: len(whole) // 2], "[]", "{}", json.dumps({"format": 1, "status": "running"})):
        (run / "result.json").write_text(broken)
        assert not results.is_finished(run), broken
    (run / "result.json").write_text(whole)
    for name in FILES:
        (run / name).rename(run / "elsewhere")
        assert not results.is_finished(run), name
        (run / "elsewhere").rename(run / name)
    (run / "adapter" / "README.md").write_text("a model card")
    files.write_json(run / "result.json", {"format": 1, "status": "finished", "files": results.entries(run)})
    (run / "adapter" / "README.md").write_text("a model card, and its licence")
    assert results.is_finished(run)  # what people write there is none of ours
    files.write_json(run / "result.json", {"format": 1, "status": "finished", "calibration": {"threshold": 0.9}})
    assert not results.is_finished(run)  # it promises a calibration.json
    (run / "calibration.json").write_text("{}")
    assert results.is_finished(run)


def test_a_record_and_its_predictions_stand_for_a_run_that_has_lost_its_weights(tmp_path: Path) -> None:
    (tmp_path / "predictions.parquet").write_text("rows")
    record = {
        "format": 1,
        "status": "finished",
        "metrics": {"test": {}},
        "files": {"predictions.parquet": 4, "config.yaml": 9},
    }
    changes = ({}, {"status": "failed"}, {"metrics": {}}, {"files": {"predictions.parquet": 5}})
    recorded = []
    for change in changes:
        files.write_json(tmp_path / "result.json", record | change)
        recorded.append(results.is_recorded(tmp_path))
        assert not results.is_finished(tmp_path)
    assert recorded == [True, False, False, False]
    files.write_json(tmp_path / "result.json", record)
    (tmp_path / "predictions.parquet").unlink()
    assert not results.is_recorded(tmp_path)


def test_a_record_says_so_where_this_package_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise results.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(results.metadata, "version", version)
    assert results.new({"seed": 0})["versions"]["partial-lora"] == "not installed"


def test_an_attempt_goes_on_from_a_record_that_says_no_more_than_its_status() -> None:
    assert results.new({"seed": 0}, {"status": "failed"})["attempts"] == 2
    seconds = {"calibrate": 3.0, "train": 5.0}
    assert results.new({"seed": 0}, {"status": "failed", "seconds": seconds})["seconds"]["calibrate"] == 3


def test_an_attempt_goes_on_over_the_commits_of_the_hub_that_the_one_before_it_had(monkeypatch, tmp_path: Path) -> None:
    config, asked = composed("model=tiny_bert", "model.weights=owner/name", "task=text_table"), []
    record = results.new(plain(config), {"status": "failed", "commits": {"model.weights": "0a1b"}})

    def task_of(config, **_) -> None:
        asked.append(config.model.weights)
        raise InterruptedError

    monkeypatch.setattr(train.build, "task_of", task_of)
    with pytest.raises(InterruptedError):
        train.run(config, tmp_path, record, "train")
    assert asked == ["owner/name@0a1b"]


def test_settings_as_large_as_their_file_may_be_reach_a_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)
    shares = {
        f"model.layers.{number}.mlp.up_proj": {"rows": draw.random(), "columns": draw.random()}
        for number in range(2500)
    }
    ((name, value),) = results.worker_variables({"calibration": {"sparsity": shares}}, {"data": "1f"}).items()
    assert len(name) + len(value) + 2 < 2**17  # as Linux has it
    monkeypatch.setenv(name, value)
    assert results.worker_settings(tmp_path) == ({"calibration": {"sparsity": shares}}, {"data": "1f"})
    assert name not in os.environ


def test_clearing_leaves_the_lock_alone(run: Path) -> None:
    with results.locked(run):
        results.prepare(run, overwrite=True)
        assert [entry.name for entry in run.iterdir()] == [results.LOCK]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_broken_record_is_set_aside_by_name(run: Path, overwrite: bool) -> None:
    (run / results.RESULT).write_text("{")
    note, *_ = results.prepare(run, overwrite=overwrite)
    assert (run / "result.json.broken").read_text() == "{"
    assert "set aside as result.json.broken" in note


@pytest.mark.parametrize("damaged", [results.PREDICTIONS, results.RESULT])
def test_weights_of_a_run_in_doubt_are_set_aside_until_all_is_overwritten(run: Path, damaged: str) -> None:
    weights, aside = run / FILES[-1], run / results.ASIDE / Path(FILES[-1]).name
    weights.write_text("first")
    (run / damaged).unlink()
    results.prepare(run, overwrite=False)
    assert aside.read_text() == "first"
    weights.parent.mkdir()
    weights.write_text("second")
    (run / results.RESULT).write_text("{")
    notes = results.prepare(run, overwrite=False)
    assert (aside.read_text(), weights.exists(), results.ASIDE in notes[-1]) == ("second", False, True)
    results.prepare(run, overwrite=True)
    assert not aside.exists()


def test_a_lock_that_is_only_looked_at_is_waited_for_and_a_system_without_locks_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = iter([False, False, True])
    monkeypatch.setattr(results, "lock", lambda descriptor: next(taken))
    with results.locked(tmp_path):
        assert not list(taken)
    monkeypatch.setattr(results, "lock", lambda descriptor: os.open(tmp_path / "no" / "locks", os.O_RDONLY))
    with refusal("results_dir: ", tmp_path), results.locked(tmp_path):
        pass


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with refusal("results_dir: ", tmp_path), results.locked(tmp_path / "file" / "run"):
        pass
