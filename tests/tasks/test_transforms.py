"""Inputs that a model reads of rows: the literal ones in every way of making them, made once; or the row at fault."""

from __future__ import annotations

import logging
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from refusals import refusal
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from transformers import PreTrainedTokenizerFast

from partial_lora import tasks

BOUND = 2**20
PIXELS = {"image_size": 12, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic"}
WORDS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "film", "is", "good", "bad", "not", "very")
SENTENCES = ["a film", "a film is not very very good", "bad", "a very bad film is bad", "good a", "is it"]
IMAGES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
pytestmark = pytest.mark.usefixtures("cache")


def of_images(*images: object, split: str = "train") -> datasets.Dataset:
    data = {"image": list(images), "label": [index % 3 for index in range(len(images))]}
    return datasets.Dataset.from_dict(data, features=IMAGES, split=datasets.NamedSplit(split))


def pictures(seed: int = 0) -> datasets.Dataset:
    generator = np.random.default_rng(seed)
    sizes = generator.integers(10, 30, (10, 2))
    images = [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    modes = ("L", "RGBA", "P", "LA", "1", "CMYK")
    return of_images(*(image.convert(mode) for image, mode in zip(images, modes, strict=False)), *images[len(modes) :])


def tokenizer(pairs: bool = True) -> PreTrainedTokenizerFast:
    fast = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="[UNK]"))
    fast.pre_tokenizer = pre_tokenizers.Whitespace()
    fast.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = ["input_ids", "token_type_ids", "attention_mask"] if pairs else ["input_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=fast, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", model_input_names=names
    )


def texts(*, pairs: bool = False, real: bool = False) -> datasets.Dataset:
    columns = {"text": SENTENCES} | ({"text_pair": SENTENCES[::-1]} if pairs else {})
    features = datasets.Features(dict.fromkeys(columns, datasets.Value("string")))
    features["label"] = datasets.Value("float32") if real else datasets.ClassLabel(names=["neg", "pos"])
    labels = [0.5, 1.0, 2.25, -1.0, 0.0, 3.5] if real else [0, 1, 0, 0, 1, 1]
    return datasets.Dataset.from_dict(columns | {"label": labels}, features=features)


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first
    )


def forbid(monkeypatch: pytest.MonkeyPatch, kind: type, method: str) -> None:
    def called(*arguments: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(kind, method, called)


def test_pixels_are_those_of_torchvision_in_every_way_of_making_them() -> None:
    rows, transform = pictures(), tasks.ImageTransform(**PIXELS)
    size = PIXELS["image_size"]
    steps = [v2.RGB(), v2.Resize(size, interpolation=v2.InterpolationMode("bicubic")), v2.CenterCrop(size)]
    steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(PIXELS["mean"], PIXELS["std"])]
    pixels = torch.stack([v2.Compose(steps)(image) for image in rows["image"]])
    expected = {"pixel_values": pixels, "labels": torch.tensor(rows["label"][:])}
    parts = [{name: value[start : start + 4] for name, value in expected.items()} for start in (0, 4, 8)]
    assert all(same(*pair) for pair in zip(transform.batches(rows, 4), parts, strict=True))
    for bound in (BOUND, 0):
        prepared = transform.prepare(rows, cache_bytes=bound)
        assert transform.lengths == ("length" in prepared.column_names)
        assert same(transform.collate(prepared.__getitems__([7, 2])), {k: v[[7, 2]] for k, v in expected.items()})
        workers = DataLoader(prepared, batch_size=4, num_workers=2, collate_fn=transform.collate)
        assert [same(*pair) for pair in zip(workers, parts, strict=True)] == [True] * 3
    assert same(transform.encode(rows["image"][:]), {"pixel_values": pixels})


def test_images_are_decoded_once_and_again_for_all_that_makes_others(cache: Path, monkeypatch) -> None:
    rows = pictures()
    first = tasks.ImageTransform(**PIXELS).prepare(rows, cache_bytes=BOUND)
    assert len(list(cache.iterdir())) == 2  # the entry and its lock
    transform = tasks.ImageTransform(**PIXELS | {"mean": [0.0] * 3})  # applied later
    with monkeypatch.context() as patched:
        forbid(patched, tasks.ImageTransform, "_decoded")
        assert transform.prepare(pictures(), cache_bytes=BOUND)[:] == first[:]
        for other, settings in (
            (pictures(seed=1), {}),
            (rows.select(range(9)), {}),
            (rows.select([1, 0, *range(2, 10)]), {}),
            (rows, {"image_size": 11}),
            (rows, {"interpolation": "bilinear"}),
        ):
            with pytest.raises(AssertionError, match="made again"):
                tasks.ImageTransform(**PIXELS | settings).prepare(other, cache_bytes=BOUND)
    labels = rows.remove_columns("label").add_column("label", [0] * 10, feature=rows.features["label"])
    assert set(transform.prepare(labels, cache_bytes=BOUND)["label"]) == {0}


def test_images_that_are_shrunk_far_are_said_with_the_key(tmp_path: Path) -> None:
    for factor, bound in ((2, BOUND), (3, BOUND), (3, 0)):
        transform = tasks.ImageTransform(**PIXELS)
        transform.prepare(of_images(*[Image.new("RGB", (12 * factor, 100))] * 3), cache_bytes=bound)
        assert [line.split(":")[0] for line in transform.warnings] == ["model.image_size=12"] * (factor == 3)


def test_past_the_bound_nothing_is_stored(cache: Path) -> None:
    rows, transform = pictures(), tasks.ImageTransform(**PIXELS)
    size = 10 * (3 * 12 * 12 + 8)
    transform.prepare(rows, cache_bytes=size - 1)
    tasks.TextTransform(tokenizer(), 8).prepare(texts(), cache_bytes=0)
    assert not cache.exists()
    transform.prepare(rows, cache_bytes=size)
    assert cache.exists()


def test_a_damaged_file_is_named_and_made_again(cache: Path, caplog) -> None:  # all damage: tests/test_files.py
    rows, transform = pictures(), tasks.ImageTransform(**PIXELS)
    expected = transform.prepare(rows, cache_bytes=BOUND)[:]
    (file,) = cache.glob("*/rows.arrow")
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with caplog.at_level(logging.WARNING):
        assert transform.prepare(rows, cache_bytes=BOUND)[:] == expected
    assert str(file.parent) in caplog.text
    assert file.read_bytes() == content


def unreadable(name: str, rows: datasets.Dataset) -> None:
    """Assert that neither way of preparing rows, nor a draw, takes an image that is named instead."""
    transform = tasks.ImageTransform(**PIXELS)
    for make in (
        lambda: transform.prepare(rows, cache_bytes=BOUND),
        lambda: transform.prepare(rows, cache_bytes=0),
        lambda: transform.batches(rows, 4),
    ):
        with refusal(f".*{name}"):
            make()


@pytest.mark.parametrize("content", [b"no image", None])
def test_an_unreadable_image_is_named_by_its_row_and_file_before_any_training(tmp_path: Path, content) -> None:
    images = pictures().cast_column("image", datasets.Image(decode=False))["image"][:]
    content = content or images[4]["bytes"][:-30]
    (tmp_path / "fourth.png").write_bytes(content)
    for image, name in (({"bytes": content, "path": None}, r" \("), (str(tmp_path / "fourth.png"), r", .*fourth\.png")):
        rows = of_images(*images[:4], image, *images[5:], split="test")
        unreadable("row 5 of its test rows" + name, rows.select([0, 2, 4, 6, 8, 9]))


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [("jpg", "RGB", {"progressive": True}), ("jpg", "L", {}), ("jpg", "CMYK", {})]
    + [(kind, "RGB", {}) for kind in ("jpg", "bmp", "tiff", "gif", "webp", "png")],
)
def test_an_image_cut_short_is_noticed_before_any_training(tmp_path: Path, kind: str, mode: str, options: dict) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 60, 3), dtype=np.uint8)
    file = tmp_path / f"a.{kind}"
    Image.fromarray(pixels).convert(mode).save(file, **options)
    whole = tasks.ImageTransform(**PIXELS).prepare(of_images(str(file)), cache_bytes=0)
    assert len(whole[0]["pixels"]) == 3 * 12 * 12
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    unreadable(rf"row 1 of .*a\.{kind}", of_images(str(file)))


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("a.png", np.array([0, 255, 256, 65535], np.uint16), [0, 0, 1, 255]),
        ("a.tiff", np.array([0, 1000, 32896, 65535], np.uint16), [0, 3, 128, 255]),
        ("a.tiff", np.array([0, 1000, 32896, 65535], ">u2"), [0, 3, 128, 255]),
        ("a.pgm", np.array([0, 1000, 32896, 65535], np.uint16), [0, 3, 128, 255]),
        ("a.pgm", np.array([0, 255, 100, 17], np.uint16), [0, 0, 0, 0]),
        ("a.tiff", np.array([0, 1000, 32896, 65535], np.int32), [0, 3, 128, 255]),
        ("a.tiff", np.array([0, 7, 100, 255], np.int32), [0, 7, 100, 255]),
        ("a.tiff", np.array([0, 0.25, 0.5, 1], np.float32), [0, 64, 128, 255]),
        ("a.png", np.array([0, 7, 100, 255], np.uint8), [0, 7, 100, 255]),
    ],
)
def test_grey_of_any_depth_keeps_its_shades(tmp_path: Path, name: str, values: np.ndarray, expected: list) -> None:
    file = tmp_path / name
    Image.fromarray(values.reshape(2, 2)).save(file)
    transform = tasks.ImageTransform(image_size=2, mean=[0.0] * 3, std=[1.0] * 3, interpolation="nearest")
    rows = of_images(str(file))
    batches = [transform.collate([transform.prepare(rows, cache_bytes=bound)[0]]) for bound in (BOUND, 0)]
    for batch in (*batches, *transform.batches(rows, 1), transform.encode([Image.open(file)])):
        shades = (batch["pixel_values"] * 255).round().int().flatten(2)
        assert shades.tolist() == [[expected] * 3]


@pytest.mark.parametrize(
    ("values", "span"),
    [
        (np.array([0, 1, 200, 3], np.float32), "from 0.0 to 200.0, expected all within 0 and 1"),
        (np.array([0, np.nan, 0.5, 1], np.float32), "from nan to nan, expected all within 0 and 1"),
        (np.array([0, 1, 70000, 3], np.int32), "from 0 to 70000, expected all within 0 and 65535"),
        (np.array([0, -1, 2, 3], np.int32), "from -1 to 3, expected all within 0 and 65535"),
    ],
)
def test_grey_without_a_known_white_is_refused(tmp_path: Path, values: np.ndarray, span: str) -> None:
    file = tmp_path / "a.tiff"
    Image.fromarray(values.reshape(2, 2)).save(file)
    unreadable(rf"row 1 of .*a\.tiff .*{span}", of_images(str(file)))
    with pytest.raises(ValueError, match=span):
        tasks.ImageTransform(**PIXELS).encode([Image.open(file)])


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("pairs", [False, True])
def test_tokens_are_those_of_the_tokenizer_padded_to_the_longest_of_the_batch(pairs: bool, real: bool) -> None:
    rows, transform = texts(pairs=pairs, real=real), tasks.TextTransform(tokenizer(), 8)
    columns = (SENTENCES, SENTENCES[::-1]) if pairs else (SENTENCES,)
    for bound in (BOUND, 0):
        prepared = transform.prepare(rows, cache_bytes=bound)
        assert transform.lengths  # by which batches are grouped
        tokens = tokenizer()(*columns, truncation=True, max_length=8)["input_ids"]
        assert prepared["length"][:] == [len(each) for each in tokens]
        for start, batch in zip((0, 4), transform.batches(rows, 4), strict=True):
            part = [column[start : start + 4] for column in columns]
            expected = dict(tokenizer()(*part, truncation=True, max_length=8, padding=True, return_tensors="pt"))
            labels = rows["label"][start : start + 4]
            expected["labels"] = torch.tensor(labels, dtype=torch.float32 if real else torch.int64)
            assert same(batch, expected)
            assert same(transform.collate(prepared.select(range(start, min(start + 4, 6))).to_list()), expected)
            inputs = list(zip(*part, strict=True)) if pairs else part[0]
            assert same(transform.encode(inputs) | {"labels": expected["labels"]}, expected)


def test_texts_that_are_cut_are_counted_in_one_warning() -> None:
    """[CLS] and [SEP] leave room for five words: two of six sentences have more, and four of six pairs."""
    for pairs, warned in ((False, "6 of 18 texts (33%)"), (True, "12 of 18 texts (67%)")):
        transform = tasks.TextTransform(tokenizer(), 7)
        assert transform.warnings == []
        for bound in (BOUND, BOUND, 0):  # made, then read, then in memory
            transform.prepare(texts(pairs=pairs), cache_bytes=bound)
        (warning,) = transform.warnings
        assert warning.startswith(f"model.max_length=7: {warned}")
    whole = tasks.TextTransform(tokenizer(), 10)
    whole.prepare(texts(), cache_bytes=0)
    assert whole.warnings == []  # the longest fits to the last token


def test_texts_are_tokenised_once_and_only_by_the_same_tokenizer(monkeypatch) -> None:
    rows, own, other = texts(pairs=True), tokenizer(), tokenizer()
    first = tasks.TextTransform(own, 8).prepare(rows, cache_bytes=BOUND)
    forbid(monkeypatch, tasks.TextTransform, "_tokenised")
    again = tasks.TextTransform(own, 8)
    own(SENTENCES, truncation=True, padding="max_length", max_length=5)  # leaves its mark on the tokenizer
    assert again.prepare(rows, cache_bytes=BOUND)[:] == first[:]
    other.add_tokens(["it"])
    for words, length, others in ((other, 8, rows), (own, 7, rows), (own, 8, texts())):
        with pytest.raises(AssertionError, match="made again"):
            tasks.TextTransform(words, length).prepare(others, cache_bytes=BOUND)


def test_a_model_without_token_types_is_given_none() -> None:
    transform = tasks.TextTransform(tokenizer(pairs=False), 8)
    assert transform.prepare(texts(), cache_bytes=BOUND).column_names == ["input_ids", "length", "cut", "label"]
    assert set(transform.encode(["a film"])) == {"input_ids", "attention_mask"}
