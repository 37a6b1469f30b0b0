"""Tables of finished runs: what enters, what is left out, how it is averaged and written."""

from __future__ import annotations

import copy
import io
import json
import statistics
import subprocess
import sys

import pandas as pd
import pytest
from rich.console import Console

from partial_lora.errors import PartialLoraError
from partial_lora.report import records, summary, tables


def record(method="partial", *, seed=0, accuracy=0.9861, task="digits", model="vit_s14", **changes):
    """A result.json as a run leaves it."""
    calibrated = method in ("partial", "targeted", "uniform")
    dense = 0 if method == "probe" else 1_000
    trainable = 700 if calibrated else dense
    return {
        "status": "finished",
        "seed": seed,
        "config": {
            "model": {"name": model},
            "task": {"name": task},
            "method": {"name": method, "rank": 16, "alpha": 16.0},
            "calibration": {"threshold": 0.9, "budget": None},
            "trainer": {"learning_rate": 1e-3},
        },
        "versions": {"partial-lora": "0.1.0", "torch": "2.13.0"},
        "git_commit": "0123456789abcdef",
        "device": "cpu",
        "started": "2026-01-01T00:00:00+00:00",
        "seconds": {"calibrate": 60.0 if calibrated else 0.0, "train": 100.0, "evaluate": 2.5},
        "peak_memory_bytes": 1 << 30,
        "parameters": {
            "base": 22_000_000,
            "adapter_dense": dense,
            "adapter_trainable": trainable,
            "head": 3850,
            "adapter_sparsity": 1 - trainable / dense if dense else None,
        },
        "sparsity": {"blocks.0.qkv": {"rows": 0.2, "columns": 0.4}, "blocks.1.qkv": {"rows": 0.4, "columns": 0.5}},
        "calibration": {
            "baseline": 0.86875,
            "joint": 0.4,
            "threshold": 0.9,
            "search": "scan",
            "evaluations": 1234,
            "seconds": 59.0,
            "cached": False,
        }
        if calibrated
        else None,
        "metrics": {
            "validation": {"primary": "accuracy", "accuracy": 0.98, "loss": 0.1},
            "test": {"primary": "accuracy", "accuracy": accuracy, "loss": 0.1},
        },
        "history": [],
    } | changes


def place(results_dir, result, *, id="0a1b2c3d", seed=None):
    config = result["config"]
    names = config["task"]["name"], config["model"]["name"], f"{config['method']['name']}-{id}"
    directory = results_dir.joinpath("runs", *names, f"seed{result['seed'] if seed is None else seed}")
    directory.mkdir(parents=True)
    (directory / "result.json").write_text(json.dumps(result))
    return directory


def budget(result, share):
    changed = copy.deepcopy(result)
    changed["config"]["calibration"]["budget"] = share
    return changed


def test_a_calibration_out_of_a_file_brings_its_own_operating_point(tmp_path):
    result = record()
    result["config"]["calibration"]["file"] = "calibration.json"
    result["calibration"] |= {"threshold": 0.5, "budget": None}
    place(tmp_path, result)
    assert records.collect(tmp_path)[0]["operating_point"].tolist() == ["threshold 0.5"]


def test_a_finished_run_is_a_row(tmp_path):
    place(tmp_path, record())
    frame, problems = records.collect(tmp_path)
    assert problems == []
    (row,) = frame.to_dict("records")
    expected = {
        "group": "runs/digits/vit_s14/partial-0a1b2c3d",
        "seed": 0,
        "task": "digits",
        "model": "vit_s14",
        "method": "partial",
        "operating_point": "threshold 0.9",
        "metric": "accuracy",
        "test": 0.9861,
        "adapter_parameters": 700,
        "adapter_dense": 1000,
        "share_of_dense": 0.7,
        "head_parameters": 3850,
        "calibrate_seconds": 60.0,
        "train_seconds": 100.0,
        "evaluate_seconds": 2.5,
        "learning_rate": 1e-3,
        "tuning": "untuned",
        "commit": "0123456789ab",
    }
    assert {key: row[key] for key in expected} == expected
    assert row["adapter_sparsity"] == pytest.approx(0.3)


def _without(*keys):
    result = record(seed=3)
    inner = result
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    return json.dumps(result)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "missing"),
        ("", "not JSON"),
        (json.dumps(record(seed=3))[:-40], "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        ("[1, 2]", "foreign"),
        ('{"accuracy": 1}', "foreign"),
        ('{"status": "finished", "metrics": {"test": 1}}', "no config"),
        (_without("seconds", "train"), "no train"),
        (_without("metrics", "test", "accuracy"), "no accuracy"),
        (json.dumps(record(seed=3, parameters=[1])), "foreign"),
        (json.dumps(record(seed=3, parameters={})), "no adapter_dense"),
        (json.dumps(record(seed=3, accuracy=float("nan"))), "accuracy is nan"),
        (json.dumps(record(seed=3, status="running")), "running"),
        (json.dumps(record(seed=3, status="failed", error="CUDA out of memory")), "failed: CUDA out of memory"),
        (json.dumps(record(seed=3, metrics={}, parameters={})), "calibrated only"),
        (json.dumps(record(seed=2)), "its seed is 2"),
        (_without("history"), "no history"),
        (_without("parameters", "base"), "no base"),
        (_without("versions"), "no versions"),
        (json.dumps(record(seed=3, history={"loss": 1})), "its history is not a list"),
        (json.dumps(record(seed=3, history=[{"loss": 1.0}])), "its history.* is not an entry of a log"),
        (json.dumps(record(seed=3, history=[{"step": 1, "eval_accuracy": "?"}])), "its history.* is not"),
        (json.dumps(record(seed=3, sparsity={"a": 0.5})), "its sparsity.* is not numbers for rows and columns"),
        (json.dumps(record(seed=3, calibration=[0.9])), "its calibration is not a mapping"),
        (json.dumps(record(seed=3, cost={"adapter_bytes": "4 KB"})), "its cost.* is not a number"),
        (json.dumps(record(seed=3) | {"config": record()["config"] | {"task": "digits"}}), "its config.task is not"),
    ],
)
def test_what_is_no_finished_run_is_named_and_left_out(tmp_path, content, reason):
    place(tmp_path, record())
    directory = place(tmp_path, record(seed=3))
    (directory / "result.json").unlink()
    if content is not None:
        (directory / "result.json").write_bytes(content.encode() if isinstance(content, str) else content)
    frame, problems = records.collect(tmp_path)
    assert frame["seed"].tolist() == [0]
    (problem,) = problems
    assert problem.startswith("runs/digits/vit_s14/partial-0a1b2c3d/seed3/result.json: ")
    assert reason in problem
    assert "\n" not in problem


def test_masks_of_single_entries_are_another_method(tmp_path):
    for method, masks in (("lora", "element"), ("partial", "rows_columns"), ("partial", "element")):
        result = record(method)
        result["config"]["mask"] = {"granularity": masks}
        place(tmp_path, result, id=masks)
    shown = tables.readable(records.group(records.collect(tmp_path)[0]))
    assert shown["method"].tolist() == ["lora", "partial", "partial (element)"]
    assert "id" not in shown
    assert "partial (element) · vit_s14" in drawn(summary.summary(result, "runs/seed0"))


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(PartialLoraError, match="expected runs in"):
        records.collect(tmp_path)
    with pytest.raises(PartialLoraError, match="expected runs in"):
        records.collect(tmp_path / "absent")


def test_no_finished_run_is_refused_and_writes_nothing(tmp_path):
    place(tmp_path, record(status="running"))
    frame, problems = records.collect(tmp_path)
    assert len(problems) == 1
    with pytest.raises(PartialLoraError, match="at least one finished run"):
        tables.write(frame, tmp_path, command="partial-lora report")
    assert not (tmp_path / "report").exists()


def test_seeds_of_one_folder_are_averaged(tmp_path):
    accuracies = [0.98, 0.985, 0.9925]
    for seed, accuracy in enumerate(accuracies):
        place(tmp_path, record(seed=seed, accuracy=accuracy))
    place(tmp_path, record(seed=0, accuracy=0.5), id="ffffffff")
    table = records.group(records.collect(tmp_path)[0])
    assert table["n"].tolist() == [3, 1]
    assert table["seeds"].tolist() == ["0 1 2", "0"]
    assert table["test_mean"][0] == pytest.approx(statistics.mean(accuracies))
    assert table["test_std"][0] == pytest.approx(statistics.stdev(accuracies))
    assert pd.isna(table["test_std"][1])
    shown = tables.readable(table)
    assert shown["test accuracy (%)"].tolist() == ["98.58 ± 0.63", "50.00"]
    assert shown["id"].tolist() == ["0a1b2c3d", "ffffffff"]  # else the two rows could not be told apart


@pytest.mark.parametrize("by", [(), ("task", "method")])
def test_runs_of_different_precision_are_not_averaged(tmp_path, by):
    for seed, precision in enumerate(("no", "no", "bf16")):
        place(tmp_path, record(seed=seed, accuracy=0.9 + seed / 100, mixed_precision=precision))
    table = records.group(records.collect(tmp_path)[0], by)
    assert dict(zip(table["precision"], table["n"], strict=True)) == {"fp32": 2, "bf16": 1}
    shown = tables.readable(table, by=by)
    assert set(shown["precision"]) == {"fp32", "bf16"}


def test_rows_are_in_order_of_task_model_point_method(tmp_path):
    runs = [
        (budget(record("uniform"), 0.13), "3"),
        (budget(record("partial"), 0.13), "4"),
        (budget(record("partial"), 0.5), "5"),
        (budget(record("partial"), 12_000), "6"),
        (record("targeted"), "1"),
        (record("partial"), "2"),
        (record("probe"), "1"),
        (record("lora"), "1"),
        (record("probe", task="cifar10"), "1"),
        (record("probe", task="cifar10", model="tiny_vit"), "1"),
    ]
    for result, id in runs:
        place(tmp_path, result, id=id)
    shown = tables.readable(records.group(records.collect(tmp_path)[0]))
    assert list(shown[["task", "model", "operating point", "method"]].itertuples(index=False, name=None)) == [
        ("cifar10", "tiny_vit", "–", "probe"),
        ("cifar10", "vit_s14", "–", "probe"),
        ("digits", "vit_s14", "–", "lora"),
        ("digits", "vit_s14", "–", "probe"),
        ("digits", "vit_s14", "threshold 0.9", "partial"),
        ("digits", "vit_s14", "threshold 0.9", "targeted"),
        ("digits", "vit_s14", "budget 12,000", "partial"),
        ("digits", "vit_s14", "budget 0.5", "partial"),
        ("digits", "vit_s14", "budget 0.13", "partial"),
        ("digits", "vit_s14", "budget 0.13", "uniform"),
    ]
    assert "id" not in shown


def test_what_does_not_apply_is_a_dash(tmp_path):
    place(tmp_path, record("probe"))
    (shown,) = tables.readable(records.group(records.collect(tmp_path)[0])).to_dict("records")
    assert shown["adapter parameters"] == "0"
    for column in ("operating point", "share of dense", "sparsity", "calibrate (s)"):
        assert shown[column] == "–"


def test_a_reused_calibration_costs_nothing_and_says_so(tmp_path):
    cached = record()["calibration"] | {"cached": True}
    seconds = record()["seconds"] | {"calibrate": 0.1}
    place(tmp_path, record(seed=0))
    place(tmp_path, record(seed=1, calibration=cached, seconds=seconds))
    place(tmp_path, record("targeted", seed=0, calibration=cached, seconds=seconds))
    shown = tables.readable(records.group(records.collect(tmp_path)[0]))
    assert shown["calibrate (s)"].tolist() == ["60.0", "reused"]


def test_metrics_of_several_names_have_their_own_column(tmp_path):
    place(tmp_path, record())
    place(tmp_path, record(task="cola", metrics={"test": {"primary": "matthews", "matthews": 0.61}}))
    shown = tables.readable(records.group(records.collect(tmp_path)[0]))
    assert shown["metric"].tolist() == ["matthews", "accuracy"]
    assert shown["test"].tolist() == ["0.6100", "98.61 %"]


def test_three_files_begin_with_their_command(tmp_path):
    for seed in (0, 1):
        place(tmp_path, record(seed=seed, accuracy=0.98 + 0.01 * seed))
    place(tmp_path, record("lora"))
    place(tmp_path, record("probe", status="failed", error="no_space left"))
    frame, problems = records.collect(tmp_path)
    command = "partial-lora report results/first"
    markdown, table, latex = tables.write(frame, tmp_path, command=command, problems=problems)
    assert [path.relative_to(tmp_path).as_posix() for path in (markdown, table, latex)] == [
        "report/table.md",
        "report/table.csv",
        "report/table.tex",
    ]
    text = markdown.read_text(encoding="utf-8")
    assert text.startswith(f"    {command}\n")
    assert "Commit: 0123456789ab. Device: cpu." in text
    assert "Untuned" in text
    assert "98.50 ± 0.71" in text
    assert "probe-0a1b2c3d/seed0/result.json: failed: no_space left" in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1
    assert len(rows) == 2 + 2

    assert table.read_text(encoding="utf-8").startswith(f"# {command}\n")
    numbers = pd.read_csv(table, comment="#")
    assert numbers["method"].tolist() == ["lora", "partial"]
    assert numbers["adapter_parameters"].tolist() == [1000, 700]
    assert numbers["test_mean"].tolist() == pytest.approx([0.9861, 0.985])
    assert str(tmp_path) not in table.read_text(encoding="utf-8")

    source = latex.read_text(encoding="utf-8")
    assert source.startswith(f"% {command}\n")
    assert r"98.50 $\pm$ 0.71" in source
    assert r"vit\_s14" in source
    assert r"70.0\%" in source
    assert source.isascii()


def test_a_command_of_two_lines_stays_a_comment(tmp_path):
    place(tmp_path, record())
    frame, _ = records.collect(tmp_path)
    _, table, latex = tables.write(frame, tmp_path, command="partial-lora \\\n  report")
    assert pd.read_csv(table, comment="#")["n"].tolist() == [1]
    assert all(line.startswith(("%", "\\")) or "&" in line for line in latex.read_text().splitlines())


def test_a_tuned_table_has_no_warning(tmp_path):
    place(tmp_path, record(tuning="grid of 3"))
    frame, _ = records.collect(tmp_path)
    text = tables.write(frame, tmp_path, command="partial-lora report")[0].read_text(encoding="utf-8")
    assert "grid of 3" in text
    assert "Untuned" not in text


def drawn(table):
    console = Console(file=io.StringIO(), width=100)
    console.print(table)
    return console.file.getvalue()


def test_the_table_on_screen_fits_100_columns(tmp_path):
    for seed in (0, 1):
        place(tmp_path, record("random_weights", seed=seed, accuracy=0.98 + 0.01 * seed))
    place(tmp_path, record("lora", task="cifar10"))
    place(tmp_path, budget(record("partial"), 250_000))
    place(tmp_path, budget(record("partial"), 250_000), id="ffffffff")
    text = drawn(tables.on_screen(records.collect(tmp_path)[0]))
    for part in ("cifar10, vit_s14", "digits, vit_s14", "98.50 ± 0.71", "budget 250,000", "ffffffff", "random_weights"):
        assert part in text
    assert all(len(line) <= 100 for line in text.splitlines())
    assert "…" not in text


def test_summary_of_a_run(tmp_path):
    text = drawn(summary.summary(record(), "results/runs/digits/vit_s14/partial-0a1b2c3d/seed0"))
    for part in (
        "98.61 %",
        "700 of 1,000",
        "3,850",
        "0.300",
        "precision",
        "fp32",
        "calibrate 60.0 · train 100.0 · evaluate 2.5",
        "results/runs/digits/vit_s14/partial-0a1b2c3d/seed0",
        "threshold 0.9",
    ):
        assert part in text
    assert all(len(line) <= 100 for line in text.splitlines())


def test_summary_of_a_run_without_calibration_or_adapter():
    text = drawn(summary.summary(record("probe"), "runs/seed0"))
    assert "calibrate –" in text
    assert "threshold" not in text


def test_summary_folds_a_long_path_into_100_columns():
    path = "/".join(["a-long-folder-name"] * 12) + "/seed0"
    text = drawn(summary.summary(record(), path))
    assert all(len(line) <= 100 for line in text.splitlines())
    assert path in "".join(line.strip("│┃ ").split("│")[-1].strip() for line in text.splitlines())


def test_summary_of_a_calibration():
    result = record(metrics={}, parameters={})
    text = drawn(summary.calibration_summary(result, "results/calibrations/0a1b"))
    for part in (
        "rows 0.300 · columns 0.450 over 2 modules",
        "0.8688 intact · 0.4000 with all",
        "1,234 (scan)",
        "60.0",
    ):
        assert part in text
    result["calibration"]["cached"] = True
    assert "(reused)" in drawn(summary.calibration_summary(result, "results/calibrations/0a1b"))


def test_report_needs_no_torch():
    task = "{'task': {'name': 'digits', 'path': 'bundled:digits'}}"
    code = "import sys, partial_lora.report_command; from partial_lora.report import page;"
    code += f"rows = page.rows_of({task}); sys.exit('torch' in sys.modules or len(rows) != 360)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
