"""Prompts of known data sets (task.format), as lm-evaluation-harness (0.4.13) puts them to a language model.

One function a format.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from partial_lora.tasks.sources import label_name

Row = Mapping[str, Any]  # a row's columns, without those that have no value


class Choice(NamedTuple):
    """One question with its options.

    prompts, options: one text for each option; the prompts are all the same unless the prompt itself is chosen. names:
    the options' names in the source, in order. answer: the name of the right option.
    """

    prompts: list[str]
    options: list[str]
    names: Sequence[object]
    answer: object


class Completion(NamedTuple):
    """A prompt and the response to it."""

    prompt: str
    response: str


def arc(row: Row) -> Choice:
    """ARC (Clark et al. 2018)."""
    return _school_question(f"Question: {row['question']}\nAnswer:", row)


def boolq(row: Row) -> Choice:
    """BoolQ (Clark et al. 2019), as in SuperGLUE; rows without a passage are the question alone."""
    passage = f"{row['passage']}\n" if "passage" in row else ""
    prompt = f"{passage}Question: {row['question']}?\nAnswer:"
    return Choice([prompt] * 2, [" no", " yes"], (False, True), row["answer"])


def hellaswag(row: Row) -> Choice:
    """HellaSwag (Zellers et al. 2019), without the remains of its articles' markup."""
    prompt = _without_markup(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    options = [" " + _without_markup(ending) for ending in row["endings"]]
    return Choice([prompt] * len(options), options, range(len(options)), row["label"])


def openbookqa(row: Row) -> Choice:
    """OpenBookQA (Mihaylov et al. 2018): a sentence that one of the options completes, without the facts."""
    return _school_question(row["question"] if "question" in row else row["question_stem"], row)


def piqa(row: Row) -> Choice:
    """PIQA (Bisk et al. 2020)."""
    prompt = f"Question: {row['goal']}\nAnswer:"
    return Choice([prompt] * 2, [f" {row['sol1']}", f" {row['sol2']}"], (0, 1), row["label"])


def social_iqa(row: Row) -> Choice:
    """Social IQa (Sap et al. 2019); rows with `choices` have the context as a part of the question."""
    if "choices" in row:
        return _school_question(f"Q: {row['question']}\nA:", row)
    options = [f" {row[column]}" for column in ("answerA", "answerB", "answerC")]
    return Choice([f"Q: {row['context']} {row['question']}\nA:"] * 3, options, (1, 2, 3), row["label"])


def winogrande(row: Row) -> Choice:
    """WinoGrande (Sakaguchi et al. 2020): after which of the two names the rest of the sentence is likelier.

    Each prompt ends with one of the names, and the rest is the option for both.
    """
    before, _, after = row["sentence"].partition("_")
    prompts = [before + row["option1"], before + row["option2"]]
    return Choice(prompts, [f" {after.strip()}"] * 2, (1, 2), row["answer"])


def gsm8k(row: Row) -> Completion:
    """GSM8K (Cobbe et al. 2021): a solution in words, whose last line is #### and a number."""
    return Completion(f"Question: {row['question']}\nAnswer:", label_name(row["answer"]))


def _school_question(prompt: str, row: Row) -> Choice:
    """Format a question whose options, as AI2 has them, are `choices` with a text and a label each."""
    texts, labels = row["choices"]["text"], row["choices"]["label"]
    return Choice([prompt] * len(texts), [f" {text}" for text in texts], labels, row["answerKey"])


def _without_markup(text: str) -> str:
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


CHOICES: dict[str, Callable[[Row], Choice]] = {
    "arc": arc,
    "boolq": boolq,
    "hellaswag": hellaswag,
    "openbookqa": openbookqa,
    "piqa": piqa,
    "social_iqa": social_iqa,
    "winogrande": winogrande,
}
COMPLETIONS: dict[str, Callable[[Row], Completion]] = {"gsm8k": gsm8k}
OPTIONAL = {  # a column that a format can do without, and a warning
    "boolq": ("passage", "its questions are asked without the passages that answer them, which is harder"),
}
