"""A member: what it publishes and what it subscribes to, over one connection after the other."""

from __future__ import annotations

import socket
import time
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

from secure_mqtt.calls import timed_out
from secure_mqtt.connection import LOOP_INTERVAL, Connection
from secure_mqtt.errors import ProgramError
from secure_mqtt.faults import LARGE_MESSAGE
from secure_mqtt.lasting import Patience
from secure_mqtt.mailboxes import Message
from secure_mqtt.session import NUMBERED
from secure_mqtt.settings import Settings
from secure_mqtt.topics.commands import refusal
from secure_mqtt.topics.enquiries import Enquiries
from secure_mqtt.topics.keys import NEVER, clock

STOPPING_TIME = 2.0  # seconds to take leave of the broker


class Part(Protocol):
    """What a member does on one topic."""

    topic: str
    refusal: str  # why the keeper does not allow that; empty: it does
    is_subscribed: bool  # whether it wants what is published there

    def go_on(self, mqtt: Connection, enquiries: Enquiries) -> None:
        """Do what can be done now."""

    def next_time(self) -> float:
        """Return when go_on() has to be called, of the clock, if nothing comes before."""

    def interrupted(self) -> None:
        """Note that the connection was lost."""


class Member(ABC):
    """What is the same whatever a member does."""

    def __init__(self, settings: Settings, enquiries: Enquiries) -> None:
        """Begin without a topic."""
        self._settings, self._enquiries = settings, enquiries
        self._mqtt: Connection
        self._stopping, self._stop = socket.socketpair()
        self.stops_at = NEVER  # of time.monotonic(): then it is to be left as it is
        self._parts: list[Part] = []
        timeout = NEVER if settings.lasts else settings.timeout
        self.patience = Patience(NUMBERED.patience, timeout)
        self.is_printing = False

    @property
    def subscriptions(self) -> list[str]:
        """The topics to subscribe to at the broker."""
        shared = [part.topic for part in self._parts if part.is_subscribed]
        return self._enquiries.subscriptions + shared

    @property
    def is_idle(self) -> bool:
        """Whether nothing is waited for."""
        return False

    def is_fatal(self, size: int) -> bool:
        """Tell whether a message of so many bytes may be what has ended the connection."""
        return size >= LARGE_MESSAGE

    def timed_out(self) -> ProgramError:
        """Return the error for a member whose time is over while it is connected."""
        if self._enquiries.has_answered:
            within = f"within {self._settings.timeout:g} s"
            return ProgramError(
                f"the broker has not acknowledged all messages {within}", "look at its log"
            )
        return timed_out(self._mqtt, self._settings)

    @property
    def is_stopped(self) -> bool:
        """Whether stop() was called."""
        return self.stops_at != NEVER

    def surroundings(self) -> AbstractContextManager[None]:
        """Return what shall be around run()."""
        return nullcontext()

    @abstractmethod
    def check(self) -> None:
        """Raise ProgramError if something is wrong with what was done."""

    def stop(self) -> None:
        """Make run() return; safe in a signal handler."""
        self.stops_at = time.monotonic() + STOPPING_TIME
        self._stop.close()  # wakes who waits for the other end

    def run(self, mqtt: Connection) -> None:
        """Go on over a connection until all is done, or stop() is called."""
        self._mqtt = mqtt
        while not self.is_stopped and not self._is_done():
            self._go_on()

    def interrupt(self) -> None:
        """Prepare for another connection."""
        self._enquiries.interrupt()
        for part in self._parts:
            part.interrupted()

    def _go_on(self) -> None:
        """Do what there is to do now, or comes in the next moment."""
        for part in [*self._parts]:
            part.go_on(self._mqtt, self._enquiries)
            if part.refusal:
                self._refuse(part)
        self._enquiries.go_on(self._mqtt)
        inputs, outputs = self._things()
        for ready in self._mqtt.wait([self._stopping, *inputs], False, self._pause(), outputs):
            if ready is not self._stopping:
                self._handle(ready)
        self._take_receipts()
        inbox = self._mqtt.inbox
        while inbox and self._has_room():
            self._take(inbox.take())

    def _refuse(self, part: Part) -> None:
        """Take that the keeper does not let us do something on a topic."""
        raise refusal(self._settings, part.refusal, part.topic)

    def _pause(self) -> float:
        """Return for how many seconds there is nothing to do unless something comes."""
        due = min((part.next_time() for part in self._parts), default=NEVER) - clock()
        return min(due, self._enquiries.next_time() - time.monotonic(), LOOP_INTERVAL)

    def _take_receipts(self) -> None:
        receipts = self._mqtt.outbox.receipts
        if receipts:
            self.patience.begin()
        while receipts:
            receipts.popleft()()

    # --- what differs --------------------------------------------------------------------------

    @abstractmethod
    def _is_done(self) -> bool:
        """Tell whether there is nothing left to do."""

    @abstractmethod
    def _things(self) -> tuple[list[Any], list[Any]]:
        """Return what is to be read and what is to be written, for select()."""

    @abstractmethod
    def _handle(self, thing: Any) -> None:
        """Read or write one of these, which is ready."""

    def _has_room(self) -> bool:
        """Tell whether another message may be taken."""
        return True

    def _take(self, message: Message) -> None:
        """Take a message."""
        self._enquiries.take(self._mqtt, message)
