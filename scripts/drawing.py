"""The drawing of the method, docs/method.svg: a frozen W, and a B and an A of which only some rows and columns train.

`python scripts/drawing.py` writes it again.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
ROWS, COLUMNS, RANK, CELL, GAP = 12, 16, 3, 14, 12
KEPT_ROWS, KEPT_COLUMNS = (1, 4, 9), (2, 6, 7, 13)
FROZEN, ROW, COLUMN, BOTH, EMPTY = "#c9ced3", "#0072b2", "#d55e00", "#7b3fa0", "#ffffff"

COUNT = "Nothing else exists as a parameter: rank × (kept rows + kept columns)"


def grid(x: int, y: int, colours: np.ndarray) -> str:
    """Return a matrix as squares, its upper left corner at x, y."""
    squares = [
        f'<rect x="{x + CELL * column}" y="{y + CELL * row}" width="{CELL}" height="{CELL}" fill="{colour}"/>'
        for (row, column), colour in np.ndenumerate(colours)
    ]
    return f'<g stroke="#8a9299" stroke-width="0.6">{"".join(squares)}</g>'


def words(x: float, y: float, text: str, size: int = 19, **attributes: str) -> str:
    """Return a line of text whose middle is at x."""
    own = "".join(f' {name}="{value}"' for name, value in attributes.items())
    return f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="middle"{own}>{text}</text>'


def matrix(height: int, width: int, rows: tuple = (), columns: tuple = ()) -> np.ndarray:
    """Return the colours of a matrix in which the kept rows and columns train."""
    colours = np.full((height, width), EMPTY)
    colours[list(rows), :] = ROW
    colours[:, list(columns)] = COLUMN
    return colours


def drawing() -> str:
    """Return the SVG."""
    changed = np.full((ROWS, COLUMNS), EMPTY)
    changed[np.ix_(KEPT_ROWS, KEPT_COLUMNS)] = BOTH
    wide, high, thin = CELL * COLUMNS, CELL * ROWS, CELL * RANK
    top, left = 46, 14
    below = top + thin + GAP  # where W, B and ΔW begin
    at_b = left + wide + 62
    at_change = at_b + thin + GAP
    width, height = at_change + wide + 14, below + high + 74
    parts = [
        grid(left, below, np.full((ROWS, COLUMNS), FROZEN)),
        grid(at_b, below, matrix(ROWS, RANK, rows=KEPT_ROWS)),
        grid(at_change, top, matrix(RANK, COLUMNS, columns=KEPT_COLUMNS)),
        grid(at_change, below, changed),
        words(left + wide / 2, below - 12, "W is frozen"),
        words(left + wide + 31, below + high / 2 + 9, "+", 30),
        words(at_change + wide / 2, top - 14, "A: kept columns train", fill=COLUMN),
        words(at_b + thin / 2, below - 12, "B", fill=ROW),
        words(at_b + 70, below + high + 26, "B: kept rows train", fill=ROW),
        words(width - 66, below + high + 26, "ΔW = B A", fill=BOTH),
        words(width / 2, below + high + 58, COUNT, 17),
    ]
    title = "W is frozen; some rows of B and some columns of A train, so W changes where a kept row meets a kept column"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="Helvetica, Arial, sans-serif" fill="#1d2329" role="img"><title>{title}</title>'
        f'<rect width="{width}" height="{height}" rx="8" fill="#ffffff"/>{"".join(parts)}</svg>\n'
    )


if __name__ == "__main__":
    (ROOT / "docs" / "method.svg").write_text(drawing(), encoding="utf-8")
