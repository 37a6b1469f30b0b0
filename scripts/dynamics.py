"""Distance that training has moved a run's model: accuracy on training rows beside test rows, and features by CKA.

    python scripts/dynamics.py results/decided/runs/trec/minilm_l6/uniform-1a2b3c4d/seed0 …

Writes RUN/dynamics.json, which figures 3 and 7 read (scripts/paper_figures.py --runs names the runs). A run that has it
is left alone. The weights have to be at hand: of a run that is only a record this says so, and ends with 3 once the
others are done. About 20 seconds a run on one core. Linear CKA (Kornblith et al. 2019) compares the features after each
block in the frozen and in the trained model: 1 for the same up to rotation and scale, 0 for unrelated ones.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader

from partial_lora import cli, files
from partial_lora.building import build
from partial_lora.calibration.peers import Alone
from partial_lora.calibration.reuse import block_names
from partial_lora.errors import PartialLoraError
from partial_lora.finished import evaluate, export
from partial_lora.finished.predict import RunModel
from partial_lora.finished.run import FinishedRun, finished_run
from partial_lora.launching.packs import DYNAMICS, OF_DYNAMICS, dynamics

MOST = 1_000  # rows of each split, at most
MISSING = 3  # how the command ends where some could not be measured; a traceback ends with 1


def measure(run: FinishedRun, *, device: str = "auto") -> dict:
    """Measure a run and write its dynamics.json; gives the content.

    Of each split at most MOST rows count, drawn by a fixed seed. The labels of training rows are those that were
    trained on. Raises PartialLoraError for a mixture, a model without `model.blocks`, changed files, and weights that
    are not there.
    """
    blocks = run.config.model.blocks
    if blocks is None:
        raise PartialLoraError(f"{run.directory}: model.blocks=null: expected a sequence of blocks to compare features")
    if run.config.task.members:
        raise PartialLoraError(f"{run.directory}: a mixture, expected a run of one task: it has no one metric to draw")
    evaluate.refuse_changed_files(run)
    task = build.task_of(run.config)
    task = replace(task, train=_drawn(task.train), test=_drawn(task.test))
    trained = RunModel(run, device)
    transform = build.transform_of(run.config.model, run.config.task)
    judge = build.judge_of(run.config, task, transform, Alone())
    size = run.config.trainer.eval_batch_size

    def batches(rows: Dataset) -> DataLoader:
        return DataLoader(rows, batch_size=size, collate_fn=transform.collate)

    def predict(rows: Dataset) -> tuple[np.ndarray, np.ndarray]:
        return evaluate.logits_of(trained, batches(rows), judge.reduce, lambda done, total: None)

    metrics = {split: judge.judged(predict, trained.model, split).metrics for split in ("train", "test")}
    frozen = export.base_model(run).to(trained.device).eval()
    test = transform.prepare(task.test, cache_bytes=run.config.task.cache_bytes)
    content = {
        "version": OF_DYNAMICS,
        "rows": {split: len(getattr(task, split)) for split in ("train", "test")},
        "metrics": metrics,
        "cka": {
            block: value if np.isfinite(value) else None
            for block, value in drift(frozen, trained, batches(test), blocks).items()
        },
        "device": trained.device,
    }
    files.write_json(run.directory / DYNAMICS, content)
    return content


def _drawn(rows: Dataset) -> Dataset:
    if len(rows) <= MOST:
        return rows
    return rows.select(np.sort(np.random.default_rng(0).choice(len(rows), MOST, replace=False)))


def drift(frozen: nn.Module, trained: RunModel, batches: Iterable[Mapping], blocks: str) -> dict[str, float]:
    """The linear CKA of the features after every block, by the block's name; every position is an example.

    frozen: the run's base model, on the device of `trained`. Padding is left out where there is an attention mask.
    """
    names = block_names(frozen, blocks)
    moved = trained.model.get_base_model()
    sums = {name: Moments() for name in names}
    with torch.inference_mode():
        for batch in batches:
            mask = batch.get("attention_mask")
            with _outputs(frozen, names) as before:
                frozen(**{name: value.to(trained.device) for name, value in batch.items() if name != "labels"})
            with _outputs(moved, names) as after:
                trained.forward(batch)
            for name in names:
                sums[name].add(positions(before[name], mask), positions(after[name], mask))
    return {name: each.cka() for name, each in sums.items()}


@contextlib.contextmanager
def _outputs(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Record the outputs of the named modules while the context lasts."""
    outputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable:
        def hook(module: nn.Module, inputs: object, output: object) -> None:
            outputs[name] = output[0] if isinstance(output, tuple) else output

        return hook

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


def positions(output: Tensor, mask: Tensor | None = None) -> Tensor:
    """A block's output as examples by features: (N, width), float32, on the CPU.

    Of tokens (B, T, width) those of the mask (B, T); of maps (B, C, H, W) every place.
    """
    if output.dim() == 4:
        output = output.movedim(1, -1)
    flat = output.reshape(-1, output.shape[-1])
    if mask is not None and mask.shape == output.shape[:2]:
        flat = flat[mask.reshape(-1).bool().to(flat.device)]
    return flat.cpu().float()


class Moments:
    """The sums over examples from which the linear CKA of two sets of features is computed, batch by batch.

    CKA does not depend on where features are measured from: they are from the first batch's mean, so that what is
    multiplied in their own precision and summed in float64 is spread, not place.
    """

    def __init__(self) -> None:
        self._count = 0
        self._origins: tuple[Tensor, Tensor] | None = None
        self._sums: Mapping[str, Tensor] = {}

    def add(self, first: Tensor, second: Tensor) -> None:
        """Take in the features of the same examples: (N, p) and (N, q)."""
        self._origins = self._origins or (first.mean(0), second.mean(0))
        x, y = first - self._origins[0], second - self._origins[1]
        new = {"x": x.sum(0), "y": y.sum(0), "xx": x.T @ x, "yy": y.T @ y, "xy": x.T @ y}
        self._count += len(x)
        self._sums = {name: self._sums.get(name, 0) + each.double() for name, each in new.items()}

    def cka(self) -> float:
        """||Cov(x, y)||² / (||Cov(x, x)|| ||Cov(y, y)||), Frobenius norms; NaN where features do not vary."""
        across, of_x, of_y = (
            (self._sums[one + other] - self._sums[one].outer(self._sums[other]) / self._count).norm().item()
            for one, other in ("xy", "xx", "yy")
        )
        return across**2 / (of_x * of_y) if of_x * of_y > 0 else float("nan")


@cli.script
def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", type=Path, metavar="RUN_DIR")
    datasets.disable_progress_bars()
    missing = False
    for directory in parser.parse_args(arguments).runs:
        if dynamics(directory):
            continue
        try:
            last = list(measure(finished_run(directory))["cka"].values())[-1]
            print(f"{directory / DYNAMICS}: CKA after the last block {last:.3f}", flush=True)
        except PartialLoraError as error:
            missing = True
            print(error, file=sys.stderr)
    return MISSING if missing else 0


if __name__ == "__main__":
    sys.exit(main())
