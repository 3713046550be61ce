"""What the program does is done with brokers of other kinds as well, or it is known what is not."""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import NamedTuple

import pytest
import sharing
from broker_side import Client
from conftest import Mosquitto, ResponderProcess, Run, error_lines, run
from other_brokers import KINDS, Broker, is_installed, running

QUICK = "mosquitto", "amqtt"  # those that the other tests need anyway
STATUS, TOPIC = "status/responder", "sensors/kitchen"
PATIENCE = 10  # seconds, where some brokers are known to let one wait for ever


class Site:
    """A broker, and how to reach it."""

    def __init__(self, broker: Broker) -> None:
        self.broker = broker
        self.login = broker.kind.login
        self.where = "-h", "127.0.0.1", "-p", str(broker.port)

    def run(self, *arguments: str, stdin: bytes | None = None) -> Run:
        """Run the program to its end."""
        return run(*self.where, *arguments, stdin=stdin)

    @contextmanager
    def responder(self, *options: str) -> Iterator[ResponderProcess]:
        """Run a responder."""
        process = ResponderProcess(*self.where, *options)
        try:
            process.wait_for("ready")
            yield process
        finally:
            process.stop()

    def gets_answer(self, netid: str, *options: str) -> None:
        """Check that a request is answered."""
        result = self.run(*options, netid, "uppercase", f"hello {netid}")
        assert result.stdout.decode() == f"hello {netid}\n".upper(), error_lines(result)


# --- the central tests -------------------------------------------------------------------------


def one_request(site: Site) -> None:
    with site.responder():
        site.gets_answer("alice")


def lines(site: Site) -> None:
    text = "".join(f"line {number}\n" for number in range(500)).encode()
    with site.responder():
        result = site.run("--suite=x25519", "--lines", "alice", "uppercase", "-", stdin=text)
    assert result.stdout == text.upper(), error_lines(result)


def restart(site: Site) -> None:
    with site.responder() as responder:
        site.gets_answer("alice")
        site.broker.restart()
        responder.wait_for("ready", 2)
        site.gets_answer("alice")


def status(site: Site, pattern: str = STATUS) -> None:
    """Who watches sees a responder begin and be killed; who comes later is told at once."""
    with Client(site.broker.port, login=site.login) as early:
        early.subscribe(pattern)
        with site.responder("--status-topic", STATUS) as responder:
            wait_for_status(early, "online")
            responder.process.kill()
            wait_for_status(early, "offline")
    with Client(site.broker.port, login=site.login) as late:
        late.subscribe(pattern)
        wait_for_status(late, "offline")


def wait_for_status(client: Client, wanted: str) -> None:
    """Receive until a status comes."""
    with suppress(queue.Empty):
        while f'"{wanted}"' not in client.messages.get(timeout=PATIENCE)[1]:
            pass
        return
    raise AssertionError(f"no status {wanted} came")


def status_by_wildcard(site: Site) -> None:
    status(site, "status/#")


def one_mebibyte(site: Site) -> None:
    text = b"a" * 2**20
    with site.responder():
        result = site.run("alice", "uppercase", "-", stdin=text)
    assert result.stdout == text.upper() + b"\n", error_lines(result)


def several_netids(site: Site) -> None:
    with site.responder(), ThreadPoolExecutor() as pool:
        list(pool.map(site.gets_answer, ("alice", "bob", "carol")))


def one_netid(netid: str, *options: str) -> Callable[[Site], None]:
    """Return the test that requests of a NetID are answered."""

    def check(site: Site) -> None:
        with site.responder():
            site.gets_answer(netid, "-W", str(PATIENCE), *options)

    return check


def topics(site: Site) -> None:
    """Members share a topic, whose messages outlast the broker."""
    before, after = ([f"{when} {n}\n".encode() for n in range(100)] for when in ("before", "after"))
    with sharing.club(site.broker.folder / "club", site.broker) as club:
        club.do("alice", "create", TOPIC, "bob")
        bob = club.subscribe("bob", TOPIC)
        alice = club.start("alice", "--lines", "publish", TOPIC, "-")
        alice.write(b"".join(before))
        bob.wait_for_lines(len(before))
        site.broker.restart()
        alice.write(b"".join(after))
        # She is there until all has come: what is published while keeper and subscriber are away,
        # she sends again when the keeper is back.
        assert bob.wait_for_lines(len(before + after)) == before + after
        alice.end_input()
        assert alice.wait() == 0
        assert all("ing again" in note for note in alice.notes), alice.notes


# The columns of the table.
CHECKS: Mapping[str, Callable[[Site], None]] = {
    "request": one_request,
    "`--lines`": lines,
    "restart": restart,
    "status": status,
    "`status/#`": status_by_wildcard,
    "1 MiB": one_mebibyte,
    "NetIDs": several_netids,
    "topics": topics,
    "`.`": one_netid("a.b"),
    "`*`": one_netid("a*b"),
    "blank": one_netid("a b", "--id=plain"),
}


class Limit(NamedTuple):
    """What is known not to work with a kind of broker."""

    words: str  # on the page
    evidence: str  # what the program, the test or the broker says then


HINT = "some brokers do not pass on a NETID with a blank, . or *"
NATS_ID = Limit("no `.`, `*` or blank in a client ID", "client identifier not valid")
LIMITS: Mapping[tuple[str, str], Limit] = {
    ("RabbitMQ", "`status/#`"): Limit(
        "no retained message for who subscribes by wildcard", "no status offline came"
    ),
    ("RabbitMQ", "`.`"): Limit("no `.` in a topic", HINT),
    ("RabbitMQ", "`*`"): Limit("no `*` in a topic", HINT),
    ("NATS", "`.`"): NATS_ID,
    ("NATS", "`*`"): NATS_ID,
    ("NATS", "blank"): Limit("no blank in a topic", 'invalid topic "a b/key-exchange/response"'),
}


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=() if name in QUICK else pytest.mark.brokers) for name in KINDS
    ],
)
def name(request: pytest.FixtureRequest) -> str:
    """Yield each kind of broker."""
    return str(request.param)


@pytest.fixture(scope="module")
def site(name: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    if not is_installed(KINDS[name]):
        pytest.skip(f"{name} is not installed: docs/brokers.md says how to")
    with (
        running(name, tmp_path_factory.mktemp(name)) as broker,
        pytest.MonkeyPatch.context() as environment,
    ):
        variables = "MQTT_USERNAME", "MQTT_PASSWORD"
        for variable, value in zip(variables, broker.kind.login or (), strict=False):
            environment.setenv(variable, value)
        yield Site(broker)


@pytest.mark.parametrize("check", CHECKS)
def test_a_broker_is_good_for_it_or_shows_the_limit_that_is_known(
    name: str, site: Site, check: str
) -> None:
    limit = LIMITS.get((name, check))
    if limit is None:
        CHECKS[check](site)
        return
    with pytest.raises(AssertionError) as seen:
        CHECKS[check](site)
    assert limit.evidence in f"{seen.value}{site.broker.log()}"


@pytest.mark.parametrize(("netid", "is_unusual"), [("a.b", True), ("a*b", True), ("alice", False)])
def test_a_hint_tells_of_brokers_that_do_not_pass_a_netid_on(
    own_broker: Mosquitto, netid: str, is_unusual: bool
) -> None:
    where = "-h", "127.0.0.1", "-p", str(own_broker.port)
    result = run(*where, "-W", "1", netid, "uppercase", "hello")
    assert result.returncode == 1
    assert (HINT in error_lines(result)) == is_unusual
