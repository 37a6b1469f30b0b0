"""Prompts and what follows them, as tokens: the rule of lm-evaluation-harness, and chats by a tokenizer's template."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from partial_lora.errors import PartialLoraError

Tokens = list[int]


@dataclass(frozen=True)
class Continuations:
    """How a tokenizer turns prompts, and prompts with continuations, into tokens.

    chat: whether a prompt is what a user says in the tokenizer's chat template, and a continuation the reply.
    """

    tokenizer: PreTrainedTokenizerBase
    chat: bool = False

    def __post_init__(self) -> None:
        if self.chat and not self.tokenizer.chat_template:
            raise PartialLoraError(
                "task.chat_template=true: the model's tokenizer has no chat template; leave it null, or choose a model "
                "that was tuned to chat"
            )

    def contexts(self, prompts: Sequence[str]) -> list[Tokens]:
        """The tokens of prompts that are to be continued.

        Of a plain prompt without the space at its end, which belongs to the word that follows.
        """
        texts = [self._asked(prompt) for prompt in prompts]
        return self._begun(texts, self._encoded(texts))

    def pairs(self, prompts: Sequence[str], continuations: Sequence[str], ends: bool) -> list[tuple[Tokens, Tokens]]:
        """The tokens of prompts, and those of what follows them, which never are none.

        Prompt and continuation are tokenised together. The tokens past those of the prompt alone are the continuation,
        as lm-evaluation-harness has it, whose first token may be made of both.

        continuations: with the space that sets them off, or after a prompt that ends in one.
        ends: whether the continuation is all that is said, and its end a token to be learned too.
        """
        texts, follow = [self._asked(prompt) for prompt in prompts], list(continuations)
        if self.chat:
            follow = [self._reply(*pair, ends) for pair in zip(prompts, texts, follow, strict=True)]
        else:
            follow = [prompt[len(text) :] + after for prompt, text, after in zip(prompts, texts, follow, strict=True)]
        whole = self._encoded([text + after for text, after in zip(texts, follow, strict=True)])
        alone = self._encoded(texts)
        found = []
        for context, both, after in zip(alone, whole, follow, strict=True):
            found.append(both[len(context) :] or self._encoded([after])[0])
        end = self.tokenizer.eos_token_id
        if ends and end is not None:
            found = [tokens if tokens[-1:] == [end] else [*tokens, end] for tokens in found]
        return list(zip(self._begun(texts, alone), found, strict=True))

    def _asked(self, prompt: str) -> str:
        """A prompt as the model sees it, up to where it is to go on."""
        if not self.chat:
            return prompt.rstrip()
        said = [{"role": "user", "content": prompt}]
        return self.tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)

    def _reply(self, prompt: str, asked: str, reply: str, ends: bool) -> str:
        """A reply as the template writes it, up to the token that ends a turn; without that unless it `ends`."""
        reply = reply.lstrip()
        if not ends:
            return reply
        said = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
        whole = self.tokenizer.apply_chat_template(said, tokenize=False)
        if not whole.startswith(asked):  # such as one that puts thoughts before a reply
            return reply
        written, end = whole[len(asked) :], self.tokenizer.eos_token
        return written[: written.rindex(end) + len(end)] if end and end in written else written

    def _begun(self, texts: Sequence[str], encoded: Sequence[Tokens]) -> list[Tokens]:
        """Contexts with what the tokenizer puts before a text; without any, a text of nothing starts at its end token.

        A template, or a prompt, that starts with such a token itself has no other put before it.
        """
        start, first = self.start, self.tokenizer.bos_token
        found = []
        for text, tokens in zip(texts, encoded, strict=True):
            own = self.chat or (first is not None and text.startswith(first))
            found.append(list(tokens) if own else [*start, *tokens])
        if all(found):
            return found
        tokenizer = self.tokenizer
        instead = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        return [tokens or [0 if instead is None else instead] for tokens in found]

    @property
    def start(self) -> Tokens:
        """The special tokens that the tokenizer puts before any text."""
        (plain,) = self._encoded(["a"])
        whole = self.tokenizer(["a"], verbose=False)["input_ids"][0]
        before = next(at for at in range(len(whole)) if whole[at : at + len(plain)] == plain)
        return list(whole[:before])

    def _encoded(self, texts: Sequence[str]) -> list[Tokens]:
        if not texts:
            return []
        return self.tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
