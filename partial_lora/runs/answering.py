"""Questions that a user asks a causal language model: a prompt and its options, and how likely each option is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import datasets
import numpy as np
from torch import Tensor

from partial_lora.errors import PartialLoraError
from partial_lora.runs.inputs import problem_of_question
from partial_lora.tasks import CausalTransform
from partial_lora.training.options import log_likelihoods

_FEATURES = datasets.Features(
    {
        "prompts": datasets.List(datasets.Value("string")),
        "options": datasets.List(datasets.Value("string")),
        "label": datasets.Value("int64"),
    }
)
Rows = list[dict]  # one an option, as `CausalTransform.options` makes them


def is_question(given: object) -> bool:
    """Whether something is a prompt and a list of options."""
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        return False
    prompt, options = given
    listed = isinstance(options, (tuple, list)) and all(isinstance(option, str) for option in options)
    return isinstance(prompt, str) and listed


def rows_of(
    transform: CausalTransform, layout: str | None, questions: Sequence[tuple[str, Sequence[str]]]
) -> list[Rows | PartialLoraError]:
    """The options of every question as the model reads them, or what is wrong with the question.

    layout: the task's `format`. That of winogrande puts the options where the prompt has a _, and scores what follows.
    """
    outcomes: list = []
    shown = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        for prompt, options in questions:
            problem = problem_of_question(prompt, options) or _problem_of_layout(layout, prompt)
            outcomes.append(_unfit(prompt, problem) if problem else _rows(transform, layout, prompt, options))
    finally:
        if not shown:
            datasets.enable_progress_bars()
    return outcomes


def likelihoods(
    questions: Sequence[Rows],
    logits: Callable[[Mapping[str, Tensor], Callable], np.ndarray],
    transform: CausalTransform,
    size: int,
) -> list[np.ndarray]:
    """The log likelihood of every option of every question, a sum over its tokens.

    Args:
        logits: of a batch, what a function keeps of them (`RunModel.logits`).
        size: how many options are in a batch.
    """
    rows = [row for question in questions for row in question]
    found = [
        logits(transform.collate(rows[start : start + size]), log_likelihoods)[:, 0]
        for start in range(0, len(rows), size)
    ]
    ends = np.cumsum([len(question) for question in questions])
    return np.split(np.concatenate(found), ends[:-1])


def _rows(
    transform: CausalTransform, layout: str | None, prompt: str, options: Sequence[str]
) -> Rows | PartialLoraError:
    if layout == "winogrande":
        before, _, after = prompt.partition("_")
        prompts, answers = [before + option for option in options], [f" {after.strip()}"] * len(options)
    else:
        space = "" if prompt[-1].isspace() else " "
        prompts, answers = [prompt] * len(options), [space + option for option in options]
    row = {"prompts": [prompts], "options": [answers], "label": [0]}
    try:
        return transform.options(datasets.Dataset.from_dict(row, features=_FEATURES), cache_bytes=0).to_list()
    except PartialLoraError:  # its words are about a row of a table
        return _unfit(prompt, "an option is longer than the run's model.max_length")


def _problem_of_layout(layout: str | None, prompt: str) -> str | None:
    if layout == "winogrande" and not prompt.partition("_")[2].strip():
        return "expected a _ in the prompt, where the options go, and words after it"
    return None


def _unfit(prompt: str, problem: str, most: int = 80) -> PartialLoraError:
    said = f"{prompt[:most]!r}: " if prompt.strip() else ""
    return PartialLoraError(f"{said}{problem}")
