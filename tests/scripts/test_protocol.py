"""Runs of the one protocol: their forms, conditions and sizes, and the members of mixtures."""

from __future__ import annotations

from pathlib import Path

import protocol
import pytest
from protocol import at_best_rates, forms, usual
from recorded_runs import KEPT, leave, record
from refusals import refusal

from partial_lora.errors import PartialLoraError


def test_what_a_calibration_and_a_rank_have_of_their_own_is_in_a_form_s_name() -> None:
    own = {"calibration__shrink": 0.5, "calibration__search": "gradient", "calibration__max_sparsity": 0.99}
    assert protocol.form_of(record(**KEPT, **own)) == "partial, shrink 0.5, by gradient, caps at 0.99"
    assert protocol.form_of(record(**KEPT, calibration__file="mean/digits.json")) == "partial, mean of draws"
    assert protocol.form_of(record(**KEPT, calibration__repair=True)) == "partial, repaired"
    equal = {"fixed": {"budget": 0.13}}
    assert protocol.form_of(record("uniform", **KEPT, method__rank=8) | equal) == "uniform, rank 8"
    assert protocol.form_of(record("targeted", **KEPT) | equal) == "targeted, equal shares"
    assert protocol.form_of(record("dense", method__rank=8)) == "dense"


def test_runs_of_as_many_parameters_stand_at_the_budget_and_other_measures_are_named(tmp_path: Path) -> None:
    leave(tmp_path, budget=0.13, **KEPT)
    leave(tmp_path, budget=0.52, method__rank=4, **KEPT)
    leave(tmp_path, budget=0.26, **KEPT)
    leave(tmp_path, budget=0.26, method__rank=4, **KEPT)
    leave(tmp_path, budget=0.13, importance__name="snip", **KEPT)
    runs, problems = forms(tmp_path)
    assert problems == []
    assert sorted(zip(runs["method"], runs["operating_point"], runs["importance"], strict=True)) == [
        ("partial", "budget 0.13", ""),
        ("partial", "budget 0.13", "snip"),
        ("partial", "budget 0.26", ""),
        ("partial, rank 4", "budget 0.065", ""),
        ("partial, rank 4", "budget 0.13", ""),
    ]


def test_wrong_labels_and_other_rows_and_steps_are_conditions_and_no_others_of_the_usual_runs(tmp_path: Path) -> None:
    for seed in range(4):
        leave(tmp_path, seed=seed)
        if seed < 3:
            leave(tmp_path, seed=seed, task__label_noise=0.4, task__train_samples=150)
            leave(tmp_path, seed=seed, id="whole", task__train_samples=1720, trainer__max_steps=1200)
    leave(tmp_path, members={"sst2": 20, "mrpc": 50})
    runs, _ = forms(tmp_path)
    assert set(runs["condition"]) == {"", "40% wrong labels, 150 rows", "1720 rows, 1200 steps"}
    leave(tmp_path, seed=8, id="epochs", trainer__max_steps=300)
    assert set(forms(tmp_path)[0]["condition"]) == set(runs["condition"]) | {"300 steps"}
    assert list(usual(runs)["seed"]) == [0, 1, 2, 3]
    assert len(at_best_rates(runs)) == len(runs)  # each condition by itself


def test_members_of_a_mixture_are_tasks_with_predictions_of_their_own(tmp_path: Path) -> None:
    leave(tmp_path, members={"sst2": 20, "mrpc": 50})
    runs, problems = forms(tmp_path)
    assert problems == []
    rows = runs[["task", "mixture", "test"]].to_numpy().tolist()
    assert rows == [["sst2", "sst2+mrpc", 0.9], ["mrpc", "sst2+mrpc", 0.75]]
    frames = [each.predictions for each in runs["outcome"]]
    assert [(frame["label"] != frame["prediction"]).sum() for frame in frames] == [20, 50]


def test_kinds_names_broken_predictions_and_what_is_not_finished(tmp_path: Path) -> None:
    for task, kind in (("piqa", "choice"), ("sst2", "label"), ("gsm8k", "generation")):
        leave(tmp_path, task=task, task__kind=kind, task__modality="text")
    (leave(tmp_path, "dense", seed=4) / "predictions.parquet").write_bytes(b"no parquet")
    (tmp_path / "runs/digits/vit/lora-x/seed0").mkdir(parents=True)
    runs, (problem,) = forms(tmp_path)
    assert "lora-x/seed0" in str(problem)
    kinds = dict(zip(runs["task"], runs["kind"], strict=True))
    assert kinds == {"piqa": "causal", "gsm8k": "generation", "sst2": "texts", "digits": "images"}
    (broken,) = runs.loc[runs["task"] == "digits", "outcome"]
    with pytest.raises((PartialLoraError, ValueError)):
        _ = broken.predictions


def test_seeds_with_rows_of_their_own_share_no_calibration() -> None:
    shared = {"calibration__seed": 0, "seed": 5}
    assert protocol.draw_of(record(**shared)) == 0
    assert protocol.draw_of(record(**shared, task__split_seed=3)) == 0
    assert protocol.draw_of(record(**shared, task__split_seed=None)) == 5
    assert protocol.draw_of(record(seed=5)) == 5


def test_models_of_one_task_are_apart_and_other_settings_of_one_form_are_refused(tmp_path: Path) -> None:
    for model, rate in (("small", 1e-3), ("large", 2e-3)):
        leave(tmp_path, "dense", model=model, trainer__learning_rate=rate)
    best = at_best_rates(forms(tmp_path)[0])
    assert set(best["task"]) == {"digits (small)", "digits (large)"}
    leave(tmp_path, "dense", model="small", seed=1, trainer__batch_size=64)
    with refusal(r"digits \(small\), dense", "conditions"):
        at_best_rates(forms(tmp_path)[0])


def test_a_folder_without_finished_runs_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "runs/digits/vit/lora-x/seed0").mkdir(parents=True)
    with refusal(str(tmp_path)):
        forms(tmp_path)
