"""The best learning rates of forms, by size."""

import forms
import pandas as pd


def test_best_rates_stand_by_size_with_their_steps_from_dense_loras() -> None:
    rates = [
        ("digits", "own", "lora", 1e-3),
        ("digits", "0.13", "partial", 1e-3),
        ("digits", "0.02", "partial", 5e-4),
        ("digits", "0.13", "entries", 4e-3),
        ("digits", "own", "lora on attn.qkv", 2e-3),
        ("digits", "20,000", "partial", 2e-3),
        ("trec", "0.13", "partial", 2e-3),  # no dense LoRA there
    ]
    numbers = pd.DataFrame(rates, columns=["task", "size", "form", "learning_rate"])
    lines = forms.best_rates(numbers).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[0] == ["task", "form", "100 %", "13 %", "2 %"]
    assert cells[2:] == [
        ["digits", "entries", "–", "0.004 (+2)", "–"],
        ["digits", "lora", "0.001", "–", "–"],
        ["digits", "partial", "–", "0.001", "0.0005 (-1)"],
    ]
    assert forms.best_rates(numbers[numbers["form"] != "lora"]) is None


def test_every_form_stands_in_the_column_of_its_verdict() -> None:
    rows = [
        ("oft", "accuracy", 0.12, 0.001, True),
        ("hira", "accuracy", 0.09, 0.04, False),
        ("entries", "accuracy", 0.01, 0.5, False),
        ("dora", "accuracy", -0.05, 0.01, False),
        ("partial", "accuracy", -0.1, 0.001, True),
        ("low_rank", "accuracy", float("nan"), float("nan"), False),
    ]
    columns = ["form", "metric", "difference", "p", "holds"]
    higher = pd.DataFrame(rows, columns=columns).assign(task="digits", size="0.13")
    lower = higher.assign(task="prices", metric="mse")
    lines = forms.verdicts(pd.concat([higher, lower])).splitlines()
    names = [[cell.strip().split(" ")[0] for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [each[2:] for each in names] == [
        ["oft", "hira", "entries", "dora", "partial"],
        ["partial", "dora", "entries", "hira", "oft"],
    ]
