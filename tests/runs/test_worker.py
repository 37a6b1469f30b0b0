"""How a run that failed says so."""

from __future__ import annotations

import pytest
from torch.utils.data import DataLoader, Dataset

from partial_lora import worker
from partial_lora.errors import PartialLoraError


class Broken(Dataset):
    """Rows of which none can be read."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, row: int) -> int:
        raise PartialLoraError(f"an image of the task cannot be read: row {row + 1}")


def test_what_a_process_that_loads_data_says_is_one_line() -> None:
    with pytest.raises(PartialLoraError) as raised:
        list(DataLoader(Broken(), num_workers=1))
    assert len(str(raised.value).splitlines()) > 5  # as torch hands it on
    assert worker._in_one_line(raised.value) == "an image of the task cannot be read: row 1"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (PartialLoraError("model.head=x: expected y"), "model.head=x: expected y"),
        (KeyboardInterrupt(), "interrupted"),
        (ValueError("two\nlines"), "ValueError: two lines"),
    ],
)
def test_any_other_error_is_one_line_too(error: BaseException, said: str) -> None:
    assert worker._in_one_line(error) == said
