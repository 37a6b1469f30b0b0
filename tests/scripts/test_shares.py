"""Mean shares of several calibrations."""

from __future__ import annotations

import shares
from recorded_runs import leave

from partial_lora import Calibration

SEARCHED = {"calibration__search": "bisect", "calibration__shrink": 0.0, "calibration__max_sparsity": 0.95}


def test_mean_shares_are_those_of_all_draws_and_keep_as_many_parameters(tmp_path, monkeypatch) -> None:
    draws = [{"a": (0.95, 0.5), "b": (0.75, 0.9)}, {"a": (0.85, 0.7), "b": (0.85, 0.5)}]
    told = SEARCHED | {"shapes": {"a": [40, 20], "b": [40, 20]}}
    for seed, draw in enumerate(draws):
        sparsity = {name: dict(zip(("rows", "columns"), axes, strict=True)) for name, axes in draw.items()}
        of_draw = {"baseline": 0.5 + seed, "joint": 0.25, "threshold": 0.75, "budget": 0.13, "search": "bisect"}
        leave(tmp_path, "partial", 0.9, budget=0.13, seed=seed, sparsity=sparsity, calibration=of_draw, **told)
        other = {name: {"rows": 0.5, "columns": 0.5} for name in draw}  # by another measure of importance
        told_of_other = told | {"importance__name": "snip", "id": "z"}
        leave(tmp_path, "partial", 0.9, budget=0.13, seed=seed, sparsity=other, calibration=of_draw, **told_of_other)
    monkeypatch.setattr(shares, "RUNS", tmp_path)
    assert shares.main(["mean"]) == 0
    found = Calibration.load(tmp_path / "mean" / "digits.json")
    expected = {"a": {"rows": 0.9, "columns": 0.6}, "b": {"rows": 0.8, "columns": 0.7}}
    assert {name: {axis: round(share, 9) for axis, share in axes.items()} for name, axes in found.sparsity.items()} == (
        expected
    )
    assert (found.baseline, found.joint, found.budget) == (1.0, 0.25, 0.13)
