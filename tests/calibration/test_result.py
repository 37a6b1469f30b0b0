"""A calibration in its file, and what its numbers warn of."""

from __future__ import annotations

import json
import math
import re

import pytest
from refusals import refusal
from scored_models import TARGETS, Counted

from partial_lora import Calibration, PartialLoraError, calibrate
from partial_lora.calibration.result import usual_of, warnings_of
from partial_lora.masks import AXES


def test_a_calibration_comes_back_from_its_file(model, score, tmp_path):
    found = calibrate(model, score, target_modules=TARGETS, levels=0.2, settings={"shots": 4})
    path = tmp_path / "calibration.json"
    found.save(path)
    assert Calibration.load(path) == found
    content = json.loads(path.read_text())
    assert {"format", "settings", "baseline", "joint", "modules"} <= set(content)
    entry = content["modules"]["vit.blocks.0.attn.qkv"]["rows"]
    assert set(entry) == {"sparsity", "curve"}
    assert set(found.summary()) >= {"baseline", "joint", "threshold", "search", "evaluations", "seconds", "cached"}
    path.write_text(json.dumps(content | {"more": 1}))
    assert Calibration.load(path) == found


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: "{",
        lambda content: "[1]",
        lambda content: json.dumps(content | {"format": 99}),
        *(lambda content, gone=name: json.dumps({**content, gone: None}) for name in ("format", "modules")),
        lambda content: json.dumps(content | {"modules": {"a": {"rows": {"sparsity": 0.5}}}}),
        lambda content: json.dumps(
            content | {"modules": {"a": {"rows": {"sparsity": 1.5}, "columns": {"sparsity": 0}}}}
        ),
        lambda content: json.dumps(
            content | {"modules": {"a": {"rows": {"sparsity": "x"}, "columns": {"sparsity": 0}}}}
        ),
    ],
)
def test_a_broken_calibration_is_refused_by_name(tmp_path, spoil):
    path = tmp_path / "calibration.json"
    axes = {axis: {"sparsity": 0.5, "curve": [[0.5, 0.9]]} for axis in ("rows", "columns")}
    good = {"format": 1, "threshold": 0.9, "settings": {}, "baseline": 1.0, "joint": 0.9, "modules": {"a": axes}}
    path.write_text(json.dumps(good))
    assert Calibration.load(path).sparsity == {"a": {"rows": 0.5, "columns": 0.5}}
    path.write_text(spoil(good))
    with refusal(r".*calibration\.json"):
        Calibration.load(path)
    with pytest.raises(PartialLoraError, match=r"missing.json"):
        Calibration.load(tmp_path / "missing.json")


USUAL = {"baseline": 0.9, "threshold": 0.9, "chance": 0.1, "joint": 0.85, "levels": 0.2, "max_sparsity": 0.8}


def of_levels(*levels, curve=(), **changes):
    modules = {
        f"block.{number}": {axis: {"sparsity": level, "curve": list(curve)} for axis in AXES}
        for number, level in enumerate(levels)
    }
    return Calibration(modules=modules, **USUAL | changes)


def warned(*levels, size=160, density=0.5, **changes):
    return warnings_of(of_levels(*levels, **changes), size=size, density=density)


@pytest.mark.parametrize(
    ("levels", "changes", "expected"),
    [
        ((0.4, 0.2, 0.0), {}, []),
        ((0.4, 0.0), {"curve": [[0.2, 0.9], [0.4, [0.85, 0.9]], [0.6, None]]}, ["not a number.* block.0, block.1 "]),
        ((0.4, 0.0), {"baseline": 0.18, "joint": 0.18}, ["frozen .*0.18 .*0.1:"]),
        ((0.4, 0.0), {"baseline": 0.2, "joint": 0.2}, []),
        ((0.4, 0.0), {"baseline": -2.1, "chance": -2.3, "threshold": 0.95, "joint": -2.1}, ["frozen .*-2.1 .*-2.3:"]),
        ((0.4, 0.0), {"baseline": 0.5, "chance": 0.4, "threshold": 0.8, "joint": 0.5}, ["line, 0.4,.*0.4"]),
        ((0.4, 0.0), {"baseline": 0.5, "chance": 0.4, "threshold": 0.8, "joint": 0.5, "above_chance": True}, []),
        ((0.4, 0.0), {"baseline": 0.5, "chance": 0.4, "threshold": 0.8, "joint": 0.5, "budget": 0.5}, []),
        ((0.4, 0.0), {"baseline": 0.5, "chance": None, "threshold": 0.1, "joint": 0.5}, []),
        ((0.0, 0.0), {}, ["no reduction"]),
        ((0.8, 0.8), {}, ["every level"]),
        ((0.8, 0.2), {"joint": 0.1}, []),
        ((0.4, 0.0), {"joint": None}, ["joint score"]),
        ((0.4, 0.0), {"size": 63, "density": 0.19}, ["few examples.* 63 .* 81%"]),
        ((0.4, 0.0), {"size": 64, "density": 0.19}, []),
        ((0.4, 0.0), {"size": 63, "density": 0.2}, []),
    ],
)
def test_warnings_of_numbers(levels, changes, expected):
    warnings = warned(*levels, **changes)
    assert len(warnings) == len(expected)
    for words, pattern in zip(warnings, expected, strict=True):
        assert re.search(pattern, words)


@pytest.mark.parametrize(
    ("levels", "changes", "expected"),
    [
        ((0.4, 0.2), {}, []),
        ((0.8, 0.2), {}, ["^1 module .*0.8"]),
        ((0.8,) * 5 + (0.2,), {}, ["^5 modules .*0.8"]),
        ((0.8, 0.8), {}, []),  # of which is warned
        ((0.4, 0.0), {"joint": 0.8}, ["0.8,.* line .0.81"]),
        ((0.4, 0.0), {"joint": 0.1}, ["0.1,.* chance .0.1"]),
        ((0.4, 0.0), {"joint": 0.1, "budget": 0.5}, ["0.1,.* chance .0.1"]),
        ((0.4, 0.0), {"joint": 0.5, "budget": 0.5}, []),
        ((0.4, 0.0), {"joint": None}, []),
    ],
)
def test_what_is_the_rule_is_no_warning(levels, changes, expected):
    usual = usual_of(of_levels(*levels, **changes))
    assert len(usual) == len(expected)
    for words, pattern in zip(usual, expected, strict=True):
        assert re.search(pattern, words)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_score_that_is_no_number_counts_as_a_failure(model, batches, tmp_path, caplog, broken):
    calls = 0

    def breaks(model):
        nonlocal calls
        calls += 1
        return broken if calls == 4 else 1.0

    store = tmp_path / "curves.json"
    found = calibrate(model, breaks, target_modules=TARGETS, store=store, levels=0.2)
    first = found.modules["vit.blocks.0.attn.qkv"]["rows"]
    assert first == {"sparsity": 0.4, "curve": [[0.2, 1.0], [0.4, 1.0], [0.6, None]]}
    assert "not a number with part of vit.blocks.0.attn.qkv zeroed" in caplog.text
    found.save(tmp_path / "calibration.json")
    assert Calibration.load(tmp_path / "calibration.json") == found
    again = calibrate(model, breaks, target_modules=TARGETS, store=store, levels=0.2)
    assert again.cached
    assert (again.modules, again.warnings) == (found.modules, found.warnings)
    lower = calibrate(model, breaks, target_modules=TARGETS, store=store, levels=0.2, threshold=0.5)
    assert lower.modules == found.modules
    assert calls == 4 + sum(len(axes[axis]["curve"]) for axes in found.modules.values() for axis in axes) - 3 + 1 + 2


def test_a_joint_score_that_is_no_number_is_none(model, tmp_path):
    weights = [module.weight for name, module in model.named_modules() if name.endswith("mlp.fc2")]

    def score(model):
        return math.nan if sum(bool((weight == 0).any()) for weight in weights) > 1 else 1.0

    found = calibrate(model, score, target_modules=["mlp.fc2"], levels=0.4, store=tmp_path / "curves.json")
    assert found.joint is None
    assert "joint score, with all sparsities at once, is not a number" in found.warnings[-1]
    repaired = calibrate(model, score, target_modules=["mlp.fc2"], levels=0.4, repair=True)
    assert repaired.joint == 1.0
    assert repaired.repaired["joint_before"] is None


def test_a_real_calibration_says_its_joint_score_and_warns_of_nothing_that_is_the_rule(model, batches, caplog):
    found = calibrate(model, Counted(batches), target_modules=TARGETS, levels=0.2, chance=0.3)
    assert any("all sparsities at once" in words for words in found.usual)
    for words in found.warnings:
        assert words in caplog.text
        assert "\n" not in words
