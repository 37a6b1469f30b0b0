"""The table of the coordinate check is that of its rows."""

from pathlib import Path

import density
import pandas as pd
from checkout import RESULTS, needs_results


@needs_results
def test_the_slopes_here_are_those_of_the_rows_beside_them(tmp_path: Path) -> None:
    kept = RESULTS.parent / density.OUT
    density.draw(pd.read_csv(kept / "coordinates.csv"), tmp_path)
    assert (tmp_path / "coordinates.md").read_text("utf-8") == (kept / "coordinates.md").read_text("utf-8")
