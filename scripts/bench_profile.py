"""Profile of an adapter's step: seconds of its own operations, by torch's profiler."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import bench_measure as measure
import torch
from bench_record import markdown
from bench_report import NAMES

ROUNDS = 4
REFERENCE = "short_floor"  # its operations are exactly the frozen part of an adapted model
SHOWN = 0.01  # operations that cost less than this share of all that dense LoRA adds are summed up

Operations = dict[tuple[str, str], tuple[float, int]]
"""{(operation, shapes of its inputs): (self seconds of processor time, calls)}"""


def profile(variants: Mapping[str, Mapping], batch: measure.Batch) -> dict:
    """Seconds a step that each variant spends in operations the floor does not have: {"own": {variant: {operation}}}.

    ``same`` is {variant: seconds} of the rest, the operations that the floor has as well, as often and on the same
    shapes: they differ from the floor's by noise and by what the variants do to each other's caches.
    """
    spent = {name: defaultdict(lambda: (0.0, 0)) for name in variants}
    for _ in range(ROUNDS):
        for name, variant in variants.items():
            for key, (seconds, calls) in _operations(variant, batch).items():
                before = spent[name][key]
                spent[name][key] = (before[0] + seconds / ROUNDS, before[1] + calls)
    own = {name: own_operations(spent[name], spent[REFERENCE]) for name in variants}
    same = {name: sum(seconds for seconds, _ in spent[name].values()) - sum(own[name].values()) for name in variants}
    return {"own": own, "same": same}


def _operations(variant: Mapping, batch: measure.Batch) -> Operations:
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, record_shapes=True) as profiler:
        measure.step(variant["model"], variant["optimizer"], batch)
    return {
        (event.key, str(event.input_shapes)): (event.self_cpu_time_total / 1e6, event.count)
        for event in profiler.key_averages(group_by_input_shape=True)
    }


def own_operations(spent: Operations, floor: Operations) -> dict[str, float]:
    """Seconds by operation that are a variant's own: calls beyond those of the floor, at what such a call costs.

    Calls are told apart by the shapes of their inputs, so that the products of the frozen weights, whose noise is
    larger than what an adapter costs, drop out. Negative where the variant does without calls of the floor.
    """
    own = defaultdict(float)
    for key in {**spent, **floor}:
        (seconds, calls), (floor_seconds, floor_calls) = spent.get(key, (0.0, 0)), floor.get(key, (0.0, 0))
        if calls > floor_calls:
            own[key[0]] += seconds * (calls - floor_calls) / calls
        elif calls < floor_calls:
            own[key[0]] -= floor_seconds * (floor_calls - calls) / floor_calls
    return dict(own)


def page(result: Mapping) -> str:
    """The profiles as Markdown."""
    parts = [
        "# Where an adapter's time goes",
        f"Made by `{result['command']}`. Milliseconds a step, self time by operation under torch's profiler (which"
        f" itself costs some microseconds a call), mean of {ROUNDS} steps. An operation's own time is that of its calls"
        " beyond those of the short floor, told apart by the shapes of their inputs.",
    ]
    for cell in result["profiles"]:
        parts += [f"## {cell['title']}, rank {cell['rank']}", _table(cell)]
    return "\n\n".join(parts) + "\n"


def _table(cell: Mapping) -> str:
    names = [name for name in cell["own"] if name not in ("floor", REFERENCE)]
    limit = SHOWN * sum(cell["own"]["lora"].values())
    operations = {operation for name in names for operation in cell["own"][name]}
    cost = {operation: max(abs(cell["own"][name].get(operation, 0.0)) for name in names) for operation in operations}
    shown = sorted((operation for operation in operations if cost[operation] >= limit), key=cost.get, reverse=True)

    def row(title: str, seconds: Mapping[str, float]) -> dict:
        return {"operation": title, **{NAMES[name]: f"{1000 * seconds[name]:.1f}" for name in names}}

    own, same = cell["own"], cell["same"]
    rows = [row(operation, {name: own[name].get(operation, 0.0) for name in names}) for operation in shown]
    rest = {name: sum(s for operation, s in own[name].items() if operation not in shown) for name in names}
    return markdown(
        [
            *rows,
            row("all others", rest),
            row("own operations, together", {name: sum(own[name].values()) for name in names}),
            row("the rest, minus the short floor's", {name: same[name] - same[REFERENCE] for name in names}),
        ]
    )
