from __future__ import annotations

import inspect
import logging

import pytest
import torch

from partial_lora.calibration import importance
from partial_lora.errors import PartialLoraError
from partial_lora.masks import Mask


def test_magnitude_is_the_squared_norm():
    rows, columns = importance.magnitude(torch.tensor([[1.0, 2.0], [0.0, -3.0]]))
    assert rows.tolist() == [5, 9]
    assert columns.tolist() == [1, 13]


@pytest.mark.parametrize("sparsity", [0.05, 0.5, 0.95])
def test_random_importance_keeps_what_a_random_mask_keeps(sparsity):
    rows, columns = importance.random(torch.zeros(60, 31), module="blocks.1.fc", seed=3)
    for axis, scores in (("rows", rows), ("columns", columns)):
        drawn = Mask.random(len(scores), sparsity, mask_seed=3, module="blocks.1.fc", axis=axis)
        assert Mask.top(scores.numpy(), sparsity) == drawn


def test_random_importance_differs_between_seeds_modules_and_axes():
    square = torch.zeros(20, 20)
    one, other = importance.random(square, module="a", seed=0)
    assert not torch.equal(one, other)
    assert not torch.equal(one, importance.random(square, module="a", seed=1)[0])
    assert not torch.equal(one, importance.random(square, module="b", seed=0)[0])
    assert torch.equal(one, importance.random(square, module="a", seed=0)[0])


def test_measures_leave_the_weight_alone():
    matrix = torch.nn.Parameter(torch.randn(8, 6, generator=torch.Generator().manual_seed(0)))
    before = matrix.detach().clone()
    for measure in importance.MEASURES.values():
        rows, columns = measure(matrix, module="m", seed=0)
        assert (rows.shape, columns.shape) == ((8,), (6,))
        assert not rows.requires_grad
    assert torch.equal(matrix, before)


def test_scores_may_be_given_and_are_checked():
    matrix, good = torch.zeros(3, 2), (torch.ones(3), torch.ones(2))
    rows, columns = importance.scores_of("m", matrix, {"m": ([1, 2, 3], [1, 2])}, seed=0, options={})
    assert (rows.tolist(), columns.tolist()) == ([1, 2, 3], [1, 2])
    with pytest.raises(PartialLoraError, match="m, found none"):
        importance.scores_of("m", matrix, {"other": good}, seed=0, options={})
    with pytest.raises(PartialLoraError, match=r"\(3, 2\) rows and columns of m"):
        importance.scores_of("m", matrix, {"m": good[::-1]}, seed=0, options={})
    with pytest.raises(PartialLoraError, match="m are not finite"):
        importance.scores_of("m", matrix, {"m": (good[0] * torch.nan, good[1])}, seed=0, options={})
    with pytest.raises(PartialLoraError, match="importance=snap: expected one of svd, magnitude, random"):
        importance.name_of("snap")


@pytest.mark.parametrize("name", importance.NEEDS_DATA)
def test_a_measure_that_needs_data_is_not_taken_by_name_alone(name):
    with pytest.raises(PartialLoraError, match=f"importance={name}: needs examples"):
        importance.name_of(name)


def test_the_options_of_every_measure_are_those_it_takes():
    measures = importance.MEASURES | importance.NEEDS_DATA
    assert importance.OPTIONS.keys() == measures.keys()
    shared = {"weight", "module", "model", "modules", "batches", "loss", "seed"}
    for name, measure in measures.items():
        assert set(inspect.signature(measure).parameters) - shared == set(importance.OPTIONS[name])


def measured(scores, **changes):
    """data_scores of a measure that says `scores`, on two modules that no batch matters to."""
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 2))
    modules = {"first": model[0], "second": model[1]}
    arguments = {"batches": [{"labels": torch.zeros(1)}], "seed": 0, "options": {"depth": 1}} | changes
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(importance.NEEDS_DATA, "told", lambda *_, **given: scores)
        return importance.data_scores("told", model, modules, **arguments)


GOOD = {"first": (torch.arange(3.0), torch.arange(2.0)), "second": (torch.arange(2.0), torch.arange(3.0))}


def test_data_scores_are_checked_by_module():
    assert measured(GOOD)["second"][1].tolist() == [0, 1, 2]
    with pytest.raises(PartialLoraError, match=r"\(2, 3\) rows and columns of second"):
        measured(GOOD | {"second": GOOD["first"]})
    with pytest.raises(PartialLoraError, match="second are not finite"):
        measured(GOOD | {"second": (GOOD["second"][0] / 0, GOOD["second"][1])})
    with pytest.raises(PartialLoraError, match="importance=told: the fit draw is empty"):
        measured(GOOD, batches=[])
    with pytest.raises(PartialLoraError, match="importance=svd: expected one of snip, imp, activation"):
        importance.data_scores("svd", torch.nn.Identity(), {}, [{}], seed=0)


def test_scores_that_rank_nothing_are_said_in_words(caplog):
    with caplog.at_level(logging.WARNING):
        measured(GOOD)
        assert not caplog.messages
        measured(GOOD | {"second": (torch.zeros(2), torch.arange(3.0))})
    assert [message for message in caplog.messages if "importance=told" in message and "second" in message]
