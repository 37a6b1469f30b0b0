"""One job of a sweep: what Hydra's launchers call, in this process or, pickled, in another one."""

from __future__ import annotations

import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from partial_lora.errors import PartialLoraError
from partial_lora.redaction import redact_output
from partial_lora.runs import remote_code, results, running
from partial_lora.runs.ledger import Ledger


class JobFailedError(PartialLoraError):
    """What a sampler is told of a run that did not finish."""


def this_process() -> tuple[str, int]:
    """What tells this process from all others, on every machine."""
    return socket.gethostname(), os.getpid()


@dataclass(frozen=True)
class Job:
    """Does a run with a composed config, and leaves an entry about it in the sweep's ledger.

    Args:
        stage: "train" or "calibrate".
        resolve: what checks a composed config (`config.resolve`).
        ledger: of the sweep.
        parent: the process of the sweep (`this_process`); jobs elsewhere are silent.
        sampled: a sampler chooses the jobs. It is given the validation metric, and an exception for a run that failed,
            to make of it what it does; a sweep over given combinations goes on instead.
    """

    stage: str
    resolve: Callable[[object], dict]
    ledger: Ledger
    parent: tuple[str, int]
    sampled: bool

    def __call__(self, composed) -> float | None:
        """The primary metric on validation, or None where nothing was trained."""
        from hydra.core.hydra_config import HydraConfig

        hydra, here = HydraConfig.get(), self.parent == this_process()
        if not here:
            redact_output()
            remote_code.refuse()
            _leave_the_terminal()
            os.chdir(hydra.runtime.cwd)
        number, entry = hydra.job.num, {"overrides": list(hydra.overrides.task), "begun": time.time()}
        if self.ledger.asked():
            return None
        try:
            settings = self.resolve(composed)
            entry |= {"directory": str(running.directory(settings, self.stage).resolve())}
            found = self._run(number, settings, entry, here)
        except PartialLoraError as error:
            found = {"status": "refused", "code": 2, "reason": str(error)}
            if here:
                print(f"partial-lora: {error}", file=sys.stderr)
        except Exception as error:  # no other job is to hear of it
            traceback.print_exc()
            found = {"status": "failed", "code": 1, "reason": f"{type(error).__name__}: {error}"}
        if found is None:
            return None
        self.ledger.write(number, **entry, **found, seconds=time.time() - entry["begun"])
        if here and found["status"] == "interrupted":
            raise SystemExit(found["code"])
        if self.sampled and found["code"]:
            raise JobFailedError(found["reason"])
        return found.get("validation")

    def _run(self, number: int, settings: dict, entry: dict, here: bool) -> dict | None:
        """How the run ended, and its metrics; None where it did not start, since the sweep is stopping."""
        with self.ledger.claimed(Path(entry["directory"])) as had_before:
            if self.ledger.asked():
                return None
            self.ledger.write(number, **entry, status="running", code=0)
            if self.ledger.asked():  # whoever stops a sweep asks first and then looks at what is running
                return {"status": "not started", "code": 0}
            if had_before:  # by another job of this sweep, which has overwritten what was there
                settings = settings | {"overwrite": False}
            outcome = running.run(settings, self.stage, shown=here, asked=self.ledger.asked)
        found = {"status": outcome.status, "code": running.code(outcome)}
        if found["code"]:
            interrupted = outcome.status == "interrupted"
            return found | {"reason": outcome.message if interrupted else running.reason(outcome)}
        return found | _metrics(results.read_result(outcome.directory))


def _metrics(result: dict) -> dict:
    """What a table and a sampler want to know of a finished run or calibration."""
    if not result["metrics"]:
        return {"metric": "joint score", "test": (result["calibration"] or {}).get("joint")}
    test, validation = result["metrics"]["test"], result["metrics"]["validation"]
    return {
        "metric": f"test {test['primary']}",
        "test": test[test["primary"]],
        "validation": validation[validation["primary"]],
    }


def _leave_the_terminal() -> None:
    """Have Ctrl-C reach the sweep alone, which then asks its jobs: once, and those that have not begun, too."""
    with suppress(PermissionError):  # the launcher has started a session for it
        os.setpgid(0, 0)
