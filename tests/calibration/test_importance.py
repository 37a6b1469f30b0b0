"""Importance: leverage scores against a full SVD, the controls, and what is checked of any measure."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from partial_lora.calibration import importance
from partial_lora.errors import PartialLoraError
from partial_lora.masks import Mask

SHAPES = [(24, 24), (40, 16), (16, 40)]


def weight(shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """A weight whose spectrum falls, as that of a trained one does."""
    generator = torch.Generator().manual_seed(seed)
    left, spectrum, right = torch.linalg.svd(torch.randn(shape, generator=generator), full_matrices=False)
    return left @ torch.diag(spectrum * torch.logspace(0, -2, len(spectrum))) @ right


def leverage_scores(matrix: torch.Tensor, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The literal twin: numpy's full SVD, cut to k."""
    left, _, right = np.linalg.svd(matrix.double().numpy(), full_matrices=True)
    rows = [sum(left[i, c] ** 2 for c in range(k)) for i in range(matrix.shape[0])]
    columns = [sum(right[c, j] ** 2 for c in range(k)) for j in range(matrix.shape[1])]
    return np.array(rows), np.array(columns)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("k", [1, 5])
def test_svd_scores_are_leverage_scores(shape, k):
    matrix = weight(shape)
    rows, columns = importance.svd(matrix, k=k)
    expected_rows, expected_columns = leverage_scores(matrix, k)
    np.testing.assert_allclose(rows, expected_rows, atol=1e-9)
    np.testing.assert_allclose(columns, expected_columns, atol=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999])
def test_svd_takes_the_smallest_k_that_holds_the_energy(shape, energy):
    matrix = weight(shape)
    squares = np.linalg.svd(matrix.double().numpy(), compute_uv=False) ** 2
    k = next(k for k in range(1, len(squares) + 1) if squares[:k].sum() >= energy * squares.sum())
    rows, columns = importance.svd(matrix, energy=energy)
    assert float(rows.sum()) == pytest.approx(k)
    assert float(columns.sum()) == pytest.approx(k)


def test_all_of_the_energy_of_a_weight_of_low_rank_is_in_its_rank():
    rows, columns = importance.svd(weight((30, 5)) @ weight((5, 12)), energy=1.0)
    assert float(rows.sum()) == pytest.approx(5)
    assert float(columns.sum()) == pytest.approx(5)


def test_svd_works_below_full_rank_and_refuses_a_k_above_it():
    matrix = torch.outer(torch.arange(1.0, 7.0), torch.tensor([3.0, 0.0, 4.0]))
    rows, columns = importance.svd(matrix)
    np.testing.assert_allclose(columns, [9 / 25, 0, 16 / 25], atol=1e-12)
    assert float(rows.sum()) == pytest.approx(1)
    for k in (0, 2, 4):
        with pytest.raises(PartialLoraError, match=rf"importance.k={k}: .*blocks.0.fc \(6, 3\)"):
            importance.svd(matrix, k=k, module="blocks.0.fc")


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_weight_without_a_spectrum_is_refused(bad):
    with pytest.raises(PartialLoraError, match=r"blocks\.0\.fc"):
        importance.svd(torch.full((4, 6), bad), module="blocks.0.fc")


def test_the_scores_follow_their_rows_and_ignore_the_scale():
    matrix = weight((40, 16))
    rows, columns = importance.svd(matrix)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1))
    moved_rows, same_columns = importance.svd(1e-18 * matrix[order])
    torch.testing.assert_close(moved_rows, rows[order], atol=1e-6, rtol=0)
    torch.testing.assert_close(same_columns, columns, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [16, 400])
def test_a_weight_in_half_precision_scores_as_the_numbers_it_holds(dtype, size):
    matrix = weight((500, size)).to(dtype)
    for half, whole in zip(importance.svd(matrix, k=4), importance.svd(matrix.double(), k=4), strict=True):
        torch.testing.assert_close(half, whole, atol=1e-5, rtol=0)


def test_a_weight_of_many_rows_is_taken_in_parts():
    matrix = weight((9000, 20))
    gram = importance._lower_gram(matrix, width=7)
    torch.testing.assert_close(gram.tril(), (matrix.double().T @ matrix.double()).tril())
    left, _, right = np.linalg.svd(matrix.double().numpy(), full_matrices=False)
    rows, columns = importance.svd(matrix, k=3)
    np.testing.assert_allclose(rows, np.square(left[:, :3]).sum(1), atol=1e-12)
    np.testing.assert_allclose(columns, np.square(right[:3]).sum(0), atol=1e-9)


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
    halves = {"m": (torch.tensor([1, 2, 3]).bfloat16(), torch.ones(2).bfloat16())}  # which NumPy does not know
    rows, _ = importance.scores_of("m", matrix, halves, seed=0, options={})
    assert rows.numpy().tolist() == [1, 2, 3]
    with pytest.raises(PartialLoraError, match=r"\bm\b"):
        importance.scores_of("m", matrix, {"other": good}, seed=0, options={})
    with pytest.raises(PartialLoraError, match=r"\(3, 2\) .*m"):
        importance.scores_of("m", matrix, {"m": good[::-1]}, seed=0, options={})
    with pytest.raises(PartialLoraError, match=r"\bm\b"):
        importance.scores_of("m", matrix, {"m": (good[0] * torch.nan, good[1])}, seed=0, options={})
    with pytest.raises(PartialLoraError, match=r"^importance=snap: .*svd"):
        importance.name_of("snap")


@pytest.mark.parametrize("name", importance.NEEDS_DATA)
def test_a_measure_that_needs_data_is_not_taken_by_name_alone(name):
    with pytest.raises(PartialLoraError, match=f"^importance={name}: "):
        importance.name_of(name)


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
    with pytest.raises(PartialLoraError, match=r"\(2, 3\) .*second"):
        measured(GOOD | {"second": GOOD["first"]})
    with pytest.raises(PartialLoraError, match="second"):
        measured(GOOD | {"second": (GOOD["second"][0] / 0, GOOD["second"][1])})
    with pytest.raises(PartialLoraError, match=r"^importance=told: "):
        measured(GOOD, batches=[])


def test_scores_that_rank_nothing_are_said_in_words(caplog):
    with caplog.at_level(logging.WARNING):
        measured(GOOD)
        assert not caplog.messages
        measured(GOOD | {"second": (torch.zeros(2), torch.arange(3.0))})
    assert [message for message in caplog.messages if "importance=told" in message and "second" in message]
