"""What a terminal is shown: never what another's text would make it do."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
from conftest import PROGRAM, SAFETY, Mosquitto, Peer, ResponderProcess, run, wait_until

from secure_mqtt.terminal import visible

# A title, a colour, a clipboard, a backspace, a return, and text that is shown from its end.
TITLE = "\x1b]0;title\x07\x1b[31m\x1b]52;c;cm0gLXJm\x07a\bb\rc\x7f\x85\x9b2J\u202ed\u2066"
SHOWN = r"\x1b]0;title\x07\x1b[31m\x1b]52;c;cm0gLXJm\x07a\x08b\rc\x7f\x85\x9b2J\u202ed\u2066"


class Screen:
    """A terminal that programs write to."""

    def __init__(self) -> None:
        self.shown = b""
        self._screen, self.terminal = pty.openpty()
        self._text = ""

    def read(self) -> str:
        """Return what was written to it, as programs wrote it: a terminal adds returns."""
        os.set_blocking(self._screen, False)
        with contextlib.suppress(BlockingIOError):
            while data := os.read(self._screen, 65536):
                self.shown += data
        return self.shown.decode().replace("\r\n", "\n")

    def has(self, text: str) -> bool:
        """Tell whether a text was written to it, or wait a moment for more."""
        select.select([self._screen], [], [], 0.1)
        return text in self.read()

    def close(self) -> None:
        os.close(self._screen)
        os.close(self.terminal)


@pytest.fixture
def screen() -> Iterator[Screen]:
    screen = Screen()
    yield screen
    screen.close()


@pytest.fixture
def command(broker: Mosquitto, responder: ResponderProcess, netid: str) -> list[str]:
    """What a request begins with."""
    return ["-p", str(broker.port), netid, "lowercase"]


def test_a_terminal_shows_the_controls_of_an_answer_and_obeys_none(
    command: list[str], screen: Screen
) -> None:
    result = run(*command, "-", stdin=TITLE.encode(), stdout=screen.terminal)
    assert (result.stderr, result.returncode) == (b"", 0)
    assert screen.read() == SHOWN.lower() + "\n"


def test_a_terminal_shows_the_controls_of_the_answers_to_lines(
    command: list[str], screen: Screen
) -> None:
    lines = b"\x1b[2J\n\xc2\x9b2J\nplain\n"
    result = run("--lines", *command, "-", stdin=lines, stdout=screen.terminal)
    assert (result.stderr, result.returncode) == (b"", 0)
    assert screen.read() == "\\x1b[2j\n\\x9b2j\nplain\n"


@pytest.mark.parametrize("text", ["two\nlines", "a\ttab", "naïve 漢字 👩\u200d🔬", "\\x1b", ""])
def test_a_terminal_shows_other_text_as_it_is(
    text: str, command: list[str], screen: Screen
) -> None:
    assert run(*command, text, stdout=screen.terminal).returncode == 0
    assert screen.read() == text + "\n"


def test_what_is_no_terminal_gets_an_answer_to_the_byte(command: list[str]) -> None:
    result = run(*command, "-", stdin=TITLE.encode())
    assert result.stdout == TITLE.lower().encode() + b"\n"


def test_a_responders_log_shows_the_controls_of_names_that_a_peer_chose(
    broker: Mosquitto, peer: Callable[..., Peer], screen: Screen
) -> None:
    arguments = [sys.executable, str(PROGRAM), "--respond", "-p", str(broker.port)]
    with subprocess.Popen(arguments, stderr=screen.terminal) as process:
        try:
            wait_until(lambda: screen.has("ready"))
            peer(broker.port, "none").publish("a\u202ebc/uppercase/request", b"no token")
            wait_until(lambda: screen.has("ignored") or process.poll() is not None)
        finally:
            process.terminate()
            assert process.wait(SAFETY) == 0
    assert '"a\\u202eb' in screen.read()
    assert all(line.isprintable() for line in screen.read().splitlines())


def test_an_error_shows_the_controls_of_what_it_names(screen: Screen) -> None:
    command = [sys.executable, str(PROGRAM), "--cafile", "\x1b[2J\u202e", "x", "reverse", "text"]
    assert subprocess.run(command, stderr=screen.terminal, timeout=SAFETY).returncode == 2
    assert r"cannot read --cafile \x1b[2J\u202e: " in screen.read()


def test_every_control_is_escaped_and_nothing_else_of_ascii() -> None:
    for character in map(chr, range(0xA0)):
        is_safe = character.isprintable() or character in "\t\n"
        assert (visible(character) == character) == is_safe
        assert visible(character).replace("\t", "").replace("\n", "").isprintable()
