"""Conversion of images to the inputs of a vision model."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from io import BytesIO
from typing import Any

import numpy as np
import PIL
import PIL.Image
import torch
import torchvision
from datasets import Dataset, Features, Image, Value
from torch import Tensor
from torchvision.transforms import v2

from partial_lora.errors import PartialLoraError
from partial_lora.tasks.config import TaskConfig
from partial_lora.tasks.sources import eight_bits, first_line
from partial_lora.tasks.text_inputs import cached

# Raised by Pillow for a file of another format, one that is cut short, and one that claims to be far too large.
_UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, struct.error, PIL.Image.DecompressionBombError)
_STORED = Image(decode=False)
_AT_ONCE = 256  # images in memory while they are checked
_LOOKED_AT = 64  # images whose sizes are read
_SHRUNK = 3  # times the pixels of a model's side, from which on much of an image is lost
_THREADS = min(8, os.cpu_count() or 1)  # Pillow decodes and resizes outside the interpreter's lock


class ImageTransform:
    """Converts rows to the inputs of a model: pixel_values (N, 3, S, S) float32, normalised, and labels (N,).

    channels: the order of the colours in them.

    The shorter side is resized to `image_size` pixels and the middle square kept, so a square image is only resized.
    Grey of 16 bits loses its lower 8, grey floats within 0 and 1 become 0 to 255, and other floats are refused.
    `prepare` decodes, resizes and crops, to uint8. `collate` normalises: that is quick, and normalised images would
    take four times the room.
    """

    lengths = False  # rows are all of one size

    def __init__(
        self,
        *,
        image_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        interpolation: str,
        channels: str = "RGB",
    ) -> None:
        self._size, self._interpolation = image_size, interpolation
        self._order = ["RGB".index(channel) for channel in channels]
        self._mean, self._std = list(mean), list(std)
        self._sides: list[int] = []  # shorter sides of some images, in pixels
        self._square = v2.Compose(
            [
                eight_bits,
                v2.RGB(),
                v2.Resize(image_size, interpolation=v2.InterpolationMode(interpolation)),
                v2.CenterCrop(image_size),
                v2.PILToTensor(),
            ]
        )

    @classmethod
    def of(cls, task: TaskConfig, **pixels: Any) -> ImageTransform:
        return cls(**pixels)

    @property
    def warnings(self) -> list[str]:
        """Warnings about the rows that were prepared, a sentence each."""
        side = int(np.median(self._sides)) if self._sides else 0
        if side < _SHRUNK * self._size:
            return []
        return [
            f"model.image_size={self._size}: images of {side} pixels are shrunk to it; a larger one sees more of them"
        ]

    def prepare(self, rows: Dataset, *, cache_bytes: int) -> Dataset:
        """Return rows for `collate`: `pixels`, the bytes of (3, S, S) uint8, and `label`.

        They are stored on disk if `cache_bytes` are enough. Else they are only checked now, and decoded whenever they
        are read, by the workers of a DataLoader. Raises PartialLoraError that names the split and the row or file of an
        image which cannot be read.
        """
        rows = rows.cast_column("image", _STORED)
        self._sides += _shorter_sides(rows)
        bytes_each = 3 * self._size**2 + 8
        if len(rows) * bytes_each > cache_bytes:
            _check_images(rows)
            return rows.with_transform(lambda batch: self._decoded(rows, batch))
        key = {
            "image_size": self._size,
            "interpolation": self._interpolation,
            "pillow": PIL.__version__,
            "torchvision": torchvision.__version__,
        }
        features = Features({"pixels": Value("binary"), "label": rows.features["label"]})
        return cached(rows, lambda batch, indices: self._decoded(rows, batch, indices), features, key)

    def collate(self, rows: Sequence[Mapping[str, object]]) -> dict[str, Tensor]:
        """Make one batch of prepared rows."""
        pixels = np.stack([np.frombuffer(row["pixels"], dtype=np.uint8) for row in rows])
        pixels = torch.from_numpy(pixels.reshape(-1, 3, self._size, self._size))
        pixels = v2.functional.to_dtype(pixels, torch.float32, scale=True)
        pixels = pixels if self._order == [0, 1, 2] else pixels[:, self._order]
        batch = {"pixel_values": v2.functional.normalize(pixels, self._mean, self._std)}
        if "label" in rows[0]:
            batch["labels"] = torch.tensor([row["label"] for row in rows])
        return batch

    def batches(self, rows: Dataset, size: int) -> list[dict[str, Tensor]]:
        """Return all rows in order, `size` rows a batch: for few-shot draws, which fit in memory."""
        rows = rows.cast_column("image", _STORED)
        batches = []
        for start in range(0, len(rows), size):
            indices = list(range(start, min(start + size, len(rows))))
            decoded = self._decoded(rows, rows[indices], indices)
            pairs = zip(decoded["pixels"], decoded["label"], strict=True)
            batches.append(self.collate([{"pixels": pixels, "label": label} for pixels, label in pairs]))
        return batches

    training_batches = batches

    def encode(self, images: Sequence[PIL.Image.Image]) -> dict[str, Tensor]:
        """Make one batch of images that have no label."""
        return self.collate([{"pixels": _bytes(self._square(image))} for image in images])

    def _decoded(self, rows: Dataset, batch: Mapping, indices: Sequence[int] | None = None) -> dict[str, list]:
        """Decode stored images to the bytes of their pixels. indices: their rows, where these are known."""
        PIL.Image.init()  # before the threads, which would all do it
        places = indices or [None] * len(batch["image"])
        with ThreadPoolExecutor(_THREADS) as pool:
            pixels = list(pool.map(lambda image, row: self._pixels(image, rows, row), batch["image"], places))
        return {"pixels": pixels, "label": batch["label"]}

    def _pixels(self, image: Mapping, rows: Dataset, row: int | None) -> bytes:
        try:
            return _bytes(self._square(Image().decode_example(image)))
        except _UNREADABLE as error:
            raise _unreadable(image, rows, row, error) from error


def _bytes(pixels: Tensor) -> bytes:
    return pixels.contiguous().numpy().tobytes()


def _shorter_sides(rows: Dataset) -> list[int]:
    """Return the shorter sides of some images by their headers; one that cannot be read is refused elsewhere."""
    sides = []
    for row in range(0, len(rows), max(1, len(rows) // _LOOKED_AT)):
        image = rows[row]["image"]
        if image["bytes"] is None and not os.path.isfile(image["path"]):  # a pipe may have no writer
            continue
        with suppress(*_UNREADABLE), PIL.Image.open(_file(image)) as opened:
            sides.append(min(opened.size))
    return sides


def _file(image: Mapping) -> str | BytesIO:
    return image["path"] if image["bytes"] is None else BytesIO(image["bytes"])


def _check_images(rows: Dataset) -> None:
    """Raise for a stored image that cannot be read, in a fraction of the time that decoding takes."""
    PIL.Image.init()
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in range(0, len(rows), _AT_ONCE):
            indices = range(start, min(start + _AT_ONCE, len(rows)))
            images = rows.select_columns("image")[start : indices.stop]["image"]
            list(pool.map(lambda image, row: _check_image(image, rows, row), images, indices))


def _check_image(image: Mapping, rows: Dataset, row: int) -> None:
    """Check a file to its end: a PNG by its checksums, a JPEG at an eighth of its size, others decoded."""
    file = _file(image)
    try:
        if file is image["path"] and not os.path.isfile(file):  # a pipe may have no writer
            raise OSError("no such file")
        with PIL.Image.open(file) as opened:
            if opened.format == "PNG":
                opened.verify()
            else:
                opened.draft(None, (1, 1))
                opened.load()
                eight_bits(opened)
    except _UNREADABLE as error:
        raise _unreadable(image, rows, row, error) from error


def _unreadable(image: Mapping, rows: Dataset, row: int | None, error: Exception) -> PartialLoraError:
    """Return an error that names an image by its file, or by its row in its split's file, even of selected rows."""
    if row is not None and rows._indices is not None:
        row = rows._indices.column(0)[row].as_py()
    place = "" if row is None else f"row {row + 1} of "
    file = f", {image['path']}" if image["path"] else ""
    return PartialLoraError(
        f"an image of the task cannot be read: {place}its {rows.split or 'given'} rows{file} ({first_line(error)})"
    )
