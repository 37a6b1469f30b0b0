"""Four analyses of how far a calibration can be trusted, each with its numbers and a table.

    python scripts/analyses.py agreement     # do measures of importance choose the same rows and columns?
    python scripts/analyses.py reliability   # do two halves of the examples give the same sparsities?
    python scripts/analyses.py stability     # over few-shot seeds, shots and wrong labels
    python scripts/analyses.py cost          # passes, blocks and seconds of each search

KEY=VALUE are the settings of `partial-lora calibrate`, with -m a sweep. Files go to
RESULTS_DIR/analyses/ANALYSIS/TASK/MODEL: analysis.json and table.md. Of a finished analysis the table is made again. A
stopped one finds its calibrations in the cache, but for those of cost.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

from partial_lora.launching.cluster import openmp

os.environ.update(openmp())  # as for the workers of a run, and before torch is imported
os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import datasets
import numpy as np
import pandas as pd
import transformers
from scipy.stats import hypergeom

from partial_lora import cli, files, tasks
from partial_lora.building import build
from partial_lora.calibration import few_shot, reliability
from partial_lora.calibration.calibrate import calibrate
from partial_lora.calibration.level_search import SEARCHES, sparsity_levels
from partial_lora.calibration.result import Calibration
from partial_lora.calibration.score import FewShotScore
from partial_lora.errors import PartialLoraError, require
from partial_lora.launching import directory
from partial_lora.masks import AXES, Mask
from partial_lora.models.targets import target_linears
from partial_lora.settings import compose, versions
from partial_lora.settings.schema import Config
from partial_lora.tasks.splits import with_label_noise
from partial_lora.training.distributed import join


class Subject:
    """A frozen model and the training rows of a task, calibrated again and again on different draws.

    The model is the one that `partial-lora calibrate` loads with these settings, so both find each other's calibrations
    in the cache.
    """

    def __init__(self, settings: Mapping) -> None:
        self.config = versions.load(settings)
        self.device = join(self.config.trainer.device).device
        self.task = build.task_of(self.config)
        self.transform = build.transform_of(self.config.model, self.config.task)
        transformers.set_seed(self.config.seed)
        self.model = build.model_of(self.config.model, self.task.labels).to(self.device)
        modules = target_linears(self.model, **self.config.model.trained_modules)
        self.shapes = {name: tuple(module.weight.shape) for name, module in modules.items()}

    def draws(self, **changes: int) -> tasks.Draws:
        """Draw the examples to fit and to score on; `changes` are of shots and seed."""
        return build.draws_of(self.config, self.task.train, **changes)

    def mislabelled(self, draws: tasks.Draws, share: float, seed: int) -> tuple[datasets.Dataset, tasks.Draws]:
        """Return the examples of both draws with a share of each draw's labels wrong, and the draws among them."""
        fit, scored = (
            with_label_noise(self.task.train.select(rows), share, [seed, draw], self.config.task.name)
            for draw, rows in enumerate((draws.fit, draws.scored))
        )
        fit_rows, scored_rows = np.split(np.arange(len(fit) + len(scored)), [len(fit)])
        return datasets.concatenate_datasets([fit, scored]), tasks.Draws(fit=fit_rows, scored=scored_rows)

    def importance(self, measure: str, draws: tasks.Draws) -> dict:
        """Score the rows and columns of every module by a measure's name, which sees the fit draw alone."""
        chosen = replace(self.config, importance=replace(self.config.importance, name=measure))
        examples = build.few_shot_of(chosen, self.task, self.transform, self.model, draws)
        return examples.importance(list(self.shapes))

    def calibrate(self, draws: tasks.Draws, *, train: datasets.Dataset | None = None, **changes: int):
        """Return the Calibration of these draws, from the cache where it is there.

        train: the rows that `draws` are of. changes: of shots and seed, what the draws were made with.
        """
        chosen = replace(self.config, calibration=replace(self.config.calibration, **changes))
        task = self.task if train is None else replace(self.task, train=train)
        examples = build.few_shot_of(chosen, task, self.transform, self.model, draws)
        return examples.calibrate(examples.importance(list(self.shapes)))

    def calibrate_counted(self, draws: tasks.Draws, search: str) -> tuple[Calibration, FewShotScore]:
        """Return a Calibration that does not come from the cache, and its score, which has counted its evaluations."""
        fit, scored = (few_shot.batches_of(self.task.train, rows, self.transform) for rows in (draws.fit, draws.scored))
        scores = self.importance(self.config.importance.name, draws)
        model, chosen = self.config.model, build.calibration_config(self.config, self.task)
        with few_shot.few_shot_head(self.model, build.new_head_of(model), fit):
            score = FewShotScore(self.model, scored, chosen.score, model.blocks, chosen.memory)
            given = {"target_modules": list(self.shapes), "importance": scores, "search": search}
            given |= {"rank": self.config.method.nominal_rank, "granularity": self.config.mask.counted}
            calibrated = calibrate(self.model, score, chosen, **given)
        return calibrated, score


class Analysis(NamedTuple):
    """The parts, by name, from settings; and what they come to, from settings and parts."""

    parts: Callable[[Mapping], dict[str, Callable[[Subject], dict]]]
    summary: Callable[[Mapping, Mapping[str, dict]], dict]


# Agreement: do measures choose the same rows and columns?


def agreement_parts(settings: Mapping) -> dict[str, Callable[[Subject], dict]]:
    """One part for each sparsity at which the choices of the measures are compared."""
    options = settings["analysis"]

    @cache
    def scores(subject: Subject) -> dict:  # the same at every sparsity
        return {measure: subject.importance(measure, subject.draws()) for measure in options["measures"]}

    def part(level: float | None, subject: Subject) -> dict:
        if level is None:
            sparsity = subject.calibrate(subject.draws()).sparsity
        else:
            sparsity = {module: dict.fromkeys(AXES, level) for module in subject.shapes}
        return {"sparsity": sparsity, "comparisons": comparisons(scores(subject), sparsity)}

    levels = {f"{level:g}": partial(part, level) for level in options["sparsities"]}
    return ({"calibrated": partial(part, None)} if options["calibrated"] else {}) | levels


def comparisons(scores: Mapping[str, Mapping], sparsity: Mapping[str, Mapping[str, float]]) -> list[dict]:
    """Compare every two measures, module by module and axis by axis, each keeping its most important entries.

    scores: {measure: {module: (row scores, column scores)}}. sparsity: {module: {"rows", "columns"}}, of all measures.
    jaccard: the share of what either measure keeps that both keep.
    """
    masks = {
        measure: {
            (module, axis): Mask.top(np.asarray(values), axes[axis])
            for module, axes in sparsity.items()
            for axis, values in zip(AXES, of_measure[module], strict=True)
        }
        for measure, of_measure in scores.items()
    }
    lines = []
    for first, second in combinations(masks, 2):
        for (module, axis), mask in masks[first].items():
            size, kept = mask.size, len(mask.kept)
            both = len(np.intersect1d(mask.kept, masks[second][module, axis].kept, assume_unique=True))
            line = {"first": first, "second": second, "module": module, "axis": axis, "size": size, "kept": kept}
            lines.append(line | {"jaccard": both / (2 * kept - both), "chance": jaccard_by_chance(size, kept)})
    return lines


def jaccard_by_chance(size: int, kept: int) -> float:
    """Return the mean Jaccard index of independent random masks that keep so many of `size` entries.

    How many entries both keep is hypergeometric, and the mean is taken of the ratio itself: the ratio of the means
    would be too small.
    """
    both = np.arange(max(0, 2 * kept - size), kept + 1)
    return float(np.sum(hypergeom.pmf(both, size, kept, kept) * both / (2 * kept - both)))


def agreement_summary(settings: Mapping, parts: Mapping[str, dict]) -> dict:
    """Return a line for every two measures at each sparsity: means over n modules and axes.

    Where everything is kept all measures agree, and nothing is learned: these, `whole` in number, are left out.
    beyond_chance: the mean agreement above chance, as a share of the room there is above chance.
    """
    summary: dict[str, list[dict]] = {}
    for point, part in parts.items():
        summary[point] = []
        for first, second in dict.fromkeys((line["first"], line["second"]) for line in part["comparisons"]):
            pair = [line for line in part["comparisons"] if (line["first"], line["second"]) == (first, second)]
            cut = [line for line in pair if line["kept"] < line["size"]]
            jaccard, chance = (reliability.mean_of([line[key] for line in cut]) for key in ("jaccard", "chance"))
            line = {"first": first, "second": second, "n": len(cut), "whole": len(pair) - len(cut)}
            line |= {"jaccard": jaccard, "chance": chance}
            summary[point].append(line | {"beyond_chance": (jaccard - chance) / (1 - chance) if cut else None})
    return summary


# Reliability: do two halves of the scored draw give the same sparsities?


def reliability_parts(settings: Mapping) -> dict[str, Callable[[Subject], dict]]:
    """One part for each split of the scored draw."""

    def part(seed: int, subject: Subject) -> dict:
        draws = subject.draws()
        labels = tasks.strata(subject.task.train)[draws.scored]
        halves, calibrations = [], []
        for half in reliability.split_half(labels, seed):
            calibrations.append(subject.calibrate(tasks.Draws(fit=draws.fit, scored=draws.scored[half])))
            halves.append({"sparsity": calibrations[-1].sparsity, "examples": len(half)})
        first, second = (each.sparsity for each in calibrations)
        of_axis = {
            axis: reliability.correlation(*({m: {axis: s[m][axis]} for m in s} for s in (first, second)))
            for axis in AXES
        }
        return {"halves": halves, "reliability": reliability.reliability(first, second), **of_axis}

    return {f"split {seed}": partial(part, seed) for seed in range(settings["analysis"]["splits"])}


def reliability_summary(settings: Mapping, parts: Mapping[str, dict]) -> dict:
    """Return means and standard deviations over the splits, and in words why there is little or no reliability."""
    each = [part["reliability"] for part in parts.values()]
    summary = {key: moments(one[key] for one in each) for key in ("pearson", "spearman", "spearman_brown")}
    summary |= {axis: moments(part[axis]["pearson"] for part in parts.values()) for axis in AXES}
    reasons = [f"{name}: {part['reliability']['said']}" for name, part in parts.items() if part["reliability"]["said"]]
    verdict = reliability.verdict(summary["spearman_brown"]["mean"])
    return summary | {"splits": len(parts), "said": reasons + ([verdict] if verdict else [])}


# Stability: what do the draw, its size and wrong labels change?


def conditions(settings: Mapping) -> list[tuple[int, float]]:
    """Return (shots, noise) of the calibrations to compare. No labels are wrong of a task without classes."""
    usual, options, task = settings["calibration"]["shots"], settings["analysis"], settings["task"]
    sizes = [(shots, 0.0) for shots in options["shots"]]
    noisy = [(usual, noise) for noise in options["noise"]] if task["kind"] == "label" and not task["regression"] else []
    return list(dict.fromkeys([*sizes, *noisy]))


def stability_parts(settings: Mapping) -> dict[str, Callable[[Subject], dict]]:
    """One part for each number of shots, share of wrong labels and seed."""

    def part(shots: int, noise: float, seed: int, subject: Subject) -> dict:
        draws, train = subject.draws(shots=shots, seed=seed), None
        if noise:
            train, draws = subject.mislabelled(draws, noise, seed)
        calibrated = subject.calibrate(draws, train=train, shots=shots, seed=seed)
        condition = {"shots": shots, "noise": noise, "seed": seed, "examples": len(draws.scored)}
        return condition | {"sparsity": calibrated.sparsity}

    return {
        f"{shots} shots, {100 * noise:g}% noise, seed {seed}": partial(part, shots, noise, seed)
        for shots, noise in conditions(settings)
        for seed in settings["analysis"]["seeds"]
    }


def stability_summary(settings: Mapping, parts: Mapping[str, dict]) -> dict:
    """Return a line for each condition: how far its seeds agree with each other."""
    by_condition = files.grouped(parts.values(), lambda part: (part["shots"], part["noise"]))
    lines = [
        {
            "shots": shots,
            "noise": noise,
            "seeds": len(own),
            "examples": reliability.mean_of([part["examples"] for part in own]),
            "between_seeds": reliability.mean_difference(combinations((part["sparsity"] for part in own), 2)),
        }
        for (shots, noise), own in sorted(by_condition.items())
    ]
    return {"conditions": lines}


# Cost: what does a calibration take?


def cost_parts(settings: Mapping) -> dict[str, Callable[[Subject], dict]]:
    """One part for each search."""

    def search_cost(search: str, subject: Subject) -> dict:
        draws, blocks = subject.draws(), subject.config.model.blocks
        calibrated, score = subject.calibrate_counted(draws, search)
        counted = {key: getattr(score.evaluations, key) for key in ("passes", "examples", "sample_blocks")}
        return {
            "search": search,
            **counted,
            "seconds": calibrated.seconds,
            "scored": len(draws.scored),
            "rows": score.rows,
            "depth": len(subject.model.get_submodule(blocks)) if blocks else 1,  # in blocks of one pass
            "sparsity": calibrated.sparsity,
        }

    return {f"search {search}": partial(search_cost, search) for search in SEARCHES}


def cost_summary(settings: Mapping, parts: Mapping[str, dict]) -> dict:
    """Return the searches beside the literal reference, and how far they differ from scan.

    The literal reference is counted, not run: full passes over the whole scored draw, for the baseline, for each level
    upward to the first failure, and for all sparsities at once. There is none with a budget, nor with a repair, after
    which the sparsities do not tell how many levels were tried.
    """
    scan, options = parts["search scan"], settings["calibration"]
    literal = None
    if options["budget"] is None and not options["repair"]:
        curves = AXES[:1] if options["axes"] == "joint" else AXES
        chosen = [axes[axis] for axes in scan["sparsity"].values() for axis in curves]
        passes = literal_passes(chosen, sparsity_levels(options["levels"], options["max_sparsity"]))
        literal = {"passes": passes, "examples": passes * scan["scored"]}
        literal |= {"sample_blocks": passes * scan["rows"] * scan["depth"], "seconds": None}
    keys = ("passes", "examples", "sample_blocks", "seconds")
    by_search = {part["search"]: part for part in parts.values()}
    searches = {search: {key: part[key] for key in keys} for search, part in by_search.items()}

    def from_scan(search: str) -> dict:
        pairs = reliability.paired(scan["sparsity"], by_search[search]["sparsity"])
        own = {"mean": float(pairs[:, 1].mean()), "differ": float((pairs[:, 0] != pairs[:, 1]).mean())}
        return own | reliability.difference(scan["sparsity"], by_search[search]["sparsity"])

    return {"searches": {"literal": literal} | searches, "from_scan": {name: from_scan(name) for name in by_search}}


ANALYSES = {
    "agreement": Analysis(agreement_parts, agreement_summary),
    "reliability": Analysis(reliability_parts, reliability_summary),
    "stability": Analysis(stability_parts, stability_summary),
    "cost": Analysis(cost_parts, cost_summary),
}


def literal_passes(chosen: Iterable[float], levels: Sequence[float]) -> int:
    """Return the full passes of the literal Algorithm 1: the baseline, of each curve every level up to the first
    failure, and the joint score.

    chosen: the sparsity that came out for each curve.
    """
    return 2 + sum(min(len(levels), sum(level <= value for level in levels) + 1) for value in chosen)


def moments(values: Iterable[float | None]) -> dict:
    """Return the mean and the standard deviation of the values that are not None."""
    known = [value for value in values if value is not None]
    return {"mean": reliability.mean_of(known), "deviation": float(np.std(known, ddof=1)) if len(known) > 1 else None}


def markdown(analysis: Mapping) -> str:
    """Return what a finished analysis comes to, below its command: a table for what has rows, one of the numbers."""
    command, commit = " ".join(analysis["command"].split()), (analysis["git_commit"] or "–")[:12]
    blocks, numbers = [f"    {command}", f"Commit: {commit}. Device: {analysis['device']}."], []
    for name, content in analysis["summary"].items():
        if isinstance(content, Mapping) and any(isinstance(of, Mapping) for of in content.values()):
            content = [{"": key} | of for key, of in content.items() if of]
        if isinstance(content, Mapping):
            numbers.append({"": name} | content)
        elif isinstance(content, list) and content and isinstance(content[0], Mapping):
            blocks += [f"**{name}**", _table(content)]
        elif content:
            blocks.append(f"{name}: {content}")
    return "\n\n".join([*blocks, *map(_table, [numbers] if numbers else [])]) + "\n"


def _table(rows: Sequence[Mapping]) -> str:
    table = pd.json_normalize(rows, sep=", ")
    table = table.loc[:, [any(value not in (None, "") for value in table[column]) for column in table]]
    table = table.convert_dtypes().astype(object).where(table.notna(), None)
    return table.to_markdown(index=False, floatfmt=",.2f", intfmt=",", missingval="–")


# From a command line to files

OPTIONS = {
    "measures": ["svd", "snip", "imp", "magnitude", "activation"],  # of agreement
    "calibrated": True,  # agreement: also at the sparsities that importance.name is calibrated to
    "sparsities": [0.25, 0.5, 0.75],  # of agreement, each for all modules
    "splits": 5,  # reliability: how many of the scored draw
    "seeds": [0, 1, 2],  # stability: of the draws, and of the wrong labels
    "shots": [4, 8, 16, 32],  # stability: scored examples a class
    "noise": [0.0, 0.1, 0.2],  # stability: shares of labels that are wrong
}


def folder_of(settings: Mapping, what: str) -> Path:
    """Return where an analysis leaves its files: one of a model on a task."""
    return Path(settings["results_dir"], "analyses", what, settings["task"]["name"], settings["model"]["name"])


_DECIDES = ("model", "task", "method", "importance", "calibration")  # groups of settings; no analysis trains


def asked(settings: Mapping) -> list[dict]:
    """Return what an analysis depends on, settings in today's terms."""
    current = versions.plain(versions.load({name: settings[name] for name in _DECIDES}))
    return [{name: current[name] for name in _DECIDES}, settings["analysis"]]


def analyse(what: str, settings: dict, command: str) -> int:
    """Do one analysis, part by part, and write its files; return the exit code.

    Raises PartialLoraError where a calibration is refused, or another process holds the directory.
    """
    for key in ("file", "sparsity"):
        if settings["calibration"][key] is not None:
            raise PartialLoraError(
                f"calibration.{key}: an analysis calibrates itself, on draws that differ; leave it out"
            )
    folder = folder_of(settings, what)
    path = folder / "analysis.json"
    print(f"analyse {what} {folder}")
    with directory.locked(folder):
        if settings["overwrite"] or not path.is_file():
            analysis = directory.new(settings)
            analysis = {key: analysis[key] for key in ("config", "versions", "git_commit", "started")}
            subject, parts = Subject(settings), {}
            for name, part in ANALYSES[what].parts(settings).items():
                began = time.perf_counter()
                parts[name] = part(subject)
                print(f"{name}: {time.perf_counter() - began:,.1f} s", flush=True)
            analysis |= {"what": what, "command": command, "device": subject.device, "parts": parts}
            files.write_json(path, analysis | {"summary": ANALYSES[what].summary(settings, parts)})
        analysis = files.read_json(path)
        same = asked(analysis["config"]) == asked(settings)
        require(same, "results_dir", folder, "an analysis with these settings; take another, or set overwrite=true")
        files.write_atomic(folder / "table.md", markdown(analysis))
    print(f"\n{markdown(analysis)}\nfiles in {folder}")
    return 0


@cli.script
def main(arguments: Sequence[str] | None = None) -> int:
    """Compose the settings of one analysis or of a sweep, and do it; return the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("what", choices=ANALYSES, metavar="ANALYSIS")
    known, overrides = parser.parse_known_args(arguments)
    words = shlex.join(["python", "scripts/analyses.py", *arguments])

    def work(composed: Config) -> int:
        return analyse(known.what, versions.plain(composed) | {"analysis": OPTIONS}, words)

    return compose.compose(f"analyses {known.what}", paper_calibration(overrides), work)


def paper_calibration(overrides: Sequence[str]) -> list[str]:
    """Return settings with the paper's calibration in place of the default, unless they choose one."""
    chosen = any(word.startswith("calibration=") for word in overrides)
    return [*overrides] if chosen else ["calibration=threshold", *overrides]


if __name__ == "__main__":
    sys.exit(main())
