"""Rows of known data sets as lm-evaluation-harness (0.4.13) puts them to a language model, one function a layout."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Row = Mapping[str, Any]  # a row's columns; what has no value is not in it


class Choice(NamedTuple):
    """One question with its options.

    prompts, options: a text each, the prompts all the same but where the prompt itself is what is chosen. names: what
    the source calls the options, in their order; answer: which of the names is right.
    """

    prompts: list[str]
    options: list[str]
    names: Sequence[object]
    answer: object


class Exchange(NamedTuple):
    """A prompt and the response that is asked for."""

    prompt: str
    response: str


def arc(row: Row) -> Choice:
    """ARC (Clark et al. 2018)."""
    return _asked(f"Question: {row['question']}\nAnswer:", row)


def boolq(row: Row) -> Choice:
    """BoolQ (Clark et al. 2019), as in SuperGLUE; rows without a passage are the question alone."""
    passage = f"{row['passage']}\n" if "passage" in row else ""
    prompt = f"{passage}Question: {row['question']}?\nAnswer:"
    return Choice([prompt] * 2, [" no", " yes"], (False, True), row["answer"])


def hellaswag(row: Row) -> Choice:
    """HellaSwag (Zellers et al. 2019), without what its articles' markup has left behind."""
    prompt = _without_markup(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
    options = [" " + _without_markup(ending) for ending in row["endings"]]
    return Choice([prompt] * len(options), options, range(len(options)), row["label"])


def openbookqa(row: Row) -> Choice:
    """OpenBookQA (Mihaylov et al. 2018): a sentence that one of the options completes, without the facts."""
    return _asked(row["question"] if "question" in row else row["question_stem"], row)


def piqa(row: Row) -> Choice:
    """PIQA (Bisk et al. 2020)."""
    prompt = f"Question: {row['goal']}\nAnswer:"
    return Choice([prompt] * 2, [f" {row['sol1']}", f" {row['sol2']}"], (0, 1), row["label"])


def social_iqa(row: Row) -> Choice:
    """Social IQa (Sap et al. 2019); rows with `choices` have the context as a part of the question."""
    if "choices" in row:
        return _asked(f"Q: {row['question']}\nA:", row)
    options = [f" {row[column]}" for column in ("answerA", "answerB", "answerC")]
    return Choice([f"Q: {row['context']} {row['question']}\nA:"] * 3, options, (1, 2, 3), row["label"])


def winogrande(row: Row) -> Choice:
    """WinoGrande (Sakaguchi et al. 2020): after which of the two names the rest of the sentence is likelier.

    The names are a part of the prompts, and the rest is both options.
    """
    before, _, after = row["sentence"].partition("_")
    prompts = [before + row["option1"], before + row["option2"]]
    return Choice(prompts, [f" {after.strip()}"] * 2, (1, 2), row["answer"])


def gsm8k(row: Row) -> Exchange:
    """GSM8K (Cobbe et al. 2021): a solution in words, whose last line is #### and a number."""
    return Exchange(f"Question: {row['question']}\nAnswer:", row["answer"])


def _asked(prompt: str, row: Row) -> Choice:
    """A question whose options, as AI2 keeps them, are `choices` with a text and a label each."""
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
EXCHANGES: dict[str, Callable[[Row], Exchange]] = {"gsm8k": gsm8k}
LACKING = {  # a column that a format can do without, and what its rows are then
    "boolq": ("passage", "its questions are asked without the passages that answer them, which is harder"),
}
