"""The keeper in its process, at a real broker."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Mosquitto, Peer, ResponderProcess, wait_until
from keeping import Member, keeper_options
from members import TOPIC

Start = Callable[..., ResponderProcess]
Connect = Callable[..., Peer]


class Site:
    """A broker with a keeper, and whoever talks to it."""

    def __init__(self, folder: Path, broker: Mosquitto, start: Start, connect: Connect) -> None:
        self.broker, self.folder = broker, folder
        self._start, self._connect = start, connect
        self.options = keeper_options(folder, broker.port)
        self.keeper: ResponderProcess

    def start(self, *options: str, **settings: bool) -> Site:
        """Start the keeper."""
        self.keeper = self._start(*self.options, *options, **settings)
        return self

    def member(self, name: str, *topics: str, suite: str = "x25519") -> Member:
        """Return a member, subscribed to topics, that has made an exchange."""
        peer = self._connect(self.broker.port, f"{name}/+/response", *topics)
        return Member(peer, name, suite).agree()


@pytest.fixture
def site(tmp_path: Path, own_broker: Mosquitto, start_responder: Start, peer: Connect) -> Site:
    """A broker, and all that a keeper needs."""
    return Site(tmp_path / "keeper", own_broker, start_responder, peer)


def has_kept(member: Member, payloads: list[bytes]) -> bool:
    """Tell whether these are the earlier messages."""
    return [message.payload for message in member.page().messages] == payloads


@pytest.mark.parametrize("suite", ["x25519", "mlkem768x25519"])
def test_members_share_a_topic_by_its_keeper(site: Site, suite: str) -> None:
    site.start()
    alice, bob = site.member("alice", suite=suite), site.member("bob", suite=suite)
    assert alice.ask("create", TOPIC, ["bob"], 100) == {}
    joined = alice.join()
    assert bob.join().key == joined.key
    payloads = [alice.publish(joined, b"%d" % number) for number in range(3)]
    wait_until(lambda: has_kept(bob, payloads))
