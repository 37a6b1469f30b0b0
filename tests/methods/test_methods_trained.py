"""Runs of methods that train in ways of their own: what they end with, what they cost, that it can be used again."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path

import numpy as np
import pandas
import pytest
import torch
from commands import here
from finished_runs import SHORT, cache, image_run, override, photographs, picture_files, trained
from peft import PeftModel
from safetensors.torch import load_file

from partial_lora import methods
from partial_lora.building import build
from partial_lora.finished import export
from partial_lora.finished.predict import Predictor
from partial_lora.launching import directory
from partial_lora.report import records

# One of each way to be saved and loaded: a magnitude, shared projections, ranks of its own, an A that no file holds,
# a whole model, indices, and masks by importance.
OWN = ("dora", "vera", "adalora", "paca", "full", "random_weights", "ticket")


def settings_of(method: str) -> tuple[str, ...]:
    """On the pictures, with the calibration of Partial-LoRA's, if any."""
    known = f"calibration.file={image_run().directory / directory.CALIBRATION}"
    known = "calibration.budget=0.3" if methods.called(method).size == "budget" else known
    rate = "trainer.learning_rate=0.003" if method == "full" else "trainer.learning_rate=0.01"
    given = ("model=tiny_vit", "task=cifar10", f"method={method}", known, rate, "method.rank=16")
    small = ("method.peft={r: 16}",) if method == "vera" else ()
    return (*given, *small, override(picture_files()))


@functools.cache
def run_of(method: str):
    return trained(f"of-{method}", *settings_of(method))


@pytest.mark.parametrize("method", OWN)
def test_a_run_is_loaded_again_as_it_was_evaluated(method: str, tmp_path: Path) -> None:
    run = run_of(method)
    predictions = pandas.read_parquet(run.directory / directory.PREDICTIONS)
    again = Predictor(run, device="cpu").predict(photographs(tmp_path), batch_size=8)
    assert [each.label for each in again] == predictions["prediction_name"].tolist()
    np.testing.assert_allclose([each.score for each in again], predictions["score"], atol=1e-4)


@pytest.mark.parametrize("method", OWN)
def test_it_merges_into_the_weights_and_loads_by_plain_peft(method: str) -> None:
    run = run_of(method)
    batch = {"pixel_values": torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
    own = export.adapted_model(run)
    with torch.no_grad():
        expected = own(**batch).logits
        plain = PeftModel.from_pretrained(export.base_model(run), str(run.adapter)).eval()
        merged = copy.deepcopy(own).merge_and_unload(safe_merge=True).eval()
        frozen = export.base_model(run)(**batch).logits
        torch.testing.assert_close(plain(**batch).logits, expected)
        torch.testing.assert_close(merged(**batch).logits, expected, rtol=1e-3, atol=1e-3)
    assert (frozen - expected).abs().max() > 0.05


@pytest.mark.parametrize("method", [*OWN, "partial"])
def test_every_run_records_its_cost(method: str) -> None:
    run = image_run() if method == "partial" else run_of(method)
    cost, parameters = run.result["cost"], run.result["parameters"]
    assert cost.keys() == {"adapter_bytes", "optimizer_bytes", "step_seconds", "saved_activation_bytes"}
    assert cost["adapter_bytes"] == (run.adapter / "adapter_model.safetensors").stat().st_size
    moments = 4 if method == "adalora" else 2  # the allocator's own averages, too, of all but the head
    expected = 4 * (moments * parameters["adapter_trainable"] + 2 * parameters["head"])
    assert expected <= cost["optimizer_bytes"] <= expected + 4 * 200  # and a step count for each tensor
    assert cost["step_seconds"] > 0
    assert cost["saved_activation_bytes"] > 32 * 17 * 32 * 4  # one layer's inputs: pictures, tokens, width, bytes


def test_a_ticket_is_found_on_the_fit_draw_and_says_how_long_that_took() -> None:
    run = run_of("ticket")
    assert run.result["fixed"] == {"budget": 0.3}
    assert run.result["calibration"] is None
    assert run.result["seconds"]["importance"] > 0
    parameters, shares = run.result["parameters"], run.result["sparsity"]
    assert 0.3 * parameters["adapter_dense"] - 16 < parameters["adapter_trainable"] <= 0.3 * parameters["adapter_dense"]
    assert len({share for axes in shares.values() for share in axes.values()}) > 10  # each module has shares of its own
    sidecar = json.loads((run.adapter / "partial_lora.json").read_text())
    assert sidecar["selection"] == "top"


def test_fixed_shares_train_without_a_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    given = (
        "model=tiny_vit",
        "task=cifar10",
        "calibration=fixed",
        "calibration.sparsity=0.5",
        override(picture_files()),
    )
    run = trained("fixed-targeted", *given, "method=targeted", "importance=adapter", "importance.steps=2")
    assert run.result["seconds"]["importance"] > 0
    monkeypatch.setattr(build, "draws_of", None)  # for random masks nobody is to draw examples
    other = trained("fixed-partial", *given)
    assert "importance" not in other.result["seconds"]
    for each in (run, other):
        assert (each.result["calibration"], each.result["fixed"]) == (None, {"sparsity": 0.5})
        assert each.result["seconds"]["calibrate"] == 0
        assert not (each.directory / directory.CALIBRATION).exists()
        assert {share for axes in each.result["sparsity"].values() for share in axes.values()} == {0.5}
        assert records.run_of(each.result, each.directory).row["operating_point"] == "sparsity 0.5"


def test_adalora_ends_with_the_ranks_it_was_to_leave() -> None:
    run = run_of("adalora")
    parameters, saved = run.result["parameters"], load_file(run.adapter / "adapter_model.safetensors")
    left = sum(int((value != 0).sum()) for name, value in saved.items() if name.endswith("lora_E"))
    assert parameters["ranks"] == left
    assert parameters["target_ranks"] == 12 * 16
    assert left <= parameters["target_ranks"]
    assert parameters["adapter_final"] < parameters["adapter_trainable"]
    ranks = [int((value != 0).sum()) for name, value in saved.items() if name.endswith("lora_E")]
    assert len(set(ranks)) > 1  # they were given to the modules unevenly
    row = records.run_of(run.result, run.directory).row
    assert row["adapter_parameters"] == parameters["adapter_final"]  # tables have what is left


def test_two_processes_share_the_penalty_of_adalora_and_choose_the_ranks_of_one(tmp_path: Path) -> None:
    settings = (*SHORT, *settings_of("adalora"), "trainer.num_processes=2", f"results_dir={tmp_path}")
    done = here(tmp_path, "train", *settings, PARTIAL_LORA_CACHE=cache())
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("runs/*/*/*/*/result.json")
    one, two = run_of("adalora").result, json.loads(path.read_text())
    losses, shared = ([entry["loss"] for entry in of["history"] if "loss" in entry] for of in (one, two))
    assert shared == pytest.approx(losses, abs=1e-4)
    for split in ("train", "validation", "test"):
        assert two["metrics"][split]["loss"] == pytest.approx(one["metrics"][split]["loss"], abs=1e-4)
    assert two["parameters"] == one["parameters"]


def test_full_trains_every_weight_and_its_file_is_the_model() -> None:
    run = run_of("full")
    parameters = run.result["parameters"]
    assert parameters["base"] == 0
    saved = load_file(run.adapter / "adapter_model.safetensors")
    assert sum(value.numel() for value in saved.values()) >= parameters["adapter_trainable"] + parameters["head"]
    frozen = dict(export.base_model(run).named_parameters())
    moved = [
        name for name, value in saved.items() if not torch.equal(value, frozen[name.removeprefix("base_model.model.")])
    ]
    assert len(moved) == len(saved)
