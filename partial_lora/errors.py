"""The exceptions a user is meant to read."""

from __future__ import annotations


class PartialLoraError(Exception):
    """A mistake in the input or in the surroundings, said in one line.

    The message names the key, file or module, what was expected and what to do. The command line prints it without a
    traceback and exits with a code other than 0.
    """


class ProofError(PartialLoraError):
    """A check that was asked for failed: what was made does not do what it should."""
