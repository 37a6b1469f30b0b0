"""Cost of a calibration beside Algorithm 1 done literally: the second benchmark behind `make bench`.

`python scripts/bench_calibration.py` runs a default scan and a bisect of the default model and task with nothing known,
and the literal reference: every (module, axis, level) one full pass over the whole scored draw, levels upward to the
first failure, whose answer the scan's has to be. Writes calibration.json and calibration.md into results/bench.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace

import bench_calibration_page as page
import bench_moved
import torch
from bench_adapter import describe_machine
from torch import nn
from transformers import set_seed

from partial_lora.calibration.calibrate import calibrate
from partial_lora.calibration.few_shot import batches_of, few_shot_head, importance_few_shot
from partial_lora.calibration.score import FewShotScore
from partial_lora.calibration.search import literal_passes, sparsity_levels
from partial_lora.models.targets import target_names
from partial_lora.runs import build
from partial_lora.runs.compose import composed
from partial_lora.runs.config import plain
from partial_lora.runs.schema import Config

_ALL = 10**6
QUICK = ["model=tiny_vit", "calibration.shots=3", "calibration.levels=0.1"]


class Literal:
    """A score that is nothing but a full pass: it does not stop early, and reuses nothing."""

    def __init__(self, score: FewShotScore) -> None:
        self._score = score

    def __call__(self, model: nn.Module) -> float:
        return self._score(model)


class Question:
    """A model with its few-shot head, the scored draw and the importance of every module, to be calibrated."""

    def __init__(self, config: Config) -> None:
        model, chosen = config.model, config.calibration
        task, transform = build.task_of(config), build.transform_of(model, config.task)
        set_seed(config.seed)
        self.model = build.model_of(model, task.labels)
        self.blocks, self.head = model.blocks, model.head
        draws = build.draws_of(config, task.train)
        self.fit, self.scored = (batches_of(task.train, rows, transform) for rows in (draws.fit, draws.scored))
        self.search = {name: getattr(chosen, name) for name in ("threshold", "levels", "max_sparsity")}
        self.importance = importance_few_shot(
            self.model,
            task.train,
            transform,
            replace(config.importance, name="svd"),
            modules=target_names(self.model, model.target_modules, head=self.head),
            draws=draws,
            head=self.head,
            seed=chosen.seed,
        )

    def measured(self, side: str, modules: Sequence[str]) -> dict:
        """One calibration of these modules with nothing known, timed and counted."""
        load = os.getloadavg()[0]
        with few_shot_head(self.model, self.head, self.fit):
            score = FewShotScore(self.model, self.scored, "accuracy", self.blocks)
            began, spent = time.perf_counter(), time.process_time()
            calibration = calibrate(
                self.model,
                Literal(score) if side == "literal" else score,
                target_modules=list(modules),
                importance={module: self.importance[module] for module in modules},
                search="bisect" if side == "bisect" else "scan",
                **self.search,
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
    parser.add_argument("--literal", type=int, default=_ALL, help="modules that the literal reference is run on")
    options = bench_moved.parsed(parser, argv)
    if min(options.threads, options.literal) < 1:
        parser.error("--threads and --literal are whole numbers of at least 1")
    return options


def main(argv: Sequence[str]) -> None:
    """Measure every side, and write record and page."""
    options = arguments(argv)
    torch.set_num_threads(options.threads)
    machine = describe_machine(malloc=[])
    config = composed(*(QUICK if options.quick else []))
    settings, question = plain(config), Question(config)
    names = list(question.importance)
    some = [names[position] for position in spread(len(names), options.literal)]
    sides = {}
    for side, modules in {"scan": names, "bisect": names, "literal": some}.items():
        sides[side] = question.measured(side, modules)
        print(f"{side}: {len(modules)} modules in {sides[side]['wall_seconds']:.0f} s", flush=True)
    blocks, examples = (
        len(question.model.get_submodule(question.blocks)),
        sum(len(b["labels"]) for b in question.scored),
    )
    levels = sparsity_levels(question.search["levels"], question.search["max_sparsity"])
    result = {
        "command": _command(options),
        "machine": machine,
        "settings": settings,
        "threads": options.threads,
        "blocks": blocks,
        "examples": examples,
        "modules": names,
        "sides": sides,
        "literal": literal(sides, levels, blocks * examples),
    }
    result["aims"] = page.judge(result)
    bench_moved.write(options.out, "calibration", result, page.page, page.figures)


def literal(sides: Mapping[str, Mapping], levels: Sequence[float], pass_sample_blocks: int) -> dict:
    """Return what the literal reference evaluates and takes on all modules.

    Its passes follow from the scan's sparsities: for each curve every level up to the first failure; one for the
    baseline, one for the joint score. Raises SystemExit where its own run, on some modules, says anything else.
    """
    ran, scanned = sides["literal"], sides["scan"]["sparsity"]
    some = {module: scanned[module] for module in ran["sparsity"]}
    if ran["sparsity"] != some:
        raise SystemExit(f"the scan's sparsities are not the literal reference's: {some}, {ran['sparsity']}")
    passes, own = (
        literal_passes([value for axes in sparsity.values() for value in axes.values()], levels)
        for sparsity in (scanned, some)
    )
    counted = ran["evaluations"]["passes"]
    if own != counted or ran["evaluations"]["sample_blocks"] != (counted + 1) * pass_sample_blocks:  # 1 puts in order
        raise SystemExit(f"the literal reference took {counted} passes, expected {own} of {pass_sample_blocks}")
    share = passes / (own + 1)
    return {
        "passes": passes,
        "sample_blocks": passes * pass_sample_blocks,
        "passes_run": own,
        "wall_seconds": ran["wall_seconds"] * share,
        "cpu_seconds": ran["cpu_seconds"] * share,
    }


def spread(count: int, wanted: int) -> list[int]:
    """Positions spread evenly over a sequence in which four kinds take turns, so that each kind comes up."""
    if wanted >= count:
        return list(range(count))
    return sorted({min(count - 1, number * count // wanted + number % 4) for number in range(wanted)})


def _command(options: argparse.Namespace) -> str:
    words = [f"--threads {options.threads}"] if options.threads != 2 else []
    words += [f"--literal {options.literal}"] if options.literal != _ALL else []
    return " ".join(["python scripts/bench_calibration.py", *words, *(["--quick"] if options.quick else [])])


if __name__ == "__main__":
    main(sys.argv[1:])
