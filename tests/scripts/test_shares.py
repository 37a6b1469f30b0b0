"""Worths of modules against taking the weights out by hand, and shares as runs have them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import shares
import torch
from finished_runs import cache, image_run
from recorded_runs import leave

from partial_lora import Calibration
from partial_lora.building import build
from partial_lora.finished.predict import RunModel
from partial_lora.report import records

MODULE = "timm_model.blocks.1.mlp.fc1"
SEARCHED = {"calibration__search": "bisect", "calibration__shrink": 0.0, "calibration__max_sparsity": 0.95}


def test_a_module_is_worth_its_change_and_the_loss_without_it_per_number(monkeypatch) -> None:
    monkeypatch.setenv("PARTIAL_LORA_CACHE", cache())
    run = image_run()
    worth = shares.measure(run).set_index("module").loc[MODULE]
    trained, task = RunModel(run, "cpu"), build.task_of(run.config)
    transform = build.transform_of(run.config.model, run.config.task)
    (batch,) = transform.batches(task.test, len(task.test))

    def loss() -> float:
        logits = torch.from_numpy(trained.logits(batch)).double()
        return -logits.log_softmax(-1)[range(len(logits)), batch["labels"]].mean().item()

    layer = trained.model.get_submodule(f"base_model.model.{MODULE}")
    with torch.no_grad():
        a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        change, before = layer.scaling["default"] * b @ a, loss()
        layer.lora_B["default"].kept.zero_()
    numbers = sum(layer.get_base_layer().weight.shape) * len(a)
    assert worth["change"] == pytest.approx(change.square().sum().item() / numbers, rel=1e-4)
    assert worth["loss"] == pytest.approx((loss() - before) / numbers, rel=1e-2)
    assert worth["gradient"] > 0


def test_shares_are_of_calibrated_runs_at_the_size_and_correlate_with_what_orders_modules_alike(tmp_path, monkeypatch):
    sparsity = {name: {"rows": kept, "columns": kept} for name, kept in zip("abcd", (0.9, 0.8, 0.6, 0.7), strict=True)}
    shapes = {name: [8, 4] for name in sparsity}
    for seed in (0, 1):
        for budget, wrong in ((0.13, 0.0), (0.5, 0.05)):
            moved = {name: {axis: share - wrong for axis, share in of.items()} for name, of in sparsity.items()}
            of_modules = {"sparsity": moved, "shapes": shapes}
            leave(tmp_path, "partial", 0.9, budget=budget, seed=seed, id=f"{budget}", **of_modules, **SEARCHED)
        other = SEARCHED | {"calibration__max_sparsity": 0.99}  # another calibration, whatever comes last
        leave(tmp_path, "partial", 0.9, budget=0.13, seed=seed, id="zz", sparsity=moved, shapes=shapes, **other)
    monkeypatch.setattr(shares, "RUNS", tmp_path)
    task = "digits"
    ((kind, found),) = shares.shares_of(task, records.read(tmp_path)[0]).items()
    assert kind == "calibrated"
    assert found.round(9).to_dict() == {seed: {"a": 0.1, "b": 0.2, "c": 0.4, "d": 0.3} for seed in (0, 1)}
    worth = {"gradient": [1, 2, 9, 3], "change": [9, 3, 1, 2], "loss": [1, 9, 2, 3]}
    rows = [{"module": name, "task": task, "seed": 0} for name in sparsity]
    table = shares.table(pd.concat([pd.DataFrame(rows).assign(**worth, seed=seed) for seed in (0, 1)]))
    assert table[""].tolist() == ["calibrated", *shares.WORTHS.values()]
    told = table.iloc[0][list(shares.WORTHS.values())].str.split(" ").str[0]
    assert told.tolist() == ["+1.00", "-1.00", f"{np.corrcoef([1, 2, 4, 3], [1, 4, 2, 3])[0, 1]:+.2f}"]


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
