"""Requests against a real broker: what is printed, and how each thing that can fail is told."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import signal
import socket
import string
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import paho.mqtt.client as paho
import pytest
from conftest import (
    PROGRAM,
    SAFETY,
    Mosquitto,
    Peer,
    ResponderProcess,
    Run,
    error_lines,
    free_port,
    is_running,
    processes_below,
    run,
    wait_until,
)
from paho.mqtt.enums import CallbackAPIVersion

import crypto
from secure_mqtt.actions import MAX_TEXT
from secure_mqtt.suites import SUITES

Connect = Callable[..., Peer]
ALL_PLANES = "".join(
    chr(plane * 0x10000 + offset) for plane in range(17) for offset in (0x41, 0x3042, 0xFFFD)
)


def succeeded(result: Run, response: bytes) -> bool:
    """Check the whole result of a request that was answered."""
    assert (error_lines(result), result.stdout, result.returncode) == ("", response + b"\n", 0)
    return True


def failed(result: Run, *words: str) -> bool:
    """Check the whole result of a request that failed: its message, and that nothing else came."""
    error, *hint = error_lines(result).splitlines()
    assert error.startswith("secure_mqtt_client.py: error: ")
    assert all(line.startswith("secure_mqtt_client.py: hint: ") for line in hint)
    assert len(hint) <= 1
    for word in words:
        assert word in error_lines(result)
    assert (result.stdout or b"", result.returncode) == (b"", 1)
    return True


@contextlib.contextmanager
def started(*arguments: str, **options: int) -> Iterator[subprocess.Popen[bytes]]:
    """Start the program in a process group of its own, as a terminal does."""
    options = {"stdin": subprocess.DEVNULL, "stderr": subprocess.PIPE, **options}
    command = [sys.executable, str(PROGRAM), *arguments]
    with subprocess.Popen(  # type: ignore[call-overload]
        command, stdout=subprocess.PIPE, start_new_session=True, **options
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def finish(process: subprocess.Popen[bytes]) -> Run:
    """Wait for the end of a program."""
    output, errors = process.communicate(timeout=SAFETY)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors or b"")


@pytest.fixture
def ask(broker: Mosquitto, responder: ResponderProcess, netid: str) -> Callable[..., Run]:
    """Send a request to the responder."""

    def ask(action: str, message: str, *options: str, **how: object) -> Run:
        stdin = how.pop("stdin", None)
        port = str(broker.port)
        return run("-p", port, *options, netid, action, message, stdin=stdin, **how)  # type: ignore[arg-type]

    return ask


# --- answers -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action", "message", "response"),
    [
        ("uppercase", "Networking is the best!", "NETWORKING IS THE BEST!"),
        ("uppercase", "straße, ǆ, ﬁ", "STRASSE, Ǆ, FI"),
        ("lowercase", "Networking İS ΤΟΣ", "networking i̇s τος"),
        ("title-case", "networking is THE best", "Networking Is The Best"),
        ("title-case", "ǆ they're", "ǅ They'Re"),
        ("reverse", "abc", "cba"),
        ("reverse", ALL_PLANES, ALL_PLANES[::-1]),
        ("reverse", "", ""),
        ("shuffle", "", ""),
        ("random", "", ""),
        ("shuffle", "aaaa", "aaaa"),
        ("reverse", "-5", "5-"),
    ],
)
def test_an_action_is_answered(
    ask: Callable[..., Run], action: str, message: str, response: str
) -> None:
    assert succeeded(ask(action, message), response.encode())


def test_shuffle_moves_the_characters_and_keeps_them(ask: Callable[..., Run]) -> None:
    result = ask("shuffle", string.printable[:90] + "é漢🦊").stdout.decode().removesuffix("\n")
    assert result != string.printable[:90] + "é漢🦊"
    assert sorted(result) == sorted(string.printable[:90] + "é漢🦊")


def test_random_drops_and_doubles_characters_in_their_order(ask: Callable[..., Run]) -> None:
    letters = string.ascii_letters + "é漢🦊"
    result = ask("random", letters).stdout.decode().removesuffix("\n")
    assert result != letters
    assert re.fullmatch("".join(f"{letter}*" for letter in letters), result)
    assert {result.count(letter) for letter in letters} >= {0, 2}


def test_a_message_after_two_dashes_may_begin_with_one(
    ask: Callable[..., Run], broker: Mosquitto, netid: str
) -> None:
    assert succeeded(run("-p", str(broker.port), "--", netid, "reverse", "--help"), b"pleh--")


@pytest.mark.parametrize("netid", ["x" * 64, "🦊", "naïve 漢字", "-"])
def test_a_netid_may_be_anything_that_is_one_level(ask: Callable[..., Run], netid: str) -> None:
    assert succeeded(ask("reverse", "abc"), b"cba")


INPUTS: dict[str, bytes] = {
    "nothing": b"",
    "a line": b"text\n",
    "Windows lines": b"one\r\ntwo\r\n",
    "a zero byte": b"a\0b",
    "a byte order mark": b"\xef\xbb\xbftext",
    "all planes": ALL_PLANES.encode(),
    "1 MiB": os.urandom(2**19).hex().encode(),
}


@pytest.mark.parametrize("case", INPUTS)
def test_standard_input_is_the_message_to_the_byte(ask: Callable[..., Run], case: str) -> None:
    reversed_text = INPUTS[case].decode()[::-1].encode()
    assert succeeded(ask("reverse", "-", stdin=INPUTS[case]), reversed_text)


@pytest.mark.parametrize("suite", SUITES)
def test_a_text_of_more_than_1_mib_is_not_answered_and_client_and_responder_say_why(
    ask: Callable[..., Run], responder: ResponderProcess, netid: str, suite: str
) -> None:
    text = b"x" * (MAX_TEXT + 16)
    result = ask("reverse", "-", f"--suite={suite}", "-W3", stdin=text)
    assert failed(result, f"to a message of {SUITES[suite].sealed_size(len(text))} bytes", "1 MiB")
    reason = 'reason="a text of more than 1 MiB"'
    responder.wait_for(f'ignored netid="{netid}" action="reverse" {reason}')


LOCALES: dict[str, dict[str, str]] = {
    "LANG=C": {"LANG": "C"},
    "LC_ALL=C": {"LC_ALL": "C"},
    "LC_ALL=POSIX": {"LC_ALL": "POSIX"},
    "ASCII": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
    "Latin-1": {"PYTHONIOENCODING": "latin-1"},
}


@pytest.mark.parametrize("locale", LOCALES)
def test_the_response_is_utf8_in_any_locale(ask: Callable[..., Run], locale: str) -> None:
    env = {"PATH": os.environ["PATH"], **LOCALES[locale]}
    assert succeeded(ask("reverse", ALL_PLANES, env=env), ALL_PLANES[::-1].encode())


def test_verbose_tells_the_progress_but_neither_key_nor_text(ask: Callable[..., Run]) -> None:
    result = ask("uppercase", "PlainText", "-v")
    assert (result.stdout, result.returncode) == (b"PLAINTEXT\n", 0)
    for stage in "CONNACK", "SUBACK", "1 → ", "2 ← ", "3 → ", "4 ← ":
        assert stage in error_lines(result)
    for secret in "plaintext", "begin", "gaaaa":
        assert secret not in error_lines(result).lower()


# What standard error is encoded in, and the arrows that it then shows.
ARROWS: dict[str, tuple[dict[str, str], str, str]] = {
    "utf-8": ({"PYTHONIOENCODING": "utf-8"}, "→", "←"),
    "latin-1": ({"PYTHONIOENCODING": "latin-1"}, "->", "<-"),
    "ascii": ({"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, "->", "<-"),
}


@pytest.mark.parametrize("encoding", ARROWS)
def test_verbose_tells_each_of_the_four_messages(
    encoding: str, ask: Callable[..., Run], netid: str
) -> None:
    variables, there, back = ARROWS[encoding]
    result = ask("uppercase", "PlainText", "-v", env={"PATH": os.environ["PATH"], **variables})
    lines = [
        re.fullmatch(rf"{PROGRAM.name}: \d+ ms: (.*)", line)[1]  # type: ignore[index]
        for line in result.stderr.decode(encoding).splitlines()
    ]
    exchange, asked = f"{netid}/key-exchange", f"{netid}/uppercase"
    assert [re.sub(r"\d+ bytes|port \d+|\b[0-9a-f]{64}$", "N", line) for line in lines] == [
        "CONNACK from localhost N, without TLS",
        f"SUBACK for {exchange}/response and {asked}/response",
        f"1 {there} {exchange}/request, N: our public key (dh4096)",
        f"2 {back} {exchange}/response, N: the responder's public key (dh4096)",
        "the responder may be anybody, without --peer-ca; SHA-256 of its public key: N",
        f"3 {there} {asked}/request, N: the text, encrypted (Fernet)",
        f"4 {back} {asked}/response, N: the answer, encrypted (Fernet)",
    ]


def test_the_wire_is_the_labs(
    tmp_path: Path, start_responder: Callable[..., ResponderProcess], netid: str
) -> None:
    mosquitto = Mosquitto(tmp_path, "log_type all")
    try:
        start_responder("-p", str(mosquitto.port))
        assert succeeded(run("-p", str(mosquitto.port), netid, "reverse", "abc"), b"cba")
        assert succeeded(run("-p", str(mosquitto.port), "-i", "me", netid, "reverse", "a"), b"a")
        log = next(tmp_path.glob("*.log"))
        wait_until(lambda: "Client me disconnected" in log.read_text())
    finally:
        mosquitto.kill()
    for client in netid, "me":
        # 3.1.1, clean session; one SUBSCRIBE for both responses; nothing before the SUBACK
        story = (
            f"as {client} (p2, c1",
            f"Received SUBSCRIBE from {client}",
            f"\t{netid}/key-exchange/response (QoS 1)",
            f"\t{netid}/reverse/response (QoS 1)",
            f"Sending SUBACK to {client}",
            f"Received PUBLISH from {client} (d0, q1, r0, m",
            f"'{netid}/key-exchange/request'",
            f"Received PUBLISH from {client} (d0, q1, r0, m",
            f"'{netid}/reverse/request'",
            f"Received DISCONNECT from {client}",
        )
        text = log.read_text()
        assert re.search(".*".join(map(re.escape, story)), text, re.DOTALL)
        assert text.count(f"Received SUBSCRIBE from {client}\n") == 1
        assert text.count(f"Received PUBLISH from {client} ") == 2


def test_the_local_broker_and_responder_answer_and_end(netid: str) -> None:
    seen: set[int] = set()

    def has_ended() -> bool:
        seen.update(processes_below(process.pid))
        return process.poll() is not None

    with started("--local", netid, "reverse", "abc") as process:
        wait_until(has_ended)
        assert succeeded(finish(process), b"cba")
    assert seen
    wait_until(lambda: not any(map(is_running, seen)))


def test_the_local_broker_admits_nobody_else(netid: str) -> None:
    refused: list[object] = []
    with started("-v", "--local", netid, "reverse", "-", stdin=subprocess.PIPE) as process:
        assert process.stderr
        said = process.stderr.readline().decode()  # of its own responder
        port = re.search(r"CONNACK from 127\.0\.0\.1 port (\d+)", said)
        assert port
        stranger = paho.Client(CallbackAPIVersion.VERSION2)
        stranger.on_connect = lambda *arguments: refused.append(arguments[3])
        stranger.username_pw_set("local", "guessed")
        stranger.connect("127.0.0.1", int(port[1]))
        stranger.loop_start()
        wait_until(lambda: refused)
        stranger.loop_stop()
        output, _ = process.communicate(b"abc", timeout=SAFETY)
    assert str(refused[0]) in ("Not authorized", "Bad user name or password")
    assert (output, process.returncode) == (b"cba\n", 0)


def test_a_local_broker_serves_a_responder(
    start_responder: Callable[..., ResponderProcess], netid: str
) -> None:
    port = str(free_port())
    responder = start_responder("--local", "-h", "127.0.0.1", "-p", port)
    assert succeeded(run("-h", "127.0.0.1", "-p", port, netid, "reverse", "abc"), b"cba")
    assert responder.stop() == 0


# --- standard streams --------------------------------------------------------------------------


def in_shell(redirection: str, *arguments: str) -> Run:
    command = ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, str(PROGRAM)]
    return subprocess.run([*command, *arguments], capture_output=True, timeout=SAFETY)


@pytest.mark.usefixtures("responder")
@pytest.mark.parametrize(
    ("redirection", "words"),
    [
        (">&-", "closed"),
        (">&- <&-", "closed"),
        (">/dev/full", "No space left on device"),
        ("</dev/full >/dev/full", "No space left on device"),
    ],
)
def test_standard_output_that_takes_nothing_is_a_failure(
    broker: Mosquitto, netid: str, redirection: str, words: str
) -> None:
    result = in_shell(redirection, "-p", str(broker.port), netid, "reverse", "abc")
    assert failed(result, "cannot write to standard output", words)


@pytest.mark.parametrize("size", [3, 300_000])
def test_a_reader_that_is_gone_is_a_failure(ask: Callable[..., Run], size: int) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    result = ask("reverse", "-", stdin=b"x" * size, stdout=writer)
    os.close(writer)
    assert failed(result, "cannot write to standard output: Broken pipe")


@pytest.mark.usefixtures("responder")
@pytest.mark.parametrize("redirection", ["<&-", "2>&-", "<&- 2>&-", "2>/dev/full"])
def test_streams_that_are_not_needed_may_be_closed(
    broker: Mosquitto, netid: str, redirection: str
) -> None:
    result = in_shell(redirection, "-p", str(broker.port), netid, "reverse", "abc")
    assert succeeded(result, b"cba")


def test_a_failure_keeps_its_status_without_standard_error() -> None:
    result = in_shell("2>&-", "-p", str(free_port()), "x", "reverse", "abc")
    assert (result.stdout, result.returncode) == (b"", 1)


@pytest.mark.parametrize(
    ("redirection", "words"), [("<&-", "closed"), ("0>/dev/null", "Bad file descriptor")]
)
def test_standard_input_that_cannot_be_read_is_a_failure(redirection: str, words: str) -> None:
    result = in_shell(redirection, "-p", str(free_port()), "x", "reverse", "-")
    assert failed(result, "standard input", words)


@pytest.mark.parametrize("data", [bytes(range(256)), b"\xed\xa0\x80", b"ab\xc3"])
def test_standard_input_that_is_not_utf8_is_a_failure(ask: Callable[..., Run], data: bytes) -> None:
    assert failed(ask("reverse", "-", stdin=data), "standard input is not UTF-8")


# --- no broker ---------------------------------------------------------------------------------


@contextlib.contextmanager
def server(reply: bytes | None) -> Iterator[int]:
    """Listen, and give each client a reply, then an end; or nothing at all."""

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                connections.append(connection)
                if reply is not None:
                    connection.recv(1)
                    connection.sendall(reply)
                    connection.shutdown(socket.SHUT_WR)

    connections: list[socket.socket] = []
    listener = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=serve)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(SAFETY)
        for connection in connections:
            connection.close()


@pytest.mark.parametrize("options", [(), ("--tls",)], ids=["plain", "TLS"])
@pytest.mark.parametrize("host", ["no-such-host.invalid", "a..b", "x" * 64, "[::1]"])
def test_a_host_that_does_not_exist_is_named(host: str, options: tuple[str, ...]) -> None:
    result = run("-h", host, "-W", "20", *options, "x", "reverse", "abc")
    assert failed(result, f"cannot find the host '{host}'", "hint: ", "--host")


def test_a_refused_connection_is_told_with_host_and_port() -> None:
    port = free_port()
    result = run("-h", "127.0.0.1", "-p", str(port), "x", "reverse", "abc")
    assert failed(result, "connection refused", f"127.0.0.1 port {port}", "hint: ")


@pytest.mark.parametrize(
    "reply",
    [
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"\x15\x03\x03\0\2\2\x28",
        b"",
    ],
    ids=["HTTP", "SSH", "TLS", "an end"],
)
def test_another_protocol_is_no_broker(reply: bytes) -> None:
    with server(reply) as port:
        result = run("-p", str(port), "-W", "20", "x", "reverse", "abc")
    assert failed(result, "no MQTT broker answers on localhost port", str(port), "hint: ")


def test_a_silent_server_is_no_broker() -> None:
    with server(None) as port:
        result = run("-p", str(port), "-W", "0.5", "x", "reverse", "abc")
    assert failed(result, "no MQTT broker answers", "0.5 s", "hint: ")


def test_a_timeout_that_is_over_at_once_is_told() -> None:
    with server(None) as port:
        result = run("-p", str(port), "-W", "1e-9", "x", "reverse", "abc")
    assert failed(result, "1e-09 s")


def test_a_broker_that_refuses_is_told_with_its_reason(tmp_path: Path) -> None:
    mosquitto = Mosquitto(tmp_path, f"password_file {os.devnull}\nallow_anonymous false")
    result = run("-p", str(mosquitto.port), "x", "reverse", "abc")
    mosquitto.kill()
    assert failed(result, "refuses the connection", str(mosquitto.port), "not authorized")


# --- no answer ---------------------------------------------------------------------------------


def foreign_key() -> bytes:
    return crypto.generate_keyset()[1].replace(b"PUBLIC", b"PRIVATE")


KEY_ANSWERS: dict[str, tuple[Callable[[bytes], bytes | None], str]] = {
    "nothing": (lambda _: None, "no responder answered the key exchange"),
    "no key": (lambda _: b"text", "no valid key came"),
    "a private key": (lambda _: foreign_key(), "no valid key came"),
    "the client's own key": (lambda own: own, "our own key handed back (1)"),
}


@pytest.mark.parametrize("case", KEY_ANSWERS)
def test_a_key_exchange_is_not_completed_by(
    case: str, own_broker: Mosquitto, peer: Connect, netid: str
) -> None:
    answer, words = KEY_ANSWERS[case]
    responder = peer(own_broker.port, "+/+/request")
    port = str(own_broker.port)
    with started("-p", port, "-W", "2", netid, "reverse", "abc") as process:
        payload = answer(responder.receive(f"{netid}/key-exchange/request"))
        if payload is not None:
            responder.publish(f"{netid}/key-exchange/response", payload)
        assert failed(finish(process), words, f"{netid}/key-exchange/response within 2 s")


def test_retained_answers_are_ignored(own_broker: Mosquitto, peer: Connect, netid: str) -> None:
    _, public = crypto.generate_keyset()
    topic = f"{netid}/key-exchange/response"
    peer(own_broker.port, "x").publish(topic, public, retain=True)
    result = run("-p", str(own_broker.port), "-W", "0.5", netid, "reverse", "abc")
    assert failed(result, "no ", topic, "0.5 s")


def exchange(responder: Peer, netid: str) -> bytes:
    """Answer a key exchange as the lab's responder does."""
    private, public = crypto.generate_keyset()
    peer_public = responder.receive(f"{netid}/key-exchange/request")
    responder.publish(f"{netid}/key-exchange/response", public)
    return crypto.create_shared_key(private, peer_public)


RESPONSES: dict[str, tuple[Callable[[bytes, bytes], bytes | None], tuple[str, ...]]] = {
    "nothing": (lambda token, key: None, ("no response came",)),
    "text": (lambda token, key: b"no token", ("no response for us", "not a Fernet token (1)")),
    "a token of another key": (
        lambda token, key: crypto.encrypt("text", bytes(32)),
        ("no response for us", "not encrypted with our key (1)"),
    ),
    "the client's own token": (
        lambda token, key: token,
        ("no response for us", "our own message handed back (1)"),
    ),
    "nothing at all": (lambda token, key: b"", ("no response for us", "not a Fernet token (1)")),
}


@pytest.mark.parametrize("case", RESPONSES)
def test_a_request_is_not_answered_by(
    case: str, own_broker: Mosquitto, peer: Connect, netid: str
) -> None:
    answer, words = RESPONSES[case]
    responder = peer(own_broker.port, "+/+/request")
    port = str(own_broker.port)
    with started("-p", port, "-W", "2", netid, "reverse", "abc") as process:
        key = exchange(responder, netid)
        payload = answer(responder.receive(f"{netid}/reverse/request"), key)
        if payload is not None:
            responder.publish(f"{netid}/reverse/response", payload)
        assert failed(finish(process), *words, f"{netid}/reverse/response within 2 s")


def test_a_response_that_is_not_utf8_is_a_failure(
    own_broker: Mosquitto, peer: Connect, netid: str
) -> None:
    responder = peer(own_broker.port, "+/+/request")
    with started("-p", str(own_broker.port), netid, "reverse", "abc") as process:
        key = exchange(responder, netid)
        responder.receive(f"{netid}/reverse/request")
        responder.publish(f"{netid}/reverse/response", crypto.encrypt(b"\xff", key))
        assert failed(finish(process), "not UTF-8")


# --- the lab's own peers -----------------------------------------------------------------------


def test_a_lab_responder_is_understood(own_broker: Mosquitto, peer: Connect, netid: str) -> None:
    responder = peer(own_broker.port, "+/+/request")
    with started("-p", str(own_broker.port), netid, "uppercase", "naïve") as process:
        key = exchange(responder, netid)
        text = crypto.decrypt(responder.receive(f"{netid}/uppercase/request"), key).decode()
        answer = crypto.encrypt(text.upper(), key)
        responder.publish(f"{netid}/uppercase/response", answer)
        assert succeeded(finish(process), "NAÏVE".encode())


def test_the_answer_is_found_among_others(own_broker: Mosquitto, peer: Connect, netid: str) -> None:
    responder = peer(own_broker.port, "+/+/request")
    with started("-p", str(own_broker.port), netid, "reverse", "abc") as process:
        responder.publish(f"{netid}/key-exchange/response", b"text")
        key = exchange(responder, netid)
        token = responder.receive(f"{netid}/reverse/request")
        for payload in b"text", token, crypto.encrypt("no", bytes(32)), crypto.encrypt("yes", key):
            responder.publish(f"{netid}/reverse/response", payload)
        assert succeeded(finish(process), b"yes")


@pytest.mark.usefixtures("responder")
def test_a_lab_client_is_answered(broker: Mosquitto, peer: Connect, netid: str) -> None:
    client = peer(broker.port, f"{netid}/+/response", client_id=netid)
    private, public = crypto.generate_keyset()
    client.publish(f"{netid}/key-exchange/request", public)
    key = crypto.create_shared_key(private, client.receive(f"{netid}/key-exchange/response"))
    for action, response in ("uppercase", b"TEXT"), ("title-case", b"Text"):
        client.publish(f"{netid}/{action}/request", crypto.encrypt("text", key))
        token = client.receive(f"{netid}/{action}/response")
        assert crypto.decrypt(token, key) == response


# --- the end of a connection, and of patience --------------------------------------------------


def test_a_broker_that_dies_ends_the_request_at_once(
    own_broker: Mosquitto, peer: Connect, netid: str
) -> None:
    responder = peer(own_broker.port, "+/+/request")
    with started("-p", str(own_broker.port), "-W", "999", netid, "reverse", "abc") as process:
        responder.receive(f"{netid}/key-exchange/request")
        own_broker.kill()
        assert failed(finish(process), "was lost while waiting for the key exchange")


def test_a_second_client_with_the_same_id_ends_the_first_with_a_hint(
    own_broker: Mosquitto, peer: Connect, netid: str
) -> None:
    responder = peer(own_broker.port, "+/+/request")
    request = "-p", str(own_broker.port), "-W", "999", netid, "reverse", "abc"
    with started(*request) as first:
        exchange(responder, netid)
        responder.receive(f"{netid}/reverse/request")
        with started(*request) as second:
            key = exchange(responder, netid)
            responder.receive(f"{netid}/reverse/request")
            words = "was lost while waiting for the response", "hint: ", f"'{netid}'", "--id"
            assert failed(finish(first), *words)
            responder.publish(f"{netid}/reverse/response", crypto.encrypt("cba", key))
            assert succeeded(finish(second), b"cba")


def test_two_clients_that_log_in_can_share_a_netid(
    own_broker: Mosquitto, peer: Connect, netid: str
) -> None:
    responder = peer(own_broker.port, "+/+/request")
    request = "-p", str(own_broker.port), "-u", "alice", netid, "reverse", "abc"
    with started(*request) as first:
        first_key = exchange(responder, netid)
        responder.receive(f"{netid}/reverse/request")
        with started(*request) as second:
            key = exchange(responder, netid)
            responder.receive(f"{netid}/reverse/request")
            for each in key, first_key:
                responder.publish(f"{netid}/reverse/response", crypto.encrypt("cba", each))
            assert succeeded(finish(second), b"cba")
            assert succeeded(finish(first), b"cba")


def interrupt(process: subprocess.Popen[bytes]) -> None:
    """Press Ctrl-C: the whole group is interrupted, and nothing of it stays."""
    group = {process.pid} | processes_below(process.pid)
    os.killpg(process.pid, signal.SIGINT)
    result = finish(process)
    assert (result.stdout, result.returncode) == (b"", 130)
    assert error_lines(result) == ""
    wait_until(lambda: not any(map(is_running, group)))


def test_ctrl_c_ends_a_request_that_waits_for_a_broker() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = str(listener.getsockname()[1])
        with started("-p", port, "x", "reverse", "abc") as process:
            connection, _ = listener.accept()
            interrupt(process)
            connection.close()


def test_ctrl_c_ends_a_request_that_waits_for_an_answer(
    own_broker: Mosquitto, peer: Connect, netid: str
) -> None:
    responder = peer(own_broker.port, "+/+/request")
    with started("-p", str(own_broker.port), netid, "reverse", "abc") as process:
        responder.receive(f"{netid}/key-exchange/request")
        interrupt(process)


def test_ctrl_c_ends_a_request_that_reads_standard_input() -> None:
    with started("x", "reverse", "-", stdin=subprocess.PIPE) as process:
        wait_until(lambda: processes_below(process.pid))
        interrupt(process)


def test_ctrl_c_ends_a_request_with_a_local_broker(netid: str) -> None:
    with started("--local", netid, "reverse", "-", stdin=subprocess.PIPE) as process:
        wait_until(lambda: processes_below(process.pid))
        interrupt(process)


# --- a terminal --------------------------------------------------------------------------------


def at_terminal(*arguments: str) -> tuple[Run, str]:
    """Run the program with a terminal as standard error; return also what that showed."""
    master, slave = pty.openpty()
    with started(*arguments, stderr=slave) as process:
        result = finish(process)
    os.set_blocking(master, False)
    shown = b""
    with contextlib.suppress(BlockingIOError):
        while data := os.read(master, 65536):
            shown += data
    os.close(slave)
    os.close(master)
    return result, shown.decode()


def test_a_person_at_a_terminal_is_told_once_what_is_waited_for(
    own_broker: Mosquitto, netid: str
) -> None:
    port = str(own_broker.port)
    result, shown = at_terminal("-p", port, "-W", "4", netid, "reverse", "abc")
    notice, error, *_ = shown.splitlines()
    assert "waiting for" in notice
    assert "error: no responder answered" in error
    assert shown.count("waiting for") == 1
    assert result.returncode == 1


@pytest.mark.usefixtures("responder")
def test_a_terminal_shows_nothing_of_a_quick_answer(broker: Mosquitto, netid: str) -> None:
    result, shown = at_terminal("-p", str(broker.port), netid, "reverse", "abc")
    assert (shown, result.stdout, result.returncode) == ("", b"cba\n", 0)
