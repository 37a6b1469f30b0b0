"""The conditions that compared runs have to share: all settings but those that a method has of its own."""

from __future__ import annotations

import copy

import pytest

from partial_lora.report.records import conditions, differences, digest
from partial_lora.runs import rates

SETTINGS = {
    "task": {"name": "digits", "train_samples": 200},
    "model": {"name": "vit", "image_size": 56},
    "method": {"name": "partial", "rank": 16},
    "importance": {"name": "svd"},
    "calibration": {"threshold": 0.9, "seed": 0},
    "mask": {"granularity": "rows_columns"},
    "trainer": {"epochs": 2.0, "learning_rate": 1e-3},
    "seed": 0,
}


def of(settings: dict, precision: str = "no") -> dict:
    """The record of a run with these settings."""
    return {"config": settings, "mixed_precision": precision}


def changed(key: str, value: object) -> dict:
    settings = copy.deepcopy(SETTINGS)
    group, _, name = key.rpartition(".")
    (settings[group] if group else settings)[name] = value
    return settings


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
def test_what_a_method_has_of_its_own_is_no_condition(key: str, value: object) -> None:
    assert conditions(of(changed(key, value))) == conditions(of(SETTINGS))
    assert digest(conditions(of(changed(key, value)))) == digest(conditions(of(SETTINGS)))


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("trainer.epochs", 50.0, "trainer.epochs 50 against 2"),
        ("trainer.batch_size", 64, "trainer.batch_size 64 against 32"),
        ("trainer.max_steps", 9, "trainer.max_steps 9 against null"),
        ("task.train_samples", None, "task.train_samples null against 200"),
        ("model.image_size", 224, "model.image_size 224 against 56"),
    ],
)
def test_all_else_is_a_condition_and_named_where_it_differs(key: str, value: object, said: str) -> None:
    found = conditions(of(changed(key, value)))
    assert digest(found) != digest(conditions(of(SETTINGS)))
    assert differences(found, conditions(of(SETTINGS))) == said


def test_precision_is_a_condition_however_it_was_come_by() -> None:
    fp32 = conditions(of(SETTINGS))
    assert conditions({"config": SETTINGS}) == fp32  # a record that is older than the field
    assert conditions(of(changed("trainer.mixed_precision", "no"))) == fp32
    bf16 = conditions(of(SETTINGS, "bf16"))
    assert conditions(of(changed("trainer.mixed_precision", "bf16"), "bf16")) == bf16
    assert digest(bf16) != digest(fp32)


def test_members_of_a_mixture_are_conditions_in_their_order() -> None:
    members = {"sst2": {"name": "sst2", "mixing": "proportional"}, "a.b": {"name": "a.b", "train_samples": 5}}
    found = conditions(of(changed("task.members", members)))
    assert found["task.members"] == ["sst2", "a.b"]
    assert found["task.members.a.b.train_samples"] == 5
    assert "task.members.sst2.mixing" not in found
    turned = conditions(of(changed("task.members", dict(reversed(members.items())))))
    assert digest(turned) != digest(found)


def test_a_file_is_the_same_in_another_place_and_another_file_is_not() -> None:
    first, second, other = (
        changed("task.data_files", {"train": path})
        for path in ("../data/cifar10/train.parquet", "/mnt/cifar10/train.parquet", "/mnt/cifar100/train.parquet")
    )
    assert conditions(of(first))["task.data_files.train"] == "cifar10/train.parquet"
    assert digest(conditions(of(first))) == digest(conditions(of(second))) != digest(conditions(of(other)))
    searched = [rates.settings_of(each, None)["task.data_files.train"] for each in (first, second, other)]
    assert searched == ["cifar10/train.parquet", "cifar10/train.parquet", "cifar100/train.parquet"]


def test_of_many_differences_the_first_are_named() -> None:
    other = {f"trainer.key{number}": number for number in range(6)}
    assert differences(other, {}).endswith("trainer.key3 3 against null, 2 more")
