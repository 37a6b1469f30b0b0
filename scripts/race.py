"""Table of methods and forms of mask at equal size: the best learning rate of each on validation, and its test score.

    python scripts/race.py results/race

The rate is chosen by the mean score on validation, of those with most seeds; of equals, the lower loss. A difference to
the reference is of runs of the same seeds (`ranking.compared`). Where dense LoRA was trained, too, a table says how far
the best rate of each form and size is from dense LoRA's, and from_dense.csv how far its score. Test loss is a second
endpoint, in loss.csv.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
from claims import by_loss, in_one_table

from partial_lora import cli
from partial_lora.errors import PartialLoraError
from partial_lora.files import write_atomic
from partial_lora.report import predictions, ranking, records
from partial_lora.report.rows import NONE

REFERENCE, FROM_DENSE, LOSS = "lora", "from_dense.csv", "loss.csv"


@cli.script
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path)
    parser.add_argument("--stem", default="race", help="name of the files")
    parser.add_argument("--page", action="store_true", help="write report/index.html, too")
    options = parser.parse_args(arguments)
    runs, skipped = records.read(options.results)
    if not runs:
        raise PartialLoraError(f"{options.results}: no finished runs there: `make race` makes them")
    text, numbers = ranking.write(runs, options.results, options.stem, REFERENCE)
    origin, _, ranked = text.partition("\n\n")
    table = ranking.rows_of(runs, predictions.Predictions(options.results))
    chosen = ranking.at_best_rates(table)
    losses = by_loss(chosen, REFERENCE)
    write_atomic(options.results / LOSS, losses.to_csv(index=False, float_format="%.6g"))
    by_score = f"### In one table\n\n{in_one_table(numbers)}\n\n### By test loss, in nats\n\n{in_one_table(losses)}"
    text = f"{origin}\n\n{by_score}\n\n{ranked}"
    if (rates := best_rates(numbers)) is not None:
        text += f"\n### Best rates by size (in brackets: factors of two from dense LoRA's)\n\n{rates}\n"
    write_atomic(options.results / f"{options.stem}.md", text)
    print(text)
    for line in skipped:
        print(line, file=sys.stderr)
    write_atomic(options.results / FROM_DENSE, from_dense(chosen).to_csv(index=False, float_format="%.6g"))
    if options.page:
        command = " ".join(["python scripts/race.py", *map(str, arguments or sys.argv[1:])])
        settings = {"reference": REFERENCE, "command": command, "refused": skipped}
        print(ranking.write_page(numbers, options.results, **settings))


def best_rates(numbers: pd.DataFrame) -> str | None:
    """Return the best learning rate of every form by its size, and how far it is from dense LoRA's, as a table.

    Dense LoRA of all modules is the whole size; other sizes are shares of its parameters. None where no task has it.
    """
    shares = numbers["size"].where(numbers["form"] != "dense", "1")
    known = numbers.assign(share=pd.to_numeric(shares, errors="coerce")).query("share <= 1")
    rates = known.pivot(index=["task", "form"], columns="share", values="learning_rate")
    rates = rates.sort_index(axis=1, ascending=False)
    if 1 not in rates:
        return None
    dense = rates[1].xs("dense", level="form")
    rates = rates[rates.index.get_level_values("task").isin(dense.index)]
    steps = np.log2(rates.div(dense, axis=0, level="task"))
    cells = {
        f"{100 * share:g} %": [
            NONE if np.isnan(rate) else f"{rate:g}" + (f" ({step:+.2g})" if step else "")
            for rate, step in zip(rates[share], steps[share], strict=True)
        ]
        for share in rates
    }
    return pd.DataFrame(cells, index=rates.index).reset_index().to_markdown(index=False, disable_numparse=True)


def from_dense(chosen: pd.DataFrame) -> pd.DataFrame:
    """Return how far every form, at every size, is from dense LoRA: differences over the seeds that both have.

    chosen: the runs of every form and size at the best rate.
    """
    at = chosen["form"].where(chosen["size"] == "own", chosen["form"] + " at " + chosen["size"])
    numbers = ranking.compared(chosen.assign(form=at, size="own"), "dense").dropna(subset="difference")
    return numbers[["task", "form", "paired", "difference", "difference_half"]]


if __name__ == "__main__":
    sys.exit(main())
