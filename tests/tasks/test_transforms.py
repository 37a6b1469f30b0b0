"""What a model reads of the rows: made once, kept whole or not at all, the same whichever way it is asked for."""

from __future__ import annotations

import logging
import threading
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from transformers import PreTrainedTokenizerFast

from partial_lora import tasks
from partial_lora.errors import PartialLoraError

BOUND = 2**20
PIXELS = {"image_size": 12, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "interpolation": "bicubic"}
WORDS = ("[PAD]", "[CLS]", "[SEP]", "[UNK]", "a", "film", "is", "good", "bad", "not", "very")
SENTENCES = ["a film", "a film is not very very good", "bad", "a very bad film is bad", "good a", "is it"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PARTIAL_LORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


def pictures(count: int = 10, seed: int = 0) -> datasets.Dataset:
    generator = np.random.default_rng(seed)
    sizes = generator.integers(10, 30, (count, 2))
    images = [Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]
    images[0], images[1] = images[0].convert("L"), images[1].convert("RGBA")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    data = {"image": images, "label": [index % 3 for index in range(count)]}
    return datasets.Dataset.from_dict(data, features=features, split=datasets.NamedSplit("train"))


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
    label = datasets.Value("float32") if real else datasets.ClassLabel(names=["neg", "pos"])
    data = {"text": SENTENCES} | ({"text_pair": SENTENCES[::-1]} if pairs else {})
    data["label"] = [0.5, 1.0, 2.25, -1.0, 0.0, 3.5] if real else [0, 1, 0, 0, 1, 1]
    features = datasets.Features(
        {name: datasets.Value("string") for name in data if name != "label"} | {"label": label}
    )
    return datasets.Dataset.from_dict(data, features=features)


def literal_pixels(rows: datasets.Dataset) -> torch.Tensor:
    """Every image through torchvision's own steps, one by one."""
    steps = v2.Compose(
        [
            v2.RGB(),
            v2.Resize(12, interpolation=v2.InterpolationMode("bicubic")),
            v2.CenterCrop(12),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(PIXELS["mean"], PIXELS["std"]),
        ]
    )
    return torch.stack([steps(image) for image in rows["image"]])


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) and first[name].dtype == second[name].dtype for name in first
    )


def forbid(monkeypatch: pytest.MonkeyPatch, kind: type, method: str) -> None:
    def called(*arguments: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(kind, method, called)


def test_pixels_are_the_literal_ones_whichever_way_they_are_asked_for() -> None:
    rows, transform = pictures(), tasks.ImageTransform(**PIXELS)
    expected = {"pixel_values": literal_pixels(rows), "labels": torch.tensor(rows["label"][:])}
    batches = transform.batches(rows, 4)
    assert [len(batch["labels"]) for batch in batches] == [4, 4, 2]
    assert same({name: torch.cat([batch[name] for batch in batches]) for name in expected}, expected)
    for bound in (BOUND, 0):
        prepared = transform.prepare(rows, cache_bytes=bound)
        assert same(transform.collate([prepared[index] for index in range(10)]), expected)
        assert same(transform.collate(prepared.__getitems__([7, 2])), {k: v[[7, 2]] for k, v in expected.items()})
    assert torch.equal(torch.stack(rows.with_transform(transform)[:]["pixel_values"]), expected["pixel_values"])
    assert same(transform.encode(rows["image"][:]), {"pixel_values": expected["pixel_values"]})


@pytest.mark.parametrize("bound", [BOUND, 0])
def test_workers_give_the_same_tensors(bound: int) -> None:
    rows, transform = pictures(), tasks.ImageTransform(**PIXELS)
    prepared = transform.prepare(rows, cache_bytes=bound)
    loaded = list(DataLoader(prepared, batch_size=4, num_workers=2, collate_fn=transform.collate))
    assert all(same(*pair) for pair in zip(loaded, transform.batches(rows, 4), strict=True))


def test_images_are_decoded_once_and_only_the_same_ones_are_found_again(cache: Path, monkeypatch) -> None:
    rows = pictures()
    first = tasks.ImageTransform(**PIXELS).prepare(rows, cache_bytes=BOUND)
    assert len(list(cache.iterdir())) == 2  # the entry and its lock
    same_settings = tasks.ImageTransform(**PIXELS | {"mean": [0.0] * 3})  # applied later
    with monkeypatch.context() as patched:
        forbid(patched, tasks.ImageTransform, "_decoded")
        assert same_settings.prepare(pictures(), cache_bytes=BOUND)[:] == first[:]
        for other in (
            lambda: same_settings.prepare(pictures(seed=1), cache_bytes=BOUND),
            lambda: same_settings.prepare(rows.select(range(9)), cache_bytes=BOUND),
            lambda: same_settings.prepare(rows.select([1, 0, *range(2, 10)]), cache_bytes=BOUND),
            lambda: tasks.ImageTransform(**PIXELS | {"image_size": 11}).prepare(rows, cache_bytes=BOUND),
            lambda: tasks.ImageTransform(**PIXELS | {"interpolation": "bilinear"}).prepare(rows, cache_bytes=BOUND),
        ):
            with pytest.raises(AssertionError, match="made again"):
                other()
    labels = rows.remove_columns("label").add_column("label", [0] * 10, feature=rows.features["label"])
    assert set(same_settings.prepare(labels, cache_bytes=BOUND)["label"]) == {0}


def test_past_the_bound_nothing_is_stored(cache: Path) -> None:
    rows, transform = pictures(), tasks.ImageTransform(**PIXELS)
    size = 10 * (3 * 12 * 12 + 8)
    transform.prepare(rows, cache_bytes=size - 1)
    tasks.TextTransform(tokenizer(), 8).prepare(texts(), cache_bytes=0)
    assert not cache.exists()
    transform.prepare(rows, cache_bytes=size)
    assert cache.exists()


@pytest.mark.parametrize("damage", ["truncated", "changed", "half-written"])
def test_a_damaged_file_is_named_and_made_again(cache: Path, caplog, damage: str) -> None:
    rows, transform = pictures(), tasks.ImageTransform(**PIXELS)
    expected = transform.prepare(rows, cache_bytes=BOUND)[:]
    (file,) = cache.glob("*/rows.arrow")
    content = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(content[: len(content) // 2])
    elif damage == "changed":
        middle = len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    else:
        (file.parent / "complete.json").unlink()
    with caplog.at_level(logging.WARNING):
        assert transform.prepare(rows, cache_bytes=BOUND)[:] == expected
    assert str(file.parent) in caplog.text
    assert file.read_bytes() == content


def test_what_ends_half_way_leaves_nothing_that_is_trusted(cache: Path, monkeypatch) -> None:
    rows, transform = pictures(300), tasks.ImageTransform(**PIXELS)
    decoded, calls = tasks.ImageTransform._decoded, []

    def interrupted(*arguments: object) -> dict:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return decoded(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(tasks.ImageTransform, "_decoded", interrupted)
        with pytest.raises(KeyboardInterrupt):
            transform.prepare(rows, cache_bytes=BOUND)
    assert not [path for path in cache.iterdir() if path.suffix != ".lock"]
    assert torch.equal(
        transform.collate(transform.prepare(rows, cache_bytes=BOUND).to_list())["pixel_values"], literal_pixels(rows)
    )


def test_two_that_ask_at_once_make_it_once(monkeypatch) -> None:
    rows, decoded, calls, found = pictures(), tasks.ImageTransform._decoded, [], []
    ready = threading.Barrier(2)

    def counted(*arguments: object) -> dict:
        calls.append(1)
        return decoded(*arguments)

    def ask(given: datasets.Dataset) -> None:
        ready.wait()
        found.append(tasks.ImageTransform(**PIXELS).prepare(given, cache_bytes=BOUND)[:])

    monkeypatch.setattr(tasks.ImageTransform, "_decoded", counted)
    threads = [threading.Thread(target=ask, args=(given,)) for given in (rows, pictures())]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    assert found[0] == found[1]


@pytest.mark.parametrize("damage", ["no image", "truncated"])
@pytest.mark.parametrize("stored", ["bytes", "file"])
def test_an_unreadable_image_is_named_before_any_training(tmp_path: Path, stored: str, damage: str) -> None:
    whole = pictures().cast_column("image", datasets.Image(decode=False))
    images = whole["image"][:]
    content = b"no image" if damage == "no image" else images[4]["bytes"][:-30]
    images[4] = {"bytes": content, "path": None}
    if stored == "file":
        (tmp_path / "fourth.png").write_bytes(content)
        images[4] = str(tmp_path / "fourth.png")
    data = {"image": images, "label": whole["label"][:]}
    features = datasets.Features({"image": datasets.Image(), "label": whole.features["label"]})
    rows = datasets.Dataset.from_dict(data, features=features, split=datasets.NamedSplit("test"))
    transform, cut = tasks.ImageTransform(**PIXELS), rows.select([0, 2, 4, 6, 8, 9])
    said = r"cannot be read: row 5 of its test rows" + (r", .*fourth\.png" if stored == "file" else r" \(")
    for bound in (BOUND, 0):
        with pytest.raises(PartialLoraError, match=said) as refusal:
            transform.prepare(cut, cache_bytes=bound)
        assert "\n" not in str(refusal.value)
    with pytest.raises(PartialLoraError, match=said):
        transform.batches(cut, 4)


def one_image(file: Path) -> datasets.Dataset:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a"])})
    return datasets.Dataset.from_dict({"image": [str(file)], "label": [0]}, features=features)


def grey(file: Path) -> list[int]:
    """What a file of 4 pixels is made of, the same whether it is kept, decoded each time or given as an image."""
    transform = tasks.ImageTransform(image_size=2, mean=[0.0] * 3, std=[1.0] * 3, interpolation="nearest")
    rows = one_image(file)
    made = [transform.collate([transform.prepare(rows, cache_bytes=bound)[0]]) for bound in (BOUND, 0)]
    made = [*made, *transform.batches(rows, 1), transform.encode([Image.open(file)])]
    pixels = [(batch["pixel_values"] * 255).round().int() for batch in made]
    assert all(torch.equal(pixels[0], other) for other in pixels)
    assert torch.equal(pixels[0][0, 0], pixels[0][0, 1])
    assert torch.equal(pixels[0][0, 0], pixels[0][0, 2])
    return pixels[0][0, 0].flatten().tolist()


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
    Image.fromarray(values.reshape(2, 2)).save(tmp_path / name)
    assert grey(tmp_path / name) == expected


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (np.array([0, 1, 200, 3], np.float32), r"mode F\) from 0\.0 to 200\.0, expected all within 0 and 1"),
        (np.array([0, np.nan, 0.5, 1], np.float32), r"from nan to nan, expected all within 0 and 1"),
        (np.array([0, 1, 70000, 3], np.int32), r"mode I\) from 0 to 70000, expected all within 0 and 65535"),
        (np.array([0, -1, 2, 3], np.int32), r"mode I\) from -1 to 3"),
    ],
)
def test_grey_without_a_known_white_is_refused(tmp_path: Path, values: np.ndarray, said: str) -> None:
    file = tmp_path / "a.tiff"
    Image.fromarray(values.reshape(2, 2)).save(file)
    for bound in (BOUND, 0):
        with pytest.raises(PartialLoraError, match=rf"row 1 of .*a\.tiff .*{said}"):
            tasks.ImageTransform(**PIXELS).prepare(one_image(file), cache_bytes=bound)
    with pytest.raises(ValueError, match=said):
        tasks.ImageTransform(**PIXELS).encode([Image.open(file)])


@pytest.mark.parametrize(
    ("kind", "mode", "options"),
    [("jpg", "RGB", {"progressive": True}), ("jpg", "L", {}), ("jpg", "CMYK", {})]
    + [(kind, "RGB", {}) for kind in ("jpg", "bmp", "tiff", "gif", "webp", "png")],
)
def test_an_image_cut_short_is_found_before_any_training(tmp_path: Path, kind: str, mode: str, options: dict) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 60, 3), dtype=np.uint8)
    file = tmp_path / f"a.{kind}"
    Image.fromarray(pixels).convert(mode).save(file, **options)
    transform = tasks.ImageTransform(**PIXELS)
    assert len(transform.prepare(one_image(file), cache_bytes=0)[0]["pixels"]) == 3 * 12 * 12
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    with pytest.raises(PartialLoraError, match=rf"cannot be read: row 1 of .*a\.{kind}"):
        transform.prepare(one_image(file), cache_bytes=0)


@pytest.mark.parametrize("real", [False, True])
@pytest.mark.parametrize("pairs", [False, True])
def test_tokens_are_those_of_the_tokenizer_padded_to_the_longest_of_the_batch(pairs: bool, real: bool) -> None:
    rows, transform = texts(pairs=pairs, real=real), tasks.TextTransform(tokenizer(), 8)
    given = (SENTENCES, SENTENCES[::-1]) if pairs else (SENTENCES,)
    for bound in (BOUND, 0):
        prepared = transform.prepare(rows, cache_bytes=bound)
        literal = tokenizer()(*given, truncation=True, max_length=8)["input_ids"]
        assert prepared["length"][:] == [len(tokens) for tokens in literal]
        for start, batch in zip((0, 4), transform.batches(rows, 4), strict=True):
            part = [column[start : start + 4] for column in given]
            expected = dict(tokenizer()(*part, truncation=True, max_length=8, padding=True, return_tensors="pt"))
            labels = rows["label"][start : start + 4]
            expected["labels"] = torch.tensor(labels, dtype=torch.float32 if real else torch.int64)
            collated = transform.collate([prepared[index] for index in range(start, min(start + 4, 6))])
            assert same(batch, expected)
            assert same(collated, expected)
            inputs = list(zip(*part, strict=True)) if pairs else part[0]
            assert same(transform.encode(inputs) | {"labels": expected["labels"]}, expected)


def test_texts_are_tokenised_once_and_only_by_the_same_tokenizer(monkeypatch) -> None:
    rows, asked = texts(pairs=True), tokenizer()
    first = tasks.TextTransform(asked, 8).prepare(rows, cache_bytes=BOUND)
    forbid(monkeypatch, tasks.TextTransform, "_tokenised")
    again = tasks.TextTransform(asked, 8)
    asked(SENTENCES, truncation=True, padding="max_length", max_length=5)  # leaves its mark on the tokenizer
    assert again.prepare(rows, cache_bytes=BOUND)[:] == first[:]
    other = tokenizer()
    other.add_tokens(["it"])
    for transform in (tasks.TextTransform(other, 8), tasks.TextTransform(asked, 7)):
        with pytest.raises(AssertionError, match="made again"):
            transform.prepare(rows, cache_bytes=BOUND)
    with pytest.raises(AssertionError, match="made again"):
        tasks.TextTransform(asked, 8).prepare(texts(), cache_bytes=BOUND)


def test_a_model_without_token_types_is_given_none() -> None:
    transform = tasks.TextTransform(tokenizer(pairs=False), 8)
    assert transform.prepare(texts(), cache_bytes=BOUND).column_names == ["input_ids", "length", "label"]
    assert set(transform.encode(["a film"])) == {"input_ids", "attention_mask"}


def test_only_texts_have_lengths() -> None:
    assert (tasks.ImageTransform(**PIXELS).lengths, tasks.TextTransform(tokenizer(), 8).lengths) == (False, True)
