"""`python -m partial_lora` is `partial-lora`."""

import signal
import sys


def main() -> int:
    """Run the command line; return its exit code, also where it is interrupted while it is still being imported."""
    try:
        from partial_lora.cli import main as command

        return command()
    except KeyboardInterrupt:
        return 128 + signal.SIGINT


if __name__ == "__main__":
    sys.exit(main())
