"""Mean shares of several calibrations, which have less noise than one: results/decided/mean/TASK.json.

python scripts/shares.py mean      # of the calibrations of results/decided at 13 %, for its stage `mean`
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from protocol import IMPORTANCE

from partial_lora import Calibration, cli
from partial_lora.masks import AXES
from partial_lora.report import records

RUNS = Path("results/decided")


def calibrated(task: str, runs: Sequence[records.Run]) -> dict[int, dict]:
    """Return a record by seed, of runs that a bisection has calibrated at 13 % with the usual settings."""
    found = {}
    for run in runs:
        chosen = run.record["config"]["calibration"]
        measure = run.record["config"].get("importance", {}).get("name", IMPORTANCE)
        at = run.row["task"], run.row["method"], run.row["operating_point"], chosen.get("file"), chosen["search"]
        usual = (chosen["shrink"], chosen["max_sparsity"], measure) == (0, 0.95, IMPORTANCE)
        if at == (task, "partial", "budget 0.13", None, "bisect") and usual:
            found[run.record["seed"]] = run.record
    return found


def mean(of_seed: Mapping[int, dict]) -> Calibration:
    """Return a calibration that keeps the mean share of several, of every module and axis, and so as many parameters.

    Its scores are means, too.
    """
    found = [record["calibration"] for record in of_seed.values()]
    modules = {
        module: {
            axis: {"sparsity": float(np.mean([record["sparsity"][module][axis] for record in of_seed.values()]))}
            | {"curve": []}
            for axis in AXES
        }
        for module in next(iter(of_seed.values()))["sparsity"]
    }
    baseline, joint, threshold = (
        float(np.mean([each[key] for each in found])) for key in ("baseline", "joint", "threshold")
    )
    return Calibration(baseline, joint, threshold, modules, budget=found[0]["budget"], search=found[0]["search"])


@cli.script
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("mean",))
    parser.parse_args(arguments)
    runs, folder = records.read(RUNS)[0], RUNS / "mean"
    folder.mkdir(exist_ok=True)
    for task in sorted({run.row["task"] for run in runs}):
        if of_seed := calibrated(task, runs):
            mean(of_seed).save(folder / f"{task}.json")
            print(f"{folder / task}.json: of {len(of_seed)} calibrations")


if __name__ == "__main__":
    sys.exit(main())
