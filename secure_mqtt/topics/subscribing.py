"""A member that subscribes to topics."""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from typing import Any

from secure_mqtt.errors import ProgramError
from secure_mqtt.mailboxes import Message
from secure_mqtt.settings import Settings
from secure_mqtt.topics.enquiries import Enquiries
from secure_mqtt.topics.keys import NEVER
from secure_mqtt.topics.member import Member
from secure_mqtt.topics.order import Received
from secure_mqtt.topics.output import Notes, Output, in_json, plain
from secure_mqtt.topics.subscription import Subscription


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
        self._format: Callable[[Received], bytes]
        self._format = in_json if settings.json else plain
        self._left = settings.count or NEVER  # messages to show

    def timed_out(self) -> ProgramError:
        """Return the error for a time without messages."""
        if not self._enquiries.has_answered:
            return super().timed_out()
        return ProgramError(f"no message came within {self._settings.timeout:g} s")

    def check(self) -> None:
        """Do nothing: what was wrong was said at once."""

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
            self._say_notes()

    def _say_notes(self) -> None:
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
