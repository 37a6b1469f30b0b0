"""Rows as a model reads them, made once and kept on disk for every later run."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow as pa
from datasets import Dataset, Features

from partial_lora.cache import cache_dir, verified_folder

_VERSION = 2  # of what is kept; another one leaves everything older unused. 1 had 16-bit images as white
_ROWS = "rows.arrow"
_BATCH = 256  # rows that are made at a time

logger = logging.getLogger(__name__)


def kept(rows: Dataset, make: Callable[..., dict], features: Features, made_by: Mapping[str, object]) -> Dataset:
    """The rows that `make` gives, read from disk; made first where they are not there, or not what they were.

    Args:
        make: a batch of rows and their indices to the columns of `features`.
        made_by: everything beside the rows that decides what `make` gives, as JSON.

    Of several processes that ask at once, one makes them and the others wait. Raises PartialLoraError where the cache
    cannot be written.
    """
    if len(rows) == 0:
        return in_memory(rows, make, features)
    key = _key(rows, made_by)

    def build(folder: Path) -> None:
        logger.info("preparing %d rows, once: they are kept in %s", len(rows), cache_dir() / "data")
        _mapped(rows, make, features, cache_file_name=str(folder / _ROWS), new_fingerprint=key)

    return Dataset.from_file(str(verified_folder(cache_dir() / "data" / key, build) / _ROWS), split=rows.split)


def in_memory(rows: Dataset, make: Callable[..., dict], features: Features) -> Dataset:
    """The rows that `make` gives, in memory."""
    return _mapped(rows, make, features, keep_in_memory=True, new_fingerprint="in-memory")


def _mapped(rows: Dataset, make: Callable[..., dict], features: Features, **where: object) -> Dataset:
    return rows.map(
        make,
        with_indices=True,
        batched=True,
        batch_size=_BATCH,
        writer_batch_size=_BATCH,
        remove_columns=rows.column_names,
        features=features,
        load_from_cache_file=False,
        **where,
    )


def _key(rows: Dataset, made_by: Mapping[str, object]) -> str:
    """Names the rows by what is in them, wherever it is from, and what is made of them."""
    digest = hashlib.sha256(json.dumps({"version": _VERSION, **made_by}, sort_keys=True).encode())
    for table in rows.with_format("arrow").iter(batch_size=_BATCH):
        for column in table.column_names:
            digest.update(column.encode())
            for value in table.column(column):
                content = _content(value)
                digest.update(len(content).to_bytes(8, "big"))
                digest.update(content)
    return digest.hexdigest()[:32]


def _content(value: pa.Scalar) -> bytes | memoryview:
    """What a cell holds; of an image, its file's bytes."""
    if isinstance(value, pa.StructScalar):
        if value["bytes"].is_valid:
            return memoryview(value["bytes"].as_buffer())
        return Path(value["path"].as_py()).read_bytes()
    return str(value.as_py()).encode()
