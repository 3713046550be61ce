"""Members of shared topics as processes, with a keeper and a broker.

A test module takes the fixture from here by a name of its own: `club = sharing.shared`.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import (
    PROGRAM,
    SAFETY,
    BrokerProcess,
    Mosquitto,
    ResponderProcess,
    Run,
    run,
    wait_until,
)
from issuing import pem
from keeping import COURSE, keeper_options, private_pem
from members import Certifier


class Process:
    """A member that runs on; what it writes is read all the time, unless a test says otherwise."""

    def __init__(
        self, command: list[str], reads: bool = True, env: dict[str, str] | None = None
    ) -> None:
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, env=env)
        self.lines: list[bytes] = []
        self.notes: list[str] = []
        self._threads = [threading.Thread(target=self._read_notes, daemon=True)]
        self._threads[0].start()
        if reads:
            self.read_on()

    def read_on(self) -> None:
        """Begin to read standard output."""
        self._threads.append(threading.Thread(target=self._read, daemon=True))
        self._threads[-1].start()

    def _read(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.append(line)

    def _read_notes(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.notes.append(line.decode().rstrip("\n"))

    def write(self, data: bytes) -> None:
        """Write to its standard input, at once."""
        assert self.process.stdin
        self.process.stdin.write(data)
        self.process.stdin.flush()

    def end_input(self) -> None:
        """Let its standard input end."""
        assert self.process.stdin
        self.process.stdin.close()

    def wait_for_lines(self, count: int, seconds: float = SAFETY) -> list[bytes]:
        """Wait until it has printed so many lines, and return all."""
        wait_until(lambda: len(self.lines) >= count or self.process.poll() is not None, seconds)
        assert len(self.lines) >= count, (self.lines[-3:], self.notes)
        return self.lines

    def has_noted(self, text: str, times: int = 1) -> bool:
        """Tell whether this many lines of standard error hold a text."""
        return sum(text in note for note in self.notes) >= times

    def wait_for_note(self, text: str, times: int = 1, seconds: float = SAFETY) -> None:
        """Wait until it has said something."""
        wait_until(lambda: self.has_noted(text, times) or self.process.poll() is not None, seconds)
        self.end_of_threads()
        assert self.has_noted(text, times), self.notes

    def end_of_threads(self) -> None:
        """Wait for the last words of a process that has ended."""
        if self.process.poll() is not None:
            for thread in self._threads:
                thread.join(SAFETY)

    def stop(self, how: int = signal.SIGTERM) -> int:
        """Send a signal, and return the exit status."""
        self.process.send_signal(how)
        return self.wait()

    def wait(self, seconds: float = SAFETY) -> int:
        """Return the exit status."""
        status = self.process.wait(seconds)
        self.end_of_threads()
        return status

    def close(self) -> None:
        """End it, if it has not ended."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(SAFETY)
        for stream in self.process.stdin, self.process.stdout, self.process.stderr:
            if stream:
                with contextlib.suppress(OSError):
                    stream.close()


def member_arguments(
    folder: Path, port: int, certifier: Certifier, name: str, *arguments: str | bytes
) -> list[str | bytes]:
    """Return the arguments for a member's command, whose files are written where they lack."""
    identity, ca = folder / f"{name}.pem", folder / "ca.pem"
    if not identity.exists():
        identity.touch(0o600)
        identity.write_bytes(private_pem(certifier.member(name)))
    ca.write_bytes(pem(certifier.certificate))
    proof = "--identity", str(identity), "--peer-ca", str(ca)
    return ["-p", str(port), *proof, name, *arguments]


def member_process(
    folder: Path,
    port: int,
    name: str,
    *arguments: str,
    reads: bool = True,
    certifier: Certifier = COURSE,
) -> Process:
    """Start a member's command."""
    words = member_arguments(folder, port, certifier, name, *arguments)
    return Process([sys.executable, str(PROGRAM), *map(str, words)], reads)


class Club:
    """A keeper at a broker, and members with identities."""

    def __init__(
        self, folder: Path, broker: BrokerProcess, *options: str, certifier: Certifier = COURSE
    ) -> None:
        self.broker, self.folder, self.certifier = broker, folder, certifier
        self._options = [*keeper_options(folder, broker.port, certifier), *options]
        self._started: list[Process] = []
        self.keeper: ResponderProcess
        self.start_keeper()

    def start_keeper(self) -> None:
        """Start the keeper, perhaps once more."""
        self.keeper = ResponderProcess(*self._options)
        self.keeper.wait_for("ready")

    def kill_keeper(self) -> None:
        """End the keeper without a word."""
        self.keeper.stop(signal.SIGKILL)

    def arguments(self, name: str, *arguments: str | bytes) -> list[str | bytes]:
        """Return the arguments for a member's command."""
        return member_arguments(self.folder, self.broker.port, self.certifier, name, *arguments)

    def run(self, name: str, *arguments: str | bytes, stdin: bytes | None = None) -> Run:
        """Run a member's command to its end."""
        return run(*self.arguments(name, *arguments), stdin=stdin)

    def do(self, name: str, *arguments: str | bytes, stdin: bytes | None = None) -> bytes:
        """Run a member's command, which must do what it is told; return what it prints."""
        result = self.run(name, *arguments, stdin=stdin)
        assert (result.returncode, result.stderr) == (0, b"")
        return result.stdout

    def start(self, name: str, *arguments: str, reads: bool = True) -> Process:
        """Start a member's command."""
        who = self.folder, self.broker.port, name
        started = member_process(*who, *arguments, reads=reads, certifier=self.certifier)
        self._started.append(started)
        return self._started[-1]

    def subscribe(self, name: str, *arguments: str, reads: bool = True) -> Process:
        """Start to subscribe; return when it has joined the topics."""
        started = self.start(name, "-v", "subscribe", *arguments, reads=reads)
        started.wait_for_note("the answer to a question (join)")
        return started

    def end_members(self) -> None:
        """End the commands that were started."""
        while self._started:
            self._started.pop().close()

    def close(self) -> None:
        """End all."""
        self.end_members()
        self.keeper.stop()


@contextlib.contextmanager
def club(folder: Path, broker: BrokerProcess, *options: str) -> Iterator[Club]:
    """Found a club, which ends with the block."""
    founded = Club(folder, broker, *options)
    try:
        yield founded
    finally:
        founded.close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, broker: Mosquitto) -> Iterator[Club]:
    """A keeper that all tests of a module share, each with topics of its own."""
    with club(tmp_path_factory.mktemp("club"), broker) as founded:
        yield founded
