"""A worker: one process of one run, started by `launching.launch` with the settings of the run.

`python -m partial_lora.worker DIRECTORY --stage train|calibrate`
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import logging
import os
import signal
import sys
from pathlib import Path

from partial_lora import credentials, files
from partial_lora.errors import PartialLoraError, kind_and_line
from partial_lora.launching import directory, first_failure, imports, launch
from partial_lora.settings import versions
from partial_lora.signals import STOPPING, leave

logger = logging.getLogger("partial_lora.worker")

_PR_SET_PDEATHSIG = 1  # <linux/prctl.h>


def main() -> None:
    parser = argparse.ArgumentParser(prog="partial_lora.worker", description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--stage", choices=("train", "calibrate"), required=True)
    parser.add_argument("--log", type=Path, help="where output goes, if not where the launcher's does")
    arguments = parser.parse_args()
    if "WORLD_SIZE" in os.environ:
        end_with_launcher()
    else:
        launch.end_with_parent()
    if arguments.log:
        descriptor = os.open(arguments.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        for stream in (sys.stdout, sys.stderr):
            os.dup2(descriptor, stream.fileno())
        os.close(descriptor)
    credentials.redact_output()  # before any library takes hold of the streams
    imports.refuse_hub_code()
    code = work(arguments.directory, arguments.stage)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        _leave_world(code)
    sys.exit(code)


def end_with_launcher() -> None:
    """Have the kernel kill this process when its launcher is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def work(place: Path, stage: str) -> int:
    """Do the run that belongs in a directory, leave a record of how it ended, and return the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", stream=sys.stdout)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a process in the background starts by ignoring it
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, leave)
    settings, digests = directory.worker_settings(place)
    is_main = os.environ.get("RANK", "0") == "0"
    record = directory.new(settings, directory.read_result(place, directory.EARLIER), digests)
    try:
        if is_main:
            files.write_json(place / directory.RESULT, record)
        chosen = versions.load(settings)
        if not imports.may_need_bitsandbytes(chosen):
            imports.hide_bitsandbytes()
        with imports.importing():  # torch and its kin; the record says, too, where an import fails
            from transformers.utils import logging as transformers_logging

            from partial_lora.train import run
        gc.freeze()  # the garbage collector need not look through the imports again in training
        transformers_logging.disable_progress_bar()  # a bar in a log is noise
        run(chosen, place, record, stage)
        if is_main:
            files.sync(place)  # before the record says that the files are there
        if record["status"] != directory.PAUSED:
            record |= {"status": "finished", "files": directory.entries(place)}
    except BaseException as error:  # whatever ended the run, its record says so
        for number in STOPPING:
            signal.signal(number, signal.SIG_IGN)  # the parent repeats its signal
        record |= {"status": "failed", "error": credentials.redacted(_in_one_line(error))}
        begun = record["parameters"] or record["calibration"] or any(record["seconds"].values())
        if isinstance(error, PartialLoraError) and not begun:
            record["refused"] = True
        if not isinstance(error, (KeyboardInterrupt, SystemExit)):
            first_failure.report(record["error"])
        if not isinstance(error, PartialLoraError):
            raise
        logger.error("%s", record["error"])
    finally:
        if is_main:
            files.write_json(place / directory.RESULT, record)
    if record["status"] == "failed":
        return 1
    if is_main and record["status"] == "finished":
        directory.remove_checkpoints(place)  # once the record says that the run has finished
    return 0


def _in_one_line(error: BaseException) -> str:
    if isinstance(error, PartialLoraError):  # from a process that loads data, its text holds that process's traceback
        text = str(*error.args[:1]).rpartition(f"{PartialLoraError.__module__}.{PartialLoraError.__qualname__}: ")[2]
        return " ".join(text.split())
    if isinstance(error, (KeyboardInterrupt, SystemExit)):
        return directory.INTERRUPTED
    return kind_and_line(error, None)


def _leave_world(code: int) -> None:
    """End one of several workers without the abort that gloo's threads cause at interpreter exit now and then."""
    import torch.distributed as dist

    if dist.is_initialized():
        if code == 0:
            dist.barrier()
        dist.destroy_process_group()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
