#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["paho-mqtt>=2.1,<3", "cryptography>=50,<51"]
# ///
"""Client and responder of the secure MQTT lab; HELP below tells how to run them.

From the top: constants, errors, settings, text actions, Connection (the only user of paho), the
client, the responder, the local broker, the command line, main. crypto.py holds the secrets.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
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
    import logging
    import ssl
    from concurrent.futures import Future, ProcessPoolExecutor
    from multiprocessing.process import BaseProcess

    import paho.mqtt.client as paho

PROGRAM = "secure_mqtt_client.py"
__version__ = "1.0.0"

HELP = """\
usage: secure_mqtt_client.py [options] NETID ACTION MESSAGE
       secure_mqtt_client.py [options] --respond [NETID]

Send one MQTT request that not even the broker can read, and print the answer;
or answer such requests.

request:
  NETID                  who asks: one level of the topic, at most 64 characters
  ACTION                 uppercase, lowercase, title-case, reverse, shuffle or
                         random (drops and doubles characters)
  MESSAGE                the text; - reads standard input, whole
  -W, --timeout SECONDS  give up after so long in all (default: 30)

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
MAX_TOKEN_SIZE = 268_435_455 - 1024  # bytes: MQTT 3.1.1, 2.2.3, less room for the topic
QOS = 1
KEEPALIVE = 15  # seconds of silence after which a broker is asked for a sign of life
LOOP_INTERVAL = 1.0  # seconds between looks at the time, for keep-alive
CLOSING_TIME = 0.3  # seconds that the network thread has to send DISCONNECT
PROBE_TIME = 1.0  # seconds to find out why TLS has failed

# The responder. What goes beyond a bound is dropped, with a warning.
MAX_NETIDS = 10_000  # the least recently used is forgotten first
KEYS_PER_NETID = 8  # so many clients can use a NetID at the same time
MAX_WAITING = 1_000  # NetIDs whose key exchanges wait for their turn
MAX_EVENTS, MAX_EVENT_BYTES = 10_000, 2**27  # received, but not handled yet
MAX_IN_FLIGHT = 10_000  # published, but not acknowledged by the broker yet
KEY_PAIR_STOCK = 32  # made ahead, so that this many clients can come at once
REPORT_INTERVAL = 1.0  # seconds between warnings of what was dropped
STATUS_INTERVAL = 30.0  # seconds
OFFLINE = b'{"status": "offline"}'
STOP_SIGNALS = signal.SIGINT, signal.SIGTERM
DRAINING_TIME = 5.0  # seconds to finish what is being answered when told to stop
FIRST_DELAY, LAST_DELAY = 1.0, 60.0  # seconds between attempts to connect

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


class UnusableError(Exception):
    """A message from a peer cannot be used; the text says why."""


# Named tuples: as immutable as frozen dataclasses, whose import would cost each request 5 ms.


class Tls(NamedTuple):
    """How we and the broker make sure of each other: names of PEM files, empty for none."""

    cafile: str  # none: what the system trusts
    certfile: str
    keyfile: str
    is_insecure: bool  # trust any broker

    def context(self) -> ssl.SSLContext:
        """Return a context for TLS 1.2 or newer, from the files as they are now.

        :raises UsageError: a file cannot be used
        """
        import ssl

        def refuse_password() -> NoReturn:
            raise UsageError("--key is encrypted; decrypt it: openssl pkey -in KEY -out NEW_KEY")

        files = {"--cafile": self.cafile, "--cert": self.certfile, "--key": self.keyfile}
        contents = {option: read_file(option, name) for option, name in files.items() if name}
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if self.is_insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        else:
            try:
                context = ssl.create_default_context(cafile=self.cafile or None)
            except ssl.SSLError:
                raise UsageError(f"--cafile {self.cafile} holds no certificate in PEM") from None
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.certfile:
            try:
                context.load_cert_chain(self.certfile, self.keyfile, refuse_password)
            except ssl.SSLError as error:
                reason = "belong to each other" if "MISMATCH" in str(error) else "hold PEM"
                raise UsageError(f"--cert and --key do not {reason}") from None
            with contextlib.suppress(ValueError):  # not in DER: then the broker will tell
                if crypto.has_expired(contents["--cert"]):
                    raise UsageError(f"--cert {self.certfile} has expired; renew it")
        return context


class Broker(NamedTuple):
    """Where the broker is, and how to get in."""

    host: str
    port: int
    client_id: str
    username: str = ""
    password: bytes | None = None
    tls: Tls | None = None

    def __str__(self) -> str:
        return f"{self.host} port {self.port}"


class Settings(NamedTuple):
    """What the command line says."""

    broker: Broker
    netid: str  # empty: every NetID, for a responder
    action: str
    message: bytes | None  # UTF-8; None: standard input, whole
    timeout: float  # seconds
    respond: bool
    local: bool
    verbose: bool
    status_topic: str  # empty: none


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
    payload: bytes | bytearray  # as paho has it: a copy of a huge one would take long
    retained: bool


class Ack(NamedTuple):
    """A CONNACK or SUBACK."""

    packet: str
    codes: list[int]  # 0 or a refusal; the QoS granted for each topic or a refusal
    reason: str


class Connection:
    """A connection to the broker, from DNS look-up to DISCONNECT.

    A thread of its own runs the network. What happens there becomes an event in a queue: Message,
    Ack, or a ProgramError when the connection is lost. paho's callbacks do nothing else: an
    exception in one would end paho's loop, and a slow one would stop it.
    """

    def __init__(
        self,
        broker: Broker,
        timeout: float,
        is_permanent: bool = False,
        will: tuple[str, bytes] | None = None,
    ) -> None:
        """Prepare a connection.

        :param timeout: seconds for all that wait_for and call wait for, together
        :param is_permanent: make the connection anew whenever it is lost; the events are then to
            be taken one by one, and not by wait_for and call
        :param will: the topic and payload that the broker shall publish, retained, when the
            connection breaks
        """
        self._broker = broker
        self._timeout = timeout
        self._end = time.monotonic() + timeout
        self._will = will
        self._is_permanent = is_permanent
        self.events: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._put_bytes = self._taken_bytes = 0  # each is changed by one thread only
        self._stage = "the connection"
        self._delays = backoff()
        self.dropped = 0  # messages for which there was no room
        self._notice = threading.Timer(NOTICE_AFTER, self._say_what_is_waited_for)
        self._notice.daemon = True
        self._topics: list[str] = []
        self._closed = threading.Event()
        self._last: paho.MQTTMessageInfo | None = None
        self._client = self._new_client()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _new_client(self) -> paho.Client:
        import paho.mqtt.client as paho
        from paho.mqtt.enums import CallbackAPIVersion

        client = paho.Client(
            CallbackAPIVersion.VERSION2, self._broker.client_id, reconnect_on_failure=False
        )
        client.max_inflight_messages_set(MAX_IN_FLIGHT)
        client.max_queued_messages_set(MAX_IN_FLIGHT)
        client.connect_timeout = self._timeout
        if self._broker.username:
            client.username_pw_set(self._broker.username, self._broker.password)  # type: ignore[arg-type]
        if self._will:
            client.will_set(*self._will, QOS, retain=True)
        client.on_log = self._on_log
        # With this, paho leaves all writing to the network thread. Else threads that publish would
        # write, too, and mix up packets that do not go out in one piece.
        client.on_socket_register_write = lambda *_: self._wake()
        client.on_socket_open = self._on_socket_open
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_publish = lambda client, *_: acknowledge_at_once(client.socket())
        client.on_message = lambda client, userdata, message: self._put(
            Message(message.topic, message.payload, message.retain)
        )
        return client

    # On the network thread.

    def _run(self) -> None:
        while not self._closed.is_set():
            self._has_socket = self._has_connack = False
            try:
                self._run_once()
            except Exception as error:
                # Whatever a hostile broker's bytes make paho raise, it ends this connection only.
                self._put(self._explain(error))
            if not self._is_permanent:
                return
            self._closed.wait(next(self._delays))
            self._client = self._new_client()

    def _run_once(self) -> NoReturn:
        import paho.mqtt.client as paho

        if self._broker.tls:
            self._client.tls_set_context(self._broker.tls.context())
        self._client.connect(self._broker.host, self._broker.port, KEEPALIVE)
        while (code := self._loop()) == paho.MQTT_ERR_SUCCESS:
            pass
        raise ConnectionError(paho.error_string(code).rstrip("."))

    def _loop(self) -> int:
        """Wait until something comes, or is to be sent, and do it; returns paho's error code."""
        client, sock = self._client, cast("Any", self._client.socket())
        if sock is None:
            return client.loop_misc()
        is_pending = hasattr(sock, "pending") and sock.pending() > 0  # decrypted by TLS already
        to_write = [sock] if client.want_write() else []
        seconds = 0 if is_pending else LOOP_INTERVAL
        readable, writable, _ = select.select([sock, self._wake_end], to_write, [], seconds)
        if self._wake_end in readable:
            self._wake_end.recv(4096)
        code = 0
        if sock in readable or is_pending:
            code = client.loop_read()
            if self._broker.tls:  # its session tickets are no packets that paho tells of
                acknowledge_at_once(sock)
        code = code or (client.loop_write() if writable else 0)
        return code or client.loop_misc()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError, OSError):  # it is awake, or has ended
            self._wake_source.send(b"\0")

    def _put(self, event: Message | Ack | ProgramError) -> None:
        if isinstance(event, Message):
            waiting_bytes = self._put_bytes - self._taken_bytes
            if waiting_bytes > MAX_EVENT_BYTES or self.events.qsize() >= MAX_EVENTS:
                self.dropped += 1
                return
            self._put_bytes += len(event.payload)
        if not self._closed.is_set():
            self.events.put(event)

    def _on_log(self, client: paho.Client, userdata: object, level: int, text: str) -> None:
        if text.startswith("Sending PUBREC"):
            # We subscribe at QoS 1. paho would keep a flood of QoS 2, to deliver it later.
            self._put(ProgramError(f"the broker on {self._broker} sent a message at QoS 2"))
            client.disconnect()

    def _on_socket_open(self, client: object, userdata: object, sock: Any) -> None:
        self._has_socket = True
        # Else Nagle's algorithm lets a small packet wait for the acknowledgement of the one before.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _on_connect(self, client: Any, userdata: Any, flags: Any, code: Any, _: Any) -> None:
        self._has_connack = True
        if not code.is_failure:
            self._delays = backoff()
        self._put(Ack("CONNACK", [code.value], str(code).lower()))

    def _on_subscribe(self, client: Any, userdata: Any, mid: int, codes: Any, _: Any) -> None:
        acknowledge_at_once(client.socket())
        self._put(Ack("SUBACK", [code.value for code in codes], ""))

    def _explain(self, error: Exception) -> ProgramError:
        """Return the error for the end of a connection, which depends on how far it got."""
        if isinstance(error, ProgramError):
            return error
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if self._has_connack:
            return ProgramError(
                f"the connection to {self._broker} was lost while waiting for {self._stage}:"
                f" {reason}",
                f"another client may have the client ID {self._broker.client_id!r};"
                " choose one with --id",
            )
        if self._broker.tls and (problem := tls_problem(self._broker, self._broker.tls)):
            return problem
        if self._has_socket:
            return self._silence(f"no CONNACK came ({reason})")
        if isinstance(error, socket.gaierror | UnicodeError):
            return ProgramError(
                f"cannot find the host {self._broker.host!r}: {reason}",
                "check --host, and that this machine is online",
            )
        if isinstance(error, ConnectionRefusedError):
            return ProgramError(
                f"connection refused: nothing listens on {self._broker}",
                f"start a broker there (mosquitto -p {self._broker.port}), or check --host and"
                " --port",
            )
        return self._silence(reason)

    def _silence(self, reason: str) -> ProgramError:
        """Return the error for a broker that does not say what it should."""
        if not self._has_socket:
            return ProgramError(
                f"cannot connect to {self._broker}: {reason}",
                "check --host and --port, and whether a firewall is in between",
            )
        if not self._has_connack:
            return ProgramError(
                f"no MQTT broker answers on {self._broker}: {reason}",
                "check --port; the broker must speak MQTT 3.1.1, and a TLS port needs --cafile or"
                " --tls",
            )
        return ProgramError(f"the broker on {self._broker} does not go on: {reason}")

    def _say_what_is_waited_for(self) -> None:
        log().log(WAITING, "waiting for %s ...", self._stage)

    # On the user's thread.

    def __enter__(self) -> Connection:
        """Begin to connect."""
        self._wake_source, self._wake_end = socket.socketpair()
        self._wake_source.setblocking(False)
        self._thread.start()
        if not self._is_permanent:
            self._notice.start()
        return self

    def __exit__(self, error: object, *exc_info: object) -> None:
        """Disconnect; after an error without waiting, as the time may be over."""
        self._closed.set()
        self._notice.cancel()
        self._client.disconnect()
        self._thread.join(0 if error else CLOSING_TIME)
        self._wake_source.close()
        self._wake_end.close()

    def subscribe(self, *topics: str) -> None:
        """Subscribe to topics at QoS 1, in one packet."""
        self._topics = [*topics]
        self._client.subscribe([(topic, QOS) for topic in topics])

    def publish(self, topic: str, payload: bytes, retain: bool = False) -> bool:
        """Publish at QoS 1. False: too large, too much in flight, or no broker."""
        try:
            self._last = self._client.publish(topic, payload, QOS, retain)
        except ValueError:  # more than MQTT can carry
            return False
        return not self._last.rc

    def flush(self, seconds: float) -> None:
        """Wait some seconds at most until the broker has acknowledged the last publication."""
        if self._last is not None:
            with contextlib.suppress(RuntimeError, ValueError):  # it was not published
                self._last.wait_for_publish(seconds)

    def check(self, ack: Ack) -> None:
        """Raise ProgramError for a CONNACK or SUBACK that refuses something."""
        if ack.packet == "CONNACK" and ack.codes != [0]:
            hints = {
                "bad user name or password": "check --username and --password-file",
                "not authorized": "it may want --username and --password-file, or --cert and --key",
            }
            raise ProgramError(
                f"the broker on {self._broker} refuses the connection: {ack.reason}",
                hints.get(ack.reason, "ask whoever runs it, or check --host and --port"),
                is_final=ack.reason in hints,
            )
        if ack.packet == "SUBACK" and ack.codes != [QOS] * len(self._topics):
            refused = [
                topic for topic, code in zip(self._topics, ack.codes, strict=False) if code != QOS
            ]
            raise ProgramError(
                f"the broker on {self._broker} refuses the subscription to"
                f" {' and '.join(refused or self._topics)}",
                "its access rules may not allow this NETID",
                is_final=True,
            )

    def wait_for(self, packet: str) -> None:
        """Wait for a CONNACK or SUBACK and check it."""
        try:
            while not (isinstance(event := self._next(packet), Ack) and event.packet == packet):
                pass
        except queue.Empty:
            raise self._silence(f"no {packet} came within {self._timeout:g} s") from None
        self.check(event)
        log().info("received %s from %s", packet, self._broker)

    def call(self, netid: str, action: str, payload: bytes, read: Callable[[bytes], T]) -> T:
        """Publish a request and return what the first answer that can be used means.

        :param action: as in the topics, KEY_EXCHANGE included
        :param read: turns a payload into the result; CryptoError if it can't be used
        :raises ProgramError: the connection or the deadline ended before such an answer came
        """
        stage = "the key exchange" if action == KEY_EXCHANGE else "the response"
        ignored: Counter[str] = Counter()
        try:
            self._stage = stage
            while not self.events.empty():
                self._next(stage)  # what came before the request is no answer to it
            self.publish(REQUEST.format(netid, action), payload)
            log().info("sent %d bytes for %s", len(payload), stage)
            size, digest = len(payload), crypto.digest(payload)
            del payload  # it may be large
            while True:
                event = self._next(stage)
                if isinstance(event, Message) and event.topic == RESPONSE.format(netid, action):
                    try:
                        result = read(usable_payload(event, size, digest))
                    except (UnusableError, crypto.CryptoError) as error:
                        ignored[str(error)] += 1
                    else:
                        log().info("received %d bytes for %s", len(event.payload), stage)
                        return result
        except queue.Empty:
            raise no_answer(netid, action, self._timeout, ignored) from None

    def _next(self, stage: str) -> Message | Ack:
        """Return the next event; queue.Empty at the deadline."""
        self._stage = stage
        seconds = self._end - time.monotonic()
        if seconds <= 0:  # not left to get(): a queue that a broker keeps full is never empty
            raise queue.Empty
        event: Message | Ack | ProgramError = self.take(seconds)
        if isinstance(event, ProgramError):
            raise event
        return event

    def take(self, seconds: float) -> Any:
        """Return the next event. queue.Empty if none comes for some seconds."""
        event = self.events.get(timeout=seconds)
        if isinstance(event, Message):
            self._taken_bytes += len(event.payload)
        return event


def acknowledge_at_once(sock: Any) -> None:
    """Make TCP acknowledge what has just come, where it can (Linux).

    mosquitto by default leaves Nagle's algorithm on: its next small packet waits for the
    acknowledgement of the last one, which TCP would delay by 40 ms.
    """
    if hasattr(socket, "TCP_QUICKACK"):
        with contextlib.suppress(OSError):  # the connection has ended
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


# Parts of what OpenSSL says, each with what it means and what to do.
TLS_PROBLEMS = (
    (
        ("unable to get", "self-signed", "self signed"),
        "its certificate comes from an unknown authority",
        "give the authority's certificate with --cafile",
    ),
    (("certificate has expired",), "its certificate has expired", "it must be renewed there"),
    (
        ("not yet valid",),
        "its certificate is not valid yet",
        "check this machine's clock",
    ),
    (("mismatch",), "its certificate is for {names}, not for {host}", "check --host"),
    (
        ("verify failed",),
        "its certificate is not good ({reason})",
        "it must be for a server, and issued by the authority in --cafile",
    ),
    (
        ("certificate required", "handshake failure"),
        "it wants a client certificate",
        "give one with --cert and --key",
    ),
    (
        (" alert ",),
        "it refuses our certificate ({reason})",
        "use a certificate that its authority has issued and that is valid now",
    ),
    (
        ("wrong version", "record layer", "packet length", "eof", "reset"),
        "it does not speak TLS on this port",
        "check --port, or leave out the TLS options",
    ),
)


def tls_problem(broker: Broker, tls: Tls) -> ProgramError | None:
    """Return the error if TLS with a broker fails: tries it, as paho does not pass alerts on."""
    try:
        context = tls.context()
        with socket.create_connection((broker.host, broker.port), PROBE_TIME) as plain:
            context.wrap_socket(plain, server_hostname=broker.host).recv(1)
        return None
    except TimeoutError:
        return None
    except UsageError as error:  # a file has just become unusable
        return error
    except OSError as error:
        reason = re.sub(r"\[SSL.*?\] | \(_ssl.*\)", "", str(error))
    for parts, problem, hint in TLS_PROBLEMS:
        if any(part in reason.lower() for part in parts):
            names = certified_names(broker) if "{names}" in problem else ""
            problem = problem.format(names=names, host=broker.host, reason=reason)
            return ProgramError(f"TLS failed with the broker on {broker}: {problem}", hint)
    return None


def certified_names(broker: Broker) -> str:
    """Return the names in a broker's certificate, for an error: asks the broker for it again."""
    import ssl

    from cryptography import x509

    with contextlib.suppress(OSError, ValueError, x509.ExtensionNotFound):
        pem = ssl.get_server_certificate((broker.host, broker.port), timeout=PROBE_TIME)
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


def usable_payload(answer: Message, size: int, digest: bytes) -> bytes:
    """Return an answer's payload. UnusableError if it is no answer, whatever it means.

    :param size: of our own message, in bytes
    :param digest: of our own message
    """
    if answer.retained:
        raise UnusableError("retained from an earlier run")
    # No action makes a text more than three times as long. A broker that sends far more wants us to
    # be busy with it when the time is over.
    if len(answer.payload) > 4 * size + crypto.MAX_KEY_FILE_SIZE:
        raise UnusableError("far too large for an answer")
    if crypto.digest(answer.payload) == digest:  # it would decrypt: both directions have one key
        raise UnusableError("our own message handed back")
    return bytes(answer.payload)


def no_answer(netid: str, action: str, timeout: float, ignored: Counter[str]) -> ProgramError:
    """Return the error for a deadline that passed; ignored counts what came, by its fault."""
    topic = RESPONSE.format(netid, action)
    faults = ", ".join(f"{fault} ({count})" for fault, count in ignored.most_common())
    time_and_place = f"on {topic} within {timeout:g} s"
    tampering = "another client may be using this NETID, or someone tampers with the messages"
    if action == KEY_EXCHANGE and ignored:
        return ProgramError(f"no valid key came {time_and_place}, only: {faults}", tampering)
    if action == KEY_EXCHANGE:
        return ProgramError(
            f"no responder answered the key exchange {time_and_place}",
            f"start one ({PROGRAM} --respond), or check NETID, --host and --port;"
            " an access rule of the broker may also drop messages without a word",
        )
    if ignored:
        return ProgramError(f"no response for us came {time_and_place}, only: {faults}", tampering)
    return ProgramError(
        f"no response came {time_and_place}",
        "the responder may have ended or not know this action (see its log), the message may be"
        " too large for the broker, or an access rule may drop it",
    )


# --- the client --------------------------------------------------------------------------------


def request(settings: Settings, exchange: crypto.Exchange, message: bytes) -> bytes:
    """Send one request and return the response, UTF-8 text.

    :param exchange: a fresh one
    :param message: the plaintext, UTF-8
    :raises ProgramError: there is no response to return
    """
    netid, action = settings.netid, settings.action
    with Connection(settings.broker, settings.timeout) as mqtt:
        mqtt.wait_for("CONNACK")
        mqtt.subscribe(RESPONSE.format(netid, KEY_EXCHANGE), RESPONSE.format(netid, action))
        mqtt.wait_for("SUBACK")
        mqtt.call(netid, KEY_EXCHANGE, exchange.public_key(), exchange.agree)
        tokens = [exchange.encrypt(message)]
        del message  # both may be large, and are not needed while the answer is
        text = mqtt.call(netid, action, tokens.pop(), exchange.decrypt)
    if not is_utf8(text):
        raise ProgramError("the response is not UTF-8 text", "the responder breaks the protocol")
    return text


def is_utf8(text: bytes) -> bool:
    """Tell whether bytes are UTF-8."""
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


# --- the responder -----------------------------------------------------------------------------


class Incoming(NamedTuple):
    """A key exchange or request."""

    netid: str
    action: str
    payload: bytes
    arrived: float  # seconds, of time.monotonic()


class Done(NamedTuple):
    """An event: a process of the pool has finished a task."""

    task: Future[Any]
    then: Callable[[Any], None]  # what to do with the result


class Session:
    """What the responder keeps of one NetID."""

    __slots__ = ("deriving", "keys", "parked")

    def __init__(self) -> None:
        self.keys: tuple[bytes, ...] = ()  # newest first
        self.deriving = 0  # keys that are on their way
        self.parked: list[Incoming] = []  # requests that may be for one of those


class Responder:
    """Answers key exchanges and requests.

    The thread in run() handles all events in their order, so nothing needs a lock. Powers are
    computed by a pool of processes, whose results are events too: pow holds Python's global lock.
    """

    def __init__(
        self, broker: Broker, netid: str, on_ready: Callable[[], None], status_topic: str = ""
    ) -> None:
        """Prepare a responder.

        :param netid: whom to answer; empty: everyone
        :param on_ready: called after each subscription
        :param status_topic: where to publish whether it runs, with counts; empty: nowhere
        """
        self._netid = netid
        self._on_ready = on_ready
        self._group = crypto.read_group()
        crypto.load_ciphers()
        self._status_topic = status_topic
        self._started = time.monotonic()
        self._status_at = float("inf")  # not before the first subscription
        self._counts = {"exchanges": 0, "requests": 0, "failures": 0}
        will = (status_topic, OFFLINE) if status_topic else None
        self._mqtt = Connection(broker, DEFAULT_TIMEOUT, is_permanent=True, will=will)
        self._is_stopped = False
        self._sessions: OrderedDict[str, Session] = OrderedDict()  # least recently used first
        self._waiting: OrderedDict[str, deque[Incoming]] = OrderedDict()  # exchanges by NetID
        self._key_pairs: deque[crypto.KeyPair] = deque()
        self._deriving = 0
        self._dropped = self._reported = 0  # messages
        self._report_at = 0.0  # of time.monotonic()
        self._processes = os.cpu_count() or 1
        self._pool: ProcessPoolExecutor

    def run(self) -> None:
        """Answer until stop() is called; connect again whenever the connection is lost.

        :raises ProgramError: the broker refuses for good, or the pool has lost a process
        """
        import multiprocessing
        from concurrent.futures import BrokenExecutor

        self._pool = process_pool(self._processes)
        try:
            with signals_blocked():
                self._make_key_pairs(KEY_PAIR_STOCK)
            children = multiprocessing.active_children()
            threading.Thread(target=self._watch, args=[children], daemon=True).start()
            with self._mqtt:
                try:
                    while not self._is_stopped:
                        self._report_status()
                        seconds = min(STATUS_INTERVAL, self._status_at - time.monotonic())
                        with contextlib.suppress(queue.Empty):
                            self._handle(self._mqtt.take(max(0, seconds)))
                    self._drain()
                finally:
                    self._go_offline()
        except BrokenExecutor:
            hint = "start the responder again; the machine may be short of memory"
            raise ProgramError("a process of the responder was ended", hint) from None
        finally:
            self._is_stopped = True
            self._pool.shutdown(cancel_futures=True)

    def stop(self) -> None:
        """Make run() finish what is being answered and return; safe in a signal handler."""
        self._is_stopped = True
        self._mqtt.events.put(None)

    def _watch(self, processes: Sequence[BaseProcess]) -> None:
        """Kill the other processes if one is lost: the pool only sends them a blocked signal."""
        from multiprocessing.connection import wait

        wait([process.sentinel for process in processes])
        if not self._is_stopped:
            for process in processes:
                process.kill()

    def _drain(self) -> None:
        end = time.monotonic() + DRAINING_TIME
        with contextlib.suppress(queue.Empty):
            while self._waiting or self._deriving or not self._mqtt.events.empty():
                self._handle(self._mqtt.take(max(0, end - time.monotonic())))

    def _go_offline(self) -> None:
        if self._status_topic:
            self._mqtt.publish(self._status_topic, OFFLINE, retain=True)
        self._mqtt.flush(DRAINING_TIME)

    def _handle(self, event: Any) -> None:
        if isinstance(event, Message):
            self._receive(event)
        elif isinstance(event, Done):
            event.then(event.task.result())
        elif isinstance(event, Ack):
            self._go_on_connecting(event)
        elif isinstance(event, ProgramError):
            log().warning("disconnected reason=%r", str(event))
        self._report_drops()

    def _report_drops(self) -> None:
        dropped, now = self._dropped + self._mqtt.dropped, time.monotonic()
        if dropped > self._reported and now >= self._report_at:
            log().warning("dropped count=%d reason='too many at a time'", dropped - self._reported)
            self._reported, self._report_at = dropped, now + REPORT_INTERVAL

    def _report_status(self) -> None:
        now = time.monotonic()
        if now < self._status_at:
            return
        import json

        uptime = round(now - self._started)
        status = {"status": "online", **self._counts, "netids": len(self._sessions)}
        payload = json.dumps({**status, "uptime_seconds": uptime}).encode()
        self._mqtt.publish(self._status_topic, payload, retain=True)
        self._status_at = now + STATUS_INTERVAL

    def _go_on_connecting(self, ack: Ack) -> None:
        try:
            self._mqtt.check(ack)
        except ProgramError as error:
            if error.is_final:
                raise
            self._handle(error)
            return
        if ack.packet == "CONNACK":
            self._mqtt.subscribe(REQUEST.format(self._netid or "+", "+"))
        else:
            self._status_at = time.monotonic() if self._status_topic else float("inf")
            self._on_ready()

    def _receive(self, message: Message) -> None:
        netid, action, suffix, *_ = (*message.topic.split("/", 2), "", "")
        request = Incoming(netid, action, bytes(message.payload), time.monotonic())
        is_ours = NETID.fullmatch(netid) and self._netid in ("", netid)
        if not is_ours or suffix != "request" or message.retained:
            self._fail(request, "retained, or on a topic that was not subscribed to")
        elif action == KEY_EXCHANGE:
            self._enqueue_exchange(request)
        else:
            self._answer(request)

    def _publish(self, request: Incoming, payload: bytes) -> None:
        if self._mqtt.publish(RESPONSE.format(request.netid, request.action), payload):
            self._counts["exchanges" if request.action == KEY_EXCHANGE else "requests"] += 1
            log_success(request)
        else:
            self._fail(request, "the broker does not take the answer")

    def _fail(self, request: Incoming, reason: str) -> None:
        self._counts["failures"] += 1
        # A peer chose the names: they are cut and quoted.
        names = request.netid[:64], request.action[:64]
        log().warning("ignored netid=%r action=%r reason=%r", *names, reason)

    def _enqueue_exchange(self, request: Incoming) -> None:
        """Let a key exchange wait for its turn.

        Each NetID has a short queue of its own, so a flood from one does not delay the others.
        """
        requests = self._waiting.get(request.netid, deque())
        if len(requests) < KEYS_PER_NETID and len(self._waiting) < MAX_WAITING:
            requests.append(request)
            self._waiting[request.netid] = requests
            self._begin_exchanges()
        else:
            self._dropped += 1

    def _begin_exchanges(self) -> None:
        """Begin as many key exchanges as keep the pool busy, one of each NetID in turn."""
        while self._waiting and self._key_pairs and self._deriving < 2 * self._processes:
            netid, requests = self._waiting.popitem(last=False)
            self._exchange(requests.popleft())
            if requests:
                self._waiting[netid] = requests

    def _exchange(self, request: Incoming) -> None:
        try:
            peer_value = crypto.read_public_key(request.payload, self._group)
        except crypto.PeerKeyError as error:
            self._fail(request, str(error))
            return
        key_pair = self._key_pairs.popleft()
        self._publish(request, key_pair.public_key)
        session = self._session(request.netid)
        session.deriving += 1
        self._deriving += 1
        self._submit(lambda key: self._keep_key(session, key), key_pair.derive, peer_value)

    def _keep_key(self, session: Session, key: bytes) -> None:
        self._deriving -= 1
        session.deriving -= 1
        session.keys = (key, *session.keys)[:KEYS_PER_NETID]
        parked, session.parked = session.parked, []
        for request in parked:
            self._answer(request)
        self._make_key_pairs(1)
        self._begin_exchanges()

    def _session(self, netid: str) -> Session:
        """Return what is kept of a NetID, new if need be, which is now the most recently used."""
        session = self._sessions.setdefault(netid, Session())
        self._sessions.move_to_end(netid)
        if len(self._sessions) > MAX_NETIDS:
            self._sessions.popitem(last=False)
        return session

    def _make_key_pairs(self, count: int) -> None:
        for _ in range(count):
            self._submit(self._keep_key_pair, crypto.KeyPair, self._group)

    def _keep_key_pair(self, key_pair: crypto.KeyPair) -> None:
        self._key_pairs.append(key_pair)
        self._begin_exchanges()

    def _submit(self, then: Callable[[Any], None], task: Callable[..., Any], *args: Any) -> None:
        future = self._pool.submit(task, *args)
        future.add_done_callback(lambda done: self._mqtt.events.put(Done(done, then)))

    def _answer(self, request: Incoming) -> None:
        session = self._sessions.get(request.netid) or Session()
        try:
            self._publish(request, response(request, session.keys))
        except UnusableError as error:
            if session.deriving and len(session.parked) < KEYS_PER_NETID:
                session.parked.append(request)
            else:
                self._fail(request, str(error))
        else:
            self._sessions.move_to_end(request.netid)


def response(request: Incoming, keys: Sequence[bytes]) -> bytes:
    """Return the response to a request, encrypted with the key that decrypts the request.

    :param keys: those to try, in this order
    :raises UnusableError: there is nothing to respond
    """
    if request.action not in ACTIONS:
        raise UnusableError("unknown action")
    for key in keys:
        with contextlib.suppress(crypto.TokenError):
            text = crypto.decrypt(request.payload, key)
            break
    else:
        raise UnusableError("not encrypted with a key of this NetID")
    if not is_utf8(text):
        raise UnusableError("not UTF-8 text")
    return crypto.encrypt(ACTIONS[request.action](text.decode()), key)


def log_success(request: Incoming) -> None:
    """Log that a key exchange or request was answered, and how long that took."""
    milliseconds = (time.monotonic() - request.arrived) * 1000
    log().info(
        "answered netid=%r action=%s ms=%.1f bytes=%d",
        *(request.netid, request.action, milliseconds, len(request.payload)),
    )


def process_pool(processes: int) -> ProcessPoolExecutor:
    """Return a pool of processes that end with this one."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    # Not fork: this process has threads, and a fork would copy their locks as they stand. Not
    # forkserver: its server dies of a SIGTERM to the whole process group, and all tasks with it.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(processes, context, end_with_parent)


def end_with_parent() -> None:
    """Make a process of the pool end when the responder is killed, as nothing else would."""
    import multiprocessing

    def wait() -> None:
        if parent := multiprocessing.parent_process():
            parent.join()
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


@contextlib.contextmanager
def signals_blocked() -> Iterator[None]:
    """Let processes that start meanwhile ignore what stops the responder.

    They inherit it. A signal to the whole group must not end them before it has finished.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


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
        thread.join(CLOSING_TIME)


@contextlib.contextmanager
def local_services(settings: Settings) -> Iterator[Settings]:
    """Run a broker and a responder for a request; yields the settings to reach them with."""
    host = "127.0.0.1"
    with socket.create_server((host, 0)) as server:
        port = server.getsockname()[1]  # free, and soon the broker's
    with local_broker(host, port):
        ready = threading.Event()
        responder = Responder(Broker(host, port, random_id()), settings.netid, ready.set)
        thread = threading.Thread(target=responder.run)
        thread.start()
        try:
            ready.wait(settings.timeout)
            yield settings._replace(broker=settings.broker._replace(host=host, port=port))
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
    add("-W", "--timeout", type=checked(float, lambda value: 0 < value <= MAX_TIMEOUT, time_span))
    add("--respond", action="store_true")
    add("-h", "--host", type=checked(str, is_mqtt_string, "a host's name or address"))
    port_range = "a number from 1 to 65535"
    add("-p", "--port", type=checked(decimal, lambda value: 1 <= value <= 65535, port_range))
    add("-i", "--id", type=checked(str, is_mqtt_string, "UTF-8 text of 1 to 65535 bytes"))
    add("--local", action="store_true")
    for option in ("--cafile", "--cert", "--key", "--password-file"):
        add(option, type=checked(str, bool, "a file's name"), default=None)
    add("--tls", action="store_true")
    add("--insecure", action="store_true")
    add("-u", "--username", type=checked(str, is_mqtt_string, "UTF-8 text"))
    add("--status-topic", type=checked(str, is_topic, "a topic without + and #"))
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
    parser = build_parser()
    if arguments == ["-h"]:  # a later edition of the course means --help by it
        arguments = ["--help"]
    end = arguments.index("--") if "--" in arguments else len(arguments)
    for text in arguments[:end]:
        if re.match(r"-[A-Za-z][^=]*\s", text):  # Python 3.13.0 would take such a MESSAGE apart
            raise UsageError("an argument that begins with a dash is an option; put -- before it")
    options = parser.parse_intermixed_args(arguments[:end])
    words = options.words + arguments[end + 1 :]
    check_combination(options, words)
    netid, action, message = (*words, None, None, None)[:3]
    check_words(netid, action, message)
    tls = tls_settings(options)
    broker = Broker(
        options.host or "localhost",
        options.port or (DEFAULT_TLS_PORT if tls else DEFAULT_PORT),
        options.id or (random_id() if options.respond else netid),
        *login(options),
        tls,
    )
    return Settings(
        broker,
        netid or "",
        action or "",
        None if message in (None, "-") else os.fsencode(message),  # as typed, in any locale
        options.timeout or DEFAULT_TIMEOUT,
        options.respond,
        options.local,
        options.verbose,
        options.status_topic or "",
    )


def tls_settings(options: argparse.Namespace) -> Tls | None:
    """Return how to use TLS, if any option says so.

    :raises UsageError: the options contradict each other, or a file cannot be used
    """
    if bool(options.cert) != bool(options.key):
        raise UsageError("--cert and --key go together: a certificate and its private key")
    if options.insecure and options.cafile:
        raise UsageError("--insecure trusts any broker, --cafile only some; leave one out")
    tls = Tls(options.cafile or "", options.cert or "", options.key or "", options.insecure)
    if not (any(tls) or options.tls):
        return None
    if tls.cafile or tls.certfile:
        tls.context()  # shows what is wrong with the files before anything else is done
    return tls


def login(options: argparse.Namespace) -> tuple[str, bytes | None]:
    """Return user name and password, which is not an option: other users see the command line."""
    username = options.username or os.environ.get("MQTT_USERNAME", "")
    password = os.environ.get("MQTT_PASSWORD")
    if not username and (options.password_file or password is not None):
        raise UsageError("--password-file or MQTT_PASSWORD needs --username or MQTT_USERNAME")
    if username and not is_mqtt_string(username):
        raise UsageError("MQTT_USERNAME must be UTF-8 text")
    if options.password_file == "-":  # noqa: S105
        return username, ask_password(username)
    if options.password_file:
        content = read_file("--password-file", options.password_file)
        return username, content.removesuffix(b"\n").removesuffix(b"\r")
    return username, None if password is None else os.fsencode(password)


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


def read_file(option: str, name: str) -> bytes:
    """Return the content of a file that an option names. UsageError if there is none."""
    try:
        with open(name, "rb") as file:
            return file.read()
    except OSError as error:
        raise UsageError(f"cannot read {option} {name}: {error.strerror}") from None


def check_combination(options: argparse.Namespace, words: Sequence[str]) -> None:
    """Refuse arguments that are right one by one, but not together."""
    if options.respond and len(words) > 1:
        raise UsageError("--respond takes no ACTION and no MESSAGE; to send a request, omit it")
    if options.respond and options.timeout is not None:
        raise UsageError("--respond answers until it is stopped; --timeout is for a request")
    if not options.respond and len(words) < 3:
        raise UsageError("NETID, ACTION and MESSAGE are needed, or --respond to answer requests")
    if len(words) > 3:
        raise UsageError("there are more arguments than NETID, ACTION and MESSAGE; quote MESSAGE")
    if options.status_topic and not options.respond:
        raise UsageError("--status-topic is for --respond")
    if options.local and not options.respond and (options.host or options.port):
        raise UsageError(
            "--local brings a broker of its own, and --host or --port names another; omit either"
        )
    if options.local and (options.cafile or options.cert or options.tls or options.insecure):
        raise UsageError("--local brings a plain broker of its own; leave the TLS options out")


def check_words(netid: str | None, action: str | None, message: str | None) -> None:
    """Refuse a wrong NETID, ACTION or MESSAGE."""
    if netid is not None and not NETID.fullmatch(netid):
        raise UsageError(
            "NETID must be one level of a topic: 1 to 64 characters without / + #, controls, and $"
            f" in front; not {netid[:80]!r}"
        )
    if action is not None and action not in ACTIONS:
        raise UsageError(f"ACTION must be one of {', '.join(ACTIONS)}; not {action[:80]!r}")
    if message is not None and not is_typed_utf8(message):
        raise UsageError("MESSAGE must be UTF-8 text")


# --- main --------------------------------------------------------------------------------------


def read_message(settings: Settings) -> bytes:
    """Return the message, from standard input if the command line says so."""
    if settings.message is not None:
        return settings.message
    if sys.stdin is None:
        raise ProgramError("cannot read MESSAGE from standard input: it is closed")
    try:
        message = sys.stdin.buffer.read()
    except OSError as error:
        raise ProgramError(f"cannot read standard input: {error.strerror}") from None
    if not is_utf8(message):
        raise ProgramError("MESSAGE on standard input is not UTF-8 text")
    if crypto.token_size(len(message)) > MAX_TOKEN_SIZE:
        raise ProgramError(
            f"MESSAGE has {len(message)} bytes, too many for MQTT", "send parts of it"
        )
    return message


def write_output(data: bytes) -> None:
    """Write to standard output, whole and at once."""
    if sys.stdout is None:
        raise ProgramError("cannot write to standard output: it is closed")
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except OSError as error:
        # Python would try to write the rest again at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise ProgramError(f"cannot write to standard output: {error.strerror}") from None


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
    exchange = crypto.start_exchange()  # before there are threads
    with local_services(settings) if settings.local else contextlib.nullcontext(settings) as found:
        text = request(found, exchange, read_message(settings))
    write_output(text + b"\n")


def run_responder(settings: Settings) -> None:
    """Answer requests until SIGINT or SIGTERM."""
    broker, whom = settings.broker, settings.netid or "all NetIDs"
    responder = Responder(
        broker,
        settings.netid,
        lambda: say(f"ready: {broker}, for {whom}"),
        settings.status_topic,
    )
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: responder.stop())
    with local_broker(broker.host, broker.port) if settings.local else contextlib.nullcontext():
        responder.run()


def main(argv: list[str] | None = None) -> int:
    """Run the program with these arguments, by default the command line's.

    :return: the exit status
    """
    try:
        settings = parse_settings(sys.argv[1:] if argv is None else argv)
        set_up_log(settings)
        if settings.broker.tls and settings.broker.tls.is_insecure:
            log().warning("--insecure: anyone between here and the broker can pose as it")
        (run_responder if settings.respond else run_request)(settings)
    except ProgramError as error:
        return report(error)
    except ImportError as error:
        hint = "install what is needed: python3 -m pip install -r requirements.txt"
        return report(ProgramError(f"a package is missing: {error}", hint))
    except (crypto.CryptoError, OSError, EOFError) as error:
        return report(ProgramError(str(error) or "a process of the program was ended"))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except SystemExit:  # argparse, after --help or --version
        pass
    return 0


if __name__ == "__main__":
    exit_status = main()
    # All is written, closed and ended. Taking the modules apart would cost each request 15 ms more.
    os._exit(exit_status)
