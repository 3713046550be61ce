"""What the tests share: the program as a process, a real broker, a real responder."""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = ROOT / "secure_mqtt_client.py"
# The program, but for one bound: each request that no key opens has a line in the log, so that a
# test can wait for it.
TALKATIVE = [
    "-c",
    f"import os, sys; sys.path.insert(0, {str(ROOT)!r}); import secure_mqtt_client as program;"
    "from secure_mqtt import reports; reports.FOREIGN_INTERVAL = 0.0; os._exit(program.main())",
]
VECTORS = Path(__file__).resolve().parent / "vectors"
# Ports below the range from which systems take those for clients. Each worker of pytest-xdist has
# its share, and goes through it in an order of its own: none takes what another just found free.
WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
OWN_PORTS = range(20_000 + WORKER, 32_000, WORKERS)
PORTS = itertools.cycle(random.SystemRandom().sample(OWN_PORTS, len(OWN_PORTS)))
SAFETY = 60.0  # seconds after which something that should have happened is taken to have failed

sys.path.insert(0, str(ROOT))

# Under nohup, or in the background of a script, we ignore these; so would all that we start, and a
# shell among it could not even trap them. What is handled here has its default again there.
for number in signal.SIGHUP, signal.SIGINT:
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, lambda *_: None)

Run = subprocess.CompletedProcess[bytes]


def copy_program(folder: Path) -> Path:
    """Copy what the program needs to run, but for the group; return the program there."""
    for path in PROGRAM, ROOT / "crypto.py":
        shutil.copy(path, folder)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "secure_mqtt", folder / "secure_mqtt", ignore=ignored)
    return folder / PROGRAM.name


def run(*arguments: str | bytes | Path, stdin: bytes | None = None, **options: object) -> Run:
    """Run the program to its end."""
    command = [
        sys.executable,
        str(options.pop("program", PROGRAM)),
        *(os.fspath(argument) for argument in arguments),
    ]
    if stdin is not None:
        options["input"] = stdin
    else:
        options.setdefault("stdin", subprocess.DEVNULL)
    options.setdefault("stdout", subprocess.PIPE)
    return subprocess.run(command, stderr=subprocess.PIPE, timeout=SAFETY, **options)  # type: ignore[call-overload,no-any-return]


def error_lines(result: Run) -> str:
    """Return what the program wrote to standard error."""
    return result.stderr.decode()


def free_port() -> int:
    """Return a TCP port of the loopback interface that nothing listens on."""
    while True:
        port = next(PORTS)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def wait_until(condition: Callable[[], object], seconds: float = SAFETY) -> None:
    """Wait until a condition holds; fail if it does not within some seconds."""
    end = time.monotonic() + seconds
    pause = threading.Event()
    while not condition():
        assert time.monotonic() < end, "what was waited for did not happen"
        pause.wait(0.01)


def processes_below(pid: int) -> set[int]:
    """Return the processes that a process has started, and those that they have started."""
    parents: dict[int, int] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = path.read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it has ended meanwhile
            continue
        if state != "Z":
            parents[int(path.parent.name)] = int(parent)
    found = {pid}
    while more := {child for child, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {pid}


def is_running(pid: int) -> bool:
    """Tell whether a process has not ended yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Peer:
    """Another's client or responder: subscribed to some topics, it publishes what a test says."""

    def __init__(self, port: int, *topics: str, client_id: str = "") -> None:
        self._messages: queue.SimpleQueue[tuple[str, bytes]] = queue.SimpleQueue()
        self._client = paho.Client(CallbackAPIVersion.VERSION2, client_id)
        self._client.on_message = lambda client, userdata, message: self._messages.put(
            (message.topic, bytes(message.payload))
        )
        subscribed = threading.Event()
        self._client.on_subscribe = lambda *_: subscribed.set()
        self._client.connect("127.0.0.1", port)
        self._client.subscribe([(topic, 1) for topic in topics])
        self._client.loop_start()
        assert subscribed.wait(SAFETY)

    def publish(self, topic: str, payload: bytes, retain: bool = False) -> None:
        """Publish at QoS 1."""
        self._client.publish(topic, payload, 1, retain).wait_for_publish(SAFETY)

    def receive_any(self) -> tuple[str, bytes]:
        """Return topic and payload of the next message."""
        return self._messages.get(timeout=SAFETY)

    def receive(self, topic: str) -> bytes:
        """Return the payload of the next message, which must be on this topic."""
        found, payload = self.receive_any()
        assert found == topic
        return payload

    def close(self) -> None:
        """Disconnect."""
        self._client.disconnect()
        self._client.loop_stop()


class BrokerProcess(ABC):
    """A broker of our own on a free port, which can be stopped and started again."""

    port: int
    process: subprocess.Popen[bytes]

    @abstractmethod
    def start(self) -> None:
        """Start it and wait until it accepts connections."""

    def kill(self, how: int = signal.SIGKILL) -> None:
        """End it."""
        self.process.send_signal(how)
        self.process.wait(SAFETY)

    def restart(self) -> None:
        """End it and start it again on the same port."""
        self.kill()
        self.start()


class Mosquitto(BrokerProcess):
    """A mosquitto."""

    def __init__(self, folder: Path, extra: str = "") -> None:
        self.port = free_port()
        self._config = folder / f"mosquitto-{self.port}.conf"
        self._log = folder / f"mosquitto-{self.port}.log"
        self._config.write_text(
            f"listener {self.port} 127.0.0.1\nallow_anonymous true\n"
            f"max_queued_messages 0\nuser root\n{extra}\n"
        )
        self._starts = 0
        self.start()

    def start(self) -> None:
        """Start it and wait until it listens."""
        path = os.environ["PATH"] + ":/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin"
        program = shutil.which("mosquitto", path=path)
        assert program, "mosquitto is not installed"
        with self._log.open("ab") as log:
            command = [program, "-c", str(self._config)]
            self.process = subprocess.Popen(command, stdout=log, stderr=log)
        # Its own word, as another program may listen on the port.
        self._starts += 1
        wait_until(
            lambda: (
                self._log.read_bytes().count(b" running") >= self._starts
                or self.process.poll() is not None
            )
        )
        assert self.process.poll() is None, self._log.read_text()


class ResponderProcess:
    """The program as a responder. Its standard error is read all the time, so it never blocks."""

    def __init__(
        self, *arguments: str, env: dict[str, str] | None = None, is_talkative: bool = False
    ) -> None:
        program = TALKATIVE if is_talkative else [str(PROGRAM)]
        command = [sys.executable, *program, "--respond", *arguments]
        self.lines: list[str] = []
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=env,
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr
        for line in self.process.stderr:
            self.lines.append(line.decode().rstrip("\n"))

    def has_said(self, text: str, times: int = 1) -> bool:
        """Tell whether this many lines of standard error hold a text."""
        return sum(text in line for line in self.lines) >= times

    def wait_for(self, text: str, times: int = 1, seconds: float = SAFETY) -> None:
        """Wait until it has said something, or ended."""
        wait_until(lambda: self.has_said(text, times) or not self._reader.is_alive(), seconds)
        assert self.has_said(text, times), self.lines

    def stop(self, how: int = signal.SIGTERM) -> int:
        """Send a signal and return the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        try:
            status = self.process.wait(SAFETY)
        finally:
            self.process.kill()
        self._reader.join(SAFETY)
        assert self.process.stdout
        with self.process.stdout:
            assert self.process.stdout.read() == b"", (
                "a responder writes nothing to standard output"
            )
        assert self.process.stderr
        self.process.stderr.close()
        return status


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mosquitto]:
    """A broker for the whole session, not to be stopped."""
    mosquitto = Mosquitto(tmp_path_factory.mktemp("broker"))
    yield mosquitto
    mosquitto.kill()


@pytest.fixture
def start_broker(tmp_path: Path) -> Iterator[Callable[[str], Mosquitto]]:
    """Start brokers that end with the test, with more settings than there are by themselves."""
    started: list[Mosquitto] = []

    def start(extra: str) -> Mosquitto:
        started.append(Mosquitto(tmp_path, extra))
        return started[-1]

    yield start
    for mosquitto in started:
        if mosquitto.process.poll() is None:
            mosquitto.kill()


@pytest.fixture
def own_broker(start_broker: Callable[[str], Mosquitto]) -> Mosquitto:
    """A broker for one test, which may stop and restart it."""
    return start_broker("")


@pytest.fixture(scope="session")
def responder(broker: Mosquitto) -> Iterator[ResponderProcess]:
    """A responder at the session's broker, for every NetID."""
    process = ResponderProcess("-v", "-p", str(broker.port), is_talkative=True)
    process.wait_for("ready")
    yield process
    process.stop()


@pytest.fixture
def start_responder() -> Iterator[Callable[..., ResponderProcess]]:
    """Start responders that end with the test."""
    started: list[ResponderProcess] = []

    def start(*arguments: str, ready: bool = True, **options: Any) -> ResponderProcess:
        started.append(ResponderProcess(*arguments, **options))
        if ready:
            started[-1].wait_for("ready")
        return started[-1]

    yield start
    for process in started:
        if process.process.stdout and not process.process.stdout.closed:
            process.stop()


@pytest.fixture
def peer() -> Iterator[Callable[..., Peer]]:
    """Connect peers that end with the test."""
    connected: list[Peer] = []

    def connect(port: int, *topics: str, client_id: str = "") -> Peer:
        connected.append(Peer(port, *topics, client_id=client_id))
        return connected[-1]

    yield connect
    for each in connected:
        each.close()


@pytest.fixture
def netid(request: pytest.FixtureRequest) -> str:
    """A NetID that no other test uses at the same time."""
    return f"t{os.getpid()}x{abs(hash(request.node.nodeid)) % 10**9}"
