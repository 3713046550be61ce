"""A responder's status, which it publishes for whoever watches it."""

from __future__ import annotations

import json
import time

from secure_mqtt.connection import Connection
from secure_mqtt.desk import Desk
from secure_mqtt.reports import Reports

INTERVAL = 30.0  # seconds
OFFLINE = b'{"status": "offline"}'
STARTED = time.monotonic()


class Status:
    """The status on one connection."""

    def __init__(self, topic: str, reports: Reports, desk: Desk) -> None:
        """Prepare to publish what is counted, retained; an empty topic: nothing."""
        self.will = (topic, OFFLINE) if topic else None
        self._topic = topic
        self._reports = reports
        self._desk = desk
        self._due = 0.0  # of time.monotonic()

    def publish_when_due(self, mqtt: Connection) -> None:
        """Publish the status, if it is time for that."""
        now = time.monotonic()
        if self._topic and now >= self._due:
            self._due = now + INTERVAL
            uptime = round(now - STARTED)
            counts = {**self._reports.counts, **self._desk.counts}
            status = {"status": "online", **counts, "uptime_seconds": uptime}
            mqtt.publish(self._topic, json.dumps(status).encode(), retain=True)

    def publish_end(self, mqtt: Connection) -> None:
        """Publish that the responder has ended."""
        if self._topic:
            mqtt.publish(self._topic, OFFLINE, retain=True)
