"""Figure 7: random against targeted: small and noisy training sets, other masks of one run, the train/test gap."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from partial_lora.evidence.dynamics import Cell, gap, measured, to_measure
from partial_lora.evidence.figures import frames, panels
from partial_lora.grouping import half_interval
from partial_lora.runs import NONE, Run

NEEDS = "runs of partial and of targeted at budget 0.13"
POINT = "budget 0.13"
METHODS = ("partial", "targeted")
SAMPLES, NOISES = (150, 600), (0.0, 0.4)
_VARIED = ("train_samples", "label_noise", "mask_seed")
_CONDITION = ["train_samples", "label_noise"]
_MOST_SEEDS = 3  # of a condition that are measured anew for the gap
_COLUMNS = ["part", *frames.PLACE, "method", *_CONDITION, "seed", "mask_seed", "n", "seeds", "test"]
_COLUMNS += ["partial", "targeted", "difference", "half", "train", "gap"]


def measured_runs(found: Sequence[Run]) -> list[Run]:
    """The runs whose gap the figure shows, for `scripts/dynamics.py`: of every condition three seeds that both have."""
    return to_measure(_by_seed(found, _cells(_known(found))), _MOST_SEEDS)


def _by_seed(found: Sequence[Run], cells: Sequence[tuple[dict, pd.DataFrame, list[str]]]) -> list[Cell]:
    """The runs of each cell; the two methods under one condition stand beside each other."""
    return [
        (
            tuple(value for name, value in place.items() if name != "method"),
            {found[run].row["seed"]: found[run] for run in one["run"]},
        )
        for place, one, _ in cells
    ]


def _known(found: Sequence[Run]) -> pd.DataFrame:
    known = frames.usual(frames.frame(found), varied=_VARIED)
    return known[known["method"].isin(METHODS) & (known["point"] == POINT)]


def _cells(known: pd.DataFrame) -> list[tuple[dict, pd.DataFrame, list[str]]]:
    """The runs of a method under each condition, whose masks go by their own seed."""
    by = [*frames.PLACE, "method", *_CONDITION]
    own = known[known["mask_seed"] == NONE]
    return [(dict(zip(by, key, strict=True)), *frames.settled(cell)) for key, cell in own.groupby(by, sort=True)]


def numbers(found: Sequence[Run], results_dir: Path) -> pd.DataFrame:
    """Three parts of one frame, all at budget 0.13.

    "difference": partial less targeted in the test score, run by run of the seeds that both have, by training rows and
    share of wrong labels; half: of its 95 % interval over seeds. "masks": a row a run with the most training rows:
    what other masks do to a run (its mask.seed moves alone), and what other seeds do. "gap": the metric on the rows
    that were trained on, with the labels they had, less that on test rows, means over the seeds that were measured.
    """
    known = _known(found)
    cells = _cells(known)
    notes = [note for _, _, said in cells for note in said]
    pairs = _differences(cells)
    rows = [*pairs, *_masks(known, cells), *_gaps(found, cells)] if pairs else []
    table = pd.DataFrame(rows, columns=_COLUMNS)
    return frames.noted(table, [*notes, *(_missing(table, results_dir) if rows else [])])


def _differences(cells: Sequence[tuple[dict, pd.DataFrame, list[str]]]) -> list[dict]:
    """A row a condition, of the seeds that all conditions of its place have, if there are two such."""
    rows = []
    by_condition: dict[tuple, dict[str, pd.Series]] = {}
    for place, one, _ in cells:
        condition = tuple(value for name, value in place.items() if name != "method")
        by_condition.setdefault(condition, {})[place["method"]] = one.set_index("seed")["test"]
    both = {condition: pd.DataFrame(tests).dropna() for condition, tests in by_condition.items() if len(tests) == 2}
    for condition, pairs in both.items():
        if pairs.empty:
            continue
        of_place = [own.index for other, own in both.items() if other[:3] == condition[:3] and len(own)]
        shared = sorted(set.intersection(*map(set, of_place)))
        pairs = pairs.loc[shared] if len(shared) > 1 else pairs
        each = pairs["partial"] - pairs["targeted"]
        rows.append(
            {"part": "difference", **dict(zip((*frames.PLACE, *_CONDITION), condition, strict=True))}
            | {"n": len(pairs), "seeds": " ".join(map(str, pairs.index))}
            | {method: float(pairs[method].mean()) for method in METHODS}
            | {"difference": float(each.mean()), "half": half_interval(float(each.std()), len(each))}
        )
    return rows


def _masks(known: pd.DataFrame, cells: Sequence[tuple[dict, pd.DataFrame, list[str]]]) -> list[dict]:
    """Runs whose mask.seed is set, that of the same seed whose is not, and the runs over seeds they stand beside.

    A mask.seed that is not set is the run's seed; runs with one all have the training rows of the whole.
    """
    rows = []
    for place, over_seeds, _ in cells:
        most = known.loc[known["task"] == place["task"], "train_samples"].max()
        if place["train_samples"] != most or place["label_noise"] != 0:
            continue
        alike = known[(known[list(place)] == pd.Series(place)).all(axis=1)]
        moved = alike[alike["mask_seed"] != NONE]
        rows += [_run(place, "over seeds", row, row.seed) for row in over_seeds.itertuples()]
        if moved.empty:
            continue
        seed = moved["seed"].mode().iloc[0]
        moved = moved[moved["seed"] == seed].drop_duplicates("mask_seed").sort_values("mask_seed")
        rows += [_run(place, "over masks", row, row.mask_seed) for row in moved.itertuples()]
        own = over_seeds[over_seeds["seed"] == seed]
        if seed not in set(moved["mask_seed"]):
            rows += [_run(place, "over masks", row, seed) for row in own.itertuples()]
    return rows


def _run(place: dict, part: str, row, mask_seed: int) -> dict:
    return {"part": part, **place, "seed": row.seed, "mask_seed": mask_seed, "n": 1, "test": row.test}


def _gaps(found: Sequence[Run], cells: Sequence[tuple[dict, pd.DataFrame, list[str]]]) -> list[dict]:
    rows = []
    for (place, _, _), contents in zip(cells, measured(_by_seed(found, cells)), strict=True):
        both = pd.DataFrame({seed: gap(content) for seed, content in contents.items()}, index=["train", "test"]).T
        if both.empty:
            continue
        each = both["train"] - both["test"]
        rows.append(
            {"part": "gap", **place, "n": len(both), "seeds": " ".join(map(str, both.index))}
            | {"train": float(both["train"].mean()), "test": float(both["test"].mean())}
            | {"gap": float(each.mean()), "half": half_interval(float(each.std()), len(each))}
        )
    return rows


def _missing(table: pd.DataFrame, results_dir: Path) -> list[str]:
    notes = []
    found = table[table["part"] == "difference"]
    for (task, model, _), part in frames.places(table[table["task"] == "digits"]):
        there = set(zip(*(found.loc[found["task"] == task, name] for name in _CONDITION), strict=True))
        lacking = [
            f"{samples} rows with {noise:.0%} noise"
            for samples in SAMPLES
            for noise in NOISES
            if (samples, noise) not in there
        ]
        notes += [f"missing: {task}, {model}, pairs of {', '.join(lacking)}"] if lacking else []
        if "over masks" not in set(part["part"]):
            notes.append(f"missing: {task}, {model}, runs over mask.seed at one seed")
    if "gap" not in set(table["part"]):
        notes.append(f"missing: dynamics.json of these runs; scripts/dynamics.py {results_dir} --figure fig7")
    return notes


def draw(table: pd.DataFrame) -> Figure:
    """Three panels a task: differences over training rows, the spread over masks and seeds, the gap."""
    parts = [(place, part) for place, part in frames.places(table) if part["label_noise"].nunique() > 1]
    parts = (parts or frames.places(table))[:3]
    figure, drawn = panels.panels(3 * len(parts), wide=4.0, high=3.2, across=3)
    for number, ((task, model, metric), part) in enumerate(parts):
        differences, masks, gaps = drawn[3 * number : 3 * number + 3]
        _draw_differences(differences, part[part["part"] == "difference"], metric)
        differences.set_title(f"{task}, {model}: partial less targeted", fontsize=9.5, loc="left")
        _draw_masks(masks, part[part["part"].isin(("over masks", "over seeds"))], metric)
        masks.set_title("single runs and their deviation", fontsize=9.5, loc="left")
        _draw_gaps(gaps, part[part["part"] == "gap"], metric)
        gaps.set_title("train less test; open: targeted", fontsize=9.5, loc="left")
    panels.above(figure, "At budget 0.13; bars: 95 % intervals over seeds, paired by seed on the left")
    return figure


def _noise_style(place: int) -> dict:
    return {
        "color": panels.COLOURS[place],
        "marker": panels.MARKERS[place],
        "linestyle": ("-", "--", "-.", ":")[place % 4],
    }


def _draw_differences(axes: Axes, part: pd.DataFrame, metric: str) -> None:
    axes.axhline(0, color="0.3", linewidth=1)
    sizes = sorted(part["train_samples"].unique())
    noises = sorted(part["label_noise"].unique())
    for place, noise in enumerate(noises):
        line = part[part["label_noise"] == noise].sort_values("train_samples")
        x = [sizes.index(size) + 0.08 * (place - (len(noises) - 1) / 2) for size in line["train_samples"]]
        said = f"{noise:.0%} of the labels wrong"
        style = _noise_style(place) | {"linewidth": 1.2, "markersize": 6, "capsize": 3, "label": said}
        axes.errorbar(x, line["difference"], yerr=line["half"], **style)
    axes.set_xticks(range(len(sizes)), [_rows(size) for size in sizes])
    axes.set_xlabel("training rows, validation included", fontsize=9)
    panels.in_points(axes, metric, f"difference in test {metric}")
    panels.plain(axes)
    panels.empty(axes, part.empty, "no pairs yet")
    if len(noises):
        axes.legend(fontsize=7, frameon=False)


def _draw_masks(axes: Axes, part: pd.DataFrame, metric: str) -> None:
    """A column of marks for every method and what moves, the mean as a line and the deviation as its name."""
    groups = sorted(part.groupby(["method", "part"]), key=lambda each: (each[0][0], each[0][1]))
    names = []
    for x, ((method, moved), of) in enumerate(groups):
        own = panels.look(method, "–")
        shifts = [0.3 * ((index + 0.5) / len(of) - 0.5) for index in range(len(of))]
        face = own.color if moved == "over seeds" else "white"
        style = own.markers | {"linestyle": "", "color": own.color, "markersize": 5, "markerfacecolor": face}
        axes.plot([x + shift for shift in shifts], of["test"], **style)
        axes.plot([x - 0.3, x + 0.3], [of["test"].mean()] * 2, color="black", linewidth=1.2)
        scale = 100 if metric in panels.SHARES else 1
        deviation = f"{scale * of['test'].std():.2f}" if len(of) > 1 else NONE
        names.append(f"{method}\n{moved}\n±{deviation} (n = {len(of)})")
    axes.set_xticks(range(len(names)), names)
    axes.set_xlim(-0.6, max(0.6, len(names) - 0.4))
    panels.scored(axes, metric)
    panels.plain(axes)
    axes.tick_params(axis="x", labelsize=7)
    panels.empty(axes, part.empty, "no runs yet")


def _draw_gaps(axes: Axes, part: pd.DataFrame, metric: str) -> None:
    sizes = sorted(part["train_samples"].unique())
    noises = sorted(part["label_noise"].unique())
    for place, noise in enumerate(noises):
        for side, method in enumerate(METHODS):
            line = part[(part["label_noise"] == noise) & (part["method"] == method)].sort_values("train_samples")
            x = [sizes.index(size) + 0.16 * (side - 0.5) for size in line["train_samples"]]
            style = _noise_style(place) | {"linewidth": 1, "markersize": 5.5, "capsize": 2}
            face = style["color"] if method == "partial" else "white"
            axes.errorbar(x, line["gap"], yerr=line["half"], markerfacecolor=face, **style)
    axes.set_xticks(range(len(sizes)), [_rows(size) for size in sizes])
    axes.set_xlabel("training rows, validation included", fontsize=9)
    panels.in_points(axes, metric, f"{metric}, train less test")
    panels.plain(axes)
    panels.empty(axes, part.empty, "not measured yet")


def _rows(size: float) -> str:
    return "all" if math.isinf(size) else f"{size:.0f}"
