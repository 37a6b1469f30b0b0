"""Rows of every source: files of every kind, folders, the hub; columns by name or type; labels; and what is wrong."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image
from refusals import refusal

from partial_lora import tasks
from partial_lora.tasks import sources
from partial_lora.tasks.config import TaskConfig
from partial_lora.tasks.image_folders import left_out

TEXTS = [f"text number {number}" for number in range(12)]
ANIMALS = ["dog", "cat"] * 6


def load(data_files: object, modality: str = "text", **settings: object) -> tasks.Task:
    return tasks.load(TaskConfig(name="own", path="files", data_files=data_files, modality=modality, **settings))


def both(file: str, modality: str = "text", **settings: object) -> tasks.Task:
    """One file as the training and the test rows."""
    return load({"train": file, "test": file}, modality, **settings)


def table(folder: Path, name: str, **columns: list) -> str:
    frame, file = pd.DataFrame(columns), folder / name
    if file.suffix in (".csv", ".tsv"):
        frame.to_csv(file, index=False, sep="," if file.suffix == ".csv" else "\t")
    elif file.suffix == ".parquet":
        frame.to_parquet(file)
    else:
        rows = frame.to_dict("records")
        file.write_text(json.dumps(rows) if file.suffix == ".json" else "\n".join(map(json.dumps, rows)))
    return str(file)


def animals(folder: Path, **columns: list) -> str:
    return table(folder, "animals.csv", **({"text": TEXTS, "label": ANIMALS} | columns))


def csv(folder: Path, labels: list[str], name: str = "labels.csv") -> str:
    """A csv file with labels exactly as they are written here."""
    rows = [f"text {number},{label}" for number, label in enumerate(labels)]
    (folder / name).write_text("\n".join(["text,label", *rows]) + "\n")
    return str(folder / name)


def picture(file: Path, grey: int = 0) -> str:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (6, 8), grey).save(file)
    return str(file)


def images(folder: Path, *classes: str, count: int = 4) -> str:
    for label in classes:
        for number in range(count):
            picture(folder / label / f"{number}.png", grey=number)
    return str(folder)


def refused(key: str, *names: str, of: object, modality: str = "text", **settings: object) -> None:
    """Assert that loading fails in one line that begins with a key and gives all the names."""
    with refusal(re.escape(key), *names):
        load(of, modality, **settings)


def sizes(task: tasks.Task) -> list[int]:
    return [len(split) for split in (task.train, task.validation, task.test)]


def counts(task: tasks.Task) -> list[Counter]:
    return [Counter(split["label"]) for split in (task.train, task.validation, task.test)]


# --- Tables.


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_a_table_of_any_kind_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    texts = ['with, comma and "quotes"', "NA", "None", "12", "2020-01-01", "tab\tand line\nbreak", "naïve"]
    train = table(tmp_path, f"train.{kind}", words=texts * 4, label=["b", "a"] * 14)
    test = table(tmp_path, f"test.{kind}", words=texts[:2], label=["a", "b"])
    task = load({"train": train, "test": test}, validation_share=0.25)
    assert (task.labels, task.modality, task.metrics) == (("a", "b"), "text", ("accuracy",))
    assert task.train.features == datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["a", "b"])
    )
    assert (task.test["text"][:], task.test["label"][:]) == (texts[:2], [0, 1])
    assert Counter([*task.train["text"], *task.validation["text"]]) == Counter(texts * 4)


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("gone.csv", None, ""),
        ("empty.csv", b"", ""),
        ("ragged.csv", b"text,label\na,b\nc,d,e,f\n", ""),
        ("latin.csv", b"text,label\ncaf\xe9,b\n", "line 2 is not UTF-8"),
        ("wide.csv", "text,label\na,b\n".encode("utf-16-le"), "UTF-16"),
        ("wider.csv", "text,label\na,b\n".encode("utf-32"), "UTF-32"),
        ("wide.jsonl", '{"text": "a", "label": 1}'.encode("utf-16-be"), "UTF-16"),
        ("twice.csv", b"text,label,text\na,b,c\n", "column text twice"),
        ("twice.jsonl", b'{"text": "a", "label": 1, "text": "b"}\n', "line 1: it has the column text twice"),
        ("twice.json", b'[{"text": "a", "label": 1, "text": "b"}]', "column text twice"),
        ("nameless.csv", b"a cat,cat\na dog,dog\nanother cat,cat\n", "first line"),
        ("numbers.csv", b"so much,3\nmore,4\n", "first line"),
        ("wide.csv", b"text,label\nHello, Bob,dog\nHi, Al,cat\n", "more cells than its header"),
        ("quote.tsv", b'text\tlabel\n"he said so\tdog\nHi\tcat\n"she, too\tcat\n', "line 2: "),
        ("broken.jsonl", b'{"text": "a", "label": 1}\n{"text":\n', "line 2"),
        ("mixed.jsonl", b'{"text": "a"}\n{"text": 3}\n', "column text"),
        ("list.json", b"[1, 2]", ""),
        ("deep.json", b"[" * 10**5, ""),
        ("broken.parquet", b"PAR1 no more", ""),
        ("table.xlsx", b"PK", "parquet, csv, tsv, json or jsonl"),
    ],
)
def test_a_file_of_another_format_is_named(tmp_path: Path, name: str, content: bytes | None, place: str) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    refused(f"task.data_files.test={file}: ", place, of={"train": animals(tmp_path), "test": str(file)})


def test_a_table_of_columns_alone_has_no_rows(tmp_path: Path) -> None:
    refused("task.data_files.train=", "no rows", of={"train": table(tmp_path, "own.parquet", text=[], label=[])})


def test_one_file_is_cut_into_three_splits_with_every_class_in_each(tmp_path: Path) -> None:
    file = table(tmp_path, "all.csv", text=[f"text {number}" for number in range(100)], label=["a", "b"] * 50)
    task = load(file)
    assert counts(task) == [{0: 36, 1: 36}, {0: 4, 1: 4}, {0: 10, 1: 10}]
    assert len({*task.train["text"], *task.validation["text"], *task.test["text"]}) == 100
    assert load(file).test["text"][:] == task.test["text"][:] != load(file, split_seed=1).test["text"][:]
    few = load(file, train_samples=60, test_samples=10)
    assert counts(few) == [{0: 27, 1: 27}, {0: 3, 1: 3}, {0: 5, 1: 5}]
    assert sizes(load(file, train_samples=10**6)) == sizes(task)
    refused("task.train_samples=1: ", "2 classes", of=file, train_samples=1)
    small = table(tmp_path, "small.csv", text=TEXTS * 2, label=["a", "b", "c"] * 8)
    refused("task=own: ", "3 classes", "task.validation_share", of=small)
    refused("task=own: ", "label a", of=csv(tmp_path, ["a"] * 12))


def test_a_class_too_small_to_cut_is_named_with_the_rows_that_it_needs(tmp_path: Path) -> None:
    file = animals(tmp_path, label=["wolf", *ANIMALS[1:]])
    refused("task=own: ", "class wolf", "10% of 12 rows", "at least 2 rows", of={"train": file, "test": file})
    refused("task=own: ", "class wolf", "20% of 12 rows", "at least 3 rows", of=file)
    labels = [*["a", "b"] * 50, "c", "c", "c"]
    file, less = csv(tmp_path, labels), csv(tmp_path, labels[:-1], "less.csv")
    assert len(load(file, split_seed=0).labels) == 3
    refused("task=own: ", "class c ", "task.train_samples", "at least 3", of=file, train_samples=20)
    with refusal("task=own: ", "class c ", "at least 3"):
        [load(less, split_seed=seed) for seed in range(20)]  # until test takes one of the two


def test_a_split_without_rows_is_named(tmp_path: Path) -> None:
    refused("task=own: the test split", of={"train": animals(tmp_path), "test": csv(tmp_path, [])})


# --- Columns.


def test_pairs_of_texts_keep_their_order(tmp_path: Path) -> None:
    file = table(tmp_path, "pairs.jsonl", a=TEXTS, b=TEXTS[::-1], label=ANIMALS)
    task = both(file, text_columns=["b", "a"])
    assert (task.test["text"][:], task.test["text_pair"][:]) == (TEXTS[::-1], TEXTS)
    codes = table(tmp_path, "codes.csv", code=["007", "1e3"] * 6, label=ANIMALS)  # texts that look like numbers
    assert both(codes, text_columns=["code"]).test["text"][:2] == ["007", "1e3"]


@pytest.mark.parametrize(
    ("columns", "settings", "key", "types"),
    [
        ({"a": TEXTS, "b": TEXTS}, {}, "text_columns: ", "'a': 'string', 'b': 'string'"),
        ({"a": TEXTS}, {"text_columns": ["c"]}, "text_columns=c: ", "'a': 'string'"),
        ({"a": TEXTS}, {"text_columns": ["a", "a"]}, "text_columns=['a', 'a']: ", ""),
        ({"a": TEXTS}, {"text_columns": ["a", "label"]}, "text_columns=label: ", "'a': 'string'"),
        ({"a": TEXTS}, {"image_column": "label", "modality": "image"}, "image_column=label: ", "'a': 'string'"),
        ({"a": TEXTS}, {"label_column": "kind"}, "label_column=kind: ", "'a': 'string'"),
        ({"label": [["a"]] * 12}, {}, "label_column: ", "'label': 'List'"),
        ({"a": [*range(12)]}, {}, "text_columns: ", "'a': 'int64'"),
    ],
)
def test_a_column_that_is_not_there_is_named_with_those_there_are(
    tmp_path: Path, columns: dict, settings: dict, key: str, types: str
) -> None:
    file = table(tmp_path, "own.jsonl", **{"label": ANIMALS} | columns)
    refused(f"task.{key}", types, of={"train": file, "test": file}, **settings)


def test_a_table_without_a_column_of_labels_is_named(tmp_path: Path) -> None:
    refused("task.label_column: ", "own.jsonl", "'a': 'string'", of=table(tmp_path, "own.jsonl", a=TEXTS))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_row_without_a_text_or_an_image_is_named(tmp_path: Path, kind: str) -> None:
    file = table(tmp_path, f"texts.{kind}", text=[*TEXTS[:2], None, *TEXTS[3:]], label=ANIMALS)
    for modality in ("text", "image"):
        refused("task=own: row 3 of the train split ", "column text", of=file, modality=modality)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_row_of_spaces_alone_has_no_text_and_a_pair_needs_one(tmp_path: Path, kind: str) -> None:
    columns = {"text": [*TEXTS[:2], " \t ", *TEXTS[3:]], "label": ANIMALS}
    refused("task=own: row 3 of the train split ", "column text", of=table(tmp_path, f"texts.{kind}", **columns))
    pairs = table(tmp_path, f"pairs.{kind}", **columns, second=TEXTS)
    assert "" in {text.strip() for text in both(pairs, text_columns=["text", "second"]).test["text"][:]}


def test_paths_of_images_start_at_the_table_s_own_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [f"pictures/{number}.png" for number in range(12)]
    for number, name in enumerate(names):
        picture(tmp_path / "data" / name, grey=20 * number)
    file = table(tmp_path / "data", "train.csv", file=names, label=ANIMALS)
    assert [np.asarray(image)[0, 0] for image in both(file, "image").test["image"]] == [20 * n for n in range(12)]
    absolute = table(tmp_path, "other.csv", file=[str(tmp_path / "data" / name) for name in names], label=ANIMALS)
    assert both(absolute, "image").test[3]["image"].size == (6, 8)
    lost = {"train": file, "test": table(tmp_path, "lost.csv", file=names, label=ANIMALS)}
    refused("task=own: row 1 of the test split: ", "0.png", of=lost, modality="image")


def test_images_are_read_from_bytes_with_or_without_the_library_s_own_marks(tmp_path: Path) -> None:
    stored = [Path(picture(tmp_path / f"{number}.png", grey=number)).read_bytes() for number in range(12)]
    pairs = [{"bytes": each, "path": None} for each in stored[:-1]] + [{"bytes": stored[-1], "path": "named.png"}]
    for number, data in enumerate((stored, pairs)):
        task = both(table(tmp_path, f"{number}.parquet", data=data, label=ANIMALS), "image")
        assert [np.asarray(image)[0, 0] for image in task.test["image"]] == list(range(12))


# --- Folders of images.


def test_a_folder_gives_its_sub_folders_as_classes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Path(images(tmp_path / "whole", "wolf", "fox", count=9))
    for label in ("wolf", "fox"):
        picture(whole / label / "deeper" / "10.png")
    for name in ("notes.txt", "form.pdf"):
        (whole / "wolf" / name).write_text("not an image")
    (whole / "fox" / ".hidden.png").write_text("not an image")
    picture(whole / "fox" / ".thumbnails" / "0.png")
    (whole / "hare").mkdir()
    (whole / "hare" / "1.heic").write_text("an image that Pillow does not read")
    task = load(str(whole), "image")
    assert task.labels == ("fox", "wolf")
    assert counts(task) == [{0: 7, 1: 7}, {0: 1, 1: 1}, {0: 2, 1: 2}]
    monkeypatch.chdir(whole)
    assert left_out(None) == left_out({}) == left_out("rows.csv") == []
    kept_out = left_out({"train": str(whole), "test": "rows.csv"})
    assert [line.partition(": left out: ")[::2] for line in kept_out] == [
        (f"task.data_files.train={whole}", "hare (a class without an image)"),
        (
            f"task.data_files.train={whole}",
            "hare/1.heic, wolf/form.pdf, wolf/notes.txt (a name that does not end as an image's)",
        ),
    ]
    (whole / "wolf" / "lost.png").symlink_to(tmp_path / "nothing.png")
    refused(f"task.data_files={whole}: ", "wolf/lost.png", of=str(whole), modality="image")
    parts = tmp_path / "parts"
    for split, count in (("train", 4), ("valid", 2), ("Test", 3)):
        images(parts / split, "wolf", "fox", count=count)
    folders = {"train": str(parts / "train"), "validation": str(parts / "valid"), "test": str(parts / "Test")}
    assert sizes(load(str(parts), "image")) == sizes(load(folders, "image")) == [8, 4, 6]
    (parts / "valid" / "fox" / "1.heic").write_text("")
    assert ["valid/fox/1.heic" in line for line in left_out(str(parts))] == [True]
    foxes = str(parts / "Test" / "fox")
    refused(f"task.data_files={foxes}: ", of=foxes, modality="image")


def test_a_link_inside_a_folder_of_images_is_followed_unless_it_leads_above_it(tmp_path: Path) -> None:
    elsewhere = images(tmp_path / "elsewhere", "brown", count=3)
    whole = Path(images(tmp_path / "whole", "wolf", "bear", count=9))
    (whole / "bear" / "more").symlink_to(elsewhere)
    assert counts(load({"train": str(whole), "test": str(whole)}, "image"))[2] == {0: 12, 1: 9}
    for place, above in (("loop", ".."), ("wolf/loop", "../..")):
        (whole / place).symlink_to(above)
        refused(f"{whole / place}: ", of=str(whole), modality="image")
        (whole / place).unlink()


def test_a_folder_of_splits_without_train_is_not_taken_for_classes(tmp_path: Path) -> None:
    for name, folders, names in (
        ("tests", ("training", "test"), "only test, training"),
        ("twice", ("train", "val", "validation"), "train, val, validation"),
        ("beside", ("extra", "train", "test"), "extra, test, train"),
    ):
        for folder in folders:
            images(tmp_path / name / folder, "wolf", "fox")
        refused(f"task.data_files={tmp_path / name}: ", names, of=str(tmp_path / name), modality="image")
    classes = load({"train": str(tmp_path / "tests")}, "image", validation_share=0.2)
    assert classes.labels == ("test", "training")


# --- Labels.


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["pear", "apple", "fig"], ("apple", "fig", "pear")),
        ([10, 9, -2], ("-2", "9", "10")),
        ([True, False, True], ("False", "True")),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_classes_are_the_labels_in_their_order(tmp_path: Path, kind: str, labels: list, names: tuple) -> None:
    task = both(table(tmp_path, f"train.{kind}", text=TEXTS, label=labels * 4), validation_share=0.25)
    assert task.labels == names
    assert [task.labels[number] for number in task.test["label"]] == [str(label) for label in labels * 4]


def test_fractions_are_regression_unless_they_are_classes_by_name(tmp_path: Path) -> None:
    file = table(tmp_path, "train.csv", text=TEXTS, score=[0.5, 2.0, 3.25] * 4)
    task = both(file, label_column="score")
    assert (task.labels, task.metrics, task.test["label"][:3]) == ((), ("pearson",), [0.5, 2.0, 3.25])
    assert sizes(task) == [10, 2, 12]
    classes = both(file, label_column="score", regression=False, validation_share=0.25)
    assert classes.labels == ("0.5", "2", "3.25")
    refused("task.metrics: ", "pearson, spearman, mse", "f1", of=file, label_column="score", metrics=["f1"])
    refused("task=own: row 1 of the train split ", "'dog'", "task.regression", of=animals(tmp_path), regression=True)
    alike = table(tmp_path, "alike.csv", text=TEXTS, score=[2.5] * 12)
    refused("task=own: ", "2.5", "task.label_column", of=alike, label_column="score")


def test_numbers_too_large_for_a_class_are_real_all_the_same(tmp_path: Path) -> None:
    prices = [20_000_001, 350_000, 7] * 4
    task = both(table(tmp_path, "houses.jsonl", text=TEXTS, label=prices), regression=True)
    assert task.test["label"][:] == np.float32(prices).tolist()
    with refusal(f"task.data_files.train={tmp_path}/hashes.jsonl", "id"):
        both(table(tmp_path, "hashes.jsonl", text=TEXTS, label=ANIMALS, id=[2**63 + 1] * 12))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_label_of_spaces_alone_is_none(tmp_path: Path, kind: str) -> None:
    file = table(tmp_path, f"own.{kind}", text=TEXTS, label=["", *ANIMALS[1:]])
    refused("task=own: row 1 of the train split ", of=file)


def test_truths_of_a_csv_file_lose_their_spaces(tmp_path: Path) -> None:
    assert both(csv(tmp_path, ["true", "false "] * 6)).labels == ("False", "True")


@pytest.mark.parametrize("labels", [["0.5", "0.50", "2"], ["1e-3", "1"], [".5", "1."], ["-1.25", "3.800"]])
def test_fractions_are_real_however_they_are_written(tmp_path: Path, labels: list[str]) -> None:
    file = csv(tmp_path, labels * 6)
    assert both(file).labels == ()
    assert both(file).test["label"][:] == pytest.approx([float(label) for label in labels] * 6)
    assert len(both(file, regression=False, validation_share=0.25).labels) == len(set(labels))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_whole_numbers_are_classes_though_written_as_floats(tmp_path: Path, kind: str) -> None:
    file = table(tmp_path, f"own.{kind}", text=TEXTS, label=[0.0, 1.0] * 6)
    task, real = both(file), both(file, regression=True)
    assert (task.labels, task.metrics, task.test["label"][:2]) == (("0", "1"), ("accuracy",), [0, 1])
    assert (real.labels, real.metrics, real.test["label"][:2]) == ((), ("pearson",), [0.0, 1.0])
    codes = csv(tmp_path, ["007", "7", "1e1"] * 4)
    assert both(codes, regression=True).test["label"][:3] == [7.0, 7.0, 10.0]
    assert load({"train": file, "test": csv(tmp_path, ["0", "1"] * 6)}).test["label"][:2] == [0, 1]


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["10", "9", "-2"], ("-2", "9", "10")),
        (["+1", "-1"], ("-1", "1")),
        ([" 10", "9"], ("9", "10")),
        (["007", "07", "7"], ("007", "07", "7")),
        (["1", "1.0"], ("1", "1.0")),
        (["0", "-0"], ("-0", "0")),
        (["1e3", "10"], ("10", "1e3")),
        (["1.0", "one"], ("1.0", "one")),
        (["wolf ", "fox", " wolf"], ("fox", "wolf")),
        (["9223372036854775807", "1"], ("1", "9223372036854775807")),
        (["9223372036854775808", "1"], ("1", "9223372036854775808")),
        (["9007199254740993.0", "1.0"], ("1.0", "9007199254740993.0")),
        (["True", "1"], ("1", "True")),
        (["NA", "NaN", "None", "inf", "nan", "null"], ("NA", "NaN", "None", "inf", "nan", "null")),
    ],
)
def test_a_label_of_a_csv_file_is_a_number_where_that_loses_nothing(
    tmp_path: Path, labels: list[str], names: tuple[str, ...]
) -> None:
    task = both(csv(tmp_path, labels * 6), validation_share=0.25)
    assert (task.labels, task.metrics) == (names, ("accuracy",))
    written = [label.strip() for label in labels]
    if all(label in names for label in written):
        assert [names[number] for number in task.test["label"]] == written * 6


@pytest.mark.parametrize(
    ("labels", "settings", "names"),
    [
        (["good", "bad"], {}, []),
        (["good", "GOOD", "bad"], {}, ["'GOOD', 'good'"]),
        (["New York", "new  york", "NewYork"], {}, ["'New York', 'NewYork', 'new  york'"]),
        (["caf\u00e9", "cafe\u0301", "x", "x\u200b"], {}, ["'cafe\\u0301', 'caf\\xe9'", "'x', 'x\\u200b'"]),
        (["NaN", "fine"], {}, ["'NaN'"]),
        (['"0,5"', '"1,5"'], {}, ["0,5"]),
        (["0.5", "1.5"], {}, ["task.regression=false"]),
        (["0.5", "1.5"], {"regression": True}, []),
        (["0.5", "1.5"], {"regression": False}, []),
        (["1", "2"], {}, []),
    ],
)
def test_classes_that_may_be_a_mistake_are_named(tmp_path: Path, labels: list, settings: dict, names: list) -> None:
    config = TaskConfig(name="own", path="files", modality="text", data_files=csv(tmp_path, labels * 20), **settings)
    found = sources.label_warnings(tasks.load(config).labels, config)
    assert len(found) == len(names)
    assert all(name in line and line.startswith("task=own: ") for name, line in zip(names, found, strict=True))


@pytest.mark.parametrize("missing", ["", "nan", "NaN", "inf"])
def test_a_row_without_a_label_is_named(tmp_path: Path, missing: str) -> None:
    for labels in (["dog", "cat"], ["1", "2"], ["1.0", "2.0"], ["0.5", "1.5"], ["True", "False"]):
        file = csv(tmp_path, [*labels * 2, missing, *labels * 4])
        if not missing or labels[0][0].isdigit():
            refused("task=own: row 5 of the train split ", of={"train": file, "test": file})


def test_a_label_that_no_training_row_has_is_named(tmp_path: Path) -> None:
    files = {"train": animals(tmp_path), "test": csv(tmp_path, ["cat", "wolf", "dog"])}
    refused("task=own: row 2 of the test split ", "wolf", "cat, dog", of=files)


# --- Data sets as the hub has them: images and classes with their own types, splits of any name.

LABELS = ("cat", "dog", "horse")


def rows(count: int, labels: tuple[str, ...] = LABELS, **columns: list) -> datasets.Dataset:
    generator = np.random.default_rng(count)
    pixels = list(generator.integers(0, 256, (count, 6, 8, 3), dtype=np.uint8))
    features = datasets.Features({"photo": datasets.Image(), "animal": datasets.ClassLabel(names=list(labels))})
    data = {"photo": pixels, "animal": [index % len(labels) for index in range(count)]}
    for name, values in columns.items():
        features[name], data[name] = datasets.ClassLabel(names=["a", "b"]), values
    return datasets.Dataset.from_dict(data, features=features)


def parquet(folder: Path, **splits: datasets.Dataset) -> dict[str, str]:
    for name, split in splits.items():
        split.to_parquet(folder / f"{name}.parquet")
    return {name: str(folder / f"{name}.parquet") for name in splits}


def pictures(split: datasets.Dataset) -> set[bytes]:
    return {image.tobytes() for image in split["image"]}


def test_files_stand_in_for_the_hub_whatever_their_columns_are_called(tmp_path: Path) -> None:
    task = load(parquet(tmp_path, train=rows(60), test=rows(30)), "image", validation_share=0.2)
    assert (sizes(task), task.labels, task.train.column_names) == ([48, 12, 30], LABELS, ["image", "label"])
    whole = load(parquet(tmp_path, train=rows(60), validation=rows(9), test=rows(30)), "image")
    assert sizes(whole) == [60, 9, 30]


def test_one_of_two_label_columns_has_to_be_named(tmp_path: Path) -> None:
    train = rows(20, labels=("cat", "dog"), coarse=[index % 2 for index in range(20)])
    paths = parquet(tmp_path, train=train, test=train)
    refused("task.label_column: ", "'coarse': 'ClassLabel'", of=paths, modality="image")
    assert load(paths, "image", label_column="coarse").labels == ("a", "b")
    types = "'photo': 'Image', 'animal': 'ClassLabel'"
    refused("task.image_column=img: ", types, of=paths, modality="image", image_column="img", label_column="animal")
    refused("task.label_column=photo: ", types, of=paths, modality="image", label_column="photo")


def test_labels_of_another_order_are_refused(tmp_path: Path) -> None:
    paths = parquet(tmp_path, train=rows(30), test=rows(30, labels=("dog", "cat", "horse")))
    refused("task=own: the test split ", "['dog', 'cat', 'horse']", of=paths, modality="image")


def test_a_test_split_that_is_not_there_or_is_trained_on_is_refused_and_validation_that_reports_does_not_select(
    tmp_path: Path,
) -> None:
    parquet(tmp_path, train=rows(60), validation=rows(21), test=rows(30))

    def of_hub(test_split: str) -> tasks.Task:
        return tasks.load(TaskConfig(name="animals", path=str(tmp_path), test_split=test_split))

    for split in ("tset", "train"):
        with refusal(f"task.test_split={split}: ", "test, validation"):
            of_hub(split)
    task = of_hub("validation")
    assert sizes(task) == [54, 6, 21]
    assert not pictures(task.validation) & pictures(task.test)
    assert not pictures(task.train) & pictures(task.validation)


def test_digits_come_in_three_fixed_disjoint_splits_and_keep_their_pixels() -> None:
    from sklearn.datasets import load_digits

    first, again, other = (
        tasks.load(TaskConfig(name="digits", path="bundled:digits", split_seed=seed)) for seed in (0, 0, 1)
    )
    assert (sizes(first), first.labels) == ([1293, 144, 360], tuple("0123456789"))
    training, validation, test = (pictures(split) for split in (first.train, first.validation, first.test))
    assert not (training | validation) & test
    assert not training & validation
    assert test == pictures(again.test) != pictures(other.test)
    whole, images = load_digits(), {}
    for image, label in zip(whole.images, whole.target, strict=True):
        images[np.round(image * 255 / 16).astype(np.uint8).tobytes()] = label
    assert [images[image.tobytes()] for image in first.test["image"]] == first.test["label"][:]


@pytest.mark.parametrize(
    ("separator", "encoding"), [(";", "utf-8"), ("\t", "utf-8-sig"), (",", "utf-16"), ("|", "utf-16")]
)
def test_a_csv_file_may_have_another_separator_and_any_unicode(tmp_path: Path, separator: str, encoding: str) -> None:
    file = tmp_path / "rows.csv"
    frame = pd.DataFrame({"text": [f"so süß, {number}" for number in range(12)], "label": ANIMALS})
    frame.to_csv(file, index=False, sep=separator, encoding=encoding)
    task = load(str(file), validation_share=0.25)
    assert task.labels == tuple(sorted(set(ANIMALS)))
    assert set(task.train["text"]) < set(frame["text"])


def test_a_column_of_few_values_beside_a_free_text_is_the_labels(tmp_path: Path) -> None:
    columns = {"id": range(12), "review": TEXTS, "stars": ["007", "7", "8"] * 4}
    file = table(tmp_path, "reviews.csv", **columns)
    assert load(file, validation_share=0.25).labels == ("007", "7", "8")  # as they are written, once it is known
    for others in ({"source": ["a", "b"] * 6}, {"stars": range(12)}):
        with refusal("task.label_column"):  # two of them, or none
            load(table(tmp_path, "other.csv", **columns | others), validation_share=0.25)


def test_labels_of_a_csv_file_are_words_where_those_of_the_training_rows_are(tmp_path: Path) -> None:
    """By itself a file whose labels are true and false alone has truths, and the training rows would not know them."""
    rows = {"train": "one,true\ntwo,false\nthree,half-true\n" * 12, "test": "four,true\nfive,false\n"}
    for split, lines in rows.items():
        (tmp_path / f"{split}.csv").write_text("text,label\n" + lines)
    files = {split: str(tmp_path / f"{split}.csv") for split in ("test", "train")}
    pd.read_csv(files["train"], dtype=str).to_parquet(tmp_path / "train.parquet")
    for train in (files["train"], str(tmp_path / "train.parquet")):
        task = load(files | {"train": train})
        assert task.labels == ("false", "half-true", "true")
        assert [task.labels[label] for label in task.test["label"]] == ["true", "false"]
