"""In which order a subscriber shows messages: each session's as they were published, each once."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

from secure_mqtt.topics.keys import NEVER

MAX_LANES = 20_000  # sessions that are remembered, the least recently heard of is forgotten first
# Messages on a topic that are held back; as many may wait for who shows them.
MAX_WAITING, MAX_WAITING_BYTES = 10_000, 2**24
RETRIES = 1.0, 2.0  # seconds after which the keeper is asked again for what is missing
PATIENCE = 30.0  # seconds after which it is missed, even if the keeper has not answered


class Received(NamedTuple):
    """A message to be shown."""

    topic: str
    sender: str  # NetID
    time: int  # milliseconds since 1970, UTC
    data: bytes


class Room:
    """How much may be held back."""

    def __init__(self, most: int = MAX_WAITING, most_bytes: int = MAX_WAITING_BYTES) -> None:
        """Take the bounds."""
        self._left, self._bytes_left = most, most_bytes

    def take(self, data: bytes) -> bool:
        """Take room for something, if there is enough."""
        has_room = self._left > 0 and self._bytes_left >= len(data)
        if has_room:
            self.give(data, -1)
        return has_room

    def give(self, data: bytes, times: int = 1) -> None:
        """Give room back."""
        self._left += times
        self._bytes_left += times * len(data)


class Gap:
    """Later messages of a session, which wait for some that are missing."""

    __slots__ = ("ends", "held", "retry_at", "tries")

    def __init__(self, now: float) -> None:
        """Ask for what is missing at once."""
        self.held: dict[int, Received] = {}  # by counter
        self.tries = 0  # how often the keeper has said that it lacks it, too
        self.retry_at = now  # when to ask; NEVER: that is being done
        self.ends = now + PATIENCE


class Lane:
    """How far the messages of a session are shown."""

    __slots__ = ("gap", "last")

    def __init__(self, last: int | None) -> None:
        """Begin after a counter; None: with whatever comes first."""
        self.last = last
        self.gap: Gap | None = None


class Order:
    """Puts the messages of a topic in order."""

    def __init__(self, clock: Callable[[], float], room: Room) -> None:
        """Begin with nothing known. clock: tells seconds, from any moment on."""
        self._clock, self._room = clock, room
        self.received: deque[Received] = deque()  # in order, until shown() is called
        self._received_bytes = 0  # of their data
        self.missed: deque[tuple[str, int]] = deque()  # whose messages, and how many; likewise
        self.starts: Mapping[bytes, int] = {}  # counters of the last messages before ours
        self.is_kept = False  # whether the keeper may have what is missing
        self._lanes: OrderedDict[bytes, Lane] = OrderedDict()
        self._gaps: dict[bytes, Gap] = {}

    def is_new(self, session: bytes, counter: int, is_past: bool = False) -> bool:
        """Tell whether a message is none that was shown, or is held back.

        :param is_past: whether the keeper has kept it
        """
        lane = self._lanes.get(session)
        if lane and lane.gap and counter in lane.gap.held:
            return is_past  # then its turn has come
        last = lane.last if lane else None if is_past else self.starts.get(session)
        return last is None or counter > last

    def has_room(self) -> bool:
        """Tell whether there should be more to show, as long as nothing of it is shown."""
        return len(self.received) < MAX_WAITING and self._received_bytes < MAX_WAITING_BYTES

    def shown(self) -> None:
        """Forget the first message that was received: it is shown."""
        self._received_bytes -= len(self.received.popleft().data)

    def has_all(self, counters: Mapping[bytes, int]) -> bool:
        """Tell whether all up to these counters was shown, or is known to be missed."""
        return not any(self.is_new(session, counter, True) for session, counter in counters.items())

    def take(self, session: bytes, counter: int, message: Received) -> None:
        """Take a message that was published just now, and is_new()."""
        lane = self._lane(session, self.starts.get(session))
        if lane.last is None and (counter == 0 or not self.is_kept):
            lane.last = counter - 1
        is_next = lane.last is not None and counter == lane.last + 1
        if is_next or not self.is_kept:
            self._show(lane, counter, message)
            self._close(session, lane)
        elif self._room.take(message.data):
            lane.gap = lane.gap or self._gaps.setdefault(session, Gap(self._clock()))
            lane.gap.held[counter] = message
        else:
            self._give_up(session, counter)
            self._show(lane, counter, message)
            self._close(session, lane)

    def take_past(self, session: bytes, counter: int, message: Received) -> None:
        """Take a message that the keeper has kept.

        It keeps none with a lower counter later: what is missing before this one is missed.
        """
        lane = self._lane(session, None)
        self._give_up(session, counter)
        if lane.last is None or counter > lane.last:
            self._show(lane, counter, message)
        self._close(session, lane)

    def _lane(self, session: bytes, last: int | None) -> Lane:
        """Return what is known of a session; if that is nothing, begin after a counter."""
        if session not in self._lanes:
            self._lanes[session] = Lane(last)
            if len(self._lanes) > MAX_LANES:
                self._forget(next(iter(self._lanes)))
        self._lanes.move_to_end(session)
        return self._lanes[session]

    def _forget(self, session: bytes) -> None:
        self._give_up(session)
        del self._lanes[session]

    def _show(self, lane: Lane, counter: int, message: Received) -> None:
        missed = 0 if lane.last is None else counter - lane.last - 1
        if missed:
            self.missed.append((message.sender, missed))
        lane.last = counter
        self.received.append(message)
        self._received_bytes += len(message.data)

    def _give_up(self, session: bytes, below: float = NEVER) -> None:
        """Show what a session holds back up to a counter; what is missing before is missed."""
        lane = self._lanes[session]
        for counter in sorted(lane.gap.held) if lane.gap else ():
            if counter < below:
                self._show(lane, counter, self._let_go(session, counter))
        self._close(session, lane)

    def _close(self, session: bytes, lane: Lane) -> None:
        """Show what is no longer held back by anything; end the gap if nothing else is held."""
        if not lane.gap:
            return
        while lane.last is not None and lane.last + 1 in lane.gap.held:
            counter = lane.last + 1
            self._show(lane, counter, self._let_go(session, counter))
        for counter in [*lane.gap.held]:
            if lane.last is not None and counter <= lane.last:
                self._let_go(session, counter)
        if not lane.gap.held:
            lane.gap = None
            del self._gaps[session]

    def _let_go(self, session: bytes, counter: int) -> Received:
        message = self._gaps[session].held.pop(counter)
        self._room.give(message.data)
        return message

    # --- what is asked of the keeper -----------------------------------------------------------

    def asked(self) -> None:
        """Note that it is being asked for all that it has."""
        for gap in self._gaps.values():
            if gap.retry_at <= self._clock():
                gap.retry_at = NEVER

    def answered(self) -> None:
        """Note that all that it has was taken."""
        for session, gap in [*self._gaps.items()]:
            if gap.retry_at == NEVER:  # else it has begun meanwhile
                if gap.tries == len(RETRIES) or self._lanes[session].last is None:
                    self._give_up(session)
                else:
                    gap.retry_at = self._clock() + RETRIES[gap.tries]
                    gap.tries += 1

    def failed(self) -> None:
        """Note that it does not answer."""
        for gap in self._gaps.values():
            if gap.retry_at == NEVER:
                gap.retry_at = self._clock() + RETRIES[0]

    def expire(self) -> None:
        """Show what was held back for too long."""
        for session, gap in [*self._gaps.items()]:
            if gap.ends <= self._clock():
                self._give_up(session)

    def asks_at(self) -> float:
        """Return when asking is due."""
        return min((gap.retry_at for gap in self._gaps.values()), default=NEVER)

    def expires_at(self) -> float:
        """Return when expire() is due."""
        return min((gap.ends for gap in self._gaps.values()), default=NEVER)
