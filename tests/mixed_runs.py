"""Finished runs of tiny models on several tasks at once, each trained once for all tests that only look at it."""

from __future__ import annotations

import functools

from datasets import ClassLabel, Dataset, Features, Value
from finished_runs import exchanges, files, picture_files, questions, sentence_files, tables, trained, written

from partial_lora.finished.run import FinishedRun

LONGER = ("method=lora", "trainer.max_steps=40", "trainer.save_steps=40")
_CAUSAL = ("model=tiny_llama", "method=lora", "trainer.save_steps=12")
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


def blanks(count: int, first: int) -> list[dict]:
    """Sentences with a _, and what may stand there."""
    texts = [f"{number} is {'so ' * (number % 3)}odd, _ it was" for number in range(first, first + count)]
    options = {"option1": "yes", "option2": "no"}
    return [{"sentence": text, **options, "answer": 1 + place % 2} for place, text in enumerate(texts)]


def mixture(name: str, members: dict[str, dict], paths: dict[str, dict], *overrides: str) -> FinishedRun:
    """A run of a mixture. members: their settings; paths: their files by split, where they have any."""
    members = {member: {"path": "files", **own} for member, own in members.items()}
    settings = f"task.members={written(members)}", f"task.data_files={written(paths)}"
    return trained(name, "task=mixture", *settings, *overrides)


@functools.cache
def text_mixture() -> FinishedRun:
    """Sentences of two classes, of which every other training row is left out, and pairs of three."""
    text = {"modality": "text"}
    of_pairs = text | {"text_columns": ["first", "second"], "metrics": ["f1", "accuracy"]}
    paths = {"films": sentence_files(), "colours": files({"train": pairs(8, 0), "test": pairs(5, 100)}, "mixed-pairs")}
    overrides = ("task.mixing=equal", "model=tiny_bert", *LONGER)
    return mixture("mixed-texts", {"films": text, "colours": of_pairs}, paths, *overrides)


@functools.cache
def image_mixture() -> FinishedRun:
    """The pictures of three colours, and digits."""
    digits = {"path": "bundled:digits", "train_samples": 100, "test_samples": 20}
    paths = {"colours": picture_files()}
    return mixture("mixed-images", {"colours": {}, "digits": digits}, paths, "model=tiny_vit", *LONGER)


@functools.cache
def choice_mixture() -> FinishedRun:
    """Questions with options, and sentences with a blank, whose options are a part of the prompt."""
    choice = {"modality": "text", "kind": "choice"}
    columns = {"prompt_columns": ["question"], "option_columns": ["options"], "answer_column": "answer"}
    paths = {
        "questions": tables({"train": questions(30, 0), "test": questions(9, 100)}, "mixed-questions"),
        "blanks": tables({"train": blanks(30, 0), "test": blanks(6, 100)}, "mixed-blanks"),
    }
    members = {"questions": choice | columns, "blanks": choice | {"format": "winogrande"}}
    return mixture("mixed-choices", members, paths, *_CAUSAL, "method.alpha=128")


@functools.cache
def generation_mixture() -> FinishedRun:
    """Prompts of two sets, after which twelve bytes are written and five."""
    own = {"modality": "text", "kind": "generation", "prompt_columns": ["prompt"], "response_column": "response"}
    paths = {
        "long": tables({"train": exchanges(20, 0), "test": exchanges(5, 100)}, "mixed-long"),
        "short": tables({"train": exchanges(20, 30), "test": exchanges(5, 200)}, "mixed-short"),
    }
    members = {"long": own | {"max_new_tokens": 12}, "short": own | {"max_new_tokens": 5}}
    return mixture("mixed-written", members, paths, *_CAUSAL, "trainer.learning_rate=0.001")
