"""What an analysis examines: a frozen model, a task's training rows, and the calibrations that come of them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from datasets import Dataset
from transformers import set_seed

from partial_lora import loading, tasks
from partial_lora.budget import dense_parameters, kept_parameters, masked_units
from partial_lora.calibration import Calibration, calibrate
from partial_lora.fewshot import batches_of, calibrate_few_shot, importance_few_shot
from partial_lora.heads import scored_head
from partial_lora.importance import OPTIONS, Scores
from partial_lora.loading import named
from partial_lora.scoring import FewShotScore
from partial_lora.stability import noisy_labels
from partial_lora.targets import target_linears
from partial_lora.world import join

# The keys of `calibration` that are the same throughout, beside how the score is made of what is left.
_FOUND_BY = ("threshold", "budget", "levels", "max_sparsity", "axes", "scope", "repair")


class Subject:
    """The model and task of some settings, calibrated again and again on draws that differ.

    settings: resolved settings (`config.resolve`). The model is the one that `partial-lora calibrate` finds with them,
    so a calibration that either has made is kept for the other.
    """

    def __init__(self, settings: Mapping) -> None:
        model = settings["model"]
        self._settings = settings
        self.device = join(settings["trainer"]["device"]).device
        self._task = loading.task_of(settings)
        self._transform = loading.transform_of(settings)
        set_seed(settings["seed"])
        self._model = loading.model_of(model, self._task.labels).to(self.device)
        self._new_head = loading.has_new_head(model)
        self._score = loading.calibration_score(settings, self._task)
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

    def importance(
        self, measure: str, draws: tasks.Draws, *, train: Dataset | None = None, seed: int | None = None
    ) -> dict[str, Scores]:
        """Row and column scores of every module by a measure's name; one that needs data sees the fit draw alone."""
        return importance_few_shot(
            self._model,
            self.train if train is None else train,
            self._transform,
            measure=measure,
            modules=list(self.shapes),
            draws=draws,
            head=self._settings["model"]["head"],
            seed=loading.calibration_seed(self._settings) if seed is None else seed,
            options=named(self._settings["importance"], *OPTIONS[measure]),
            new_head=self._new_head,
        )

    def calibration(self, draws: tasks.Draws, *, train: Dataset | None = None, **changes: int) -> Calibration:
        """The sparsities by the settings' measure on these draws, kept in the cache as any calibration is.

        train: the rows that `draws` are of. changes: of `shots` and `seed`, what the draws were made with.
        """
        own = {"seed": loading.calibration_seed(self._settings)}
        chosen = self._settings["calibration"] | own | changes
        measure = self._settings["importance"]["name"]
        train = self.train if train is None else train
        return calibrate_few_shot(
            self._model,
            train,
            self._transform,
            scores=self.importance(measure, draws, train=train, seed=chosen["seed"]),
            draws=draws,
            importance={"seed": chosen["seed"]} | named(self._settings["importance"], "name", *OPTIONS[measure]),
            architecture=named(self._settings["model"], "architecture", "model_args"),
            rank=self._settings["method"]["rank"],
            granularity=self._settings["mask"]["granularity"],
            **named(self._settings["model"], "head", "blocks"),
            new_head=self._new_head,
            score=self._score,
            drawn=loading.drawn_by(self._settings | {"calibration": chosen}),
            **named(chosen, *_FOUND_BY, "chance", "memory", "seed", "search"),
        )

    def counted(self, draws: tasks.Draws, search: str) -> tuple[Calibration, FewShotScore]:
        """A calibration that nothing is known for, and its score, which has counted what it did."""
        fit, scored = (batches_of(self.train, rows, self._transform) for rows in (draws.fit, draws.scored))
        scores, chosen = self.importance(self._settings["importance"]["name"], draws), self._settings["calibration"]
        with scored_head(self._model, self._settings["model"]["head"], fit, self._new_head):
            blocks = self._settings["model"]["blocks"]
            score = FewShotScore(self._model, scored, self._score, blocks, chosen["memory"])
            calibration = calibrate(
                self._model,
                score,
                target_modules=list(scores),
                importance=scores,
                rank=self._settings["method"]["rank"],
                granularity=self._settings["mask"]["granularity"],
                search=search,
                above_chance=chosen["chance"] == "majority",
                **named(chosen, *_FOUND_BY),
            )
        return calibration, score

    def density(self, sparsity: Mapping[str, Mapping[str, float]]) -> float:
        """The share of dense LoRA's parameters that an adapter of these sparsities trains."""
        units = masked_units(self.shapes, self._settings["method"]["rank"], self._settings["mask"]["granularity"])
        return kept_parameters(*units, sparsity) / dense_parameters(*units)
