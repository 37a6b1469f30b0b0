"""Train on your own images: a folder with one sub-folder for each class.

    python examples/own_images.py

Prints: the progress of the run, its closing table with the test accuracy, and the label of three test images.
Takes: about 60 s of one CPU core.
"""

import subprocess
import sys
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

from partial_lora import Predictor

# %% [markdown]
# The folder stands in for yours: `photos/train/CLASS/…` and `photos/test/CLASS/…`. Without `test/` a fifth of the
# images becomes the test split. The images here are handwritten digits.

# %%
out = Path("out/own_images")
names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
digits = load_digits()
for split, rows in {"train": range(400), "test": range(400, 600)}.items():
    for row in rows:
        file = out / "photos" / split / names[digits.target[row]] / f"{row}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((255 - 15 * digits.images[row]).astype("uint8")).resize((56, 56)).save(file)

# %% [markdown]
# `calibration=fixed` keeps the same share of every module: 13 % of dense LoRA's parameters. `model=vit_b16` takes a
# larger model from the hub. A second call finds the run finished and skips it.

# %%
settings = [
    "model=vit_s14",  # 22 M parameters, out of a PyPI wheel
    "model.image_size=56",
    "task=image_folder",
    "task.name=photos",
    f"task.data_files={out / 'photos'}",
    "calibration=fixed",
    "trainer.epochs=4",
    f"results_dir={out}",
]
subprocess.run([sys.executable, "-m", "partial_lora", "train", *settings], check=True)

# %%
images = sorted((out / "photos" / "test").glob("*/*.png"))[::70]
for prediction in Predictor(out / "latest").predict(images):
    print(f"{prediction.input}: {prediction.label} ({prediction.score:.2f})")
