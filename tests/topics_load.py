"""Traffic on a topic, to be measured: what a sensor sends, through members or plain paho."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
import timeit
from collections.abc import Iterator
from typing import NamedTuple

from conftest import PROGRAM
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from sharing import Club

FEW = 20  # messages of a run whose time is that of start and end
ROUND_TRIPS = 300  # messages whose latency is measured
GAP = 0.003  # seconds between these, in which all comes to rest

QUICK = """
import socket, sys, threading, paho.mqtt.client as paho
def quick(c, *_):
    c.socket().setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    c.socket().setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
c = paho.Client(paho.CallbackAPIVersion.VERSION2)
c.on_connect = quick
port, topic = int(sys.argv[1]), sys.argv[2]
"""
PLAIN_SUBSCRIBER = f"""{QUICK}
left = int(sys.argv[3])
def on_message(c, _, message):
    global left
    sys.stdout.buffer.write(message.payload + b"\\n")
    sys.stdout.buffer.flush()
    left -= 1
    if not left:
        c.disconnect()
c.on_message = on_message
c.on_subscribe = lambda *_: print("ready", file=sys.stderr, flush=True)
c.connect("127.0.0.1", port)
c.subscribe(topic, 1)
c.loop_forever()
"""
PLAIN_PUBLISHER = f"""{QUICK}
c.max_inflight_messages_set(0)
room = threading.Semaphore(1000)
def on_publish(c, *_):
    quick(c)
    room.release()
c.on_publish = on_publish
c.connect("127.0.0.1", port)
c.loop_start()
for line in sys.stdin.buffer:
    room.acquire()
    c.publish(topic, line[:-1], 1)
for _ in range(1000):
    room.acquire()
c.disconnect()
c.loop_stop()
"""


def records(count: int) -> list[bytes]:
    """Return what a sensor sends: objects in JSON of about 120 bytes, always the same."""
    chance = random.Random(12)
    return [
        json.dumps(
            {
                "sensor": f"kitchen/{chance.randrange(100):02}",
                "number": number,
                "temperature": round(chance.uniform(15, 30), 2),
                "humidity": round(chance.uniform(20, 80), 1),
                "battery": round(chance.uniform(2.8, 3.3), 3),
                "ok": True,
            }
        ).encode()
        for number in range(count)
    ]


class Run(NamedTuple):
    """What a run took."""

    publisher: float  # seconds of processor time
    subscriber: float  # likewise, of one of them
    published: float  # seconds until the broker had acknowledged all
    received: float  # seconds until all subscribers had all

    def less(self, other: Run) -> Run:
        """Return what it took beyond another run."""
        return Run(*(mine - its for mine, its in zip(self, other, strict=True)))


class Traffic:
    """Messages on a topic, from one publisher, to those who subscribe before."""

    def __init__(self, club: Club, topic: str, is_plain: bool) -> None:
        self._club, self._topic, self._is_plain = club, topic, is_plain

    def publisher(self) -> list[str]:
        """Return the command that publishes the lines of its input."""
        if self._is_plain:
            return [sys.executable, "-c", PLAIN_PUBLISHER, str(self._club.broker.port), self._topic]
        words = self._club.arguments("alice", "--lines", "publish", self._topic, "-")
        return [sys.executable, str(PROGRAM), *map(str, words)]

    @contextlib.contextmanager
    def subscriber(self, count: int) -> Iterator[subprocess.Popen[bytes]]:
        """Start a process that prints so many messages; it has subscribed."""
        options = "-C", str(count), "--history", "0"
        words = self._club.arguments("bob", "-v", "subscribe", self._topic, *options)
        command = [sys.executable, str(PROGRAM), *map(str, words)]
        mark = b"the answer to a question (join)"
        if self._is_plain:
            plain = [PLAIN_SUBSCRIBER, str(self._club.broker.port), self._topic, str(count)]
            command, mark = [sys.executable, "-c", *plain], b"ready"
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stderr
            assert any(mark in line for line in process.stderr)
            try:
                yield process
            finally:
                process.kill()

    def run(self, lines: list[bytes], subscribers: int) -> Run:
        """Let some lines go from one publisher to subscribers, whose output is a file."""
        source = self._club.folder / "lines"
        source.write_bytes(b"".join(line + b"\n" for line in lines))
        with contextlib.ExitStack() as stack:
            readers = [stack.enter_context(self.subscriber(len(lines))) for _ in range(subscribers)]
            drains = [
                stack.enter_context(
                    subprocess.Popen(["cat"], stdin=reader.stdout, stdout=subprocess.DEVNULL)
                )
                for reader in readers
            ]
            begin = time.perf_counter()
            with source.open("rb") as file:
                publisher = subprocess.Popen(self.publisher(), stdin=file)
            used = processor_seconds(publisher)
            published = time.perf_counter() - begin
            each = [processor_seconds(reader) for reader in readers]
            received = time.perf_counter() - begin
            for drain in drains:
                drain.wait()
        return Run(used, sum(each) / len(each), published, received)

    def latencies(self, lines: list[bytes]) -> list[float]:
        """Return the seconds from each line that is written to the same one that is printed."""
        seconds = []
        with (
            self.subscriber(len(lines)) as reader,
            subprocess.Popen(self.publisher(), stdin=subprocess.PIPE) as publisher,
        ):
            assert publisher.stdin
            assert reader.stdout
            for line in lines:
                begin = time.perf_counter()
                publisher.stdin.write(line + b"\n")
                publisher.stdin.flush()
                assert reader.stdout.readline() == line + b"\n"
                seconds.append(time.perf_counter() - begin)
                time.sleep(GAP)
            publisher.stdin.close()
            publisher.wait()
        return seconds[len(seconds) // 3 :]  # without the start


def processor_seconds(process: subprocess.Popen[bytes]) -> float:
    """Return the processor time of a process, which must end well."""
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    return usage.ru_utime + usage.ru_stime


def sealing_and_opening(record: bytes) -> tuple[float, float]:
    """Return the seconds that signature and cipher alone take for a record: made, and checked."""
    key, cipher, head, nonce = Ed25519PrivateKey.generate(), AESGCM(bytes(32)), bytes(45), bytes(12)
    public_key, signed = key.public_key(), record + bytes(130)
    signature = key.sign(signed)
    sealed = cipher.encrypt(nonce, bytes(8) + signature + record, head)

    def seal() -> None:
        cipher.encrypt(nonce, bytes(8) + key.sign(signed) + record, head)

    def open_it() -> None:
        cipher.decrypt(nonce, sealed, head)
        public_key.verify(signature, signed)

    times = [min(timeit.repeat(each, number=2000, repeat=3)) / 2000 for each in (seal, open_it)]
    return times[0], times[1]
