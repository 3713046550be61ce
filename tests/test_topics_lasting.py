"""Members that outlast their broker, their keeper, and a reader that stops reading."""

from __future__ import annotations

import re
import signal
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
import sharing
from conftest import Mosquitto, free_port, is_running, wait_until
from sharing import Club, Process

TOPIC = "sensors/kitchen"


@pytest.fixture
def found(tmp_path: Path, own_broker: Mosquitto) -> Iterator[Callable[..., Club]]:
    """Found a club of alice and bob, with a topic, which ends with the test."""
    founded: list[Club] = []

    def make(*options: str, history: int = 10_000) -> Club:
        founded.append(Club(tmp_path / "club", own_broker, *options))
        founded[0].do("alice", "create", TOPIC, "bob", "--history", str(history))
        return founded[0]

    yield make
    for club in founded:
        club.close()


def lines(*numbers: int) -> list[bytes]:
    return [b"line %d\n" % number for number in numbers]


def publish_lines(publisher: Process, *numbers: int) -> None:
    publisher.write(b"".join(lines(*numbers)))


def test_members_go_on_when_the_broker_is_back(found: Callable[..., Club]) -> None:
    club = found()
    bob = club.subscribe("bob", TOPIC)
    alice = club.start("alice", "--lines", "publish", TOPIC, "-")
    publish_lines(alice, *range(10))
    bob.wait_for_lines(10)
    club.broker.kill()
    publish_lines(alice, *range(10, 20))
    bob.wait_for_note("connecting again")
    club.broker.start()
    publish_lines(alice, *range(20, 30))
    alice.end_input()
    assert alice.wait() == 0
    assert bob.wait_for_lines(30) == lines(*range(30))
    assert not bob.has_noted("missed")


def test_members_wait_for_a_broker_that_is_not_there_yet(
    found: Callable[..., Club],
) -> None:
    club = found()
    club.broker.kill()
    bob = club.start("bob", "subscribe", TOPIC, "-C", "1")
    alice = club.start("alice", "--lines", "publish", TOPIC, "-")
    publish_lines(alice, 1)
    alice.end_input()
    for member in alice, bob:
        member.wait_for_note("connecting again: connection refused")
    club.broker.start()
    assert (alice.wait(), bob.wait()) == (0, 0)
    assert bob.lines == lines(1)


def test_a_single_message_needs_a_broker_that_is_there(found: Callable[..., Club]) -> None:
    club = found()
    club.broker.kill()
    result = club.run("alice", "publish", TOPIC, "x")
    assert (result.returncode, result.stdout) == (1, b"")
    assert re.match(rb"\S+ error: connection refused", result.stderr)
    club.broker.start()


def test_members_go_on_when_the_keeper_is_back(found: Callable[..., Club]) -> None:
    club = found("--rotate", "2")
    bob = club.subscribe("bob", TOPIC)
    alice = club.start("alice", "--lines", "publish", TOPIC, "-")
    publish_lines(alice, *range(10))
    bob.wait_for_lines(10)
    club.kill_keeper()
    publish_lines(alice, *range(10, 20))
    bob.wait_for_lines(20)  # for some time it is not needed
    club.start_keeper()
    publish_lines(alice, *range(20, 30))
    alice.end_input()
    assert alice.wait() == 0
    assert not alice.has_noted("kept")
    assert bob.wait_for_lines(30) == lines(*range(30))
    assert not bob.has_noted("missed")
    history = club.do("bob", "subscribe", TOPIC, "-C", "30")
    assert history == b"".join(lines(*range(30)))


def test_a_keeper_that_is_away_is_said_once_and_waited_for(found: Callable[..., Club]) -> None:
    club = found()
    club.do("alice", "publish", TOPIC, "x")
    club.kill_keeper()
    bob = club.start("bob", "subscribe", TOPIC, "-C", "1")
    bob.wait_for_note("no answer from 'responder': asking again")
    club.start_keeper()
    assert (bob.wait(), bob.lines, len(bob.notes)) == (0, [b"x\n"], 1)


def test_a_shell_says_for_what_it_waits(found: Callable[..., Club]) -> None:
    club = found()
    bob = club.start("bob", "shell")
    bob.write(b"topics\n")
    bob.wait_for_lines(1)
    club.broker.kill()
    bob.wait_for_note("connecting again")
    club.kill_keeper()
    club.broker.start()
    bob.write(b"topics\n")
    bob.wait_for_note("no answer from 'responder': asking again")
    club.start_keeper()
    bob.wait_for_lines(2)
    bob.end_input()
    assert (bob.wait(), len(bob.notes)) == (0, 2)


def test_a_single_message_needs_a_keeper_that_answers(found: Callable[..., Club]) -> None:
    club = found()
    club.kill_keeper()
    result = club.run("alice", "publish", TOPIC, "x", "-W", "1")
    assert (result.returncode, result.stdout) == (1, b"")
    assert b"error: no keeper answered the key exchange on alice/key-exchange/" in result.stderr
    club.start_keeper()


def test_keys_are_renewed_while_lines_go_on(found: Callable[..., Club]) -> None:
    club = found("--rotate", "1", history=0)
    bob = club.subscribe("bob", TOPIC)
    alice = club.start("alice", "-v", "--lines", "publish", TOPIC, "-")
    numbers = count()

    def is_renewed() -> bool:
        number = next(numbers)
        publish_lines(alice, number)
        bob.wait_for_lines(number + 1)
        return alice.has_noted("the answer to a question (join)", 5)

    wait_until(is_renewed)
    alice.end_input()
    assert alice.wait() == 0
    assert bob.lines == lines(*range(next(numbers)))
    assert not bob.has_noted("missed")
    assert not bob.has_noted("refused")


def test_what_nobody_keeps_is_missed_and_said(found: Callable[..., Club]) -> None:
    club = found(history=0)
    bob = club.subscribe("bob", TOPIC)
    alice = club.start("alice", "--lines", "publish", TOPIC, "-")
    publish_lines(alice, 0)
    bob.wait_for_lines(1)
    bob.process.send_signal(signal.SIGSTOP)
    publish_lines(alice, 1, 2, 3)
    carol = club.start("alice", "-v", "subscribe", TOPIC)
    carol.wait_for_note("the answer to a question (join)")
    club.broker.kill()
    bob.process.send_signal(signal.SIGCONT)
    club.broker.start()
    bob.wait_for_note("the answer to a question (join)", 2)
    publish_lines(alice, 4)
    alice.end_input()
    assert alice.wait() == 0
    bob.wait_for_lines(2)
    wait_until(lambda: bob.lines[-1] == lines(4)[0])
    shown = len(bob.lines)
    if shown < 5:
        bob.wait_for_note(f"missed {5 - shown} message")


def test_who_was_removed_is_told_so_and_shown_nothing_more(found: Callable[..., Club]) -> None:
    club = found()
    bob = club.subscribe("bob", TOPIC)
    club.do("alice", "publish", TOPIC, "before")
    bob.wait_for_lines(1)
    club.do("alice", "remove", TOPIC, "bob")
    club.do("alice", "publish", TOPIC, "after")
    assert bob.wait() == 1
    assert bob.lines == [b"before\n"]
    assert bob.has_noted("error: 'responder' refuses on sensors/kitchen: there is no such topic")


def test_a_reader_that_stops_reading_loses_nothing_that_is_kept(
    found: Callable[..., Club],
) -> None:
    """The broker waits as well; what it has no room for comes from the keeper."""
    club = found("--rotate", "3600")
    bob = club.subscribe("bob", TOPIC, reads=False)
    count, size = 2000, 500
    text = b"".join(b"%d %b\n" % (number, bytes(size)) for number in range(count))
    club.do("alice", "--lines", "publish", TOPIC, "-", stdin=text)
    assert is_running(bob.process.pid)
    bob.read_on()
    assert b"".join(bob.wait_for_lines(count)) == text
    assert not bob.has_noted("missed")


def test_a_subscriber_without_a_broker_can_be_stopped(tmp_path: Path) -> None:
    process = sharing.member_process(tmp_path, free_port(), "bob", "subscribe", TOPIC)
    try:
        process.wait_for_note("connecting again")
        assert process.stop() == 0
    finally:
        process.close()
