"""The table of the forms of mask: names of forms, best rates and differences of paired seeds."""

from __future__ import annotations

import forms
import pandas as pd
import pytest


def runs(form: str, scores: dict[tuple[float, int], tuple[float, float, float]]) -> list[dict]:
    """Rows of one form. scores: validation, loss and test by learning rate and seed."""
    common = {"task": "digits", "size": "0.13", "form": form, "parameters": 10, "step_seconds": 1.0, "saved_bytes": 1.0}
    return [
        common | {"learning_rate": rate, "seed": seed, "validation": validation, "loss": loss, "test": test}
        for (rate, seed), (validation, loss, test) in scores.items()
    ]


def test_the_best_rate_is_chosen_over_the_seeds_that_all_rates_have_and_by_loss_between_equals() -> None:
    scores = {(1e-3, 0): (0.8, 1.0, 0.1), (2e-3, 0): (0.9, 2.0, 0.2), (4e-3, 0): (0.9, 1.0, 0.3)}
    table = pd.DataFrame(runs("partial", scores | {(4e-3, 1): (0.0, 9.0, 0.5)}))  # no other rate has seed 1
    chosen = forms.at_best_rates(table)
    assert set(chosen["learning_rate"]) == {4e-3}
    assert list(chosen["test"]) == [0.3, 0.5]
    assert set(chosen["edge"]) == {True}


def test_a_difference_is_of_runs_of_the_same_seeds() -> None:
    own = {(1e-3, 0): (0.9, 1.0, 0.5), (1e-3, 1): (0.9, 1.0, 0.7), (1e-3, 2): (0.9, 1.0, 0.0)}
    other = {(2e-3, 0): (0.9, 1.0, 0.4), (2e-3, 1): (0.9, 1.0, 0.5)}
    chosen = pd.DataFrame(runs("partial", own) + runs("low_rank", other)).assign(rates=1, edge=False)
    row = forms.compared(chosen, "low_rank").set_index("form").loc["partial"]
    assert (row["difference"], row["paired"], row["seeds"]) == (pytest.approx(0.15), 2, 3)
    assert row["difference_half"] == pytest.approx(12.7062 * 0.05, rel=1e-4)  # Student's t of one degree of freedom


@pytest.mark.parametrize(
    ("mask", "method", "name"),
    [
        ({"granularity": "rows_columns", "columns": "masked", "fan_in": "dense"}, {"name": "partial"}, "partial"),
        ({"fan_in": "kept", "row_exponent": 1.0}, {"name": "partial", "ranks": "auto"}, "partial rank=auto kept p^-1"),
        ({"granularity": "units", "fan_in": "kept"}, {"name": "partial"}, "partial units kept"),
        ({"granularity": "element"}, {"name": "entries"}, "entries"),
        ({"row_exponent": 1.0, "column_exponent": 0.5}, {"name": "ticket"}, "ticket p^-1 q^-0.5"),
    ],
)
def test_what_differs_between_forms_is_in_their_names(mask: dict, method: dict, name: str) -> None:
    assert forms.form_of({"mask": mask, "method": method}) == name
