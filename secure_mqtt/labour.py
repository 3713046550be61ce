"""A responder's labour: messages wait for their NetID's turn, and NetIDs for a worker."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

from secure_mqtt.actions import KEY_EXCHANGE
from secure_mqtt.keyring import Key, Keyring
from secure_mqtt.pool import Pool
from secure_mqtt.powers import Powers
from secure_mqtt.turns import Hold, Incoming, Turns

MAX_INLINE = 2**13  # bytes of a request that is answered at once; a larger one would take too long


class Labour:
    """Who waits for what, and who is next."""

    def __init__(self, keyring: Keyring) -> None:
        """Start the workers; to be done before there are threads."""
        self._keyring = keyring
        self.turns = Turns()
        self.pool = Pool()
        self.powers = Powers(self.pool)
        # NetIDs that want a worker, as a heap: by rank, then in the order in which they came.
        self._waiting: list[tuple[int, int, str]] = []
        self._waited = 0  # NetIDs so far

    @property
    def is_busy(self) -> bool:
        """Whether there is anything to be finished."""
        return self.turns.has_next or bool(self._waiting) or self.pool.is_busy

    def wait_for_worker(self, message: Incoming) -> None:
        """Let a message wait that was just taken, and its NetID's others behind it."""
        self.turns.hold(message.netid, Hold.WORKER, message)
        self._waited += 1
        heappush(self._waiting, (self._rank(message), self._waited, message.netid))

    def take_waiting(self) -> Incoming | None:
        """Return the message that gets a worker next, if one waits."""
        while self._waiting:
            *_, netid = heappop(self._waiting)
            if self.turns.release(netid, Hold.WORKER):
                return self.turns.take()
        return None

    def _rank(self, message: Incoming) -> int:
        """Return how much a message is to be kept waiting: 0 is what any honest client sends."""
        unused = self._keyring.unproven(message.netid)
        if message.action == KEY_EXCHANGE:
            return unused
        # A request may be for one of them. A long text takes as long as many powers.
        return max(0, unused - 1) + (len(message.payload) > MAX_INLINE)

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
