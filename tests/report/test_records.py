"""Records of runs: which are rows, which may stand beside each other, how they are averaged and chosen."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator

import pandas as pd
import pytest
from recorded_runs import leave, place, record, rows_of
from refusals import refusal

from partial_lora.launching.directory import PREDICTIONS, RESULT
from partial_lora.report import filters, make_report, records, seed_groups, summary, tables
from partial_lora.report.predictions import Predictions
from partial_lora.report.rows import NONE, conditions, differing, operating_point, point_of, point_order, row


def test_points_are_in_the_order_of_kinds_and_of_sizes() -> None:
    ordered = ["–", "threshold 0.9", "threshold 0.5", "budget 2,000", "budget 0.13", "budget 0.05"]
    ordered += ["sparsity 0.5", "sparsity 0.87", "sparsity of modules 1e5a2b"]
    assert sorted(sorted(ordered), key=point_order) == ordered


def test_a_point_in_words() -> None:
    assert point_of({"threshold": 0.9}) == "threshold 0.9"
    assert point_of({"threshold": 0.42, "budget": 0.13}) == "budget 0.13"
    assert point_of({"threshold": 0.9, "budget": 153344.0}) == "budget 153,344"  # to the last parameter
    assert point_of({"threshold": 0.9, "budget": None, "sparsity": 0.87}) == "sparsity 0.87"
    assert point_of({"threshold": 0.9, "budget": 0.05, "sparsity": "uniform"}) == "budget 0.05"
    modules = [point_of({"sparsity": {"qkv": share}}) for share in (0.5, 0.5, 0.6)]
    assert modules[0] == modules[1] != modules[2]


def test_a_finished_run_is_a_row(tmp_path):
    place(tmp_path, record(), id="0a1b2c3d")
    (run,), problems = records.read(tmp_path)
    assert problems == []
    expected = {"group": "runs/digits/vit/partial-0a1b2c3d", "seed": 0, "task": "digits", "model": "vit"}
    expected |= {"method": "partial", "operating_point": "threshold 0.9", "metric": "accuracy", "test": 0.9861}
    expected |= {"learning_rate": 1e-3, "adapter_parameters": 700, "adapter_dense": 1000}
    expected |= {"share_of_dense": 0.7, "head_parameters": 3850, "adapter_sparsity": pytest.approx(0.3)}
    expected |= {"calibrate_seconds": 60.0, "train_seconds": 100.0, "evaluate_seconds": 2.5}
    expected |= {"commit": "0123456789ab", "precision": "fp32"}
    assert {key: run.row[key] for key in expected} == expected
    assert records.one(run.directory).row == run.row
    of_a_file = record(method__name="partial", calibration__file="c.json", calibration={"threshold": 0.5})
    assert row(of_a_file)["operating_point"] == "threshold 0.5"
    entries = [row(record(method, mask__granularity="element"))["method"] for method in ("partial", "lora")]
    assert entries == ["partial (element)", "lora"]  # masks of single entries are another method


@pytest.mark.parametrize(
    ("files", "path", "name"),
    [
        ("rows/questions.csv", "files", "own (questions.csv)"),
        ({"train": "signs/train.parquet", "test": "signs/test.parquet"}, "files", "own (signs)"),
        ({"train": "photos/Train", "test": "photos/test"}, "files", "own (photos)"),
        ({"test": "others/later.csv", "train": "rows/questions.csv"}, "files", "own (questions.csv)"),
        ("photos/own", "files", "own"),
        ("train.csv", "files", "own"),
        ({"train": "data/elsewhere/train.parquet"}, "someone/own", "own"),  # a set of the hub, out of a folder
    ],
)
def test_a_user_s_own_rows_go_by_their_file_or_folder_too(tmp_path, files, path, name) -> None:
    own = record(task="own", task__path=path, task__data_files=files)
    assert row(own)["task"] == name
    place(tmp_path, own)
    (run,) = runs = records.read(tmp_path)[0]
    assert [filters.where(runs, [f"task={word}"]) for word in {"own", name}] == [[run]] * len({"own", name})
    assert summary.run_line(run.directory, own)[1] == name


def test_a_file_of_sparsities_need_not_say_its_point() -> None:
    of_file = {"config": {"calibration": {"file": "c.json", "threshold": 0.9}}}
    for point, name in ((None, NONE), (0.8, "threshold 0.8")):
        assert operating_point(of_file | {"calibration": {"threshold": point, "budget": None}}) == name


@pytest.mark.parametrize(
    ("content", "names"),
    [
        (None, "missing"),
        (b"\xff\xfe\x00", "not JSON"),
        ([1, 2], "foreign"),
        (record(seed=3, cost={"adapter_bytes": "4 KB"}), "4 KB"),
        (record(test=math.nan, seed=3), "accuracy is nan"),
        (record(seed=3, status="failed", error="CUDA out of memory"), "failed: CUDA out of memory"),
        (record(seed=3, status="failed", error="interrupted"), "interrupted"),
        (record(seed=3, metrics={}), "calibrated only"),
        (record(seed=2), "its seed is 2"),
    ],
)
def test_a_record_of_no_finished_run_is_left_out_and_its_field_is_named(tmp_path, content, names):
    place(tmp_path, record(), id="0")
    file = place(tmp_path, record(seed=3), id="0") / RESULT
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    runs, (problem,) = records.read(tmp_path)
    assert [run.row["seed"] for run in runs] == [0]
    assert problem.path == "runs/digits/vit/partial-0/seed3/result.json"
    assert names in problem.why
    assert "\n" not in str(problem)
    assert problem.why.startswith("interrupted") == (names == "interrupted")
    unfinished = ("missing", "failed: CUDA out of memory", "interrupted", "calibrated only")
    assert problem.is_broken == (names not in unfinished)


def _damaged() -> Iterator[tuple[str, dict]]:
    """Every field of a record, each missing, null, an empty list or a list of null; by the field's key."""
    history = [{"step": step, "loss": 0.5, "eval_accuracy": 0.5} for step in (10, 20)]
    settings = {"training": {"learning_rate": 1e-3}, "warnings": ["beware"], "calibration__seed": None}
    whole = json.dumps(record(seed=3, history=history, **settings))

    def places(value, *path):
        for key, inside in value.items() if isinstance(value, dict) else ():
            yield (*path, key)
            yield from places(inside, *path, key)

    for *parents, last in places(json.loads(whole)):
        for value in ((), None, [], [None]):
            result = content = json.loads(whole)
            for parent in parents:
                content = content[parent]
            content[last] = value
            if value == ():
                del content[last]
            yield ".".join((*parents, last)), result


def test_a_damaged_field_is_named_or_does_without_and_never_ends_the_report(tmp_path):
    for method in ("lora", "partial"):
        leave(tmp_path, method, wrong=5, seed=3, id="whole", calibration__seed=None)
    damaged = dict(zip(map("{:06x}".format, range(10**6)), _damaged(), strict=False))
    for id, (_, result) in damaged.items():
        folder = tmp_path / "runs" / "digits" / "vit" / f"partial-{id}" / "seed3"
        folder.mkdir(parents=True)
        (folder / RESULT).write_text(json.dumps(result))
    make_report.report(tmp_path, where=[], by=None, examples=2, command="", note=lambda line: None)
    runs, left_out = records.read(tmp_path)
    assert {run.directory.parent.name for run in runs} >= {"lora-whole", "partial-whole"}
    why = {problem.path.split("/")[3].removeprefix("partial-"): problem.why for problem in left_out}
    assert len(runs) + len(why) == len(damaged) + 2
    named = {damaged[id][0] for id in why}
    unnamed = [(damaged[id][0], words) for id, words in why.items() if damaged[id][0].split(".")[-1] not in words]
    assert {key for key, _ in unnamed} <= {"status", "metrics", "format"}, (
        unnamed
    )  # by which a run is known to have finished
    assert {"history", "sparsity.blocks.0.qkv.rows", "warnings", "seed", "config.task.name", "calibration"} <= named


def test_a_folder_without_runs_is_refused(tmp_path):
    for folder in (tmp_path, tmp_path / "absent"):
        with refusal(str(folder)):
            records.read(folder)


# Conditions


@pytest.mark.parametrize(
    "settings",
    [
        {"method__name": "lora", "method__rank": 4, "importance__name": "snip"},
        {"calibration__seed": 3, "mask__granularity": "element"},
        {"trainer__loraplus_ratio": 4.0},
        {"trainer__learning_rate": 0.1},
        {"seed": 1, "trainer__num_processes": 2},
        {"trainer__weight_decay": 0.01, "trainer__mixed_precision": "no"},  # defaults that an earlier record may lack
    ],
)
def test_settings_of_a_method_and_those_that_change_no_result_are_no_conditions(settings):
    assert conditions(record(**settings)) == conditions(record())


def test_all_other_settings_are_conditions_and_named_where_they_differ():
    changed = {"trainer__epochs": 50.0, "trainer__max_steps": 9, "trainer__head_learning_rate": 0.01}
    other = conditions(record(**changed, task__train_samples=None))
    assert sorted(differing(other, conditions(record())), key=str) == [
        ("task.train_samples", None, 600),
        ("trainer.epochs", 50.0, 3.0),
        ("trainer.head_learning_rate", 0.01, None),
        ("trainer.max_steps", 9, None),
    ]


def test_the_precision_that_was_computed_in_is_a_condition():
    auto, bf16 = record(mixed_precision="bf16"), record(mixed_precision="bf16", trainer__mixed_precision="bf16")
    assert conditions(auto) == conditions(bf16) != conditions(record())


def test_members_of_a_mixture_are_conditions_in_their_order():
    members = {"sst2": {"name": "sst2", "mixing": "proportional"}, "a.b": {"name": "a.b", "train_samples": 5}}
    shared = conditions(record(task__members=members))
    assert shared["task.members"] == ["sst2", "a.b"]
    assert shared["task.members.a.b.train_samples"] == 5
    assert "task.members.sst2.mixing" not in shared
    assert conditions(record(task__members=dict(reversed(members.items())))) != shared


def test_a_file_is_the_same_in_another_place_and_another_file_is_not():
    paths = ("../data/cifar10/train.parquet", "/mnt/cifar10/train.parquet", "/mnt/cifar100/train.parquet")
    results = [record(task__data_files={"train": path}) for path in paths]
    expected = ["cifar10/train.parquet", "cifar10/train.parquet", "cifar100/train.parquet"]
    assert [conditions(each)["task.data_files.train"] for each in results] == expected


# Averages and choices


def test_seeds_of_one_folder_are_averaged(tmp_path):
    accuracies = [0.98, 0.985, 0.9925]
    for seed, accuracy in enumerate(accuracies):
        of_seed = record(test=accuracy, seed=seed)
        of_seed["parameters"]["adapter_trainable"] = 700 + seed // 2
        place(tmp_path, of_seed, id="0")
    place(tmp_path, record(test=0.5), id="1")
    table = seed_groups.group(rows_of(tmp_path))
    assert table["n"].tolist() == [3, 1]
    assert table["seeds"].tolist() == ["0 1 2", "0"]
    assert table["test_mean"][0] == pytest.approx(statistics.mean(accuracies))
    assert table["test_std"][0] == pytest.approx(statistics.stdev(accuracies))
    assert table["test_half"][0] == pytest.approx(4.302653 * statistics.stdev(accuracies) / math.sqrt(3), rel=1e-6)
    assert table.loc[1, ["test_std", "test_half"]].isna().all()
    assert table[["adapter_parameters", "adapter_dense"]].to_numpy()[0].tolist() == [pytest.approx(700 + 1 / 3), 1000]


def test_seeds_whose_learning_rates_came_out_unlike_are_a_folder_still(tmp_path):
    for seed, (rate, loss) in enumerate(((1.1e-3, 0.3), (1e-3, 0.1), (1.2e-3, 0.2))):
        of_seed = record(seed=seed, training={"learning_rate": rate}, trainer__learning_rate="auto")
        of_seed["metrics"]["validation"]["loss"] = loss
        place(tmp_path, of_seed)
    (kept,) = seed_groups.without_searches(seed_groups.folders(records.read(tmp_path)[0]))
    assert kept.seeds == [0, 1, 2]
    table = seed_groups.group(rows_of(tmp_path))
    assert (table["n"].tolist(), table["learning_rate"].tolist()) == ([3], [1.1e-3])
    assert table["differs"].tolist() == ["–"]


@pytest.mark.parametrize("by", [(), ("task", "method")])
def test_runs_of_different_precision_are_not_averaged(tmp_path, by):
    for seed, precision in enumerate(("no", "no", "bf16")):
        place(tmp_path, record(seed=seed, mixed_precision=precision))
    table = seed_groups.group(rows_of(tmp_path), by)
    assert dict(zip(table["precision"], table["n"], strict=True)) == {"fp32": 2, "bf16": 1}
    assert dict(zip(table["precision"], table["differs"], strict=True)) == {"fp32": "–", "bf16": "mixed_precision=bf16"}
    assert set(tables.readable(table, by=by)["precision"]) == {"fp32", "bf16"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for seed, accuracy in enumerate((0.98, 0.985, 0.9925)):
        place(folder, record(test=accuracy, seed=seed))
    place(folder, record("lora", task="cifar10"))
    for budget in (0.13, 120_000.0, 1_200_000.0, 1_200_001.0):
        place(folder, record(budget=budget, share=0.13))
    return records.read(folder)[0]


@pytest.mark.parametrize(
    ("conditions", "count"),
    [
        (["task=digits"], 7),
        (["task=digits", "seed=1,2"], 2),
        (["trainer.learning_rate=0.0010"], 8),
        (["method=lora, partial"], 8),
        (["operating_point=budget 120,000"], 1),
        (["calibration.budget=1200001"], 1),  # met to the last parameter
        (["calibration.budget=120000,1200001"], 2),
        (["calibration.budget=null"], 4),
    ],
)
def test_conditions_are_met_together_and_values_by_what_they_are(runs, conditions, count):
    assert len(filters.where(runs, conditions)) == count


@pytest.mark.parametrize(
    ("choose", "words", "names"),
    [
        (filters.where, ["task"], "--where task"),
        (filters.where, ["=1"], "--where =1"),
        (filters.where, ["taks=digits"], ".*taks.*task"),
        (filters.where, ["task=rte"], "--where task=rte"),
        (filters.keys, "method.rnk", r".*method\.rnk.*method\.rank"),
    ],
)
def test_a_choice_without_runs_or_of_no_key_is_refused(runs, choose, words, names):
    with refusal(names):
        choose(runs, words)


def test_runs_are_averaged_over_all_that_the_keys_do_not_tell_apart(runs):
    assert filters.keys(runs, "method, method.rank") == ["method", "method.rank"]
    table = seed_groups.group(seed_groups.table(runs), ["method"])
    assert table[["method", "n"]].to_numpy().tolist() == [["lora", 1], ["partial", 7]]
    assert table["test_mean"][1] == pytest.approx(statistics.mean([0.98, 0.985, 0.9925, *[0.9861] * 4]))
    assert table["operating_point"].tolist() == ["–", "–"]  # the one has none, the other several


@pytest.mark.parametrize("key", [*filters._COLUMNS, "model.target_modules"])
def test_every_column_and_a_setting_of_many_values_can_be_grouped_by(runs, key):
    frame = seed_groups.table(runs)
    frame[key] = [filters.value_of(run, key) for run in runs]
    table = seed_groups.group(frame, [key])
    assert table["n"].sum() == len(runs)
    shown = tables.readable(table, by=[key])
    assert next(iter(shown)) == key
    assert len(shown) == frame[key].nunique()


def test_predictions_are_read_once_and_no_more_of_them_than_is_compared(tmp_path):
    file = leave(tmp_path, "lora", wrong=5) / PREDICTIONS
    frame = pd.read_parquet(file)
    frame.assign(logits=[[0.0, 1.0]] * len(frame)).to_parquet(file)
    known, group = Predictions(tmp_path), str(file.parents[1].relative_to(tmp_path))
    assert set(known.of(group, 0, "accuracy")) == {"label", "prediction"}
    assert "logits" in known.of(group, 0, "f1")
    file.unlink()
    assert len(known.of(group, 0, "accuracy")) == len(frame)
    with refusal("", PREDICTIONS):
        Predictions(tmp_path).of(group, 0, "accuracy")
    file.write_bytes(b"no parquet")
    with pytest.raises(ValueError, match=PREDICTIONS):
        Predictions(tmp_path).of(group, 0, "accuracy")


def test_seeds_are_in_the_order_of_their_numbers(tmp_path):
    for seed in (10, 9, 0):
        place(tmp_path, record(seed=seed))
    assert [run.row["seed"] for run in records.read(tmp_path)[0]] == [0, 9, 10]
