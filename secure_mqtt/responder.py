"""The responder: it stays connected, and answers key exchanges and requests."""

from __future__ import annotations

import gc
import select
import time
from collections.abc import Callable
from typing import Any

from crypto import read_group
from secure_mqtt.actions import REQUEST
from secure_mqtt.chores import Credentials
from secure_mqtt.connection import backoff
from secure_mqtt.desk import Desk
from secure_mqtt.errors import ProgramError, UnusableError, WorkerError
from secure_mqtt.link import Link
from secure_mqtt.log import event
from secure_mqtt.orders import Orders
from secure_mqtt.reports import Reports
from secure_mqtt.service import notify, notify_reloading
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
        load_suites()
        gc.freeze()  # what is here for good need not be looked through again, in any process
        self._settings = settings
        self._on_ready = on_ready
        self._reports = Reports()
        self._desk = Desk(settings, self._reports)
        self._desk.replies.publish = self._publish
        self._limit = SizeLimit()
        self._orders = Orders()
        self._is_connected = self._is_announced = False
        self._status = Status(settings.status_topic, self._reports, self._desk)
        self._link = Link(settings, REQUEST.format(settings.netid or "+", "+"), self._status.will)

    def run(self) -> None:
        """Answer until stop() is called; connect again whenever the connection is lost.

        :raises ProgramError: the broker refuses for good, or a process was lost
        """
        try:
            self._stay_connected()
        except WorkerError:
            hint = "start the responder again; the machine may be short of memory"
            raise ProgramError("a process of the responder was ended", hint) from None
        self._desk.end()
        event("stopped")

    def _stay_connected(self) -> None:
        delays = backoff()
        while not self._orders.is_stopped:
            try:
                self._connect()
                delays = backoff()
                self._serve()
            except ProgramError as error:
                if error.is_final:
                    raise
                self._reports.disconnected(error)
                self._limit.connection_lost(self._link.close(is_orderly=False))
            self._is_connected = False
            self._pause(time.monotonic() + next(delays))

    def _pause(self, end: float) -> None:
        """Wait, while no process of ours has to wait for us, or until an order comes."""
        notify("WATCHDOG=1")
        is_ordered = self._orders.is_stopped
        while not is_ordered and (rest := end - time.monotonic()) > 0:
            ready = select.select([self._orders, *self._desk.processes], [], [], rest)[0]
            is_ordered = self._orders in ready
            for process in ready[is_ordered:]:
                self._desk.take_result(process)
        self._orders.take_renewal()  # it is about to connect

    def stop(self) -> None:
        """Make run() finish what is being answered and return; safe in a signal handler."""
        notify("STOPPING=1")
        self._orders.stop(DRAINING_TIME if self._is_connected else 0)

    def renew(self) -> None:
        """Make run() read the files again, and connect anew; safe in a signal handler."""
        self._orders.renew()

    def end(self) -> float:
        """Return when it is to be left as it is, of time.monotonic()."""
        return self._orders.end

    def _connect(self) -> None:
        """Connect and subscribe, with the files as they are now.

        :raises ProgramError: that can't be done; an older connection stays in use, with its files
        """
        notify("WATCHDOG=1")
        credentials = Credentials(*peer_files(self._settings))
        self._link.open()
        self._desk.use(credentials)
        self._status.hasten()
        self._is_connected, self._is_announced = True, False

    def _serve(self) -> None:
        sweep_at = time.monotonic()
        while not self._orders.is_stopped:
            if not self._is_announced and self._desk.is_ready:
                self._announce()
            if time.monotonic() >= sweep_at:
                sweep_at = time.monotonic() + SWEEP_INTERVAL
                self._sweep(sweep_at)
            is_ordered = self._go_on(self._orders)
            if is_ordered and not self._link.is_changing_over and self._orders.take_renewal():
                self._renew()
        while self._desk.is_busy:
            self._go_on()
        self._status.publish_end(self._link)
        self._link.flush()
        self._link.close(is_orderly=True)

    def _announce(self) -> None:
        """Say that all that may be asked is answered."""
        self._is_announced = True
        event("ready", topic=self._link.topic)
        self._on_ready()
        notify("READY=1")

    def _sweep(self, now: float) -> None:
        """Do what is to be done from time to time."""
        notify("WATCHDOG=1")
        self._desk.keyring.sweep()
        self._reports.dropped(self._link.take_dropped() + self._desk.labour.turns.take_dropped())
        self._reports.sum_up(now)
        self._status.publish_when_due(self._link)

    def _renew(self) -> None:
        """Change over to a new connection, with the files as they are now, or go on as before."""
        notify_reloading()
        try:
            self._connect()
        except ProgramError as error:
            event("unchanged", is_warning=True, reason=str(error), hint=error.hint)
            notify("READY=1")
        else:
            self._desk.renew()

    def _go_on(self, *others: Any) -> bool:
        """Do what there is to do now, or comes in the next moment.

        :return: whether any of the others is ready
        """
        has_more = self._desk.work(time.monotonic() + WORK_TIME)
        ready = self._link.wait([*self._desk.processes, *others], is_busy=has_more)
        for each in ready:
            if each not in others:
                self._desk.take_result(each)
        for message in self._link.messages():
            self._desk.receive(message)
        return any(each in others for each in ready)

    def _publish(self, topic: str, payload: bytes) -> None:
        self._limit.check(len(payload))
        if not self._link.publish(topic, payload):
            raise UnusableError("the broker does not take the answer")
