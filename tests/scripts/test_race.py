"""The best learning rates of forms, by size."""

import claims
import pandas as pd
import pytest
import race
from recorded_runs import leave
from scipy.stats import ttest_rel

from partial_lora.report import ranking, records


def test_best_rates_stand_by_size_with_their_steps_from_dense_loras() -> None:
    rates = [
        ("digits", "own", "dense", 1e-3),
        ("digits", "0.13", "partial", 1e-3),
        ("digits", "0.02", "partial", 5e-4),
        ("digits", "0.13", "entries", 4e-3),
        ("digits", "own", "lora on attn.qkv", 2e-3),
        ("digits", "20,000", "partial", 2e-3),
        ("trec", "0.13", "partial", 2e-3),  # no dense LoRA there
    ]
    numbers = pd.DataFrame(rates, columns=["task", "size", "form", "learning_rate"])
    lines = race.best_rates(numbers).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["task", "form", "100 %", "13 %", "2 %"]
    assert cells[2:] == [
        ["digits", "dense", "0.001", "–", "–"],
        ["digits", "entries", "–", "0.004 (+2)", "–"],
        ["digits", "partial", "–", "0.001", "0.0005 (-1)"],
    ]
    assert race.best_rates(numbers[numbers["form"] != "dense"]) is None


def test_every_form_stands_in_the_column_of_its_verdict() -> None:
    rows = [
        ("oft", "accuracy", 0.12, 0.001, True),
        ("hira", "accuracy", 0.09, 0.04, False),
        ("entries", "accuracy", 0.01, 0.5, False),
        ("dora", "accuracy", -0.05, 0.01, False),
        ("partial", "accuracy", -0.1, 0.001, True),
        ("lora", "accuracy", float("nan"), float("nan"), False),
    ]
    columns = ["form", "metric", "difference", "p", "holds"]
    higher = pd.DataFrame(rows, columns=columns).assign(task="digits", size="0.13")
    lower = higher.assign(task="prices", metric="mse")
    lines = claims.in_one_table(pd.concat([higher, lower])).splitlines()
    names = [[cell.strip().split(" ")[0] for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [each[2:] for each in names] == [
        ["oft", "hira", "entries", "dora", "partial"],
        ["partial", "dora", "entries", "hira", "oft"],
    ]


def test_test_loss_is_compared_over_the_seeds_that_both_have_as_scipys_t_test_does(tmp_path) -> None:
    losses = {"lora": [0.50, 0.52, 0.55, 0.51], "lokr": [0.41, 0.44, 0.45, 0.42], "oft": [0.6, 0.4, 0.7]}
    for method, of_method in losses.items():
        for seed, loss in enumerate(of_method):
            scores = {"primary": "accuracy", "accuracy": 0.9, "loss": loss}
            leave(tmp_path, method, 0.9, seed=seed, budget=0.13, metrics={"validation": scores, "test": scores})
    chosen = ranking.at_best_rates(ranking.rows_of(records.read(tmp_path)[0]))
    found = claims.by_loss(chosen, "lora").set_index("form")
    expected = ttest_rel(losses["lokr"], losses["lora"])
    assert found.loc["lokr", "difference"] == pytest.approx(-0.09)
    assert found.loc["lokr", "p"] == pytest.approx(expected.pvalue)
    assert found.loc["lokr", "half"] == pytest.approx(-0.09 - expected.confidence_interval().low)
    assert found["holds"].to_dict() == {"lokr": True, "oft": False}
    assert found.loc["oft", "seeds"] == 3
    cells = [cell.strip() for cell in claims.in_one_table(found.reset_index()).splitlines()[-1].split("|")]
    assert cells[3] == "lokr -0.09"  # a lower loss is better
