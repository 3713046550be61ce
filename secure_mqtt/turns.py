"""A queue in which NetIDs take turns, so that none keeps the others waiting."""

from __future__ import annotations

import time
from collections import deque
from enum import Enum, auto
from typing import NamedTuple

# Bytes of all that waits together: the payloads, and for each message what it takes beside. A
# second's worth of short messages as fast as a broker sends them, and twenty of the largest.
MAX_WEIGHT = 2**25
MESSAGE_WEIGHT = 512
SLACK = MAX_WEIGHT // 16  # bytes: so much is freed at a time, since to find the heaviest takes long


class Incoming(NamedTuple):
    """A message to a responder."""

    netid: str
    action: str
    payload: bytes
    arrived: float  # of time.monotonic()

    @property
    def weight(self) -> int:
        """What it counts as, in bytes."""
        return len(self.payload) + MESSAGE_WEIGHT

    def milliseconds(self) -> float:
        """Return the time since it came."""
        return (time.monotonic() - self.arrived) * 1000


class Hold(Enum):
    """What a NetID waits for that is held."""

    WORKER = auto()  # an idle one
    KEY = auto()  # its key, which is being derived
    ANSWER = auto()  # the answer to its request, which a worker makes
    KEEPER = auto()  # the keeper's process, which has enough to do


class Turns:
    """Messages that wait, each in the queue of its NetID.

    When there is no room left, the heaviest queue loses its newest messages.
    """

    def __init__(self) -> None:
        self._dropped = 0  # messages
        self._queues: dict[str, deque[Incoming]] = {}
        self._weights: dict[str, int] = {}  # of the queues, in bytes
        self._weight = 0  # of all of them
        self._order: deque[str] = deque()  # NetIDs whose turn will come
        self._held: dict[str, Hold] = {}  # those whose turn does not come before they are released

    def __len__(self) -> int:
        """Return how many messages wait."""
        return sum(map(len, self._queues.values()))

    @property
    def has_next(self) -> bool:
        """Whether it is anybody's turn."""
        return bool(self._order)

    def put(self, message: Incoming) -> None:
        """Let a message wait."""
        netid = message.netid
        queue = self._queues.get(netid)
        if queue is None:
            queue = self._queues[netid] = deque()
            if netid not in self._held:
                self._order.append(netid)
        queue.append(message)
        self._add_weight(netid, message.weight)
        if self._weight > MAX_WEIGHT:
            self._make_room()

    def take(self) -> Incoming:
        """Return the oldest message of the NetID whose turn it is. IndexError if there is none."""
        netid = self._order.popleft()
        queue = self._queues[netid]
        message = queue.popleft()
        self._add_weight(netid, -message.weight)
        if queue:
            self._order.append(netid)
        else:
            self._remove(netid)
        return message

    def hold(self, netid: str, why: Hold, message: Incoming | None = None) -> None:
        """Keep a NetID waiting whose message was just taken, until it is released.

        :param message: what was taken, if it shall be taken again then
        """
        self._held[netid] = why
        if self._order and self._order[-1] == netid:  # where take() puts it, if more waits
            self._order.pop()
        if message:
            self._queues.setdefault(netid, deque()).appendleft(message)
            self._add_weight(netid, message.weight)

    def release(self, netid: str, why: Hold) -> bool:
        """Let it be a NetID's turn next, if it was held for that; tell whether it has messages."""
        if self._held.get(netid) != why:
            return False
        del self._held[netid]
        is_next = netid in self._queues
        if is_next:
            self._order.appendleft(netid)
        return is_next

    def take_dropped(self) -> int:
        """Return how many messages were dropped since this was asked before."""
        dropped, self._dropped = self._dropped, 0
        return dropped

    def _add_weight(self, netid: str, weight: int) -> None:
        self._weights[netid] = self._weights.get(netid, 0) + weight
        self._weight += weight

    def _remove(self, netid: str) -> None:
        del self._queues[netid], self._weights[netid]

    def _make_room(self) -> None:
        while self._weight > MAX_WEIGHT - SLACK:
            heaviest = max(self._weights, key=self._weights.__getitem__)
            queue = self._queues[heaviest]
            for _ in range((len(queue) + 1) // 2):
                self._add_weight(heaviest, -queue.pop().weight)
                self._dropped += 1
            if not queue:
                self._remove(heaviest)
                if heaviest in self._order:
                    self._order.remove(heaviest)
