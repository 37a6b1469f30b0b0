from __future__ import annotations

import json

import pytest
import torch
from scored_models import TARGETS, Counted

from partial_lora import calibrate
from partial_lora.calibration.score import FewShotScore

BLOCKS = "vit.blocks"


def test_the_model_comes_back_bit_for_bit(model, batches, score):
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    calibrate(model, score, target_modules=TARGETS)
    calls = 0

    def breaks(model):
        nonlocal calls
        calls += 1
        assert not model.training
        if calls == 9:
            raise KeyboardInterrupt
        return 1.0

    with pytest.raises(KeyboardInterrupt):
        calibrate(model, breaks, target_modules=TARGETS)
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


# What is kept on disk


def never(model):
    raise AssertionError("evaluated again")


def test_the_same_question_is_answered_without_any_evaluation(model, score, tmp_path):
    store = tmp_path / "new" / "curves.json"
    first = calibrate(model, score, target_modules=TARGETS, store=store, settings={"shots": 9})
    again = calibrate(model, never, target_modules=TARGETS, store=store, settings={"shots": 16})
    assert (first.cached, again.cached, again.evaluations) == (False, True, 0)
    assert again.modules == first.modules
    assert (again.baseline, again.joint, again.threshold) == (first.baseline, first.joint, first.threshold)
    assert again.settings == {"shots": 16}
    budget = calibrate(model, score, target_modules=TARGETS, store=store, budget=0.5, chance=0.0)
    again = calibrate(model, never, target_modules=TARGETS, store=store, budget=0.5, chance=0.0)
    assert again.cached
    assert again.sparsity == budget.sparsity
    assert again.budget == 0.5


def test_another_threshold_evaluates_only_what_is_undecided(model, batches, tmp_path):
    def fresh():
        return FewShotScore(model, batches, blocks=BLOCKS)

    alone = {at: calibrate(model, fresh(), target_modules=TARGETS, threshold=at) for at in (0.75, 0.9)}
    store = tmp_path / "curves.json"
    for at in (0.9, 0.75):
        shared = calibrate(model, fresh(), target_modules=TARGETS, threshold=at, store=store)
        assert shared.sparsity == alone[at].sparsity
        assert shared.joint == alone[at].joint
        assert not shared.cached
    assert shared.evaluations < 0.8 * alone[0.75].evaluations


def test_an_interrupted_calibration_goes_on(model, batches, tmp_path):
    store = tmp_path / "curves.json"
    whole = calibrate(model, Counted(batches), target_modules=TARGETS)
    with pytest.raises(KeyboardInterrupt):
        calibrate(model, Counted(batches, limit=40), target_modules=TARGETS, store=store)
    rest = calibrate(model, Counted(batches), target_modules=TARGETS, store=store)
    assert rest.modules == whole.modules
    assert rest.evaluations == whole.evaluations - 39  # the baseline is evaluated again, to check it


def spoil_end(text):
    return text[: len(text) // 2]


def spoil_number(text):
    file = json.loads(text)
    next(iter(file["content"]["curves"].values()))["rows"][0][1] = 0.123
    return json.dumps(file)


@pytest.mark.parametrize("spoil", [spoil_end, spoil_number, lambda text: "[]", lambda text: '{"version": 1}'])
def test_a_broken_store_is_named_and_made_again(model, batches, score, tmp_path, caplog, spoil):
    store = tmp_path / "curves.json"
    first = calibrate(model, score, target_modules=TARGETS, store=store)
    store.write_text(spoil(store.read_text()))
    again = calibrate(model, FewShotScore(model, batches, blocks=BLOCKS), target_modules=TARGETS, store=store)
    assert str(store) in caplog.text
    assert not again.cached
    assert (again.sparsity, again.evaluations) == (first.sparsity, first.evaluations)
    assert calibrate(model, never, target_modules=TARGETS, store=store).cached


def test_curves_of_something_else_are_not_used(model, batches, score, tmp_path, caplog):
    store = tmp_path / "curves.json"
    calibrate(model, score, target_modules=TARGETS, store=store)
    other = calibrate(model, Counted(batches), target_modules=TARGETS, store=store, search="bisect")
    assert "made for another question" in caplog.text
    assert other.modules == calibrate(model, Counted(batches), target_modules=TARGETS, search="bisect").modules
    caplog.clear()
    moved = [{**batch, "labels": (batch["labels"] + (torch.arange(len(batch["labels"])) < 2)) % 4} for batch in batches]
    other = calibrate(model, Counted(moved), target_modules=TARGETS, store=store, search="bisect", threshold=0.8)
    assert "its baseline score is" in caplog.text
    fresh = calibrate(model, Counted(moved), target_modules=TARGETS, search="bisect", threshold=0.8)
    assert other.modules == fresh.modules
