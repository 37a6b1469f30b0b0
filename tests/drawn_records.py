"""A record to draw, and its curves: a different sparsity everywhere, every kind of point there is."""

from __future__ import annotations

KINDS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")


def record(depth=3, kinds=KINDS, start="timm_model.blocks"):
    """A result.json with a different sparsity everywhere and five looks at validation, the fourth the best."""
    history = [
        {"loss": 2.0 / step, "grad_norm": 1.0, "learning_rate": 1e-3, "step": step} for step in range(10, 60, 10)
    ]
    for step, accuracy in zip((12, 24, 36, 48, 60), (0.5, 0.8, 0.9, 0.975, 0.96), strict=True):
        history.append({"eval_loss": 1 - accuracy, "eval_accuracy": accuracy, "eval_runtime": 1.0, "step": step})
    history.append({"train_loss": 0.3, "train_runtime": 30.0, "step": 60})
    modules = [f"{start}.{block}.{kind}" for block in range(depth) for kind in kinds]
    return {
        "seed": 0,
        "config": {"method": {"name": "partial"}, "model": {"name": "tiny_vit"}, "task": {"name": "digits"}},
        "parameters": {"adapter_sparsity": 0.31},
        "sparsity": {
            module: {"rows": index / 40, "columns": 0.95 - index / 50} for index, module in enumerate(modules)
        },
        "metrics": {"test": {"primary": "accuracy", "accuracy": 0.9512, "loss": 0.2}},
        "history": history,
    }


def curves_of(result, baseline=0.87, threshold=0.9):
    """Curves that give those sparsities: bounds where a level passes and just past it, one score that is known."""
    held = threshold * baseline
    modules = {}
    for name, axes in result["sparsity"].items():
        modules[name] = {}
        for axis, sparsity in axes.items():
            passing = [[round(0.05 * step, 10), [held, 0.95]] for step in range(1, int(sparsity / 0.05) + 1)]
            curve = [*passing, [0.96, [0.1, held - 0.01]], [0.97, 0.2], [0.98, None], [0.99, [None, 0.3]]]
            modules[name][axis] = {"sparsity": sparsity, "curve": curve}
    return modules


def calibrated(depth=3, **shape):
    """The record of a calibration and its curves."""
    result = record(depth, **shape)
    result["calibration"] = {"baseline": 0.87, "joint": 0.4, "threshold": 0.9}
    return result, curves_of(result)
