"""A text that a finished causal run writes after a prompt, word by word as it is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import TextStreamer, set_seed

from partial_lora.building import build
from partial_lora.errors import require
from partial_lora.finished.predict import RunModel, is_text
from partial_lora.finished.run import FinishedRun
from partial_lora.finished.task import one_task
from partial_lora.training.metrics import generation_config


def generate(
    run: FinishedRun,
    prompt: str,
    emit: Callable[[str], object],
    *,
    member: str | None = None,
    device: str = "auto",
    max_new_tokens: int | None = None,
    stop: Sequence[str] = (),
    temperature: float = 0.0,
    seed: int | None = None,
) -> None:
    """Call `emit` with the parts of the text that a causal run writes after a prompt, without space around it.

    The prompt enters the model as the task's own prompts did, chat template included. The text ends at the model's end
    token, before the first of the task's stop strings or of `stop`, or after `max_new_tokens` (None: the task's).

    Args:
        member: of a mixture, the task whose prompts and stop strings are meant.
        temperature: 0 takes the most likely token each time, as `predict` does; else tokens are drawn.
        seed: of what is drawn; None draws another text each time.
    """
    require(is_text(prompt), "PROMPT", prompt, "a text in UTF-8")
    task = one_task(run, member).config.task
    transform = build.transform_of(run.config.model, task)
    on = RunModel(run, device)
    inputs = {name: tensor.to(on.device) for name, tensor in transform.encode([prompt]).items()}
    stop = [*task.stop, *stop]
    settings = generation_config(on.model, transform, max_new_tokens or task.max_new_tokens, stop, temperature)
    streamer = _Words(transform.tokenizer, settings.eos_token_id or [], stop, emit)
    if seed is not None:
        set_seed(seed)
    tokenizer = {"tokenizer": transform.tokenizer} if stop else {}
    with torch.inference_mode():
        on.model.generate(**inputs, generation_config=settings, streamer=streamer, **tokenizer)


class _Words(TextStreamer):
    """A streamer of transformers that ends before stop strings: it holds back what may become one, and space."""

    def __init__(
        self, tokenizer: object, ends: Sequence[int], stop: Sequence[str], emit: Callable[[str], object]
    ) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._ends, self._stop, self._emit = ends, stop, emit
        self._held, self._begun, self._ended = "", False, False

    def put(self, value: Tensor) -> None:
        if self.next_tokens_are_prompt or value.item() not in self._ends:
            super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        if self._ended:
            return
        self._held += text
        stops = [self._held.find(each) for each in self._stop if each in self._held]
        self._ended = stream_end or bool(stops)
        length, longest = len(self._held), max(map(len, self._stop), default=0)
        ready = self._held[: min(stops, default=length) if self._ended else max(0, length - longest)].rstrip()
        self._held = self._held[len(ready) :]
        if not self._begun:
            ready = ready.lstrip()
        if ready:
            self._begun = True
            self._emit(ready)
