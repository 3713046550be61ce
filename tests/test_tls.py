"""TLS and login at the sample broker side: every way in, and everything that can go wrong."""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path

import broker_side
import hostile
import pytest
from broker_side import PASSWORDS, BrokerSide, Client, issue, load, made, started
from conftest import (
    PROGRAM,
    SAFETY,
    ResponderProcess,
    error_lines,
    free_port,
    processes_below,
    run,
)
from cryptography import x509
from cryptography.hazmat.primitives import serialization

import crypto
import secure_mqtt_client as program
from secure_mqtt.certificates import has_expired

Start = Callable[..., ResponderProcess]
REQUEST = ("alice", "reverse", "text")
ANSWER = b"txet\n"

certificates, broker, own = broker_side.certificates, broker_side.running, broker_side.own
change_program = broker_side.change_program


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the certificates of another authority."""
    return made(tmp_path_factory.mktemp("strangers") / "certs", "localhost", "alice", "responder")


def certified(directory: Path, name: str = "") -> list[str]:
    """Return the options to trust the authority, and to show a certificate."""
    own_files = [f"--cert={directory}/{name}.crt", f"--key={directory}/{name}.key"]
    return [f"--cafile={directory}/ca.crt", *(own_files if name else [])]


def password_file(directory: Path, name: str) -> Path:
    path = directory / f"{name}.password"
    path.write_text(PASSWORDS[name] + "\n", encoding="utf-8")
    path.chmod(0o600)
    return path


def plain(broker: BrokerSide, name: str) -> list[str]:
    return [f"-p{broker.plain}"]


def certificate(broker: BrokerSide, name: str) -> list[str]:
    return [f"-p{broker.tls}", *certified(broker.directory, name)]


def proxy(broker: BrokerSide, name: str) -> list[str]:
    return [f"-p{broker.proxy}", *certified(broker.directory, name)]


def password(broker: BrokerSide, name: str) -> list[str]:
    file = password_file(broker.directory, name)
    login = [f"--username={name}", f"--password-file={file}"]
    return [f"-p{broker.password}", *certified(broker.directory), *login]


WAYS = (plain, certificate, proxy, password)


def failure(*arguments: str, netid: str = "alice", **env: str) -> tuple[str, str]:
    """Run a request that fails; return the error and the hint."""
    result = run(*arguments, netid, "reverse", "text", env=os.environ | env)
    assert (result.stdout, result.returncode) == (b"", 1)
    *others, error, hint = error_lines(result).splitlines()
    assert all("--insecure: " in line for line in others)
    error, hint = (line.removeprefix(f"{PROGRAM.name}: ") for line in (error, hint))
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")
    return error[7:], hint[6:]


# --- what works --------------------------------------------------------------------------------


@pytest.mark.parametrize("way", WAYS)
def test_a_responder_on_any_port_answers_requests_on_every_port(
    way: Callable[[BrokerSide, str], list[str]], broker: BrokerSide, start_responder: Start
) -> None:
    start_responder(*way(broker, "responder"))
    for other in WAYS:
        result = run(*other(broker, "alice"), *REQUEST)
        assert (error_lines(result), result.stdout, result.returncode) == ("", ANSWER, 0)


def test_large_messages_and_many_at_once_pass_through_tls(
    broker: BrokerSide, start_responder: Start
) -> None:
    """What TLS has already decrypted no longer shows at the socket."""
    start_responder(*proxy(broker, "responder"))
    message = b"0123456789abcdef" * 2**16
    arguments = [*proxy(broker, "alice"), "alice", "reverse", "-"]
    result = run(*arguments, stdin=message)
    assert (error_lines(result), result.stdout == message[::-1] + b"\n") == ("", True)
    with Client(broker.plain) as clients:
        clients.subscribe("+/key-exchange/response")
        public_key = crypto.generate_keyset()[1].decode()
        netids = {f"netid{number}" for number in range(100)}
        for netid in netids:
            clients.client.publish(f"{netid}/key-exchange/request", public_key, 1)
        assert {clients.receive()[0].partition("/")[0] for _ in netids} == netids


def test_insecure_trusts_any_broker_and_says_so(
    broker: BrokerSide, strangers: Path, start_responder: Start
) -> None:
    start_responder(*certificate(broker, "responder"))
    own_files = certified(broker.directory, "alice")[1:]
    # The certificate's names end where inet_aton's notation of 127.0.0.1 begins.
    options = ["--insecure", *own_files, "-h127.1", f"-p{broker.tls}"]
    result = run(*options, *REQUEST)
    assert result.stdout == ANSWER
    [warning] = error_lines(result).splitlines()
    assert "--insecure" in warning
    assert "error" not in warning
    without = [f"--cafile={broker.directory}/ca.crt", *own_files, "-h127.1", f"-p{broker.tls}"]
    assert (
        "its certificate is for 'localhost', '127.0.0.1', '::1', not for 127.1"
        in failure(*without)[0]
    )


@pytest.mark.parametrize(
    ("trust", "words"),
    [
        (
            "--cafile={certs}/ca.crt",
            "with TLS 1.3; the broker's certificate is for 'localhost', '127.0.0.1',"
            " '0:0:0:0:0:0:0:1', issued by 'secure-mqtt CA', valid until ",
        ),
        (
            "--insecure",
            "with TLS 1.3, but the broker may be anybody: its certificate was not verified",
        ),
    ],
    ids=["verified", "insecure"],
)
def test_verbose_tells_of_tls_of_the_brokers_certificate_and_of_the_peers(
    trust: str, words: str, broker: BrokerSide, start_responder: Start, tmp_path: Path
) -> None:
    parts = [(broker.directory / f"responder.{end}").read_bytes() for end in ("crt", "key")]
    (tmp_path / "responder.pem").write_bytes(b"".join(parts))
    start_responder(*certificate(broker, "responder"), f"--identity={tmp_path}/responder.pem")
    options = [f"-p{broker.tls}", *certified(broker.directory, "alice")[1:], "-v"]
    authorities = [trust.format(certs=broker.directory), f"--peer-ca={broker.directory}/ca.crt"]
    result = run(*options, *authorities, *REQUEST)
    assert result.stdout == ANSWER
    assert f" ms: CONNACK from localhost port {broker.tls}, {words}" in error_lines(result)
    assert " ms: the responder has proved to be 'responder'\n" in error_lines(result)


PAIR_OF_LOGFMT = r'\w+=("([^"\\]|\\.)*"|[^\s"=]+)'


def test_all_that_a_responder_logs_is_logfmt(broker: BrokerSide, start_responder: Start) -> None:
    own_files = certified(broker.directory, "responder")[1:]
    responder = start_responder("-v", "--insecure", f"-p{broker.tls}", *own_files)
    assert run(*certificate(broker, "alice"), *REQUEST).stdout == ANSWER
    responder.wait_for("event=answered", times=2)
    log = [line for line in responder.lines if not line.startswith("ready: ")]
    for line in log:
        assert re.fullmatch(rf"{PAIR_OF_LOGFMT}( {PAIR_OF_LOGFMT})+", line), line
    insecure, connected, *_ = log
    assert ' level=warning event=note text="--insecure: ' in insecure
    assert ' level=info event=connected broker="localhost port ' in connected


# --- what is allowed, but unwise ---------------------------------------------------------------


def warnings(broker: BrokerSide, *options: str) -> list[str]:
    """Run a request that is answered all the same; return what standard error says."""
    result = run(f"-p{broker.tls}", f"--cafile={broker.directory}/ca.crt", *options, *REQUEST)
    assert (result.stdout, result.returncode) == (ANSWER, 0)
    return [line.removeprefix(f"{PROGRAM.name}: ") for line in error_lines(result).splitlines()]


@pytest.mark.parametrize(("days", "is_said"), [(1, True), (13, True), (15, False)])
def test_a_certificate_of_ours_that_ends_within_14_days_is_a_warning(
    days: int, is_said: bool, broker: BrokerSide, start_responder: Start, own: Path
) -> None:
    start_responder(*certificate(broker, "responder"))
    issue(own, "alice", names=("alice",), ends=timedelta(days=days))
    date = f"{load(own, 'alice').not_valid_after_utc:%Y-%m-%d}"
    options = [*certified(own, "alice")[1:], f"--identity={own}/alice.pem"]
    assert warnings(broker, *options) == (
        [
            f"--cert {own}/alice.crt ends on {date}; renew it",
            f"--identity {own}/alice.pem ends on {date}; renew it",
        ]
        if is_said
        else []
    )


def test_a_secret_file_that_all_users_can_read_is_a_warning(
    broker: BrokerSide, start_responder: Start, own: Path
) -> None:
    start_responder(*certificate(broker, "responder"))
    secrets = {
        "--key": own / "alice.key",
        "--password-file": password_file(own, "alice"),
        "--identity": own / "alice.pem",
    }
    options = [f"--cert={own}/alice.crt", "-ualice"]
    options += [f"{option}={path}" for option, path in secrets.items()]
    for mode in 0o600, 0o640:
        for path in secrets.values():
            path.chmod(mode)
        assert warnings(broker, *options) == []
    for path in secrets.values():
        path.chmod(0o644)
    assert warnings(broker, *options) == [
        f"{option} {path} can be read by all users of this machine; run: chmod 600 {path}"
        for option, path in secrets.items()
    ]


def test_a_responders_warnings_are_in_its_log(
    own: Path, broker: BrokerSide, start_responder: Start
) -> None:
    (own / "responder.key").chmod(0o604)
    responder = start_responder(*certificate(broker, "responder")[:1], *certified(own, "responder"))
    [warning, _] = responder.lines
    assert ' level=warning event=note text="--key ' in warning


def test_tls_alone_trusts_whom_the_system_trusts(
    broker: BrokerSide, start_responder: Start
) -> None:
    start_responder(*plain(broker, "responder"))
    login = password(broker, "alice")[2:]
    arguments = [f"-p{broker.password}", "--tls", *login, *REQUEST]
    env = os.environ | {"SSL_CERT_FILE": str(broker.directory / "ca.crt")}  # OpenSSL's own variable
    assert run(*arguments, env=env).stdout == ANSWER


def test_certificate_and_key_may_be_in_one_file_in_any_order(
    broker: BrokerSide, start_responder: Start, tmp_path: Path
) -> None:
    start_responder(*plain(broker, "responder"))
    parts = [(broker.directory / f"alice.{end}").read_bytes() for end in ("crt", "key")]
    for content in b"".join(parts), b"".join(reversed(parts)):
        (tmp_path / "both.pem").write_bytes(content)
        (tmp_path / "both.pem").chmod(0o600)
        both = [f"--cert={tmp_path}/both.pem", f"--key={tmp_path}/both.pem"]
        result = run(f"-p{broker.tls}", *certified(broker.directory), *both, *REQUEST)
        assert (error_lines(result), result.stdout) == ("", ANSWER)


def test_a_certificate_may_come_with_text_and_with_the_authoritys(
    broker: BrokerSide, start_responder: Start, tmp_path: Path
) -> None:
    start_responder(*plain(broker, "responder"))
    text = ["openssl", "x509", "-text", "-in", str(broker.directory / "alice.crt")]
    chain = subprocess.run(text, check=True, stdout=subprocess.PIPE, timeout=SAFETY).stdout
    chain += (broker.directory / "ca.crt").read_bytes()
    (tmp_path / "chain.crt").write_bytes(chain)
    files = [f"--cert={tmp_path}/chain.crt", f"--key={broker.directory}/alice.key"]
    result = run(f"-p{broker.tls}", *certified(broker.directory), *files, *REQUEST)
    assert (error_lines(result), result.stdout) == ("", ANSWER)


TLS_OPTIONS = (["--tls"], ["--insecure"], ["--cafile"], ["--cert", "--key"])


@pytest.mark.parametrize("options", TLS_OPTIONS, ids=" ".join)
def test_each_tls_option_turns_tls_on_and_moves_the_default_port(
    options: list[str], certificates: Path
) -> None:
    files = {"--cafile": "ca.crt", "--cert": "alice.crt", "--key": "alice.key"}
    arguments = [
        f"{option}={certificates / files[option]}" if option in files else option
        for option in options
    ]
    settings = program.settings_from([*arguments, *REQUEST])
    assert settings.uses_tls
    assert settings.port == 8883
    assert program.settings_from([*arguments, "-p1884", *REQUEST]).port == 1884


def client_hello(*arguments: str) -> bytes:
    """Return what a request sends first."""
    command = [sys.executable, str(PROGRAM), "-W5", *arguments]
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(SAFETY)
        port = server.getsockname()[1]
        process = subprocess.Popen([*command, f"-p{port}", *REQUEST], stderr=subprocess.DEVNULL)
        with server.accept()[0] as connection:
            connection.settimeout(SAFETY)
            first = connection.recv(16384)
    assert process.wait(SAFETY) == 1
    return first


@pytest.mark.parametrize("option", ["--tls", "--insecure"])
def test_only_tls_1_2_and_1_3_are_offered_and_the_host_is_named(option: str) -> None:
    hello = client_hello(option)
    assert hello.startswith(b"\x16\x03")  # a handshake
    # Extensions (RFC 8446, 4.2): type, length, content.
    assert bytes.fromhex("002b 0005 04 0304 0303") in hello  # supported_versions
    assert bytes.fromhex("0000 000e 000c 00 0009") + b"localhost" in hello  # server_name


def test_without_tls_options_no_context_is_made_and_x509_is_never_loaded(
    broker: BrokerSide, start_responder: Start, tmp_path: Path
) -> None:
    start_responder(*plain(broker, "responder"))
    # The ssl module opens this file for each context that it makes.
    log = tmp_path / "keys"
    for way, has_context in (plain, False), (certificate, True):
        command = [sys.executable, "-Ximporttime", str(PROGRAM), *way(broker, "alice"), *REQUEST]
        result = subprocess.run(
            command,
            capture_output=True,
            env=os.environ | {"SSLKEYLOGFILE": str(log)},
            timeout=SAFETY,
        )
        assert result.stdout == ANSWER
        modules = {line.rpartition(b"|")[2].strip() for line in result.stderr.splitlines()}
        assert b"paho.mqtt.client" in modules
        assert b"cryptography.x509" not in modules
        assert log.exists() == has_context


# --- what fails at run time --------------------------------------------------------------------

TRUST = "--cafile={certs}/ca.crt"
NO_TLS = "TLS failed with the broker on localhost port {plain}: it does not speak TLS on this port"
WANTS = "it wants a client certificate"
REFUSES = "it refuses our certificate ("
UNKNOWN = "its certificate comes from an unknown authority"
NOT_AUTHORIZED = "the broker on localhost port {password} refuses the connection: not authorized"
# The options; how the error begins; words of the hint.
FAILURES: dict[str, tuple[str, str, str]] = {
    "an unknown authority": (
        "-p{tls} --cafile={others}/ca.crt",
        "TLS failed with the broker on localhost port {tls}: " + UNKNOWN,
        "--cafile",
    ),
    "an authority that the system does not know": (
        "-p{password} --tls",
        "TLS failed with the broker on localhost port {password}: " + UNKNOWN,
        "--cafile",
    ),
    "an unknown authority behind NGINX": (
        "-p{proxy} --cafile={others}/ca.crt",
        "TLS failed with the broker on localhost port {proxy}: " + UNKNOWN,
        "--cafile",
    ),
    "no client certificate": (
        "-p{tls} " + TRUST,
        "TLS failed with the broker on localhost port {tls}: " + WANTS,
        "--cert and --key",
    ),
    "no client certificate behind NGINX": (
        "-p{proxy} " + TRUST,
        "TLS failed with the broker on localhost port {proxy}: " + WANTS,
        "--cert and --key",
    ),
    "no client certificate, insecurely": (
        "-p{tls} --insecure",
        "TLS failed with the broker on localhost port {tls}: " + WANTS,
        "--cert and --key",
    ),
    "a client certificate of another authority": (
        "-p{tls} " + TRUST + " --cert={others}/alice.crt --key={others}/alice.key",
        "TLS failed with the broker on localhost port {tls}: " + REFUSES,
        "its authority",
    ),
    "a client certificate that is for servers": (
        "-p{tls} " + TRUST + " --cert={certs}/localhost.crt --key={certs}/localhost.key",
        "TLS failed with the broker on localhost port {tls}: " + REFUSES,
        "its authority",
    ),
    "a client certificate that is refused behind NGINX": (
        "-p{proxy} " + TRUST + " --cert={others}/alice.crt --key={others}/alice.key",
        "TLS failed with the broker on localhost port {proxy}: " + REFUSES,
        "its authority",
    ),
    "TLS on a plain port": ("-p{plain} " + TRUST, NO_TLS, "leave out the TLS options"),
    "TLS on a plain port, insecurely": ("-p{plain} --insecure", NO_TLS, "--port"),
    "plain on a TLS port": (
        "-p{tls}",
        "no MQTT broker answers on localhost port {tls}: no CONNACK came",
        "a TLS port needs --cafile or --tls",
    ),
    "plain with a password on a TLS port": (
        "-p{password} -ualice --password-file={certs}/alice.password",
        "no MQTT broker answers on localhost port {password}: no CONNACK came",
        "a TLS port needs --cafile or --tls",
    ),
    "no login": (
        "-p{password} " + TRUST,
        NOT_AUTHORIZED,
        "it may want --username and --password-file, or --cert",
    ),
    "a certificate instead of a login": (
        "-p{password} --cert={certs}/alice.crt --key={certs}/alice.key " + TRUST,
        NOT_AUTHORIZED,
        "it may want --username and --password-file, or not admit the name in --cert",
    ),
    "another's password": (
        "-p{password} -ualice --password-file={certs}/bob.password " + TRUST,
        NOT_AUTHORIZED,
        "the password may be wrong, or the user unknown: check --username and --password-file",
    ),
    "an unknown user": (
        "-p{password} -umallory --password-file={certs}/bob.password " + TRUST,
        NOT_AUTHORIZED,
        "the password may be wrong, or the user unknown: check --username and --password-file",
    ),
    "no password": (
        "-p{password} -ualice " + TRUST,
        NOT_AUTHORIZED,
        "no password was given: check --username and --password-file",
    ),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_request_says_what_is_wrong_with(case: str, broker: BrokerSide, strangers: Path) -> None:
    options, message, hint = FAILURES[case]
    names = {
        **{name: getattr(broker, name) for name in ("plain", "tls", "proxy", "password")},
        "certs": broker.directory,
        "others": strangers,
    }
    for name in "alice", "bob":
        password_file(broker.directory, name)
    error, found_hint = failure(*(option.format(**names) for option in options.split()))
    assert error.startswith(message.format(**names))
    assert hint in found_hint


EXPIRED = {"begins": timedelta(days=-2), "ends": timedelta(days=-1)}
FUTURE = {"begins": timedelta(days=1), "ends": timedelta(days=2)}
# What the broker's certificate is; what is wrong with it; a word of the hint.
SERVERS: dict[str, tuple[dict[str, object], str, str]] = {
    "expired": ({"names": ("localhost",), **EXPIRED}, "its certificate has expired", "renew"),
    "not valid yet": ({"names": ("localhost",), **FUTURE}, "is not valid yet", "clock"),
    "for others": (
        {"names": ("mqtt.example.edu", "mqtt.example.org")},
        "its certificate is for 'mqtt.example.edu', 'mqtt.example.org', not for localhost",
        "--host",
    ),
    "for no host": (
        {"subject": "mqtt.example.edu"},
        "its certificate is for another name, not for localhost",
        "--host",
    ),
}


@pytest.mark.parametrize("case", SERVERS)
def test_a_request_says_why_the_brokers_certificate_is_not_good(case: str, own: Path) -> None:
    details, problem, hint = SERVERS[case]
    issue(own, "localhost", **details)  # type: ignore[arg-type]
    with started(own) as broker:
        for port in broker.tls, broker.proxy:
            error, found_hint = failure(f"-p{port}", *certified(own, "alice"))
            assert error.startswith(f"TLS failed with the broker on localhost port {port}: ")
            assert problem in error
            assert hint in found_hint


def test_a_client_certificate_that_only_the_broker_finds_expired_is_explained(
    own: Path, tmp_path: Path
) -> None:
    """The leaf is valid, so the program takes it; the authority between is not."""
    issue(own, "middle", **EXPIRED)  # type: ignore[arg-type]
    issue(own, "alice", "middle")
    with (own / "alice.crt").open("ab") as chain:
        chain.write((own / "middle.crt").read_bytes())
    with started(own) as broker:
        error, hint = failure(f"-p{broker.tls}", *certified(own, "alice"))
    assert REFUSES in error
    assert "valid now" in hint


BAD_CERTIFICATE, HANDSHAKE_FAILURE = (bytes([21, 3, 3, 0, 2, 2, code]) for code in (42, 40))


@contextlib.contextmanager
def tls_server(directory: Path, version: ssl.TLSVersion, last_word: bytes) -> Iterator[int]:
    """Listen with TLS, and refuse who has no certificate of our authority; yields the port.

    :param last_word: what is then sent, instead of the alert that OpenSSL would send
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "localhost.crt", directory / "localhost.key")
    context.load_verify_locations(directory / "ca.crt")
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = context.maximum_version = version

    def refuse(connection: socket.socket) -> None:
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        tls = context.wrap_bio(incoming, outgoing, server_side=True)
        while data := connection.recv(65536):
            incoming.write(data)
            try:
                tls.do_handshake()
            except ssl.SSLWantReadError:
                connection.sendall(outgoing.read())
            except ssl.SSLError:
                connection.sendall(last_word)
                return

    def serve() -> None:
        while True:
            with server.accept()[0] as connection, contextlib.suppress(ConnectionError):
                connection.settimeout(SAFETY)
                refuse(connection)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = hostile.in_thread(serve)
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join(SAFETY)


TLS_1_2, TLS_1_3 = ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3
NO_REASON = "it ends the connection without a reason"
# Whether we show a certificate; the server's version, and what it says; what we say of it.
REFUSALS: dict[str, tuple[bool, ssl.TLSVersion, bytes, str, str]] = {
    "our certificate without a word": (True, TLS_1_3, b"", NO_REASON, "may refuse our certificate"),
    "our certificate without a word, in TLS 1.2": (
        True,
        TLS_1_2,
        b"",
        NO_REASON,
        "may refuse our certificate",
    ),
    "no certificate without a word": (False, TLS_1_3, b"", NO_REASON, "(--cert and --key)"),
    "our certificate with an alert": (
        True,
        TLS_1_2,
        BAD_CERTIFICATE,
        "it refuses our certificate (",
        "its authority",
    ),
    "no certificate as if it were a bad one": (
        False,
        TLS_1_2,
        BAD_CERTIFICATE,
        "it ends the connection (sslv3 alert bad certificate)",
        "may want a client certificate (--cert and --key)",
    ),
    "no certificate with an alert that says nothing": (
        False,
        TLS_1_2,
        HANDSHAKE_FAILURE,
        "it ends the connection (sslv3 alert handshake failure)",
        "may want a client certificate (--cert and --key), or speak other versions of TLS",
    ),
    "our certificate with an alert that says nothing": (
        True,
        TLS_1_2,
        HANDSHAKE_FAILURE,
        "it ends the connection (sslv3 alert handshake failure)",
        "may refuse our certificate, or speak other versions of TLS",
    ),
}


@pytest.mark.parametrize("case", REFUSALS)
def test_of_a_broker_that_refuses_no_more_is_said_than_can_be_known(
    case: str, certificates: Path, strangers: Path
) -> None:
    shows, version, last_word, problem, words = REFUSALS[case]
    options = certified(strangers, "alice")[1:] if shows else []
    with tls_server(certificates, version, last_word) as port:
        error, hint = failure(f"-p{port}", f"--cafile={certificates}/ca.crt", *options)
    # OpenSSL 3.2 and newer have another name for alerts.
    error = error.replace("ssl/tls alert", "sslv3 alert")
    assert error.startswith(f"TLS failed with the broker on localhost port {port}: {problem}")
    assert words in hint


def test_a_broker_that_is_silent_after_tls_is_not_called_one_without_tls(
    certificates: Path,
) -> None:
    with tls_server(certificates, TLS_1_3, b"") as port:
        error, hint = failure(f"-p{port}", "-W2", *certified(certificates, "alice"))
    assert error.startswith(f"no MQTT broker answers on localhost port {port}: no CONNACK came")
    assert "TLS" not in hint


def test_a_web_server_is_not_taken_for_a_broker_with_tls(certificates: Path) -> None:
    answer = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n"
    with hostile.listening(lambda wire: wire.send(answer).end()) as port:
        error, hint = failure(f"-p{port}", *certified(certificates))
    assert error.endswith("it does not speak TLS on this port")
    assert "--port" in hint


def test_nothing_on_the_port_is_no_failure_of_tls(certificates: Path) -> None:
    error, _ = failure(f"-p{free_port()}", *certified(certificates))
    assert error.startswith("connection refused: nothing listens on localhost port ")


def test_a_server_that_is_silent_in_the_handshake_is_left_at_the_deadline(
    certificates: Path,
) -> None:
    with hostile.listening(lambda wire: None) as port:
        error, _ = failure(f"-p{port}", "-W1", *certified(certificates))
    assert f"localhost port {port}" in error
    assert "within 1 s" in error


def test_bad_user_name_or_password_is_said_where_the_broker_tells_it_apart() -> None:
    refuse: hostile.Script = {"connect": lambda c: c.send(hostile.connack(4)).close()}
    with hostile.hostile_broker(refuse) as (port, _):
        error, hint = failure(f"-p{port}", "-ualice", MQTT_PASSWORD="wrong")
    broker = f"localhost port {port}"
    assert error == f"the broker on {broker} refuses the connection: bad user name or password"
    assert "--password-file" in hint


# --- one NetID and another's topics ------------------------------------------------------------


@pytest.mark.parametrize("way", [certificate, proxy, password])
def test_a_netid_cannot_ask_as_another_and_learns_that_a_rule_may_drop_messages(
    way: Callable[[BrokerSide, str], list[str]], broker: BrokerSide, start_responder: Start
) -> None:
    responder = start_responder("-v", *plain(broker, "responder"))
    error, hint = failure("-W1", *way(broker, "alice"), netid="bob")
    assert error == (
        "no responder answered the key exchange on bob/key-exchange/response within 1 s"
    )
    assert "access rule" in hint
    assert run(*way(broker, "alice"), *REQUEST).stdout == ANSWER
    assert responder.has_said('netid="alice"')
    assert not responder.has_said('netid="bob"')


@pytest.mark.parametrize("way", [certificate, proxy, password])
def test_a_netid_cannot_answer_anothers_requests_nor_see_them(
    way: Callable[[BrokerSide, str], list[str]], broker: BrokerSide, start_responder: Start
) -> None:
    impostor = start_responder("-v", "bob", *way(broker, "alice"))
    error, _ = failure("-W1", *certificate(broker, "bob"), netid="bob")
    assert "no responder answered" in error
    assert not impostor.has_said('netid="bob"')
    start_responder(*plain(broker, "responder"))
    result = run(*certificate(broker, "bob"), "bob", "reverse", "text")
    assert (error_lines(result), result.stdout) == ("", ANSWER)


# --- wrong usage -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(certificates: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of good and unusable files."""
    folder = Path(shutil.copytree(certificates, tmp_path_factory.mktemp("files") / "files"))
    issue(folder, "expired", **EXPIRED)  # type: ignore[arg-type]
    key = serialization.load_pem_private_key((folder / "alice.key").read_bytes(), None)
    for name, form in (
        ("encrypted.key", serialization.PrivateFormat.PKCS8),
        ("encrypted-in-old-form.key", serialization.PrivateFormat.TraditionalOpenSSL),
    ):
        encryption = serialization.BestAvailableEncryption(b"secret")
        pem = key.private_bytes(serialization.Encoding.PEM, form, encryption)
        (folder / name).write_bytes(pem)
    (folder / "text").write_bytes(b"not PEM\n")
    (folder / "empty").write_bytes(b"")
    (folder / "damaged.crt").write_bytes(
        b"-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
    )
    (folder / "password").write_bytes(b"secret\n")
    return folder


PAIR = "--cert=alice.crt --key=alice.key"
# The options, and what the message must name.
WRONG: dict[str, tuple[str, list[str]]] = {
    "a certificate without its key": ("--cert=alice.crt", ["--cert", "--key"]),
    "a key without its certificate": ("--key=alice.key", ["--cert", "--key"]),
    "insecure with an authority": ("--insecure --cafile=ca.crt", ["--insecure", "--cafile"]),
    "a password without a user name": (
        "--password-file=password",
        ["--password-file", "--username"],
    ),
    "local with an authority": ("--local --cafile=ca.crt", ["--local", "TLS options"]),
    "local with a certificate": (f"--local {PAIR}", ["--local", "TLS options"]),
    "local with tls": ("--local --tls", ["--local", "TLS options"]),
    "local with insecure": ("--local --insecure", ["--local", "TLS options"]),
    "a status topic for a request": ("--status-topic=status", ["--status-topic", "--respond"]),
    "no authority's file": ("--cafile=none", ["--cafile", "none", "No such file"]),
    "no certificate's file": ("--cert=none --key=alice.key", ["--cert", "none", "No such file"]),
    "no key's file": ("--cert=alice.crt --key=none", ["--key", "none", "No such file"]),
    "no password's file": ("-ualice --password-file=none", ["--password-file", "No such file"]),
    "a folder for an authority": ("--cafile=.", ["--cafile", "Is a directory"]),
    "a folder for a key": ("--cert=alice.crt --key=.", ["--key", "Is a directory"]),
    "a folder for a password": ("-ualice --password-file=.", ["--password-file", "directory"]),
    "an authority in no PEM": ("--cafile=text", ["--cafile", "text", "PEM"]),
    "an empty authority": ("--cafile=empty", ["--cafile", "empty", "PEM"]),
    "a damaged authority": ("--cafile=damaged.crt", ["--cafile", "damaged.crt"]),
    "a key for an authority": ("--cafile=alice.key", ["--cafile", "alice.key", "PEM"]),
    "a certificate in no PEM": ("--cert=text --key=alice.key", ["--cert", "PEM"]),
    "an empty certificate": ("--cert=empty --key=alice.key", ["--cert", "PEM"]),
    "a damaged certificate": ("--cert=damaged.crt --key=alice.key", ["--cert"]),
    "a key in no PEM": ("--cert=alice.crt --key=text", ["--key", "PEM"]),
    "key and certificate exchanged": ("--cert=alice.key --key=alice.crt", ["--cert", "--key"]),
    "another's key": ("--cert=alice.crt --key=bob.key", ["--cert", "--key", "belong"]),
    "an expired certificate": (
        "--cert=expired.crt --key=expired.key",
        ["--cert", "expired.crt", "expired"],
    ),
    "an encrypted key": (
        "--cert=alice.crt --key=encrypted.key",
        ["--key", "encrypted", "openssl pkey"],
    ),
    "a key encrypted in the old form": (
        "--cert=alice.crt --key=encrypted-in-old-form.key",
        ["--key", "encrypted", "openssl pkey"],
    ),
    # As "$CA" is in a script where the variable is not set: it must not mean a plain connection.
    "an authority without a name": ("--cafile=", ["--cafile"]),
    "a certificate and a key without names": ("--cert= --key=", ["--cert"]),
    "a password's file without a name": ("-ualice --password-file=", ["--password-file"]),
    "an empty user name": ("--username=", ["--username"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_it_refuses_before_any_connection(case: str, files: Path) -> None:
    options, words = WRONG[case]
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = [] if "--local" in options else [f"-p{server.getsockname()[1]}"]
        result = run(*port, "-W1", *options.split(), *REQUEST, cwd=files)
        server.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            server.accept()[0].close()
            pytest.fail("it has connected")
    message, _, rest = error_lines(result).partition("\n")
    assert message.startswith(f"{PROGRAM.name}: error: ")
    for word in words:
        assert word in message
    assert rest == program.USAGE + "\n"
    assert (result.stdout, result.returncode) == (b"", 2)


@pytest.mark.parametrize("topic", ["a/+", "#", "", b"\xff", "x" * 65536])
def test_a_status_topic_that_is_none_is_refused(topic: str | bytes) -> None:
    result = run("--respond", "--status-topic", topic)
    assert "--status-topic" in error_lines(result).partition("\n")[0]
    assert (result.stdout, result.returncode) == (b"", 2)


@pytest.mark.parametrize("option", ["--password=secret", "-Psecret", "--pw=secret"])
def test_a_password_that_no_option_takes_is_not_shown(option: str) -> None:
    result = run(option, *REQUEST)
    assert "secret" not in error_lines(result)
    assert (result.stdout, result.returncode) == (b"", 2)


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("MQTT_PASSWORD", b"secret", ["MQTT_PASSWORD", "--username"]),
        ("MQTT_USERNAME", b"\xff", ["MQTT_USERNAME", "UTF-8"]),
    ],
)
def test_an_environment_that_cannot_be_used_is_refused(
    variable: str, value: bytes, words: list[str]
) -> None:
    env = {**os.environb, variable.encode(): value}
    result = run(f"-p{free_port()}", *REQUEST, env=env)
    message = error_lines(result).partition("\n")[0]
    for word in words:
        assert word in message
    assert "secret" not in message
    assert (result.stdout, result.returncode) == (b"", 2)


# --- login -------------------------------------------------------------------------------------

# Arguments, MQTT_USERNAME and MQTT_PASSWORD; the user name and password that follow.
LOGINS: dict[str, tuple[list[str], str | None, str | None, tuple[str, bytes | None]]] = {
    "none": ([], None, None, ("", None)),
    "all in the environment": ([], "env", "environment's", ("env", b"environment's")),
    "a user name in the environment": ([], "env", None, ("env", None)),
    "a user name before the environment's": (["-uarg"], "env", "e", ("arg", b"e")),
    "a file before the environment": (["--password-file=file"], "env", "e", ("env", b"file's")),
    "arguments before the environment": (
        ["--username=arg", "--password-file=file"],
        "env",
        "e",
        ("arg", b"file's"),
    ),
    "an empty password in the environment": ([], "env", "", ("env", b"")),
    "empty variables": ([], "", None, ("", None)),
    "what is not ASCII": (["-uälice"], None, "pässword", ("älice", "pässword".encode())),
}


@pytest.mark.parametrize("case", LOGINS)
def test_an_argument_goes_before_the_environment(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, username, secret, login = LOGINS[case]
    (tmp_path / "file").write_bytes(b"file's\n")
    monkeypatch.chdir(tmp_path)
    for name, value in ("MQTT_USERNAME", username), ("MQTT_PASSWORD", secret):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    settings = program.settings_from([*arguments, *REQUEST])
    assert (settings.username, settings.password) == login


@pytest.mark.parametrize("days", [1, -1])
def test_a_certificate_of_version_1_expires_like_any_other(days: int, tmp_path: Path) -> None:
    commands = (
        "req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj /O=lab/CN=alice"
        " -keyout key -out request",
        f"x509 -req -in request -signkey key -days {days} -out certificate",
    )
    for command in commands:
        subprocess.run(["openssl", *command.split()], cwd=tmp_path, check=True, capture_output=True)
    certificate = (tmp_path / "certificate").read_bytes()
    assert x509.load_pem_x509_certificate(certificate).version == x509.Version.v1
    assert has_expired(certificate) == (days < 0)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"secret", b"secret"),
        (b"secret\n", b"secret"),
        (b"secret\r\n", b"secret"),
        (b"secret\n\n", b"secret\n"),
        (b" secret \n", b" secret "),
        (b"\n", b""),
        (b"\xff\0", b"\xff\0"),
    ],
)
def test_one_newline_at_the_end_of_a_password_file_is_left_out(
    content: bytes, found: bytes, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(content)
    arguments = ["-ualice", f"--password-file={tmp_path}/file", *REQUEST]
    assert program.settings_from(arguments).password == found


def test_the_environment_logs_in_and_arguments_go_before_it(
    broker: BrokerSide, start_responder: Start
) -> None:
    start_responder(*plain(broker, "responder"))
    port, cafile, *login = password(broker, "alice")
    right = {"MQTT_USERNAME": "alice", "MQTT_PASSWORD": PASSWORDS["alice"]}
    wrong = {"MQTT_USERNAME": "mallory", "MQTT_PASSWORD": "wrong"}
    assert run(port, cafile, *REQUEST, env=os.environ | right).stdout == ANSWER
    assert run(port, cafile, *login, *REQUEST, env=os.environ | wrong).stdout == ANSWER
    assert "not authorized" in failure(port, cafile, **wrong)[0]


def test_a_password_is_in_no_command_line_log_or_error(
    broker: BrokerSide, start_responder: Start
) -> None:
    secret, wrong = PASSWORDS["responder"], "a wrong secret"
    port, cafile, username, file = password(broker, "responder")
    env = os.environ | {"MQTT_PASSWORD": secret}
    for options in {"env": env}, {}:
        source = [] if options else [file]
        responder = start_responder("-v", port, cafile, username, *source, **options)
        result = run("-v", *password(broker, "alice"), *REQUEST)
        assert result.stdout == ANSWER
        said = "\n".join([*responder.lines, error_lines(result)])
        assert "CONNACK" in said
        for name in "responder", "alice":
            assert PASSWORDS[name] not in said
        for pid in {responder.process.pid} | processes_below(responder.process.pid):
            assert secret.encode() not in Path(f"/proc/{pid}/cmdline").read_bytes()
        assert responder.stop() == 0
    error, hint = failure("-v", port, cafile, username, MQTT_PASSWORD=wrong)
    assert wrong not in error + hint


def test_a_refused_login_ends_a_responder(broker: BrokerSide, start_responder: Start) -> None:
    options = [f"-p{broker.password}", *certified(broker.directory), "-uresponder"]
    env = os.environ | {"MQTT_PASSWORD": "wrong"}
    responder = start_responder(*options, env=env, ready=False)
    responder.wait_for("error: the broker on localhost port")
    assert responder.process.wait(SAFETY) == 1
    assert responder.has_said("hint: ")


# --- at a terminal -----------------------------------------------------------------------------

# Makes standard input the terminal of the process, as a shell would, then runs the program.
AT_TERMINAL = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


class Terminal:
    """The program at a terminal of its own."""

    def __init__(self, *arguments: str) -> None:
        self.shown = b""
        self._keyboard, terminal = os.openpty()
        command = [sys.executable, "-c", AT_TERMINAL, str(PROGRAM), *arguments]
        self.process = subprocess.Popen(
            command, stdin=terminal, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        os.close(terminal)

    def read_until(self, text: bytes) -> None:
        """Read what the terminal shows until a text comes."""
        while text not in self.shown:
            readable, _, _ = select.select([self._keyboard], [], [], SAFETY)
            assert readable, self.shown
            self.shown += os.read(self._keyboard, 4096)

    def type(self, line: str) -> None:
        os.write(self._keyboard, line.encode() + b"\n")

    def end(self) -> tuple[bytes, str, int]:
        """Wait for the end; the result is standard output, standard error and status."""
        output, error = self.process.communicate(timeout=SAFETY)
        with contextlib.suppress(OSError):  # EIO: all has been read
            while part := os.read(self._keyboard, 4096):
                self.shown += part
        os.close(self._keyboard)
        return output, error.decode(), self.process.returncode


def test_a_dash_asks_for_the_password_at_the_terminal_without_showing_it(
    broker: BrokerSide, start_responder: Start
) -> None:
    start_responder(*plain(broker, "responder"))
    port, cafile, username, _ = password(broker, "alice")
    terminal = Terminal(port, cafile, username, "--password-file=-", *REQUEST)
    terminal.read_until(b"Password of alice: ")
    terminal.type(PASSWORDS["alice"])
    assert terminal.end() == (ANSWER, "", 0)
    assert PASSWORDS["alice"].encode() not in terminal.shown


def test_ctrl_c_instead_of_a_password_ends_it_with_130(certificates: Path) -> None:
    terminal = Terminal("-ualice", "--password-file=-", *REQUEST)
    terminal.read_until(b"Password of alice: ")
    terminal.type("\3")
    output, error, status = terminal.end()
    assert (output, status) == (b"", 130)
    assert "Traceback" not in error


def test_a_dash_without_a_terminal_is_an_error_that_says_so() -> None:
    arguments = ["-ualice", "--password-file=-", f"-p{free_port()}", *REQUEST]
    result = run(*arguments, start_new_session=True)  # which has no terminal
    [message, *_] = error_lines(result).splitlines()
    assert message.startswith(f"{PROGRAM.name}: error: ")
    assert "--password-file" in message
    assert "terminal" in message
    assert "Warning" not in error_lines(result)
    assert result.stdout == b""
    assert result.returncode in (1, 2)


@pytest.mark.parametrize("key", ["encrypted.key", "encrypted-in-old-form.key"])
def test_an_encrypted_key_is_refused_without_asking_for_its_password(key: str, files: Path) -> None:
    terminal = Terminal(f"--cert={files}/alice.crt", f"--key={files}/{key}", *REQUEST)
    output, error, status = terminal.end()
    assert (output, status) == (b"", 2)
    assert "--key is encrypted" in error
    assert terminal.shown == b""


# --- a responder that goes on ------------------------------------------------------------------


def test_a_responder_answers_again_after_the_broker_side_was_restarted(
    own: Path, start_responder: Start
) -> None:
    with started(own) as broker:
        responder = start_responder(*proxy(broker, "responder"))
        assert run(*certificate(broker, "alice"), *REQUEST).stdout == ANSWER
    responder.wait_for("event=disconnected")
    with started(own, ports=broker.ports) as broker:
        responder.wait_for("ready", times=2)
        assert run(*certificate(broker, "alice"), *REQUEST).stdout == ANSWER


def test_renewed_certificates_are_used_at_the_next_connection(
    own: Path, strangers: Path, start_responder: Start
) -> None:
    """The authority is a new one, so neither side would take anything old."""
    with started(own) as broker:
        responder = start_responder(*certificate(broker, "responder"))
        for path in strangers.iterdir():
            shutil.copy(path, own)
    with started(own, ports=broker.ports) as broker:
        responder.wait_for("ready", times=2)
        assert run(*certificate(broker, "alice"), *REQUEST).stdout == ANSWER


SPOILED: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "a key that does not belong to the certificate": (
        lambda own, strangers: shutil.copy(strangers / "responder.key", own),
        "--cert and --key do not belong to each other",
    ),
    "an expired certificate": (
        lambda own, _: issue(own, "responder", **EXPIRED),  # type: ignore[arg-type]
        "has expired",
    ),
    "half a certificate": (
        lambda own, _: (own / "responder.crt").write_bytes(b"-----BEGIN CERTIFICATE-----\nMII"),
        "--cert",
    ),
    "an authority that did not issue the broker's": (
        lambda own, strangers: shutil.copy(strangers / "ca.crt", own),
        "unknown authority",
    ),
    "no file": (lambda own, _: (own / "ca.crt").unlink(), "cannot read --cafile"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_responder_says_that_it_cannot_use_a_file_and_goes_on_when_it_can_again(
    case: str,
    certificates: Path,
    own: Path,
    strangers: Path,
    start_responder: Start,
    change_program: Callable[..., None],
) -> None:
    spoil, reason = SPOILED[case]
    change_program("connection", FIRST_DELAY=0.05)
    with started(own) as broker:
        responder = start_responder("-iboth", *certificate(broker, "responder"))
        spoil(own, strangers)
        # A second connection with this client ID ends the first.
        other = ["--respond", "-iboth", f"-p{broker.tls}", *certified(certificates, "responder")]
        with subprocess.Popen([sys.executable, PROGRAM, *other], stderr=subprocess.DEVNULL) as one:
            responder.wait_for("event=disconnected", times=2)
            assert responder.has_said(reason)
            one.send_signal(signal.SIGTERM)
        for path in certificates.iterdir():
            shutil.copy(path, own)
        responder.wait_for("ready", times=2)
