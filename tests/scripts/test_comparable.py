"""Runs that stand beside each other in tables and figures, and runs that are left out."""

from __future__ import annotations

from pathlib import Path

import pytest
from comparable import COLUMNS, Evidence, collect, comparable, usual
from recorded_runs import leave

from partial_lora.errors import PartialLoraError


def kept(place: Path) -> tuple[list[tuple], list[str]]:
    """The runs that are compared, and notes on the others."""
    runs, notes = comparable(collect(place)[0])
    return sorted(zip(runs["method"], runs["operating_point"], runs["seed"], strict=True)), notes


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("method__rank", 4),
        ("mask__seed", 3),
        ("task__label_noise", 0.2),
        ("calibration__repair", True),
        ("calibration__scope", "cumulative"),
        ("task__train_samples", 150),
        ("trainer__epochs", 50),
        ("trainer__head_learning_rate", 0.01),
    ],
)
def test_a_run_of_other_settings_or_conditions_is_left_out_and_its_setting_named(tmp_path, setting, value) -> None:
    for method, budget in (("lora", None), ("partial", None), ("partial", 0.13)):
        leave(tmp_path, method, budget=budget)
    leave(tmp_path, seed=1, **{setting: value})
    runs, (note,) = kept(tmp_path)
    assert runs == [("lora", "–", 0), ("partial", "budget 0.13", 0), ("partial", "threshold 0.9", 0)]
    assert note.startswith("digits, vit: 1 run left out")
    assert f"({setting.replace('__', '.')})" in note
    known, notes = usual(collect(tmp_path)[0], varied=(setting.replace("__", "."),))
    assert (len(known), notes) == (4, [])  # of a figure that varies it


def test_settings_that_a_method_does_not_read_make_no_other_run_of_it(tmp_path: Path) -> None:
    for seed, settings in enumerate(({}, {"calibration__seed": 1}, {"calibration__max_sparsity": 0.99})):
        leave(tmp_path, "lora", seed=seed, **settings)
    for seed in range(2):  # nor does the draw of a calibration
        leave(tmp_path, seed=seed, calibration__seed=seed)
    lora = [("lora", "–", seed) for seed in range(3)]
    assert kept(tmp_path) == ([*lora, *(("partial", "threshold 0.9", seed) for seed in range(2))], [])


def test_of_several_rates_the_tuned_count_and_of_these_those_run_last(tmp_path: Path) -> None:
    for seed in range(3):
        leave(tmp_path, seed=seed, tuning="untuned", trainer__learning_rate=0.5)
        leave(tmp_path, seed=seed, trainer__learning_rate=0.1) if seed < 2 else None
    assert kept(tmp_path)[0] == [("partial", "threshold 0.9", seed) for seed in range(2)]
    leave(tmp_path, seed=1, started="2026-01-02T00:00:00+00:00")
    runs, (note,) = kept(tmp_path)
    assert runs == [("partial", "threshold 0.9", 1)]
    assert "5 runs left out" in note
    assert "trainer.learning_rate" in note


def test_conditions_of_most_methods_count_before_those_of_most_runs_and_these_before_most_rows(tmp_path: Path) -> None:
    for method in ("lora", "partial"):
        leave(tmp_path, method)
    for seed in range(3):
        leave(tmp_path, seed=seed, task__train_samples=None)
    assert [method for method, *_ in kept(tmp_path)[0]] == ["lora", "partial"]
    for seed, rows in enumerate((300, 600, 150)):
        leave(tmp_path / "rows", seed=seed, task__train_samples=rows)
    assert kept(tmp_path / "rows")[0] == [("partial", "threshold 0.9", 1)]


def test_members_of_a_mixture_are_tasks_with_predictions_of_their_own(tmp_path: Path) -> None:
    leave(tmp_path, members={"sst2": 20, "mrpc": 50})
    runs, problems = collect(tmp_path)
    assert problems == []
    rows = runs[["task", "mixture", "test"]].to_numpy().tolist()
    assert rows == [["sst2", "sst2+mrpc", 0.9], ["mrpc", "sst2+mrpc", 0.75]]
    frames = [each.predictions for each in runs["outcome"]]
    assert [(frame["label"] != frame["prediction"]).sum() for frame in frames] == [20, 50]


def test_kinds_names_broken_predictions_and_what_is_not_finished(tmp_path: Path) -> None:
    for task, settings in {
        "piqa": {"task__kind": "choice"},
        "sst2": {"mask__granularity": "element"},
        "gsm8k": {"task__kind": "generation"},
    }.items():
        leave(tmp_path, task=task, task__modality="text", **settings)
    (leave(tmp_path, "lora", seed=4) / "predictions.parquet").write_bytes(b"no parquet")
    (tmp_path / "runs/digits/vit/lora-x/seed0").mkdir(parents=True)
    runs, (problem,) = collect(tmp_path)
    assert "lora-x/seed0" in problem
    assert {row.task: (row.kind, row.method, row.importance) for row in runs.itertuples()} == {
        "piqa": ("causal", "partial", "svd"),
        "gsm8k": ("generation", "partial", "svd"),
        "sst2": ("texts", "partial (element)", "svd"),
        "digits": ("images", "lora", "–"),
    }
    (broken,) = runs.loc[runs["task"] == "digits", "outcome"]
    with pytest.raises((PartialLoraError, ValueError)):
        _ = broken.predictions


def test_of_nothing_there_is_an_empty_frame_and_the_nearer_of_two_files_counts(tmp_path: Path) -> None:
    place = tmp_path / "cpu"
    runs, problems = collect(place)
    assert (list(runs.columns), len(runs), problems, len(comparable(runs)[0])) == (list(COLUMNS), 0, [], 0)
    evidence = Evidence(place, runs, runs)
    assert evidence.files("bench/adapter.json") == []
    for folder in (tmp_path, place):
        file = folder / "bench" / "adapter.json"
        file.parent.mkdir(parents=True)
        file.touch()
        assert evidence.files("bench/adapter.json") == [file]
