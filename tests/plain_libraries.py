"""Logits of an export by the libraries that own its format, in this process."""

from __future__ import annotations

import contextlib
import io
import sys
from types import SimpleNamespace

import pytest

from partial_lora.finished import export


def run(command: list[str], **settings: object) -> SimpleNamespace:
    """Do what a clean interpreter would with a script, but for its refusal of this package; as `subprocess.run`."""
    _, option, script, *arguments = command
    own = "\n".join(line for line in script.splitlines() if '"partial_lora"' not in line)
    written, wrong = io.StringIO(), ""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(written):
        patch.setattr(sys, "argv", [option, *arguments])
        try:
            exec(own, {"__name__": "__main__"})
        except Exception as error:
            wrong = f"{type(error).__name__}: {error}"
    return SimpleNamespace(returncode=int(bool(wrong)), stdout=written.getvalue(), stderr=wrong)


def in_this_process(patch: pytest.MonkeyPatch) -> None:
    """Let exports be checked without the seconds that a clean interpreter takes to start."""
    patch.setattr(export, "subprocess", SimpleNamespace(run=run))
