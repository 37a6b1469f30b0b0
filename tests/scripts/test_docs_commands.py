"""The commands of a page run in order in one folder; what needs something else is left out; a failure ends the page."""

from __future__ import annotations

from pathlib import Path

import docs_commands
import pytest

PAGE = """# A page

```sh
echo 3 > number
```

```python
number = int(open("number").read())
```

```sh title="takes an hour"
echo 5 > number
```

```python
assert int(open("number").read()) == number
assert number == {expected}
```

```sh title="needs a hub"
exit 7
```
"""


@pytest.mark.parametrize(("expected", "long", "ran", "failures"), [(3, False, 3, 0), (4, False, 2, 1), (3, True, 3, 1)])
def test_a_page_runs_as_it_is_written(tmp_path: Path, expected: int, long: bool, ran: int, failures: int) -> None:
    page = tmp_path / "page.md"
    page.write_text(PAGE.format(expected=expected), encoding="utf-8")
    done, failed = docs_commands.run_page(page, long)
    assert (done, len(failed)) == (ran, failures)
    assert not (tmp_path / "number").exists()
