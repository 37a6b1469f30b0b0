"""No code of the model hub runs here: what is fetched from it is data."""

from __future__ import annotations

import logging
import os
import sys

_ASKS_FOR_KERNELS = "bitsandbytes.backends.cpu.ops"  # the logger that tells the user to install them


def refuse() -> None:
    """Keep libraries from fetching compiled kernels from the hub; to be called before any of them is imported.

    transformers does so for some kinds of attention, bitsandbytes on some processors as soon as it is imported, both by
    way of the package `kernels`; it computes without them, and its advice to install them is kept from the terminal.
    Code of a repository's own (trust_remote_code) is never asked for.
    """
    os.environ["USE_HUB_KERNELS"] = "NO"
    sys.modules.setdefault("kernels", None)  # for `import` and `find_spec` the same as not installed
    logging.getLogger(_ASKS_FOR_KERNELS).setLevel(logging.ERROR)
