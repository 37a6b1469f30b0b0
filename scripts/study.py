"""Runs of a study, one command after another: what `study` in a file of conf/experiment lists.

    python scripts/study.py race                                  # as `make race` does
    python scripts/study.py decided --only task=digits stage=first --list

Finished runs are skipped. A run that failed ends its command with 1, and the study goes on. It also goes on after a
script that ends with 1, and then ends with 1 itself. Whatever else goes wrong ends it.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from partial_lora import cli
from partial_lora.errors import require
from partial_lora.settings.study_commands import OF_RUNS, commands, keys


@cli.script
def main(arguments: Sequence[str] | None = None) -> int:
    """Run a study; return the exit code of the command that ended it, or 1 where a script ended with 1."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="a file of conf/experiment")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of NAME/{train,test}.parquet")
    parser.add_argument("--only", nargs="*", default=[], metavar="KEY=A,B", help="leave out what has another value")
    parser.add_argument("--with", nargs="*", default=[], metavar="KEY=VALUE", dest="settings", help="of all runs")
    parser.add_argument("--list", action="store_true", help="print the commands alone")
    options = parser.parse_args(arguments)
    only = {key: set(values.split(",")) for key, _, values in (word.partition("=") for word in options.only)}
    named = {"preset", *keys(options.name)}
    for key in only:
        require(key in named, "--only", key, f"a key that the study names: {', '.join(sorted(named))}")
    failed = 0
    for words in commands(options.name, options.data, only):
        words += options.settings if words[0] in OF_RUNS else []
        print("+", shlex.join(words), flush=True)
        if not options.list:
            own, environment = ["-m", "partial_lora", *words], dict(os.environ)
            is_script = words[0] == "python"
            if is_script:
                own = words[1:]
                environment.pop("PYTHONSAFEPATH", None)  # a script imports what lies beside it
            code = subprocess.run([sys.executable, *own], env=environment, check=False).returncode
            if code not in (0, 1):
                return code if code > 0 else 128 - code  # as a shell says which signal has ended it
            failed |= is_script and code
    return failed


if __name__ == "__main__":
    sys.exit(main())
