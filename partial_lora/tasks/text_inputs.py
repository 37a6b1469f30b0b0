"""Conversion of texts to the inputs of a language model, and the cache of converted rows on disk."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import tokenizers
import torch
import transformers
from datasets import Dataset, Features, List, Value
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from partial_lora.files import cache_dir, verified_folder
from partial_lora.tasks.config import TaskConfig

_VERSION = 2  # of the cached rows; raising it leaves older rows unused. Version 1 had 16-bit images as white
_ROWS = "rows.arrow"
_BATCH = 256  # rows that are converted at a time

logger = logging.getLogger(__name__)


class TextTransform:
    """Converts rows to inputs: input_ids, attention_mask (N, L), token_type_ids where a model has any, and labels.

    Texts, and pairs of them, are cut to `max_length` tokens, the longer one of a pair first, and padded to the longest
    of their batch. Labels are (N,), whole numbers of classes or float32.
    """

    lengths = True  # prepared rows have a column `length`, of tokens

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int) -> None:
        self.tokenizer, self._max_length = tokenizer, max_length
        self._cut = self._prepared = 0  # rows
        self._inputs = tuple(self._encoded(["a"], None))

    @classmethod
    def of(cls, task: TaskConfig, *, tokenizer: PreTrainedTokenizerBase, max_length: int) -> TextTransform:
        return cls(tokenizer, max_length)

    @property
    def warnings(self) -> list[str]:
        """A sentence on the texts that were cut among all prepared rows, if any were."""
        if not self._cut:
            return []
        share = f"{self._cut} of {self._prepared} texts ({self._cut / self._prepared:.0%})"
        return [f"model.max_length={self._max_length}: {share} have more tokens and are cut to so many"]

    def prepare(self, rows: Dataset, *, cache_bytes: int) -> Dataset:
        """Return rows for `collate`: tokens without padding, `length` (their number), `cut` (or not), and `label`.

        On disk where they cannot need more than `cache_bytes`, else in memory.
        """
        features = Features(
            {name: List(Value("int32")) for name in self._inputs}
            | {"length": Value("int32"), "cut": Value("bool"), "label": rows.features["label"]}
        )
        if len(rows) * (self._max_length * 4 * len(self._inputs) + 12) > cache_bytes:
            prepared = in_memory(rows, self._tokenised, features)
        else:
            key = {"tokenizer": fingerprint(self.tokenizer), "max_length": self._max_length, "columns": list(features)}
            prepared = cached(rows, self._tokenised, features, key)
        self._cut, self._prepared = self._cut + sum(prepared["cut"]), self._prepared + len(rows)
        return prepared

    def collate(self, rows: Sequence[Mapping[str, object]]) -> dict[str, Tensor]:
        """Make one batch of prepared rows."""
        batch = self._padded({name: [row[name] for row in rows] for name in self._inputs})
        if "label" in rows[0]:
            batch["labels"] = torch.tensor([row["label"] for row in rows])
        return batch

    def batches(self, rows: Dataset, size: int) -> list[dict[str, Tensor]]:
        """Return all rows in order, `size` rows a batch: for few-shot draws, which fit in memory."""
        batches = []
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            batch = self._padded(self._encoded(part["text"], part.get("text_pair")))
            batches.append(batch | {"labels": torch.tensor(part["label"])})
        return batches

    training_batches = batches

    def encode(self, texts: Sequence[str] | Sequence[tuple[str, str]]) -> dict[str, Tensor]:
        """Make one batch of texts, or of pairs, that have no label."""
        if isinstance(texts[0], str):
            return self._padded(self._encoded(list(texts), None))
        first, second = zip(*texts, strict=True)
        return self._padded(self._encoded(list(first), list(second)))

    def _tokenised(self, batch: Mapping[str, list], _: Sequence[int]) -> dict[str, list]:
        texts = batch["text"], batch.get("text_pair")
        encoded, whole = self._encoded(*texts), self._encoded(*texts, truncation=False)["input_ids"]
        lengths = [len(tokens) for tokens in encoded["input_ids"]]
        cut = [len(tokens) > length for tokens, length in zip(whole, lengths, strict=True)]
        return encoded | {"length": lengths, "cut": cut, "label": batch["label"]}

    def _encoded(
        self, texts: Sequence[str], pairs: Sequence[str] | None, *, truncation: bool = True
    ) -> dict[str, list[list[int]]]:
        encoded = self.tokenizer(
            list(texts),
            None if pairs is None else list(pairs),
            truncation=truncation,
            max_length=self._max_length if truncation else None,
            return_attention_mask=False,
            verbose=False,
        )
        return dict(encoded)

    def _padded(self, encoded: dict[str, list[list[int]]]) -> dict[str, Tensor]:
        return dict(self.tokenizer.pad(encoded, padding=True, return_attention_mask=True, return_tensors="pt"))


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of a tokenizer, without the padding of its last call, and of the libraries that run it."""
    if tokenizer.is_fast:
        rules = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
    else:
        rules = {"kind": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    parts = [rules, tokenizer.special_tokens_map, tokenizer.padding_side, tokenizer.truncation_side]
    parts += [transformers.__version__, tokenizers.__version__]
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


# --- Converted rows, on disk for every later run.


def cached(rows: Dataset, convert: Callable[..., dict], features: Features, key: Mapping[str, object]) -> Dataset:
    """Return the converted rows from disk; convert them first where they are not there, or damaged.

    Args:
        convert: from a batch of rows and their indices to the columns of `features`.
        key: everything beside the rows that decides the result of `convert`, as JSON.

    Where several processes call this at once, one converts and the others wait. Raises PartialLoraError where the cache
    cannot be written.
    """
    if len(rows) == 0:
        return in_memory(rows, convert, features)
    digest = _digest(rows, key)

    def build(folder: Path) -> None:
        logger.info("preparing %d rows, once: they are kept in %s", len(rows), cache_dir() / "data")
        _map(rows, convert, features, cache_file_name=str(folder / _ROWS), new_fingerprint=digest)

    return Dataset.from_file(str(verified_folder(cache_dir() / "data" / digest, build) / _ROWS), split=rows.split)


def in_memory(rows: Dataset, convert: Callable[..., dict], features: Features) -> Dataset:
    """Return the converted rows in memory."""
    return _map(rows, convert, features, keep_in_memory=True, new_fingerprint="in-memory")


def _map(rows: Dataset, convert: Callable[..., dict], features: Features, **where: object) -> Dataset:
    return rows.map(
        convert,
        with_indices=True,
        batched=True,
        batch_size=_BATCH,
        writer_batch_size=_BATCH,
        remove_columns=rows.column_names,
        features=features,
        load_from_cache_file=False,
        **where,
    )


def _digest(rows: Dataset, key: Mapping[str, object]) -> str:
    """Return a digest of the contents of the rows, wherever they are from, and of the key."""
    digest = hashlib.sha256(json.dumps({"version": _VERSION, **key}, sort_keys=True).encode())
    for table in rows.with_format("arrow").iter(batch_size=_BATCH):
        for column in table.column_names:
            digest.update(column.encode())
            for value in table.column(column):
                content = _content(value)
                digest.update(len(content).to_bytes(8, "big"))
                digest.update(content)
    return digest.hexdigest()[:32]


def _content(value: pa.Scalar) -> bytes | memoryview:
    """Return the bytes of a cell, or of an image's file."""
    if isinstance(value, pa.StructScalar):
        if value["bytes"].is_valid:
            return memoryview(value["bytes"].as_buffer())
        return Path(value["path"].as_py()).read_bytes()
    return str(value.as_py()).encode()
