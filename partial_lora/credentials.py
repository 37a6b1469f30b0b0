"""Credentials: none in what is written and printed; a mark replaces each."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

HIDDEN = "[hidden]"
_SHORTEST = 8  # characters of a variable's value; a shorter value occurs in harmless text, too
_SECRET_NAME = re.compile(
    r"(^|_)(TOKEN|API_?KEY|ACCESS_KEY|PRIVATE_KEY|PASSWORD|PASSWD|CREDENTIALS?)$|(^|_)SECRETS?(_|$)", re.IGNORECASE
)
_CREDENTIALS = (  # the first group, the text before a credential, stays
    re.compile(
        r"((?<![A-Za-z0-9]))(?:"
        r"(?:hf|api_org)_[A-Za-z0-9]{16,}"  # Hugging Face
        r"|sk-[A-Za-z0-9_-]{16,}"  # OpenAI and others
        r"|wandb_v[0-9]+_[A-Za-z0-9_]{16,}"
        r"|(?:AKIA|ASIA)[A-Z0-9]{16}"  # Amazon
        r"|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_[A-Za-z0-9_]{16,}"
        r")"
    ),
    re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^\s/?#'\"]+(?=@)", re.IGNORECASE),  # a user in a URL
    re.compile(
        r"([?&;](?:[\w.-]*[-_.])?(?:token|key|apikey|password|passwd|secret|signature|sig|credential)=)[^\s&#;'\"]+",
        re.IGNORECASE,
    ),
    re.compile(r"(\bBearer\s+)[\w.~+/=-]{8,}", re.IGNORECASE),
)


def redacted(content: Any) -> Any:
    """Return a text, or plain data (mappings, lists), with credentials hidden in all texts; all else as it is."""
    secrets = {value for name, value in os.environ.items() if len(value) >= _SHORTEST and _SECRET_NAME.search(name)}
    return _without(sorted(secrets, key=len, reverse=True), content)  # a longer one may contain a shorter one


def _without(secrets: Sequence[str], content: Any) -> Any:
    """Return content with secrets, and what looks like one, hidden."""
    if isinstance(content, Mapping):
        return {_without(secrets, key): _without(secrets, value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_without(secrets, value) for value in content]
    if not isinstance(content, str):
        return content
    for value in secrets:
        content = content.replace(value, HIDDEN)
    for pattern in _CREDENTIALS:
        content = pattern.sub(rf"\1{HIDDEN}", content)
    return content


def redact_output() -> None:
    """Hide credentials in all that this process prints from now on, logs and tracebacks included.

    A character that the terminal's encoding lacks is printed as an escape, instead of raising an error. A line is
    printed when it ends, also into a file or a pipe.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace", line_buffering=True)
        if stream is not None and not isinstance(stream, _Redacting):
            setattr(sys, name, _Redacting(stream))


def as_it_is(stream: TextIO) -> TextIO:
    """Return the stream beneath one that hides credentials: a user's own inputs are printed as they are."""
    return _Redacting(stream.beneath, str) if isinstance(stream, _Redacting) else stream


class _Redacting:
    """A stream that hides credentials in what is written to it, and passes all else on to the stream beneath.

    Its errors name it: what could not be written is gone, so that nobody could find out later.
    """

    def __init__(self, stream: TextIO, change: Callable[[str], str] = redacted) -> None:
        self.beneath, self._change = stream, change

    def write(self, text: str) -> int:
        try:
            self.beneath.write(self._change(text))
        except OSError as error:
            streams = {"<stdout>": "standard output", "<stderr>": "standard error"}
            error.filename = streams.get(getattr(self.beneath, "name", None))
            raise
        return len(text)

    def writelines(self, lines) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.beneath, name)
