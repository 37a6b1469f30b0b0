"""Adapters that earlier versions saved, tiny ones of every form, and how they were made (tests/adapter/fixtures).

In a checkout of an earlier version:  PYTHONPATH=. python .../tests/old_adapters.py VERSION FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

FIXTURES = Path(__file__).parent / "adapter" / "fixtures"
BASE = FIXTURES / "base.safetensors"
LINEAR = ["first", "second"]

# By version and form: the settings of PartialLoraConfig. What is left out has the default that it had then.
FORMS: dict[str, dict[str, dict]] = {
    "0.1": {
        "rows_columns": {"target_modules": LINEAR, "sparsity": 0.5},
        "conv": {"target_modules": ["conv"], "sparsity": 0.5, "r": 2},
        "element": {"target_modules": LINEAR, "sparsity": 0.7, "granularity": "element", "r": 2},
        "bernoulli": {"target_modules": LINEAR, "sparsity": 0.7, "granularity": "element", "count": "bernoulli"},
        "top": {
            "target_modules": ["first"],
            "selection": "top",
            "indices": {"first": {"rows": [1, 4, 9], "columns": [0, 5]}},
            "modules_to_save": ["head"],
        },
    },
    "0.2": {
        "rows_columns": {"target_modules": LINEAR, "sparsity": 0.5},
        "kept": {"target_modules": LINEAR, "sparsity": 0.5, "fan_in": "kept", "row_exponent": 1},
        "exponents": {"target_modules": LINEAR, "sparsity": 0.7, "row_exponent": 0.5, "column_exponent": 1},
        "units": {"target_modules": LINEAR, "sparsity": 0.7, "granularity": "units", "fan_in": "kept"},
        "element": {"target_modules": LINEAR, "sparsity": 0.7, "granularity": "element"},
        "groups": {"target_modules": LINEAR, "sparsity": 0.7, "granularity": "groups"},
        "frozen": {"target_modules": LINEAR, "sparsity": 0.7, "columns": "frozen", "row_exponent": 1},
        "embedding": {"target_modules": ["embed", "first"], "sparsity": 0.5, "r": 2},
        "conv": {"target_modules": ["conv"], "sparsity": 0.5, "r": 2},
        "gaussian": {"target_modules": LINEAR, "sparsity": 0.5, "init_lora_weights": "gaussian"},
        "ranks": {"target_modules": LINEAR, "sparsity": 0.5, "rank_pattern": {"first": 2}, "row_exponent": 1},
    },
}


class Tiny(nn.Module):
    """An embedding, a convolution, two linear layers and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(12, 8)
        self.conv = nn.Conv1d(8, 8, 3, padding=1)
        self.first = nn.Linear(8, 16)
        self.second = nn.Linear(16, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        features = self.conv(self.embed(ids).transpose(1, 2)).transpose(1, 2)
        return self.head(self.second(torch.tanh(self.first(features))).mean(1))


def base() -> Tiny:
    """The base model of all of them."""
    model = Tiny()
    model.load_state_dict({name: value for name, value in load_file(BASE).items() if name != "inputs"})
    return model.eval()


@torch.no_grad()
def outputs(model: nn.Module) -> Tensor:
    return model.eval()(load_file(BASE)["inputs"])


def make(version: str, folder: Path) -> None:
    """Write the adapters of a version, in PEFT's form and the compact one, and what they come to."""
    from partial_lora.adapter import PartialLoraConfig, write_compact

    if not BASE.exists():
        torch.manual_seed(0)
        FIXTURES.mkdir(parents=True, exist_ok=True)
        save_file(Tiny().state_dict() | {"inputs": torch.randint(12, (2, 5))}, BASE)
    come_to = {}
    for form, settings in FORMS[version].items():
        torch.manual_seed(1)
        model = get_peft_model(base(), PartialLoraConfig(**settings))
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter, std=0.5)
        model.save_pretrained(folder / form)
        write_compact(model, folder / form)
        (folder / form / "README.md").unlink()
        come_to[form] = outputs(model)
    save_file(come_to, folder / "outputs.safetensors")


if __name__ == "__main__":
    make(sys.argv[1], Path(sys.argv[2]))
