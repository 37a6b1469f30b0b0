"""Texts that a model writes: the same in a batch as alone, cut where they are to stop, and how they are scored."""

from __future__ import annotations

import re
from decimal import Decimal

import numpy as np
import pytest
import torch
from rouge_score.rouge_scorer import RougeScorer
from tiny_causal import bytes_tokenizer, llama, merging_tokenizer

from partial_lora import tasks
from partial_lora.training.metrics import exact_match, generate, rouge_l

PROMPTS = [
    "two",
    "Question: which of these is a bird?\nAnswer:",
    "the man  writes over the snow, then he",
    "a",
    "ab cd",
]


@torch.no_grad()
def written(model, tokenizer, prompt: str, most: int, ends: tuple[int, ...]) -> list[int]:
    """The likeliest next token of the whole text so far, again and again: no batch, no padding, no cache."""
    asked = [tokenizer.bos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]
    said: list[int] = []
    while len(said) < most:
        token = int(model(input_ids=torch.tensor([asked + said]), use_cache=False).logits[0, -1].argmax())
        if token in ends:
            break
        said.append(token)
    return said


def literal(model, tokenizer, most: int, *ends: int) -> list[str]:
    said = [written(model, tokenizer, prompt, most, (tokenizer.eos_token_id, *ends)) for prompt in PROMPTS]
    return [tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in said]


def plain(text: str) -> str:
    """The first two letters or signs in a text that no other text is likely to have."""
    return re.search(r"[!-~]{2}", text).group()


@pytest.fixture(scope="module", params=["bytes", "merged"])
def writer(request):
    tokenizer = bytes_tokenizer() if request.param == "bytes" else merging_tokenizer()
    return llama(tokenizer, seed=3), tokenizer, tasks.CausalTransform(tokenizer, 64)


def test_a_batch_writes_what_each_prompt_gets_alone(writer) -> None:
    model, tokenizer, transform = writer
    expected = literal(model, tokenizer, 12)
    assert len(set(expected)) == len(PROMPTS)
    for size in (1, 2, 5):
        seen = []
        said = generate(
            model,
            transform,
            PROMPTS,
            max_new_tokens=12,
            batch_size=size,
            progress=lambda done, total, seen=seen: seen.append((done, total)),
        )
        assert said == expected
        assert seen == [(min(start + size, 5), 5) for start in range(0, 5, size)]
    assert not model.training


def test_an_end_token_ends_its_own_text_alone(writer) -> None:
    model, tokenizer, transform = writer
    whole = literal(model, tokenizer, 12)
    end = written(model, tokenizer, PROMPTS[1], 12, ())[3]
    own = model.generation_config.eos_token_id
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, end]  # a model's own end beside the tokenizer's
    try:
        expected = literal(model, tokenizer, 12, end)
        assert 0 < sum(text != full for text, full in zip(expected, whole, strict=True)) < len(PROMPTS)
        model.train()
        assert generate(model, transform, PROMPTS, max_new_tokens=12, batch_size=5) == expected
        assert model.training
    finally:
        model.generation_config.eos_token_id = own
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


def test_a_model_s_own_taste_for_variety_is_left_aside(writer) -> None:
    model, _, transform = writer
    expected = generate(model, transform, PROMPTS, max_new_tokens=12)
    own = model.generation_config
    kept = {name: getattr(own, name) for name in ("repetition_penalty", "do_sample", "temperature")}
    own.repetition_penalty, own.do_sample, own.temperature = 5.0, True, 9.0
    try:
        assert generate(model, transform, PROMPTS, max_new_tokens=12) == expected
    finally:
        for name, value in kept.items():
            setattr(own, name, value)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 1,234", "1234"),
        ("$5.00", "5"),
        ("so it is -7.", "-7"),
        ("−3 degrees", "-3"),
        ("+4", "4"),
        ("-$1,234.50 is lost", "-1234.50"),
        ("$-2", "-2"),
        ("16-3", "3"),
        ("(2+5)-3=4", "4"),
        ("= -3", "-3"),
        ("50%-5", "5"),
        ("2 pens, 3 cups", "3"),
        ("1,234,567.8", "1234567.8"),
        ("1,2,3", "3"),
        ("12,3456", "3456"),
        (".5", "0.5"),
        ("18.", "18"),
        ("#### 18\nThat is 3 more", "18"),
        ("9 apples #### none", None),
        ("none", None),
    ],
)
def test_the_final_number_of_a_text(text: str, number: str | None) -> None:
    assert tasks.final_number(text) == (None if number is None else Decimal(number))


def test_exact_matches_are_of_numbers_or_of_whole_texts() -> None:
    said = ["It is $5.00.", "#### 1,234", "no idea", "7 or 8", "5"]
    references = ["2+3=<<2+3=5>>5\n#### 5", "#### 1234", "#### 3", "#### 7", "#### -5"]
    assert exact_match(said, references, "number").tolist() == [1, 1, 0, 0, 0]
    assert exact_match([" a b\n", "a  b", ""], ["a b", "a b", "x"], None).tolist() == [1, 0, 0]


def test_rouge_l_is_that_of_the_longest_common_words() -> None:
    def common(first: list[str], second: list[str]) -> int:
        if not first or not second:
            return 0
        if first[0] == second[0]:
            return 1 + common(first[1:], second[1:])
        return max(common(first[1:], second), common(first, second[1:]))

    said = ["the cat sat on the mat", "On the mat, sat the CAT!", "", "a b c d"]
    references = ["the cat lay on a mat", "the cat sat on the mat", "something", "d c b a"]
    expected = []
    for text, reference in zip(said, references, strict=True):
        words = [each.lower().replace(",", "").replace("!", "").split() for each in (text, reference)]
        length = common(*words)
        expected.append(2 * length / (len(words[0]) + len(words[1])) if length else 0.0)
    found = rouge_l(said, references)
    np.testing.assert_allclose(found, expected)
    package = RougeScorer(["rougeL"])
    assert found.tolist() == [package.score(b, a)["rougeL"].fmeasure for a, b in zip(said, references, strict=True)]
    assert rouge_l(["größe und maß"], ["Größe und Maß"]).tolist() == [1.0]
