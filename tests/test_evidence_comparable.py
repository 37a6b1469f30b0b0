"""Which runs a table sets beside each other, and which it leaves out."""

from __future__ import annotations

from pathlib import Path

import pytest
from table_records import leave

from partial_lora.evidence import tables
from partial_lora.evidence.comparable import comparable
from partial_lora.evidence.recorded import COLUMNS, Evidence, collect


def kept(place: Path) -> tuple[list[tuple], list[str]]:
    runs, _ = collect(place)
    found, notes = comparable(runs)
    return sorted(zip(found["method"], found["operating_point"], found["seed"], strict=True)), notes


@pytest.mark.parametrize(
    "settings",
    [
        {"method": {"rank": 4}},
        {"mask": {"seed": 3}},
        {"task": {"label_noise": 0.2}},
        {"calibration": {"repair": True}},
        {"calibration": {"max_sparsity": 0.99}},
        {"calibration": {"scope": "cumulative"}},
        {"task": {"train_samples": 150}},
    ],
)
def test_what_a_figure_varies_is_no_run_of_a_table(tmp_path: Path, settings: dict) -> None:
    for budget in (None, 0.13):
        leave(tmp_path, seed=0, budget=budget)
    leave(tmp_path, "lora", seed=0)
    leave(tmp_path, seed=1, settings=settings)
    leave(tmp_path, "lora", seed=1, settings=settings if "task" in settings or "method" in settings else None)
    found, notes = kept(tmp_path)
    both = "task" in settings or "method" in settings
    lora = [] if both else [("lora", "–", 1)]
    assert found == [("lora", "–", 0), *lora, ("partial", "budget 0.13", 0), ("partial", "threshold 0.9", 0)]
    ((group, own),) = settings.items()
    (note,) = notes
    assert note.startswith(f"digits, vit: {'2 runs' if both else '1 run'} left out, ")
    assert note.endswith(f"({group}.{next(iter(own))})")


def test_seeds_that_calibrated_on_examples_of_their_own_are_one_row(tmp_path: Path) -> None:
    for seed in range(3):
        leave(tmp_path, seed=seed, settings={"calibration": {"seed": seed}})
    assert len({path.parent for path in tmp_path.glob("runs/*/*/*/seed*")}) == 3
    assert kept(tmp_path) == ([("partial", "threshold 0.9", seed) for seed in range(3)], [])


def test_tuned_runs_stand_for_a_method_and_the_rest_is_said(tmp_path: Path) -> None:
    leave(tmp_path, seed=0)
    for seed in range(3):
        leave(tmp_path, seed=seed, tuning="untuned", settings={"trainer": {"learning_rate": 0.1}})
    found, notes = kept(tmp_path)
    assert found == [("partial", "threshold 0.9", 0)]
    assert notes == [
        "digits, vit, partial, svd, threshold 0.9: 3 runs left out, with other settings of its own "
        "(trainer.learning_rate)"
    ]


def test_of_tuned_runs_those_that_were_run_last_stand_for_a_method(tmp_path: Path) -> None:
    for seed in range(3):
        leave(tmp_path, seed=seed, settings={"trainer": {"learning_rate": 0.1}})
    leave(tmp_path, seed=1, started="2026-01-02T00:00:00+00:00")
    assert kept(tmp_path)[0] == [("partial", "threshold 0.9", 1)]


def test_methods_are_of_the_same_conditions(tmp_path: Path) -> None:
    leave(tmp_path, seed=0)
    leave(tmp_path, seed=1)
    leave(tmp_path, "lora", seed=0, settings={"trainer": {"epochs": 50}})
    found, notes = kept(tmp_path)
    assert found == [("partial", "threshold 0.9", 0), ("partial", "threshold 0.9", 1)]
    assert notes == ["digits, vit: 1 run left out, under other conditions than those shown (trainer.epochs)"]


def test_one_run_on_all_rows_does_not_displace_a_table_of_them(tmp_path: Path) -> None:
    for seed in range(2):
        for method in ("lora", "partial"):
            leave(tmp_path, method, seed=seed)
    leave(tmp_path, seed=5, settings={"task": {"train_samples": None}})
    found, notes = kept(tmp_path)
    assert found == [*[("lora", "–", seed) for seed in range(2)], *[("partial", "threshold 0.9", s) for s in range(2)]]
    assert notes == ["digits, vit: 1 run left out, under other conditions than those shown (task.train_samples)"]


def test_of_as_many_methods_and_runs_the_most_rows_count(tmp_path: Path) -> None:
    for seed, rows in enumerate((300, 600, 150)):
        leave(tmp_path, seed=seed, settings={"task": {"train_samples": rows}})
    assert kept(tmp_path)[0] == [("partial", "threshold 0.9", 1)]


def test_a_table_without_runs_says_that_there_are_some_of_other_settings(tmp_path: Path) -> None:
    leave(tmp_path, "lora", settings={"method": {"rank": 8}})
    found = tables.gather(tmp_path)
    for name in ("table1", "table5", "table7"):
        notes = tables.TABLES[name](found).notes
        assert "digits, vit: 1 run left out, of other settings than a table's (method.rank)" in notes, name


def test_members_of_a_mixture_are_tasks_with_predictions_of_their_own(tmp_path: Path) -> None:
    leave(tmp_path, members={"sst2": 20, "mrpc": 50})
    runs, problems = collect(tmp_path)
    assert problems == []
    assert runs[["task", "mixture", "test"]].to_numpy().tolist() == [
        ["sst2", "sst2+mrpc", 0.9],
        ["mrpc", "sst2+mrpc", 0.75],
    ]
    wrong = [(frame["label"] != frame["prediction"]).sum() for frame in (each.predictions for each in runs["outcome"])]
    assert wrong == [20, 50]


def test_kinds_names_and_what_is_not_finished(tmp_path: Path) -> None:
    leave(tmp_path, settings={"task": {"kind": "choice", "modality": "text", "name": "piqa"}})
    leave(tmp_path, settings={"task": {"modality": "text", "name": "sst2"}, "mask": {"granularity": "element"}})
    leave(tmp_path, settings={"task": {"kind": "generation", "modality": "text", "name": "gsm8k"}})
    leave(tmp_path, "lora", seed=4)
    (tmp_path / "runs/digits/vit/lora-x/seed0").mkdir(parents=True)
    runs, problems = collect(tmp_path)
    named = {row.task: (row.kind, row.method, row.importance) for row in runs.itertuples()}
    assert named == {
        "piqa": ("causal", "partial", "svd"),
        "gsm8k": ("generation", "partial", "svd"),
        "sst2": ("texts", "partial (element)", "svd"),
        "digits": ("images", "lora", "–"),
    }
    assert len(problems) == 1
    assert "lora-x/seed0" in problems[0]


def test_of_nothing_there_is_an_empty_frame_and_files_are_found_in_both_places(tmp_path: Path) -> None:
    runs, problems = collect(tmp_path / "none")
    assert (list(runs.columns), len(runs), problems) == (list(COLUMNS), 0, [])
    assert comparable(runs)[0].empty
    evidence = Evidence(tmp_path / "cpu", runs, runs)
    assert evidence.file("bench", "adapter.json") is None
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "adapter.json").write_text("{}")
    assert evidence.file("bench", "adapter.json") == tmp_path / "bench" / "adapter.json"
    (tmp_path / "cpu" / "bench").mkdir(parents=True)
    (tmp_path / "cpu" / "bench" / "adapter.json").write_text("{}")
    assert evidence.file("bench", "adapter.json") == tmp_path / "cpu" / "bench" / "adapter.json"
