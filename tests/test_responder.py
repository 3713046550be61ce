"""The responder at a real broker: what it answers, survives, logs and leaves behind."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import conftest
import pytest
import reference
from conftest import (
    Mosquitto,
    Peer,
    ResponderProcess,
    error_lines,
    free_port,
    is_running,
    processes_below,
    run,
    wait_until,
)
from hostile import RawClient, impatient_program

import crypto
from crypto import to_pem

Start = Callable[..., ResponderProcess]
Connect = Callable[..., Peer]
SECRET_TEXT = "PlainText"


def answers(port: int, netid: str) -> bool:
    """Send a request and check its answer."""
    result = run("-p", str(port), netid, "reverse", SECRET_TEXT)
    assert (error_lines(result), result.stdout) == ("", SECRET_TEXT[::-1].encode() + b"\n")
    return True


class Client:
    """A client of the lab that goes on with one key, or several."""

    def __init__(self, peer: Peer, netid: str) -> None:
        self.peer = peer
        self.netid = netid

    def exchange(self) -> bytes:
        """Exchange keys; return the shared one."""
        private, public = crypto.generate_keyset()
        self.peer.publish(f"{self.netid}/key-exchange/request", public)
        answer = self.peer.receive(f"{self.netid}/key-exchange/response")
        return crypto.create_shared_key(private, answer)

    def ask(self, key: bytes, text: str | bytes = SECRET_TEXT, action: str = "reverse") -> None:
        """Send a request."""
        self.peer.publish(f"{self.netid}/{action}/request", crypto.encrypt(text, key))

    def is_answered(self, key: bytes) -> bool:
        """Check that the next message is the response under a key."""
        token = self.peer.receive(f"{self.netid}/reverse/response")
        assert crypto.decrypt(token, key).decode() == SECRET_TEXT[::-1]
        return True


@pytest.fixture
def client(broker: Mosquitto, responder: ResponderProcess, peer: Connect, netid: str) -> Client:
    """A client at the session's broker, which has a responder."""
    return Client(peer(broker.port, f"{netid}/+/response"), netid)


def about(responder: ResponderProcess, netid: str) -> list[str]:
    """Return what a responder has logged about a NetID."""
    return [line for line in responder.lines if f'netid="{netid}"' in line]


# --- keys and requests -------------------------------------------------------------------------


def test_the_last_eight_keys_of_a_netid_are_good(
    client: Client, responder: ResponderProcess
) -> None:
    keys = [client.exchange() for _ in range(9)]
    for key in keys[1:]:
        client.ask(key)
        assert client.is_answered(key)
    client.ask(keys[0])
    responder.wait_for(f'ignored netid="{client.netid}"')
    client.ask(keys[-1])
    assert client.is_answered(keys[-1])


def test_a_request_that_comes_right_after_the_key_is_answered(client: Client) -> None:
    private, public = crypto.generate_keyset()
    for _ in range(8):
        client.peer.publish(f"{client.netid}/key-exchange/request", public)
    answers = [client.peer.receive(f"{client.netid}/key-exchange/response") for _ in range(8)]
    key = crypto.create_shared_key(private, answers[-1])
    client.ask(key)
    assert client.is_answered(key)


def test_a_key_is_good_for_its_netid_only(
    client: Client, responder: ResponderProcess, netid: str
) -> None:
    key = client.exchange()
    other = Client(client.peer, f"{netid}-other")
    other.ask(key)
    responder.wait_for(f'ignored netid="{other.netid}"')


def test_a_responder_for_one_netid_ignores_the_others(
    own_broker: Mosquitto, start_responder: Start, netid: str
) -> None:
    start_responder("-p", str(own_broker.port), netid)
    assert answers(own_broker.port, netid)
    result = run("-p", str(own_broker.port), "-W", "0.5", f"{netid}y", "reverse", "text")
    assert "no responder answered" in error_lines(result)
    assert result.returncode == 1


def nested_key() -> bytes:
    """Return a key whose DER is a SEQUENCE in a SEQUENCE in … so deep that recursion may fail."""
    der = b""
    for _ in range(700):
        length = len(der)
        der = (
            b"\x30"
            + (bytes([length]) if length < 128 else b"\x82" + length.to_bytes(2, "big"))
            + der
        )
    return to_pem(b"PUBLIC KEY", der)


FOREIGN = crypto.encrypt("text", bytes(32))
UNUSABLE: dict[str, tuple[str, bytes, bool, str]] = {
    "an unknown action": ("capitalise", b"text", False, "unknown action"),
    "an action of another case": ("UPPERCASE", b"text", False, "unknown action"),
    "an empty action": ("", b"text", False, "unknown action"),
    "no token": ("reverse", b"text!", False, "not encrypted"),
    "an empty token": ("reverse", b"", False, "not encrypted"),
    "a token of another key": (
        "reverse",
        crypto.encrypt("text", bytes(32)),
        False,
        "not encrypted",
    ),
    "no key": ("key-exchange", b"text", False, "no valid public key"),
    "an empty key": ("key-exchange", b"", False, "no valid public key"),
    "a key over 64 KiB": ("key-exchange", bytes(65537), False, "larger than 64 KiB"),
    "a key in deep nesting": ("key-exchange", nested_key(), False, "no valid public key"),
    "a retained request": ("reverse", b"text", True, "retained"),
    "a retained key": ("key-exchange", crypto.generate_keyset()[1], True, "retained"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_it_logs_and_survives(
    case: str, own_broker: Mosquitto, peer: Connect, start_responder: Start, netid: str
) -> None:
    action, payload, is_retained, reason = UNUSABLE[case]
    attacker = peer(own_broker.port, f"{netid}/+/response")
    topic = f"{netid}/{action}/request"
    if is_retained:
        attacker.publish(topic, payload, retain=True)
    responder = start_responder("-p", str(own_broker.port))
    if not is_retained:
        attacker.publish(topic, payload)
    responder.wait_for("ignored")
    (line,) = about(responder, netid)
    assert "level=warning" in line
    assert reason in line
    client = Client(attacker, netid)
    key = client.exchange()  # its answer is the first to come
    client.ask(key)
    assert client.is_answered(key)


def test_it_logs_and_survives_text_that_is_not_utf8(
    client: Client, responder: ResponderProcess
) -> None:
    key = client.exchange()
    client.ask(key, b"\xff")
    responder.wait_for(f'ignored netid="{client.netid}" action="reverse" reason="not UTF-8 text"')
    client.ask(key)
    assert client.is_answered(key)


def test_a_name_from_a_peer_cannot_forge_a_line_of_the_log(
    client: Client, responder: ResponderProcess
) -> None:
    line_end = "\N{LINE SEPARATOR}"
    for action in f"x{line_end}level=info event=forged", "y" * 9999:
        client.peer.publish(f"{client.netid}/{action}/request", b"text")
    responder.wait_for(f'ignored netid="{client.netid}"', times=2)
    first, second = about(responder, client.netid)
    assert r'action="x\u2028level=info event=forged"' in first
    assert len(second) < 300


# --- the log -----------------------------------------------------------------------------------


def test_without_verbose_it_says_only_that_it_is_ready(
    own_broker: Mosquitto, start_responder: Start, netid: str
) -> None:
    responder = start_responder("-p", str(own_broker.port))
    assert answers(own_broker.port, netid)
    assert responder.stop() == 0
    assert len(responder.lines) == 1
    assert re.match(r"ready\b.*\b" + str(own_broker.port), responder.lines[0])


def test_verbose_logs_each_exchange_and_request_without_key_or_text(
    broker: Mosquitto, responder: ResponderProcess, netid: str
) -> None:
    assert answers(broker.port, netid)
    responder.wait_for(f'netid="{netid}" action="reverse"')
    exchange, request = about(responder, netid)
    for line, action in (exchange, "key-exchange"), (request, "reverse"):
        stamp = r"time=\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z"
        assert re.fullmatch(
            rf'{stamp} level=info event=answered netid="{netid}" action="{action}"'
            r" ms=\d+\.\d bytes=\d+",
            line,
        )
    assert f"bytes={crypto.token_size(len(SECRET_TEXT))}" in request
    for secret in SECRET_TEXT, SECRET_TEXT[::-1], "BEGIN", "gAAAA":
        assert not responder.has_said(secret)


# --- its broker --------------------------------------------------------------------------------


def test_it_answers_again_after_its_broker_was_restarted(
    own_broker: Mosquitto, start_responder: Start, netid: str
) -> None:
    responder = start_responder("-p", str(own_broker.port))
    assert answers(own_broker.port, netid)
    own_broker.restart()
    responder.wait_for("ready", times=2)
    assert responder.has_said("lost while waiting for requests")
    assert answers(own_broker.port, netid)


def test_of_two_responders_the_first_answer_counts(
    own_broker: Mosquitto, start_responder: Start
) -> None:
    """The other has no key that opens the requests, and ignores them."""
    for _ in range(2):
        start_responder("-p", str(own_broker.port))
    lines = "".join(f"line {number}\n" for number in range(200)).encode()
    where = "-h", "127.0.0.1", "-p", str(own_broker.port), "--suite=x25519", "--lines"
    for netid in "alice", "bob":
        result = run(*where, netid, "uppercase", "-", stdin=lines)
        assert (error_lines(result), result.stdout) == ("", lines.upper())
        assert answers(own_broker.port, netid)


def test_it_may_be_started_before_its_broker(
    own_broker: Mosquitto, start_responder: Start, netid: str
) -> None:
    own_broker.kill()
    responder = start_responder("-p", str(own_broker.port), ready=False)
    responder.wait_for('disconnected reason="connection refused')
    own_broker.start()
    responder.wait_for("ready")
    assert answers(own_broker.port, netid)


def test_what_to_check_when_there_is_no_broker_is_said_once(
    own_broker: Mosquitto,
    start_responder: Start,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(conftest, "PROGRAM", impatient_program(tmp_path))
    own_broker.kill()
    port = own_broker.port
    responder = start_responder("-p", str(port), ready=False)
    responder.wait_for('event=disconnected reason="connection refused', times=3)
    hint = f' hint="start a broker there (mosquitto -p {port}), or check --host and --port"'
    assert responder.lines[0].endswith(hint)
    own_broker.start()
    responder.wait_for("ready")
    own_broker.kill()
    refused = sum("connection refused" in line for line in responder.lines)
    responder.wait_for("connection refused", times=refused + 2)
    assert sum(hint in line for line in responder.lines) == 1


def test_a_refusal_for_good_ends_it(
    start_broker: Callable[[str], Mosquitto], start_responder: Start
) -> None:
    mosquitto = start_broker(f"password_file {os.devnull}\nallow_anonymous false")
    responder = start_responder("-p", str(mosquitto.port), ready=False)
    responder.wait_for("error:")
    assert responder.process.wait(60) == 1
    (error, hint) = responder.lines
    assert "refuses the connection: not authorized" in error
    assert "hint:" in hint


# --- its end -----------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("is_group", [False, True], ids=["alone", "with its processes"])
def test_a_signal_stops_it_with_status_0_and_nothing_stays(
    how: signal.Signals, is_group: bool, own_broker: Mosquitto, start_responder: Start, netid: str
) -> None:
    responder = start_responder("-p", str(own_broker.port))
    assert answers(own_broker.port, netid)
    children = processes_below(responder.process.pid)
    assert children
    for pid in children if is_group else ():
        os.kill(pid, how)
    assert responder.stop(how) == 0
    assert len(responder.lines) == 1
    wait_until(lambda: not any(map(is_running, children)))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_may_come_while_its_processes_start(
    how: signal.Signals, own_broker: Mosquitto, start_responder: Start
) -> None:
    responder = start_responder("-p", str(own_broker.port), ready=False)
    wait_until(lambda: len(processes_below(responder.process.pid)) > 1)
    for pid in processes_below(responder.process.pid):
        os.kill(pid, how)
    assert responder.stop(how) == 0
    assert not responder.has_said("Traceback")


def test_when_it_is_killed_no_process_stays(own_broker: Mosquitto, start_responder: Start) -> None:
    responder = start_responder("-p", str(own_broker.port))
    wait_until(lambda: len(processes_below(responder.process.pid)) > 1)
    children = processes_below(responder.process.pid)
    assert responder.stop(signal.SIGKILL) == -signal.SIGKILL
    wait_until(lambda: not any(map(is_running, children)))


def test_a_signal_stops_it_while_it_waits_for_its_broker(start_responder: Start) -> None:
    responder = start_responder("-p", str(free_port()), ready=False)
    responder.wait_for("disconnected")
    assert responder.stop() == 0


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("is_group", [False, True], ids=["alone", "with its processes"])
def test_a_request_that_has_come_before_a_signal_is_still_answered(
    how: signal.Signals,
    is_group: bool,
    own_broker: Mosquitto,
    peer: Connect,
    start_responder: Start,
    netid: str,
) -> None:
    responder = start_responder("-p", str(own_broker.port))
    assert answers(own_broker.port, netid)
    children = processes_below(responder.process.pid)
    # They make keys ahead; while they do, none of them would take up an exchange.
    wait_until(lambda: not any(map(is_computing, [responder.process.pid, *children])))
    client = Client(peer(own_broker.port, f"{netid}/+/response"), netid)
    for pid in children:
        os.kill(pid, signal.SIGSTOP)
    key = client.exchange()
    client.ask(key)
    client.peer.publish(f"{netid}-end/none/request", b"")
    responder.wait_for("unknown action")  # so the request before has come, and waits for its key
    for pid in children if is_group else ():
        os.kill(pid, how)
    responder.process.send_signal(how)
    for pid in children:
        os.kill(pid, signal.SIGCONT)
    assert responder.stop(how) == 0
    assert client.is_answered(key)
    assert len(responder.lines) == 2


def test_a_lost_process_ends_it_with_an_error_and_nothing_stays(
    own_broker: Mosquitto, peer: Connect, start_responder: Start, netid: str
) -> None:
    responder = start_responder("-p", str(own_broker.port))
    assert answers(own_broker.port, netid)
    children = processes_below(responder.process.pid)
    os.kill(max(children), signal.SIGKILL)
    client = peer(own_broker.port, "x")
    try:
        client.publish(f"{netid}/key-exchange/request", crypto.generate_keyset()[1])
        responder.wait_for("error: a process of the responder was ended", seconds=10)
        assert responder.process.wait(10) == 1
        assert not responder.has_said("Traceback")
        wait_until(lambda: not any(map(is_running, children)))
    finally:
        responder.process.kill()


def is_computing(pid: int) -> bool:
    """Tell whether any thread of a process is at work, and not waiting for some."""
    states = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return any(state.rpartition(")")[2].split()[0] != "S" for state in states)


# --- load --------------------------------------------------------------------------------------

NETIDS = 5_000


def memory(pid: int) -> int:
    """Return the resident memory of a process in bytes."""
    status = Path(f"/proc/{pid}/status").read_text()
    match = re.search(r"VmRSS:\s+(\d+) kB", status)
    assert match
    return int(match[1]) * 1024


def test_five_thousand_netids_take_at_most_50_mb(
    own_broker: Mosquitto, start_responder: Start
) -> None:
    """In the quickest suite: the powers of the lab's would take minutes."""
    responder = start_responder("-p", str(own_broker.port))
    own = reference.X25519Keys()
    message_1 = own.ask()
    at_start = memory(responder.process.pid)
    batch = 50  # exchanges at a time
    with RawClient(own_broker.port, "many", "+/+/response") as client:
        for start in range(0, NETIDS, batch):
            netids = [f"n{number}" for number in range(start, start + batch)]
            for netid in netids:
                client.publish(f"{netid}/key-exchange/request", message_1)
            keys = {}
            for answer in (client.next_message() for _ in netids):
                netid, secret = answer.topic.partition("/")[0], own.agree(answer.payload)
                keys[netid] = reference.message_keys(
                    own.suite, secret, netid, message_1, answer.payload
                )
            for netid, (sealing, _) in keys.items():
                topic = f"{netid}/reverse/request"
                client.publish(topic, reference.seal(sealing, topic, 1, b"abc"))
            for answer in (client.next_message() for _ in netids):
                opening = keys[answer.topic.partition("/")[0]][1]
                assert reference.unseal(opening, answer.topic, answer.payload) == (1, b"cba")
    assert memory(responder.process.pid) - at_start <= 50 * 2**20
    assert len(responder.lines) == 1
