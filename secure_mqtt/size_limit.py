"""How large an answer may be for a broker, which only shows by the end of the connection."""

from __future__ import annotations

import time

from secure_mqtt.errors import UnusableError
from secure_mqtt.mailboxes import Outbox

MIN_LIMIT = 1024  # bytes: a broker that takes less is of no use, and other reasons are likelier
LIFETIME = 600.0  # seconds after which it is tried again: the connection may have ended by chance


class SizeLimit:
    """Learns from connections that end while an answer larger than all before is on its way."""

    def __init__(self) -> None:
        self._limit = float("inf")  # bytes of a payload that the broker does not take
        self._until = 0.0  # of time.monotonic()
        self._largest_taken = MIN_LIMIT

    def connection_lost(self, outbox: Outbox) -> None:
        """Learn from what was published, but not acknowledged, when a connection ended."""
        self._largest_taken = max(self._largest_taken, outbox.largest_taken)
        if outbox.largest > self._largest_taken:
            self._limit = outbox.largest
            self._until = time.monotonic() + LIFETIME

    def check(self, size: int) -> None:
        """Raise UnusableError for a payload of so many bytes if the broker does not take it."""
        if size >= self._limit and time.monotonic() < self._until:
            raise UnusableError(
                f"the answer has {size} bytes, and {self._limit:.0f} have ended a connection to"
                " the broker: it may have a limit"
            )
