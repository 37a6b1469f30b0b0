"""Processes that calibrate together: each gets the results of all, and an error in one is raised in all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

from partial_lora.errors import PartialLoraError, kind_and_line

Value = TypeVar("Value")


class Peers(Protocol):
    """This process among those that share a calibration; all of them make the same calls in the same order.

    gather: every process's value (plain data), in the order of their ranks; returns once all have called it.
    """

    rank: int
    size: int

    def gather(self, value: Any) -> list[Any]: ...


class Alone:
    """The one process of a calibration that nobody shares."""

    rank, size = 0, 1

    def gather(self, value: Any) -> list[Any]:
        return [value]


def gathered(peers: Peers, work: Callable[[], Value]) -> list[Value]:
    """Return the results of `work` in every process, in rank order.

    An error in one process must not leave the others waiting: all raise it, a PartialLoraError as it is and any other
    as a RuntimeError that names the process.
    """
    if peers.size == 1:
        return [work()]
    failure, value, cause = None, None, None
    try:
        value = work()
    except PartialLoraError as error:
        failure = PartialLoraError, str(error)
    except Exception as error:
        cause, reason = error, kind_and_line(error)
        failure = RuntimeError, f"calibration: process {peers.rank} failed with {reason}"
    outcomes = peers.gather((failure, value))
    for failed, _ in outcomes:
        if failed is not None:
            kind, words = failed
            raise kind(words) from cause
    return [value for _, value in outcomes]


def of_first(peers: Peers, work: Callable[[], Value]) -> Value:
    """Return the result of `work` in the process of rank 0; the others do nothing and receive it."""
    return gathered(peers, lambda: work() if peers.rank == 0 else None)[0]
