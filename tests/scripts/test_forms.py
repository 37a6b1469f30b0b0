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
