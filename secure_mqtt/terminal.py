"""What a terminal must not be made to do."""

from __future__ import annotations

import re

# What a terminal obeys instead of showing it: C0, but for tab and newline, DEL and C1 (ECMA-48).
# What makes it show text in another order than it has: Unicode's marks of direction (UAX #9, 2).
UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069]"
)


def visible(text: str) -> str:
    """Return a text whose controls are escaped as in Python, so that a terminal obeys none."""
    return UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)
