"""What the tests attack with: MQTT 3.1.1 by hand, a hostile broker, a relay, a client of our own.

An MQTT library would refuse to do most of what a hostile broker does. So this one is written on
plain sockets: a packet is a byte of kind and flags, its length, its body (MQTT 3.1.1, chapter 2).
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from conftest import PROGRAM, ROOT, SAFETY, Run, error_lines, run
from hypothesis import strategies as st

import crypto

# --- packets -----------------------------------------------------------------------------------

CONNECT, CONNACK, PUBLISH, PUBACK, PUBREC, PUBREL, PUBCOMP = range(1, 8)
SUBSCRIBE, SUBACK, UNSUBSCRIBE, UNSUBACK, PINGREQ, PINGRESP, DISCONNECT = range(8, 15)
RETAIN, QOS_0, QOS_1, QOS_2, DUP = 1, 0, 2, 4, 8  # flags of a PUBLISH
REFUSED = 0x80  # a SUBACK's code
MAX_LENGTH = 268_435_455  # bytes of a packet's body


class Packet(NamedTuple):
    """A packet that was received."""

    kind: int
    flags: int
    body: bytes

    @property
    def raw(self) -> bytes:
        """The packet as it came."""
        return packet(self.kind, self.body, self.flags)

    @property
    def mid(self) -> bytes:
        """The packet identifier, two bytes."""
        start = 2 + len(self.topic.encode()) if self.kind == PUBLISH else 0
        return self.body[start : start + 2]

    @property
    def topic(self) -> str:
        """The topic of a PUBLISH."""
        (size,) = struct.unpack_from(">H", self.body)
        return self.body[2 : 2 + size].decode()

    @property
    def payload(self) -> bytes:
        """The payload of a PUBLISH."""
        return self.body[2 + len(self.topic.encode()) + (2 if self.flags & 6 else 0) :]

    @property
    def topics(self) -> list[str]:
        """The topics of a SUBSCRIBE."""
        topics, rest = [], self.body[2:]
        while rest:
            (size,) = struct.unpack_from(">H", rest)
            topics.append(rest[2 : 2 + size].decode())
            rest = rest[3 + size :]
        return topics


def length(size: int) -> bytes:
    """Encode a remaining length: seven bits a byte, lowest first."""
    size, digit = divmod(size, 128)
    return bytes([digit | 128]) + length(size) if size else bytes([digit])


def packet(kind: int, body: bytes = b"", flags: int = 0) -> bytes:
    """Encode a packet."""
    return bytes([kind << 4 | flags]) + length(len(body)) + body


def string(text: str | bytes) -> bytes:
    """Encode a string: its length in two bytes, then itself."""
    data = text.encode() if isinstance(text, str) else text
    return struct.pack(">H", len(data)) + data


def connect(client_id: str) -> bytes:
    """Encode a CONNECT with a clean session that never needs a sign of life."""
    return packet(CONNECT, string("MQTT") + b"\4\2\0\0" + string(client_id))


def connack(code: int = 0) -> bytes:
    """Encode a CONNACK."""
    return packet(CONNACK, bytes([0, code]))


def subscribe(*topics: str) -> bytes:
    """Encode a SUBSCRIBE at QoS 1."""
    return packet(SUBSCRIBE, b"\0\1" + b"".join(string(topic) + b"\1" for topic in topics), 2)


def publish(topic: str | bytes, payload: bytes, flags: int = QOS_1, mid: bytes = b"\0\7") -> bytes:
    """Encode a PUBLISH."""
    return packet(PUBLISH, string(topic) + (mid if flags & 6 else b"") + payload, flags)


class Wire:
    """A socket that packets go through."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(SAFETY)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket = sock

    def send(self, data: bytes) -> Wire:
        """Send bytes."""
        self._socket.sendall(data)
        return self

    def receive(self) -> Packet:
        """Return the next packet; OSError if the connection ends before."""
        first = self._read(1)[0]
        size, shift = 0, 0
        while True:
            digit = self._read(1)[0]
            size |= (digit & 127) << shift
            shift += 7
            if digit < 128:
                return Packet(first >> 4, first & 15, self._read(size))

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            part = self._socket.recv(min(size - len(data), 1 << 20))
            if not part:
                raise ConnectionError
            data += part
        return bytes(data)

    def end(self, reset: bool = False) -> None:
        """End the connection, also for a thread that is reading from it; or reset it."""
        with contextlib.suppress(OSError):  # it has ended already
            if reset:
                linger = struct.pack("ii", 1, 0)
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self._socket.close()
            else:
                self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the connection and free the socket."""
        self.end()
        self._socket.close()


def admit(wire: Wire) -> None:
    """Accept a connection, and grant the one topic that it subscribes to."""
    wire.receive()
    wire.send(connack())
    wire.send(packet(SUBACK, wire.receive().mid + b"\1"))


@contextlib.contextmanager
def listening(serve: Callable[[Wire], None]) -> Iterator[int]:
    """Accept connections and serve each in a thread, until the context ends; yields the port.

    A thread may raise OSError, as when the peer has gone; anything else fails the test.
    """
    wires: list[Wire] = []
    threads: list[threading.Thread] = []
    is_over = threading.Event()

    def accept() -> None:
        while True:
            wire = Wire(server.accept()[0])
            wires.append(wire)
            if is_over.is_set():
                return
            threads.append(in_thread(lambda wire=wire: serve(wire)))  # type: ignore[misc]

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        acceptor = in_thread(accept)
        try:
            yield port
        finally:
            is_over.set()
            socket.create_connection(("127.0.0.1", port)).close()  # wakes accept()
            acceptor.join(SAFETY)
            for wire in wires:
                wire.end()
            for thread in threads:
                thread.join(SAFETY)
            for wire in wires:
                wire.close()


def in_thread(target: Callable[[], object]) -> threading.Thread:
    """Run a function in a thread, which an OSError ends quietly."""

    def body() -> None:
        with contextlib.suppress(OSError):
            target()

    thread = threading.Thread(target=body, daemon=True)
    thread.start()
    return thread


# --- the hostile broker ------------------------------------------------------------------------


class Conversation:
    """A client's connection to the hostile broker, which is an honest responder as well.

    A stage of the connection is honest unless the script has a step of its own for it. A step
    calls methods here, all of which return the conversation so that they can be chained.
    """

    def __init__(self, wire: Wire, script: Script) -> None:
        self.wire = wire
        self.began = time.monotonic()
        self.packet = Packet(0, 0, b"")  # the last one that came
        self.topics: list[str] = []
        self.client_key = b""  # message 1 of the protocol, as it came
        self.token = b""  # message 3
        self.key_pair = crypto.DhKeyPair()
        self._script: Script = {**HONEST, **script}

    def serve(self) -> None:
        """Play the script until the client leaves."""
        self._do("accept")
        while True:
            self.packet = self.wire.receive()
            if self.packet.kind == CONNECT:
                self._do("connect")
            elif self.packet.kind == SUBSCRIBE:
                self.topics = self.packet.topics
                self._do("subscribe")
            elif self.packet.kind == PUBLISH:
                self._do("acknowledge")
                if "/key-exchange/" in self.packet.topic:
                    self.client_key = self.packet.payload
                    self._do("exchange")
                else:
                    self.token = self.packet.payload
                    self._do("request")
            elif self.packet.kind == PUBREC:
                self.send(packet(PUBREL, self.packet.mid, 2))
            elif self.packet.kind == DISCONNECT:
                self._do("disconnect")

    def _do(self, stage: str) -> None:
        self._script[stage](self)

    @cached_property
    def key(self) -> bytes:
        """The key of the exchange."""
        return self.key_pair.shared_key(self.client_key)

    @property
    def answer(self) -> bytes:
        """A token of the right answer."""
        return self.encrypt(ANSWER)

    def encrypt(self, text: str | bytes) -> bytes:
        """Return a token under the key of the exchange."""
        return crypto.encrypt(text, self.key)

    def send(self, *packets: bytes) -> Conversation:
        """Send any bytes."""
        self.wire.send(b"".join(packets))
        return self

    def grant(self, *codes: int) -> Conversation:
        """Send a SUBACK."""
        return self.send(packet(SUBACK, self.packet.mid + bytes(codes)))

    def acknowledge(self) -> Conversation:
        """Send a PUBACK."""
        return self.send(packet(PUBACK, self.packet.mid))

    def give_key(self, payload: bytes | None = None, flags: int = QOS_1) -> Conversation:
        """Answer the key exchange, by default with the right key."""
        payload = self.key_pair.public_key if payload is None else payload
        return self.send(publish(self.topics[0], payload, flags))

    def respond(self, payload: bytes | None = None, flags: int = QOS_1) -> Conversation:
        """Respond to the request, by default with the right answer."""
        return self.send(
            publish(self.topics[1], self.answer if payload is None else payload, flags)
        )

    def flood(self, *packets: bytes) -> Conversation:
        """Send the same packets again and again, as long as the client takes them."""
        data = b"".join(packets)
        while True:
            self.send(data * max(1, 65536 // len(data)))

    def trickle(self, *packets: bytes) -> Conversation:
        """Send the same packets every now and then, as long as the client takes them."""
        while True:
            self.send(*packets)
            threading.Event().wait(0.05)

    def close(self, reset: bool = False) -> Conversation:
        """Close the connection."""
        self.wire.end(reset)
        return self


Step = Callable[[Conversation], object]
Script = Mapping[str, Step]
HONEST: Script = {
    "accept": lambda c: c,
    "connect": lambda c: c.send(connack()),
    "subscribe": lambda c: c.grant(1, 1),
    "acknowledge": lambda c: c.acknowledge(),
    "exchange": lambda c: c.give_key(),
    "request": lambda c: c.respond(),
    "disconnect": lambda c: c.close(),
}
STAGES = ("accept", "connect", "subscribe", "exchange", "request")


@contextlib.contextmanager
def hostile_broker(script: Script) -> Iterator[tuple[int, list[Conversation]]]:
    """Run a broker that follows a script; yields its port and the conversations that it has."""
    conversations: list[Conversation] = []

    def serve(wire: Wire) -> None:
        conversations.append(Conversation(wire, script))
        try:
            conversations[-1].serve()
        finally:
            wire.end()

    with listening(serve) as port:
        yield port, conversations


# --- a relay -----------------------------------------------------------------------------------


class Link(NamedTuple):
    """A connection through the relay."""

    client: Wire
    broker: Wire

    def cut(self) -> None:
        """Cut both halves."""
        self.client.end()
        self.broker.end()


# Told of each packet on its way; sends it on, or something else, with the function given.
PassOn = Callable[[Link, Packet, Callable[[bytes], object]], object]


@contextlib.contextmanager
def relay(port: int, pass_on: PassOn) -> Iterator[int]:
    """Stand between clients and the broker on a port; yields the port to connect to instead."""

    def serve(client: Wire) -> None:
        broker = Wire(socket.create_connection(("127.0.0.1", port), SAFETY))
        link = Link(client, broker)

        def pump(source: Wire, target: Wire) -> None:
            try:
                while True:
                    pass_on(link, source.receive(), target.send)
            finally:
                link.cut()

        back = in_thread(lambda: pump(broker, client))
        try:
            pump(client, broker)
        finally:
            back.join(SAFETY)
            broker.close()

    with listening(serve) as relay_port:
        yield relay_port


def drip(link: Link, packet: Packet, send: Callable[[bytes], object]) -> None:
    """Pass on a packet byte by byte."""
    for byte in packet.raw:
        send(bytes([byte]))


def delay(link: Link, packet: Packet, send: Callable[[bytes], object]) -> None:
    """Pass on a packet after 300 ms."""
    threading.Event().wait(0.3)
    send(packet.raw)


# --- peers at a real broker --------------------------------------------------------------------


def next_message(wire: Wire) -> Packet:
    """Return the next PUBLISH that comes, acknowledged."""
    while (message := wire.receive()).kind != PUBLISH:
        pass
    wire.send(packet(PUBACK, message.mid))
    return message


class RawClient:
    """A client that sends what the program never would."""

    def __init__(self, port: int, client_id: str, *topics: str) -> None:
        self.wire = Wire(socket.create_connection(("127.0.0.1", port), SAFETY))
        for request in (connect(client_id), subscribe(*topics)):
            self.wire.send(request).receive()

    def __enter__(self) -> RawClient:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.wire.close()

    def publish(self, topic: str, payload: bytes, flags: int = QOS_1) -> None:
        """Publish at QoS 1."""
        self.wire.send(publish(topic, payload, flags))

    def next_message(self) -> Packet:
        """Return the next PUBLISH that comes."""
        return next_message(self.wire)


class LabClient(RawClient):
    """An honest client, in small steps between which something else can happen."""

    def __init__(self, port: int, netid: str, client_id: str = "") -> None:
        super().__init__(port, client_id or netid, f"{netid}/+/response")
        self._netid = netid
        self.key = b""

    def __enter__(self) -> LabClient:
        return self

    def ask(self, action: str, payload: bytes) -> bytes:
        """Publish a request and return the payload of the first response, which must be its."""
        self.publish(f"{self._netid}/{action}/request", payload)
        response = self.next_message()
        assert response.topic == f"{self._netid}/{action}/response"
        return response.payload

    def exchange(self) -> LabClient:
        """Agree upon a key."""
        key_pair = crypto.DhKeyPair()
        self.key = key_pair.shared_key(self.ask("key-exchange", key_pair.public_key))
        return self

    def request(self, action: str, text: str) -> str:
        """Send a request and return the answer."""
        return crypto.decrypt(self.ask(action, crypto.encrypt(text, self.key)), self.key).decode()


@contextlib.contextmanager
def lab_responder(
    port: int, netid: str = "+", seconds: float = 0
) -> Iterator[list[tuple[str, str]]]:
    """Answer requests for uppercase, as the lab's protocol says, until the context ends.

    :param seconds: that it takes for an exchange; it does one thing after the other
    :return: NetID and action of what came, in order
    """
    keys: dict[str, bytes] = {}
    came: list[tuple[str, str]] = []

    def answer(netid: str, action: str, payload: bytes) -> bytes:
        if action == "key-exchange":
            threading.Event().wait(seconds)
            key_pair = crypto.DhKeyPair()
            keys[netid] = key_pair.shared_key(payload)
            return key_pair.public_key
        return crypto.encrypt(crypto.decrypt(payload, keys[netid]).decode().upper(), keys[netid])

    def serve() -> None:
        while True:
            message = raw.next_message()
            netid, action, _ = message.topic.split("/")
            came.append((netid, action))
            with contextlib.suppress(crypto.TokenError):  # nobody gets an answer to that
                response = answer(netid, action, message.payload)
                raw.publish(f"{netid}/{action}/response", response)

    with RawClient(port, "lab-responder", f"{netid}/+/request") as raw:
        thread = in_thread(serve)
        yield came
        raw.wire.end()
        thread.join(SAFETY)


def impatient_program(folder: Path) -> Path:
    """Write a program that is ours, but for the seconds between its attempts to connect."""
    return changed_program(folder, "connection.FIRST_DELAY = connection.LAST_DELAY = 0.05\n")


def changed_program(folder: Path, change: str) -> Path:
    """Write a program that is ours, but for a change: lines of Python."""
    path = folder / "changed.py"
    path.write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "import crypto, secure_mqtt_client as program\n"
        f"from secure_mqtt import connection, exchange, session, streams, suites\n{change}"
        "if __name__ == '__main__':\n    os._exit(program.main())\n"
    )
    return path


# --- any bytes ---------------------------------------------------------------------------------


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes with a few places changed, cut or repeated."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(data)))
        end = draw(st.integers(start, min(len(data), start + 8)))
        data = data[:start] + draw(st.binary(max_size=8)) + data[end:]
    return data


# --- the client under attack -------------------------------------------------------------------

MESSAGE = "Attack at dawn"
ANSWER = "ATTACK AT DAWN"
EITHER = "either the right answer, or an error"
TIMEOUT = 2.0  # seconds: --timeout of the cases that last until it
LATENESS = 1.0  # seconds after its timeout when the program must have ended
START_UP = 15.0  # seconds to start a program on a busy machine, at most


class WrongWordsError(AssertionError):
    """The program failed as it should, but for another reason than the one expected."""


def patiently(attempt: Callable[[float], object]) -> None:
    """Try a case with the usual timeout, and with a longer one if the words are wrong.

    On a busy machine a client may reach its timeout before the attack reaches it.
    """
    try:
        attempt(TIMEOUT)
    except WrongWordsError:
        attempt(5 * TIMEOUT)


def attacked(
    port: int,
    *options: str,
    netid: str = "alice",
    timeout: float = TIMEOUT,
    program: Path = PROGRAM,
) -> Run:
    """Run the program as a client that asks for MESSAGE in upper case; check that it ends."""
    start = time.monotonic()
    where = ["-h", "127.0.0.1", "-p", str(port), "-W", str(timeout)]
    result = run(*where, *options, netid, "uppercase", MESSAGE, program=program)
    seconds = time.monotonic() - start
    assert seconds < timeout + LATENESS + START_UP, f"it took {seconds:.1f} s"
    return result


@contextlib.contextmanager
def process(command: list[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process whose output does not matter; it is ended with the context."""
    silent = subprocess.DEVNULL
    with subprocess.Popen(command, stdin=silent, stdout=silent, stderr=silent) as started:
        try:
            yield started
        finally:
            started.kill()


def memory(pid: int) -> int:
    """Return the resident memory of a process in bytes, 0 when it has ended (Linux)."""
    with contextlib.suppress(OSError, IndexError):
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    return 0


def check(result: Run, says: str) -> None:
    """Check a run: it printed the right answer and nothing else, or an error with these words.

    Words of an error are separated by "…".
    """
    errors = error_lines(result)
    outcome = f"status {result.returncode}, stdout {result.stdout!r}, stderr:\n{errors}"
    if says == ANSWER or (says == EITHER and result.returncode == 0):
        assert result.returncode == 0, outcome
        assert result.stdout == ANSWER.encode() + b"\n", outcome
        assert errors == "", outcome
        return
    assert result.returncode == 1, outcome
    assert result.stdout == b"", outcome
    lines = errors.splitlines()
    assert lines, outcome
    assert lines[0].startswith("secure_mqtt_client.py: error: "), outcome
    assert all(line.startswith("secure_mqtt_client.py: hint: ") for line in lines[1:]), outcome
    assert MESSAGE not in errors, outcome
    assert all(line.isprintable() for line in lines), f"an escape sequence? {outcome}"
    for words in says.split("…") if says != EITHER else ():
        if words not in errors:
            raise WrongWordsError(f"{words!r} expected, but: {outcome}")


def all_at_once(cases: Mapping[str, Callable[[], object]], at_once: int = 8) -> None:
    """Run cases, some at a time since most of them only wait; name all that fail."""

    def failure(name: str) -> str:
        try:
            cases[name]()
        except Exception as error:
            return f"{name}: {type(error).__name__}: {error}"
        return ""

    with ThreadPoolExecutor(at_once) as pool:
        failures = [text for text in pool.map(failure, cases) if text]
    assert not failures, "\n\n".join([f"{len(failures)} of {len(cases)} cases failed", *failures])
