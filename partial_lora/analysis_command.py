"""`partial-lora analyse WHAT KEY=VALUE …`: an analysis, composed as a run is."""

from __future__ import annotations

import os
import shlex
import signal
import sys

from partial_lora import analysis_schema
from partial_lora.composition import compose
from partial_lora.errors import PartialLoraError


def main(arguments: list[str]) -> int:
    """Compose the settings of one analysis or a sweep of them, and do it in this process; gives the exit code.

    Raises PartialLoraError where the first word names no analysis.
    """
    known = "|".join(analysis_schema.ANALYSES)
    what, *rest = arguments or [""]
    if what in ("-h", "--help"):
        print(f"usage: partial-lora analyse {known} [KEY=VALUE …]; the keys of train, and analysis.KEY")
        print(f"`partial-lora analyse {analysis_schema.ANALYSES[0]} --help` lists them all")
        return 0
    if what not in analysis_schema.ANALYSES:
        raise PartialLoraError(f"analyse {what}".rstrip() + f": expected one of {known}, then KEY=VALUE …")

    def work(settings: dict) -> int:
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as for workers, and before torch is there
        os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, _leave)
        from partial_lora import analysis

        return analysis.analyse(what, settings, shlex.join(["partial-lora", "analyse", *arguments]))

    return compose(f"analyse {what}", rest, work, node=analysis_schema.AnalysedConfig, resolve=analysis_schema.resolve)


def _leave(number: int, frame: object) -> None:
    """End by way of exceptions: what is finished is kept, nothing is half written."""
    sys.exit(128 + number)
