"""What has come over a connection and is not handled yet, and what has gone."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

MAX_MESSAGES = 10_000  # received, but not handled yet; more are dropped
MAX_BYTES = 2**27  # of the messages received, or published, in that state; one may have more


class Message(NamedTuple):
    """A PUBLISH that came in."""

    topic: str
    payload: bytes
    is_retained: bool
    mid: int = 0  # the packet identifier; 0: none, or it is acknowledged already


class Inbox:
    """The messages that were received, but not handled yet."""

    def __init__(self) -> None:
        self._dropped = 0  # for which there was no room
        self._messages: deque[Message] = deque()
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._messages)

    def put(self, message: Message) -> bool:
        """Take a message in, if there is room; tell whether there was."""
        size = len(message.payload) + (self._bytes if self._messages else 0)
        has_room = not self._messages or (len(self._messages) < MAX_MESSAGES and size <= MAX_BYTES)
        if has_room:
            self._messages.append(message)
            self._bytes = size
        else:
            self._dropped += 1
        return has_room

    def take(self) -> Message:
        """Return the oldest message, which is then no longer there."""
        message = self._messages.popleft()
        self._bytes -= len(message.payload)
        return message

    def take_dropped(self) -> int:
        """Return for how many there was no room since this was asked before."""
        dropped, self._dropped = self._dropped, 0
        return dropped

    def clear(self) -> None:
        """Forget the messages."""
        self._messages.clear()


class Outbox:
    """What was published, but not acknowledged by the broker yet."""

    def __init__(self) -> None:
        self.largest_taken = 0  # bytes of the largest payload that was acknowledged
        self.receipts: deque[Callable[[], None]] = deque()  # of what was; who wants them takes them
        self._sizes: dict[int, int] = {}  # of the payloads, in bytes, by packet identifier
        self._receipts: dict[int, Callable[[], None]] = {}  # likewise
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._sizes)

    @property
    def largest(self) -> int:
        """The size of the largest payload in it, in bytes; 0 if there is none."""
        return max(self._sizes.values(), default=0)

    def has_room(self, size: int) -> bool:
        """Tell whether a payload of so many bytes may be published."""
        return not self._sizes or self._bytes + size <= MAX_BYTES

    def add(self, mid: int, size: int, receipt: Callable[[], None] | None = None) -> None:
        """Note what was published. receipt: what to put into receipts then; None: nothing."""
        self._sizes[mid] = size
        if receipt is not None:
            self._receipts[mid] = receipt
        self._bytes += size

    def remove(self, mid: int) -> None:
        """Note that it was acknowledged."""
        size = self._sizes.pop(mid, 0)
        self._bytes -= size
        if mid in self._receipts:
            self.receipts.append(self._receipts.pop(mid))
        self.largest_taken = max(self.largest_taken, size)
