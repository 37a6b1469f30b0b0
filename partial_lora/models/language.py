"""Text models of transformers' own classes, encoders and causal language models, and their tokenizers.

An encoder's head is new for every task. Other parts without pre-trained weights, such as DeBERTa's pooler, start from
the same numbers in every run. A causal model has no new part: every weight is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from partial_lora.errors import PartialLoraError, one_line
from partial_lora.models import quantization as quantizations
from partial_lora.models.config import ModelConfig
from partial_lora.models.fetch import RANDOM, folder_of, name_after
from partial_lora.models.weights import Geometry, draw_head, fixed_seed, head_config, load_weights, quiet
from partial_lora.tasks.kinds import kinds_for

_PICKLED = ("encoder",)  # families whose weights may be pickles, where a repository has nothing better
_HEAD_STD = 0.02  # of a new head, where a config has none: that of BERT
_SPECIAL = ("[PAD]", "[CLS]", "[MASK]", "[SEP]")  # [SEP] is not 2, which CLIP's class takes for an old mistake
VOCABULARY = len(_SPECIAL) + 256  # tokens of the tokenizer that goes with random weights


def load_classifier(model: ModelConfig, labels: Sequence[str]) -> PreTrainedModel:
    """Load a pre-trained model with a new head for `labels` (none: one real number), on the CPU, in eval mode.

    `model.weights` is bundled:NAME, a repository of the model hub, a folder in the same format, or random. The head
    alone is drawn from torch's global generator, which the rest leaves as it was. Raises PartialLoraError where the
    weights cannot be had, do not have the geometry of `model.model_args`, or leave a part of the model's base unfilled
    but `model.new_modules`.
    """
    geometry = Geometry(model.family, model.architecture, model.model_args, head_config(labels, model.name))
    new = tuple(f"{module}." for module in model.new_modules)
    loaded = _load(
        geometry,
        model,
        may_be_new=lambda loaded, key: not key.startswith(f"{loaded.base_model_prefix}.") or key.startswith(new),
    )
    if getattr(loaded.config, "pad_token_id", 0) is None:  # a language model's last token is classified
        ends = loaded.config.eos_token_id  # by which `tokenizer` pads
        loaded.config.pad_token_id = ends[0] if isinstance(ends, list) else ends
    std = getattr(loaded.config, "initializer_range", None) or getattr(loaded.config, "init_std", None) or _HEAD_STD
    draw_head(loaded.get_submodule(head_name(loaded)), std=std)
    # Else the Trainer multiplies the loss, and so the gradient, by the steps of accumulation and the processes.
    loaded.accepts_loss_kwargs = False
    return loaded.eval()


def load_causal(model: ModelConfig, labels: Sequence[str] = ()) -> PreTrainedModel:
    """Load the pre-trained model in evaluation mode, on the CPU; a quantised one where transformers puts it.

    `model.weights` is bundled:NAME, a repository of the model hub, a folder in the same format (safetensors alone), or
    random. `model.quantization`, nf4 or int8, is for all linear layers but the last; all other weights have
    `model.dtype`. torch's global generator is left as it was. Raises PartialLoraError where the weights cannot be had,
    do not have the geometry of `model.model_args`, leave a part unfilled, or cannot be quantised here.
    """
    options, quantization = {}, model.quantization
    if quantization is not None:
        options["quantization_config"] = quantizations.config(quantization, getattr(torch, model.dtype))
    geometry = Geometry("causal", model.architecture, model.model_args, {})
    loaded = _load(geometry, model, may_be_new=lambda loaded, key: False, **options)
    if quantization is not None:
        quantizations.keep_gradients(loaded)
    return loaded.eval()


def _load(
    geometry: Geometry,
    model: ModelConfig,
    *,
    may_be_new: Callable[[PreTrainedModel, str], bool],
    **options: object,
) -> PreTrainedModel:
    geometry.empty()  # refuses an impossible one before anything is downloaded
    if model.attn_implementation is not None:
        geometry.check_attention(model.attn_implementation)
        options["attn_implementation"] = model.attn_implementation
    with fixed_seed():
        if model.weights == RANDOM:
            return _random(geometry, getattr(torch, model.dtype), options)
        folder = _folder(model.weights, model.name, geometry.family)
        config, pickles = geometry.config_in(folder, model.weights), geometry.family in _PICKLED
        loaded = load_weights(geometry.auto, folder, config, model, may_be_new=may_be_new, pickles=pickles, **options)
    name_after(loaded, model.weights)
    return loaded


def _folder(weights: str, name: str, family: str) -> Path:
    """Return the folder of a model and its tokenizer, fetched first if need be."""
    return folder_of(weights, name, text=True, pickles=family in _PICKLED, instead=kinds_for(family)[0].model)


def _random(geometry: Geometry, dtype: torch.dtype, options: dict) -> PreTrainedModel:
    config = geometry.config()
    if getattr(config, "vocab_size", VOCABULARY) < VOCABULARY:
        raise PartialLoraError(
            f"model.model_args.vocab_size={config.vocab_size}: expected at least {VOCABULARY}, the tokens of "
            "weights=random"
        )
    attention = {key: value for key, value in options.items() if key == "attn_implementation"}
    model = geometry.auto.from_config(config, **attention)
    if "quantization_config" not in options:
        return model.to(dtype)
    with quiet():  # transformers quantises what it loads, so the drawn weights are loaded as if they were stored
        return type(model).from_pretrained(
            None, config=geometry.config(), state_dict=model.state_dict(), dtype=dtype, **options
        )


_TABLES = ("position_embeddings", "embed_positions", "positions_embed", "pos_encoding", "wpe")  # of positions


def longest_text(model: nn.Module) -> int | None:
    """Return how many tokens a model's table of positions has room for; None for a model without such a table.

    Some models use only the positions after the padding's, or after an offset.
    """
    for module in model.modules():
        for table in (getattr(module, name, None) for name in _TABLES):
            if isinstance(table, nn.Embedding):
                before = 0 if table.padding_idx is None else table.padding_idx + 1
                return table.num_embeddings - before - getattr(table, "offset", 0)
            if isinstance(table, Tensor) and not isinstance(table, nn.Parameter):  # of sines, which are not trained
                return len(table)
    return None


def head_name(model: PreTrainedModel) -> str:
    """Return the full name of the linear layer that gives the logits: the last one after the encoder."""
    after = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith(f"{model.base_model_prefix}.")
    ]
    if not after:
        raise PartialLoraError(f"model.architecture={model.config.model_type}: expected a linear layer as its head")
    return after[-1]


def tokenizer(*, name: str, weights: str, family: str = "encoder") -> PreTrainedTokenizerBase:
    """Load the tokenizer beside a text model's weights; for random weights, one with a token for each byte.

    A tokenizer without a token for padding, as Llama's, pads with the token that ends a text, which is masked out.
    `weights` and `family` as in `models.load`. Raises PartialLoraError where no tokenizer can be read.
    """
    if weights == RANDOM:
        return byte_tokenizer()
    loaded = tokenizer_in(_folder(weights, name, family), name=name, weights=weights)
    if loaded.pad_token is None:
        loaded.pad_token = loaded.eos_token
    return loaded


def tokenizer_in(folder: Path, *, name: str, weights: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer in a folder."""
    try:
        loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        if [*folder.glob("*.model")] and find_spec("sentencepiece") is None:
            raise PartialLoraError(
                f"model={name}: the tokenizer of {weights} needs sentencepiece, which is not installed: "
                "pip install sentencepiece"
            ) from error
        raise PartialLoraError(f"model={name}: cannot read the tokenizer of {weights} ({one_line(error)})") from error
    if len(loaded) <= len(loaded.all_special_tokens):  # transformers makes an empty one where the files are missing
        raise PartialLoraError(
            f"model={name}: {weights} has no tokenizer; expected tokenizer.json, vocab.txt or spm.model"
        )
    return loaded


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Build a tokenizer of bytes for random weights, with texts between [CLS] and [SEP] as in BERT."""
    symbols = [*_SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    built = Tokenizer(models.BPE(vocab={symbol: number for number, symbol in enumerate(symbols)}, merges=[]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(token, symbols.index(token)) for token in ("[CLS]", "[SEP]")],
    )
    names = dict(zip(("pad_token", "cls_token", "mask_token", "sep_token"), _SPECIAL, strict=True))
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=built, model_input_names=inputs, bos_token="[CLS]", eos_token="[SEP]", **names
    )
