"""From text to the numbers a text model reads: the tokenizer that belongs to a model's weights."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from partial_lora.errors import PartialLoraError
from partial_lora.models.hub import OFFLINE_CAUSAL_MODEL, OFFLINE_TEXT_MODEL
from partial_lora.models.source import RANDOM, folder_of

_SPECIAL = ("[PAD]", "[CLS]", "[MASK]", "[SEP]")  # 2 ends no text: CLIP's class takes that for a mistake of old
VOCABULARY = len(_SPECIAL) + 256  # tokens of the tokenizer that goes with random weights


def tokenizer(*, name: str, weights: str, family: str = "encoder") -> PreTrainedTokenizerBase:
    """The tokenizer beside a text model's weights; for random ones, one token for each byte.

    Padding is one of its tokens: where it has none of its own, as Llama's, the one that ends a text, which is masked
    out. `weights` and `family` as in `models.load`. Raises PartialLoraError where there is none that can be read.
    """
    if weights == RANDOM:
        return byte_tokenizer()
    causal = family == "causal"
    instead = OFFLINE_CAUSAL_MODEL if causal else OFFLINE_TEXT_MODEL
    folder = folder_of(weights, name, text=True, pickles=not causal, instead=instead)
    found = tokenizer_in(folder, name=name, weights=weights)
    if found.pad_token is None:
        found.pad_token = found.eos_token
    return found


def tokenizer_in(folder, *, name: str, weights: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder."""
    try:
        found = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PartialLoraError(f"model={name}: cannot read the tokenizer of {weights} ({reason})") from error
    if len(found) <= len(found.all_special_tokens):  # transformers makes an empty one where the files are missing
        raise PartialLoraError(
            f"model={name}: {weights} has no tokenizer; expected tokenizer.json, vocab.txt or spm.model"
        )
    return found


def check_room(vocabulary: int) -> None:
    """Raise PartialLoraError where a model of random weights has fewer tokens than the tokenizer that goes with it."""
    if vocabulary < VOCABULARY:
        raise PartialLoraError(
            f"model.model_args.vocab_size={vocabulary}: expected at least {VOCABULARY}, the tokens of weights=random"
        )


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Bytes as tokens, between [CLS] and [SEP] as BERT has its words: all that random weights can make use of."""
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
