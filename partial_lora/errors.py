"""The exceptions a user is meant to read."""

from __future__ import annotations

from collections.abc import Sequence


class PartialLoraError(Exception):
    """A mistake in the input or in the surroundings, said in one line.

    The message names the key, file or module, what was expected and what to do. The command line prints it without a
    traceback and exits with a code other than 0.
    """


def shortlist(names: Sequence[str], most: int = 10) -> str:
    """Return the first few names for a message, and how many more there are: "a, b and 7 more"."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class ProofError(PartialLoraError):
    """A check that was asked for failed: what was made does not do what it should."""
