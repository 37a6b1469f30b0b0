"""Records of runs: which are rows, which may stand beside each other, how they are averaged and chosen."""

from __future__ import annotations

import copy
import json
import math
import statistics

import numpy as np
import pandas as pd
import pytest
from recorded_runs import budget, leave, place, record, rows_of

from partial_lora.errors import PartialLoraError
from partial_lora.report import records, tables
from partial_lora.report.records import Predictions, conditions, differences
from partial_lora.runs import rates
from partial_lora.runs.directory import PREDICTIONS, RESULT


def test_a_finished_run_is_a_row(tmp_path):
    place(tmp_path, record())
    (run,), problems = records.read(tmp_path)
    assert problems == []
    expected = {
        "group": "runs/digits/vit_s14/partial-0a1b2c3d",
        "seed": 0,
        "task": "digits",
        "model": "vit_s14",
        "method": "partial",
        "operating_point": "threshold 0.9",
        "metric": "accuracy",
        "test": 0.9861,
        "learning_rate": 1e-3,
        "tuning": "untuned",
        "adapter_parameters": 700,
        "adapter_dense": 1000,
        "share_of_dense": 0.7,
        "head_parameters": 3850,
        "calibrate_seconds": 60.0,
        "train_seconds": 100.0,
        "evaluate_seconds": 2.5,
        "commit": "0123456789ab",
        "precision": "fp32",
    }
    assert {key: run.row[key] for key in expected} == expected
    assert run.row["adapter_sparsity"] == pytest.approx(0.3)
    assert records.one(run.directory).row == run.row | {"group": "partial-0a1b2c3d"}


def _without(*keys):
    result = record(seed=3)
    inner = result
    for key in keys[:-1]:
        inner = inner[key]
    del inner[keys[-1]]
    return result


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (None, "missing"),
        (b"", "not JSON"),
        (json.dumps(record(seed=3))[:-40].encode(), "not JSON"),
        (b"\xff\xfe\x00", "not JSON"),
        ([1, 2], "foreign"),
        ({"accuracy": 1}, "foreign"),
        ({"status": "finished", "metrics": {"test": 1}}, "seed"),
        (_without("seconds", "train"), "train"),
        (_without("metrics", "test", "accuracy"), "accuracy"),
        (_without("history"), "history"),
        (_without("parameters", "base"), "parameters.base"),
        (_without("versions"), "versions"),
        (_without("calibration"), "calibration"),
        (record(seed=3, parameters=[1]), "parameters"),
        (record(seed=3, parameters={}), "parameters."),
        (record(seed=3, accuracy=float("nan")), "accuracy is nan"),
        (record(seed=3, status="running"), "running"),
        (record(seed=3, status="failed", error="CUDA out of memory"), "failed: CUDA out of memory"),
        (record(seed=3, metrics={}, parameters={}), "calibrated only"),
        (record(seed=2), "its seed is 2"),
        (record(seed=3, history={"loss": 1}), "history"),
        (record(seed=3, history=[{"loss": 1.0}]), "history.step"),
        (record(seed=3, history=[{"step": 1, "eval_accuracy": "?"}]), "history.eval_accuracy is '?'"),
        (record(seed=3, sparsity={"a": 0.5}), "sparsity.a"),
        (record(seed=3, sparsity={"a": {"rows": 0.5}}), "sparsity.a.columns"),
        (record(seed=3, calibration=[0.9]), "calibration"),
        (record(seed=3, cost={"adapter_bytes": "4 KB"}), "cost.adapter_bytes is '4 KB'"),
        (record(seed=3) | {"config": record()["config"] | {"task": "digits"}}, "config.task"),
    ],
)
def test_a_record_of_no_finished_run_is_left_out_and_its_field_is_named(tmp_path, content, names):
    place(tmp_path, record())
    directory = place(tmp_path, record(seed=3))
    (directory / RESULT).unlink()
    if content is not None:
        (directory / RESULT).write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    runs, (problem,) = records.read(tmp_path)
    assert [run.row["seed"] for run in runs] == [0]
    assert problem.startswith("runs/digits/vit_s14/partial-0a1b2c3d/seed3/result.json: ")
    assert names in problem.partition(": ")[2]
    assert "\n" not in problem


def test_a_folder_without_runs_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(PartialLoraError, match=f"{folder}.*runs"):
            records.read(folder)


def test_a_calibration_out_of_a_file_brings_its_own_operating_point(tmp_path):
    result = record()
    result["config"]["calibration"]["file"] = "calibration.json"
    result["calibration"] |= {"threshold": 0.5, "budget": None}
    assert records.row(result)["operating_point"] == "threshold 0.5"


def test_masks_of_single_entries_are_another_method(tmp_path):
    for method, masks in (("lora", "element"), ("partial", "rows_columns"), ("partial", "element")):
        result = record(method)
        result["config"]["mask"] = {"granularity": masks}
        place(tmp_path, result, id=masks)
    assert sorted(rows_of(tmp_path)["method"]) == ["lora", "partial", "partial (element)"]


@pytest.mark.parametrize(
    ("module", "kind", "depth"),
    [
        ("timm_model.blocks.3.attn.qkv", "timm_model.blocks.attn.qkv", (3,)),
        ("layers.1.blocks.0.mlp.fc1", "layers.blocks.mlp.fc1", (1, 0)),
        ("fc1", "fc1", ()),
    ],
)
def test_a_module_has_a_kind_and_a_depth(module, kind, depth):
    assert records.place(module) == (kind, depth)


# Conditions

CONFIG = {
    "task": {"name": "digits", "train_samples": 200},
    "model": {"name": "vit", "image_size": 56},
    "method": {"name": "partial", "rank": 16},
    "importance": {"name": "svd"},
    "calibration": {"threshold": 0.9, "seed": 0},
    "mask": {"granularity": "rows_columns"},
    "trainer": {"epochs": 2.0, "learning_rate": 1e-3},
    "seed": 0,
}


def of(config: dict, precision: str = "no") -> dict:
    """The conditions of a run with these settings."""
    return conditions({"config": config, "mixed_precision": precision})


def changed(key: str, value: object) -> dict:
    config = copy.deepcopy(CONFIG)
    group, _, name = key.rpartition(".")
    (config[group] if group else config)[name] = value
    return config


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("method.name", "lora"),
        ("method.rank", 4),
        ("importance.name", "snip"),
        ("calibration.seed", 3),
        ("mask.granularity", "element"),
        ("trainer.learning_rate", 0.1),
        ("trainer.tuned", "results/tuning.json"),
        ("trainer.tuned_elsewhere", "tuned at 0.5"),
        ("trainer.num_processes", 2),
        ("trainer.weight_decay", 0.01),  # the schema's default, which an earlier record may lack
        ("results_dir", "elsewhere"),
        ("seed", 1),
    ],
)
def test_settings_of_a_method_and_those_that_change_no_result_are_no_conditions(key, value):
    assert of(changed(key, value)) == of(CONFIG)


@pytest.mark.parametrize(
    ("key", "value", "difference"),
    [
        ("trainer.epochs", 50.0, "trainer.epochs 50 against 2"),
        ("trainer.batch_size", 64, "trainer.batch_size 64 against 32"),
        ("trainer.max_steps", 9, "trainer.max_steps 9 against null"),
        ("task.train_samples", None, "task.train_samples null against 200"),
        ("model.image_size", 224, "model.image_size 224 against 56"),
    ],
)
def test_all_other_settings_are_conditions_and_named_where_they_differ(key, value, difference):
    assert differences(of(changed(key, value)), of(CONFIG)) == [difference]


def test_precision_is_a_condition_whichever_setting_it_is_of():
    assert conditions({"config": CONFIG}) == of(CONFIG)  # a record that is older than the field
    assert of(changed("trainer.mixed_precision", "no")) == of(CONFIG)
    assert of(changed("trainer.mixed_precision", "bf16"), "bf16") == of(CONFIG, "bf16") != of(CONFIG)


def test_members_of_a_mixture_are_conditions_in_their_order():
    members = {"sst2": {"name": "sst2", "mixing": "proportional"}, "a.b": {"name": "a.b", "train_samples": 5}}
    shared = of(changed("task.members", members))
    assert shared["task.members"] == ["sst2", "a.b"]
    assert shared["task.members.a.b.train_samples"] == 5
    assert "task.members.sst2.mixing" not in shared
    assert of(changed("task.members", dict(reversed(members.items())))) != shared


def test_a_file_is_the_same_in_another_place_and_another_file_is_not():
    paths = ("../data/cifar10/train.parquet", "/mnt/cifar10/train.parquet", "/mnt/cifar100/train.parquet")
    configs = [changed("task.data_files", {"train": path}) for path in paths]
    expected = ["cifar10/train.parquet", "cifar10/train.parquet", "cifar100/train.parquet"]
    assert [of(each)["task.data_files.train"] for each in configs] == expected
    assert [rates.settings_of(each, None)["task.data_files.train"] for each in configs] == expected


# Pairing: through the table that is made of it


def compared(place) -> tables.Differences:
    return tables.differences(records.read(place)[0], Predictions(place))


def test_runs_under_other_conditions_are_named_once_and_not_paired(tmp_path):
    for seed in (0, 1):
        for at in (None, 0.13):
            leave(tmp_path, "partial", wrong=20, seed=seed, budget=at)
        leave(
            tmp_path, "probe", wrong=0, seed=seed, settings={"epochs": 50.0, **{f"key{key}": key for key in range(5)}}
        )
        leave(tmp_path, "lora", wrong=0, seed=seed, settings={"learning_rate": 0.1, "num_workers": 4})
    found = compared(tmp_path)
    assert set(found.rows["method"]) == {"partial", "lora"}  # another rate and other workers are no other conditions
    assert found.problems == ()
    (apart,) = found.apart
    assert apart.startswith("runs/digits/vit/probe-None-50001234: ")
    assert "partial at threshold 0.9 and budget 0.13: trainer.epochs 50 against 5, trainer.key0 0 against" in apart
    assert apart.endswith("2 more")


def test_references_under_other_conditions_have_blocks_of_their_own(tmp_path):
    for epochs in (2.0, 50.0):
        for method in ("partial", "lora"):
            leave(tmp_path, method, wrong=20, settings={"epochs": epochs})
    found = compared(tmp_path)
    assert found.uncompared == ()
    pairs = found.rows[found.rows["group"] != found.rows["reference"]]
    assert [(row.group[-3:], row.reference[-3:]) for row in pairs.itertuples()] == [("-20", "-20"), ("500", "500")]


def test_up_to_three_references_are_each_compared_with(tmp_path):
    for seed in (0, 1):
        leave(tmp_path, "lora", wrong=20, seed=seed)
        for rate in (0.1, 0.2, 0.3):
            leave(tmp_path, "partial", wrong=20, seed=seed, settings={"learning_rate": rate})
    found = compared(tmp_path)
    assert found.uncompared == ()
    assert found.rows.groupby("reference").size().tolist() == [4, 4, 4]
    shown = tables.readable_differences(found.rows)
    assert (shown["id"] == shown["against"]).sum() == 3
    assert shown["verdict"].tolist().count("reference") == 3
    leave(tmp_path, "partial", wrong=20, settings={"learning_rate": 0.4})
    found = compared(tmp_path)
    assert found.rows.empty
    assert "--where trainer.learning_rate=" in found.uncompared[0]


def test_of_many_references_the_nearest_to_the_schema_is_taken(tmp_path):
    leave(tmp_path, "partial", wrong=20)
    leave(tmp_path, "lora", wrong=20)
    for number in range(3):
        leave(tmp_path, "partial", wrong=20, count=f"another {number}")
    found = compared(tmp_path)
    assert found.problems == ()
    assert set(found.rows["reference"]) == {"runs/digits/vit/partial-None-"}
    assert len(found.rows) == 5
    (remark,) = found.remarks
    assert remark.startswith("runs/digits/vit/partial-None-: ")
    assert f"{remark}." in tables.notes_of_differences(found)


def test_references_are_of_the_same_measure_and_their_masks_go_by_the_run(tmp_path):
    for measure in ("svd", "snip"):
        for method in ("partial", "targeted"):
            leave(tmp_path, method, wrong=20, importance=measure)
    leave(tmp_path, "lora", wrong=20)
    leave(tmp_path, "partial", wrong=30, mask_seed=5)
    rows = compared(tmp_path).rows
    pairs = {(row.group.rpartition("/")[2], row.reference.rpartition("/")[2]) for row in rows.itertuples()}
    for measure in ("", "snip"):
        assert (f"targeted-None-{measure}", f"partial-None-{measure}") in pairs
    assert ("targeted-None-snip", "partial-None-") not in pairs
    assert ("partial-None-mask5", "partial-None-") in pairs
    assert {reference for _, reference in pairs} == {"partial-None-", "partial-None-snip"}
    assert rows["reference"].iloc[0].endswith("partial-None-")  # before that of snip
    assert ("lora-None-", "partial-None-snip") in pairs


@pytest.mark.parametrize(("config", "metric"), [({"members": {"a": {"name": "a"}}}, "average"), ({}, "perplexity")])
def test_a_task_without_a_metric_of_examples_is_remarked(tmp_path, config, metric):
    for method in ("partial", "lora"):
        result = record(method, metrics={"test": {"primary": metric, metric: 3.0}})
        result["config"]["task"] |= config
        place(tmp_path, result)
    found = compared(tmp_path)
    assert (found.problems, found.known) == ((), False)
    assert found.remarks[0].startswith("digits: ")


# Averages and choices


def test_seeds_of_one_folder_are_averaged(tmp_path):
    accuracies = [0.98, 0.985, 0.9925]
    for seed, accuracy in enumerate(accuracies):
        of_seed = record(seed=seed, accuracy=accuracy)
        of_seed["parameters"]["adapter_trainable"] = 700 + seed // 2
        place(tmp_path, of_seed)
    place(tmp_path, record(seed=0, accuracy=0.5), id="ffffffff")
    table = records.group(rows_of(tmp_path))
    assert table["n"].tolist() == [3, 1]
    assert table["seeds"].tolist() == ["0 1 2", "0"]
    assert table["test_mean"][0] == pytest.approx(statistics.mean(accuracies))
    assert table["test_std"][0] == pytest.approx(statistics.stdev(accuracies))
    assert table["test_half"][0] == pytest.approx(4.302653 * statistics.stdev(accuracies) / math.sqrt(3), rel=1e-6)
    assert table.loc[1, ["test_std", "test_half"]].isna().all()
    assert table[["adapter_parameters", "adapter_dense"]].to_numpy()[0].tolist() == [pytest.approx(700 + 1 / 3), 1000]


@pytest.mark.parametrize("by", [(), ("task", "method")])
def test_runs_of_different_precision_are_not_averaged(tmp_path, by):
    for seed, precision in enumerate(("no", "no", "bf16")):
        place(tmp_path, record(seed=seed, accuracy=0.9 + seed / 100, mixed_precision=precision))
    table = records.group(rows_of(tmp_path), by)
    assert dict(zip(table["precision"], table["n"], strict=True)) == {"fp32": 2, "bf16": 1}
    assert set(tables.readable(table, by=by)["precision"]) == {"fp32", "bf16"}


@pytest.fixture
def runs(tmp_path):
    for seed, accuracy in enumerate((0.98, 0.985, 0.9925)):
        place(tmp_path, record(seed=seed, accuracy=accuracy))
    place(tmp_path, record("lora", task="cifar10"))
    place(tmp_path, budget(record(), 0.13), id="1")
    return records.read(tmp_path)[0]


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
def test_conditions_are_met_together_and_values_by_what_they_are(runs, conditions, count):
    assert len(records.where(runs, conditions)) == count


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
    ("condition", "names"),
    [("task", "KEY=VALUE"), ("=1", "KEY=VALUE"), ("taks=digits", "perhaps task"), ("task=rte", "--where task=rte")],
)
def test_a_condition_without_runs_is_refused(runs, condition, names):
    with pytest.raises(PartialLoraError, match=names):
        records.where(runs, [condition])


def test_runs_are_averaged_over_all_that_the_keys_do_not_tell_apart(runs):
    assert records.keys(runs, "method, method.rank") == ["method", "method.rank"]
    with pytest.raises(PartialLoraError, match=r"method\.rnk.*method\.rank"):
        records.keys(runs, "method.rnk")
    table = records.group(records.table(runs), ["method"])
    assert table[["method", "n"]].to_numpy().tolist() == [["lora", 1], ["partial", 4]]
    assert table["test_mean"][1] == pytest.approx(statistics.mean([0.98, 0.985, 0.9925, 0.9861]))
    assert table["operating_point"].tolist() == ["–", "–"]  # the one has none, the other two


@pytest.mark.parametrize("key", records._COLUMNS)
def test_every_column_can_be_grouped_by(runs, key):
    frame = records.table(runs)
    table = records.group(frame, [key])
    assert table["n"].sum() == 5
    shown = tables.readable(table, by=[key])
    assert next(iter(shown)) == key
    assert len(shown) == frame[key].nunique()


def test_predictions_are_read_once_and_no_more_of_them_than_is_compared(tmp_path):
    leave(tmp_path, "lora", wrong=5)
    (file,) = tmp_path.rglob(PREDICTIONS)
    frame = pd.read_parquet(file)
    frame.assign(logits=[[0.0, 1.0]] * len(frame)).to_parquet(file)
    known, group = Predictions(tmp_path), str(file.parents[1].relative_to(tmp_path))
    assert set(known.of(group, [0], "accuracy")[0]) == {"label", "prediction"}
    assert "logits" in known.of(group, [0], "f1")[0]
    file.unlink()
    assert len(known.of(group, [0], "accuracy")[0]) == 200
    with pytest.raises(PartialLoraError, match=PREDICTIONS):
        Predictions(tmp_path).of(group, [0], "accuracy")
    file.write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=PREDICTIONS):
        Predictions(tmp_path).of(group, [0], "accuracy")
    assert Predictions(tmp_path).outputs(group, 0) is None
    assert not np.any(Predictions(tmp_path).exist(group, [1]))
