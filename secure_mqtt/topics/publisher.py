"""Publishing on a topic: what is to be published when, so that each message arrives once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from secure_mqtt.errors import ProgramError
from secure_mqtt.topics.keys import NEVER, Keys
from secure_mqtt.topics.messages import MAX_DATA_SIZE, Epoch, SessionKey, Stream
from secure_mqtt.topics.requests import Joined

WINDOW, WINDOW_BYTES = 1_000, 2**20  # messages that the broker has not acknowledged yet
# Acknowledged messages that are kept to be sent again, should the keeper not have them.
MAX_KEPT, MAX_KEPT_BYTES = 20_000, 2**24
# Of these, so many that the keeper is waited for: it shall have them before their epoch is over.
PACE, PACE_BYTES = 4_000, 2**22
CHECK_INTERVAL = 10.0  # seconds
PACE_PATIENCE = 3.0  # seconds to wait for a keeper that gets no further, which may be away
PATIENCE = 30.0  # seconds to wait for it when no more can be kept; then the oldest are forgotten


class Line:
    """A message to publish."""

    __slots__ = ("counter", "data", "epoch", "is_acknowledged", "time")

    def __init__(self, counter: int, time: int, data: bytes) -> None:
        """Take it. time: in milliseconds since 1970."""
        self.counter, self.time, self.data = counter, time, data
        self.epoch: Epoch | None = None  # in which it was sent last
        self.is_acknowledged = False  # by the broker


class Receipt(NamedTuple):
    """What a broker's acknowledgement is for."""

    counter: int  # of a message; -1: a hello
    epoch: Epoch


# Publishes a payload at QoS 1, or returns False.
Publish = Callable[[bytes, Receipt], bool]


class Tally:
    """How many lines of some kind there are, and of how many bytes."""

    def __init__(self, most: int, most_bytes: int) -> None:
        """Count from 0, up to some numbers."""
        self.count = self._bytes = 0
        self._most, self._most_bytes = most, most_bytes

    def add(self, line: Line, times: int = 1) -> None:
        """Count a line, or with -1 as times no longer."""
        self.count += times
        self._bytes += times * len(line.data)

    def is_full(self) -> bool:
        """Tell whether there should be no further ones."""
        return self.exceeds(self._most, self._most_bytes)

    def exceeds(self, count: int, size: int) -> bool:
        """Tell whether there are so many lines or more, or so many bytes of them."""
        return self.count >= count or self._bytes >= size


class Window:
    """The lines that may still have to be sent, or sent again, in their order."""

    def __init__(self) -> None:
        self.waiting = Tally(WINDOW, WINDOW_BYTES)  # for the broker's acknowledgement
        self._acknowledged = Tally(MAX_KEPT, MAX_KEPT_BYTES)
        self._lines: deque[Line] = deque()
        self._sent = 0  # how many of these were sent
        self._next = 0  # the next line's counter

    def add(self, time: int, data: bytes) -> None:
        """Take one more line."""
        line = Line(self._next, time, data)
        self._next += 1
        self._lines.append(line)
        self.waiting.add(line)

    def to_send(self) -> Line | None:
        """Return the line to send next, if it is time for one."""
        in_flight = self._sent - self._acknowledged.count
        is_there = self._sent < len(self._lines) and in_flight < WINDOW
        return self._lines[self._sent] if is_there else None

    def oldest_sent(self) -> Line | None:
        """Return the oldest line that was sent and is still here."""
        return self._lines[0] if self._sent else None

    @property
    def acknowledged(self) -> int:
        """How many lines are here that the broker has."""
        return self._acknowledged.count

    def is_ahead(self) -> bool:
        """Tell whether the keeper may lack so much that it has to be asked."""
        return self._acknowledged.exceeds(PACE, PACE_BYTES)

    def is_keeper_behind(self) -> bool:
        """Tell whether there will be no more room for what the keeper may lack."""
        return self._acknowledged.exceeds(MAX_KEPT - WINDOW, MAX_KEPT_BYTES - WINDOW_BYTES)

    def sent(self) -> None:
        """Note that this line was sent."""
        self._sent += 1

    def acknowledge(self, receipt: Receipt) -> None:
        """Note that the broker has a line; forget the oldest if these are too many."""
        index = receipt.counter - self._lines[0].counter if self._lines else -1
        if 0 <= index < self._sent and self._lines[index].epoch is receipt.epoch:
            self._mark(self._lines[index], True)
        while self._acknowledged.is_full() and self._lines[0].is_acknowledged:
            self._forget_first()

    def forget_acknowledged(self) -> None:
        """Forget the oldest lines that the broker has."""
        while self._lines and self._lines[0].is_acknowledged:
            self._forget_first()

    def confirm(self, counter: int) -> bool:
        """Forget the lines up to a counter: the keeper has them. Tell whether there were any."""
        sent = self._sent
        while self._sent and self._lines[0].counter <= counter:
            self._mark(self._lines[0], True)
            self._forget_first()
        return self._sent < sent

    def rewind(self) -> None:
        """Send again what is still here."""
        self._sent = 0
        for line in self._lines:
            self._mark(line, False)

    def _mark(self, line: Line, is_acknowledged: bool) -> None:
        if line.is_acknowledged != is_acknowledged:
            line.is_acknowledged = is_acknowledged
            self._acknowledged.add(line, 1 if is_acknowledged else -1)
            self.waiting.add(line, -1 if is_acknowledged else 1)

    def _forget_first(self) -> None:
        self._acknowledged.add(self._lines.popleft(), -1)
        self._sent -= 1


def check_size(size: int) -> None:
    """Raise ProgramError for a message of so many bytes if that is too large."""
    if size > MAX_DATA_SIZE:
        raise ProgramError(
            f"a message of {size} bytes is too large for a topic",
            f"it can have {MAX_DATA_SIZE}",
        )


class Publisher:
    """What one session publishes on one topic."""

    def __init__(self, session: SessionKey, keys: Keys, clock: Callable[[], float]) -> None:
        """Take the session's key, and what is known of the topic's.

        :param clock: as the keys have it
        """
        self._session, self._keys, self._clock = session, keys, clock
        self._window = Window()
        # By the epoch's key, the newest last; in each our hello was sent.
        self._streams: dict[bytes, Stream] = {}
        self._must_ask = True  # before we publish on
        self._is_kept = False  # whether the keeper keeps messages
        self._is_ending = False  # whether no more will be added
        self._check_at = NEVER  # when to ask how far the keeper has got, once something was sent
        self._ahead_since = NEVER  # since when the keeper gets no further

    @property
    def hello(self) -> bytes:
        """What our request to join has to carry."""
        return self._session.hello

    @property
    def is_done(self) -> bool:
        """Whether the broker has acknowledged all."""
        return not self._window.waiting.count

    @property
    def unkept(self) -> int:
        """How many messages the keeper may lack, as it has said, if it keeps them."""
        return self._window.acknowledged if self._is_kept else 0

    def is_settled(self) -> bool:
        """Tell whether the keeper has all, too, or has got no further for PATIENCE.

        To be called when no more will be added: from then on it is asked often.
        """
        self._is_ending = True
        return not self.unkept or self._clock() >= self._ahead_since + PATIENCE

    def has_room(self) -> bool:
        """Tell whether another message may be added."""
        return not self._window.waiting.is_full()

    def add(self, time: int, data: bytes) -> None:
        """Add a message.

        :param time: now, in milliseconds since 1970, UTC
        :raises ProgramError: it is too large
        """
        check_size(len(data))
        self._window.add(time, data)

    def send(self, publish: Publish) -> None:
        """Publish what can be published now.

        :param publish: its receipt is for acknowledged(), when the broker has acknowledged it
        """
        while not self._has_to_wait() and (line := self._window.to_send()):
            line.epoch = epoch = self._keys.current
            if not (epoch and self._introduce(epoch, publish) and self._send(line, epoch, publish)):
                break
            self._window.sent()

    def _has_to_wait(self) -> bool:
        """Tell whether the keeper has to say first how far it has got."""
        now = self._clock()
        is_ahead = self._is_kept and (self._is_ending or self._window.is_ahead())
        is_overdue = now >= self.asks_at()
        if is_overdue:  # the answer may be long in coming: who waits for it shall not spin
            self._check_at = now + CHECK_INTERVAL
        if is_ahead or is_overdue:
            self._keys.ask_soon()
        self._ahead_since = min(self._ahead_since, now) if is_ahead else NEVER
        patience = PATIENCE if self._window.is_keeper_behind() else PACE_PATIENCE
        return self._must_ask or now < self._ahead_since + patience < NEVER

    def asks_at(self) -> float:
        """Return when to ask whether what we have published was in time for its epoch.

        Who publishes does not subscribe, and so gets no notice that it is over.
        """
        return self._check_at if self._window.oldest_sent() else NEVER

    def _introduce(self, epoch: Epoch, publish: Publish) -> bool:
        """Publish our hello, if that was not done yet in an epoch; tell whether it was."""
        if epoch.key not in self._streams and publish(
            epoch.seal_hello(self.hello), Receipt(-1, epoch)
        ):
            # The others are over, but for the one before.
            self._streams = dict([*self._streams.items()][-1:])
            self._streams[epoch.key] = Stream(epoch, self._session.session)
        return epoch.key in self._streams

    def _send(self, line: Line, epoch: Epoch, publish: Publish) -> bool:
        key, stream = self._session.key, self._streams[epoch.key]
        payload = stream.seal(key, line.counter, line.time, line.data)
        return publish(payload, Receipt(line.counter, epoch))

    def acknowledged(self, receipt: Receipt) -> None:
        """Note that the broker has acknowledged something."""
        self._window.acknowledge(receipt)

    def interrupted(self) -> None:
        """Note that the connection was lost, and perhaps some of what was under way."""
        self._must_ask = True
        self._streams.clear()
        self._keys.ask_soon()

    def learn(self, joined: Joined) -> None:
        """Take the keeper's answer to our request to join, which the keys have taken already.

        We send again what may be lost: with a connection, or since it comes when its epoch is
        over. Where the keeper keeps messages, that is what it lacks; elsewhere, what was sent since
        it was asked last, or what the broker has not acknowledged. Who has it already drops it.

        In a new epoch it is sent before all that follows: else it might come too late, what follows
        not, and whoever has that takes nothing from before.
        """
        self._check_at, self._is_kept = self._clock() + CHECK_INTERVAL, joined.history > 0
        if self._window.confirm(joined.counters.get(self._session.session, -1)):
            self._ahead_since = NEVER
        oldest = self._window.oldest_sent()
        epoch = oldest.epoch if oldest else self._keys.current
        is_over = epoch and self._keys.find(epoch.number) is not epoch
        if not (self._is_kept or is_over):
            self._window.forget_acknowledged()
        if self._must_ask or epoch is not self._keys.current:
            self._window.rewind()
        self._must_ask = False
