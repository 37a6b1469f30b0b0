from __future__ import annotations

import math

import pytest
from scored_models import TARGETS, Counted

from partial_lora import PartialLoraError, calibrate
from partial_lora.calibration.importance import svd
from partial_lora.models.targets import target_names


def test_importance_by_name_by_function_or_given(model, batches):
    names = target_names(model, TARGETS)
    given = {name: svd(model.get_submodule(name).weight, k=4) for name in names}
    options = {"target_modules": TARGETS, "threshold": 0.8, "levels": 0.2}
    by_name = calibrate(model, Counted(batches), importance_options={"k": 4}, **options)
    assert by_name.modules == calibrate(model, Counted(batches), importance=given, **options).modules
    by_function = calibrate(model, Counted(batches), importance=svd, importance_options={"k": 4}, **options)
    assert by_name.modules == by_function.modules
    random = [
        calibrate(model, Counted(batches), importance="random", seed=seed, **options).sparsity for seed in (0, 0, 1)
    ]
    assert random[0] == random[1] != random[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"threshold": 0}, "calibration.threshold=0: "),
        ({"threshold": 1.1}, "calibration.threshold=1.1: "),
        ({"search": "grid"}, "calibration.search=grid: expected "),
        ({"levels": 0}, "calibration.levels=0: "),
        ({"max_sparsity": 1}, "calibration.max_sparsity=1: "),
        ({"importance": "snap"}, "importance=snap: expected one of"),
        ({"budget": 2.0}, "calibration.budget=2: allows 2 parameters, expected at least 192"),
        ({"budget": -1}, "calibration.budget=-1: "),
        ({"budget": 1e9}, "calibration.budget=1e.09: expected at most"),
        ({"importance_options": {"k": 99}}, "importance.k=99: .*vit.blocks.0.attn.qkv"),
    ],
)
def test_bad_arguments_are_named(model, score, arguments, message):
    with pytest.raises(PartialLoraError, match=message):
        calibrate(model, score, **{"target_modules": TARGETS} | arguments)


def test_a_baseline_that_is_no_number_is_refused(model):
    with pytest.raises(PartialLoraError, match=r"frozen model is inf"):
        calibrate(model, lambda model: math.inf, target_modules=TARGETS)


def test_a_score_that_tells_nothing_is_warned_of(model, caplog):
    found = calibrate(model, lambda model: 1.0, target_modules=TARGETS)
    assert all(sparsity == 0.95 for axes in found.sparsity.values() for sparsity in axes.values())
    assert "every level of every module passes" in caplog.text


def test_progress_tells_every_axis_of_every_module(model, score):
    told = []
    found = calibrate(
        model, score, target_modules=TARGETS, progress=lambda done, total, **detail: told.append((done, total, detail))
    )
    assert [done for done, _, _ in told] == list(range(1, 13))
    assert {total for _, total, _ in told} == {12}
    for _, _, detail in told:
        assert found.sparsity[detail["module"]][detail["axis"]] == detail["sparsity"]
