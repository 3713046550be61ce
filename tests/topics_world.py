"""Members of a topic and their keeper in one process, with a broker that does as the test says.

All are the program's own but the broker, which is a few queues, and the clock. Whatever is sent
waits until the test lets it go on, is lost with a connection, or is what the test makes of it.
"""

from __future__ import annotations

import contextlib
from collections import deque
from pathlib import Path
from typing import Any

from issuing import NOW
from members import KEEPER, TOPIC, Certified, Certifier, Desk

from crypto import CryptoError
from secure_mqtt.topics.keys import Keys
from secure_mqtt.topics.messages import SessionKey
from secure_mqtt.topics.order import Received
from secure_mqtt.topics.publisher import Publisher, Receipt
from secure_mqtt.topics.requests import Ask, RefusedError
from secure_mqtt.topics.senders import Senders
from secure_mqtt.topics.subscriber import Subscriber

INTERVAL = 600.0  # seconds between rotations


class Writer:
    """A process that publishes."""

    def __init__(self, world: World, member: Certified) -> None:
        self.world, self.name = world, member.name
        clock = lambda: world.now  # noqa: E731
        self._keys = Keys(TOPIC, clock, spread=lambda seconds: 0)
        session = SessionKey(member.identity, TOPIC, member.name, KEEPER)
        self.session = session.session
        self._publisher = Publisher(session, self._keys, clock)
        self.under_way: deque[tuple[bytes, Receipt]] = deque()  # to the broker
        self._receipts: deque[Receipt] = deque()  # from the broker
        self.is_asking = False
        self.refusal = ""
        self.lines: list[bytes] = []
        self.go_on()

    @property
    def is_done(self) -> bool:
        return self._publisher.is_done

    def next_time(self) -> float:
        """Return when there is something to do, if nothing comes before."""
        return min(self._keys.next_time(), self._publisher.asks_at())

    def write(self, data: bytes) -> None:
        """Publish a line."""
        if self._publisher.has_room():
            self._publisher.add(int(self.world.now * 1000), data)
            self.lines.append(data)
        self.go_on()

    def go_on(self) -> None:
        """Do what can be done without the network."""
        self._publisher.send(self._publish)
        if self._keys.is_due() and not self.refusal:
            self._keys.asked()
            self.is_asking = True

    def _publish(self, payload: bytes, receipt: Receipt) -> bool:
        self.under_way.append((payload, receipt))
        return True

    def be_answered(self) -> bool:
        """Get the keeper's answer, if there is a question."""
        if not self.is_asking:
            return False
        self.is_asking = False
        ask = Ask("join", TOPIC, self._publisher.hello)
        try:
            joined = self.world.answer(self.name, ask)
        except ConnectionError:
            self._keys.failed()
        except RefusedError as error:
            self.refusal = str(error)
            self._keys.failed()
        else:
            self._keys.learn(joined)
            self._publisher.learn(joined)
        self.go_on()
        return True

    def reach_broker(self) -> bool:
        """Let the broker take the next of what is under way."""
        if not self.under_way:
            return False
        payload, receipt = self.under_way.popleft()
        self._receipts.append(receipt)
        self.world.publish(payload)
        return True

    def be_acknowledged(self) -> bool:
        """Get the broker's next acknowledgement."""
        if not self._receipts:
            return False
        self._publisher.acknowledged(self._receipts.popleft())
        self.go_on()
        return True

    def lose_connection(self) -> None:
        """Lose what is under way in both directions, and connect again."""
        self.under_way.clear()
        self._receipts.clear()
        if self.is_asking:
            self.is_asking = False
            self._keys.failed()
        self._publisher.interrupted()
        self.go_on()


class Reader:
    """A process that subscribes."""

    def __init__(self, world: World, name: str, earlier: int | None = None) -> None:
        self.world, self.name, self.earlier = world, name, earlier
        clock = lambda: world.now  # noqa: E731
        self.keys = Keys(TOPIC, clock, spread=lambda seconds: 0)
        senders = Senders(TOPIC, KEEPER, world.certifier.authority)
        self.subscriber = Subscriber(TOPIC, self.keys, senders, clock, earlier)
        self.inbox: deque[bytes] = deque()  # from the broker
        self.asks: deque[Ask] = deque()  # to the keeper
        self.asked: list[Ask] = []
        self.asked_at: list[float] = []
        self.refusal = ""
        self.shown: list[Received] = []
        self.missed: list[tuple[str, int]] = []
        self.go_on()

    @property
    def texts(self) -> list[bytes]:
        return [message.data for message in self.shown]

    @property
    def faults(self) -> dict[str, int]:
        return dict(self.subscriber.feed.faults)

    def go_on(self) -> None:
        """Do what can be done without the network."""
        if not self.refusal:
            asks = self.subscriber.asks()
            self.asks.extend(asks)
            self.asked.extend(asks)
            self.asked_at.extend(self.world.now for _ in asks)
        order = self.subscriber.order
        while order.received:
            self.shown.append(order.received[0])
            order.shown()
        self.missed.extend(order.missed)
        order.missed.clear()

    def receive(self) -> bool:
        """Get the next payload from the broker."""
        if not self.inbox:
            return False
        self.take(self.inbox.popleft())
        return True

    def take(self, payload: bytes) -> None:
        """Get a payload."""
        self.subscriber.take(payload)
        self.go_on()

    def be_answered(self) -> bool:
        """Get the keeper's answer to the next question."""
        if not self.asks:
            return False
        ask = self.asks.popleft()
        try:
            self.subscriber.answered(ask, self.world.answer(self.name, ask))
        except ConnectionError:
            self.subscriber.failed(ask)
        except RefusedError as error:
            self.refusal = str(error) if ask.do == "join" else ""
            self.subscriber.refused(ask)
        self.go_on()
        return True

    def lose_connection(self) -> None:
        """Lose what is under way in both directions, and subscribe again."""
        self.inbox.clear()
        while self.asks:
            self.subscriber.failed(self.asks.popleft())
        self.subscriber.reconnected()
        self.go_on()


class World:
    """A topic of alice, bob and carol, at a broker."""

    def __init__(self, path: Path, certifier: Certifier, history: int) -> None:
        self.certifier, self.history = certifier, history
        self.desk = Desk(path, certifier.authority, INTERVAL, NOW.timestamp())
        self.desk.ask("alice", "create", TOPIC, ["bob", "carol"], history)
        self.writers: list[Writer] = []
        self.readers: list[Reader] = []
        self.published: list[bytes] = []
        self.is_keeper_up = True
        self.inbox: deque[bytes] = deque()  # of the keeper

    @property
    def now(self) -> float:
        return self.desk.now

    def writer(self, name: str) -> Writer:
        self.writers.append(Writer(self, self.certifier.member(name)))
        return self.writers[-1]

    def reader(self, name: str, earlier: int | None = None) -> Reader:
        self.readers.append(Reader(self, name, earlier))
        return self.readers[-1]

    def answer(self, name: str, ask: Ask) -> Any:
        """Return the keeper's answer. ConnectionError: it is away."""
        if not self.is_keeper_up:
            raise ConnectionError
        answer = self.desk.ask(name, ask.do, ask.topic, ask.detail)
        self._publish_notices()
        return answer

    def _publish_notices(self) -> None:
        for _, payload in self.desk.effects.notices:
            self.publish(payload)

    def publish(self, payload: bytes) -> None:
        """Let the broker pass a payload on."""
        self.published.append(payload)
        if self.is_keeper_up and self.history:
            self.inbox.append(payload)
        for reader in self.readers:
            reader.inbox.append(payload)

    def keep(self) -> bool:
        """Let the keeper take the next payload."""
        if not self.inbox:
            return False
        with contextlib.suppress(CryptoError):
            self.desk.take(self.inbox.popleft())
        return True

    def change_members(self, do: str, *names: str) -> None:
        """Admit or remove somebody."""
        self.desk.ask("alice", do, TOPIC, [*names])
        self._publish_notices()

    def kill_keeper(self) -> None:
        """End the keeper; what was under way to it is lost."""
        self.is_keeper_up = False
        self.inbox.clear()
        self.desk.close()
        self.desk.open()

    def start_keeper(self) -> None:
        """Start it again."""
        if not self.is_keeper_up:
            self.is_keeper_up = True
            self.desk.catch_up()
            self.rotate()

    def rotate(self) -> None:
        """Let the keeper do what it is time for."""
        if self.is_keeper_up:
            self.desk.rotate()
            self._publish_notices()

    def wait(self, seconds: float) -> None:
        """Let time pass, in which nothing arrives anywhere."""
        self.desk.now += seconds
        self.rotate()
        for writer in self.writers:
            writer.go_on()
        for reader in self.readers:
            reader.go_on()

    def flow(self) -> None:
        """Let all arrive that is under way, and what comes of that, in this moment."""
        while any([self._flow_once(), *(self.keep() for _ in range(len(self.inbox)))]):
            pass

    def _flow_once(self) -> bool:
        has_moved = False
        for writer in self.writers:
            has_moved |= writer.be_answered() | writer.reach_broker() | writer.be_acknowledged()
        for reader in self.readers:
            has_moved |= reader.receive() | reader.be_answered()
        return has_moved

    def settle(self) -> None:
        """Let all come to an end, with a good network and a running keeper."""
        self.start_keeper()
        for _ in range(15):
            self.flow()
            self.wait(1.5)

    def close(self) -> None:
        self.desk.close()
