"""Claims are judged by intervals, alone and among all that can be decided, and read in points where they are shares."""

from __future__ import annotations

import claims
import pandas as pd
import pytest
from claims import AS_GOOD, BETTER, FAILS, HOLDS, OPEN, WORSE
from scipy import stats

from partial_lora.report.statistics import Estimate


@pytest.mark.parametrize(
    ("low", "high", "metric", "as_good", "better"),
    [
        (0.001, 0.004, "accuracy", HOLDS, HOLDS),
        (-0.019, 0.019, "accuracy", HOLDS, FAILS),
        (-0.04, 0.021, "accuracy", OPEN, OPEN),
        (-0.04, -0.019, "accuracy", WORSE, FAILS),
        (-0.04, -0.021, "accuracy", FAILS, FAILS),
        (-0.004, -0.001, "mse", HOLDS, HOLDS),  # less is better
        (0.001, 0.004, "mse", FAILS, FAILS),
        (-0.004, 0.004, "mse", OPEN, OPEN),
    ],
)
def test_claims_are_judged_by_the_interval(low: float, high: float, metric: str, as_good: str, better: str) -> None:
    found = Estimate((low + high) / 2, (high - low) / 2 / stats.t.ppf(0.975, 6), 6)
    assert tuple(claim.judge(found, metric, (0.05, 0.05)) for claim in (AS_GOOD, BETTER)) == (as_good, better)
    for claim, said in ((AS_GOOD, as_good), (BETTER, better)):  # decided from its significance on
        assert (min(claim.significances(found, metric)) < 0.05) == (said in (HOLDS, FAILS))


def test_a_verdict_is_among_those_of_its_table_that_can_be_decided() -> None:
    def rows(*p: float) -> pd.DataFrame:
        each = [{"difference": 0.01 * stats.t.isf(one / 2, 9) - claims.MARGIN} for one in p]
        places = {"error": 0.01, "freedom": 9.0, "part": "difference", "model": "vit", "mixture": ""}
        places |= {"importance": "svd", "second": "dense", "metric": "accuracy", "tasks": 1, "task": "digits"}
        places |= {"seeds": 3, "low": 0.0, "high": 0.0}
        return pd.DataFrame(
            [places | one | {"first": str(at), "operating_point": "budget 0.13"} for at, one in enumerate(each)]
        )

    def of(numbers: pd.DataFrame) -> list[tuple[str, str, int]]:
        asked = [(first, "dense", AS_GOOD, "budget 0.13") for first in (*numbers["first"], "other")]
        made = claims.judged(numbers, *asked)
        assert (made[-1].verdict, made[-1].alone, made[-1].among) == (OPEN, OPEN, 0)  # no runs
        return [(each.alone, each.verdict, each.among) for each in made[:-1]]

    assert of(rows(0.03)) == [(HOLDS, HOLDS, 1)]
    assert of(rows(0.03, 0.04)) == [(HOLDS, OPEN, 2)] * 2
    assert of(rows(0.04, 0.02)) == [(HOLDS, HOLDS, 2)] * 2
    numbers = rows(0.03, 0.04)
    numbers.loc[1, "seeds"] = 1  # decides nothing, and is no comparison
    assert of(numbers) == [(HOLDS, HOLDS, 1), (OPEN, OPEN, 0)]
    second = [rows(p).assign(seeds=claims.FIRST_LOOK + 1) for p in (0.03, 0.02)]  # of two looks each has half
    assert [of(each)[0][:2] for each in second] == [(OPEN, OPEN), (HOLDS, HOLDS)]


def test_only_shares_are_read_in_points() -> None:
    row = {"difference": 0.0123, "low": 0.01, "high": 0.015}
    assert {claims.interval(row | {"metric": name}) for name in ("accuracy", "average")} == {"+1.23 [+1.00, +1.50]"}
    assert {claims.interval(row | {"metric": name}) for name in ("mse", "matthews")} == {"+0.0123 [+0.0100, +0.0150]"}
