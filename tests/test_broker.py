"""The sample broker side in broker/: its certificates, its rules and its start script.

Real mosquitto and NGINX, on loopback and free ports. That a message does not arrive is shown by a
later one that does: a broker keeps the order of one client's messages.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import pty
import pwd
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import tempfile
import termios
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import broker_side
import pytest
from broker_side import (
    BROKER,
    PASSWORDS,
    BrokerSide,
    Client,
    certificate_client,
    context,
    free_ports,
    generate,
    issue,
    load,
    made,
    password_client,
    set_password,
    started,
)
from conftest import SAFETY, is_running, processes_below, wait_until
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import verification

broker, certificates, own = broker_side.running, broker_side.certificates, broker_side.own


def refused(directory: Path, **env: str) -> tuple[int, str]:
    """Run a `broker/start` that cannot start: its exit status and stderr."""
    broker = BrokerSide(directory, free_ports() | env)
    if broker.line.startswith("ready"):
        broker.stop()
        pytest.fail("it started")
    status, rest = broker.ended()
    return status, broker.line + rest


def children(of: BrokerSide) -> dict[str, int]:
    """Return the processes below `broker/start`: mosquitto, nginx (the master) and worker."""
    pids = processes_below(of.process.pid)
    [mosquitto] = [pid for pid in pids if Path(f"/proc/{pid}/comm").read_text() == "mosquitto\n"]
    [nginx] = [pid for pid in pids if processes_below(pid)]
    [worker] = processes_below(nginx)
    assert pids == {mosquitto, nginx, worker}
    return {"mosquitto": mosquitto, "nginx": nginx, "worker": worker}


def user_of(pid: int) -> int:
    return Path(f"/proc/{pid}").stat().st_uid


def snapshot(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.is_file()}


def round_trip(netid: str, client: Client, responder: Client) -> None:
    """Pass a request and a response through the broker."""
    responder.subscribe("+/+/request")
    client.subscribe(f"{netid}/uppercase/response")
    client.publish(f"{netid}/uppercase/request", "question")
    assert responder.receive() == (f"{netid}/uppercase/request", "question")
    responder.publish(f"{netid}/uppercase/response", "answer")
    assert client.receive() == (f"{netid}/uppercase/response", "answer")


# --- generate-certs.sh -------------------------------------------------------------------------


def policy(directory: Path) -> verification.PolicyBuilder:
    return verification.PolicyBuilder().store(verification.Store([load(directory, "ca")]))


def verifies_as_client(directory: Path, name: str) -> bool:
    try:
        verified = policy(directory).build_client_verifier().verify(load(directory, name), [])
    except verification.VerificationError:
        return False
    return verified.subjects is not None and x509.DNSName(name) in verified.subjects


def verifies_as_server(
    directory: Path, name: str, subject: x509.DNSName | x509.IPAddress | None = None
) -> bool:
    verifier = policy(directory).build_server_verifier(subject or x509.DNSName(name))
    try:
        verifier.verify(load(directory, name), [])
    except verification.VerificationError:
        return False
    return True


@pytest.mark.parametrize(
    ("name", "client", "server"),
    [
        ("alice", True, False),
        ("12345", True, False),
        ("responder", True, True),
        ("localhost", False, True),
        ("mqtt.example.edu", False, True),
    ],
)
def test_a_certificate_is_for_what_its_name_says(
    certificates: Path, name: str, client: bool, server: bool
) -> None:
    assert verifies_as_client(certificates, name) is client
    assert verifies_as_server(certificates, name) is server
    assert not verifies_as_server(certificates, name, x509.DNSName("mallory"))


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_localhost_is_also_known_by_its_addresses(certificates: Path, address: str) -> None:
    subject = x509.IPAddress(ipaddress.ip_address(address))
    assert verifies_as_server(certificates, "localhost", subject)


def test_a_ca_is_valid_for_ten_years_and_its_certificates_for_one(certificates: Path) -> None:
    for name, days in (("ca", 3650), ("alice", 365), ("localhost", 365)):
        certificate = load(certificates, name)
        lifetime = certificate.not_valid_after_utc - certificate.not_valid_before_utc
        assert lifetime == timedelta(days=days)


def test_a_name_is_its_certificates_subject_and_the_key_is_its_own(certificates: Path) -> None:
    certificate = load(certificates, "alice")
    key = serialization.load_pem_private_key((certificates / "alice.key").read_bytes(), None)
    assert certificate.subject.rfc4514_string() == "CN=alice"
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert isinstance(key.curve, ec.SECP256R1)
    assert key.public_key() == certificate.public_key()


def test_serial_numbers_are_random(certificates: Path) -> None:
    serials = {load(certificates, name).serial_number for name in ("ca", "alice", "bob")}
    assert len(serials) == 3
    assert all(number.bit_length() > 64 for number in serials)  # chance of failure: 2^-63


def test_the_ca_signs_certificates_and_no_other_certificate_can(certificates: Path) -> None:
    ca = load(certificates, "ca").extensions
    constraints = ca.get_extension_for_class(x509.BasicConstraints)
    usage = ca.get_extension_for_class(x509.KeyUsage)
    assert constraints.critical
    assert constraints.value.ca
    assert usage.critical
    assert usage.value.key_cert_sign
    assert usage.value.crl_sign
    assert not usage.value.digital_signature
    alice = load(certificates, "alice").extensions
    assert not alice.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not alice.get_extension_for_class(x509.KeyUsage).value.key_cert_sign


def test_keys_are_for_their_owner_alone_and_certificates_for_all(certificates: Path) -> None:
    modes = {path.name: path.stat().st_mode & 0o777 for path in certificates.iterdir()}
    assert {mode for name, mode in modes.items() if name.endswith((".key", ".pem"))} == {0o600}
    assert {mode for name, mode in modes.items() if name.endswith(".crt")} == {0o644}
    assert all(name.endswith((".key", ".pem", ".crt")) for name in modes)


@pytest.mark.parametrize("name", ["alice", "responder", "localhost"])
def test_a_names_pem_is_its_certificate_and_then_its_key(certificates: Path, name: str) -> None:
    certificate, key, both = (
        (certificates / f"{name}.{end}").read_bytes() for end in ("crt", "key", "pem")
    )
    assert both == certificate + key


def test_the_files_that_were_made_are_listed(tmp_path: Path) -> None:
    directory = tmp_path / "with a space"
    for names, new in ((["alice", "bob"], ["ca.crt", "ca.key"]), (["carol"], [])):
        listed = generate(directory, *names).stdout.splitlines()
        own = [f"{name}.{end}" for name in names for end in ("crt", "key", "pem")]
        assert listed == [f"{directory}/{file}" for file in (*new, *own)]
        assert all(map(os.path.isfile, listed))


def test_a_second_run_adds_names_and_keeps_the_rest(own: Path) -> None:
    before = snapshot(own)
    made(own, "carol", "dave")
    after = snapshot(own)
    assert after.keys() - before.keys() == {
        f"{name}.{end}" for name in ("carol", "dave") for end in ("crt", "key", "pem")
    }
    assert all(after[name] == content for name, content in before.items())
    assert verifies_as_client(own, "carol")


@pytest.mark.parametrize("left", ["alice.crt", "alice.key", "alice.pem"])
def test_an_existing_name_is_refused_and_nothing_changed(own: Path, left: str) -> None:
    for file in {"alice.crt", "alice.key", "alice.pem"} - {left}:
        (own / file).unlink()
    before = snapshot(own)
    result = generate(own, "carol", "alice")
    assert result.returncode == 1
    assert f"{left} exists" in result.stderr
    assert snapshot(own) == before


# Harmful as a file name, to openssl, as a topic level, in a DNS name; too long; not a name; taken.
BAD_NAMES = [*"+#ä", "a+b", "a/b", "../a", ".a", "-a", "a=b", "a_b", "a-", "a.", "a..b", "Alice"]
BAD_NAMES += [
    "127.0.0.1",
    "::1",
    "ca",
    "status",
    "shared",
    "",
    "a b",
    "a\nb",
    "a" * 64,
    ".".join(["a" * 21] * 3),
]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_name_that_is_not_harmless_everywhere_is_refused(tmp_path: Path, name: str) -> None:
    result = generate(tmp_path / "certs", "alice", name)
    assert result.returncode == 2
    assert f"'{name}'" in result.stderr
    assert not (tmp_path / "certs").exists()


@pytest.mark.parametrize("arguments", [(), ("alice", "alice")], ids=["none", "one twice"])
def test_names_are_given_and_given_once(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert generate(tmp_path / "certs", *arguments).returncode == 2
    assert not (tmp_path / "certs").exists()


@pytest.mark.parametrize("left", ["ca.crt", "ca.key"])
def test_half_a_ca_is_not_replaced(own: Path, left: str) -> None:
    (own / ({"ca.crt", "ca.key"} - {left}).pop()).unlink()
    before = snapshot(own)
    result = generate(own, "carol")
    assert result.returncode == 1
    assert "only one of ca.crt and ca.key" in result.stderr
    assert snapshot(own) == before


@pytest.mark.parametrize("fails_at", ["/CN=secure-mqtt CA", "/CN=carol", "/CN=dave", "x509"])
def test_a_failure_half_way_leaves_nothing(tmp_path: Path, fails_at: str) -> None:
    fake = tmp_path / "bin" / "openssl"
    fake.parent.mkdir()
    fake.write_text(
        f'#!/bin/sh\nfor a; do [ "$a" != "{fails_at}" ] || {{ echo no more; exit 1; }}; done\n'
        f'exec {shutil.which("openssl")} "$@"\n'
    )
    fake.chmod(0o755)
    directory = tmp_path / "certs"
    result = generate(directory, "carol", "dave", PATH=f"{fake.parent}:{os.environ['PATH']}")
    assert result.returncode == 1
    assert "no more" in result.stderr
    assert list(directory.iterdir()) == []


def test_two_runs_at_once_keep_out_of_each_others_way(own: Path) -> None:
    (own / ".new").mkdir()  # as a run that is at work has it
    result = generate(own, "carol")
    assert result.returncode == 1
    assert "another run is at work" in result.stderr
    assert (own / ".new").exists()
    assert not (own / "carol.crt").exists()


# --- Other users of the same machine -----------------------------------------------------------

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


def given_away(path: Path) -> Path:
    """Make another user the owner: of a link, not of what it leads to."""
    os.chown(path, pwd.getpwnam("nobody").pw_uid, -1, follow_symlinks=False)
    return path


def with_mode(path: Path, mode: int) -> Path:
    path.chmod(mode)
    return path


def below(parent: str, directory: Path) -> Path:
    """Move a directory into a new one beside it, and return that one."""
    above = directory.with_name(parent)
    above.mkdir()
    directory.rename(above / directory.name)
    return above


def link_to(path: Path) -> Path:
    link = path.with_name(f"link to {path.name}")
    link.symlink_to(path)
    return link


Change = Callable[[Path], Path]
DIRECTORIES: dict[str, Change] = {
    "group can write": lambda own: with_mode(own, 0o775),
    "all can write": lambda own: with_mode(own, 0o757),
    "all can write, sticky": lambda own: with_mode(own, 0o1777),
    "group can write, by a link": lambda own: link_to(with_mode(own, 0o775)),
    "in one that all can write": lambda own: with_mode(below("open", own), 0o777) / own.name,
}
ANOTHERS_DIRECTORIES: dict[str, Change] = {
    "another's": given_away,
    "another's, by a link": lambda own: link_to(given_away(own)),
    "by another's link": lambda own: given_away(link_to(own)),
    "in another's": lambda own: given_away(below("home", own)) / own.name,
    "below another's link": lambda own: given_away(link_to(below("mine", own))) / own.name,
}


def cases(all_users: dict[str, Change], root_only: dict[str, Change]) -> pytest.MarkDecorator:
    """Parametrise a test with changes to a path that make it unsafe."""
    params = [pytest.param(change, id=name) for name, change in all_users.items()]
    params += [pytest.param(root_only[name], id=name, marks=as_root) for name in root_only]
    return pytest.mark.parametrize("change", params)


@cases(DIRECTORIES, ANOTHERS_DIRECTORIES)
@pytest.mark.parametrize("script", ["start", "generate-certs.sh"])
def test_a_directory_that_others_can_change_is_refused(
    own: Path, script: str, change: Change
) -> None:
    directory = change(own)
    before = sorted(own.parent.rglob("*"))
    if script == "start":
        status, stderr = refused(directory)
    else:
        result = generate(directory, "carol")
        status, stderr = result.returncode, result.stderr
    assert status == 1
    assert "belongs to another user, or" in stderr or "is not your own, or" in stderr
    assert "hint: " in stderr
    assert sorted(own.parent.rglob("*")) == before


def test_a_directory_may_be_named_by_a_link_of_ones_own(own: Path) -> None:
    link = link_to(own)
    made(link, "carol")
    with started(link) as broker:
        assert broker.line.startswith("ready"), broker.line


@pytest.mark.parametrize("umask", [0, 0o077])
def test_nobody_else_can_write_to_a_directory_that_was_made(tmp_path: Path, umask: int) -> None:
    directory = tmp_path / "one" / "certs"
    command: list[str | Path] = [BROKER / "generate-certs.sh", directory, "alice"]
    subprocess.run(command, umask=umask, check=True, capture_output=True, timeout=SAFETY)
    assert [path.stat().st_mode & 0o777 for path in (directory, directory.parent)] == [
        0o755 & ~umask
    ] * 2


FILES: dict[str, Change] = {
    "a link": lambda path: link_to(path.rename(path.with_name("target"))).rename(path),
    "group can write": lambda path: with_mode(path, 0o660),
    "all can write": lambda path: with_mode(path, 0o606),
}
ANOTHERS_FILES: dict[str, Change] = {"another's": given_away}


@cases(FILES, ANOTHERS_FILES)
@pytest.mark.parametrize("name", ["ca.crt", "localhost.key", "passwords"])
def test_a_file_that_others_may_have_chosen_is_not_used(
    own: Path, name: str, change: Change
) -> None:
    (own / "passwords").touch(0o600)
    change(own / name)
    status, stderr = refused(own)
    assert status == 1
    assert f"{own / name} is a link, not your own, or others can write to it\nhint: " in stderr


@cases(FILES, ANOTHERS_FILES)
@pytest.mark.parametrize("name", ["ca.crt", "ca.key"])
def test_an_authority_that_others_may_have_chosen_is_not_used(
    own: Path, name: str, change: Change
) -> None:
    change(own / name)
    result = generate(own, "carol")
    assert result.returncode == 1
    assert f"{own / name} is a link, not your own, or others can write to it\n" in result.stderr
    assert not (own / "carol.crt").exists()


@pytest.mark.parametrize("name", ["ca.crt", "ca.key", "carol.crt", "carol.key", "carol.pem"])
def test_no_certificate_or_key_is_written_where_a_link_leads(
    own: Path, tmp_path: Path, name: str
) -> None:
    if name.startswith("ca."):
        for file in own.glob("ca.*"):
            file.unlink()
    (own / name).symlink_to(tmp_path / "elsewhere")
    assert generate(own, "carol").returncode == 1
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("run", ["a directory", "a link"])
def test_what_lies_in_the_place_of_run_is_removed_and_its_links_are_not_followed(
    own: Path, tmp_path: Path, run: str
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    files = ("mosquitto.conf", "nginx.conf", "acl", "localhost.key", "mosquitto.log", "nginx.pid")
    for name in files:
        (victim / name).write_text("precious")
    if run == "a directory":
        (own / "run").mkdir()
        for name in files:
            (own / "run" / name).symlink_to(victim / name)
    else:
        (own / "run").symlink_to(victim)
    if os.geteuid() == 0:
        given_away(own / "run")
    before = snapshot(victim)
    with started(own) as broker:
        assert broker.line.startswith("ready"), broker.line
        assert not (own / "run").is_symlink()
        assert (own / "run").stat().st_uid == os.geteuid()
        assert not any(path.is_symlink() for path in (own / "run").iterdir())
    assert snapshot(victim) == before


def test_a_second_start_leaves_the_first_alone(own: Path) -> None:
    with started(own) as broker:
        status, stderr = refused(own)
        assert status == 1
        assert f"another broker/start is at work on {own}" in stderr
        assert talk(broker.proxy, context(own, "alice")) == ACCEPTED
        assert (own / "run" / "acl").exists()


@pytest.mark.parametrize("mode", [0o644, 0o640])
def test_passwords_that_others_can_read_are_made_private(own: Path, mode: int) -> None:
    passwords = own / "passwords"
    passwords.touch(mode)
    passwords.chmod(mode)
    with started(own) as broker:
        assert broker.line.startswith("start: warning: others could read")
        assert str(passwords) in broker.line
        assert broker.next_line().startswith("ready")
        assert passwords.stat().st_mode & 0o777 == 0o600
        assert (own / "run" / "passwords").stat().st_mode & 0o777 == 0o600


# --- Who gets in -------------------------------------------------------------------------------


def test_anonymous_clients_talk_on_the_plain_port(broker: BrokerSide) -> None:
    with Client(broker.plain) as alice, Client(broker.plain) as responder:
        round_trip("alice", alice, responder)


def test_a_netid_and_the_responder_talk_with_certificates(broker: BrokerSide) -> None:
    with (
        certificate_client(broker, "alice") as alice,
        certificate_client(broker, "responder") as responder,
    ):
        round_trip("alice", alice, responder)


def test_a_certificate_passes_through_nginx(broker: BrokerSide) -> None:
    with (
        Client(broker.proxy, context(broker.directory, "alice")) as alice,
        certificate_client(broker, "responder") as responder,
    ):
        round_trip("alice", alice, responder)


def test_a_netid_with_a_password_talks_to_the_responder_with_a_certificate(
    broker: BrokerSide,
) -> None:
    with (
        password_client(broker, "alice") as alice,
        certificate_client(broker, "responder") as responder,
    ):
        round_trip("alice", alice, responder)


@pytest.mark.parametrize(
    "login",
    [("alice", "wrong"), ("alice", None), ("mallory", "wrong"), None],
    ids=["wrong password", "no password", "unknown user", "no login"],
)
def test_a_bad_login_is_refused(broker: BrokerSide, login: tuple[str, str | None] | None) -> None:
    client = Client(broker.password, context(broker.directory), login)
    client.close()
    assert client.reason == "Not authorized"


# MQTT 3.1.1: CONNECT with a clean session and no client ID; CONNACK, accepted.
CONNECT = bytes.fromhex("100c 00044d515454 04 02 003c 0000")
ACCEPTED = bytes.fromhex("20020000")


def talk(
    port: int,
    tls: ssl.SSLContext,
    sent: bytes = CONNECT,
    name: str = "localhost",
    host: str = "127.0.0.1",
) -> bytes:
    """Send to a TLS port and return the answer."""
    with (
        socket.create_connection((host, port), SAFETY) as plain,
        tls.wrap_socket(plain, server_hostname=name) as secure,
    ):
        secure.sendall(sent)
        return secure.recv(4)


def own_context(directory: Path, issuer: str, subject: str) -> ssl.SSLContext:
    """Return a context with a certificate, issued now, that generate-certs.sh would not make."""
    issue(directory, "own", issuer, subject)
    return context(directory, "own")


@pytest.mark.parametrize("port", ["tls", "proxy"])
def test_a_client_without_a_good_certificate_is_refused(broker: BrokerSide, port: str) -> None:
    number = getattr(broker, port)
    certs = broker.directory
    assert talk(number, context(certs, "alice")) == ACCEPTED
    assert talk(number, own_context(certs, "ca", "alice")) == ACCEPTED
    for tls, alert in (
        (context(certs), "certificate required"),
        (own_context(certs, "alice", "alice"), "unknown ca|invalid ca"),
        (context(certs, "localhost"), "unsupported certificate"),
    ):
        # Nothing is sent, so that the alert is not lost to a reset of the connection.
        with pytest.raises(ssl.SSLError, match=f"(?i)alert {alert}".replace(" ", "[ _]")):
            talk(number, tls, b"")


def test_every_port_is_on_loopback_alone(broker: BrokerSide) -> None:
    for port in map(int, broker.ports.values()):
        socket.create_connection(("127.0.0.1", port), SAFETY).close()
        with pytest.raises(ConnectionRefusedError):  # a port on all addresses would answer here too
            socket.create_connection(("127.0.0.2", port), SAFETY).close()


# --- TLS versions and ciphers ------------------------------------------------------------------


def client_hello(version: int, *suites: int) -> bytes:
    """A TLS 1.0 to 1.2 ClientHello (RFC 5246, 7.4.1.2) that offers old things OpenSSL cannot."""
    extensions = bytes.fromhex(
        "000a 0006 0004 001d 0017"  # supported_groups: x25519, secp256r1
        "000b 0002 01 00"  # ec_point_formats: uncompressed
        "000d 0006 0004 0403 0401"  # signature_algorithms: ECDSA and RSA with SHA-256
    )
    body = struct.pack(">H32sB", version, os.urandom(32), 0)
    body += struct.pack(f">H{len(suites)}H", 2 * len(suites), *suites)
    body += b"\x01\x00" + struct.pack(">H", len(extensions)) + extensions
    handshake = b"\x01" + len(body).to_bytes(3, "big") + body
    return b"\x16\x03\x01" + struct.pack(">H", len(handshake)) + handshake


def answer(port: int, hello: bytes) -> str:
    """What a server says to a ClientHello: the version of its ServerHello, or its alert."""
    with (
        socket.create_connection(("127.0.0.1", port), SAFETY) as connection,
        connection.makefile("rb") as stream,
    ):
        connection.sendall(hello)
        record = stream.read(7)
        if record[0] == 22:  # a handshake record: type, length and version of a ServerHello follow
            return f"hello {stream.read(4)[2:].hex()}"
        return {40: "handshake_failure", 70: "protocol_version"}[record[6]]


GOOD = 0xC02B  # ECDHE-ECDSA-AES128-GCM-SHA256
OLD = (0xC00A, 0xC009, 0xC014, 0xC013, 0x0035, 0x002F)  # AES-CBC with SHA-1: TLS 1.0 and later
BAD = {
    "null": (0x0001, 0x0002, 0x003B, 0xC001, 0xC006, 0xC010, 0xC015),
    "export": (0x0003, 0x0006, 0x0008, 0x000B, 0x000E, 0x0011, 0x0014, 0x0017, 0x0019),
    "anonymous": (0x0018, 0x001B, 0x0034, 0x003A, 0x006C, 0x00A6, 0xC018, 0xC019),
    "RC4, DES and 3DES": (0x0004, 0x0005, 0x0009, 0x000A, 0x0016, 0xC007, 0xC008, 0xC011, 0xC012),
    "CBC": (*OLD, 0x003C, 0xC023, 0xC024),
    "no forward secrecy": (0x009C, 0x009D, 0xC02D, 0xC02E),
}


@pytest.mark.parametrize("port", ["tls", "proxy", "password"])
def test_tls_1_0_and_1_1_are_refused(broker: BrokerSide, port: str) -> None:
    number = getattr(broker, port)
    assert answer(number, client_hello(0x0303, GOOD, *OLD)) == "hello 0303"
    for version in (0x0301, 0x0302):
        assert answer(number, client_hello(version, GOOD, *OLD)) == "protocol_version"


@pytest.mark.parametrize("port", ["tls", "proxy", "password"])
@pytest.mark.parametrize("suites", BAD.values(), ids=BAD)
def test_weak_ciphers_are_refused(broker: BrokerSide, port: str, suites: tuple[int, ...]) -> None:
    number = getattr(broker, port)
    assert answer(number, client_hello(0x0303, *suites)) == "handshake_failure"
    assert answer(number, client_hello(0x0303, *suites, GOOD)) == "hello 0303"


def test_tls_1_3_is_spoken(broker: BrokerSide) -> None:
    tls = context(broker.directory, "alice")
    tls.minimum_version = ssl.TLSVersion.TLSv1_3
    assert talk(broker.tls, tls) == ACCEPTED


# --- Who may do what ---------------------------------------------------------------------------


@pytest.fixture(params=["certificate", "password"])
def bob(broker: BrokerSide, request: pytest.FixtureRequest) -> Iterator[Client]:
    """A NetID, logged in either way."""
    login = certificate_client if request.param == "certificate" else password_client
    with login(broker, "bob") as client:
        yield client


def test_a_netid_cannot_read_anothers_topics(broker: BrokerSide, bob: Client) -> None:
    with (
        certificate_client(broker, "alice") as alice,
        certificate_client(broker, "responder") as responder,
    ):
        alice.subscribe("alice/+/response")
        bob.subscribe("alice/reverse/response", "alice/#", "+/+/request", "+/+/response", "#")
        alice.publish("alice/reverse/request", "for the responder")
        responder.publish("alice/reverse/response", "for alice")
        responder.publish("bob/reverse/response", "for bob")
        assert alice.receive() == ("alice/reverse/response", "for alice")
        assert bob.receive() == ("bob/reverse/response", "for bob")


def test_a_netid_cannot_write_anothers_topics(broker: BrokerSide, bob: Client) -> None:
    with (
        certificate_client(broker, "alice") as alice,
        certificate_client(broker, "responder") as responder,
    ):
        responder.subscribe("+/+/request")
        alice.subscribe("alice/+/response")
        bob.publish("alice/reverse/request", "forged")
        bob.publish("alice/reverse/response", "forged")
        bob.publish("bob/reverse/request", "bob's own")
        assert responder.receive() == ("bob/reverse/request", "bob's own")
        alice.publish("alice/reverse/request", "alice's own")
        assert responder.receive() == ("alice/reverse/request", "alice's own")
        responder.publish("alice/reverse/response", "true")
        assert alice.receive() == ("alice/reverse/response", "true")


def test_a_netid_cannot_answer_itself(broker: BrokerSide, bob: Client) -> None:
    with certificate_client(broker, "responder") as responder:
        bob.subscribe("bob/+/response")
        bob.publish("bob/reverse/response", "forged")
        responder.publish("bob/reverse/response", "true")
        assert bob.receive() == ("bob/reverse/response", "true")


def test_all_netids_read_the_status_and_none_writes_it(broker: BrokerSide, bob: Client) -> None:
    with (
        certificate_client(broker, "alice") as alice,
        certificate_client(broker, "responder") as responder,
    ):
        responder.publish("status/responder", "online", retain=True)
        bob.publish("status/responder", "forged", retain=True)
        for client in (alice, bob):
            client.subscribe("status/#")
            assert client.receive() == ("status/responder", "online")
        responder.publish("status/responder", "", retain=True)


def test_all_netids_and_the_keeper_read_and_write_shared_topics(
    broker: BrokerSide, bob: Client
) -> None:
    with (
        certificate_client(broker, "alice") as alice,
        certificate_client(broker, "responder") as keeper,
    ):
        clients = (alice, bob, keeper)
        for topic in ("shared/kitchen", "shared/house/kitchen/oven"):
            for client in clients:
                client.subscribe(topic)
            for publisher in clients:
                publisher.publish(topic, "a message")
                for client in clients:
                    assert client.receive() == (topic, "a message")


def test_nobody_asks_or_answers_in_the_name_of_shared_topics(
    broker: BrokerSide, bob: Client
) -> None:
    with certificate_client(broker, "responder") as responder:
        responder.subscribe("+/+/request", "shared/#")
        bob.publish("shared/uppercase/request", "forged")
        bob.publish("shared/uppercase/response", "forged")
        bob.publish("shared/kitchen", "a message")
        assert responder.receive() == ("shared/kitchen", "a message")


@pytest.mark.parametrize(
    ("login", "name"),
    [
        ("certificate", "+"),
        ("certificate", "#"),
        ("certificate", "alice/key-exchange"),
        ("password", "+"),  # mosquitto_passwd takes no "#"
        ("password", "alice/key-exchange"),
    ],
)
def test_a_name_with_wildcards_reaches_nobodys_topics(
    broker: BrokerSide, login: str, name: str
) -> None:
    if login == "password":
        mallory = password_client(broker, name)
    else:
        mallory = Client(broker.tls, own_context(broker.directory, "ca", name))
    with (
        mallory,
        certificate_client(broker, "alice") as alice,
        certificate_client(broker, "responder") as responder,
    ):
        mallory.subscribe("#")
        alice.subscribe("alice/+/response")
        responder.subscribe("+/+/request")
        mallory.publish("alice/key-exchange/request", "forged")
        mallory.publish("alice/key-exchange/response", "forged")
        round_trip("alice", alice, responder)
        # What mallory was sent would have come before the answer to another subscription.
        mallory.subscribe("alice/nothing")
        assert mallory.messages.empty()


def test_a_certificate_names_its_client_whatever_that_says(broker: BrokerSide) -> None:
    with (
        certificate_client(broker, "alice", login=("bob", PASSWORDS["bob"])) as alice,
        certificate_client(broker, "responder") as responder,
    ):
        responder.subscribe("+/+/request")
        alice.publish("bob/reverse/request", "forged")
        alice.publish("alice/reverse/request", "own")
        assert responder.receive() == ("alice/reverse/request", "own")


@pytest.mark.parametrize("login", [certificate_client, password_client])
def test_a_netid_has_several_connections_at_a_time(
    broker: BrokerSide, login: Callable[..., Client]
) -> None:
    with (
        login(broker, "alice", client_id="alice-1") as publisher,
        login(broker, "alice", client_id="alice-2") as subscriber,
        certificate_client(broker, "alice") as client,  # the broker chooses its ID
        certificate_client(broker, "responder") as responder,
    ):
        subscriber.subscribe("shared/kitchen")
        publisher.publish("shared/kitchen", "a message")
        assert subscriber.receive() == ("shared/kitchen", "a message")
        round_trip("alice", client, responder)
        assert not any(each.disconnected.is_set() for each in (publisher, subscriber))


def test_a_netid_is_not_thrown_off_by_another_that_takes_its_name_for_an_id(
    broker: BrokerSide, bob: Client
) -> None:
    with (
        certificate_client(broker, "alice", client_id=f"alice-{os.urandom(8).hex()}") as alice,
        certificate_client(broker, "responder") as responder,
        certificate_client(broker, "bob", client_id="alice"),
        password_client(broker, "bob", client_id="responder"),
    ):
        round_trip("alice", alice, responder)
        assert not any(each.disconnected.is_set() for each in (alice, responder, bob))


def test_a_client_whose_id_is_known_can_be_thrown_off_as_the_configuration_says(
    broker: BrokerSide,
) -> None:
    with (
        certificate_client(broker, "alice", client_id="alice") as alice,
        certificate_client(broker, "bob", client_id="alice"),
    ):
        assert alice.disconnected.wait(SAFETY)


# --- NGINX -------------------------------------------------------------------------------------


def test_nginx_logs_each_connection(broker: BrokerSide) -> None:
    log = broker.directory / "run" / "connections.log"
    with socket.create_connection(("127.0.0.1", broker.proxy), SAFETY) as connection:
        port = connection.getsockname()[1]
    wait_until(lambda: f" 127.0.0.1:{port} status=200 " in log.read_text())


def test_nginx_limits_the_connections_of_one_address(own: Path) -> None:
    limit = 50
    with started(own) as broker, ExitStack() as stack:
        # What the script's own look at the port leaves is closed when it is logged.
        log = own / "run" / "connections.log"
        wait_until(lambda: "status=200" in log.read_text())
        connections = [
            stack.enter_context(socket.create_connection(("127.0.0.1", broker.proxy), SAFETY))
            for _ in range(limit + 1)
        ]
        assert connections.pop().recv(1) == b""
        connections.pop().close()
        wait_until(lambda: log.read_text().count("status=200") == 2)
        assert talk(broker.proxy, context(own, "alice")) == ACCEPTED


# --- start -------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_everything(own: Path, number: int) -> None:
    with started(own) as broker:
        assert broker.line.startswith("ready")
        pids = children(broker).values()
        assert broker.stop(number) == (0, "")
        assert not any(map(is_running, pids))


def test_it_stops_when_its_terminal_is_closed(own: Path) -> None:
    ours, its = pty.openpty()
    with started(
        own,
        stdin=its,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    ) as broker:
        assert broker.line.startswith("ready"), broker.line
        assert broker.reload()[-1].startswith("reloaded")
        pids = processes_below(broker.process.pid)
        os.close(its)
        os.close(ours)
        assert broker.ended() == (0, "")
        assert not any(map(is_running, pids))


@pytest.mark.parametrize("victim", ["mosquitto", "nginx"])
def test_when_one_program_ends_the_other_is_stopped(own: Path, victim: str) -> None:
    with started(own) as broker:
        family = children(broker)
        os.kill(family[victim], signal.SIGKILL)
        status, stderr = broker.ended()
        assert status == 1
        assert stderr.startswith(f"start: error: {victim} ended with exit status 137\n")
        # The worker of a killed master is not the script's own to wait for.
        wait_until(lambda: not any(map(is_running, family.values())))


def test_it_starts_again_where_it_was_stopped(own: Path) -> None:
    with started(own) as first:
        assert talk(first.tls, context(own, "alice")) == ACCEPTED
        assert first.stop() == (0, "")
    with started(own, ports=first.ports) as second:
        assert second.line == first.line
        assert talk(second.proxy, context(own, "alice")) == ACCEPTED


def test_without_a_password_file_there_is_no_port_for_passwords(own: Path) -> None:
    with started(own) as broker:
        assert broker.line.startswith("ready")
        assert str(broker.password) not in broker.line
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", broker.password), SAFETY).close()


def test_the_programs_get_copies_for_them_alone_and_not_the_ca_key(broker: BrokerSide) -> None:
    run = broker.directory / "run"
    for name in ("mosquitto.conf", "acl", "ca.crt", "localhost.crt", "localhost.key", "passwords"):
        assert (run / name).stat().st_mode & 0o777 == 0o600
    assert not (run / "ca.key").exists()


def listening(*pids: int) -> set[str]:
    """Return where some processes wait for connections over IPv4, as address:port."""
    inodes = set()
    for pid in pids:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            if (target := os.readlink(fd)).startswith("socket:"):
                inodes.add(target.strip("socket:[]"))
    found = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        fields = line.split()
        if fields[3] == "0A" and fields[9] in inodes:  # LISTEN
            address, port = (bytes.fromhex(part) for part in fields[1].split(":"))
            found.add(f"{ipaddress.IPv4Address(address[::-1])}:{int.from_bytes(port, 'big')}")
    return found


def test_without_being_asked_for_there_is_no_port_that_goes_around_the_access_rules(
    own: Path,
) -> None:
    with started(own, free_ports() | {"PLAIN_PORT": ""}) as broker:
        expected = {f"127.0.0.1:{broker.tls}", f"127.0.0.1:{broker.proxy}"}
        assert set(broker.line.rpartition(" on ")[2].split()) == expected
        assert listening(*children(broker).values()) == expected


def test_the_environment_chooses_address_and_name_but_the_plain_port_stays_on_loopback(
    own: Path,
) -> None:
    (own / "passwords").touch(0o600)
    for file in own.glob("localhost.*"):
        file.unlink()
    env = {"LISTEN": "127.0.0.2", "SERVER_NAME": "mqtt.example.edu"}
    with started(own, free_ports() | env) as broker:
        assert listening(*children(broker).values()) == {
            f"127.0.0.1:{broker.plain}",
            *(f"127.0.0.2:{port}" for port in (broker.tls, broker.proxy, broker.password)),
        }
        for port in (broker.tls, broker.proxy):
            tls = context(own, "alice")
            assert talk(port, tls, name="mqtt.example.edu", host="127.0.0.2") == ACCEPTED


@pytest.mark.parametrize(
    ("env", "listen", "broker_host"),
    [
        ({}, "127.0.0.1", "127.0.0.1"),
        ({"LISTEN": "10.0.0.1"}, "10.0.0.1", "10.0.0.1"),
        ({"LISTEN": "0.0.0.0"}, "0.0.0.0", "127.0.0.1"),
        ({"LISTEN": "0.0.0.0", "BROKER_HOST": "broker.internal"}, "0.0.0.0", "broker.internal"),
    ],
)
def test_the_configuration_for_other_machines_differs_in_addresses_alone(
    env: dict[str, str], listen: str, broker_host: str
) -> None:
    files = [BROKER / name for name in ("mosquitto.conf", "plain.conf", "nginx.conf")]
    text = subprocess.run(
        [BROKER / "configure", *files],
        env=os.environ | env,
        check=True,
        capture_output=True,
        text=True,
        timeout=SAFETY,
    ).stdout
    expected = "".join(file.read_text() for file in files)
    for old, new in (
        ("\nlistener 8883 127.0.0.1", f"\nlistener 8883 {listen}"),
        (" listen 127.0.0.1:8884;", f" listen {listen}:8884;"),
        ("proxy_pass 127.0.0.1:", f"proxy_pass {broker_host}:"),
    ):
        assert expected.count(old) == 1
        expected = expected.replace(old, new)
    assert text == expected


def test_certificate_and_key_may_lie_elsewhere(own: Path, tmp_path: Path) -> None:
    (own / "localhost.key").rename(tmp_path / "elsewhere.key")
    changed = Path(shutil.copytree(BROKER, tmp_path / "broker"))
    conf = (changed / "mosquitto.conf").read_text()
    assert conf.count("\nkeyfile localhost.key\n") == 1
    conf = conf.replace("localhost.key", str(tmp_path / "elsewhere.key"))
    (changed / "mosquitto.conf").write_text(conf)
    with started(own, script=changed / "start") as broker:
        assert broker.line.startswith("ready"), broker.line
        assert talk(broker.tls, context(own, "alice")) == ACCEPTED


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has privileges to drop")
def test_started_as_root_it_serves_as_another_user(broker: BrokerSide) -> None:
    family = children(broker)
    assert (broker.directory / "localhost.key").stat().st_uid == 0
    mosquitto = pwd.getpwnam("mosquitto").pw_uid
    assert user_of(family["mosquitto"]) == mosquitto
    assert user_of(family["worker"]) not in (0, mosquitto)


@pytest.mark.skipif(os.geteuid() != 0, reason="the other tests show it")
def test_it_runs_without_being_root(certificates: Path) -> None:
    # Not below pytest's directory, which is for root alone.
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name, "certs")
        shutil.copytree(certificates, directory)
        shutil.copytree(BROKER, Path(name, "broker"))
        for path in (Path(name), *Path(name).rglob("*")):
            shutil.chown(path, "nobody")
        script = Path(name, "broker", "start")
        with started(directory, script=script, user="nobody", extra_groups=[]) as broker:
            assert broker.line.startswith("ready"), broker.line
            assert set(map(user_of, children(broker).values())) == {pwd.getpwnam("nobody").pw_uid}
            assert broker.reload() == [RELOADED]
            assert talk(broker.proxy, context(directory, "alice")) == ACCEPTED
            assert broker.stop() == (0, "")


# --- SIGHUP ------------------------------------------------------------------------------------


RELOADED = "reloaded: mosquitto and NGINX take the files as they are now\n"


@dataclass
class Renewable:
    """A broker side of which tests change the scripts' copy and the directory."""

    broker: BrokerSide
    scripts: Path
    own: Path

    def edit(self, path: Path, old: str, new: str) -> None:
        text = path.read_text()
        assert text.count(old) == 1
        path.write_text(text.replace(old, new))


def copied(source: Path, target: Path) -> Path:
    """Make a directory's files those of another, but for what is only in the first."""
    return Path(shutil.copytree(source, target, dirs_exist_ok=True))


@pytest.fixture(scope="module")
def one_renewable(
    certificates: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Renewable, Path]]:
    """A broker side, and what its directories were when it was started."""
    kept = tmp_path_factory.mktemp("kept")
    copied(certificates, kept / "own")
    copied(BROKER, kept / "scripts")
    for name in ("alice", "bob"):
        set_password(kept / "own", name, PASSWORDS[name])
    used = copied(kept, tmp_path_factory.mktemp("renewable"))
    with started(used / "own", script=used / "scripts" / "start") as broker:
        yield Renewable(broker, used / "scripts", used / "own"), kept


@pytest.fixture
def renewable(one_renewable: tuple[Renewable, Path]) -> Iterator[Renewable]:
    """A broker side that goes back to where it was after the test."""
    renewable, kept = one_renewable
    yield renewable
    for path in renewable.own.iterdir():
        if path.name != "run":
            path.unlink()
    copied(kept, renewable.own.parent)
    assert renewable.broker.reload()[-1].startswith("reloaded")


def shown(port: int, tls: ssl.SSLContext) -> int:
    """Return the serial number of the certificate that a port shows."""
    with (
        socket.create_connection(("127.0.0.1", port), SAFETY) as plain,
        tls.wrap_socket(plain, server_hostname="localhost") as secure,
    ):
        certificate = secure.getpeercert(binary_form=True)
        assert certificate
        return x509.load_der_x509_certificate(certificate).serial_number


def test_after_sighup_all_tls_ports_show_the_renewed_certificate_and_open_connections_stay(
    renewable: Renewable,
) -> None:
    broker, own = renewable.broker, renewable.own
    tls = context(own, "alice")

    def serials() -> set[int]:
        return {shown(port, tls) for port in (broker.tls, broker.proxy, broker.password)}

    assert serials() == {load(own, "localhost").serial_number}
    with (
        certificate_client(broker, "alice") as alice,
        Client(broker.proxy, context(own, "12345")) as proxied,
        password_client(broker, "bob") as bob,
        certificate_client(broker, "responder") as responder,
        Client(broker.plain) as anybody,
    ):
        for file in own.glob("localhost.*"):
            file.unlink()
        new = load(made(own, "localhost"), "localhost").serial_number
        assert broker.reload() == [RELOADED]
        wait_until(lambda: serials() == {new})
        for netid, client in (("alice", alice), ("12345", proxied), ("bob", bob)):
            round_trip(netid, client, responder)
        assert not anybody.disconnected.is_set()


def logs_in(broker: BrokerSide, name: str, password: str) -> bool:
    client = Client(broker.password, context(broker.directory), (name, password))
    client.close()
    return not client.reason.is_failure


def test_after_sighup_a_new_user_logs_in_and_a_changed_password_ends_connections(
    renewable: Renewable,
) -> None:
    broker = renewable.broker
    with password_client(broker, "alice") as alice, password_client(broker, "bob") as bob:
        assert not logs_in(broker, "carol", "carol's")
        set_password(renewable.own, "carol", "carol's")
        set_password(renewable.own, "bob", "another")
        assert broker.reload()[-1].startswith("reloaded")
        wait_until(lambda: logs_in(broker, "carol", "carol's"))
        assert not logs_in(broker, "bob", PASSWORDS["bob"])
        assert bob.disconnected.wait(SAFETY)
        assert not alice.disconnected.is_set()


def test_after_sighup_changed_access_rules_count_for_open_connections(
    renewable: Renewable,
) -> None:
    broker = renewable.broker
    with certificate_client(broker, "alice") as alice, certificate_client(broker, "bob") as bob:
        bob.subscribe("news/#")
        alice.publish("news/now", "forbidden")
        renewable.edit(renewable.scripts / "acl", "shared/#\n", "news/#\n")
        assert broker.reload()[-1].startswith("reloaded")

        def news() -> bool:
            alice.publish("news/now", "allowed")
            return not bob.messages.empty()

        wait_until(news)
        assert bob.receive() == ("news/now", "allowed")


def test_after_sighup_nginx_has_its_new_configuration(renewable: Renewable) -> None:
    renewable.edit(renewable.scripts / "nginx.conf", "limit_conn address 50;", "deny all;")
    assert renewable.broker.reload()[-1].startswith("reloaded")

    def denied() -> bool:
        with socket.create_connection(("127.0.0.1", renewable.broker.proxy), SAFETY) as connection:
            connection.settimeout(0.5)
            try:
                return connection.recv(1) == b""
            except TimeoutError:
                return False

    wait_until(denied)


def test_after_sighup_what_counts_at_the_next_start_only_is_named(
    renewable: Renewable, tmp_path: Path
) -> None:
    renewable.edit(renewable.scripts / "mosquitto.conf", "log_type information\n", "")
    shutil.copy(made(tmp_path / "other", "alice") / "ca.crt", renewable.own)
    assert renewable.broker.reload() == [
        f"start: warning: {what} has changed: that counts at the next start only\n"
        for what in ("mosquitto's configuration", "ca.crt")
    ] + [RELOADED]


def test_after_sighup_new_passwords_open_no_port_and_that_is_said(own: Path) -> None:
    with started(own) as broker:
        set_password(own, "alice", "secret")
        for _ in range(2):
            assert broker.reload() == [
                f"start: warning: {own}/passwords is new: "
                "the port for passwords opens at the next start only\n",
                RELOADED,
            ]
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", broker.password), SAFETY).close()


def test_a_sighup_renews_also_when_nobody_reads_what_it_says(own: Path) -> None:
    tls = context(own, "alice")
    with started(own) as broker:
        broker.stderr.close()
        issue(own, "localhost", names=("localhost",))
        broker.process.send_signal(signal.SIGHUP)
        wait_until(lambda: shown(broker.tls, tls) == load(own, "localhost").serial_number)
    assert broker.process.returncode == 0


def test_a_sighup_before_it_is_ready_is_heeded_when_it_is(own: Path) -> None:
    pid, nginx = own / "pid", own / "nginx"
    nginx.write_text(f'#!/bin/sh\n[ "$1" != -V ] || kill -HUP "$(cat {pid})"\nexec nginx "$@"\n')
    nginx.chmod(0o755)
    with started(
        own,
        free_ports() | {"NGINX": str(nginx)},
        preexec_fn=lambda: pid.write_text(str(os.getpid())),
    ) as broker:
        assert broker.line.startswith("ready"), broker.line
        assert broker.next_line() == RELOADED


BROKEN: dict[str, tuple[Callable[[Renewable], object], str]] = {
    "no certificate": (lambda r: (r.own / "localhost.crt").unlink(), "cannot read localhost.crt"),
    "no authority": (lambda r: (r.own / "ca.crt").unlink(), "cannot read ca.crt"),
    "a certificate cut off": (
        lambda r: os.truncate(r.own / "localhost.crt", 300),
        "localhost.crt and localhost.key are no certificate and its key",
    ),
    "another's key": (
        lambda r: shutil.copy(r.own / "bob.key", r.own / "localhost.key"),
        "localhost.crt and localhost.key are no certificate and its key",
    ),
    "an empty key": (
        lambda r: os.truncate(r.own / "localhost.key", 0),
        "localhost.crt and localhost.key are no certificate and its key",
    ),
    "an empty authority": (
        lambda r: os.truncate(r.own / "ca.crt", 0),
        "there is no certificate in ca.crt",
    ),
    "a link": (
        lambda r: link_to((r.own / "ca.crt").rename(r.own / "x")).rename(r.own / "ca.crt"),
        "is a link, not your own",
    ),
    "a wrong word in the access rules": (
        lambda r: r.edit(r.scripts / "acl", "pattern readwrite", "pattern red"),
        "does not accept acl or passwords: ",
    ),
    "a topic that is none in the access rules": (
        lambda r: r.edit(r.scripts / "acl", "readwrite shared/#", "readwrite shared#"),
        "does not accept acl or passwords: ",
    ),
    "no access rules": (lambda r: (r.scripts / "acl").unlink(), "No such file"),
    "a password in clear text": (
        lambda r: (r.own / "passwords").write_text("alice:secret\n"),
        "does not accept acl or passwords: ",
    ),
    "something else in passwords": (
        lambda r: (r.own / "passwords").write_text("alice\n"),
        "a line of",
    ),
    "an error in nginx.conf": (
        lambda r: r.edit(r.scripts / "nginx.conf", "error_log", "eror_log"),
        'unknown directive "eror_log"',
    ),
}


@pytest.mark.parametrize(("spoil", "reason"), BROKEN.values(), ids=BROKEN)
def test_after_sighup_with_a_broken_file_all_the_old_ones_stay_in_use(
    renewable: Renewable, spoil: Callable[[Renewable], object], reason: str
) -> None:
    broker, tls = renewable.broker, context(renewable.own, "alice")
    serial = shown(broker.tls, tls)
    files = copies_in(renewable)
    with certificate_client(broker, "bob") as bob, password_client(broker, "alice") as alice:
        spoil(renewable)
        lines = broker.reload()
        assert reason in "".join(lines[:-1])
        assert lines[-1] == "not reloaded: the files from before stay in use\n"
        assert copies_in(renewable) == files
        assert shown(broker.proxy, tls) == serial
        assert not bob.disconnected.is_set()
        assert not alice.disconnected.is_set()


def copies_in(renewable: Renewable) -> dict[str, bytes]:
    files = snapshot(renewable.own / "run")
    return {name: content for name, content in files.items() if not name.endswith(".log")}


# --- usage -------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [(), ("one", "two")])
def test_one_directory_is_given(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    result = subprocess.run(
        [BROKER / "start", *arguments], capture_output=True, text=True, timeout=SAFETY
    )
    assert result.returncode == 2
    assert "usage: broker/start DIR" in result.stderr


@pytest.mark.parametrize("script", ["start", "generate-certs.sh"])
def test_help_is_the_head_of_the_script(script: str) -> None:
    result = subprocess.run(
        [BROKER / script, "--help"], capture_output=True, text=True, timeout=SAFETY
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert "broker/generate-certs.sh" in result.stdout
    assert "Exit status:" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80


@pytest.mark.parametrize(
    ("variable", "package"), [("MOSQUITTO", "mosquitto"), ("NGINX", "libnginx-mod-stream")]
)
def test_a_missing_program_is_named_with_its_package(
    own: Path, variable: str, package: str
) -> None:
    status, stderr = refused(own, **{variable: "no-such-program"})
    assert status == 1
    assert "there is no program no-such-program" in stderr
    assert package in stderr.split("hint:")[1]


def test_a_missing_directory_or_certificate_is_named_with_what_makes_it(
    own: Path, tmp_path: Path
) -> None:
    (own / "localhost.crt").unlink()
    for directory, what in ((tmp_path / "none", "no directory"), (own, "localhost.crt")):
        status, stderr = refused(directory)
        assert status == 1
        assert what in stderr
        assert "generate-certs.sh" in stderr.split("hint:")[1]


def test_a_port_in_use_is_named(own: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        status, stderr = refused(own, TLS_PORT=port)
        assert status == 1
        assert f"127.0.0.1:{port} is in use" in stderr


@pytest.mark.parametrize("variable", ["MOSQUITTO", "NGINX"])
def test_a_program_that_fails_at_once_ends_the_start(own: Path, variable: str) -> None:
    fails = own / "fails"
    fails.write_text("#!/bin/sh\necho its last words >&2\nexit 3\n")
    fails.chmod(0o755)
    status, stderr = refused(own, **{variable: str(fails)})
    assert status == 1
    assert f"{variable.lower()} ended with exit status 3" in stderr
    assert "its last words" in stderr
    assert "ready" not in stderr
