from __future__ import annotations

import random

import pytest
import torch
from scored_models import Altered, full_accuracy, linears

from partial_lora.calibration.score import BoundedScore, FewShotScore
from partial_lora.errors import PartialLoraError

BLOCKS = "vit.blocks"


def all_of_it(low, high):
    return True


@pytest.mark.parametrize("order", ["as in the model", "backwards", "any"])
def test_reuse_gives_what_a_full_pass_gives(model, batches, order):
    score = FewShotScore(model, batches, blocks=BLOCKS)
    assert score(model) == full_accuracy(model, batches)
    names = linears(model)
    if order == "backwards":
        names.reverse()
    if order == "any":
        random.Random(0).shuffle(names)
    found = set()
    for name in names:
        with Altered(model, name):
            low, high = score.bounds(model, name, all_of_it)
            assert low == high == full_accuracy(model, batches)
            found.add(low)
        with Altered(model, name, rows=20):
            assert score.bounds(model, name, all_of_it)[0] == full_accuracy(model, batches)
    assert score(model) == full_accuracy(model, batches)
    assert len(found) > 3  # the alterations do something


def test_the_logits_are_those_of_a_full_pass_bit_for_bit(model, batches):
    score = FewShotScore(model, batches, blocks=BLOCKS)
    score(model)
    for name in linears(model):
        with Altered(model, name), torch.no_grad():
            for index, batch in enumerate(score._batches):
                expected = model(batch["pixel_values"])
                for _ in range(3):  # what fills the store, what reads it
                    assert torch.equal(score._logits(model, index, name), expected)


def test_a_model_that_is_no_sequence_of_blocks_is_one(model, batches):
    score = FewShotScore(model, batches)
    score(model)
    rows = sum(len(batch["labels"]) for batch in batches)
    assert (score.evaluations.blocks, score.evaluations.sample_blocks) == (
        2 * len(batches),
        2 * rows,
    )  # 1 puts in order


def test_blocks_before_the_altered_one_do_not_run(model, batches):
    score = FewShotScore(model, batches, blocks=BLOCKS)
    score(model)
    ran = []
    for position, block in enumerate(model.vit.blocks):
        block.norm1.register_forward_hook(lambda *_, position=position: ran.append(position))
    score.bounds(model, "vit.blocks.2.mlp.fc1", all_of_it)  # fills
    ran.clear()
    before = score.evaluations.blocks
    score.bounds(model, "vit.blocks.2.mlp.fc2", all_of_it)
    assert set(ran) == {2}
    assert score.evaluations.blocks - before == len(batches)
    ran.clear()
    score.bounds(model, "vit.head", all_of_it)  # in no block: nothing is known to be unchanged
    assert set(ran) == {0, 1, 2}


def test_it_stops_once_the_question_is_decided(model, batches):
    score = FewShotScore(model, batches, blocks=BLOCKS)
    baseline = score(model)
    for asked in (0.3, 0.6, baseline, 0.95):
        for name in linears(model):
            with Altered(model, name):
                before = score.evaluations.examples
                low, high = score.bounds(model, name, lambda low, high, asked=asked: low < asked <= high)
                exact = full_accuracy(model, batches)
            assert low <= exact <= high
            assert (low >= asked) == (exact >= asked)
            assert (low >= asked) or (high < asked)
            if high - low > 0.3:
                assert score.evaluations.examples - before < score.size
    before = score.evaluations.examples
    assert score.bounds(model, "vit.blocks.0.mlp.fc1", lambda low, high: False) == (0, 1)
    assert score.evaluations.examples == before


def test_it_goes_on_where_it_stopped(model, batches):
    score = FewShotScore(model, batches, blocks=BLOCKS)
    score(model)
    name = "vit.blocks.1.attn.qkv"
    with Altered(model, name):
        exact = score.bounds(model, name, all_of_it)
        before = score.evaluations.examples
        known = None
        for width in (0.7, 0.4, 0.0):
            known = score.bounds(model, name, lambda low, high, width=width: high - low > width, known)
            assert known[1] - known[0] <= width
        assert known == exact
        assert score.evaluations.examples - before == score.size


def test_the_surest_come_first_and_what_is_wrong_anyway_last(model, batches):
    score = FewShotScore(model, batches, blocks=BLOCKS)
    score(model)
    assert [len(batch["labels"]) for batch in score._batches] == [len(batch["labels"]) for batch in batches]
    with torch.no_grad():
        images = torch.cat([batch["pixel_values"] for batch in score._batches])
        labels = torch.cat([batch["labels"] for batch in score._batches])
        logits = model(images)
    own = logits.gather(1, labels[:, None]).squeeze(1)
    margins = own - logits.scatter(1, labels[:, None], -torch.inf).max(1).values
    assert (margins.diff() < 1e-4).all()
    assert margins[0] > 0 > margins[-1]
    same = {tuple(image.flatten()[:4].tolist()) for batch in batches for image in batch["pixel_values"]}
    assert {tuple(image.flatten()[:4].tolist()) for image in images} == same


def test_the_model_comes_back_as_it_was(model, batches):
    model.train()
    model.vit.blocks[1].eval()
    flags = {name: module.training for name, module in model.named_modules()}
    score = FewShotScore(model, batches, blocks=BLOCKS)
    score(model)
    score.bounds(model, "vit.blocks.2.mlp.fc1", all_of_it)

    def broken(low, high):
        if low > 0:
            raise RuntimeError("in the middle")
        return True

    with pytest.raises(RuntimeError, match="in the middle"):
        score.bounds(model, "vit.blocks.2.mlp.fc1", broken)
    handle = model.vit.blocks[2].mlp.fc2.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        score.bounds(model, "vit.blocks.2.mlp.fc1", all_of_it)
    handle.remove()
    assert {name: module.training for name, module in model.named_modules()} == flags
    for block in model.vit.blocks:
        assert "forward" not in vars(block)
        assert not block._forward_hooks


def test_a_forward_of_its_own_is_put_back(model, batches):
    block = model.vit.blocks[0]
    own = block.forward
    block.forward = lambda x: own(x)  # what accelerate's hooks do
    replaced = block.forward
    score = FewShotScore(model, batches, blocks=BLOCKS)
    score(model)
    for _ in range(2):
        score.bounds(model, "vit.blocks.1.mlp.fc1", all_of_it)
    assert block.forward is replaced


def test_a_score_that_is_no_number_says_so(model, batches):
    score = FewShotScore(model, batches, blocks=BLOCKS)
    with torch.no_grad():
        model.vit.blocks[1].mlp.fc1.weight[0, 0] = torch.inf
    assert not score.bounds(model, "vit.blocks.1.mlp.fc1", all_of_it)[0] >= 0


def test_bad_arguments_are_named(model, batches):
    with pytest.raises(PartialLoraError, match=r"model.blocks=vit.layers: no such module"):
        FewShotScore(model, batches, blocks="vit.layers")
    with pytest.raises(
        PartialLoraError, match=r"model.blocks=vit.head: expected a ModuleList or Sequential, found Linear"
    ):
        FewShotScore(model, batches, blocks="vit.head")
    with pytest.raises(PartialLoraError, match="scored draw is empty"):
        FewShotScore(model, [])


def test_only_a_score_with_bounds_is_a_bounded_score(model, batches):
    assert isinstance(FewShotScore(model, batches), BoundedScore)
    assert not isinstance(lambda model: 1.0, BoundedScore)
