"""Measure the program, in one run: python tests/benchmark.py [PART ...]

Every figure is measured here and now. On a shared machine only the ratios mean something; each is
taken between commands that ran in turn. gmpy2 is switched off by a module of its name that fails.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import paho.mqtt.client as paho
from broker_side import made
from conftest import PROGRAM, ROOT, SAFETY, Mosquitto, ResponderProcess, free_port, run
from paho.mqtt.enums import CallbackAPIVersion

import crypto
import secure_mqtt_client as program

FLOOR = "import paho.mqtt.client, cryptography.fernet, cryptography.hazmat.primitives.kdf.hkdf"
ROUNDS = 21
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


def without_gmpy2(folder: Path) -> dict[str, str]:
    """Return an environment in which gmpy2 cannot be imported."""
    folder.mkdir(exist_ok=True)
    (folder / "gmpy2.py").write_text("raise ImportError")
    return {**os.environ, "PYTHONPATH": str(folder)}


# Python caches the bytecode of crypto.py, as on a user's machine, whatever this one is set to.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


# --- start: one request, as a whole process ----------------------------------------------------


def measure_start(broker: Mosquitto, folder: Path) -> None:
    """Compare whole commands with the import floor, which runs in turn with them."""
    port = str(broker.port)
    request = [str(PROGRAM), "-p", port, "bench", "uppercase", "Networking is the best!"]
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
        with responding(broker, dict(os.environ)):
            commands = {"the import floor": floor, "a request, gmpy2": request}
            rows += in_turn(commands, dict(os.environ))[1:]
    table("One command, a fresh process each", rows)
    with responding(broker, dict(os.environ)):
        table("Where the time of a request goes", list(stages(broker)))


@contextlib.contextmanager
def responding(broker: Mosquitto, env: dict[str, str]) -> Iterator[ResponderProcess]:
    """Run a responder at a broker."""
    responder = ResponderProcess("-p", str(broker.port), env=env)
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


def median_ratio(ours: list[float], theirs: list[float]) -> float:
    """Return the median of the ratios of pairs."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def stages(broker: Mosquitto) -> Iterator[tuple[str, ...]]:
    """Time the stages of requests inside this process, where nothing overlaps."""
    times: dict[str, list[float]] = {}

    def stage(name: str, action: Callable[[], T]) -> T:
        start = time.perf_counter()
        result = action()
        times.setdefault(name, []).append(time.perf_counter() - start)
        return result

    netid, action = "stages", "uppercase"
    topics = [program.RESPONSE.format(netid, name) for name in (program.KEY_EXCHANGE, action)]
    for _ in range(ROUNDS):
        stage(
            "imports (a process of its own)", lambda: subprocess.run([sys.executable, "-c", FLOOR])
        )
        exchange = stage("key pair", crypto.Exchange)
        mqtt = program.Connection(program.Broker("localhost", broker.port, netid), SAFETY)

        def connect(mqtt: program.Connection = mqtt) -> None:
            mqtt.__enter__()
            mqtt.wait_for("CONNACK")
            mqtt.subscribe(*topics)
            mqtt.wait_for("SUBACK")

        stage("connect and subscribe", connect)
        public_key = exchange.public_key()
        peer_key = stage(
            "exchange of public keys",
            lambda: mqtt.call(netid, program.KEY_EXCHANGE, public_key, bytes),  # noqa: B023
        )
        stage("derivation", lambda: exchange.agree(peer_key))  # noqa: B023
        token = exchange.encrypt(b"Networking is the best!")
        stage(
            "request and response",
            lambda: mqtt.call(netid, action, token, exchange.decrypt),  # noqa: B023
        )
        stage("disconnect", lambda: mqtt.__exit__(None))  # noqa: B023
    yield "stage", "median"
    for name, seconds in times.items():
        yield name, milliseconds(statistics.median(seconds))


# --- load: many clients ------------------------------------------------------------------------

TEXT = b"Networking is the best!"


class LoadClients:
    """Clients that share one connection: each session is an exchange and one request.

    Their private exponent is 2, so that a session costs them one squaring.
    """

    def __init__(self, port: int, prefix: str) -> None:
        self.seconds: list[float] = []  # of each session, from key to answer
        self.wrong = 0
        self._prefix = prefix
        self._key_pair = crypto.KeyPair(crypto.read_group(), 2)
        self._public_key = self._key_pair.public_key
        self._keys: dict[str, bytes] = {}
        self._started: dict[str, float] = {}
        self._left = 0
        self._count = 0
        self._done = threading.Event()
        self._client = connected(port, prefix, self._on_message, "+/+/response")

    def run(self, sessions: int, at_a_time: int) -> float:
        """Run sessions, so many at a time; returns the seconds that all took."""
        self.seconds.clear()
        self._done.clear()
        self._left = sessions
        start = time.perf_counter()
        for _ in range(min(at_a_time, sessions)):
            self._begin()
        assert self._done.wait(10 * SAFETY), f"{len(self._started)} answers were lost"
        return time.perf_counter() - start

    def stop(self) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def _begin(self) -> None:
        self._left -= 1
        self._count += 1
        netid = f"{self._prefix}{self._count}"
        self._started[netid] = time.perf_counter()
        self._client.publish(
            program.REQUEST.format(netid, program.KEY_EXCHANGE), self._public_key, 1
        )

    def _on_message(self, client: object, userdata: object, message: paho.MQTTMessage) -> None:
        netid, action, _ = message.topic.split("/")
        if netid not in self._started:
            return
        if action == program.KEY_EXCHANGE:
            key = self._keys[netid] = self._key_pair.agree(bytes(message.payload))
            token = crypto.encrypt(TEXT, key)
            self._client.publish(program.REQUEST.format(netid, "uppercase"), token, 1)
            return
        answer = crypto.decrypt(bytes(message.payload), self._keys.pop(netid))
        self.wrong += answer != TEXT.upper()
        self.seconds.append(time.perf_counter() - self._started.pop(netid))
        if self._left:
            self._begin()
        elif not self._started:
            self._done.set()


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
            for _ in range(3):
                bounds.append(exponentiations_per_second(env))
                sessions = int(4 * bounds[-1])
                rates.append(sessions / clients.run(sessions, 32))
            bound, rate = statistics.median(bounds), statistics.median(rates)
            ratio = f"{median_ratio(rates, bounds):.2f}"
            rows.append((name, f"{bound:.0f}/s", f"{rate:.0f}/s", ratio, f"{clients.wrong}"))
            for count in (1, 10, 50):
                clients.run(max(100, 6 * count), count)
                latencies.append((name, f"{count}", *percentiles(clients.seconds)))
            if name == "pow":
                measure_flood(broker, clients)
            clients.stop()
            assert responder.process.poll() is None
    table("Exchanges with one request each, per second", rows)
    table("From key to answer, while so many clients run", latencies)


def environments(folder: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield both arithmetics."""
    yield "pow", without_gmpy2(folder / "plain")
    if has_gmpy2():
        yield "gmpy2", dict(os.environ)


def exponentiations_per_second(env: dict[str, str]) -> float:
    """Return cores / (t_keypair + t_secret), both measured on an otherwise idle machine."""
    code = (
        "import crypto, statistics, time\n"
        "group, times = crypto.read_group(), []\n"
        "peer = crypto.KeyPair(group).public_value\n"
        "for _ in range(41):\n"
        "    start = time.perf_counter(); crypto.KeyPair(group).shared_secret(peer)\n"
        "    times.append(time.perf_counter() - start)\n"
        "print(statistics.median(times))"
    )
    output = subprocess.run([sys.executable, "-c", code], env=env, cwd=ROOT, stdout=subprocess.PIPE)
    return (os.cpu_count() or 1) / float(output.stdout)


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
    key = crypto.KeyPair(crypto.read_group(), 2).public_key

    def flood() -> None:
        client = connected(broker.port, "flood", lambda *_: None, "nothing")
        while not stop.is_set():
            client.publish(
                program.REQUEST.format("flood", program.KEY_EXCHANGE), key, 1
            ).wait_for_publish(SAFETY)
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
        clients.stop()
    table("Memory of the responder", rows)


# --- requests of one session, and large messages -----------------------------------------------

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
client.on_connect = lambda c, *_: c.subscribe("echo/+/request", 1)
client.connect("localhost", int(sys.argv[1]))
client.loop_forever()
"""


@contextlib.contextmanager
def echoing(broker: Mosquitto) -> Iterator[None]:
    """Run a plain paho echo on the topics of the NetID echo."""
    command = [sys.executable, "-c", ECHO, str(broker.port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        yield
        process.kill()


def answers_per_second(port: int, netid: str, payload: bytes, requests: int, window: int) -> float:
    """Send one payload again and again, so many at a time, and count the answers."""
    done = threading.Event()
    state = Counter(sent=window)
    topic = program.REQUEST.format(netid, "uppercase")

    def on_message(client: paho.Client, userdata: object, message: object) -> None:
        state["answered"] += 1
        if state["sent"] < requests:
            state["sent"] += 1
            client.publish(topic, payload, 1)
        elif state["answered"] == requests:
            done.set()

    client = connected(
        port, f"rate-{netid}", on_message, program.RESPONSE.format(netid, "uppercase")
    )
    start = time.perf_counter()
    for _ in range(window):
        client.publish(topic, payload, 1)
    assert done.wait(SAFETY), state
    seconds = time.perf_counter() - start
    client.disconnect()
    client.loop_stop()
    return requests / seconds


def agreed_key(port: int, netid: str) -> bytes:
    """Make an exchange with the responder and return the key."""
    exchange = crypto.KeyPair(crypto.read_group())
    with program.Connection(program.Broker("localhost", port, netid), SAFETY) as mqtt:
        mqtt.wait_for("CONNACK")
        mqtt.subscribe(program.RESPONSE.format(netid, program.KEY_EXCHANGE))
        mqtt.wait_for("SUBACK")
        return mqtt.call(netid, program.KEY_EXCHANGE, exchange.public_key, exchange.agree)


def measure_requests(broker: Mosquitto, folder: Path) -> None:
    """Compare the requests within one session with a plain echo of as many bytes."""
    rows: list[tuple[str, ...]] = [("at a time", "plain echo", "responder", "ratio")]
    with responding(broker, dict(os.environ)), echoing(broker):
        token = crypto.encrypt(TEXT, agreed_key(broker.port, "session"))
        for window in (1, 16):
            pairs = [
                (
                    answers_per_second(broker.port, "echo", token, 1500, window),
                    answers_per_second(broker.port, "session", token, 1500, window),
                )
                for _ in range(5)
            ]
            echo, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
            ratio = median_ratio([b for _, b in pairs], [a for a, _ in pairs])
            rows.append((f"{window}", f"{echo:.0f}/s", f"{ours:.0f}/s", f"{ratio:.2f}"))
    table("Requests under one key, per second", rows)


PLAIN_CLIENT = """
import sys, threading, paho.mqtt.client as mqtt
message, done, answers = sys.stdin.buffer.read(), threading.Event(), []
client = mqtt.Client(mqtt.CallbackAPIVersion.VERSION2)
client.on_message = lambda c, _, m: (answers.append(m.payload), done.set())
client.on_subscribe = lambda c, *_: c.publish("echo/plain/request", message, 1)
client.on_connect = lambda c, *_: c.subscribe("echo/plain/response", 1)
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
        for size in (2**10, 2**20, 2**24, 2**26):
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
                pause.wait(0.01)
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
    words = ["bench", "uppercase", "Networking is the best!"]
    commands = {
        "the import floor": ["-c", FLOOR],
        "plain": [str(PROGRAM), f"-p{own_broker.port}", *words],
        "TLS": [str(PROGRAM), f"-p{anonymous}", cafile, *words],
        "mutual TLS": [str(PROGRAM), f"-p{mutual}", cafile, *certificate, *words],
        "TLS, --insecure": [str(PROGRAM), f"-p{anonymous}", "--insecure", *words],
    }
    rows: list[tuple[str, ...]] = [("request", "median", "ratio to the floor", "more than plain")]
    try:
        with responding(own_broker, dict(os.environ)):
            for arguments in list(commands.values())[1:]:
                subprocess.run([sys.executable, *arguments], check=True, capture_output=True)
            times = times_in_turn(commands, dict(os.environ))
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


PARTS = {
    "start": measure_start,
    "reliability": measure_reliability,
    "load": measure_load,
    "memory": measure_memory,
    "requests": measure_requests,
    "sizes": measure_sizes,
    "tls": measure_tls,
}


def main(parts: list[str]) -> None:
    """Measure some parts, or all."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        broker = Mosquitto(folder)
        try:
            for part, measure in PARTS.items():
                if part in parts or not parts:
                    measure(broker, folder)
        finally:
            broker.kill()


if __name__ == "__main__":
    main(sys.argv[1:])
