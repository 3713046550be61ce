"""A member that publishes: one message, or the lines of standard input."""

from __future__ import annotations

from typing import Any

from secure_mqtt.lines import InputLines
from secure_mqtt.log import log
from secure_mqtt.settings import Settings
from secure_mqtt.topics.enquiries import Enquiries
from secure_mqtt.topics.member import Member
from secure_mqtt.topics.publication import Publication


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
        if not self._publication.is_done:
            return False
        # The broker has all. A single message need not wait for the keeper as well.
        return not self._lines or (self._lines.has_ended and self._publication.is_settled())

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
        """Say what the keeper may lack; raise ProgramError for an input that ended too early."""
        if self._lines and (count := self._publication.unkept):
            topic = self._publication.topic
            log().warning(f"messages that the keeper may not have kept on {topic}: {count}")
        if self._lines and self._lines.fault:
            raise self._lines.fault
