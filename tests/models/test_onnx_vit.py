from __future__ import annotations

import numpy as np
import onnx
import pytest
import timm
import torch
from exported_vit import ARCHITECTURE, MODEL_ARGS, content
from onnx.reference import ReferenceEvaluator

from partial_lora.errors import PartialLoraError
from partial_lora.models import bundled


def test_converted_weights_compute_what_the_graph_computes():
    state = {name: torch.tensor(value) for name, value in bundled.timm_state_dict(content()).items()}
    model = timm.create_model(ARCHITECTURE, num_classes=0, **MODEL_ARGS).eval()
    model.load_state_dict(state)  # strict: every weight, in its shape
    image = np.random.default_rng(0).standard_normal((1, 3, 16, 16)).astype(np.float32)
    (expected,) = ReferenceEvaluator(content()).run(None, {"input_image": image})
    with torch.no_grad():
        features = model.forward_features(torch.from_numpy(image)).numpy()
    assert np.abs(features).max() > 0.1
    np.testing.assert_allclose(features, expected, atol=1e-5)


def test_graph_without_a_weight_is_refused_by_its_name():
    model = onnx.load_model_from_string(content())
    kept = [tensor for tensor in model.graph.initializer if tensor.name != "backbone.encoder.layer.1.mlp.fc1.bias"]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    with pytest.raises(PartialLoraError, match=r"backbone\.encoder\.layer\.1\.mlp\.fc1\.weight"):
        bundled.timm_state_dict(model.SerializeToString())
