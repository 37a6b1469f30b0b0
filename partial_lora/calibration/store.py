"""What calibration has found so far, kept on disk, so that no point of a curve is evaluated in two runs."""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from partial_lora.calibration.peers import Peers, gathered
from partial_lora.calibration.points import Curve, curve_of, listed
from partial_lora.locks import alone
from partial_lora.sealed import write_json

VERSION = 1

logger = logging.getLogger(__name__)


class Store:
    """Curves and finished results on disk, for one model, score, importance and search.

    path: a JSON file, or None to keep nothing. key: plain data that says what the curves are of. A file that is broken
    or has another key is named, removed and never used.
    """

    def __init__(self, path: Path | None, key: Mapping) -> None:
        self.path, self.key = None if path is None else Path(path), json.loads(json.dumps(key))
        self.baseline: float | None = None
        self.results: dict[str, dict] = {}
        self.changed = False
        self._curves: dict[str, dict[str, Curve]] = {}
        if self.path is not None and self.path.exists():
            try:
                self._read(json.loads(self.path.read_text(encoding="utf-8")))
            except (OSError, ValueError, KeyError, TypeError) as error:
                self.discard(f"not the curves that were kept there ({type(error).__name__}: {error})")

    @classmethod
    @contextmanager
    def shared(cls, path: Path | None, key: Mapping, peers: Peers) -> Iterator[Store]:
        """The store of processes that share a calibration: rank 0 has the file, all know what it says.

        The file is held until the block ends, and written then, also where it is interrupted: another run that asks the
        same waits, and finds the answer.
        """
        with ExitStack() as held:
            opened: list[Store] = []

            def content() -> dict | None:
                own = path if peers.rank == 0 else None
                if own is not None:
                    with suppress(OSError):  # a store that cannot be written is only read
                        held.enter_context(alone(Path(own), "calibrate into"))
                opened.append(cls(own, key))
                return opened[0].content() if peers.size > 1 and peers.rank == 0 else None

            known = gathered(peers, content)[0]
            if peers.rank:
                opened[0].take(known)
            try:
                yield opened[0]
            finally:
                opened[0].save()

    def curve(self, module: str, axis: str, after: str = "") -> Curve:
        """The points known of one curve, by level; to be added to. `after` names what is zeroed in other modules."""
        return self._curves.setdefault(module, {}).setdefault(f"{axis}@{after}" if after else axis, {})

    def belongs_to(self, baseline: float) -> None:
        """Take the baseline score of the model that is calibrated; curves of a model with another one are dropped."""
        if self.baseline is not None and not math.isclose(self.baseline, baseline, rel_tol=1e-6, abs_tol=1e-9):
            self.discard(f"its baseline score is {self.baseline}, this model's is {baseline}")
        self.baseline = baseline

    def discard(self, reason: str) -> None:
        """Forget everything, and say of which file and why."""
        self.baseline, self.results, self._curves = None, {}, {}
        if self.path is not None:
            logger.warning("%s: %s; removed, its points are evaluated again", self.path, reason)
            self.path.unlink(missing_ok=True)

    def save(self) -> None:
        """Write the file, if there is one and anything is new."""
        if self.path is None or not self.changed:
            return
        content = self.content()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, {"version": VERSION, "sha256": _digest(content), "content": content})
        except OSError as error:  # a full or a read-only cache costs another run's time, not this one
            logger.warning(
                "%s cannot be written (%s): what is found is kept in memory alone", self.path, error.strerror
            )
            self.path = None
        self.changed = False

    def content(self) -> dict:
        """Everything that is known, as plain data."""
        curves = {
            module: {axis: listed(curve) for axis, curve in axes.items()} for module, axes in self._curves.items()
        }
        return {"key": self.key, "baseline": self.baseline, "curves": curves, "results": self.results}

    def _read(self, file: dict) -> None:
        content = file["content"]
        if file["version"] != VERSION or file["sha256"] != _digest(content):
            raise ValueError("wrong version or checksum")
        if content["key"] != self.key:
            raise ValueError("made for another question")
        self.take(content)

    def take(self, content: Mapping) -> None:
        """Know what another store's `content` says, too."""
        curves = {
            (module, axis): curve_of(points)
            for module, axes in content["curves"].items()
            for axis, points in axes.items()
        }
        self.baseline, self.results = content["baseline"], dict(content["results"])
        for (module, axis), curve in curves.items():
            self.curve(module, axis).update(curve)


def _digest(content: Mapping) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
