"""Picture of a terminal in which commands were run, for a light and a dark page.

    python scripts/screen.py docs/demo COMMAND …     # or `make screen`

Runs the commands one after the other in an empty folder, and draws what they print into NAME.svg and NAME-dark.svg. The
course of a run is left out: of what stands before a table nothing is drawn. Ends with the exit code of a command that
fails.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import DEFAULT_TERMINAL_THEME, DIMMED_MONOKAI, TerminalTheme
from rich.text import Text

from partial_lora import cli
from partial_lora.files import write_atomic

COLUMNS = 84
THEMES: dict[str, TerminalTheme] = {"": DEFAULT_TERMINAL_THEME, "-dark": DIMMED_MONOKAI}
_REMOTE = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)  # fonts of another server, which a page does not ask for


def printed(commands: Sequence[str], folder: Path) -> Text:
    """Return what commands print, each below its own line, as a terminal of COLUMNS shows it.

    Raises CalledProcessError where one fails.
    """
    seen = Text()
    for command in commands:
        seen.append(f"$ {command}\n", style="bold")
        as_wide = os.environ | {"COLUMNS": str(COLUMNS)}
        done = subprocess.run(command, shell=True, cwd=folder, env=as_wide, stdout=-1, text=True, check=True)
        _, table, rest = done.stdout.replace(f"{folder}/", "").rpartition("┌")
        seen.append(f"{table}{rest}".rstrip() if table else rest.rstrip())
        seen.append("\n\n")
    seen.rstrip()
    return seen


@cli.script
def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", help="of the pictures, without .svg")
    parser.add_argument("commands", nargs="+")
    asked = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        try:
            text = printed(asked.commands, Path(folder))
        except subprocess.CalledProcessError as failed:
            return failed.returncode
    for suffix, theme in THEMES.items():
        console = Console(record=True, width=COLUMNS, file=io.StringIO())
        console.print(text, overflow="fold")
        drawn = console.export_svg(title="", theme=theme, unique_id="screen")
        write_atomic(Path(f"{asked.name}{suffix}.svg"), _REMOTE.sub("", drawn))
    return 0


if __name__ == "__main__":
    sys.exit(main())
