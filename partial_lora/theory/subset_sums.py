"""Where the factor 1/log(1/sparsity) comes from: one of several random candidates has to be kept, or has to fit.

Sources: Lueker 1998; Malach et al. 2020 (arXiv 2002.00585); Pensia et al. 2020 (arXiv 2006.07990); Gadhikar, Mukherjee
and Burkholz 2023 (arXiv 2210.02412). docs/theory.md says which of their statements could be read.
"""

from __future__ import annotations

import math

import numpy as np

from partial_lora.errors import PartialLoraError
from partial_lora.theory.arguments import count, failure, share

_MOST_VALUES = 22  # all 2**n sums are held at once


def group_probability(groups: int, size: int, keep: float) -> float:
    """P(every group keeps a member): (1 - (1 - keep)^size)^groups, members kept independently at rate `keep`."""
    missed = (1 - share("keep", keep)) ** count("size", size)
    return math.exp(count("groups", groups) * math.log1p(-missed)) if missed < 1 else 0.0


def group_size(groups: int, keep: float, delta: float) -> int:
    """Members a group needs for all groups to keep one with probability at least 1 - delta.

    ceil(log(groups / delta) / log(1 / (1 - keep))), by the union bound: groups * (1 - keep)^size <= delta.
    """
    groups, delta = count("groups", groups), failure("delta", delta)
    if share("keep", keep) == 1:
        return 1
    return max(1, math.ceil(math.log(groups / delta) / -math.log1p(-keep)))


def least_group_size(groups: int, keep: float, delta: float) -> int:
    """The smallest size for which group_probability is at least 1 - delta: no smaller one will do."""
    size = 1
    while group_probability(groups, size, keep) < 1 - failure("delta", delta):
        size += 1
    return size


def kept_groups(groups: int, size: int, keep: float, *, draws: int, rng: np.random.Generator) -> np.ndarray:
    """1 for every draw of masks in which all groups keep a member, else 0 (draws,)."""
    return np.array([(rng.random((groups, size)) < keep).any(1).all() for _ in range(draws)], dtype=np.float64)


def fewest_values(precision: float) -> int:
    """Values that subset sums need at least to come within `precision` of every point of [-1/2, 1/2].

    n values have 2^n subset sums, and each is near an interval of length 2 * precision only: 2^n * 2 * precision >= 1.
    """
    return max(0, math.ceil(math.log2(1 / (2 * failure("precision", precision))) - 1e-12))


def worst_distance(values: np.ndarray) -> float:
    """How far the point of [-1/2, 1/2] that is worst served is from the nearest subset sum of `values` (n,)."""
    values = np.asarray(values, dtype=np.float64)
    if values.ndim != 1 or len(values) > _MOST_VALUES:
        raise PartialLoraError(f"values: expected one list of at most {_MOST_VALUES} numbers")
    sums = np.zeros(1)
    for value in values:
        sums = np.concatenate([sums, sums + value])
    sums.sort()
    middles = (sums[1:] + sums[:-1]) / 2  # within a gap its middle is worst; outside all sums, an end
    points = np.concatenate([[-0.5, 0.5], middles[(middles > -0.5) & (middles < 0.5)]])
    after = np.searchsorted(sums, points).clip(0, len(sums) - 1)
    return float(np.minimum(abs(points - sums[after]), abs(points - sums[(after - 1).clip(0)])).max())


def worst_distances(values: int, *, draws: int, rng: np.random.Generator) -> np.ndarray:
    """worst_distance of `values` numbers drawn uniformly from [-1, 1], for every draw (draws,)."""
    return np.array([worst_distance(rng.uniform(-1, 1, values)) for _ in range(draws)])
