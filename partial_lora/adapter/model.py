"""PartialLoraModel: PEFT's LoRA tuner, which masks every adapter it has just built."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any, cast

from peft import LoraConfig, PeftType, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer, _maybe_include_all_linear_layers, check_target_module_exists
from torch import Tensor, backends, nn
from torch.nn.modules.conv import _ConvNd

from partial_lora.adapter.config import Drawn, PartialLoraConfig
from partial_lora.adapter.factor import PARTS, FactorA, FactorB, MaskedFactor
from partial_lora.adapter.fingerprint import forget_base, remember_base
from partial_lora.adapter.layer import EMBEDDED, PartialEmbedding, as_factors, mask_layer
from partial_lora.adapter.selection import Geometry, ModuleMasks, geometry, parameter_geometry
from partial_lora.errors import PartialLoraError, shortlist
from partial_lora.masks import AXES, Mask


class PartialLoraModel(LoraModel):
    """A base model whose adapters hold only the kept rows and columns.

    PEFT itself does all that its LoRA does (merging, saving, several adapters, quantised bases). An adapter with a
    LoraConfig is plain LoRA, beside masked ones; add_weighted_adapter combines adapters into such a one.

    Raises PartialLoraError, before anything is built, for targets that cannot be masked.
    """

    _drawn: Drawn | None = None  # while an adapter is put in
    OWN = frozenset({"OWN", "_drawn", "_geometries", "__annotations__"})  # what LoraModel does not have

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, state_dict=None, **kwargs) -> None:
        """Put an adapter into ``model``, as PEFT does."""
        if state_dict is not None and isinstance(self.peft_config[adapter_name], PartialLoraConfig):
            raise PartialLoraError("targets taken from a state_dict cannot be masked: name them in target_modules.")
        if any(isinstance(layer, LoraLayer) and adapter_name in layer.lora_A for layer in model.modules()):
            raise PartialLoraError(
                f"the model already has an adapter {adapter_name!r}: load the base model again, unload() its PeftModel,"
                " or choose another name."
            )
        try:
            super().inject_adapter(model, adapter_name, *args, state_dict=state_dict, **kwargs)
        finally:
            self._drawn = None
        if isinstance(config := self.peft_config[adapter_name], PartialLoraConfig):
            _save_with(config, model, adapter_name)

    def _prepare_model(self, peft_config: LoraConfig, model: nn.Module) -> None:
        # PEFT calls this last before it replaces the first module: the model is still unchanged.
        if isinstance(peft_config, PartialLoraConfig):
            peft_config.check()  # attributes may have changed since, and super() would replicate layers
        super()._prepare_model(peft_config, model)
        if isinstance(peft_config, PartialLoraConfig):
            named = peft_config.target_modules
            _name_experts(peft_config, model)  # first: "all-linear" stands for them, too
            _maybe_include_all_linear_layers(peft_config, model)
            if peft_config.target_modules != named:
                # PEFT lists parts of its wrappers, too: a head in there trains whole already.
                listed = cast("set[str]", peft_config.target_modules)
                peft_config.target_modules = {name for name in listed if not set(name.split(".")) & _WRAPPED}
                _warn_of_experts(peft_config, model, named)
            _check_tying(peft_config, model)
            geometries = self._geometries(peft_config, model)
            self._drawn = peft_config.choose_masks(geometries), geometries
            _warn_of_saturation(peft_config, *self._drawn)

    def _geometries(self, peft_config: PartialLoraConfig, model: nn.Module) -> dict[str, Geometry]:
        """Return the modules that PEFT is about to adapt, {name: geometry}; refuse those that cannot be masked."""
        if (getattr(model, "_tp_size", None) or 1) > 1:
            raise PartialLoraError("the base model is split by tensor parallelism: load it without tp_plan.")
        modules = dict(model.named_modules())
        names, inside = [], None
        for name, module in modules.items():  # what is inside a layer follows it
            if name and not (inside and name.startswith(inside)):
                names.append(name)
                inside = f"{name}." if isinstance(module, BaseTunerLayer) else None
        targets = [name for name in names if self._check_target_module_exists(peft_config, name)]
        patterns = peft_config.target_modules or []
        ends = set() if isinstance(patterns, str) else {end for name in names for end in _ends(name)}
        for target in [] if isinstance(patterns, str) else sorted(patterns):
            if target not in ends:
                kinds = dict.fromkeys(name.rpartition(".")[2] for name in names if hasattr(modules[name], "weight"))
                raise PartialLoraError(
                    f"target_modules names {target!r}, which matches no module; there are {shortlist(list(kinds))}."
                )
        usual = _HEADS if peft_config.task_type in ("SEQ_CLS", "TOKEN_CLS") else ()
        for part in peft_config.modules_to_save or ():
            if part not in usual and not any(name.endswith(part) for name in modules):  # as PEFT finds them
                raise PartialLoraError(f"modules_to_save names {part!r}, which matches no module.")
        parameters = _target_parameters(peft_config, model)
        if not targets and not parameters:
            keys = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save")
            options = {key: getattr(peft_config, key) for key in keys}
            listed = ", ".join(f"{key}={value!r}" for key, value in options.items() if value not in (None, []))
            raise PartialLoraError(f"{listed}: no module is left to adapt.")
        placed = getattr(model, "hf_device_map", None) or {}
        away = {"cpu", "disk"} if {*placed.values()} - {"cpu", "disk"} else {"disk"}
        offloaded = {part for part, place in placed.items() if place in away}
        for key in ("alora_invocation_tokens", "lora_bias"):
            if parameters and getattr(peft_config, key):
                raise PartialLoraError(f"target_parameters: expected modules alone beside {key}.")
        unfit: dict[str, Any] = {"alora_invocation_tokens": (nn.Embedding, _ConvNd), "lora_bias": nn.Embedding}
        unfit = {key: kinds for key, kinds in unfit.items() if getattr(peft_config, key)}
        if axis := peft_config.frozen_axis:
            unfit[axis] = nn.Embedding if getattr(peft_config, axis) == "frozen" else (nn.Embedding, _ConvNd)
        for name in targets:
            if any(f"{name}.".startswith(f"{part}.") for part in offloaded):
                raise PartialLoraError(
                    f"target module {name} is offloaded by the base model's device_map, from where accelerate cannot"
                    " fetch masked factors: keep it on a GPU, or load the base quantised."
                )
            parent = modules[name.rpartition(".")[0]]
            if isinstance(parent, nn.MultiheadAttention):
                raise PartialLoraError(
                    f"target module {name} is inside nn.MultiheadAttention, which never calls it, and would not train:"
                    " leave it out by exclude_modules."
                )
            if isinstance(parent, nn.TransformerEncoderLayer) and backends.mha.get_fastpath_enabled():
                raise PartialLoraError(
                    f"target module {name} is inside nn.TransformerEncoderLayer, which in evaluation never calls it:"
                    " torch.backends.mha.set_fastpath_enabled(False) first, wherever the adapter is used."
                )
            adapted = modules[name]
            base = adapted.get_base_layer() if isinstance(adapted, BaseTunerLayer) else adapted
            for key, kinds in unfit.items():
                if isinstance(base, kinds):
                    raise PartialLoraError(
                        f"target module {name} is a {type(base).__name__}: {key}={getattr(peft_config, key)!r} does not"
                        " fit it; leave it out of target_modules."
                    )
        geometries = {
            loaded_name(name): geometry(name, modules[name], peft_config.rank_of(loaded_name(name))) for name in targets
        }
        for name, (module, parameter) in parameters.items():
            geometries[name] = parameter_geometry(module, parameter, peft_config.rank_of(name))
        return geometries

    def _check_target_module_compatiblity(self, peft_config: LoraConfig, model: nn.Module, target_name: str) -> None:
        # PEFT goes by the method's name, and by nothing else, to refuse targets that LoRA does not work on.
        shown = cast(LoraConfig, SimpleNamespace(peft_type=PeftType.LORA))
        super()._check_target_module_compatiblity(shown, model, target_name)

    def _create_and_replace(
        self, lora_config, adapter_name, target, target_name, parent, current_key, **kwargs
    ) -> None:
        super()._create_and_replace(lora_config, adapter_name, target, target_name, parent, current_key, **kwargs)
        if isinstance(lora_config, PartialLoraConfig):
            # PEFT has drawn the dense factors with the same random numbers as plain LoRA; now most entries are dropped.
            name, parameter = loaded_name(current_key), kwargs.get("parameter_name")
            is_wrapped = isinstance(target, ParamWrapper) and target.parameter_name == parameter
            layer = target if is_wrapped else parent.get_submodule(target_name)  # wrapped before, or now
            masks, geometries = cast(Drawn, self._drawn)
            options: dict[str, Any] = {key: getattr(lora_config, key) for key in ("fan_in", "rows", "columns")}
            options["invoked"] = bool(lora_config.alora_invocation_tokens)
            options["frozen"] = lora_config.frozen(name, geometries[name])
            options["factor"] = lora_config.density_factor(masks[name])
            mask_layer(layer, adapter_name, masks[name], **options)

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str, combination_type: str = "svd", **kwargs
    ) -> None:
        """Combine adapters into a new one, as PEFT does; a combination has no mask, so the new one is plain LoRA."""
        configs = {name: self.peft_config[name] for name in adapters if name in self.peft_config}
        for key, layer in self.model.named_modules():
            if isinstance(layer, PartialEmbedding) and layer.lora_B.keys() & configs.keys():
                raise PartialLoraError(f"{loaded_name(key)} is an embedding: PEFT cannot combine its masked adapters.")
        for name, config in configs.items():
            if config.lora_bias and isinstance(config, PartialLoraConfig):  # of its own LoRA, it drops them
                raise PartialLoraError(f"adapter {name!r} has lora_bias: PEFT combines factors without their biases.")
            if config.rank_pattern and combination_type != "cat" and not combination_type.endswith("svd"):
                raise PartialLoraError(
                    f"adapter {name!r} has a rank_pattern: combination_type={combination_type!r} adds up factors, which"
                    " must have one rank; take 'cat' or a type that ends in 'svd'."
                )
        dense = {
            name: config.as_lora(saved_rank(self.model, name))
            for name, config in configs.items()
            if isinstance(config, PartialLoraConfig)
        }
        for config in dense.values():
            config.use_rslora = False  # scales go into the factors
        self.peft_config.update(dense)  # PEFT copies the new config from the first of these
        try:
            super().add_weighted_adapter(adapters, weights, adapter_name, combination_type, **kwargs)
        finally:
            self.peft_config.update(configs)

    def merge_adapter(self, *args, **kwargs) -> None:
        """Merge, as PEFT does, but first keep the base's diagonals: unmerging restores weights only up to rounding."""
        remember_base(self.model)
        super().merge_adapter(*args, **kwargs)

    def _unload_and_optionally_merge(self, merge: bool = True, *args, **kwargs) -> nn.Module:
        layers = [layer for layer in self.model.modules() if isinstance(layer, BaseTunerLayer)]
        altered = [layer for layer in layers if merge or layer.merged]  # unload() does not unmerge
        base = super()._unload_and_optionally_merge(merge, *args, **kwargs)
        forget_base(altered)
        return base

    @classmethod
    def _get_adapter_state_dict(
        cls, *, model: nn.Module, config: LoraConfig, adapter_name: str, state_dict: dict, **kwargs
    ) -> dict:
        """Return the adapter's part of a state dict as it is on disk: every factor dense, all of one rank and alpha.

        A masked factor writes itself dense. ZeRO's stage 3 instead gathers a state dict by the names of parameters, so
        there it has the kept entries under the names of these.
        """
        options: dict[str, Any] = {"model": model, "config": config, "adapter_name": adapter_name}
        state = super()._get_adapter_state_dict(state_dict=state_dict, **options, **kwargs)
        if not isinstance(config, PartialLoraConfig):
            return state
        _save_with(config, model, adapter_name)  # which is saved next
        layers: dict[str, Any] = {}
        factors: dict[str, tuple[str, str, str, MaskedFactor]] = {}
        ends = tuple(f".{adapter_name}.{name}" for name in (*PARTS, *PARTS.values()))
        for key in [key for key in state if key.endswith(ends) and ".lora_" in key]:
            path, part, _, name = key.rsplit(".", 3)
            if path not in layers:
                layers[path] = model.get_submodule(path)
            factor = getattr(layers[path], part)[adapter_name]
            if isinstance(factor, MaskedFactor):
                factors[key] = path, part, name, factor
        paths = {path for path, *_ in factors.values()}
        rank = max((layer_rank(layers[path], adapter_name) for path in paths), default=config.r)
        for key, (path, part, name, factor) in factors.items():
            value, layer = state.pop(key), layers[path]
            dense = value if name in PARTS else factor.dense(value)
            whole_name = "weight" if name in ("weight", "kept") else "bias"
            if whole_name == "weight" and not isinstance(layer, ParamWrapper):
                dense = factor.padded(dense, rank)
            if part == "lora_B" and (ratio := config.own_scaling(_layer_name(base_name(path), layer))) != 1:
                dense = dense * ratio
            if isinstance(layer, PartialEmbedding):
                state[f"{path}.{EMBEDDED[part]}.{adapter_name}"] = dense.T.contiguous()
            else:
                state[f"{path}.{part}.{adapter_name}.{whole_name}"] = dense
        return state

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, *, model: nn.Module, config: LoraConfig, state_dict: dict, **kwargs
    ) -> dict:
        factors = as_factors(state_dict)
        if isinstance(config, PartialLoraConfig) and (config.rank_pattern or config.alpha_pattern):
            names = {base_name(path): name for path, name in _layer_names(model).items()}
            for key in factors:
                path, is_b, _ = key.partition(".lora_B.")
                if is_b and base_name(path) in names:
                    factors[key] = factors[key] / config.own_scaling(names[base_name(path)])
        return super()._remap_adapter_state_dict_for_load(model=model, config=config, state_dict=factors, **kwargs)

    @classmethod
    def _convert_state_dict_for_initial_model(cls, *args, **kwargs) -> dict:
        raise PartialLoraError(
            "path_initial_model_for_weight_conversion has no meaning here: the base is never changed."
        )


_HEADS = ("classifier", "score")  # that PEFT adds for these tasks, whichever of them the model has
_WRAPPED = {"modules_to_save", "original_module"}  # what PEFT's ModulesToSaveWrapper holds


def _name_experts(config: PartialLoraConfig, model: nn.Module) -> None:
    """Name fused experts by their parameters, where target_modules names their parts as a class had them before.

    "all-linear" names them and the router. PEFT does so for its own LoRA, in the config, and so again when it reads the
    saved one. Raises PartialLoraError for a part without the one that it is fused with.
    """
    if config.expected is not None or not hasattr(getattr(model, "config", None), "model_type"):
        return
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    plain = config.as_lora()
    try:
        convert_peft_config_for_transformers(plain, model, None)
    except ValueError as error:
        raise PartialLoraError(f"target_modules={config.target_modules!r}: {error}") from None
    if plain.target_parameters and plain.target_parameters != config.target_parameters:
        config.target_modules, config.target_parameters = plain.target_modules, plain.target_parameters


def _warn_of_experts(config: PartialLoraConfig, model: nn.Module, named: object) -> None:
    """Warn of fused experts that "all-linear" leaves out: PEFT knows only some classes of them."""
    if not isinstance(named, str) or config.target_parameters:
        return
    modules = [(path, module) for path, module in model.named_modules() if type(module).__name__.endswith("Experts")]
    fused = dict.fromkeys(
        f"{path.rpartition('.')[2]}.{name}"
        for path, module in modules
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.ndim == 3
    )
    if fused:
        warnings.warn(
            f"target_modules={named!r} leaves out fused experts: target_parameters={[*fused]} adapts them, too",
            stacklevel=2,
        )


def _check_tying(config: PartialLoraConfig, model: nn.Module) -> None:
    """Raise PartialLoraError for tied embeddings as targets, whose adapter PEFT would tie by copying its tensors."""
    is_tied = getattr(getattr(model, "config", None), "tie_word_embeddings", False)
    if not config.ensure_weight_tying or not is_tied:
        return
    getters = (getattr(model, f"get_{end}_embeddings", None) for end in ("input", "output"))
    ends = [embeddings for get in getters if get and (embeddings := get()) is not None]
    for name, module in model.named_modules():
        if any(module is end for end in ends) and check_target_module_exists(config, name):
            raise PartialLoraError(
                f"ensure_weight_tying: the masked adapter of {name} cannot be tied; leave {name} out of target_modules,"
                " or set ensure_weight_tying=False."
            )


def loaded_name(name: str) -> str:
    """Return a name in the base model without what torch.compile and FSDP 1 put into it."""
    return name.replace("_orig_mod.", "").replace("_fsdp_wrapped_module.", "")


def base_name(key: str) -> str:
    """Return a name in a PeftModel, or in its file, as the base model has it."""
    return loaded_name(key).removeprefix("base_model.model.")


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules of the base model, with PEFT's layers but not what these hold, by their names as loaded."""
    return {loaded_name(name): module for name, module in _modules(_base_of(model))}


def _base_of(model: nn.Module) -> nn.Module:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield a model's modules by name, as named_modules does, without a LoRA layer's dozen of parts but its base."""
    met: set[nn.Module | None] = {None}
    ahead: list[tuple[str, nn.Module | None]] = [("", model)]
    while ahead:  # no recursion, which costs at every level
        name, module = ahead.pop()
        if module not in met:
            met.add(module)
            yield name, module
            parts, prefix = module._modules, f"{name}." if name else ""
            below = ("base_layer",) if isinstance(module, LoraLayer) else reversed(parts)
            ahead += [(prefix + part, parts[part]) for part in below]


def adapter_layers(model: nn.Module, adapter_name: str) -> dict[str, LoraLayer]:
    """Return the layers of a LoRA or Partial-LoRA model that hold the adapter, by their names in the base model."""
    return {
        _layer_name(loaded_name(name), layer): layer
        for name, layer in _modules(_base_of(model))
        if isinstance(layer, LoraLayer) and (adapter_name in layer.lora_A or adapter_name in layer.lora_embedding_A)
    }


def _layer_names(model: nn.Module) -> dict[str, str]:
    """Return the names of layers with adapters in the base model, by their names in this model."""
    layers = {path: layer for path, layer in _modules(model) if isinstance(layer, LoraLayer)}
    return {path: _layer_name(base_name(path), layer) for path, layer in layers.items()}


def _layer_name(name: str, layer: LoraLayer) -> str:
    """Return the name of the weight that a layer adapts: its own, or its parameter's, of which PEFT nests several."""
    if not isinstance(layer, ParamWrapper):
        return name
    while name.endswith(".base_layer"):
        name = name.removesuffix(".base_layer")
    return f"{name}.{layer.parameter_name}"


def _ends(name: str) -> Iterator[str]:
    """Yield a name and what follows each of its dots."""
    while name:
        yield name
        _, _, name = name.partition(".")


def _target_parameters(config: PartialLoraConfig, model: nn.Module) -> dict[str, tuple[nn.Module, str]]:
    """Return the parameters that PEFT is about to adapt, by name: the module that has one, and its name there."""
    wanted, found, matched = set(config.target_parameters or ()), {}, set()
    for path, module in model.named_modules() if wanted else ():
        for name, _ in module.named_parameters(recurse=False):
            full = ".".join(part for part in loaded_name(f"{path}.{name}").split(".") if part != "base_layer")
            if ends := wanted.intersection(_ends(full)):
                found[full] = module, name
                matched |= ends
    if missing := sorted(wanted - matched):
        raise PartialLoraError(f"target_parameters names {missing[0]!r}, which matches no parameter.")
    return found


def adapter_tensors(model: nn.Module, adapter_name: str, *, masked: bool = True) -> dict[str, Tensor]:
    """Return the tensors that PEFT saves of an adapter, by names in the base model; only masked factors are copies.

    masked: False leaves these out, and takes no time for them.
    """
    state: dict[str, Tensor] = model.state_dict() if masked else {}
    for path, module in () if masked else _modules(model):
        module._save_to_state_dict(state, f"{path}." if path else "", keep_vars=False)
    state = get_peft_model_state_dict(model, state, adapter_name=adapter_name, save_embedding_layers=False)
    again = (".modules_to_save.", ".original_module.")  # with bias="all", a head's biases are there twice
    return as_factors({base_name(key): state[key] for key in state if not any(part in key for part in again)})


def check_unmerged(model: nn.Module) -> None:
    """Raise PartialLoraError, naming the module, for a model with an adapter merged into its base weights."""
    for name, module in _modules(model):
        if isinstance(module, BaseTunerLayer) and module.merged:
            raise PartialLoraError(f"{name} has an adapter merged into its base weight: call unmerge_adapter() first.")


def config_of(model: nn.Module, adapter_name: str) -> LoraConfig:
    """Return the config of an adapter; raise PartialLoraError, naming those that are there, where it is missing."""
    configs = getattr(model, "peft_config", {})
    if adapter_name not in configs:
        names = ", ".join(map(repr, configs)) or "none"
        raise PartialLoraError(f"adapter_name is {adapter_name!r}: the model's adapters are {names}.")
    return configs[adapter_name]


def _warn_of_saturation(
    config: PartialLoraConfig, drawn: Mapping[str, ModuleMasks], geometries: Mapping[str, Geometry]
) -> None:
    """Warn of modules that are to train no fewer numbers than there are entries of W that they can change."""
    if config.inference_mode or config.granularity != "rows_columns" or config.frozen_axis is not None:
        return
    saturated = []
    for module, masks in drawn.items():
        rows, columns, rank = len(masks.rows.kept), len(masks.columns.kept), geometries[module].rank
        if (
            geometries[module].experts is None
            and len(geometries[module].a) == 2
            and rank * (rows + columns) >= rows * columns > 0
        ):
            saturated.append((module, rank * (rows + columns), rows * columns))
    if saturated:
        module, numbers, entries = saturated[0]
        warnings.warn(
            f"{len(saturated)} of {len(drawn)} modules train no fewer numbers than there are entries of W that "
            f"they can change (as {module}: {numbers:,} for {entries:,}): a lower r, or a lower sparsity, reaches more",
            stacklevel=2,
        )


def module_masks(model: nn.Module, adapter_name: str = "default") -> dict[str, ModuleMasks]:
    """Return the masks in force, {module: masks}, read off the adapter itself; full ones for plain LoRA.

    Raises PartialLoraError for a module that has lost its masks, as when PEFT code builds its layers again.
    """
    masked, layers = isinstance(config_of(model, adapter_name), PartialLoraConfig), adapter_layers(model, adapter_name)
    if masked:
        return dict(drawn_of(layers, adapter_name)[0])
    masks = {}
    for name, layer in layers.items():
        shape = layer.out_features, layer.in_features
        if adapter_name in layer.lora_embedding_A:  # rank × rows of W, and columns of W × rank
            shape = layer.lora_embedding_A[adapter_name].shape[1], layer.lora_embedding_B[adapter_name].shape[0]
        masks[name] = ModuleMasks(*map(Mask.full, shape), shape)
    return masks


def drawn(model: nn.Module, adapter_name: str = "default") -> Drawn:
    """Return the masks and geometries of a masked adapter, {module: masks} and {module: geometry}."""
    return drawn_of(adapter_layers(model, adapter_name), adapter_name)


def drawn_of(layers: Mapping[str, LoraLayer], adapter_name: str) -> Drawn:
    """Return the masks and geometries of the layers of a masked adapter, {module: layer}, read off its factors."""
    masks, geometries = {}, {}
    for name, layer in layers.items():
        a, b = (factors._modules.get(adapter_name) for factors in (layer.lora_A, layer.lora_B))
        if not (isinstance(a, FactorA) and isinstance(b, FactorB)):
            raise PartialLoraError(f"{name} has lost its masks: something has rebuilt its adapter as dense LoRA.")
        shape, experts = (b.shape[0], a.shape[1]), layer.num_experts if isinstance(layer, ParamWrapper) else None
        masks[name] = ModuleMasks(rows=b.mask, columns=a.mask, shape=shape)
        geometries[name] = Geometry(shape, a=tuple(a.shape), b=tuple(b.shape), experts=experts)
    return masks, geometries


def saved_rank(model: nn.Module, adapter_name: str) -> int:
    """Return the rank of every module of a masked adapter on disk: the highest."""
    return max(layer_rank(layer, adapter_name) for layer in adapter_layers(model, adapter_name).values())


def layer_rank(layer: LoraLayer, adapter_name: str) -> int:
    """Return the rank of a masked layer's factors, padded or not; of experts that of each."""
    experts = layer.num_experts if isinstance(layer, ParamWrapper) else 1
    return cast(MaskedFactor, layer.lora_A[adapter_name]).rank // experts


def _save_with(config: PartialLoraConfig, model: nn.Module, adapter_name: str) -> None:
    """Have a config save the masks of an adapter of this model, which it does not keep alive."""
    reference = weakref.ref(model)

    def masks() -> Drawn:
        if (alive := reference()) is None:
            raise PartialLoraError("the model of this PartialLoraConfig is gone, and its masks: save the model.")
        return drawn(alive, adapter_name)

    config.drawn = masks


def module_sparsity(model: nn.Module, adapter_name: str = "default") -> dict[str, dict[str, float]]:
    """Return the measured sparsity of every adapted module: {module: {"rows": s, "columns": s}}."""
    return {
        name: {axis: getattr(masks, axis).sparsity for axis in AXES}
        for name, masks in module_masks(model, adapter_name).items()
    }
