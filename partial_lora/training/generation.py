"""Texts that a model writes, always the likeliest token next, and how close they come to what was asked for."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn
from transformers import GenerationConfig

from partial_lora.tasks import CausalTransform, final_number

_WORD = r"[^\W_]+"  # ASCII texts have the words that the package's own tokenizer finds; others have words at all


def generate(
    model: nn.Module,
    transform: CausalTransform,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    batch_size: int = 8,
    progress: Callable[[int, int], object] | None = None,
    together: bool = False,
) -> list[str]:
    """What the model writes after each prompt, without space around it.

    It ends before the first of the texts in `stop`, at the model's end token or after `max_new_tokens`. Prompts of like
    length share a batch, which changes no text but where two tokens are equally likely. `progress(done, total)` is told
    of every batch. `together`: processes that hold the model in parts write together, each as many texts as the others.
    The model is left in the mode it was in.
    """
    tokenizer, ends = transform.tokenizer, _ends(model, transform)
    greedy = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,  # a model's own settings would make another token the likeliest
        no_repeat_ngram_size=0,
        min_length=0,
        temperature=1.0,
        top_p=1.0,
        top_k=50,
        eos_token_id=ends or None,
        pad_token_id=next(end for end in (tokenizer.pad_token_id, *ends, 0) if end is not None),
        stop_strings=list(stop) or None,
    )
    order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
    texts = [""] * len(prompts)
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        for start in range(0, len(order), batch_size):
            places = order[start : start + batch_size]
            inputs = {
                name: value.to(device) for name, value in transform.of_inputs([prompts[at] for at in places]).items()
            }
            with torch.no_grad():
                written = model.generate(
                    **inputs,
                    generation_config=greedy,
                    tokenizer=tokenizer if stop else None,
                    synced_gpus=together,
                )
            for place, tokens in zip(places, written[:, inputs["input_ids"].shape[1] :].tolist(), strict=True):
                texts[place] = _text(tokenizer.decode(_until(tokens, ends), skip_special_tokens=True), stop)
            if progress is not None:
                progress(start + len(places), len(order))
    finally:
        model.train(training)
    return texts


def exact_match(said: Sequence[str], references: Sequence[str], answer: str | None) -> np.ndarray:
    """1 for a text whose answer is that of its reference, 0 for another (N,).

    answer: "number", the number a text comes to (`tasks.final_number`), or None, all of it but space around it.
    """
    if answer == "number":
        pairs = [
            (final_number(text), final_number(reference)) for text, reference in zip(said, references, strict=True)
        ]
        return np.array([found is not None and found == asked for found, asked in pairs], dtype=np.float64)
    pairs = zip(said, references, strict=True)
    return np.array([text.strip() == reference.strip() for text, reference in pairs], dtype=np.float64)


def rouge_l(said: Sequence[str], references: Sequence[str]) -> np.ndarray:
    """The F-measure of ROUGE-L of each text against its reference (N,): words in the same order (Lin 2004)."""
    from rouge_score.rouge_scorer import RougeScorer

    class _Words:
        def tokenize(self, text: str) -> list[str]:
            return re.findall(_WORD, text.lower())

    scorer = RougeScorer(["rougeL"], tokenizer=_Words())
    pairs = zip(references, said, strict=True)
    return np.array([scorer.score(reference, text)["rougeL"].fmeasure for reference, text in pairs])


def _ends(model: nn.Module, transform: CausalTransform) -> list[int]:
    """The tokens that end a text, by the model's own account and by the tokenizer's, which it is trained on."""
    own = model.generation_config.eos_token_id
    ends = [transform.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    return list(dict.fromkeys(end for end in ends if end is not None))


def _until(tokens: Sequence[int], ends: Sequence[int]) -> list[int]:
    """The tokens before the first that ends a text: what follows is padding."""
    at = next((place for place, token in enumerate(tokens) if token in ends), len(tokens))
    return list(tokens[:at])


def _text(text: str, stop: Sequence[str]) -> str:
    """A text up to the first place where any of `stop` is."""
    places = [place for place in (text.find(each) for each in stop) if place >= 0]
    return text[: min(places, default=len(text))].strip()
