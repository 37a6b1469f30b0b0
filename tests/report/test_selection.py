"""What a report is about and what it is grouped by: conditions and keys over records."""

from __future__ import annotations

import math
import statistics

import pytest
from test_report import budget, place, record

from partial_lora import report_command
from partial_lora.errors import PartialLoraError
from partial_lora.report import records, tables


@pytest.fixture
def found(tmp_path):
    for seed, accuracy in enumerate((0.98, 0.985, 0.9925)):
        place(tmp_path, record(seed=seed, accuracy=accuracy))
    place(tmp_path, record("lora", task="cifar10"))
    place(tmp_path, budget(record(), 0.13), id="1")
    return records.read(tmp_path)[0]


@pytest.mark.parametrize(
    ("condition", "count"),
    [
        ("operating_point=budget 120,000", 1),
        ("calibration.budget=120000", 1),
        ("calibration.budget=1200001", 1),
        ("calibration.budget=120000,1200001", 2),
    ],
)
def test_a_budget_of_parameters_is_one_value_and_met_to_the_last(tmp_path, condition, count):
    for number, parameters in enumerate((120_000.0, 1_200_000.0, 1_200_001.0)):
        place(tmp_path, budget(record(), parameters), id=str(number))
    assert len(records.where(records.read(tmp_path)[0], [condition])) == count


@pytest.mark.parametrize(
    ("conditions", "count"),
    [
        (["task=digits"], 4),
        (["task=digits", "seed=1,2"], 2),
        (["learning_rate=1e-3"], 5),
        (["trainer.learning_rate=0.0010"], 5),
        (["calibration.budget=0.13"], 1),
        (["method=lora,partial"], 5),
        (["operating_point=budget 0.13"], 1),
    ],
)
def test_conditions_are_met_together_and_values_by_what_they_are(found, conditions, count):
    assert len(records.where(found, conditions)) == count


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ("task", "expected KEY=VALUE"),
        ("taks=digits", "perhaps task"),
        ("task=rte", "no finished run"),
        ("=1", "expected"),
    ],
)
def test_a_condition_that_says_nothing_is_refused(found, condition, said):
    with pytest.raises(PartialLoraError, match=said):
        records.where(found, [condition])


def test_runs_are_averaged_over_all_that_the_keys_do_not_tell_apart(found):
    assert records.keys(found, "method, method.rank") == ["method", "method.rank"]
    with pytest.raises(PartialLoraError, match=r"perhaps .*method\.rank"):
        records.keys(found, "method.rnk")
    frame = records.table(found)
    table = records.group(frame, ["method"])
    assert table[["method", "n"]].to_numpy().tolist() == [["lora", 1], ["partial", 4]]
    assert table["test_mean"][1] == pytest.approx(statistics.mean([0.98, 0.985, 0.9925, 0.9861]))
    assert table["operating_point"].tolist() == ["–", "–"]  # the one has none, the other two


@pytest.mark.parametrize("key", records._WORDS)
def test_every_column_can_be_grouped_by(found, key):
    table = records.group(records.table(found), [key])
    assert table["n"].sum() == 5
    shown = tables.readable(table, by=[key])
    assert next(iter(shown)) == key
    assert shown.shape[0] == records.table(found)[key].nunique()


def test_a_folder_where_nothing_finished_is_refused(tmp_path, capsys):
    place(tmp_path, record(status="running"))
    with pytest.raises(PartialLoraError, match="at least one finished run"):
        report_command.report([str(tmp_path)])
    assert "seed0/result.json: running" in capsys.readouterr().err
    assert not (tmp_path / "report").exists()


def test_parameters_that_differ_between_seeds_are_averaged_as_they_are(tmp_path):
    for seed, kept in enumerate((700, 701)):
        of_seed = record(seed=seed)
        of_seed["parameters"]["adapter_trainable"] = kept
        place(tmp_path, of_seed)
    table = records.group(records.table(records.read(tmp_path)[0]))
    assert table[["adapter_parameters", "adapter_dense"]].to_numpy().tolist() == [[700.5, 1000]]


def test_half_the_interval_is_students():
    assert records.half_interval(0.01, 3) == pytest.approx(4.302653 * 0.01 / math.sqrt(3), rel=1e-6)
    assert math.isnan(records.half_interval(math.nan, 1))


def test_the_command_filters_groups_and_says_what_it_left_out(tmp_path, found, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    asked = [str(tmp_path), "--where", "task=digits", "--by", "calibration.budget", "--spread", "interval"]
    assert report_command.report(asked) == 0
    text = (tmp_path / "report" / "table.md").read_text(encoding="utf-8")
    assert text.splitlines()[0].endswith("--where task=digits --by calibration.budget --spread interval")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    assert rows[0][:3] == ["calibration.budget", "n", "test accuracy (%)"]
    assert [row[:2] for row in rows[2:]] == [["0.13", "1"], ["–", "3"]]
    assert rows[3][2].startswith("98.58 ± 1.5")
    assert "half the 95 % interval" in text
    assert all(len(line) <= 100 for line in capsys.readouterr().out.splitlines() if not line.startswith("wrote"))
    place(tmp_path, record(seed=9, status="failed", error="no space left"))
    assert report_command.report([str(tmp_path)]) == 1
    assert "seed9/result.json: failed: no space left" in capsys.readouterr().err


def test_bytes_stand_beside_scores(tmp_path):
    place(tmp_path, record(cost={"adapter_bytes": 81_000}))
    place(tmp_path, record("lora", files={"adapter/adapter_model.safetensors": 4_000, "config.yaml": 9}))
    place(tmp_path, record("probe"))
    shown = tables.readable(records.group(records.collect(tmp_path)[0]))
    assert shown["adapter (KB)"].tolist() == ["4", "–", "81"]
