"""Texts that a finished causal run writes after prompts and in conversations, word by word as they are written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor
from transformers import TextStreamer, set_seed

from partial_lora.building import build
from partial_lora.errors import require
from partial_lora.finished.predict import RunModel, is_text
from partial_lora.finished.run import FinishedRun
from partial_lora.finished.target_task import one_task
from partial_lora.tasks.prompt_inputs import Message, Prompt
from partial_lora.tasks.questions import ASSISTANT
from partial_lora.training.generation import generation_config, room_for_prompts


class Writer:
    """A finished causal run that writes after prompts, alone or in a conversation.

    Prompts enter the model as the task's own prompts did, chat template included. A text ends at the model's end token,
    before the first of the task's stop strings or of `stop`, or after `max_new_tokens` (None: the task's).

    Args:
        member: of a mixture, the task whose prompts and stop strings are meant.
        temperature: 0 takes the most likely token each time, as `predict` does; else tokens are drawn.
        seed: of what is drawn; None draws another text each time.
    """

    def __init__(
        self,
        run: FinishedRun,
        *,
        member: str | None = None,
        device: str = "auto",
        max_new_tokens: int | None = None,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> None:
        task = one_task(run, member).config.task
        self._transform = build.transform_of(run.config.model, task)
        self._on, self._stop = RunModel(run, device), [*task.stop, *stop]
        tokens = max_new_tokens or task.max_new_tokens
        self._room = room_for_prompts(self._on.model, tokens)
        self._settings = generation_config(self._on.model, self._transform, tokens, self._stop, temperature)
        if seed is not None:
            set_seed(seed)

    def write(self, prompt: Prompt, emit: Callable[[str], object]) -> str:
        """Return the text after a prompt, without space around it; call `emit` with its parts as they are written."""
        parts: list[str] = []

        def put(part: str) -> None:
            parts.append(part)
            emit(part)

        tokenizer, settings = self._transform.tokenizer, self._settings
        encoded = self._transform.encode([prompt], self._room)
        inputs = {name: tensor.to(self._on.device) for name, tensor in encoded.items()}
        streamer = _Words(tokenizer, settings.eos_token_id or [], self._stop, put)
        reader = {"tokenizer": tokenizer} if self._stop else {}
        with torch.inference_mode():
            self._on.model.generate(**inputs, generation_config=settings, streamer=streamer, **reader)
        return "".join(parts)

    def converse(self, turns: Iterable[str], emit: Callable[[str], object]) -> Iterator[str]:
        """Yield the answer to each turn of a conversation, which the model reads with all before it.

        Where prompts have no chat template, a turn is a prompt of its own.
        """
        messages: list[Message] = []
        for turn in filter(str.strip, turns):
            require(is_text(turn), "PROMPT", turn, "a text in UTF-8")
            messages.append({"role": "user", "content": turn})
            answer = self.write(messages if self._transform.chat else turn, emit)
            messages.append({"role": ASSISTANT, "content": answer})
            yield answer


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
        stops = [self._held.find(string) for string in self._stop if string in self._held]
        self._ended = stream_end or bool(stops)
        length, longest = len(self._held), max(map(len, self._stop), default=0)
        ready = self._held[: min(stops, default=length) if self._ended else max(0, length - longest)].rstrip()
        self._held = self._held[len(ready) :]
        if not self._begun:
            ready = ready.lstrip()
        if ready:
            self._begun = True
            self._emit(ready)
