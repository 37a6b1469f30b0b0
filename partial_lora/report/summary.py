"""The end of a run or a calibration on a terminal: a short table out of its result.json, and its warnings."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from statistics import fmean

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from partial_lora.budget import Shapes, counted_of, dense_parameters, kept_parameters, masked_units, saturated
from partial_lora.launching.directory import INTERRUPTED
from partial_lora.masks import AXES
from partial_lora.methods import called
from partial_lora.methods.config import nominal_rank
from partial_lora.report.depth import depth_of, without_common_start
from partial_lora.report.rows import (
    NONE,
    method_of,
    number,
    operating_point,
    row,
    task_of,
    warnings_of,
)
from partial_lora.settings import rates
from partial_lora.tasks.kinds import kind_in
from partial_lora.tasks.metrics import SHARES
from partial_lora.training.config import AUTO


def summary(result: Mapping) -> Table:
    """Return one finished run in a few lines: how good, how small, how long, what to beware of. Fits 100 columns."""
    numbers = row(result)
    adapter = f"{numbers['adapter_parameters']:,}"
    if numbers["adapter_dense"]:
        adapter += f" of {numbers['adapter_dense']:,} of the dense adapter ({numbers['share_of_dense']:.1%})"
    return _lines(
        {
            "run": named_in_full(result),
            f"test {numbers['metric']}": measured(numbers["metric"], numbers["test"]),
            **_by_member(result["metrics"]["test"]),
            "adapter, trainable": adapter,
            "head, trainable": f"{numbers['head_parameters']:,}",
            "sparsity": cell(numbers["adapter_sparsity"], ".3f"),
            "training": rates.in_words(result["config"], result["training"])
            if "training" in result
            else f"learning rate {numbers['learning_rate']:.3g}",
            "precision": numbers["precision"],
            "seconds": _seconds(result, "calibrate", *({"importance"} & result["seconds"].keys()), "train", "evaluate"),
            "beware": "\n".join(warnings_of(result)),
        }
    )


def run_line(directory: Path, result: Mapping | None) -> tuple[str, ...]:
    """Return a run as a line of a list: when it began, task, model, method, seed, test score or status, path."""
    task, model, method, seed = directory.parts[-4:]
    began, point, score = NONE, "", "no record"
    with suppress(KeyError, TypeError, ValueError, AttributeError):  # of a foreign record
        result = result or {}
        began = datetime.fromisoformat(result["started"]).astimezone().strftime("%Y-%m-%d %H:%M")
        task, method, point, score = task_of(result), method_of(result), operating_point(result), result["status"]
        score = INTERRUPTED if result.get("error") == INTERRUPTED else score
        if test := (result.get("metrics") or {}).get("test"):
            score = f"{test['primary']} {measured(test['primary'], test[test['primary']])}"
    named = method if point in ("", NONE) else f"{method}, {point}"
    return began, task, model, named, seed, score, str(directory)


def calibration_summary(result: Mapping) -> Group:
    """Return one calibration: what it chose for each module, what the choice does to the score, what to beware of.

    Fits 100 columns; long names are folded.
    """
    calibration, sparsity = result["calibration"], result["sparsity"]
    chosen = [f"{axis} {fmean(shares[axis] for shares in sparsity.values()):.3f}" for axis in AXES]
    joint = cell(number(calibration["joint"]), ".4f")
    score = f"{calibration['baseline']:.4f} intact · {joint} with all sparsities at once"
    if repaired := calibration.get("repaired"):
        score += f", {cell(number(repaired['joint_before']), '.4f')} before {repaired['steps']} steps of repair"
    lines = {
        "calibration": named_in_full(result),
        "mean sparsity": f"{' · '.join(chosen)} over {len(sparsity)} modules",
        "saturated": _saturated(result),
        "score": score,
        "threshold": _threshold(calibration),
        "reliability": _reliability(calibration.get("reliability")),
        "evaluations": f"{calibration['evaluations']:,} ({calibration['search']})",
        "learning rate": _auto_rate(result),
        "seconds": _seconds(result, "calibrate", *({"reliability"} & result["seconds"].keys())),
        "beware": "\n".join(warnings_of(result)),
        "as usual": Text("; ".join(calibration.get("usual") or []), style="dim"),
    }
    return Group(module_table(result), _lines(lines))


def module_table(result: Mapping) -> Table:
    """Return every module of a calibration: kind, shape of the weight, sparsities and what is kept of its adapter.

    Kept parameters and shapes are blank for a record that was made before shapes were kept.
    """
    sparsity, shapes = result["sparsity"], result.get("shapes") or {}
    kinds = without_common_start([depth_of(module)[0] for module in sparsity])
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    drawn.add_column("module", overflow="fold")
    drawn.add_column("type", overflow="fold")
    for name in ("shape", "rows", "columns", "parameters\nkept"):
        drawn.add_column(name, justify="right", no_wrap=True)
    kept = _parameters(result)
    for (module, axes), kind in zip(sparsity.items(), kinds, strict=True):
        shape = " × ".join(map(str, shapes[module])) if module in shapes else NONE
        counted = f"{kept[module]:,}" if module in kept else NONE
        drawn.add_row(module, kind, shape, *(f"{axes[axis]:.3f}" for axis in AXES), counted)
    if len(kept) == len(sparsity):
        drawn.add_section()
        drawn.add_row("all", "", "", "", "", f"{sum(kept.values()):,}")
    return drawn


_UNLESS_SAID = {"granularity": "rows_columns", "rows": "masked", "columns": "masked"}


def _sizes(result: Mapping) -> tuple[Shapes, int, str]:
    """Return the shapes of W, none of a record that has none, the rank, and what masks count."""
    config, shapes = result["config"], {name: tuple(shape) for name, shape in (result.get("shapes") or {}).items()}
    counted = counted_of(*(config.get("mask", {}).get(key, usual) for key, usual in _UNLESS_SAID.items()))
    return shapes, nominal_rank(config["method"]["rank"]), counted


def _parameters(result: Mapping) -> dict[str, int]:
    """Return the trainable parameters of the adapter of each module whose shape is known."""
    units, unit = masked_units(*_sizes(result))
    modules = {module: axes for module, axes in result["sparsity"].items() if module in units}
    return {module: kept_parameters({module: units[module]}, unit, {module: axes}) for module, axes in modules.items()}


def _saturated(result: Mapping) -> str:
    """Return how many modules would do with a lower rank; nothing where none would, or each has a rank of its own."""
    sparsity, (shapes, rank, counted) = result["sparsity"], _sizes(result)
    if not shapes or result["config"]["method"]["rank"] == AUTO:
        return ""
    full = saturated({name: shapes[name] for name in sparsity}, rank, sparsity, counted)
    words = f"{len(full)} of {len(sparsity)} modules have as many parameters as the block of W that they reach"
    return f"{words}; method.rank=auto reaches more" if full else ""


def _auto_rate(result: Mapping) -> str:
    """Return the learning rate to try first for a masked adapter; nothing for a record that was made without shapes."""
    config, (shapes, rank, _) = result["config"], _sizes(result)
    if not shapes or not called(config["method"]["name"]).masked:
        return ""
    density = sum(_parameters(result).values()) / dense_parameters(shapes, rank)
    rate = rates.auto(config, width=rates.width(shapes.values()), density=density)
    return f"to try first: {rate:.2g}, at density {density:.3g}"


def _by_member(test: Mapping) -> dict[str, str]:
    """Return the metrics of every member of a mixture, a line each; nothing of a single task."""
    lines: dict[str, list[str]] = {}
    for key, value in test.items():
        member, _, metric = key.rpartition("/")
        if member and metric != "loss":
            words = NONE if value is None else measured(metric, value)
            lines.setdefault(f"test {member}", []).append(f"{metric} {words}")
    return {member: " · ".join(metrics) for member, metrics in lines.items()}


def _threshold(calibration: Mapping) -> str:
    """Return the threshold, the score that it is a share of, and the budget that it meets, if any."""
    if calibration["threshold"] is None:
        return NONE
    whole = "the intact score"
    if calibration.get("above_chance"):
        whole = f"what the score is above chance ({cell(number(calibration['chance']), '.4f')})"
    budget = calibration.get("budget")
    return f"{calibration['threshold']:.4g} of {whole}" + (
        "" if budget is None else f", what a budget of {budget:g} comes to"
    )


def _reliability(halves: Mapping | None) -> str:
    """Return how far two halves of the scored draw agree; nothing where that was not measured."""
    if not halves:
        return ""
    if halves["spearman_brown"] is None:
        return f"{NONE} ({halves['said']})"
    return f"{halves['spearman_brown']:.2f} (split-half, Spearman-Brown; {halves['pearson']:.2f} between the halves)"


def named_in_full(result: Mapping) -> str:
    """Return the names of a run: method, model, task, operating point, seed."""
    names = [method_of(result), result["config"]["model"]["name"], task_of(result)]
    point = operating_point(result)
    return " · ".join(names + ([] if point == NONE else [point]) + [f"seed {result['seed']}"])


def _seconds(result: Mapping, *stages: str) -> str:
    """Return the seconds of stages; "calibrate" also says whether there was a calibration, and if it was reused."""
    calibration, words = result["calibration"], []
    for stage in stages:
        spent = cell(number(result["seconds"].get(stage)), ",.1f")
        if stage == "calibrate":
            reused = " (reused)" if (calibration or {}).get("cached") else ""
            spent = NONE if calibration is None else spent + reused
        words.append(f"{stage} {spent}")
    return " · ".join(words)


def _lines(lines: Mapping[str, str | Text]) -> Table:
    """Return a table of named lines; a line with nothing to show is left out."""
    drawn = Table(show_header=False)
    drawn.add_column(style="bold", no_wrap=True)
    drawn.add_column(overflow="fold")
    for name, value in lines.items():
        if value:
            text = Text(value) if isinstance(value, str) else value  # what stands in brackets would be markup
            drawn.add_row(name, text)
    return drawn


def next_commands(run: str, config: Mapping, example: str | None = None) -> list[str]:
    """Return the commands that take a finished run, as they are typed: predict and export.

    run: its path. config: its settings. example: a file to predict, where there is one.
    """
    task, member = config["task"], ""
    if members := task.get("members"):
        name = next(iter(members))
        task, member = members[name], f" --member {shlex.quote(name)}"
    inputs = kind_in(task).typed
    if len(task.get("text_columns") or ()) == 2:
        inputs = r"$'TEXT\tTEXT'"
    elif example:
        inputs = shlex.quote(example)
    form = "compact" if called(config["method"]["name"]).masked else "peft"
    return [
        f"partial-lora predict {shlex.quote(run)}{member} {inputs}",
        f"partial-lora export {shlex.quote(run)} --to {form}",
    ]


def percent(mean: float, std: float = math.nan) -> str:
    """Return a share as a percentage, with its standard deviation over seeds where there is one."""
    return f"{mean:.2%}".rstrip("%") + ("" if math.isnan(std) else f" ± {100 * std:.2f}")


def measured(metric: str, mean: float, std: float = math.nan) -> str:
    """Return a metric's value as it is read: a share in percent, anything else as a plain number."""
    if metric in SHARES:
        return f"{percent(mean, std)} %"
    return f"{mean:.4f}" + ("" if math.isnan(std) else f" ± {std:.4f}")


def cell(value: float, form: str) -> str:
    """Return a number in a format, "–" for one that does not apply."""
    return NONE if math.isnan(value) else format(value, form)


def size_text(size: float) -> str:
    """Return a number of parameters in a few letters."""
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if size >= 0.9995 * unit:  # from here on three digits round up to the next unit
            return f"{size / unit:.3g} {letter}"
    return f"{size:.0f}"
