#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["paho-mqtt>=2.1,<3", "cryptography>=50,<51"]
# ///
"""Client and responder of the secure MQTT lab; HELP below tells how to run them.

From the top: constants, errors, settings, text actions, Connection (the only user of paho), the
client, sessions of many lines, the responder, the local broker, the command line, main. crypto.py
holds the secrets.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import select
import signal
import socket
import sys
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, TypeVar, cast

import crypto

if TYPE_CHECKING:  # else loaded where they are used: --help and usage errors need none of them
    import io
    import logging
    import ssl

    import paho.mqtt.client as paho

PROGRAM = "secure_mqtt_client.py"
__version__ = "2.0.0"

HELP = """\
usage: secure_mqtt_client.py [options] NETID ACTION MESSAGE
       secure_mqtt_client.py [options] --lines NETID ACTION -
       secure_mqtt_client.py [options] --respond [NETID]

Send one MQTT request that not even the broker can read, and print the answer;
or one for each line; or answer such requests.

request:
  NETID                  who asks: one level of the topic, at most 64 characters
  ACTION                 uppercase, lowercase, title-case, reverse, shuffle or
                         random (drops and doubles characters)
  MESSAGE                the text; - reads standard input, whole
  -W, --timeout SECONDS  give up after so long in all, or without a next answer
                         to --lines (default: 30)
  --suite SUITE          dh4096, the lab's (default), or x25519: faster, and
                         each message fits its place only
  --lines                send each line of standard input as a request
  --rekey SECONDS        agree on new keys so often (with --lines)

responder:
  --respond              answer the requests of all NETIDs, or of one
  --status-topic TOPIC   publish there, retained, whether it runs, and counts

broker:
  -h, --host HOST        name or address (default: localhost)
  -p, --port PORT        TCP port (default: 1884, with TLS 8883)
  -i, --id ID            MQTT client ID (default: NETID, as the lab wants it;
                         for a responder a random one)
  --local                run a broker for this command, and for a request a
                         responder, too (needs the package amqtt)

security from end to end:
  --identity FILE        sign with the private key in this file, and send its
                         certificates with it (PEM, not encrypted)
  --peer-ca FILE         accept only a peer that these authorities certify
                         (PEM); a responder expects the NETID as its name
  --peer-name NAME       the responder's name (default: responder)

security of the connection (each of the first five turns TLS on):
  --cafile FILE          trust the authorities in this file (PEM)
  --tls                  trust the authorities that the system trusts
  --insecure             trust any broker: no protection from an active attacker
  --cert FILE            our certificate, and intermediate ones (PEM)
  --key FILE             its private key (PEM, not encrypted)
  -u, --username NAME    (default: MQTT_USERNAME in the environment)
  --password-file FILE   holds the password, - asks for it (default:
                         MQTT_PASSWORD in the environment)

other:
  -v, --verbose          say on stderr what happens; never a key or a text
  --help                 print this help, as does -h alone
  --version              print the version

exit status:
  0 the response was printed, 1 it was not, 2 wrong usage, 130 Ctrl-C;
  a responder that SIGINT or SIGTERM stops exits with 0

examples:
  secure_mqtt_client.py --local le0nh4rt uppercase "Networking is the best!"
  secure_mqtt_client.py -h broker.example.org le0nh4rt reverse - < message.txt
  secure_mqtt_client.py --respond
"""
USAGE = HELP.partition("\n\n")[0]

DEFAULT_PORT = 1884  # the lab's
DEFAULT_TLS_PORT = 8883  # secure-mqtt, as registered with IANA
# A peer on the course's own module needs over 10 s on cryptography 49 and newer.
DEFAULT_TIMEOUT = 30.0  # seconds
MAX_TIMEOUT = 86_400.0  # seconds: far more overflows the clocks of the system
NOTICE_AFTER = 3.0  # seconds until a person at a terminal is told what is being waited for
# One level of a topic. Brokers may close the connection at a control character (3.1.1, 1.5.3), and
# a $ in front hides it from the responder's wildcard (4.7.2).
NETID = re.compile(r"(?!\$)[^/+#\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,64}")
DNS_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"  # RFC 1034, 3.5; RFC 1123, 2.1
DNS_NAME = re.compile(rf"{DNS_LABEL}(\.{DNS_LABEL})*")
MAX_TOKEN_SIZE = 268_435_455 - 1024  # bytes: MQTT 3.1.1, 2.2.3, less room for the topic
QOS = 1
KEEPALIVE = 15  # seconds of silence after which a broker is asked for a sign of life
READS = 16  # packets read, if so many have come, before anything else is done
LOOP_INTERVAL = 1.0  # seconds between looks at the time, for keep-alive
PROBE_TIME = 1.0  # seconds to find out why TLS has failed
MAX_MESSAGES, MAX_MESSAGE_BYTES = 10_000, 2**27  # received, but not handled yet; more are dropped
MAX_IN_FLIGHT = 10_000  # published, but not acknowledged by the broker yet
FIRST_DELAY, LAST_DELAY = 1.0, 60.0  # seconds between attempts to connect

# A session of many lines.
CHUNK_SIZE = 2**16  # bytes, read from standard input at a time
WINDOW, WINDOW_BYTES = 64, 2**20  # requests sent, but not answered yet
# Seconds without an answer until all is tried again, then doubled. A peer on the course's own
# module has the one suite only, and needs long.
PATIENCE = {"x25519": 2.0, "dh4096": 15.0}
MAX_REQUESTS_PER_KEY = {"x25519": 10_000, "dh4096": 100}  # both ends remember them
IDLE_TIME = 30.0  # seconds after which a key is renewed: a responder may forget it (KEY_LIFETIME)

# The responder. What goes beyond a bound is dropped, with a warning.
MAX_NETIDS = 10_000  # the least recently used is forgotten first
KEYS_PER_NETID = 8  # so many clients can use a NetID at the same time
KEY_LIFETIME = 60.0  # seconds without use until a key is forgotten that has a successor
MAX_WAITING = 1_000  # NetIDs whose key exchanges wait for their turn
KEY_PAIR_STOCK = 32  # made ahead, so that this many clients can come at once
REPORT_INTERVAL = 1.0  # seconds between warnings of what was dropped
STATUS_INTERVAL = 30.0  # seconds
OFFLINE = b'{"status": "offline"}'
STOP_SIGNALS = signal.SIGINT, signal.SIGTERM
DRAINING_TIME = 5.0  # seconds to finish what is being answered when told to stop

WAITING = 21  # log level, just above INFO: what a person at a terminal is told unasked
T = TypeVar("T")


def log() -> logging.Logger:
    """Return the program's logger."""
    import logging

    return logging.getLogger(PROGRAM)


class ProgramError(Exception):
    """What went wrong and, as a hint, what to do about it, both in the user's words."""

    def __init__(self, message: str, hint: str = "", is_final: bool = False) -> None:
        """Take the texts; final is what no further attempt to connect can change."""
        super().__init__(message)
        self.hint = hint
        self.is_final = is_final


class UsageError(ProgramError):
    """The command line is wrong."""


class UnusableError(crypto.CryptoError):
    """A message from a peer cannot be used; the text says why."""


# --- settings ----------------------------------------------------------------------------------


class Settings(argparse.Namespace):
    """What the command line says; the attributes have the options' names.

    Empty or zero is what was not given and has no default.
    """

    netid = ""  # for a responder: every NetID
    action = ""
    message: bytes | None = None  # UTF-8; None: standard input
    timeout = 0.0  # seconds
    suite = ""
    lines = False
    rekey = 0.0  # seconds
    respond = False
    status_topic = ""
    host = ""
    port = 0
    id = ""
    local = False
    identity = ""
    peer_ca = ""
    peer_name = ""
    cafile = ""
    tls = False
    insecure = False
    cert = ""
    key = ""
    username = ""
    password_file = ""
    password: bytes | None = None
    verbose = False

    @property
    def uses_tls(self) -> bool:
        """Whether any option turns TLS on."""
        return bool(self.cafile or self.tls or self.insecure or self.cert)

    @property
    def broker(self) -> str:
        """The broker, for messages."""
        return f"{self.host} port {self.port}"


def tls_context(settings: Settings) -> ssl.SSLContext:
    """Return a context for TLS 1.2 or newer, from the files as they are now.

    :raises UsageError: a file cannot be used
    """
    import ssl

    def refuse_password() -> NoReturn:
        raise UsageError("--key is encrypted; decrypt it: openssl pkey -in KEY -out NEW_KEY")

    names = {"--cafile": settings.cafile, "--cert": settings.cert, "--key": settings.key}
    contents = {option: read_file(option, name) for option, name in names.items() if name}
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if settings.insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        try:
            context = ssl.create_default_context(cafile=settings.cafile or None)
        except ssl.SSLError:
            raise UsageError(f"--cafile {settings.cafile} holds no certificate in PEM") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if settings.cert:
        try:
            context.load_cert_chain(settings.cert, settings.key, refuse_password)
        except ssl.SSLError as error:
            reason = "belong to each other" if "MISMATCH" in str(error) else "hold PEM"
            raise UsageError(f"--cert and --key do not {reason}") from None
        with contextlib.suppress(ValueError):  # not in DER: then the broker will tell
            if crypto.has_expired(contents["--cert"]):
                raise UsageError(f"--cert {settings.cert} has expired; renew it")
    return context


def peer_security(settings: Settings) -> tuple[crypto.Identity | None, crypto.Authority | None]:
    """Return what --identity and --peer-ca name, from the files as they are now.

    :raises UsageError: a file cannot be used
    """

    def read(option: str, name: str, kind: Callable[[bytes], T]) -> T | None:
        try:
            return kind(read_file(option, name)) if name else None
        except crypto.KeyFileError as error:
            raise UsageError(f"{option} {name} {error}") from None

    identity = read("--identity", settings.identity, crypto.Identity)
    if identity and not settings.respond and settings.netid not in identity.names:
        raise UsageError(
            f"--identity {settings.identity} is for {', '.join(identity.names)!r}, not for NETID"
            f" {settings.netid!r}"
        )
    return identity, read("--peer-ca", settings.peer_ca, crypto.Authority)


def read_file(option: str, name: str) -> bytes:
    """Return the content of a file that an option names. UsageError if there is none."""
    try:
        with open(name, "rb") as file:
            return file.read()
    except OSError as error:
        raise UsageError(f"cannot read {option} {name}: {error.strerror}") from None


# --- text actions ------------------------------------------------------------------------------


def shuffle(text: str) -> str:
    """Return the characters in random order."""
    import random

    return "".join(random.sample(text, len(text)))


def drop_and_double(text: str) -> str:
    """Return the characters, each of them dropped, kept or doubled at random."""
    import random

    return "".join(character * random.randint(0, 2) for character in text)


ACTIONS: dict[str, Callable[[str], str]] = {
    "uppercase": str.upper,
    "lowercase": str.lower,
    "title-case": str.title,
    "reverse": lambda text: text[::-1],
    "shuffle": shuffle,
    "random": drop_and_double,
}
KEY_EXCHANGE = "key-exchange"  # in the topics of the exchange, where else the action is
REQUEST, RESPONSE = "{}/{}/request", "{}/{}/response"  # topics, of NetID and action


# --- Connection --------------------------------------------------------------------------------


class Message(NamedTuple):
    """A PUBLISH that came in."""

    topic: str
    payload: bytes
    is_retained: bool


class Connection:
    """A connection to the broker, from DNS look-up to DISCONNECT.

    Its methods let the network go on while they wait, on the thread that calls them. paho's
    callbacks only note what came.
    """

    def __init__(self, settings: Settings, will: tuple[str, bytes] | None = None) -> None:
        """Prepare a connection.

        :param will: the topic and payload that the broker shall publish, retained, when the
            connection breaks
        """
        import paho.mqtt.client as paho
        from paho.mqtt.enums import CallbackAPIVersion

        self._settings = settings
        self.stage = "CONNACK"  # what is being waited for
        self.messages: deque[Message] = deque()
        self.dropped = 0  # messages for which there was no room
        self.patience_ends = float("inf")  # of time.monotonic(), when wait() gives up
        self._bytes = 0  # of the payloads since wait() was called
        self._connack: Any = None
        self._granted: list[Any] | None = None  # QoS, or a refusal, for each topic
        self._failure: ProgramError | None = None
        self._has_socket = False
        self.ignored: Counter[str] = Counter()  # answers that can't be used, by their fault
        self._last: paho.MQTTMessageInfo | None = None
        self._client = client = paho.Client(
            CallbackAPIVersion.VERSION2, settings.id, reconnect_on_failure=False
        )
        client.max_inflight_messages_set(MAX_IN_FLIGHT)
        client.max_queued_messages_set(MAX_IN_FLIGHT)
        client.connect_timeout = settings.timeout
        if settings.username:
            client.username_pw_set(settings.username, settings.password)  # type: ignore[arg-type]
        if will:
            client.will_set(*will, QOS, retain=True)
        client.on_socket_open = self._on_socket_open
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_publish = lambda client, *_: acknowledge_at_once(client.socket())
        client.on_message = self._on_message
        # We subscribe at QoS 1. paho would keep a flood of QoS 2, to deliver it later.
        client._send_pubrec = self._refuse_qos_2  # type: ignore[method-assign]

    def __enter__(self) -> Connection:
        """Return the connection."""
        return self

    def __exit__(self, error: object, *exc_info: object) -> None:
        """Disconnect; after an error without a word, so that the broker publishes the will."""
        if error is None:
            self._client.disconnect()
        elif sock := self._client.socket():
            sock.close()

    def connect(self) -> None:
        """Connect, and wait for the CONNACK. ProgramError if that fails, or it is a refusal."""
        client, settings = self._client, self._settings
        try:
            if settings.uses_tls:
                client.tls_set_context(tls_context(settings))
            client.connect(settings.host, settings.port, KEEPALIVE)
        except Exception as error:  # ValueError, UnicodeError, … for a host that cannot be one
            raise self._explain(error) from None
        while self._connack is None:
            self.wait()
        log().info("received CONNACK from %s", settings.broker)

    def subscribe(self, *topics: str) -> None:
        """Subscribe at QoS 1, in one packet; wait for the SUBACK. ProgramError for a refusal."""
        self.stage = "SUBACK"
        self._client.subscribe([(topic, QOS) for topic in topics])
        while self._granted is None:
            self.wait()
        if self._granted != [QOS] * len(topics):
            codes = zip(topics, self._granted, strict=False)
            refused = [topic for topic, code in codes if code != QOS] or topics
            raise ProgramError(
                f"the broker on {self._settings.broker} refuses the subscription to"
                f" {' and '.join(refused)}",
                "its access rules may not allow this NETID",
                is_final=True,
            )
        log().info("received SUBACK from %s", self._settings.broker)

    def publish(self, topic: str, payload: bytes, retain: bool = False) -> bool:
        """Publish at QoS 1. False: too large, too much in flight, or no broker."""
        try:
            publication = self._client.publish(topic, payload, QOS, retain)
        except ValueError:  # more than MQTT can carry
            return False
        if not publication.rc:
            self._last = publication
        return not publication.rc

    def flush(self) -> None:
        """Wait until the broker has acknowledged the last publication."""
        while self._last and not self._last.is_published():
            self.wait()
            self.messages.clear()  # nobody takes them any more

    def wait(self, seconds: float = LOOP_INTERVAL, others: Sequence[Any] = ()) -> list[Any]:
        """Let the network go on until something comes, or for some seconds.

        :param others: things that select() takes, to be waited for as well
        :return: those of them that can be read
        :raises ProgramError: the connection has ended
        :raises TimeoutError: so has the patience
        """
        readable: list[Any] = []
        if not self.messages:
            self._bytes = 0
        try:
            if not self._failure:
                readable = self._step(seconds, others)
        except Exception as error:
            # Whatever a hostile broker's bytes make paho raise, it ends this connection only.
            self._failure = self._explain(error)
        # What came before still counts, once we have subscribed.
        if self._failure and not (self.messages and self._granted):
            raise self._failure
        if time.monotonic() > self.patience_ends:
            raise TimeoutError("no answer came")
        return readable

    def _step(self, seconds: float, others: Sequence[Any]) -> list[Any]:
        client, sock = self._client, self._client.socket()
        if sock is None:
            raise ConnectionError("The connection was lost")
        is_pending = hasattr(sock, "pending") and sock.pending() > 0  # decrypted by TLS already
        to_write = [sock] if client.want_write() else []
        is_busy = is_pending or self.messages
        timeout = 0 if is_busy else max(0, min(seconds, LOOP_INTERVAL))
        readable, writable, _ = select.select([sock, *others], to_write, [], timeout)
        code = 0
        if sock in readable or is_pending:
            for _ in range(READS):
                code = client.loop_read()
                if code or not select.select([sock], [], [], 0)[0]:
                    break
            if self._settings.uses_tls:  # its session tickets are no packets that paho tells of
                acknowledge_at_once(sock)
        if code := code or (client.loop_write() if writable else 0) or client.loop_misc():
            import paho.mqtt.client as paho

            raise ConnectionError(paho.error_string(code).rstrip("."))
        return [each for each in readable if each is not sock]

    def discard(self) -> None:
        """Drop the messages that are here already."""
        while (sock := self._client.socket()) and select.select([sock], [], [], 0)[0]:
            self.wait(0)
        self.messages.clear()

    def _on_socket_open(self, client: object, userdata: object, sock: Any) -> None:
        self._has_socket = True
        # Else Nagle's algorithm lets a small packet wait for the acknowledgement of the one before.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _on_connect(self, client: Any, userdata: Any, flags: Any, code: Any, _: Any) -> None:
        self._connack = code
        self.messages.clear()  # nobody has asked for any
        if code.is_failure:
            reason = str(code).lower()
            hints = {
                "bad user name or password": "check --username and --password-file",
                "not authorized": "it may want --username and --password-file, or --cert and --key",
            }
            raise ProgramError(
                f"the broker on {self._settings.broker} refuses the connection: {reason}",
                hints.get(reason, "ask whoever runs it, or check --host and --port"),
                is_final=reason in hints,
            )

    def _on_subscribe(self, client: Any, userdata: Any, mid: int, codes: Any, _: Any) -> None:
        acknowledge_at_once(client.socket())
        self._granted = [code.value for code in codes]

    def _on_message(self, client: object, userdata: object, message: Any) -> None:
        self._bytes += len(message.payload)
        if len(self.messages) < MAX_MESSAGES and (
            self._bytes <= MAX_MESSAGE_BYTES or not self.messages
        ):
            self.messages.append(Message(message.topic, bytes(message.payload), message.retain))
        else:
            self.dropped += 1

    def _refuse_qos_2(self, mid: int) -> NoReturn:
        raise ProgramError(f"the broker on {self._settings.broker} sent a message at QoS 2")

    def _explain(self, error: Exception) -> ProgramError:
        """Return the error for the end of a connection, which depends on how far it got."""
        if isinstance(error, ProgramError):
            return error
        settings = self._settings
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if self._connack is not None:
            return ProgramError(
                f"the connection to {settings.broker} was lost while waiting for {self.stage}:"
                f" {reason}",
                f"another client may have the client ID {settings.id!r}; choose one with --id",
            )
        if settings.uses_tls and (problem := tls_problem(settings)):
            return problem
        if self._has_socket:
            return self.silence(f"no CONNACK came ({reason})")
        if isinstance(error, socket.gaierror | UnicodeError):
            return ProgramError(
                f"cannot find the host {settings.host!r}: {reason}",
                "check --host, and that this machine is online",
            )
        if isinstance(error, ConnectionRefusedError):
            return ProgramError(
                f"connection refused: nothing listens on {settings.broker}",
                f"start a broker there (mosquitto -p {settings.port}), or check --host and --port",
            )
        return self.silence(reason)

    def silence(self, reason: str) -> ProgramError:
        """Return the error for a broker that does not say what it should."""
        broker = self._settings.broker
        if not self._has_socket:
            return ProgramError(
                f"cannot connect to {broker}: {reason}",
                "check --host and --port, and whether a firewall is in between",
            )
        if self._connack is None:
            return ProgramError(
                f"no MQTT broker answers on {broker}: {reason}",
                "check --port; the broker must speak MQTT 3.1.1, and a TLS port needs --cafile or"
                " --tls",
            )
        return ProgramError(f"the broker on {broker} does not go on: {reason}")


def acknowledge_at_once(sock: Any) -> None:
    """Make TCP acknowledge what has just come, where it can (Linux).

    mosquitto by default leaves Nagle's algorithm on: its next small packet waits for the
    acknowledgement of the last one, which TCP would delay by 40 ms.
    """
    if hasattr(socket, "TCP_QUICKACK"):
        with contextlib.suppress(OSError):  # the connection has ended
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


# Parts of what OpenSSL says, each with what it means and what to do.
TLS_PROBLEMS = {
    "unable to get|self.signed": (
        "its certificate comes from an unknown authority",
        "give the authority's certificate with --cafile",
    ),
    "certificate has expired": ("its certificate has expired", "it must be renewed there"),
    "not yet valid": ("its certificate is not valid yet", "check this machine's clock"),
    "mismatch": ("its certificate is for {names}, not for {host}", "check --host"),
    "verify failed": (
        "its certificate is not good ({reason})",
        "it must be for a server, and issued by the authority in --cafile",
    ),
    "certificate required|handshake failure": (
        "it wants a client certificate",
        "give one with --cert and --key",
    ),
    " alert ": (
        "it refuses our certificate ({reason})",
        "use a certificate that its authority has issued and that is valid now",
    ),
    "wrong version|record layer|packet length|eof|reset": (
        "it does not speak TLS on this port",
        "check --port, or leave out the TLS options",
    ),
}


def tls_problem(settings: Settings) -> ProgramError | None:
    """Return the error if TLS with the broker fails: tries it, as paho does not pass alerts on."""
    try:
        context = tls_context(settings)
        with socket.create_connection((settings.host, settings.port), PROBE_TIME) as plain:
            context.wrap_socket(plain, server_hostname=settings.host).recv(1)
        return None
    except TimeoutError:
        return None
    except UsageError as error:  # a file has just become unusable
        return error
    except OSError as error:
        reason = re.sub(r"\[SSL.*?\] | \(_ssl.*\)", "", str(error))
    for pattern, (problem, hint) in TLS_PROBLEMS.items():
        if re.search(pattern, reason.lower()):
            names = certified_names(settings) if "{names}" in problem else ""
            problem = problem.format(names=names, host=settings.host, reason=reason)
            return ProgramError(f"TLS failed with the broker on {settings.broker}: {problem}", hint)
    return None


def certified_names(settings: Settings) -> str:
    """Return the names in the broker's certificate, for an error: asks the broker for it again."""
    import ssl

    from cryptography import x509

    with contextlib.suppress(OSError, ValueError, x509.ExtensionNotFound):
        pem = ssl.get_server_certificate((settings.host, settings.port), timeout=PROBE_TIME)
        certificate = x509.load_pem_x509_certificate(pem.encode())
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return ", ".join(repr(str(name.value)) for name in names)  # a stranger chose them
    return "another name"


def backoff() -> Iterator[float]:
    """Yield the seconds to wait before each further attempt to connect: doubling, with jitter."""
    import random

    ceiling = FIRST_DELAY
    while True:
        ceiling = min(2 * ceiling, LAST_DELAY)
        yield random.uniform(ceiling / 2, ceiling)


# --- the client --------------------------------------------------------------------------------


def request(mqtt: Connection, settings: Settings, exchange: crypto.Exchange, text: bytes) -> bytes:
    """Send one request and return the answer, UTF-8 text.

    :param mqtt: a connection that was not used yet
    :param exchange: a fresh one
    :param text: the message, UTF-8
    :raises ProgramError: there is no answer to return
    """
    asking, answering = topics(settings)
    with mqtt:
        mqtt.connect()
        mqtt.subscribe(RESPONSE.format(settings.netid, KEY_EXCHANGE), answering)
        exchange_keys(mqtt, settings, exchange)
        read = partial(exchange.open, answering)
        _, answer = call(mqtt, settings, settings.action, exchange.seal(asking, text), read)
    if not is_utf8(answer):
        raise ProgramError("the response is not UTF-8 text", "the responder breaks the protocol")
    return answer


def topics(settings: Settings) -> tuple[str, str]:
    """Return the topics of encrypted requests and their responses."""
    names = settings.netid, settings.action
    return REQUEST.format(*names), RESPONSE.format(*names)


def exchange_keys(mqtt: Connection, settings: Settings, exchange: crypto.Exchange) -> None:
    """Make the exchange with a responder. ProgramError: the connection has ended."""

    def agree(response: bytes) -> bytes:
        exchange.agree(response)
        return response

    response = call(mqtt, settings, KEY_EXCHANGE, exchange.request(), agree)
    if settings.peer_ca:
        log().info("the peer has proved to be %r", settings.peer_name)
    else:
        fingerprint = crypto.digest(crypto.public_key_der(response)).hex()
        log().info("the peer is not authenticated; SHA-256 of its public key: %s", fingerprint)


def call(
    mqtt: Connection, settings: Settings, action: str, payload: bytes, read: Callable[[bytes], T]
) -> T:
    """Publish a request and return what the first answer that can be used means.

    :param action: as in the topics, KEY_EXCHANGE included
    :param read: turns a payload into the result; CryptoError if it can't be used
    :raises ProgramError: the connection has ended
    """
    mqtt.stage = "the key exchange" if action == KEY_EXCHANGE else "the response"
    topic = RESPONSE.format(settings.netid, action)
    mqtt.ignored.clear()
    mqtt.discard()  # what came before the request is no answer to it
    mqtt.publish(REQUEST.format(settings.netid, action), payload)
    log().info("sent %d bytes for %s", len(payload), mqtt.stage)
    size = len(payload)
    del payload  # it may be large
    while True:
        while not mqtt.messages:
            mqtt.wait()
        message = mqtt.messages.popleft()
        if message.topic == topic:
            try:
                check_answer(message, size)
                result = read(message.payload)
            except crypto.CryptoError as error:
                mqtt.ignored[str(error)] += 1
            else:
                log().info("received %d bytes for %s", len(message.payload), mqtt.stage)
                return result


def check_answer(answer: Message, size: int) -> None:
    """Raise UnusableError for what is no answer, whatever it means.

    :param size: of our own message, in bytes
    """
    if answer.is_retained:
        raise UnusableError("retained from an earlier run")
    # No action makes a text more than three times as long. A broker that sends far more wants us to
    # be busy with it when the time is over.
    if len(answer.payload) > 4 * size + crypto.MAX_KEY_FILE_SIZE:
        raise UnusableError("far too large for an answer")


def is_utf8(text: bytes) -> bool:
    """Tell whether bytes are UTF-8."""
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def timed_out(mqtt: Connection, settings: Settings) -> ProgramError:
    """Return the error for a client whose time is over."""
    within = f"within {settings.timeout:g} s"
    if mqtt.stage in ("CONNACK", "SUBACK"):
        return mqtt.silence(f"no {mqtt.stage} came {within}")
    is_exchange = mqtt.stage == "the key exchange"
    topic = RESPONSE.format(settings.netid, KEY_EXCHANGE if is_exchange else settings.action)
    faults = ", ".join(f"{fault} ({count})" for fault, count in mqtt.ignored.most_common())
    wanted = "valid key" if is_exchange else "response for us"
    if faults:
        return ProgramError(
            f"no {wanted} came on {topic} {within}, only: {faults}",
            "check --peer-ca and --peer-name; someone may be tampering with the messages"
            if is_exchange and settings.peer_ca
            else "another client may be using this NETID, or someone tampers with the messages",
        )
    if is_exchange:
        return ProgramError(
            f"no responder answered the key exchange on {topic} {within}",
            f"start one ({PROGRAM} --respond), or check NETID, --host and --port;"
            " an access rule of the broker may also drop messages without a word, or the responder"
            " demand an --identity",
        )
    return ProgramError(
        f"no response came on {topic} {within}",
        "the responder may have ended or not know this action (see its log), the message may be"
        " too large for the broker, or an access rule may drop it",
    )


def supervise(run: Callable[[], T], end: Callable[[], float]) -> T:
    """Return the result of a function, which a thread runs: a look-up in DNS, for one, has no end.

    :param end: tells until when to wait for it, of time.monotonic(); this may move
    :raises TimeoutError: that has come
    """
    results: list[T] = []
    errors: list[BaseException] = []
    finished = threading.Event()

    def run_and_tell() -> None:
        try:
            results.append(run())
        except BaseException as error:
            errors.append(error)
        finished.set()

    threading.Thread(target=run_and_tell, daemon=True).start()
    while not finished.wait(max(0, min(end() - time.monotonic(), LOOP_INTERVAL))):
        if time.monotonic() >= end():
            raise TimeoutError
    if errors:
        raise errors[0]
    return results[0]


# --- sessions of many lines --------------------------------------------------------------------


class Session:
    """Each line of standard input is a request; the answers are printed in their order."""

    def __init__(self, settings: Settings, new_exchange: Callable[[], crypto.Exchange]) -> None:
        """Begin to read standard input."""
        self._settings = settings
        self._new_exchange = new_exchange
        # Nothing but their order tells which request a response of dh4096 is for.
        self._window = WINDOW if settings.suite == "x25519" else 1
        self._max_requests = MAX_REQUESTS_PER_KEY[settings.suite]
        self._mqtt = Connection(settings)
        self._is_connected = self._has_connected = False  # now; ever
        self._is_printing = False  # which lasts as long as the reader pleases
        self._loss: ProgramError | None = None  # why it is not connected any more
        self._begin_to_wait()
        self._exchange: crypto.Exchange | None = None
        self._exchanged = 0.0  # of time.monotonic()
        self._base = 1  # the number of the line that was the exchange's first request
        self._input = InputLines()
        self._lines: deque[bytes] = deque()  # read, but not answered
        self.first = 1  # the number of the first of them
        self._sent = self._sent_bytes = 0  # of them
        self._answers: dict[int, bytes] = {}  # by line number: those that came before their turn

    def end(self) -> float:
        """Return when it is to be given up; never while there is nothing to wait for."""
        is_idle = self._is_printing or (self._is_connected and not self._lines)
        return float("inf") if is_idle else self._progress + self._settings.timeout

    def timed_out(self) -> ProgramError:
        """Return the error for that."""
        return self._loss or timed_out(self._mqtt, self._settings)

    def run(self) -> None:
        """Answer all lines. ProgramError: the line with the number in first can't be answered."""
        while True:
            try:
                with self._mqtt:
                    self._connect()
                    while self._lines or not self._input.has_ended:
                        self._go_on()
                break
            except TimeoutError as error:
                self._prepare_again(error)
            except ProgramError as error:
                if error.is_final or not self._has_connected:
                    raise
                self._loss = error
                self._prepare_again(error)
        if self._input.fault:
            raise self._input.fault

    def _connect(self) -> None:
        self._mqtt.connect()
        _, topic = topics(self._settings)
        self._mqtt.subscribe(RESPONSE.format(self._settings.netid, KEY_EXCHANGE), topic)
        self._is_connected = self._has_connected = True
        self._loss = None

    def _prepare_again(self, reason: Exception) -> None:
        """Prepare another connection, on which all is sent again that was not answered."""
        log().info("connecting again: %s", reason)
        if not self._lines:
            self._progress = time.monotonic()
        self._is_connected, self._exchange = False, None
        self._sent = self._sent_bytes = 0
        time.sleep(next(self._delays))
        self._patience *= 2
        self._mqtt = Connection(self._settings)

    def _begin_to_wait(self) -> None:
        """Count the time from now on: an answer has come, or the first of some lines."""
        self._progress = self._tried = time.monotonic()
        self._patience = min(PATIENCE[self._settings.suite], self._settings.timeout / 2)
        self._delays = backoff()

    def _go_on(self) -> None:
        """Send what can be sent, and take what comes."""
        exchange = self._fresh_exchange()
        if not exchange and self._lines and not self._sent:  # what is in flight finishes first
            exchange = self._renew_key()
        if exchange:
            self._send(exchange)
        self._mqtt.patience_ends = self._tried + self._patience if self._sent else float("inf")
        has_room = len(self._lines) < self._window and not self._input.has_ended
        if self._mqtt.wait(others=[self._input] if has_room else []):
            self._read()
        while self._mqtt.messages:
            self._take(self._mqtt.messages.popleft())
        self._print()

    def _read(self) -> None:
        if not self._lines:
            if time.monotonic() - self._progress >= IDLE_TIME:
                self._exchange = None
            self._begin_to_wait()
        self._lines += self._input.read()

    def _fresh_exchange(self) -> crypto.Exchange | None:
        """Return the exchange, if its key may be used for another request."""
        age = time.monotonic() - self._exchanged
        requests = self.first + self._sent - self._base
        is_old = age >= (self._settings.rekey or float("inf")) or requests >= self._max_requests
        return None if is_old else self._exchange

    def _renew_key(self) -> crypto.Exchange:
        self._exchange = self._new_exchange()
        self._mqtt.patience_ends = time.monotonic() + self._patience
        exchange_keys(self._mqtt, self._settings, self._exchange)
        self._mqtt.stage = "the response"
        self._base = self.first
        self._exchanged = self._tried = time.monotonic()
        return self._exchange

    def _send(self, exchange: crypto.Exchange) -> None:
        topic, _ = topics(self._settings)
        while self._sent < min(self._window, len(self._lines)):
            line = self._lines[self._sent]
            if self._sent and self._sent_bytes + len(line) > WINDOW_BYTES:
                break
            self._mqtt.publish(topic, exchange.seal(topic, line))
            self._sent += 1
            self._sent_bytes += len(line)

    def _take(self, message: Message) -> None:
        """Keep an answer until its turn comes."""
        _, topic = topics(self._settings)
        if not self._exchange or message.topic != topic:
            return
        try:
            check_answer(message, self._sent_bytes)
            number, text = self._exchange.open(topic, message.payload)
        except crypto.CryptoError as error:
            self._mqtt.ignored[str(error)] += 1
        else:
            self._answers[self._base + number] = text

    def _print(self) -> None:
        """Print the answers whose turn it is."""
        texts: list[bytes] = []
        while is_line(text := self._answers.get(self.first + len(texts), b"\n")):
            texts.append(text)
        if texts:
            self._is_printing = True
            write_output(b"".join(b"%b\n" % text for text in texts))
            for _ in texts:
                del self._answers[self.first]
                self._sent_bytes -= len(self._lines.popleft())
                self._sent -= 1
                self.first += 1
            self._is_printing = False
            self._begin_to_wait()
        if self.first in self._answers:
            raise ProgramError("the response is not one line of UTF-8 text", is_final=True)


def is_line(text: bytes) -> bool:
    """Tell whether bytes are one line of UTF-8 text, without its end."""
    return is_utf8(text) and b"\n" not in text


class InputLines:
    """The lines of standard input, also for select(), which does not take files everywhere."""

    def __init__(self) -> None:
        """Begin to read."""
        self._socket, copy = socket.socketpair()
        self.fileno = self._socket.fileno
        self._rest = bytearray()  # a line of which more is to come
        self.has_ended = False
        self.fault: ProgramError | None = None  # why it has, if not by itself
        threading.Thread(target=self._copy, args=[copy], daemon=True).start()

    def _copy(self, copy: socket.socket) -> None:
        with copy:
            try:
                while data := standard_input().read1(CHUNK_SIZE):
                    copy.sendall(data)
            except ProgramError as error:
                self.fault = error
            except OSError as error:
                self.fault = ProgramError(f"cannot read standard input: {error.strerror}")

    def read(self) -> list[bytes]:
        """Return the lines that have come, up to the first that can't be sent."""
        data = self._socket.recv(CHUNK_SIZE)
        self.has_ended = not data
        first, *others = data.split(b"\n")
        self._rest += first
        if self.has_ended and self._rest:  # the last line may lack its end
            others = [b""]
        lines = []
        try:
            for start in others:
                lines.append(checked_message(bytes(self._rest)))
                self._rest = bytearray(start)
        except ProgramError as error:
            self.fault, self.has_ended = error, True
        return lines


# --- the responder -----------------------------------------------------------------------------


class Incoming(NamedTuple):
    """A key exchange or request."""

    netid: str
    action: str
    payload: bytes
    arrived: float  # of time.monotonic()


class Key:
    """A key that some client of a NetID has."""

    __slots__ = ("_known", "_number", "cipher", "used")

    def __init__(self, cipher: crypto.Cipher) -> None:
        """Take the cipher of an exchange."""
        self.cipher = cipher
        self.used = time.monotonic()
        self._number = -1  # of the last request, if the suite knows such
        self._known: deque[bytes] = deque(maxlen=2 * MAX_REQUESTS_PER_KEY["dh4096"])  # digests

    def open(self, topic: str, message: bytes) -> tuple[int | None, bytes]:
        """Return a request's number and plaintext. CryptoError if it is unusable.

        Each is opened once, and no response is. Else a broker that sends it again had another
        answer, which a client of the lab's protocol would take for that to its next request.
        """
        number, text = self.cipher.open(topic, message)
        if number is None:
            digest = crypto.digest(message)
            is_known = digest in self._known
            self._known.append(digest)
        else:
            is_known = number <= self._number
            self._number = max(number, self._number)
        if is_known:
            raise UnusableError("out of order, or here before")
        self.used = time.monotonic()
        return number, text

    def seal(self, topic: str, number: int | None, text: bytes) -> bytes:
        """Return the response to a request of that number."""
        message = self.cipher.seal(topic, number or 0, text)
        if number is None:
            self._known.append(crypto.digest(message))
        return message


class Keys:
    """What the responder keeps of one NetID."""

    __slots__ = ("coming", "live", "parked")

    def __init__(self) -> None:
        self.live: list[Key] = []  # newest first
        self.coming = 0  # those being computed
        self.parked: list[Incoming] = []  # requests that may be for one of those

    def add(self, cipher: crypto.Cipher) -> None:
        """Take a new key, and forget old ones."""
        in_use = time.monotonic() - KEY_LIFETIME
        self.live = [Key(cipher), *(key for key in self.live if key.used > in_use)]
        del self.live[KEYS_PER_NETID:]

    def open(self, topic: str, message: bytes) -> tuple[Key, int | None, bytes]:
        """Return a request's plaintext, after the key that opens it and its number.

        :raises UnusableError: no key opens it, or it was here before
        """
        for key in self.live:
            with contextlib.suppress(crypto.TokenError):
                return key, *key.open(topic, message)
        raise UnusableError("not encrypted with a key of this NetID")


class Responder:
    """Answers key exchanges and requests.

    All of it happens in run(), one after the other. Only powers are left to other processes, since
    they would keep everything else waiting.
    """

    def __init__(self, settings: Settings, on_ready: Callable[[], None]) -> None:
        """Prepare a responder; to be done before there are threads.

        :param on_ready: called after each subscription
        """
        crypto.read_group()
        self._identity, self._authority = peer_security(settings)
        self._settings = settings
        self._on_ready = on_ready
        # One more than processors, so that none is without work while this process is busy.
        self._idle = [crypto.Worker(crypto.Calculator) for _ in range(1 + (os.cpu_count() or 1))]
        self._busy: dict[crypto.Worker, Keys | None] = {}  # whose key it computes
        self._key_pairs: deque[crypto.DhKeyPair] = deque()
        for suite in crypto.SUITES:
            crypto.load_ciphers(suite)
        self._mqtt: Connection
        self._stopping, self._stop = socket.socketpair()
        self._is_stopped = self._is_connected = False
        self._end = float("inf")
        self._netids: OrderedDict[str, Keys] = OrderedDict()  # least recently used first
        self._waiting: OrderedDict[str, deque[Incoming]] = OrderedDict()  # exchanges by NetID
        self._counts = {"exchanges": 0, "requests": 0, "failures": 0}
        self._started = time.monotonic()
        self._status_at = float("inf")  # not before the first subscription
        self._dropped = 0  # messages, not reported yet
        self._report_at = 0.0  # of time.monotonic()

    def run(self) -> None:
        """Answer until stop() is called; connect again whenever the connection is lost.

        :raises ProgramError: the broker refuses for good, or a process was lost
        """
        topic = self._settings.status_topic
        delays = backoff()
        while not self._is_stopped:
            try:
                self._identity, self._authority = peer_security(self._settings)
                self._mqtt = Connection(self._settings, (topic, OFFLINE) if topic else None)
                with self._mqtt:
                    self._mqtt.connect()
                    delays = backoff()
                    self._serve()
            except crypto.WorkerError:
                hint = "start the responder again; the machine may be short of memory"
                raise ProgramError("a process of the responder was ended", hint) from None
            except ProgramError as error:
                if error.is_final:
                    raise
                log().warning("disconnected reason=%r", str(error))
            self._is_connected = False
            if not self._is_stopped:
                select.select([self._stopping], [], [], next(delays))

    def stop(self) -> None:
        """Make run() finish what is being answered and return; safe in a signal handler."""
        self._is_stopped = True
        self._end = time.monotonic() + (DRAINING_TIME if self._is_connected else 0)
        self._stop.close()  # wakes who waits for the other end

    def end(self) -> float:
        """Return when it is to be left as it is, of time.monotonic()."""
        return self._end

    def _serve(self) -> None:
        settings = self._settings
        self._mqtt.subscribe(REQUEST.format(settings.netid or "+", "+"))
        self._is_connected = True
        self._status_at = time.monotonic() if settings.status_topic else float("inf")
        self._on_ready()
        while not self._is_stopped:
            self._go_on(self._stopping)
        while self._waiting or any(self._busy.values()):
            self._go_on()
        if settings.status_topic:
            self._mqtt.publish(settings.status_topic, OFFLINE, retain=True)
        self._mqtt.flush()

    def _go_on(self, *others: Any) -> None:
        """Do what there is to do now, or comes in the next moment."""
        self._report_status()
        self._give_tasks()
        for worker in self._mqtt.wait(others=[*self._idle, *self._busy, *others]):
            if worker not in others:
                self._take_result(worker)
        while self._mqtt.messages:
            self._receive(self._mqtt.messages.popleft())
        self._report_drops()

    def _report_drops(self) -> None:
        self._dropped, self._mqtt.dropped = self._dropped + self._mqtt.dropped, 0
        if self._dropped and time.monotonic() >= self._report_at:
            log().warning("dropped count=%d reason='too many at a time'", self._dropped)
            self._dropped, self._report_at = 0, time.monotonic() + REPORT_INTERVAL

    def _report_status(self) -> None:
        now = time.monotonic()
        if now < self._status_at:
            return
        import json

        uptime = round(now - self._started)
        status = {"status": "online", **self._counts, "netids": len(self._netids)}
        payload = json.dumps({**status, "uptime_seconds": uptime}).encode()
        self._mqtt.publish(self._settings.status_topic, payload, retain=True)
        self._status_at = now + STATUS_INTERVAL

    def _receive(self, message: Message) -> None:
        netid, action, suffix, *_ = (*message.topic.split("/", 2), "", "")
        request = Incoming(netid, action, message.payload, time.monotonic())
        is_ours = NETID.fullmatch(netid) and self._settings.netid in ("", netid)
        if is_ours and suffix == "request" and not message.is_retained:
            self._attempt(self._exchange if action == KEY_EXCHANGE else self._answer, request)
        else:
            self._ignore(request, "retained, or on a topic that was not subscribed to")

    def _attempt(self, action: Callable[[Incoming], None], request: Incoming) -> None:
        """Do something for a request, and ignore it if that can't be done."""
        try:
            action(request)
        except crypto.CryptoError as error:
            self._ignore(request, str(error))

    def _ignore(self, request: Incoming, reason: str) -> None:
        self._counts["failures"] += 1
        # A peer chose the names: they are cut and quoted.
        names = request.netid[:64], request.action[:64]
        log().warning("ignored netid=%r action=%r reason=%r", *names, reason)

    def _publish(self, request: Incoming, payload: bytes) -> None:
        if not self._mqtt.publish(RESPONSE.format(request.netid, request.action), payload):
            raise UnusableError("the broker does not take the answer")
        self._counts["exchanges" if request.action == KEY_EXCHANGE else "requests"] += 1
        milliseconds = (time.monotonic() - request.arrived) * 1000
        log().info(
            "answered netid=%r action=%s ms=%.1f bytes=%d",
            *(request.netid, request.action, milliseconds, len(request.payload)),
        )

    def _exchange(self, request: Incoming) -> None:
        """Answer a key exchange now, or let it wait for its turn; CryptoError if it is unusable."""
        suite = crypto.suite_of(request.payload)
        if self._authority:
            self._authority.verify(request.payload, request.netid, request.netid)
        if suite == "dh4096":
            self._enqueue(request)
            return
        key_pair = crypto.X25519KeyPair()
        transcript = self._transcript(request, key_pair)
        cipher = key_pair.agree(transcript, is_client=False)
        self._publish(request, transcript.response)
        self._keys(request.netid).add(cipher)

    def _transcript(self, request: Incoming, key_pair: crypto.KeyPair) -> crypto.Transcript:
        response = key_pair.public_key
        if self._identity:
            response = self._identity.sign(response, request.netid, request.payload)
        return crypto.Transcript(request.netid, request.payload, response)

    def _keys(self, netid: str) -> Keys:
        """Return what is kept of a NetID, new if need be, which is now the most recently used."""
        keys = self._netids.setdefault(netid, Keys())
        self._netids.move_to_end(netid)
        if len(self._netids) > MAX_NETIDS:
            self._netids.popitem(last=False)
        return keys

    def _enqueue(self, request: Incoming) -> None:
        """Let a key exchange wait in a short queue of its NetID, so that none delays the others."""
        requests = self._waiting.get(request.netid, deque())
        if len(requests) < KEYS_PER_NETID and len(self._waiting) < MAX_WAITING:
            requests.append(request)
            self._waiting[request.netid] = requests
        else:
            self._dropped += 1

    def _give_tasks(self) -> None:
        """Let idle workers go on with key exchanges, one of each NetID in turn, or make ready."""
        while self._idle:
            if self._waiting and self._key_pairs:
                netid, requests = self._waiting.popitem(last=False)
                if len(requests) > 1:
                    self._waiting[netid] = requests
                self._begin_exchange(requests.popleft())
            elif len(self._key_pairs) + len(self._busy) < KEY_PAIR_STOCK:
                self._give_task(None, "make_key_pair")
            else:
                break

    def _give_task(self, keys: Keys | None, task: str, *arguments: Any) -> None:
        worker = self._idle.pop()
        worker.send(task, *arguments)
        self._busy[worker] = keys

    def _begin_exchange(self, request: Incoming) -> None:
        key_pair = self._key_pairs.popleft()
        transcript = self._transcript(request, key_pair)
        self._attempt(lambda request: self._publish(request, transcript.response), request)
        keys = self._keys(request.netid)
        keys.coming += 1
        self._give_task(keys, "agree", key_pair, transcript)

    def _take_result(self, worker: crypto.Worker) -> None:
        cipher, key_pair = worker.receive()
        keys = self._busy.pop(worker)
        self._idle.append(worker)
        self._key_pairs.append(key_pair)
        if keys:
            keys.coming -= 1
            keys.add(cipher)
            parked, keys.parked = keys.parked, []
            for request in parked:
                self._attempt(self._answer, request)

    def _answer(self, request: Incoming) -> None:
        """Answer a request. CryptoError if it is unusable."""
        if request.action not in ACTIONS:
            raise UnusableError("unknown action")
        keys = self._netids.get(request.netid) or Keys()
        names = request.netid, request.action
        try:
            key, number, text = keys.open(REQUEST.format(*names), request.payload)
        except UnusableError:
            if not keys.coming or len(keys.parked) >= KEYS_PER_NETID:
                raise
            keys.parked.append(request)
            return
        if not is_utf8(text):
            raise UnusableError("not UTF-8 text")
        self._netids.move_to_end(request.netid)
        answer = ACTIONS[request.action](text.decode()).encode()
        self._publish(request, key.seal(RESPONSE.format(*names), number, answer))


# --- the local broker --------------------------------------------------------------------------


@contextlib.contextmanager
def local_broker(host: str, port: int) -> Iterator[None]:
    """Run an MQTT broker in a thread."""
    import asyncio
    import logging

    try:
        from amqtt.broker import Broker as AmqttBroker
        from amqtt.errors import AMQTTError, BrokerError
    except ImportError:
        raise ProgramError(
            "--local needs the package amqtt", "install it: python3 -m pip install amqtt"
        ) from None
    logging.getLogger("amqtt").setLevel(logging.CRITICAL + 1)  # what matters is said here
    config = {
        "listeners": {"default": {"type": "tcp", "bind": f"{host}:{port}"}},
        "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
    }
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start() -> Any:
        broker = AmqttBroker(config)
        await broker.start()
        return broker

    try:
        broker = asyncio.run_coroutine_threadsafe(start(), loop).result()
    except (AMQTTError, BrokerError) as error:
        raise ProgramError(
            f"the local broker cannot listen on {host} port {port}: {error}", "choose another port"
        ) from None
    try:
        yield
    finally:
        asyncio.run_coroutine_threadsafe(broker.shutdown(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join(LOOP_INTERVAL)


@contextlib.contextmanager
def local_services(settings: Settings) -> Iterator[None]:
    """Run a broker and a responder for a request, and put into the settings how to reach them."""
    settings.host = "127.0.0.1"
    with socket.create_server((settings.host, 0)) as server:
        settings.port = server.getsockname()[1]  # free, and soon the broker's
    names = {"netid": settings.netid, "host": settings.host, "port": settings.port}
    ready = threading.Event()
    responder = Responder(
        Settings(**names, id=random_id(), timeout=settings.timeout), on_ready=ready.set
    )
    with local_broker(settings.host, settings.port):
        thread = threading.Thread(target=responder.run)
        thread.start()
        try:
            ready.wait(settings.timeout)
            yield
        finally:
            responder.stop()
            thread.join()


def random_id() -> str:
    """Return a client ID for a responder, since the NetID is the client's."""
    return f"responder{os.urandom(4).hex()}"  # every broker takes 23 of these (3.1.1, 3.1.3.1)


# --- command line ------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """A parser that knows HELP, and leaves it to main() to print and exit."""

    def format_help(self) -> str:
        """Return the help, the same on all versions of Python."""
        return HELP

    def error(self, message: str) -> NoReturn:
        """Raise UsageError. What follows an unknown option may be a password: it is not shown."""
        raise UsageError(re.sub(r"(--[\w-]+)=.*", r"\1=...", message))

    def _print_message(self, message: str, file: Any = None) -> None:
        write_output(message.encode())


def build_parser() -> Parser:
    """Return the parser of the command line that HELP describes."""
    # With these two, argparse need not measure the terminal, which takes 3 ms.
    formatter = partial(argparse.HelpFormatter, width=80)
    parser = Parser(usage="", formatter_class=formatter, add_help=False, allow_abbrev=False)
    add = parser.add_argument
    add("words", nargs="*")
    time_span = f"a number of seconds above 0, at most {MAX_TIMEOUT:g}"
    seconds = checked(float, lambda value: 0 < value <= MAX_TIMEOUT, time_span)
    add("-W", "--timeout", type=seconds)
    add("--rekey", type=seconds)
    suites = " or ".join(crypto.SUITES)
    add("--suite", type=checked(str, crypto.SUITES.__contains__, suites))
    add("-h", "--host", type=checked(str, is_mqtt_string, "a host's name or address"))
    port_range = "a number from 1 to 65535"
    add("-p", "--port", type=checked(decimal, lambda value: 1 <= value <= 65535, port_range))
    add("-i", "--id", type=checked(str, is_mqtt_string, "UTF-8 text of 1 to 65535 bytes"))
    for option in ("identity", "peer-ca", "cafile", "cert", "key", "password-file"):
        add(f"--{option}", type=checked(str, bool, "a file's name"))
    add("--peer-name", type=checked(str, DNS_NAME.fullmatch, "a DNS name"))
    add("-u", "--username", type=checked(str, is_mqtt_string, "UTF-8 text"))
    add("--status-topic", type=checked(str, is_topic, "a topic without + and #"))
    for option in ("--respond", "--local", "--lines", "--tls", "--insecure"):
        add(option, action="store_true")
    add("-v", "--verbose", action="store_true")
    add("--help", action="help")
    add("--version", action="version", version=f"{PROGRAM} {__version__}")
    return parser


def checked(
    convert: Callable[[str], T], is_valid: Callable[[T], object], wanted: str
) -> Callable[[str], T]:
    """Return the type of an argument, for argparse."""

    def check(text: str) -> T:
        with contextlib.suppress(ValueError):
            if is_valid(value := convert(text)):
                return value
        raise argparse.ArgumentTypeError(f"must be {wanted}; not {text[:80]!r}")

    return check


def decimal(text: str) -> int:
    """Return the number that a text of digits stands for; int() would take more than that."""
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else -1


def is_typed_utf8(text: str) -> bool:
    """Tell whether an argument was typed as UTF-8."""
    return is_utf8(os.fsencode(text))


def is_mqtt_string(text: str) -> bool:
    """Tell whether an argument can be a string in MQTT (3.1.1, 1.5.3), and is not empty."""
    return is_typed_utf8(text) and "\0" not in text and 1 <= len(os.fsencode(text)) <= 65535


def is_topic(text: str) -> bool:
    """Tell whether an argument can be a topic to publish on."""
    return is_mqtt_string(text) and not set("+#") & set(text)


def parse_settings(arguments: list[str]) -> Settings:
    """Turn the command line into settings.

    :raises UsageError: something is wrong with it
    """
    settings = Settings()
    if arguments == ["-h"]:  # a later edition of the course means --help by it
        arguments = ["--help"]
    end = arguments.index("--") if "--" in arguments else len(arguments)
    for text in arguments[:end]:
        if re.match(r"-[A-Za-z][^=]*\s", text):  # Python 3.13.0 would take such a MESSAGE apart
            raise UsageError("an argument that begins with a dash is an option; put -- before it")
    build_parser().parse_intermixed_args(arguments[:end], settings)
    words = settings.words + arguments[end + 1 :]
    check_combination(settings, words)
    check_words(settings, words)
    fill_in(settings)
    if settings.cafile or settings.cert:
        tls_context(settings)  # shows what is wrong with the files before anything else is done
    return settings


def check_combination(settings: Settings, words: Sequence[str]) -> None:
    """Refuse arguments that are right one by one, but not together."""
    if settings.respond:
        check_responder(settings, words)
    else:
        check_request(settings, words)
    if settings.local and settings.uses_tls:
        raise UsageError("--local brings a plain broker of its own; leave the TLS options out")
    if settings.peer_name and not settings.peer_ca:
        raise UsageError("--peer-name needs --peer-ca: the authorities that certify such a name")
    if bool(settings.cert) != bool(settings.key):
        raise UsageError("--cert and --key go together: a certificate and its private key")
    if settings.insecure and settings.cafile:
        raise UsageError("--insecure trusts any broker, --cafile only some; leave one out")


def check_responder(settings: Settings, words: Sequence[str]) -> None:
    """Refuse what is for requests."""
    if len(words) > 1:
        raise UsageError("--respond takes no ACTION and no MESSAGE; to send a request, omit it")
    if settings.timeout:
        raise UsageError("--respond answers until it is stopped; --timeout is for a request")
    for option in ("suite", "lines", "rekey", "peer_name"):
        if getattr(settings, option):
            name = option.replace("_", "-")
            raise UsageError(f"--respond answers requests as they come; --{name} is for a request")


def check_request(settings: Settings, words: Sequence[str]) -> None:
    """Refuse what is for a responder, or for another request."""
    if len(words) < 3:
        raise UsageError("NETID, ACTION and MESSAGE are needed, or --respond to answer requests")
    if len(words) > 3:
        raise UsageError("there are more arguments than NETID, ACTION and MESSAGE; quote MESSAGE")
    if settings.status_topic:
        raise UsageError("--status-topic is for --respond")
    if settings.lines and words[2] != "-":
        raise UsageError("--lines sends the lines of standard input; give - as MESSAGE")
    if settings.rekey and not settings.lines:
        raise UsageError("--rekey is for --lines; a single request has a single key")
    if settings.local and (settings.host or settings.port):
        raise UsageError(
            "--local brings a broker of its own, and --host or --port names another; omit either"
        )
    if settings.local and settings.peer_ca:
        raise UsageError("--local brings a responder that signs nothing; leave --peer-ca out")


def check_words(settings: Settings, words: Sequence[str]) -> None:
    """Take NETID, ACTION and MESSAGE. UsageError if one is wrong."""
    settings.netid, settings.action, message = (*words, "", "", "")[:3]
    netid, action = settings.netid, settings.action
    if words and not NETID.fullmatch(netid):
        raise UsageError(
            "NETID must be one level of a topic: 1 to 64 characters without / + #, controls, and $"
            f" in front; not {netid[:80]!r}"
        )
    if (settings.identity or settings.peer_ca) and words and not re.fullmatch(DNS_LABEL, netid):
        raise UsageError(
            "--identity and --peer-ca need a NETID that a certificate can name: 1 to 63 letters,"
            f" digits and inner hyphens; not {netid[:80]!r}"
        )
    if words[1:] and action not in ACTIONS:
        raise UsageError(f"ACTION must be one of {', '.join(ACTIONS)}; not {action[:80]!r}")
    if not is_typed_utf8(message):
        raise UsageError("MESSAGE must be UTF-8 text")
    settings.message = None if message == "-" else os.fsencode(message)  # as typed, in any locale


def fill_in(settings: Settings) -> None:
    """Put the defaults where nothing was given, and read the login."""
    settings.timeout = settings.timeout or DEFAULT_TIMEOUT
    settings.suite = settings.suite or "dh4096"
    settings.host = settings.host or "localhost"
    settings.port = settings.port or (DEFAULT_TLS_PORT if settings.uses_tls else DEFAULT_PORT)
    settings.id = settings.id or (random_id() if settings.respond else settings.netid)
    settings.peer_name = settings.peer_name or "responder"
    settings.username = settings.username or os.environ.get("MQTT_USERNAME", "")
    settings.password = password(settings)


def password(settings: Settings) -> bytes | None:
    """Return the password, which is not an option: other users see the command line."""
    environment = os.environ.get("MQTT_PASSWORD")
    if not settings.username and (settings.password_file or environment is not None):
        raise UsageError("--password-file or MQTT_PASSWORD needs --username or MQTT_USERNAME")
    if settings.username and not is_mqtt_string(settings.username):
        raise UsageError("MQTT_USERNAME must be UTF-8 text")
    if settings.password_file == "-":  # noqa: S105
        return ask_password(settings.username)
    if settings.password_file:
        content = read_file("--password-file", settings.password_file)
        return content.removesuffix(b"\n").removesuffix(b"\r")
    return None if environment is None else os.fsencode(environment)


def ask_password(username: str) -> bytes:
    """Ask for a password at the terminal."""
    import getpass
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error", getpass.GetPassWarning)
        try:
            return getpass.getpass(f"Password of {username}: ").encode()
        except (getpass.GetPassWarning, EOFError):
            raise UsageError("--password-file - needs a terminal to ask at") from None


# --- main --------------------------------------------------------------------------------------


def read_message(settings: Settings) -> bytes:
    """Return the message, from standard input if the command line says so."""
    if settings.message is not None:
        return settings.message
    try:
        message = standard_input().read()
    except OSError as error:
        raise ProgramError(f"cannot read standard input: {error.strerror}") from None
    return checked_message(message)


def standard_input() -> io.BufferedReader:
    """Return standard input. ProgramError if there is none."""
    if sys.stdin is None:
        raise ProgramError("cannot read MESSAGE from standard input: it is closed")
    return cast("io.BufferedReader", sys.stdin.buffer)


def checked_message(text: bytes) -> bytes:
    """Return a message, or raise ProgramError if it can't be sent."""
    if not is_utf8(text):
        raise ProgramError("MESSAGE on standard input is not UTF-8 text")
    if crypto.token_size(len(text)) > MAX_TOKEN_SIZE:
        raise ProgramError(f"MESSAGE has {len(text)} bytes, too many for MQTT", "send parts of it")
    return text


def write_output(data: bytes) -> None:
    """Write to standard output, whole and at once."""
    if sys.stdout is None:
        raise ProgramError("cannot write to standard output: it is closed", is_final=True)
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except OSError as error:
        # Python would try to write the rest again at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        problem = f"cannot write to standard output: {error.strerror}"
        raise ProgramError(problem, is_final=True) from None


def say(text: str) -> None:
    """Write a line to standard error, if there is one."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)


def report(error: ProgramError) -> int:
    """Say what went wrong; the result is the exit status."""
    say(f"{PROGRAM}: error: {error}")
    if error.hint:
        say(f"{PROGRAM}: hint: {error.hint}")
    if isinstance(error, UsageError):
        say(USAGE)
        return 2
    return 1


def set_up_log(settings: Settings) -> None:
    """Send the log to standard error: for a person, or from a responder for programs."""
    import logging

    line = f"{PROGRAM}: %(message)s"
    if settings.respond:
        line = "time=%(asctime)s.%(msecs)03dZ level=%(levelname)s event=%(message)s"
    formatter = logging.Formatter(line, "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    log().addHandler(handler)
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    log().setLevel(
        logging.INFO if settings.verbose else WAITING if is_terminal else logging.WARNING
    )


def run_request(settings: Settings) -> None:
    """Send a request and print the response."""
    # Before there are threads, and before paho is imported: it computes meanwhile.
    exchange = crypto.start_exchange(*exchange_settings(settings))
    with local_services(settings) if settings.local else contextlib.nullcontext():
        text = read_message(settings)
        mqtt = Connection(settings)
        end = time.monotonic() + settings.timeout
        try:
            with notice(mqtt):
                answer = supervise(partial(request, mqtt, settings, exchange, text), lambda: end)
        except TimeoutError:
            raise timed_out(mqtt, settings) from None
    write_output(answer + b"\n")


@contextlib.contextmanager
def notice(mqtt: Connection) -> Iterator[None]:
    """Tell a person at a terminal what is being waited for, if it takes long."""
    timer = threading.Timer(
        NOTICE_AFTER, lambda: log().log(WAITING, "waiting for %s ...", mqtt.stage)
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def run_session(settings: Settings) -> None:
    """Send the lines of standard input and print the responses."""
    new_exchange = partial(crypto.Exchange, *exchange_settings(settings))
    with local_services(settings) if settings.local else contextlib.nullcontext():
        session = Session(settings, new_exchange)
        try:
            supervise(session.run, session.end)
        except (ProgramError, TimeoutError) as error:
            fault = error if isinstance(error, ProgramError) else session.timed_out()
            raise ProgramError(f"line {session.first}: {fault}", fault.hint) from None


def exchange_settings(settings: Settings) -> tuple[Any, ...]:
    """Return the arguments of an Exchange."""
    return settings.netid, settings.suite, *peer_security(settings), settings.peer_name


def run_responder(settings: Settings) -> None:
    """Answer requests until SIGINT or SIGTERM."""
    whom = settings.netid or "all NetIDs"
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: sys.exit(0))  # before there is anything to finish
    responder = Responder(settings, lambda: say(f"ready: {settings.broker}, for {whom}"))
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: responder.stop())
    local = local_broker(settings.host, settings.port)
    with local if settings.local else contextlib.nullcontext(), contextlib.suppress(TimeoutError):
        supervise(responder.run, responder.end)


def main(argv: list[str] | None = None) -> int:
    """Run the program with these arguments, by default the command line's.

    :return: the exit status
    """
    try:
        settings = parse_settings(sys.argv[1:] if argv is None else argv)
        set_up_log(settings)
        if settings.insecure:
            log().warning("--insecure: anyone between here and the broker can pose as it")
        run = run_session if settings.lines else run_request
        (run_responder if settings.respond else run)(settings)
    except ProgramError as error:
        return report(error)
    except ImportError as error:
        hint = "install what is needed: python3 -m pip install -r requirements.txt"
        return report(ProgramError(f"a package is missing: {error}", hint))
    except crypto.WorkerError:
        return report(ProgramError("a process of the program was ended", "try again"))
    except (crypto.CryptoError, OSError) as error:
        return report(ProgramError(str(error)))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except SystemExit:  # argparse after --help or --version, or a responder that was just started
        pass
    return 0


if __name__ == "__main__":
    exit_status = main()
    # All is written, closed and ended. Taking the modules apart would cost each request 15 ms more.
    os._exit(exit_status)
