"""Notebooks with outputs, made of example scripts: `python scripts/notebooks.py examples/own_images.py …`.

A script is cut into cells at its lines `# %%`. Each notebook is executed in the current folder and written to
`notebooks/NAME.ipynb` beside its script. Of the outputs stdout alone is kept: stderr has warnings of the machine.
Raises nbclient's CellExecutionError for a cell that fails.
"""

from __future__ import annotations

import argparse
import ast
import os
import re
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient


def notebook(script: Path) -> nbformat.NotebookNode:
    """Return a script as a notebook without outputs; its docstring becomes the first words."""
    text = script.read_text(encoding="utf-8")
    parsed = ast.parse(text)
    words = ast.get_docstring(parsed).replace("\nPrints:", "\n**Prints:**").replace("\nTakes:", "\n\n**Takes:**")
    made = jupytext.reads("\n".join(text.splitlines()[parsed.body[0].end_lineno :]).lstrip("\n"), fmt="py:percent")
    made.cells.insert(0, nbformat.v4.new_markdown_cell(words))
    made.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    for number, cell in enumerate(made.cells):
        cell.id, cell.metadata = f"cell-{number}", {}
    return made


def execute(made: nbformat.NotebookNode) -> None:
    """Run all cells, and keep what they write to stdout."""
    os.environ["TTY_COMPATIBLE"] = "0"  # or rich draws bars, since a kernel asks for colours
    NotebookClient(made, timeout=1800, kernel_name="python3").execute()
    for cell in made.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            text = "".join(each.text for each in cell.outputs if each.get("name") == "stdout")
            text = re.sub("\ufffd+", "─", text)  # a kernel reads in blocks, which may end inside of a table's rule
            cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=text)] if text else []
    made.metadata.pop("language_info", None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("scripts", nargs="+", type=Path, metavar="SCRIPT")
    for script in parser.parse_args().scripts:
        made = notebook(script)
        execute(made)
        target = script.parent / "notebooks" / f"{script.stem}.ipynb"
        target.parent.mkdir(exist_ok=True)
        nbformat.write(made, target)
        print(f"wrote {target}")


if __name__ == "__main__":
    main()
