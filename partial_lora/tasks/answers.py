"""What of a text in words is its answer."""

from __future__ import annotations

import re
from decimal import Decimal

_MARK = "####"  # what GSM8K writes before the answer
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)\]%])[-+−])?"  # after a digit or a bracket it is an operator: 16-3 has no number -3
    r"(?:[$€£](?P<inner>[-+−])?)?"
    r"(?P<digits>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])(?:\.[0-9]+)?|[0-9]+(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+)"
)


def final_number(text: str) -> Decimal | None:
    """The number that a text comes to: the first one after ####, where that is written, or else its last one.

    Signs, commas between thousands, decimals and a currency's sign are understood: "-$1,234.50" is -1234.50. None of a
    text without a number.
    """
    _, mark, after = text.partition(_MARK)
    numbers = list(_NUMBER.finditer(after if mark else text))
    if not numbers:
        return None
    found = numbers[0 if mark else -1]
    size = Decimal(found["digits"].replace(",", ""))
    return -size if (found["sign"] or found["inner"] or "+") in "-−" else size
