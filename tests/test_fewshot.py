"""The head that a frozen model is given for calibration."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import nn

from partial_lora import models
from partial_lora.errors import PartialLoraError
from partial_lora.fewshot import features, few_shot_head, logistic_head

TINY = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
HEAD = "timm_model.head"


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    return models.load(
        name="tiny_vit",
        weights="random",
        architecture="vit_tiny_patch16_224",
        model_args=TINY,
        labels=["a", "b", "c"],
        image_size=32,
    )


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
    weight, bias = logistic_head(inputs, labels, classes)
    given = torch.softmax(torch.from_numpy(inputs @ weight.T + bias), dim=-1).numpy()
    expected = LogisticRegression(C=1.0, max_iter=5000).fit(inputs, labels).predict_proba(inputs)
    assert np.allclose(given, expected, atol=1e-6)


def test_a_class_without_examples_is_never_predicted() -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(60) % 2 * 3  # classes 0 and 3 of 4
    inputs = generator.standard_normal((60, 5)) + labels[:, None]
    weight, bias = logistic_head(inputs, labels, classes=4)
    assert set((inputs @ weight.T + bias).argmax(axis=-1)) == {0, 3}


def test_the_model_predicts_with_the_fitted_head_and_gets_its_own_back(model, batches) -> None:
    before, state = logits(model, batches), {key: value.clone() for key, value in model.state_dict().items()}
    weight, bias = logistic_head(*features(model, HEAD, batches), classes=3)
    with few_shot_head(model, HEAD, batches):
        entering, labels = features(model, HEAD, batches)
        given = logits(model, batches)
        assert np.allclose(given, entering @ weight.T + bias, atol=1e-4)
        assert (given.argmax(axis=-1) == labels).mean() > 0.6  # random features; guessing gets 0.375
    assert np.array_equal(logits(model, batches), before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())


def test_the_own_head_comes_back_after_an_error(model, batches) -> None:
    before = logits(model, batches)
    with pytest.raises(RuntimeError), few_shot_head(model, HEAD, batches):
        raise RuntimeError
    assert np.array_equal(logits(model, batches), before)


def test_a_head_that_is_not_linear_is_refused_by_name(model, batches) -> None:
    refused = pytest.raises(PartialLoraError, match=r"model\.head=timm_model\.norm: expected a linear layer")
    with refused, few_shot_head(model, "timm_model.norm", batches):
        pass
