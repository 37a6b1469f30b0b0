"""Prompts with options or responses as a causal language model reads them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import tokenizers
import torch
import transformers
from datasets import Dataset, Features, List, Value
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from partial_lora.errors import PartialLoraError
from partial_lora.tasks.texts import fingerprint, in_memory, kept

# --- Prompts and what follows them, as tokens: the rule of lm-evaluation-harness, and chats by a tokenizer's templa

Tokens = list[int]


@dataclass(frozen=True)
class Continuations:
    """How a tokenizer turns prompts, and prompts with continuations, into tokens.

    chat: whether a prompt is what a user says in the tokenizer's chat template, and a continuation the reply.
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
        """The tokens of prompts that are to be continued.

        Of a plain prompt without the space at its end, which belongs to the word that follows.
        """
        texts = [self._asked(prompt) for prompt in prompts]
        return self._begun(texts, self._encoded(texts))

    def pairs(self, prompts: Sequence[str], continuations: Sequence[str], ends: bool) -> list[tuple[Tokens, Tokens]]:
        """The tokens of prompts, and those of what follows them, which never are none.

        Prompt and continuation are tokenised together. The tokens past those of the prompt alone are the continuation,
        as lm-evaluation-harness has it, whose first token may be made of both.

        continuations: with the space that sets them off, or after a prompt that ends in one.
        ends: whether the continuation is all that is said, and its end a token to be learned too.
        """
        texts, follow = [self._asked(prompt) for prompt in prompts], list(continuations)
        if self.chat:
            follow = [self._reply(*pair, ends) for pair in zip(prompts, texts, follow, strict=True)]
        else:
            follow = [prompt[len(text) :] + after for prompt, text, after in zip(prompts, texts, follow, strict=True)]
        whole = self._encoded([text + after for text, after in zip(texts, follow, strict=True)])
        alone = self._encoded(texts)
        found = []
        for context, both, after in zip(alone, whole, follow, strict=True):
            found.append(both[len(context) :] or self._encoded([after])[0])
        end = self.tokenizer.eos_token_id
        if ends and end is not None:
            found = [tokens if tokens[-1:] == [end] else [*tokens, end] for tokens in found]
        return list(zip(self._begun(texts, alone), found, strict=True))

    def _asked(self, prompt: str) -> str:
        """A prompt as the model sees it, up to where it is to go on."""
        if not self.chat:
            return prompt.rstrip()
        said = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)

    def _reply(self, prompt: str, asked: str, reply: str, ends: bool) -> str:
        """A reply as the template writes it, up to the token that ends a turn; without that unless it `ends`."""
        reply = reply.lstrip()
        if not ends:
            return reply
        said = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
        whole = self.tokenizer.apply_chat_template(said, tokenize=False)
        if not whole.startswith(asked):  # such as one that puts thoughts before a reply
            return reply
        written, end = whole[len(asked) :], self.tokenizer.eos_token
        return written[: written.rindex(end) + len(end)] if end and end in written else written

    def _begun(self, texts: Sequence[str], encoded: Sequence[Tokens]) -> list[Tokens]:
        """Contexts with what the tokenizer puts before a text; without any, a text of nothing starts at its end token.

        A template, or a prompt, that starts with such a token itself has no other put before it.
        """
        start, first = self.start, self.tokenizer.bos_token
        found = []
        for text, tokens in zip(texts, encoded, strict=True):
            own = self.chat or (first is not None and text.startswith(first))
            found.append(list(tokens) if own else [*start, *tokens])
        if all(found):
            return found
        tokenizer = self.tokenizer
        instead = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        return [tokens or [0 if instead is None else instead] for tokens in found]

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


IGNORED = -100  # the label of a token that is not asked for, as in transformers
_ANSWERS = Features({"input_ids": List(Value("int32")), "answer_start": Value("int32"), "length": Value("int32")})
_OPTIONS = Features(
    _ANSWERS | {"item": Value("int32"), "right": Value("bool"), "characters": Value("int32")}  # of an option
)


class CausalTransform:
    """Turns prompts with options, or with responses, into input_ids, attention_mask and labels, each (N, L).

    Only the tokens of the answer are labels, all else is -100, and the model's own shift by one token is left to it.
    What is longer than `max_length` tokens loses the first of its prompt, never any of its answer.

    Args:
        kind: "choice", or "generation", whose responses end with the tokenizer's end token.
        chat: whether prompts and answers are put into the tokenizer's chat template.

    Raises PartialLoraError where there is no such template.
    """

    lengths = True  # prepared rows have a column `length`, of tokens

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, max_length: int, *, kind: str = "generation", chat: bool = False
    ) -> None:
        self.tokenizer, self.kind = tokenizer, kind
        self._max_length, self._tokens = max_length, Continuations(tokenizer, chat)

    def prepare(self, rows: Dataset, *, cache_bytes: int) -> Dataset:
        """Rows to train on, for `collate`: the right answer of each, tokens without padding.

        Columns: input_ids, answer_start (the place of the answer's first token) and length. Kept on disk where they
        cannot need more than `cache_bytes`, else in memory. Raises PartialLoraError for an answer that is too long.
        """
        return self._prepared(rows, self._right(rows.split), _ANSWERS, len(rows), cache_bytes)

    def options(self, rows: Dataset, *, cache_bytes: int) -> Dataset:
        """Rows to score, one an option, those of a question next to each other; as of `prepare`, and three columns.

        item (the number of the question), right (whether it is the right option), characters (the option's length,
        which lm-evaluation-harness's acc_norm divides by).
        """
        count = sum(map(len, rows["options"]))
        return self._prepared(rows, self._every(rows.split), _OPTIONS, count, cache_bytes)

    def collate(self, rows: Sequence[Mapping[str, object]]) -> dict[str, Tensor]:
        """One batch of prepared rows, padded on the right to the longest of them."""
        tokens = [torch.tensor(row["input_ids"]) for row in rows]
        labels = [each.clone() for each in tokens]
        for label, row in zip(labels, rows, strict=True):
            label[: row["answer_start"]] = IGNORED
        return self._padded(tokens, "right") | {"labels": pad_sequence(labels, True, IGNORED)}

    def batches(self, rows: Dataset, size: int) -> list[dict[str, Tensor]]:
        """All rows in order, for few-shot draws, which fit in memory: at most `size` sequences a batch.

        Of a choice every option is one; all of a question are in one batch, however many, which also has `items` (N,),
        the question of each, and `answers` (N,), True for the right option.
        """
        if self.kind != "choice":
            prepared = in_memory(rows, self._right(rows.split), _ANSWERS).to_list()
            return [self.collate(prepared[start : start + size]) for start in range(0, len(prepared), size)]
        batches: list[list[dict]] = [[]]
        for item in _by_item(in_memory(rows, self._every(rows.split), _OPTIONS).to_list()):
            if batches[-1] and len(batches[-1]) + len(item) > size:
                batches.append([])
            batches[-1] += item
        return [self._scored(batch) for batch in batches if batch]

    def of_inputs(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """One batch of prompts to be continued, padded on the left."""
        start = self._tokens.start
        contexts = [_cut(context, self._max_length, start) for context in self._tokens.contexts(prompts)]
        return self._padded([torch.tensor(context) for context in contexts], "left")

    def _scored(self, rows: Sequence[Mapping]) -> dict[str, Tensor]:
        items, answers = ([row[name] for row in rows] for name in ("item", "right"))
        return self.collate(rows) | {"items": torch.tensor(items), "answers": torch.tensor(answers)}

    def _prepared(self, rows: Dataset, make: Callable, features: Features, count: int, cache_bytes: int) -> Dataset:
        if count * (self._max_length * 4 + 20) > cache_bytes:
            return in_memory(rows, make, features)
        made_by = {
            "tokenizer": fingerprint(self.tokenizer),
            "template": str(self.tokenizer.chat_template) if self._tokens.chat else None,
            "max_length": self._max_length,
            "kind": self.kind,
            "columns": list(features),
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        }
        return kept(rows, make, features, made_by)

    def _right(self, split: object) -> Callable[[Mapping[str, list], Sequence[int]], dict[str, list]]:
        """The right answer of every row of a batch."""

        def make(batch: Mapping[str, list], places: Sequence[int]) -> dict[str, list]:
            if self.kind == "choice":
                labels = batch["label"]
                prompts = [given[label] for given, label in zip(batch["prompts"], labels, strict=True)]
                answers = [given[label] for given, label in zip(batch["options"], labels, strict=True)]
            else:
                prompts = batch["prompt"]
                answers = [
                    response if not prompt or prompt[-1].isspace() else f" {response}"
                    for prompt, response in zip(prompts, batch["response"], strict=True)
                ]
            return self._sequences(prompts, answers, places, split)

        return make

    def _every(self, split: object) -> Callable[[Mapping[str, list], Sequence[int]], dict[str, list]]:
        """Every option of every row of a batch."""

        def make(batch: Mapping[str, list], places: Sequence[int]) -> dict[str, list]:
            prompts = [prompt for given in batch["prompts"] for prompt in given]
            options = [option for given in batch["options"] for option in given]
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

        return make

    def _sequences(
        self, prompts: Sequence[str], answers: Sequence[str], places: Sequence[int], split: object
    ) -> dict[str, list]:
        found: dict[str, list] = {name: [] for name in _ANSWERS}
        pairs = self._tokens.pairs(prompts, answers, ends=self.kind == "generation")
        start = self._tokens.start
        for place, (context, answer) in zip(places, pairs, strict=True):
            room = self._max_length - len(answer)
            if room < 1:
                raise PartialLoraError(
                    f"model.max_length={self._max_length}: an answer of row {place + 1} of the {split or 'given'} rows "
                    f"has {len(answer)} tokens, expected at most {self._max_length - 1}; raise it or leave the row out"
                )
            context = _cut(context, room, start)
            found["input_ids"].append([*context, *answer])
            found["answer_start"].append(len(context))
            found["length"].append(len(context) + len(answer))
        return found

    def _padded(self, tokens: Sequence[Tensor], side: str) -> dict[str, Tensor]:
        pad = self.tokenizer.pad_token_id
        mask = [torch.ones_like(each) for each in tokens]
        return {
            "input_ids": pad_sequence(tokens, True, 0 if pad is None else pad, padding_side=side),
            "attention_mask": pad_sequence(mask, True, 0, padding_side=side),
        }


def _cut(context: Tokens, room: int, start: Tokens) -> Tokens:
    """The last tokens of a context that is too long, after what any text starts with where there is room for both."""
    if len(context) <= room:
        return context
    kept = start if context[: len(start)] == start and room > len(start) else []
    return [*kept, *context[len(context) - room + len(kept) :]]


def _by_item(rows: Sequence[dict]) -> list[list[dict]]:
    items: list[list[dict]] = []
    for row in rows:
        if not items or items[-1][0]["item"] != row["item"]:
            items.append([])
        items[-1].append(row)
    return items
