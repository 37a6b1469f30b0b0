"""What a calibration ends with on a terminal: every module, what is kept of it, and what to beware of."""

from __future__ import annotations

import copy
import io
import math

import pytest
from rich.console import Console
from test_report import record

from partial_lora.report import summary

SHAPES = {"blocks.0.qkv": [1152, 384], "blocks.1.qkv": [1152, 384]}
SPARSITY = {"blocks.0.qkv": {"rows": 0.25, "columns": 0.4}, "blocks.1.qkv": {"rows": 0.0, "columns": 0.95}}


def drawn(table, width=100):
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(table)
    return console.file.getvalue()


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
    said = " ".join(line.split("│")[-2].strip() for line in text.splitlines() if line.startswith("│"))
    assert warning.strip() in said
    assert "no reduction" in said


def test_a_record_from_before_shapes_were_kept_is_shown_without():
    result = calibration()
    del result["shapes"]
    text = drawn(summary.calibration_summary(result, "somewhere"))
    assert cells(text, "blocks.0.qkv") == ["blocks.0.qkv", "qkv", "–", "0.250", "0.400", "–"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "0.9 of the intact score"),
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
def test_what_was_asked_for_is_said_in_words(changes, said):
    result = copy.deepcopy(calibration(**changes))
    text = drawn(summary.calibration_summary(result, "somewhere"), width=200)
    assert said in text


def test_what_reliability_took_is_told_apart():
    result = calibration()
    result["seconds"] |= {"reliability": 12.5}
    assert "calibrate 60.0 · reliability 12.5" in drawn(summary.calibration_summary(result, "somewhere"))


def test_a_run_repeats_the_warnings_of_its_calibration():
    result = record()
    assert "beware" not in drawn(summary.summary(result, "runs/seed0"))
    result["calibration"]["warnings"] = ["poorly suited model"]
    assert "poorly suited model" in drawn(summary.summary(result, "runs/seed0"))


@pytest.mark.parametrize(
    ("metric", "value", "said"),
    [("accuracy", 0.838, "83.80 %"), ("mse", 8.8619, "8.8619"), ("pearson", -0.2395, "-0.2395")],
)
def test_only_shares_are_percentages(metric, value, said):
    text = drawn(summary.summary(record(metrics={"test": {"primary": metric, metric: value}}), "results/0a1b/seed0"))
    assert f"test {metric}" in text
    assert said in text
