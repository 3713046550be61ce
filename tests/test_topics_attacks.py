"""Members and their keeper under a broker that does to their messages what it likes."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from copy import copy
from pathlib import Path

import pytest
import sharing
from conftest import SAFETY, Mosquitto, Peer, is_running, processes_below, wait_until
from hostile import (
    PUBACK,
    PUBLISH,
    QOS_0,
    QOS_1,
    RETAIN,
    SUBACK,
    SUBSCRIBE,
    Link,
    Packet,
    PassOn,
    changed_program,
    in_thread,
    memory,
    packet,
    publish,
    relay,
)
from keeping import Member
from members import TOPIC
from sharing import Club, Process

from secure_mqtt.topics.messages import MESSAGE, make_notice

Send = Callable[[bytes], object]
COUNT = 16  # messages that are published on a topic
HONEST = 4  # of these before an attack begins: from then on it is known what is missing


@pytest.fixture(scope="module")
def club(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Club]:
    """A keeper that most tests share, each with topics of its own."""
    folder = tmp_path_factory.mktemp("club")
    mosquitto = Mosquitto(folder)
    try:
        with sharing.club(folder, mosquitto) as club:
            yield club
    finally:
        mosquitto.kill()


@pytest.fixture
def start(club: Club) -> Iterator[Callable[..., Process]]:
    """Start members behind a relay: its port, the NetID, and what the program is told."""
    started: list[Process] = []

    def begin(port: int, name: str, *arguments: str) -> Process:
        started.append(sharing.member_process(club.folder, port, name, *arguments))
        return started[-1]

    yield begin
    for process in started:
        process.close()


def create(club: Club, *topics: str, history: int) -> None:
    """Create topics of alice and bob."""
    peer = Peer(club.broker.port, "alice/+/response")
    alice = Member(peer, "alice").agree()
    for topic in topics:
        alice.ask("create", topic, ["bob"], history)
    peer.close()


def is_for_client(link: Link, send: Send) -> bool:
    """Tell whether a packet is on its way to the client."""
    return getattr(send, "__self__", None) is link.client


def texts(*numbers: int) -> list[bytes]:
    return [b"line %d\n" % number for number in numbers]


def has_no_traceback(process: Process) -> bool:
    return not any("Traceback" in note or "Error" in note for note in process.notes)


# --- messages on their way to a subscriber -----------------------------------------------------

# What the broker makes of a message: the payloads that it sends in its place, each with flags and
# on a topic; given the topic, and all payloads until now.
Forgery = tuple[str, bytes, int]
Attack = Callable[[str, list[bytes]], list[Forgery]]


def one_in_three(change: Callable[[str, bytes], list[Forgery]]) -> Attack:
    """Return an attack on every third message."""

    def attack(topic: str, seen: list[bytes]) -> list[Forgery]:
        if len(seen) % 3:
            return [(topic, seen[-1], QOS_1)]
        return change(topic, seen[-1])

    return attack


def reversed_in_threes(topic: str, seen: list[bytes]) -> list[Forgery]:
    newest = [] if len(seen) % 3 else seen[:-4:-1]
    return [(topic, payload, QOS_1) for payload in newest]


ATTACKS: dict[str, Attack] = {
    "replayed": lambda topic, seen: [(topic, each, QOS_1) for each in [*seen, *seen]],
    "reordered": reversed_in_threes,
    "doubled": lambda topic, seen: [(topic, seen[-1], QOS_1)] * 2,
    "dropped": one_in_three(lambda topic, payload: []),
    "cut": one_in_three(lambda topic, payload: [(topic, payload[:-1], QOS_1)]),
    "flipped": one_in_three(
        lambda topic, payload: [(topic, payload[:-1] + bytes([payload[-1] ^ 1]), QOS_1)]
    ),
    "renumbered": one_in_three(  # so that it names a counter that was not used yet
        lambda topic, payload: [(topic, payload[:28] + bytes([payload[28] + 9]), QOS_1)]
    ),
    "retained": one_in_three(lambda topic, payload: [(topic, payload, QOS_1 | RETAIN)]),
    "moved": one_in_three(
        lambda topic, payload: [(topic.replace("moved", "doubled"), payload, QOS_1)]
    ),
    "later": one_in_three(  # of an epoch that there is not
        lambda topic, payload: [(topic, payload[:4] + bytes([payload[4] + 1]) + payload[5:], QOS_1)]
    ),
}


class Attacker:
    """A broker that attacks what goes to a subscriber; the last message of a topic it passes on."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._seen: dict[str, list[bytes]] = {f"{prefix}/{name}": [] for name in ATTACKS}

    def pass_on(self, link: Link, packet_: Packet, send: Send) -> None:
        is_ours = packet_.kind == PUBLISH and packet_.topic in self._seen
        if is_ours and is_for_client(link, send) and packet_.payload[0] == MESSAGE:
            link.broker.send(packet(PUBACK, packet_.mid))
            for number, forgery in enumerate(self._forgeries(packet_)):
                topic, payload, flags = forgery
                send(publish(topic, payload, flags, (60_000 + number).to_bytes(2, "big")))
        elif is_for_client(link, send) or not is_forged(packet_):
            send(packet_.raw)

    def _forgeries(self, message: Packet) -> list[Forgery]:
        seen = self._seen[message.topic]
        seen.append(message.payload)
        if len(seen) <= HONEST or len(seen) == COUNT:
            return [(message.topic, message.payload, QOS_1)]
        return ATTACKS[message.topic.rpartition("/")[2]](message.topic, seen)


def is_forged(each: Packet) -> bool:
    """Tell whether a packet acknowledges what the broker does not know."""
    return each.kind == PUBACK and each.mid >= (60_000).to_bytes(2, "big")


def shown_by_topic(process: Process) -> dict[str, list[bytes]]:
    """Return what a subscriber to many topics has shown, by the kind of attack."""
    shown: dict[str, list[bytes]] = {name: [] for name in ATTACKS}
    for line in process.lines:
        name, number = line.split()
        shown[name.decode()].append(number)
    return shown


def missed(process: Process, topic: str) -> int:
    """Return how many messages of alice a subscriber has said to have missed."""
    found = [
        re.search(rf"missed (\d+) messages? of alice on {topic}$", note) for note in process.notes
    ]
    return sum(int(each[1]) for each in found if each)


@pytest.mark.parametrize("history", [0, 1000])
def test_whatever_a_broker_does_each_message_is_shown_once_and_in_order_or_said_to_be_missed(
    history: int, club: Club, start: Callable[..., Process]
) -> None:
    prefix = f"attacked/{history}"
    topics = [f"{prefix}/{name}" for name in ATTACKS]
    create(club, *topics, history=history)
    with relay(club.broker.port, Attacker(prefix).pass_on) as port:
        bob = start(port, "bob", "-v", "subscribe", *topics)
        bob.wait_for_note("the answer to a question (join)", len(topics))
        words = [
            f"publish {prefix}/{name} {name} {number}\n"
            for number in range(COUNT)
            for name in ATTACKS
        ]
        club.do("alice", "shell", stdin="".join(words).encode())
        last = b"%d" % (COUNT - 1)
        wait_until(lambda: all(last in shown for shown in shown_by_topic(bob).values()))
        counts = {
            name: COUNT - len(shown) for name, shown in shown_by_topic(bob).items() if not history
        }
        wait_until(
            lambda: all(missed(bob, f"{prefix}/{name}") >= each for name, each in counts.items())
        )
        assert bob.stop() == 0
    assert has_no_traceback(bob)
    for name, shown in shown_by_topic(bob).items():
        numbers = [*map(int, shown)]
        assert numbers == sorted({*numbers}), name
        assert COUNT - len(numbers) == missed(bob, f"{prefix}/{name}"), name
        assert len(numbers) == COUNT or not history, name
    assert history or len(shown_by_topic(bob)["dropped"]) < COUNT


# --- floods, and what is held back -------------------------------------------------------------

FLOOD_TIME = 3.0  # seconds at least
LIMIT = 48 * 2**20  # bytes that a subscriber may need for what it holds back, and its bookkeeping


class Flooder:
    """A broker that floods a subscriber to a topic, from the first message there on."""

    def __init__(self, topic: str) -> None:
        self.asked: list[float] = []  # when the subscriber has asked the keeper
        self.floods: list[threading.Thread] = []
        self.began = 0.0  # when the flood has
        self.size = 0  # of what was made up, in bytes
        self._topic = topic
        self._is_sending = threading.Lock()

    def pass_on(self, link: Link, each: Packet, send: Send) -> None:
        if not is_for_client(link, send):
            if each.kind == PUBLISH and each.topic == "bob/topic/request":
                self.asked.append(time.monotonic())
            send(each.raw)
            return
        with self._is_sending:
            send(each.raw)
        if not self.floods and each.kind == PUBLISH and each.topic == self._topic:
            self.began = time.monotonic()
            self.floods.append(in_thread(lambda: self._flood(send)))

    def _flood(self, send: Send) -> None:
        epoch = 1000
        while time.monotonic() < self.began + FLOOD_TIME or self.size <= LIMIT:
            epoch += 1
            unknown = bytes([MESSAGE]) + epoch.to_bytes(4, "big") + bytes(4000)
            payloads = make_notice(epoch), unknown
            with self._is_sending:
                send(b"".join(publish(self._topic, payload, QOS_0) for payload in payloads))
            self.size += len(unknown)


def test_a_flood_makes_a_subscriber_ask_once_a_second_and_takes_little_memory(
    club: Club, start: Callable[..., Process]
) -> None:
    topic = "flooded"
    create(club, topic, history=0)
    flooder = Flooder(topic)
    with relay(club.broker.port, flooder.pass_on) as port:
        bob = start(port, "bob", "-v", "subscribe", topic)
        bob.wait_for_note("the answer to a question (join)")
        before = memory(bob.process.pid)
        club.do("alice", "publish", topic, "one")
        wait_until(lambda: flooder.floods)
        flooder.floods[0].join(SAFETY)
        club.do("alice", "publish", topic, "two")
        bob.wait_for_lines(2)
        assert memory(bob.process.pid) - before < LIMIT < flooder.size
        seconds = time.monotonic() - flooder.began
        assert bob.stop() == 0
    assert bob.lines == [b"one\n", b"two\n"]
    assert bob.has_noted("refused")
    assert has_no_traceback(bob)
    during = [each for each in flooder.asked if each >= flooder.began]
    assert 2 <= len(during) <= seconds + 3  # some name a sender


def test_answers_that_are_replayed_or_held_back_change_nothing(
    club: Club, start: Callable[..., Process]
) -> None:
    """The keeper is asked again; what comes late, or twice, is for nobody."""
    topic = "held"
    create(club, topic, history=100)
    answers: list[bytes] = []

    def pass_on(link: Link, each: Packet, send: Send) -> None:
        is_answer = each.kind == PUBLISH and each.topic.endswith("/response")
        if not (is_answer and is_for_client(link, send)):
            send(each.raw)
            return
        link.broker.send(packet(PUBACK, each.mid))
        answers.append(publish(each.topic, each.payload, 0))
        if len(answers) != 2:  # the first one to a question is held back
            send(b"".join(answers * 2))

    with relay(club.broker.port, pass_on) as port:
        bob = start(port, "bob", "subscribe", topic, "-C", "10")
        alice = start(port, "alice", "--lines", "publish", topic, "-")
        alice.write(b"".join(texts(*range(10))))
        alice.end_input()
        assert (alice.wait(), bob.wait()) == (0, 0)
    assert bob.lines == texts(*range(10))
    assert has_no_traceback(alice)
    assert has_no_traceback(bob)


def test_a_subscriber_whose_subscription_is_not_answered_subscribes_again(
    club: Club, tmp_path: Path
) -> None:
    topic = "unanswered"
    create(club, topic, history=100)
    club.do("alice", "publish", topic, "text")
    dropped: list[Packet] = []

    def pass_on(link: Link, each: Packet, send: Send) -> None:
        if each.kind == SUBACK and not dropped:
            dropped.append(each)
        else:
            send(each.raw)

    change = "from secure_mqtt import command_line\ncommand_line.DEFAULT_TIMEOUT = 1.5\n"
    program = changed_program(tmp_path, change)
    with relay(club.broker.port, pass_on) as port:
        words = sharing.member_arguments(
            club.folder, port, club.certifier, "bob", "subscribe", topic, "-C", "1"
        )
        bob = Process([sys.executable, str(program), *map(str, words)])
        try:
            assert bob.wait(20) == 0
        finally:
            bob.close()
    assert bob.lines == [b"text\n"]
    assert bob.has_noted("no SUBACK came within 1.5 s"), bob.notes


# --- the keeper's own connection ---------------------------------------------------------------


@pytest.fixture
def found(tmp_path: Path, own_broker: Mosquitto) -> Iterator[Callable[[PassOn], Club]]:
    """Start a keeper behind a relay; its members are not."""
    with contextlib.ExitStack() as stack:

        def begin(pass_on: PassOn) -> Club:
            port = stack.enter_context(relay(own_broker.port, pass_on))
            behind = copy(own_broker)
            behind.port = port
            club = Club(tmp_path / "club", behind)
            stack.callback(club.close)
            club.broker = own_broker
            return club

        yield begin


@pytest.mark.parametrize("packets", [SUBSCRIBE, SUBACK])
def test_a_keeper_that_is_cut_off_while_it_answers_goes_on(
    packets: int, found: Callable[[PassOn], Club]
) -> None:
    """It has to subscribe to a new topic before it says that it is there."""
    subscribing: list[bytes] = []
    cuts: list[Packet] = []

    def pass_on(link: Link, each: Packet, send: Send) -> None:
        if each.kind == SUBSCRIBE and TOPIC in each.topics:
            subscribing.append(each.body[:2])
        if not cuts and each.kind == packets and each.body[:2] in subscribing:
            cuts.append(each)
            link.cut()
        else:
            send(each.raw)

    club = found(pass_on)
    club.do("alice", "create", TOPIC, "bob", "--history", "9", "-W", "20")
    assert cuts
    club.keeper.wait_for("keeping", 2)
    club.do("alice", "publish", TOPIC, "text")
    assert club.do("bob", "subscribe", TOPIC, "-C", "1", "-W", "20") == b"text\n"


def kept_in(file: Path) -> set[bytes]:
    """Return the messages in a keeper's file."""
    with contextlib.closing(sqlite3.connect(file)) as database:
        return {payload for (payload,) in database.execute("SELECT payload FROM messages")}


def test_a_keeper_acknowledges_to_the_broker_only_what_is_in_its_file(
    tmp_path: Path, found: Callable[[PassOn], Club]
) -> None:
    on_their_way: dict[bytes, bytes] = {}  # to the keeper, by packet identifier
    acknowledged: set[bytes] = set()
    killed: list[int] = []

    def pass_on(link: Link, each: Packet, send: Send) -> None:
        if is_for_client(link, send) and each.kind == PUBLISH and each.topic == TOPIC:
            if each.payload[0] == MESSAGE:
                on_their_way[each.mid] = each.payload
        elif each.kind == PUBACK and not is_for_client(link, send) and each.mid in on_their_way:
            acknowledged.add(on_their_way.pop(each.mid))
            if len(acknowledged) == 100:
                for pid in processes:
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
        send(each.raw)

    club: Club = found(pass_on)
    processes = processes_below(club.keeper.process.pid)  # here, since there is no time then
    club.do("alice", "create", TOPIC, "bob", "--history", "10000")
    alice = club.start("alice", "--lines", "publish", TOPIC, "-")
    alice.write(b"".join(texts(*range(2000))))
    wait_until(lambda: bool(killed) and not any(map(is_running, killed)))
    club.keeper.process.wait(SAFETY)
    kept = kept_in(tmp_path / "club" / "topics.db")
    assert len(acknowledged) >= 100
    assert acknowledged <= kept
