"""What a member does on one topic: it publishes there, or it subscribes to it."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

from secure_mqtt.connection import Connection
from secure_mqtt.settings import Settings
from secure_mqtt.signatures import Authority, Identity
from secure_mqtt.topics.enquiries import Enquiries
from secure_mqtt.topics.keys import Keys
from secure_mqtt.topics.messages import SessionKey
from secure_mqtt.topics.order import Received
from secure_mqtt.topics.output import Notes
from secure_mqtt.topics.publisher import Publisher, Receipt
from secure_mqtt.topics.requests import Joined
from secure_mqtt.topics.senders import Senders
from secure_mqtt.topics.subscriber import Ask, Subscriber

# On Linux, the one that goes on while the machine sleeps; that of macOS does.
CLOCK = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)
MAX_UNSHOWN = 10_000  # messages that the reader of standard output has no room for


def clock() -> float:
    """Return the seconds since some moment, those of sleep included."""
    return time.clock_gettime(CLOCK)


class Publication:
    """Publishes on a topic."""

    def __init__(self, settings: Settings, identity: Identity, topic: str) -> None:
        """Make the session's key."""
        self.topic = topic
        self.refusal = ""  # why the keeper does not let us
        self._keys = Keys(topic, clock)
        session = SessionKey(identity, topic, settings.netid, settings.peer_name)
        self._publisher = Publisher(session, self._keys, clock)

    @property
    def is_done(self) -> bool:
        """Whether the broker has acknowledged all."""
        return self._publisher.is_done

    def has_room(self) -> bool:
        """Tell whether another message may be added."""
        return self._publisher.has_room()

    def add(self, data: bytes) -> None:
        """Publish a message. ProgramError if it is too large."""
        self._publisher.add(time.time_ns() // 1_000_000, data)

    def go_on(self, mqtt: Connection, enquiries: Enquiries) -> None:
        """Publish and ask what can be published and asked."""
        self._publisher.send(partial(self._publish, mqtt))
        if self._keys.is_due() and not self.refusal:
            self._keys.asked()
            enquiries.ask(self, Ask("join", self.topic, self._publisher.hello))

    def _publish(self, mqtt: Connection, payload: bytes, receipt: Receipt) -> bool:
        return mqtt.publish(
            self.topic, payload, receipt=partial(self._publisher.acknowledged, receipt)
        )

    def next_time(self) -> float:
        """Return when go_on() has to be called, of the clock, if nothing comes before."""
        return min(self._keys.next_time(), self._publisher.asks_at())

    def interrupted(self) -> None:
        """Note that the connection was lost."""
        self._publisher.interrupted()

    def answered(self, ask: Ask, answer: Joined) -> None:
        """Do as Asker.answered() does."""
        self._keys.learn(answer)
        self._publisher.learn(answer)

    def refused(self, ask: Ask, words: str) -> None:
        """Do as Asker.refused() does."""
        self.refusal = words
        self._keys.failed()

    def failed(self, ask: Ask) -> None:
        """Do as Asker.failed() does."""
        self._keys.failed()


class Subscription:
    """Subscribes to a topic."""

    def __init__(self, settings: Settings, authority: Authority, topic: str, notes: Notes) -> None:
        """Begin. notes: where to say what is not shown."""
        self.topic = topic
        self.refusal = ""  # why the keeper does not let us
        self._notes = notes
        keys = Keys(topic, clock)
        senders = Senders(topic, settings.peer_name, authority)
        self._subscriber = Subscriber(topic, keys, senders, clock, settings.history)
        self.take = self._subscriber.take
        self.next_time = self._subscriber.next_time
        self.interrupted = self._subscriber.reconnected
        self.answered = self._subscriber.answered
        self.failed = self._subscriber.failed

    def has_room(self) -> bool:
        """Tell whether more messages may be taken."""
        return len(self._subscriber.order.received) < MAX_UNSHOWN

    def go_on(self, mqtt: Connection, enquiries: Enquiries) -> None:
        """Ask what can be asked."""
        if not self.refusal:
            for ask in self._subscriber.asks():
                enquiries.ask(self, ask)

    def show(self, put: Callable[[Received], bool]) -> None:
        """Show messages, as long as there is room for them; note what can't be shown.

        :param put: shows a message; False: it can't be shown now
        """
        received = self._subscriber.order.received
        while received and put(received[0]):
            received.popleft()
        self._note()

    def _note(self) -> None:
        missed, faults = self._subscriber.order.missed, self._subscriber.feed.faults
        while missed:
            self._notes.missed(self.topic, *missed.popleft())
        for fault, count in faults.items():
            self._notes.refused(self.topic, fault, count)
        faults.clear()

    def refused(self, ask: Ask, words: str) -> None:
        """Do as Asker.refused() does."""
        if ask.do == "join":
            self.refusal = words
        self._subscriber.refused(ask)
