"""The responder: it stays connected, and answers key exchanges and requests."""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from crypto import read_group
from secure_mqtt.actions import REQUEST
from secure_mqtt.chores import Credentials
from secure_mqtt.connection import Connection, backoff
from secure_mqtt.desk import Desk
from secure_mqtt.errors import ProgramError, UnusableError, WorkerError
from secure_mqtt.log import event
from secure_mqtt.reports import Reports
from secure_mqtt.settings import Settings, peer_files
from secure_mqtt.size_limit import SizeLimit
from secure_mqtt.status import Status
from secure_mqtt.suites import load_suites

WORK_TIME = 0.005  # seconds of work until the network is looked at again
SWEEP_INTERVAL = 1.0  # seconds
DRAINING_TIME = 5.0  # seconds to finish what is being answered when told to stop


class Responder:
    """Answers until it is stopped.

    All of it happens in run(), one after the other, but for what workers do.
    """

    def __init__(self, settings: Settings, on_ready: Callable[[], None]) -> None:
        """Prepare a responder; to be done before there are threads.

        :param on_ready: called after each subscription
        """
        read_group()
        peer_files(settings)  # raises the error of one that can't be used
        self._settings = settings
        self._on_ready = on_ready
        self._reports = Reports()
        self._desk = Desk(settings, self._reports)
        self._limit = SizeLimit()
        self._stopping, self._stop = socket.socketpair()
        self._is_stopped = self._is_connected = False
        self._end = float("inf")
        load_suites()

    def run(self) -> None:
        """Answer until stop() is called; connect again whenever the connection is lost.

        :raises ProgramError: the broker refuses for good, or a process was lost
        """
        delays = backoff()
        while not self._is_stopped:
            mqtt = None
            try:
                self._desk.use(Credentials(*peer_files(self._settings)))
                status = Status(self._settings.status_topic, self._reports, self._desk)
                mqtt = Connection(self._settings, status.will)
                with mqtt:
                    mqtt.connect()
                    event("connected", broker=self._settings.broker, tls=mqtt.security())
                    delays = backoff()
                    self._serve(mqtt, status)
            except WorkerError:
                hint = "start the responder again; the machine may be short of memory"
                raise ProgramError("a process of the responder was ended", hint) from None
            except ProgramError as error:
                if error.is_final:
                    raise
                self._reports.disconnected(error)
                if mqtt:
                    self._limit.connection_lost(mqtt.outbox)
            self._is_connected = False
            if not self._is_stopped:
                select.select([self._stopping], [], [], next(delays))
        self._desk.end()
        event("stopped")

    def stop(self) -> None:
        """Make run() finish what is being answered and return; safe in a signal handler."""
        self._is_stopped = True
        draining_time = DRAINING_TIME if self._is_connected else 0
        self._end = min(self._end, time.monotonic() + draining_time)
        self._stop.close()  # wakes who waits for the other end

    def end(self) -> float:
        """Return when it is to be left as it is, of time.monotonic()."""
        return self._end

    def _serve(self, mqtt: Connection, status: Status) -> None:
        topic = REQUEST.format(self._settings.netid or "+", "+")
        mqtt.subscribe(topic)
        mqtt.stage = "requests"
        self._desk.replies.publish = partial(self._publish, mqtt)
        self._is_connected = True
        is_announced = False
        sweep_at = time.monotonic()
        while not self._is_stopped:
            if self._desk.is_ready and not is_announced:
                is_announced = True
                event("ready", topic=topic)
                self._on_ready()
            if time.monotonic() >= sweep_at:
                sweep_at = time.monotonic() + SWEEP_INTERVAL
                self._desk.keyring.sweep()
                self._reports.sum_up(sweep_at)
                status.publish_when_due(mqtt)
            self._go_on(mqtt, self._stopping)
        while self._desk.is_busy:
            self._go_on(mqtt)
        status.publish_end(mqtt)
        mqtt.flush()

    def _go_on(self, mqtt: Connection, *others: Any) -> None:
        """Do what there is to do now, or comes in the next moment."""
        has_more = self._desk.work(time.monotonic() + WORK_TIME)
        for ready in mqtt.wait([*self._desk.processes, *others], is_busy=has_more):
            if ready not in others:
                self._desk.take_result(ready)
        while mqtt.inbox:
            self._desk.receive(mqtt.inbox.take())
        self._reports.dropped(mqtt.inbox.take_dropped())

    def _publish(self, mqtt: Connection, topic: str, payload: bytes) -> None:
        self._limit.check(len(payload))
        if not mqtt.publish(topic, payload):
            raise UnusableError("the broker does not take the answer")
