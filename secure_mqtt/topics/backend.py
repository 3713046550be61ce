"""The keeper's process, which alone uses the keeper's file.

It has a connection of its own to the broker, for the topics whose messages are kept. So a flood of
those stands in no request's way, neither in the broker's queues nor in ours.
"""

from __future__ import annotations

import contextlib
import select
import socket
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

from secure_mqtt.chores import read_authority, read_identity
from secure_mqtt.connection import LOOP_INTERVAL, PatientConnection, backoff
from secure_mqtt.errors import ProgramError, UsageError
from secure_mqtt.faults import CONNECTING, SUBACK, silence
from secure_mqtt.log import event
from secure_mqtt.mailboxes import Message
from secure_mqtt.settings import DEFAULT_PEER_NAME, Settings, for_connection, peer_files
from secure_mqtt.topics.batches import MAX_BATCH, Batches
from secure_mqtt.topics.database import StoreError
from secure_mqtt.topics.keeper import Keeper
from secure_mqtt.topics.store import Store
from secure_mqtt.workers import receive, send

SUBSCRIBED_AT_A_TIME = 100  # topics, in one packet of at most 50 KiB
RETRY_INTERVAL = 1.0  # seconds after which it is tried again to renew what could not be
DRAINING_TIME = 3.0  # seconds for what is on its way to the broker at the end
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


def keeper_name(names: list[str]) -> str:
    """Return the one of a certificate's names that members know the keeper by."""
    if not names:
        raise UsageError("--keep needs an --identity with a DNS name, which members know it by")
    return DEFAULT_PEER_NAME if DEFAULT_PEER_NAME in names else names[0]


class Unkept:
    """Counts the messages that were not kept, and says so from time to time."""

    def __init__(self) -> None:
        self._reasons: Counter[str] = Counter()
        self._report_at = 0.0  # of time.monotonic()

    def add(self, reason: str, count: int = 1) -> None:
        """Count messages, if there are any, and a reason."""
        if reason and count:
            self._reasons[reason] += count

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
        self.is_renewal = False  # whether to connect anew, with the files as they are now
        self.has_ended = False
        self._channel = channel
        self.fileno = channel.fileno  # for select(): it has said something

    def receive(self) -> None:
        """Take what it has said, or that it has ended."""
        try:
            authority, requests, is_renewal = receive(self._channel)
        except (EOFError, OSError):
            self.has_ended = True
        else:
            self.authority = authority
            self.requests += requests
            self.is_renewal |= is_renewal

    def tell(self, what: str, value: object = None) -> None:
        """Tell it something; it may have ended."""
        try:
            send(self._channel, (what, value))
        except OSError:
            self.has_ended = True


class KeeperConnection(PatientConnection):
    """The keeper's connection to the broker.

    The responder waits while we wait for the broker: so that ends in time, by ProgramError.
    """

    def open(self) -> None:
        """Connect."""
        try:
            with self._patience(CONNECTING):
                self.connect()
        except ProgramError:
            self.close(is_orderly=False)
            raise

    def follow(self, topics: Sequence[str]) -> None:
        """Subscribe to topics, and say which of them the broker refuses."""
        for start in range(0, len(topics), SUBSCRIBED_AT_A_TIME):
            with self._patience(SUBACK):
                refused = self.refused(*topics[start : start + SUBSCRIBED_AT_A_TIME])
            for topic in refused:
                reason = "the broker refuses the subscription: its messages are not kept"
                event("refused", is_warning=True, topic=topic, reason=reason)

    def drain(self) -> None:
        """Wait until the broker has acknowledged all."""
        with self._patience("PUBACK", DRAINING_TIME):
            self.flush()

    @contextlib.contextmanager
    def _patience(self, stage: str, seconds: float = 0.0) -> Iterator[None]:
        """Let what is done inside end in time.

        :param seconds: by default the time for an answer
        """
        self.stage = stage
        self.patience_ends = time.monotonic() + (seconds or self._settings.timeout)
        try:
            yield
        except TimeoutError:
            raise silence(self._settings, self.stage, f"no {self.stage} came") from None
        self.stage, self.patience_ends = "messages of shared topics", float("inf")

    def change_subscriptions(self, changes: dict[str, bool]) -> None:
        """Subscribe to topics (True), or no longer."""
        for topic in (topic for topic, is_wanted in changes.items() if not is_wanted):
            self.unsubscribe(topic)
        self.follow([topic for topic, is_wanted in changes.items() if is_wanted])

    def publish_some(self, notices: dict[str, bytes]) -> None:
        """Publish what is to be published on topics, as far as there is room; take that out."""
        while notices:
            topic, payload = notices.popitem()
            if not self.publish(topic, payload):
                notices[topic] = payload
                return


class Backend:
    """Answers members and keeps messages, until the responder's process ends."""

    def __init__(self, settings: Settings, front: Front) -> None:
        """Open the file. StoreError if it can't be used."""
        self._settings = settings
        self._front = front
        self._clock = keeper_clock()
        self._store = Store(settings.keep)
        identity, authority = peer_files(settings)
        name = keeper_name(read_identity(identity).names)
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
                following: KeeperConnection | None = self._connected()
                while following:
                    with following:
                        self._begin(following)
                        delays = backoff()
                        following = self._serve(following)
            except ProgramError as error:
                self._front.tell(FAILED if error.is_final else LOST, error)
            self._serve_without(time.monotonic() + next(delays))
        self._store.database.close()

    def _connected(self) -> KeeperConnection:
        """Return a new connection. ProgramError if there can be none."""
        own = for_connection(self._settings)
        own.id += "-keep"  # 22 characters, unless we were given one
        mqtt = KeeperConnection(own)
        mqtt.open()
        return mqtt

    def _begin(self, mqtt: KeeperConnection) -> None:
        """Subscribe to the topics whose messages are kept."""
        self._messages.clear()  # the broker sends them no more
        topics = self._batches.catch_up()
        mqtt.follow(topics)
        event("keeping", topics=len(topics))
        self._front.tell(READY)

    def _serve(self, mqtt: KeeperConnection) -> KeeperConnection | None:
        """Go on until the end, or until there is another connection to go on with."""
        following = None
        while not self._front.has_ended and not following:
            self._answer(mqtt)
            self._keep(mqtt)
            self._rotate()
            mqtt.publish_some(self._batches.notices)
            self._unkept.add("too many at a time", mqtt.inbox.take_dropped())
            self._report()
            is_busy = bool(self._front.requests or self._messages) or self._is_rotation_due
            if self._front in mqtt.wait([self._front], is_busy):
                self._front.receive()
            if self._front.is_renewal:
                following = self._renewed()
        mqtt.drain()
        return following

    def _renewed(self) -> KeeperConnection | None:
        """Return a new connection, with the files as they are now, if there can be one."""
        self._front.is_renewal = False
        try:
            return self._connected()
        except ProgramError as error:
            event("unchanged", is_warning=True, reason=str(error), hint=error.hint)
            return None

    def _serve_without(self, end: float) -> None:
        """Go on without a connection for a while: many requests need none."""
        while not self._front.has_ended and (rest := end - time.monotonic()) > 0:
            self._answer(None)
            self._rotate()
            self._report()
            is_busy = bool(self._front.requests) or self._is_rotation_due
            timeout = 0 if is_busy else min(rest, LOOP_INTERVAL)
            if select.select([self._front], [], [], timeout)[0]:
                self._front.receive()

    def _answer(self, mqtt: KeeperConnection | None) -> None:
        """Answer a batch of requests."""
        self._keeper.authority = read_authority(self._front.authority)
        requests = self._front.requests
        if not requests:
            return
        answers = self._batches.answer([*islice(requests, MAX_BATCH)])
        for _ in answers:
            requests.popleft()
        self._note_failure()
        try:
            if mqtt:  # before anybody hears that there are new topics, and publishes there
                changes, self._batches.subscriptions = self._batches.subscriptions, {}
                mqtt.change_subscriptions(changes)
        finally:  # the responder passes nothing more on until it has them
            self._front.tell(ANSWERS, answers)

    def _keep(self, mqtt: KeeperConnection) -> None:
        """Keep a batch of messages, and acknowledge them.

        :raises StoreError: that can't be done. They stay with the broker until we disconnect, and
            their publishers send them again when we are back
        """
        while mqtt.inbox and len(self._messages) < MAX_BATCH:
            self._messages.append(mqtt.inbox.take())
        if self._messages:
            faults = self._batches.keep([(each.topic, each.payload) for each in self._messages])
            for fault in faults:
                mqtt.acknowledge([self._messages.popleft()])
                self._unkept.add(fault)

    @property
    def _is_rotation_due(self) -> bool:
        is_awaited = time.monotonic() < self._retry_at
        return not is_awaited and self._keeper.next_rotation() <= self._clock()

    def _rotate(self) -> None:
        if self._is_rotation_due:
            self._batches.rotate()
            self._note_failure()

    def _note_failure(self) -> None:
        """Say why a batch has failed, if it has; not for each of many."""
        if self._batches.failure and time.monotonic() >= self._retry_at:
            self._retry_at = time.monotonic() + RETRY_INTERVAL
            event("failed", is_warning=True, **words_for(self._batches.failure))

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
