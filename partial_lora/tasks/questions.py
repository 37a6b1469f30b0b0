"""Questions with options, and prompts with responses, out of rows in a known format or in columns that are named."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from string import ascii_uppercase
from typing import TypeVar

from datasets import Dataset, Features, List, Value

from partial_lora import progress
from partial_lora.errors import PartialLoraError, one_line
from partial_lora.tasks.config import TaskConfig
from partial_lora.tasks.metrics import final_number
from partial_lora.tasks.prompt_formats import CHOICES, COMPLETIONS, OPTIONAL, Choice, Completion, Row
from partial_lora.tasks.sources import LAYOUTS, Layout, label_name, row_name

Formatted = TypeVar("Formatted")

CHOICE_FEATURES = Features(
    {"prompts": List(Value("string")), "options": List(Value("string")), "label": Value("int64")}
)
COMPLETION_FEATURES = Features({"prompt": Value("string"), "response": Value("string")})
ASSISTANT = "assistant"  # the role whose messages are a conversation's answers
_SHAREGPT = {"human": "user", "gpt": ASSISTANT}  # its names of roles
_MESSAGES = {"messages": List({"role": Value("string"), "content": Value("string")})}

logger = logging.getLogger(__name__)


# --- Splits of rows, formatted.


def format_choices(splits: Mapping[str, Dataset], config: TaskConfig) -> dict[str, Dataset]:
    """Return every split's rows as `prompts` and `options`, a text each, and `label`, the right option's place.

    Raises PartialLoraError, in one line, for a column or an answer that is missing, an answer that is no option, an
    empty option and a question with fewer than two options.
    """
    choices = (_choices_of_columns if config.format is None else _choices_of_format)(splits, config)
    return {
        split: Dataset.from_list(
            [dict(zip(CHOICE_FEATURES, choice, strict=True)) for choice in choices[split]],
            features=CHOICE_FEATURES,
            split=rows.split,
        )
        for split, rows in splits.items()
    }


def _choices_of_format(splits: Mapping[str, Dataset], config: TaskConfig) -> dict[str, list[tuple]]:
    name, format = config.name, config.format
    if format not in CHOICES:
        raise PartialLoraError(f"task.format={format}: expected one of {', '.join(CHOICES)}, or null for a table")
    column, warning = OPTIONAL.get(format, (None, ""))
    if column and column not in splits["train"].column_names:
        logger.warning("task=%s: there is no column %s: %s", name, column, warning)
    labelled = {}
    for split, rows in splits.items():
        labelled[split] = []
        for row, choice in _formatted(rows, name, split, CHOICES[format], f"task.format={format}"):
            _check_options(choice.options, name, split, row)
            names, answer = [str(option).strip() for option in choice.names], str(choice.answer).strip()
            if answer not in names:
                raise _no_option(name, split, row, answer, f"they are called {', '.join(names)}")
            labelled[split].append((choice.prompts, choice.options, names.index(answer)))
    return labelled


def _choices_of_columns(splits: Mapping[str, Dataset], config: TaskConfig) -> dict[str, list[tuple]]:
    name, answer_column = config.name, config.answer_column
    columns = [*config.prompt_columns, *config.option_columns, answer_column]

    def choice_of(row: Row) -> Choice:
        prompt, options = _lines(row, config.prompt_columns), _options(row, config.option_columns)
        return Choice([prompt] * len(options), options, (), _text(row[answer_column]))

    choices: list[tuple[str, int, Choice]] = []
    for split, rows in splits.items():
        _check_columns(rows, name, "prompt_columns", config.prompt_columns)
        _check_columns(rows, name, "option_columns", config.option_columns)
        _check_columns(rows, name, "answer_column", [answer_column] if answer_column else [])
        read = rows.select_columns(list(dict.fromkeys(columns)))
        for row, choice in _formatted(read, name, split, choice_of, "task.answer_column"):
            _check_options(choice.options, name, split, row)
            if not choice.prompts[0].strip():
                listed = ", ".join(config.prompt_columns)
                raise PartialLoraError(f"{row_name(name, split, row)} has no prompt (task.prompt_columns={listed})")
            choices.append((split, row, choice))

    # Answers are texts, letters or places, in all rows alike: take what fits most rows, the first among equals.
    def fitting(parse: Callable[[str, Sequence[str]], int | None]) -> int:
        return sum(parse(choice.answer, choice.options) is not None for *_, choice in choices)

    parse = max((_by_text, _by_letter, _by_place), key=fitting)
    labelled = {split: [] for split in splits}
    for split, row, choice in choices:
        label = parse(choice.answer, choice.options)
        if label is None:
            expected = (
                f"task.answer_column={answer_column} has to be an option's text, its letter (A is the first) or its "
                "place (0 is the first), in all rows alike"
            )
            raise _no_option(name, split, row, choice.answer, expected)
        space = "" if choice.prompts[0][-1].isspace() else " "
        labelled[split].append((choice.prompts, [space + option for option in choice.options], label))
    if parse is _by_place and not any(label == 0 for rows in labelled.values() for *_, label in rows):
        logger.warning("task=%s: no answer in %s is 0, which is the place of the first option", name, answer_column)
    return labelled


def _by_text(answer: str, options: Sequence[str]) -> int | None:
    return options.index(answer) if options.count(answer) == 1 else None


def _by_letter(answer: str, options: Sequence[str]) -> int | None:
    place = ascii_uppercase.find(answer.upper()) if len(answer) == 1 else -1
    return place if 0 <= place < len(options) else None


def _by_place(answer: str, options: Sequence[str]) -> int | None:
    return int(answer) if answer.isdecimal() and int(answer) < len(options) else None


def _options(row: Row, columns: Sequence[str]) -> list[str]:
    if len(columns) > 1:
        return [_text(row.get(column)) for column in columns]
    values = row[columns[0]]
    values = values.get("text", values) if isinstance(values, dict) else values
    return [_text(value) for value in (values if isinstance(values, list) else [values])]


def _check_options(options: Sequence[str], name: str, split: str, row: int) -> None:
    if len(options) < 2:
        raise PartialLoraError(f"{row_name(name, split, row)} has {len(options)} options, expected at least two")
    for number, option in enumerate(options, 1):
        if not option.strip():
            raise PartialLoraError(f"{row_name(name, split, row)}: its option {number} of {len(options)} is empty")


def _no_option(name: str, split: str, row: int, answer: str, expected: str) -> PartialLoraError:
    return PartialLoraError(f"{row_name(name, split, row)}: the answer {answer!r} is none of its options; {expected}")


def format_completions(splits: Mapping[str, Dataset], config: TaskConfig) -> dict[str, Dataset]:
    """Return every split's rows as `prompt` and `response`; conversations also as `messages`, up to the last answer.

    Where neither a format nor a column is named, the first of `LAYOUTS` that the training rows have is read. Raises
    PartialLoraError, in one line, where a column, a prompt, a response or its number is missing.
    """
    name, format, messages_column = config.name, config.format, config.messages_column
    prompt_columns, response_column = config.prompt_columns, config.response_column
    if format is not None and format not in COMPLETIONS:
        raise PartialLoraError(f"task.format={format}: expected one of {', '.join(COMPLETIONS)}, or null for a table")
    if not (format or prompt_columns or response_column or messages_column):
        splits, layout = _with_layout(splits, name)
        prompt_columns, response_column = layout.prompt, layout.response
        if not prompt_columns:
            messages_column = response_column

    def completion_of(row: Row) -> Completion:
        if messages_column:
            return _last_answer(row[messages_column])
        return Completion(_lines(row, prompt_columns), _text(row[response_column]))

    formatted = {}
    for split, rows in splits.items():
        if messages_column:
            _check_columns(rows, name, "messages_column", [messages_column])
            rows = rows.select_columns([messages_column])
        elif format is None:
            _check_columns(rows, name, "prompt_columns", prompt_columns)
            _check_columns(rows, name, "response_column", [response_column] if response_column else [])
            rows = rows.select_columns(list(dict.fromkeys([*prompt_columns, response_column])))
        format_row = completion_of if format is None else COMPLETIONS[format]
        completions = []
        for row, completion in _formatted(rows, name, split, format_row, f"task.format={format}"):
            _check_completion(completion, config, split, row)
            chat = {"messages": _conversation(_messages(rows[row - 1][messages_column]))} if messages_column else {}
            completions.append(completion._asdict() | chat)
        features = Features(COMPLETION_FEATURES | (_MESSAGES if messages_column else {}))
        formatted[split] = Dataset.from_list(completions, features=features, split=rows.split)
    return formatted


def _check_completion(completion: Completion | str, config: TaskConfig, split: str, row: int) -> None:
    """Raise PartialLoraError for a conversation's fault, an empty text, or a response without the number it needs."""
    if isinstance(completion, str):
        raise PartialLoraError(f"{row_name(config.name, split, row)}: {completion} (task.messages_column)")
    for part, text in completion._asdict().items():
        if not text.strip():
            raise PartialLoraError(f"{row_name(config.name, split, row)} has no {part}, its text is empty")
    if config.answer == "number" and final_number(completion.response) is None:
        raise PartialLoraError(f"{row_name(config.name, split, row)}: its response has no number (task.answer=number)")


def _with_layout(splits: Mapping[str, Dataset], name: str) -> tuple[Mapping[str, Dataset], Layout]:
    """Return the rows and the layout of their columns; a prompt and a response that are messages become one column."""
    features = splits["train"].features
    layout = next((layout for layout in LAYOUTS if {*layout.prompt[:1], layout.response} <= features.keys()), None)
    if layout is None:
        layouts = "; ".join(" and ".join([*layout.prompt[:1], layout.response]) for layout in LAYOUTS)
        raise PartialLoraError(
            f"task.prompt_columns: {name} needs it, with task.response_column: set them to some of the columns "
            f"{', '.join(features)}, since there is none of the layouts {layouts}"
        )
    read = [column for column in (*layout.prompt, layout.response) if column in features]
    line = f"task={name}: read as {layout.name}, columns {', '.join(read)}"
    logger.info(line)
    progress.emit("rows", 0, 0, note=line)
    if not layout.prompt or isinstance(features[layout.response], Value):
        return splits, layout._replace(prompt=tuple(read[:-1]))
    joined = {}
    for split, rows in splits.items():
        _check_columns(rows, name, "prompt_columns", read)
        parts = zip(*(rows[column] for column in read), strict=True)
        chats = [[message for part in of_row for message in part or ()] for of_row in parts]
        joined[split] = Dataset.from_dict({"messages": chats}, split=rows.split)
    return joined, LAYOUTS[0]


def _messages(conversation: object) -> object:
    """Return a conversation with ShareGPT's messages, {from, value}, as those of chat templates, {role, content}."""
    if not isinstance(conversation, list):
        return conversation
    return [
        {"role": _SHAREGPT.get(message["from"], message["from"]), "content": message.get("value")}
        if isinstance(message, dict) and message.get("from") is not None
        else message
        for message in conversation
    ]


def _last_answer(messages: object) -> Completion | str:
    """Return an assistant's last message in a conversation, with all before it as the prompt; or what is wrong."""
    messages = _messages(messages)
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        return "expected a list of messages, each with a role and a content"
    for number, message in enumerate(messages, 1):
        if not all(isinstance(message.get(part), str) for part in ("role", "content")):
            return f"its message {number} has no role or no content that is a text"
        if message["role"] == ASSISTANT and not message["content"].strip():
            return f"its message {number}, an answer, is empty"
    *before, last = _conversation(messages) or [None]
    if last is None:
        return f"none of its messages has the role {ASSISTANT}, whose answers are trained"
    several = len(before) > 1
    prompt = [f"{message['role']}: {message['content']}" if several else message["content"] for message in before]
    return Completion("\n".join(prompt), last["content"])


def _conversation(messages: Sequence[Row]) -> list[dict[str, str]]:
    """Return the messages up to the last answer."""
    roles = [message["role"] for message in messages]
    count = len(roles) - roles[::-1].index(ASSISTANT) if ASSISTANT in roles else 0
    return [{"role": message["role"], "content": message["content"]} for message in messages[:count]]


def _formatted(
    rows: Dataset, name: str, split: str, format_row: Callable[[Row], Formatted], key: str
) -> Iterator[tuple[int, Formatted]]:
    """Yield every row's number, counted from 1, and what `format_row` makes of the columns that have a value.

    key: the setting that chose `format_row`. Raises PartialLoraError for a column that `format_row` did not find.
    """
    for number, row in enumerate(rows, 1):
        try:
            yield number, format_row({column: value for column, value in row.items() if value is not None})
        except KeyError as error:
            column = error.args[0]
            if column in rows.column_names:
                raise PartialLoraError(f"{row_name(name, split, number)} has no value in its column {column}") from None
            raise PartialLoraError(
                f"task={name}: {key} reads a column {column}; the columns of the {split} split are "
                f"{', '.join(rows.column_names)}"
            ) from None
        except (TypeError, AttributeError) as error:
            raise PartialLoraError(
                f"{row_name(name, split, number)} cannot be read by {key} ({one_line(error)})"
            ) from error


def _check_columns(rows: Dataset, name: str, key: str, columns: Sequence[str]) -> None:
    """Raise PartialLoraError unless the setting `key` names columns and all of them exist."""
    names = ", ".join(rows.column_names)
    if not columns:
        raise PartialLoraError(f"task.{key}: {name} needs it, set it to some of the columns {names}")
    for column in columns:
        if column not in rows.column_names:
            raise PartialLoraError(f"task.{key}={column}: {name} has no such column; its columns are {names}")


def _text(value: object) -> str:
    """Return a cell as text, without space around it: 3.0 is 3, and a cell without a value is empty."""
    return "" if value is None else label_name(value).strip()


def _lines(row: Row, columns: Sequence[str]) -> str:
    """Return the texts of several columns, a line each, without those that are empty."""
    return "\n".join(label_name(row[column]) for column in columns if _text(row.get(column)))
