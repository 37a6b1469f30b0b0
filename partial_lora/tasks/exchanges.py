"""Prompts with the responses to them: of a known data set, or of a table of the user's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset, Features, Value

from partial_lora.errors import PartialLoraError
from partial_lora.tasks import given
from partial_lora.tasks.answers import final_number
from partial_lora.tasks.formats import EXCHANGES, Exchange

FEATURES = Features({"prompt": Value("string"), "response": Value("string")})


def read(
    splits: Mapping[str, Dataset],
    name: str,
    layout: str | None,
    prompt_columns: Sequence[str],
    response_column: str | None,
    answer: str | None,
) -> dict[str, Dataset]:
    """The rows of every split as `prompt` and `response`.

    Args:
        layout: one of `formats.EXCHANGES`; None for a table, which is read by its columns.
        prompt_columns: what the response is to, a line each.
        answer: "number" where every response has to come to one.

    Raises PartialLoraError, in one line, for a column, a prompt, a response or the number of one that is missing.
    """
    if layout is not None and layout not in EXCHANGES:
        raise PartialLoraError(f"task.format={layout}: expected one of {', '.join(EXCHANGES)}, or null for a table")

    def exchange_of(row: Mapping[str, Any]) -> Exchange:
        return Exchange(given.joined(row, prompt_columns), given.text_of(row[response_column]))

    found = {}
    for split, rows in splits.items():
        if layout is None:
            given.named(rows, name, "prompt_columns", prompt_columns)
            given.named(rows, name, "response_column", [response_column] if response_column else [])
            rows = rows.select_columns(list(dict.fromkeys([*prompt_columns, response_column])))
        read_one = exchange_of if layout is None else EXCHANGES[layout]
        columns: dict[str, list[str]] = {"prompt": [], "response": []}
        for row, exchange in given.read(rows, name, split, read_one, f"task.format={layout}"):
            for part, text in zip(columns, exchange, strict=True):
                if not text.strip():
                    raise PartialLoraError(f"{given.place(name, split, row)} has no {part}, its text is empty")
                columns[part].append(text)
            if answer == "number" and final_number(exchange.response) is None:
                raise PartialLoraError(
                    f"{given.place(name, split, row)}: its response has no number (task.answer=number)"
                )
        found[split] = Dataset.from_dict(columns, features=FEATURES, split=rows.split)
    return found
