"""The sparsity of each module and axis at one threshold, each found alone or after those chosen before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from partial_lora.calibration.curves import Curves
from partial_lora.calibration.peers import Peers, gathered, of_first
from partial_lora.calibration.points import Levels, curve_of, listed
from partial_lora.calibration.search import in_order

_ROUND = 4  # modules of each process between two exchanges: as much is lost where one of them is killed

Find = Callable[[str, str], float]  # module, axis -> level
Progress = Callable[..., None]


def chosen(
    curves: Curves,
    modules: Sequence[str],
    axes: Sequence[str],
    find: Find,
    *,
    scope: str,
    peers: Peers,
    progress: Progress | None,
) -> Levels:
    """The level of every curve, the modules in their own order whatever the scope.

    axes: of a module's curves. find: the search of one curve, which asks `curves`. scope: "independent", all other
    modules intact; "cumulative" and "cumulative_backward", all that was chosen before stays zeroed, from front to back
    or from back to front (rows before columns). progress: called after every curve.
    """
    told = _Told(progress, len(modules) * len(axes))
    if scope == "independent":
        return _independent(curves, modules, axes, find, peers, told)
    levels = of_first(peers, lambda: _cumulative(curves, in_order(modules, scope), axes, find, told))
    for module in modules if peers.rank else ():
        told.all_of(module, levels[module])
    return {module: levels[module] for module in modules}


def _independent(
    curves: Curves, modules: Sequence[str], axes: Sequence[str], find: Find, peers: Peers, told: _Told
) -> Levels:
    """Every process finds those of its own modules, (rank, rank + size, ...), and is given those of the others."""
    levels: Levels = {}
    step = _ROUND * peers.size
    for start in range(0, len(modules), step):
        own = modules[start + peers.rank : start + step : peers.size]

        def work(own: Sequence[str] = own) -> tuple[Levels, dict]:
            found = {module: _of_module(curves, module, axes, find, told) for module in own}
            return found, {module: {axis: listed(curves.curve(module, axis)) for axis in axes} for module in own}

        for rank, (found, points) in enumerate(gathered(peers, work)):
            levels |= found
            for module in found if rank != peers.rank else ():
                for axis in axes:
                    curves.learn(module, axis, curve_of(points[module][axis]))
                told.all_of(module, found[module])
        curves.save()
    return {module: levels[module] for module in modules}


def _cumulative(curves: Curves, modules: Sequence[str], axes: Sequence[str], find: Find, told: _Told) -> Levels:
    with curves.choices() as choose:
        return {module: _of_module(curves, module, axes, find, told, choose) for module in modules}


def _of_module(
    curves: Curves,
    module: str,
    axes: Sequence[str],
    find: Find,
    told: _Told,
    choose: Callable[[str, str, float], None] | None = None,
) -> dict[str, float]:
    levels = {}
    for axis in axes:
        levels[axis] = find(module, axis)
        if choose is not None:
            choose(module, axis, levels[axis])
        if axis == axes[-1]:
            curves.save()
        told(module, axis, levels[axis])
    return levels


class _Told:
    """Counts the curves that are done, and says so."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def __call__(self, module: str, axis: str, level: float) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total, module=module, axis=axis, sparsity=level)

    def all_of(self, module: str, levels: dict[str, float]) -> None:
        for axis, level in levels.items():
            self(module, axis, level)
