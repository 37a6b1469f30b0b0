"""The end of a run and of a calibration on a terminal: numbers, every module, and what to beware of."""

from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
from recorded_runs import place, record
from rich.console import Console

from partial_lora import cli
from partial_lora.report import summary


def drawn(table: object, width: int = 100) -> str:
    console = Console(width=width, file=io.StringIO(), force_terminal=False)
    console.print(table)
    return console.file.getvalue()


def of_run(*arguments, **changes):
    return drawn(summary.summary(record(*arguments, **changes)))


def calibration(**changes):
    """The record of a calibration alone."""
    shapes = {module: [1152, 384] for module in record()["sparsity"]}
    return record(**{"metrics": {}, "parameters": {}, "shapes": shapes, **changes})


def of_calibration(width=100, **changes):
    return drawn(summary.calibration_summary(calibration(**changes)), width)


def cells(text, start):
    (line,) = (line for line in text.splitlines() if line.strip().startswith(start))
    return line.split()


def test_a_run_in_a_few_lines():
    text = of_run()
    assert [part for part in ("98.61 %", "700 of 1,000", "3,850", "threshold 0.9") if part not in text] == []
    assert [part for part in ("threshold", "calibrate –") if part in of_run("probe")] == ["calibrate –"]
    assert "poorly suited" in of_run(calibration={"warnings": ["poorly suited model"]})
    usual = {"usual": ["2 modules never fail"]}
    assert ("2 modules" in of_run(calibration=usual), "2 modules" in of_calibration(calibration=usual)) == (False, True)


def test_a_list_of_runs_has_one_line_of_each_whatever_its_record_is():
    place = Path("results/runs/digits/vit/partial-0a1b2c3d/seed0")
    (_, *line) = summary.run_line(place, record())
    assert line == ["digits", "vit", "partial, threshold 0.9", "seed0", "accuracy 98.61 %", str(place)]
    assert summary.run_line(place, record(status="failed", metrics={}))[-2] == "failed"
    assert summary.run_line(place, record(status="failed", error="interrupted", metrics={}))[-2] == "interrupted"
    for broken in (None, {"status": "finished"}, record(config=1)):
        assert summary.run_line(place, broken)[-2:] == ("no record", str(place))
    assert summary.run_line(place, record(metrics=[1]))[-1] == str(place)


def test_runs_are_listed_in_the_order_of_time(tmp_path, capsys):
    for minute, task in ((2, "alpha"), (0, "zebra"), (1, "beta")):
        place(tmp_path, record(task=task, started=f"2026-11-28T10:00:0{minute}+00:00"))
    cli.runs([str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in lines] == ["zebra", "beta", "alpha"]


def test_the_next_command_names_what_its_task_needs():
    texts = {"modality": "text", "text_columns": ["text"]}
    choice = texts | {"kind": "choice"}
    for task, inputs in (
        ({"modality": "image"}, " IMAGE …"),
        (texts, " TEXT …"),
        (texts | {"text_columns": ["one", "other"]}, r" $'TEXT\tTEXT'"),
        (choice, r" $'PROMPT\tOPTION\tOPTION'"),
        ({"members": {"opinions": texts, "topics": texts}}, " --member opinions TEXT …"),
    ):
        config = {"task": task, "method": {"name": "partial"}}
        assert summary.next_commands("latest", config)[0] == f"partial-lora predict latest{inputs}"


def test_modules_that_a_lower_rank_would_serve_are_counted():
    assert "saturated" not in of_calibration()
    few = {module: {"rows": 0.99, "columns": 0.5} for module in record()["sparsity"]}  # 12 rows and 192 columns
    text = of_calibration(sparsity=few)
    assert cells(text, "│ saturated")[3:6] == ["2", "of", "2"]
    assert "saturated" not in of_calibration(sparsity=few, method__rank="auto")  # each module has a rank of its own


def test_every_module_is_a_line_with_what_is_kept_of_it():
    text = of_calibration()
    first = 16 * (math.floor(0.75 * 1152 + 0.5) + math.floor(0.6 * 384 + 0.5))
    second = 16 * (1152 + math.floor(0.05 * 384 + 0.5))
    assert cells(text, "blocks.0.qkv") == ["blocks.0.qkv", "qkv", "1152", "×", "384", "0.250", "0.400", f"{first:,}"]
    assert cells(text, "blocks.1.qkv")[-1] == f"{second:,}"
    assert cells(text, "all")[-1] == f"{first + second:,}"
    of_entries = drawn(summary.module_table(calibration(mask__granularity="element", method__rank=3)))
    entries = math.floor(0.75 * 3 * 1152 + 0.5) + math.floor(0.6 * 3 * 384 + 0.5)
    assert cells(of_entries, "blocks.0.qkv")[-1] == f"{entries:,}"
    older = of_calibration(shapes=None)  # from before shapes were kept
    assert cells(older, "blocks.0.qkv") == ["blocks.0.qkv", "qkv", "–", "0.250", "0.400", "–"]


def test_long_names_and_warnings_fit_100_columns_and_lose_nothing():
    warning = "risk of collapse: raise the threshold, since " + "so much depends on so little, " * 6
    names = [f"deberta.encoder.layer.11.attention.self.query_pro{index}" for index in range(2)]
    text = of_calibration(
        calibration={"warnings": [warning, "no reduction"]},
        sparsity={name: {"rows": 0.25, "columns": 0.4} for name in names},
        shapes={name: [14336, 14336] for name in names},
    )
    assert all(len(line) <= 100 for line in text.splitlines())
    assert "14336 × 14336" in text
    words = " ".join(line.split("│")[-2].strip() for line in text.splitlines() if line.startswith("│"))
    assert warning.strip() in words
    assert "no reduction" in words


@pytest.mark.parametrize(
    ("changes", "numbers"),
    [
        ({}, ("0.9", "0.125", "0.675", "0.8000", "0.1000", "1,234", "0.75", "0.60")),
        ({"threshold": 0.41237, "budget": 0.13, "cached": True}, ("0.4124", "0.13", "reused")),
        ({"repaired": {"joint_before": 0.2345, "steps": 7, "threshold": 0.9}}, ("0.2345", "7")),
        (
            {"threshold": None, "joint": None, "reliability": {"spearman_brown": None, "said": "all are 0"}},
            ("all are 0",),
        ),
    ],
)
def test_a_calibration_is_told_by_its_numbers(changes, numbers):
    text = of_calibration(width=200, calibration=changes)
    assert [number for number in numbers if number not in text] == []


def test_a_calibration_ends_with_the_learning_rate_of_its_density():
    rows = math.floor(0.75 * 1152 + 0.5) + math.floor(0.6 * 384 + 0.5) + 1152 + math.floor(0.05 * 384 + 0.5)
    density = rows / (2 * (1152 + 384))
    assert f"{2e-3 / math.sqrt(density):.2g}, at density {density:.3g}" in of_calibration()
    aware = of_calibration(mask__fan_in="kept", mask__row_exponent=1.0)
    assert f"0.002, at density {density:.3g}" in aware
    assert "to try" not in of_calibration(method__name="lora") + of_calibration(shapes=None)
