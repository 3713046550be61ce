"""What happens when processes die, hang and come back, and when the network fails.

A client ends in time and names the stage that it was in; a responder comes back by itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import conftest
import pytest
from conftest import PROGRAM, SAFETY, Mosquitto, ResponderProcess, Run, free_port, run, wait_until
from hostile import (
    ANSWER,
    CONNACK,
    CONNECT,
    EITHER,
    MESSAGE,
    PUBLISH,
    SUBACK,
    SUBSCRIBE,
    Conversation,
    LabClient,
    Link,
    Packet,
    PassOn,
    RawClient,
    all_at_once,
    attacked,
    changed_program,
    check,
    delay,
    drip,
    hostile_broker,
    impatient_program,
    in_thread,
    lab_responder,
    patiently,
    publish,
    relay,
)

import crypto
from secure_mqtt.suites import COUNTER_SIZE, SUITES, TAG_SIZE

Responders = Callable[..., ResponderProcess]

# --- at every stage of a request ---------------------------------------------------------------


def is_kind(kind: int, packet: Packet) -> bool:
    """Tell whether a packet is of this kind."""
    return packet.kind == kind


def is_message(topic_end: str, packet: Packet) -> bool:
    """Tell whether this is a PUBLISH on such a topic."""
    return packet.kind == PUBLISH and packet.topic.endswith(topic_end)


# The packet that is on its way when the fault comes, and what the client is waiting for then.
STAGES: Mapping[str, tuple[Callable[[Packet], bool], str]] = {
    "CONNECT": (partial(is_kind, CONNECT), "CONNACK"),
    "CONNACK": (partial(is_kind, CONNACK), "CONNACK"),
    "SUBSCRIBE": (partial(is_kind, SUBSCRIBE), "SUBACK"),
    "SUBACK": (partial(is_kind, SUBACK), "SUBACK"),
    "the client's public key": (partial(is_message, "exchange/request"), "key exchange"),
    "the responder's public key": (partial(is_message, "exchange/response"), "key exchange"),
    "the request": (partial(is_message, "uppercase/request"), "response"),
    "the response": (partial(is_message, "uppercase/response"), "response"),
}
FAULTS: Mapping[str, Callable[[Mosquitto, Link], object]] = {
    "the broker is killed": lambda mosquitto, link: mosquitto.kill(),
    "the broker is restarted": lambda mosquitto, link: mosquitto.restart(),
    "the broker is stopped": lambda mosquitto, link: mosquitto.process.send_signal(signal.SIGSTOP),
    "the network is cut": lambda mosquitto, link: link.cut(),
    "the network loses everything": lambda mosquitto, link: None,
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_at_any_stage_ends_in_time_with_an_error_that_names_it(
    name: str, tmp_path: Path
) -> None:
    def fail_at(stage: str, timeout: float) -> None:
        is_moment, waiting_for = STAGES[stage]
        has_failed = threading.Event()

        def pass_on(link: Link, packet: Packet, send: Callable[[bytes], object]) -> None:
            if is_moment(packet):
                has_failed.set()
                FAULTS[name](mosquitto, link)
            if not has_failed.is_set():
                send(packet.raw)

        with contextlib.ExitStack() as stack:
            with one_at_a_time:  # else two of them might find the same port free
                mosquitto = Mosquitto(tmp_path)
                stack.callback(mosquitto.kill)
                stack.enter_context(lab_responder(mosquitto.port))
                port = stack.enter_context(relay(mosquitto.port, pass_on))
            check(attacked(port, timeout=timeout), waiting_for)
        assert has_failed.is_set()

    one_at_a_time = threading.Lock()
    all_at_once({stage: partial(patiently, partial(fail_at, stage)) for stage in STAGES})


def states_of_threads(pid: int) -> set[str]:
    """Return the states that a process's threads are in, as proc(5) has them."""
    stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return {stat.rpartition(")")[2].split()[0] for stat in stats}


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
def test_a_responder_that_goes_between_the_exchange_and_the_request_is_missed(
    how: signal.Signals, own_broker: Mosquitto, start_responder: Responders
) -> None:
    responder = start_responder("-p", str(own_broker.port))

    def pass_on(link: Link, packet: Packet, send: Callable[[bytes], object]) -> None:
        if is_message("uppercase/request", packet):
            responder.process.send_signal(how)
            if how == signal.SIGSTOP:  # its threads stop one after the other
                wait_until(lambda: states_of_threads(responder.process.pid) == {"T"})
            else:
                responder.process.wait(SAFETY)
        send(packet.raw)

    with relay(own_broker.port, pass_on) as port:
        try:
            missed = "no response came on alice/uppercase/response within 3 s"
            check(attacked(port, timeout=3), missed)
        finally:
            responder.process.send_signal(signal.SIGCONT)


# --- a bad network -----------------------------------------------------------------------------


def test_a_message_may_be_long_on_its_way(tmp_path: Path) -> None:
    """As long as the timeout allows; no sign of life of the broker can pass it."""
    is_over = threading.Event()

    def answer_and_stop_reading(c: Conversation) -> None:
        c.give_key()
        is_over.wait(SAFETY)

    impatient = changed_program(tmp_path, "connection.KEEPALIVE = 1\n")
    with hostile_broker({"exchange": answer_and_stop_reading}) as (port, _):
        arguments = ["-h", "127.0.0.1", "-p", str(port), "-W", "5", "alice", "uppercase", "-"]
        result = run(*arguments, stdin=bytes(2**24), program=impatient)
        is_over.set()
    check(result, "no response came")


@pytest.mark.parametrize("pass_on", [delay, drip])
def test_a_slow_network_only_takes_longer(
    pass_on: PassOn, own_broker: Mosquitto, start_responder: Responders
) -> None:
    with relay(own_broker.port, pass_on) as port:
        responder = start_responder("-p", str(port))
        check(attacked(port, timeout=30), ANSWER)
        assert responder.stop() == 0


def test_a_name_that_resolves_to_nothing_is_named() -> None:
    result = run("-h", "nothing.invalid", "-W", "5", "alice", "uppercase", MESSAGE)
    check(result, "'nothing.invalid'")


def test_a_port_where_nothing_listens_is_named() -> None:
    port = free_port()
    check(attacked(port), f"nothing listens on 127.0.0.1 port {port}")


def test_an_address_that_does_not_answer_is_given_up_at_the_timeout() -> None:
    """The system of the other side lets no further connection wait, and drops what asks for one."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        address = server.getsockname()
        waiting = [socket.socket() for _ in range(4)]
        for each in waiting:
            each.setblocking(False)
            each.connect_ex(address)
        check(attacked(address[1]), "connect…127.0.0.1 port")
        for each in waiting:
            each.close()


def test_of_the_addresses_of_a_name_one_that_works_is_enough(
    broker: Mosquitto, responder: ResponderProcess, netid: str, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import socket\n"
        "def resolve(host, port, *rest, original=socket.getaddrinfo):\n"
        f"    ports = [{free_port()}, port] if host == 'broker.example' else [port]\n"
        "    return [found for each in ports for found in original('127.0.0.1', each, *rest)]\n"
        "socket.getaddrinfo = resolve\n"
    )
    line = ["-h", "broker.example", "-p", str(broker.port), netid, "uppercase", MESSAGE]
    check(run(*line, env={**os.environ, "PYTHONPATH": str(tmp_path)}), ANSWER)


# --- a broker that does not take all -----------------------------------------------------------


@pytest.fixture
def strict_broker(tmp_path: Path, start_responder: Responders) -> Iterator[Mosquitto]:
    """A broker with a limit on packets, and a responder."""
    mosquitto = Mosquitto(tmp_path, "max_packet_size 5000")
    start_responder("-p", str(mosquitto.port))
    yield mosquitto
    mosquitto.kill()


def too_large(port: int, size: int, suite: str) -> Run:
    """Send a text of so many bytes, which the broker does not take."""
    where = ["-h", "127.0.0.1", "-p", str(port), "--suite", suite]
    return run(*where, "alice", "uppercase", "-", stdin=b"x" * size)


@pytest.mark.parametrize("size", [8_000, 30_000, 10_000_000])
@pytest.mark.parametrize("suite", list(SUITES))
def test_of_a_message_that_the_broker_does_not_take_the_size_is_named(
    strict_broker: Mosquitto, suite: str, size: int
) -> None:
    payload = crypto.token_size(size) if suite == "dh4096" else size + COUNTER_SIZE + TAG_SIZE
    words = f"the response, with a message of {payload:,} bytes on its way: …"
    hint = "may take no packet as large as that (max_packet_size)…the client ID 'alice'…--id"
    check(too_large(strict_broker.port, size, suite), words + hint)


@pytest.mark.parametrize("suite", list(SUITES))
def test_of_a_small_message_that_the_broker_does_not_take_no_size_is_named(
    strict_broker: Mosquitto, suite: str
) -> None:
    result = too_large(strict_broker.port, 5_500, suite)
    check(result, "lost while waiting for the response: …hint: another client may have")


# --- others ------------------------------------------------------------------------------------


def test_a_second_client_with_the_same_client_id_is_named_as_a_possible_cause(
    own_broker: Mosquitto,
) -> None:
    command = [
        sys.executable,
        str(PROGRAM),
        "-p",
        str(own_broker.port),
        "alice",
        "uppercase",
        MESSAGE,
    ]
    with RawClient(own_broker.port, "observer", "alice/key-exchange/request") as observer:
        client = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        observer.next_message()  # so it waits for the response now
        with RawClient(own_broker.port, "alice", "none"):
            stdout, stderr = client.communicate(timeout=SAFETY)
    result = subprocess.CompletedProcess(command, client.returncode, stdout, stderr)
    check(result, "lost while waiting for the key exchange…client ID 'alice'…--id")


def test_clients_that_share_a_netid_get_the_right_answer_or_an_error(
    broker: Mosquitto, responder: ResponderProcess, netid: str
) -> None:
    """In the lab's protocol a response does not say for whom it is."""

    def ask(name: str) -> None:
        check(attacked(broker.port, "--id", name, netid=netid), EITHER)

    all_at_once({f"{netid}-{number}": partial(ask, f"{netid}-{number}") for number in range(6)})


def test_clients_that_take_each_others_client_id_get_the_right_answer_or_an_error(
    broker: Mosquitto, responder: ResponderProcess, netid: str
) -> None:
    def ask() -> None:
        check(attacked(broker.port, netid=netid), EITHER)

    all_at_once({str(number): ask for number in range(6)})


# --- the responder -----------------------------------------------------------------------------


def request(client: LabClient) -> None:
    """Check that the responder answers an honest client."""
    assert client.exchange().request("uppercase", MESSAGE) == ANSWER


def serves(port: int) -> None:
    """Check that the responder answers a new honest client."""
    with LabClient(port, "alice") as client:
        request(client)


def test_a_responder_survives_20_broker_restarts_in_a_row_and_answers_after_each(
    own_broker: Mosquitto,
    start_responder: Responders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(conftest, "PROGRAM", impatient_program(tmp_path))
    responder = start_responder("-p", str(own_broker.port))
    for restarts in range(1, 21):
        own_broker.restart()
        responder.wait_for("ready", times=1 + restarts)
        serves(own_broker.port)
    assert responder.stop() == 0
    assert not responder.has_said("Traceback")


def test_a_responder_that_waits_the_usual_time_comes_back_too(
    own_broker: Mosquitto, start_responder: Responders
) -> None:
    responder = start_responder("-p", str(own_broker.port))
    own_broker.restart()
    responder.wait_for("ready", times=2, seconds=10)
    serves(own_broker.port)


def test_a_responder_serves_on_after_its_broker_was_stopped_for_a_while(
    own_broker: Mosquitto, start_responder: Responders
) -> None:
    start_responder("-p", str(own_broker.port))
    own_broker.process.send_signal(signal.SIGSTOP)
    check(attacked(own_broker.port), "CONNACK")
    own_broker.process.send_signal(signal.SIGCONT)
    serves(own_broker.port)


def test_a_responder_comes_back_after_a_cut_of_the_network_at_any_stage(
    own_broker: Mosquitto,
    start_responder: Responders,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(conftest, "PROGRAM", impatient_program(tmp_path))
    links: list[Link] = []
    moments: list[Callable[[Packet], bool]] = []  # the next one at which to cut, if any

    def pass_on(link: Link, packet: Packet, send: Callable[[bytes], object]) -> None:
        links.append(link)
        if moments and moments[0](packet):
            moments.clear()
            link.cut()
        else:
            send(packet.raw)

    with relay(own_broker.port, pass_on) as port:
        responder = start_responder("-p", str(port))
        for stage, (is_moment, _) in STAGES.items():
            connections = sum("ready" in line for line in responder.lines)
            with LabClient(own_broker.port, "alice") as client:
                moments.append(is_moment)
                if stage in ("CONNECT", "CONNACK", "SUBSCRIBE", "SUBACK"):
                    links[-1].cut()  # for these it must connect once more
                else:
                    in_thread(partial(request, client))
                wait_until(lambda: not moments)
            responder.wait_for("ready", times=connections + 1)
            serves(own_broker.port)
        assert responder.stop() == 0
    assert not responder.has_said("Traceback")


def test_a_large_answer_arrives_whole_among_many_small_ones(
    own_broker: Mosquitto, start_responder: Responders
) -> None:
    """A small packet must not be written into the middle of a large one."""
    responder = start_responder("-p", str(own_broker.port))
    is_over = threading.Event()
    with LabClient(own_broker.port, "large") as large, LabClient(own_broker.port, "small") as small:
        token = crypto.encrypt(MESSAGE, small.exchange().key)

        def ask_often() -> None:
            while not is_over.wait(0.0005):
                small.publish("small/uppercase/request", token)

        def take_answers() -> None:
            while True:
                small.next_message()

        threads = [in_thread(ask_often), in_thread(take_answers)]
        text = MESSAGE * (2**20 // len(MESSAGE))
        large.exchange()
        for _ in range(3):
            assert large.request("uppercase", text) == text.upper()
        is_over.set()
        small.wire.end()
        for thread in threads:
            thread.join(SAFETY)
    assert not responder.has_said("disconnected")


def test_a_large_request_arrives_whole_among_many_acknowledgements() -> None:
    """The client acknowledges what a broker sends, while its own message is on its way."""
    text = MESSAGE.encode() * 600_000

    def exchange(c: Conversation) -> None:
        c.give_key()
        for _ in range(2000):
            c.send(publish(c.topics[1], b"no token"))

    def respond(c: Conversation) -> None:
        c.respond(c.encrypt(crypto.decrypt(c.token, c.key).upper()))

    with hostile_broker({"exchange": exchange, "request": respond}) as (port, _):
        line = ["-h", "127.0.0.1", "-p", str(port), "alice", "uppercase", "-"]
        result = run(*line, stdin=text)
    assert result.returncode == 0, result.stderr
    assert result.stdout == text.upper() + b"\n"
    assert result.stderr == b""


def test_a_client_leaves_nothing_behind_at_a_broker(own_broker: Mosquitto) -> None:
    """Its session is clean and its messages are not retained: who comes later sees nothing."""
    with lab_responder(own_broker.port):
        check(attacked(own_broker.port, timeout=20), ANSWER)
    with RawClient(own_broker.port, "alice", "#") as later:
        later.publish("end", b"")
        assert later.next_message().topic == "end"
