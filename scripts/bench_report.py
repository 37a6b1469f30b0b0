"""From the raw numbers of the benchmark to ratios with intervals, verdicts on the aims, and a page to read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import bench_record
import numpy as np
from bench_measure import STAGES
from bench_models import PARTIAL, REFERENCES, SELDOM
from bench_record import ENOUGH, markdown
from scipy.stats import bootstrap, quantile_test, trim_mean

CONFIDENCE = 0.95


def step_seconds(variant: Mapping) -> np.ndarray:
    """Processor seconds of each repetition's whole step (repetitions,)."""
    return np.sum([variant["seconds"][stage] for stage in STAGES], axis=0)


def ratio(values: np.ndarray, dense: np.ndarray, floor: np.ndarray) -> dict[str, float | None]:
    """mean(values - floor) / mean(dense - floor), and the interval that holds it: {ratio, low, high}.

    All are seconds of the same repetitions (repetitions,). Differences are taken within a repetition, where a machine
    that is slow for a while is slow for all; the quotient is taken of their means, since a single repetition's may have
    next to nothing below the line. The means leave out the quarter at either end: nearly as deaf to outliers as a
    median, with intervals a tenth narrower. These are percentile bootstraps over whole repetitions, None of too few.
    """

    def quotient(values: np.ndarray, dense: np.ndarray, floor: np.ndarray, axis: int = -1) -> np.ndarray:
        return trim_mean(values - floor, 0.25, axis=axis) / trim_mean(dense - floor, 0.25, axis=axis)

    samples, low, high = (values, dense, floor), None, None
    if len(values) >= ENOUGH:
        settings = {"method": "percentile", "confidence_level": CONFIDENCE, "rng": np.random.default_rng(0)}
        low, high = map(float, bootstrap(samples, quotient, paired=True, **settings).confidence_interval)
    return {"ratio": float(quotient(*samples)), "low": low, "high": high}


def ratios(variants: Mapping[str, Mapping]) -> dict[str, dict[str, dict]]:
    """Every variant against dense LoRA: {variant: {name: {ratio, low, high}}}.

    ``step`` is t / t_lora; ``overhead`` (t - floor) / (t_lora - floor), ``overhead_short`` with the short floor for the
    floor; ``saved`` (b - floor) / (b_lora - floor) of the bytes saved for the backward pass. ``state``, of a variant
    with masks, is bytes of gradients and Adam for each kept entry, over the 12 it takes (Adam's 4 for the number of
    steps of a tensor left out). Bytes are the same every time.
    """
    seconds = {name: step_seconds(variant) for name, variant in variants.items()}
    saved = {name: variant["saved_bytes"] for name, variant in variants.items()}
    against = {}
    for name, variant in variants.items():
        dense, floor, short = (seconds[reference][variant["repetitions"]] for reference in REFERENCES)
        against[name] = {
            "step": ratio(seconds[name], dense, np.zeros_like(dense)),
            "overhead": ratio(seconds[name], dense, floor),
            "overhead_short": ratio(seconds[name], dense, short),
            "saved": _exact((saved[name] - saved["floor"]) / (saved["lora"] - saved["floor"])),
        }
        if name in PARTIAL:
            state = variant["gradient_bytes"] + variant["optimizer_bytes"] - 4 * variant["trainable_tensors"]
            against[name]["state"] = _exact(state / (12 * variant["kept_entries"]))
    return against


def _exact(value: float) -> dict[str, float]:
    return {"ratio": value, "low": value, "high": value}


def line(cell: Mapping) -> str:
    """A cell in a line, to see while the benchmark runs."""
    ours = (
        f"{name} step {_interval(own['step'])}, overhead {_interval(own['overhead'])}"
        for name, own in cell["ratios"].items()
        if name not in REFERENCES
    )
    return f"{cell['model']} rank {cell['rank']}, {cell['wall_seconds']:.0f} s, against LoRA: {'; '.join(ours)}"


# (aim, variant, ratio, at most, ranks it is judged at)
AIMS = (
    ("adapter overhead above the floor", "rows_columns", "overhead", 0.30, (16, 64)),
    ("saved activations above the floor", "rows_columns", "saved", 0.20, (16, 64)),
    ("trainable state, bytes / (12 × kept entries)", "rows_columns", "state", 1, (8, 16, 64)),
    ("trainable state, bytes / (12 × kept entries)", "element", "state", 1, (8, 16, 64)),
    ("step time against dense LoRA", "element", "step", 1.05, (8, 16, 64)),
)


def judge(cells: Sequence[Mapping]) -> list[dict]:
    """The aims beside what was measured, and whether the whole interval is on the right side of the limit."""
    verdicts = []
    for aim, variant, name, limit, ranks in AIMS:
        for cell in cells:
            if cell["rank"] in ranks and variant in cell["variants"]:
                measured = cell["ratios"][variant][name]
                where = {"aim": aim, "variant": variant, "model": cell["model"], "rank": cell["rank"]}
                verdicts.append({**where, "limit": limit, **measured, "verdict": verdict(measured, limit)})
    return verdicts


def verdict(measured: Mapping, limit: float) -> str:
    """ "met" or "not met" where the interval says so; "open" where the limit is inside it or there is none."""
    if measured["low"] is None:
        return "open: too few repetitions"
    if measured["high"] <= limit:
        return "met"
    return "not met" if measured["low"] > limit else "open: the limit is inside the interval"


NAMES = {
    "floor": "frozen floor",
    "short_floor": "short floor",
    "lora": "dense LoRA (PEFT)",
    "rows_columns": "ours, rows and columns",
    "element": "ours, element",
    "shira": "SHiRA (PEFT)",
}


def figures(result: Mapping) -> bench_record.Figures:
    """The ratios of a result that have intervals."""
    return {
        f"{cell['model']} rank {cell['rank']}, {NAMES[name]}: {what}": (each["ratio"], each["low"], each["high"])
        for cell in result["cells"]
        for name, own in cell["ratios"].items()
        if name not in REFERENCES
        for what, each in own.items()
        if each["low"] is not None
    }


def page(result: Mapping) -> str:
    """The result as Markdown."""
    parts = [
        "# The adapter against dense LoRA",
        f"Made by `{result['command']}`; every number of every repetition is in adapter.json.",
    ]
    if result["settings"]["quick"]:
        parts.append("**Tiny models, for a test of the benchmark: these times mean nothing.**")
    parts += ["## Aims", _aims(result["aims"])]
    for model in dict.fromkeys(cell["model"] for cell in result["cells"]):
        cells = [cell for cell in result["cells"] if cell["model"] == model]
        title = f"## {cells[0]['title']}, {cells[0]['modules']} adapted modules"
        parts += [title, "Time:", table(cells, _times), "Memory and files, MiB:", table(cells, _memory)]
    parts += ["## How it is measured", _method(result), "## Where"]
    parts.append(bench_record.where(result["machine"], [load for cell in result["cells"] for load in cell["load"]], 1))
    return "\n\n".join(parts) + "\n"


def _aims(aims: Sequence[Mapping]) -> str:
    shown = ("aim", "variant", "model", "rank", "at most", "measured", "verdict")
    rows = [
        {**aim, "variant": NAMES[aim["variant"]], "at most": aim["limit"], "measured": _interval(aim)} for aim in aims
    ]
    return markdown([{name: row[name] for name in shown} for row in rows])


def table(cells: Sequence[Mapping], columns: Callable[[Mapping, Mapping, Mapping], Mapping]) -> str:
    """One row for each rank and variant, with the ``columns`` made of (cell, variant, its ratios)."""
    return markdown(
        [
            {"rank": cell["rank"], "variant": NAMES[name], **columns(cell, variant, cell["ratios"][name])}
            for cell in cells
            for name, variant in cell["variants"].items()
        ]
    )


def _interval(measured: Mapping) -> str:
    if measured["low"] == measured["high"]:  # exact, or none
        return f"{measured['ratio']:.3f}"
    return f"{measured['ratio']:.3f} [{measured['low']:.3f}, {measured['high']:.3f}]"


def _times(cell: Mapping, variant: Mapping, own: Mapping) -> dict:
    seconds = step_seconds(variant)
    low, high = quantile_test(seconds, p=0.5).confidence_interval(CONFIDENCE)
    return {
        f"{cell['unit']} / s": f"{cell['units'] / np.median(seconds):.2f}",
        "step, s": f"{np.median(seconds):.3f}" + (f" [{low:.3f}, {high:.3f}]" if len(seconds) >= ENOUGH else ""),
        **{stage: f"{np.median(variant['seconds'][stage]):.3f}" for stage in STAGES},
        "step / LoRA": _interval(own["step"]),
        "overhead": _interval(own["overhead"]),
        "overhead, short floor": _interval(own["overhead_short"]),
    }


def _memory(cell: Mapping, variant: Mapping, own: Mapping) -> dict:
    def mib(number: int | None) -> str:
        return "" if number is None else f"{number / 2**20:.2f}"

    return {
        "trainable": f"{variant['trainable_parameters']:,}",
        "saved": mib(variant["saved_bytes"]),
        "saved above floor": _interval(own["saved"]),
        "gradients": mib(variant["gradient_bytes"]),
        "Adam": mib(variant["optimizer_bytes"]),
        "lasting": mib(variant["lasting_bytes"]),
        "file": mib(variant["file_bytes"]["dense"]),
        "compact": mib(variant["file_bytes"]["compact"]),
    }


def _method(result: Mapping) -> str:
    settings, malloc = result["settings"], result["machine"]["malloc"]
    lines = [
        f"Sparsity {settings['sparsity']}, no dropout, fp32, alpha 2 × rank, AdamW (fused), one thread; the head is"
        " frozen. Random weights, the same frozen tensors in memory for all variants, the same batch.",
        "A step is forward pass, loss, backward pass, optimizer and zeroing of gradients, in processor time (user and"
        " system) of this one process. All variants of a model and rank stay in memory; after a discarded round,"
        f" {settings['repeats']} repetitions run each variant once,"
        f" {' and '.join(NAMES[name] for name in SELDOM)} in one of {settings['every']} only, in an order shuffled for"
        " every repetition. Python's garbage collector runs between repetitions only. Seconds are medians (images or"
        " tokens / s made from them); in brackets the two repetitions between which the median lies with"
        f" {CONFIDENCE:.0%} confidence.",
        f"The C library's allocator keeps freed memory ({', '.join(malloc) or 'not here: it has no mallopt'}), for all"
        " variants alike, as a GPU's caching allocator does; otherwise page faults cost more than what is compared.",
        'Overhead is (t - floor) / (t_LoRA - floor), "saved above floor" (b - floor) / (b_LoRA - floor).',
        "A ratio of times is the quotient of two interquartile means of differences within a repetition: what slows the"
        " machine for a while cancels in the differences, and no single repetition in which dense LoRA happened to cost"
        f" next to nothing can blow it up. Its {CONFIDENCE:.0%} interval is a percentile bootstrap over whole"
        " repetitions; an aim is met or not met where the whole interval is on one side of the limit.",
        "Frozen floor: no adapter, and the backward pass goes down to the input of the first block. Adapted models need"
        " no gradient of that input, so they do slightly less frozen work than it, which makes overheads look smaller"
        " than they are; the short floor stops at the output of the first adapted modules, which is where theirs stop.",
        "Saved: memory that one forward pass keeps for its backward pass, each piece of memory once and whole, what"
        " existed before the pass left out; handed to autograd, or held in any other way that Python can see. Lasting:"
        " what a variant holds from step to step beyond the frozen model, its parameters, gradients and Adam (indices,"
        " scratch tensors; masks as numpy arrays not counted). Gradients: those of the parameters; the dense gradient"
        " of W that SHiRA makes on the way is not among them.",
        "SHiRA has exactly as many entries in every module as rows and columns keep there. Its own r can only be a"
        " whole number and would miss it, so the vectors and positions of its layers are replaced after injection.",
        "File: adapter_model.safetensors as save_pretrained writes it. Compact: the whole folder of kept values only.",
    ]
    return "\n".join(f"- {line}" for line in lines)
