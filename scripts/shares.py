"""Correlations of calibrated shares with what modules are worth, and their mean over draws.

    make shares                        # trains dense LoRA (conf/experiment/shares.yaml), and measures it
    python scripts/shares.py mean      # results/decided/mean/TASK.json: the mean shares of eight calibrations
    python scripts/shares.py measure   # the runs in results/analyses/shares again
    python scripts/shares.py draw      # the table again, of what was measured

A share should be large where a parameter is worth much. WORDS says what is measured.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from analyses import Subject
from first_steps import gradients_of
from peft.tuners.lora import LoraLayer
from protocol import IMPORTANCE
from scipy.stats import spearmanr
from torch import Tensor

from partial_lora import Calibration, cli
from partial_lora.errors import PartialLoraError
from partial_lora.files import write_atomic
from partial_lora.finished.predict import RunModel
from partial_lora.finished.run import FinishedRun, finished_run
from partial_lora.masks import AXES, Sparsity
from partial_lora.report import records
from partial_lora.settings.versions import plain

OUT, RUNS = Path("results/analyses/shares"), Path("results/decided")
ROWS = 400  # of test, of which losses are
SHARES = {"bisect": "calibrated", "gradient": "by gradients"}  # by calibration.search
WORDS = """Rank correlations (Spearman's) over the modules of a model, of means over seeds. "Two seeds" says how far two
seeds agree. What a module is worth is counted per number of its dense adapter: squares of the first gradient, with a
fitted head; squares of the change that dense LoRA has made in the end; and the loss of 400 test rows that is added if
this change is taken out of the module. Shares are those of the runs of [decided](../../decided/tables/decided.md)."""
WORTHS = {"gradient": "first gradient", "change": "change by training", "loss": "loss without it"}


def measure(run: FinishedRun) -> pd.DataFrame:
    """Return what each module of a run of dense LoRA is worth, per number of its adapter."""
    subject, trained = Subject(plain(run.config)), RunModel(run)
    squares = {name: float((gradient**2).sum()) for name, gradient in gradients_of(subject).items()}
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in trained.model.named_modules()
        if isinstance(layer, LoraLayer)
    }
    rows = subject.task.test.shuffle(seed=0).select(range(min(ROWS, len(subject.task.test))))
    batches = list(subject.transform.batches(rows, 32))
    whole, found = loss_of(trained, batches), []
    for name, layer in layers.items():
        (adapter,) = layer.active_adapters
        numbers = sum(layer.get_base_layer().weight.shape) * layer.r[adapter]
        change = layer.get_delta_weight(adapter).square().sum().item()
        layer.set_scale(adapter, 0)
        lost = loss_of(trained, batches) - whole
        layer.set_scale(adapter, 1)
        found.append((name, squares[name] / numbers, change / numbers, lost / numbers))
    task, seed = run.config.task.name, run.config.seed
    return pd.DataFrame(found, columns=["module", *WORTHS]).assign(task=task, seed=seed)


def loss_of(trained: RunModel, batches: Sequence[Mapping[str, Tensor]]) -> float:
    """Return the mean loss of labelled rows."""
    losses = [
        torch.nn.functional.cross_entropy(torch.from_numpy(trained.logits(batch)), batch["labels"], reduction="sum")
        for batch in batches
    ]
    return float(sum(losses)) / sum(len(batch["labels"]) for batch in batches)


def calibrated(task: str, runs: Sequence[records.Run]) -> dict[str, dict[int, dict]]:
    """Return a record by seed, of calibrated runs at 13 % as they are by default, by `SHARES`."""
    found: dict[str, dict[int, dict]] = {kind: {} for kind in SHARES.values()}
    for run in runs:
        chosen = run.record["config"]["calibration"]
        measure = run.record["config"].get("importance", {}).get("name", IMPORTANCE)
        at = run.row["task"], run.row["method"], run.row["operating_point"], chosen.get("file")
        usual = (chosen["shrink"], chosen["max_sparsity"], measure) == (0, 0.95, IMPORTANCE)
        if at == (task, "partial", "budget 0.13", None) and usual:
            found[SHARES[chosen["search"]]][run.record["seed"]] = run.record
    return found


def shares_of(task: str, runs: Sequence[records.Run]) -> dict[str, pd.DataFrame]:
    """Return the share of each module by seed, of the calibrations of `calibrated`."""
    kept = {
        kind: {seed: _shares(record["sparsity"], record["shapes"]) for seed, record in of_seed.items()}
        for kind, of_seed in calibrated(task, runs).items()
    }
    return {kind: pd.DataFrame(of_seed) for kind, of_seed in kept.items() if of_seed}


def _shares(sparsity: Sparsity, shapes: Mapping[str, tuple[int, int]]) -> dict[str, float]:
    return {
        name: 1 - (of["rows"] * shapes[name][0] + of["columns"] * shapes[name][1]) / sum(shapes[name])
        for name, of in sparsity.items()
    }


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


def correlated(one: pd.Series, other: pd.Series) -> str:
    """Return a correlation of ranks over modules, with its p."""
    found = spearmanr(one, other.reindex(one.index))
    return f"{found.statistic:+.2f} (p = {found.pvalue:.2g})"


def agreement(of_seed: pd.DataFrame) -> str:
    """Return the mean correlation of two seeds' columns."""
    return f"{np.mean([spearmanr(of_seed[a], of_seed[b]).statistic for a, b in combinations(of_seed, 2)]):+.2f}"


def table(measured: pd.DataFrame) -> pd.DataFrame:
    """Return the correlations, a row for each set and each share or worth."""
    runs, rows = records.read(RUNS)[0], []
    for task, of_task in measured.groupby("task", sort=False):
        worths = {words: of_task.pivot(index="module", columns="seed", values=name) for name, words in WORTHS.items()}
        for name, of_seed in (shares_of(task, runs) | worths).items():
            row = {"set": task, "": name, "seeds": of_seed.shape[1], "two seeds": agreement(of_seed)}
            for words, worth in worths.items():
                row[words] = correlated(of_seed.mean(axis=1), worth.mean(axis=1)) if words != name else ""
            rows.append(row)
    return pd.DataFrame(rows)


@cli.script
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("measure", "draw", "mean"))
    options = parser.parse_args(arguments)
    if options.what == "mean":
        runs, folder = records.read(RUNS)[0], RUNS / "mean"
        folder.mkdir(exist_ok=True)
        for task in sorted({run.row["task"] for run in runs}):
            if of_seed := calibrated(task, runs)["calibrated"]:
                mean(of_seed).save(folder / f"{task}.json")
                print(f"{folder / task}.json: of {len(of_seed)} calibrations")
        return
    file = OUT / "shares.csv"
    if options.what == "measure":
        places = sorted(OUT.glob("runs/*/*/*/seed*"))
        if not places:
            raise PartialLoraError(f"{OUT}/runs: no finished runs there: `make shares` makes them")
        found = pd.concat([measure(finished_run(place)) for place in places])
        write_atomic(file, found.to_csv(index=False, float_format="%.6g"))
    text = table(pd.read_csv(file)).to_markdown(index=False, disable_numparse=True)
    write_atomic(OUT / "shares.md", f"    make shares\n\n# What calibrated shares follow\n\n{WORDS}\n\n{text}\n")
    print(text)


if __name__ == "__main__":
    sys.exit(main())
