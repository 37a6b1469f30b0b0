"""What a step keeps is what it was said to keep, and the size that a limit allows is the largest that meets it."""

from __future__ import annotations

import pytest
import torch

from partial_lora import models
from partial_lora.building import memory
from partial_lora.errors import PartialLoraError
from partial_lora.settings.compose import composed
from partial_lora.training.cost import kept_by_forward

SMALL = ("trainer.batch_size=4", "method.rank=8", "calibration=fixed", "calibration.budget=0.3")
CASES = [("tiny_vit", "cifar10", method) for method in ("partial", "entries", "paca")]
CASES += [("tiny_llama", "arc_easy", "partial"), ("tiny_deberta", "sst2", "lorafa")]


def batch_of(config) -> dict[str, torch.Tensor]:
    size = config.model
    if size.modality == "image":
        return {"pixel_values": torch.rand(4, 3, size.image_size, size.image_size)}
    mask = torch.ones(4, size.max_length, dtype=torch.long)
    mask[0, -1] = 0  # padding, without which a model may leave the mask out
    return {"input_ids": torch.ones_like(mask), "attention_mask": mask}


def measured(config, *, checkpointed: bool = False) -> int:
    """The bytes that a real pass keeps, after a first one, when everything that lasts exists."""
    model = memory.adapted(config).to_empty(device="cpu").train()
    for value in [*model.parameters(), *model.buffers()]:
        value.data.zero_()
    if checkpointed:
        models.enable_gradient_checkpointing(model)
    batch = batch_of(config)
    model(**batch)
    with kept_by_forward() as kept:
        output = model(**batch)
    assert output is not None
    return kept.bytes


@pytest.mark.parametrize(("name", "task", "method"), CASES)
def test_what_a_step_keeps_is_known_without_memory(name: str, task: str, method: str) -> None:
    config = composed(f"model={name}", f"task={task}", f"method={method}", *SMALL)
    step = memory.step_memory(config)
    assert step.floor + step.adapter == pytest.approx(measured(config), rel=0.05)
    assert step.checkpointed == pytest.approx(measured(config, checkpointed=True), rel=0.05)
    assert step.adapter >= 0


def test_the_budget_of_a_limit_is_the_largest_that_meets_it(monkeypatch) -> None:
    monkeypatch.setattr(memory, "_NEAR", 0.3)  # two halvings
    given = ("model=tiny_vit", "task=cifar10", *SMALL)
    limit = memory.kept_by_step(composed(*given))
    config = composed(*given, f"calibration.kept={limit}")
    found = memory.within(config).calibration
    assert found.budget >= 0.3 - 1 / 4
    assert found.kept is None
    for budget, fits in ((found.budget, True), (found.budget + 1 / 4, False)):
        assert (memory.kept_by_step(composed(*given, f"calibration.budget={budget}")) <= limit) == fits
    with pytest.raises(PartialLoraError, match=r"^calibration\.kept=1000: "):
        memory.within(composed(*given, "calibration.kept=1000"))
    assert memory.within(composed(*given)) == composed(*given)


def test_layers_that_cannot_be_counted_are_refused() -> None:
    quantised = composed("model=tiny_llama", "task=arc_easy", *SMALL, "model.quantization=int8")
    with pytest.raises(PartialLoraError, match=r"^model\.quantization=int8"):
        memory.step_memory(quantised)


def test_a_method_that_has_no_large_size_has_the_largest_that_it_can_have() -> None:
    given = ("model=tiny_vit", "task=cifar10", "method=ia3", "trainer.batch_size=4", "calibration=fixed")
    assert 0 < memory.within(composed(*given, "calibration.kept=1e9")).calibration.budget < 1


def test_fused_experts_are_adapted_where_memory_is_counted_and_ranks_of_their_own_are_refused_there() -> None:
    sizes = (
        "{hidden_size: 32, intermediate_size: 48, num_hidden_layers: 1, num_attention_heads: 4, num_local_experts: 4}"
    )
    targets = "model.target_modules=[o_proj,experts.down_proj]"
    model = ("model=tiny_qwen", "model.architecture=mixtral", f"++model.model_args={sizes}", targets)
    adapted = memory.adapted(composed(*model, "task=arc_easy", *SMALL))
    assert any("experts" in name for name, value in adapted.named_parameters() if value.requires_grad)
    with pytest.raises(PartialLoraError, match=r"^model\.target_modules"):
        memory.adapted(composed(*model, "task=arc_easy", *SMALL, "method=lora"))
