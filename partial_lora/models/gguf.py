"""A language model in llama.cpp's GGUF format, written once as the folder that transformers loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer

from partial_lora.models.checkpoint import quiet
from partial_lora.models.heads import own_generator

_FILE = "model.gguf"
# Of which transformers' reader knows nothing, as llama.cpp splits them (llama-vocab.cpp, LLAMA_VOCAB_PRE_TYPE_SMOLLM)
_PRE_TOKENIZERS = {
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
}


def write_folder(contents: Mapping[str, bytes], folder: Path) -> None:
    """The one GGUF file's config, tokenizer with its chat template, and weights, which become fp32: no bit is lost.

    A quantised weight is a code times a scale of fp16, plus an offset: more digits than bf16 or fp16 have.
    """
    (content,) = contents.values()
    source = folder / _FILE
    source.write_bytes(content)
    try:
        with quiet(), own_generator():
            read = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=_FILE, dtype=torch.float32, trust_remote_code=False
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=_FILE, trust_remote_code=False)
        # What is read counts as quantised, and is not saved: the same weights in a model that is not.
        config = read.config
        del config.quantization_config
        config.name_or_path = ""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(read.state_dict(), assign=True)
        model.tie_weights()
        model.save_pretrained(folder)
        _split_as_llama_cpp(tokenizer.backend_tokenizer, _pre_tokenizer_of(source))
        tokenizer.save_pretrained(folder)
    finally:
        source.unlink()


def _split_as_llama_cpp(tokenizer: Tokenizer, name: str) -> None:
    if name in _PRE_TOKENIZERS:
        tokenizer.pre_tokenizer = _PRE_TOKENIZERS[name]()


def _pre_tokenizer_of(file: Path) -> str:
    from gguf import GGUFReader

    field = GGUFReader(file).fields.get("tokenizer.ggml.pre")
    return "" if field is None else field.contents()
