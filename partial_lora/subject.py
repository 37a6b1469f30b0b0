"""What an analysis examines: a frozen model, a task's training rows, and the calibrations that come of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
from datasets import Dataset
from transformers import set_seed

from partial_lora import calibrating, loading, models, tasks
from partial_lora.budget import dense_parameters, kept_parameters, masked_units
from partial_lora.calibration import Calibration, calibrate
from partial_lora.fewshot import batches_of, calibrate_few_shot
from partial_lora.heads import scored_head
from partial_lora.importance import Scores
from partial_lora.loading import named
from partial_lora.peers import Alone
from partial_lora.scoring import FewShotScore
from partial_lora.stability import noisy_labels
from partial_lora.targets import target_linears
from partial_lora.world import join

# What a calibration of any score is asked (`calibrating.asked`), beside its search.
_FOUND_BY = ("rank", "granularity", "threshold", "budget", "levels", "max_sparsity", "axes", "scope", "repair")


class Subject:
    """The model and task of some settings, calibrated again and again on draws that differ.

    settings: resolved settings (`config.resolve`). The model is the one that `partial-lora calibrate` finds with them,
    so a calibration that either has made is kept for the other.
    """

    def __init__(self, settings: dict) -> None:
        model = settings["model"]
        self._settings = settings
        self.device = join(settings["trainer"]["device"]).device
        self._task = loading.task_of(settings)
        self._transform = loading.transform_of(settings)
        set_seed(settings["seed"])
        self._model = loading.model_of(model, self._task.labels).to(self.device)
        with models.dequantised(self._model, values=False):
            targets = target_linears(self._model, **named(model, "target_modules", "head", "new_modules"))
            self.shapes = {name: tuple(module.weight.shape) for name, module in targets.items()}

    @property
    def train(self) -> Dataset:
        """The training rows that draws come from."""
        return self._task.train

    @property
    def blocks(self) -> int:
        """How many blocks one pass runs; 1 for a model that is not known as a sequence of them."""
        name = self._settings["model"]["blocks"]
        return len(self._model.get_submodule(name)) if name else 1

    def draws(self, **changes: int) -> tasks.Draws:
        """The two draws; `changes` are of `shots` and `seed`."""
        return loading.draws_of(self._settings, self.train, **changes)

    def mislabelled(self, draws: tasks.Draws, share: float, seed: int) -> tuple[Dataset, tasks.Draws]:
        """The examples of both draws with a share of each draw's labels wrong, and the draws among them."""
        parts = []
        for number, rows in enumerate((draws.fit, draws.scored)):
            part = self.train.select(rows)
            wrong = noisy_labels(part["label"], share, classes=len(self._task.labels), seed=[seed, number])
            parts.append(wrong)
        rows = self.train.select(np.concatenate([draws.fit, draws.scored]))
        label = rows.features["label"]
        rows = rows.remove_columns("label").add_column("label", np.concatenate(parts).tolist(), feature=label)
        fit, scored = np.split(np.arange(len(rows)), [len(draws.fit)])
        return rows, tasks.Draws(fit=fit, scored=scored)

    def importance(self, measure: str, draws: tasks.Draws) -> dict[str, Scores]:
        """Row and column scores of every module by a measure's name; one that needs data sees the fit draw alone."""
        settings = self._settings | {"importance": self._settings["importance"] | {"name": measure}}
        with models.dequantised(self._model):
            return self._importance(settings, self._task, draws)

    def calibration(self, draws: tasks.Draws, *, train: Dataset | None = None, **changes: int) -> Calibration:
        """The sparsities by the settings' measure on these draws, kept in the cache as any calibration is.

        train: the rows that `draws` are of. changes: of `shots` and `seed`, what the draws were made with.
        """
        settings = self._settings | {"calibration": self._settings["calibration"] | changes}
        task = self._task if train is None else replace(self._task, train=train)
        with models.dequantised(self._model):
            asked = self._asked(settings, task, draws)
            return calibrate_few_shot(self._model, task.train, self._transform, **asked)

    def counted(self, draws: tasks.Draws, search: str) -> tuple[Calibration, FewShotScore]:
        """A calibration that nothing is known for, and its score, which has counted what it did."""
        fit, scored = (batches_of(self.train, rows, self._transform) for rows in (draws.fit, draws.scored))
        with models.dequantised(self._model):
            asked = self._asked(self._settings, self._task, draws)
            with scored_head(self._model, asked["head"], fit, asked["new_head"]):
                score = FewShotScore(self._model, scored, asked["score"], asked["blocks"], asked["memory"])
                calibration = calibrate(
                    self._model,
                    score,
                    target_modules=list(asked["scores"]),
                    importance=asked["scores"],
                    search=search,
                    above_chance=asked["chance"] == "majority",
                    **named(asked, *_FOUND_BY),
                )
        return calibration, score

    def _asked(self, settings: dict, task: tasks.Task, draws: tasks.Draws) -> dict:
        scores = self._importance(settings, task, draws)
        return calibrating.asked(settings, task, scores, draws, Alone())

    def _importance(self, settings: dict, task: tasks.Task, draws: tasks.Draws) -> dict[str, Scores]:
        return calibrating.importance(settings, task, self._transform, self._model, list(self.shapes), draws)

    def density(self, sparsity: Mapping[str, Mapping[str, float]]) -> float:
        """The share of dense LoRA's parameters that an adapter of these sparsities trains."""
        units = masked_units(self.shapes, self._settings["method"]["rank"], self._settings["mask"]["granularity"])
        return kept_parameters(*units, sparsity) / dense_parameters(*units)
