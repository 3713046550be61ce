"""What a member subscribes to: one topic, over a connection."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from secure_mqtt.connection import Connection
from secure_mqtt.settings import Settings
from secure_mqtt.topics.enquiries import Enquiries
from secure_mqtt.topics.keys import Keys, clock
from secure_mqtt.topics.order import Received
from secure_mqtt.topics.output import Notes
from secure_mqtt.topics.requests import Ask
from secure_mqtt.topics.senders import Senders
from secure_mqtt.topics.subscriber import Subscriber

if TYPE_CHECKING:
    from secure_mqtt.signatures import Authority


class Subscription:
    """Subscribes to a topic."""

    is_subscribed = True

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

    def has_begun(self) -> bool:
        """Tell whether all is taken that was published before."""
        return not self._subscriber.feed.is_held

    def has_room(self) -> bool:
        """Tell whether more messages may be taken."""
        return self._subscriber.order.has_room()

    def go_on(self, mqtt: Connection, enquiries: Enquiries) -> None:
        """Ask what can be asked."""
        if not self.refusal:
            for ask in self._subscriber.asks():
                enquiries.ask(self, ask)

    def show(self, put: Callable[[Received], bool]) -> None:
        """Show messages, as long as there is room for them; note what can't be shown.

        :param put: shows a message; False: it can't be shown now
        """
        order = self._subscriber.order
        while order.received and put(order.received[0]):
            order.shown()
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
