"""How far training has moved a run's model: accuracy on training rows beside test rows, and features by CKA.

For a finished run whose weights are at hand. Linear CKA (Kornblith et al. 2019) compares the features after each block
in the frozen and in the trained model: 1 for the same up to rotation and scale, 0 for unrelated ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import DataLoader

from partial_lora import evaluate_run, formats, judges, loading, results
from partial_lora.errors import PartialLoraError
from partial_lora.evidence.dynamics import DYNAMICS, VERSION
from partial_lora.finished import FinishedRun
from partial_lora.inference import RunModel
from partial_lora.peers import Alone
from partial_lora.reuse import block_names
from partial_lora.tasks import Task


def measure(run: FinishedRun, *, most: int = 1_000, device: str = "auto") -> dict:
    """Measure a run and write its dynamics.json; gives the content.

    most: rows of each split at most, drawn by a fixed seed. The labels of training rows are those that were trained
    on. Raises PartialLoraError for a mixture, a model without `model.blocks`, changed files, and weights that are not
    there.
    """
    blocks = run.settings["model"]["blocks"]
    if blocks is None:
        raise PartialLoraError(f"{run.directory}: model.blocks=null: expected a sequence of blocks to compare features")
    if run.settings["task"].get("members"):
        raise PartialLoraError(f"{run.directory}: a mixture, expected a run of one task: it has no one metric to draw")
    evaluate_run.check_files(run)
    task = loading.task_of(run.settings)
    task = replace(task, train=_drawn(task.train, most), test=_drawn(task.test, most))
    trained = RunModel(run, device)
    transform = loading.transform_of(run.settings)
    judge = judges.judge_of(task, transform, run.settings, Alone())
    size = run.settings["trainer"]["eval_batch_size"]

    def batches(rows: Dataset) -> DataLoader:
        return DataLoader(rows, batch_size=size, collate_fn=transform.collate)

    def predict(rows: Dataset) -> tuple[np.ndarray, np.ndarray]:
        return evaluate_run.said_of(trained, batches(rows), judge.reduce, lambda done, total: None)

    metrics = {split: judge.judged(predict, trained.model, split).metrics for split in ("train", "test")}
    found = drift(_frozen(run, trained.device), trained, batches(_read(transform, task, run)), blocks)
    content = {
        "version": VERSION,
        "rows": {split: len(getattr(task, split)) for split in ("train", "test")},
        "metrics": metrics,
        "cka": {block: value if np.isfinite(value) else None for block, value in found.items()},
        "device": trained.device,
    }
    results.write_json(run.directory / DYNAMICS, content)
    return content


def _drawn(rows: Dataset, most: int) -> Dataset:
    if len(rows) <= most:
        return rows
    return rows.select(np.sort(np.random.default_rng(0).choice(len(rows), most, replace=False)))


def _read(transform: loading.Transform, task: Task, run: FinishedRun) -> Dataset:
    """Test rows as the model reads them."""
    return transform.prepare(task.test, cache_bytes=run.settings["task"]["cache_bytes"])


def _frozen(run: FinishedRun, device: str) -> nn.Module:
    return formats.base_model(run).to(device).eval()


@torch.inference_mode()
def drift(frozen: nn.Module, trained: RunModel, batches: DataLoader, blocks: str) -> dict[str, float]:
    """The linear CKA of the features after every block, by the block's name; every position is an example.

    frozen: the run's base model, on the device of `trained`. Padding is left out where there is an attention mask.
    """
    names = block_names(frozen, blocks)
    moved = trained.model.get_base_model()
    sums = {name: Moments() for name in names}
    for batch in batches:
        mask = batch.get("attention_mask")
        with _watched(frozen, names) as before:
            frozen(**{name: value.to(trained.device) for name, value in batch.items() if name != "labels"})
        with _watched(moved, names) as after:
            trained.logits(batch, _first)
        for name in names:
            sums[name].add(positions(before[name], mask), positions(after[name], mask))
    return {name: each.cka() for name, each in sums.items()}


def _first(logits: Tensor, labels: Tensor) -> Tensor:
    return logits[:1, :1].float()


@contextlib.contextmanager
def _watched(model: nn.Module, names: list[str]) -> Iterator[dict[str, Tensor]]:
    """What leaves the named modules while the block lasts."""
    kept: dict[str, Tensor] = {}

    def keeper(name: str) -> Callable:
        def keep(module: nn.Module, inputs: object, output: object) -> None:
            kept[name] = output if isinstance(output, Tensor) else output[0]

        return keep

    handles = [model.get_submodule(name).register_forward_hook(keeper(name)) for name in names]
    try:
        yield kept
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
        norms = [self._covariance(*pair).norm().item() for pair in ("xy", "xx", "yy")]
        return norms[0] ** 2 / (norms[1] * norms[2]) if norms[1] * norms[2] > 0 else float("nan")

    def _covariance(self, one: str, other: str) -> Tensor:
        means = torch.outer(self._sums[one], self._sums[other]) / self._count
        return self._sums[one + other] - means
