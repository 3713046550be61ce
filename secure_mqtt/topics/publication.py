"""What a member publishes on one topic, over a connection."""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING

from secure_mqtt.connection import Connection
from secure_mqtt.settings import Settings
from secure_mqtt.topics.enquiries import Enquiries
from secure_mqtt.topics.keys import Keys, clock
from secure_mqtt.topics.messages import SessionKey
from secure_mqtt.topics.publisher import Publisher, Receipt
from secure_mqtt.topics.requests import Ask, Joined

if TYPE_CHECKING:
    from secure_mqtt.signatures import Identity


class Publication:
    """Publishes on a topic."""

    is_subscribed = False

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

    @property
    def unkept(self) -> int:
        """How many messages the keeper may lack."""
        return self._publisher.unkept

    def is_settled(self) -> bool:
        """Do as Publisher.is_settled() does."""
        return self._publisher.is_settled()

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
