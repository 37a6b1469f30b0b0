"""Credentials kept out of what is written and printed: each is replaced by a mark wherever it stands in a text.

What is hidden is the value of every environment variable whose name says that it is secret, what has the shape of a
token of a known service, whoever stands before the host in a URL, and parameters of a URL that are named as secrets
are. Other text is left as it is, to the character.
"""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Mapping
from typing import Any, TextIO

HIDDEN = "[hidden]"
_SHORTEST = 8  # characters of a variable's value: a shorter one is found in harmless text, too
_SECRET_NAME = re.compile(
    r"(^|_)(TOKEN|API_?KEY|ACCESS_KEY|PRIVATE_KEY|PASSWORD|PASSWD|CREDENTIALS?)$|(^|_)SECRETS?(_|$)", re.IGNORECASE
)
_TOKEN = re.compile(
    r"(?<![A-Za-z0-9])(?:"
    r"(?:hf|api_org)_[A-Za-z0-9]{16,}"  # Hugging Face
    r"|sk-[A-Za-z0-9_-]{16,}"  # OpenAI and others
    r"|wandb_v[0-9]+_[A-Za-z0-9_]{16,}"
    r"|(?:AKIA|ASIA)[A-Z0-9]{16}"  # Amazon
    r"|gh[pousr]_[A-Za-z0-9]{16,}|github_pat_[A-Za-z0-9_]{16,}"
    r")"
)
_USER_IN_URL = re.compile(r"(?P<before>\b[a-z][a-z0-9+.-]*://)[^\s/?#'\"]+@", re.IGNORECASE)
_PARAMETER = re.compile(
    r"(?P<before>[?&;](?:[\w.-]*[-_.])?(?:token|key|apikey|password|passwd|secret|signature|sig|credential)=)"
    r"[^\s&#;'\"]+",
    re.IGNORECASE,
)
_BEARER = re.compile(r"(?P<before>\bBearer\s+)[\w.~+/=-]{8,}", re.IGNORECASE)


def redacted(content: Any) -> Any:
    """A text without credentials, or plain data (mappings, lists) whose texts are all so; anything else as it is."""
    if isinstance(content, str):
        return _without_secrets(content)
    if isinstance(content, Mapping):
        return {redacted(key): redacted(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [redacted(value) for value in content]
    return content


def redact_output() -> None:
    """Hide credentials in all that this process prints from now on, logs and tracebacks among it.

    What the terminal's encoding has no character for is printed as an escape, and ends nothing.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
        if stream is not None and not isinstance(stream, _Redacting):
            setattr(sys, name, _Redacting(stream))


def _without_secrets(text: str) -> str:
    for value in _secrets():
        text = text.replace(value, HIDDEN)
    text = _TOKEN.sub(HIDDEN, text)
    text = _USER_IN_URL.sub(rf"\g<before>{HIDDEN}@", text)
    for pattern in (_PARAMETER, _BEARER):
        text = pattern.sub(rf"\g<before>{HIDDEN}", text)
    return text


def _secrets() -> list[str]:
    """Values of this process's variables that are secret by their name; one that holds another comes before it."""
    found = {value for name, value in os.environ.items() if len(value) >= _SHORTEST and _SECRET_NAME.search(name)}
    return sorted(found, key=len, reverse=True)


class _Redacting:
    """A stream that hides credentials in what is written to it, and is in all else the one beneath."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(_without_secrets(text))
        return len(text)

    def writelines(self, lines) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
