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

    def check(self, payload: bytes) -> None:
        """Raise UnusableError if the key in a message 1 was here before."""
        if self._short(payload) in self._seen:
            raise UnusableError("a public key that was here before")

    def add(self, payload: bytes) -> None:
        """Remember the key in a message 1 that was verified."""
        self._seen[self._short(payload)] = None
        if len(self._seen) > MAX_SEEN:
            self._seen.popitem(last=False)

    def _short(self, payload: bytes) -> bytes:
        return digest(public_key_der(payload))[:DIGEST_SIZE]
