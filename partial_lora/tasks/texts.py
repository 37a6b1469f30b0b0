"""Texts as a language model reads them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence

import tokenizers
import torch
import transformers
from datasets import Dataset, Features, List, Value
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from partial_lora.tasks.prepared import in_memory, kept


class TextTransform:
    """Turns rows into what a model reads: input_ids, attention_mask (N, L), token_type_ids where it has any, labels.

    Texts, and pairs of them, are cut to `max_length` tokens, the longer one of a pair first, and padded to the longest
    of their batch. Labels are (N,), whole numbers of classes or float32.
    """

    lengths = True  # prepared rows have a column `length`, of tokens

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self._tokenizer, self._max_length = tokenizer, max_length
        self._inputs = tuple(self._encoded(["a"], None))

    def prepare(self, rows: Dataset, *, cache_bytes: int) -> Dataset:
        """Rows for `collate`: tokens without padding, their number `length`, and `label`.

        Kept on disk where they cannot need more than `cache_bytes`, else in memory.
        """
        features = Features(
            {name: List(Value("int32")) for name in self._inputs}
            | {"length": Value("int32"), "label": rows.features["label"]}
        )
        most = len(rows) * (self._max_length * 4 * len(self._inputs) + 12)
        if most > cache_bytes:
            return in_memory(rows, self._tokenised, features)
        made_by = {
            "tokenizer": fingerprint(self._tokenizer),
            "max_length": self._max_length,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        }
        return kept(rows, self._tokenised, features, made_by)

    def collate(self, rows: Sequence[Mapping[str, object]]) -> dict[str, Tensor]:
        """One batch of prepared rows."""
        batch = self._padded({name: [row[name] for row in rows] for name in self._inputs})
        if "label" in rows[0]:
            batch["labels"] = torch.tensor([row["label"] for row in rows])
        return batch

    def batches(self, rows: Dataset, size: int) -> list[dict[str, Tensor]]:
        """All rows in order, `size` rows a batch: for few-shot draws, which fit in memory."""
        batches = []
        for start in range(0, len(rows), size):
            given = rows[start : start + size]
            batch = self._padded(self._encoded(given["text"], given.get("text_pair")))
            batches.append(batch | {"labels": torch.tensor(given["label"])})
        return batches

    def of_inputs(self, texts: Sequence[str] | Sequence[tuple[str, str]]) -> dict[str, Tensor]:
        """One batch of texts, or of pairs, that have no label."""
        if isinstance(texts[0], str):
            return self._padded(self._encoded(list(texts), None))
        first, second = zip(*texts, strict=True)
        return self._padded(self._encoded(list(first), list(second)))

    def _tokenised(self, batch: Mapping[str, list], _: Sequence[int]) -> dict[str, list]:
        encoded = self._encoded(batch["text"], batch.get("text_pair"))
        return encoded | {"length": [len(tokens) for tokens in encoded["input_ids"]], "label": batch["label"]}

    def _encoded(self, texts: Sequence[str], pairs: Sequence[str] | None) -> dict[str, list[list[int]]]:
        encoded = self._tokenizer(
            list(texts),
            None if pairs is None else list(pairs),
            truncation=True,
            max_length=self._max_length,
            return_attention_mask=False,
        )
        return dict(encoded)

    def _padded(self, encoded: dict[str, list[list[int]]]) -> dict[str, Tensor]:
        # The library advises fast tokenizers against padding on its own, where texts could be tokenised in one go.
        warned = self._tokenizer.deprecation_warnings.get("Asking-to-pad-a-fast-tokenizer", False)
        self._tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = True
        try:
            return dict(self._tokenizer.pad(encoded, padding=True, return_attention_mask=True, return_tensors="pt"))
        finally:
            self._tokenizer.deprecation_warnings["Asking-to-pad-a-fast-tokenizer"] = warned


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Names what a tokenizer makes of texts: its rules and vocabulary, not the padding it was last asked for."""
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    else:
        rules = {"kind": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    decides = [rules, tokenizer.special_tokens_map, tokenizer.padding_side, tokenizer.truncation_side]
    return hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()
