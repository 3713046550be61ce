"""The shell: commands from a pipe, and from somebody at a terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from itertools import count

import pytest
import sharing
from conftest import PROGRAM, SAFETY, Peer, error_lines, wait_until
from sharing import Club

from secure_mqtt.topics.messages import MAX_EPOCH, make_notice
from secure_mqtt.topics.shell import COMMANDS, HELP

club = sharing.shared
NAMES = count(1)
MANY_COMMANDS = 2**24  # bytes, far more than pipes and sockets hold
STANDSTILL = 5.0  # seconds in which nothing is taken


@pytest.fixture
def topic(club: Club) -> Iterator[str]:
    """The name of a topic that is not there yet."""
    yield f"shell/{os.getpid()}/{next(NAMES)}"
    club.end_members()


def test_commands_from_a_pipe_are_done_one_after_the_other(club: Club, topic: str) -> None:
    commands = (
        f"create {topic} bob\n\nadmit {topic} carol\npublish {topic} one  text\n"
        f"subscribe {topic}\nremove {topic} bob\ntopics\nhelp"
    )
    printed = club.do("alice", "shell", stdin=commands.encode())
    assert printed == f"{topic} alice: one  text\n{topic}\talice\talice carol\n".encode() + HELP
    assert club.do("carol", "subscribe", topic, "-C", "1") == b"one  text\n"


def test_a_command_that_fails_says_why_and_the_next_is_done(club: Club, topic: str) -> None:
    commands = (
        f"publish {topic} x\nunknown\ncreate\nsubscribe {topic}\nsubscribe {topic} b\n"
        f"unsubscribe {topic}\nunsubscribe\nadmit a+ b\ncreate {topic}\nexit\nunknown"
    )
    result = club.run("alice", "shell", stdin=commands.encode())
    assert result.returncode == 1
    errors = re.findall(r"error: (.*)", error_lines(result))
    wanted = [
        f"'responder' refuses on {topic}: there is no such topic",
        "there is no command 'unknown'",
        "create takes: TOPIC",
        f"'responder' refuses on {topic}: there is no such topic",
        "subscribe takes: TOPIC",
        f"not subscribed to '{topic}'",
        "unsubscribe takes: TOPIC",
        "TOPIC must be",
        "commands that failed: 8",
    ]
    for error, start in zip(errors, wanted, strict=True):
        assert error.startswith(start)
    assert topic in club.do("alice", "topics").decode()


def test_messages_are_shown_until_they_are_unsubscribed_from(club: Club, topic: str) -> None:
    club.do("alice", "create", topic, "bob")
    bob = club.start("bob", "shell")
    bob.write(f"subscribe {topic}\n".encode())
    club.do("alice", "publish", topic, "one")
    assert bob.wait_for_lines(1) == [f"{topic} alice: one\n".encode()]
    bob.write(f"unsubscribe {topic}\ntopics\n".encode())
    bob.wait_for_lines(2)
    club.do("alice", "publish", topic, "two")
    bob.write(f"subscribe {topic}\n".encode())
    assert bob.wait_for_lines(4)[2:] == [
        f"{topic} alice: {text}\n".encode() for text in ("one", "two")
    ]
    bob.end_input()
    assert (bob.wait(), bob.notes) == (0, [])


def test_a_removal_fails_no_other_command(
    club: Club, topic: str, peer: Callable[..., Peer]
) -> None:
    """The keeper is stopped until it has the removal, Bob's question for new keys, and another."""
    other = f"{topic}/other"
    for name in topic, other:
        club.do("alice", "create", name, "bob")
    alice, bob = (club.start(name, "-v", "shell") for name in ("alice", "bob"))
    alice.write(b"topics\n")
    alice.wait_for_lines(2)
    bob.write(f"subscribe {topic}\n".encode())
    bob.wait_for_note("the answer to a question (history)")
    club.keeper.process.send_signal(signal.SIGSTOP)
    try:
        alice.write(f"remove {topic} bob\n".encode())
        alice.wait_for_note("a question (remove)")
        peer(club.broker.port, topic).publish(topic, make_notice(MAX_EPOCH))
        bob.wait_for_note("question (join)", 3)
        bob.write(b"topics\n")
        bob.wait_for_note("a question (list)")
    finally:
        club.keeper.process.send_signal(signal.SIGCONT)
    bob.wait_for_note(f"error: 'responder' refuses on {topic}: there is no such topic")
    wait_until(lambda: f"{other}\talice\talice bob\n".encode() in bob.lines)
    assert not any(line.startswith(f"{topic}\t".encode()) for line in bob.lines)
    bob.end_input()
    assert bob.wait() == 1
    assert bob.notes[-1].endswith("commands that failed: 1")


def test_a_shell_whose_output_nobody_reads_takes_no_further_commands(
    club: Club, topic: str
) -> None:
    club.do("alice", "create", topic, "bob")
    bob = club.start("bob", "shell", reads=False)
    stdin = bob.process.stdin
    assert stdin
    os.set_blocking(stdin.fileno(), False)
    taken = 0
    while taken < MANY_COMMANDS and select.select([], [stdin], [], STANDSTILL)[1]:
        taken += os.write(stdin.fileno(), f"subscribe {topic}\nhelp\n".encode() * 100)
    assert taken < MANY_COMMANDS


def test_the_help_names_every_command() -> None:
    named = re.findall(r"(?m)^(\w+)", HELP.decode())
    assert named == [*dict.fromkeys(named)]
    assert {*named} == {*COMMANDS}


class AtTerminal:
    """Somebody at a terminal, where the program runs."""

    def __init__(self, arguments: list[str], has_input: bool = True) -> None:
        self.pid, self._terminal = pty.fork()
        if not self.pid:
            if not has_input:
                os.close(pty.STDIN_FILENO)
            os.environ["TERM"] = "xterm"
            os.execv(sys.executable, [sys.executable, str(PROGRAM), *arguments])
        self.screen = b""

    def type(self, text: str) -> None:
        os.write(self._terminal, text.encode())

    def wait_for(self, text: str) -> None:
        """Wait until it has shown something; what came before is forgotten."""
        end = time.monotonic() + SAFETY
        while text.encode() not in self.screen:
            readable, _, _ = select.select([self._terminal], [], [], end - time.monotonic())
            assert readable, self.screen
            self.screen += os.read(self._terminal, 4096)
        self.screen = self.screen.partition(text.encode())[2]

    def status(self) -> int:
        """Return the exit status, when it has ended."""
        found: list[int] = []

        def has_ended() -> bool:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            found.append(os.waitstatus_to_exitcode(status) if pid else -1)
            return pid != 0

        wait_until(has_ended)
        os.close(self._terminal)
        return found[-1]


def test_messages_tear_neither_what_is_being_typed_nor_each_other(club: Club, topic: str) -> None:
    club.do("alice", "create", topic, "bob")
    bob = AtTerminal([*map(str, club.arguments("bob", "shell"))])
    bob.wait_for("> ")
    bob.type(f"subscribe {topic}\n")
    bob.wait_for("> ")
    bob.type("top")
    bob.wait_for("top")
    club.do("alice", "publish", topic, f"\x1b[2J hello\n{topic} carol: hi")  # in another's name
    bob.wait_for(f"\r\x1b[J{topic} alice: \\x1b[2J hello\\n{topic} carol: hi\r\n> top")
    bob.type("ics\n")
    bob.wait_for(f"{topic}\talice\talice bob\r\n")
    bob.wait_for("> ")
    bob.type("exit\n")
    assert bob.status() == 0


@pytest.mark.parametrize(("key", "status"), [("\x04", 0), ("\x03", 130)])
def test_end_of_input_and_interrupt_end_a_shell(
    key: str, status: int, club: Club, topic: str
) -> None:
    bob = AtTerminal([*map(str, club.arguments("bob", "shell"))])
    bob.wait_for("> ")
    bob.type(key)
    assert bob.status() == status


def test_a_shell_without_standard_input_says_so(club: Club) -> None:
    bob = AtTerminal([*map(str, club.arguments("bob", "shell"))], has_input=False)
    bob.wait_for("error: cannot read MESSAGE from standard input: it is closed\r\n")
    assert bob.status() == 1
