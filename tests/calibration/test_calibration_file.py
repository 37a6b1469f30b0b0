from __future__ import annotations

import json

import pytest
from scored_models import TARGETS, Named, full_accuracy, scored_draw, tiny_vit

from partial_lora import Calibration, PartialLoraError, calibrate


def test_a_calibration_comes_back_from_its_file(tmp_path):
    model = Named(tiny_vit())
    batches = scored_draw(model)

    def score(model):
        return full_accuracy(model, batches)

    found = calibrate(model, score, target_modules=TARGETS, settings={"shots": 4})
    path = tmp_path / "calibration.json"
    found.save(path)
    assert Calibration.load(path) == found
    content = json.loads(path.read_text())
    assert {"version", "settings", "baseline", "joint", "modules"} <= set(content)
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
        lambda content: json.dumps(content | {"version": 99}),
        lambda content: json.dumps({key: value for key, value in content.items() if key != "modules"}),
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
    good = {"version": 1, "settings": {}, "baseline": 1.0, "joint": 0.9, "modules": {"a": axes}}
    path.write_text(json.dumps(good))
    assert Calibration.load(path).sparsity == {"a": {"rows": 0.5, "columns": 0.5}}
    path.write_text(spoil(good))
    with pytest.raises(PartialLoraError, match=r"calibration.json: expected a calibration.json") as error:
        Calibration.load(path)
    assert "\n" not in str(error.value)
    with pytest.raises(PartialLoraError, match=r"missing.json"):
        Calibration.load(tmp_path / "missing.json")
