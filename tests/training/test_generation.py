"""Generated texts against one sequence at a time."""

from __future__ import annotations

import re

import pytest
import torch
from refusals import refusal
from tiny_causal import bytes_tokenizer, llama, merging_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from partial_lora import tasks
from partial_lora.training.generation import generate

PROMPTS = [
    "two",
    "Question: which of these is a bird?\nAnswer:",
    "the man  writes over the snow, then he",
    "a",
    "ab cd",
]


@torch.no_grad()
def written(model, tokenizer, prompt: str, most: int, ends: tuple[int, ...]) -> list[int]:
    """Return the most likely tokens, each after the whole text so far: no batch, no padding, no cache."""
    context = [tokenizer.bos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]
    tokens: list[int] = []
    while len(tokens) < most:
        token = int(model(input_ids=torch.tensor([context + tokens]), use_cache=False).logits[0, -1].argmax())
        if token in ends:
            break
        tokens.append(token)
    return tokens


def literal_texts(model, tokenizer, most: int, *ends: int) -> list[str]:
    texts = [written(model, tokenizer, prompt, most, (tokenizer.eos_token_id, *ends)) for prompt in PROMPTS]
    return [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in texts]


def plain(text: str) -> str:
    """Return the first two letters or signs of a text that no other text is likely to have."""
    return re.search(r"[!-~]{2}", text).group()


@pytest.fixture(scope="module", params=["bytes", "merged"])
def writer(request):
    tokenizer = bytes_tokenizer() if request.param == "bytes" else merging_tokenizer()
    return llama(tokenizer, seed=3), tokenizer, tasks.CausalTransform(tokenizer, 64)


def test_a_batch_writes_what_each_prompt_gets_alone(writer) -> None:
    model, tokenizer, transform = writer
    expected = literal_texts(model, tokenizer, 12)
    assert len(set(expected)) == len(PROMPTS)
    for size in (1, 2, 5):
        seen = []
        texts = generate(
            model,
            transform,
            PROMPTS,
            max_new_tokens=12,
            batch_size=size,
            progress=lambda done, total, seen=seen: seen.append((done, total)),
        )
        assert texts == expected
        assert seen == [(min(start + size, 5), 5) for start in range(0, 5, size)]
    assert not model.training


@pytest.mark.parametrize("most", [3, 12])
def test_a_prompt_loses_its_start_where_the_model_has_too_few_positions(most: int) -> None:
    tokenizer = bytes_tokenizer()
    torch.manual_seed(3)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 12, "initializer_range": 0.3}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), eos_token_id=None, **sizes)).eval()
    narrow = tasks.CausalTransform(tokenizer, 13 - most)
    expected = []
    for tokens, mask in zip(*narrow.encode(PROMPTS).values(), strict=True):
        context = tokens[mask.bool()].tolist()
        for _ in range(most):
            context.append(int(model(input_ids=torch.tensor([context])).logits[0, -1].argmax()))
        ends = [*context[-most:], tokenizer.eos_token_id]
        expected.append(tokenizer.decode(ends[: ends.index(tokenizer.eos_token_id)], skip_special_tokens=True).strip())
    wide = tasks.CausalTransform(tokenizer, 64)
    assert generate(model, wide, PROMPTS, max_new_tokens=most) == expected
    with refusal(r"task\.max_new_tokens=13: "):
        generate(model, wide, PROMPTS, max_new_tokens=13)


def test_an_end_token_ends_its_own_text_alone(writer, monkeypatch) -> None:
    model, tokenizer, transform = writer
    whole = literal_texts(model, tokenizer, 12)
    end = written(model, tokenizer, PROMPTS[1], 12, ())[3]
    monkeypatch.setattr(model.generation_config, "eos_token_id", [tokenizer.eos_token_id, end])  # the model's own
    expected = literal_texts(model, tokenizer, 12, end)
    assert 0 < sum(text != full for text, full in zip(expected, whole, strict=True)) < len(PROMPTS)
    model.train()
    assert generate(model, transform, PROMPTS, max_new_tokens=12, batch_size=5) == expected
    assert model.training
    model.eval()


def test_texts_are_cut_at_the_first_of_the_stops(writer) -> None:
    model, _, transform = writer
    whole = generate(model, transform, PROMPTS, max_new_tokens=12)
    stops = [plain(whole[1]), plain(whole[1][::-1])[::-1], plain(whole[4])]
    expected = [min((text.partition(stop)[0] for stop in stops), key=len).strip() for text in whole]
    assert 1 < sum(text != full for text, full in zip(expected, whole, strict=True)) < len(PROMPTS)
    assert generate(model, transform, PROMPTS, max_new_tokens=12, stop=stops, batch_size=3) == expected


def test_a_token_that_holds_two_stops_is_cut_at_the_first() -> None:
    tokenizer = merging_tokenizer()
    model, transform = llama(tokenizer, seed=3), tasks.CausalTransform(tokenizer, 64)
    first = tokenizer.decode(written(model, tokenizer, PROMPTS[1], 1, ()))
    assert len(set(first)) == len(first) >= 3
    assert generate(model, transform, PROMPTS[1:2], max_new_tokens=3, stop=[first[2], first[1]]) == [first[0]]


def test_nothing_more_is_written_after_a_stop(writer, monkeypatch) -> None:
    model, _, transform = writer
    (whole,) = generate(model, transform, PROMPTS[4:], max_new_tokens=40)
    calls, forward = [], model.forward

    def counted(*arguments: object, **named: object):
        calls.append(1)
        return forward(*arguments, **named)

    monkeypatch.setattr(model, "forward", counted)
    generate(model, transform, PROMPTS[4:], max_new_tokens=40, stop=[plain(whole)])
    assert len(calls) < 20


def test_a_model_s_own_generation_settings_change_nothing(writer, monkeypatch) -> None:
    model, _, transform = writer
    expected = generate(model, transform, PROMPTS, max_new_tokens=12)
    for name, value in {"repetition_penalty": 5.0, "do_sample": True, "temperature": 9.0}.items():
        monkeypatch.setattr(model.generation_config, name, value)
    assert generate(model, transform, PROMPTS, max_new_tokens=12) == expected
