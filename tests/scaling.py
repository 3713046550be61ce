"""Measure what a keeper's work costs, and simulate how long its members wait: python scaling.py.

The costs are of a real keeper at a real mosquitto, in seconds of its processor time.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import sharing
from benchmark import cpu_seconds, settle, table
from conftest import Mosquitto, Peer, wait_until
from keeping import Member
from members import TOPIC

from secure_mqtt.topics.keys import MAX_SPREAD

MEMBERS, AT_A_TIME = 200, 32
MESSAGES, SIZE = 3000, 100  # SIZE in bytes
CROWDS = 1_000, 5_000, 10_000, 20_000, 50_000


def cost(keeper: int, count: int, work: Callable[[], object]) -> float:
    """Return the processor time that each of some pieces of work takes a keeper."""
    settle(keeper)
    before = cpu_seconds(keeper)
    work()
    settle(keeper)
    return (cpu_seconds(keeper) - before) / count


def costs(folder: Path, broker: Mosquitto) -> dict[str, float]:
    """Return the seconds that a join, a renewal and a message that is kept take a keeper."""
    names = [f"m{number}" for number in range(MEMBERS)]
    with (
        sharing.club(folder, broker) as club,
        ExitStack() as stack,
        ThreadPoolExecutor(AT_A_TIME) as pool,
    ):
        club.do("alice", "create", TOPIC, *names, "--history", str(MESSAGES))
        members = [connected(broker.port, name, stack) for name in names]
        keeper = club.keeper.process.pid
        return {
            "join, with its exchange": cost(
                keeper, MEMBERS, lambda: [*pool.map(lambda each: each.agree().join(), members)]
            ),
            "join alone": cost(keeper, MEMBERS, lambda: [*pool.map(Member.join, members)]),
            "message kept": cost(keeper, MESSAGES, lambda: publish(members[0])),
        }


def connected(port: int, name: str, stack: ExitStack) -> Member:
    """Return a member with a connection of its own, which the stack closes."""
    peer = Peer(port, f"{name}/key-exchange/response", f"{name}/topic/response")
    stack.callback(peer.close)
    return Member(peer, name, "mlkem768x25519")


def publish(member: Member) -> None:
    """Publish messages, until the keeper has them all."""
    joined = member.join()
    for _ in range(MESSAGES):
        member.publish(joined, bytes(SIZE))
    wait_until(lambda: member.join().number >= MESSAGES)


def longest_wait(crowd: int, seconds: float) -> float:
    """Simulate members that come at random within MAX_SPREAD, one after the other served.

    :param seconds: that each takes
    :return: from coming to being served, of who waits longest; in seconds
    """
    longest = free = 0.0
    for arrival in sorted(random.uniform(0, MAX_SPREAD) for _ in range(crowd)):
        free = max(free, arrival) + seconds
        longest = max(longest, free - arrival)
    return longest


def main() -> None:
    """Print both tables."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        broker = Mosquitto(folder)
        try:
            measured = costs(folder / "club", broker)
        finally:
            broker.kill()
    rows = [(what, f"{1000 * each:.2f} ms", f"{1 / each:,.0f}") for what, each in measured.items()]
    table("A keeper's processor time", [("", "each", "per second"), *rows])
    seconds = measured["join, with its exchange"]
    waits = [(f"{crowd:,}", f"{longest_wait(crowd, seconds):.1f} s") for crowd in CROWDS]
    table("Members whose keys end at once", [("members", "longest wait"), *waits])


if __name__ == "__main__":
    main()
