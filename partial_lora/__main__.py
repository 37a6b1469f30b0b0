"""`python -m partial_lora` is `partial-lora`."""

import sys

from partial_lora.cli import main

sys.exit(main())
