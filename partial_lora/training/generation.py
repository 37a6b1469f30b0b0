"""Texts that a model generates after prompts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import GenerationConfig

from partial_lora.errors import require
from partial_lora.models import longest_text
from partial_lora.tasks import CausalTransform
from partial_lora.tasks.prompt_inputs import Prompt


def generation_config(
    model: nn.Module, transform: CausalTransform, max_new_tokens: int, stop: Sequence[str], temperature: float = 0.0
) -> GenerationConfig:
    """Return how texts are generated: at temperature 0 the most likely token, else one drawn at that temperature."""
    tokenizer, eos = transform.tokenizer, model.generation_config.eos_token_id
    # The tokens that end a text: the tokenizer's, which the model was trained on here, and the model's own.
    ends = [tokenizer.eos_token_id, *(eos if isinstance(eos, list) else [eos])]
    ends = list(dict.fromkeys(end for end in ends if end is not None))
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        num_beams=1,
        repetition_penalty=1.0,  # a model's own settings would make another token the most likely
        no_repeat_ngram_size=0,
        min_length=0,
        temperature=temperature or 1.0,
        top_p=1.0,
        top_k=0 if temperature > 0 else 50,
        eos_token_id=ends or None,
        pad_token_id=next(end for end in (tokenizer.pad_token_id, *ends, 0) if end is not None),
        stop_strings=list(stop) or None,
    )


def room_for_prompts(model: nn.Module, max_new_tokens: int) -> int | None:
    """Return the most tokens of a prompt after which a model has positions for the new ones; None for any number.

    Raises PartialLoraError where it has positions for no prompt.
    """
    longest = longest_text(model)
    if longest is None:
        return None
    expected = f"at most {longest}, the positions that the model has for a prompt and what follows it"
    require(max_new_tokens <= longest, "task.max_new_tokens", max_new_tokens, expected)
    return longest + 1 - max_new_tokens  # the last token that is written is never read


def generate(
    model: nn.Module,
    transform: CausalTransform,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    batch_size: int = 8,
    progress: Callable[[int, int], object] | None = None,
    together: bool = False,
) -> list[str]:
    """Return the text that the model generates after each prompt, without space around it.

    A text ends before the first of the strings in `stop`, at the model's end token or after `max_new_tokens`. A prompt
    loses its start where the model has too few positions (`room_for_prompts`). Prompts of like length share a batch,
    which changes no text unless two tokens are equally likely. `progress(done, total)` is called after every batch.
    `together`: processes with a sharded model generate together, each the same number of texts. The model is left in
    the mode it was in.
    """
    tokenizer, greedy = transform.tokenizer, generation_config(model, transform, max_new_tokens, stop)
    ends, room = greedy.eos_token_id or [], room_for_prompts(model, max_new_tokens)
    longest_first = sorted(range(len(prompts)), key=lambda place: -len(str(prompts[place])))
    texts = [""] * len(prompts)
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        for start in range(0, len(prompts), batch_size):
            places = longest_first[start : start + batch_size]
            encoded = transform.encode([prompts[place] for place in places], room)
            inputs = {name: value.to(device) for name, value in encoded.items()}
            with torch.no_grad():
                generated = model.generate(
                    **inputs,
                    generation_config=greedy,
                    tokenizer=tokenizer if stop else None,
                    synced_gpus=together,
                )
            for place, tokens in zip(places, generated[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                text_tokens = itertools.takewhile(lambda token: token not in ends, tokens)
                text = tokenizer.decode(list(text_tokens), skip_special_tokens=True)
                stops = [text.find(string) for string in stop if string in text]
                texts[place] = text[: min(stops, default=len(text))].strip()
            if progress is not None:
                progress(start + len(places), len(prompts))
    finally:
        model.train(training)
    return texts
