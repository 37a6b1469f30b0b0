"""Conversion of prompts, with options or responses, to the inputs of a causal language model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import tokenizers
import torch
import transformers
from datasets import Dataset, Features, List, Value
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from partial_lora.errors import PartialLoraError
from partial_lora.tasks.texts import cached, fingerprint, in_memory

Tokens = list[int]


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

    def contexts(self, prompts: Sequence[str]) -> list[Tokens]:
        """Return the tokens of prompts that are to be continued.

        A plain prompt loses the space at its end, which belongs to the word that follows.
        """
        texts = [self._context(prompt) for prompt in prompts]
        return self._with_start(texts, self._encoded(texts))

    def pairs(self, prompts: Sequence[str], continuations: Sequence[str], ends: bool) -> list[tuple[Tokens, Tokens]]:
        """Return the tokens of prompts and of their continuations, at least one each.

        Prompt and continuation are tokenised together. The tokens past those of the prompt alone are the continuation,
        as in lm-evaluation-harness; its first token may be made of both.

        continuations: with the space that sets them off, or after a prompt that ends in one.
        ends: the continuation is complete, and its end a token to be learned too.
        """
        texts = [self._context(prompt) for prompt in prompts]
        if self.chat:
            triples = zip(prompts, texts, continuations, strict=True)
            continuations = [self._reply(prompt, text, reply, ends) for prompt, text, reply in triples]
        else:
            triples = zip(prompts, texts, continuations, strict=True)
            continuations = [prompt[len(text) :] + continuation for prompt, text, continuation in triples]
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

    def _context(self, prompt: str) -> str:
        """Return a prompt as the model reads it, up to the place where it continues."""
        if not self.chat:
            return prompt.rstrip()
        messages = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def _reply(self, prompt: str, context: str, reply: str, ends: bool) -> str:
        """Return a reply as the template writes it, up to the token that ends a turn; without that unless it `ends`."""
        reply = reply.lstrip()
        if not ends:
            return reply
        messages = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
        chat = self.tokenizer.apply_chat_template(messages, tokenize=False)
        if not chat.startswith(context):  # such as one that puts thoughts before a reply
            return reply
        written, end = chat[len(context) :], self.tokenizer.eos_token
        return written[: written.rindex(end) + len(end)] if end and end in written else written

    def _with_start(self, texts: Sequence[str], encoded: Sequence[Tokens]) -> list[Tokens]:
        """Return contexts after the tokens that start any text; an empty one without any starts at an end token.

        A template, or a prompt, that starts with such a token itself has no other put before it.
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


IGNORED = -100  # the label of a token that is not predicted, as in transformers
_ANSWERS = Features({"input_ids": List(Value("int32")), "answer_start": Value("int32"), "length": Value("int32")})
_MAYBE_CUT = Features(_ANSWERS | {"cut": Value("bool")})
_OPTIONS = Features(
    _ANSWERS | {"item": Value("int32"), "right": Value("bool"), "characters": Value("int32")}  # of an option
)


class CausalTransform:
    """Converts prompts with options, or with responses, to input_ids, attention_mask and labels, each (N, L).

    Only the tokens of the answer are labels, all else is -100; the model itself shifts them by one token. A sequence
    that is longer than `max_length` tokens loses the first of its prompt, never any of an answer that fits alone.

    Args:
        kind: "choice", or "generation", whose responses end with the tokenizer's end token.
        chat: put prompts and answers into the tokenizer's chat template.
        too_long: what becomes of an answer that does not fit alone: "refuse"; "cut", it loses its end, the prompt
            keeps up to half of the tokens; "drop", its row is left out. How many there are is among `warnings`.

    Raises PartialLoraError where there is no such template.
    """

    lengths = True  # prepared rows have a column `length`, of tokens

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        *,
        kind: str = "generation",
        chat: bool = False,
        too_long: str = "refuse",
    ) -> None:
        self.tokenizer, self.kind, self.warnings = tokenizer, kind, []
        self._too_long = too_long
        self._max_length, self._tokens = max_length, Continuations(tokenizer, chat)

    def prepare(self, rows: Dataset, *, cache_bytes: int) -> Dataset:
        """Return rows to train on, for `collate`: the right answer of each, tokens without padding.

        Columns: input_ids, answer_start (the place of the answer's first token) and length. On disk where they cannot
        need more than `cache_bytes`, else in memory. Raises PartialLoraError for an answer that is too long, where that
        is refused.
        """
        if self._too_long == "refuse":
            return self._prepared(rows, self._right_answers(rows.split), _ANSWERS, len(rows), cache_bytes)
        prepared = self._prepared(rows, self._right_answers(rows.split), _MAYBE_CUT, len(rows), cache_bytes)
        if count := sum(prepared["cut"]) + len(rows) - len(prepared):
            self.warnings.append(
                f"task.too_long={self._too_long}: {count} of {len(rows)} answers of the {rows.split or 'given'} rows "
                f"do not fit into model.max_length={self._max_length}"
            )
        if len(prepared) == 0:
            raise PartialLoraError(f"model.max_length={self._max_length}: no answer fits, expected more; raise it")
        return prepared

    def options(self, rows: Dataset, *, cache_bytes: int) -> Dataset:
        """Return rows to score, one an option, those of a question next to each other; with three more columns.

        item (the number of the question), right (True for the right option), characters (the option's length, by which
        lm-evaluation-harness's acc_norm divides).
        """
        count = sum(map(len, rows["options"]))
        return self._prepared(rows, self._all_options(rows.split), _OPTIONS, count, cache_bytes)

    def collate(self, rows: Sequence[Mapping[str, object]]) -> dict[str, Tensor]:
        """Make one batch of prepared rows, padded on the right to the longest of them."""
        tokens = [torch.tensor(row["input_ids"]) for row in rows]
        labels = [each.clone() for each in tokens]
        for label, row in zip(labels, rows, strict=True):
            label[: row["answer_start"]] = IGNORED
        return self._padded(tokens, "right") | {"labels": pad_sequence(labels, True, IGNORED)}

    def batches(self, rows: Dataset, size: int) -> list[dict[str, Tensor]]:
        """Return all rows in order, for few-shot draws, which fit in memory: at most `size` sequences a batch.

        Of a choice every option is one; all of a question are in one batch, however many, which also has `items` (N,),
        the question of each, and `answers` (N,), True for the right option.
        """
        if self.kind != "choice":
            features = _ANSWERS if self._too_long == "refuse" else _MAYBE_CUT
            prepared = in_memory(rows, self._right_answers(rows.split), features).to_list()
            return [self.collate(prepared[start : start + size]) for start in range(0, len(prepared), size)]
        batches: list[list[dict]] = [[]]
        options = in_memory(rows, self._all_options(rows.split), _OPTIONS).to_list()
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

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Make one batch of prompts to be continued, padded on the left."""
        start = self._tokens.start
        contexts = [_truncated(context, self._max_length, start) for context in self._tokens.contexts(prompts)]
        return self._padded([torch.tensor(context) for context in contexts], "left")

    def _prepared(self, rows: Dataset, convert: Callable, features: Features, count: int, cache_bytes: int) -> Dataset:
        if count * (self._max_length * 4 + 20) > cache_bytes:
            return in_memory(rows, convert, features)
        key = {
            "tokenizer": fingerprint(self.tokenizer),
            "template": str(self.tokenizer.chat_template) if self._tokens.chat else None,
            "max_length": self._max_length,
            "kind": self.kind,
            "columns": list(features),
            **({} if self._too_long == "refuse" else {"too_long": self._too_long}),
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        }
        return cached(rows, convert, features, key)

    def _right_answers(self, split: object) -> Callable[[Mapping[str, list], Sequence[int]], dict[str, list]]:
        """Return a function to the right answer of every row of a batch."""

        def convert(batch: Mapping[str, list], places: Sequence[int]) -> dict[str, list]:
            if self.kind == "choice":
                labels = batch["label"]
                prompts = [each[label] for each, label in zip(batch["prompts"], labels, strict=True)]
                answers = [each[label] for each, label in zip(batch["options"], labels, strict=True)]
            else:
                prompts = batch["prompt"]
                answers = [
                    response if not prompt or prompt[-1].isspace() else f" {response}"
                    for prompt, response in zip(prompts, batch["response"], strict=True)
                ]
            return self._sequences(prompts, answers, places, split)

        return convert

    def _all_options(self, split: object) -> Callable[[Mapping[str, list], Sequence[int]], dict[str, list]]:
        """Return a function to every option of every row of a batch."""

        def convert(batch: Mapping[str, list], places: Sequence[int]) -> dict[str, list]:
            prompts = [prompt for each in batch["prompts"] for prompt in each]
            options = [option for each in batch["options"] for option in each]
            counts = list(map(len, batch["options"]))
            items = [place for place, count in zip(places, counts, strict=True) for _ in range(count)]
            return self._sequences(prompts, options, items, split) | {
                "item": items,
                "right": [
                    place == label
                    for count, label in zip(counts, batch["label"], strict=True)
                    for place in range(count)
                ],
                "characters": [len(option.removeprefix(" ")) for option in options],
            }

        return convert

    def _sequences(
        self, prompts: Sequence[str], answers: Sequence[str], places: Sequence[int], split: object
    ) -> dict[str, list]:
        columns: dict[str, list] = {name: [] for name in (_ANSWERS if self._too_long == "refuse" else _MAYBE_CUT)}
        pairs = self._tokens.pairs(prompts, answers, ends=self.kind == "generation")
        start = self._tokens.start
        for place, (context, answer) in zip(places, pairs, strict=True):
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
            context = _truncated(context, room, start)
            columns["input_ids"].append([*context, *answer])
            columns["answer_start"].append(len(context))
            columns["length"].append(len(context) + len(answer))
            if "cut" in columns:
                columns["cut"].append(is_cut)
        return columns

    def _padded(self, tokens: Sequence[Tensor], side: str) -> dict[str, Tensor]:
        pad = self.tokenizer.pad_token_id
        mask = [torch.ones_like(each) for each in tokens]
        return {
            "input_ids": pad_sequence(tokens, True, 0 if pad is None else pad, padding_side=side),
            "attention_mask": pad_sequence(mask, True, 0, padding_side=side),
        }


def _truncated(context: Tokens, room: int, start: Tokens) -> Tokens:
    """Return the last tokens of a context that is too long, after those that start any text where there is room."""
    if len(context) <= room:
        return context
    first = start if context[: len(start)] == start and room > len(start) else []
    return [*first, *context[len(context) - room + len(first) :]]
