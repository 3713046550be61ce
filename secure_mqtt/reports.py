"""What a responder says of its work: its log, within bounds, and its counts."""

from __future__ import annotations

import time

from secure_mqtt.actions import KEY_EXCHANGE
from secure_mqtt.errors import ProgramError
from secure_mqtt.log import event
from secure_mqtt.turns import Incoming

REPORT_INTERVAL = 1.0  # seconds between warnings of how much was dropped
MAX_REPORTS = 100  # messages that are ignored in that time, and named; more are only counted
FOREIGN_INTERVAL = 60.0  # seconds: another responder at the broker has requests of its own
NO_KEY = "not encrypted with a key of this NetID"


class Reports:
    """Counts what was answered and what was not, and says so."""

    def __init__(self) -> None:
        self.counts = {"exchanges": 0, "requests": 0, "failures": 0}
        self._ignored = 0  # messages since the last report
        self._dropped = 0
        self._report_at = 0.0  # of time.monotonic()
        self._foreign = 0  # requests since the last report of those
        self._foreign_at = 0.0
        self._given = {""}  # hints

    def disconnected(self, error: ProgramError) -> None:
        """Note why there is no connection; what to do about it is said once."""
        hint = {} if error.hint in self._given else {"hint": error.hint}
        self._given.add(error.hint)
        event("disconnected", is_warning=True, reason=str(error), **hint)

    def answered(self, message: Incoming) -> None:
        """Note that a message was answered."""
        self.counts["exchanges" if message.action == KEY_EXCHANGE else "requests"] += 1
        event(
            "answered",
            netid=message.netid,
            action=message.action,
            ms=round(message.milliseconds(), 1),
            bytes=len(message.payload),
        )

    def ignored(self, message: Incoming, reason: str) -> None:
        """Note that a message was not answered. A flood of those shall not fill the disk."""
        self.counts["failures"] += 1
        if reason == NO_KEY and self._is_one_of_many():
            return
        self._ignored += 1
        if self._ignored <= MAX_REPORTS:
            names = {"netid": message.netid[:64], "action": message.action[:64]}  # a peer's choice
            event("ignored", is_warning=True, **names, reason=reason)

    def _is_one_of_many(self) -> bool:
        """Tell whether a request that no key opens is only to be counted, for now."""
        now = time.monotonic()
        self._foreign += 1
        if now < self._foreign_at:
            return True
        self._foreign, self._foreign_at = 0, now + FOREIGN_INTERVAL
        return False

    def dropped(self, count: int) -> None:
        """Note how many messages were dropped, since there was no room."""
        self._dropped += count

    def sum_up(self, now: float) -> None:
        """Say how much was dropped, or ignored without a line of its own, if it is time for that.

        :param now: of time.monotonic()
        """
        if self._foreign and now >= self._foreign_at:
            event("ignored", is_warning=True, count=self._foreign, reason=NO_KEY)
            self._foreign, self._foreign_at = 0, now + FOREIGN_INTERVAL
        if now < self._report_at or not (self._dropped or self._ignored):
            return
        if self._dropped:
            event("dropped", is_warning=True, count=self._dropped, reason="too many at a time")
        if self._ignored > MAX_REPORTS:
            count = self._ignored - MAX_REPORTS
            event("ignored", is_warning=True, count=count, reason="and more")
        self._dropped = self._ignored = 0
        self._report_at = now + REPORT_INTERVAL
