"""The learning rates that a search found best on validation, as a file for `trainer.tuned`.

    partial-lora train -m experiment=tune method=… results_dir=results/tune
    python scripts/tune.py results/tune --out results/tuning.json

All runs of one search agree in every setting that matters; those of all methods in how long and on what they trained,
in the number of rates and in the seeds. An entry of what was not searched for stays in the file, and has to agree with
the new ones, too. With --extend a search goes on: the rates that the file says were tried, with the same settings and
seeds, count beside those of the runs, so that a wider range costs only what is new of it. Exit code 1 where the best
of some search is its lowest or highest rate: there may be a better one beyond; 2 where nothing was written.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from partial_lora.errors import PartialLoraError
from partial_lora.rate_search import best_rates
from partial_lora.rate_settings import key_in, named
from partial_lora.results import read_result
from partial_lora.tuning import load, save


def main(arguments: list[str] | None = None) -> int:
    """Read the runs, write the file, and say what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results_dir", type=Path, metavar="RESULTS_DIR")
    parser.add_argument("--out", type=Path, default=Path("results/tuning.json"), metavar="FILE")
    parser.add_argument("--extend", action="store_true", help="count the rates that FILE says were tried, too")
    asked = parser.parse_args(arguments)
    folders = sorted(asked.results_dir.glob("runs/*/*/*/seed*"))
    try:
        records = [record for folder in folders if (record := read_result(folder)) is not None]
        entries, left_out = best_rates(records, load(asked.out) if asked.extend else ())
        for line in left_out:
            print(f"tune: left out: {line}", file=sys.stderr)
        if not entries:
            raise PartialLoraError(f"{asked.results_dir}: expected runs of experiment=tune")
        save(asked.out, entries)
    except PartialLoraError as error:
        print(f"tune: {error}", file=sys.stderr)
        return 2
    for entry in entries:
        worth = {rate: "not finite" if value is None else f"{value:.4f}" for rate, value in entry["tried"].items()}
        tried = "  ".join(f"{rate}: {said}" for rate, said in worth.items())
        at_edge = "   at the edge: search further" if entry["at_edge"] else ""
        print(f"{named(key_in(entry))}: {entry['learning_rate']:g}   [{tried}]{at_edge}")
    print(f"wrote {asked.out}")
    return 1 if any(entry["at_edge"] for entry in entries) else 0


if __name__ == "__main__":
    sys.exit(main())
