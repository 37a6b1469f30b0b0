"""The numbers of the evidence's figures, from literal records; and that a figure says what it lacks."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from evidence_records import dynamics, leave
from matplotlib.image import imread
from scipy.stats import t as student

from partial_lora import runs
from partial_lora.errors import PartialLoraError
from partial_lora.evidence import figures
from partial_lora.evidence.figures import fig1, fig2, fig3, fig4, fig5, fig6, fig7, frames


def numbers(figure, place: Path) -> pd.DataFrame:
    return figure.numbers(runs.read(place)[0], place)


def only(table: pd.DataFrame, **wanted: object) -> pd.Series:
    for name, value in wanted.items():
        table = table[table[name] == value]
    assert len(table) == 1
    return table.iloc[0]


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
        leave(place, "partial", 0.1, seed=seed, threshold=0.9, task__train_samples=150)
    leave(place, "partial", 0.2, threshold=0.9, method__rank=64)
    leave(place, "partial", 0.3, threshold=0.9, importance__name="snip")
    leave(place, "partial", 0.4, threshold=0.9, mask__granularity="element")
    leave(place, "partial", 0.4, threshold=0.9, mask__seed=3)
    leave(place, "partial", 0.4, threshold=0.9, task__label_noise=0.2)
    leave(place, "partial", 0.5, task="cifar10")


def test_fig1_has_means_of_the_usual_runs_alone(tmp_path) -> None:
    thresholds(tmp_path)
    table = numbers(fig1, tmp_path)
    row = only(table, method="partial", point="threshold 0.9")
    values = [0.90, 0.92, 0.97]
    assert (row["n"], row["seeds"], row["parameters"]) == (3, "0 1 2", 700_000)
    assert row["mean"] == pytest.approx(np.mean(values))
    assert row["std"] == pytest.approx(np.std(values, ddof=1))
    assert row["half"] == pytest.approx(student.ppf(0.975, 2) * np.std(values, ddof=1) / math.sqrt(3))
    assert only(table, method="partial", point="budget 0.13")["parameters"] == 130_000
    assert set(table["task"]) == {"digits"}  # of cifar10 there is one point
    assert "missing: digits, partial, threshold 0.7, 0.8" in table.attrs["notes"]


def test_fig1_draws_two_points_only_where_no_task_has_three_and_mixtures_never(tmp_path) -> None:
    for budget, task in ((None, "gtsrb"), (0.13, "gtsrb"), (None, "mixture"), (0.13, "mixture")):
        members = {"task__members": {"digits": {"metrics": ["accuracy"]}}} if task == "mixture" else {}
        leave(tmp_path, "partial", 0.5, task=task, budget=budget, **members)
    assert set(numbers(fig1, tmp_path)["task"]) == {"gtsrb"}
    thresholds(tmp_path)
    table = numbers(fig1, tmp_path)
    assert set(table["task"]) == {"digits"}
    assert "not drawn: gtsrb, which have two points" in table.attrs["notes"]


def test_what_is_said_above_a_figure_has_room(tmp_path) -> None:
    thresholds(tmp_path)
    figure = fig1.draw(numbers(fig1, tmp_path))
    figure.canvas.draw()
    box = figure._suptitle.get_window_extent()
    assert box.x0 > 0
    assert box.x1 < figure.bbox.width


def test_of_runs_with_other_settings_the_most_stay_and_the_rest_are_named(tmp_path) -> None:
    thresholds(tmp_path)
    leave(tmp_path, "partial", 0.5, seed=0, trainer__learning_rate=9.0)
    leave(tmp_path, "lora", 0.5, seed=1, calibration__seed=1)  # another seed of the calibration is no other setting
    leave(tmp_path, "lora", 0.5, seed=2, calibration__max_sparsity=0.99)  # nor is what calibration it goes without
    table = numbers(fig1, tmp_path)
    assert only(table, method="partial", point="threshold 0.9")["mean"] == pytest.approx(0.93)
    assert only(table, method="lora")["n"] == 3
    (note,) = [note for note in table.attrs["notes"] if "left out" in note]
    assert note == (
        "digits, vit_s14, partial, threshold 0.9: left out 1 of 4 runs, of other settings (trainer.learning_rate)"
    )


def test_tuned_rates_go_before_many_runs(tmp_path) -> None:
    for seed in range(3):
        leave(tmp_path, "lora", 0.5, seed=seed, trainer__learning_rate=9.0, tuning="untuned")
    leave(tmp_path, "lora", 0.9)
    table, _ = frames.means(frames.frame(runs.read(tmp_path)[0]), [*frames.PLACE, "method"])
    assert table["mean"].tolist() == [0.9]


def test_of_tuned_rates_those_go_first_that_were_run_last(tmp_path) -> None:
    """A search that was made again has outdated the runs of the rate that it found before, however many these are."""
    for seed in range(3):
        leave(tmp_path, "lora", 0.5, seed=seed, trainer__learning_rate=9.0)
    leave(tmp_path, "lora", 0.9, started="2026-01-02T00:00:00+00:00")
    table, _ = frames.means(frames.frame(runs.read(tmp_path)[0]), [*frames.PLACE, "method"])
    assert table["mean"].tolist() == [0.9]


def test_means_of_a_task_are_over_the_seeds_that_all_have(tmp_path) -> None:
    for seed in range(4):
        leave(tmp_path, "partial", 0.8 + seed / 10, seed=seed)
        leave(tmp_path, "lora", 0.5, seed=seed) if seed < 2 else None
    leave(tmp_path, "partial", 0.3, seed=7, task="cifar10")
    leave(tmp_path, "lora", 0.3, seed=8, task="cifar10")  # no seed in common: as they are
    table, _ = frames.means(frames.frame(runs.read(tmp_path)[0]), [*frames.PLACE, "method"])
    assert only(table, task="digits", method="partial")["mean"] == pytest.approx(0.85)
    assert sorted(table["seeds"]) == ["0 1", "0 1", "7", "8"]


def test_runs_of_other_conditions_are_left_out_and_said(tmp_path) -> None:
    thresholds(tmp_path)
    leave(tmp_path, "lora", 0.5, seed=1, trainer__epochs=9.0)
    assert only(numbers(fig1, tmp_path), method="lora")["mean"] == 0.95
    said = []
    figures.make("fig1", tmp_path, say=said.append)
    assert "fig1: digits, vit_s14: left out 1 of 18 runs, of other conditions (trainer.epochs)" in said


def test_usual_is_what_most_have_where_none_has_the_default(tmp_path) -> None:
    for seed in range(2):
        leave(tmp_path, "lora", 0.9, seed=seed, method__rank=8)
    leave(tmp_path, "lora", 0.1, method__rank=4)
    known = frames.usual(frames.frame(runs.read(tmp_path)[0]))
    assert known["rank"].tolist() == [8, 8]


def test_usual_rows_are_those_of_most_methods_and_points(tmp_path) -> None:
    leave(tmp_path, "lora", 0.9)
    leave(tmp_path, "partial", 0.9)
    for seed in range(3):
        leave(tmp_path, "partial", 0.1, seed=seed, task__train_samples=None)
    known = frames.usual(frames.frame(runs.read(tmp_path)[0]))
    assert sorted(known["method"]) == ["lora", "partial"]
    assert known["train_samples"].tolist() == [600, 600]
    leave(tmp_path, "lora", 0.1, task__train_samples=None)  # as many methods, and more runs
    known = frames.usual(frames.frame(runs.read(tmp_path)[0]))
    assert known["train_samples"].tolist() == [math.inf] * 4


def test_fig2_averages_seeds_of_partial_and_keeps_depth_and_kind(tmp_path) -> None:
    for seed, rows in enumerate((0.2, 0.4)):
        sparsity = {f"m.blocks.{block}.{kind}": {"rows": rows, "columns": block / 10} for block in (0, 11)
                    for kind in ("qkv", "fc")}  # fmt: skip
        leave(tmp_path, "partial", 0.9, seed=seed, sparsity=sparsity)
    leave(tmp_path, "uniform", 0.9, sparsity={"m.blocks.0.qkv": {"rows": 0.99, "columns": 0.99}})
    leave(tmp_path, "partial", 0.9, budget=0.13, sparsity={"m.blocks.0.qkv": {"rows": 0.98, "columns": 0.98}})
    table = numbers(fig2, tmp_path)
    assert len(table) == 8
    row = only(table, kind="qkv", axis="rows", block="11")
    assert (row["depth"], row["n"], row["low"], row["high"]) == (1, 2, 0.2, 0.4)
    assert row["mean"] == pytest.approx(0.3)
    assert only(table, kind="fc", axis="columns", block="11")["mean"] == pytest.approx(1.1)
    assert table.attrs["notes"] == ["missing: tasks other than digits"]


def test_fig2_goes_without_a_task_of_controls_alone(tmp_path) -> None:
    leave(tmp_path, "uniform", 0.9, task="cifar10")
    missing = "missing: cifar10, vit_s14, runs of partial, targeted or flow"
    table = numbers(fig2, tmp_path)
    assert (len(table), table.attrs["notes"]) == (0, [missing])
    leave(tmp_path, "targeted", 0.9)
    table = numbers(fig2, tmp_path)
    assert (set(table["task"]), table.attrs["notes"]) == ({"digits"}, [missing, "missing: tasks other than digits"])


def test_fig2_takes_causal_runs_from_beside_the_cpu_preset(tmp_path) -> None:
    leave(tmp_path / "cpu", "partial", 0.9)
    leave(tmp_path / "causal", "partial", 0.9, task="piqa", model="smollm2_135m")
    assert set(numbers(fig2, tmp_path / "cpu")["task"]) == {"digits", "piqa"}


def test_fig3_has_histories_gaps_and_drift_over_seeds(tmp_path) -> None:
    for seed in (0, 1):
        history = [
            {"step": 1, "loss": 2.0 + seed, "grad_norm": 4.0},
            {"step": 5, "loss": 1.0 + seed, "grad_norm": None},
        ]
        measured = dynamics(0.99, 0.95 - seed / 10, {"blocks.0": 0.9, "blocks.1": 0.5 + seed / 10})
        leave(tmp_path, "partial", 0.95, seed=seed, history=history, measured=measured)
    leave(tmp_path, "lora", 0.96, history=history)
    leave(tmp_path, "partial", 0.9, task="cifar10")  # without lora beside it
    table = numbers(fig3, tmp_path)
    assert set(table["task"]) == {"digits"}
    row = only(table, method="partial", quantity="loss", x=5)
    assert (row["mean"], row["low"], row["high"], row["n"]) == (1.5, 1.0, 2.0, 2)
    assert table[table["quantity"] == "grad_norm"]["x"].tolist() == [1, 1]
    gap = only(table, method="partial", quantity="gap")
    assert (gap["mean"], gap["low"], gap["high"]) == pytest.approx((0.09, 0.04, 0.14))
    drift = only(table, method="partial", quantity="cka", x=2)
    assert (drift["mean"], drift["block"]) == (pytest.approx(0.55), "blocks.1")
    (note,) = table.attrs["notes"]
    assert note.startswith("missing: dynamics.json of digits lora; scripts/dynamics.py")
    measured = fig3.measured_runs(runs.read(tmp_path)[0])
    assert sorted((run.row["method"], run.row["seed"]) for run in measured) == [
        ("lora", 0),
        ("partial", 0),
    ]  # lora has no other seed


def test_fig3_draws_what_was_measured_before_what_was_not(tmp_path) -> None:
    for number, task in enumerate(("a", "b", "c", "d")):
        for method in ("lora", "partial"):
            measured = dynamics(0.9, 0.8) if task == "d" else None
            leave(
                tmp_path, method, 0.8 + number / 100, task=task, history=[{"step": 1, "loss": 1.0}], measured=measured
            )
    assert set(numbers(fig3, tmp_path)["task"]) == {"d", "a", "b"}


def test_fig4_puts_runs_of_one_size_on_one_level(tmp_path) -> None:
    leave(tmp_path, "low_rank", 0.90, budget=0.25)  # dense, of rank 4
    leave(tmp_path, "partial", 0.91, budget=0.25)
    leave(tmp_path, "partial", 0.92, budget=0.125, share=0.126, method__rank=32)
    leave(tmp_path, "partial", 0.93, budget=0.13)  # the only one of its size
    leave(tmp_path, "low_rank", 0.94, budget=0.13, calibration__max_sparsity=0.99)  # figure 6's
    table = numbers(fig4, tmp_path)
    assert table["level"].unique().tolist() == [250_000]
    assert sorted(table["rank"]) == [4, 16, 32]
    assert only(table, rank=32)["sparsity"] == pytest.approx(1 - 0.126)
    assert only(table, rank=4)["sparsity"] == 0
    assert table.attrs["notes"] == ["missing: digits, vit_s14, rank 2, 8, 64"]
    assert fig4.levels([100, 330, 104, 106]) == [100, 330, 100, 106]


def agreement(place: Path, jaccard: float) -> None:
    """A finished analysis of two measures."""
    line = {"first": "svd", "second": "snip", "jaccard": jaccard, "chance": 0.4, "beyond_chance": 1 / 6}
    config = {"task": {"name": "digits"}, "model": {"name": "vit_s14"}}
    folder = place / "analyses" / "agreement" / "digits" / "vit_s14-0"
    folder.mkdir(parents=True)
    content = {"status": "finished", "config": config, "summary": {"calibrated": [line]}}
    (folder / "analysis.json").write_text(json.dumps(content))


def test_fig5_reads_agreement_and_what_it_leads_to(tmp_path) -> None:
    agreement(tmp_path, 0.9)
    agreement(tmp_path / "cpu", 0.5)  # the nearer one counts
    place = tmp_path / "cpu"
    for seed in (0, 1):
        leave(place, "targeted", 0.9 + seed / 10, seed=seed, importance__name="snip")
    leave(place, "targeted", 0.1, importance__name="svd", method__rank=4)
    leave(place, "partial", 0.8)
    table = numbers(fig5, place)
    assert only(table, part="agreement")["jaccard"] == 0.5
    assert only(table, part="accuracy", method="targeted", importance="snip")["mean"] == pytest.approx(0.95)
    assert table.attrs["notes"] == ["missing: runs of targeted with importance svd, imp"]


def test_fig6_takes_budgets_whatever_sparsity_they_need(tmp_path) -> None:
    leave(tmp_path, "partial", 0.90, budget=0.13)
    leave(tmp_path, "partial", 0.85, budget=0.01, calibration__max_sparsity=0.995)
    leave(tmp_path, "partial", 0.95, budget=0.5)
    leave(tmp_path, "lora", 0.96)
    leave(tmp_path, "partial", 0.90, budget=0.13, task="cifar10")
    table = numbers(fig6, tmp_path)
    assert sorted(zip(table["method"], table["budget"].fillna(1), strict=True)) == [
        ("lora", 1), ("partial", 0.01), ("partial", 0.13),
    ]  # fmt: skip
    assert set(table["task"]) == {"digits"}
    assert table.attrs["notes"] == [
        "missing: digits, vit_s14, partial, budget 0.1, 0.05, 0.02",
        "missing: digits, vit_s14, probe",
    ]


FEW = {"task__train_samples": 300, "trainer__epochs": 6.0}  # as many steps as 600 rows three times


def test_fig7_pairs_seeds_and_sets_masks_beside_seeds(tmp_path) -> None:
    tests = {"partial": (0.90, 0.91, 0.95), "targeted": (0.88, 0.92, 0.90)}
    for method, values in tests.items():
        for seed, test in enumerate(values):
            noisy = FEW | {"task__label_noise": 0.2}
            leave(tmp_path, method, test, seed=seed, budget=0.13, measured=dynamics(1.0, test), **noisy)
            leave(tmp_path, method, test + 0.01, seed=seed, budget=0.13)
            leave(tmp_path, method, 0.1 * seed, seed=seed + 3, budget=0.13)  # seeds that no noisy run has
            leave(tmp_path, method, 0.5, seed=seed)  # at another point
    leave(tmp_path, "partial", 0.99, seed=7, budget=0.13, **noisy)  # no pair
    for mask_seed, test in ((1, 0.93), (2, 0.94)):
        leave(tmp_path, "partial", test, budget=0.13, mask__seed=mask_seed)
    table = numbers(fig7, tmp_path)
    row = only(table, part="difference", train_samples=300, label_noise=0.2)
    each = np.subtract(*tests.values())
    assert (row["n"], row["seeds"]) == (3, "0 1 2")
    assert row["difference"] == pytest.approx(each.mean())
    assert row["half"] == pytest.approx(student.ppf(0.975, 2) * each.std(ddof=1) / math.sqrt(3))
    masks = table[table["part"] == "over masks"]
    assert sorted(zip(masks["mask_seed"], masks["test"], strict=True)) == [
        (0, pytest.approx(0.91)),
        (1, 0.93),
        (2, 0.94),
    ]
    over = table[(table["part"] == "over seeds") & (table["method"] == "partial")]
    assert over["test"].tolist() == pytest.approx([0.91, 0.92, 0.96, 0.0, 0.1, 0.2])
    plain = only(table, part="difference", train_samples=600, label_noise=0.0)
    assert (plain["seeds"], plain["difference"]) == ("0 1 2", pytest.approx(each.mean()))
    assert only(table, part="gap", method="targeted")["gap"] == pytest.approx(1 - 0.9)
    assert len(fig7.measured_runs(runs.read(tmp_path)[0])) == 12
    (note,) = table.attrs["notes"]
    assert note.startswith("missing: digits, vit_s14, pairs of 150 rows with 0% noise, 150 rows with 40% noise")
    assert "600 rows with 0% noise" not in note


def test_a_figure_is_written_with_its_numbers_and_says_what_it_lacks(tmp_path) -> None:
    thresholds(tmp_path)
    said = []
    png, svg, csv = figures.make("fig1", tmp_path, say=said.append)
    assert min(imread(png).shape[:2]) > 200
    assert svg.read_text().rstrip().endswith("</svg>")
    assert [csv.name, csv.parent] == ["fig1.csv", tmp_path / "figures"]
    first, *notes = [line for line in csv.read_text().splitlines() if line.startswith("#")]
    assert first == f"# python scripts/reproduce.py fig1 --results {tmp_path}"
    assert notes == [f"# {note}" for note in said]
    assert "fig1: missing: digits, partial, threshold 0.7, 0.8" in said
    read = pd.read_csv(csv, comment="#")
    assert len(read) == 6


@pytest.mark.parametrize("name", figures.NAMES)
def test_without_runs_a_figure_says_how_to_get_them(name, tmp_path) -> None:
    place = tmp_path / "cpu"
    stale = place / "figures" / f"{name}.png"
    stale.parent.mkdir(parents=True)
    stale.touch()
    said = []
    assert figures.make(name, place, say=said.append) == []
    assert said[-1].startswith(f"{name}: no ")
    assert said[-1].endswith(f"in {place}; make reproduce-{name}")
    assert not stale.exists()
    leave(place, "partial", 0.9, task="sst2", model="minilm_l6")  # one run alone is no reason to fail
    figures.make(name, place, say=said.append)


def test_every_figure_is_drawn_from_few_runs(tmp_path) -> None:
    thresholds(tmp_path)
    leave(tmp_path, "targeted", 0.9, budget=0.13)
    leave(tmp_path, "partial", 0.7, budget=0.01, calibration__max_sparsity=0.995)
    leave(tmp_path, "partial", 0.8, budget=0.26, share=0.26, method__rank=8)
    leave(tmp_path, "lora", 0.9, task="trec", history=[{"step": 1, "loss": 2.0, "grad_norm": 1.0}])
    leave(tmp_path, "partial", 0.9, task="trec")
    agreement(tmp_path, 0.5)
    for name in figures.NAMES[1:]:
        assert len(figures.make(name, tmp_path, say=lambda note: None)) == 3, name


def test_an_unknown_figure_is_refused(tmp_path) -> None:
    with pytest.raises(PartialLoraError, match=r"fig8: expected one of fig1, fig2"):
        figures.make("fig8", tmp_path)
