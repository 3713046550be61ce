"""The sample broker side, as the tests start it: certificates, broker/start, and MQTT clients.

A test module takes a fixture from here by a name of its own: `broker = broker_side.running`.
"""

from __future__ import annotations

import os
import queue
import shutil
import signal
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import conftest
import paho.mqtt.client as paho
import pytest
from conftest import ROOT, SAFETY, processes_below
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hostile import changed_program
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.reasoncodes import ReasonCode

BROKER = ROOT / "broker"
NAMES = ("localhost", "mqtt.example.edu", "responder", "alice", "bob", "12345")
PASSWORDS = {
    "alice": "alice's password",
    "bob": "bob's password",
    "responder": "pässword of the responder",
    "+": "plus",
    "alice/key-exchange": "slash",
}


# --- certificates ------------------------------------------------------------------------------


def generate(directory: Path, *names: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run generate-certs.sh."""
    return subprocess.run(
        [BROKER / "generate-certs.sh", directory, *names],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=SAFETY,
    )


def made(directory: Path, *names: str) -> Path:
    """Run a generate-certs.sh that succeeds."""
    result = generate(directory, *names)
    assert (result.returncode, result.stderr) == (0, "")
    return directory


def load(directory: Path, name: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate((directory / f"{name}.crt").read_bytes())


def issue(
    directory: Path,
    file: str,
    issuer: str = "ca",
    subject: str = "",
    names: tuple[str, ...] = (),
    begins: timedelta = timedelta(minutes=-1),
    ends: timedelta = timedelta(days=30),
) -> None:
    """Write a certificate, its key and both, replacing what is there.

    So generate-certs.sh would not.

    :param begins: when it becomes valid, from now
    """
    key = ec.generate_private_key(ec.SECP256R1())
    issuers_key = serialization.load_pem_private_key(
        (directory / f"{issuer}.key").read_bytes(), None
    )
    assert isinstance(issuers_key, ec.EllipticCurvePrivateKey)
    now = datetime.now(timezone.utc)
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, subject or file)]))
        .issuer_name(load(directory, issuer).subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + begins)
        .not_valid_after(now + ends)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuers_key.public_key()), False
        )
    )
    purposes = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
    builder = builder.add_extension(x509.ExtendedKeyUsage(purposes), False)
    if names:
        dns_names = x509.SubjectAlternativeName([x509.DNSName(name) for name in names])
        builder = builder.add_extension(dns_names, False)
    certificate = builder.sign(issuers_key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    in_pem = certificate.public_bytes(pem)
    key_in_pem = key.private_bytes(
        pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    for end, content in (("crt", in_pem), ("key", key_in_pem), ("pem", in_pem + key_in_pem)):
        (directory / f"{file}.{end}").write_bytes(content)
        (directory / f"{file}.{end}").chmod(0o600)


def context(certificates: Path, name: str | None = None) -> ssl.SSLContext:
    """Return a client's context: it trusts the CA, and has the certificate of a name, if any."""
    tls = ssl.create_default_context(cafile=certificates / "ca.crt")
    if name:
        tls.load_cert_chain(certificates / f"{name}.crt", certificates / f"{name}.key")
    return tls


def set_password(directory: Path, name: str, password: str) -> None:
    """Add a user to the file passwords, which is made if there is none, or change a password."""
    passwords = directory / "passwords"
    passwords.touch(0o600)
    command: list[str | Path] = ["mosquitto_passwd", "-b", passwords, name, password]
    subprocess.run(command, check=True, capture_output=True, timeout=SAFETY)


# --- broker/start ------------------------------------------------------------------------------


PORTS = ("PLAIN_PORT", "TLS_PORT", "PROXY_PORT", "PASSWORD_PORT")


def free_ports() -> dict[str, str]:
    """Return the environment that gives broker/start free ports."""
    with ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in PORTS]
        return {name: str(s.getsockname()[1]) for name, s in zip(PORTS, servers, strict=True)}


def kill_all(process: subprocess.Popen[str]) -> None:
    """Kill a process, and what it has started: that would run on."""
    below = processes_below(process.pid)
    process.kill()
    for pid in below:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


@contextmanager
def killed_at_timeout(process: subprocess.Popen[str]) -> Iterator[None]:
    """End what is read from a process that takes too long."""
    timer = threading.Timer(SAFETY, kill_all, (process,))
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class BrokerSide:
    """A running `broker/start`: its directory, its ports and the first line that it wrote."""

    def __init__(
        self,
        directory: Path,
        env: dict[str, str],
        script: Path = BROKER / "start",
        **options: Any,
    ) -> None:
        """Start it.

        :param env: the ports, "" for none, and what else is to be in the environment
        """
        self.directory = directory
        self.ports = {name: env[name] for name in PORTS}
        self.plain, self.tls, self.proxy, self.password = (
            int(port or 0) for port in self.ports.values()
        )
        self.process: subprocess.Popen[str] = subprocess.Popen(
            [script, directory],
            env=os.environ | env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            **options,
        )
        assert self.process.stderr
        self.stderr = self.process.stderr
        self.line = self.next_line()

    def next_line(self) -> str:
        """Return the next line of its stderr."""
        with killed_at_timeout(self.process):
            return self.stderr.readline()

    def reload(self) -> list[str]:
        """Send SIGHUP and return the lines of its stderr up to the one that tells the result."""
        self.process.send_signal(signal.SIGHUP)
        lines = [self.next_line()]
        while "reloaded" not in lines[-1]:
            assert lines[-1], "it has ended"
            lines.append(self.next_line())
        return lines

    def ended(self) -> tuple[int, str]:
        """Wait for its end and return its exit status and the rest of its stderr."""
        with killed_at_timeout(self.process), self.stderr:
            rest = self.stderr.read()
            return self.process.wait(), rest

    def stop(self, how: int = signal.SIGTERM) -> tuple[int, str]:
        """Send a signal; the result is that of ended()."""
        self.process.send_signal(how)
        return self.ended()


@contextmanager
def started(
    directory: Path,
    ports: dict[str, str] | None = None,
    **options: Any,
) -> Iterator[BrokerSide]:
    """Run `broker/start DIR` from its first line to the end of the block."""
    for _ in range(5):  # another program may take one of the ports before the broker does
        broker = BrokerSide(directory, ports or free_ports(), **options)
        try:
            if "in use" not in broker.line:
                yield broker
                return
        finally:
            broker.process.terminate()
            broker.process.wait(SAFETY)
            broker.stderr.close()
    raise AssertionError(broker.line)


# --- clients -----------------------------------------------------------------------------------


class Client:
    """An MQTT client that is connected when it is made, and whose calls wait for their answer."""

    def __init__(
        self,
        port: int,
        tls: ssl.SSLContext | None = None,
        login: tuple[str, str | None] | None = None,
        client_id: str = "",
    ) -> None:
        self.connected: queue.Queue[ReasonCode] = queue.Queue()
        self.subscribed: queue.Queue[int] = queue.Queue()
        self.messages: queue.Queue[tuple[str, str]] = queue.Queue()
        self.disconnected = threading.Event()
        self.client = paho.Client(
            CallbackAPIVersion.VERSION2, client_id, reconnect_on_failure=False
        )
        self.client.on_connect = lambda _c, _u, _f, reason, _p: self.connected.put(reason)
        self.client.on_subscribe = lambda _c, _u, mid, _r, _p: self.subscribed.put(mid)
        self.client.on_disconnect = lambda *_: self.disconnected.set()
        self.client.on_message = lambda _c, _u, message: self.messages.put(
            (message.topic, message.payload.decode())
        )
        if tls:
            self.client.tls_set_context(tls)
        if login:
            self.client.username_pw_set(*login)
        self.client.connect("localhost", port)
        self.client.loop_start()
        self.reason = self.connected.get(timeout=SAFETY)

    def __enter__(self) -> Client:
        assert not self.reason.is_failure, self.reason
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.client.disconnect()
        self.client.loop_stop()

    def subscribe(self, *topics: str) -> None:
        self.client.subscribe([(topic, 1) for topic in topics])
        self.subscribed.get(timeout=SAFETY)

    def publish(self, topic: str, payload: str, *, retain: bool = False) -> None:
        """Publish and wait for the PUBACK, which also comes for what the ACL denies."""
        message = self.client.publish(topic, payload, qos=1, retain=retain)
        message.wait_for_publish(SAFETY)
        assert message.is_published()

    def receive(self) -> tuple[str, str]:
        return self.messages.get(timeout=SAFETY)


def certificate_client(broker: BrokerSide, name: str, **options: Any) -> Client:
    return Client(broker.tls, context(broker.directory, name), **options)


def password_client(broker: BrokerSide, name: str, **options: Any) -> Client:
    login = (name, PASSWORDS[name])
    return Client(broker.password, context(broker.directory), login, **options)


# --- fixtures ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificates that no test changes."""
    return made(tmp_path_factory.mktemp("certificates") / "certs", *NAMES)


@pytest.fixture(scope="module")
def running(certificates: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[BrokerSide]:
    """One broker side for the tests that leave it as it was."""
    directory = tmp_path_factory.mktemp("broker") / "with a space"
    shutil.copytree(certificates, directory)
    for name, password in PASSWORDS.items():
        set_password(directory, name, password)
    with started(directory) as broker:
        assert broker.line.startswith("ready"), broker.line
        yield broker


@pytest.fixture
def own(certificates: Path, tmp_path: Path) -> Path:
    """Certificates of one test alone."""
    return Path(shutil.copytree(certificates, tmp_path / "own"))


@pytest.fixture
def change_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Make the test's responders wait less: give constants of a module other values."""

    def change(module: str, **constants: float) -> None:
        lines = f"from secure_mqtt import {module}\nvars({module}).update({constants!r})\n"
        monkeypatch.setattr(conftest, "PROGRAM", changed_program(tmp_path, lines))

    return change
