"""The shell: commands from a pipe, and from somebody at a terminal."""

from __future__ import annotations

import os
import pty
import re
import select
import sys
import time
from collections.abc import Iterator
from itertools import count

import pytest
import sharing
from conftest import PROGRAM, SAFETY, error_lines, wait_until
from sharing import Club

from secure_mqtt.topics.shell import COMMANDS, HELP

club = sharing.shared
NAMES = count(1)


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
        f"publish {topic} x\nunknown\ncreate\nsubscribe {topic}\nunsubscribe {topic}\nadmit a+ b\n"
        f"create {topic}\nexit\nunknown"
    )
    result = club.run("alice", "shell", stdin=commands.encode())
    assert result.returncode == 1
    errors = re.findall(r"error: (.*)", error_lines(result))
    wanted = [
        f"'responder' refuses on {topic}: there is no such topic",
        "there is no command 'unknown'",
        "create takes: TOPIC",
        f"'responder' refuses on {topic}: there is no such topic",
        f"not subscribed to '{topic}'",
        "TOPIC must be",
        "commands that failed: 6",
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


def test_the_help_names_every_command() -> None:
    named = re.findall(r"(?m)^(\w+)", HELP.decode())
    assert named == [*dict.fromkeys(named)]
    assert {*named} == {*COMMANDS}


class AtTerminal:
    """Somebody at a terminal, where the program runs."""

    def __init__(self, arguments: list[str]) -> None:
        self.pid, self._terminal = pty.fork()
        if not self.pid:
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


def test_messages_do_not_tear_what_is_being_typed(club: Club, topic: str) -> None:
    club.do("alice", "create", topic, "bob")
    bob = AtTerminal([*map(str, club.arguments("bob", "shell"))])
    bob.wait_for("> ")
    bob.type(f"subscribe {topic}\n")
    bob.wait_for("> ")
    bob.type("top")
    bob.wait_for("top")
    club.do("alice", "publish", topic, "\x1b[2J hello")
    bob.wait_for(f"\r\x1b[J{topic} alice: \\x1b[2J hello\r\n> top")
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
