"""A responder's status, which it publishes for whoever watches it."""

from __future__ import annotations

import json
import time

from secure_mqtt.desk import Desk
from secure_mqtt.link import Link
from secure_mqtt.reports import Reports

INTERVAL = 30.0  # seconds
OFFLINE = b'{"status": "offline"}'
STARTED = time.monotonic()


class Status:
    """The status of a responder, as long as it runs."""

    def __init__(self, topic: str, reports: Reports, desk: Desk) -> None:
        """Prepare to publish what is counted, retained; an empty topic: nothing."""
        self.will = (topic, OFFLINE) if topic else None
        self._topic = topic
        self._reports = reports
        self._desk = desk
        self._due = 0.0  # of time.monotonic()

    def hasten(self) -> None:
        """Let it be time to publish: on a new connection."""
        self._due = 0.0

    def publish_when_due(self, link: Link) -> None:
        """Publish the status, if it is time for that."""
        now = time.monotonic()
        if self._topic and now >= self._due:
            self._due = now + INTERVAL
            link.publish(self._topic, json.dumps(self._online(now)).encode(), retain=True)

    def _online(self, now: float) -> dict[str, object]:
        return {
            "status": "online",
            **self._reports.counts.sums(),
            **self._desk.counts,
            "uptime_seconds": round(now - STARTED),
            **self._reports.counts.parts(),
            "waiting": len(self._desk.labour.turns),
        }

    def publish_end(self, link: Link) -> None:
        """Publish that the responder has ended."""
        if self._topic:
            link.publish(self._topic, OFFLINE, retain=True)
