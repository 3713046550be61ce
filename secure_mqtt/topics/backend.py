"""The keeper's process, which alone uses the keeper's file.

It has a connection of its own to the broker, for the topics whose messages are kept. So a flood of
those stands in no request's way, neither in the broker's queues nor in ours.
"""

from __future__ import annotations

import copy
import select
import socket
import time
from collections import Counter, deque
from collections.abc import Callable
from itertools import islice

from secure_mqtt.chores import read_authority, read_identity
from secure_mqtt.connection import LOOP_INTERVAL, PatientConnection, backoff
from secure_mqtt.errors import ProgramError
from secure_mqtt.log import event
from secure_mqtt.mailboxes import Message
from secure_mqtt.settings import Settings, peer_files
from secure_mqtt.topics.batches import MAX_BATCH, Batches
from secure_mqtt.topics.database import StoreError
from secure_mqtt.topics.keeper import Keeper
from secure_mqtt.topics.store import Store
from secure_mqtt.workers import receive, send

SUBSCRIBED_AT_A_TIME = 100  # topics, in one packet of at most 50 KiB
RETRY_INTERVAL = 1.0  # seconds after which it is tried again to write what could not be written
REPORT_INTERVAL = 1.0  # seconds between lines in the log about messages that were not kept
COUNT_INTERVAL = 10.0  # seconds
MAX_REASONS = 10  # that are named in the log at a time
# What the process says: the name of one of these, and a value.
OPENED, READY, LOST, FAILED = "opened", "ready", "lost", "failed"
ANSWERS, COUNTS = "answers", "counts"


def keeper_clock() -> Callable[[], float]:
    """Return a clock in seconds since 1970 that nobody turns back."""
    start = time.time() - time.monotonic()
    return lambda: start + time.monotonic()


class Unkept:
    """Counts the messages that were not kept, and says so from time to time."""

    def __init__(self) -> None:
        self._reasons: Counter[str] = Counter()
        self._report_at = 0.0  # of time.monotonic()

    def add(self, reason: str) -> None:
        """Count a message, if there is a reason."""
        if reason:
            self._reasons[reason] += 1

    def report(self) -> None:
        """Say how many there were, if it is time for that."""
        if self._reasons and time.monotonic() >= self._report_at:
            for reason, count in self._reasons.most_common(MAX_REASONS):
                event("unkept", is_warning=True, count=count, reason=reason)
            self._reasons.clear()
            self._report_at = time.monotonic() + REPORT_INTERVAL


class Front:
    """The responder's process, as the keeper's process sees it."""

    def __init__(self, channel: socket.socket) -> None:
        """Take what leads to it."""
        self.requests: deque[tuple[str, bytes]] = deque()  # the NetIDs that ask, and for what
        self.authority = b""  # who certifies members (PEM); empty: it has not been said yet
        self.has_ended = False
        self._channel = channel
        self.fileno = channel.fileno  # for select(): it has said something

    def receive(self) -> None:
        """Take what it has said, or that it has ended."""
        try:
            authority, requests = receive(self._channel)
        except (EOFError, OSError):
            self.has_ended = True
        else:
            self.authority = authority
            self.requests += requests

    def tell(self, what: str, value: object = None) -> None:
        """Tell it something; it may have ended."""
        try:
            send(self._channel, (what, value))
        except OSError:
            self.has_ended = True


class Backend:
    """Answers members and keeps messages, until the responder's process ends."""

    def __init__(self, settings: Settings, front: Front) -> None:
        """Open the file. StoreError if it can't be used."""
        self._settings = copy.copy(settings)
        self._settings.id = f"{settings.id}-keep"  # 22 characters for one that we have chosen
        self._front = front
        self._clock = keeper_clock()
        self._store = Store(settings.keep)
        identity, authority = peer_files(settings)
        name = read_identity(identity).names[0]
        self._keeper = Keeper(
            self._store, read_authority(authority), name, self._clock, settings.rotate
        )
        self._batches = Batches(self._keeper)
        self._messages: deque[Message] = deque()  # that are not settled
        self._unkept = Unkept()
        self._retry_at = self._count_at = 0.0  # of time.monotonic()

    def run(self) -> None:
        """Do so; connect again whenever the connection is lost."""
        while not self._front.authority and not self._front.has_ended:
            self._front.receive()  # the responder is about to connect
        delays = backoff()
        while not self._front.has_ended:
            try:
                mqtt = PatientConnection(self._settings)
                with mqtt:
                    mqtt.connect()
                    self._begin(mqtt)
                    delays = backoff()
                    self._serve(mqtt)
            except ProgramError as error:
                self._front.tell(FAILED if error.is_final else LOST, error)
            self._serve_without(time.monotonic() + next(delays))

    def _begin(self, mqtt: PatientConnection) -> None:
        """Subscribe to the topics whose messages are kept."""
        self._messages.clear()  # the broker sends them no more
        topics = self._batches.catch_up()
        for start in range(0, len(topics), SUBSCRIBED_AT_A_TIME):
            self._subscribe(mqtt, topics[start : start + SUBSCRIBED_AT_A_TIME])
        self._rotate()
        mqtt.stage = "messages of shared topics"
        self._front.tell(READY)

    def _subscribe(self, mqtt: PatientConnection, topics: list[str]) -> None:
        for topic in mqtt.refused(*topics):
            reason = "the broker refuses the subscription: its messages are not kept"
            event("refused", is_warning=True, topic=topic, reason=reason)

    def _serve(self, mqtt: PatientConnection) -> None:
        while not self._front.has_ended:
            self._answer(mqtt)
            self._keep(mqtt)
            self._rotate()
            self._publish_notices(mqtt)
            self._report()
            is_busy = bool(self._front.requests) or (self._can_write and bool(self._messages))
            if self._front in mqtt.wait([self._front], is_busy):
                self._front.receive()
        mqtt.flush()

    def _serve_without(self, end: float) -> None:
        """Go on without a connection for a while: many requests need none."""
        while not self._front.has_ended and (rest := end - time.monotonic()) > 0:
            self._answer(None)
            self._rotate()
            self._report()
            timeout = 0 if self._front.requests else min(rest, LOOP_INTERVAL)
            if select.select([self._front], [], [], timeout)[0]:
                self._front.receive()

    def _answer(self, mqtt: PatientConnection | None) -> None:
        """Answer a batch of requests."""
        self._keeper.authority = read_authority(self._front.authority)
        requests = self._front.requests
        if not requests:
            return
        answers = self._batches.answer([*islice(requests, MAX_BATCH)])
        for _ in answers:
            requests.popleft()
        self._note_failure()
        if mqtt:  # before anybody hears that there are new topics, and publishes there
            self._change_subscriptions(mqtt)
        self._front.tell(ANSWERS, answers)

    def _change_subscriptions(self, mqtt: PatientConnection) -> None:
        changes, self._batches.subscriptions = self._batches.subscriptions, {}
        for topic in (topic for topic, is_wanted in changes.items() if not is_wanted):
            mqtt.unsubscribe(topic)
        if wanted := [topic for topic, is_wanted in changes.items() if is_wanted]:
            self._subscribe(mqtt, wanted)

    def _keep(self, mqtt: PatientConnection) -> None:
        """Keep a batch of messages, and acknowledge them."""
        while mqtt.inbox and len(self._messages) < MAX_BATCH:
            self._messages.append(mqtt.inbox.take())
        if not self._messages or not self._can_write:
            return
        outcomes = self._batches.keep([(each.topic, each.payload) for each in self._messages])
        self._note_failure()
        for outcome in outcomes:
            if outcome.is_settled:
                mqtt.acknowledge([self._messages.popleft()])
                self._unkept.add(outcome.fault)

    @property
    def _can_write(self) -> bool:
        """Whether to write what can wait. If the last attempt has failed, the next one waits."""
        return time.monotonic() >= self._retry_at

    def _rotate(self) -> None:
        if self._can_write and self._keeper.next_rotation() <= self._clock():
            self._batches.rotate()
            self._note_failure()

    def _note_failure(self) -> None:
        """Say why a batch has failed, if it has; not for each of many."""
        if self._batches.failure and self._can_write:
            self._retry_at = time.monotonic() + RETRY_INTERVAL
            event("failed", is_warning=True, **words_for(self._batches.failure))

    def _publish_notices(self, mqtt: PatientConnection) -> None:
        """Publish what a batch has left to publish, as far as there is room for it."""
        notices = self._batches.notices
        while notices:
            topic, payload = notices.popitem()
            if not mqtt.publish(topic, payload):
                notices[topic] = payload
                return

    def _report(self) -> None:
        self._unkept.report()
        if time.monotonic() >= self._count_at:
            self._count_at = time.monotonic() + COUNT_INTERVAL
            self._front.tell(COUNTS, self._store.counts())


def words_for(error: Exception) -> dict[str, str]:
    """Return what to say of an error that has made a batch fail."""
    if isinstance(error, StoreError):
        return {"reason": str(error), "hint": error.hint}
    return {"reason": f"it raised {type(error).__name__}"}


def run_backend(settings: Settings, channel: socket.socket) -> None:
    """Be the keeper's process, until the responder's ends."""
    front = Front(channel)
    try:
        backend = Backend(settings, front)
    except ProgramError as error:
        front.tell(FAILED, error)
        return
    front.tell(OPENED)
    backend.run()
