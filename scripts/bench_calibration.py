"""Cost of a calibration beside Algorithm 1 done literally: the second benchmark behind `make bench`.

`python scripts/bench_calibration.py` runs a default scan and a bisect of the default model and task with nothing known,
and the literal reference: every (module, axis, level) one full pass over the whole scored draw, levels upward to the
first failure, whose answer the scan's has to be. Writes calibration.json and calibration.md into results/bench.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import bench_record
import torch
from analyses import Subject
from bench_record import markdown, where

from partial_lora.calibration.calibrate import calibrate
from partial_lora.calibration.few_shot import batches_of, few_shot_head
from partial_lora.calibration.score import FewShotScore
from partial_lora.calibration.search import literal_passes, sparsity_levels
from partial_lora.settings.compose import composed
from partial_lora.settings.schema import Config
from partial_lora.settings.stored import plain

QUICK = ["model=tiny_vit", "calibration.shots=3", "calibration.levels=0.1"]


class Question(Subject):
    """A model, the batches of its few-shot draws and the importance of every module, to be calibrated."""

    def __init__(self, config: Config) -> None:
        super().__init__(plain(config))
        draws = self.draws()
        self.fit = batches_of(self.task.train, draws.fit, self.transform)
        self.scored = batches_of(self.task.train, draws.scored, self.transform)
        self.scores = self.importance("svd", draws)

    def measured(self, side: str) -> dict:
        """One calibration of all modules with nothing known, timed and counted."""
        load = os.getloadavg()[0]
        model, chosen = self.config.model, self.config.calibration
        with few_shot_head(self.model, model.head, self.fit):
            score = FewShotScore(self.model, self.scored, "accuracy", model.blocks)
            began, spent = time.perf_counter(), time.process_time()
            calibration = calibrate(
                self.model,
                score.__call__ if side == "literal" else score,  # a full pass alone stops early and reuses nothing
                target_modules=list(self.scores),
                importance=self.scores,
                search="bisect" if side == "bisect" else "scan",
                threshold=chosen.threshold,
                levels=chosen.levels,
                max_sparsity=chosen.max_sparsity,
            )
            wall, cpu = time.perf_counter() - began, time.process_time() - spent
        return {
            "wall_seconds": wall,
            "cpu_seconds": cpu,
            "evaluations": asdict(score.evaluations),
            "baseline": calibration.baseline,
            "joint": calibration.joint,
            "sparsity": calibration.sparsity,
            "load": [load, os.getloadavg()[0]],
            "usable_cpus": len(os.sched_getaffinity(0)),
        }


def arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The command line, read and checked."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    options = bench_record.parsed(parser, argv)
    if options.threads < 1:
        parser.error("--threads is a whole number of at least 1")
    return options


def main(argv: Sequence[str]) -> None:
    """Measure every side, and write record and page."""
    options = arguments(argv)
    torch.set_num_threads(options.threads)
    machine = bench_record.describe_machine()
    config = composed(*(QUICK if options.quick else []))
    settings, question = plain(config), Question(config)
    names = list(question.scores)
    sides = {}
    for side in ("scan", "bisect", "literal"):
        sides[side] = question.measured(side)
        print(f"{side}: {len(names)} modules in {sides[side]['wall_seconds']:.0f} s", flush=True)
    blocks, examples = (
        len(question.model.get_submodule(config.model.blocks)),
        sum(len(b["labels"]) for b in question.scored),
    )
    levels = sparsity_levels(config.calibration.levels, config.calibration.max_sparsity)
    result = {
        "command": shlex.join(["python", "scripts/bench_calibration.py", *argv]),
        "machine": machine,
        "settings": settings,
        "threads": options.threads,
        "blocks": blocks,
        "examples": examples,
        "modules": names,
        "sides": sides,
        "literal": literal(sides, levels, blocks * examples),
    }
    result["aims"] = judge(result)
    bench_record.write(options.out, "calibration", result, page, figures)


def literal(sides: Mapping[str, Mapping], levels: Sequence[float], pass_sample_blocks: int) -> dict:
    """Return what the literal reference evaluates and takes, without the pass that puts examples in order.

    Its passes follow from the sparsities: for each curve every level up to the first failure; one for the baseline, one
    for the joint score. Raises SystemExit where its own run, or the scan, says anything else.
    """
    ran, scanned = sides["literal"], sides["scan"]["sparsity"]
    if ran["sparsity"] != scanned:
        raise SystemExit(f"the scan's sparsities are not the literal reference's: {scanned}, {ran['sparsity']}")
    passes = literal_passes([value for axes in scanned.values() for value in axes.values()], levels)
    counted = ran["evaluations"]["passes"]
    if passes != counted or ran["evaluations"]["sample_blocks"] != (counted + 1) * pass_sample_blocks:
        raise SystemExit(f"the literal reference took {counted} passes, expected {passes} of {pass_sample_blocks}")
    share = passes / (passes + 1)
    seconds = {name: ran[name] * share for name in ("wall_seconds", "cpu_seconds")}
    return {"passes": passes, "sample_blocks": passes * pass_sample_blocks, **seconds}


# --- The page.

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
    sides = result["sides"].values()
    usable, loads = min(side["usable_cpus"] for side in sides), [load for side in sides for load in side["load"]]
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
        where(result["machine"], loads, result["threads"], usable),
    ]
    return "\n\n".join(sections) + "\n"


def _measured(result: Mapping) -> str:
    literal, rows = result["literal"], []
    searches = {side: result["sides"][side] | result["sides"][side]["evaluations"] for side in AIMS}
    for name, of in {"literal, all modules": literal, **searches}.items():
        ran = f" (from {of['passes']:,} passes)" if of is literal else ""
        rows.append(
            {
                "": name,
                "passes": f"{of['passes']:,}",
                "sample-blocks": f"{of['sample_blocks']:,}",
                "literal / this": f"{literal['sample_blocks'] / of['sample_blocks']:.2f}",
                "wall, s": f"{of['wall_seconds']:.0f}{ran}",
                "CPU, s": f"{of['cpu_seconds']:.0f}",
                "CPU, literal / this": f"{literal['cpu_seconds'] / of['cpu_seconds']:.2f}",
            }
        )
    return markdown(rows)


def _sparsities(result: Mapping) -> str:
    other, of = differing(result)
    means = {}
    for side in AIMS:
        values = [value for axes in result["sides"][side]["sparsity"].values() for value in axes.values()]
        means[side] = sum(values) / len(values)
    return (
        "The scan's are those of the literal reference on all modules (a run in which they are not ends without a"
        f" page). Bisect's differ in {other} of {of} ({other / of:.1%}): curves are not"
        f" monotone. Mean sparsity {means['scan']:.3f} by scan, {means['bisect']:.3f} by bisect; baseline"
        f" {result['sides']['scan']['baseline']:.4f}, joint score {result['sides']['scan']['joint']:.4f} and"
        f" {result['sides']['bisect']['joint']:.4f}."
    )


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
        " all modules. Its seconds on all modules go by the passes.",
        "Seconds are from the first full pass to the joint score; importance, head and data are made before.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def figures(result: Mapping) -> bench_record.Figures:
    """Return how many times fewer sample-blocks each search evaluates than the literal reference: an exact number."""
    literal = result["literal"]["sample_blocks"]
    times = {side: literal / result["sides"][side]["evaluations"]["sample_blocks"] for side in AIMS}
    return {f"sample-blocks, literal / {side}": (each, each, each) for side, each in times.items()}


if __name__ == "__main__":
    main(sys.argv[1:])
