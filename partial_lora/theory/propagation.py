"""From errors of modules to the change of a network's output, by Lipschitz constants taken from known activations.

x_l = f_l(x_{l-1}) is the network, y_l = g_l(y_{l-1}) the same with other weights, y_0 = x_0. Assumed of every l: g_l is
K_l-Lipschitz *from the known point*, |g_l(y) - g_l(x_{l-1})| <= K_l |y - x_{l-1}| for every y that can occur, and
|g_l(x_{l-1}) - f_l(x_{l-1})| <= e_l. Then |y_L - x_L| <= sum_l e_l prod_{k > l} K_k. Norms are Euclidean, of one
example with all its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

GELU = 1.13  # the largest slope of x Phi(x) is 1.1289...
SOFTMAX = 0.5  # |diag(s) - s s^T| <= max_i 2 s_i (1 - s_i) <= 1/2, Gershgorin


@dataclass(frozen=True)
class Step:
    """One map of a chain: its Lipschitz constant from the known point, and its own error there."""

    constant: float
    error: float = 0.0


def propagated(steps: Iterable[Step], entering: float = 0.0) -> float:
    """A bound on the change after a chain of maps: K change + e, map by map."""
    change = entering
    for step in steps:
        change = step.constant * change + step.error
    return change


def residual(branch: Iterable[Step], entering: float) -> float:
    """The same after x + branch(x)."""
    return entering + propagated(branch, entering)


def in_closed_form(steps: list[Step]) -> float:
    """sum_l e_l prod_{k > l} K_k."""
    return sum(one.error * math.prod(later.constant for later in steps[at + 1 :]) for at, one in enumerate(steps))


def normalisation(deviations: np.ndarray, floor: float) -> float:
    """The constant of layer normalisation before its scale and shift, from tokens with these standard deviations.

    max over tokens of 2 / (sigma + sqrt(floor)), sigma^2 = variance + floor: |a/|a| - b/|b|| <= 2 |a - b| / (|a| + |b|)
    with the centred token and sqrt(width * floor) as one more coordinate; the other token has sigma >= sqrt(floor).
    """
    return float((2 / (np.asarray(deviations, dtype=np.float64) + floor**0.5)).max())


def deviations(tokens: np.ndarray, floor: float) -> np.ndarray:
    """sqrt(variance + floor) of every token (tokens,), of activations (tokens, width)."""
    return np.sqrt(np.asarray(tokens, dtype=np.float64).var(-1) + floor)


def attention(keys: np.ndarray, values: np.ndarray, query_limits: np.ndarray, scale: float) -> float:
    """The constant of softmax(scale Q K^T) V, from known keys and values (heads, tokens, size), in Q, K and V together.

    query_limits (heads,): no query of any token can be longer, with the other weights, whatever enters. Of each head,
    sqrt(tokens + (scale |Vc| |Kc| / 2)^2 + (scale |Vc| sqrt(tokens) limit / 2)^2), with keys and values centred over
    tokens, which softmax does not see; the largest of the heads.
    """
    tokens = keys.shape[1]
    centred = [one.astype(np.float64) - one.mean(1, keepdims=True) for one in (keys, values)]
    of_keys, of_values = (np.linalg.norm(one, ord=2, axis=(1, 2)) for one in centred)
    slope = SOFTMAX * scale * of_values
    by_query, by_key = slope * of_keys, slope * tokens**0.5 * np.asarray(query_limits)
    return float(np.sqrt(tokens + by_query**2 + by_key**2).max())


def longest(weight: np.ndarray, bias: np.ndarray, gain: np.ndarray, shift: np.ndarray) -> float:
    """No output of a linear map (out, width) after layer normalisation can be longer, whatever token enters.

    |W diag(gain)| sqrt(width) + |W shift + bias|: a normalised token is no longer than sqrt(width).
    """
    return float(np.linalg.norm(weight * gain, ord=2) * len(gain) ** 0.5 + np.linalg.norm(weight @ shift + bias))


def farthest(gain: np.ndarray) -> float:
    """No two outputs of a normalisation are farther apart: 2 max |gain| sqrt(width). A larger bound says nothing."""
    return float(2 * abs(gain).max() * len(gain) ** 0.5)
