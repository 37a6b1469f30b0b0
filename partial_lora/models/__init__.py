"""Pre-trained models, each loaded whole and checked, with a new head for the task."""

from partial_lora.models.checkpointing import enable_gradient_checkpointing
from partial_lora.models.digest import weights_digest
from partial_lora.models.family import SETTINGS, empty, has_own_head, head_name, load
from partial_lora.models.heads import in_full_precision
from partial_lora.models.quantization import dequantised, size_of
from partial_lora.models.tokenizers import tokenizer

__all__ = [
    "SETTINGS",
    "dequantised",
    "empty",
    "enable_gradient_checkpointing",
    "has_own_head",
    "head_name",
    "in_full_precision",
    "load",
    "size_of",
    "tokenizer",
    "weights_digest",
]
