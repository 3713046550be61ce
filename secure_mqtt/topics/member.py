"""A member: what it publishes and what it subscribes to, over one connection after the other."""

from __future__ import annotations

import select
import socket
import time
from typing import Any

from secure_mqtt.calls import timed_out
from secure_mqtt.connection import LOOP_INTERVAL, Connection
from secure_mqtt.errors import ProgramError
from secure_mqtt.faults import LARGE_MESSAGE
from secure_mqtt.lasting import Patience
from secure_mqtt.lines import InputLines
from secure_mqtt.mailboxes import Message
from secure_mqtt.session import NUMBERED
from secure_mqtt.settings import Settings
from secure_mqtt.topics.commands import refusal
from secure_mqtt.topics.enquiries import Enquiries
from secure_mqtt.topics.keys import NEVER
from secure_mqtt.topics.order import Received
from secure_mqtt.topics.output import Notes, Output, in_json, plain
from secure_mqtt.topics.parts import Publication, Subscription, clock

STOPPING_TIME = 2.0  # seconds to take leave of the broker


class Member:
    """What is the same whatever a member does."""

    def __init__(self, settings: Settings, enquiries: Enquiries) -> None:
        """Begin without a topic."""
        self._settings, self._enquiries = settings, enquiries
        self._mqtt: Connection
        self._stopping, self._stop = socket.socketpair()
        self.stops_at = NEVER  # of time.monotonic(): then it is to be left as it is
        self._parts: list[Publication | Subscription] = []
        timeout = NEVER if settings.is_patient else settings.timeout
        self.patience = Patience(NUMBERED.patience, timeout)
        self.is_printing = False

    @property
    def subscriptions(self) -> list[str]:
        """The topics to subscribe to at the broker."""
        shared = [part.topic for part in self._parts if isinstance(part, Subscription)]
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
        for part in self._parts:
            part.go_on(self._mqtt, self._enquiries)
            if part.refusal:
                raise refusal(self._settings, part.refusal, part.topic)
        self._enquiries.go_on(self._mqtt)
        inputs, outputs = self._things()
        for ready in self._mqtt.wait([self._stopping, *inputs], False, self._pause(), outputs):
            if ready is not self._stopping:
                self._handle(ready)
        self._take_receipts()
        inbox = self._mqtt.inbox
        while inbox and self._has_room():
            self._take(inbox.take())

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

    def _is_done(self) -> bool:
        """Tell whether there is nothing left to do."""
        raise NotImplementedError

    def _things(self) -> tuple[list[Any], list[Any]]:
        """Return what is to be read and what is to be written, for select()."""
        return [], []

    def _handle(self, thing: Any) -> None:
        """Read or write one of these, which is ready."""

    def _has_room(self) -> bool:
        """Tell whether another message may be taken."""
        return True

    def _take(self, message: Message) -> None:
        """Take a message."""
        self._enquiries.take(self._mqtt, message)


class PublishingMember(Member):
    """Publishes on a topic."""

    def __init__(
        self,
        settings: Settings,
        enquiries: Enquiries,
        publication: Publication,
        lines: InputLines | None = None,
    ) -> None:
        """Take what to publish. lines: None: what was added already is all."""
        super().__init__(settings, enquiries)
        self._publication, self._lines = publication, lines
        self._parts.append(publication)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is waited for."""
        return self._publication.is_done

    def _is_done(self) -> bool:
        return self._publication.is_done and not (self._lines and not self._lines.has_ended)

    def _things(self) -> tuple[list[Any], list[Any]]:
        lines = self._lines
        is_reading = lines and not lines.has_ended and self._publication.has_room()
        return [lines] if is_reading else [], []

    def _handle(self, thing: InputLines) -> None:
        if self.is_idle:
            self.patience.begin()
        for line in thing.read():
            self._publication.add(line)

    def check(self) -> None:
        """Raise ProgramError if standard input has ended before its time."""
        if self._lines and self._lines.fault:
            raise self._lines.fault


class SubscribingMember(Member):
    """Subscribes to topics, and shows their messages."""

    def __init__(
        self, settings: Settings, enquiries: Enquiries, parts: list[Subscription], notes: Notes
    ) -> None:
        """Take the topics. notes: where they say what they can't show."""
        super().__init__(settings, enquiries)
        self._parts.extend(parts)
        self._subscribed = {part.topic: part for part in parts}
        self._notes = notes
        self._output = Output()
        self._format = in_json if settings.json else plain
        self._left = settings.count or NEVER  # messages to show

    def timed_out(self) -> ProgramError:
        """Return the error for a time without messages."""
        if not self._enquiries.has_answered:
            return super().timed_out()
        return ProgramError(f"no message came within {self._settings.timeout:g} s")

    def _is_done(self) -> bool:
        return not (self._left or self._output)

    def _go_on(self) -> None:
        super()._go_on()
        for part in self._subscribed.values():
            part.show(self._show)
        if self._output and select.select([], [self._output], [], 0)[1]:
            self._output.write()
        self.is_printing = len(self._output) > 0
        self._mqtt.pause(not self._output.has_room())
        self._notes.dropped(self._mqtt.inbox.take_dropped())
        if time.monotonic() >= self._notes.next_time():
            self._notes.say()

    def _things(self) -> tuple[list[Any], list[Any]]:
        return [], [self._output] if self._output else []

    def _handle(self, thing: Output) -> None:
        thing.write()

    def _has_room(self) -> bool:
        return self._output.has_room() or all(part.has_room() for part in self._subscribed.values())

    def _take(self, message: Message) -> None:
        part = self._subscribed.get(message.topic)
        if not part:
            super()._take(message)
        elif message.is_retained:
            self._notes.refused(message.topic, "retained", 1)
        else:
            part.take(message.payload)

    def _show(self, message: Received) -> bool:
        """Show a message, if there is room; tell whether there was."""
        if not self._left or not self._output.has_room():
            return False
        self._left -= 1
        self._output.put(self._format(message))
        self.patience.begin()
        return True
