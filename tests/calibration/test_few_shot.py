"""The head that a frozen model is given for calibration, and what importance sees of the draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from configured import load
from datasets import Dataset
from PIL import Image
from sklearn.linear_model import LogisticRegression, Ridge
from torch import nn

from partial_lora import tasks
from partial_lora.calibration import importance
from partial_lora.calibration.config import CalibrationConfig, ImportanceConfig
from partial_lora.calibration.few_shot import FewShot, features, few_shot_head, fitted_head
from partial_lora.errors import PartialLoraError
from partial_lora.tasks.config import TaskConfig

HEAD = "timm_model.head"


@pytest.fixture
def model() -> nn.Module:
    return load("tiny_vit", labels=["a", "b", "c"])


@pytest.fixture
def batches() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(3):
        labels = torch.arange(8) % 3
        pixels = torch.randn(8, 3, 32, 32, generator=generator) + 2 * labels[:, None, None, None]
        batches.append({"pixel_values": pixels, "labels": labels})
    return batches


@torch.no_grad()
def logits(model: nn.Module, batches: list[dict[str, torch.Tensor]]) -> np.ndarray:
    return torch.cat([model(pixel_values=batch["pixel_values"]).logits for batch in batches]).numpy()


@pytest.mark.parametrize("classes", [2, 3])
def test_the_head_gives_the_probabilities_of_the_logistic_regression(classes: int) -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(60) % classes
    inputs = generator.standard_normal((60, 5)) + labels[:, None]
    weight, bias = fitted_head(inputs, labels, classes)
    given = torch.softmax(torch.from_numpy(inputs @ weight.T + bias), dim=-1).numpy()
    expected = LogisticRegression(C=1.0, max_iter=5000).fit(inputs, labels).predict_proba(inputs)
    assert np.allclose(given, expected, atol=1e-6)


def test_a_class_without_examples_is_never_predicted() -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(60) % 2 * 3  # classes 0 and 3 of 4
    inputs = generator.standard_normal((60, 5)) + labels[:, None]
    weight, bias = fitted_head(inputs, labels, outputs=4)
    given = torch.softmax(torch.from_numpy(inputs @ weight.T + bias), dim=-1)
    assert given[:, [1, 2]].max() == 0
    assert set(given.argmax(dim=-1).tolist()) == {0, 3}


def test_one_class_is_nothing_to_fit_a_head_on() -> None:
    with pytest.raises(PartialLoraError, match=r"\(1\)"):
        fitted_head(np.zeros((3, 2)), np.array([1, 1, 1]), outputs=2)


def test_of_real_labels_the_head_is_a_ridge_regression() -> None:
    generator = np.random.default_rng(0)
    inputs = generator.standard_normal((60, 5))
    labels = (inputs @ np.arange(5) + generator.standard_normal(60)).astype(np.float32)
    weight, bias = fitted_head(inputs, labels, outputs=1)
    expected = Ridge(alpha=1.0).fit(inputs, labels).predict(inputs)
    assert (weight.shape, bias.shape) == ((1, 5), (1,))
    assert np.allclose((inputs @ weight.T + bias)[:, 0], expected, atol=1e-5)


def test_a_model_with_a_head_of_its_own_keeps_it(model, batches) -> None:
    before = logits(model, batches)
    with few_shot_head(model, None, batches):
        assert np.array_equal(logits(model, batches), before)


def test_the_model_predicts_with_the_fitted_head_and_gets_its_own_back_also_after_an_error(model, batches) -> None:
    before, state = logits(model, batches), {key: value.clone() for key, value in model.state_dict().items()}
    weight, bias = fitted_head(*features(model, HEAD, batches), outputs=3)
    with few_shot_head(model, HEAD, batches):
        entering, labels = features(model, HEAD, batches)
        given = logits(model, batches)
        assert np.allclose(given, entering @ weight.T + bias, atol=1e-4)
        assert (given.argmax(axis=-1) == labels).mean() > 0.6  # random features; guessing gets 0.375
    with pytest.raises(RuntimeError), few_shot_head(model, HEAD, batches):
        raise RuntimeError
    assert np.array_equal(logits(model, batches), before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_a_head_that_is_not_linear_is_refused_by_name(model, batches) -> None:
    refused = pytest.raises(PartialLoraError, match=r"^model\.head=timm_model\.norm: ")
    with refused, few_shot_head(model, "timm_model.norm", batches):
        pass


@pytest.fixture(scope="module")
def digits() -> tuple[tasks.Task, tasks.ImageTransform]:
    task = tasks.load(TaskConfig(name="digits", path="bundled:digits", train_samples=200))
    return task, tasks.ImageTransform(image_size=32, mean=[0.5] * 3, std=[0.5] * 3, interpolation="bilinear")


def ten_classes() -> nn.Module:
    return load("tiny_vit", labels=[str(digit) for digit in range(10)])


TARGETS = ["timm_model.blocks.0.attn.qkv", "timm_model.blocks.1.mlp.fc2"]
ADAPTER = {"steps": 2, "learning_rate": 1e-3}
IMP = {"rounds": 2, "fraction": 0.3, "steps": 2, "learning_rate": 1e-3}


def spoilt(train: Dataset, rows: np.ndarray) -> Dataset:
    """The same rows, but for these: a black picture, and the label that comes next."""
    kept = [row in set(rows.tolist()) for row in range(len(train))]
    black = Image.new("L", (8, 8))
    images = [black if bad else image for image, bad in zip(train["image"], kept, strict=True)]
    labels = [(label + bad) % 10 for label, bad in zip(train["label"], kept, strict=True)]
    return Dataset.from_dict({"image": images, "label": labels}, features=train.features)


def same(first: dict, second: dict) -> bool:
    return all(torch.equal(*pair) for name in first for pair in zip(first[name], second[name], strict=True))


@pytest.mark.parametrize(("measure", "options"), [("snip", {}), ("imp", IMP), ("activation", {}), ("adapter", ADAPTER)])
def test_importance_sees_the_fit_draw_and_never_the_scored_one(digits, measure: str, options: dict) -> None:
    task, transform = digits
    draws = tasks.few_shot_draws(task.train["label"], shots=3, seed=0)
    model = ten_classes()

    def importance_of(rows: Dataset) -> dict:
        chosen = CalibrationConfig(), ImportanceConfig(measure, **options)
        return FewShot(model, rows, transform, draws, *chosen, HEAD).importance(TARGETS)

    own = {key: value.clone() for key, value in model.state_dict().items()}
    scores = importance_of(task.train)
    assert list(scores) == TARGETS
    assert all(torch.equal(value, own[key]) for key, value in model.state_dict().items())
    assert same(scores, importance_of(spoilt(task.train, draws.scored)))
    assert not same(scores, importance_of(spoilt(task.train, draws.fit)))


def test_gradients_flow_from_the_head_that_the_fit_draw_gives(digits) -> None:
    task, transform = digits
    draws = tasks.few_shot_draws(task.train["label"], shots=3, seed=0)
    model = ten_classes()
    chosen = CalibrationConfig(), ImportanceConfig("snip")
    scores = FewShot(model, task.train, transform, draws, *chosen, HEAD).importance(TARGETS)
    fit = transform.batches(task.train.select(draws.fit), 30)
    layer = model.get_submodule(HEAD)
    weight, bias = fitted_head(*features(model, HEAD, fit), outputs=10)
    layer.load_state_dict({"weight": torch.from_numpy(weight), "bias": torch.from_numpy(bias)})
    loss = nn.functional.cross_entropy(model(pixel_values=fit[0]["pixel_values"]).logits, fit[0]["labels"])
    for name, (rows, columns) in scores.items():
        own = model.get_submodule(name).weight
        (gradient,) = torch.autograd.grad(loss, own, retain_graph=True)
        entries = (own * gradient).abs().double()
        assert torch.allclose(rows, entries.sum(1), rtol=1e-4)
        assert torch.allclose(columns, entries.sum(0), rtol=1e-4)


def test_measures_of_the_weights_alone_look_at_no_example(digits) -> None:
    task, transform = digits
    draws = tasks.Draws(fit=np.empty(0, dtype=np.int64), scored=np.empty(0, dtype=np.int64))
    model = ten_classes()
    chosen = CalibrationConfig(), ImportanceConfig("svd", k=3)
    found = FewShot(model, task.train, transform, draws, *chosen, HEAD).importance(TARGETS)
    rows, _ = importance.svd(model.get_submodule(TARGETS[0]).weight.detach(), k=3)
    assert torch.equal(found[TARGETS[0]][0], rows.cpu())
