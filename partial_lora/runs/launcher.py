"""`accelerate launch` that leaves word of which worker failed, and that hears a request to stop once.

`python -m partial_lora.runs.launcher …` takes what `accelerate launch …` takes. torchrun, which accelerate calls, turns
every failure into exit code 1, and a second signal while it waits for its workers would make it leave them behind.
"""

from __future__ import annotations

import os
import signal
import sys

from partial_lora.files import redacted
from partial_lora.progress import STOPPING
from partial_lora.runs import launch as failures


def main() -> None:
    """Launch, wait, and exit with 0, 1, or 128 and the number of the signal that asked to stop."""
    os.environ["PET_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # the others are ours
    from accelerate.commands import launch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    def stop(number: int, frame: object) -> None:
        for each in STOPPING:
            signal.signal(each, signal.SIG_IGN)
        # torchrun passes the signal on, waits as long as PET_SHUTDOWN_TIMEOUT says, and kills who is left then.
        raise SignalException(f"asked to stop by {signal.Signals(number).name}", signal.Signals(number))

    for number in STOPPING:
        signal.signal(number, stop)
    try:
        launch.main()
    except ChildFailedError as error:
        failures.report_exits({rank: (failure.exitcode, failure.timestamp) for rank, failure in error.failures.items()})
        sys.exit(1)
    except SignalException as stopped:
        sys.exit(128 + stopped.sigval)
    except Exception as error:
        failures.report_failure(redacted(f"accelerate launch: {type(error).__name__}: {' '.join(str(error).split())}"))
        raise


if __name__ == "__main__":
    main()
