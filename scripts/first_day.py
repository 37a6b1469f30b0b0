"""The first day of a stranger: tables and folders of images, trained by the defaults and beside searched rates.

    python scripts/first_day.py --data data --out results/first_day

Tables of 256 to 560 rows and 2 to 12 classes are cut out of real sets. Every method trains by its defaults, and again
at multiples of the rate that the default came to. The best on validation of all these is the searched best. The last
line of first_day.md counts how often the default is within two points of it on test, on tables that the rule for rates
was not made from. Runs that are finished are skipped, so that this can be interrupted and goes on.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pandas as pd
from datasets import Dataset, concatenate_datasets, load_dataset

from partial_lora import cli
from partial_lora.errors import PartialLoraError
from partial_lora.files import building, write_atomic
from partial_lora.launching.directory import INTERRUPTED, read_result
from partial_lora.launching.paths import run_directory
from partial_lora.methods import called
from partial_lora.settings.compose import checked

METHODS = ("partial", "dense", "lora", "entries")
FACTORS = (0.5, 2.0)


@dataclass(frozen=True)
class Table:
    """Rows of a stranger: out of which sets, how many for training and test, and what is in them.

    columns: of the texts; none for images. classes: the first so many. words: of each text, the first so many. fitted:
    the rule for rates was made from searches on the set.
    """

    sets: tuple[str, ...]
    rows: int
    test: int
    label: str = "label"
    columns: tuple[str, ...] = ()
    classes: int | None = None
    words: int | None = None
    fitted: bool = False


# Where a message is from: one column of texts of each of so many sets.
SOURCES = {
    **dict.fromkeys(("arc_easy", "boolq", "gsm8k", "openbookqa", "qnli", "social_iqa"), "question"),
    **dict.fromkeys(("cola", "sst2"), "sentence"),
    **dict.fromkeys(("rte", "mrpc"), "sentence1"),
    "piqa": "goal",
    "trec": "text",
}
TABLES = {
    "questions": Table(("trec",), 560, 400, "coarse_label", ("text",), fitted=True),
    "sources": Table(tuple(SOURCES), 480, 480, words=14),  # so that the length does not tell where it is from
    "pairs": Table(("mrpc",), 480, 400, columns=("sentence1", "sentence2")),
    "reviews": Table(("imdb",), 400, 300, columns=("text",), words=40),
    "flowers": Table(("flowers17",), 256, 160, classes=8),
}


@cli.script
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a folder of NAME/{train,test}.parquet")
    parser.add_argument("--out", type=Path, default=Path("results/first_day"))
    parser.add_argument("--tables", nargs="+", default=list(TABLES))
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--factors", nargs="*", type=float, default=FACTORS, help="of the default's learning rate")
    options = parser.parse_args(arguments)
    for seed, name in product(options.seeds, options.tables):
        folder = options.out / "data" / name
        if not folder.is_dir():
            write_table(TABLES[name], options.data, folder)
        for method in options.methods:
            write(pd.DataFrame(runs(name, folder, options.out, method, seed, options.factors)), options.out)


# --- The rows.


def write_table(table: Table, data: Path, folder: Path) -> None:
    """Write the rows of a table as a stranger has them: two csv files, or folders of images by class."""
    with building(folder) as temporary:
        for split, count in (("train", table.rows), ("test", table.test)):
            rows = concatenate_datasets(list(_of_sets(table, data, split)))
            drawn = _drawn(rows, table.classes, count)
            if "image" in drawn.column_names:
                for number, row in enumerate(drawn):
                    file = temporary / split / row["class"] / f"{number}.png"
                    file.parent.mkdir(parents=True, exist_ok=True)
                    row["image"].convert("RGB").save(file)
            else:
                drawn.to_csv(temporary / f"{split}.csv")


def _of_sets(table: Table, data: Path, split: str) -> Iterator[Dataset]:
    for name in table.sets:
        file = str(data / name / f"{split}.parquet")
        rows = load_dataset("parquet", data_files={split: file}, split=split)
        if len(table.sets) > 1:
            texts = [" ".join(text.lower().split()[: table.words]).rstrip("?. ") for text in rows[SOURCES[name]]]
            yield Dataset.from_dict({"message": texts, "class": [name] * len(texts)})
            continue
        columns = table.columns or ("image",)
        if table.words is not None:
            rows = rows.map(lambda row: {key: " ".join(row[key].split()[: table.words]) for key in table.columns})
        classes = [f"class {value}" for value in rows[table.label]]
        yield rows.select_columns(list(columns)).add_column("class", classes)


def _drawn(rows: Dataset, classes: int | None, count: int) -> Dataset:
    """Return so many rows, as many of each class as there are or as come to the same for all."""
    known = sorted(set(rows["class"]), key=lambda name: (len(name), name))[:classes]
    shuffled = pd.Series(rows.shuffle(seed=0)["class"])
    places = shuffled.groupby(shuffled).head(-(-count // len(known)))
    kept = places[places.isin(known)].index
    return rows.shuffle(seed=0).select(sorted(kept)[:count])


# --- The runs.


def settings(name: str, folder: Path, out: Path, method: str, seed: int) -> list[str]:
    """Return what a stranger would write, and where results go."""
    table = TABLES[name]
    if (folder / "train").is_dir():
        rows = ["task=image_folder", f"task.data_files={folder}"]
    else:
        columns = "message" if len(table.sets) > 1 else ",".join(table.columns)
        files = f"{{train: {folder}/train.csv, test: {folder}/test.csv}}"
        rows = ["model=minilm_l6", "task=text_table", f"task.data_files={files}", f"task.text_columns=[{columns}]"]
        rows += ["task.label_column=class"]
    size = {"calibrated": ["calibration=fixed"], "rank": ["calibration.budget=0.13"]}.get(called(method).size, [])
    chosen = [
        f"method={method}",
        *size,
        f"seed={seed}",
        f"results_dir={out}",
        "keep_records=true",
        "trainer.start=fork",
    ]
    return [*rows, f"task.name={name}", *chosen]


def runs(name: str, folder: Path, out: Path, method: str, seed: int, factors: Sequence[float]) -> Iterator[dict]:
    """Give a row for the default run and for each multiple of its learning rate."""
    default = settings(name, folder, out, method, seed)
    record = made(default)
    came_to = record["training"]
    yield row(name, record, 1.0)
    for factor in factors:
        rates = [f"trainer.learning_rate={factor * came_to['learning_rate']:g}"]
        if came_to["head_learning_rate"] is not None:
            rates.append(f"trainer.head_learning_rate={came_to['head_learning_rate']:g}")
        yield row(name, made([*default, *rates]), factor)


def made(overrides: list[str]) -> dict:
    """Return the record of a run, which is made if there is none; one that diverged counts as any other."""
    ((_, config),) = checked(["-m", *overrides]).runs
    place = run_directory(config)
    record = read_result(place) or {}
    if record.get("status") not in ("finished", "failed") or record.get("error") == INTERRUPTED:
        code = cli.main(["train", "-m", *overrides])
        if code > 1:
            reason = "interrupted; the same command goes on from there" if code > 128 else "refused"
            raise PartialLoraError(f"{place}: {reason}")
    return read_result(place)


def row(name: str, record: dict, factor: float) -> dict:
    """Return what the table needs of a record; the scores of a run that failed are 0."""
    table, scores = TABLES[name], record.get("metrics") or {}
    training = record["training"]
    score = {split: scores[split][scores[split]["primary"]] if scores else 0.0 for split in ("validation", "test")}
    return {
        "table": name,
        "held_out": not table.fitted,
        "rows": training["rows"],
        "classes": len(record["labels"]),
        "method": record["config"]["method"]["name"],
        "seed": record["seed"],
        "factor": factor,
        "learning_rate": training["learning_rate"],
        "steps": training["steps"],
        "seconds": sum(record["seconds"].values()),
    } | score


# --- The tables.


def compared(rows: pd.DataFrame) -> pd.DataFrame:
    """Return for every table and method the default's test score, and its distance from that of the best rate.

    The best rate is that of the best mean score on validation, over the seeds that were searched at all rates.
    """
    cells = []
    for (name, method), cell in rows.groupby(["table", "method"], sort=False):
        tried = cell.groupby("seed")["factor"].transform("nunique")
        searched = cell[tried == max(2, cell["factor"].nunique())]
        default = cell[cell["factor"] == 1].mean(numeric_only=True)
        cells.append(
            {"table": name, "held out": cell["held_out"].iloc[0], "classes": cell["classes"].iloc[0], "method": method}
            | {"seeds": cell["seed"].nunique(), "learning rate": default["learning_rate"], "steps": default["steps"]}
            | {"test": 100 * default["test"], "seconds": default["seconds"], "searched": searched["seed"].nunique()}
        )
        if not searched.empty:
            means = searched.groupby("factor")[["validation", "test", "learning_rate"]].mean()
            best = means.loc[means["validation"].idxmax()]
            difference = 100 * (means.loc[1.0, "test"] - best["test"])
            cells[-1] |= {"best rate": best["learning_rate"], "difference": difference}
    return pd.DataFrame(cells)


def write(rows: pd.DataFrame, out: Path) -> None:
    """Add rows to first_day.csv, a line a run, and write first_day.md, a line a table and method."""
    file, run = out / "first_day.csv", ["table", "method", "seed", "factor"]
    known = pd.read_csv(file) if file.is_file() else rows.iloc[:0]
    rows = pd.concat([known, rows], ignore_index=True).drop_duplicates(run, keep="last")
    numbers = compared(rows)
    held_out = numbers[numbers["held out"] & numbers["searched"].gt(0)]
    text = numbers.to_markdown(index=False, floatfmt=".4g")
    if not held_out.empty:
        near = (held_out["difference"] >= -2).sum()
        worst = held_out.loc[held_out["difference"].idxmin()]
        text += (
            f"\n\nOf {len(held_out)} tables and methods that no rule was made from, the default is within two points "
        )
        text += f"of the searched best on {near}; the farthest is {worst['table']}, {worst['method']}, "
        text += f"{worst['difference']:+.1f} points."
    write_atomic(file, rows.to_csv(index=False, float_format="%.6g"))
    write_atomic(out / "first_day.md", text + "\n")


if __name__ == "__main__":
    sys.exit(main())
