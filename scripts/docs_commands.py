"""Run the commands of README.md and of docs/, page by page, each page in an empty folder of its own.

    python scripts/docs_commands.py [PAGE …] [--list] [--long]

A block of `sh` or `python` is run as it stands. Those of a page follow one another, and Python keeps its names from
block to block. A block whose title says that it needs something (a hub, a GPU, your own files) or that it takes long is
left out and listed at the end; --long runs those that only take long. Exits with 1 where a block fails.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FENCE = re.compile(r'^```(sh|python)(?: title="([^"]*)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)
LINKED = ("scripts", "examples")  # of the checkout, beside what a page makes


@dataclass(frozen=True)
class Block:
    """Commands of a page. note: what they need, or how long they take; empty where they run anywhere, at once."""

    language: str
    note: str
    text: str


def pages() -> list[Path]:
    """Return README.md and the pages of docs/."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def name_of(page: Path) -> str:
    """Return a page's path from the project's root."""
    return os.path.relpath(page, ROOT)


def blocks(page: Path) -> Iterator[Block]:
    """Yield the blocks of commands of a page, in order."""
    for language, note, text in FENCE.findall(page.read_text(encoding="utf-8")):
        yield Block(language, note, text)


def run(block: Block, folder: Path, names: dict) -> str | None:
    """Run a block in a folder; return what it ended with, or None where all went well."""
    if block.language == "python":
        before = Path.cwd()
        os.chdir(folder)
        try:
            exec(compile(block.text, "<page>", "exec"), names)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        finally:
            os.chdir(before)
        return None
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"PATH": path, "COLUMNS": "100"}
    ended = subprocess.run(["bash", "-ec", block.text], cwd=folder, env=environment, check=False)
    return f"exit code {ended.returncode}" if ended.returncode else None


def run_page(page: Path, long: bool) -> tuple[int, list[str]]:
    """Run a page's blocks; return how many ran, and a line for each that failed, the last one, which ends the page."""
    done, names = 0, {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name in LINKED:
            (folder / name).symlink_to(ROOT / name)
        for block in blocks(page):
            if block.note and not (long and block.note.startswith("takes")):
                continue
            print(f"+ {name_of(page)}\n{block.text}", flush=True)
            start = time.monotonic()
            failure = run(block, folder, names)
            print(f"= {failure or 'done'}, {time.monotonic() - start:.0f} s\n", flush=True)
            if failure:
                return done, [f"{name_of(page)}: {failure}: {block.text.strip().splitlines()[0]}"]
            done += 1
    return done, []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pages", nargs="*", type=lambda page: Path(page).resolve(), metavar="PAGE")
    parser.add_argument("--list", action="store_true", help="run nothing, list what is left out")
    parser.add_argument("--long", action="store_true", help="also run what only takes long")
    options = parser.parse_args()
    chosen = options.pages or pages()
    ran, failures = 0, []
    for page in [] if options.list else chosen:
        done, failed = run_page(page, options.long)
        ran, failures = ran + done, failures + failed
    print("left out:")
    for page in chosen:
        for block in blocks(page):
            if block.note:
                print(f"  {name_of(page)}: {block.note}: {block.text.strip().splitlines()[0]}")
    print(f"{ran} blocks ran", *failures, sep="\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
