"""Benchmark of many adapters on one base model, masked and dense: `results/bench/serving.md`.

`python scripts/bench_serving.py` adds the products of 1, 4, 16 and 64 adapters to the outputs of one layer, each
adapter for its share of the batch: dense of rank 16; dense of rank 2, which holds as many numbers as the masked one;
and masked of rank 16 at 13 %, which gathers x[:, J] and adds to y[:, I]. It also puts one adapter in the place of
another, as a server does for a request whose adapter is not there. The forms take turns; times are medians of processor
time.
"""

from __future__ import annotations

import argparse
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import process_time

import bench_record
import torch
from torch import Tensor

from partial_lora.report.drawing import COLOURS, MARKERS, legend_below, panels, plain, save

RANK, LOW_RANK, SPARSITY = 16, 2, 0.87
FORMS = ("dense 16", "dense 2", "masked 16")


@dataclass
class Adapters:
    """Adapters of one layer side by side, as a server holds them.

    a: (adapters, rank, kept columns). b: (adapters, kept rows, rank). columns, rows: (adapters, kept), which these are;
    None of a dense one, which has all of them.
    """

    a: Tensor
    b: Tensor
    columns: Tensor | None = None
    rows: Tensor | None = None

    def tensors(self) -> list[Tensor]:
        return [each for each in (self.a, self.b, self.columns, self.rows) if each is not None]

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """Add every adapter's product to its part of the batch: x (adapters, tokens, in), y (adapters, tokens, out)."""
        if self.columns is None:
            return y.baddbmm_(x @ self.a.mT, self.b.mT)
        tokens = x.shape[1]
        low = x.gather(2, self.columns[:, None].expand(-1, tokens, -1)) @ self.a.mT
        return y.scatter_add_(2, self.rows[:, None].expand(-1, tokens, -1), low @ self.b.mT)

    def dense(self, wide: int, high: int) -> Adapters:
        """The same adapters with their zeros."""
        if self.columns is None:
            return self
        count, rank, _ = self.a.shape
        a = torch.zeros(count, rank, wide).scatter_(2, self.columns[:, None].expand_as(self.a), self.a)
        b = torch.zeros(count, high, rank).scatter_(1, self.rows[:, :, None].expand_as(self.b), self.b)
        return Adapters(a, b)


def adapters(form: str, count: int, wide: int, high: int) -> Adapters:
    """Adapters of one form with random values and masks."""
    rank = LOW_RANK if form == "dense 2" else RANK
    if form != "masked 16":
        return Adapters(torch.randn(count, rank, wide), torch.randn(count, high, rank))
    columns, rows = (torch.stack([_kept(size, seed) for seed in range(count)]) for size in (wide, high))
    return Adapters(torch.randn(count, rank, columns.shape[1]), torch.randn(count, rows.shape[1], rank), columns, rows)


def _kept(size: int, seed: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[: round((1 - SPARSITY) * size)].sort()[0]


LAYERS = {"q of 2048": (2048, 2048), "up of 2048": (2048, 8192)}  # in, out: of a Llama of a thousand million weights
TOKENS = {"decode": 64, "prefill": 1024}  # in the whole batch
COUNTS = (1, 4, 16, 64)


def measure(layer: tuple[int, int], tokens: int, count: int, repeats: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of every form, {"add" | "switch": {form: [each repetition]}}, the forms taking turns in random order."""
    wide, high = layer
    held = {form: adapters(form, count, wide, high) for form in FORMS}
    others = {form: [each[0].clone() for each in adapters(form, 1, wide, high).tensors()] for form in FORMS}
    x, y = torch.randn(count, tokens // count, wide), torch.randn(count, tokens // count, high)

    def switch(form: str) -> None:
        for place, value in zip(held[form].tensors(), others[form], strict=True):
            place[-1].copy_(value)

    doing: Mapping[str, Callable[[str], object]] = {"add": lambda form: held[form].add_to(y, x), "switch": switch}
    seconds: dict = {what: {form: [] for form in FORMS} for what in doing}
    for repeat in range(-2, repeats):  # the first two are for caches
        for what, do in doing.items():
            for form in random.sample(FORMS, len(FORMS)):
                y.zero_()  # what was added before does not grow without end, and lies in the cache for all of them
                start = process_time()
                do(form)
                end = process_time()
                if repeat >= 0:
                    seconds[what][form].append(end - start)
    return seconds


def size(form: str, layer: tuple[int, int]) -> dict[str, int]:
    """Bytes of one adapter of a layer: its values in float32, and its indices at 4 bytes (a seed makes them again)."""
    one = adapters(form, 1, *layer)
    indices = sum(each.numel() for each in (one.columns, one.rows) if each is not None)
    return {"values": 4 * (one.a.numel() + one.b.numel()), "indices": 4 * indices}


def page(record: Mapping) -> str:
    """The tables, and where the masked form is the cheapest."""
    cases, sizes, made = record["cases"], record["bytes"], record["made"]
    lines = ["# Many adapters on one base model", ""]
    lines += [
        "Made by `python scripts/bench_serving.py`; every repetition is in serving.json. " + made["how"],
        "",
        "An adapter's product is added to the output of one layer, for each adapter's share of the batch. Dense of rank"
        f" {LOW_RANK} holds as many numbers as rank {RANK} masked at {1 - SPARSITY:.0%}.",
        "",
        "| layer | batch | adapters | "
        + " | ".join(f"{form}, ms" for form in FORMS)
        + " | masked / dense 16 | masked / dense 2 |",
        "|---" * (5 + len(FORMS)) + "|",
    ]
    wins: dict[str, list[str]] = {"dense 16": [], "dense 2": []}
    for case in cases:
        median = {form: statistics.median(case["add"][form]) for form in FORMS}
        ratios = {other: median["masked 16"] / median[other] for other in wins}
        for other, ratio in ratios.items():
            if ratio < 1:
                wins[other].append(f"{case['layer']}, {case['batch']}, {case['adapters']}")
        cells = [case["layer"], f"{case['batch']}, {case['tokens']} tokens", str(case["adapters"])]
        cells += [f"{1000 * median[form]:.3f}" for form in FORMS] + [f"{ratio:.2f}" for ratio in ratios.values()]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Putting another adapter in the place of one, and what an adapter of the layer takes:", ""]
    lines += [
        "| layer | form | bytes, values | bytes, indices | switch, ms | of dense 16 |",
        "|---" * 6 + "|",
    ]
    for layer, of_forms in sizes.items():
        times = {
            form: statistics.median(each for case in cases if case["layer"] == layer for each in case["switch"][form])
            for form in FORMS
        }
        for form, bytes_of in of_forms.items():
            ratio = times[form] / times["dense 16"]
            cells = [layer, form, f"{bytes_of['values']:,}", f"{bytes_of['indices']:,}", f"{1000 * times[form]:.4f}"]
            lines.append("| " + " | ".join([*cells, f"{ratio:.2f}"]) + " |")
    lines += [
        "",
        *(f"Masked takes less time than {other} in {len(of)} of {len(cases)} cases." for other, of in wins.items()),
        "",
        "![time and memory against the number of adapters](serving.svg)",
    ]
    return "\n".join(lines) + "\n"


def figures(record: Mapping) -> bench_record.Figures:
    """The time of the masked form against the others', in every case."""
    return {
        f"{case['layer']}, {case['batch']}, {case['adapters']}: masked / {other}": bench_record.ratio_of_medians(
            case["add"]["masked 16"], case["add"][other]
        )
        for case in record["cases"]
        for other in ("dense 16", "dense 2")
    }


def draw(cases: Sequence[Mapping], sizes: Mapping[str, Mapping[str, Mapping[str, int]]], out: Path) -> None:
    """Draw time against the number of adapters, a panel for a layer and batch, and the memory that they take."""
    kinds = list(dict.fromkeys((case["layer"], case["batch"]) for case in cases))
    figure, axes = panels(len(kinds) + len(sizes), wide=3.6, high=2.9)
    for panel, (layer, batch) in zip(axes, kinds, strict=False):
        own = [case for case in cases if (case["layer"], case["batch"]) == (layer, batch)]
        for form in FORMS:
            times = [1000 * statistics.median(case["add"][form]) for case in own]
            panel.plot([case["adapters"] for case in own], times, **_looks(form))
        panel.set(title=f"{layer}, {batch}", ylabel="ms", ylim=(0, None))
    for panel, (layer, of_forms) in zip(axes[len(kinds) :], sizes.items(), strict=True):
        counts = sorted({case["adapters"] for case in cases})
        for form, bytes_of in of_forms.items():
            panel.plot(counts, [count * sum(bytes_of.values()) / 1e6 for count in counts], **_looks(form))
        panel.set(title=f"{layer}, memory", ylabel="MB", yscale="log")
    for panel in axes:
        panel.set(xscale="log", xlabel="adapters")
        panel.set_xticks(COUNTS, [str(count) for count in COUNTS])
        panel.minorticks_off()
        plain(panel)
    legend_below(figure, axes[0].get_lines())
    save(figure, out / "serving.svg")


def _looks(form: str) -> dict[str, object]:
    at = FORMS.index(form)
    return {"label": form, "color": COLOURS[at], "marker": MARKERS[at], "markersize": 5}


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, and write serving.json and serving.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=60)
    options = bench_record.parsed(parser, argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    random.seed(0)
    layers = {"q of 64": (64, 64)} if options.quick else LAYERS
    cases = [
        {"layer": name, "batch": batch, "tokens": tokens, "adapters": count}
        | measure(layer, tokens, count, options.repeats)
        for name, layer in layers.items()
        for batch, tokens in TOKENS.items()
        for count in COUNTS
    ]
    sizes = {name: {form: size(form, layer) for form in FORMS} for name, layer in layers.items()}
    made = {
        "how": f"Medians of {options.repeats} repetitions on one thread of a CPU in float32, torch {torch.__version__};"
        " the forms take turns in random order."
    }
    record = {"made": made, "bytes": sizes, "cases": cases}
    bench_record.write(options.out, "serving", record, page, figures)
    draw(cases, sizes, options.out)


if __name__ == "__main__":
    main()
