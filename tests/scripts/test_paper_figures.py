"""The numbers of the paper's figures, from literal records; what a figure lacks; and that each is drawn."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import paper_figures as figures
import pytest
from paper_figures import FIGURES, Cell, measured, to_measure
from recorded_runs import leave, measure
from scipy.stats import t as student

from partial_lora.report import records


def numbers(name: str, place: Path) -> tuple[pd.DataFrame, list[str]]:
    return FIGURES[name].numbers(figures.runs_of(name, place)[0], place)


def only(table: pd.DataFrame, **wanted: object) -> pd.Series:
    for name, value in wanted.items():
        table = table[table[name] == value]
    assert len(table) == 1
    return table.iloc[0]


def half(values) -> float:
    """Half of Student's 95 % interval of a mean."""
    return student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values))


def thresholds(place: Path) -> None:
    """Partial at three points, two controls, the dense ends; and runs of other experiments, which are not theirs."""
    for seed, test in enumerate((0.90, 0.92, 0.97)):
        leave(place, "partial", test, seed=seed, share=0.7)
    leave(place, "partial", 0.85, threshold=0.5, share=0.2)
    leave(place, "partial", 0.80, budget=0.13)
    leave(place, "uniform", 0.83, threshold=0.5, share=0.2)
    leave(place, "lora", 0.95)
    leave(place, "probe", 0.60)
    for seed in range(4):  # more of them than of the usual ones
        leave(place, "partial", 0.1, seed=seed, task__train_samples=150)
    for setting in ("method__rank=64", "importance__name=snip", "mask__granularity=element", "mask__seed=3"):
        name, value = setting.split("=")
        leave(place, "partial", 0.2, **{name: int(value) if value.isdigit() else value})


def test_means_are_of_the_usual_runs_alone_and_of_the_seeds_that_all_have(tmp_path: Path) -> None:
    thresholds(tmp_path)
    table, _ = numbers("fig1", tmp_path)
    row = only(table, method="partial", point="threshold 0.9")
    values = [0.90, 0.92, 0.97]
    assert (row["n"], row["seeds"], row["parameters"]) == (3, "0 1 2", 700)
    expected = np.mean(values), np.std(values, ddof=1), half(values)
    assert (row["mean"], row["std"], row["half"]) == pytest.approx(expected)
    assert only(table, method="partial", point="budget 0.13")["parameters"] == 130
    place = tmp_path / "common"
    for seed in range(4):
        leave(place, "partial", 0.8 + seed / 10, seed=seed)
        leave(place, "lora", 0.5, seed=seed) if seed < 2 else None
    leave(place, "partial", 0.3, seed=7, task="cifar10")
    leave(place, "lora", 0.3, seed=8, task="cifar10")  # no seed in common: as they are
    table, _ = figures.means(figures.runs_of("fig1", place)[0], [*figures.PLACE, "method"])
    assert only(table, task="digits", method="partial")["mean"] == pytest.approx(0.85)
    assert sorted(table["seeds"]) == ["0 1", "0 1", "7", "8"]


def test_fig1_draws_two_points_only_where_no_task_has_three_and_mixtures_never(tmp_path: Path) -> None:
    for budget in (None, 0.13):
        leave(tmp_path, task="gtsrb", budget=budget)
        leave(tmp_path, members={"digits": 3, "gtsrb": 4}, budget=budget)
    assert set(numbers("fig1", tmp_path)[0]["task"]) == {"gtsrb"}
    thresholds(tmp_path)
    table, notes = numbers("fig1", tmp_path)
    assert set(table["task"]) == {"digits"}
    assert any(note.startswith("not drawn: gtsrb") for note in notes)


def test_fig2_averages_seeds_of_partial_and_keeps_depth_and_kind(tmp_path: Path) -> None:
    place = tmp_path / "cpu"
    for seed, rows in enumerate((0.2, 0.4)):
        names = [f"m.blocks.{block}.{kind}" for block in (0, 11) for kind in ("qkv", "fc")]
        sparsity = {name: {"rows": rows, "columns": int(name.split(".")[2]) / 12} for name in names}
        leave(place, seed=seed, sparsity=sparsity)
    moved = {"m.blocks.0.qkv": {"rows": 0.99, "columns": 0.99}}
    leave(place, "uniform", sparsity=moved)
    leave(place, budget=0.13, sparsity=moved)
    leave(place, "uniform", task="cifar10")
    table, notes = numbers("fig2", place)
    assert len(table) == 8
    row = only(table, kind="qkv", axis="rows", block="11")
    assert (row["depth"], row["n"], row["low"], row["high"], row["mean"]) == (1, 2, 0.2, 0.4, pytest.approx(0.3))
    assert only(table, kind="fc", axis="columns", block="11")["mean"] == pytest.approx(11 / 12)
    assert notes == []
    leave(tmp_path / "causal", task="piqa", model="smollm2_135m")  # which lies beside the preset's
    assert set(numbers("fig2", place)[0]["task"]) == {"digits", "piqa"}


def test_fig3_has_histories_gaps_and_drift_over_seeds(tmp_path: Path) -> None:
    for seed in (0, 1):
        history = [
            {"step": 1, "loss": 2.0 + seed, "grad_norm": 4.0},
            {"step": 5, "loss": 1.0 + seed, "grad_norm": None},
        ]
        folder = leave(tmp_path, "partial", 0.95, seed=seed, history=history)
        measure(folder, 0.99, 0.95 - seed / 10, {"blocks.0": 0.9, "blocks.1": 0.5 + seed / 10})
    leave(tmp_path, "lora", 0.96, history=history)
    leave(tmp_path, "partial", 0.9, task="cifar10")  # without lora beside it
    table, _ = numbers("fig3", tmp_path)
    assert set(table["task"]) == {"digits"}
    row = only(table, method="partial", quantity="loss", x=5)
    assert (row["mean"], row["low"], row["high"], row["n"]) == (1.5, 1.0, 2.0, 2)
    assert table[table["quantity"] == "grad_norm"]["x"].tolist() == [1, 1]
    gap = only(table, method="partial", quantity="gap")
    assert (gap["mean"], gap["low"], gap["high"]) == pytest.approx((0.09, 0.04, 0.14))
    drift = only(table, method="partial", quantity="cka", x=2)
    assert (drift["mean"], drift["block"]) == (pytest.approx(0.55), "blocks.1")


def test_fig3_draws_what_was_measured_before_what_was_not(tmp_path: Path) -> None:
    for task in "abcd":
        for method in ("lora", "partial"):
            folder = leave(tmp_path, method, 0.8, task=task, history=[{"step": 1, "loss": 1.0}])
            measure(folder, 0.9, 0.8) if task == "d" else None
    assert set(numbers("fig3", tmp_path)[0]["task"]) == {"d", "a", "b"}


def test_fig4_puts_runs_of_one_size_on_one_level(tmp_path: Path) -> None:
    leave(tmp_path, "low_rank", 0.90, budget=0.25)  # dense, of rank 4
    leave(tmp_path, "partial", 0.91, budget=0.25)
    leave(tmp_path, "partial", 0.92, budget=0.125, share=0.126, method__rank=32)
    leave(tmp_path, "partial", 0.93, budget=0.13)  # the only one of its size
    leave(tmp_path, "low_rank", 0.94, budget=0.13, calibration__max_sparsity=0.99)  # figure 6's
    table, notes = numbers("fig4", tmp_path)
    assert table["level"].unique().tolist() == [250]
    assert sorted(table["rank"]) == [4, 16, 32]
    assert (only(table, rank=32)["sparsity"], only(table, rank=4)["sparsity"]) == pytest.approx((1 - 0.126, 0))
    assert notes == []
    assert figures.levels([100, 330, 104, 106]) == [100, 330, 100, 106]


def agreement(place: Path, jaccard: float) -> None:
    """A finished analysis of two measures."""
    line = {"first": "svd", "second": "snip", "jaccard": jaccard, "chance": 0.4, "beyond_chance": 1 / 6}
    config = {"task": {"name": "digits"}, "model": {"name": "vit"}}
    folder = place / "analyses" / "agreement" / "digits" / "vit-0"
    folder.mkdir(parents=True)
    content = {"status": "finished", "config": config, "summary": {"calibrated": [line]}}
    (folder / "analysis.json").write_text(json.dumps(content))


def test_fig5_has_agreement_and_what_it_leads_to(tmp_path: Path) -> None:
    place = tmp_path / "cpu"
    agreement(tmp_path, 0.9)
    agreement(place, 0.5)  # the nearer one counts
    for seed in (0, 1):
        leave(place, "targeted", 0.9 + seed / 10, seed=seed, importance__name="snip")
    leave(place, "targeted", 0.1, method__rank=4)
    leave(place, "partial", 0.8)
    table, notes = numbers("fig5", place)
    assert only(table, part="agreement")["jaccard"] == 0.5
    assert only(table, part="accuracy", method="targeted", importance="snip")["mean"] == pytest.approx(0.95)
    assert notes == []


def test_fig6_takes_budgets_whatever_sparsity_they_need(tmp_path: Path) -> None:
    leave(tmp_path, "partial", 0.90, budget=0.13)
    leave(tmp_path, "partial", 0.85, budget=0.01, calibration__max_sparsity=0.995)
    leave(tmp_path, "partial", 0.95, budget=0.5)
    leave(tmp_path, "lora", 0.96)
    leave(tmp_path, "partial", 0.90, budget=0.13, task="cifar10")
    table, notes = numbers("fig6", tmp_path)
    assert set(table["task"]) == {"digits"}
    points = sorted(zip(table["method"], table["budget"].fillna(1), strict=True))
    assert points == [("lora", 1), ("partial", 0.01), ("partial", 0.13)]
    assert notes == []


def test_fig7_pairs_seeds_and_sets_masks_beside_seeds(tmp_path: Path) -> None:
    noisy = {"task__train_samples": 300, "trainer__epochs": 6, "task__label_noise": 0.2}
    tests = {"partial": (0.90, 0.91, 0.95), "targeted": (0.88, 0.92, 0.90)}
    for method, values in tests.items():
        for seed, test in enumerate(values):
            measure(leave(tmp_path, method, test, seed=seed, budget=0.13, **noisy), 1.0, test)
            leave(tmp_path, method, test + 0.01, seed=seed, budget=0.13)
            leave(tmp_path, method, 0.1 * seed, seed=seed + 3, budget=0.13)  # seeds that no noisy run has
            leave(tmp_path, method, 0.5, seed=seed)  # at another point
    leave(tmp_path, "partial", 0.99, seed=7, budget=0.13, **noisy)  # no pair
    for mask_seed, test in ((1, 0.93), (2, 0.94)):
        leave(tmp_path, "partial", test, budget=0.13, mask__seed=mask_seed)
    table, _ = numbers("fig7", tmp_path)
    each = np.subtract(*tests.values())
    row = only(table, part="difference", train_samples=300, label_noise=0.2)
    assert (row["n"], row["seeds"]) == (3, "0 1 2")
    assert (row["difference"], row["half"]) == pytest.approx((each.mean(), half(each)))
    plain = only(table, part="difference", train_samples=600, label_noise=0.0)
    assert (plain["seeds"], plain["difference"]) == ("0 1 2", pytest.approx(each.mean()))
    masks = table[table["part"] == "over masks"].sort_values("mask_seed")
    assert masks["mask_seed"].tolist() == [0, 1, 2]
    assert masks["test"].tolist() == pytest.approx([0.91, 0.93, 0.94])
    seeds = table[(table["part"] == "over seeds") & (table["method"] == "partial")]
    assert seeds["test"].tolist() == pytest.approx([0.91, 0.92, 0.96, 0.0, 0.1, 0.2])
    assert only(table, part="gap", method="targeted")["gap"] == pytest.approx(1 - 0.9)
    assert len(figures.measured_runs("fig7", tmp_path)) == 12


def test_a_figure_is_written_with_its_numbers_and_what_is_drawn_are_these(tmp_path: Path, capsys) -> None:
    thresholds(tmp_path)
    leave(tmp_path, "lora", 0.5, seed=1, trainer__epochs=9)
    svg, csv = figures.make("fig1", tmp_path)
    printed = capsys.readouterr().out.splitlines()
    assert svg.read_text(encoding="utf-8").rstrip().endswith("</svg>")
    assert csv.parent == tmp_path / "figures"
    first, *notes = [line for line in csv.read_text(encoding="utf-8").splitlines() if line.startswith("#")]
    command = ["python", "scripts/paper_figures.py", "fig1", "--results", str(tmp_path)]
    assert shlex.split(first.removeprefix("# ")) == command
    assert {note.removeprefix("# ") for note in notes} <= set(printed)
    assert any("trainer.epochs" in line for line in printed)
    assert len(pd.read_csv(csv, comment="#")) == 6
    table, _ = numbers("fig1", tmp_path)
    figure = FIGURES["fig1"].draw(table)
    heights = {float(y) for line in figure.axes[0].lines for y in np.atleast_1d(line.get_ydata())}
    assert heights >= set(table.loc[table["method"] != "probe", "mean"])
    figure.canvas.draw()
    box = figure._suptitle.get_window_extent()
    assert 0 < box.x0 < box.x1 < figure.bbox.width  # it has room


@pytest.mark.parametrize("name", FIGURES)
def test_each_figure_is_drawn_from_few_runs_and_without_any_names_what_makes_them(
    name: str, tmp_path: Path, capsys
) -> None:
    place = tmp_path / "cpu"
    stale = place / "figures" / f"{name}.svg"
    stale.parent.mkdir(parents=True)
    stale.touch()
    assert figures.make(name, place) == []
    assert capsys.readouterr().out.splitlines()[-1].endswith(f"in {place}; make reproduce-{name}")
    assert not stale.exists()
    leave(place, "partial", 0.9, task="sst2", model="minilm_l6")  # one run alone is no reason to fail
    figures.make(name, place)
    thresholds(place)
    leave(place, "targeted", 0.9, budget=0.13)
    leave(place, "partial", 0.7, budget=0.01, calibration__max_sparsity=0.995)
    leave(place, "partial", 0.8, budget=0.26, share=0.26, method__rank=8)
    leave(place, "lora", 0.9, task="trec", history=[{"step": 1, "loss": 2.0, "grad_norm": 1.0}])
    leave(place, "partial", 0.9, task="trec")
    agreement(place, 0.5)
    assert len(figures.make(name, place)) == 2


def test_a_figure_names_the_runs_whose_dynamics_it_shows(tmp_path: Path, capsys) -> None:
    for seed in range(4):
        leave(tmp_path, "lora", 0.9, seed=seed)
        leave(tmp_path, "partial", 0.9, seed=seed)
        leave(tmp_path, "partial", 0.9, seed=seed, threshold=0.5)
    assert figures.main(["fig3", "--results", str(tmp_path), "--runs"]) == 0
    chosen = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(place.name for place in chosen) == sorted(f"seed{seed}" for seed in (0, 0, 1, 1, 2, 2))


def test_seeds_are_measured_that_all_have_and_whose_weights_are_there(tmp_path: Path) -> None:
    for method, seeds in {"lora": range(5), "partial": range(1, 6)}.items():
        for seed in seeds:
            folder = leave(tmp_path, method, 0.9, seed=seed)
            measure(folder, 0.9, 0.8) if seed == 3 or (method, seed) == ("lora", 5) else None
            (folder / "adapter").mkdir() if seed == 4 else None

    def cells() -> list[Cell]:
        every: dict[tuple, dict] = {}
        for run in records.read(tmp_path)[0]:
            every.setdefault((run.row["task"], run.row["method"]), {})[run.row["seed"]] = run
        return [(task, cell) for (task, _), cell in sorted(every.items())]

    chosen = [(run.row["method"], run.row["seed"]) for run in to_measure(cells(), 3)]
    assert chosen == [(method, seed) for method in ("lora", "partial") for seed in (1, 3, 4)]
    for task in ("digits", "cifar10"):
        measure(leave(tmp_path, "lora", 0.9, task=task, seed=7), 0.9, 0.8)
    assert [sorted(cell) for cell in measured(cells())] == [[7], [3], [3]]


def test_runs_to_measure_are_of_the_figures_that_show_dynamics(tmp_path: Path) -> None:
    assert figures.main(["fig1", "--runs", "--results", str(tmp_path)]) == 2
    assert figures.main(["fig1", "--results", str(tmp_path / "mistyped")]) == 2
    assert list(tmp_path.iterdir()) == []
