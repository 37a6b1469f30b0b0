"""The evidence in a minute: four figures, each for a light and a dark page, out of the tables of results/.

    python scripts/evidence.py      # or `make figures`

Every mark is named beside it, and colour never tells two things apart without a shape.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
from claims import ALL_SETS, AS_GOOD, BETTER, FAILS, HOLDS, OPEN, WORSE
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from protocol import BUDGET, PARTIAL, UNIFORM

from partial_lora import cli
from partial_lora.report.drawing import look
from partial_lora.report.rows import NONE
from partial_lora.report.statistics import Estimate

NAMED = {  # the method of a form, in ordinary words, and how far its label is from the mark, on one set or on all
    "partial": ("partial", "rows and columns", {"gtsrb": (8, 9), "trec": (-40, 38)}),
    "lora on attn.qkv": ("dense", "LoRA on q, k, v", (8, -15)),
    "lora on query, value": ("dense", "LoRA on q, v", (10, -29)),
    "lora": ("lora", "plain LoRA", (26, -12)),
    "entries": ("entries", "single entries", (26, 3)),
    "random_weights": ("random_weights", "entries of W", (8, -4)),
    "lori": ("lori", "LoRI", (5, 15)),
    "lorafa": ("lorafa", "LoRA-FA", {"gtsrb": (8, -8), "trec": (8, -3)}),
    "paca": ("paca", "PaCA", {"gtsrb": (8, -8), "trec": (8, -16)}),
    "oft": ("oft", "OFT", (8, 6)),
    "hira": ("hira", "HiRA", {"gtsrb": (-36, 8), "trec": (-36, 22)}),
}
LIGHT = {"black": "#1d2329", "faint": "#d0d7de", "grey": "#59636e", "page": "#ffffff"}  # dark enough for words
LIGHT |= {"blue": "#0072b2", "vermillion": "#c44601", "green": "#00795a", "purple": "#8f4e9f", "orange": "#9a6700"}
LIGHT |= {"sky": "#1a7fa8"}
DARK = {"black": "#e6edf3", "faint": "#3d444d", "grey": "#9198a1", "page": "#0d1117"}
DARK |= {"blue": "#58a6ff", "vermillion": "#ff8a4c", "green": "#3fd0a0", "purple": "#d2a8ff", "orange": "#e3b341"}
DARK |= {"sky": "#8ad8ff"}
OURS = ("partial", "lora", "entries", "random_weights", "dense", "lori", "lorafa", "paca", "rows", "ticket")
SETS = {"gtsrb": "gtsrb, traffic signs", "trec": "trec, questions", "signdigits": "signdigits"}
CLAIMS = {  # the method that rows and columns are set against, and what the paper says of it
    "dense": "As good as dense LoRA",
    "targeted": "As good as the most important rows",
    UNIFORM: "Calibrated shares beat equal shares",
}
VERDICTS = {
    HOLDS: ("blue", "o"),
    FAILS: ("vermillion", "s"),
    WORSE: ("grey", "d"),
    OPEN: ("grey", "d"),
}  # colour, marker
WIDTH = 6.25  # inches of 96 pixels: 600


def figures(results: Path) -> None:
    """Draw the figures into results/figures."""
    for theme, colours in {"": LIGHT, "-dark": DARK}.items():
        for name, draw in DRAWN.items():
            with rc_context(_style(colours)):
                figure = draw(results, colours)
                path = results / "figures" / f"{name}{theme}.svg"
                path.parent.mkdir(exist_ok=True)
                figure.savefig(path, metadata={"Date": None}, facecolor=colours["page"])


def _style(colours: dict[str, str]) -> dict:
    ink = {f"{part}.color": colours["black"] for part in ("text", "xtick", "ytick")}
    edges = {"axes.edgecolor": colours["grey"], "axes.facecolor": colours["page"], "axes.labelcolor": colours["black"]}
    grid = {"axes.grid": True, "grid.color": colours["faint"], "grid.linewidth": 0.5, "axes.axisbelow": True}
    frame = {"axes.spines.top": False, "axes.spines.right": False}
    title = {"axes.titlelocation": "left", "axes.titleweight": "bold"}
    text = {"font.size": 11, "svg.fonttype": "none", "svg.hashsalt": "partial-lora"}
    return ink | edges | grid | frame | title | text


def differences_at_rates(results: Path, task: str) -> dict[str, Estimate]:
    """Return rsLoRA less plain LoRA at 13 %, in points over the seeds of both, at each of the task's RATES."""
    runs = pd.read_parquet(results / "race" / "runs.parquet", columns=[*_OF_RATES, "seed", "test"])
    runs = runs[(runs["task"] == task) & (runs["size"] == "0.13")]
    scores = 100 * runs.pivot_table(index="seed", columns=["form", "learning_rate"], values="test")
    estimates = {}
    for words, (first, second) in RATES[task].items():
        differences = (scores["rslora", first] - scores["lora", second]).dropna()
        error = differences.std() / len(differences) ** 0.5
        estimates[words] = Estimate(differences.mean(), error, len(differences) - 1)
    return estimates


_OF_RATES = ["task", "form", "size", "learning_rate"]
_BEST = {"each with its best": (1e-3, 4e-3)}  # those of the first seed's searches, on both sets
RATES = {  # of rsLoRA and of plain LoRA
    "gtsrb": {f"both with {rate}": (rate, rate) for rate in (1e-3, 2e-3)} | _BEST,
    "trec": {f"both with {rate}": (rate, rate) for rate in (1e-3, 2e-3, 4e-3)} | _BEST,
}


def rates(results: Path, colours: dict[str, str]) -> Figure:
    """Draw rsLoRA less plain LoRA at each of the RATES, each with its verdict."""
    figure = Figure(figsize=(WIDTH, 4.4))
    axes = figure.add_axes((0.36, 0.14, 0.62, 0.76))
    axes.axvline(0, color=colours["black"], linewidth=1)
    found = {(task, words): each for task in RATES for words, each in differences_at_rates(results, task).items()}
    for y, ((task, words), estimate) in enumerate(found.items()):
        low, high = estimate.interval()
        verdict = "rsLoRA is better" if low > 0 else "rsLoRA is worse" if high < 0 else "not told apart"
        color, marker = {"rsLoRA is better": ("blue", "o"), "rsLoRA is worse": ("vermillion", "s")}.get(
            verdict, ("grey", "d")
        )
        ink = colours[color]
        axes.plot([low, high], [y, y], color=ink, linewidth=2)
        axes.plot(estimate.difference, y, marker, color=ink, markersize=8)
        words_beside = f"{estimate.difference:+.1f}: {verdict}".replace("-", "−")
        ground = {"facecolor": colours["page"], "edgecolor": "none", "pad": 1}
        axes.text(estimate.difference, y - 0.28, words_beside, color=ink, ha="center", fontsize=11, bbox=ground)
        label = f"{task}, {words}"
        axes.text(-0.04, y, label, ha="right", va="center", fontsize=11, transform=axes.get_yaxis_transform())
    axes.set(xlim=(-90, 35), ylim=(len(found) - 0.5, -0.7), yticks=[])
    axes.set_xlabel("points of test accuracy less plain LoRA; bars: 95 %, 8 seeds", fontsize=10)
    axes.set_title("Is rsLoRA better than plain LoRA? It depends on the rate.", fontsize=12, x=-0.56)
    axes.spines["left"].set_visible(False)
    return figure


def raced(results: Path) -> pd.DataFrame:
    """Return a row for each task, size and form of the race, with its distance from dense LoRA."""
    cells, dense = (pd.read_csv(results / "race" / f"{name}.csv") for name in ("race", "from_dense"))
    at = cells["form"].where(cells["size"] == "own", cells["form"] + " at " + cells["size"])
    dense = dense.set_index(["task", "form"])
    found = dense.reindex(pd.MultiIndex.from_arrays([cells["task"], at]))
    whole = cells["task"].map(cells[cells["form"] == "dense"].set_index("task")["parameters"])
    return cells.assign(
        share=cells["parameters"] / whole,
        lead=100 * found["difference"].to_numpy(),
        lead_half=100 * found["difference_half"].to_numpy(),
        lead_seeds=found["paired"].to_numpy(),
    )


def floor_of(cells: pd.DataFrame) -> float:
    """Return the bytes that a model keeps whatever its adapter: what rows and columns of no parameters would keep."""
    kept = cells[cells["form"] == "partial"].set_index("size")["saved_bytes"]
    return kept["0.01"] - 0.01 * (kept["0.13"] - kept["0.01"]) / 0.12


def memory(results: Path, colours: dict[str, str]) -> Figure:
    """Draw the distance from dense LoRA against the bytes kept above the floor, methods of 13 % of its parameters."""
    figure = Figure(figsize=(WIDTH, 6.6), layout="constrained")
    drawn = figure.subplots(2, 1, sharex=True, height_ratios=(5, 4))
    cells = raced(results)
    for axes, task in zip(drawn, ("gtsrb", "trec"), strict=True):
        frontier(axes, cells[cells["task"] == task], colours)
        axes.set_title(SETS[task])
    drawn[-1].set_xlabel(_KEPT)
    figure.supxlabel(f"{_MARKS}; dots: other methods", fontsize=9)
    return figure


_KEPT = "MB kept for the backward pass, above what the frozen model keeps"
_MARKS = "filled: 8 seeds, hollow: fewer; bars: 95 %"


def frontier(axes: Axes, cells: pd.DataFrame, colours: dict[str, str]) -> None:
    """Draw the methods of 13 % on one set by what they keep and how far they are from dense LoRA."""
    floor = floor_of(cells)
    cells = cells.assign(above=(cells["saved_bytes"] - floor) / 1e6)
    dense = cells.loc[cells["form"] == "dense", "above"].iloc[0]
    own = ~cells["form"].str.contains(" ") & (cells["size"] == "0.13")
    own |= cells["form"].str.startswith("lora on")  # which has about as many parameters
    for row in cells[own].itertuples():
        at, ink, marker = (row.above, row.lead), colours["grey"], "."
        if row.form in NAMED:
            method, name, places = NAMED[row.form]
            ink, marker = look_of(method, colours)
            axes.errorbar(*at, row.lead_half, color=ink, linewidth=1, capsize=2)
            place = places[row.task] if isinstance(places, dict) else places
            label(axes, name, at, place, ink)
        mark(axes, at, marker, ink, row.lead_seeds, colours)
    axes.axhline(0, color=colours["grey"], linewidth=1)
    low, high = axes.get_ylim()
    for x, y, words, place in (
        (0, low, f"the frozen model: {floor / 1e6:.0f} MB", (4, 4)),
        (dense, high, f"dense LoRA: {dense:+.0f} MB", (-112, -12)),
    ):
        axes.axvline(x, color=colours["grey"], linewidth=1.5, linestyle="--")
        label(axes, words, (x, y), place, colours["grey"])
    axes.set_xscale("function", functions=(lambda x: np.sqrt(np.maximum(x, 0)), np.square))
    axes.set(xlim=(0, 170), xticks=(5, 10, 20, 40, 60, 80, 100, 120), ylabel="points from dense LoRA")


def look_of(method: str, colours: dict[str, str]) -> tuple[str, object]:
    """Return the colour and the marker that a method has in all figures, its hue as the page has it."""
    own = look(method, NONE)
    return colours[own.hue], own.marker


def mark(axes: Axes, at: tuple[float, float], marker: object, ink: str, seeds: int, colours: dict[str, str]) -> None:
    """Draw a method at one size: filled for eight seeds, hollow for three."""
    face = ink if seeds > 3 else colours["page"]
    axes.plot(*at, marker=marker, color=ink, markerfacecolor=face, markersize=7, zorder=3)


def label(axes: Axes, words: str, at: tuple[float, float], place: tuple[float, float], ink: str) -> None:
    """Write words beside a mark, with a line to it from afar."""
    line = {"arrowstyle": "-", "color": ink, "linewidth": 0.6, "shrinkB": 4} if abs(place[1]) > 30 else None
    ground = {"facecolor": axes.get_facecolor(), "edgecolor": "none", "alpha": 0.75, "pad": 0.5}
    offset = {"textcoords": "offset points", "arrowprops": line, "bbox": ground}
    axes.annotate(words, at, place, color=ink, fontsize=10, zorder=4, **offset)


def size(results: Path, colours: dict[str, str]) -> Figure:
    """Draw the test score against the share of dense LoRA's parameters, a panel for each set."""
    cells = raced(results)
    figure = Figure(figsize=(WIDTH, 7), layout="constrained")
    drawn = figure.subplot_mosaic([["gtsrb"] * 2, ["trec", "signdigits"]], height_ratios=(5, 3))
    beside = {"partial": (2, (8, -12)), "lora": (0, (-66, -3)), "entries": (0, (6, -9)), "oft": (1, (-196, 19))}
    for task, axes in drawn.items():
        of_task = cells[cells["task"] == task]
        dense = of_task[of_task["form"] == "dense"].iloc[0]
        axes.axhspan(*(100 * (dense["test"] + sign * dense["half"]) for sign in (-1, 1)), color=colours["faint"])
        lines = {form: of_task[of_task["form"] == form] for form in ("lora", "entries", "partial")}
        lines["oft"] = best_of_others(of_task, results)
        for form, line in lines.items():
            method, name, _ = NAMED[form]
            line, (ink, marker) = line.sort_values("share"), look_of(method, colours)
            scores = 100 * line["test"]
            axes.errorbar(line["share"], scores, 100 * line["half"], color=ink, linewidth=1.5, elinewidth=0.6)
            at = list(zip(line["share"], scores, strict=True))
            for place, seeds in zip(at, line["seeds"], strict=True):
                mark(axes, place, marker, ink, seeds, colours)
            if task == "gtsrb":
                place, away = beside[form]
                theirs = f"PEFT's best on validation: {', '.join(NAMED[each][1] for each in line['form'].unique())}"
                label(axes, theirs if form == "oft" else name, at[place], away, ink)
        if task == "gtsrb":
            label(axes, "dense LoRA, 95 %", (0.0085, 100 * dense["test"]), (0, -3), colours["black"])
        shares = (0.01, 0.02, 0.05, 0.13, 0.6) if task == "gtsrb" else (0.01, 0.13, 0.6)
        axes.set(xscale="log", xlim=(0.008, 1))
        axes.minorticks_off()
        axes.set_xticks(shares, [f"{100 * share:g} %" for share in shares])
        axes.set_title(SETS[task])
    figure.supylabel("test accuracy, %", fontsize=11)
    figure.supxlabel("share of dense LoRA's parameters; filled: 8 seeds, hollow: 3 seeds; bars: 95 %", fontsize=9)
    return figure


def best_of_others(cells: pd.DataFrame, results: Path) -> pd.DataFrame:
    """Return of PEFT's methods the one that is best on validation at each size, at its best rate."""
    columns = ["task", "form", "size", "learning_rate"]
    runs = pd.read_parquet(results / "race" / "runs.parquet", columns=[*columns, "validation"])
    is_theirs = ~cells["form"].str.partition(" ")[0].isin(OURS)
    theirs = cells[is_theirs & (cells["size"] != "own")]
    theirs = theirs.merge(runs.groupby(columns)["validation"].mean().reset_index(), on=columns)
    return theirs.loc[theirs.groupby("size")["validation"].idxmax()] if len(theirs) else theirs


def claims(results: Path, colours: dict[str, str]) -> Figure:
    """Draw the paper's claims by set, each with its verdict among them."""
    folder = results / "decided" / "tables"
    numbers = pd.read_csv(folder / "decided.csv")
    by_svd = numbers["importance"].isna() & (numbers["operating_point"] == BUDGET)
    numbers = numbers[(numbers["first"] == PARTIAL) & by_svd & (numbers["task"] != ALL_SETS)]
    verdicts = pd.read_csv(folder / "verdicts.csv").set_index(["claim", "where"])["paper's"]
    figure = Figure(figsize=(WIDTH, 3.8))
    axes, y = figure.add_axes((0.13, 0.13, 0.66, 0.87)), 0.0
    axes.axvspan(-2, 2, color=colours["faint"])
    axes.text(0, -0.7, "±2 points", ha="center", fontsize=9)
    left = {"x": -0.18, "va": "center", "transform": axes.get_yaxis_transform()}
    for second, title in CLAIMS.items():
        y -= 1.5
        axes.text(y=y, s=title, fontweight="bold", **left)
        for row in numbers[numbers["second"] == second].itertuples():
            y -= 1
            axes.text(y=y, s=row.task, **left)
            verdict = verdicts[claim_of(second), f"{row.task}, {BUDGET}"].partition(", among ")[0]
            color, marker = VERDICTS[verdict]
            ink = colours[color]
            axes.plot([100 * row.low, 100 * row.high], [y, y], color=ink, linewidth=1.5)
            axes.plot(100 * row.difference, y, marker, color=ink, markersize=6)
            axes.text(6.8, y, plainly(verdict, second).partition(",")[0], color=ink, va="center", fontsize=10)
    axes.set(xlim=(-17.5, 6.5), ylim=(y - 1, 0), yticks=[])
    axes.set_xlabel("rows and columns minus the other, points of test accuracy; bars: 95 %", fontsize=9)
    axes.spines["left"].set_visible(False)
    return figure


DRAWN = {"rates": rates, "memory": memory, "size": size, "claims": claims}


def claim_of(second: str) -> str:
    """Return the claim about rows and columns and another method, as the tables have it."""
    return (BETTER if second == UNIFORM else AS_GOOD).words.format(first=PARTIAL, second=second)


def plainly(verdict: str, second: str) -> str:
    """Return a verdict in ordinary words: a claim to be better is refuted where a gain of the margin is excluded."""
    return "no gain of 2" if (second, verdict) == (UNIFORM, FAILS) else verdict


@cli.script
def main() -> None:
    figures(Path("results"))


if __name__ == "__main__":
    sys.exit(main())
