"""Any number of thresholds and budgets from one artefact: what its points decide is not evaluated again."""

from __future__ import annotations

import dataclasses
import json

import pytest
from scored_models import Counted, Named, scored_draw, tiny_vit

from partial_lora import Calibration, PartialLoraError, calibrate
from partial_lora.calibration.score import FewShotScore

GRID = {"target_modules": ["attn.qkv", "mlp.fc2"], "levels": 0.2, "max_sparsity": 0.8}
THRESHOLDS = (0.95, 0.9, 0.8, 0.7, 0.5)


def bounded(model, batches):
    return FewShotScore(model, batches, blocks="vit.blocks")


@pytest.fixture(scope="module")
def fresh():
    """Calibrations with nothing known by a plain score, each made once."""
    model, made = Named(tiny_vit()), {}
    batches = scored_draw(model)

    def calibrated(**kind):
        key = json.dumps(kind, sort_keys=True)
        if key not in made:
            made[key] = calibrate(model, Counted(batches), **GRID | kind)
        return made[key]

    return calibrated


@pytest.mark.parametrize(
    "kind",
    [
        {"search": "scan"},
        {"search": "bisect"},
        {"search": "bisect", "axes": "joint"},
        {"search": "scan", "above_chance": True, "chance": 0.3},
    ],
)
def test_an_artefact_tells_other_thresholds_or_says_that_it_cannot(model, batches, fresh, kind, tmp_path):
    calibrate(model, bounded(model, batches), threshold=0.8, **GRID, **kind).save(tmp_path / "calibration.json")
    artefact = Calibration.load(tmp_path / "calibration.json")  # as a later process has it
    decided = 0
    for threshold in THRESHOLDS:
        expected = fresh(threshold=threshold, **kind)
        known = calibrate(model, bounded(model, batches), threshold=threshold, known=artefact, **GRID, **kind)
        assert (known.sparsity, known.joint) == (expected.sparsity, expected.joint)
        if known.evaluations > 2:  # the baseline, the joint score, and what was undecided
            with pytest.raises(PartialLoraError, match=rf"{threshold:g}.*known="):
                artefact.at(threshold)
            assert known.at(threshold).sparsity == expected.sparsity
            continue
        decided += 1
        read = artefact.at(threshold)
        assert read.sparsity == expected.sparsity
        assert (read.joint, read.threshold, read.cached, read.evaluations) == (None, threshold, True, 0)
        assert not [words for words in read.warnings if "joint score" in words]
        assert read.at(0.8).sparsity == artefact.sparsity
    assert 1 <= decided < len(THRESHOLDS)


def test_exact_curves_tell_every_higher_threshold(fresh):
    for threshold in (1.0, 0.95, 0.9, 0.7):
        read = fresh(threshold=0.5, search="scan").at(threshold)
        assert read.sparsity == fresh(threshold=threshold, search="scan").sparsity


@pytest.mark.parametrize("scope", ["cumulative", "cumulative_backward"])
def test_choices_made_before_are_part_of_what_is_known(model, batches, fresh, scope):
    artefact = fresh(threshold=0.8, scope=scope)
    assert artefact.at(0.8).modules == artefact.modules
    undecided = []
    for threshold in THRESHOLDS:
        expected = fresh(threshold=threshold, scope=scope)
        known = calibrate(model, Counted(batches), threshold=threshold, known=artefact, scope=scope, **GRID)
        assert (known.sparsity, known.joint) == (expected.sparsity, expected.joint)
        assert known.evaluations <= expected.evaluations
        undecided.append(known.evaluations - 2)
        if undecided[-1]:
            with pytest.raises(PartialLoraError, match=rf"{threshold:g}.*known="):
                artefact.at(threshold)
        else:
            assert artefact.at(threshold).sparsity == expected.sparsity
    assert min(undecided) == 0
    assert max(undecided) > 1


@pytest.mark.parametrize("scope", ["independent", "cumulative"])
def test_budgets_and_repairs_leave_the_curves_as_they_were(model, batches, fresh, scope):
    by_budget = fresh(budget=0.5, chance=0.3, scope=scope)
    read = by_budget.at(by_budget.threshold)
    assert read.sparsity == fresh(threshold=by_budget.threshold, scope=scope).sparsity
    again = calibrate(model, Counted(batches), budget=0.5, chance=0.3, known=by_budget, scope=scope, **GRID)
    assert again.sparsity == by_budget.sparsity
    if scope == "independent":
        repaired = fresh(threshold=0.9, repair=True)
        assert repaired.repaired["steps"]
        assert repaired.at(0.9).sparsity == fresh(threshold=0.9).sparsity
        assert repaired.at(0.9).repaired is None
        reused = calibrate(model, Counted(batches), repair=True, known=repaired, **GRID)
        assert (reused.sparsity, reused.joint) == (repaired.sparsity, repaired.joint)


def test_what_is_known_goes_into_the_store(model, batches, fresh, tmp_path):
    artefact = fresh(threshold=0.8)
    store = tmp_path / "curves.json"
    first = calibrate(model, Counted(batches), threshold=0.8, known=artefact, store=store, **GRID)
    assert first.evaluations == 2
    assert calibrate(model, Counted(batches), threshold=0.9, store=store, **GRID).evaluations == 2


def test_of_the_store_and_what_is_known_the_one_that_knows_better_counts(model, batches, fresh, tmp_path):
    store = tmp_path / "curves.json"
    calibrate(model, bounded(model, batches), threshold=0.7, store=store, **GRID)
    exact = fresh(threshold=0.7)
    assert calibrate(model, Counted(batches), threshold=0.8, store=None, known=exact, **GRID).evaluations == 2
    rest = calibrate(model, Counted(batches), threshold=0.8, store=store, known=exact, **GRID)
    assert rest.evaluations == 2
    short = calibrate(model, bounded(model, batches), threshold=0.7, **GRID)
    assert calibrate(model, Counted(batches), threshold=0.9, store=store, known=short, **GRID).evaluations == 2
    assert calibrate(model, Counted(batches), threshold=0.9, known=short, **GRID).evaluations > 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axes": "joint"}, "axes .*joint"),
        ({"scope": "cumulative"}, "scope .*cumulative"),
        ({"search": "bisect"}, "search .*bisect"),
        ({"levels": 0.1}, "levels .*0.1"),
        ({"max_sparsity": 0.6}, "max_sparsity .*0.6"),
        ({"target_modules": ["attn.qkv"]}, "modules .*vit.blocks.0.mlp.fc2"),
    ],
)
def test_a_calibration_of_something_else_is_refused(model, batches, fresh, changes, message):
    artefact = fresh(threshold=0.8)
    with pytest.raises(PartialLoraError, match=f"^known: .*{message}"):
        calibrate(model, Counted(batches), known=artefact, **GRID | changes)
    other = dataclasses.replace(artefact, baseline=artefact.baseline - 0.1)
    with pytest.raises(PartialLoraError, match=r"^known: .*baseline"):
        calibrate(model, Counted(batches), known=other, **GRID)
    with pytest.raises(PartialLoraError, match=r"calibration.threshold=1.5"):
        artefact.at(1.5)


def test_older_files_are_read(fresh, tmp_path):
    path, new = tmp_path / "calibration.json", ("axes", "scope", "levels", "max_sparsity", "chance", "above_chance")
    found = fresh(threshold=0.8, settings={"levels": 0.2, "max_sparsity": 0.8})
    found.save(path)
    content = json.loads(path.read_text())
    assert content["version"] == 1
    path.write_text(json.dumps({key: value for key, value in content.items() if key not in (*new, "repaired")}))
    assert Calibration.load(path) == found


def test_a_store_that_cannot_be_written_costs_nothing_but_time(model, batches, fresh, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    found = calibrate(model, Counted(batches), threshold=0.8, store=tmp_path / "file" / "curves.json", **GRID)
    assert found.sparsity == fresh(threshold=0.8).sparsity
    assert caplog.text.count("cannot be written") == 1
