"""Refusals: one line that begins with what is at fault."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from partial_lora.errors import PartialLoraError


@contextmanager
def refusal(begins: str, *names: object) -> Iterator[None]:
    """Assert that a block is refused in one line that begins as a pattern says, with a key or a file, and has names."""
    with pytest.raises(PartialLoraError) as refused:
        yield
    line = str(refused.value)
    assert re.match(begins, line), line
    assert "\n" not in line
    assert [name for name in map(str, names) if name not in line] == []
