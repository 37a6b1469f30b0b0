"""Adapters that versions 0.1 and 0.2 saved load with the values that they were made with."""

from __future__ import annotations

import pytest
import torch
from old_adapters import FIXTURES, FORMS, base, outputs
from peft import PeftModel
from safetensors.torch import load_file

from partial_lora.adapter import PartialLoraConfig, load_compact, write_compact

# What a setting was where FORMS leaves it out.
THEN = {"r": 8, "lora_alpha": 8, "fan_in": "dense", "row_exponent": 0, "column_exponent": 0, "init_lora_weights": True}
THEN |= {"granularity": "rows_columns", "selection": "random", "count": "exact", "columns": "masked", "mask_seed": 0}
MADE = [(version, form) for version, forms in FORMS.items() for form in forms]


@pytest.mark.parametrize(("version", "form"), MADE)
def test_an_old_adapter_gives_the_same_outputs_in_every_way_of_loading_it(version, form, tmp_path):
    folder, settings = FIXTURES / version / form, THEN | FORMS[version][form]
    expected = load_file(FIXTURES / version / "outputs.safetensors")[form]
    config = PartialLoraConfig.from_pretrained(folder)
    masked = PeftModel.from_pretrained(base(), folder, config=config, is_trainable=True)
    compact = load_compact(base(), folder, is_trainable=True)
    write_compact(compact, tmp_path)
    masked.save_pretrained(tmp_path)
    again = PartialLoraConfig.from_pretrained(tmp_path)
    models = [
        PeftModel.from_pretrained(base(), folder),  # plain PEFT
        masked,
        compact,
        load_compact(base(), tmp_path, is_trainable=True),
        PeftModel.from_pretrained(base(), tmp_path, config=again, is_trainable=True),
    ]
    for model in models:
        torch.testing.assert_close(outputs(model), expected, atol=1e-5, rtol=1e-5)
    for model in models[2:]:
        assert model.get_nb_trainable_parameters() == masked.get_nb_trainable_parameters()
    for model in (compact, models[3]):
        assert {name: getattr(model.peft_config["default"], name) for name in THEN} == {n: settings[n] for n in THEN}
    of_alphas = {"lora_alpha", "row_exponent", "column_exponent"}  # an ordinary adapter has the product of these
    for read in (config, again):
        names = THEN.keys() - of_alphas
        assert {name: getattr(read, name) for name in names} == {name: settings[name] for name in names}
        assert read.row_exponent == read.column_exponent == 0
