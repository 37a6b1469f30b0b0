"""A training that was ended resumes as if it had not been, bit for bit, and only from a checkpoint that is whole."""

from __future__ import annotations

import logging
import os
import shutil
import signal
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from tiny_trainer import RESUMED, SHAPE, VERSIONS, EndAfter, EndedError, masked, resumable, trained_state, trainer
from transformers import TrainerCallback

from partial_lora import files
from partial_lora.errors import PartialLoraError
from partial_lora.launching import directory as results
from partial_lora.training import checkpoints
from partial_lora.training import trainer as training_module


def measured(training) -> list[dict]:
    """Return the history without what depends on a clock."""
    clock = ("runtime", "second", "flos")
    return [
        {key: value for key, value in entry.items() if not any(word in key for word in clock)}
        for entry in training.state.log_history
        if "train_loss" not in entry
    ]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory):
    training = trainer(masked(), tmp_path_factory.mktemp("unbroken"), **RESUMED)
    training.train()
    return training


def ended_after(step: int, directory: Path, scores: Iterable[float] = (), **changes: object) -> None:
    training = trainer(masked(), directory, **RESUMED | changes)
    if scores:
        left = iter(scores)
        training.compute_metrics = lambda told: {"accuracy": next(left)}
    training.add_callback(EndAfter(step))
    with pytest.raises(EndedError):
        training.train()


ENDS = [((1,), False, None), ((3, 7), False, 6), ((4, 8), True, 8)]


@pytest.mark.parametrize(("steps", "saved", "resumes_from"), ENDS)
def test_a_resumed_training_ends_as_one_without_a_break(unbroken, tmp_path: Path, steps, saved, resumes_from) -> None:
    folder = tmp_path / results.CHECKPOINTS
    for step in steps:
        training = trainer(masked(), tmp_path, **RESUMED)
        training.add_callback(EndAfter(step, saved))
        with pytest.raises(EndedError):
            training.train(resumable(folder.parent))
    found = resumable(folder.parent)
    assert (found and checkpoints.step_of(found)) == resumes_from
    training = trainer(masked(), tmp_path, **RESUMED)
    training.train(found)
    assert measured(training) == measured(unbroken)
    assert training.mean_loss == unbroken.mean_loss
    expected = trained_state(unbroken.model)
    assert all(torch.equal(value, expected[name]) for name, value in trained_state(training.model).items())


def test_the_mean_loss_is_that_of_all_steps(unbroken) -> None:
    logged = [entry for entry in unbroken.state.log_history if "loss" in entry]
    steps = [0, *(entry["step"] for entry in logged)]
    total = sum(entry["loss"] * (entry["step"] - before) for entry, before in zip(logged, steps, strict=False))
    assert unbroken.mean_loss == pytest.approx(total / 8, rel=1e-6)


def test_a_checkpoint_holds_what_trains_and_nothing_else(tmp_path: Path) -> None:
    ended_after(3, tmp_path)
    adapted, (folder,) = masked(), (tmp_path / results.CHECKPOINTS).iterdir()
    held = {name: value.numel() for name, value in load_file(folder / checkpoints.TRAINABLE).items()}
    trains = {name: value.numel() for name, value in adapted.named_parameters() if value.requires_grad}
    assert held == trains
    dense = sum(value.numel() for name, value in masked(LoraConfig).named_parameters() if value.requires_grad)
    assert sum(held.values()) < dense


@pytest.fixture(scope="module")
def two_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of steps 2 and 4, the first of which is the best."""
    directory = tmp_path_factory.mktemp("two")
    ended_after(5, directory, scores=(0.9, 0.1), save_total_limit=3)
    folder = directory / results.CHECKPOINTS
    assert {path.name for path in folder.iterdir()} == {"checkpoint-2", "checkpoint-4"}
    return folder


@pytest.fixture
def folder(two_checkpoints: Path, tmp_path: Path) -> Path:
    """A copy of those for a test of its own."""
    return Path(shutil.copytree(two_checkpoints, tmp_path / results.CHECKPOINTS))


@pytest.mark.parametrize(  # any other damage of a sealed folder: tests/test_files.py
    ("file", "spoilt"),
    [
        ("optimizer.pt", None),
        ("complete.json", lambda content: content[: len(content) // 2]),
        (checkpoints.TRAINABLE, lambda content: content[:-1] + bytes([content[-1] ^ 1])),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_set_aside_by_name(folder: Path, caplog, file: str, spoilt) -> None:
    broken = folder / "checkpoint-4" / file
    broken.unlink() if spoilt is None else broken.write_bytes(spoilt(broken.read_bytes()))
    with caplog.at_level(logging.WARNING):
        found = resumable(folder.parent)
    assert file in caplog.text
    assert found.name == "checkpoint-2"
    assert (folder / "checkpoint-4.broken").is_dir()


def test_other_versions_of_the_libraries_or_other_masks_start_over(folder: Path, caplog) -> None:
    other = checkpoints.shape_of(masked(mask_seed=1))
    with caplog.at_level(logging.WARNING):
        assert checkpoints.resumable(Path(shutil.copytree(folder, folder.parent / "copy")), VERSIONS, other) is None
        assert checkpoints.resumable(folder, {"torch": "0.4"}, SHAPE) is None
    assert "masks" in caplog.text
    assert f"computed by torch {torch.__version__}, this is 0.4" in caplog.text


def test_a_checkpoint_of_another_version_of_this_package_is_set_aside(folder: Path, caplog) -> None:
    newest, building = folder / "checkpoint-4", folder / ".building"
    newest.rename(building)
    progress = files.read_json(building / "progress.json")
    del progress["shape"]
    (building / "complete.json").unlink()
    files.write_json(building / "progress.json", progress)
    files.seal(building, newest)
    assert files.fault(newest) is None
    assert resumable(folder.parent).name == "checkpoint-2"
    assert "progress.json" in caplog.text


def test_what_may_end_best_has_to_be_there_still(folder: Path, caplog) -> None:
    (folder / "checkpoint-2" / checkpoints.TRAINABLE).write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert resumable(folder.parent) is None
    assert (folder / "checkpoint-4.broken").is_dir()  # it is whole, but could not end with the best


def test_a_half_written_checkpoint_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    training = trainer(masked(), tmp_path, **RESUMED)
    written = []

    def fails_at_the_second(building: Path, final: Path) -> None:
        written.append(final)
        if len(written) == 2:
            monkeypatch.setattr(os, "fsync", full)
        sealed(building, final)

    sealed = files.seal
    monkeypatch.setattr(training_module, "seal", fails_at_the_second)
    with pytest.raises(PartialLoraError, match=r"checkpoint-4 .*No space left on device"):
        training.train()
    monkeypatch.undo()
    folder = tmp_path / results.CHECKPOINTS
    assert {path.name for path in folder.iterdir()} == {"checkpoint-2"}  # older ones go once the new one is whole
    assert resumable(folder.parent).name == "checkpoint-2"


def test_checkpoints_beside_the_best_are_as_many_as_configured(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    for step in (2, 4, 10, 12):
        (folder / f"checkpoint-{step}").mkdir(parents=True)
    checkpoints.rotate(folder, best=4, limit=2)
    assert {path.name for path in folder.iterdir()} == {"checkpoint-4", "checkpoint-10", "checkpoint-12"}


class Signal(TrainerCallback):
    """Ask this process to stop, within a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self._step - 1:
            os.kill(os.getpid(), signal.SIGTERM)


def by_epoch(directory: Path):
    """Return a training that validates and saves after every epoch of three steps."""
    return trainer(masked(), directory, epochs=3.0, learning_rate=0.05, count=25)


def by_steps(directory: Path):
    return trainer(masked(), directory, **RESUMED)


@pytest.fixture(scope="module")
def unbroken_by_epoch(tmp_path_factory: pytest.TempPathFactory):
    training = by_epoch(tmp_path_factory.mktemp("by_epoch"))
    training.train()
    return training


@pytest.mark.parametrize(
    ("make", "of", "step", "steps"),
    [
        # at the end of an epoch, and of the last
        *((by_epoch, "unbroken_by_epoch", step, [3, 6, 9]) for step in (3, 9)),
        (by_steps, "unbroken", 3, [2, 4, 6, 8]),  # a step at which no checkpoint was due
    ],
)
def test_a_signal_ends_training_with_a_checkpoint_and_changes_nothing_of_what_follows(
    request, tmp_path: Path, monkeypatch, make, of: str, step: int, steps: list[int]
) -> None:
    expected, training, before = request.getfixturevalue(of), make(tmp_path), signal.getsignal(signal.SIGTERM)
    training.add_callback(Signal(step))
    sealed = files.seal

    def signalled_again(building: Path, final: Path) -> None:
        if final.name == f"checkpoint-{step}":
            os.kill(os.getpid(), signal.SIGTERM)
        sealed(building, final)

    monkeypatch.setattr(training_module, "seal", signalled_again)
    with pytest.raises(SystemExit) as ended:
        training.train()
    assert (ended.value.code, signal.getsignal(signal.SIGTERM)) == (128 + signal.SIGTERM, before)
    found = resumable(tmp_path)
    assert checkpoints.step_of(found) == step
    training = make(tmp_path)
    training.train(found)
    assert training.mean_loss == expected.mean_loss
    of_validation = [[entry for entry in measured(each) if "eval_loss" in entry] for each in (training, expected)]
    assert of_validation[0] == of_validation[1]
    assert [entry["step"] for entry in of_validation[0]] == steps
    assert training.state.best_global_step == expected.state.best_global_step
    kept = trained_state(expected.model)
    assert all(torch.equal(value, kept[name]) for name, value in trained_state(training.model).items())


def test_a_loss_that_is_no_number_stops_before_anything_moves(tmp_path: Path) -> None:
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 4:
                with torch.no_grad():
                    model.get_base_model().timm_model.norm.weight[0] = float("nan")

    training = trainer(masked(), tmp_path, **RESUMED | {"save_total_limit": 9})
    training.add_callback(Poison())
    with pytest.raises(PartialLoraError, match=r"step 5 .*trainer\.learning_rate"):
        training.train()
    found = resumable(tmp_path)
    assert checkpoints.step_of(found) == 4
    kept = load_file(found / checkpoints.TRAINABLE)
    assert all(torch.equal(value, kept[name]) for name, value in trained_state(training.model).items())
