"""Train on your own texts and labels: a csv file with a column of texts and a column of classes.

    python examples/own_table.py

Prints: the progress of the run, its closing table with the test accuracy, and the labels of two new texts.
Takes: about 30 s of one CPU core.
"""

import csv
import itertools
import subprocess
import sys
from pathlib import Path

# The table stands in for yours. tsv, parquet, json and jsonl files are read in the same way.
out = Path("out/own_table")
out.mkdir(parents=True, exist_ok=True)
words = {
    "good": ["excellent", "delicious", "friendly", "quick", "perfect", "lovely"],
    "bad": ["terrible", "cold", "rude", "slow", "awful", "disappointing"],
}
things = ["meal", "soup", "service", "staff", "delivery", "room", "coffee", "visit"]
sentences = ["The {} was {}.", "I found the {} {}.", "My friends say the {} is {}."]
with open(out / "reviews.csv", "w", newline="", encoding="utf-8") as file:
    table = csv.writer(file)
    table.writerow(["text", "opinion"])
    for sentence, thing in itertools.product(sentences, things):
        for opinion, adjectives in words.items():
            table.writerows([sentence.format(thing, adjective), opinion] for adjective in adjectives)


def partial_lora(*words: str) -> None:
    """Run a command of partial-lora."""
    subprocess.run([sys.executable, "-m", "partial_lora", *words], check=True)


# One file is split: a fifth of its rows becomes the test split. {train: a.csv, test: b.csv} names two files.
partial_lora(
    "train",
    "model=minilm_l6",  # 22 M parameters, out of a PyPI wheel; bert_base and deberta_v3_base come from the hub
    "task=text_table",
    "task.name=reviews",
    f"task.data_files={out / 'reviews.csv'}",
    "task.label_column=opinion",
    "calibration=fixed",  # the same share of every module: 13 % of dense LoRA's parameters
    "trainer.epochs=5",
    f"results_dir={out}",
)
partial_lora("predict", str(out / "latest"), "The dinner was wonderful.", "The waiter was horrible.")
