"""Tokens of prompts and answers: lm-evaluation-harness's rule, chats, cuts, padding; made once."""

from __future__ import annotations

import datasets
import pytest
import torch
from refusals import refusal
from tiny_causal import CHAT, bytes_tokenizer, merging_tokenizer

from partial_lora import tasks
from partial_lora.calibration.answer_scores import Loss, OptionLikelihood
from partial_lora.tasks.config import TaskConfig
from partial_lora.tasks.questions import CHOICE_FEATURES, COMPLETION_FEATURES, format_completions

BOUND = 2**20
QUESTIONS = [
    ("Question: which of these is a bird?\nAnswer:", [" the robin", " the snow", " four"], 0),
    ("the man  writes over ", ["the snow", "two"], 1),  # ends in a space, as options then do not begin with one
    ("Ques", ["tion", "nine, naïve"], 0),  # the options are part of a word that the prompt begins
    ("and tw", ["o and two", "o is four"], 0),  # so are these, and some of their words' tokens are left
    ("", [" the end", " the start"], 1),
    ("<s> the end", [" is", " of"], 0),
]
pytestmark = pytest.mark.usefixtures("cache")


def questions(*items: tuple[str, list[str], int]) -> datasets.Dataset:
    prompts, options, labels = zip(*(items or QUESTIONS), strict=True)
    data = {"prompts": [[prompt] * len(each) for prompt, each in zip(prompts, options, strict=True)]}
    data |= {"options": list(options), "label": list(labels)}
    return datasets.Dataset.from_dict(data, features=CHOICE_FEATURES, split=datasets.NamedSplit("train"))


def completions(*pairs: tuple[str, str]) -> datasets.Dataset:
    data = dict(zip(("prompt", "response"), map(list, zip(*pairs, strict=True)), strict=True))
    return datasets.Dataset.from_dict(data, features=COMPLETION_FEATURES, split=datasets.NamedSplit("train"))


def choice(tokenizer, length: int = 64, **named: object) -> tasks.CausalTransform:
    return tasks.ChoiceTransform(tokenizer, length, **named)


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
    start = tokenizer.encode("Ques", add_special_tokens=False)
    assert tokenizer.encode("Question", add_special_tokens=False)[: len(start)] != start  # merged across the border
    _, answer = literal(tokenizer, "and tw", "o and two")
    assert answer not in ([], tokenizer.encode("o and two", add_special_tokens=False))
    expected = []
    for number, (prompt, options, label) in enumerate(QUESTIONS):
        for place, option in enumerate(options):
            context, answer = literal(tokenizer, prompt, option)
            answer = answer or tokenizer.encode(option, add_special_tokens=False)
            row = {"input_ids": context + answer, "answer_start": len(context), "length": len(context) + len(answer)}
            expected.append(row | {"item": number, "right": place == label, "characters": len(option.strip())})
    for bound in (BOUND, 0):
        assert choice(tokenizer).options(questions(), cache_bytes=bound).to_list() == expected


def test_an_option_that_melts_into_the_prompt_still_has_tokens() -> None:
    tokenizer = merging_tokenizer(begins=False)
    alone = [len(tokenizer.encode(text, add_special_tokens=False)) for text in ("Quest", "Question")]
    assert alone[1] <= alone[0]  # together they are fewer tokens than the prompt is, so the rule leaves none
    row = choice(tokenizer).options(questions(("Quest", ["ion", " is"], 0)), cache_bytes=0)[0]
    assert row["input_ids"][row["answer_start"] :] == tokenizer.encode("ion", add_special_tokens=False)


def test_special_tokens_at_a_text_s_end_are_left_out_and_those_before_it_kept() -> None:
    tokenizer = bytes_tokenizer()
    row = choice(tokenizer).prepare(questions(("ab", [" c", " d"], 1)), cache_bytes=0)[0]
    plain = tokenizer("ab d", add_special_tokens=False)["input_ids"]
    assert tokenizer("ab d")["input_ids"] == [tokenizer.cls_token_id, *plain, tokenizer.sep_token_id]
    assert (row["input_ids"], row["answer_start"]) == ([tokenizer.cls_token_id, *plain], 3)


def padded(tokens: list[int], count: int, padding: int, side: str = "right") -> list[int]:
    more = [padding] * (count - len(tokens))
    return tokens + more if side == "right" else more + tokens


def test_the_right_answer_is_trained_and_nothing_else_is_a_label() -> None:
    tokenizer, rows = merging_tokenizer(), questions()
    prepared = choice(tokenizer).prepare(rows, cache_bytes=BOUND)
    right = [row for row in choice(tokenizer).options(rows, cache_bytes=BOUND) if row["right"]]
    assert prepared.to_list() == [
        {name: row[name] for name in ("input_ids", "answer_start", "length")} for row in right
    ]
    batch = choice(tokenizer).collate(prepared.to_list())
    longest = max(prepared["length"])
    for place, row in enumerate(prepared):
        tokens, start = row["input_ids"], row["answer_start"]
        assert batch["input_ids"][place].tolist() == padded(tokens, longest, tokenizer.pad_token_id)
        assert batch["attention_mask"][place].tolist() == padded([1] * row["length"], longest, 0)
        assert batch["labels"][place].tolist() == padded([-100] * start + tokens[start:], longest, -100)
    assert {value.dtype for value in batch.values()} == {torch.int64}


@pytest.mark.parametrize(("size", "counts"), [(4, [3, 4, 4, 2]), (1, [3, 2, 2, 2, 2, 2]), (100, [13])])
def test_draws_of_questions_have_whole_questions_in_order(size: int, counts: list[int]) -> None:
    rows, transform = questions(), choice(merging_tokenizer())
    every = iter(transform.options(rows, cache_bytes=0).to_list())
    batches = transform.batches(rows, size)
    assert [len(batch["items"]) for batch in batches] == counts
    for batch in batches:
        OptionLikelihood().check(batch)
        part = [next(every) for _ in batch["items"]]
        assert batch["items"].tolist() == [row["item"] for row in part]
        assert batch["answers"].tolist() == [row["right"] for row in part]
        assert all(torch.equal(batch[name], value) for name, value in transform.collate(part).items())


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
        context = row["input_ids"][: row["answer_start"]]
        assert inputs["input_ids"][place].tolist() == padded(context, longest, tokenizer.pad_token_id, "left")
        assert inputs["attention_mask"][place].tolist() == padded([1] * len(context), longest, 0, "left")


def test_a_chat_is_written_by_the_template_up_to_the_end_of_the_reply() -> None:
    tokenizer = merging_tokenizer(chat=True)
    transform = tasks.CausalTransform(tokenizer, 99, chat=True)
    (row,) = transform.prepare(completions(("what is two?", "it is two")), cache_bytes=0)
    messages = [{"role": "user", "content": "what is two?"}]
    context = tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    whole = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": "it is two"}], tokenize=False)
    assert whole == "<|user|>\nwhat is two?</s>\n<|assistant|>\nit is two</s>\n"
    assert row["input_ids"] == tokenizer.encode(whole[:-1], add_special_tokens=False)  # the template has no <s>
    assert transform.encode(["what is two?"])["input_ids"].tolist() == [context]
    item = questions(("what is two?", [" it is two", " four"], 0))
    (option, _) = choice(tokenizer, 99, chat=True).options(item, cache_bytes=0)
    assert tokenizer.decode(option["input_ids"]) == whole.removesuffix("</s>\n")
    assert [each["input_ids"][: each["answer_start"]] for each in (row, option)] == [context] * 2
    with refusal("task.chat_template=true: "):
        tasks.CausalTransform(merging_tokenizer(), 99, chat=True)


def test_what_is_too_long_loses_the_first_words_of_its_prompt_and_never_the_answer() -> None:
    tokenizer = merging_tokenizer()
    rows = questions(("the snow " * 20 + "the end", [" is four", " two"], 0))
    whole, short = (choice(tokenizer, length).options(rows, cache_bytes=0).to_list() for length in (999, 12))
    for long, cut in zip(whole, short, strict=True):
        assert long["length"] > cut["length"] == 12
        assert cut["input_ids"] == [tokenizer.bos_token_id, *long["input_ids"][-11:]]
        assert cut["input_ids"][cut["answer_start"] :] == long["input_ids"][long["answer_start"] :]
    (context,) = tasks.CausalTransform(tokenizer, 12).encode([rows["prompts"][0][0]])["input_ids"].tolist()
    assert context == [tokenizer.bos_token_id, *whole[0]["input_ids"][: whole[0]["answer_start"]][-11:]]


def test_an_answer_without_room_is_one_line_that_names_its_row() -> None:
    tokenizer = merging_tokenizer()
    rows = completions(("two", "four"), ("two", "and four " * 9))
    tokens = len(tokenizer.encode(" " + "and four " * 9, add_special_tokens=False)) + 1
    with refusal(f"model.max_length={tokens}: ", "row 2 of the train rows"):
        tasks.CausalTransform(tokenizer, tokens).prepare(rows, cache_bytes=0)
    (_, row) = tasks.CausalTransform(tokenizer, tokens + 1).prepare(rows, cache_bytes=0)
    assert (row["answer_start"], row["length"]) == (1, tokens + 1)


def test_tokens_are_made_once_and_again_for_all_that_makes_others(monkeypatch) -> None:
    rows, tokenizer = questions(), merging_tokenizer(chat=True)

    def made(length: int = 64, items: datasets.Dataset = rows, cache_bytes: int = BOUND, **named: object) -> list:
        transform = choice(tokenizer, length, **named)
        return [make(items, cache_bytes=cache_bytes)[:] for make in (transform.prepare, transform.options)]

    def again(*arguments: object) -> None:
        raise AssertionError("made again")

    first = made()
    monkeypatch.setattr(tasks.CausalTransform, "_sequences", again)
    assert made() == first
    others = ({"length": 63}, {"chat": True}, {"cache_bytes": 0}, {"items": questions(*QUESTIONS[:4])})
    for other in others:
        with pytest.raises(AssertionError, match="made again"):
            made(**other)
    tokenizer.chat_template = None
    assert made() == first  # plain prompts know of no template


@pytest.mark.parametrize(("too_long", "rows", "said"), [("cut", 3, 1), ("drop", 2, 1), ("cut", 3, 0)])
def test_one_answer_that_does_not_fit_does_not_end_a_training(too_long: str, rows: int, said: int) -> None:
    long = "a long answer " * (10 if said else 1)
    columns = {"prompt": ["one", "two", "three"], "response": ["a", long, "b"]}
    given = datasets.Dataset.from_dict(columns, split=datasets.NamedSplit("train"))
    transform = tasks.CausalTransform(bytes_tokenizer(), 40, too_long=too_long)
    plain = tasks.CausalTransform(bytes_tokenizer(), 400).prepare(given, cache_bytes=0)
    prepared = transform.prepare(given, cache_bytes=0)
    assert len(prepared) == len(transform.collate(prepared)["input_ids"]) == rows
    assert len(transform.warnings) == said
    assert all("1 of 3" in line for line in transform.warnings)
    assert tasks.MixtureTransform([transform, transform], None).warnings == 2 * transform.warnings
    others = [row for row in prepared if not row.pop("cut")]
    assert [row for row in plain if row["length"] <= 40] == others
    if too_long == "cut" and said:
        (row,) = (row for row in prepared if row["cut"])
        whole = plain[1]["input_ids"][: plain[1]["answer_start"] + 40]
        assert row["length"] == 40
        assert row["input_ids"] == whole[:40]  # the prompt is there, the answer without its end
    with refusal("model.max_length=2: "):
        tasks.CausalTransform(bytes_tokenizer(), 2, too_long="drop").prepare(given, cache_bytes=0)


# Conversations

SAID = [
    ("system", "be a bird"),
    ("user", "what is two?"),
    ("assistant", "two is two"),
    ("user", "and four?"),
    ("assistant", "four and four is eight"),
]


def marked(answer: str) -> str:
    """A template that writes answers in a way of its own; a line's end behind a block would be no part of it."""
    turn = f"{{% if message.role == 'assistant' %}}{answer}{{% else %}}{{{{ message.content }}}}</s>{{% endif %}}"
    messages = f"{{% for message in messages %}}<|{{{{ message.role }}}}|>\n{turn}{{{{ '\\n' }}}}{{% endfor %}}"
    return messages + "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"


TEMPLATES = {  # how a template writes an answer, and how much of the end is trained with it
    "prefixes": (CHAT, ["two is two", "four and four is eight"], "</s>"),
    "marks": (
        marked("{% generation %}{{ message.content }}</s>{% endgeneration %}"),
        ["two is two", "four and four is eight"],
        "</s>",
    ),
    "marks without the end": (
        marked("{%- generation -%}{{ message.content }}{%- endgeneration -%}</s>"),
        ["two is two", "four and four is eight"],
        "",
    ),
    "thoughts before the last one": (
        marked("{% if loop.last %}the man {% endif %}{{ message.content }}</s>"),
        ["two is two", "the man four and four is eight"],
        "</s>",
    ),
}


def conversation(*messages: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in messages]


def conversations(*chats: list[dict[str, str]]) -> datasets.Dataset:
    rows = datasets.Dataset.from_dict({"messages": list(chats)}, split=datasets.NamedSplit("train"))
    return format_completions({"train": rows}, TaskConfig("own", "files", modality="text", kind="generation"))["train"]


def literal_chat(tokenizer, answers: list[str], end: str) -> tuple[list[int], list[int]]:
    """Tokens and labels of SAID, put together piece by piece."""
    tokens, labels, answers = [], [], iter(answers)
    for role, content in SAID:
        pieces = [f"<|{role}|>\n", *((next(answers), "</s>") if role == "assistant" else (content, "</s>")), "\n"]
        for place, piece in enumerate(pieces):
            new = tokenizer.encode(piece, add_special_tokens=False)
            trained = role == "assistant" and (place == 1 or (place == 2 and end))
            tokens += new
            labels += new if trained else [-100] * len(new)
    last = max(place for place, label in enumerate(labels) if label != -100) + 1  # nothing is learned behind it
    return tokens[:last], labels[:last]


@pytest.mark.parametrize("of", TEMPLATES)
def test_every_answer_of_a_conversation_is_trained_and_nothing_else(of: str) -> None:
    tokenizer = merging_tokenizer(chat=True)
    tokenizer.chat_template, answers, end = TEMPLATES[of]
    transform = tasks.CausalTransform(tokenizer, 999, chat=True)
    rows = conversations(conversation(*SAID, ("user", "the end")), conversation(*SAID[1:3]))
    prepared = transform.prepare(rows, cache_bytes=BOUND)
    batch = transform.collate(prepared.to_list())
    tokens, labels = literal_chat(tokenizer, answers, end)
    assert batch["input_ids"][0].tolist() == tokens
    assert batch["labels"][0].tolist() == labels
    assert (batch["labels"][1] != -100).sum() == (prepared["length"][1] - prepared["answer_start"][1])
    asked = tokenizer.apply_chat_template(conversation(*SAID[:4]), add_generation_prompt=True)["input_ids"]
    (context,) = transform.encode([rows["messages"][0][:-1]])["input_ids"].tolist()
    assert context == asked == tokens[: prepared["answer_start"][0]]
    assert all(torch.equal(batch[name], value) for name, value in transform.batches(rows, 2)[0].items())


def test_a_long_conversation_loses_its_beginning_and_with_it_what_is_trained_there() -> None:
    tokenizer, rows = merging_tokenizer(chat=True), conversations(conversation(*SAID))

    def made(length: int) -> dict[str, torch.Tensor]:
        transform = tasks.CausalTransform(tokenizer, length, chat=True)
        return transform.collate(transform.prepare(rows, cache_bytes=0).to_list())

    whole = made(999)
    second = int((whole["labels"][0] != -100).nonzero()[1])  # token of the first answer
    cut = made(whole["labels"].shape[1] - second)
    for name in ("input_ids", "labels"):
        assert cut[name][0].tolist() == whole[name][0, second:].tolist()
    short = len(tokenizer.encode("four and four is eight</s>", add_special_tokens=False))
    with refusal(f"model.max_length={short}: "):
        tasks.CausalTransform(tokenizer, short, chat=True).prepare(rows, cache_bytes=0)


@pytest.mark.parametrize(
    ("template", "key"),
    [
        (None, "task.chat_template: "),
        ("{{ raise_exception('no system here') }}", "row 1 of the train rows: .*no system here"),
        (CHAT + "{% if add_generation_prompt %}<think>{% endif %}", "row 1 of the train rows: .*message 3"),
        (marked("{% generation %}{% endgeneration %}{{ message.content }}"), "row 1 of the train rows: .*marks"),
    ],
)
def test_a_template_that_does_not_tell_where_answers_are_is_one_line(template: str | None, key: str) -> None:
    tokenizer = merging_tokenizer()
    tokenizer.chat_template = template
    transform = tasks.CausalTransform(tokenizer, 999, chat=template is not None)
    with refusal(key):
        transform.prepare(conversations(conversation(*SAID)), cache_bytes=0)
