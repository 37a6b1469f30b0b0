"""What a mixture is trained on and judged by: its members' judges, each on its own rows and its own outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import numpy as np
import pandas
from datasets import Dataset
from torch import Tensor, nn
from transformers import EvalPrediction

from partial_lora.calibration.peers import Peers
from partial_lora.calibration.slices import starts
from partial_lora.errors import PartialLoraError
from partial_lora.tasks import Joined, Mixture, MixtureTransform, Task
from partial_lora.tasks.metrics import LOWER_IS_BETTER
from partial_lora.training import judges
from partial_lora.training.judges import Judge, Judged, Predict
from partial_lora.training.losses import loss_of_batch_within

AVERAGE = "average"


class ByMembers:
    """Metrics by member, as MEMBER/METRIC, and the average of the members' main ones, which selects.

    sizes: how many classes each member has; none where members have no outputs of their own.
    """

    def __init__(self, names: Sequence[str], each: Sequence[Judge], sizes: Sequence[int]) -> None:
        self._names, self._each, self._sizes = list(names), list(each), sizes
        self._starts = starts(sizes) if sizes else [0] * len(each)
        self.selects = _average_of([judge.selects for judge in each])
        self.loss: Callable[..., Tensor] = loss_of_batch_within(sizes) if sizes else each[0].loss
        self.reduce = each[0].reduce

    def train(self) -> Joined:
        return Joined([judge.train() for judge in self._each], self._starts)

    def validation(self) -> Joined:
        return self._validation

    def test(self) -> Joined:
        return Joined([judge.test() for judge in self._each], self._starts)

    def measure(self, said: EvalPrediction) -> dict[str, float]:
        found, start = [], 0
        for number, count in enumerate(self._validation.sizes):
            rows = slice(start, start + count)
            labels = np.asarray(said.label_ids)[rows] - self._starts[number]
            own = EvalPrediction(predictions=self._own(number, said.predictions[rows]), label_ids=labels)
            found.append(self._each[number].measure(own))
            start += count
        main = [each[judge.selects] for each, judge in zip(found, self._each, strict=True)]
        return self._by_name(found) | {self.selects: float(np.mean(main))}

    def judged(self, predict: Predict, model: nn.Module, split: str) -> Judged:
        """Also the loss, averaged over the members; predictions have a column `member`, the index is the member's."""
        found = [judge.judged(self._predict(predict, number), model, split) for number, judge in enumerate(self._each)]
        primary = _average_of([each.metrics["primary"] for each in found])
        means = {
            primary: float(np.mean([each.metrics[each.metrics["primary"]] for each in found])),
            "loss": float(np.mean([each.metrics["loss"] for each in found])),
        }
        by_name = self._by_name(
            [{key: value for key, value in each.metrics.items() if key != "primary"} for each in found]
        )
        frames = [each.predictions for each in found]
        for name, frame in zip(self._names, frames, strict=True):
            frame.insert(0, "member", name)
        return Judged({"primary": primary, **means, **by_name}, pandas.concat(frames, ignore_index=True))

    @cached_property
    def _validation(self) -> Joined:
        return Joined([judge.validation() for judge in self._each], self._starts)

    def _own(self, number: int, logits: np.ndarray) -> np.ndarray:
        """Of logits (N, outputs) a member's own."""
        if not self._sizes:
            return logits
        return logits[:, self._starts[number] : self._starts[number] + self._sizes[number]]

    def _predict(self, predict: Predict, number: int) -> Predict:
        def own(rows: Dataset) -> tuple[np.ndarray, np.ndarray]:
            logits, labels = predict(rows)
            return self._own(number, logits), labels

        return own

    def _by_name(self, found: Sequence[Mapping[str, float]]) -> dict[str, float]:
        pairs = zip(self._names, found, strict=True)
        return {f"{name}/{metric}": value for name, each in pairs for metric, value in each.items()}


def _average_of(metrics: Sequence[str]) -> str:
    """What an average of metrics is called: what they all are where the smallest is the best, else an average."""
    return metrics[0] if metrics[0] in LOWER_IS_BETTER and len(set(metrics)) == 1 else AVERAGE


def judge_of(task: Task, transform: object, settings: Mapping, peers: Peers) -> Judge:
    """The judge of a run's task, whether it is one or several. Raises PartialLoraError for metrics without average."""
    if not isinstance(task, Mixture) or not isinstance(transform, MixtureTransform):
        return judges.judge_of(task, transform, settings, peers)
    main = {member.name: member.metrics[0] for member in task.members}
    if len({metric in LOWER_IS_BETTER for metric in main.values()}) > 1:
        raise PartialLoraError(f"task.members: expected first metrics that are all the better the larger, found {main}")
    pairs = zip(task.members, transform.transforms, settings["task"]["members"].values(), strict=True)
    each = [judges.judge_of(member, own, {**settings, "task": chosen}, peers) for member, own, chosen in pairs]
    return ByMembers(list(main), each, task.sizes)
