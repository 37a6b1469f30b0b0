"""What calibration found, and the calibration.json that holds it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from partial_lora.errors import PartialLoraError
from partial_lora.results import write_json

VERSION = 1
AXES = ("rows", "columns")

Sparsity = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Calibration:
    """What calibration found: one sparsity for each module and axis, and the curves it was read from.

    threshold: the one asked for, or the one that meets `budget`. scaled: densities were then scaled to spend the
    budget, so the sparsities are no levels of the curves. evaluations, seconds: what this call cost; cached: it
    evaluated nothing. modules: {name: {"rows"|"columns": {"sparsity", "curve": [[level, score | [low, high]]...]}}}.
    """

    baseline: float
    joint: float
    threshold: float | None
    modules: dict[str, dict[str, dict]]
    budget: float | None = None
    search: str = "scan"
    scaled: bool = False
    evaluations: int = 0
    seconds: float = 0.0
    cached: bool = False
    settings: dict = field(default_factory=dict)
    version: int = VERSION

    @property
    def sparsity(self) -> Sparsity:
        """{module: {"rows": s, "columns": s}}, as PartialLoraConfig takes it."""
        return {name: {axis: axes[axis]["sparsity"] for axis in AXES} for name, axes in self.modules.items()}

    def summary(self) -> dict:
        """What a run's result.json says of its calibration: everything but settings and curves."""
        return {
            key: value
            for key, value in dataclasses.asdict(self).items()
            if key not in ("modules", "settings", "version")
        }

    def save(self, path: Path) -> None:
        """Write calibration.json, atomically."""
        write_json(Path(path), dataclasses.asdict(self))

    def reused_for(self, modules: Sequence[str]) -> Calibration:
        """The same, as a run that did not pay for it records it.

        Raises PartialLoraError, naming the first, where these are not the modules that the run adapts.
        """
        for module in sorted(self.modules.keys() ^ set(modules)):
            where = "not in this model's targets" if module in self.modules else "missing"
            raise PartialLoraError(f"calibration.file: {module} is {where}; expected a calibration of the same model")
        return dataclasses.replace(self, cached=True, evaluations=0, seconds=0.0)

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Read calibration.json. Raises PartialLoraError, naming the file, for one that is broken."""
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8"))
            if content["version"] != VERSION:
                raise ValueError(f"version {content['version']} instead of {VERSION}")
            known = {item.name for item in dataclasses.fields(cls)}
            found = cls(**{"threshold": None} | {key: value for key, value in content.items() if key in known})
            for name, axes in found.sparsity.items():
                for axis, value in axes.items():
                    if not (isinstance(value, (int, float)) and 0 <= value < 1):
                        raise ValueError(f"{name}.{axis}: sparsity {value} is not in [0, 1)")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise PartialLoraError(f"{path}: expected a calibration.json ({type(error).__name__}: {error})") from error
        return found
