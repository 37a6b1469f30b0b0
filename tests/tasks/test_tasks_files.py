"""The user's own files: every kind of them, labels that are found, and one line for whatever is wrong."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from partial_lora import tasks
from partial_lora.errors import PartialLoraError

TEXTS = [f"text number {number}" for number in range(12)]
ANIMALS = ["dog", "cat"] * 6


def load(data_files: object, modality: str = "text", **named: object) -> tasks.Task:
    return tasks.load(name="own", path="files", data_files=data_files, modality=modality, **named)


def table(folder: Path, name: str, **columns: list) -> str:
    frame, file = pd.DataFrame(columns), folder / name
    if file.suffix in (".csv", ".tsv"):
        frame.to_csv(file, index=False, sep="," if file.suffix == ".csv" else "\t")
    elif file.suffix == ".parquet":
        frame.to_parquet(file)
    elif file.suffix == ".json":
        file.write_text(json.dumps(frame.to_dict("records")))
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in frame.to_dict("records")))
    return str(file)


def csv(folder: Path, labels: list[str], name: str = "written.csv") -> str:
    """A csv file with labels as they are written here."""
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


def refused(match: str, *given: object, **named: object) -> None:
    with pytest.raises(PartialLoraError, match=match) as refusal:
        load(*given, **named)
    assert "\n" not in str(refusal.value)


def test_a_cache_that_cannot_be_written_is_not_taken_for_a_broken_file(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/dev/null/datasets")
    refused(r"task\.data_files\.train=.*/dev/null.*HF_HOME", {"train": table(tmp_path, "own.parquet", text=["a"])})


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_a_table_of_any_kind_gives_the_same_rows(tmp_path: Path, kind: str) -> None:
    texts = ['with, comma and "quotes"', "NA", "None", "12", "tab\tand line\nbreak", "naïve"]
    train = table(tmp_path, f"train.{kind}", words=texts * 4, label=["b", "a"] * 12)
    test = table(tmp_path, f"test.{kind}", words=texts[:2], label=["a", "b"])
    task = load({"train": train, "test": test}, validation_share=0.25)
    assert (task.labels, task.modality, task.metrics) == (("a", "b"), "text", ("accuracy",))
    assert task.train.features == datasets.Features(
        text=datasets.Value("string"), label=datasets.ClassLabel(names=["a", "b"])
    )
    assert (task.test["text"][:], task.test["label"][:]) == (texts[:2], [0, 1])
    assert Counter([*task.train["text"], *task.validation["text"]]) == Counter(texts * 4)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["pear", "apple", "fig"], ("apple", "fig", "pear")),
        ([10, 9, -2], ("-2", "9", "10")),
        ([True, False, True], ("False", "True")),
    ],
)
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_labels_are_found_in_their_order(tmp_path: Path, kind: str, labels: list, names: tuple[str, ...]) -> None:
    train = table(tmp_path, f"train.{kind}", text=TEXTS, label=labels * 4)
    task = load({"train": train, "test": train}, validation_share=0.25)
    assert task.labels == names
    assert [task.labels[number] for number in task.test["label"]] == [str(label) for label in labels * 4]


def test_fractions_are_regression_unless_they_are_said_to_be_classes(tmp_path: Path) -> None:
    train = table(tmp_path, "train.csv", text=TEXTS, score=[0.5, 2.0, 3.25] * 4)
    task = load({"train": train, "test": train}, label_column="score")
    assert (task.labels, task.metrics) == ((), ("pearson",))
    assert task.test["label"][:3] == [0.5, 2.0, 3.25]
    assert [len(split) for split in (task.train, task.validation)] == [10, 2]
    classes = load({"train": train, "test": train}, label_column="score", regression=False, validation_share=0.25)
    assert classes.labels == ("0.5", "2", "3.25")
    whole = table(tmp_path, "whole.csv", text=TEXTS, label=[1, 2, 3] * 4)
    assert load({"train": whole, "test": whole}, regression=True, metrics=["mse"]).train.features["label"].dtype == (
        "float32"
    )
    refused(
        "real numbers, expected some of pearson, spearman, mse, not f1", train, label_column="score", metrics=["f1"]
    )
    refused(
        "task=own: row 1 of the train split has the label 'dog', expected a number", _texts(tmp_path), regression=True
    )


def _texts(folder: Path, **columns: list) -> str:
    return table(folder, "texts.csv", **({"text": TEXTS, "label": ANIMALS} | columns))


def test_one_file_is_cut_into_three_splits_with_every_class_in_each(tmp_path: Path) -> None:
    file = table(tmp_path, "all.csv", text=[f"text {number}" for number in range(100)], label=["a", "b"] * 50)
    task = load(file)
    assert [Counter(split["label"]) for split in (task.train, task.validation, task.test)] == [
        {0: 36, 1: 36},
        {0: 4, 1: 4},
        {0: 10, 1: 10},
    ]
    assert len({*task.train["text"], *task.validation["text"], *task.test["text"]}) == 100
    assert load(file).test["text"][:] == task.test["text"][:] != load(file, split_seed=1).test["text"][:]


def test_samples_are_of_every_class_and_taken_before_validation(tmp_path: Path) -> None:
    train = table(tmp_path, "train.csv", text=[f"text {number}" for number in range(300)], label=["a", "a", "b"] * 100)
    test = table(tmp_path, "test.csv", text=[f"test {number}" for number in range(30)], label=["a", "b"] * 15)
    task = load({"train": train, "test": test}, train_samples=60, test_samples=10)
    counts = [Counter(split["label"]) for split in (task.train, task.validation, task.test)]
    assert counts == [{0: 36, 1: 18}, {0: 4, 1: 2}, {0: 5, 1: 5}]
    assert load({"train": train, "test": test}, train_samples=10**6).train.num_rows == 270
    refused("task.train_samples=1: expected at least one row for each of 2 classes", train, train_samples=1)


def test_pairs_of_texts_keep_their_order(tmp_path: Path) -> None:
    file = table(tmp_path, "pairs.jsonl", a=TEXTS, b=TEXTS[::-1], label=ANIMALS)
    task = load({"train": file, "test": file}, text_columns=["b", "a"])
    assert (task.test["text"][:], task.test["text_pair"][:]) == (TEXTS[::-1], TEXTS)
    refused(r"task\.text_columns: the train split of own .* has 2 columns of texts.*'a': 'string', 'b': 'string'", file)
    refused(r"task\.text_columns=c: .* has no such column of texts.*'a': 'string'", file, text_columns=["c"])
    refused(r"task\.text_columns=\['a', 'a'\]: expected different columns", file, text_columns=["a", "a"])
    for columns in (["label"], ["a", "label"]):
        refused("task.text_columns=label: .* has its labels there, expected a column of te", file, text_columns=columns)
    refused(
        "task.image_column=label: .* has its labels there, expected a column of images",
        file,
        "image",
        image_column="label",
    )


def test_texts_that_look_like_numbers_stay_as_they_are(tmp_path: Path) -> None:
    file = table(tmp_path, "codes.csv", code=["007", "1e3"] * 6, label=ANIMALS)
    assert load({"train": file, "test": file}, text_columns=["code"]).test["text"][:2] == ["007", "1e3"]


def test_images_are_found_by_path_from_the_table_s_own_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = [f"pictures/{number}.png" for number in range(12)]
    for number, name in enumerate(names):
        picture(tmp_path / "data" / name, grey=20 * number)
    file = table(tmp_path / "data", "train.csv", file=names, label=ANIMALS)
    task = load({"train": file, "test": file}, "image")
    assert [np.asarray(image)[0, 0] for image in task.test["image"]] == [20 * number for number in range(12)]
    absolute = table(tmp_path, "other.csv", file=[str(tmp_path / "data" / name) for name in names], label=ANIMALS)
    assert load({"train": absolute, "test": absolute}, "image").test[3]["image"].size == (6, 8)
    lost = table(tmp_path, "lost.csv", file=names, label=ANIMALS)
    refused(r"row 1 of the test split: no such image file, .*0\.png", {"train": file, "test": lost}, "image")


def test_images_are_read_from_bytes_with_or_without_the_library_s_own_marks(tmp_path: Path) -> None:
    stored = [Path(picture(tmp_path / f"{number}.png", grey=number)).read_bytes() for number in range(12)]
    plain = table(tmp_path, "plain.parquet", data=stored, label=ANIMALS)
    pairs = table(
        tmp_path,
        "pairs.parquet",
        data=[{"bytes": each, "path": None} for each in stored[:-1]] + [{"bytes": stored[-1], "path": "named.png"}],
        label=ANIMALS,
    )
    for file in (plain, pairs):
        task = load({"train": file, "test": file}, "image")
        assert [np.asarray(image)[0, 0] for image in task.test["image"]] == list(range(12))


def test_a_folder_gives_its_sub_folders_as_classes(tmp_path: Path) -> None:
    whole = Path(images(tmp_path / "whole", "wolf", "fox", count=10))
    (whole / "wolf" / "notes.txt").write_text("not an image")
    (whole / "fox" / ".hidden.png").write_text("not an image")
    task = load(str(whole), "image")
    assert task.labels == ("fox", "wolf")
    assert [Counter(split["label"]) for split in (task.train, task.validation, task.test)] == [
        {0: 7, 1: 7},
        {0: 1, 1: 1},
        {0: 2, 1: 2},
    ]
    for split, count in (("train", 4), ("val", 2), ("test", 3)):
        images(tmp_path / "parts" / split, "wolf", "fox", count=count)
    parts = load(str(tmp_path / "parts"), "image")
    named = {split: str(tmp_path / "parts" / folder) for split, folder in
             (("train", "train"), ("validation", "val"), ("test", "test"))}  # fmt: skip
    for task in (parts, load(named, "image")):
        assert [len(split) for split in (task.train, task.validation, task.test)] == [8, 4, 6]
    refused(
        "no image in any sub-folder, expected one sub-folder a class", str(tmp_path / "parts" / "test" / "fox"), "image"
    )


def test_a_folder_of_splits_without_train_is_not_taken_for_classes(tmp_path: Path) -> None:
    for folder in ("training", "test"):
        images(tmp_path / "tests" / folder, "wolf", "fox")
    refused(
        r"task\.data_files=.*tests: it has a folder test but none called train, only test, training; call",
        str(tmp_path / "tests"),
        "image",
    )
    assert load({"train": str(tmp_path / "tests")}, "image", validation_share=0.2).labels == ("test", "training")
    for folder in ("Train", "Val"):
        images(tmp_path / "capitals" / folder, "wolf", "fox")
    refused("it has a folder Train but none called train, only Train, Val", str(tmp_path / "capitals"), "image")
    for folder in ("train", "val", "validation"):
        images(tmp_path / "twice" / folder, "wolf", "fox")
    refused("it has the folders val and validation, expected one of them", str(tmp_path / "twice"), "image")


def test_a_column_that_is_not_there_is_named_with_those_there_are(tmp_path: Path) -> None:
    file = _texts(tmp_path)
    refused(
        r"task\.label_column=kind: .* of own .* has no such column of labels.*'text': 'string', 'label': 'string'",
        file,
        label_column="kind",
    )
    unlabelled = table(tmp_path, "unlabelled.csv", text=TEXTS)
    said = r"the {} split of own \(.*unlabelled\.csv\) has no column of labels, none called label; .*'text': 'string'"
    refused(rf"task\.label_column: {said.format('train')}", unlabelled)
    refused(rf"task\.label_column: {said.format('test')}", {"train": file, "test": unlabelled})
    lists = table(tmp_path, "lists.jsonl", text=TEXTS, label=[["a"]] * 12)
    refused(r"lists\.jsonl\) has no column of labels; name one of its columns, .*'label': 'List'", lists)
    numbers = table(tmp_path, "numbers.csv", number=range(12), label=ANIMALS)
    refused(r"task\.text_columns: .*numbers\.csv\) has no column of texts; name one of .*'number': 'int64'", numbers)


def test_a_label_that_no_training_row_has_is_named(tmp_path: Path) -> None:
    test = table(tmp_path, "test.csv", text=TEXTS[:3], label=["cat", "wolf", "dog"])
    files = {"train": _texts(tmp_path), "test": test}
    refused("row 2 of the test split has the label wolf, which no training row has; those there are: cat, dog", files)


@pytest.mark.parametrize("missing", ["", "nan", "NaN", "inf"])
def test_a_row_without_a_label_is_named(tmp_path: Path, missing: str) -> None:
    for labels in (["dog", "cat"], ["1", "2"], ["1.0", "2.0"], ["0.5", "1.5"], ["True", "False"]):
        file = csv(tmp_path, [*labels * 2, missing, *labels * 4])
        if not missing or labels[0][0].isdigit():
            refused("task=own: row 5 of the train split has no label", {"train": file, "test": file})


def test_words_that_mean_nothing_elsewhere_are_words_among_words(tmp_path: Path) -> None:
    names = ("NA", "NaN", "None", "inf", "nan", "null")
    file = csv(tmp_path, [*names] * 4)
    assert load({"train": file, "test": file}, validation_share=0.25).labels == names
    kept = table(tmp_path, "kept.parquet", text=TEXTS, label=["nan", "pita"] * 6)
    assert load({"train": kept, "test": kept}).labels == ("nan", "pita")


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["10", "9", "-2"], ("-2", "9", "10")),
        (["10.0", "9.0"], ("9", "10")),
        (["+1", "-1"], ("-1", "1")),
        ([" 10", "9"], ("9", "10")),
        (["007", "07", "7"], ("007", "07", "7")),
        (["01", "10"], ("01", "10")),
        (["1", "1.0"], ("1", "1.0")),
        (["0", "-0"], ("-0", "0")),
        (["1e3", "10"], ("10", "1e3")),
        (["1.0", "one"], ("1.0", "one")),
        (["9223372036854775807", "1"], ("1", "9223372036854775807")),
        (["9223372036854775808", "1"], ("1", "9223372036854775808")),
        (["9007199254740993.0", "1.0"], ("1.0", "9007199254740993.0")),
        (["True", "false"], ("False", "True")),
        (["True", "1"], ("1", "True")),
    ],
)
def test_what_is_written_in_a_table_is_a_number_where_that_loses_nothing(
    tmp_path: Path, labels: list[str], names: tuple[str, ...]
) -> None:
    file = csv(tmp_path, labels * 6)
    task = load({"train": file, "test": file}, validation_share=0.25)
    assert (task.labels, task.metrics) == (names, ("accuracy",))
    written = [label.strip() for label in labels]
    if all(label in names for label in written):
        assert [names[number] for number in task.test["label"]] == written * 6


@pytest.mark.parametrize("labels", [["0.5", "0.50", "2"], ["1e-3", "1"], [".5", "1."], ["-1.25", "3.800"]])
def test_fractions_are_real_however_they_are_written(tmp_path: Path, labels: list[str]) -> None:
    file = csv(tmp_path, labels * 6)
    task = load({"train": file, "test": file})
    assert (task.labels, task.metrics) == ((), ("pearson",))
    assert task.test["label"][:] == pytest.approx([float(label) for label in labels] * 6)
    words = load({"train": file, "test": file}, regression=False, validation_share=0.25)
    assert len(words.labels) == len(set(labels))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_whole_numbers_are_classes_though_written_as_floats(tmp_path: Path, kind: str) -> None:
    file = table(tmp_path, f"own.{kind}", text=TEXTS, label=[0.0, 1.0] * 6)
    task = load({"train": file, "test": file})
    assert (task.labels, task.metrics, task.test["label"][:2]) == (("0", "1"), ("accuracy",), [0, 1])
    real = load({"train": file, "test": file}, regression=True)
    assert (real.labels, real.metrics, real.test["label"][:2]) == ((), ("pearson",), [0.0, 1.0])
    codes = csv(tmp_path, ["007", "7", "1e1"] * 4)
    assert load({"train": codes, "test": codes}, regression=True).test["label"][:3] == [7.0, 7.0, 10.0]
    mixed = {"train": file, "test": csv(tmp_path, ["0", "1"] * 6, "whole.csv")}
    assert load(mixed).test["label"][:2] == [0, 1]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_a_row_without_a_text_or_an_image_is_named(tmp_path: Path, kind: str) -> None:
    file = table(tmp_path, f"texts.{kind}", text=[*TEXTS[:2], None, *TEXTS[3:]], label=ANIMALS)
    refused(r"task=own: row 3 of the train split has no text \(column text\)", file)
    refused(r"task=own: row 3 of the train split has no image \(column text\)", file, "image")


def test_a_class_of_one_row_is_named(tmp_path: Path) -> None:
    file = _texts(tmp_path, label=["wolf", *ANIMALS[1:]])
    said = "rows aside per class: class wolf has a single example"
    refused(rf"cannot set 10% of 12 {said}; a cut needs at least 2 rows of a class", {"train": file, "test": file})
    refused(rf"cannot set 20% of 12 {said}; two cuts, test and validation, need at least 3 rows of a class", file)


def test_a_class_that_earlier_cuts_left_one_row_of_is_said_with_what_it_had(tmp_path: Path) -> None:
    labels = [*["a", "b"] * 50, "c", "c", "c"]
    assert len(load(csv(tmp_path, labels), split_seed=0).labels) == 3
    left = r"class c \(of {}\) has a single row left after {}; two cuts, test and validation, need at least 3 rows of a"
    with pytest.raises(PartialLoraError, match=left.format(2, "the test split was cut off")):
        [load(csv(tmp_path, labels[:-1]), split_seed=seed) for seed in range(20)]  # until test takes one of the two
    drawn = "the test split was cut off and task.train_samples=20 rows were drawn"
    refused(left.format(3, drawn), csv(tmp_path, labels), train_samples=20)


def test_a_split_without_rows_is_named(tmp_path: Path) -> None:
    empty = tmp_path / "empty.csv"
    empty.write_text("text,label\n")
    refused("task=own: the test split is empty", {"train": _texts(tmp_path), "test": str(empty)})


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("gone.csv", None, "no such file"),
        ("empty.csv", b"", "the file is empty"),
        ("ragged.csv", b"text,label\na,b\nc,d,e,f\n", "expected a csv file"),
        ("latin.csv", b"text,label\ncaf\xe9,b\n", "expected a csv file"),
        ("broken.jsonl", b'{"text": "a", "label": 1}\n{"text":\n', r"expected a jsonl file .*line 2 is no JSON object"),
        ("mixed.jsonl", b'{"text": "a"}\n{"text": 3}\n', r"column text has values of several types"),
        ("list.json", b"[1, 2]", "not every row is an object"),
        ("broken.parquet", b"PAR1 no more", "expected a parquet file"),
        ("table.xlsx", b"PK", "expected a parquet, csv, tsv, json or jsonl file"),
    ],
)  # fmt: skip
def test_a_file_that_is_not_what_it_should_be_is_named(
    tmp_path: Path, name: str, content: bytes | None, said: str
) -> None:
    file = tmp_path / name
    if content is not None:
        file.write_bytes(content)
    refused(rf"task\.data_files\.test=.*{name}: .*{said}", {"train": _texts(tmp_path), "test": str(file)})
