"""What lasts while brokers and keepers come and go: python tests/endurance.py [topics] [LINES].

A long session; or with topics, a publisher and three subscribers, whose keeper is killed as well.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import conftest
import pytest
import sharing
from conftest import PROGRAM, SAFETY, Mosquitto, ResponderProcess, wait_until
from hostile import impatient_program, in_thread
from sharing import Club, Process

WIDTH = 100  # characters of a line: few fit into a pipe, so the program is never far ahead
RATE = 50  # lines a second that the slowest machine should do


class Seen(NamedTuple):
    """What a session was like."""

    answers: int
    restarts: int
    exchanges: int
    seconds: float
    longest_gap: float  # seconds between two answers


def line(number: int) -> bytes:
    """Return a line that is unlike all others."""
    return f"line {number} ä🦊 ".ljust(WIDTH, "x").encode()


def answer(number: int) -> bytes:
    """Return what uppercase makes of it."""
    return line(number).decode().upper().encode() + b"\n"


@contextlib.contextmanager
def services(folder: Path) -> Iterator[Mosquitto]:
    """Run a broker, and a responder that connects again at once."""
    mosquitto = Mosquitto(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(conftest, "PROGRAM", impatient_program(folder))
        responder = ResponderProcess("-p", str(mosquitto.port))
    try:
        responder.wait_for("ready")
        yield mosquitto
    finally:
        responder.stop()
        mosquitto.kill()


@contextlib.contextmanager
def long_session(port: int, lines: int) -> Iterator[subprocess.Popen[bytes]]:
    """Start a session that is given all its lines."""
    options = ["-v", "-p", str(port), "--suite", "x25519", "--rekey", "1", "--lines"]
    command = [sys.executable, str(PROGRAM), *options, "endurance", "uppercase", "-"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe) as process:

        def feed() -> None:
            assert process.stdin
            with process.stdin:
                for number in range(lines):
                    process.stdin.write(line(number) + b"\n")

        feeder = in_thread(feed)
        safety_net = threading.Timer(SAFETY + lines / RATE, process.kill)
        safety_net.start()
        try:
            yield process
        finally:
            safety_net.cancel()
            process.kill()
            feeder.join(SAFETY)


def endurance(lines: int, restarts: int) -> Seen:
    """Let a session run whose broker is restarted; AssertionError unless all answers are right."""
    with (
        tempfile.TemporaryDirectory() as folder,
        services(Path(folder)) as mosquitto,
        long_session(mosquitto.port, lines) as process,
    ):
        assert process.stdout
        assert process.stderr
        log: list[bytes] = []
        log_reader = in_thread(lambda: log.extend(process.stderr or ()))
        restart_at = {lines * turn // (restarts + 1) for turn in range(1, restarts + 1)}
        began = last = time.monotonic()
        longest_gap = 0.0
        for number in range(lines):
            found = process.stdout.readline()
            assert found == answer(number), (number, found, log)
            longest_gap = max(longest_gap, time.monotonic() - last)
            last = time.monotonic()
            if number in restart_at:
                mosquitto.restart()
        assert process.stdout.read() == b""
        assert process.wait(SAFETY) == 0
        log_reader.join(SAFETY)
    exchanges = sum("ms: 2 ←".encode() in text for text in log)
    connections = sum(b"CONNACK from" in text for text in log)
    assert connections > restarts, log
    return Seen(lines, connections - 1, exchanges, last - began, longest_gap)


# --- topics ------------------------------------------------------------------------------------

EVENTS = "bbkbbkb"  # the broker is restarted, or the keeper killed and started again
ROTATION = "5"  # seconds


def text_of(number: int) -> bytes:
    """Return a line as it is published and printed."""
    return b"line %07d of a publisher that lasts\n" % number


def start_feeding(publisher: Process, lines: int) -> None:
    """Give a publisher all its lines."""

    def feed() -> None:
        for number in range(lines):
            publisher.write(text_of(number))
        publisher.end_input()

    in_thread(feed)


def happen(event: str, club: Club) -> None:
    """Let the broker or the keeper end without a word, and begin again."""
    if event == "b":
        club.broker.restart()
    else:
        club.kill_keeper()
        club.start_keeper()


def topics_endurance(lines: int, history: int) -> str:
    """Let members last; AssertionError unless each subscriber has each line once, in order."""
    patience = SAFETY + lines / RATE
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        broker = Mosquitto(folder)
        stack.callback(broker.kill)
        club = stack.enter_context(sharing.club(folder / "club", broker, "--rotate", ROTATION))
        club.do("alice", "create", "endurance", "bob", "--history", str(history))
        subscribers = [club.subscribe("bob", "endurance") for _ in range(3)]
        began = time.monotonic()
        publisher = club.start("alice", "-v", "--lines", "publish", "endurance", "-")
        start_feeding(publisher, lines)
        for turn, event in enumerate(EVENTS, 1):
            at = lines * turn // (len(EVENTS) + 1)
            wait_until(lambda: len(subscribers[0].lines) >= at, patience)  # noqa: B023
            happen(event, club)
        assert publisher.wait(patience) == 0
        for subscriber in subscribers:
            subscriber.wait_for_lines(lines, patience)
            assert subscriber.lines == [text_of(number) for number in range(lines)]
        seconds = time.monotonic() - began
        notes = [note for each in subscribers for note in each.notes if " ms: " not in note]
    others = sorted({note.partition(": ")[2] for note in notes if "connecting again" not in note})
    return f"{lines} lines to 3 subscribers in order, none twice, in {seconds:.1f} s; {others}"


def main() -> None:
    """Print what it was like."""
    if sys.argv[1:2] == ["topics"]:
        lines = int(sys.argv[2]) if sys.argv[2:] else 100_000
        print(topics_endurance(lines, history=lines))
        return
    seen = endurance(int(sys.argv[1]) if sys.argv[1:] else 100_000, restarts=5)
    print(
        f"{seen.answers} answers in order, none twice, in {seen.seconds:.1f} s;"
        f" {seen.restarts} new connections, {seen.exchanges} key exchanges,"
        f" longest wait for an answer {seen.longest_gap:.1f} s"
    )


if __name__ == "__main__":
    main()
