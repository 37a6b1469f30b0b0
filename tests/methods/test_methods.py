"""Methods: found by name, equal in trainable parameters where they are controls, and what each control does."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from pkgutil import resolve_name

import numpy as np
import pytest
import torch
from configured import inputs, labels, load, loud
from method_settings import adapted, drawn_sparsity, setting_of
from peft import PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from refusals import refusal
from safetensors.torch import load_file
from torch import nn
from transformers import set_seed

from partial_lora import methods
from partial_lora.adapter import PartialLoraConfig, module_masks, module_sparsity
from partial_lora.budget import dense_parameters, kept_parameters, scaled
from partial_lora.building import build
from partial_lora.building.info import outline
from partial_lora.calibration.importance import data_scores, task_loss
from partial_lora.errors import PartialLoraError
from partial_lora.masks import AS_PEFT, AXES, kept_count, random_keys
from partial_lora.methods.config import MaskConfig
from partial_lora.methods.controls import permuted, reversed_ranks
from partial_lora.methods.lora import ranks_within
from partial_lora.methods.setting import Setting, widest
from partial_lora.settings.compose import composed
from partial_lora.training import cost

CONTROLS = ("uniform", "shuffled", "inverted", "random_weights", "flow", "targeted", "ticket")
MASKED = ("uniform", "shuffled", "inverted", "flow")


def counted(model: PeftModel, setting) -> dict:
    dense = dense_parameters(setting.shapes, setting.rank)
    return cost.measured(model, setting.head, new_modules=setting.new_modules, dense=dense)


def test_a_method_is_found_by_the_name_of_its_function_or_in_what_that_says_of_itself() -> None:
    for name, method in methods.METHODS.items():
        function = resolve_name(f"partial_lora.methods.{method.function}")
        assert function.__name__ == name or f"`{name}`" in function.__doc__


@pytest.mark.parametrize(("name", "high"), [("tiny_vit", 0.5), ("tiny_qwen", 0.95), ("tiny_convnext", 0.95)])
def test_controls_train_as_many_parameters_as_partial(name: str, high: float) -> None:
    reference, setting = adapted("partial", name, high=high)
    expected = counted(reference, setting)
    assert expected["adapter_trainable"] == setting.budget()
    for method in CONTROLS:
        own = counted(*adapted(method, name, high=high))
        assert own["head"] == expected["head"], method
        assert own["adapter_trainable"] == setting.budget(), method


@pytest.mark.parametrize("method", ["entries", "lori", "lorafa", "paca", "rows"])
def test_methods_that_spend_a_budget_spend_it(method: str) -> None:
    model, setting = adapted(method, "tiny_llama", high=0.5)
    ranks = methods.METHODS[method].own_ranks
    assert counted(model, setting)["adapter_trainable"] == pytest.approx(setting.budget(), rel=0.01 * ranks, abs=0)
    trains = {name for name, value in model.named_parameters() if value.requires_grad and "lora_" in name}
    factors = {"entries": "AB", "rows": "A"}.get(method, "B")
    assert {factor for factor in "AB" if any(f"lora_{factor}" in name for name in trains)} == set(factors)


@pytest.mark.parametrize("method", ["lori", "uniform"])
def test_entries_of_one_factor_are_counted_where_they_are_drawn_by_chance(method: str) -> None:
    one = {"granularity": "element", "columns": "frozen", "count": "bernoulli"}
    model, setting = adapted(method, "tiny_vit", **one)
    assert counted(model, setting)["adapter_trainable"] == pytest.approx(setting.budget(), rel=0.1)


@pytest.mark.parametrize("method", MASKED)
def test_controls_of_single_entries_train_as_many_parameters(method: str) -> None:
    for granularity in ({"granularity": "element"}, {"granularity": "element", "count": "bernoulli"}):
        reference, setting = adapted("partial", "tiny_vit", **granularity)
        own, expected = (
            counted(model, setting)["adapter_trainable"]
            for model in (adapted(method, "tiny_vit", **granularity)[0], reference)
        )
        assert setting.budget() == expected
        random = granularity.get("count") == "bernoulli" and method != "flow"
        assert own == pytest.approx(expected, rel=0.06 if random else 0, abs=0)


def test_controls_without_masks_train_as_many_parameters_as_bernoulli_has_drawn() -> None:
    drawn = {"granularity": "element", "count": "bernoulli", "high": 0.5}
    reference, setting = adapted("partial", "tiny_vit", **drawn)
    expected, planned = (
        counted(reference, setting)["adapter_trainable"],
        kept_parameters(*setting.units(), setting.sparsity),
    )
    assert expected != planned
    assert counted(*adapted("random_weights", "tiny_vit", **drawn))["adapter_trainable"] == expected


@pytest.mark.parametrize("method", sorted(methods.METHODS.keys() - {"peft"}))
def test_a_method_is_known_by_name_to_have_a_masked_adapter_and_to_train_a_product(method: str) -> None:
    model, _ = adapted(method, "tiny_vit")
    assert isinstance(model.peft_config["default"], PartialLoraConfig) is methods.METHODS[method].masked
    trains = {name for name, value in model.named_parameters() if value.requires_grad}
    both = all(any(f".{factor}.default." in name for name in trains) for factor in ("lora_A", "lora_B"))
    assert methods.METHODS[method].product is both


def test_every_method_starts_from_the_same_head_and_changes_nothing_before_it_trains() -> None:
    batch, plain = inputs("tiny_vit"), loud(load("tiny_vit"))
    expected = plain(**batch).logits
    for method in methods.METHODS:
        model = loud(load("tiny_vit"))
        own = methods.METHODS[method](model, setting_of("tiny_vit", model, peft_type="LOKR")).eval()
        torch.testing.assert_close(own(**batch).logits, expected, msg=method, rtol=1e-4, atol=1e-4)


def test_uniform_keeps_the_same_share_everywhere() -> None:
    model, setting = adapted("uniform", "tiny_vit")
    masks = module_masks(model)
    shares = {axis: [getattr(each, axis).density for each in masks.values()] for axis in ("rows", "columns")}
    narrowest = min(min(shape) for shape in setting.shapes.values())
    assert np.ptp(shares["rows"] + shares["columns"]) <= 1.5 / narrowest
    assert np.ptp([each for axes in setting.sparsity.values() for each in axes.values()]) > 0.5


@pytest.mark.parametrize("share", [0.02, 0.13, 0.6, 1.0])
def test_ranks_of_their_own_reach_most_of_w_at_the_size_of_each_module(share: float) -> None:
    sparsity = {"rows": 1 - share, "columns": 1 - share / 2}
    for m, n in ((48, 16), (16, 48), (384, 384), (2, 3)):
        kept = kept_count(m, sparsity["rows"]) + kept_count(n, sparsity["columns"])
        rank, chosen = widest((m, n), 16, sparsity)
        reach = kept_count(m, chosen["rows"]) + kept_count(n, chosen["columns"])
        assert 0 <= 16 * kept - rank * reach < rank
        assert all(16 * kept > lower * (m + n) for lower in range(1, rank))  # all of W's at a lower rank is less


def test_modules_with_ranks_of_their_own_have_the_size_and_loras_scaling() -> None:
    reference, setting = adapted("partial", "tiny_vit", high=0.8, rank=16)
    own, _ = adapted("partial", "tiny_vit", high=0.8, rank="auto", row_exponent=0)
    sizes = [counted(model, setting)["adapter_trainable"] for model in (own, reference)]
    assert 0 <= sizes[1] - sizes[0] < 16 * len(setting.shapes)
    layers = {name: own.get_base_model().get_submodule(name) for name in setting.shapes}
    assert len({layer.r["default"] for layer in layers.values()}) > 1
    for layer in layers.values():
        assert layer.scaling["default"] == pytest.approx(setting.method.alpha / layer.lora_A["default"].rank)


def test_entries_are_drawn_one_by_one_at_one_share_of_every_factor() -> None:
    model, setting = adapted("entries", "tiny_vit", seed=3)
    shares = []
    for module, masks in module_masks(model).items():
        m, n = setting.shapes[module]
        for axis, size in (("rows", 4 * m), ("columns", 4 * n)):
            kept = getattr(masks, axis).kept
            keys = random_keys(size, mask_seed=3, module=module, axis=axis)
            assert kept.tolist() == sorted(np.argsort(keys)[: len(kept)])
            shares.append((len(kept), size))
    spent = sum(kept for kept, _ in shares)
    assert spent == setting.budget()
    share = spent / sum(size for _, size in shares)
    assert all(abs(kept - share * size) <= 1.5 for kept, size in shares)


def test_tickets_are_the_largest_of_all_modules_in_one_ranking() -> None:
    model, setting = adapted("ticket", "tiny_vit", seed=3)
    parts = {
        (module, axis): part.tolist()
        for module, own in setting.scores.items()
        for axis, part in zip(AXES, own, strict=True)
    }
    every = [(score, *part, place) for part, scores in parts.items() for place, score in enumerate(scores)]
    kept = {(*part, max(range(len(scores)), key=scores.__getitem__)) for part, scores in parts.items()}
    for _, *which in sorted(every, key=lambda each: -each[0]):
        if len(kept) == setting.budget() // setting.rank:
            break
        kept.add(tuple(which))
    masks = module_masks(model)
    found = {(module, axis, int(i)) for module in masks for axis in AXES for i in getattr(masks[module], axis).kept}
    assert found == kept


def test_a_ticket_starts_from_the_values_of_a_that_it_was_scored_by() -> None:
    model, batch = load("tiny_vit"), inputs("tiny_vit") | {"labels": labels("tiny_vit", {})}
    setting = setting_of("tiny_vit", model)
    modules, began = {name: model.get_submodule(name) for name in setting.shapes}, {}

    def loss(model: nn.Module, batch: dict) -> torch.Tensor:
        for name in modules:
            began.setdefault(name, model.get_submodule(name).lora_A["default"].weight.detach().clone())
        return task_loss(model, batch)

    scores = data_scores("adapter", model, modules, [batch], seed=7, options={"rank": 4, "steps": 2}, loss=loss)
    set_seed(7)
    ticket = methods.METHODS["ticket"](model, dataclasses.replace(setting, scores=scores, mask=MaskConfig(**AS_PEFT)))
    for name, masks in module_masks(ticket).items():
        start = ticket.get_base_model().get_submodule(name).lora_A["default"].weight
        assert torch.equal(start[:, masks.columns.kept], began[name][:, masks.columns.kept])


def test_shuffled_gives_each_shape_its_own_sparsities_in_an_order_of_the_seed() -> None:
    shapes = {f"{block}.{name}": shape for block in range(6) for name, shape in {"a": (8, 8), "b": (16, 8)}.items()}
    shapes["alone"] = (3, 5)
    sparsity = drawn_sparsity(shapes, 3)
    dealt = permuted(sparsity, shapes, 0)
    assert list(dealt) == list(sparsity)
    assert dealt["alone"] == sparsity["alone"]
    for shape in set(shapes.values()):
        alike = [module for module in shapes if shapes[module] == shape]
        assert sorted(map(str, map(dealt.get, alike))) == sorted(map(str, map(sparsity.get, alike)))
    assert dealt != sparsity
    assert dealt == permuted(sparsity, shapes, 0) != permuted(sparsity, shapes, 1)
    kept, setting = adapted("shuffled", "tiny_vit", seed=2)
    exact = {
        module: pytest.approx(axes, abs=0.5 / 32)
        for module, axes in permuted(setting.sparsity, setting.shapes, 2).items()
    }
    assert module_sparsity(kept) == exact


def test_inverted_reverses_the_ranks_of_each_axis() -> None:
    given = dict(zip("abcde", [0.0, 0.9, 0.3, 0.3, 0.6], strict=True))
    sparsity = {module: {"rows": value, "columns": 0.5} for module, value in given.items()}
    swapped = reversed_ranks(sparsity)
    # In order 0 .3 .3 .6 .9, reversed .9 .6 .3 .3 0; the two that were equal share (.6 + .3) / 2.
    assert {module: axes["rows"] for module, axes in swapped.items()} == pytest.approx(
        {"a": 0.9, "b": 0.0, "c": 0.45, "d": 0.45, "e": 0.3}
    )
    assert {axes["columns"] for axes in swapped.values()} == {0.5}
    model, setting = adapted("inverted", "tiny_vit")
    for axis in ("rows", "columns"):
        before = [axes[axis] for axes in setting.sparsity.values()]
        after = [axes[axis] for axes in module_sparsity(model).values()]
        assert np.corrcoef(np.argsort(np.argsort(before)), np.argsort(np.argsort(after)))[0, 1] < -0.9


def test_lora_at_a_budget_holds_alpha_over_rank_and_spreads_ranks_evenly() -> None:
    model, setting = adapted("lora", "tiny_vit", size=900)
    layers = {name: layer for name, layer in model.get_base_model().named_modules() if hasattr(layer, "lora_A")}
    assert {layer.scaling["default"] for layer in layers.values()} == {setting.method.alpha / setting.rank}
    ranks = ranks_within(900, setting.shapes, setting.mask_seed)
    assert {name: layer.r["default"] for name, layer in layers.items()} == {n: r for n, r in ranks.items() if r}
    by_shape = {
        shape: [ranks[module] for module in ranks if setting.shapes[module] == shape]
        for shape in setting.shapes.values()
    }
    assert all(max(each) - min(each) <= 1 for each in by_shape.values())


def nearest_by_trying(budget: int, shapes: dict) -> tuple[float, int]:
    """The literal twin: of all units within two of their shares that fit to 1 %, how near the nearest are."""
    sizes = [sum(shape) for shape in shapes.values()]
    shares = {size: budget / sum(sizes) * sizes.count(size) for size in sorted(set(sizes))}
    around = [{max(0, round(share) + move) for move in (-2, -1, 0, 1, 2)} for share in shares.values()]
    found = []
    for units in itertools.product(*around):
        missed = abs(budget - sum(size * count for size, count in zip(shares, units, strict=True)))
        far = sum(abs(count - share) for count, share in zip(units, shares.values(), strict=True))
        found += [(round(far, 6), missed)] if missed <= 0.01 * budget else []
    return min(found)


def test_ranks_of_many_sizes_are_the_nearest_that_fit() -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        shapes = {f"m{index}": tuple(map(int, draw.integers(8, 60, 2))) for index in range(5)}
        budget = int(draw.integers(2000, 9000))
        ranks, sizes = ranks_within(budget, shapes, 0), {module: sum(shape) for module, shape in shapes.items()}
        units = {size: sum(ranks[each] for each in sizes if sizes[each] == size) for size in set(sizes.values())}
        shares = {size: budget / sum(sizes.values()) * list(sizes.values()).count(size) for size in units}
        own = round(sum(abs(units[size] - shares[size]) for size in units), 6)
        missed = abs(budget - sum(size * count for size, count in units.items()))
        assert (own, missed) == pytest.approx(nearest_by_trying(budget, shapes))
    many = {f"m{index}": (10 + index, 20) for index in range(14)}  # in all combinations they would not fit a memory
    assert sum(rank * sum(many[module]) for module, rank in ranks_within(5000, many, 0).items()) in range(4950, 5051)


def test_lora_adapts_fewer_modules_where_rank_one_is_too_much_and_says_where_none_fits() -> None:
    shapes = {f"{block}.{name}": shape for block in range(12) for name, shape in {"a": (24, 8), "b": (8, 40)}.items()}
    few = ranks_within(320, shapes, 0)
    assert set(few.values()) == {0, 1}
    spent = {seed: ranks_within(320, shapes, seed) for seed in range(3)}
    for ranks in spent.values():
        assert 317 <= sum(rank * sum(shapes[module]) for module, rank in ranks.items()) <= 323
    assert spent[0] == few
    assert spent[0] != spent[1]
    nearest = ranks_within(40, {"a": (24, 8), "b": (24, 24)}, 0)  # 32 or 48: as near
    assert sorted(nearest.values()) == [0, 1]
    with pytest.raises(PartialLoraError, match=r"^calibration\.budget: "):
        ranks_within(20, shapes, 0)


@pytest.mark.parametrize("method", ["lora", "dora", "rslora", "pissa", "hira", "lorafa", "paca", "rows"])
def test_a_budget_solves_the_rank_and_without_one_it_is_the_rank_that_is_set(method: str) -> None:
    def of(*overrides: str) -> tuple[PeftModel, Setting]:
        return fixed(method, "calibration=threshold", "method.alpha=8", *overrides)

    model, setting = of("method.rank=3")
    assert _ranks_of(model) == {3}
    model, setting = of("calibration.budget=0.25")
    spent = counted(model, setting)["adapter_trainable"]
    assert spent == pytest.approx(dense_parameters(setting.shapes, 8) / 4, rel=0.2)
    assert _ranks_of(model) != {8}


def _ranks_of(model: PeftModel) -> set[int]:
    """The ranks of all adapted modules."""
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    return {(getattr(layer, "hira_r", None) or layer.r)["default"] for layer in layers}


def trained_a_step(model: PeftModel, batch: dict) -> None:
    optimizer = torch.optim.AdamW([each for each in model.parameters() if each.requires_grad], lr=0.05)
    model(**batch).logits.square().sum().backward()
    optimizer.step()


def test_random_weights_change_as_many_entries_of_w_as_partial_has_parameters() -> None:
    model, setting = adapted("random_weights", "tiny_vit")
    trained_a_step(model, inputs("tiny_vit"))
    for name, layer in model.get_base_model().named_modules():
        if name in setting.shapes:
            changed = layer.get_delta_weight("default").to_dense()
            one = {name: setting.shapes[name]}
            kept = sum(
                round((1 - share) * size) or 1
                for share, size in zip(setting.sparsity[name].values(), one[name], strict=True)
            )
            assert abs(int((changed != 0).sum()) - setting.rank * kept) <= 2 * setting.rank  # halves round either way
    assert (
        sum(layer.shira_weight["default"].numel() for layer in model.modules() if hasattr(layer, "shira_weight"))
        == setting.budget()
    )


def test_random_weights_are_saved_as_plain_shira(tmp_path: Path) -> None:
    model, _ = adapted("random_weights", "tiny_vit")
    batch = inputs("tiny_vit")
    trained_a_step(model, batch)
    expected = model.eval()(**batch).logits
    model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(load("tiny_vit"), tmp_path).eval()
    torch.testing.assert_close(plain(**batch).logits, expected)
    again, _ = adapted("random_weights", "tiny_vit")
    assert not torch.allclose(again.eval()(**batch).logits, expected)
    again.load_adapter(tmp_path, "default", is_trainable=True)  # as Trainer loads the best checkpoint
    torch.testing.assert_close(again.eval()(**batch).logits, expected)
    one, other = (adapted("random_weights", "tiny_vit", mask_seed=seed)[0] for seed in (0, 1))
    places = [
        next(layer for layer in each.modules() if hasattr(layer, "shira_indices")).shira_indices["default"]
        for each in (model, one, other)
    ]
    assert torch.equal(places[0], places[1])
    assert not torch.equal(places[0], places[2])


def test_random_weights_need_as_many_weights() -> None:
    with pytest.raises(PartialLoraError, match=r"^method=random_weights: "):
        adapted("random_weights", "tiny_vit", rank=64, alpha=64.0, high=0.05)


def test_probe_needs_a_head() -> None:
    with pytest.raises(PartialLoraError, match=r"^method=probe: "):
        adapted("probe", "tiny_llama")
    model, setting = adapted("probe", "tiny_vit")
    assert counted(model, setting)["adapter_trainable"] == 0


@pytest.mark.parametrize("method", ["dora", "vera", "adalora", "full", "probe"])
def test_what_info_foretells_is_what_the_adapter_has(method: str, tmp_path: Path) -> None:
    foretold = outline(
        composed("model=tiny_vit", f"method={method}", *(["method.peft={r: 16}"] if method == "vera" else []))
    ).counts
    model, setting = adapted(method, "tiny_vit", rank=16, alpha=16.0)
    dense = dense_parameters(setting.shapes, 16)
    own = cost.measured(model, setting.head, dense=dense)
    heads = {"head": 32 * 10 + 10, "base": own["base"]}  # ten digits in place of three classes
    assert {key: foretold[key] for key in own} == own | heads
    model.save_pretrained(tmp_path)
    held = sum(value.nbytes for value in load_file(tmp_path / "adapter_model.safetensors").values())
    assert foretold["adapter_bytes"] == held + 4 * 7 * 33


# Shares that are fixed in place of a calibration


def fixed(method: str, *overrides: str) -> tuple[PeftModel, Setting]:
    """A tiny model as a run with `calibration.sparsity` adapts it, and the setting."""
    chosen = composed("model=tiny_vit", f"method={method}", "method.rank=8", "calibration=fixed", *overrides)
    model = load("tiny_vit")
    drawn = setting_of("tiny_vit", model)
    sparsity = chosen.sizing.sparsity(drawn.shapes)
    setting = build.setting_of(chosen, drawn.shapes, sparsity, drawn.scores)
    return chosen.method.traits(model, setting), setting


@pytest.mark.parametrize("more", [[], ["mask=element"], ["mask=units"], ["mask=groups"], ["mask=frozen"]])
def test_a_fixed_share_is_that_of_partial_lora_config(more: list[str]) -> None:
    model, setting = fixed("partial", "calibration.sparsity=0.75", *more)
    mask = composed(*more).mask
    config = PartialLoraConfig(
        r=8,
        target_modules=list(setting.shapes),
        sparsity=0.75,
        granularity=mask.granularity,
        columns=mask.columns,
        mask_seed=0,
    )
    assert module_masks(model) == module_masks(get_peft_model(load("tiny_vit"), config))


@pytest.mark.parametrize("mask", ["rows_columns", "units", "element", "groups"])
def test_python_and_the_command_line_have_the_same_defaults(mask: str) -> None:
    run, adapter = composed("calibration=fixed", f"mask={mask}"), PartialLoraConfig(granularity=mask)
    assert adapter.mask_seed == run.mask_seed
    assert adapter.sparsity == 1 - run.calibration.budget
    assert (adapter.r, adapter.lora_alpha) == (run.method.rank, run.method.alpha)
    assert adapter.lora_dropout == run.method.dropout
    for name in dataclasses.asdict(run.mask).keys() - {"seed"}:
        assert getattr(adapter, name) == getattr(run.mask, name)


def test_the_most_important_rows_meet_a_frozen_a_that_keeps_all_columns() -> None:
    model, _ = fixed("targeted", "calibration.sparsity=0.75", "mask=frozen")
    assert set(map(tuple, map(dict.values, module_sparsity(model).values()))) == {(0.75, 0.0)}


def test_modules_have_the_share_of_the_first_pattern_that_names_them() -> None:
    model, setting = fixed("partial", "calibration.sparsity={attn.qkv: 0.75, .*fc1: {rows: 0.5, columns: 0}, .*: 0.25}")
    shares = {"qkv": (0.75, 0.75), "fc1": (0.5, 0.0)}
    found = module_sparsity(model)
    assert found == {
        module: dict(zip(AXES, shares.get(module.rpartition(".")[2], (0.25, 0.25)), strict=True))
        for module in setting.shapes
    }
    for wrong in ("{nothing: 0.5, .*: 0.1}", "{attn.qkv: 0.5}", "{*x: 0.5}"):
        with refusal("calibration.sparsity "):
            fixed("partial", f"calibration.sparsity={wrong}")


@pytest.mark.parametrize("method", [name for name, of in methods.METHODS.items() if of.size == "calibrated"])
def test_every_calibrated_method_spends_a_budget_without_a_calibration(method: str) -> None:
    model, setting = fixed(method, "calibration.budget=2000")
    spent = counted(model, setting)["adapter_trainable"]
    assert spent == setting.budget() == 2000
    given = ("model=tiny_vit", "method.rank=8", "calibration=fixed", "calibration.budget=2000", f"method={method}")
    planned = outline(composed(*given))
    assert (planned.counts["adapter_trainable"], planned.passes) == (spent, 0)


def test_uniform_needs_no_calibration_for_a_budget() -> None:
    def calibrated(*overrides: str) -> bool:
        return composed("model=tiny_vit", *overrides).sizing.is_calibrated

    assert not calibrated("method=uniform", "calibration=budget")
    for more in (["calibration=threshold"], ["calibration=budget", "calibration.reliability=true"]):
        assert calibrated("method=uniform", *more)
    assert calibrated("method=partial", "calibration=budget")
    one, other = (composed("model=tiny_vit", "method=uniform", f"calibration={each}") for each in ("budget", "fixed"))
    shapes = setting_of("tiny_vit", load("tiny_vit")).shapes
    assert one.sizing.sparsity(shapes) == other.sizing.sparsity(shapes)


def test_uniform_has_the_masks_that_it_has_after_a_calibration_that_spends_as_much() -> None:
    model, setting = fixed("uniform", "calibration.budget=2000")
    calibrated = scaled(drawn_sparsity(setting.shapes, 1), *setting.units(), 2000)
    after = methods.METHODS["uniform"](load("tiny_vit"), dataclasses.replace(setting, sparsity=calibrated))
    assert module_masks(model) == module_masks(after)


def test_what_is_not_calibrated_has_no_use_for_a_share() -> None:
    for method in ("lora", "dense", "full"):
        chosen = composed("model=tiny_vit", f"method={method}", "calibration=fixed")
        assert chosen.sizing.sparsity({}) is None


def test_info_finds_no_module_saturated_where_each_has_a_rank_of_its_own() -> None:
    small = ("model=tiny_vit", "calibration=fixed", "calibration.budget=0.05")
    one, own = (outline(composed(*small, f"method.rank={rank}")).counts for rank in ("16", "auto"))
    assert one["saturated_modules"] == one["adapted_modules"]
    assert own["saturated_modules"] == 0
    assert own["adapter_trainable"] == pytest.approx(one["adapter_trainable"], rel=0.01)
