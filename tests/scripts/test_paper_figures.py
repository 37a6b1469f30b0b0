"""The numbers of the paper's figures, from literal records; which runs they are of; and that each is drawn."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import paper_figures as figures
import pytest
from paper_figures import FIGURES
from recorded_runs import KEPT, leave, measure
from scipy.stats import t as student

EQUAL = "targeted, equal shares"
NOISY, FEW = {"task__label_noise": 0.4}, {"task__train_samples": 150}


def run(place: Path, method: str, test: float, *, budget: float | None = 0.13, **changes: object) -> Path:
    """Leave a run of the protocol: masks drawn for what is kept, one share everywhere of what has no calibration."""
    name = method.partition(",")[0]
    if name == "dense":
        return leave(place, name, test, **changes)
    if method in ("uniform", EQUAL):
        changes = {"calibration": None, "fixed": {"budget": budget} if budget else {"threshold": 0.9}} | changes
    return leave(place, name, test, budget=budget, **({} if name == "lora" else KEPT), **changes)


def numbers(name: str, place: Path) -> pd.DataFrame:
    return FIGURES[name].numbers(figures.runs_of(place)[0], place)


def only(table: pd.DataFrame, **wanted: object) -> pd.Series:
    for name, value in wanted.items():
        table = table[table[name] == value]
    assert len(table) == 1
    return table.iloc[0]


def half(values) -> float:
    """Half of Student's 95 % interval of a mean."""
    return student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))


def test_fig1_has_means_at_best_rates_of_usual_runs_with_both_points(tmp_path: Path) -> None:
    values = (0.90, 0.92, 0.97)
    for seed, test in enumerate(values):
        run(tmp_path, "partial", test, seed=seed)
        run(tmp_path, "partial", 0.5, seed=seed, trainer__learning_rate=0.1)
        for other in (NOISY, FEW, {"importance__name": "snip"}, {"calibration__shrink": 0.5}):
            run(tmp_path, "partial", 0.99, seed=seed, **other) if seed < 2 else None
    run(tmp_path, "partial", 0.91, budget=None, share=0.2)
    run(tmp_path, "uniform", 0.93)
    run(tmp_path, "dense", 0.95)
    run(tmp_path, "dense", 0.95, task="trec")  # without partial beside it
    leave(tmp_path, members={"digits": 3, "gtsrb": 4}, budget=0.13, **KEPT)
    table = numbers("fig1", tmp_path)
    assert set(table["task"]) == {"digits"}
    assert sorted(table["method"]) == ["dense", "partial", "partial", "uniform"]
    row = only(table, method="partial", operating_point="budget 0.13")
    assert (row["n"], row["seeds"], row["parameters"]) == (3, "0 1 2", 130)
    expected = np.mean(values), np.std(values, ddof=1), half(values)
    assert (row["mean"], row["std"], row["half"]) == pytest.approx(expected)
    assert only(table, operating_point="threshold 0.9")["parameters"] == 200
    heights = {float(y) for line in FIGURES["fig1"].draw(table).axes[0].lines for y in np.atleast_1d(line.get_ydata())}
    assert heights >= set(table["mean"])


def test_fig2_averages_seeds_of_partial_and_keeps_depth_and_kind(tmp_path: Path) -> None:
    for seed, rows in enumerate((0.2, 0.4)):
        names = [f"m.blocks.{block}.{kind}" for block in (0, 11) for kind in ("qkv", "fc")]
        sparsity = {name: {"rows": rows, "columns": int(name.split(".")[2]) / 12} for name in names}
        run(tmp_path, "partial", 0.9, seed=seed, sparsity=sparsity)
    moved = {"m.blocks.0.qkv": {"rows": 0.99, "columns": 0.99}}
    run(tmp_path, "uniform", 0.9, sparsity=moved)
    run(tmp_path, "partial", 0.9, budget=None, sparsity=moved)
    table = numbers("fig2", tmp_path)
    assert len(table) == 8
    row = only(table, kind="qkv", axis="rows", depth=1)
    assert (row["n"], row["low"], row["high"], row["mean"]) == (2, 0.2, 0.4, pytest.approx(0.3))
    assert only(table, kind="fc", axis="columns", depth=1)["mean"] == pytest.approx(11 / 12)


def test_fig3_has_histories_of_all_seeds_and_gap_and_drift_of_those_that_all_have(tmp_path: Path) -> None:
    for seed in range(2):
        entries = [{"step": 1, "loss": 2.0 + seed, "grad_norm": 4.0}, {"step": 5, "loss": 1.0 + seed}]
        for method in ("dense", "uniform", "partial"):
            folder = run(tmp_path, method, 0.95, seed=seed, history=entries)
            if (method, seed) != ("uniform", 1) and method != "partial":
                measure(folder, 0.99, 0.95 - seed / 10, {"blocks.0": 0.9, "blocks.1": 0.5 + seed / 10})
    run(tmp_path, "partial", 0.95, budget=None, history=entries)
    table = numbers("fig3", tmp_path)
    row = only(table, method="partial", quantity="loss", x=5)
    assert (row["mean"], row["low"], row["high"], row["n"]) == (1.5, 1.0, 2.0, 2)
    assert table[table["quantity"] == "grad_norm"]["x"].tolist() == [1, 1, 1]
    gap = only(table, method="dense", quantity="gap")
    assert (gap["n"], gap["mean"]) == (1, pytest.approx(0.04))
    drift = only(table, method="dense", quantity="cka", x=2)
    assert (drift["mean"], drift["at"]) == (0.5, "blocks.1")
    assert "gap" not in set(table.loc[table["method"] == "partial", "quantity"])


def test_fig3_draws_three_tasks_with_both_and_first_what_was_measured(tmp_path: Path) -> None:
    for task in "abcde":
        for method in ("dense", "uniform", "partial"):
            if (task, method) not in {("a", "uniform"), ("b", "partial")}:
                folder = run(tmp_path, method, 0.8, task=task, history=[{"step": 1, "loss": 1.0}])
                measure(folder, 0.9, 0.8) if task == "e" else None
    assert set(numbers("fig3", tmp_path)["task"]) == {"e", "c", "d"}


def test_fig4_has_ranks_of_as_many_parameters_and_low_rank_as_the_dense_end(tmp_path: Path) -> None:
    for method in ("partial", "uniform"):
        run(tmp_path, method, 0.91)
        run(tmp_path, method, 0.92, budget=0.26, method__rank=8)
        run(tmp_path, method, 0.99, budget=0.52, method__rank=8)  # twice as many
        run(tmp_path, method, 0.91, task="trec")  # of one rank
    run(tmp_path, "lora", 0.90)
    run(tmp_path, "lora", 0.90, task="trec")
    table = numbers("fig4", tmp_path)
    assert set(table["task"]) == {"digits"}
    assert sorted(zip(table["method"], table["rank"], table["mean"], strict=True)) == [
        ("lora", 2, 0.90),
        *((method, *of_rank) for method in ("partial", "uniform") for of_rank in ((8, 0.92), (16, 0.91))),
    ]
    assert table["parameters"].tolist() == [130] * 5
    sparsity = [only(table, rank=2)["sparsity"], only(table, rank=8, method="partial")["sparsity"]]
    assert sparsity == pytest.approx([0, 0.74])


def agreement(place: Path, jaccard: float) -> None:
    """A finished analysis of two measures."""
    line = {"first": "svd", "second": "snip", "jaccard": jaccard, "chance": 0.4, "beyond_chance": 1 / 6}
    config = {"task": {"name": "digits"}, "model": {"name": "vit"}}
    folder = place / "analyses" / "agreement" / "digits" / "vit"
    folder.mkdir(parents=True)
    content = {"config": config, "summary": {"calibrated": [line]}}
    (folder / "analysis.json").write_text(json.dumps(content))


def test_fig5_has_agreement_and_what_measures_lead_to_on_any_task_with_two(tmp_path: Path) -> None:
    place = tmp_path / "decided"
    agreement(tmp_path, 0.9)
    agreement(place, 0.5)  # the nearer one counts
    snip = {"importance__name": "snip", "calibration__seed": 0}
    for seed in range(2):
        run(place, "partial", 0.8, seed=seed, task="trec")
        run(place, "targeted", 0.9 + seed / 10, seed=seed, task="trec", **snip)
        run(place, "partial", 0.8, seed=seed)  # of one measure
    run(place, "partial", 0.1, task="trec", budget=None, **snip)
    table = numbers("fig5", place)
    assert only(table, part="agreement")["jaccard"] == 0.5
    accuracy = table[table["part"] == "accuracy"]
    rows = sorted(zip(accuracy["task"], accuracy["method"], accuracy["importance"], strict=True))
    assert rows == [("trec", "partial", "svd"), ("trec", "targeted", "snip")]
    row = only(table, part="accuracy", method="targeted", importance="snip")
    assert (row["mean"], row["n"], row["calibrations"]) == (pytest.approx(0.95), 2, 1)
    assert only(table, part="accuracy", method="partial", importance="svd")["calibrations"] == 2


def test_fig6_is_of_the_study_beside_and_of_tasks_with_small_budgets(tmp_path: Path) -> None:
    place, forms = tmp_path / "decided", tmp_path / "race"
    run(place, "partial", 0.1, budget=0.01)
    assert numbers("fig6", place).empty
    run(forms, "partial", 0.90)
    run(forms, "partial", 0.85, budget=0.01)
    run(forms, "partial", 0.30, budget=0.01, trainer__learning_rate=0.1)
    run(forms, "partial", 0.99, budget=0.01, mask__columns="whole")  # another form
    run(forms, "lora", 0.88)
    for seed in range(2):
        run(forms, "dense", 0.96, seed=seed)
    run(forms, "lora", 0.99, budget=None, model__target_modules=["fc"])
    run(forms, "partial", 0.90, task="trec")
    table = numbers("fig6", place)
    assert set(table["task"]) == {"digits"}
    assert sorted(zip(table["method"], table["budget"], table["mean"], strict=True)) == [
        ("dense", 1, 0.96),
        ("lora", 0.13, 0.88),
        ("partial", 0.01, 0.85),
        ("partial", 0.13, 0.90),
    ]


def conditions(place: Path) -> dict[str, np.ndarray]:
    """Three forms with right and with wrong labels; gives the scores of each, conditions by seeds."""
    scores = {
        "uniform": np.array([[0.90, 0.91, 0.95], [0.80, 0.84, 0.82]]),
        EQUAL: np.array([[0.88, 0.92, 0.90], [0.70, 0.71, 0.75]]),
        "dense": np.array([[0.91, 0.90, 0.92], [0.78, 0.80, 0.83]]),
    }
    for method, tests in scores.items():
        for changes, of_condition in zip(({}, NOISY), tests, strict=True):
            for seed, test in enumerate(of_condition):
                measure(run(place, method, test, seed=seed, trainer__learning_rate=2e-3, **changes), 1.0, test)
    return scores


def test_fig7_pairs_seeds_by_condition_and_from_the_usual_one(tmp_path: Path) -> None:
    scores = conditions(tmp_path)
    for seed in range(8):  # better, at a rate that no other condition has
        run(tmp_path, "dense", 0.99, seed=seed, trainer__learning_rate=1e-3)
        run(tmp_path, "dense", 0.99, seed=seed, task="gtsrb")  # under one condition
        run(tmp_path, "uniform", 0.99, seed=seed, task="gtsrb")
        for method in ("dense", "uniform"):
            run(tmp_path, method, 0.99, seed=seed, task="trec", **NOISY)  # under one, too
        run(tmp_path, "uniform", 0.99, seed=seed, budget=None, trainer__learning_rate=2e-3)
        run(tmp_path, EQUAL, 0.99, seed=seed, trainer__learning_rate=2e-3, importance__name="snip")
    run(tmp_path, "uniform", 0.99, seed=7, trainer__learning_rate=2e-3, **NOISY)  # no pair
    table = numbers("fig7", tmp_path)
    assert set(table["task"]) == {"digits"}
    for other in (EQUAL, "dense"):
        right, noisy = scores["uniform"] - scores[other]
        for part, condition, each in (
            ("difference", "", right),
            ("difference", "40% wrong labels", noisy),
            ("change", "40% wrong labels", noisy - right),
        ):
            row = only(table, part=part, condition=condition, form="uniform", less=other)
            assert (row["n"], row["seeds"]) == (3, "0 1 2")
            assert (row["mean"], row["half"]) == pytest.approx((each.mean(), half(each)))
    gap = only(table, part="gap", condition="40% wrong labels", form="dense")
    assert gap["mean"] == pytest.approx(1 - scores["dense"][1].mean())


def test_of_runs_made_twice_the_one_with_weights_counts(tmp_path: Path, capsys) -> None:
    for id, seeds in {"a": range(5), "b": range(1, 5)}.items():
        for seed in seeds:
            folder = run(tmp_path, "dense", 0.9, seed=seed, id=id)
            (folder / "adapter").mkdir() if id == "b" else None
    for seed in range(1, 5):
        run(tmp_path, "uniform", 0.9, seed=seed)
        run(tmp_path, "uniform", 0.9, seed=seed, budget=None)
    assert figures.main(["fig3", "--results", str(tmp_path), "--runs"]) == 0
    chosen = [Path(line) for line in capsys.readouterr().out.splitlines()]
    names = [(place.parent.name.partition("-")[0], place.name) for place in chosen]
    assert sorted(names) == [(method, f"seed{seed}") for method in ("dense", "uniform") for seed in (1, 2, 3)]
    assert {place.parent.name for place in chosen if "dense" in place.parent.name} == {"dense-b"}


def test_fig7_has_what_runs_there_are_and_names_the_seeds_that_every_form_has_by_condition(
    tmp_path: Path, capsys
) -> None:
    conditions(tmp_path)
    for method in ("uniform", "dense"):
        for seed in range(1, 3):
            run(tmp_path, method, 0.7, seed=seed, trainer__learning_rate=2e-3, **NOISY, **FEW)
    assert only(numbers("fig7", tmp_path), part="difference", condition="40% wrong labels, 150 rows")["less"] == "dense"
    assert figures.main(["fig7", "--results", str(tmp_path), "--runs"]) == 0
    chosen = [Path(line).name for line in capsys.readouterr().out.splitlines()]
    assert {name: chosen.count(name) for name in chosen} == {"seed0": 6, "seed1": 8, "seed2": 8}


@pytest.mark.parametrize("name", FIGURES)
def test_each_figure_is_drawn_with_its_numbers_and_goes_when_there_is_nothing(name: str, tmp_path: Path) -> None:
    place = tmp_path / "decided"
    run(place, "lora", 0.9)
    folder = place / "figures"
    folder.mkdir()
    (folder / f"{name}.svg").touch()
    assert figures.main([name, "--results", str(place)]) == 0
    assert list(folder.iterdir()) == []
    entries = [{"step": 1, "loss": 2.0, "grad_norm": 1.0}]
    for method in ("partial", "uniform", "dense"):
        run(place, method, 0.9, history=entries)
    run(place, "partial", 0.8, budget=0.26, method__rank=8)
    run(place, "partial", 0.8, importance__name="snip")
    for method in ("partial", "dense"):
        run(tmp_path / "race", method, 0.7, budget=0.01)
    for changes in ({}, NOISY):
        run(place, "dense", 0.9, task="trec", **changes)
        run(place, "uniform", 0.9, task="trec", **changes)
    agreement(place, 0.5)
    assert figures.main([name, "--results", str(place)]) == 0
    assert {file.name for file in folder.iterdir()} == {f"{name}.svg", f"{name}.csv"}
    assert (folder / f"{name}.svg").read_text(encoding="utf-8").rstrip().endswith("</svg>")
    first, *_ = (folder / f"{name}.csv").read_text(encoding="utf-8").splitlines()
    command = ["python", "scripts/paper_figures.py", name, "--results", str(place)]
    assert shlex.split(first.removeprefix("# ")) == command
    assert len(pd.read_csv(folder / f"{name}.csv", comment="#")) == len(numbers(name, place))


def test_what_has_no_dynamics_and_no_runs_is_refused(tmp_path: Path, capsys) -> None:
    for arguments in (["fig1", "--runs"], ["fig1"], ["fig1", "--results", str(tmp_path / "mistyped")]):
        assert figures.main([*arguments, *(["--results", str(tmp_path)] if "--results" not in arguments else [])]) == 2
    assert str(tmp_path / "mistyped") in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
