"""Rows that an installed package brings along."""

from __future__ import annotations

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, NamedSplit
from sklearn.datasets import load_digits


def digits() -> Dataset:
    """scikit-learn's digits: 1,797 grey images (8 x 8), the 17 grey levels stretched to 0..255."""
    read = load_digits()
    features = Features({"image": Image(), "label": ClassLabel(names=[str(digit) for digit in range(10)])})
    pixels = np.round(read.images * (255 / 16)).astype(np.uint8)
    data = {"image": list(pixels), "label": read.target.tolist()}
    return Dataset.from_dict(data, features=features, split=NamedSplit("train"))
