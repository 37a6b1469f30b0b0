"""Questions with options: of a known data set, or of a table of the user's own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset, Features, List, Value

from partial_lora.errors import PartialLoraError
from partial_lora.tasks import given
from partial_lora.tasks.formats import CHOICES, LACKING, Choice

FEATURES = Features({"prompts": List(Value("string")), "options": List(Value("string")), "label": Value("int64")})
_READ = "an option's text, its letter (A is the first) or its place (0 is the first)"

logger = logging.getLogger(__name__)


def read(
    splits: Mapping[str, Dataset],
    name: str,
    layout: str | None,
    prompt_columns: Sequence[str],
    option_columns: Sequence[str],
    answer_column: str | None,
) -> dict[str, Dataset]:
    """The rows of every split as `prompts` and `options`, a text for each option, and `label`, the right one's place.

    Args:
        layout: one of `formats.CHOICES`; None for a table, which is read by its columns.
        prompt_columns: come before the options, a line each.
        option_columns: one column of lists, or a column for each option.
        answer_column: the right option's text, letter or place, in all rows alike.

    Raises PartialLoraError, in one line, for a column or an answer that is missing, an answer that is no option, an
    empty option and a question with fewer than two.
    """
    if layout is not None:
        found = _of_layout(splits, name, layout)
    else:
        found = _of_columns(splits, name, prompt_columns, option_columns, answer_column)
    return {
        split: Dataset.from_dict(columns, features=FEATURES, split=splits[split].split)
        for split, columns in found.items()
    }


def _of_layout(splits: Mapping[str, Dataset], name: str, layout: str) -> dict[str, dict[str, list]]:
    if layout not in CHOICES:
        raise PartialLoraError(f"task.format={layout}: expected one of {', '.join(CHOICES)}, or null for a table")
    column, said = LACKING.get(layout, (None, ""))
    if column and column not in splits["train"].column_names:
        logger.warning("task=%s: there is no column %s: %s", name, column, said)
    found = {}
    for split, rows in splits.items():
        columns = found[split] = _columns()
        for row, choice in given.read(rows, name, split, CHOICES[layout], f"task.format={layout}"):
            _check(choice.options, name, split, row)
            names = [str(each).strip() for each in choice.names]
            answer = str(choice.answer).strip()
            if answer not in names:
                raise PartialLoraError(_no_option(name, split, row, answer, f"they are called {', '.join(names)}"))
            _add(columns, choice.prompts, choice.options, names.index(answer))
    return found


def _of_columns(
    splits: Mapping[str, Dataset],
    name: str,
    prompt_columns: Sequence[str],
    option_columns: Sequence[str],
    answer_column: str | None,
) -> dict[str, dict[str, list]]:
    def choice_of(row: Mapping[str, Any]) -> Choice:
        prompt, options = given.joined(row, prompt_columns), _options(row, option_columns)
        return Choice([prompt] * len(options), options, (), given.text_of(row[answer_column]))

    every: list[tuple[str, int, Choice]] = []
    for split, rows in splits.items():
        given.named(rows, name, "prompt_columns", prompt_columns)
        given.named(rows, name, "option_columns", option_columns)
        given.named(rows, name, "answer_column", [answer_column] if answer_column else [])
        kept = rows.select_columns(list(dict.fromkeys([*prompt_columns, *option_columns, answer_column])))
        for row, choice in given.read(kept, name, split, choice_of, "task.answer_column"):
            _check(choice.options, name, split, row)
            if not choice.prompts[0].strip():
                columns = ", ".join(prompt_columns)
                raise PartialLoraError(f"{given.place(name, split, row)} has no prompt (task.prompt_columns={columns})")
            every.append((split, row, choice))
    reading = _reading([choice for _, _, choice in every])
    found = {split: _columns() for split in splits}
    for split, row, choice in every:
        label = reading(choice.answer, choice.options)
        if label is None:
            expected = f"task.answer_column={answer_column} has to be {_READ}, in all rows alike"
            raise PartialLoraError(_no_option(name, split, row, choice.answer, expected))
        space = "" if choice.prompts[0][-1].isspace() else " "
        _add(found[split], choice.prompts, [space + option for option in choice.options], label)
    if reading is _by_place and not any(0 in columns["label"] for columns in found.values()):
        logger.warning("task=%s: no answer in %s is 0, which is the place of the first option", name, answer_column)
    return found


def _options(row: Mapping[str, Any], columns: Sequence[str]) -> list[str]:
    if len(columns) > 1:
        return [given.text_of(row.get(column)) for column in columns]
    values = row[columns[0]]
    values = values.get("text", values) if isinstance(values, dict) else values
    return [given.text_of(value) for value in values] if isinstance(values, list) else [given.text_of(values)]


def _check(options: Sequence[str], name: str, split: str, row: int) -> None:
    if len(options) < 2:
        raise PartialLoraError(f"{given.place(name, split, row)} has {len(options)} options, expected at least two")
    empty = next((number for number, option in enumerate(options, 1) if not option.strip()), None)
    if empty:
        raise PartialLoraError(f"{given.place(name, split, row)}: its option {empty} of {len(options)} is empty")


def _no_option(name: str, split: str, row: int, answer: str, expected: str) -> str:
    return f"{given.place(name, split, row)}: the answer {answer!r} is none of its options; {expected}"


def _by_text(answer: str, options: Sequence[str]) -> int | None:
    return options.index(answer) if options.count(answer) == 1 else None


def _by_letter(answer: str, options: Sequence[str]) -> int | None:
    place = ord(answer.upper()) - ord("A") if len(answer) == 1 else -1
    return place if 0 <= place < len(options) else None


def _by_place(answer: str, options: Sequence[str]) -> int | None:
    return int(answer) if answer.isdecimal() and int(answer) < len(options) else None


def _reading(choices: Sequence[Choice]) -> Callable[[str, Sequence[str]], int | None]:
    """How answers are written: the first of the ways that makes sense of most rows."""

    def fits(reading: Callable) -> int:
        return sum(reading(choice.answer, choice.options) is not None for choice in choices)

    return max((_by_text, _by_letter, _by_place), key=fits)


def _columns() -> dict[str, list]:
    return {column: [] for column in FEATURES}


def _add(columns: dict[str, list], prompts: list[str], options: list[str], label: int) -> None:
    columns["prompts"].append(prompts)
    columns["options"].append(options)
    columns["label"].append(label)
