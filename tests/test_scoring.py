from __future__ import annotations

import random

import pytest
import torch
from scored_models import Named, full_accuracy, scored_draw, tiny_vit
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from partial_lora.errors import PartialLoraError
from partial_lora.scoring import BoundedScore, FewShotAccuracy

BLOCKS = "vit.blocks"


@pytest.fixture
def model():
    return Named(tiny_vit())


@pytest.fixture
def batches(model):
    return scored_draw(model)


def linears(model):
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and "blocks" in name]


def all_of_it(low, high):
    return True


class Altered:
    """One module with a few of its rows zeroed, for as long as the block lasts."""

    def __init__(self, model, name, rows=8):
        self.weight, self.rows = model.get_submodule(name).weight.data, rows

    def __enter__(self):
        self.own = self.weight.clone()
        self.weight[: self.rows] = 0

    def __exit__(self, *exception):
        self.weight.copy_(self.own)


@pytest.mark.parametrize("order", ["as in the model", "backwards", "any"])
def test_reuse_gives_what_a_full_pass_gives(model, batches, order):
    score = FewShotAccuracy(model, batches, BLOCKS)
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
    score = FewShotAccuracy(model, batches, BLOCKS)
    score(model)
    for name in linears(model):
        with Altered(model, name), torch.no_grad():
            block = score._block_of(name)
            for index, batch in enumerate(score._batches):
                expected = model(batch["pixel_values"])
                for _ in range(2):  # what fills the store, then what reads it
                    assert torch.equal(score._logits(model, index, block), expected)


def test_blocks_before_the_altered_one_do_not_run(model, batches):
    score = FewShotAccuracy(model, batches, BLOCKS)
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
    score = FewShotAccuracy(model, batches, BLOCKS)
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
    score = FewShotAccuracy(model, batches, BLOCKS)
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


def test_the_least_sure_come_first_and_what_is_wrong_anyway_last(model, batches):
    score = FewShotAccuracy(model, batches, BLOCKS)
    score(model)
    assert [len(batch["labels"]) for batch in score._batches] == [len(batch["labels"]) for batch in batches]
    with torch.no_grad():
        images = torch.cat([batch["pixel_values"] for batch in score._batches])
        labels = torch.cat([batch["labels"] for batch in score._batches])
        logits = model(images)
    own = logits.gather(1, labels[:, None]).squeeze(1)
    margins = own - logits.scatter(1, labels[:, None], -torch.inf).max(1).values
    right = int((margins > 0).sum())
    assert (margins[:right] > 0).all()
    assert (margins[right:] <= 0).all()
    assert (margins[:right].diff() > -1e-4).all()
    same = {tuple(image.flatten()[:4].tolist()) for batch in batches for image in batch["pixel_values"]}
    assert {tuple(image.flatten()[:4].tolist()) for image in images} == same


def test_the_model_comes_back_as_it_was(model, batches):
    model.train()
    model.vit.blocks[1].eval()
    flags = {name: module.training for name, module in model.named_modules()}
    score = FewShotAccuracy(model, batches, BLOCKS)
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
    score = FewShotAccuracy(model, batches, BLOCKS)
    score(model)
    for _ in range(2):
        score.bounds(model, "vit.blocks.1.mlp.fc1", all_of_it)
    assert block.forward is replaced


class PassedBy(nn.Module):
    """Residual paths that pass the blocks by, and blocks that run more than once."""

    def __init__(self, times: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))
        self.head = nn.Linear(6, 3)
        self.times = times

    def forward(self, x):
        for block in self.blocks:
            for _ in range(self.times):
                x = x + block(x).tanh()
        return self.head(x)


class Overwriting(nn.Module):
    """A block that writes into what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 6)

    def forward(self, x):
        return x.add_(self.linear(x).tanh())


def examples(model, count=24):
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        labels = model(x).argmax(-1)
    return [{"x": part, "labels": label} for part, label in zip(x.split(8), labels.split(8), strict=True)]


def test_blocks_may_write_into_what_they_are_given():
    torch.manual_seed(0)
    blocks = nn.ModuleDict({"blocks": nn.Sequential(*(Overwriting() for _ in range(4)), nn.Linear(6, 3))})
    blocks.forward = lambda x: blocks["blocks"](x.clone())
    score = FewShotAccuracy(blocks, examples(blocks), "blocks")
    assert score(blocks) == 1
    for name in ("blocks.1.linear", "blocks.3.linear", "blocks.3.linear"):
        with Altered(blocks, name, rows=4):
            assert score.bounds(blocks, name, all_of_it) == (score(blocks), score(blocks))
            assert score(blocks) < 1


@pytest.mark.parametrize(
    ("model", "reason"),
    [(PassedBy(), "depends on more than what leaves block 1"), (PassedBy(times=2), "block 1 ran 2 times")],
)
def test_blocks_that_are_no_plain_sequence_are_refused(model, reason):
    score = FewShotAccuracy(model, examples(model), "blocks")
    score(model)
    with pytest.raises(PartialLoraError, match=rf"model.blocks=blocks: .*{reason}.*; set it to null"):
        score.bounds(model, "blocks.2", all_of_it)


def test_a_language_model_with_padded_batches():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, num_labels=3
    )
    config.initializer_range = 0.5
    model = BertForSequenceClassification(config).eval()
    batches = []
    for length in (5, 9):
        words = torch.randint(1, 50, (6, length))
        mask = torch.ones_like(words)
        mask[0, 3:] = 0
        batches.append({"input_ids": words, "attention_mask": mask, "labels": torch.arange(6) % 3})
    score, slow = FewShotAccuracy(model, batches, "bert.encoder.layer"), FewShotAccuracy(model, batches)
    assert score(model) == slow(model)
    for name in linears(model) + [
        n for n, m in model.named_modules() if n.endswith(("query", "dense")) and "layer" in n
    ]:
        with Altered(model, name, rows=6):
            assert score.bounds(model, name, all_of_it) == (slow(model), slow(model))


def test_a_score_that_is_no_number_says_so(model, batches):
    score = FewShotAccuracy(model, batches, BLOCKS)
    with torch.no_grad():
        model.vit.blocks[1].mlp.fc1.weight[0, 0] = torch.inf
    assert not score.bounds(model, "vit.blocks.1.mlp.fc1", all_of_it)[0] >= 0


def test_bad_arguments_are_named(model, batches):
    with pytest.raises(PartialLoraError, match=r"model.blocks=vit.layers: no such module"):
        FewShotAccuracy(model, batches, "vit.layers")
    with pytest.raises(
        PartialLoraError, match=r"model.blocks=vit.head: expected a ModuleList or Sequential, found Linear"
    ):
        FewShotAccuracy(model, batches, "vit.head")
    with pytest.raises(PartialLoraError, match="scored draw is empty"):
        FewShotAccuracy(model, [])


def test_only_a_score_with_bounds_is_a_bounded_score(model, batches):
    assert isinstance(FewShotAccuracy(model, batches), BoundedScore)
    assert not isinstance(lambda model: 1.0, BoundedScore)
