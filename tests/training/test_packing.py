"""Packed texts: losses and gradients are those of texts that have a row each, and models that mix them are refused."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import transformers
from datasets import Dataset
from judged_tasks import TOKENIZER, trained
from refusals import refusal
from tiny_causal import llama

from partial_lora.calibration.peers import Alone
from partial_lora.tasks import CausalTransform, Task
from partial_lora.tasks.config import TaskConfig
from partial_lora.training import objectives, packing


def batches(lengths: list[int]) -> tuple[dict, dict]:
    """Texts of random tokens that have a row each, and the same ones packed."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 40, (len(lengths), max(lengths)), generator=generator)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    alone = {"input_ids": tokens * mask, "attention_mask": mask, "labels": tokens.where(mask > 0, -100)}
    return alone, packing.packed(alone)


@pytest.mark.parametrize(
    ("lengths", "shape"), [([7, 3, 5, 2, 2, 7, 1], (3, 9)), ([250, 240, 130, 120], (3, 250)), ([300] * 3, (3, 300))]
)
def test_no_token_is_lost_and_none_is_padded_for_nothing(lengths: list[int], shape: tuple[int, int]) -> None:
    alone, packed = batches(lengths)
    assert packed["input_ids"].shape == shape
    ends = (packed["position_ids"] == 0).long().cumsum(1)
    texts = sorted(
        tokens[own == text].tolist()
        for tokens, own in zip(packed["input_ids"], ends, strict=True)
        for text in own.unique()
        if tokens[own == text].any()
    )
    assert texts == sorted(row[row > 0].tolist() for row in alone["input_ids"])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_losses_and_gradients_are_those_of_texts_alone(attention: str) -> None:
    model = llama(TOKENIZER)
    model.set_attn_implementation(attention)
    model.config.use_cache = False
    found = []
    for batch in batches([130, 7, 130, 5, 120]):
        labels = batch["labels"]
        model.zero_grad()
        loss = objectives.loss_of_tokens(model(**{key: batch[key] for key in batch if key != "labels"}), labels)
        loss.backward()
        found.append([loss, *(value.grad for value in model.parameters())])
    for alone, packed in zip(*found, strict=True):
        torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-6)


def test_a_training_has_the_losses_of_one_with_a_row_for_each_text(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("PARTIAL_LORA_CACHE", str(tmp_path / "cache"))
    repeated = [1, 9, 4, 4, 1, 1, 9, 2] * 2
    rows = Dataset.from_dict({"prompt": ["what is two? " * n for n in repeated], "response": ["a bird"] * 16})
    splits = dict.fromkeys(("train", "validation", "test"), rows)
    chosen = Task(name="mine", modality="text", labels=(), metrics=("rouge_l",), kind="generation", **splits)
    judge = objectives.judge_of(chosen, CausalTransform(TOKENIZER, 64), TaskConfig(), Alone(), batch_size=8)
    alone, together = (
        trained(judge, tmp_path / str(packs), packing=packs, batch_size=16, gradient_accumulation_steps=2).state
        for packs in (False, True)
    )
    losses = [[entry[key] for entry in alone.log_history if key in entry] for key in ("loss", "eval_loss")]
    for key, expected in zip(("loss", "eval_loss"), losses, strict=True):
        assert [entry[key] for entry in together.log_history if key in entry] == pytest.approx(expected, rel=1e-4)
    assert alone.num_input_tokens_seen <= together.num_input_tokens_seen < 1.5 * alone.num_input_tokens_seen


BLOCKS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
KEYS = {"vocab_size": 40, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
MADE = {  # by class: keys of its config, and whether its texts are kept apart
    "Qwen2ForCausalLM": (BLOCKS | {"num_key_value_heads": 1}, True),
    "MistralForCausalLM": (BLOCKS | {"num_key_value_heads": 1, "sliding_window": 3}, True),
    "GPTNeoXForCausalLM": (BLOCKS, True),
    "OPTForCausalLM": (BLOCKS | {"ffn_dim": 24, "word_embed_proj_dim": 16}, False),  # positions by the mask
    "BloomForCausalLM": ({"hidden_size": 16, "n_layer": 2, "n_head": 2}, False),
    "MambaForCausalLM": ({"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}, False),
}


@pytest.mark.parametrize("name", MADE)
def test_models_that_do_not_keep_texts_apart_are_refused(name: str) -> None:
    keys, is_exact = MADE[name]
    kind = getattr(transformers, name)
    model = kind(kind.config_class(**KEYS | keys)).eval()
    with nullcontext() if is_exact else refusal("trainer.packing", name):
        packing.check(model)
