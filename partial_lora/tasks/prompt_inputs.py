"""Conversion of prompts, with options or responses, to the inputs of a causal language model."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby

import jinja2
import torch
from datasets import Dataset, Features, List, Value
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from partial_lora.errors import PartialLoraError
from partial_lora.tasks.config import TaskConfig
from partial_lora.tasks.image_folders import FILES
from partial_lora.tasks.metrics import IGNORED
from partial_lora.tasks.questions import ASSISTANT
from partial_lora.tasks.text_inputs import cached, fingerprint, in_memory

Tokens = list[int]
Message = Mapping[str, str]  # role and content
Prompt = str | Sequence[Message]  # a text, or a conversation that is to be continued
_MARK = re.compile(r"\{%-?\s*generation\b")  # marks, in a template, what an assistant writes


@dataclass(frozen=True)
class Continuations:
    """Tokenisation of prompts, alone and with what continues them.

    chat: put prompts into the tokenizer's chat template as the user's messages, and continuations as the replies.
    """

    tokenizer: PreTrainedTokenizerBase
    chat: bool = False

    def __post_init__(self) -> None:
        if self.chat and not self.tokenizer.chat_template:
            raise PartialLoraError(
                "task.chat_template=true: the model's tokenizer has no chat template; leave it null, or choose a model "
                "that was tuned to chat"
            )

    def contexts(self, prompts: Sequence[Prompt]) -> list[Tokens]:
        """Return the tokens of prompts that are to be continued.

        A plain prompt loses the space at its end, which belongs to the word that follows.
        """
        texts = [self._context(prompt) for prompt in prompts]
        return self._with_start(texts, self._encoded(texts))

    def pairs(self, prompts: Sequence[str], continuations: Sequence[str], ends: bool) -> list[tuple[Tokens, Tokens]]:
        """Return the tokens of prompts and of their continuations, at least one token each.

        Prompt and continuation are tokenised together. The tokens past those of the prompt alone are the continuation,
        as in lm-evaluation-harness; its first token may hold characters of both.

        continuations: each begins with a space, unless its prompt ends in one.
        ends: True for complete continuations, whose end token is learned too.
        """
        texts = [self._context(prompt) for prompt in prompts]
        triples = zip(prompts, texts, continuations, strict=True)
        continuations = [self._continuation(*triple, ends) for triple in triples]
        together = self._encoded([text + after for text, after in zip(texts, continuations, strict=True)])
        alone = self._encoded(texts)
        answers = [
            both[len(context) :] or self._encoded([continuation])[0]
            for context, both, continuation in zip(alone, together, continuations, strict=True)
        ]
        end = self.tokenizer.eos_token_id
        if ends and end is not None:
            answers = [tokens if tokens[-1:] == [end] else [*tokens, end] for tokens in answers]
        return list(zip(self._with_start(texts, alone), answers, strict=True))

    def conversation(self, messages: Sequence[Message]) -> tuple[Tokens, list[bool], Tokens]:
        """Return the tokens before the last answer, True for those of earlier answers, and the last answer's tokens.

        Where the template marks what an assistant writes ({% generation %}), that is an answer. Else the tokens of an
        answer are those past the tokens of all before it, as in `pairs`, up to the token that ends its turn.

        messages: the last one is an assistant's. Raises ValueError, with a message for users, where the template
        refuses them or does not tell where an answer is.
        """
        try:
            if _MARK.search(self.tokenizer.get_chat_template()):
                return self._marked(messages)
            return self._between_prefixes(messages)
        except jinja2.TemplateError as error:
            raise ValueError(f"the model's chat template refuses it ({error})") from error

    def _marked(self, messages: Sequence[Message]) -> tuple[Tokens, list[bool], Tokens]:
        encoded = self.tokenizer.apply_chat_template(
            list(messages), return_dict=True, return_assistant_tokens_mask=True
        )
        tokens, marks = encoded["input_ids"], [bool(mark) for mark in encoded["assistant_masks"]]
        if not any(marks):
            raise ValueError("the model's chat template marks no token of its answers")
        end = len(marks) - marks[::-1].index(True)
        start = end - next((back for back, mark in enumerate(marks[:end][::-1]) if not mark), end)
        return tokens[:start], marks[:start], tokens[start:end]

    def _between_prefixes(self, messages: Sequence[Message]) -> tuple[Tokens, list[bool], Tokens]:
        whole = self._written(messages)
        spans = [
            self._span(messages, place, whole) for place, message in enumerate(messages) if message["role"] == ASSISTANT
        ]
        prefixes = self._encoded([whole[:end] for span in spans for end in span])
        tokens, ends = prefixes[-1], list(map(len, prefixes))
        trained = [False] * len(tokens)
        for start, stop in zip(ends[::2], ends[1::2], strict=True):
            trained[start:stop] = [True] * (stop - start)
        start, end = ends[-2], self.tokenizer.eos_token_id
        answer = tokens[start:]
        return tokens[:start], trained[:start], answer if answer[-1:] == [end] or end is None else [*answer, end]

    def _span(self, messages: Sequence[Message], place: int, whole: str) -> tuple[int, int]:
        """Return where in the text of a conversation an answer starts and where its turn has ended."""
        before, through = self._context(messages[:place]), self._written(messages[: place + 1])
        end = self.tokenizer.eos_token
        if whole.startswith(before):
            start = len(before)
            if whole.startswith(through):
                last = whole.rfind(end, start, len(through)) if end else -1
                return start, len(through) if last < 0 else last + len(end)
            if end and (first := whole.find(end, start)) >= 0:  # earlier answers are written differently from the last
                return start, first + len(end)
        raise ValueError(
            f"the model's chat template rewrites what is before message {place + 1} when that is added; mark in the "
            "template what an assistant writes by {% generation %}"
        )

    def _written(self, messages: Sequence[Message]) -> str:
        return self.tokenizer.apply_chat_template(list(messages), tokenize=False)

    def _context(self, prompt: Prompt) -> str:
        """Return a prompt as the model reads it, up to the place where it continues."""
        if not self.chat:
            return prompt.rstrip()
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def _continuation(self, prompt: str, context: str, text: str, ends: bool) -> str:
        """Return what follows a context: in a chat a reply as the template writes it, up to its end if it `ends`."""
        if not self.chat:
            return prompt[len(context) :] + text
        reply = text.lstrip()
        if not ends:
            return reply
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
        chat = self.tokenizer.apply_chat_template(messages, tokenize=False)
        if not chat.startswith(context):  # the template may put thoughts before a reply
            return reply
        tail, end = chat[len(context) :], self.tokenizer.eos_token
        return tail[: tail.rindex(end) + len(end)] if end and end in tail else tail

    def _with_start(self, texts: Sequence[str], encoded: Sequence[Tokens]) -> list[Tokens]:
        """Return contexts with the tokens that start any text before them; an empty one gets at least one token.

        A template, and a prompt that begins with such a token itself, get no second one.
        """
        tokenizer, start = self.tokenizer, self.start
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        least = bos if bos is not None else eos if eos is not None else 0
        contexts = []
        for text, tokens in zip(texts, encoded, strict=True):
            started = self.chat or (tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token))
            contexts.append((list(tokens) if started else [*start, *tokens]) or [least])
        return contexts

    @property
    def start(self) -> Tokens:
        """The special tokens that the tokenizer puts before any text."""
        (plain,) = self._encoded(["a"])
        whole = self.tokenizer(["a"], verbose=False)["input_ids"][0]
        before = next(at for at in range(len(whole)) if whole[at : at + len(plain)] == plain)
        return list(whole[:before])

    def _encoded(self, texts: Sequence[str]) -> list[Tokens]:
        if not texts:
            return []
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]


_ANSWERS = Features({"input_ids": List(Value("int32")), "answer_start": Value("int32"), "length": Value("int32")})
_MAYBE_CUT = {"cut": Value("bool")}
_OF_CHATS = {"trained": List(Value("bool"))}  # whether a token belongs to an answer
_OPTIONS = Features(
    _ANSWERS | {"item": Value("int32"), "right": Value("bool"), "characters": Value("int32")}  # of an option
)


class CausalTransform:
    """Converts prompts with responses to input_ids, attention_mask and labels, each (N, L).

    Only the tokens of the answer are labels, all else is -100; the model itself shifts them by one token. Rows with
    `messages` are conversations, and every answer in one is trained. A sequence that is longer than `max_length` tokens
    loses the start of its prompt or conversation, but nothing of a last answer that fits by itself.

    Args:
        chat: put prompts and answers into the tokenizer's chat template.
        too_long: what becomes of an answer that does not fit by itself: "refuse" raises; "cut" takes off its end and
            leaves the prompt up to half of the tokens; "drop" leaves out its row, though not of rows to judge by
            (`to_judge`). `warnings` say how many there were.

    Raises PartialLoraError where `chat` finds no template.
    """

    lengths = True  # prepared rows have a column `length`, of tokens
    ends = True  # answers end with the tokenizer's end token

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int, *, chat: bool = False, too_long: str = "refuse"
    ) -> None:
        self.tokenizer, self.chat, self.warnings = tokenizer, chat, []
        self._too_long = too_long
        self._max_length, self._tokens = max_length, Continuations(tokenizer, chat)

    @classmethod
    def of(cls, task: TaskConfig, *, tokenizer: PreTrainedTokenizerBase, max_length: int) -> CausalTransform:
        """Return the transform of a task's rows. A benchmark's prompts stay as they are: they are what is compared."""
        is_benchmark = task.format is not None and task.path != FILES
        chat = not is_benchmark and tokenizer.chat_template is not None
        chat = chat if task.chat_template is None else task.chat_template
        return cls(tokenizer, max_length, chat=chat, too_long=task.too_long if cls.ends else "refuse")

    def prepare(self, rows: Dataset, *, cache_bytes: int) -> Dataset:
        """Return rows to train on, for `collate`: the right answer of each, tokens without padding.

        Columns: input_ids, answer_start (the place of the answer's first token) and length. On disk where they cannot
        need more than `cache_bytes`, else in memory. Raises PartialLoraError for an answer that is too long ("refuse"),
        and where none fits.
        """
        convert = partial(self._right_answers, split=rows.split)
        prepared = self._prepared(rows, convert, self._features(rows), len(rows), cache_bytes)
        if self._too_long == "refuse":
            return prepared
        if count := sum(prepared["cut"]) + len(rows) - len(prepared):
            self.warnings.append(
                f"task.too_long={self._too_long}: {count} of {len(rows)} answers of the {rows.split or 'given'} rows "
                f"do not fit into model.max_length={self._max_length}"
            )
        if len(prepared) == 0:
            raise PartialLoraError(f"model.max_length={self._max_length}: no answer fits, expected more; raise it")
        return prepared

    def to_judge(self, rows: Dataset, *, cache_bytes: int) -> Dataset:
        """Return all rows as `prepare` does; an answer whose row training would drop loses its end."""
        keeping = copy.copy(self)
        keeping._too_long = "cut" if self._too_long == "drop" else self._too_long
        return keeping.prepare(rows, cache_bytes=cache_bytes)

    def collate(self, rows: Sequence[Mapping[str, object]]) -> dict[str, Tensor]:
        """Make one batch of prepared rows, padded on the right to the longest of them."""
        tokens = [torch.tensor(row["input_ids"]) for row in rows]
        labels = [ids.clone() for ids in tokens]
        for label, row in zip(labels, rows, strict=True):
            if "trained" in row:
                label[~torch.tensor(row["trained"])] = IGNORED
            else:
                label[: row["answer_start"]] = IGNORED
        return self._padded(tokens, "right") | {"labels": pad_sequence(labels, True, IGNORED)}

    def batches(self, rows: Dataset, size: int) -> list[dict[str, Tensor]]:
        """Return all rows in order, at most `size` a batch: for few-shot draws, which fit in memory."""
        convert = partial(self._right_answers, split=rows.split)
        prepared = in_memory(rows, convert, self._features(rows)).to_list()
        return [self.collate(prepared[start : start + size]) for start in range(0, len(prepared), size)]

    training_batches = batches

    def encode(self, prompts: Sequence[Prompt], room: int | None = None) -> dict[str, Tensor]:
        """Make one batch of prompts to be continued, padded on the left. room: the most tokens of each."""
        start, most = self._tokens.start, min(self._max_length, room or self._max_length)
        contexts = [torch.tensor(context) for context in self._tokens.contexts(prompts)]
        return self._padded([context[_kept(context.tolist(), most, start)] for context in contexts], "left")

    def _features(self, rows: Dataset) -> Features:
        """Return the columns of prepared rows to train on."""
        features = dict(_ANSWERS) | ({} if self._too_long == "refuse" else _MAYBE_CUT)
        if "messages" not in rows.column_names:
            return Features(features)
        if not self._tokens.chat:
            raise PartialLoraError(
                "task.chat_template: conversations are written by the chat template of the model's tokenizer, expected "
                "one; choose a model that was tuned to chat, or task.prompt_columns and task.response_column"
            )
        return Features(features | _OF_CHATS)

    def _prepared(self, rows: Dataset, convert: Callable, features: Features, count: int, cache_bytes: int) -> Dataset:
        if count * (self._max_length * 4 + 20) > cache_bytes:
            return in_memory(rows, convert, features)
        key = {
            "tokenizer": fingerprint(self.tokenizer),
            "template": str(self.tokenizer.chat_template) if self._tokens.chat else None,
            "max_length": self._max_length,
            "ends": self.ends,
            "columns": list(features),
            "too_long": self._too_long,
        }
        return cached(rows, convert, features, key)

    def _right_answers(self, batch: Mapping[str, list], places: Sequence[int], split: object) -> dict[str, list]:
        """Return the columns of the right answers of a batch of rows."""
        if "messages" in batch:
            return self._conversations(batch["messages"], places, split)
        return self._sequences(*self._answered(batch), places, split)

    def _answered(self, batch: Mapping[str, list]) -> tuple[list[str], list[str]]:
        """Return the prompts of a batch of rows, and their right answers."""
        answers = [
            response if not prompt or prompt[-1].isspace() else f" {response}"
            for prompt, response in zip(batch["prompt"], batch["response"], strict=True)
        ]
        return batch["prompt"], answers

    def _sequences(
        self, prompts: Sequence[str], answers: Sequence[str], places: Sequence[int], split: object
    ) -> dict[str, list]:
        pairs = self._tokens.pairs(prompts, answers, ends=self.ends)
        columns = self._fitted([(context, [False] * len(context), answer) for context, answer in pairs], places, split)
        del columns["trained"]  # nothing before the answer trains
        return columns

    def _conversations(
        self, conversations: Sequence[Sequence[Message]], places: Sequence[int], split: object
    ) -> dict[str, list]:
        parts = []
        for place, messages in zip(places, conversations, strict=True):
            try:
                parts.append(self._tokens.conversation(messages))
            except ValueError as error:
                raise PartialLoraError(f"row {place + 1} of the {split or 'given'} rows: {error}") from error
        return self._fitted(parts, places, split)

    def _fitted(
        self, parts: Sequence[tuple[Tokens, list[bool], Tokens]], places: Sequence[int], split: object
    ) -> dict[str, list]:
        """Return the columns of sequences that are not too long.

        parts: what is before the last answer, which of it is trained, and that answer.
        """
        names = [*_ANSWERS, *_OF_CHATS, *({} if self._too_long == "refuse" else _MAYBE_CUT)]
        columns: dict[str, list] = {name: [] for name in names}
        start = self._tokens.start
        for place, (context, trained, answer) in zip(places, parts, strict=True):
            room = self._max_length - len(answer)
            if (is_cut := room < 1) and self._too_long == "drop":
                continue
            if is_cut and self._too_long == "cut":
                room = max(1, min(len(context), self._max_length // 2))
                answer = answer[: self._max_length - room]
            elif is_cut:
                raise PartialLoraError(
                    f"model.max_length={self._max_length}: an answer of row {place + 1} of the {split or 'given'} rows "
                    f"has {len(answer)} tokens, expected at most {self._max_length - 1}; raise it or leave the row out"
                )
            kept = _kept(context, room, start)
            columns["input_ids"].append([*(context[index] for index in kept), *answer])
            columns["trained"].append([*(trained[index] for index in kept), *[True] * len(answer)])
            columns["answer_start"].append(len(kept))
            columns["length"].append(len(kept) + len(answer))
            if "cut" in columns:
                columns["cut"].append(is_cut)
        return columns

    def _padded(self, tokens: Sequence[Tensor], side: str) -> dict[str, Tensor]:
        pad = self.tokenizer.pad_token_id
        mask = [torch.ones_like(ids) for ids in tokens]
        return {
            "input_ids": pad_sequence(tokens, True, 0 if pad is None else pad, padding_side=side),
            "attention_mask": pad_sequence(mask, True, 0, padding_side=side),
        }


class ChoiceTransform(CausalTransform):
    """Converts prompts with options: the right one of each to train on, or all of them to score."""

    ends = False

    def options(self, rows: Dataset, *, cache_bytes: int) -> Dataset:
        """Return rows to score, one for each option, a question's options in sequence, with three more columns.

        item (the number of the question), right (True for the right option), characters (the option's length, by which
        lm-evaluation-harness's acc_norm divides).
        """
        count = sum(map(len, rows["options"]))
        return self._prepared(rows, partial(self.option_columns, split=rows.split), _OPTIONS, count, cache_bytes)

    def batches(self, rows: Dataset, size: int) -> list[dict[str, Tensor]]:
        """Return all options in order, at most `size` a batch, but all options of a question in one, however many.

        A batch also has `items` (N,), the question of each option, and `answers` (N,), True for the right option.
        """
        batches: list[list[dict]] = [[]]
        options = in_memory(rows, partial(self.option_columns, split=rows.split), _OPTIONS).to_list()
        for _, item in groupby(options, key=lambda row: row["item"]):
            item = list(item)
            if batches[-1] and len(batches[-1]) + len(item) > size:
                batches.append([])
            batches[-1] += item
        return [
            self.collate(batch)
            | {
                "items": torch.tensor([row["item"] for row in batch]),
                "answers": torch.tensor([row["right"] for row in batch]),
            }
            for batch in batches
            if batch
        ]

    def option_columns(self, batch: Mapping[str, list], places: Sequence[int], split: object = None) -> dict[str, list]:
        """Return the columns of `options` for a batch of rows, and their places in the split."""
        prompts = [prompt for row in batch["prompts"] for prompt in row]
        options = [option for row in batch["options"] for option in row]
        counts = list(map(len, batch["options"]))
        items = [place for place, count in zip(places, counts, strict=True) for _ in range(count)]
        return self._sequences(prompts, options, items, split) | {
            "item": items,
            "right": [
                place == label for count, label in zip(counts, batch["label"], strict=True) for place in range(count)
            ],
            "characters": [len(option.removeprefix(" ")) for option in options],
        }

    def _answered(self, batch: Mapping[str, list]) -> tuple[list[str], list[str]]:
        labels = batch["label"]
        prompts, options = (
            [texts[label] for texts, label in zip(batch[column], labels, strict=True)]
            for column in ("prompts", "options")
        )
        return prompts, options


def _kept(context: Tokens, room: int, start: Tokens) -> list[int]:
    """Return the places of the tokens of a context that fit: the last ones, after those that start any text."""
    if len(context) <= room:
        return list(range(len(context)))
    first = len(start) if context[: len(start)] == start and room > len(start) else 0
    return [*range(first), *range(len(context) - room + first, len(context))]
