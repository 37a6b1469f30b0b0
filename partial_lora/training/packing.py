"""Packing: short texts of a batch one after the other in a row, none of which sees another."""

from __future__ import annotations

from collections.abc import Mapping
from operator import itemgetter

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from partial_lora.errors import PartialLoraError, one_line
from partial_lora.tasks.metrics import IGNORED

_WIDE = 256  # tokens of a row; in wider ones attention, which grows with their square, would take what padding took


def packed(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return texts (N, L), padded on the right, in rows that hold several.

    Positions begin anew with each text, by which transformers keeps texts apart; each token of padding is a text of its
    own. The first token of a text is no label, since nothing before it predicts it.
    """
    tokens, lengths = batch["input_ids"], batch["attention_mask"].sum(1).tolist()
    rows = _rows(lengths, most=max(_WIDE, tokens.shape[1]))
    labels = batch["labels"].clone()
    labels[:, 0] = IGNORED
    columns = {
        "input_ids": (tokens, 0),
        "labels": (labels, IGNORED),
        "position_ids": (torch.arange(tokens.shape[1]).expand_as(tokens), 0),
    }

    def in_rows(values: Tensor) -> list[Tensor]:
        return [torch.cat([values[text, : lengths[text]] for text in row]) for row in rows]

    return {name: pad_sequence(in_rows(values), True, padding) for name, (values, padding) in columns.items()}


def _rows(lengths: list[int], most: int) -> list[list[int]]:
    """Return the texts of each row: of all numbers of rows of at most `most` tokens, that which pads least."""
    packings = []
    for count in range(len(lengths), 0, -1):  # of equals the first has the narrowest rows
        rows: list[list[int]] = [[] for _ in range(count)]
        filled = [0] * count
        for text in sorted(range(len(lengths)), key=lambda text: -lengths[text]):
            emptiest = filled.index(min(filled))
            rows[emptiest].append(text)
            filled[emptiest] += lengths[text]
        if max(filled) <= most:
            packings.append((count * max(filled), rows))
    return min(packings, key=itemgetter(0))[1]


def check(model: nn.Module) -> None:
    """Raise PartialLoraError for a model whose logits of a text depend on what is packed beside it."""
    device, size = model.device, model.get_input_embeddings().num_embeddings
    tokens = torch.randint(size, (4, 8), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(8).repeat(2, 2)
    try:
        with torch.no_grad():
            alone = model(input_ids=tokens.to(device), use_cache=False).logits
            packed_in_two = {"input_ids": tokens.view(2, 16).to(device), "position_ids": positions.to(device)}
            beside = model(**packed_in_two, use_cache=False).logits.view_as(alone)
        differs = (beside - alone).float().norm() > torch.finfo(alone.dtype).eps ** 0.5 * alone.float().norm()
        reason = "its logits of a text depend on what is beside it"
    except (TypeError, ValueError) as error:
        differs, reason = True, one_line(error)
    if differs:
        raise PartialLoraError(
            f"trainer.packing=true: expected false for a {type(model).__name__} with "
            f"model.attn_implementation={model.config._attn_implementation} ({reason})"
        )
