"""Tables of runs and of their differences: what stands in a row, what is written, what is noted below."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from recorded_runs import budget, drawn, leave, place, record, rows_of

from partial_lora.errors import PartialLoraError
from partial_lora.report import records, tables
from partial_lora.report.records import Predictions
from partial_lora.runs.directory import PREDICTIONS, RESULT


def shown_of(results_dir, **options):
    return tables.readable(records.group(rows_of(results_dir)), **options)


def test_no_finished_run_is_refused_and_writes_nothing(tmp_path):
    place(tmp_path, record(status="running"))
    with pytest.raises(PartialLoraError, match=str(tmp_path)):
        tables.write(rows_of(tmp_path), tmp_path, command="partial-lora report")
    assert not (tmp_path / "report").exists()


def test_rows_that_look_alike_have_their_ids(tmp_path):
    for seed, accuracy in enumerate([0.98, 0.985, 0.9925]):
        place(tmp_path, record(seed=seed, accuracy=accuracy))
    place(tmp_path, record(seed=0, accuracy=0.5), id="ffffffff")
    shown = shown_of(tmp_path)
    assert shown["test accuracy (%)"].tolist() == ["98.58 ± 0.63", "50.00"]
    assert shown["id"].tolist() == ["0a1b2c3d", "ffffffff"]


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
    shown = shown_of(tmp_path)
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


def test_a_quantity_that_does_not_apply_is_a_dash(tmp_path):
    place(tmp_path, record("probe"))
    (shown,) = shown_of(tmp_path).to_dict("records")
    assert shown["adapter parameters"] == "0"
    assert {shown[each] for each in ("operating point", "share of dense", "sparsity", "calibrate (s)")} == {"–"}


def test_a_reused_calibration_costs_nothing_and_says_so(tmp_path):
    cached = {
        "calibration": record()["calibration"] | {"cached": True},
        "seconds": record()["seconds"] | {"calibrate": 0.1},
    }
    place(tmp_path, record(seed=0))
    place(tmp_path, record(seed=1, **cached))
    place(tmp_path, record("targeted", **cached))
    assert shown_of(tmp_path)["calibrate (s)"].tolist() == ["60.0", "reused"]


def test_metrics_of_several_names_have_their_own_column(tmp_path):
    place(tmp_path, record())
    place(tmp_path, record(task="cola", metrics={"test": {"primary": "matthews", "matthews": 0.61}}))
    shown = shown_of(tmp_path)
    assert shown["metric"].tolist() == ["matthews", "accuracy"]
    assert shown["test"].tolist() == ["0.6100", "98.61 %"]


def test_bytes_stand_beside_scores(tmp_path):
    place(tmp_path, record(cost={"adapter_bytes": 81_000}))
    place(tmp_path, record("lora", files={"adapter/adapter_model.safetensors": 4_000, "config.yaml": 9}))
    place(tmp_path, record("probe"))
    assert shown_of(tmp_path)["adapter (KB)"].tolist() == ["4", "–", "81"]


def test_three_files_begin_with_their_command(tmp_path):
    for seed in (0, 1):
        place(tmp_path, record(seed=seed, accuracy=0.98 + 0.01 * seed))
    place(tmp_path, record("lora"))
    place(tmp_path, record("probe", status="failed", error="no_space left"))
    runs, problems = records.read(tmp_path)
    command = "partial-lora report \\\n  results/first"
    files = tables.write(records.table(runs), tmp_path, command=command, problems=problems)
    assert [path.relative_to(tmp_path).as_posix() for path in files] == [
        f"report/table.{kind}" for kind in ("md", "csv", "tex")
    ]
    markdown, table, latex = (path.read_text(encoding="utf-8") for path in files)
    assert markdown.startswith("    partial-lora report \\ results/first\n")
    assert "Commit: 0123456789ab. Device: cpu." in markdown
    assert "98.50 ± 0.71" in markdown
    assert "probe-0a1b2c3d/seed0/result.json: failed: no_space left" in markdown
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows}) == 1
    assert len(rows) == 2 + 2

    assert table.startswith("# partial-lora report \\ results/first\n")
    assert str(tmp_path) not in table
    numbers = pd.read_csv(files[1], comment="#")
    assert numbers["method"].tolist() == ["lora", "partial"]
    assert numbers["adapter_parameters"].tolist() == [1000, 700]
    assert numbers["test_mean"].tolist() == pytest.approx([0.9861, 0.985])

    assert latex.startswith("% partial-lora report \\ results/first\n")
    assert r"98.50 $\pm$ 0.71" in latex
    assert r"vit\_s14" in latex
    assert r"70.0\%" in latex
    assert latex.isascii()


def test_only_an_untuned_table_has_the_warning(tmp_path):
    place(tmp_path, record())
    assert tables._UNTUNED in tables.notes(records.group(rows_of(tmp_path)))
    place(tmp_path / "tuned", record(tuning="grid of 3"))
    assert tables.notes(records.group(rows_of(tmp_path / "tuned"))) == []


def test_the_table_on_screen_fits_100_columns(tmp_path):
    for seed in (0, 1):
        place(tmp_path, record("random_weights", seed=seed, accuracy=0.98 + 0.01 * seed))
    place(tmp_path, record("lora", task="cifar10"))
    place(tmp_path, budget(record("partial"), 250_000))
    place(tmp_path, budget(record("partial"), 250_000), id="ffffffff")
    text = drawn(tables.on_screen(rows_of(tmp_path)))
    for part in ("cifar10, vit_s14", "digits, vit_s14", "98.50 ± 0.71", "budget 250,000", "ffffffff", "random_weights"):
        assert part in text
    assert all(len(line) <= 100 for line in text.splitlines())
    assert "…" not in text


# Differences


@pytest.fixture
def results(tmp_path):
    for seed in (0, 1):
        leave(tmp_path, "partial", wrong=20, seed=seed)
        leave(tmp_path, "partial", wrong=40, seed=seed, budget=0.13)
        leave(tmp_path, "uniform", wrong=70, seed=seed, budget=0.13)
        leave(tmp_path, "lora", wrong=20, seed=seed)
    leave(tmp_path, "partial", wrong=40, budget=0.13, granularity="element")
    return tmp_path


def compared(results_dir):
    return tables.differences(records.read(results_dir)[0], Predictions(results_dir))


def test_each_is_compared_with_the_reference_at_its_point(results):
    found = compared(results)
    assert found.uncompared == ()
    rows = {(row.operating_point, row.method): row for row in found.rows.itertuples()}
    assert rows.keys() == {
        ("threshold 0.9", "partial"),
        ("threshold 0.9", "lora"),
        ("budget 0.13", "partial"),
        ("budget 0.13", "partial (element)"),
        ("budget 0.13", "uniform"),
        ("budget 0.13", "lora"),
    }
    lora, worse = rows["threshold 0.9", "lora"], rows["budget 0.13", "uniform"]
    assert (lora.difference, lora.low, lora.high, lora.verdict) == (0, 0, 0, "matches")
    assert worse.difference == pytest.approx(-0.15)
    assert worse.low < -0.15 < worse.high < 0
    assert (worse.verdict, worse.pairs, worse.n, worse.examples) == ("worse", 2, 2, 200)
    assert rows["budget 0.13", "partial (element)"].pairs == 1
    assert rows["budget 0.13", "lora"].verdict == "better"
    assert worse.optimizer_bytes == 2000.5
    assert worse.reliability == 0.75
    assert np.isnan(lora.reliability)
    assert np.isnan(worse.saved_activation_bytes)


def test_the_comparison_is_written_with_its_command_and_intervals(results):
    written = tables.write_differences(compared(results), results, command="partial-lora report x")
    text, numbers = (path.read_text(encoding="utf-8") for path in written)
    assert text.startswith("    partial-lora report x\n")
    (row,) = [line for line in text.splitlines() if "| uniform" in line]
    cells = [each.strip() for each in row.strip("|").split("|")]
    assert cells[6].startswith("-15.00 [-")
    assert cells[7] == "worse"
    assert {"0.75", "tuned"} <= set(cells)
    assert numbers.splitlines()[0] == "# partial-lora report x"
    assert len(pd.read_csv(written[1], comment="#")) == 6


def test_nothing_is_written_where_there_is_nothing_to_compare(tmp_path):
    leave(tmp_path, "lora", wrong=1)
    assert tables.write_differences(compared(tmp_path), tmp_path, command="x") == []
    leave(tmp_path, "partial", wrong=1)
    assert len(tables.write_differences(compared(tmp_path), tmp_path, command="x")) == 2


def test_problems_alone_replace_an_earlier_comparison(tmp_path):
    leave(tmp_path, "partial", wrong=20)
    leave(tmp_path, "lora", wrong=20)
    assert len(tables.write_differences(compared(tmp_path), tmp_path, command="x")) == 2
    (file,) = tmp_path.glob(f"runs/*/*/lora*/seed0/{RESULT}")
    file.write_text(file.read_text().replace('"learning_rate"', '"batch_size": 512, "learning_rate"'))
    (written,) = tables.write_differences(compared(tmp_path), tmp_path, command="x")
    text = written.read_text(encoding="utf-8")
    assert "trainer.batch_size 512 against 32" in text
    assert "|" not in text
    assert not (tmp_path / "report" / "comparison.csv").exists()


def test_what_cannot_be_compared_is_named(results):
    (folder,) = results.glob("runs/*/*/uniform*/seed1")
    (folder / PREDICTIONS).unlink()
    leave(results, "targeted", wrong=3, seed=4)
    found = compared(results)
    (broken,), (other_seeds,) = found.problems, found.apart
    assert "uniform-013-/seed1" in broken
    assert "targeted" in other_seeds
    assert found.rows.query("method == 'targeted'")["difference"].isna().all()


def test_seeds_that_only_one_has_and_a_single_pair_show(tmp_path):
    for seed in (0, 1, 2):
        leave(tmp_path, "partial", wrong=20, seed=seed)
        leave(tmp_path, "lora", wrong=60, seed=seed + 2)
    found = compared(tmp_path)
    shown = tables.readable_differences(found.rows).set_index("method")
    assert shown.loc["lora", ["n", "verdict"]].tolist() == ["1 of 3", "undecided (one seed)"]
    assert shown.loc["partial", "n"] == "3"
    alone = tables.notes_of_differences(found)
    for seed in (0, 1):
        leave(tmp_path, "lora", wrong=60, seed=seed)
    several = tables.notes_of_differences(compared(tmp_path))
    assert len(alone) == len(several) + 2  # of one seed, and of the reference's seeds
    assert set(several) < set(alone)


def test_predictions_of_seeds_that_only_one_has_are_not_needed(tmp_path):
    for seed in range(3):
        leave(tmp_path, "partial", wrong=20, seed=seed)
        leave(tmp_path, "lora", wrong=60, seed=seed) if seed < 2 else None
    (lost,) = tmp_path.glob(f"runs/*/*/partial*/seed2/{PREDICTIONS}")
    lost.unlink()
    found = compared(tmp_path)
    assert found.problems == ()
    assert found.rows.set_index("method").loc["lora", "pairs"] == 2


def test_records_without_predictions_are_no_problem_but_remarked(results):
    for file in results.rglob(PREDICTIONS):
        file.unlink()
    found = compared(results)
    assert (found.problems, found.known, len(found.remarks)) == ((), False, 1)
    others = [run for run in records.read(results)[0] if run.row["method"] != "partial"]
    (remark,) = tables.differences(others, Predictions(results)).remarks
    assert "partial" in remark
    assert tables.differences(others[:1], Predictions(results)).remarks == ()
