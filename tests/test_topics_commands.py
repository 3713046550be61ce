"""Members on the command line: real processes, a real keeper, a real broker."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import pytest
import sharing
from conftest import PROGRAM, SAFETY, error_lines, run
from sharing import Club

club = sharing.shared
NAMES = count(1)


@pytest.fixture
def topic(club: Club) -> Iterator[str]:
    """A topic of alice and bob, whose messages are kept."""
    name = f"sensors/{os.getpid()}/{next(NAMES)}"
    club.do("alice", "create", name, "bob")
    yield name
    club.end_members()


# --- create, admit, remove, topics -------------------------------------------------------------


def listed(club: Club, name: str) -> dict[str, list[str]]:
    """Return owner and members of each topic that a member is told of."""
    rows = (line.split("\t") for line in club.do(name, "topics").decode().splitlines())
    return {topic: [owner, *members.split(" ")] for topic, owner, members in rows}


def test_a_topic_is_listed_to_its_members_only(club: Club, topic: str) -> None:
    assert listed(club, "alice")[topic] == ["alice", "alice", "bob"]
    assert listed(club, "bob")[topic] == ["alice", "alice", "bob"]
    assert topic not in club.do("carol", "topics").decode()


def test_members_come_and_go(club: Club, topic: str) -> None:
    club.do("alice", "admit", topic, "carol", "dave")
    assert listed(club, "carol")[topic] == ["alice", "alice", "bob", "carol", "dave"]
    club.do("alice", "remove", topic, "bob", "dave")
    assert listed(club, "carol")[topic] == ["alice", "alice", "carol"]


def test_who_asks_for_the_same_topic_once_more_is_told_that_it_is_there(
    club: Club, topic: str
) -> None:
    club.do("alice", "create", topic, "bob")


REFUSED = {
    "a name that is taken": ("bob", ["create"], "this name is taken"),
    "to admit, to another than the owner": ("bob", ["admit", "carol"], "only its owner alice"),
    "to remove, likewise": ("bob", ["remove", "alice"], "only its owner alice"),
    "to remove the owner": ("alice", ["remove", "alice"], "its owner can't be removed"),
    "to admit, to a stranger": ("carol", ["admit", "carol"], "there is no such topic, or"),
    "to publish, to a stranger": ("carol", ["publish", "x"], "there is no such topic, or"),
    "to subscribe, to a stranger": ("carol", ["subscribe"], "there is no such topic, or"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_keeper_refuses(case: str, club: Club, topic: str) -> None:
    name, [do, *words], reason = REFUSED[case]
    result = club.run(name, do, topic, *words)
    assert (result.returncode, result.stdout) == (1, b"")
    assert re.search(f"error: 'responder' refuses.*: {reason}", error_lines(result))


# --- publish, subscribe ------------------------------------------------------------------------


def test_earlier_messages_come_first_then_what_is_published(club: Club, topic: str) -> None:
    club.do("alice", "publish", topic, "one")
    club.do("bob", "publish", topic, "-", stdin=b"two")
    bob = club.start("bob", "subscribe", topic, "-C", "3")
    assert bob.wait_for_lines(2) == [b"one\n", b"two\n"]
    club.do("alice", "publish", topic, "three")
    assert (bob.wait(), bob.notes) == (0, [])
    assert bob.lines == [b"one\n", b"two\n", b"three\n"]


def test_any_bytes_can_be_published(club: Club, topic: str) -> None:
    data = bytes(range(256)) * 3
    club.do("alice", "publish", topic, "-", stdin=data)
    club.do("alice", "publish", topic, b"\xff")
    club.do("alice", "publish", topic, "-", stdin=b"")
    assert club.do("bob", "subscribe", topic, "-C", "3") == data + b"\n\xff\n\n"


def test_each_line_is_a_message(club: Club, topic: str) -> None:
    lines = [b"%d " % number + os.urandom(20).replace(b"\n", b"") for number in range(500)]
    club.do("alice", "--lines", "publish", topic, "-", stdin=b"\n".join(lines))
    printed = club.do("bob", "--history", "400", "subscribe", topic, "-C", "100")
    assert printed == b"".join(b"%b\n" % line for line in lines[-100:])


def test_a_line_is_published_as_soon_as_it_is_read(club: Club, topic: str) -> None:
    bob = club.subscribe("bob", topic)
    alice = club.start("alice", "--lines", "publish", topic, "-")
    for number in range(3):
        alice.write(b"%d\n" % number)
        assert bob.wait_for_lines(number + 1)[-1] == b"%d\n" % number
    alice.end_input()
    assert (alice.wait(), alice.notes) == (0, [])


def test_messages_in_json_name_their_sender_topic_and_time(club: Club, topic: str) -> None:
    club.do("alice", "publish", topic, 'Grüße "\n\x1b')
    club.do("bob", "publish", topic, "-", stdin=b"\xff\x00")
    lines = club.do("bob", "subscribe", topic, "-C", "2", "--json").splitlines()
    first, second = map(json.loads, lines)
    assert [*first] == ["time", "topic", "sender", "text"]
    assert (first["topic"], first["sender"], first["text"]) == (topic, "alice", 'Grüße "\n\x1b')
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", first["time"])
    assert (second["sender"], second["base64"]) == ("bob", "/wA=")


def test_several_topics_are_subscribed_to_at_once(club: Club, topic: str) -> None:
    others = [f"{topic}/{number}" for number in range(3)]
    for other in others:
        club.do("alice", "create", other, "bob", "--history", "0")
    bob = club.start("bob", "-v", "subscribe", "--json", *others)
    bob.wait_for_note("the answer to a question (join)", 3)
    for other in others:
        club.do("alice", "publish", other, "x")
    assert [json.loads(line)["topic"] for line in bob.wait_for_lines(3)] == others


@pytest.mark.parametrize(("history", "texts"), [("0", []), ("1", ["b"]), ("2", ["a", "b"])])
def test_history_limits_the_earlier_messages(
    club: Club, topic: str, history: str, texts: list[str]
) -> None:
    for text in "a", "b":
        club.do("alice", "publish", topic, text)
    bob = club.subscribe("bob", topic, "--history", history)
    club.do("alice", "publish", topic, "c")
    lines = bob.wait_for_lines(len(texts) + 1)
    assert [line.decode().strip() for line in lines] == [*texts, "c"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_subscriber_that_is_stopped_ends_well(club: Club, topic: str, how: int) -> None:
    bob = club.subscribe("bob", topic)
    club.do("alice", "publish", topic, "x")
    bob.wait_for_lines(1)
    assert bob.stop(how) == 0
    assert not bob.has_noted("error")


def test_a_subscriber_gives_up_when_nothing_comes_for_so_long(club: Club, topic: str) -> None:
    club.do("alice", "publish", topic, "x")
    result = club.run("bob", "subscribe", topic, "-W", "0.5")
    assert (result.returncode, result.stdout) == (1, b"x\n")
    assert "error: no message came within 0.5 s" in error_lines(result)


def test_a_message_of_1_mib_is_the_largest(club: Club, topic: str) -> None:
    data = os.urandom(2**20)
    club.do("alice", "publish", topic, "-", stdin=data)
    assert club.do("bob", "subscribe", topic, "-C", "1") == data + b"\n"
    result = club.run("alice", "publish", topic, "-", stdin=data + b"x")
    assert (result.returncode, result.stdout) == (1, b"")
    assert "error: a message of 1048577 bytes is too large" in error_lines(result)


def test_lines_before_one_that_is_too_large_are_published(club: Club, topic: str) -> None:
    data = b"first\n" + bytes(2**20 + 1) + b"\nlast\n"
    result = club.run("alice", "--lines", "publish", topic, "-", stdin=data)
    assert result.returncode == 1
    assert "too large for a topic" in error_lines(result)
    assert club.do("bob", "subscribe", topic, "-C", "1") == b"first\n"


def test_nothing_is_published_of_an_endless_input(club: Club, topic: str) -> None:
    command = [sys.executable, str(PROGRAM), *map(str, club.arguments("alice", "publish", topic))]
    with open("/dev/zero", "rb") as zero:
        result = subprocess.run(
            [*command, "-"], stdin=zero, capture_output=True, timeout=SAFETY, check=False
        )
    assert (result.returncode, result.stdout) == (1, b"")
    assert "too large for a topic" in error_lines(result)


# --- standard output ---------------------------------------------------------------------------


def test_a_closed_pipe_ends_a_subscriber(club: Club, topic: str) -> None:
    club.do("alice", "publish", topic, "x")
    bob = club.start("bob", "subscribe", topic, reads=False)
    assert bob.process.stdout
    bob.process.stdout.close()
    assert bob.wait() == 1
    assert bob.notes == [
        "secure_mqtt_client.py: error: cannot write to standard output: Broken pipe"
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no /dev/full")
def test_a_full_disk_ends_a_subscriber(club: Club, topic: str) -> None:
    club.do("alice", "publish", topic, "x")
    with open("/dev/full", "wb") as full:
        result = run(*club.arguments("bob", "subscribe", topic), stdout=full)
    assert result.returncode == 1
    assert "cannot write to standard output: No space left on device" in error_lines(result)


# --- wrong usage -------------------------------------------------------------------------------

PROOF = "--identity", "alice.pem", "--peer-ca", "ca.pem"
WRONG: dict[str, tuple[list[str | bytes], str]] = {
    "no identity": (["x", "topics", "--peer-ca", "ca.pem"], "topics needs --identity and --peer"),
    "no authority": (["x", "topics", "--identity", "x.pem"], "topics needs --identity and --peer"),
    "the lab's suite": (["x", "publish", "t", "m", "--suite", "dh4096"], "--suite dh4096 is not"),
    "create without a topic": (["x", "create"], "create takes: TOPIC"),
    "admit without a member": (["x", "admit", "t"], "admit takes: TOPIC MEMBER..."),
    "publish without a message": (["x", "publish", "t"], "publish takes: TOPIC MESSAGE"),
    "publish of two messages": (["x", "publish", "t", "a", "b"], "quote MESSAGE"),
    "subscribe to nothing": (["x", "subscribe"], "subscribe takes: TOPIC..."),
    "topics of something": (["x", "topics", "t"], "topics takes: nothing more"),
    "a topic with +": (["x", "subscribe", "a/+"], "TOPIC must be"),
    "a topic with #": (["x", "subscribe", "#"], "TOPIC must be"),
    "a topic with $ in front": (["x", "subscribe", "$SYS/x"], "TOPIC must be"),
    "a topic of the lab": (["x", "subscribe", "x/reverse/request"], "TOPIC must be"),
    "an answer's topic": (["x", "create", "x/reverse/response"], "TOPIC must be"),
    "an empty topic": (["x", "subscribe", ""], "TOPIC must be"),
    "a topic of 513 bytes": (["x", "subscribe", "x" * 513], "1 to 512 bytes"),
    "a topic with a control": (["x", "subscribe", "a\nb"], "TOPIC must be"),
    "a topic that is not UTF-8": (["x", "subscribe", b"\xff"], "TOPIC must be UTF-8"),
    "a NetID that no certificate names": (["x_y", "topics"], "that a certificate can name"),
    "a member that no certificate names": (["x", "admit", "t", "x.y"], "MEMBER must be"),
    "lines of a message": (["--lines", "x", "publish", "t", "m"], "give - as MESSAGE"),
    "lines to subscribe to": (["--lines", "x", "subscribe", "t"], "--lines is not for subscribe"),
    "JSON to publish": (["x", "publish", "t", "m", "--json"], "--json is not for publish"),
    "a count to publish": (["x", "publish", "t", "m", "-C", "1"], "--count is not for publish"),
    "a count of 0": (["x", "subscribe", "t", "-C", "0"], "must be a number from 1 on"),
    "a history of too many": (["x", "create", "t", "--history", "100001"], "from 0 to 100000"),
    "a history to publish": (["x", "publish", "t", "m", "--history", "0"], "--history is not for"),
    "a broker of its own": (["--local", "x", "topics"], "--local is not for topics"),
    "a key's age without lines": (["--rekey", "5", "x", "publish", "t", "m"], "--rekey is for"),
    "a status": (["--status-topic", "s", "x", "topics"], "--status-topic is not for topics"),
    "JSON of a request": (
        ["x", "reverse", "m", "--json"],
        "--json and --count are for shared topics",
    ),
    "JSON of a responder": (["--respond", "--json"], "--json is for a request"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_usage_is_refused_before_anything_else(case: str, tmp_path: Path) -> None:
    arguments, problem = WRONG[case]
    proof = [] if "--peer-ca" in arguments or "--identity" in arguments else PROOF
    result = run(*proof, *arguments, cwd=tmp_path)
    assert (result.returncode, result.stdout) == (2, b"")
    assert problem in error_lines(result)
    assert "usage: " in error_lines(result)
