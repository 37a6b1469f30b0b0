"""The size of a run that has not begun."""

from __future__ import annotations

import pytest
from refusals import refusal
from transformers import OPTConfig, OPTForCausalLM

from partial_lora.building.info import outline
from partial_lora.settings.compatibility import check
from partial_lora.settings.compose import composed

OWN = ("model=tiny_bert", "task=text_table", "method=lora")


def table(folder, labels, name="own.csv"):
    rows = "".join(f"a film of {label},{label}\n" for label in labels for _ in range(20))
    (folder / name).write_text(f"text,label\n{rows}", encoding="utf-8")
    return folder / name


@pytest.mark.parametrize(("labels", "outputs"), [("abcdef", 6), (range(30), 30), ((0.5, 1.25, 3.0), 1)])
def test_the_head_is_for_the_classes_that_are_in_the_file(tmp_path, labels, outputs) -> None:
    planned = outline(composed(*OWN, f"task.data_files={table(tmp_path, labels)}"))
    assert (planned.outputs, planned.is_known) == (outputs, True)


def test_a_mixture_has_the_classes_of_all_its_members(tmp_path) -> None:
    own = f"{{modality: text, path: files, data_files: {table(tmp_path, 'abc')}}}"
    members = f"{{sst2: {{modality: text, path: sst2, classes: 2}}, own: {own}}}"
    planned = outline(composed("model=tiny_bert", "task=mixture", f"task.members={members}", "method=lora"))
    assert (planned.outputs, planned.is_known) == (5, True)


def test_a_number_of_classes_that_nobody_knows_is_said_to_be_a_guess() -> None:
    planned = outline(composed(*OWN))
    assert (planned.outputs, planned.is_known) == (2, False)
    with refusal("task.data_files"):
        check(composed(*OWN), here=True)


def test_a_language_model_whose_config_has_other_names_has_no_estimate_of_memory(tmp_path) -> None:
    sizes = {"vocab_size": 64, "hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=16)).save_pretrained(tmp_path)
    planned = outline(composed(f"model={tmp_path}", "task=arc_easy", "calibration=fixed"))
    assert planned.memory == {}
    assert planned.counts["adapter_trainable"] > 0


def test_the_memory_of_a_language_model_is_first_that_of_its_own_format() -> None:
    given = ("model=tiny_llama", "task=arc_easy", "calibration=fixed")
    weights = {}
    for own, kinds in (("dtype=float32", "fp32 bf16 nf4"), ("quantization=int8", "int8 bf16 nf4")):
        planned = outline(composed(*given, f"model.{own}"))
        assert " ".join(planned.memory) == kinds
        weights |= {kind: held["weights"] for kind, held in planned.memory.items()}
    assert weights["fp32"] > weights["bf16"] > weights["nf4"]
