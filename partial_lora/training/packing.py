"""Packing: short texts of a batch one after the other in a row, none of which sees another."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from partial_lora.errors import PartialLoraError, one_line
from partial_lora.tasks.metrics import IGNORED


def packed(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return texts (N, L), padded on the right, in as few rows of L tokens as the first that has room gives.

    Positions begin anew with each text, by which transformers keeps texts apart; each token of padding is a text of its
    own. The first token of a text is no label, since nothing before it predicts it.
    """
    tokens, lengths = batch["input_ids"], batch["attention_mask"].sum(1).tolist()
    rows: list[list[int]] = []
    room: list[int] = []
    for text in sorted(range(len(lengths)), key=lambda text: -lengths[text]):
        row = next((row for row, left in enumerate(room) if lengths[text] <= left), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(tokens.shape[1])
        rows[row].append(text)
        room[row] -= lengths[text]
    labels = batch["labels"].clone()
    labels[:, 0] = IGNORED
    columns = {
        "input_ids": (tokens, 0),
        "labels": (labels, IGNORED),
        "position_ids": (torch.arange(tokens.shape[1]).expand_as(tokens), 0),
    }
    return {
        name: pad_sequence([torch.cat([values[text, : lengths[text]] for text in row]) for row in rows], True, padding)
        for name, (values, padding) in columns.items()
    }


def check(model: nn.Module) -> None:
    """Raise PartialLoraError for a model whose logits of a text depend on what is packed beside it."""
    device, size = model.device, model.get_input_embeddings().num_embeddings
    tokens = torch.randint(size, (3, 8), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(8) < torch.tensor([[8], [4], [4]])).long()  # the second and the third share a row
    inputs = packed({"input_ids": tokens, "attention_mask": mask, "labels": tokens})
    del inputs["labels"]
    try:
        with torch.no_grad():
            alone = model(input_ids=tokens.to(device), attention_mask=mask.to(device), use_cache=False).logits
            beside = model(**{name: value.to(device) for name, value in inputs.items()}, use_cache=False).logits
        expected, measured = alone[1:, :4].float(), beside[1].float().unflatten(0, (2, 4))
        differs = (measured - expected).norm() > torch.finfo(alone.dtype).eps ** 0.5 * expected.norm()
        reason = "its logits of a text depend on what is beside it"
    except (TypeError, ValueError) as error:
        differs, reason = True, one_line(error)
    if differs:
        raise PartialLoraError(
            f"trainer.packing=true: expected false for a {type(model).__name__} with "
            f"model.attn_implementation={model.config._attn_implementation} ({reason})"
        )
