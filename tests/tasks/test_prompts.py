"""What a causal model reads of prompts and answers: lm-evaluation-harness's rule, chats, cuts, and one file for all."""

from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import torch
from tiny_causal import bytes_tokenizer, merging_tokenizer

from partial_lora import tasks
from partial_lora.calibration.score import Loss, OptionLikelihood
from partial_lora.errors import PartialLoraError
from partial_lora.tasks.questions import CHOICE_FEATURES, COMPLETION_FEATURES

BOUND = 2**20
QUESTIONS = [
    ("Question: which of these is a bird?\nAnswer:", [" the robin", " the snow", " four"], 0),
    ("the man  writes over ", ["the snow", "two"], 1),  # ends in a space, as options then do not begin with one
    ("Ques", ["tion", "nine, naïve"], 0),  # the options are part of a word that the prompt begins
    ("and tw", ["o and two", "o is four"], 0),  # so are these, and some of their words' tokens are left
    ("", [" the end", " the start"], 1),
    ("<s> the end", [" is", " of"], 0),
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PARTIAL_LORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


def questions(given: list = QUESTIONS) -> datasets.Dataset:
    data = {"prompts": [[prompt] * len(options) for prompt, options, _ in given]}
    data |= {"options": [options for _, options, _ in given], "label": [label for *_, label in given]}
    return datasets.Dataset.from_dict(data, features=CHOICE_FEATURES, split=datasets.NamedSplit("train"))


def completions(*pairs: tuple[str, str]) -> datasets.Dataset:
    data = {"prompt": [prompt for prompt, _ in pairs], "response": [response for _, response in pairs]}
    return datasets.Dataset.from_dict(data, features=COMPLETION_FEATURES, split=datasets.NamedSplit("train"))


def literal(tokenizer, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """lm-evaluation-harness's rule (0.4.13: TemplateLM._encode_pair and loglikelihood), one pair at a time."""

    def encode(text: str) -> list[int]:
        begun = text.startswith(tokenizer.bos_token)
        return tokenizer.encode(text, add_special_tokens=not begun)

    if context == "":
        tokens = tokenizer.encode(continuation, add_special_tokens=False)
        return [tokenizer.bos_token_id], tokens
    spaces = len(context) - len(context.rstrip())
    if spaces > 0:
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole, alone = encode(context + continuation), encode(context)
    return alone, whole[len(alone) :]


@pytest.mark.parametrize("begins", [True, False])
def test_options_are_tokenised_as_lm_evaluation_harness_does(begins: bool) -> None:
    tokenizer = merging_tokenizer(begins=begins)
    asked = tokenizer.encode("Ques", add_special_tokens=False)
    assert tokenizer.encode("Question", add_special_tokens=False)[: len(asked)] != asked  # merged across the border
    _, answer = literal(tokenizer, "and tw", "o and two")
    assert answer not in ([], tokenizer.encode("o and two", add_special_tokens=False))
    rows = questions()
    for bound in (BOUND, 0):
        prepared = tasks.CausalTransform(tokenizer, 64, kind="choice").options(rows, cache_bytes=bound)
        at = 0
        for number, (prompt, options, label) in enumerate(QUESTIONS):
            for place, option in enumerate(options):
                row, (context, answer) = prepared[at], literal(tokenizer, prompt, option)
                answer = answer or tokenizer.encode(option, add_special_tokens=False)
                assert row["input_ids"] == context + answer
                assert (row["answer_start"], row["length"]) == (len(context), len(context) + len(answer))
                assert (row["item"], row["right"]) == (number, place == label)
                assert row["characters"] == len(option.strip())
                at += 1
        assert at == len(prepared)


def test_an_option_that_melts_into_the_prompt_still_has_tokens() -> None:
    tokenizer = merging_tokenizer(begins=False)
    alone = [len(tokenizer.encode(text, add_special_tokens=False)) for text in ("Quest", "Question")]
    assert alone[1] <= alone[0]  # together they are fewer tokens than the prompt is, so the rule leaves none
    row = tasks.CausalTransform(tokenizer, 64, kind="choice").options(
        questions([("Quest", ["ion", " is"], 0)]), cache_bytes=0
    )[0]
    assert row["input_ids"][row["answer_start"] :] == tokenizer.encode("ion", add_special_tokens=False)


def test_special_tokens_at_a_text_s_end_are_left_out_and_those_before_it_kept() -> None:
    tokenizer = bytes_tokenizer()
    row = tasks.CausalTransform(tokenizer, 64, kind="choice").prepare(
        questions([("ab", [" c", " d"], 1)]), cache_bytes=0
    )[0]
    plain = tokenizer("ab d", add_special_tokens=False)["input_ids"]
    assert tokenizer("ab d")["input_ids"] == [tokenizer.cls_token_id, *plain, tokenizer.sep_token_id]
    assert (row["input_ids"], row["answer_start"]) == ([tokenizer.cls_token_id, *plain], 3)


def test_the_right_answer_is_trained_and_nothing_else_is_a_label() -> None:
    tokenizer, rows = merging_tokenizer(), questions()
    transform = tasks.CausalTransform(tokenizer, 64, kind="choice")
    prepared = transform.prepare(rows, cache_bytes=BOUND)
    every = transform.options(rows, cache_bytes=BOUND)
    assert prepared.to_list() == [
        {name: row[name] for name in ("input_ids", "answer_start", "length")} for row in every if row["right"]
    ]
    batch = transform.collate(prepared.to_list())
    longest = max(prepared["length"])
    for place, row in enumerate(prepared):
        padding = longest - row["length"]
        answer = row["input_ids"][row["answer_start"] :]
        assert batch["input_ids"][place].tolist() == row["input_ids"] + [tokenizer.pad_token_id] * padding
        assert batch["attention_mask"][place].tolist() == [1] * row["length"] + [0] * padding
        assert batch["labels"][place].tolist() == [-100] * row["answer_start"] + answer + [-100] * padding
    assert {value.dtype for value in batch.values()} == {torch.int64}


def test_draws_of_questions_have_whole_questions_in_order() -> None:
    rows, transform = questions(), tasks.CausalTransform(merging_tokenizer(), 64, kind="choice")
    every = transform.options(rows, cache_bytes=0).to_list()
    for size, expected in ((4, [3, 4, 4, 2]), (1, [3, 2, 2, 2, 2, 2]), (100, [13])):
        batches = transform.batches(rows, size)
        assert [len(batch["items"]) for batch in batches] == expected
        at = 0
        for batch in batches:
            OptionLikelihood().check(batch)
            part = every[at : at + len(batch["items"])]
            at += len(part)
            assert batch["items"].tolist() == [row["item"] for row in part]
            assert batch["answers"].tolist() == [row["right"] for row in part]
            collated = transform.collate(part)
            assert all(torch.equal(batch[name], collated[name]) for name in collated)


def test_a_response_ends_with_the_end_token_and_its_prompt_is_what_is_generated_from() -> None:
    tokenizer = merging_tokenizer()
    rows = completions(("Question: what is two?\nAnswer:", "two is two"), ("the end ", "is four"), ("the", "man"))
    transform = tasks.CausalTransform(tokenizer, 64)
    prepared = transform.prepare(rows, cache_bytes=0).to_list()
    texts = [tokenizer.decode(row["input_ids"]) for row in prepared]
    assert texts == ["<s>Question: what is two?\nAnswer: two is two</s>", "<s>the end is four</s>", "<s>the man</s>"]
    batches = transform.batches(rows, 2)
    assert [len(batch["labels"]) for batch in batches] == [2, 1]
    Loss().check(batches[0])
    assert torch.equal(batches[1]["input_ids"], transform.collate(prepared[2:])["input_ids"])
    inputs = transform.encode(rows["prompt"][:])
    longest = max(row["answer_start"] for row in prepared)
    for place, row in enumerate(prepared):
        padding = longest - row["answer_start"]
        context = row["input_ids"][: row["answer_start"]]
        assert inputs["input_ids"][place].tolist() == [tokenizer.pad_token_id] * padding + context
        assert inputs["attention_mask"][place].tolist() == [0] * padding + [1] * len(context)


def test_a_chat_is_written_by_the_template_up_to_the_end_of_the_reply() -> None:
    tokenizer = merging_tokenizer(chat=True)
    transform = tasks.CausalTransform(tokenizer, 99, chat=True)
    (row,) = transform.prepare(completions(("what is two?", "it is two")), cache_bytes=0)
    messages = [{"role": "user", "content": "what is two?"}]
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": "it is two"}], tokenize=False)
    assert whole == "<|user|>\nwhat is two?</s>\n<|assistant|>\nit is two</s>\n"
    assert row["input_ids"] == tokenizer.encode(whole[:-1], add_special_tokens=False)  # the template has no <s>
    assert row["input_ids"][: row["answer_start"]] == asked
    assert transform.encode(["what is two?"])["input_ids"].tolist() == [asked]
    (option, _) = tasks.CausalTransform(tokenizer, 99, kind="choice", chat=True).options(
        questions([("what is two?", [" it is two", " four"], 0)]), cache_bytes=0
    )
    assert tokenizer.decode(option["input_ids"]) == whole.removesuffix("</s>\n")
    assert option["input_ids"][: option["answer_start"]] == asked
    with pytest.raises(PartialLoraError, match=r"^task\.chat_template=true: "):
        tasks.CausalTransform(merging_tokenizer(), 99, chat=True)


def test_what_is_too_long_loses_the_first_words_of_its_prompt_and_never_the_answer() -> None:
    tokenizer = merging_tokenizer()
    rows = questions([("the snow " * 20 + "the end", [" is four", " two"], 0)])
    whole = tasks.CausalTransform(tokenizer, 999, kind="choice").options(rows, cache_bytes=0).to_list()
    cut = tasks.CausalTransform(tokenizer, 12, kind="choice").options(rows, cache_bytes=0).to_list()
    for long, short in zip(whole, cut, strict=True):
        assert long["length"] > short["length"] == 12
        assert short["input_ids"] == [tokenizer.bos_token_id, *long["input_ids"][-11:]]
        assert short["input_ids"][short["answer_start"] :] == long["input_ids"][long["answer_start"] :]
    (context,) = tasks.CausalTransform(tokenizer, 12).encode([rows["prompts"][0][0]])["input_ids"].tolist()
    kept = whole[0]["input_ids"][: whole[0]["answer_start"]]
    assert context == [tokenizer.bos_token_id, *kept[-11:]]


def test_an_answer_without_room_is_one_line_that_names_its_row() -> None:
    tokenizer = merging_tokenizer()
    rows = completions(("two", "four"), ("two", "and four " * 9))
    tokens = len(tokenizer.encode(" " + "and four " * 9, add_special_tokens=False)) + 1
    with pytest.raises(PartialLoraError, match=rf"^model\.max_length={tokens}: .*row 2 of the train rows") as refusal:
        tasks.CausalTransform(tokenizer, tokens).prepare(rows, cache_bytes=0)
    assert "\n" not in str(refusal.value)
    (_, row) = tasks.CausalTransform(tokenizer, tokens + 1).prepare(rows, cache_bytes=0)
    assert (row["answer_start"], row["length"]) == (1, tokens + 1)


def test_tokens_are_made_once_and_only_what_decides_them_makes_others(cache: Path, monkeypatch) -> None:
    rows, tokenizer = questions(), merging_tokenizer(chat=True)

    def transform(length: int = 64, **named: object) -> tasks.CausalTransform:
        return tasks.CausalTransform(tokenizer, length, **{"kind": "choice"} | named)

    first = transform().prepare(rows, cache_bytes=BOUND)[:], transform().options(rows, cache_bytes=BOUND)[:]

    def again(*arguments: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(tasks.CausalTransform, "_sequences", again)
    assert (transform().prepare(rows, cache_bytes=BOUND)[:], transform().options(rows, cache_bytes=BOUND)[:]) == first
    for other in (transform(63), transform(chat=True)):
        with pytest.raises(AssertionError, match="made again"):
            other.options(rows, cache_bytes=BOUND)
    tokenizer.chat_template = None
    assert transform().prepare(rows, cache_bytes=BOUND)[:] == first[0]  # plain prompts know of no template
    with pytest.raises(AssertionError, match="made again"):
        transform().prepare(rows, cache_bytes=0)
    with pytest.raises(AssertionError, match="made again"):
        transform().prepare(questions(QUESTIONS[:4]), cache_bytes=BOUND)
