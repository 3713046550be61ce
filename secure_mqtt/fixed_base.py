"""Key pairs in the lab's group, made in a fifth of the time: for a responder, which makes many."""

from __future__ import annotations

import functools
import os

from crypto import EXPONENT_SIZE, DhKeyPair, read_group

# A comb (Lim and Lee, 1994): the exponent's bits are laid out in rows, and a column is looked up at
# a time. 8 rows make 47 squarings and 48 multiplications of 383 squarings, and 128 KiB of table.
ROWS = 8
COLUMNS = EXPONENT_SIZE * 8 // ROWS


def make_key_pair() -> DhKeyPair:
    """Return a new key pair.

    Like pow, this does not run in constant time, which is acceptable for the reason that crypto
    gives. Where gmpy2 is installed, its constant-time arithmetic does the work.
    """
    try:
        import gmpy2  # noqa: F401
    except ImportError:
        exponent = int.from_bytes(os.urandom(EXPONENT_SIZE), "big")
        return DhKeyPair(exponent, power_of_g(exponent))
    return DhKeyPair()


def power_of_g(exponent: int) -> int:
    """Return g ^ exponent mod p, for an exponent of at most EXPONENT_SIZE bytes."""
    p, powers = read_group().p, table()
    result = 1
    for column in reversed(range(COLUMNS)):
        shifted = exponent >> column
        entry = sum((shifted >> row * COLUMNS & 1) << row for row in range(ROWS))
        result = result * result * powers[entry] % p
    return result


@functools.cache
def table() -> list[int]:
    """Return, for each choice of rows, the product of the powers of g that stand for them."""
    p, power = read_group()
    entries = [1]
    for _ in range(ROWS):
        entries += [entry * power % p for entry in entries]
        power = pow(power, 1 << COLUMNS, p)
    return entries
