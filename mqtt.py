"""The lab's topics, and the connection to the broker: the only user of paho."""

from __future__ import annotations

import contextlib
import os
import re
import select
import socket
import time
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

from keys import CryptoError
from settings import ProgramError, Settings, UsageError, log, tls_context

if TYPE_CHECKING:  # else loaded where it is used: --help and usage errors do not need it
    import paho.mqtt.client as paho

# The topics: {NetID}/{action}/request and …/response.
REQUEST, RESPONSE = "{}/{}/request", "{}/{}/response"
KEY_EXCHANGE = "key-exchange"  # the exchange's action
ACTIONS = ("uppercase", "lowercase", "title-case", "reverse", "shuffle", "random")
# One level of a topic. Brokers may close the connection at a control character (3.1.1, 1.5.3), and
# a $ in front hides it from the responder's wildcard (4.7.2).
NETID = re.compile(r"(?!\$)[^/+#\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,64}")

CONNECTING, CONNACK, SUBACK = "TCP connection", "CONNACK", "SUBACK"  # the first stages
QOS = 1
KEEPALIVE = 15  # seconds of silence after which a responder asks its broker for a sign of life
MAX_KEEPALIVE = 65_535  # seconds: 3.1.1, 3.1.2.10
LOOP_INTERVAL = 1.0  # seconds between looks at the time, for keep-alive
PROBE_TIME = 1.0  # seconds to find out why TLS has failed
MAX_MESSAGES = 10_000  # received, but not handled yet; more are dropped
MAX_IN_FLIGHT = 10_000  # published, but not acknowledged by the broker yet
MAX_BYTES = 2**27  # of the messages received, or published, in that state; one may have more
FIRST_DELAY, LAST_DELAY = 1.0, 60.0  # seconds between attempts to connect


class UnusableError(CryptoError):
    """A message from a peer cannot be used; the text says why."""


def is_utf8(text: bytes) -> bool:
    """Tell whether bytes are UTF-8."""
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


class Message(NamedTuple):
    """A PUBLISH that came in."""

    topic: str
    payload: bytes
    is_retained: bool


class Connection:
    """A connection to the broker, from DNS look-up to DISCONNECT.

    Its methods let the network go on while they wait, on the thread that calls them. paho's
    callbacks only note what came, or raise ProgramError, which ends the connection.
    """

    def __init__(self, settings: Settings, will: tuple[str, bytes] | None = None) -> None:
        """Prepare a connection.

        :param will: the topic and payload that the broker shall publish, retained, when the
            connection breaks
        """
        self._settings = settings
        self._uses_tls = settings.uses_tls
        self.stage = CONNECTING  # what is being waited for
        self.messages: deque[Message] = deque()
        self.dropped = 0  # messages for which there was no room
        self.ignored: Counter[str] = Counter()  # answers that can't be used, by their fault
        self.patience_ends = float("inf")  # of time.monotonic(), when wait() gives up
        self._bytes = 0  # of the messages
        self._granted: list[int] | None = None  # QoS, or a refusal, for each topic
        self._failure: ProgramError | None = None  # why the connection has ended
        self._unacknowledged: list[int] = []  # the packet identifiers of what came in
        self._in_flight: dict[int, int] = {}  # packet identifier and size of what was published
        self._in_flight_bytes = 0
        self._client = self._new_client()
        if will:
            self._client.will_set(*will, QOS, retain=True)

    def _new_client(self) -> paho.Client:
        import paho.mqtt.client as paho
        from paho.mqtt.enums import CallbackAPIVersion

        settings = self._settings
        client = paho.Client(
            CallbackAPIVersion.VERSION2,
            settings.id,
            reconnect_on_failure=False,
            manual_ack=True,
        )
        client.max_inflight_messages_set(0)  # all are sent at once ...
        client.max_queued_messages_set(MAX_IN_FLIGHT)  # ... and no more than these are taken
        client.connect_timeout = settings.timeout
        if settings.username:
            client.username_pw_set(settings.username, settings.password)  # type: ignore[arg-type]
        client.on_socket_open = self._on_socket_open
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_publish = self._on_publish
        client.on_message = self._on_message
        # We subscribe at QoS 1. paho would keep a flood of QoS 2, to deliver it later.
        client._send_pubrec = self._refuse_qos_2  # type: ignore[method-assign]
        return client

    def __enter__(self) -> Connection:
        """Return the connection."""
        return self

    def __exit__(self, error: object, *exc_info: object) -> None:
        """Disconnect; after an error without a word, so that the broker publishes the will."""
        if error is None:
            self._acknowledge()
            self._client.disconnect()
        elif sock := self._client.socket():
            sock.close()

    def connect(self) -> None:
        """Connect, and wait for the CONNACK. ProgramError if that fails, or it is a refusal."""
        client, settings = self._client, self._settings
        keepalive = KEEPALIVE
        if not settings.respond:  # its deadline counts: a large message may be long on its way
            keepalive = min(MAX_KEEPALIVE, max(KEEPALIVE, int(settings.timeout) + 1))
        try:
            if settings.uses_tls:
                client.tls_set_context(tls_context(settings))
            client.connect(settings.host, settings.port, keepalive)
        except Exception as error:  # ValueError, UnicodeError, … for a host that cannot be one
            raise self._explain(error) from None
        while self.stage == CONNACK:
            self.wait()
        log().info("received CONNACK from %s", settings.broker)

    def subscribe(self, *topics: str) -> None:
        """Subscribe at QoS 1, in one packet; wait for the SUBACK. ProgramError for a refusal."""
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
        if self._in_flight and self._in_flight_bytes + len(payload) > MAX_BYTES:
            return False
        try:
            publication = self._client.publish(topic, payload, QOS, retain)
        except ValueError:  # more than MQTT can carry
            return False
        if publication.rc:
            return False
        self._in_flight[publication.mid] = len(payload)
        self._in_flight_bytes += len(payload)
        return True

    def flush(self) -> None:
        """Wait until the broker has acknowledged all that was published."""
        while self._in_flight:
            self.wait()
            self.messages.clear()  # nobody takes them any more

    def wait(self, others: Sequence[Any] = ()) -> list[Any]:
        """Let the network go on until something comes, or for LOOP_INTERVAL.

        :param others: things that select() takes, to be waited for as well
        :return: those of them that can be read
        :raises ProgramError: the connection has ended
        :raises TimeoutError: so has the patience
        """
        readable: list[Any] = []
        if self._failure:
            raise self._failure
        try:
            readable = self._step(others)
        except Exception as error:
            # Whatever a hostile broker's bytes make paho raise, it ends this connection only.
            self._failure = self._explain(error)
            # What came before still counts, once we have subscribed: then the next call raises it.
            if not self.messages or not self._granted:
                raise self._failure from None
        if time.monotonic() > self.patience_ends:
            raise TimeoutError("no answer came")
        return readable

    def _step(self, others: Sequence[Any]) -> list[Any]:
        self._acknowledge()
        client = self._client
        client.loop_misc()  # keep-alive: closes a connection that is dead
        sock: Any = client.socket()
        if sock is None:
            raise ConnectionError("The connection was lost")
        # A broker that does not read is not read from: what it makes us owe would pile up.
        to_read, to_write = ([], [sock]) if client.want_write() else ([sock], [])
        # TLS may have decrypted more than was read.
        is_pending = self._uses_tls and bool(to_read) and sock.pending() > 0
        is_busy = is_pending or (self.messages and self._granted)
        timeout = 0 if is_busy else LOOP_INTERVAL
        readable, writable, _ = select.select([*to_read, *others], to_write, [], timeout)
        code = client.loop_write() if writable else 0
        if sock in readable or is_pending:
            code = client.loop_read()
            if self._uses_tls:  # its session tickets are no packets that paho tells of
                acknowledge_at_once(sock)
        if code:
            import paho.mqtt.client as paho

            raise ConnectionError(paho.error_string(code).rstrip("."))
        if sock in readable:
            readable.remove(sock)
        return readable

    def _acknowledge(self) -> None:
        """Acknowledge what came in; not at once, so that the answers to it are faster."""
        for mid in self._unacknowledged:
            self._client.ack(mid, QOS)
        self._unacknowledged.clear()

    def discard(self) -> None:
        """Drop the messages that are here already."""
        self.messages.clear()
        while (sock := self._client.socket()) and select.select([sock], [], [], 0)[0]:
            self.wait()
            self.messages.clear()

    def _on_socket_open(self, client: object, userdata: object, sock: Any) -> None:
        self.stage = CONNACK
        # Else Nagle's algorithm lets a small packet wait for the acknowledgement of the one before.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _on_connect(self, client: Any, userdata: Any, flags: Any, code: Any, _: Any) -> None:
        if self.stage == CONNACK:
            self.stage = SUBACK
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
        if self.stage != CONNACK:
            self._granted = [code.value for code in codes]

    def _on_publish(self, client: Any, userdata: object, mid: int, *_: object) -> None:
        acknowledge_at_once(client.socket())
        self._in_flight_bytes -= self._in_flight.pop(mid, 0)

    def _on_message(self, client: object, userdata: object, message: Any) -> None:
        if message.qos:
            self._unacknowledged.append(message.mid)
        self._bytes = len(message.payload) + (self._bytes if self.messages else 0)
        has_room = len(self.messages) < MAX_MESSAGES and self._bytes <= MAX_BYTES
        if has_room or not self.messages:
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
        if self.stage not in (CONNECTING, CONNACK):
            return ProgramError(
                f"the connection to {settings.broker} was lost while waiting for {self.stage}:"
                f" {reason}",
                f"another client may have the client ID {settings.id!r}; choose one with --id",
            )
        if settings.uses_tls and (problem := tls_problem(settings)):
            return problem
        if self.stage == CONNACK:
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
        if self.stage == CONNECTING:
            return ProgramError(
                f"cannot connect to {broker}: {reason}",
                "check --host and --port, and whether a firewall is in between",
            )
        if self.stage == CONNACK:
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
    except (OSError, ValueError) as error:  # ValueError for a host that cannot be one
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

    with contextlib.suppress(Exception):  # whatever a stranger's certificate makes a parser raise
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


def random_id() -> str:
    """Return a client ID for a responder, since the NetID is the client's."""
    return f"responder{os.urandom(4).hex()}"  # every broker takes 23 of these (3.1.1, 3.1.3.1)
