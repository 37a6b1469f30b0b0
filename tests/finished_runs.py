"""Finished runs of tiny models, each trained once for all tests that only look at it."""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import shutil
import tempfile
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from partial_lora import files as sealed
from partial_lora import train
from partial_lora.finished.run import FinishedRun, finished_run
from partial_lora.launching import directory as record
from partial_lora.settings.compose import composed
from partial_lora.settings.versions import plain

COLOURS = ("red", "green", "blue")
SHORT = ("trainer.max_steps=12", "trainer.device=cpu", "trainer.learning_rate=0.01", "trainer.eval_batch_size=8")
SHORT += ("calibration.levels=0.3",)  # where there is a calibration: three in place of nineteen
_PLACE = tempfile.TemporaryDirectory(prefix="partial-lora-tests-")  # gone when the interpreter ends

datasets.disable_progress_bars()  # as the commands do in a process of their own


def cache() -> str:
    """The cache that the runs were trained with."""
    return str(Path(_PLACE.name) / "cache")


def trained(name: str, *overrides: str) -> FinishedRun:
    """What a worker does with a run, in this process."""
    directory = Path(_PLACE.name) / name
    directory.mkdir()
    config = composed(*SHORT, *overrides)
    (directory / record.CONFIG).write_text(json.dumps(plain(config)))
    entry = record.new(plain(config))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PARTIAL_LORA_CACHE", cache())
        train.run(config, directory, entry, "train")
    sealed.write_json(directory / record.RESULT, entry | {"status": "finished"})
    return finished_run(directory)


def changed(run: FinishedRun, group: str, **values: object) -> FinishedRun:
    """The run with other settings in one group."""
    config = dataclasses.replace(run.config, **{group: dataclasses.replace(getattr(run.config, group), **values)})
    return dataclasses.replace(run, config=config)


def with_other_values(run: FinishedRun, folder: Path, *, b: float = 1.0, alpha: float = 1.0) -> FinishedRun:
    """A copy of a run, every B and its alpha times a factor."""
    adapter = shutil.copytree(run.directory, folder) / "adapter"
    weights, settings = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    tensors = {name: tensor * (b if "lora_B" in name else 1) for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    changed = json.loads(settings.read_text())
    settings.write_text(json.dumps(changed | {"lora_alpha": changed["lora_alpha"] * alpha}))
    return finished_run(folder)


def files(rows: dict[str, datasets.Dataset], name: str) -> dict[str, str]:
    """The splits as parquet files, for `task.data_files`."""
    folder = Path(_PLACE.name) / "data" / name
    folder.mkdir(parents=True, exist_ok=True)
    for split, of_split in rows.items():
        of_split.to_parquet(str(folder / f"{split}.parquet"))
    return {split: str(folder / f"{split}.parquet") for split in rows}


def written(value: object) -> str:
    """A value as an override has it; a path may have spaces in it."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {written(each)}' for key, each in value.items())}}}"
    return repr(value) if isinstance(value, str) else str(value)


def override(paths: dict[str, str]) -> str:
    return f"task.data_files={written(paths)}"


def encoded(colour: int, seed: int) -> bytes:
    """A noisy picture of a colour as the bytes of a file; sizes, modes, formats and the camera's orientation differ."""
    generator = np.random.default_rng([colour, seed])
    height, width = ((32, 32), (40, 64), (90, 50))[seed % 3]
    pixels = generator.integers(0, 120, (height, width, 3))
    pixels[: height // 2, :, colour] += 130  # brighter in the upper half, so that orientation matters
    image = Image.fromarray(pixels.astype(np.uint8)).convert("RGBA" if seed % 4 == 1 else "RGB")
    exif = image.getexif()
    if seed % 5 == 2:
        exif[0x0112] = 6  # lies on its side
    stream = io.BytesIO()
    lossy = image.mode == "RGB" and seed % 2 == 0
    image.save(stream, "JPEG" if lossy else "PNG", exif=exif)
    return stream.getvalue()


def pictures(count: int, first: int, labels: tuple[str, ...] = COLOURS) -> datasets.Dataset:
    """`count` pictures of each colour, in turn; `labels` orders the names of the classes."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=list(labels))})
    rows = [(colour, first + number) for number in range(count) for colour in range(len(COLOURS))]
    images = [{"bytes": encoded(*row), "path": None} for row in rows]
    names = [COLOURS[colour] for colour, _ in rows]
    return datasets.Dataset.from_dict({"image": images, "label": names}, features=features)


@functools.cache
def picture_files() -> dict[str, str]:
    return files({"train": pictures(20, 0), "test": pictures(7, 100)}, "pictures")


@functools.cache
def image_run() -> FinishedRun:
    """A masked adapter on the pictures."""
    return trained("images", "model=tiny_vit", "task=cifar10", "calibration.shots=4", override(picture_files()))


def photographs(folder: Path) -> list[str]:
    """The files of the pictures that the image run was tested on, in the order of its predictions."""
    rows = datasets.Dataset.from_parquet(picture_files()["test"]).cast_column("image", datasets.Image(decode=False))
    paths = [str(folder / f"{number:02}.png") for number in range(len(rows))]
    for path, image in zip(paths, rows["image"], strict=True):
        Path(path).write_bytes(image["bytes"])
    return paths


TEXTS = {"good": "a fine and lovely film", "bad": "dull, long and loud"}


def sentences(count: int, first: int) -> datasets.Dataset:
    """`count` sentences of each of two labels; their lengths differ."""
    rows = [(label, first + number) for number in range(count) for label in TEXTS]
    texts = [f"{'so ' * (number % 7)}{TEXTS[label]} {number}" for label, number in rows]
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=list(TEXTS))})
    return datasets.Dataset.from_dict({"text": texts, "label": [label for label, _ in rows]}, features=features)


def scored_pairs(count: int, first: int) -> datasets.Dataset:
    """Pairs of sentences, and how many words they share as a real number."""
    ones = [f"one {'two ' * (number % 5)}{number}" for number in range(first, first + count)]
    others = [f"two {'three ' * (number % 3)}{number}" for number in range(first, first + count)]
    numbers = [len(set(one.split()) & set(other.split())) + 0.25 for one, other in zip(ones, others, strict=True)]
    return datasets.Dataset.from_dict({"first": ones, "second": others, "label": numbers})


@functools.cache
def sentence_files() -> dict[str, str]:
    return files({"train": sentences(24, 0), "test": sentences(10, 100)}, "sentences")


@functools.cache
def pair_files() -> dict[str, str]:
    return files({"train": scored_pairs(48, 0), "test": scored_pairs(20, 100)}, "pairs")


@functools.cache
def text_run() -> FinishedRun:
    """A dense adapter of a small BERT on the sentences."""
    return trained("texts", "model=tiny_bert", "task=text_table", "method=lora", override(sentence_files()))


@functools.cache
def pair_run() -> FinishedRun:
    """A regression on the pairs, by a small DeBERTa."""
    columns = "task.text_columns=[first,second]"
    paths = override(pair_files())
    return trained("pairs", "model=tiny_deberta", "task=text_table", "method=lora", columns, paths)


def questions(count: int, first: int) -> list[dict]:
    """Questions with two or three options; the right one has a word of the question in it, at a place that moves."""
    rows = []
    for number in range(first, first + count):
        colour = COLOURS[number % 3]
        options = [f"a {colour} one", "none of them", f"{number} or more"][: 2 + number % 2]
        place = number % len(options)
        options[0], options[place] = options[place], options[0]
        question = f"which {'very ' * (number % 4)}{colour} one is it? ({number})"
        rows.append({"question": question, "options": options, "answer": place})
    return rows


def exchanges(count: int, first: int) -> list[dict]:
    """Prompts and responses of unlike lengths."""
    rows = []
    for number in range(first, first + count):
        colour = COLOURS[number % 3]
        rows.append({"prompt": f"say {'so ' * (number % 4)}{colour} {number}", "response": f"{colour} it is"})
    return rows


def tables(rows: dict[str, list[dict]], name: str) -> dict[str, str]:
    """The splits as files of JSON lines, for `task.data_files`."""
    folder = Path(_PLACE.name) / "data" / name
    folder.mkdir(parents=True, exist_ok=True)
    for split, of_split in rows.items():
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_split))
    return {split: str(folder / f"{split}.jsonl") for split in rows}


CHOICE = ("task.prompt_columns=[question]", "task.option_columns=[options]", "task.answer_column=answer")
_AT_ITS_END = "trainer.save_steps=12"  # of few questions as many are answered after every epoch, and the first counts
GENERATION = ("task.prompt_columns=[prompt]", "task.response_column=response")


@functools.cache
def question_files() -> dict[str, str]:
    return tables({"train": questions(40, 0), "test": questions(11, 100)}, "questions")


@functools.cache
def exchange_files() -> dict[str, str]:
    return tables({"train": exchanges(40, 0), "test": exchanges(9, 100)}, "exchanges")


@functools.cache
def choice_run() -> FinishedRun:
    """A masked adapter of a small Llama that chooses among options, scaled by alpha alone: merging rounds less."""
    unscaled = ("mask.fan_in=dense", "mask.row_exponent=0")
    given = ("calibration.levels=0.45", "calibration.share=0.1", "method.alpha=128", *unscaled, _AT_ITS_END)
    return trained("choices", "model=tiny_llama", "task=choice_table", *CHOICE, *given, override(question_files()))


@functools.cache
def generation_run() -> FinishedRun:
    """A dense adapter of a small Llama, trained so little that what it writes still depends on the prompt."""
    given = ("method=lora", "task.max_new_tokens=12", "trainer.learning_rate=0.001", _AT_ITS_END)
    return trained(
        "generations", "model=tiny_llama", "task=text_generation", *GENERATION, *given, override(exchange_files())
    )
