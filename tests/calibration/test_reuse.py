"""Passes that start at the altered block: the outputs of a full pass, without the work before that block."""

from __future__ import annotations

import random

import pytest
import torch
from scored_models import Altered, Named, called, linears, random_model, scored_draw, tiny_vit, word_batches
from torch import nn

from partial_lora.calibration.reuse import Reuse, logits_of
from partial_lora.calibration.score import FewShotScore
from partial_lora.errors import PartialLoraError

BLOCKS = {
    "vit": "vit.blocks",
    "bert": "bert.encoder.layer",
    "deberta": "deberta.encoder.layer",
    "llama": "model.layers",
}


def made(family):
    """A tiny random model, its inputs in two batches, and the linear layers of its blocks in the model's order."""
    if family == "vit":
        model = Named(tiny_vit(depth=3))
        batches = scored_draw(model, sizes=(6, 3))
    else:
        model = random_model(family, layers=3)
        batches = word_batches()
    inputs = [{name: value for name, value in batch.items() if name != "labels"} for batch in batches]
    names = [name for name in linears(model, "") if name.startswith(BLOCKS[family])]
    return model, inputs, names


def outputs(model, inputs):
    with torch.no_grad():
        return logits_of(model(**inputs))


def altered(reuse, model, inputs, batch, module):
    with torch.no_grad():
        return logits_of(reuse.altered(model, inputs, batch, module))


def in_order(names, order):
    shuffled = random.Random(1).sample(names, len(names))
    return {"forwards": names, "backwards": names[::-1], "any": shuffled}[order]


@pytest.mark.parametrize(
    ("family", "memory", "order"),
    [
        *(("vit", *each) for each in ((2**31, "any"), (2**31, "backwards"), (9000, "forwards"))),
        *((family, 9000, "any") for family in BLOCKS),
    ],
)
def test_the_outputs_are_those_of_a_full_pass_bit_for_bit(family, memory, order):
    model, inputs, names = made(family)
    reuse = Reuse(model, BLOCKS[family], memory)
    intact = [outputs(model, batch) for batch in inputs]
    changed = 0
    for name in in_order(names, order):
        for rows in (3, 8):  # what fills the store, what reads it
            with Altered(model, name, rows):
                for index in (0, 1):
                    expected = outputs(model, inputs[index])
                    assert torch.equal(altered(reuse, model, inputs[index], index, name), expected)
                    changed += not torch.equal(expected, intact[index])
                    assert reuse.bytes <= memory
    assert changed > 0.8 * 4 * len(names)
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("family", BLOCKS)
def test_only_the_block_of_the_module_and_those_after_it_run(family):
    model, inputs, names = made(family)
    reuse = Reuse(model, BLOCKS[family], 2**31)
    module = next(name for name in names if name.startswith(f"{BLOCKS[family]}.1."))
    altered(reuse, model, inputs[0], 0, module)
    with called(model) as ran:
        altered(reuse, model, inputs[0], 0, module)
    blocks = {name.removeprefix(BLOCKS[family])[1] for name in ran if name.startswith(BLOCKS[family])}
    assert blocks == {"1", "2"}
    assert reuse.ran == 2


def test_memory_holds_the_nearest_earlier_state_where_the_own_does_not_fit():
    model, inputs, _ = made("vit")
    whole, bare = Reuse(model, BLOCKS["vit"], 2**31), Reuse(model, BLOCKS["vit"], 0)
    module = "vit.blocks.2.mlp.fc2"
    for _ in range(2):
        altered(whole, model, inputs[0], 0, module)
        altered(bare, model, inputs[0], 0, module)
    assert (whole.ran, bare.ran) == (1, 3)
    assert whole.bytes > bare.bytes == 0
    large, small = (4 * 17 * 32 * len(batch["pixel_values"]) for batch in inputs)  # float32, tokens, width
    ran = []
    tight = Reuse(model, BLOCKS["vit"], large + small)
    for batch, block in ((0, 1), (0, 1), (1, 2), (1, 2), (0, 2), (0, 2)):
        altered(tight, model, inputs[batch], batch, f"vit.blocks.{block}.mlp.fc2")
        ran.append(tight.ran)
        assert tight.bytes <= large + small
    assert ran == [3 + 2, 2, 3 + 1, 1, 2, 1]  # for each block it is checked once that what enters it is all it needs
    assert tight.bytes == large + small
    tighter = Reuse(model, BLOCKS["vit"], large)
    for batch in (1, 0, 1, 0):
        altered(tighter, model, inputs[batch], batch, module)
        assert tighter.ran >= (1 if batch else 3)
    assert tighter.bytes == small


def test_going_backwards_costs_no_more_than_going_forwards():
    model, inputs, names = made("vit")
    ran = {}
    for order in ("forwards", "backwards"):
        reuse = Reuse(model, BLOCKS["vit"], 2**31)
        ran[order] = 0
        for name in in_order(names, order):
            for _ in range(2):
                altered(reuse, model, inputs[0], 0, name)
                ran[order] += reuse.ran
    assert ran["backwards"] <= ran["forwards"] < 0.75 * 2 * 3 * len(names)


@pytest.mark.parametrize(
    ("family", "order"), [("vit", "forwards"), ("vit", "backwards"), ("deberta", "forwards"), ("llama", "backwards")]
)
def test_what_depends_on_a_settled_module_is_forgotten(family, order):
    model, inputs, names = made(family)
    reuse = Reuse(model, BLOCKS[family], 2**31)
    own = {name: value.clone() for name, value in model.state_dict().items()}
    names = in_order(names, order)
    for name in names:
        weight = model.get_submodule(name).weight.data
        with Altered(model, name):
            assert torch.equal(altered(reuse, model, inputs[0], 0, name), outputs(model, inputs[0]))
        weight[:, :4] = 0
        reuse.settled(name)
        block = name.split(BLOCKS[family])[1].split(".")[1]
        for other in [other for other in names if other.startswith(f"{BLOCKS[family]}.{block}.")][:3] + names[::9]:
            with Altered(model, other):
                assert torch.equal(altered(reuse, model, inputs[0], 0, other), outputs(model, inputs[0]))
    model.load_state_dict(own)
    for name in names:
        reuse.settled(name)
    for name in names:
        with Altered(model, name):
            assert torch.equal(altered(reuse, model, inputs[0], 0, name), outputs(model, inputs[0]))


# Blocks that are not as tidy


class Block(nn.Module):
    """A norm and linear layers, in ways that differ in what they write into."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.norm = nn.LayerNorm(6)
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        h = self.norm(x)
        if self.kind == "writes into what enters":
            return x.add_(self.third(self.first(h).tanh() + self.second(h)))
        if self.kind == "writes into an output":
            a = self.first(h)
            a += self.second(h)
        else:
            a = self.first(h).relu() + self.second(h)
        return x + self.third(a)


class Blocks(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(6, 6)
        self.blocks = nn.Sequential(*(Block(kind) for _ in range(3)))
        self.head = nn.Linear(6, 3)
        if kind == "weights tied in a block":
            self.blocks[1].third.weight = self.blocks[1].first.weight
        if kind == "weights tied across blocks":
            self.blocks[2].third.weight = self.blocks[1].first.weight
        if kind == "weights tied outside":
            self.embed.weight = self.blocks[1].first.weight

    def forward(self, x):
        return self.head(self.blocks(self.embed(x)))


KINDS = ["tidy", "writes into an output", "writes into what enters"]

KINDS += ["weights tied in a block", "weights tied across blocks", "weights tied outside"]

WORDS = {"x": torch.randn(5, 4, 6, generator=torch.Generator().manual_seed(1))}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("order", ["any", "each afresh"])
def test_blocks_that_are_not_as_tidy_give_the_same(kind, order):
    model = Blocks(kind).eval()
    reuse = Reuse(model, "blocks", 2**31)
    intact = outputs(model, WORDS)
    different = set()
    names = linears(model, "")
    for name in names if order == "each afresh" else in_order(names, order):
        if order == "each afresh":
            reuse = Reuse(model, "blocks", 2**31)
        for rows in (2, 0, 4, 3, 6, 1):
            with Altered(model, name, rows):
                expected = outputs(model, WORDS)
                assert torch.equal(altered(reuse, model, WORDS, 0, name), expected)
                if not torch.equal(expected, intact):
                    different.add(name)
    assert len(different) >= 8


@pytest.mark.parametrize("kind", KINDS)
def test_no_order_of_questions_changes_an_answer(kind):
    """Modules in any order, now and then one that is altered for good."""
    model, draw = Blocks(kind).eval(), random.Random(2)
    reuse = Reuse(model, "blocks", 2**31)
    names = linears(model, "blocks")
    for step in range(150):
        name = draw.choice(names)
        for _ in range(draw.choice([1, 1, 2])):
            with Altered(model, name, draw.choice([1, 2, 3, 6])):
                assert torch.equal(altered(reuse, model, WORDS, 0, name), outputs(model, WORDS))
        if step % 6 == 5:
            settled = draw.choice(names)
            model.get_submodule(settled).weight.data.mul_(draw.choice([-1, 0.9, 1.1]))
            reuse.settled(settled)


def test_what_a_block_writes_into_is_copied_and_not_run_again():
    model, ran = Blocks("writes into what enters").eval(), []
    reuse = Reuse(model, "blocks", 2**31)
    for rows in (2, 4, 5, 5):
        with Altered(model, "blocks.1.first", rows):
            altered(reuse, model, WORDS, 0, "blocks.1.first")
        ran.append(reuse.ran)
    assert ran[-1] == 2


def test_under_inference_mode_as_well():
    model, inputs, names = made("vit")
    reuse = Reuse(model, BLOCKS["vit"], 2**31)
    with torch.inference_mode():
        for name in names[3:7]:
            for _ in range(2):
                with Altered(model, name):
                    assert torch.equal(altered(reuse, model, inputs[0], 0, name), outputs(model, inputs[0]))


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


def examples(model, count=24):
    x = torch.randn(count, 6, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        labels = model(x).argmax(-1)
    return [{"x": part, "labels": label} for part, label in zip(x.split(8), labels.split(8), strict=True)]


@pytest.mark.parametrize(
    ("model", "reason"),
    [(PassedBy(), "depends on more than what leaves block 1"), (PassedBy(times=2), "block 1 ran 2 times")],
)
def test_blocks_that_are_no_plain_sequence_are_refused(model, reason):
    score = FewShotScore(model, examples(model), blocks="blocks")
    score(model)
    with pytest.raises(PartialLoraError, match=rf"^model\.blocks=blocks: .*{reason}"):
        score.bounds(model, "blocks.2", lambda low, high: True)
