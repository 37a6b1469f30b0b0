"""What a run and a calibration end with on a terminal: numbers, every module, and what to beware of."""

from __future__ import annotations

import math

import pytest
from recorded_runs import drawn, record

from partial_lora.report import summary

SHAPES = {"blocks.0.qkv": [1152, 384], "blocks.1.qkv": [1152, 384]}
SPARSITY = {"blocks.0.qkv": {"rows": 0.25, "columns": 0.4}, "blocks.1.qkv": {"rows": 0.0, "columns": 0.95}}


def test_a_run_in_a_few_lines():
    text = drawn(summary.summary(record(), "results/runs/digits/vit_s14/partial-0a1b2c3d/seed0"))
    for part in (
        *("98.61 %", "700 of 1,000", "3,850", "0.300", "fp32", "threshold 0.9"),
        "calibrate 60.0 · train 100.0 · evaluate 2.5",
        "results/runs/digits/vit_s14/partial-0a1b2c3d/seed0",
    ):
        assert part in text
    text = drawn(summary.summary(record("probe"), "runs/seed0"))
    assert "calibrate –" in text
    assert "threshold" not in text
    result = record()
    result["config"]["mask"] = {"granularity": "element"}
    assert "partial (element) · vit_s14" in drawn(summary.summary(result, "runs/seed0"))


def test_a_long_path_is_folded_into_100_columns():
    path = "/".join(["a-long-folder-name"] * 12) + "/seed0"
    text = drawn(summary.summary(record(), path))
    assert all(len(line) <= 100 for line in text.splitlines())
    assert path in "".join(line.strip("│┃ ").split("│")[-1].strip() for line in text.splitlines())


def calibration(**changes):
    result = record(metrics={}, parameters={}, sparsity=SPARSITY, shapes=SHAPES)
    result["calibration"] |= changes
    return result


def cells(text, start):
    (line,) = (line for line in text.splitlines() if line.strip().startswith(start))
    return line.split()


def test_every_module_is_a_line_with_what_is_kept_of_it():
    text = drawn(summary.calibration_summary(calibration(), "results/calibrations/0a1b"))
    kept = [
        16 * (math.floor((1 - s["rows"]) * 1152 + 0.5) + math.floor((1 - s["columns"]) * 384 + 0.5))
        for s in SPARSITY.values()
    ]
    assert cells(text, "blocks.0.qkv") == ["blocks.0.qkv", "qkv", "1152", "×", "384", "0.250", "0.400", f"{kept[0]:,}"]
    assert cells(text, "blocks.1.qkv")[-1] == f"{kept[1]:,}"
    assert cells(text, "all")[-1] == f"{sum(kept):,}"


def test_single_entries_are_counted_one_by_one():
    result = calibration()
    result["config"]["mask"] = {"granularity": "element"}
    result["config"]["method"]["rank"] = 3
    text = drawn(summary.module_table(result))
    entries = math.floor(0.75 * 3 * 1152 + 0.5) + math.floor(0.6 * 3 * 384 + 0.5)
    assert cells(text, "blocks.0.qkv")[-1] == f"{entries:,}"


@pytest.mark.parametrize(
    "name", ["model.layers.10.self_attn.q_proj", "deberta.encoder.layer.11.attention.self.query_proj"]
)
def test_long_names_and_long_warnings_fit_100_columns_and_lose_nothing(name):
    warning = "risk of collapse: raise the threshold, since " + "so much depends on so little, " * 6
    result = calibration(warnings=[warning, "no reduction"])
    result["sparsity"] = {f"{name[:-1]}{index}": axes for index, axes in enumerate(SPARSITY.values())}
    result["shapes"] = {module: [14336, 14336] for module in result["sparsity"]}
    text = drawn(summary.calibration_summary(result, "results/calibrations/0a1b"))
    assert all(len(line) <= 100 for line in text.splitlines())
    assert "14336 × 14336" in text
    words = " ".join(line.split("│")[-2].strip() for line in text.splitlines() if line.startswith("│"))
    assert warning.strip() in words
    assert "no reduction" in words


def test_a_record_from_before_shapes_were_kept_is_shown_without():
    result = calibration()
    del result["shapes"]
    text = drawn(summary.calibration_summary(result, "somewhere"))
    assert cells(text, "blocks.0.qkv") == ["blocks.0.qkv", "qkv", "–", "0.250", "0.400", "–"]


@pytest.mark.parametrize(
    ("changes", "shown"),
    [
        ({}, "0.9 of the intact score"),
        ({}, "rows 0.125 · columns 0.675 over 2 modules"),
        ({}, "0.8688 intact · 0.4000 with all"),
        ({}, "1,234 (scan)"),
        ({"cached": True}, "60.0 (reused)"),
        ({"chance": 0.1}, "0.9 of the intact score"),
        ({"chance": 0.1, "above_chance": True}, "0.9 of what the score is above chance (0.1000)"),
        ({"threshold": 0.41237, "budget": 0.13}, "0.4124 of the intact score, what a budget of 0.13 comes to"),
        ({"threshold": None}, "–"),
        ({"joint": None}, "– with all sparsities at once"),
        ({"repaired": {"joint_before": 0.1, "steps": 7, "threshold": 0.9}}, "0.1000 before 7 steps of repair"),
        (
            {"reliability": {"pearson": 0.5, "spearman": 0.4, "spearman_brown": 2 / 3, "n": 96, "said": ""}},
            "0.67 (split-half, Spearman-Brown; 0.50 between the halves)",
        ),
        ({"reliability": {"spearman_brown": None, "pearson": None, "said": "all are 0"}}, "– (all are 0)"),
    ],
)
def test_numbers_of_a_calibration_say_what_they_are_of(changes, shown):
    text = drawn(summary.calibration_summary(calibration(**changes), "somewhere"), width=200)
    assert shown in text


def test_seconds_of_reliability_stand_apart():
    result = calibration()
    result["seconds"] |= {"reliability": 12.5}
    assert "calibrate 60.0 · reliability 12.5" in drawn(summary.calibration_summary(result, "somewhere"))


def test_a_run_repeats_the_warnings_of_its_calibration():
    result = record()
    assert "beware" not in drawn(summary.summary(result, "runs/seed0"))
    result["calibration"]["warnings"] = ["poorly suited model"]
    assert "poorly suited model" in drawn(summary.summary(result, "runs/seed0"))


@pytest.mark.parametrize(
    ("metric", "value", "shown"),
    [("accuracy", 0.838, "83.80 %"), ("mse", 8.8619, "8.8619"), ("pearson", -0.2395, "-0.2395")],
)
def test_only_shares_are_percentages(metric, value, shown):
    text = drawn(summary.summary(record(metrics={"test": {"primary": metric, metric: value}}), "results/0a1b/seed0"))
    assert f"test {metric}" in text
    assert shown in text
