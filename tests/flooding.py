"""Floods a broker, as a process of its own: python flooding.py PORT SECONDS RATE < PACKETS

PACKETS are the bytes of PUBLISH packets, of one size each: they are sent again and again. It ends
by itself, and prints how many it has sent each second.
"""

from __future__ import annotations

import select
import socket
import sys
import time

from hostile import connect, length

INTERVAL = 0.01  # seconds between bursts


def split(data: bytes, count: int) -> list[bytes]:
    """Return the packets in bursts of so many."""
    packets, start = [], 0
    while start < len(data):
        size, shift, end = 0, 0, start + 1
        while True:
            size |= (data[end] & 127) << shift
            shift, end = shift + 7, end + 1
            if data[end - 1] < 128:
                break
        packets.append(data[start : end + size])
        start = end + size
    assert length(size) == data[end - len(length(size)) : end]
    whole = packets * (count // len(packets) + 1) if count > len(packets) else packets
    return [b"".join(whole[at : at + count]) for at in range(0, len(whole), count)]


def flood(port: int, seconds: float, rate: float) -> float:
    """Send what standard input holds, at a rate per second; return the rate that was reached."""
    count = max(1, round(rate * INTERVAL))
    bursts = split(sys.stdin.buffer.read(), count)
    with socket.create_connection(("127.0.0.1", port), 60) as sock:
        sock.sendall(connect(f"flood{port}"))
        assert sock.recv(4), "no CONNACK"
        print("floods", flush=True)
        start, sent = time.monotonic(), 0
        while time.monotonic() < start + seconds:
            sock.sendall(bursts[sent % len(bursts)])
            sent += 1
            if select.select([sock], [], [], 0)[0]:  # PUBACKs
                sock.recv(2**20)
            time.sleep(max(0, start + sent * count / rate - time.monotonic()))
        return sent * count / (time.monotonic() - start)


if __name__ == "__main__":
    print(flood(int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])))
