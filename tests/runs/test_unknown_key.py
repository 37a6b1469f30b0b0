"""A key that no group has is answered with the one that was meant, if that is plain."""

from __future__ import annotations

import pytest

from partial_lora.runs.config import _ELSEWHERE, no_such_key
from partial_lora.runs.identity import defaults


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("method.ran", "method.rank"),
        ("trainer.learning_rte", "trainer.learning_rate"),
        ("trainer.lr", "trainer.learning_rate"),
        ("lr", "trainer.learning_rate"),
        ("batch_size", "trainer.batch_size"),
        ("trainer.rank", "method.rank"),
    ],
)
def test_the_likest_key_is_named(key: str, meant: str) -> None:
    said = f"{key}: no such key; did you mean {meant}? `partial-lora train --cfg job` lists the keys there are"
    assert no_such_key(key) == said


@pytest.mark.parametrize("key", ["model.colour", "colour", "trainer.name"])
def test_nothing_is_guessed(key: str) -> None:
    assert no_such_key(key) == f"{key}: no such key; `partial-lora train --cfg job` lists the keys there are"


def test_other_tools_names_stand_for_keys_that_exist() -> None:
    assert set(_ELSEWHERE.values()) <= set(defaults())
    assert no_such_key("hydra.lr", "hydra").endswith(
        "no such key; `partial-lora train --cfg hydra` lists the keys there are"
    )
