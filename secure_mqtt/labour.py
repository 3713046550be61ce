"""A responder's labour: messages wait for their NetID's turn, and NetIDs for a worker."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from secure_mqtt.keyring import Key
from secure_mqtt.pool import Pool
from secure_mqtt.powers import Powers
from secure_mqtt.turns import Incoming, Turns


class Labour:
    """Who waits for what, and who is next."""

    def __init__(self) -> None:
        """Start the workers; to be done before there are threads."""
        self.turns = Turns()
        self.pool = Pool()
        self.powers = Powers(self.pool)
        self._waiting: deque[str] = deque()  # NetIDs that want a worker

    @property
    def is_busy(self) -> bool:
        """Whether there is anything to be finished."""
        return self.turns.has_next or bool(self._waiting) or self.pool.is_busy

    def wait_for_worker(self, message: Incoming) -> None:
        """Let a message wait that was just taken, and its NetID's others behind it."""
        self.turns.hold(message.netid, message)
        self._waiting.append(message.netid)

    def take_waiting(self) -> Incoming | None:
        """Return the message that has waited longest for a worker, if there is one."""
        while self._waiting:
            if self.turns.release(self._waiting.popleft()):
                return self.turns.take()
        return None

    def work_ahead(self, derive: Callable[[Key], Any]) -> bool:
        """Let an idle worker do what nobody waits for yet; tell whether there is such work.

        :param derive: lets it derive a key
        """
        if self.powers.needs_key_pairs(0.5):
            self.powers.make_key_pairs()
        elif key := self.powers.next_unhurried():
            derive(key)
        elif self.powers.needs_key_pairs(1):
            self.powers.make_key_pairs()
        else:
            return False
        return True
