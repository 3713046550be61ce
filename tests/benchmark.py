"""Measure the program, in one run: python tests/benchmark.py [--svg FILE] [PART ...]

Every figure is measured here and now. On a shared machine only the ratios mean something; each is
taken between commands that ran in turn. PySocks, which only tests need, is switched off in all that
is started, and gmpy2 where a table says so, by modules of their names that fail.
--svg draws what the parts suites, exchanges and lines have measured, and beside it, in topics.svg,
what the part topics has.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import importlib.util
import itertools
import os
import re
import select
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import timeit
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import keeping
import paho.mqtt.client as paho
import sharing
import topics_load
from broker_side import issue, made
from conftest import (
    PROGRAM,
    ROOT,
    SAFETY,
    Mosquitto,
    Peer,
    ResponderProcess,
    free_port,
    processes_below,
    run,
)
from hostile import (
    CONNACK,
    PUBACK,
    PUBLISH,
    QOS_1,
    SUBACK,
    connect,
    packet,
    publish,
    subscribe,
)
from members import KEEPER, TOPIC, Certified
from paho.mqtt.enums import CallbackAPIVersion

import crypto
import secure_mqtt_client as program
from crypto import PUBLIC_KEY, from_pem, read_group
from secure_mqtt import connection
from secure_mqtt.actions import KEY_EXCHANGE, MAX_TEXT, REQUEST, RESPONSE
from secure_mqtt.calls import call, exchange_keys, topics
from secure_mqtt.connection import Connection
from secure_mqtt.exchange import Exchange
from secure_mqtt.session import NUMBERED
from secure_mqtt.settings import Settings
from secure_mqtt.signatures import Identity
from secure_mqtt.suites import (
    COUNTER_SIZE,
    SUITES,
    TAG_SIZE,
    Transcript,
    key_blocks,
    suite_of,
)
from secure_mqtt.topics.messages import OVERHEAD, Epoch, SessionKey, Stream
from secure_mqtt.topics.requests import ACTION, Joined, read_answer, write_request

try:
    from gmpy2 import powmod
except ImportError:
    powmod = pow

if TYPE_CHECKING:
    import io

FLOOR = "import paho.mqtt.client, cryptography.fernet, cryptography.hazmat.primitives.kdf.hkdf"
ROUNDS = 21
TEXT = b"Networking is the best!"
T = TypeVar("T")


def table(title: str, rows: list[tuple[str, ...]]) -> None:
    """Print rows, the first of which is the heading, as a Markdown table."""
    print(f"\n### {title}\n")
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, tuple("-" * width for width in widths))
    for row in rows:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |")  # noqa: B905
    sys.stdout.flush()


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"


def timed(action: Callable[[], object]) -> float:
    """Return the seconds that an action takes."""
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def lacking(folder: Path, *modules: str) -> dict[str, str]:
    """Return an environment in which modules that the tests need cannot be imported."""
    folder.mkdir(exist_ok=True)
    for module in modules:
        (folder / f"{module}.py").write_text("raise ImportError")
    return {**os.environ, "PYTHONPATH": str(folder)}


def without_gmpy2(folder: Path) -> dict[str, str]:
    """Return an environment as requirements.txt makes it, and no more.

    socks is PySocks: where it is, paho looks for a proxy, which takes some 15 ms.
    """
    return lacking(folder, "gmpy2", "socks")


def with_gmpy2(folder: Path) -> dict[str, str]:
    """Return such an environment with gmpy2."""
    return lacking(folder, "socks")


# Python caches the bytecode of the modules, as on a user's machine, whatever this one is set to.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


# --- start: one request, as a whole process ----------------------------------------------------


def measure_start(broker: Mosquitto, folder: Path) -> None:
    """Compare whole commands with the import floor, which runs in turn with them."""
    port = str(broker.port)
    request = [str(PROGRAM), "-p", port, "bench", "uppercase", TEXT.decode()]
    floor = ["-c", FLOOR]
    rows: list[tuple[str, ...]] = [("command", "median", "ratio to the floor")]
    plain = without_gmpy2(folder / "plain")
    with responding(broker, plain):
        commands = {
            "the import floor": floor,
            "--help": [str(PROGRAM), "--help"],
            "a usage error": [str(PROGRAM), "a/b", "uppercase", "x"],
            "a request, pow": request,
        }
        rows += in_turn(commands, plain)
    if has_gmpy2():
        fast = with_gmpy2(folder / "fast")
        with responding(broker, fast):
            commands = {"the import floor": floor, "a request, gmpy2": request}
            rows += in_turn(commands, fast)[1:]
    table("One command, a fresh process each", rows)
    with responding(broker, dict(os.environ)):
        table("Where the time of a request goes", list(stages(broker)))


@contextlib.contextmanager
def responding(
    broker: Mosquitto, env: dict[str, str], *arguments: str
) -> Iterator[ResponderProcess]:
    """Run a responder at a broker."""
    responder = ResponderProcess(*arguments, "-p", str(broker.port), env=env)
    try:
        responder.wait_for("ready")
        yield responder
    finally:
        responder.stop()


def has_gmpy2() -> bool:
    """Tell whether the faster arithmetic is installed."""
    return importlib.util.find_spec("gmpy2") is not None


def in_turn(commands: dict[str, list[str]], env: dict[str, str]) -> list[tuple[str, ...]]:
    """Run commands in turn; the first is the floor of the ratios."""
    times = times_in_turn(commands, env)
    floor = next(iter(times.values()))
    return [
        (name, milliseconds(statistics.median(seconds)), f"{median_ratio(seconds, floor):.2f}")
        for name, seconds in times.items()
    ]


def times_in_turn(commands: dict[str, list[str]], env: dict[str, str]) -> dict[str, list[float]]:
    """Return the seconds that commands take which run in turn, after a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(ROUNDS + 1):
        for name, arguments in commands.items():
            command = [sys.executable, *arguments]
            silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
            times[name].append(timed(lambda: subprocess.run(command, env=env, **silent)))  # type: ignore[call-overload]  # noqa: B023
    return {name: seconds[1:] for name, seconds in times.items()}


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """Return the median of the ratios of pairs."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def settings_of(port: int, netid: str) -> Settings:
    """Return the settings of a client that asks for a text in uppercase."""
    return program.settings_from(["-p", str(port), netid, "uppercase", TEXT.decode()])


def new_exchange(settings: Settings) -> Exchange:
    """Return an exchange in the suite of the settings."""
    return Exchange(settings.netid, settings.suite)


def stages(broker: Mosquitto) -> Iterator[tuple[str, ...]]:
    """Time the stages of requests inside this process, where nothing overlaps."""
    times: dict[str, list[float]] = {}

    def stage(name: str, action: Callable[[], T]) -> T:
        start = time.perf_counter()
        result = action()
        times.setdefault(name, []).append(time.perf_counter() - start)
        return result

    settings = settings_of(broker.port, "stages")
    asking, answering = topics(settings)
    floor = [sys.executable, "-c", FLOOR]
    for _ in range(ROUNDS):
        stage("imports (a process of its own)", lambda: subprocess.run(floor))
        exchange = stage("key pair", lambda: new_exchange(settings))
        mqtt = Connection(settings)

        def prepare(mqtt: Connection = mqtt) -> None:
            mqtt.connect()
            mqtt.subscribe(RESPONSE.format(settings.netid, KEY_EXCHANGE), answering)

        stage("connect and subscribe", prepare)
        response = stage(
            "exchange of public keys",
            lambda: call(mqtt, settings, KEY_EXCHANGE, exchange.request(), bytes),  # noqa: B023
        )
        stage("derivation", lambda: exchange.agree(response))  # noqa: B023
        message = exchange.seal(asking, TEXT)
        read = partial(exchange.open, answering)
        stage(
            "request and response",
            lambda: call(mqtt, settings, settings.action, message, read),  # noqa: B023
        )
        stage("disconnect", lambda: mqtt.__exit__(None))  # noqa: B023
    yield "stage", "median"
    for name, seconds in times.items():
        yield name, milliseconds(statistics.median(seconds))


# --- timeline: where the time of a whole request goes ------------------------------------------

# Found in the lines that a request writes with -v, and Python when it has imported a module, each
# with what is over then. What the child does meanwhile has no line.
MARKS = {
    r"\| +site$": "Python has started",
    r"\| +secure_mqtt\.command_line$": "the parser is imported",
    r"\| +secure_mqtt\.workers$": "the options are read",
    r"\| +logging$": "the child is forked, logging imported",
    r"\| +paho\.mqtt\.client$": "paho is imported",
    "CONNACK": "connected",
    "SUBACK": "subscribed",
    " 1 (→|->)": "message 1 is sent",
    " 2 (←|<-)": "message 2 has come, the key is derived",
    " 3 (→|->)": "message 3 is sent",
    " 4 (←|<-)": "message 4 has come",
}


def measure_timeline(broker: Mosquitto, folder: Path) -> None:
    """Tell where the time of a whole request goes, by what it writes, and when it does so."""
    plain = without_gmpy2(folder / "plain")
    rows: list[tuple[str, ...]] = [("", *SUITES)]
    with responding(broker, plain):
        columns = [median_timeline(broker.port, suite, plain) for suite in SUITES]
    rows += [
        (event, *(milliseconds(column[event]) for column in columns))
        for event in (*MARKS.values(), "the process has ended")
    ]
    table("When it happens in a request (pow; importing takes longer when it is traced)", rows)


def median_timeline(port: int, suite: str, env: dict[str, str]) -> dict[str, float]:
    """Return the seconds from the start of a request to each event, medians."""
    runs = [timeline(port, suite, env) for _ in range(ROUNDS + 1)][1:]
    return {event: statistics.median(each[event] for each in runs) for event in runs[0]}


def timeline(port: int, suite: str, env: dict[str, str]) -> dict[str, float]:
    """Return the seconds from the start of one request to each event."""
    command = [sys.executable, "-X", "importtime", str(PROGRAM), "-v", f"--suite={suite}"]
    words = ["-p", str(port), "bench", "uppercase", TEXT.decode()]
    events: dict[str, float] = {}
    start = time.perf_counter()
    with subprocess.Popen(
        [*command, *words],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    ) as process:
        for line in cast("io.TextIOWrapper", process.stderr):
            now = time.perf_counter() - start
            for mark, event in MARKS.items():
                if re.search(mark, line.rstrip()):
                    events.setdefault(event, now)
    events["the process has ended"] = time.perf_counter() - start
    return events


# --- load: many clients ------------------------------------------------------------------------


LAB = b"\x00", b"\x00"  # salt and info of the lab's keys


class BareClient:
    """A client by hand, since it must cost less than what it measures."""

    def __init__(self, port: int, name: str, topic: str) -> None:
        """Connect, and subscribe to a topic."""
        self._socket = socket.create_connection(("127.0.0.1", port), SAFETY)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._rest = b""
        self._published = 0
        self._to_send = [connect(name)]
        assert self._packets()[0][0] == CONNACK
        self._to_send = [subscribe(topic)]
        assert self._packets()[0][0] == SUBACK

    def publish(self, topic: str, payload: bytes) -> None:
        """Publish at QoS 1, together with all else, before anything is received."""
        self._published = self._published % 65535 + 1
        mid = self._published.to_bytes(2, "big")
        self._to_send.append(publish(topic, payload, QOS_1, mid))

    def receive(self) -> list[tuple[bytes, bytes]]:
        """Return topic and payload of the messages that have come, at least one packet."""
        messages = []
        for kind, body in self._packets():
            if kind == PUBLISH:
                end = 2 + int.from_bytes(body[:2], "big")
                messages.append((body[2:end], body[end + 2 :]))
                self._to_send.append(packet(PUBACK, body[end : end + 2]))
        return messages

    def close(self) -> None:
        self._socket.close()

    def flush(self) -> None:
        """Send what is to be sent."""
        self._socket.sendall(b"".join(self._to_send))
        self._to_send.clear()

    def _packets(self) -> list[tuple[int, bytes]]:
        self.flush()
        packets: list[tuple[int, bytes]] = []
        while not packets:
            data = self._socket.recv(2**18)
            assert data, "the connection was lost"
            connection.acknowledge_at_once(self._socket)
            packets, self._rest = whole_packets(self._rest + data)
        return packets


def whole_packets(data: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """Return the packets in what was received, as kind and body, and the rest."""
    packets: list[tuple[int, bytes]] = []
    start = 0
    while True:
        size, at, digit = 0, start + 1, 128
        while digit & 128 and at < len(data):
            digit = data[at]
            size |= (digit & 127) << 7 * (at - start - 1)
            at += 1
        if digit & 128 or at + size > len(data):
            return packets, data[start:]
        packets.append((data[start] >> 4, data[at : at + size]))
        start = at + size


class LoadClients(BareClient):
    """Clients that share one connection: each session is an exchange and one request.

    Their private exponent is 2, so that a session costs them one squaring.
    """

    def __init__(self, port: int, prefix: str) -> None:
        super().__init__(port, prefix, "+/+/response")
        self.seconds: list[float] = []  # of each session, from key to answer
        self.wrong = 0
        self._prefix = prefix
        self._public_key = crypto.DhKeyPair(2).public_key
        any_key = crypto.DhKeyPair()
        size = any_key.public_value.bit_length() // 8 + 1  # of an INTEGER
        self._header_size = len(from_pem(PUBLIC_KEY, any_key.public_key)) - size
        self._ciphers: dict[str, crypto.FernetCipher] = {}
        self._started: dict[str, float] = {}
        self._count = 0

    def run(self, sessions: int, at_a_time: int) -> float:
        """Run sessions, so many at a time; returns the seconds that all took."""
        self.seconds.clear()
        last = self._count + sessions
        start = time.perf_counter()
        for _ in range(min(at_a_time, sessions)):
            self._begin()
        while len(self.seconds) < sessions:
            for topic, payload in self.receive():
                netid, action, _ = topic.decode().split("/")
                if action == KEY_EXCHANGE and netid in self._started:
                    self._ask(netid, payload)
                elif netid in self._started:
                    self._check(netid, payload)
                    if self._count < last:
                        self._begin()
        return time.perf_counter() - start

    def _begin(self) -> None:
        self._count += 1
        netid = f"{self._prefix}{self._count}"
        self._started[netid] = time.perf_counter()
        self.publish(REQUEST.format(netid, KEY_EXCHANGE), self._public_key)

    def _ask(self, netid: str, public_key: bytes) -> None:
        # Not by what reads the keys of strangers, nor in constant time: both would cost more than
        # the squaring.
        der = base64.b64decode(b"".join(public_key.split(b"\n")[1:-2]))
        secret = int(powmod(int.from_bytes(der[self._header_size :], "big"), 2, read_group().p))
        key = crypto.derive_key(secret.to_bytes(512, "big"), 32, *LAB)
        cipher = self._ciphers[netid] = crypto.FernetCipher(key)
        self.publish(REQUEST.format(netid, "uppercase"), cipher.seal(TEXT))

    def _check(self, netid: str, token: bytes) -> None:
        self.wrong += self._ciphers.pop(netid).open(token) != TEXT.upper()
        self.seconds.append(time.perf_counter() - self._started.pop(netid))


def connected(port: int, name: str, on_message: Callable[..., None], topic: str) -> paho.Client:
    """Return a paho client, in a thread, that has subscribed to a topic."""
    client = paho.Client(CallbackAPIVersion.VERSION2, name)
    ready = threading.Event()
    client.on_message = on_message
    client.on_subscribe = lambda *_: ready.set()
    client.on_publish = lambda *_: acknowledge_at_once(client)
    client.max_inflight_messages_set(0)
    client.connect("localhost", port)
    client.subscribe(topic, 1)
    client.loop_start()
    assert ready.wait(SAFETY)
    return client


def acknowledge_at_once(client: paho.Client) -> None:
    """Avoid TCP's delays, as the program does, so that the load is not what is measured."""
    sock: Any = client.socket()
    if sock is not None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


def measure_load(broker: Mosquitto, folder: Path) -> None:
    """Compare the responder with what the exponentiations alone allow, and with a plain echo."""
    rows: list[tuple[str, ...]] = [("arithmetic", "bound", "exchanges", "ratio", "lost or wrong")]
    latencies: list[tuple[str, ...]] = [("arithmetic", "clients", "p50", "p99")]
    for name, env in environments(folder):
        with responding(broker, env) as responder:
            clients = LoadClients(broker.port, f"load-{name}-")
            clients.run(100, 10)  # the warm-up
            bounds, rates = [], []
            for _ in range(5):
                bounds.append(exponentiations_per_second(env))
                sessions = int(3 * bounds[-1])
                rates.append(sessions / clients.run(sessions, 32))
            bound, rate = statistics.median(bounds), statistics.median(rates)
            ratio = f"{median_ratio(rates, bounds):.2f}"
            rows.append((name, f"{bound:.0f}/s", f"{rate:.0f}/s", ratio, f"{clients.wrong}"))
            for count in (1, 10, 50):
                clients.run(max(100, 6 * count), count)
                latencies.append((name, f"{count}", *percentiles(clients.seconds)))
            if name == "pow":
                measure_flood(broker, clients)
            clients.close()
            assert responder.process.poll() is None
    table("Exchanges with one request each, per second", rows)
    table("From key to answer, while so many clients run", latencies)


def environments(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield both arithmetics."""
    yield "pow", without_gmpy2(folder / "plain")
    if has_gmpy2():
        yield "gmpy2", with_gmpy2(folder / "fast")


def exponentiations_per_second(env: dict[str, str]) -> float:
    """Return cores / (t_keypair + t_secret): what the exponentiations alone allow, each second.

    All cores are busy meanwhile, and for long, as they are under load, and the peer's public value
    is that of the load clients: pow is faster for a small one.
    """
    code = (
        "import crypto, os, time\n"
        "peer, p, count = crypto.DhKeyPair(2).public_value, crypto.read_group().p, 0\n"
        "start = end = time.perf_counter()\n"
        "while end < start + 2:\n"
        "    crypto.DhKeyPair()\n"
        "    exponent = int.from_bytes(os.urandom(crypto.EXPONENT_SIZE), 'big')\n"
        "    crypto.modular_power(peer, exponent, p)\n"
        "    count, end = count + 1, time.perf_counter()\n"
        "print(count / (end - start))"
    )
    command = [sys.executable, "-c", code]
    processes = [
        subprocess.Popen(command, env=env, cwd=ROOT, stdout=subprocess.PIPE)
        for _ in range(os.cpu_count() or 1)
    ]
    return sum(float(process.communicate()[0]) for process in processes)


def percentiles(seconds: list[float]) -> tuple[str, str]:
    """Return the median and the 99th percentile."""
    return milliseconds(statistics.median(seconds)), milliseconds(p99(seconds))


def p99(seconds: list[float]) -> float:
    return statistics.quantiles(seconds, n=100)[98]


def measure_flood(broker: Mosquitto, clients: LoadClients) -> None:
    """Measure what a flood of key exchanges from one NetID does to the others."""
    clients.run(300, 10)
    quiet = clients.seconds.copy()
    stop = threading.Event()
    key = crypto.DhKeyPair(2).public_key

    def flood() -> None:
        client = connected(broker.port, "flood", lambda *_: None, "nothing")
        while not stop.is_set():
            client.publish(REQUEST.format("flood", KEY_EXCHANGE), key, 1).wait_for_publish(SAFETY)
        client.disconnect()

    thread = threading.Thread(target=flood)
    thread.start()
    clients.run(300, 10)
    stop.set()
    thread.join()
    table(
        "A flood of key exchanges from one NetID, and ten other clients",
        [
            ("", "p50", "p99"),
            ("without", *percentiles(quiet)),
            ("with", *percentiles(clients.seconds)),
            ("ratio", "", f"{p99(clients.seconds) / p99(quiet):.2f}"),
        ],
    )


def measure_memory(broker: Mosquitto, folder: Path) -> None:
    """Measure the responder's memory after exchanges with many NetIDs."""
    with responding(broker, dict(os.environ)) as responder:
        clients = LoadClients(broker.port, "memory-")
        clients.run(10, 10)
        rows: list[tuple[str, ...]] = [("NetIDs", "resident", "more than at the start")]
        start, total = resident(responder.process.pid), 0
        for goal in (0, 5_000, 10_000, 20_000):
            if goal:
                clients.run(goal - total, 32)
            total = goal
            now = resident(responder.process.pid)
            rows.append((f"{goal}", f"{now:.1f} MB", f"{now - start:.1f} MB"))
        clients.close()
    table("Memory of the responder", rows)


# --- requests of one session, and large messages -----------------------------------------------

# In the place of a NetID; its topics have a level more, so that no responder hears them.
PLAIN = "plain/echo"
ECHO = """
import socket, sys, paho.mqtt.client as mqtt
def quick(c):
    c.socket().setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    c.socket().setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
client.max_inflight_messages_set(0)
client.on_message = lambda c, _, m: c.publish(m.topic.replace("request", "response"), m.payload, 1)
client.on_subscribe = lambda *_: print("ready", flush=True)
client.on_publish = lambda c, *_: quick(c)
client.on_connect = lambda c, *_: c.subscribe("plain/+/+/request", 1)
client.connect("localhost", int(sys.argv[1]))
client.loop_forever()
"""


@contextlib.contextmanager
def echoing(broker: Mosquitto) -> Iterator[int]:
    """Run a plain paho echo below PLAIN."""
    command = [sys.executable, "-c", ECHO, str(broker.port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout
            process.stdout.readline()
            yield process.pid
        finally:
            process.kill()


def answers_per_second(port: int, netid: str, payloads: Sequence[bytes], window: int) -> float:
    """Send payloads, so many at a time, and count the answers."""
    done = threading.Event()
    state = Counter(sent=window)
    topic = REQUEST.format(netid, "uppercase")

    def on_message(client: paho.Client, userdata: object, message: object) -> None:
        state["answered"] += 1
        if state["sent"] < len(payloads):
            state["sent"] += 1
            client.publish(topic, payloads[state["sent"] - 1], 1)
        elif state["answered"] == len(payloads):
            done.set()

    client = connected(port, f"rate-{netid}", on_message, RESPONSE.format(netid, "uppercase"))
    start = time.perf_counter()
    for payload in payloads[:window]:
        client.publish(topic, payload, 1)
    assert done.wait(SAFETY), state
    seconds = time.perf_counter() - start
    client.disconnect()
    client.loop_stop()
    return len(payloads) / seconds


def sealed(port: int, netid: str, count: int) -> list[bytes]:
    """Make an exchange with the responder and return so many encrypted requests."""
    settings = settings_of(port, netid)
    exchange = new_exchange(settings)
    with Connection(settings) as mqtt:
        mqtt.connect()
        mqtt.subscribe(RESPONSE.format(netid, KEY_EXCHANGE))
        exchange_keys(mqtt, settings, exchange)
    return [exchange.seal(topics(settings)[0], TEXT) for _ in range(count)]


def measure_requests(broker: Mosquitto, folder: Path) -> None:
    """Compare the requests within one session with a plain echo of as many bytes."""
    rows: list[tuple[str, ...]] = [("at a time", "plain echo", "responder", "ratio")]
    with responding(broker, dict(os.environ)), echoing(broker):
        for window in (1, 16):
            pairs = []
            for _ in range(60):  # short and many, as how processes share the cores comes and goes
                tokens = sealed(broker.port, "session", 400)
                plain = answers_per_second(broker.port, PLAIN, tokens, window)
                pairs.append((plain, answers_per_second(broker.port, "session", tokens, window)))
            echo, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
            ratio = median_ratio([b for _, b in pairs], [a for a, _ in pairs])
            rows.append((f"{window}", f"{echo:.0f}/s", f"{ours:.0f}/s", f"{ratio:.2f}"))
    table("Requests under one key, per second", rows)


PLAIN_CLIENT = """
import sys, threading, paho.mqtt.client as mqtt
message, done, answers = sys.stdin.buffer.read(), threading.Event(), []
client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
client.on_message = lambda c, _, m: (answers.append(m.payload), done.set())
client.on_subscribe = lambda c, *_: c.publish("plain/echo/x/request", message, 1)
client.on_connect = lambda c, *_: c.subscribe("plain/echo/x/response", 1)
client.connect("localhost", int(sys.argv[1]))
client.loop_start()
done.wait()
sys.stdout.buffer.write(answers[0])
"""


def measure_sizes(broker: Mosquitto, folder: Path) -> None:
    """Compare large messages with a plain paho client at a plain echo: time, and peak memory."""
    port = str(broker.port)
    ours = [str(PROGRAM), "-p", port, "--timeout", "60", "sizes", "reverse", "-"]
    plain = ["-c", PLAIN_CLIENT, port]
    rows: list[tuple[str, ...]] = [
        ("message", "plain", "request", "ratio", "plain memory", "request memory", "ratio")
    ]
    with responding(broker, dict(os.environ)), echoing(broker):
        for size in (2**10, 2**16, MAX_TEXT):
            message = (b"0123456789abcdef" * (size // 16))[:size]
            pairs = [
                (
                    with_peak_memory(plain, message, message),
                    with_peak_memory(ours, message, message[::-1] + b"\n"),
                )
                for _ in range(3)
            ]
            theirs, mine = (
                [statistics.median(figures) for figures in zip(*runs, strict=True)]
                for runs in zip(*pairs, strict=True)
            )
            rows.append(
                (
                    f"{size // 1024} KiB",
                    *(milliseconds(theirs[0]), milliseconds(mine[0]), f"{mine[0] / theirs[0]:.2f}"),
                    *(f"{theirs[1]:.0f} MB", f"{mine[1]:.0f} MB", f"{mine[1] / theirs[1]:.2f}"),
                )
            )
    table("Large messages, there and back", rows)


def with_peak_memory(arguments: list[str], message: bytes, answer: bytes) -> tuple[float, float]:
    """Run a command; the result is its seconds, and MB at most in all its processes together."""
    start = time.perf_counter()
    with tempfile.TemporaryFile() as stdin, tempfile.TemporaryFile() as stdout:
        stdin.write(message)
        stdin.seek(0)
        with subprocess.Popen([sys.executable, *arguments], stdin=stdin, stdout=stdout) as process:
            peak, pause = 0.0, threading.Event()
            while process.poll() is None:
                peak = max(peak, sum(map(proportional, (process.pid, *children(process.pid)))))
                pause.wait(0.001)
        seconds = time.perf_counter() - start
        stdout.seek(0)
        assert stdout.read() == answer
    return seconds, peak


def children(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return [
            int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
        ]
    return []


def proportional(pid: int) -> float:
    """Return the memory of a process in MB, with its share of what several have in common (PSS)."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) / 1024
    return 0.0  # it has ended


def resident(pid: int) -> float:
    """Return the memory of a process in MB."""
    with contextlib.suppress(OSError):
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
    return 0.0  # it has ended


# --- the suites side by side -------------------------------------------------------------------

POW, GMPY2, X25519, HYBRID = "dh4096, pow", "dh4096, gmpy2", "x25519", "mlkem768x25519"
ECHO_OF_BYTES = "plain paho echo"
SIZES = {"64 B": 64, "1 KiB": 2**10, "1 MiB": 2**20}
FIGURES: dict[str, dict[str, dict[str, float]]] = {}  # by panel, group and kind, for --svg
TIMES, RATES = "seconds", "per second"


def note(panel: str, group: str, kind: str, figure: float) -> None:
    """Keep a figure to be drawn."""
    FIGURES.setdefault(panel, {}).setdefault(group, {})[kind] = figure


def measure_suites(broker: Mosquitto, folder: Path) -> None:
    """Compare what the suites compute, in this process, and the bytes that they send."""
    columns = {}
    with arithmetic_of_python():
        columns[POW] = suite_times("dh4096")
    if has_gmpy2():
        columns[GMPY2] = suite_times("dh4096")
    for kind in (X25519, HYBRID):
        columns[kind] = suite_times(kind)
    table("The suites, one step each", side_by_side(columns, microseconds))
    for kind, times in columns.items():
        for step in ("key pair", "agreement"):
            note(TIMES, step, kind, times[step])
        for size in SIZES:
            note(TIMES, f"seal + open\n{size}", kind, times[f"seal {size}"] + times[f"open {size}"])
    certificates = made(folder / "suites-certs", "responder", "bench")
    columns_of_bytes = {suite: wire_sizes(suite, certificates) for suite in SUITES}
    table("The suites, bytes of a payload", side_by_side(columns_of_bytes, "{:,}".format))


def side_by_side(
    columns: dict[str, dict[str, T]], cell: Callable[[T], str]
) -> list[tuple[str, ...]]:
    """Return the rows of a table of columns that have the same keys."""
    steps = next(iter(columns.values()))
    rows = [(step, *(cell(column[step]) for column in columns.values())) for step in steps]
    return [("", *columns), *rows]


def microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:,.1f} µs"


@contextlib.contextmanager
def arithmetic_of_python() -> Iterator[None]:
    """Let this process not find gmpy2."""
    loaded = sys.modules.pop("gmpy2", None)
    sys.modules["gmpy2"] = None  # type: ignore[assignment] # Python's way to say so
    try:
        yield
    finally:
        del sys.modules["gmpy2"]
        if loaded:
            sys.modules["gmpy2"] = loaded


def suite_times(suite: str) -> dict[str, float]:
    """Return the seconds of each step of a suite."""
    make, topic = SUITES[suite].client, REQUEST.format("bench", "uppercase")
    client = make()
    responder = SUITES[suite].responder(client.blocks)
    transcript = Transcript("bench", client.blocks, responder.blocks)
    ours, theirs = client.agree(transcript), responder.agree(transcript)
    times = {
        "key pair": median_time(lambda: make().blocks),
        "agreement": median_time(lambda: client.agree(transcript)),
        "both, of a responder": median_time(lambda: answer(suite, transcript)),
    }
    for name, size in SIZES.items():
        text = os.urandom(size)
        message = ours.seal(topic, 0, text)
        assert theirs.open(topic, message)[1] == text
        times[f"seal {name}"] = median_time(partial(ours.seal, topic, 0, text))
        times[f"open {name}"] = median_time(partial(theirs.open, topic, message))
    return times


def answer(suite: str, transcript: Transcript) -> None:
    """Do what a responder does for a key exchange, all in one."""
    SUITES[suite].responder(transcript.request).agree(transcript)


def median_time(action: Callable[[], object]) -> float:
    """Return the seconds that a short action takes."""
    timer = timeit.Timer(action)
    number = max(1, timer.autorange()[0] // 8)
    return statistics.median(timer.repeat(ROUNDS, number)) / number


def wire_sizes(suite: str, certificates: Path) -> dict[str, int]:
    """Return the sizes of a suite's payloads."""
    client = SUITES[suite].client()
    first = client.blocks
    second = SUITES[suite].responder(first).blocks
    asking, answering = (
        Identity(identity(certificates, name).read_bytes()) for name in ("bench", "responder")
    )
    signed = asking.sign(first, "bench")
    cipher = client.agree(Transcript("bench", first, second))
    return {
        "message 1": len(first),
        "message 1, signed with P-256": len(signed),
        "message 2": len(second),
        "message 2, signed with P-256": len(answering.sign(second, "bench", signed)),
        **{
            f"more than a text of {name}": len(cipher.seal("topic", 0, bytes(size))) - size
            for name, size in SIZES.items()
        },
    }


def identity(certificates: Path, name: str) -> Path:
    """Return the file for --identity of a name, made of those of generate-certs.sh."""
    file = certificates / f"{name}.pem"
    parts = [certificates / f"{name}.{end}" for end in ("crt", "key")]
    file.write_bytes(b"".join(part.read_bytes() for part in parts))
    return file


# --- exchanges alone ---------------------------------------------------------------------------

SIGNED = f"{HYBRID}, signed"  # and verified, by both ends
PER_RUN = {
    POW: 400,
    GMPY2: 1_000,
    X25519: 6_000,
    HYBRID: 5_000,
    SIGNED: 2_000,
    ECHO_OF_BYTES: 12_000,
}
SKIPPED = 100  # answers before the measurement begins: then a stock of key pairs is used up


class ExchangeLoad(BareClient):
    """A client that publishes message 1 on many topics, and takes the responses."""

    WINDOW = 32  # publications without a response at a time

    def __init__(self, port: int, name: str, messages: Iterator[tuple[str, bytes]]) -> None:
        """Connect.

        :param messages: each a NetID, or what stands in its place, and a payload
        """
        first = next(messages)
        everybody = "/".join([*first[0].split("/")[:-1], "+"])
        super().__init__(port, f"load-{name}", RESPONSE.format(everybody, KEY_EXCHANGE))
        self._messages = itertools.chain([first], messages)

    def run(self, count: int) -> tuple[float, list[bytes]]:
        """Return the responses to so many publications, after the rate per second."""
        messages = deque(itertools.islice(self._messages, count))  # to make them may take time
        responses: list[bytes] = []
        began_with, began = 0, 0.0
        while len(responses) < count:
            while messages and count - len(messages) < len(responses) + self.WINDOW:
                netid, payload = messages.popleft()
                self.publish(REQUEST.format(netid, KEY_EXCHANGE), payload)
            responses += [payload for _, payload in self.receive()]
            if not began and len(responses) >= SKIPPED:
                began_with, began = len(responses), time.perf_counter()
        rate = (count - began_with) / (time.perf_counter() - began)
        return rate, responses


def by_everybody(prefix: str, payload: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield one payload for ever, each time by another."""
    return ((f"{prefix}{number}", payload) for number in itertools.count())


def by_signers(certificates: Path) -> Iterator[tuple[str, bytes]]:
    """Yield messages with new keys of some signers, one after the other, again and again."""
    names = [f"signer{number}" for number in range(ExchangeLoad.WINDOW)]
    for name in names:
        issue(certificates, name, names=(name,))
    signers = [Identity(identity(certificates, name).read_bytes()) for name in names]
    for name, signer in itertools.cycle(zip(names, signers, strict=True)):
        yield name, signer.sign(SUITES[HYBRID].client().blocks, name)


def measure_exchanges(broker: Mosquitto, folder: Path) -> None:
    """Compare a responder's exchanges with a plain echo of as many bytes, at the same broker."""
    rows: list[tuple[str, ...]] = [
        ("suite", "exchanges", "plain echo", "ratio", "per CPU second", "plain echo", "ratio")
    ]
    lab_key = by_everybody("lab", crypto.DhKeyPair(2).public_key)
    for name, env in environments(folder):
        rows.append(exchange_row(broker, f"dh4096, {name}", lab_key, env))
    for suite in (X25519, HYBRID):
        asking = by_everybody(suite, SUITES[suite].client().blocks)
        rows.append(exchange_row(broker, suite, asking, dict(os.environ)))
    certificates = made(folder / "exchange-certs", "responder")
    options = [
        f"--identity={identity(certificates, 'responder')}",
        f"--peer-ca={certificates}/ca.crt",
    ]
    signed = by_signers(certificates)
    rows.append(exchange_row(broker, SIGNED, signed, dict(os.environ), *options))
    table("Exchanges alone, per second, and per second of CPU time", rows)


def exchange_row(
    broker: Mosquitto,
    kind: str,
    messages: Iterator[tuple[str, bytes]],
    env: dict[str, str],
    *options: str,
) -> tuple[str, ...]:
    """Measure the exchanges of one kind in turn with echoes."""
    ours, theirs = [], []
    _, payload = next(messages)
    kind_of_answer = suite_and_labels(SUITES[kind.partition(",")[0]].responder(payload).blocks)
    with responding(broker, env, *options) as responder, echoing(broker) as echo:
        exchanges = ExchangeLoad(broker.port, kind.replace(", ", "-"), messages)
        echoes = ExchangeLoad(broker.port, PLAIN, by_everybody(PLAIN, payload))
        for load in (exchanges, echoes):
            load.run(2 * SKIPPED)  # the warm-up
        for _ in range(5):
            rates, keys = exchange_rates(exchanges, PER_RUN[kind], responder.process.pid)
            assert {suite_and_labels(key) for key in keys} == {kind_of_answer}
            assert len({*keys}) == len(keys), "a key pair was used twice"
            ours.append(rates)
            rates, answers = exchange_rates(echoes, PER_RUN[ECHO_OF_BYTES], echo)
            assert {*answers} == {payload}
            theirs.append(rates)
        exchanges.close()
        echoes.close()
        assert len(responder.lines) == 1, responder.lines  # nothing was wrong
    pairs = list(zip(zip(*ours, strict=True), zip(*theirs, strict=True), strict=True))
    if kind in COLOURS:
        for who, column in zip((kind, ECHO_OF_BYTES), pairs[0], strict=True):
            note(RATES, "exchanges", who, statistics.median(column))
    return (kind, *(cell for pair in pairs for cell in compared(*pair)))


def suite_and_labels(payload: bytes) -> tuple[str, ...]:
    """Return what the keys in a payload look like."""
    return suite_of(payload).name, *(label.decode() for label, _ in key_blocks(payload))


def exchange_rates(
    load: ExchangeLoad, count: int, pid: int
) -> tuple[tuple[float, float], list[bytes]]:
    """Return exchanges per second, and per second of a process's CPU time, and the responses."""
    settle(pid)
    before = cpu_seconds(pid)
    rate, responses = load.run(count)
    settle(pid)
    return (rate, count / (cpu_seconds(pid) - before)), responses


def compared(ours: Sequence[float], theirs: Sequence[float]) -> tuple[str, str, str]:
    """Return the medians of two columns of rates, and of their ratios, for a table."""
    rate, reference = (f"{statistics.median(column):,.0f}/s" for column in (ours, theirs))
    return rate, reference, f"{median_ratio(ours, theirs):.2f}"


def settle(pid: int) -> None:
    """Wait until a process and those that it has started have nothing left to do."""
    before, now, pause = -1.0, cpu_seconds(pid), threading.Event()
    while now > before:
        pause.wait(0.1)
        before, now = now, cpu_seconds(pid)


def cpu_seconds(pid: int) -> float:
    """Return the CPU time that a process and those that it has started have taken."""
    ticks = 0
    for each in (pid, *processes_below(pid)):
        fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # in user and in system mode
    return ticks / os.sysconf("SC_CLK_TCK")


# --- sessions of many lines --------------------------------------------------------------------

PLAIN_SESSION = """
import socket, sys, threading, time, paho.mqtt.client as mqtt
port, size, count, window = map(int, sys.argv[1:])
payload, sent, times, done = bytes(size), window, [], threading.Event()
def quick(c):
    c.socket().setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    c.socket().setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
def on_message(c, _, message):
    global sent
    times.append(time.perf_counter())
    if sent < count:
        sent += 1
        c.publish("plain/echo/session/request", payload, 1)
    elif len(times) == count:
        done.set()
client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
client.max_inflight_messages_set(0)
client.on_message = on_message
client.on_publish = lambda c, *_: quick(c)
client.on_subscribe = lambda c, *_: [
    c.publish("plain/echo/session/request", payload, 1) for _ in range(window)
]
client.on_connect = lambda c, *_: c.subscribe("plain/echo/session/response", 1)
client.connect("localhost", port)
client.loop_start()
done.wait()
client.disconnect()
client.loop_stop()
print((count - 1) / (times[-1] - times[0]))
"""
SESSION_LINES = {
    X25519: 20_000,
    f"{X25519}, --rekey 1": 20_000,
    HYBRID: 20_000,
    f"{HYBRID}, --rekey 1": 20_000,
    "dh4096": 2_000,
}


def measure_lines(broker: Mosquitto, folder: Path) -> None:
    """Compare whole sessions with a plain echo of as many bytes: first to last answer of each."""
    rates: dict[str, list[float]] = {}
    text = b"Networking is the best! %06d"
    lines = [text % number for number in range(max(SESSION_LINES.values()))]
    size = len(lines[0]) + COUNTER_SIZE + TAG_SIZE
    token = crypto.token_size(len(lines[0]))
    with responding(broker, dict(os.environ)), echoing(broker):
        for _ in range(5):
            for name, count in SESSION_LINES.items():
                options = ["--suite", *name.replace(",", "").split()]
                rate = lines_per_second(broker.port, options, lines[:count])
                rates.setdefault(name, []).append(rate)
            for name, numbers in {
                "echo": (size, 20_000, NUMBERED.window),
                "echo, one by one": (token, 2_000, 1),
            }.items():
                rates.setdefault(name, []).append(echoes_per_second(broker.port, *numbers))
    rows: list[tuple[str, ...]] = [("", "rate", "of", "rate", "ratio")]
    for name, of in (
        (X25519, "echo"),
        (f"{X25519}, --rekey 1", "echo"),
        (f"{X25519}, --rekey 1", X25519),
        (HYBRID, "echo"),
        (HYBRID, X25519),
        (f"{HYBRID}, --rekey 1", HYBRID),
        ("dh4096", "echo, one by one"),
        ("dh4096", "echo"),
    ):
        ours, theirs, ratio = compared(rates[name], rates[of])
        rows.append((f"--lines, {name}", ours, of, theirs, ratio))
    table("Lines of one session, per second", rows)
    kinds = {X25519: X25519, HYBRID: HYBRID, ECHO_OF_BYTES: "echo"}
    kinds[GMPY2 if has_gmpy2() else POW] = "dh4096"
    for kind, name in kinds.items():
        note(RATES, "lines of\none session", kind, statistics.median(rates[name]))


def lines_per_second(port: int, options: list[str], lines: list[bytes]) -> float:
    """Let the program send lines from a file, and return the rate from first to last answer."""
    command = [str(PROGRAM), "-p", str(port), *options, "--lines", "session", "uppercase", "-"]
    with tempfile.TemporaryFile() as stdin:
        stdin.writelines(line + b"\n" for line in lines)
        stdin.seek(0)
        process = subprocess.Popen([sys.executable, *command], stdin=stdin, stdout=subprocess.PIPE)
        with killed_in_the_end(process) as stdout:
            output = stdout.read1()
            start = end = time.perf_counter()
            before = output.count(b"\n")
            while data := stdout.read1():
                end = time.perf_counter()
                output += data
    assert output.splitlines() == [line.upper() for line in lines]
    return (len(lines) - before) / (end - start)


@contextlib.contextmanager
def killed_in_the_end(process: subprocess.Popen[bytes]) -> Iterator[io.BufferedReader]:
    """Let a process run as long as the block, which gets its output, but not for ever."""
    timer = threading.Timer(SAFETY, process.kill)
    timer.start()
    with process:
        try:
            yield cast("io.BufferedReader", process.stdout)
        finally:
            process.kill()
            timer.cancel()


def echoes_per_second(port: int, size: int, count: int, window: int) -> float:
    """Let a plain paho client, in a process of its own, do the same at an echo."""
    arguments = map(str, (port, size, count, window))
    command = [sys.executable, "-c", PLAIN_SESSION, *arguments]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, timeout=SAFETY)
    return float(result.stdout)


# --- signed requests ---------------------------------------------------------------------------


def measure_signed(broker: Mosquitto, folder: Path) -> None:
    """Compare whole requests, unsigned, and signed and verified by both ends, with the floor."""
    certificates = made(folder / "signed-certs", "responder", "signed")
    authority = f"--peer-ca={certificates}/ca.crt"
    signing = {
        name: [f"--identity={identity(certificates, name)}", authority]
        for name in ("responder", "signed")
    }
    request = [str(PROGRAM), "-p", str(broker.port)]
    words = ["uppercase", TEXT.decode()]
    plain = without_gmpy2(folder / "plain")
    commands = {
        "the import floor": ["-c", FLOOR],
        "the floor with x509": ["-c", f"{FLOOR}, cryptography.x509.verification"],
        "dh4096, pow": [*request, "unsigned", *words],
        "dh4096, pow, signed": [*request, *signing["signed"], "signed", *words],
    }
    for suite in (X25519, HYBRID):
        own = [*request, f"--suite={suite}"]
        commands[suite] = [*own, "unsigned", *words]
        commands[f"{suite}, signed"] = [*own, *signing["signed"], "signed", *words]
    with (
        responding(broker, plain, "unsigned"),
        responding(broker, plain, "signed", *signing["responder"]),
    ):
        for arguments in list(commands.values())[2:]:
            subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
        times = times_in_turn(commands, plain)
    floor, with_x509 = times["the import floor"], times["the floor with x509"]
    rows: list[tuple[str, ...]] = [("request", "median", "ratio to the floor", "without x509")]
    for name, seconds in times.items():
        without = [a - b + c for a, b, c in zip(seconds, with_x509, floor, strict=True)]
        apart = f"{median_ratio(without, floor):.2f}" if "signed" in name else ""
        ratio = f"{median_ratio(seconds, floor):.2f}"
        rows.append((name, milliseconds(statistics.median(seconds)), ratio, apart))
    table("A signed request, a fresh process each", rows)


# --- TLS ---------------------------------------------------------------------------------------


def measure_tls(broker: Mosquitto, folder: Path) -> None:
    """Compare requests over TLS with a plain one; the responder's connection is plain."""
    certificates = made(folder / "certs", "localhost", "bench")
    anonymous, mutual = free_port(), free_port()
    tls = "".join(
        f"listener {port} 127.0.0.1\nrequire_certificate {required}\n"
        f"cafile {certificates}/ca.crt\ncertfile {certificates}/localhost.crt\n"
        f"keyfile {certificates}/localhost.key\nallow_anonymous true\n"
        for port, required in ((anonymous, "false"), (mutual, "true"))
    )
    own_broker = Mosquitto(folder, tls)
    cafile = f"--cafile={certificates}/ca.crt"
    certificate = [f"--cert={certificates}/bench.crt", f"--key={certificates}/bench.key"]
    words = ["bench", "uppercase", TEXT.decode()]
    commands = {
        "the import floor": ["-c", FLOOR],
        "plain": [str(PROGRAM), f"-p{own_broker.port}", *words],
        "TLS": [str(PROGRAM), f"-p{anonymous}", cafile, *words],
        "mutual TLS": [str(PROGRAM), f"-p{mutual}", cafile, *certificate, *words],
        "TLS, --insecure": [str(PROGRAM), f"-p{anonymous}", "--insecure", *words],
    }
    rows: list[tuple[str, ...]] = [("request", "median", "ratio to the floor", "more than plain")]
    try:
        env = with_gmpy2(folder / "fast")
        with responding(own_broker, env):
            for arguments in list(commands.values())[1:]:
                command = [sys.executable, *arguments]
                subprocess.run(command, check=True, capture_output=True, env=env)
            times = times_in_turn(commands, env)
    finally:
        own_broker.kill()
    floor = times["the import floor"]
    for name, seconds in times.items():
        more = [a - b for a, b in zip(seconds, times["plain"], strict=True)]
        ratios = f"{median_ratio(seconds, floor):.2f}", f"{median_ratio(more, floor):.2f}"
        rows.append((name, milliseconds(statistics.median(seconds)), *ratios))
    table("A request over TLS, a fresh process each", rows)


def measure_reliability(broker: Mosquitto, folder: Path) -> None:
    """Send 500 requests one after another, each from a fresh process, and count what went wrong."""
    wrong = 0
    with responding(broker, dict(os.environ)):
        for number in range(500):
            result = run("-p", str(broker.port), "reliable", "reverse", f"request {number}")
            right = f"request {number}"[::-1].encode() + b"\n"
            wrong += (result.returncode, result.stdout, result.stderr) != (0, right, b"")
    table("Requests, a fresh process each", [("sent", "not perfect"), ("500", f"{wrong}")])


# --- the keeper of shared topics ---------------------------------------------------------------


class Joiners(BareClient):
    """Members that share one connection: each makes an exchange, and joins a topic to publish."""

    def __init__(self, port: int, suite: str, members: Sequence[Certified]) -> None:
        super().__init__(port, f"joiners-{suite}", "+/+/response")
        self.seconds: list[float] = []  # of each member, from key to answer
        self._suite, self.members = suite, members
        self._exchanges: dict[str, Exchange] = {}
        self._sessions: dict[str, SessionKey] = {}
        self._joined: Joined
        self._started: dict[str, float] = {}
        for member in self.members:
            self.prepare(member)

    def prepare(self, member: Certified) -> None:
        """Make what a member sends, ahead: it is not to be measured."""
        name, identity = member.name, member.identity
        authority = keeping.COURSE.authority
        self._exchanges[name] = Exchange(name, self._suite, identity, authority, KEEPER)
        self._sessions[name] = SessionKey(identity, TOPIC, name, KEEPER)

    def run(self, at_a_time: int) -> float:
        """Let all members join, so many at a time; returns the seconds that all took."""
        self.seconds.clear()
        waiting = deque(self.members)
        start = time.perf_counter()
        for _ in range(min(at_a_time, len(self.members))):
            self.begin(waiting.popleft())
        while len(self.seconds) < len(self.members):
            for _ in range(min(self.go_on(), len(waiting))):
                self.begin(waiting.popleft())
        return time.perf_counter() - start

    def begin(self, member: Certified) -> None:
        """Let a member ask for the keeper's key."""
        self._started[member.name] = time.perf_counter()
        asking = REQUEST.format(member.name, KEY_EXCHANGE)
        self.publish(asking, self._exchanges[member.name].request())

    def run_spread(self, seconds: float) -> float:
        """Let all members join, spread over some time; returns the seconds that all took."""
        self.seconds.clear()
        waiting = deque(enumerate(self.members))
        start = time.perf_counter()
        while len(self.seconds) < len(self.members):
            share = (time.perf_counter() - start) / seconds * len(self.members)
            while waiting and waiting[0][0] <= share:
                self.begin(waiting.popleft()[1])
            self.flush()
            if select.select([self._socket], [], [], 0.001)[0]:
                self.go_on()
        return time.perf_counter() - start

    def join_again(self) -> float:
        """Let all members ask for the key at once, in their exchanges; returns the seconds."""
        self.seconds.clear()
        start = time.perf_counter()
        for member in self.members:
            self._started[member.name] = time.perf_counter()
            self._join(member.name)
        while len(self.seconds) < len(self.members):
            self.go_on()
        return time.perf_counter() - start

    def _join(self, name: str) -> None:
        asking = REQUEST.format(name, ACTION)
        request = write_request("join", TOPIC, self._sessions[name].hello)
        self.publish(asking, self._exchanges[name].seal(asking, request))

    def go_on(self) -> int:
        """Take what comes; returns how many members have joined by that."""
        joined = 0
        for topic, payload in self.receive():
            name, action, _ = topic.decode().split("/")
            if name not in self._started:
                continue
            if action == KEY_EXCHANGE:
                self._exchanges[name].agree(payload)
                self._join(name)
            else:
                _, answer = self._exchanges[name].open(topic.decode(), payload)
                self._joined = read_answer("join", answer)
                self.seconds.append(time.perf_counter() - self._started.pop(name))
                joined += 1
        return joined

    def publish_each(self, data: bytes) -> None:
        """Let each member, all of whom have joined, introduce its session, and use it once."""
        epoch = Epoch(TOPIC, self._joined.epoch, self._joined.key)
        now = int(time.time() * 1000)
        for session in self._sessions.values():
            stream = Stream(epoch, session.session)
            self.publish(TOPIC, epoch.seal_hello(session.hello))
            self.publish(TOPIC, stream.seal(session.key, 0, now, data))
        self.flush()


def create_topic(port: int, members: Sequence[Certified]) -> None:
    """Let alice create the topic for these members."""
    peer = Peer(port, "alice/+/response")
    alice = keeping.Member(peer, "alice").agree()
    alice.ask("create", TOPIC, [member.name for member in members], 100)
    peer.close()


JOINING = 256  # members at a time


def measure_joins(broker: Mosquitto, folder: Path) -> None:
    """Measure how many members join a topic in a second of the keeper's processor time."""
    rows: list[tuple[str, ...]] = [
        ("suite", "1,500 members join", "per second of the keeper's processor time", "p50", "p99")
    ]
    for suite in ("x25519", "mlkem768x25519"):
        options = keeping.keeper_options(folder / f"keeper-{suite}", broker.port)
        with responding(broker, dict(os.environ), *options[1:]) as keeper:
            members = [keeping.COURSE.member(f"m{number}") for number in range(1500)]
            create_topic(broker.port, members)
            clients = Joiners(broker.port, suite, members)
            for name in "for the first time", "again, in new sessions":
                before = cpu_seconds(keeper.process.pid)
                clients.run(JOINING)
                taken = cpu_seconds(keeper.process.pid) - before
                rate = f"{len(members) / taken:.0f}/s"
                rows.append((suite, name, rate, *percentiles(clients.seconds)))
                for member in members:
                    clients.prepare(member)
            clients.close()
    table("Members that join a topic, exchange and verifications included", rows)


RENEWAL_TIME = 20.0  # seconds over which members spread what they ask at a renewal
OWNERS, TOPICS_EACH, MEMBERS_EACH = 100, 100, 10


def measure_renewals(broker: Mosquitto, folder: Path) -> None:
    """Let 10,000 members of a topic renew its key, and measure how long lab requests take then."""
    rows: list[tuple[str, ...]] = [
        ("10,000 members ask", "until all have the key", "p50", "p99", "slowest lab request")
    ]
    options = keeping.keeper_options(folder / "renewals", broker.port)
    members = [keeping.COURSE.member(f"m{number}") for number in range(9_999)]
    with responding(broker, dict(os.environ), *options[1:]):
        create_topic(broker.port, members)
        clients = Joiners(broker.port, HYBRID, members)
        for name, renew in (
            ("within 20 s, in a new exchange each", partial(clients.run_spread, RENEWAL_TIME)),
            ("at once, after a notice", clients.join_again),
        ):
            with lab_requests(broker.port, folder / "renewals") as lab:
                seconds = renew()
            figures = *percentiles(clients.seconds), milliseconds(max(lab))
            rows.append((name, f"{seconds:.1f} s", *figures))
        clients.close()
    table("A renewal of a topic's key", rows)


@contextlib.contextmanager
def lab_requests(port: int, folder: Path) -> Iterator[list[float]]:
    """Send lab requests one after another meanwhile; yield the seconds that each has taken."""
    (folder / "student.pem").write_bytes(keeping.private_pem(keeping.COURSE.member("student")))
    security = f"--identity={folder / 'student.pem'}", f"--peer-ca={folder / 'ca.pem'}"
    seconds: list[float] = []
    has_ended = threading.Event()

    def ask() -> None:
        while not has_ended.is_set() or not seconds:
            start = time.perf_counter()
            result = run("-p", str(port), *security, "student", "uppercase", TEXT.decode())
            assert result.stdout == TEXT.upper() + b"\n", result.stderr
            seconds.append(time.perf_counter() - start)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield seconds
    finally:
        has_ended.set()
        thread.join()


def measure_topics_memory(broker: Mosquitto, folder: Path) -> None:
    """Measure what 10,000 topics of 10 members cost a keeper."""
    rows: list[tuple[str, ...]] = [("keeper", "all its processes", "more than at the start")]
    options = keeping.keeper_options(folder / "memory", broker.port)[1:]
    with responding(broker, dict(os.environ), *options) as keeper:
        create_topics(broker.port, 1, 1)
        start = memory_of_all(keeper.process.pid)
        rows.append(("at its start", f"{start:.1f} MB", ""))
        create_topics(broker.port, OWNERS, TOPICS_EACH - 1)
        now = memory_of_all(keeper.process.pid)
        rows.append(("with 9,901 topics", f"{now:.1f} MB", f"{now - start:.1f} MB"))
    with responding(broker, dict(os.environ), *options) as keeper:
        now = memory_of_all(keeper.process.pid)
        rows.append(("started again", f"{now:.1f} MB", f"{now - start:.1f} MB"))
    table("Memory of a keeper", rows)


def create_topics(port: int, owners: int, count: int) -> None:
    """Let NetIDs create so many topics each."""
    for owner in range(owners):
        peer = Peer(port, f"o{owner}/+/response")
        member = keeping.Member(peer, f"o{owner}").agree()
        for number in range(count):
            names = [f"m{owner}-{number}-{each}" for each in range(MEMBERS_EACH - 1)]
            member.send("create", f"shared/{owner}/{number}-of-{count}", names, 100)
        for _ in range(count):
            member.answer("create")
        peer.close()


def memory_of_all(pid: int) -> float:
    """Return the memory of a process and those below it, in MB."""
    return sum(map(proportional, (pid, *processes_below(pid))))


# --- topics: messages --------------------------------------------------------------------------


BY_PAHO, MEMBERS, KEPT = "plain paho", "members", "members, with a history"
MESSAGES = 6000
END_TO_END = "end to end"


def measure_topics(broker: Mosquitto, folder: Path) -> None:
    """Compare messages of members with the same through plain paho, in turn."""
    lines = topics_load.records(MESSAGES)
    with sharing.club(folder / "topics", broker) as club:
        club.do("alice", "create", TOPIC, "bob", "--history", "0")
        club.do("alice", "create", "kept", "bob", "--history", "100000")
        traffic = {
            BY_PAHO: topics_load.Traffic(club, "plain/topic", is_plain=True),
            MEMBERS: topics_load.Traffic(club, TOPIC, is_plain=False),
            KEPT: topics_load.Traffic(club, "kept", is_plain=False),
        }
        measure_rates(traffic, lines)
        measure_latencies(traffic, lines)
        measure_one_shots(club)
    print(f"\nA message has {OVERHEAD} bytes beside its data, of about {len(lines[0])}.")


def measure_rates(traffic: dict[str, topics_load.Traffic], lines: list[bytes]) -> None:
    """Measure processor time and rates, from one publisher to some subscribers."""
    starts = {name: each.run(lines[: topics_load.FEW], 1) for name, each in traffic.items()}
    rows = [("to so many subscribers", *(f"{name}, {end}" for name in traffic for end in ENDS))]
    used: dict[str, topics_load.Run] = {}
    for count in (1, 3, 10):
        runs = {name: each.run(lines, count) for name, each in traffic.items()}
        used = used or {name: run.less(starts[name]) for name, run in runs.items()}
        for name, each in runs.items():
            group = f"{count} subscriber{'s' if count > 1 else ''}"
            note(END_TO_END, group, name, len(lines) / each.received)
        spans = (span for each in runs.values() for span in (each.published, each.received))
        rows.append((f"{count}", *(f"{len(lines) / span:,.0f}/s" for span in spans)))
    table("Messages from one publisher, start included", rows)
    sealing, opening = topics_load.sealing_and_opening(lines[0])
    most = {"publishes": used[BY_PAHO].publisher, "subscribes": used[BY_PAHO].subscriber}
    ours = {"publishes": used[MEMBERS].publisher, "subscribes": used[MEMBERS].subscriber}
    alone = {"publishes": sealing, "subscribes": opening}
    rows = [("who", BY_PAHO, "signature and cipher alone", MEMBERS, "ratio to both")]
    for who, seconds in ours.items():
        mine, plain = seconds / len(lines), most[who] / len(lines)
        ratio = f"{mine / (plain + alone[who]):.2f}"
        rows.append((who, *map(microseconds, (plain, alone[who], mine)), ratio))
    table("Processor time for a message", rows)


ENDS = "published", "received"


def measure_latencies(traffic: dict[str, topics_load.Traffic], lines: list[bytes]) -> None:
    """Measure the time from a line that is written to the same one that is printed."""
    rows: list[tuple[str, ...]] = [("from line to line", "p50", "p99")]
    for name, each in traffic.items():
        seconds = each.latencies(lines[: topics_load.ROUND_TRIPS])
        rows.append((name, *percentiles(seconds)))
    table("Latency of a message", rows)


def measure_one_shots(club: sharing.Club) -> None:
    """Compare whole processes with the imports that a client can't do without."""
    club.do("alice", "create", "one-shot", "bob")
    club.do("alice", "publish", "one-shot", "x")
    publish = club.arguments("alice", "publish", "one-shot", TEXT)
    subscribe = club.arguments("bob", "subscribe", "one-shot", "-C", "1")
    commands = {
        "the import floor": ["-c", FLOOR],
        "publish": [str(PROGRAM), *map(os.fsdecode, publish)],
        "subscribe -C 1": [str(PROGRAM), *map(os.fsdecode, subscribe)],
    }
    table("One message, as a whole process", in_turn(commands, dict(os.environ)))


SENDERS = 1000


def measure_senders(broker: Mosquitto, folder: Path) -> None:
    """Measure what many senders, each in a session of its own, cost a subscriber."""
    names = [f"m{number}" for number in range(SENDERS)]
    with sharing.club(folder / "senders", broker) as club:
        club.do("alice", "create", TOPIC, "bob", *names, "--history", "0")
        subscriber = club.subscribe("bob", TOPIC)
        start = memory_of_all(subscriber.process.pid)
        clients = Joiners(broker.port, HYBRID, [*map(keeping.COURSE.member, names)])
        clients.run(JOINING)
        clients.publish_each(TEXT)
        subscriber.wait_for_lines(SENDERS)
        now = memory_of_all(subscriber.process.pid)
        clients.close()
    rows: list[tuple[str, ...]] = [("subscriber", "memory", "more than with none")]
    rows.append(("of nobody's messages", f"{start:.1f} MB", ""))
    rows.append((f"of {SENDERS:,} senders'", f"{now:.1f} MB", f"{now - start:.1f} MB"))
    table("Memory of a subscriber", rows)


PARTS = {
    "start": measure_start,
    "timeline": measure_timeline,
    "reliability": measure_reliability,
    "load": measure_load,
    "memory": measure_memory,
    "requests": measure_requests,
    "sizes": measure_sizes,
    "tls": measure_tls,
    "suites": measure_suites,
    "exchanges": measure_exchanges,
    "lines": measure_lines,
    "signed": measure_signed,
    "topics": measure_topics,
    "topics-senders": measure_senders,
    "topics-joins": measure_joins,
    "topics-renewals": measure_renewals,
    "topics-memory": measure_topics_memory,
}
DRAWN_PARTS = ("suites", "exchanges", "lines")


# --- the picture -------------------------------------------------------------------------------

COLOURS = {
    POW: "#9a3412",
    GMPY2: "#f59e0b",
    X25519: "#2563eb",
    HYBRID: "#0d9488",
    ECHO_OF_BYTES: "#94a3b8",
}


def draw(file: Path) -> None:
    """Draw the figures as an SVG picture."""
    import matplotlib

    matplotlib.use("svg")
    # Text as text; the same picture of the same figures.
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "suites", "font.size": 10})
    from matplotlib import patches, pyplot

    groups = [len(FIGURES[panel]) for panel in (TIMES, RATES)]
    figure, axes = pyplot.subplots(
        1, 2, figsize=(11, 4.6), width_ratios=groups, layout="constrained"
    )
    draw_panel(axes[0], TIMES, "time of one step (shorter is better)", duration)
    draw_panel(axes[1], RATES, "rate (longer is better)", "{:,.0f}/s".format)
    handles = [patches.Patch(color=colour) for colour in COLOURS.values()]
    figure.legend(handles, list(COLOURS), loc="outside upper center", ncols=5, frameon=False)
    title = "The suites dh4096, x25519 and mlkem768x25519: time of each step, and rates"
    figure.savefig(file, format="svg", facecolor="white", metadata={"Title": title, "Date": None})


def draw_topics(file: Path) -> None:
    """Draw the rates of messages as an SVG picture."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "topics", "font.size": 10})
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 3.6), layout="constrained")
    colours = {BY_PAHO: "#94a3b8", MEMBERS: "#0d9488", KEPT: "#2563eb"}
    for number, (name, colour) in enumerate(colours.items()):
        rates = [figures[name] for figures in FIGURES[END_TO_END].values()]
        places = [place + (number - 1) * 0.27 for place in range(len(rates))]
        bars = axes.bar(places, rates, 0.25, color=colour, label=name)
        axes.bar_label(bars, [f"{rate:,.0f}/s" for rate in rates], padding=3, fontsize=8)
    axes.set_xticks(range(len(FIGURES[END_TO_END])), list(FIGURES[END_TO_END]))
    axes.set_title("messages from one publisher that all subscribers have", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    title = "Messages a second, end to end, of members and of plain paho"
    figure.savefig(file, format="svg", facecolor="white", metadata={"Title": title, "Date": None})


def draw_panel(axes: Any, panel: str, title: str, label: Callable[[float], str]) -> None:
    """Draw groups of bars on a logarithmic axis, each bar with its figure."""
    width = 0.8 / len(COLOURS) if panel == RATES else 0.8 / (len(COLOURS) - 1)
    for place, figures in enumerate(FIGURES[panel].values()):
        kinds = [kind for kind in COLOURS if kind in figures]
        for number, kind in enumerate(kinds):
            at = place + (number - (len(kinds) - 1) / 2) * width
            bar = axes.bar(at, figures[kind], 0.92 * width, color=COLOURS[kind])
            axes.bar_label(bar, [label(figures[kind])], rotation=90, padding=3, fontsize=8)
    axes.set_title(title, fontsize=10)
    axes.set_yscale("log")
    axes.set_xticks(range(len(FIGURES[panel])), list(FIGURES[panel]))
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(top=6 * max(max(figures.values()) for figures in FIGURES[panel].values()))
    axes.grid(axis="y", color="#e5e7eb")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_formatter(lambda value, _: label(value))


def duration(seconds: float) -> str:
    """Return seconds in a unit that suits them."""
    factor, unit = (1e6, "µs") if seconds < 1e-3 else (1e3, "ms") if seconds < 1 else (1, "s")
    return f"{seconds * factor:.3g} {unit}"


def main() -> None:
    """Measure some parts, or all."""
    parser = argparse.ArgumentParser(description="Measure the program.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw what was measured")
    arguments = parser.parse_args()
    parts = arguments.parts or list(PARTS)
    if unknown := {*parts} - {*PARTS}:
        parser.error(f"no part of the benchmark: {', '.join(sorted(unknown))}")
    if arguments.svg and not ({*DRAWN_PARTS} <= {*parts} or "topics" in parts):
        parser.error(f"--svg needs the parts {', '.join(DRAWN_PARTS)}, or the part topics")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.environ |= with_gmpy2(folder / "fast")  # for all that is started from here
        broker = Mosquitto(folder)
        try:
            for part, measure in PARTS.items():
                if part in parts:
                    measure(broker, folder)
        finally:
            broker.kill()
    if arguments.svg and {*DRAWN_PARTS} <= {*parts}:
        draw(arguments.svg)
    if arguments.svg and "topics" in parts:
        draw_topics(arguments.svg.with_name("topics.svg"))


if __name__ == "__main__":
    main()
