"""Few-shot scores of models whose blocks are not the plain ones of a vision transformer."""

from __future__ import annotations

import pytest
import torch
from scored_models import Altered, linears
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from partial_lora.calibration.score import FewShotScore
from partial_lora.errors import PartialLoraError


def all_of_it(low, high):
    return True


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
    score = FewShotScore(blocks, examples(blocks), blocks="blocks")
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
    score = FewShotScore(model, examples(model), blocks="blocks")
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
    score, slow = FewShotScore(model, batches, blocks="bert.encoder.layer"), FewShotScore(model, batches)
    assert score(model) == slow(model)
    for name in linears(model) + [
        n for n, m in model.named_modules() if n.endswith(("query", "dense")) and "layer" in n
    ]:
        with Altered(model, name, rows=6):
            assert score.bounds(model, name, all_of_it) == (slow(model), slow(model))
