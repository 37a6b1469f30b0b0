"""From what calibrations took to verdicts on the aims, and a page to read."""

from __future__ import annotations

from collections.abc import Mapping

import bench_moved
from bench_report import markdown

# (what, side, at least so many times fewer sample-block evaluations, at most so many seconds)
AIMS = {"scan": (2.0, 200), "bisect": (3.0, 120)}


def judge(result: Mapping) -> list[dict]:
    """The aims beside what was measured; a time that misses its aim is held against it on free processors only."""
    verdicts = []
    for side, (times, seconds) in AIMS.items():
        measured = result["sides"][side]
        fewer = result["literal"]["sample_blocks"] / measured["evaluations"]["sample_blocks"]
        what = "sample-block evaluations, literal / this"
        met = "met" if fewer >= times else "not met"
        verdicts.append({"side": side, "aim": what, "wanted": f"at least {times:g}", "measured": fewer, "verdict": met})
        met = "met" if measured["wall_seconds"] <= seconds else _excuse(result, measured) or "not met"
        wanted = f"at most {seconds} s"
        wall = measured["wall_seconds"]
        verdicts.append({"side": side, "aim": "wall time", "wanted": wanted, "measured": wall, "verdict": met})
    return verdicts


def _excuse(result: Mapping, measured: Mapping) -> str:
    """Return why a time says nothing: fewer processors than threads, or others at work on them."""
    usable, threads = measured["usable_cpus"], result["threads"]
    if usable < threads:
        return f"open: {threads} threads had {usable} processor{'s' * (usable != 1)}"
    busy = max(measured["load"])
    return f"open: the machine was busy (load {busy:.1f})" if busy > threads + 0.5 else ""


def differing(result: Mapping) -> tuple[int, int]:
    """Count the sparsities that bisect and scan differ in, and all of them."""
    scan, bisect = (result["sides"][side]["sparsity"] for side in ("scan", "bisect"))
    pairs = [(scan[module][axis], bisect[module][axis]) for module in scan for axis in scan[module]]
    return sum(one != other for one, other in pairs), len(pairs)


def page(result: Mapping) -> str:
    """The whole page, as Markdown."""
    sections = [
        "# Calibration against its literal reference",
        f"`{result['command']}`",
        "## Aims",
        markdown([{**aim, "measured": f"{aim['measured']:.2f}"} for aim in result["aims"]]),
        "## Measured",
        _measured(result),
        "## Sparsities",
        _sparsities(result),
        "## How it was measured",
        _method(result),
        "## Where",
        _where(result),
    ]
    return "\n\n".join(sections) + "\n"


def _measured(result: Mapping) -> str:
    literal = result["literal"]
    rows = [
        {
            "": "literal, all modules",
            "passes": f"{literal['passes']:,}",
            "sample-blocks": f"{literal['sample_blocks']:,}",
            "literal / this": "1.00",
            "wall, s": f"{literal['wall_seconds']:.0f} (from {literal['passes_run']} passes)",
            "CPU, s": f"{literal['cpu_seconds']:.0f}",
            "CPU, literal / this": "1.00",
        }
    ]
    for side in AIMS:
        measured = result["sides"][side]
        counted = measured["evaluations"]
        rows.append(
            {
                "": side,
                "passes": f"{counted['passes']:,}",
                "sample-blocks": f"{counted['sample_blocks']:,}",
                "literal / this": f"{literal['sample_blocks'] / counted['sample_blocks']:.2f}",
                "wall, s": f"{measured['wall_seconds']:.0f}",
                "CPU, s": f"{measured['cpu_seconds']:.0f}",
                "CPU, literal / this": f"{literal['cpu_seconds'] / measured['cpu_seconds']:.2f}",
            }
        )
    return markdown(rows)


def _sparsities(result: Mapping) -> str:
    other, of = differing(result)
    some, means = _literal_modules(result), {}
    for side in AIMS:
        values = [value for axes in result["sides"][side]["sparsity"].values() for value in axes.values()]
        means[side] = sum(values) / len(values)
    return (
        f"The scan's are those of the literal reference on {some} (a run in which they are not ends without a page)."
        f" Bisect's differ in {other} of {of} ({other / of:.1%}): curves are not"
        f" monotone. Mean sparsity {means['scan']:.3f} by scan, {means['bisect']:.3f} by bisect; baseline"
        f" {result['sides']['scan']['baseline']:.4f}, joint score {result['sides']['scan']['joint']:.4f} and"
        f" {result['sides']['bisect']['joint']:.4f}."
    )


def _literal_modules(result: Mapping) -> str:
    ran = result["sides"]["literal"]["sparsity"]
    return "all modules" if len(ran) == len(result["modules"]) else f"{', '.join(ran)}, where it was run"


def _method(result: Mapping) -> str:
    settings = result["settings"]
    lines = [
        f"{settings['model']['name']} on {settings['task']['name']}: {len(result['modules'])} modules, rows and"
        f" columns, {result['examples']} scored examples, {settings['model']['image_size']} pixels, threshold"
        f" {settings['calibration']['threshold']}, fp32, threads: {result['threads']}. Nothing is known before.",
        "A sample-block evaluation is one block run on one example. A block of which only a part is computed counts"
        " whole, and so does the pass that puts the examples in order.",
        "Literal: every (module, axis, level) is one full pass from the input over the whole scored draw, in the same"
        " batches, levels upward to the first failure; one pass for the baseline and one for the joint score. What it"
        " evaluates follows from the sparsities, and the same formula gives what was counted where it was run, on"
        f" {_literal_modules(result).removesuffix(', where it was run')}. Its seconds on all modules go by the passes.",
        "Seconds are from the first full pass to the joint score; importance, head and data are made before.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _where(result: Mapping) -> str:
    machine = result["machine"]
    usable = min(side["usable_cpus"] for side in result["sides"].values())
    loads = [load for side in result["sides"].values() for load in side["load"]]
    lines = [
        f"{machine['cpu']}, {usable} of {machine['cpus']} CPUs usable, {machine['capability']}",
        ", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
        f"commit {machine['git_commit']}; started {machine['started']}",
        f"load average {min(loads):.2f} to {max(loads):.2f}, of which the benchmark is {result['threads']}",
    ]
    return "\n".join(f"- {line}" for line in lines)


def figures(result: Mapping) -> bench_moved.Figures:
    """Return how many times fewer sample-blocks each search evaluates than the literal reference: an exact number."""
    literal = result["literal"]["sample_blocks"]
    times = {side: literal / result["sides"][side]["evaluations"]["sample_blocks"] for side in AIMS}
    return {f"sample-blocks, literal / {side}": (each, each, each) for side, each in times.items()}
