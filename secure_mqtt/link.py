"""A responder's link with its broker: a connection and, for a while, the one before it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from crypto import digest
from secure_mqtt.connection import Connection
from secure_mqtt.errors import ProgramError
from secure_mqtt.faults import silence
from secure_mqtt.log import event
from secure_mqtt.mailboxes import MAX_MESSAGES, Message, Outbox
from secure_mqtt.settings import Settings, for_connection

OVERLAP = 1.0  # seconds for the broker to deliver what it had queued for the connection before


class Link:
    """Subscribed to a topic, it can change over to a new connection without losing a message.

    For a while the broker sends each message on both. Those of the connection before are taken,
    until it is closed; then those of the new one, but for what was taken already. So they keep
    their order, which the numbers of requests need.
    """

    def __init__(self, settings: Settings, topic: str, will: tuple[str, bytes] | None) -> None:
        """Prepare a link; see Connection about the will."""
        self._settings = settings
        self.topic = topic
        self._will = will
        self._connections: list[Connection] = []  # newest first: two at most
        self._former_ends = 0.0  # of time.monotonic()
        self._taken: Counter[bytes] = Counter()  # from the connection before: digests of messages

    def open(self) -> None:
        """Connect and subscribe; what was open before is closed later.

        :raises ProgramError: that fails; then what was open before stays in use
        """
        settings = for_connection(self._settings)
        mqtt = Connection(settings, self._will)
        mqtt.patience_ends = time.monotonic() + settings.timeout
        try:
            mqtt.connect()
            event("connected", broker=settings.broker, tls=mqtt.security())
            mqtt.subscribe(self.topic)
        except BaseException as error:
            mqtt.close(is_orderly=False)
            if isinstance(error, TimeoutError):
                raise silence(settings, mqtt.stage, f"no {mqtt.stage} came") from None
            raise
        mqtt.patience_ends = float("inf")
        mqtt.stage = "requests"
        self._taken.clear()
        self._connections.insert(0, mqtt)
        self._former_ends = time.monotonic() + OVERLAP

    def close(self, is_orderly: bool) -> Outbox:
        """Disconnect, if need be; see Connection.

        :return: what the broker had not acknowledged
        """
        self._close_former()
        if not self._connections:
            return Outbox()
        mqtt = self._connections.pop()
        mqtt.close(is_orderly)
        return mqtt.outbox

    @property
    def is_changing_over(self) -> bool:
        """Whether there is something of the connection before, so that open() has to wait."""
        return len(self._connections) > 1 or bool(self._taken)

    def publish(self, topic: str, payload: bytes, retain: bool = False) -> bool:
        """Publish as Connection does; False if there is none."""
        return bool(self._connections) and self._connections[0].publish(topic, payload, retain)

    def flush(self) -> None:
        """Wait until the broker has acknowledged all that was published."""
        self._connections[0].flush()

    def wait(self, others: Sequence[Any], is_busy: bool) -> list[Any]:
        """Wait as Connection does. ProgramError: the connection has ended."""
        if self.is_changing_over:
            self._attend_former()
        current, *former = self._connections
        readable = current.wait([*others, *(each for each in former if each.is_open)], is_busy)
        return [each for each in readable if each not in former]

    def messages(self) -> Iterator[Message]:
        """Yield what has come, each message once."""
        current, *former = self._connections
        for mqtt in former:
            while mqtt.inbox:
                yield self._noted(mqtt.inbox.take())
        while current.inbox and not former:
            message = current.inbox.take()
            if not self._taken or self._is_new(message):
                yield message

    def take_dropped(self) -> int:
        """Return for how many messages there was no room since this was asked before."""
        return sum(mqtt.inbox.take_dropped() for mqtt in self._connections)

    def _attend_former(self) -> None:
        """Let the network of the connection before go on, until its time is over."""
        now = time.monotonic()
        if now >= self._former_ends:
            self._close_former()
        if now >= self._former_ends + OVERLAP:  # the second copies have come
            self._taken.clear()
        try:
            for former in self._connections[1:]:
                former.wait(is_busy=True)
        except ProgramError:  # a broker that takes an ID once only has thrown it off
            self._close_former()

    def _close_former(self) -> None:
        for former in self._connections[1:]:
            former.close(is_orderly=True)
            self._connections.remove(former)

    def _noted(self, message: Message) -> Message:
        """Return a message of the connection before, whose second copy is to be dropped."""
        self._taken[mark(message)] += 1
        if len(self._taken) >= MAX_MESSAGES:
            self._former_ends = time.monotonic()
        return message

    def _is_new(self, message: Message) -> bool:
        """Tell whether a message was not taken from the connection before."""
        place = mark(message)
        if not self._taken[place]:
            return True
        self._taken[place] -= 1
        return False


def mark(message: Message) -> bytes:
    """Return what no other message has."""
    return digest(message.topic.encode() + b"\0" + message.payload)
