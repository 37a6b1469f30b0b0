"""Questions with options: of a known data set, or of a table of the user's own."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

from datasets import Dataset, Features, List, Value

from partial_lora.errors import PartialLoraError
from partial_lora.tasks import sources

# --- Rows of known data sets as lm-evaluation-harness (0.4.13) puts them to a language model, one function a layout

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


CHOICE_FEATURES = Features(
    {"prompts": List(Value("string")), "options": List(Value("string")), "label": Value("int64")}
)
_READ = "an option's text, its letter (A is the first) or its place (0 is the first)"

logger = logging.getLogger(__name__)


def read_choices(
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
        split: Dataset.from_dict(columns, features=CHOICE_FEATURES, split=splits[split].split)
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
        for row, choice in sources.read_given(rows, name, split, CHOICES[layout], f"task.format={layout}"):
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
        prompt, options = sources.joined(row, prompt_columns), _options(row, option_columns)
        return Choice([prompt] * len(options), options, (), sources.text_of(row[answer_column]))

    every: list[tuple[str, int, Choice]] = []
    for split, rows in splits.items():
        sources.named(rows, name, "prompt_columns", prompt_columns)
        sources.named(rows, name, "option_columns", option_columns)
        sources.named(rows, name, "answer_column", [answer_column] if answer_column else [])
        kept = rows.select_columns(list(dict.fromkeys([*prompt_columns, *option_columns, answer_column])))
        for row, choice in sources.read_given(kept, name, split, choice_of, "task.answer_column"):
            _check(choice.options, name, split, row)
            if not choice.prompts[0].strip():
                columns = ", ".join(prompt_columns)
                raise PartialLoraError(
                    f"{sources.place(name, split, row)} has no prompt (task.prompt_columns={columns})"
                )
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
        return [sources.text_of(row.get(column)) for column in columns]
    values = row[columns[0]]
    values = values.get("text", values) if isinstance(values, dict) else values
    return [sources.text_of(value) for value in values] if isinstance(values, list) else [sources.text_of(values)]


def _check(options: Sequence[str], name: str, split: str, row: int) -> None:
    if len(options) < 2:
        raise PartialLoraError(f"{sources.place(name, split, row)} has {len(options)} options, expected at least two")
    empty = next((number for number, option in enumerate(options, 1) if not option.strip()), None)
    if empty:
        raise PartialLoraError(f"{sources.place(name, split, row)}: its option {empty} of {len(options)} is empty")


def _no_option(name: str, split: str, row: int, answer: str, expected: str) -> str:
    return f"{sources.place(name, split, row)}: the answer {answer!r} is none of its options; {expected}"


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
    return {column: [] for column in CHOICE_FEATURES}


def _add(columns: dict[str, list], prompts: list[str], options: list[str], label: int) -> None:
    columns["prompts"].append(prompts)
    columns["options"].append(options)
    columns["label"].append(label)


# --- What of a text in words is its answer.

_MARK = "####"  # what GSM8K writes before the answer
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]%])[-+−])?"  # after a digit or a bracket it is an operator: 16-3 has no number -3
    r"(?:[$€£](?P<inner>[-+−])?)?"
    r"(?P<digits>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)"
)


def final_number(text: str) -> Decimal | None:
    """The number that a text comes to: the first one after ####, where that is written, or else its last one.

    Signs, commas between thousands, decimals and a currency's sign are understood: "-$1,234.50" is -1234.50. None of a
    text without a number.
    """
    _, mark, after = text.partition(_MARK)
    numbers = list(_NUMBER.finditer(after if mark else text))
    if not numbers:
        return None
    found = numbers[0 if mark else -1]
    size = Decimal(found["digits"].replace(",", ""))
    return -size if (found["sign"] or found["inner"] or "+") in "-−" else size


# --- Prompts with the responses to them: of a known data set, or of a table of the user's own.

EXCHANGE_FEATURES = Features({"prompt": Value("string"), "response": Value("string")})


def read_exchanges(
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
        return Exchange(sources.joined(row, prompt_columns), sources.text_of(row[response_column]))

    found = {}
    for split, rows in splits.items():
        if layout is None:
            sources.named(rows, name, "prompt_columns", prompt_columns)
            sources.named(rows, name, "response_column", [response_column] if response_column else [])
            rows = rows.select_columns(list(dict.fromkeys([*prompt_columns, response_column])))
        read_one = exchange_of if layout is None else EXCHANGES[layout]
        columns: dict[str, list[str]] = {"prompt": [], "response": []}
        for row, exchange in sources.read_given(rows, name, split, read_one, f"task.format={layout}"):
            for part, text in zip(columns, exchange, strict=True):
                if not text.strip():
                    raise PartialLoraError(f"{sources.place(name, split, row)} has no {part}, its text is empty")
                columns[part].append(text)
            if answer == "number" and final_number(exchange.response) is None:
                raise PartialLoraError(
                    f"{sources.place(name, split, row)}: its response has no number (task.answer=number)"
                )
        found[split] = Dataset.from_dict(columns, features=EXCHANGE_FEATURES, split=rows.split)
    return found
