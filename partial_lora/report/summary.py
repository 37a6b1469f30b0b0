"""What a run or a calibration ends with on a terminal: a short table out of its result.json, and its warnings."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from partial_lora.calibration.budget import kept_parameters, masked_units
from partial_lora.masks import AXES
from partial_lora.report.records import NONE, method_of, number, operating_point, place, row, without_common_start
from partial_lora.tasks.metrics import SHARES


def summary(result: Mapping, directory: Path) -> Table:
    """One finished run in a few lines: how good, how small, how long, what to beware of. Fits 100 columns."""
    found = row(result)
    adapter = f"{found['adapter_parameters']:,}"
    if found["adapter_dense"]:
        adapter += f" of {found['adapter_dense']:,} of the dense adapter ({found['share_of_dense']:.1%})"
    return _lines(
        {
            "run": _title(result),
            f"test {found['metric']}": measured(found["metric"], found["test"]),
            **_by_member(result["metrics"]["test"]),
            "adapter, trainable": adapter,
            "head, trainable": f"{found['head_parameters']:,}",
            "sparsity": cell(found["adapter_sparsity"], ".3f"),
            "precision": found["precision"],
            "seconds": _seconds(result, "calibrate", "train", "evaluate"),
            **_warned(result),
            "files": str(directory),
        }
    )


def calibration_summary(result: Mapping, directory: Path) -> Group:
    """One calibration: what it chose for each module, what that does to the score, what to beware of, its files.

    Fits 100 columns; long names are folded.
    """
    calibration, sparsity = result["calibration"], result["sparsity"]
    chosen = [f"{axis} {fmean(each[axis] for each in sparsity.values()):.3f}" for axis in AXES]
    lines = {
        "calibration": _title(result),
        "mean sparsity": f"{' · '.join(chosen)} over {len(sparsity)} modules",
        "score": f"{calibration['baseline']:.4f} intact · {_number(calibration['joint'])} with all sparsities at once"
        + _repaired(calibration),
        "threshold": _threshold(calibration),
        **_reliability(calibration),
        "evaluations": f"{calibration['evaluations']:,} ({calibration['search']})",
        "seconds": _seconds(result, "calibrate", *({"reliability"} & result["seconds"].keys())),
        **_warned(result),
        "files": str(directory),
    }
    return Group(module_table(result), _lines(lines))


def module_table(result: Mapping) -> Table:
    """Every module of a calibration: its kind, the shape of its weight, its sparsities and what is kept of its adapter.

    Kept parameters and shapes are blank for a record that was made before shapes were kept.
    """
    sparsity, shapes = result["sparsity"], result.get("shapes") or {}
    kinds = without_common_start([place(module)[0] for module in sparsity])
    drawn = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1))
    drawn.add_column("module", overflow="fold")
    drawn.add_column("type", overflow="fold")
    for name in ("shape", "rows", "columns", "parameters\nkept"):
        drawn.add_column(name, justify="right", no_wrap=True)
    kept = {module: _kept(result, shapes[module], axes) for module, axes in sparsity.items() if module in shapes}
    for (module, axes), kind in zip(sparsity.items(), kinds, strict=True):
        shape = " × ".join(map(str, shapes[module])) if module in shapes else NONE
        counted = f"{kept[module]:,}" if module in kept else NONE
        drawn.add_row(module, kind, shape, *(f"{axes[axis]:.3f}" for axis in AXES), counted)
    if len(kept) == len(sparsity):
        drawn.add_section()
        drawn.add_row("all", "", "", "", "", f"{sum(kept.values()):,}")
    return drawn


def _kept(result: Mapping, shape: Sequence[int], sparsity: Mapping[str, float]) -> int:
    """Trainable parameters of one module's adapter."""
    config = result["config"]
    granularity = config.get("mask", {}).get("granularity", "rows_columns")
    counted = masked_units({"module": tuple(shape)}, config["method"]["rank"], granularity)
    return kept_parameters(*counted, {"module": sparsity})


def _by_member(test: Mapping) -> dict[str, str]:
    """Of a mixture the metrics of every member, a line each member; nothing of a single task."""
    lines: dict[str, list[str]] = {}
    for key, value in test.items():
        member, _, metric = key.rpartition("/")
        if member and metric != "loss":
            said = f"{value:.2f}" if metric == "perplexity" else f"{percent(value)} %"
            lines.setdefault(f"test {member}", []).append(f"{metric} {said}")
    return {member: " · ".join(said) for member, said in lines.items()}


def _warned(result: Mapping) -> dict[str, str]:
    """What a calibration warns of, one sentence a line; nothing where it warns of nothing."""
    warnings = (result["calibration"] or {}).get("warnings") or []
    return {"beware": "\n".join(warnings)} if warnings else {}


def _threshold(calibration: Mapping) -> str:
    """The share of the score that had to be left, and what it was a share of."""
    if calibration["threshold"] is None:
        return NONE
    above = calibration.get("above_chance")
    of = f"what the score is above chance ({_number(calibration['chance'])})" if above else "the intact score"
    found = "" if calibration.get("budget") is None else f", what a budget of {calibration['budget']:g} comes to"
    return f"{calibration['threshold']:.4g} of {of}{found}"


def _repaired(calibration: Mapping) -> str:
    repaired = calibration.get("repaired")
    return f", {_number(repaired['joint_before'])} before {repaired['steps']} steps of repair" if repaired else ""


def _reliability(calibration: Mapping) -> dict[str, str]:
    """How far two halves of the scored draw agree, where that was asked."""
    found = calibration.get("reliability")
    if not found:
        return {}
    if found["spearman_brown"] is None:
        return {"reliability": f"{NONE} ({found['said']})"}
    halves = f"split-half, Spearman-Brown; {found['pearson']:.2f} between the halves"
    return {"reliability": f"{found['spearman_brown']:.2f} ({halves})"}


def _number(value: float | None) -> str:
    return NONE if value is None else f"{value:.4f}"


def _title(result: Mapping) -> str:
    config = result["config"]
    names = [method_of(result), config["model"]["name"], config["task"]["name"]]
    point = operating_point(result)
    return " · ".join(names + ([] if point == NONE else [point]) + [f"seed {result['seed']}"])


def _seconds(result: Mapping, *stages: str) -> str:
    """The stages that took time; a calibration that was found rather than made says so."""
    reused = " (reused)" if (result["calibration"] or {}).get("cached") else ""
    spent = {stage: number(result["seconds"].get(stage)) for stage in stages}
    calibrated = result["calibration"] is not None
    return " · ".join(
        f"{stage} {NONE if stage == 'calibrate' and not calibrated else cell(seconds, ',.1f')}"
        + (reused if stage == "calibrate" else "")
        for stage, seconds in spent.items()
    )


def _lines(lines: Mapping[str, str]) -> Table:
    drawn = Table(show_header=False)
    drawn.add_column(style="bold", no_wrap=True)
    drawn.add_column(overflow="fold")
    for name, value in lines.items():
        drawn.add_row(name, Text(value))  # as it is: what stands in brackets would be markup
    return drawn


def percent(mean: float, std: float = math.nan) -> str:
    """A share as a percentage, with its standard deviation over seeds where there is one."""
    return f"{mean:.2%}".rstrip("%") + ("" if math.isnan(std) else f" ± {100 * std:.2f}")


def measured(metric: str, mean: float, std: float = math.nan) -> str:
    """A metric's value as it is read: a share in percent, anything else as a plain number."""
    if metric in SHARES:
        return f"{percent(mean, std)} %"
    return f"{mean:.4f}" + ("" if math.isnan(std) else f" ± {std:.4f}")


def cell(value: float, form: str) -> str:
    """A number in a format, "–" for one that does not apply."""
    return NONE if math.isnan(value) else format(value, form)
