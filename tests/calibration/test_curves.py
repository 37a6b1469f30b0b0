"""The store of a calibration's curves: no point is evaluated twice, and none of something else is used."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from scored_models import GRID, VARIANTS, Counted

from partial_lora import PartialLoraError, calibrate
from partial_lora.calibration import curves
from partial_lora.calibration.score import FewShotScore


def never(model):
    raise AssertionError("evaluated again")


def test_a_store_that_cannot_be_removed_is_not_used(model, score, tmp_path, monkeypatch):
    store = tmp_path / "curves.json"
    calibrate(model, score, **GRID, store=store)
    text = store.read_text()

    monkeypatch.setattr(Path, "unlink", refused_to)
    monkeypatch.setattr(curves, "write_json", refused_to)
    found = calibrate(model, lambda model: 0.5 * score(model), **GRID, threshold=0.7, store=store)
    assert (found.cached, store.read_text() == text) == (False, True)


def test_a_file_that_cannot_be_read_is_left_alone(model, score, tmp_path, monkeypatch):
    store = tmp_path / "curves.json"
    calibrate(model, score, **GRID, store=store)
    text = store.read_text()
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_text", refused_to)
        assert not calibrate(model, score, **GRID, store=store).cached
    assert store.read_text() == text


def refused_to(path, *_, **__):
    raise PermissionError(13, "not yours", str(path))


def test_the_same_question_is_answered_without_any_evaluation(model, score, tmp_path):
    store = tmp_path / "new" / "curves.json"
    first = calibrate(model, score, **GRID, store=store, settings={"shots": 9})
    again = calibrate(model, never, **GRID, store=store, settings={"shots": 16})
    assert (first.cached, again.cached, again.evaluations) == (False, True, 0)
    assert again.modules == first.modules
    assert (again.baseline, again.joint, again.threshold) == (first.baseline, first.joint, first.threshold)
    assert again.settings == {"shots": 16}
    budget = calibrate(model, score, **GRID, store=store, budget=0.5, chance=0.0)
    again = calibrate(model, never, **GRID, store=store, budget=0.5, chance=0.0)
    assert again.cached
    assert again.sparsity == budget.sparsity
    assert again.budget == 0.5


def test_an_interrupted_calibration_goes_on(model, batches, tmp_path):
    store = tmp_path / "curves.json"
    whole = calibrate(model, Counted(batches), **GRID)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, Counted(batches, limit=12), **GRID, store=store)
    rest = calibrate(model, Counted(batches), **GRID, store=store)
    assert rest.modules == whole.modules
    assert rest.evaluations == whole.evaluations - 11  # the baseline is evaluated again, to check it


def spoil_end(text):
    return text[: len(text) // 2]


def spoil_number(text):
    file = json.loads(text)
    next(iter(file["content"]["curves"].values()))["rows"][0][1] = 0.123
    return json.dumps(file)


@pytest.mark.parametrize("spoil", [spoil_end, spoil_number, lambda text: ""])
def test_a_broken_store_is_named_and_made_again(model, batches, score, tmp_path, caplog, spoil):
    store = tmp_path / "curves.json"
    first = calibrate(model, score, **GRID, store=store)
    store.write_text(spoil(store.read_text()))
    again = calibrate(model, FewShotScore(model, batches, blocks="vit.blocks"), **GRID, store=store)
    assert str(store) in caplog.text
    assert not again.cached
    assert (again.sparsity, again.evaluations) == (first.sparsity, first.evaluations)
    assert calibrate(model, never, **GRID, store=store).cached


@pytest.mark.parametrize("text", ["[]", '{"version": 1}', '{"prompt": "a"}\n{"prompt": "b"}\n', "\x00\xff"])
def test_a_file_that_is_no_store_stays_as_it_is(model, tmp_path, text):
    store = tmp_path / "train.json"
    store.write_text(text)
    with pytest.raises(PartialLoraError, match=f"store={store}"):
        calibrate(model, never, **GRID, store=store)
    assert store.read_text() == text


def test_curves_of_something_else_are_not_used(model, batches, score, tmp_path, caplog):
    store = tmp_path / "curves.json"
    calibrate(model, score, **GRID, store=store)
    other = calibrate(model, Counted(batches), **GRID, store=store, search="bisect")
    assert "made for another question" in caplog.text
    assert other.modules == calibrate(model, Counted(batches), **GRID, search="bisect").modules
    caplog.clear()
    moved = [{**batch, "labels": (batch["labels"] + (torch.arange(len(batch["labels"])) < 2)) % 4} for batch in batches]
    other = calibrate(model, Counted(moved), **GRID, store=store, search="bisect", threshold=0.8)
    assert "its baseline score is" in caplog.text
    fresh = calibrate(model, Counted(moved), **GRID, search="bisect", threshold=0.8)
    assert other.modules == fresh.modules


@pytest.mark.parametrize(("axes", "scope", "bounded"), [*((*each, False) for each in VARIANTS), (*VARIANTS[0], True)])
def test_thresholds_share_what_has_the_same_choices_before_it(model, batches, tmp_path, axes, scope, bounded):
    def fresh():
        return FewShotScore(model, batches, blocks="vit.blocks") if bounded else Counted(batches)

    kind, store = {"axes": axes, "scope": scope, **GRID}, tmp_path / "curves.json"
    alone = calibrate(model, fresh(), threshold=0.85, **kind)
    calibrate(model, fresh(), threshold=0.9, store=store, **kind)
    shared = calibrate(model, fresh(), threshold=0.85, store=store, **kind)
    assert (shared.modules.keys(), shared.sparsity, shared.joint) == (alone.modules.keys(), alone.sparsity, alone.joint)
    assert not shared.cached
    assert shared.evaluations < alone.evaluations
    again = calibrate(model, lambda model: pytest.fail("evaluated again"), threshold=0.85, store=store, **kind)
    assert again.cached
    assert again.modules == shared.modules


def test_one_store_keeps_every_variant_apart(model, batches, tmp_path):
    store = tmp_path / "curves.json"
    for axes, scope in VARIANTS:
        for more in ({}, {"above_chance": True, "chance": 0.4}, {"repair": True}):
            kind = {"axes": axes, "scope": scope, "threshold": 0.8, **GRID, "target_modules": ["mlp.fc2"], **more}
            found, fresh = (calibrate(model, Counted(batches), store=at, **kind) for at in (store, None))
            assert not found.cached
            assert (found.sparsity, found.joint) == (fresh.sparsity, fresh.joint)


@pytest.mark.parametrize("kind", [{"scope": "cumulative"}, {"axes": "joint", "scope": "cumulative_backward"}])
def test_a_killed_calibration_keeps_every_finished_module(model, batches, tmp_path, kind):
    store = tmp_path / "curves.json"
    whole = calibrate(model, Counted(batches), threshold=0.8, **GRID, **kind)
    reached = 2 * whole.evaluations // 3

    class Killed(Counted):
        def __call__(self, model):
            if self.calls == reached:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__call__(model)

    child = os.fork()
    if not child:
        try:
            calibrate(model, Killed(batches), threshold=0.8, store=store, **GRID, **kind)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    rest = calibrate(model, Counted(batches), threshold=0.8, store=store, **GRID, **kind)
    assert rest.modules == whole.modules
    most = 2 * 4  # of the module it died in
    assert rest.evaluations <= whole.evaluations - reached + 1 + most


def test_a_store_that_cannot_be_written_costs_nothing_but_time(model, batches, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    found = calibrate(model, Counted(batches), threshold=0.8, store=tmp_path / "file" / "curves.json", **GRID)
    assert found.sparsity == calibrate(model, Counted(batches), threshold=0.8, **GRID).sparsity
    assert caplog.text.count("cannot be written") == 1
