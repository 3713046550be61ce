"""Which signed key exchanges were here before."""

from __future__ import annotations

from collections import OrderedDict

from crypto import digest, public_key_der
from secure_mqtt.errors import UnusableError

MAX_SEEN = 2**16  # exchanges that are remembered, the newest: in about 8 MB
DIGEST_SIZE = 16  # bytes that are kept of a SHA-256


class Replays:
    """Remembers the first public key of each exchange.

    A message 1 that was recorded is still signed when it comes again: else anyone could push out
    a NetID's keys with its own.
    """

    def __init__(self) -> None:
        self._seen: OrderedDict[bytes, None] = OrderedDict()

    def check(self, payload: bytes) -> bytes:
        """Return what add() is to remember of a message 1, if its key was not here before.

        :raises UnusableError: it was
        """
        short = digest(public_key_der(payload))[:DIGEST_SIZE]
        if short in self._seen:
            raise UnusableError("a public key that was here before")
        return short

    def add(self, short: bytes) -> None:
        """Remember the key in a message 1 that was verified."""
        self._seen[short] = None
        if len(self._seen) > MAX_SEEN:
            self._seen.popitem(last=False)
