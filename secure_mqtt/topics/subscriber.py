"""Subscribing to a topic: what comes there, and what the keeper says, becomes messages to show."""

from __future__ import annotations

import contextlib
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from crypto import CryptoError
from secure_mqtt.topics.keys import ASK_INTERVAL, NEVER, Keys
from secure_mqtt.topics.messages import (
    HELLO,
    MESSAGE,
    NOTICE,
    Content,
    Epoch,
    Head,
    MessageError,
    Stream,
    read_head,
)
from secure_mqtt.topics.order import Order, Received, Room
from secure_mqtt.topics.requests import MAX_COUNTERS, Joined, Kept, Page, write_request
from secure_mqtt.topics.senders import Reader, Senders, check_time

KEYS = b""  # what payloads wait for; else for a session's sender


class Ask(NamedTuple):
    """What a member asks the keeper of its topic."""

    do: str  # join, sender or history
    topic: str
    detail: Any = None  # the third field of the request

    def __bytes__(self) -> bytes:
        """Return the request."""
        return write_request(self.do, self.topic, self.detail)


class Shelf:
    """What came from the topic and waits for the keeper, within bounds."""

    def __init__(self, room: Room) -> None:
        """Take the bounds."""
        self._room = room
        self._payloads: dict[bytes, list[tuple[bytes, float]]] = {}

    def put(self, reason: bytes, payload: bytes, now: float) -> None:
        """Keep a payload. MessageError if there is no room.

        :param reason: KEYS, or the session that has to be known
        """
        if not self._room.take(payload):
            raise MessageError("too many at a time")
        self._payloads.setdefault(reason, []).append((payload, now))

    def take(self, reason: bytes) -> list[tuple[bytes, float]]:
        """Return what waits for something, and since when; it is here no more."""
        payloads = self._payloads.pop(reason, [])
        for payload, _ in payloads:
            self._room.give(payload)
        return payloads


class Past:
    """How far the messages that the keeper has kept were read."""

    def __init__(self, clock: Callable[[], float], earlier: int | None) -> None:
        """Begin with so many of the newest, or with all (None)."""
        self._clock, self._is_wanted = clock, earlier != 0
        self._after = 0 if earlier is None else -earlier
        self.is_reading = self._needs_page = True
        self._is_asking = False
        self.ask_at = -NEVER
        self._messages: deque[Kept] = deque()  # of a page
        self._epochs: dict[int, Epoch] = {}  # of these

    def start(self, joined: Joined) -> None:
        """Note what there is; it is not read at first if nobody wants it."""
        if not (joined.history and self._is_wanted):
            self._after, self.is_reading = joined.number, False

    def begin(self) -> None:
        """Read what is new."""
        if not self.is_reading:
            self.is_reading = self._needs_page = True

    def end(self) -> None:
        """Read no more for now."""
        self.is_reading = False
        self.ask_at = self._clock() + ASK_INTERVAL

    def skip_to(self, number: int) -> None:
        """Take the messages up to a number as read."""
        self._after = max(self._after, number)

    def to_ask(self) -> int | None:
        """Return after which message to ask for more, if it is time for that."""
        if self.next_time() > self._clock():
            return None
        self._is_asking = True
        return self._after

    def next_time(self) -> float:
        """Return when to ask."""
        is_wanted = self.is_reading and self._needs_page and not self._is_asking
        return self.ask_at if is_wanted and not self._messages else NEVER

    def learn(self, topic: str, page: Page) -> None:
        """Take the keeper's answer."""
        self._is_asking = False
        self._messages.extend(page.messages)
        self._epochs = {number: Epoch(topic, number, key) for number, key in page.keys.items()}
        self._needs_page = page.more and bool(page.messages)
        self._after = page.messages[-1].number if page.messages else max(self._after, 0)

    def failed(self) -> None:
        """Note that it does not answer."""
        self._is_asking = False
        self.ask_at = self._clock() + ASK_INTERVAL

    def first(self) -> bytes:
        """Return the next message's payload; empty: there is none."""
        return self._messages[0].payload if self._messages else b""

    def drop(self) -> None:
        """Go on to the next one."""
        self._messages.popleft()

    def epoch(self, number: int) -> Epoch:
        """Return an epoch of these messages. MessageError if the keeper has not sent its key."""
        if number not in self._epochs:
            raise MessageError("of an epoch whose key the keeper does not have")
        return self._epochs[number]

    def is_finished(self) -> bool:
        """Tell whether all was read that there is."""
        is_busy = self._is_asking or self._needs_page or self._messages
        return self.is_reading and not is_busy


class Feed:
    """Turns what members have published on one topic into messages to show."""

    def __init__(
        self, topic: str, keys: Keys, senders: Senders, order: Order, shelf: Shelf
    ) -> None:
        """Take what is known of the topic, and where its messages go."""
        self._topic, self._keys, self._senders = topic, keys, senders
        self._order, self._shelf = order, shelf
        self.is_held = True  # what comes waits for what came earlier
        self.faults: Counter[str] = Counter()  # why payloads were refused

    def take(self, payload: bytes, now: float) -> None:
        """Take what has come on the topic."""
        with self._counted():
            head = read_head(payload)
            if self.is_held and head.kind != NOTICE:
                self._shelf.put(KEYS, payload, now)
            else:
                self._sort(head, payload, now)

    def release(self, reason: bytes) -> None:
        """Take what has waited for something."""
        for payload, came in self._shelf.take(reason):
            with self._counted():
                self._sort(read_head(payload), payload, came)

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """Do something with what others have sent; count what can't be used."""
        try:
            yield
        except CryptoError as error:
            self.faults[str(error)] += 1

    def _sort(self, head: Head, payload: bytes, came: float) -> None:
        """Take what may belong to an epoch that is over, or not known yet."""
        epoch = self._keys.find(head.epoch)
        if head.kind == NOTICE:
            if head.epoch > self._keys.number:
                self._keys.ask_soon()
        elif not epoch:
            self._postpone(head, payload, came)
        elif head.kind == HELLO:
            self.release(self._senders.introduce(epoch, epoch.open_hello(payload)))
        elif self._order.is_new(head.session, head.counter):
            self._read(epoch, head, payload, came)

    def _postpone(self, head: Head, payload: bytes, came: float) -> None:
        if head.epoch < self._keys.number:
            raise MessageError("of an epoch that is over")
        if head.epoch > self._keys.number and came < self._keys.known_at:
            raise MessageError("of an epoch that the keeper does not know")
        self._shelf.put(KEYS, payload, came)
        self._keys.ask_soon()

    def _read(self, epoch: Epoch, head: Head, payload: bytes, came: float) -> None:
        reader = self._senders.find(epoch, head.session)
        if not reader:
            Stream(epoch, head.session).decrypt(payload)  # nobody else shall make us ask
            reader = self._senders.ask(epoch, head.session)
        if reader:
            content = reader.stream.decrypt(payload)
            self._order.take(head.session, head.counter, self._checked(reader, payload, content))
        else:
            self._shelf.put(head.session, payload, came)

    def _checked(self, reader: Reader, payload: bytes, content: Content) -> Received:
        """Return a message if it is from the sender that it names. MessageError otherwise."""
        reader.stream.verify(payload, content, reader.sender.key)
        return Received(self._topic, reader.sender.netid, content.time, content.data)

    def take_past(self, past: Past) -> bool:
        """Take the next message that the keeper has kept; tell whether its sender is known."""
        with self._counted():
            return self._read_past(past, past.first())
        return True

    def _read_past(self, past: Past, payload: bytes) -> bool:
        head = read_head(payload)
        if head.kind != MESSAGE or not self._order.is_new(head.session, head.counter, True):
            return True
        epoch = past.epoch(head.epoch)
        reader = self._senders.find(epoch, head.session, is_past=True)
        stream = reader.stream if reader else Stream(epoch, head.session)
        content = stream.decrypt(payload)
        reader = reader or self._senders.ask(epoch, head.session, content.time)
        if reader:
            check_time(reader.sender, content.time)
            message = self._checked(reader, payload, content)
            self._order.take_past(head.session, head.counter, message)
        return reader is not None


class Subscriber:
    """What a member knows of a topic that it subscribes to, and asks of its keeper."""

    def __init__(
        self,
        topic: str,
        keys: Keys,
        senders: Senders,
        clock: Callable[[], float],
        earlier: int | None = None,
    ) -> None:
        """Begin; the subscription at the broker has to be there before asks() is called.

        :param clock: tells seconds, from any moment on
        :param earlier: how many messages to show that were published before; None: all
        """
        self.topic, self._keys, self._senders, self._clock = topic, keys, senders, clock
        room = Room()
        self.order = Order(clock, room)
        self.feed = Feed(topic, keys, senders, self.order, Shelf(room))
        self._past = Past(clock, earlier)
        self._pause_ends = -NEVER  # until when not to ask for senders, since there was no answer

    def take(self, payload: bytes) -> None:
        """Take what has come on the topic."""
        self.feed.take(payload, self._clock())

    def reconnected(self) -> None:
        """Note that the subscription began anew: messages may have been lost meanwhile."""
        self._keys.ask_soon()
        self._past.begin()

    def asks(self) -> list[Ask]:
        """Return what to ask the keeper now; each is answered(), refused() or failed() later."""
        now = self._clock()
        self.order.expire()
        asks = []
        if self._keys.is_due():
            self._keys.asked()
            asks.append(Ask("join", self.topic))
        if now >= self._pause_ends:
            asks += [Ask("sender", self.topic, session) for session in self._senders.to_ask()]
        if now >= self.order.asks_at():
            self._past.begin()
        if self.order.is_kept and (after := self._past.to_ask()) is not None:
            self.order.asked()
            asks.append(Ask("history", self.topic, after))
        return asks

    def next_time(self) -> float:
        """Return when asks() has to be called again, if nothing comes before."""
        times = [self._keys.next_time(), self.order.expires_at()]
        if self._senders.are_wanted():
            times.append(self._pause_ends)
        if self.order.is_kept:
            is_reading = self._past.is_reading
            next_page = self._past.next_time() if is_reading else self.order.asks_at()
            times.append(max(next_page, self._past.ask_at))
        return min(times)

    def answered(self, ask: Ask, answer: Any) -> None:
        """Take the keeper's answer, as read_answer() returns it."""
        if ask.do == "join":
            self._join(answer)
        elif ask.do == "sender":
            self._senders.learn(ask.detail, answer)
            self.feed.release(ask.detail)
        else:
            self._past.learn(self.topic, answer)
        self._read_past()

    def refused(self, ask: Ask) -> None:
        """Note that the keeper does not do that."""
        if ask.do == "sender":
            self.answered(ask, b"")
        else:
            self.failed(ask)

    def failed(self, ask: Ask) -> None:
        """Note that no answer will come."""
        if ask.do == "join":
            self._keys.failed()
        elif ask.do == "sender":
            self._senders.failed(ask.detail)
            self._pause_ends = self._clock() + ASK_INTERVAL
        else:
            self._past.failed()
            self.order.failed()

    def _join(self, joined: Joined) -> None:
        before = self._keys.number
        self._keys.learn(joined)
        self.order.is_kept = joined.history > 0
        if before != joined.epoch:
            self._senders.forget_refusals()
        if not before:
            self.order.starts = joined.counters
            self._past.start(joined)
        elif self._knows_all(before, joined):
            self._past.skip_to(joined.number)
        self._end_waiting()

    def _knows_all(self, before: int, joined: Joined) -> bool:
        """Tell whether all messages have come that are kept, so that they need not be read."""
        are_named = before >= joined.epoch - 1 and len(joined.counters) < MAX_COUNTERS
        return are_named and not self._past.is_reading and self.order.has_all(joined.counters)

    def _read_past(self) -> None:
        """Take the messages that the keeper has kept, as far as their senders are known."""
        while self._past.first() and self.feed.take_past(self._past):
            self._past.drop()
        if self._past.is_finished():
            self._past.end()
            self.order.answered()
            self._end_waiting()

    def _end_waiting(self) -> None:
        """Take what has waited for keys, and at the start for what was published earlier."""
        if self._past.is_reading and self.feed.is_held:
            return
        self.feed.is_held = False
        self.feed.release(KEYS)
