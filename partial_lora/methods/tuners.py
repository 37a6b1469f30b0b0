"""Any tuner of PEFT by its configuration (`method=peft`), as large as a budget allows."""

from __future__ import annotations

import dataclasses
import math
import warnings
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from partial_lora.budget import FARTHEST, TOLERANCE
from partial_lora.errors import PartialLoraError, one_line
from partial_lora.files import read_json, write_json
from partial_lora.masks import random_keys
from partial_lora.methods.setting import Setting, Training

# Types of tuners that a run refuses: why, or what to take instead.
_REFUSED = {
    "ADALORA": "take method=adalora",
    "LN_TUNING": "it trains layers of the model itself and not an adapter",
    "OSF": "it trains the model's own weights",
    "PARTIAL_LORA": "take method=partial",
    "POLY": "it needs the task of every example",
    "SHADOW": "it adapts a whole language model and no modules",
    "SHIRA": "take method=random_weights",
    "SUPERTUNING": "it trains the model's own weights",
    "TRAINABLE_TOKENS": "it trains tokens and no modules",
    "XLORA": "it mixes adapters that are trained already",
}
# Initialisations of LoRA that look at data or gradients before training.
_PREPARED = ("eva", "corda", "lora_ga", "loftq")
_SIZE_KEYS = {  # the key that sets the number of trainable parameters, where it is not `r`
    "BOFT": "boft_block_size",
    "C3A": "block_size",
    "FOURIERFT": "n_frequency",
    "OFT": "oft_block_size",
    "TINYLORA": "u",
    "UNILORA": "theta_d_length",
    "VBLORA": "num_vectors",
    "WAVEFT": "n_frequency",
}
_SHARED = {"LILY"}  # types whose factors modules of one name share
_BLOCKS = {"boft_block_size", "oft_block_size", "block_size"}  # sizes that have to divide the weights' sizes
_STEPS = {"GRALORA": "gralora_k", "HRA": 2}  # sizes are multiples of this number, or of this key
_SEEDS = {"generator_seed", "proj_seed", "projection_prng_key", "projection_seed", "random_loc_seed", "random_seed"}
_OWN_DROPOUT = {"module_dropout", "rank_dropout"}  # these drop something other than a layer's input
_RANKED = {"LORA", "HIRA"}  # whose r is method.rank, unless the options have another
_LARGEST = 2**20


def peft(model: nn.Module, setting: Setting) -> PeftModel:
    """Any weight tuner of PEFT, by `setting.kind` and the options of its configuration.

    It is sized (`sized`) to train `setting.size` parameters; None leaves the size to the options. Raises
    PartialLoraError with PEFT's own reason where it cannot adapt the model.
    """
    options = dict(setting.options)
    configuration(setting.kind, options)
    if setting.size is not None:
        options |= sized(setting, lambda options: counts(setting, options, model))
    return _built(model, setting, options)


def configuration(peft_type: str, options: Mapping, **shared: object) -> PeftConfig:
    """Return PEFT's configuration; raises PartialLoraError for an unknown type, and for options that PEFT refuses.

    shared: arguments that every configuration has.
    """
    tuners = weight_tuners()
    if peft_type in _REFUSED:
        raise PartialLoraError(f"method.peft_type={peft_type}: expected another tuner: {_REFUSED[peft_type]}")
    if peft_type not in tuners:
        raise PartialLoraError(f"method.peft_type={peft_type}: expected one of {', '.join(sorted(tuners))}")
    if options.get("init_lora_weights") in _PREPARED:
        raise PartialLoraError(
            f"method.peft.init_lora_weights={options['init_lora_weights']}: expected another: this one starts from a "
            "preparation that runs do not make"
        )
    try:
        return tuners[peft_type](**{"target_modules": ["all"]} | shared | dict(options))
    except (TypeError, ValueError, AssertionError) as error:
        raise PartialLoraError(f"method.peft: {one_line(error)}") from error


@cache
def weight_tuners() -> dict[str, type[PeftConfig]]:
    """Return the configuration of every tuner of the installed PEFT that adapts modules, by its type."""
    by_name = {getattr(kind, "value", kind): kind for kind in PEFT_TYPE_TO_TUNER_MAPPING}
    return {
        name: PEFT_TYPE_TO_CONFIG_MAPPING[kind]
        for name, kind in by_name.items()
        if issubclass(PEFT_TYPE_TO_TUNER_MAPPING[kind], BaseTuner) and name not in _REFUSED
    }


def _built(model: nn.Module, setting: Setting, options: Mapping) -> PeftModel:
    is_bare = setting.kind == "LORA" and all(parameter.is_meta for parameter in model.parameters())
    if is_bare and options.get("init_lora_weights") != "mica":  # which freezes B, and needs no weights for that
        options = {**options, "init_lora_weights": True}  # other initialisations read the weights
    config = configuration(setting.kind, options, **_shared(setting, options))
    try:
        return get_peft_model(model, config, low_cpu_mem_usage=is_bare)
    except (ValueError, TypeError, AssertionError, NotImplementedError) as error:
        raise PartialLoraError(f"method.peft_type={setting.kind}: {one_line(error)}") from error


def _shared(setting: Setting, options: Mapping) -> dict[str, object]:
    """Return what every configuration is given: names of modules, dropout and the seeds of what is drawn and frozen."""
    fields = _defaults(setting.kind)
    shared: dict[str, object] = {
        "target_modules": list(setting.target_modules),
        "modules_to_save": setting.whole() or None,
    }
    shared |= dict.fromkeys(_SEEDS & fields.keys(), setting.mask_seed)
    if setting.method.dropout:
        names = [name for name in fields if name.endswith("_dropout") and name not in _OWN_DROPOUT]
        if not names:
            raise PartialLoraError(
                f"method.dropout={setting.method.dropout}: expected 0: {setting.kind} has no dropout of its inputs"
            )
        shared[names[0]] = setting.method.dropout
    if setting.kind in _RANKED:
        shared["r"] = setting.rank
    if setting.kind == "LORA":
        shared["lora_alpha"] = setting.method.alpha
    if setting.kind == "IA3":
        shared["feedforward_modules"] = []  # outputs are scaled in every module
    return shared | {name: value for name, value in options.items() if name in shared}


@cache
def _defaults(peft_type: str) -> dict[str, object]:
    fields = dataclasses.fields(weight_tuners()[peft_type])
    return {field.name: None if field.default is dataclasses.MISSING else field.default for field in fields}


# --- The size that meets a budget.

Counts = Mapping[str, int]  # trainable parameters by module, and those that modules share under ""


def size_key(peft_type: str) -> str | None:
    """Return the key of a configuration that sets how many parameters train; None where none does."""
    key = _SIZE_KEYS.get(peft_type, "r")
    return key if key in _defaults(peft_type) else None


def sized(setting: Setting, counted: Callable[[Mapping], Counts]) -> dict[str, object]:
    """Return the options with which a tuner trains `setting.size` parameters, or as near to it as it can.

    The key that sets the size takes the value that comes nearest. Where that is more than 1 % off, and PEFT can set the
    key by module, some modules take the next larger value. Where even the smallest is too large for all modules, or
    none comes within FARTHEST, some modules have no adapter. The mask seed draws which.

    counted: from options, including target_modules, to the parameters that each module trains.
    Raises PartialLoraError, "not applicable", where the nearest size is more than FARTHEST off, and where the options
    have the key themselves.
    """
    kind, goal, key = setting.kind, setting.size, size_key(setting.kind)
    if key in setting.options:
        raise PartialLoraError(f"method.peft.{key}: expected none beside calibration.budget, which sets it")

    def off(options: Mapping) -> float:
        if not options.get("target_modules", setting.shapes):
            return -1.0
        return sum(counted(options).values()) / goal - 1

    def far(options: Mapping) -> float:
        return abs(off(options))

    around = _around(setting, key, counted)
    smaller, larger = around[0], around[-1]
    chosen = min((options for options, _ in around), key=far)
    if far(chosen) > TOLERANCE and smaller is not larger and _pattern_of(key) in _defaults(kind):
        drawn = _drawn(setting, larger[1], smaller[1])
        mixed = smaller[0] | _pattern(setting, key, larger[0][key], drawn)
        chosen = min(chosen, mixed, key=far)  # PEFT does not heed every pattern
    options, sizes = smaller if sum(smaller[1].values()) > goal else larger
    if far(chosen) > TOLERANCE and (options is smaller[0] or far(chosen) > FARTHEST):
        chosen = min(chosen, options | {"target_modules": _drawn(setting, sizes)}, key=far)
    if far(chosen) > FARTHEST:
        raise PartialLoraError(
            f"method.peft_type={kind}: not applicable: expected {goal:,} trainable parameters, the nearest that it can "
            f"have are {round(goal * (1 + off(chosen))):,}"
        )
    if far(chosen) > TOLERANCE:
        warnings.warn(
            f"method.peft_type={kind}: {100 * off(chosen):+.1f} % off the budget, the nearest that it can have",
            stacklevel=2,
        )
    return chosen


def _around(
    setting: Setting, key: str | None, counted: Callable[[Mapping], Counts]
) -> list[tuple[dict[str, object], Counts]]:
    """Return the nearest options on both sides of the size, with what each module trains; fewer parameters first.

    Only one, where all that PEFT can build are on one side.
    """
    values = _values(setting, key) if key else [None]
    if not values:
        raise PartialLoraError(f"method.peft_type={setting.kind}: not applicable: no {key} divides all modules' widths")

    @cache
    def at(place: int) -> Counts | None:
        try:
            return counted(_at(setting, key, values[place]))
        except PartialLoraError:  # a value that PEFT refuses for these modules
            if place:
                return None
            raise

    def total(place: int) -> float:
        return math.inf if at(place) is None else sum(at(place).values())

    def is_above(place: int) -> bool:
        return total(place) > setting.size

    step = total(1) - total(0) if len(values) > 1 else 0
    if step < 0:  # the key is the rank of a frozen part: beyond the rank of the weights it changes nothing
        values = values[: min(map(min, setting.shapes.values()))]
    places = [0]
    if is_above(0) == (step < 0):
        guess = int((setting.size - total(0)) / step) if 0 < step < math.inf else 0
        last = _last(lambda place: is_above(place) == (step < 0), len(values), guess)
        places = [place for place in (last, last + 1) if place < len(values) and total(place) < math.inf]
    return [(_at(setting, key, values[place]), at(place)) for place in sorted(places, key=total)]


def _last(holds: Callable[[int], bool], length: int, guess: int) -> int:
    """Return the last place that `holds`, sought from a guess by doubling and halving; place 0 holds."""
    low, high, step = 0, min(max(guess, 1), length), 1
    while high < length and holds(high):
        low, high, step = high, high + step, 2 * step
    return bisect_left(range(min(high, length)), True, lo=low + 1, key=lambda place: not holds(place)) - 1


def _values(setting: Setting, key: str) -> Sequence[int]:
    """Return the values that the size's key may take, in order."""
    if key in _BLOCKS:
        sizes = [n for _, n in setting.shapes.values()]
        if key == "block_size":
            sizes += [m for m, _ in setting.shapes.values()]
        common = math.gcd(*sizes)
        return [size for size in range(2, common + 1) if common % size == 0]
    step = _STEPS.get(setting.kind, 1)
    if isinstance(step, str):
        step = setting.options.get(step, _defaults(setting.kind)[step])
    return range(step, _LARGEST, step)


def _at(setting: Setting, key: str | None, value: int | None) -> dict[str, object]:
    """Return options with the key at a value; alpha changes with r, to keep alpha / r, unless the options set it."""
    if key is None:
        return {}
    alpha, ratio = _alpha(setting)
    return {key: value} | ({alpha: ratio * value} if alpha and key == "r" else {})


def _alpha(setting: Setting) -> tuple[str | None, float]:
    """Return the name of the alpha that changes with r, or None; and alpha / r, PEFT's default except for LoRA."""
    defaults = _defaults(setting.kind)
    name = next((name for name in defaults if name.split("_")[-1] == "alpha" and name != "regularization_alpha"), None)
    if name is None or name in setting.options or defaults[name] is None or setting.options.get("use_rslora"):
        return None, 1.0
    if setting.kind == "LORA":
        return name, setting.method.alpha / setting.rank
    return name, defaults[name] / defaults["r"]


def _pattern_of(key: str | None) -> str:
    """Return the name of the option that gives modules values of their own."""
    return "rank_pattern" if key == "r" else f"{key}_pattern"


def _pattern(setting: Setting, key: str, value: int, modules: Sequence[str]) -> dict[str, object]:
    """Return options that give some modules another value."""
    pattern: dict[str, object] = {_pattern_of(key): dict.fromkeys(modules, value)}
    alpha, ratio = _alpha(setting)
    if alpha and "alpha_pattern" in _defaults(setting.kind):
        pattern["alpha_pattern"] = dict.fromkeys(modules, ratio * value)
    return pattern


def _drawn(setting: Setting, larger: Counts, smaller: Counts | None = None) -> list[str]:
    """Draw modules at random, while they fit, whose larger counts bring the sum near the size from below.

    smaller: the counts of the others; None where they train nothing.
    """
    smaller = smaller or dict.fromkeys(larger, 0) | {"": larger[""]}
    names, left = list(setting.shapes), setting.size - sum(smaller.values())
    keys = random_keys(len(names), mask_seed=setting.mask_seed, module=setting.kind, axis="sizes")
    drawn = set()
    for place in np.argsort(keys):
        name = names[place]
        if larger[name] - smaller[name] <= left:
            drawn.add(name)
            left -= larger[name] - smaller[name]
    return [name for name in names if name in drawn]


def counts(setting: Setting, options: Mapping, model: nn.Module) -> Counts:
    """Count the parameters that each module of a model would train with these options, on the meta device.

    Where the options have target_modules, only these count.
    """
    if setting.kind in _SHARED:
        raise PartialLoraError(
            f"calibration.budget: {setting.kind} shares factors between modules of one name, so no module has a "
            "size of its own; expected null, and the size among the options of method.peft"
        )
    names = options.get("target_modules", list(setting.shapes))
    bare = dataclasses.replace(setting, target_modules=names, head=None, new_modules=(), size=None)
    try:
        with torch.random.fork_rng(devices=[]):
            adapted = _built(_stand_in(model, names), bare, dict(setting.options) | dict(options))
    except PartialLoraError as error:
        if isinstance(error.__cause__, NotImplementedError):  # it looks at the values of the weights
            raise PartialLoraError(
                f"calibration.budget: {setting.kind} cannot be sized for it; expected null, and the size among "
                "the options of method.peft"
            ) from error
        raise
    trained, seen = {"": 0}, set()
    for name, layer in adapted.base_model.model.named_modules():
        if isinstance(layer, BaseTunerLayer):
            frozen = {id(parameter) for parameter in layer.get_base_layer().parameters()}
            weights = {
                id(weight): weight for weight in layer.parameters() if weight.requires_grad and id(weight) not in frozen
            }
            trained[name] = sum(weight.numel() for key, weight in weights.items() if key not in seen)
            seen |= weights.keys()
    trained[""] = sum(
        weight.numel() for weight in adapted.parameters() if weight.requires_grad and id(weight) not in seen
    )
    return trained


def _stand_in(model: nn.Module, modules: Sequence[str]) -> nn.Module:
    """Return a model of the modules alone, under their names and without memory."""
    root = nn.Module()
    for name in modules:
        *parents, last = name.split(".")
        parent = root
        for part in parents:
            if not hasattr(parent, part):
                parent.add_module(part, nn.Module())
            parent = getattr(parent, part)
        module = model.get_submodule(name)  # linear, as all that is adapted
        empty = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
        parent.add_module(last, empty)
    return root


# --- What training adds: the size in the record.


def train_tuner(adapted: PeftModel) -> Training:
    """Train as every method does; record the key that sets the size."""
    config = adapted.peft_config["default"]
    kind = getattr(config.peft_type, "value", config.peft_type)
    key = size_key(kind)
    size = {} if key is None else {key: getattr(config, key)}
    pattern = getattr(config, _pattern_of(key), None)
    return Training(summary=lambda: {"peft_type": kind, "size": size | {"pattern": len(pattern)} if pattern else size})


def taken_out(adapted: PeftModel) -> dict[str, Tensor] | None:
    """Return a copy of a new adapter that was subtracted from W, and so fits this model alone; None for any other.

    `put_back` makes the saved adapter fit the model as it was before.
    """
    config = adapted.peft_config["default"] if isinstance(adapted, PeftModel) else None
    start = str(getattr(config, "init_lora_weights", "")).lower()
    if not (start.startswith("pissa") or start == "olora"):
        return None
    state = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    return {name: tensor.detach().clone() for name, tensor in state.items()}


def put_back(folder: Path, start: Mapping[str, Tensor]) -> None:
    """Turn a saved adapter that began as `start` (`taken_out`) into a plain LoRA of its change, of twice the rank.

    B A − B₀ A₀ is [B, −B₀] [A; A₀]. PEFT's own conversion loses the head.
    """
    file, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    state = load_file(file)
    for name, tensor in state.items():
        if ".lora_A." in name:
            state[name] = torch.cat([tensor, start[name]])
        elif ".lora_B." in name:
            state[name] = torch.cat([tensor, -start[name]], dim=1)
    save_file(state, file, metadata={"format": "pt"})
    config = read_json(settings)
    times = 2**0.5 if config["use_rslora"] else 2
    config |= {"r": 2 * config["r"], "lora_alpha": times * config["lora_alpha"], "init_lora_weights": True}
    for pattern, factor in (("rank_pattern", 2), ("alpha_pattern", times)):
        config[pattern] = {module: factor * value for module, value in config[pattern].items()}
    write_json(settings, config)
