"""The cost that is announced before a calibration starts."""

from __future__ import annotations

import re

import pytest
from scored_models import TARGETS, Counted

from partial_lora import calibrate
from partial_lora.estimate import duration, passes_at_most, timed_pass
from partial_lora.scoring import Evaluations


def test_passes_are_counted_by_hand():
    assert passes_at_most(48, 2, 19, search="scan") == 48 * 2 * 19 + 1
    assert passes_at_most(48, 1, 19, search="bisect") == 48 * 5 + 1
    assert [passes_at_most(1, 1, levels, search="bisect") - 1 for levels in (1, 3, 4, 7, 8)] == [1, 2, 3, 3, 4]


def test_durations_are_said_as_one_says_them():
    said = [duration(seconds) for seconds in (0.2, 40, 89, 91, 179, 5000, 9000)]
    assert said == ["1 s", "40 s", "89 s", "2 min", "3 min", "83 min", "2.5 h"]


@pytest.mark.parametrize("search", ["scan", "bisect"])
@pytest.mark.parametrize("more", [{}, {"axes": "joint"}, {"scope": "cumulative"}, {"repair": True}, {"budget": 0.4}])
def test_the_estimate_is_said_once_and_is_never_too_low(model, batches, tmp_path, search, more):
    said, score = [], Counted(batches)
    score.size = 37
    kind = {"target_modules": TARGETS, "levels": 0.2, "search": search, "threshold": 0.8, "say": said.append}
    store = tmp_path / "curves.json"
    found = calibrate(model, score, store=store, **kind, **more)
    (words,) = said
    axes = "rows and columns together" if "axes" in more else "2 axes"
    match = re.fullmatch(
        rf"calibration: 6 modules, {axes}, 4 levels: at most (\d+) passes over 37 examples, "
        r"no more than about \d+ (s|min) by the time of the first",
        words,
    )
    assert match
    assert found.evaluations <= int(match[1]) + 1  # and the baseline, which is over by then
    assert calibrate(model, score, store=store, **kind, **more).cached
    assert len(said) == 1


def test_without_a_size_no_examples_are_mentioned(model):
    said = []
    calibrate(model, lambda model: 1.0, target_modules=["mlp.fc2"], levels=0.4, say=said.append)
    assert "at most 13 passes, no more than about" in said[0]
    calibrate(model, lambda model: 1.0, target_modules=["mlp.fc2"], levels=0.4, say=said.append, budget=0.9)
    assert "for each threshold" not in said[1]
    kind = {"scope": "cumulative", "budget": 0.9}
    calibrate(model, lambda model: 1.0, target_modules=["mlp.fc2"], levels=0.4, say=said.append, **kind)
    assert "at most 13 passes for each threshold tried, no more than about" in said[2]


def test_a_score_that_takes_several_passes_at_first_is_timed_by_the_examples(monkeypatch):
    class Slow:
        size, evaluations = 10, Evaluations()

    def twice():
        Slow.evaluations.examples += 20
        return 0.5

    clock = iter([100.0, 106.0])
    monkeypatch.setattr("partial_lora.estimate.time.perf_counter", lambda: next(clock))
    assert timed_pass(Slow, twice) == (0.5, 3.0)
