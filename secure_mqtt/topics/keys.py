"""Which keys a member may use on a topic, and when it asks for new ones."""

from __future__ import annotations

import random
from collections.abc import Callable

from secure_mqtt.topics.messages import Epoch
from secure_mqtt.topics.requests import Joined

ASK_INTERVAL = 1.0  # seconds at least between two requests for keys, whatever the broker sends
MAX_SPREAD = 20.0  # seconds over which members spread their requests
NEVER = float("inf")


class Keys:
    """What a member knows of a topic's keys.

    Times of an answer count from when it was asked for: if it was held back, they are over earlier.
    """

    def __init__(
        self, topic: str, clock: Callable[[], float], spread: Callable[[float], float] | None = None
    ) -> None:
        """Know nothing yet, which is to be asked for at once.

        :param clock: tells seconds, from any moment on; it goes on while the machine sleeps
        :param spread: returns how much later to ask, from 0 to a number of seconds; None: random
        """
        self._topic, self._clock = topic, clock
        self._spread = spread or (lambda seconds: random.uniform(0, seconds))
        self.newest: Epoch | None = None
        self._previous: Epoch | None = None
        self._newest_ends = self._previous_ends = -NEVER
        self._renew_at = self._asked_at = -NEVER
        self.is_asking = False
        self.known_at = -NEVER  # when the keeper was asked for the answer that is known

    @property
    def number(self) -> int:
        """The number of the newest epoch that is known; 0: none is."""
        return self.newest.number if self.newest else 0

    @property
    def current(self) -> Epoch | None:
        """The epoch to publish in; None: there is none now."""
        return self.newest if self._clock() < self._newest_ends else None

    def find(self, number: int) -> Epoch | None:
        """Return an epoch that may be read from the topic now."""
        if number == self.number:
            return self.current
        is_open = self._previous and self._clock() < self._previous_ends
        return self._previous if is_open and number == self.number - 1 else None

    def learn(self, joined: Joined) -> None:
        """Take the keeper's answer."""
        self.is_asking, self.known_at = False, self._asked_at
        self._previous, self._previous_ends = None, -NEVER
        if joined.previous:
            self._previous = self._epoch(joined.previous.epoch, joined.previous.key)
            self._previous_ends = self._asked_at + joined.previous.expires
        self.newest = self._epoch(joined.epoch, joined.key)
        self._newest_ends = self._asked_at + joined.expires
        later = self._spread(min(joined.renew / 10, MAX_SPREAD))
        self._renew_at = self._asked_at + joined.renew + later

    def _epoch(self, number: int, key: bytes) -> Epoch:
        for known in (self.newest, self._previous):
            if known and (known.number, known.key) == (number, key):
                return known
        return Epoch(self._topic, number, key)

    def ask_soon(self) -> None:
        """Ask as soon as that may be: there seem to be other keys, or no answer came."""
        self._renew_at = min(self._renew_at, self._clock())

    def is_due(self) -> bool:
        """Tell whether to ask now."""
        return self.next_time() <= self._clock()

    def next_time(self) -> float:
        """Return when to ask."""
        return NEVER if self.is_asking else max(self._renew_at, self._asked_at + ASK_INTERVAL)

    def asked(self) -> None:
        """Note that the keeper is being asked."""
        self.is_asking, self._asked_at = True, self._clock()

    def failed(self) -> None:
        """Note that no answer will come."""
        self.is_asking = False
        self.ask_soon()
