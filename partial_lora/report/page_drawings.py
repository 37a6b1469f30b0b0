"""Drawings that are part of a page: lines as SVG, sparsities as shaded cells. They take the page's own colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from markupsafe import Markup

from partial_lora.report.places import AXES, grid
from partial_lora.report.series import points, selected
from partial_lora.tasks.metrics import SHARES

_WIDE, _HIGH, _LEFT, _BELOW, _ABOVE = 340, 130, 44, 18, 8
_DASHES = ("", "6 3", "2 3", "8 3 2 3", "1 4", "10 4")

Points = Sequence[tuple[float, float]]


def training_lines(records: Sequence[Mapping]) -> list[tuple[str, Markup]]:
    """The training loss and the metric of validation of runs as small drawings, titled; none that has no points."""
    metric = selected(records[0])
    drawn = []
    for said, key in (("training loss", "loss"), (f"validation {metric}", f"eval_{metric}")):
        lines = {f"seed {record['seed']}": points(record["history"], key) for record in records}
        if any(lines.values()):
            drawn.append((said, lines_drawn(lines, said, share=key != "loss" and metric in SHARES)))
    return drawn


def lines_drawn(lines: Mapping[str, Points], title: str, *, share: bool = False) -> Markup:
    """Lines over steps as SVG; they differ in their dashes, and their ends are named for those who hear the page."""
    every = [point for line in lines.values() for point in line]
    left, right = min(step for step, _ in every), max(step for step, _ in every)
    low, high = min(value for _, value in every), max(value for _, value in every)

    def at(step: float, value: float) -> tuple[float, float]:
        across = (step - left) / ((right - left) or 1)
        up = (value - low) / ((high - low) or 1)
        return _LEFT + across * (_WIDE - _LEFT - 8), _HIGH - _BELOW - up * (_HIGH - _BELOW - _ABOVE)

    form = ".1%" if share else ".3g"
    parts = [
        f'<svg viewBox="0 0 {_WIDE} {_HIGH}" role="img" aria-label="{escape(_said(lines, title, form))}">',
        f'<path class="axis" d="M{_LEFT} {_ABOVE}V{_HIGH - _BELOW}H{_WIDE - 8}"/>',
        f'<text x="{_LEFT - 4}" y="{_ABOVE + 6}" text-anchor="end">{high:{form}}</text>',
        f'<text x="{_LEFT - 4}" y="{_HIGH - _BELOW}" text-anchor="end">{low:{form}}</text>',
        f'<text x="{_LEFT}" y="{_HIGH - 4}">{left:,.0f}</text>',
        f'<text x="{_WIDE - 8}" y="{_HIGH - 4}" text-anchor="end">{right:,.0f} steps</text>',
    ]
    for number, line in enumerate(line for line in lines.values() if line):
        placed = [at(*point) for point in line]
        joined = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
        dash = _DASHES[(number + number // 6) % len(_DASHES)]  # where colours come again, another dash
        parts.append(f'<polyline class="line{number % 6}" points="{joined}" stroke-dasharray="{dash}"/>')
        parts += [f'<circle class="line{number % 6}" cx="{placed[-1][0]:.1f}" cy="{placed[-1][1]:.1f}" r="2.5"/>']
    return Markup("".join([*parts, "</svg>"]))


def sparsity_map(sparsity: Mapping[str, Mapping[str, float]]) -> dict | None:
    """Rows of cells, kinds of modules by depth, for each axis; None where nothing is sparse.

    {depths, axes: {axis: [(kind, cells)]}}; a cell is a sparsity in [0, 1], None where there is no module.
    """
    if not sparsity or not any(of[axis] for of in sparsity.values() for axis in AXES):
        return None
    kinds, depths, grids = grid(sparsity)
    cells = {
        axis: [
            (kind, [None if value != value else float(value) for value in line])
            for kind, line in zip(kinds, grids[axis], strict=True)
        ]
        for axis in AXES
    }
    return {"depths": [".".join(map(str, depth)) or "–" for depth in depths], "axes": cells}


def _said(lines: Mapping[str, Points], title: str, form: str) -> str:
    ends = [f"{name} from {line[0][1]:{form}} to {line[-1][1]:{form}}" for name, line in lines.items() if line]
    return f"{title}: {'; '.join(ends)}"
