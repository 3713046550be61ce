"""--status-topic: who looks there learns whether the responder runs, however it ended."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import broker_side
import hostile
import pytest
from broker_side import BrokerSide, certificate_client, started
from conftest import (
    ROOT,
    SAFETY,
    Mosquitto,
    Peer,
    ResponderProcess,
    processes_below,
    run,
    wait_until,
)

import crypto
from secure_mqtt.counts import REFUSALS

Start = Callable[..., ResponderProcess]
Connect = Callable[..., Peer]
TOPIC = "status/responder"
OPTION = f"--status-topic={TOPIC}"
FILES = {"cafile": "ca.crt", "cert": "responder.crt", "key": "responder.key"}

certificates, running, own = broker_side.certificates, broker_side.running, broker_side.own
change_program = broker_side.change_program


def parse(payload: bytes | str) -> dict[str, object]:
    status = json.loads(payload)
    assert isinstance(status, dict)
    return status


def retained(peer: Connect, port: int) -> dict[str, object]:
    """Return what a client that comes now is told at once."""
    client = peer(port, TOPIC, "end")
    client.publish("end", b"")
    return parse(client.receive(TOPIC))


def first_status(peer: Connect, port: int) -> dict[str, object]:
    """Return the next status that a client is told which comes now, at once or later."""
    return parse(peer(port, TOPIC).receive(TOPIC))


def counts(status: dict[str, object]) -> tuple[object, ...]:
    """Check that a status says online; return its counts."""
    assert list(status)[:6] == [
        "status",
        "exchanges",
        "requests",
        "failures",
        "netids",
        "uptime_seconds",
    ]
    assert status["status"] == "online"
    assert isinstance(status["uptime_seconds"], int)
    assert status["uptime_seconds"] >= 0
    return tuple(status.values())[1:5]


def wait_for_status(peer: Peer, wanted: str) -> None:
    """Receive until a status comes."""
    while parse(peer.receive(TOPIC))["status"] != wanted:
        pass


def ask(broker: Mosquitto, netid: str) -> None:
    result = run(f"-p{broker.port}", netid, "reverse", "text")
    assert (result.stdout, result.returncode) == (b"txet\n", 0)


def test_a_responder_is_online_as_soon_as_it_is_ready(
    own_broker: Mosquitto, start_responder: Start, peer: Connect
) -> None:
    watcher = peer(own_broker.port, TOPIC)
    start_responder(f"-p{own_broker.port}", OPTION)
    assert counts(parse(watcher.receive(TOPIC))) == (0, 0, 0, 0)
    assert counts(retained(peer, own_broker.port)) == (0, 0, 0, 0)


def test_without_the_option_nothing_is_published(
    own_broker: Mosquitto, start_responder: Start, peer: Connect
) -> None:
    watcher = peer(own_broker.port, "#")
    responder = start_responder(f"-p{own_broker.port}")
    assert responder.stop() == 0
    peer(own_broker.port, "nothing").publish("last", b"")
    assert watcher.receive_any() == ("last", b"")


def test_the_counts_are_of_exchanges_requests_failures_and_netids(
    own_broker: Mosquitto, start_responder: Start, peer: Connect
) -> None:
    responder = start_responder(f"-p{own_broker.port}", OPTION)
    for netid in "alice", "bob", "alice":
        ask(own_broker, netid)
    peer(own_broker.port, "nothing").publish("carol/reverse/request", b"no token")
    responder.wait_for("event=ignored")
    own_broker.restart()  # hence it publishes its status again
    responder.wait_for("ready", times=2)
    assert counts(first_status(peer, own_broker.port)) == (3, 3, 1, 2)


def test_the_counts_are_also_of_suites_and_reasons(
    own_broker: Mosquitto, start_responder: Start, peer: Connect
) -> None:
    responder = start_responder(f"-p{own_broker.port}", OPTION)
    for suite in "x25519", "x25519", "mlkem768x25519":
        arguments = [f"-p{own_broker.port}", f"--suite={suite}", "alice", "reverse", "-"]
        assert run(*arguments, stdin=b"long text" * 2000).returncode == 0
    attacker = peer(own_broker.port, "nothing")
    for _ in range(3):
        attacker.publish("alice/none/request", b"")
    attacker.publish("alice/key-exchange/request", b"not signed")
    responder.wait_for("event=ignored", times=4)
    own_broker.restart()  # hence it publishes its status again
    responder.wait_for("ready", times=2)
    status = first_status(peer, own_broker.port)
    assert status["exchanges_by_suite"] == {"dh4096": 0, "x25519": 2, "mlkem768x25519": 1}
    assert status["requests_by_suite"] == status["exchanges_by_suite"]
    assert isinstance(status["refused"], dict)
    assert +Counter(status["refused"]) == {"action": 3, "public_key": 1}
    assert set(status["refused"]) == set(REFUSALS.values())
    assert (status["dropped"], status["waiting"]) == (0, 0)


def test_the_status_is_published_again_and_again(
    own_broker: Mosquitto,
    start_responder: Start,
    peer: Connect,
    change_program: Callable[..., None],
) -> None:
    change_program("status", INTERVAL=0.2)
    watcher = peer(own_broker.port, TOPIC)
    start_responder(f"-p{own_broker.port}", OPTION)
    first = parse(watcher.receive(TOPIC))
    assert counts(first) == (0, 0, 0, 0)
    ask(own_broker, "alice")
    while counts(status := parse(watcher.receive(TOPIC))) != (1, 1, 0, 1):
        pass
    while parse(watcher.receive(TOPIC))["uptime_seconds"] == status["uptime_seconds"]:
        pass


def test_a_killed_responder_is_offline_by_its_will(
    own_broker: Mosquitto, start_responder: Start, peer: Connect
) -> None:
    responder = start_responder(f"-p{own_broker.port}", OPTION)
    watcher = peer(own_broker.port, TOPIC)
    wait_for_status(watcher, "online")
    responder.process.kill()
    wait_for_status(watcher, "offline")
    assert retained(peer, own_broker.port) == {"status": "offline"}


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_responder_is_offline(
    how: int, own_broker: Mosquitto, start_responder: Start, peer: Connect
) -> None:
    responder = start_responder(f"-p{own_broker.port}", OPTION)
    assert responder.stop(how) == 0
    assert retained(peer, own_broker.port) == {"status": "offline"}


def test_a_responder_that_an_error_ends_is_offline(
    own_broker: Mosquitto, start_responder: Start, peer: Connect
) -> None:
    responder = start_responder(f"-p{own_broker.port}", OPTION)
    ask(own_broker, "alice")
    watcher = peer(own_broker.port, TOPIC)
    wait_for_status(watcher, "online")
    for pid in processes_below(responder.process.pid):
        with contextlib.suppress(ProcessLookupError):  # it has ended with another
            os.kill(pid, signal.SIGKILL)
    watcher.publish("alice/key-exchange/request", crypto.generate_keyset()[1])
    assert responder.process.wait(SAFETY) == 1
    assert retained(peer, own_broker.port) == {"status": "offline"}


def test_a_responder_that_may_not_subscribe_does_not_stay_online(start_responder: Start) -> None:
    """mosquitto grants every subscription, so this broker is one of our own."""
    told = ["offline"]

    def serve(wire: hostile.Wire) -> None:
        wire.receive()
        wire.send(hostile.connack())
        with contextlib.suppress(ConnectionError):
            while (packet := wire.receive()).kind != hostile.DISCONNECT:
                if packet.kind == hostile.SUBSCRIBE:
                    wire.send(hostile.packet(hostile.SUBACK, packet.mid + b"\x80"))
                elif packet.kind == hostile.PUBLISH:
                    told.append(str(parse(packet.payload)["status"]))
                    wire.send(hostile.packet(hostile.PUBACK, packet.mid))
            return
        told.append("offline")  # its will, since it went without a DISCONNECT

    with hostile.listening(serve) as port:
        responder = start_responder(f"-p{port}", OPTION, ready=False)
        assert responder.process.wait(SAFETY) == 1
        responder.wait_for("refuses the subscription")
    assert told[-1] == "offline"


def test_it_is_online_again_after_a_restart_of_its_broker(
    own_broker: Mosquitto, start_responder: Start, peer: Connect
) -> None:
    responder = start_responder(f"-p{own_broker.port}", OPTION)
    own_broker.restart()
    responder.wait_for("ready", times=2)
    assert counts(first_status(peer, own_broker.port)) == (0, 0, 0, 0)


def test_further_signals_do_not_prolong_its_end(
    start_responder: Start, change_program: Callable[..., None]
) -> None:
    """It waits for the acknowledgement of its last status, which this broker withholds."""

    def serve(wire: hostile.Wire) -> None:
        hostile.admit(wire)
        while True:  # until the responder closes the connection
            wire.receive()

    change_program("responder", DRAINING_TIME=1.0)
    with hostile.listening(serve) as port:
        responder = start_responder(f"-p{port}", OPTION)

        def has_ended() -> bool:
            responder.process.terminate()
            return responder.process.poll() is not None

        wait_until(has_ended)


def test_it_stops_at_once_while_its_broker_is_away(
    own_broker: Mosquitto, start_responder: Start
) -> None:
    responder = start_responder(f"-p{own_broker.port}", OPTION)
    own_broker.kill()
    responder.wait_for("event=disconnected")
    assert responder.stop() == 0


def test_every_netid_sees_the_status_at_the_sample_broker(
    running: BrokerSide, start_responder: Start
) -> None:
    files = [f"--{option}={running.directory}/{name}" for option, name in FILES.items()]
    responder = start_responder(f"-p{running.tls}", OPTION, *files)
    with certificate_client(running, "alice") as alice:
        alice.subscribe(TOPIC)
        assert alice.receive()[0] == TOPIC
        responder.process.kill()
        topic, payload = alice.receive()
        while parse(payload)["status"] == "online":
            topic, payload = alice.receive()
        assert (topic, parse(payload)) == (TOPIC, {"status": "offline"})


def test_the_status_is_online_again_after_the_broker_side_was_restarted(
    own: Path, start_responder: Start
) -> None:
    files = [f"--{option}={own}/{name}" for option, name in FILES.items()]
    with started(own) as broker:
        responder = start_responder(f"-p{broker.tls}", OPTION, *files)
    with started(own, ports=broker.ports) as broker:
        responder.wait_for("ready", times=2)
        with certificate_client(broker, "alice") as alice:
            alice.subscribe("status/#")
            topic, payload = alice.receive()
    assert topic == TOPIC
    assert counts(parse(payload)) == (0, 0, 0, 0)


def test_the_page_on_operating_shows_the_status_as_it_is(
    own_broker: Mosquitto, start_responder: Start, peer: Connect
) -> None:
    text = (ROOT / "docs/operating.md").read_text(encoding="utf-8")
    [block] = re.findall(r"(?ms)^```json\n(.*?)^```$", text)
    online, offline = map(parse, block.splitlines())
    counts(online)
    responder = start_responder(f"-p{own_broker.port}", OPTION)
    assert responder.stop() == 0
    assert retained(peer, own_broker.port) == offline
