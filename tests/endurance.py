"""What lasts while brokers and keepers come and go.

python tests/endurance.py [LINES] lets a session last.
python tests/endurance.py topics [LINES] [--history COUNT] lets a publisher and three subscribers
last, whose keeper is killed as well. Without --history, the keeper has kept all lines.
"""

from __future__ import annotations

import argparse
import contextlib
import re
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


def missed(subscriber: Process) -> int:
    """Return how many messages a subscriber has said that it missed."""
    return sum(int(count) for count in re.findall(r"missed (\d+)", "\n".join(subscriber.notes)))


def accounted(subscriber: Process) -> int:
    """Return how many messages a subscriber has printed or said to be missed."""
    return len(subscriber.lines) + missed(subscriber)


def check_lines(subscriber: Process, lines: int, history: int) -> None:
    """AssertionError unless each line was printed once, in order, or is said to be missed."""
    wanted = [text_of(number) for number in range(lines)]
    assert accounted(subscriber) == lines
    assert subscriber.lines == sorted({*subscriber.lines} & {*wanted})
    assert not missed(subscriber) or history < lines, subscriber.notes


def topics_endurance(lines: int, history: int) -> str:
    """Let members last; AssertionError unless all subscribers account for all lines, in order."""
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
            wait_until(lambda: accounted(subscribers[0]) >= at, patience)  # noqa: B023
            happen(event, club)
        assert publisher.wait(patience) == 0
        for subscriber in subscribers:
            wait_until(lambda: accounted(subscriber) >= lines, patience)  # noqa: B023
            check_lines(subscriber, lines, history)
        seconds = time.monotonic() - began
        notes = [note for each in subscribers for note in each.notes if " ms: " not in note]
        counts = ", ".join(f"{missed(each)}" for each in subscribers)
    others = sorted({note.partition(": ")[2] for note in notes if "connecting again" not in note})
    return (
        f"{lines} lines to 3 subscribers in order, none twice, in {seconds:.1f} s;"
        f" missed, and said so: {counts}; {others}"
    )


def main() -> None:
    """Print what it was like."""
    parser = argparse.ArgumentParser(description="Let a session, or topics, last.")
    parser.add_argument("words", nargs="*", metavar="[topics] [LINES]")
    parser.add_argument("--history", type=int, metavar="COUNT", help="of the topic; all lines")
    arguments = parser.parse_args()
    are_topics = arguments.words[:1] == ["topics"]
    words = arguments.words[are_topics:]
    lines = int(words[0]) if words else 100_000
    if are_topics:
        print(topics_endurance(lines, lines if arguments.history is None else arguments.history))
        return
    seen = endurance(lines, restarts=5)
    print(
        f"{seen.answers} answers in order, none twice, in {seen.seconds:.1f} s;"
        f" {seen.restarts} new connections, {seen.exchanges} key exchanges,"
        f" longest wait for an answer {seen.longest_gap:.1f} s"
    )


if __name__ == "__main__":
    main()
