"""Whatever ends a run, and whenever: nothing half-written is taken for whole, and the same command ends as one run."""

from __future__ import annotations

import itertools
import json
import operator
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas
import pytest
from commands import begun, here, until
from refusals import refusal

from partial_lora import train as train_module
from partial_lora.files import fault, is_locked
from partial_lora.finished.run import finished_run
from partial_lora.launching import directory as results
from partial_lora.report.predictions import losses_of, read
from partial_lora.training import trainer

TINY = ("model=tiny_vit", "method.dropout=0.2", "trainer.device=cpu", "calibration.shots=4", "calibration.levels=0.2")
TINY += ("task.train_samples=100", "task.test_samples=60", "calibration.search=scan")  # many steps to be killed in
SHORT = ("trainer.max_steps=6", "trainer.save_steps=2")


def train(place: Path, *arguments: str, first: Callable[[], object] = lambda: None) -> subprocess.CompletedProcess:
    """`partial-lora train` with its own cache, so that nothing is known beforehand; `first` is done in its worker."""
    return here(place, "train", *TINY, *SHORT, *arguments, first=first)


def kill_at(moment: str) -> None:
    """Have this process killed at a moment, module:function:N: as the N-th call of that begins."""
    module, name, count = moment.split(":")
    holder, _, attribute = name.rpartition(".")
    holder = operator.attrgetter(holder)(sys.modules[module]) if holder else sys.modules[module]
    function, calls = getattr(holder, attribute), itertools.count(1)

    def killed(*arguments, **settings):
        if next(calls) == int(count):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **settings)

    setattr(holder, attribute, killed)


def run_of(place: Path) -> Path:
    (directory,) = place.glob("results/runs/*/*/*/seed0")
    return directory


def record_of(place: Path) -> dict:
    return json.loads((run_of(place) / "result.json").read_text())


def without_clocks(history: list[dict]) -> list[dict]:
    clock = ("runtime", "second", "flos", "train_loss")
    return [{key: value for key, value in entry.items() if not any(word in key for word in clock)} for entry in history]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("unbroken")
    done = train(place)
    assert done.returncode == 0, done.stderr
    return place


def ends_as(unbroken: Path, place: Path) -> None:
    """Nothing that was computed tells the two apart."""
    own, expected = record_of(place), record_of(unbroken)
    assert own["status"] == "finished"
    for key in ("metrics", "sparsity", "parameters"):
        assert own[key] == expected[key], key
    assert without_clocks(own["history"]) == without_clocks(expected["history"])
    for name in ("adapter/adapter_model.safetensors", "adapter/partial_lora.json"):
        assert (run_of(place) / name).read_bytes() == (run_of(unbroken) / name).read_bytes(), name
    frames = [pandas.read_parquet(run_of(each) / "predictions.parquet") for each in (place, unbroken)]
    pandas.testing.assert_frame_equal(*frames)
    assert results.is_finished(run_of(place))
    assert not (run_of(place) / results.CHECKPOINTS).exists()
    assert {path.name for path in run_of(place).iterdir()} == {path.name for path in run_of(unbroken).iterdir()}


def test_a_run_that_paused_ends_as_one_that_did_not_and_keeps_the_losses_of_its_validation_rows(
    unbroken: Path, tmp_path: Path
) -> None:
    """Those of the best checkpoint so far."""
    assert train(tmp_path, "trainer.until=0.5").returncode == 0
    kept = run_of(tmp_path) / results.VALIDATION
    losses = losses_of(read(kept))
    assert any(losses.mean() == pytest.approx(entry.get("eval_loss")) for entry in record_of(tmp_path)["history"])
    assert train(tmp_path).returncode == 0
    kept.unlink()  # it was there to the end
    ends_as(unbroken, tmp_path)


MOMENTS = (  # in the order of a run; and the checkpoints that are whole after each
    ("partial_lora.calibration.curves:Store.save:9", set()),  # calibrating
    ("partial_lora.training.trainer:ReportProgress.on_step_end:3", {2}),  # between two checkpoints
    ("partial_lora.training.trainer:seal:1", {2}),  # while the next one is saved
    ("partial_lora.training.checkpoints:rotate:1", {2, 4}),  # before older ones are removed
    ("partial_lora.train:_save_adapter:1", {6}),  # while results are written
    ("partial_lora.launching.directory:remove_checkpoints:1", {6}),  # when all has been said
)


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list]:
    """One run that was killed at every moment in turn and then left to end; and what was seen after each."""
    place, seen = tmp_path_factory.mktemp("killed"), []
    for moment, _ in MOMENTS:
        done = train(place, first=partial(kill_at, moment))
        whole = {int(path.name.split("-")[1]) for path in run_of(place).glob("checkpoints/*-*") if not fault(path)}
        seen.append((done, record_of(place)["status"], whole))
    return place, seen


def test_a_run_that_was_killed_at_any_moment_ends_as_one_that_never_was(unbroken: Path, killed) -> None:
    place, seen = killed
    for (moment, _), (done, status, _) in zip(MOMENTS[:-1], seen[:-1], strict=True):
        assert done.returncode == 1, (moment, done.stdout)
        assert "the worker was ended by SIGKILL" in done.stderr
        assert status == "failed", moment
    assert seen[-1][1] == "finished"
    done = train(place)
    assert done.returncode == 0, done.stderr
    assert "finished before, not run again" in done.stdout
    ends_as(unbroken, place)
    assert record_of(place)["attempts"] == len(MOMENTS)
    assert record_of(place)["resumed_from_step"] == 6


def test_a_checkpoint_goes_once_a_newer_one_is_whole(killed) -> None:
    _, seen = killed
    for (moment, whole), (_, _, found) in zip(MOMENTS, seen, strict=True):
        assert whole <= found, moment


def test_what_was_calibrated_before_the_kill_is_not_evaluated_again(unbroken: Path, killed) -> None:
    place, _ = killed
    own, expected = record_of(place)["calibration"], record_of(unbroken)["calibration"]
    assert 0 < own["evaluations"] < expected["evaluations"]
    assert not own["cached"]  # what the attempts before had paid for is not called free
    same = ("baseline", "joint", "threshold")
    assert {key: own[key] for key in same} == {key: expected[key] for key in same}


def test_a_run_under_way_is_nobody_else_s_and_leaves_a_checkpoint_at_a_signal(unbroken: Path, tmp_path: Path) -> None:
    shutil.copytree(unbroken / "cache", tmp_path / "cache")
    given = ("train", *TINY, "trainer.max_steps=5000", "trainer.save_steps=5000")
    running = begun(tmp_path, *given)
    while "train …" not in (line := running.stdout.readline()):
        assert line, running.communicate()
    held = here(tmp_path, *given)
    running.send_signal(signal.SIGTERM)
    _, said = running.communicate(timeout=120)
    assert held.returncode == 2
    assert re.search(rf"in use by pid {running.pid} on .* \(worker: pid \d+\)", held.stderr)
    assert running.returncode == 143
    assert "interrupted by SIGTERM" in said
    assert record_of(tmp_path)["status"] == "failed"
    (checkpoint,) = (run_of(tmp_path) / results.CHECKPOINTS).iterdir()
    assert fault(checkpoint) is None
    assert 0 < int(checkpoint.name.split("-")[1]) < 5000


def orphan_at(step: int) -> None:
    """Have the parent of a worker killed amid a step, which goes on once the worker has heard."""
    before = trainer.StopOnSignal.on_step_end

    def orphaned(self, args, state, control, **given):
        if state.global_step == step:
            os.kill(os.getppid(), signal.SIGKILL)
            until(lambda: self.received is not None)
        return before(self, args, state, control, **given)

    trainer.StopOnSignal.on_step_end = orphaned


def test_a_run_whose_command_is_killed_ends_after_its_step_and_is_gone_on_from(unbroken: Path, tmp_path: Path) -> None:
    shutil.copytree(unbroken / "cache", tmp_path / "cache")
    command = begun(tmp_path, "train", *TINY, *SHORT, first=partial(orphan_at, 3))
    assert command.wait(120) == -signal.SIGKILL
    until(lambda: not is_locked(run_of(tmp_path) / results.LOCK))  # by the worker
    assert (record_of(tmp_path)["status"], record_of(tmp_path)["error"]) == ("failed", results.INTERRUPTED)
    assert train(tmp_path).returncode == 0
    own, expected = record_of(tmp_path), record_of(unbroken)
    assert (own["resumed_from_step"], own["metrics"]) == (3, expected["metrics"])


def full_at_the_adapter() -> None:
    """Have this process write small files alone from the moment on that it saves the adapter."""
    saved = train_module._save_adapter

    def full(*arguments) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        saved(*arguments)

    train_module._save_adapter = full


def test_a_full_disk_is_named_and_what_was_written_stays(unbroken: Path, tmp_path: Path) -> None:
    shutil.copytree(unbroken / "cache", tmp_path / "cache")

    def small_files() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    done = train(tmp_path, first=small_files)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "checkpoint-2 cannot be written" in done.stderr
    assert record_of(tmp_path)["status"] == "failed"
    assert not list((run_of(tmp_path) / results.CHECKPOINTS).iterdir())
    done = train(tmp_path, first=full_at_the_adapter)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert f"{run_of(tmp_path) / results.ADAPTER} cannot be written" in done.stderr
    done = train(tmp_path)
    assert done.returncode == 0, done.stderr
    assert "goes on after step 6" in done.stdout + done.stderr
    ends_as(unbroken, tmp_path)


def flipped(content: bytes) -> bytes:
    return content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]


@pytest.mark.parametrize("damage", [lambda content: content[: len(content) // 2], flipped], ids=["cut", "flipped"])
@pytest.mark.parametrize(
    "file",
    [f"adapter/{name}" for name in ("adapter_model.safetensors", "adapter_config.json", "partial_lora.json")]
    + ["predictions.parquet", "calibration.json"],
)
def test_a_finished_run_with_a_damaged_file_is_not_finished(unbroken: Path, tmp_path: Path, file: str, damage) -> None:
    run = tmp_path / "seed0"
    shutil.copytree(run_of(unbroken), run)
    assert results.is_finished(run)
    (run / file).write_bytes(damage((run / file).read_bytes()))
    assert not results.is_finished(run)
    with refusal(f"{run}: ", file, "overwrite=true"):
        finished_run(run)
    note, of_weights = results.prepare(run, overwrite=False)
    assert note.startswith(f"{run}: ")
    assert file in note
    assert results.ASIDE in of_weights
