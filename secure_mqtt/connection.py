"""The connection to the broker: the only user of paho."""

from __future__ import annotations

import contextlib
import functools
import select
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from io import BytesIO
from typing import TYPE_CHECKING, Any, NoReturn

from secure_mqtt.errors import ProgramError
from secure_mqtt.faults import CONNACK, CONNECTING, SUBACK, explain, refusal, refused_topics
from secure_mqtt.log import log
from secure_mqtt.mailboxes import Inbox, Message, Outbox
from secure_mqtt.postponed import postponed
from secure_mqtt.settings import Settings
from secure_mqtt.tls import describe, tls_context

if TYPE_CHECKING:  # else loaded where it is used: --help and usage errors do not need it
    import paho.mqtt.client as paho

QOS = 1
KEEPALIVE = 15  # seconds of silence after which a responder asks its broker for a sign of life
MAX_KEEPALIVE = 65_535  # seconds: 3.1.1, 3.1.2.10
READ_TIME = 0.02  # seconds of reading until what came is handled
READ_SIZE = 2**16  # bytes that are read at a time: paho wants each packet in three parts
LOOP_INTERVAL = 1.0  # seconds between looks at the time, for keep-alive
MAX_IN_FLIGHT = 10_000  # published, but not acknowledged by the broker yet
FIRST_DELAY, LAST_DELAY = 1.0, 60.0  # seconds between attempts to connect


class Network:
    """A client of paho's, whose network goes on while step() is called."""

    def __init__(self, client: paho.Client, inbox: Inbox, uses_tls: bool) -> None:
        """Take the client, and where its callbacks put what comes."""
        self.owed: list[int] = []  # the packet identifiers of what came in, to be acknowledged
        self.is_paused = False  # whether that has to wait, so that the broker waits, too
        self._client = client
        self._inbox = inbox
        self._uses_tls = uses_tls
        self._received = BytesIO()  # what was read, of which paho has not taken ...
        self._unread = 0  # ... so many bytes
        self._is_full = False  # whether as much was read as may be at a time: then there is more
        self._to_send = bytearray()  # what paho has written: it sends each packet by itself
        self._send: Callable[..., int] = client._sock_send
        client._sock_recv = partial(self._receive, client._sock_recv)  # type: ignore[method-assign]
        client._sock_send = self._write  # type: ignore[method-assign]

    def step(self, others: Sequence[Any], seconds: float, output: Sequence[Any] = ()) -> list[Any]:
        """Read and write what can be, once something can or after a time.

        :param others: things that select() takes, to be waited for as well
        :param seconds: the time, but LOOP_INTERVAL at most
        :param output: other things, to be waited for until they can be written
        :return: those of both that are ready
        :raises Exception: whatever paho raises; ConnectionError if the connection has ended
        """
        self._send_all()  # the answers, before all else
        if not self.is_paused:
            self.acknowledge()
        client = self._client
        client.loop_misc()  # keep-alive: closes a connection that is dead
        sock: Any = client.socket()
        if sock is None:
            raise ConnectionError("The connection was lost")
        self._send_all()
        # A broker that does not read is not read from: what it makes us owe would pile up.
        to_read, to_write = ([], [sock]) if self._to_send else ([sock], [])
        is_pending = bool(to_read and (self._unread or is_decrypted(sock)))
        timeout = 0 if is_pending else max(0, min(seconds, LOOP_INTERVAL))
        readable, writable, _ = select.select(
            [*to_read, *others], [*to_write, *output], [], timeout
        )
        if sock in readable or is_pending:
            code = self._read()
            if code:
                import paho.mqtt.client as paho

                raise ConnectionError(paho.error_string(code).rstrip("."))
            if self._uses_tls:  # its session tickets are no packets that paho tells of
                acknowledge_at_once(sock)
        return [ready for ready in readable + writable if ready is not sock]

    def _read(self) -> int:
        """Read what has come, but not for long: a flood shall not keep its answers waiting.

        :return: paho's code of what went wrong, or 0
        """
        end = time.monotonic() + READ_TIME
        while True:
            code = self._client.loop_read()
            if code or not self._inbox or time.monotonic() >= end:
                return int(code)
            if not self._unread and not self._is_full:
                return 0

    def _receive(self, read: Callable[[int], bytes], size: int) -> bytes:
        """Return bytes from the broker for paho, as many as it wants at most.

        :param read: reads from the socket
        """
        if not self._unread:
            data = read(READ_SIZE)  # however much it wants: memory is taken as it is filled
            self._received, self._unread = BytesIO(data), len(data)
            self._is_full = len(data) == READ_SIZE
        self._unread = max(0, self._unread - size)
        return self._received.read(size)

    def _write(self, buf: bytes | bytearray) -> int:
        """Take bytes from paho for the broker, to be sent together; return how many."""
        self._to_send += buf
        return len(buf)

    def _send_all(self) -> None:
        """Send what was written, as far as the broker takes it at once."""
        if self._to_send:
            with contextlib.suppress(BlockingIOError):
                del self._to_send[: self._send(self._to_send)]

    def publish(
        self,
        outbox: Outbox,
        topic: str,
        payload: bytes,
        retain: bool,
        receipt: Callable[[], None] | None,
    ) -> bool:
        """Publish at QoS 1. False if that can't be done."""
        try:
            publication = self._client.publish(topic, payload, QOS, retain)
        except ValueError:  # more than MQTT can carry
            return False
        if publication.rc and self._client.socket():
            return False
        outbox.add(publication.mid, len(payload), receipt)  # also what has ended the connection
        return not publication.rc

    def close(self, is_orderly: bool) -> None:
        """Disconnect; else without a word, so that the broker publishes the will."""
        if is_orderly:
            self.acknowledge()
            with contextlib.suppress(OSError):  # the connection has ended
                self._send_all()
        if is_orderly and not self._to_send:
            self._client._sock_send = self._send  # type: ignore[method-assign]  # nothing follows
            self._client.disconnect()
        elif sock := self._client.socket():
            sock.close()

    def has_more(self) -> bool:
        """Tell whether more has come that was not read yet."""
        sock = self._client.socket()
        return bool(sock and (self._unread or select.select([sock], [], [], 0)[0]))

    def acknowledge(self) -> None:
        """Acknowledge what came in; not at once, so that the answers to it are faster."""
        for mid in self.owed:
            self._client.ack(mid, QOS)
        self.owed.clear()


class Events:
    """What happens to a connection, as paho's callbacks tell it, and waiting for that.

    The callbacks only note what came, or raise ProgramError, which ends the connection.
    """

    def __init__(self, settings: Settings, will: tuple[str, bytes] | None = None) -> None:
        """Prepare a connection.

        :param will: the topic and payload that the broker shall publish, retained, when the
            connection breaks
        """
        self._settings = settings
        self.stage = CONNECTING  # what is being waited for
        self.inbox = Inbox()
        self.outbox = Outbox()
        self.ignored: Counter[str] = Counter()  # answers that can't be used, by their fault
        self.patience_ends = float("inf")  # of time.monotonic(), when wait() gives up
        self._granted: list[int] | None = None  # QoS, or a refusal, for each topic
        self._failure: ProgramError | None = None  # why the connection has ended
        self._client = new_client(settings, will)
        self._network = Network(self._client, self.inbox, settings.uses_tls)
        self._set_callbacks()

    def _set_callbacks(self) -> None:
        client = self._client
        client.on_socket_open = self._on_socket_open
        client.on_connect = self._on_connect
        client.on_subscribe = self._on_subscribe
        client.on_publish = self._on_publish
        client.on_message = self._on_message
        # We subscribe at QoS 1. paho would keep a flood of QoS 2, to deliver it later.
        problem = f"the broker on {self._settings.broker} sent a message at QoS 2"
        client._send_pubrec = partial(refuse, ProgramError(problem))  # type: ignore[method-assign]

    @property
    def is_open(self) -> bool:
        """Whether there is something that select() can wait for."""
        return self._client.socket() is not None

    def fileno(self) -> int:
        """Return what select() waits for, while it is open."""
        return int(self._client.socket().fileno())  # type: ignore[union-attr]

    def wait(
        self,
        others: Sequence[Any] = (),
        is_busy: bool = False,
        seconds: float = LOOP_INTERVAL,
        output: Sequence[Any] = (),
    ) -> list[Any]:
        """Let the network go on until something comes, or for LOOP_INTERVAL.

        :param others: things that select() takes, to be waited for as well
        :param is_busy: whether to come back at once
        :param seconds: after which to come back anyway
        :param output: things that are waited for until they can be written
        :return: those of both that are ready
        :raises ProgramError: the connection has ended
        :raises TimeoutError: so has the patience
        """
        ready: list[Any] = []
        if self._failure:
            raise self._failure
        try:
            has_work = self.inbox and self._granted and not self._network.is_paused
            timeout = 0 if is_busy or has_work else seconds
            ready = self._network.step(others, timeout, output)
        except Exception as error:
            # Whatever a hostile broker's bytes make paho raise, it ends this connection only.
            self._failure = explain(error, self.stage, self._settings, self.outbox.largest)
            # What came before still counts, once we have subscribed: then the next call raises it.
            if not self.inbox or not self._granted:
                raise self._failure from None
        if time.monotonic() > self.patience_ends:
            raise TimeoutError("no answer came")
        return ready

    def _on_socket_open(self, client: object, userdata: object, sock: Any) -> None:
        self.stage = CONNACK
        # Else Nagle's algorithm lets a small packet wait for the acknowledgement of the one before.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def _on_connect(self, client: Any, userdata: Any, flags: Any, code: Any, _: Any) -> None:
        if self.stage == CONNACK:
            self.stage = SUBACK
            self.inbox.clear()  # nobody has asked for any
        if code.is_failure:
            raise refusal(self._settings, str(code).lower())

    def _on_subscribe(self, client: Any, userdata: Any, mid: int, codes: Any, _: Any) -> None:
        acknowledge_at_once(client.socket())
        if self.stage != CONNACK:
            self._granted = [code.value for code in codes]

    def _on_publish(self, client: Any, userdata: object, mid: int, *_: object) -> None:
        acknowledge_at_once(client.socket())
        self.outbox.remove(mid)

    def _on_message(self, client: object, userdata: object, message: Any) -> None:
        if message.qos:
            self._network.owed.append(message.mid)
        self.inbox.put(Message(message.topic, bytes(message.payload), message.retain))


class Connection(Events):
    """A connection to the broker, from DNS look-up to DISCONNECT.

    Its methods let the network go on while they wait, on the thread that calls them.
    """

    def __enter__(self) -> Connection:
        """Return the connection."""
        return self

    def __exit__(self, error: object, *exc_info: object) -> None:
        """Disconnect; after an error without a word, so that the broker publishes the will."""
        self.close(is_orderly=error is None)

    def close(self, is_orderly: bool) -> None:
        """Disconnect; else without a word, so that the broker publishes the will."""
        self._network.close(is_orderly)

    def connect(self) -> None:
        """Connect, and wait for the CONNACK. ProgramError if that fails, or it is a refusal."""
        client, settings = self._client, self._settings
        try:
            if settings.uses_tls:
                client.tls_set_context(tls_context(settings))
            client.connect(settings.host, settings.port, keepalive(settings))
            # So paho answers CONNACK code 1: it would try MQTT 3.1, and not call on_connect.
            client.reconnect = partial(refuse, refusal(settings, "unsupported protocol version"))  # type: ignore[method-assign]
        except Exception as error:  # ValueError, UnicodeError, … for a host that cannot be one
            raise explain(error, self.stage, settings) from None
        while self.stage == CONNACK:
            self.wait()
        tell(settings, "CONNACK from %s, %s", settings.broker, self.security())

    def security(self) -> str:
        """Tell of its TLS, for a person."""
        return describe(self._client.socket())

    def subscribe(self, *topics: str) -> None:
        """Subscribe at QoS 1, in one packet; wait for the SUBACK. ProgramError for a refusal."""
        if refused := self.refused(*topics):
            raise refused_topics(self._settings, refused)
        tell(self._settings, "SUBACK for %s", " and ".join(topics))

    def refused(self, *topics: str) -> Sequence[str]:
        """Do as subscribe() does, but return which topics the broker has refused."""
        self._granted = None
        self._client.subscribe([(topic, QOS) for topic in topics])
        while self._granted is None:
            self.wait()
        if self._granted == [QOS] * len(topics):
            return []
        codes = zip(topics, self._granted, strict=False)
        return [topic for topic, code in codes if code != QOS] or topics

    def unsubscribe(self, topic: str) -> None:
        """Let the broker send nothing more of a topic; what is under way still comes."""
        self._client.unsubscribe(topic)

    def publish(
        self,
        topic: str,
        payload: bytes,
        retain: bool = False,
        receipt: Callable[[], None] | None = None,
    ) -> bool:
        """Publish at QoS 1. False: too large, too much in flight, or no broker.

        :param receipt: what outbox.receipts gets when the broker has acknowledged it, if anything
        """
        return self.outbox.has_room(len(payload)) and self._network.publish(
            self.outbox, topic, payload, retain, receipt
        )

    def flush(self) -> None:
        """Wait until the broker has acknowledged all that was published."""
        while self.outbox:
            self.wait()
            self.inbox.clear()  # nobody takes them any more

    def pause(self, is_paused: bool) -> None:
        """Leave in the inbox what comes, and let the broker wait for acknowledgements, or go on."""
        self._network.is_paused = is_paused

    def next_message(self) -> Message:
        """Wait for a message, and take it. ProgramError: the connection has ended."""
        while not self.inbox:
            self.wait()
        return self.inbox.take()

    def discard(self) -> None:
        """Drop the messages that are here already."""
        self.inbox.clear()
        while self._network.has_more():
            self.wait()
            self.inbox.clear()


class PatientConnection(Connection):
    """A connection whose messages are acknowledged when that is said, and not before."""

    def acknowledge(self, messages: Iterable[Message]) -> None:
        """Acknowledge messages: they need never come again."""
        self._network.owed += [message.mid for message in messages if message.mid]

    def _on_message(self, client: object, userdata: object, message: Any) -> None:
        mid = message.mid if message.qos else 0
        received = Message(message.topic, bytes(message.payload), message.retain, mid)
        if not self.inbox.put(received):
            # Else nobody would, and a broker sends nothing more beside too many of those.
            self.acknowledge([received])


@functools.cache
def load_paho() -> None:
    """Import paho, without what it needs for proxies only: a third of the time that it takes.

    It asks urllib.request for the proxy of the environment, and that only where PySocks is there.
    """
    with postponed("urllib.request"):
        import paho.mqtt.client  # noqa: F401


def new_client(settings: Settings, will: tuple[str, bytes] | None) -> paho.Client:
    """Return a client that sends all at once, and is told when to acknowledge."""
    load_paho()
    import paho.mqtt.client as paho
    from paho.mqtt.enums import CallbackAPIVersion

    client = paho.Client(CallbackAPIVersion.VERSION2, settings.id, manual_ack=True)
    client.max_inflight_messages_set(0)  # all are sent at once ...
    client.max_queued_messages_set(MAX_IN_FLIGHT)  # ... and no more than these are taken
    client.connect_timeout = settings.timeout
    if settings.username:
        client.username_pw_set(settings.username, settings.password)  # type: ignore[arg-type]
    if will:
        client.will_set(*will, QOS, retain=True)
    return client


def tell(settings: Settings, text: str, *values: object) -> None:
    """Log for a person what has happened; to a responder, whose log has events, its own do."""
    if not settings.respond:
        log().info(text, *values)


def refuse(error: ProgramError, *arguments: object) -> NoReturn:
    """Raise an error instead of what paho would do."""
    raise error


def keepalive(settings: Settings) -> int:
    """Return the seconds of silence after which the broker is asked for a sign of life."""
    if settings.respond:
        return KEEPALIVE
    # A client's deadline counts: a large message may be long on its way.
    return min(MAX_KEEPALIVE, max(KEEPALIVE, int(settings.timeout) + 1))


def is_decrypted(sock: Any) -> bool:
    """Tell whether TLS has decrypted more than was read."""
    return hasattr(sock, "pending") and sock.pending() > 0


def acknowledge_at_once(sock: Any) -> None:
    """Make TCP acknowledge what has just come, where it can (Linux).

    mosquitto by default leaves Nagle's algorithm on: its next small packet waits for the
    acknowledgement of the last one, which TCP would delay by 40 ms.
    """
    if hasattr(socket, "TCP_QUICKACK"):
        with contextlib.suppress(OSError):  # the connection has ended
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)


def backoff() -> Iterator[float]:
    """Yield the seconds to wait before each further attempt to connect: doubling, with jitter."""
    import random

    ceiling = FIRST_DELAY
    while True:
        ceiling = min(2 * ceiling, LAST_DELAY)
        yield random.uniform(ceiling / 2, ceiling)
