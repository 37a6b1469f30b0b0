"""What several tests need: the shared data sets where they are, and calibrations that stay inside a test."""

from __future__ import annotations

import gc
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Before torch is loaded: its models here are too small for several threads, and threads that spin while they wait make
# the suite ten times slower on a machine that does anything else.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"

# What libraries keep is neither taken from nor left in the home of whoever runs the tests; it may not be writable.
_HOME = tempfile.TemporaryDirectory(prefix="partial-lora-tests-")
for _name in ("HF_HOME", "MPLCONFIGDIR"):
    os.environ[_name] = _HOME.name

for _name in ("NO_PROXY", "no_proxy"):  # tests that call this machine mean it, and no proxy
    os.environ[_name] = ",".join(filter(None, (os.environ.get(_name), "127.0.0.1")))

gc.disable()  # until all tests are found: importing what they need makes millions of objects that stay

# Nobody cuts the power while tests run: to wait for the disk would only take longer where it is busy.
os.fsync = lambda descriptor: None


def pytest_collection_finish() -> None:
    """Leave out what is imported whenever garbage is looked for: every training does, in a million objects."""
    gc.enable()
    gc.set_threshold(50_000, 10, 10)  # of the 700 by default, whose rounds were a tenth of the time
    _keep_what_is_there()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Leave out, too, what a file of tests has imported and cached."""
    if nextitem is not None and nextitem.path != item.path:
        _keep_what_is_there()


def _keep_what_is_there() -> None:
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def any_processor() -> Iterator[None]:
    """Refuse this package's questions about the processor, so that no result of a test depends on which one it is."""
    import torch

    names = [name for name in dir(torch.cpu) if name.startswith("_is_")]
    with pytest.MonkeyPatch.context() as patch:
        for name in names:
            patch.setattr(torch.cpu, name, _refused(name, getattr(torch.cpu, name)))
        patch.setattr(torch.backends.cpu, "get_cpu_capability", _refused("capability", lambda: "DEFAULT"))
        yield


def _refused(name: str, answer: Callable[[], object]) -> Callable[[], object]:
    def ask() -> object:
        asked_by = sys._getframe(1).f_globals["__name__"]
        assert not asked_by.startswith("partial_lora"), f"{asked_by} asks the processor ({name})"
        return answer()

    return ask


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """A port of this machine for processes to meet at: bound, so that nobody else is given it, yet free to listen."""
    with socket.socket() as bound:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(("127.0.0.1", 0))
        yield bound.getsockname()[1]


@pytest.fixture
def no_figures(monkeypatch) -> None:
    """Reports without figures, which take most of their time: tests/report looks at these."""
    monkeypatch.setattr("partial_lora.report.figures.draw_gallery", lambda *given: [])


@pytest.fixture
def model():
    """A tiny ViT under a name of its own: what calibration is tested on, where a test has no model of its own."""
    from scored_models import Named, tiny_vit

    return Named(tiny_vit())


@pytest.fixture
def batches(model):
    """A scored draw that the tiny ViT does better on than chance."""
    from scored_models import scored_draw

    return scored_draw(model)


@pytest.fixture
def score(model, batches):
    """The accuracy on that draw, with reuse of what enters a block."""
    from partial_lora.calibration.score import FewShotScore

    return FewShotScore(model, batches, blocks="vit.blocks")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of prepared rows in a cache that this test alone has."""
    monkeypatch.setenv("PARTIAL_LORA_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "data"


@pytest.fixture
def rng():
    """Random numbers of one seed: simulations say the same each time."""
    import numpy as np

    return np.random.default_rng(20251222)


@pytest.fixture
def usual_umask():
    """The umask of most machines: others may read."""
    before = os.umask(0o022)
    yield
    os.umask(before)
