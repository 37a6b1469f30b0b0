"""Preparation of the process that forks runs (`fork`): it imports this module first, and computes nothing.

What libraries print while they are imported is dropped: the terminal is the parent's, and a run has a log of its own.
"""

import gc
import os
import sys

from partial_lora import credentials
from partial_lora.launching import imports

_nowhere = os.open(os.devnull, os.O_WRONLY)
for _stream in (sys.stdout, sys.stderr):
    os.dup2(_nowhere, _stream.fileno())
os.close(_nowhere)
credentials.redact_output()  # before any library takes hold of the streams
imports.refuse_hub_code()
imports.hide_bitsandbytes()
gc.disable()  # until a worker has its own imports
