"""Finished runs of tiny models on several tasks at once, each trained once for all tests that only look at it."""

from __future__ import annotations

import functools

from datasets import ClassLabel, Dataset, Features, Value
from finished_runs import exchanges, files, picture_files, questions, sentence_files, tables, trained

from partial_lora.runs.finished import FinishedRun

_AT_ITS_END = "trainer.save_steps=12"
LONGER = ("trainer.max_steps=40", "trainer.save_steps=40")
WORDS = {"blue": "the sea", "green": "a meadow", "red": "one rose"}


def pairs(count: int, first: int) -> Dataset:
    """`count` pairs of texts of each of three classes, which the second text decides."""
    rows = [(name, first + number) for number in range(count) for name in WORDS]
    columns = {
        "first": [f"what colour is it {'now ' * (number % 4)}" for _, number in rows],
        "second": [f"{WORDS[name]} {number}" for name, number in rows],
        "label": [name for name, _ in rows],
    }
    features = {"first": Value("string"), "second": Value("string"), "label": ClassLabel(names=list(WORDS))}
    return Dataset.from_dict(columns, features=Features(features))


def given(of: dict[str, tuple[str, dict[str, str]]]) -> list[str]:
    """The overrides of a mixture of {name: (settings, files by split)}."""
    listed = ", ".join(f"{name}: {{path: files, {own}}}" for name, (own, _) in of.items())
    paths = ", ".join(
        f"{name}: {{{', '.join(f'{split}: {path!r}' for split, path in own.items())}}}" for name, (_, own) in of.items()
    )
    return ["task=mixture", f"task.members={{{listed}}}", f"task.data_files={{{paths}}}"]


@functools.cache
def text_mixture() -> FinishedRun:
    """Sentences of two classes, of which every other training row is left out, and pairs of three."""
    pair_files = files({"train": pairs(8, 0), "test": pairs(5, 100)}, "mixed-pairs")
    of = {
        "films": ("modality: text", sentence_files()),
        "colours": ("modality: text, text_columns: [first, second], metrics: [f1, accuracy]", pair_files),
    }
    return trained("mixed-texts", *given(of), "task.mixing=equal", "model=tiny_bert", "method=lora", *LONGER)


@functools.cache
def image_mixture() -> FinishedRun:
    """The pictures of three colours, and digits."""
    of = "{colours: {path: files}, digits: {path: 'bundled:digits', train_samples: 100, test_samples: 20}}"
    paths = ", ".join(f"{split}: {path!r}" for split, path in picture_files().items())
    return trained(
        "mixed-images",
        "task=mixture",
        f"task.members={of}",
        f"task.data_files={{colours: {{{paths}}}}}",
        "model=tiny_vit",
        "method=lora",
        *LONGER,
    )


def blanks(count: int, first: int) -> list[dict]:
    """Sentences with a _, and what may stand there."""
    asked = [f"{number} is {'so ' * (number % 3)}odd, _ it was" for number in range(first, first + count)]
    return [
        {"sentence": sentence, "option1": "yes", "option2": "no", "answer": 1 + place % 2}
        for place, sentence in enumerate(asked)
    ]


@functools.cache
def choice_mixture() -> FinishedRun:
    """Questions with options, and sentences with a blank, whose options are a part of the prompt."""
    columns = "prompt_columns: [question], option_columns: [options], answer_column: answer"
    of = {
        "asked": (
            f"modality: text, kind: choice, {columns}",
            tables({"train": questions(30, 0), "test": questions(9, 100)}, "mixed-questions"),
        ),
        "blanks": (
            "modality: text, kind: choice, format: winogrande",
            tables({"train": blanks(30, 0), "test": blanks(6, 100)}, "mixed-blanks"),
        ),
    }
    return trained("mixed-choices", *given(of), "model=tiny_llama", "method=lora", "method.alpha=128", _AT_ITS_END)


@functools.cache
def generation_mixture() -> FinishedRun:
    """Prompts of two sets, after which twelve bytes are written and five."""
    columns = "modality: text, kind: generation, prompt_columns: [prompt], response_column: response"
    of = {
        name: (f"{columns}, max_new_tokens: {most}", tables(rows, f"mixed-{name}"))
        for name, most, rows in (
            ("long", 12, {"train": exchanges(20, 0), "test": exchanges(5, 100)}),
            ("short", 5, {"train": exchanges(20, 30), "test": exchanges(5, 200)}),
        )
    }
    slowly = "trainer.learning_rate=0.001"
    return trained("mixed-texts-written", *given(of), "model=tiny_llama", "method=lora", slowly, _AT_ITS_END)
