"""The certificate of a comparison: the scores beside it say the same, and what was changed since is found."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from recorded_runs import record
from refusals import refusal

from partial_lora import cli
from partial_lora.files import read_json, write_json
from partial_lora.report import certificate
from partial_lora.report.forgetting import LESS, MORE, Changes
from partial_lora.report.sequential import decide

CHANCES = {"a": 0.9, "b": 0.88, "c": 0.5}
FORGOTTEN = {"a": 0.5, "b": 0.1}


@pytest.fixture
def take(tmp_path):
    generator = np.random.default_rng(0)
    outputs = {
        name: {seed: (generator.uniform(size=120) < chance).astype(float) for seed in range(3)}
        for name, chance in CHANCES.items()
    }
    changes = {
        name: {seed: shift + 0.1 * generator.normal(size=40) for seed in range(3)} for name, shift in FORGOTTEN.items()
    }
    folder = tmp_path / "take"
    folder.mkdir()
    certificate.write(
        folder,
        outputs,
        decide(outputs, 0.02, (2, 3, 5, 8)),
        metric="accuracy",
        margin=0.02,
        looks=(2, 3, 5, 8),
        settings={name: record(name)["config"] for name in CHANCES},
        verdict=["Take a."],
        forgotten={"piqa": Changes("loss", 3.7, changes)},
    )
    return folder


def rewrite(take, **changes) -> None:
    """Change what a certificate says, its digest, too, as who knows how it is made would."""
    content = {key: value for key, value in (read_json(take / "verdict.json") | changes).items() if key != "digest"}
    write_json(take / "verdict.json", content | {"digest": certificate._digest(content)})


def test_what_was_decided_is_derived_again(take, capsys):
    assert certificate.found_wrong(take / "verdict.json") == []
    assert cli.compare([str(take / "verdict.json"), "--verify"]) == 0
    table = pd.read_parquet(take / "scores.parquet").sample(frac=1, random_state=1)
    table.to_parquet(take / "scores.parquet")
    assert certificate.found_wrong(take / "verdict.json") == []  # in another order they are the same scores


@pytest.mark.parametrize("of_set", ["", "piqa"])
def test_a_changed_row_is_found(take, of_set):
    table = pd.read_parquet(take / "scores.parquet")
    table["values"] = [
        np.where(np.arange(len(one)) == 7, 1 - one, one) if name == of_set else one
        for name, one in zip(table["set"], table["values"], strict=True)
    ]
    table.to_parquet(take / "scores.parquet")
    assert any("scores.parquet" in line for line in certificate.found_wrong(take / "verdict.json"))
    assert cli.compare([str(take / "verdict.json"), "--verify"]) == 1


@pytest.mark.parametrize("key", ["margin", "verdict", "versions", "settings", "looks"])
def test_a_changed_word_or_number_is_found(take, key):
    content = read_json(take / "verdict.json")
    write_json(take / "verdict.json", content | {key: {"margin": 0.021, "looks": [2, 3, 5, 9]}.get(key, ["another"])})
    assert certificate.found_wrong(take / "verdict.json")


def test_a_verdict_that_its_scores_do_not_give_is_found_whoever_sealed_it(take):
    content = read_json(take / "verdict.json")
    decisions = content["decisions"]
    worse = next(name for name, decision in decisions.items() if decision["verdict"] == "worse")
    piqa = content["forgetting"]["piqa"]
    methods = piqa["methods"]
    (told,) = (name for name, change in methods.items() if change["verdict"] in (LESS, MORE))
    for changes in (
        {"forgetting": {"piqa": piqa | {"methods": methods | {told: methods[told] | {"less": 0.3}}}}},
        {"decisions": decisions | {worse: decisions[worse] | {"difference": 0.1}}},
        {"decisions": decisions | {worse: decisions[worse] | {"verdict": "as good"}}},
        {"leader": worse},
    ):
        rewrite(take, **content | changes)
        assert len(certificate.found_wrong(take / "verdict.json")) == 1, changes


def test_a_file_that_is_no_certificate_is_refused(take):
    (take / "scores.parquet").unlink()
    with refusal(str(take / "verdict.json")):
        certificate.found_wrong(take / "verdict.json")
    with refusal("--verify"):
        cli.compare(["--verify"])


def test_the_run_that_has_won_finds_its_certificate_whatever_its_seed(take):
    content = read_json(take / "verdict.json")
    of_seed = [record(content["leader"], seed=seed)["config"] for seed in (0, 3)]
    assert [certificate.of_run(take.parent, config)[0] for config in of_seed] == [take / "verdict.json"] * 2
    other = record(content["leader"], trainer__epochs=9)["config"]
    assert certificate.of_run(take.parent, other) is None
