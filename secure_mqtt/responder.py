"""The responder: answers key exchanges and requests."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any, NamedTuple

from crypto import CryptoError, DhKeyPair, TokenError, read_group, read_public_key
from secure_mqtt.actions import KEY_EXCHANGE, NETID, REQUEST, RESPONSE, TRANSFORMATIONS
from secure_mqtt.connection import Connection, Message, backoff
from secure_mqtt.errors import ProgramError, UnusableError
from secure_mqtt.log import event
from secure_mqtt.settings import Settings, peer_security
from secure_mqtt.streams import is_utf8
from secure_mqtt.suites import LAB, Cipher, LabCipher, Transcript, load_suites, suite_of
from secure_mqtt.workers import Worker, WorkerError

# What goes beyond a bound is dropped, with a warning, or forgotten, without one.
MAX_NETIDS = 10_000  # the least recently used is forgotten first
KEYS_PER_NETID = 8  # so many clients can use a NetID at the same time
KEY_LIFETIME = 60.0  # seconds without use until a key is forgotten that has a successor
MAX_KNOWN_TOKENS = 200  # of a key: the requests until our client renews it, and the responses
TOKEN_END = 44  # characters: 31 bytes at least of a token's HMAC-SHA256, which no other has
MAX_WAITING = 1_000  # NetIDs whose key exchanges wait for their turn
KEY_PAIR_STOCK = 32  # made ahead, so that this many clients can come at once
REPORT_INTERVAL = 1.0  # seconds between warnings of how much was dropped
MAX_REPORTS = 100  # messages that are ignored in that time, and named; more are only counted
STATUS_INTERVAL = 30.0  # seconds
OFFLINE = b'{"status": "offline"}'
DRAINING_TIME = 5.0  # seconds to finish what is being answered when told to stop


# --- what is kept of a NetID -------------------------------------------------------------------


class Incoming(NamedTuple):
    """A key exchange or request."""

    netid: str
    action: str
    payload: bytes
    arrived: float  # of time.monotonic()


class WaitingExchange(NamedTuple):
    """A key exchange in the suite dh4096, which waits for a worker."""

    request: Incoming
    peer_value: int


class Key:
    """A key that some client of a NetID has."""

    __slots__ = ("_known", "_number", "cipher", "used")

    def __init__(self, cipher: Cipher) -> None:
        """Take the cipher of an exchange."""
        self.cipher = cipher
        self.used = time.monotonic()
        self._number = -1  # of the last request, if the suite numbers them
        self._known: OrderedDict[bytes, None] = OrderedDict()  # else the ends of tokens, in order

    def open(self, topic: str, message: bytes) -> tuple[int | None, bytes]:
        """Return a request's number and plaintext. CryptoError if it is unusable.

        Each is opened once, and no response is. Else a broker that sends it again had another
        answer, which a client of the lab's protocol would take for that to its next request.
        """
        number, text = self.cipher.open(topic, message)
        if not self._remember(number, message):
            raise UnusableError("out of order, or here before")
        self.used = time.monotonic()
        return number, text

    def seal(self, topic: str, number: int | None, text: bytes) -> bytes:
        """Return the response to a request of that number."""
        message = self.cipher.seal(topic, number or 0, text)
        self._remember(number, message)
        return message

    def _remember(self, number: int | None, message: bytes) -> bool:
        """Tell whether a message is new, from now on no more."""
        if number is not None:
            is_new = number > self._number
            self._number = max(number, self._number)
            return is_new
        end = message[-TOKEN_END:]
        is_new = end not in self._known
        self._known[end] = None
        if len(self._known) > MAX_KNOWN_TOKENS:
            self._known.popitem(last=False)
        return is_new


class Keys:
    """What the responder keeps of one NetID."""

    __slots__ = ("coming", "live", "parked")

    def __init__(self) -> None:
        self.live: list[Key] = []  # newest first
        self.coming = 0  # those being computed
        self.parked: list[Incoming] = []  # requests that may be for one of those

    def add(self, cipher: Cipher) -> None:
        """Take a new key, and forget old ones."""
        in_use = time.monotonic() - KEY_LIFETIME
        self.live = [Key(cipher), *(key for key in self.live if key.used > in_use)]
        del self.live[KEYS_PER_NETID:]

    def open(self, topic: str, message: bytes) -> tuple[Key, int | None, bytes]:
        """Return a request's plaintext, after the key that opens it and its number.

        :raises UnusableError: no key opens it, or it was here before
        """
        for key in self.live:
            with contextlib.suppress(TokenError):
                return key, *key.open(topic, message)
        raise UnusableError("not encrypted with a key of this NetID")


# --- the responder -----------------------------------------------------------------------------


class Calculator:
    """What a Worker does for a responder, in the suite dh4096."""

    def __init__(self) -> None:
        LAB.load()

    def make_key_pair(self) -> tuple[None, DhKeyPair]:
        """Return a new key pair."""
        return None, DhKeyPair()

    def derive(self, key_pair: DhKeyPair, peer_value: int) -> tuple[bytes, DhKeyPair]:
        """Return the key of an exchange, and a new key pair for the next one."""
        return key_pair.derive(peer_value), DhKeyPair()


class Responder:
    """Answers key exchanges and requests.

    All of it happens in run(), one after the other. Only powers are left to other processes, since
    they would keep everything else waiting.
    """

    def __init__(self, settings: Settings, on_ready: Callable[[], None]) -> None:
        """Prepare a responder; to be done before there are threads.

        :param on_ready: called after each subscription
        """
        read_group()
        self._identity, self._authority = peer_security(settings)
        self._settings = settings
        self._on_ready = on_ready
        # More than processors, so that none is without work while this process is busy.
        self._idle = [Worker(Calculator) for _ in range(2 + (os.cpu_count() or 1))]
        self._busy: dict[Worker, Keys | None] = {}  # whose key it computes
        self._key_pairs: deque[DhKeyPair] = deque()
        load_suites()
        self._mqtt: Connection
        self._stopping, self._stop = socket.socketpair()
        self._is_stopped = self._is_connected = False
        self._end = float("inf")
        self._netids: OrderedDict[str, Keys] = OrderedDict()  # least recently used first
        self._waiting: OrderedDict[str, deque[WaitingExchange]] = OrderedDict()  # by NetID
        self._counts = {"exchanges": 0, "requests": 0, "failures": 0}
        self._started = time.monotonic()
        self._status_at = float("inf")  # not before the first subscription
        self._dropped = self._ignored = 0  # messages since the last report
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
            except WorkerError:
                hint = "start the responder again; the machine may be short of memory"
                raise ProgramError("a process of the responder was ended", hint) from None
            except ProgramError as error:
                if error.is_final:
                    raise
                event("disconnected", is_warning=True, reason=str(error))
            self._is_connected = False
            if not self._is_stopped:
                select.select([self._stopping], [], [], next(delays))

    def stop(self) -> None:
        """Make run() finish what is being answered and return; safe in a signal handler."""
        self._is_stopped = True
        draining_time = DRAINING_TIME if self._is_connected else 0
        self._end = min(self._end, time.monotonic() + draining_time)
        self._stop.close()  # wakes who waits for the other end

    def end(self) -> float:
        """Return when it is to be left as it is, of time.monotonic()."""
        return self._end

    def _serve(self) -> None:
        settings = self._settings
        self._mqtt.subscribe(REQUEST.format(settings.netid or "+", "+"))
        self._mqtt.stage = "requests"
        self._is_connected = True
        self._status_at = time.monotonic() if settings.status_topic else float("inf")
        self._on_ready()
        self._give_tasks()
        while not self._is_stopped:
            self._go_on(self._stopping)
        while self._waiting or any(self._busy.values()):
            self._go_on()
        if settings.status_topic:
            self._mqtt.publish(settings.status_topic, OFFLINE, retain=True)
        self._mqtt.flush()

    def _go_on(self, *others: Any) -> None:
        """Do what there is to do now, or comes in the next moment."""
        now = time.monotonic()
        if now >= self._report_at:
            self._report_losses(now)
        if now >= self._status_at:
            self._publish_status(now)
        for worker in self._mqtt.wait(others=[*self._idle, *self._busy, *others]):
            if worker not in others:
                self._take_result(worker)
        while self._mqtt.inbox:
            self._receive(self._mqtt.inbox.take())

    def _report_losses(self, now: float) -> None:
        """Say how much was dropped, or ignored without a line of its own."""
        inbox = self._mqtt.inbox
        self._dropped, inbox.dropped = self._dropped + inbox.dropped, 0
        if not (self._dropped or self._ignored):
            return
        if self._dropped:
            event("dropped", is_warning=True, count=self._dropped, reason="too many at a time")
        if self._ignored > MAX_REPORTS:
            count = self._ignored - MAX_REPORTS
            event("ignored", is_warning=True, count=count, reason="and more")
        self._dropped = self._ignored = 0
        self._report_at = now + REPORT_INTERVAL

    def _publish_status(self, now: float) -> None:
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
        except CryptoError as error:
            self._ignore(request, str(error))

    def _ignore(self, request: Incoming, reason: str) -> None:
        self._counts["failures"] += 1
        self._ignored += 1
        if self._ignored > MAX_REPORTS:  # a flood shall not fill the disk
            return
        names = {"netid": request.netid[:64], "action": request.action[:64]}  # a peer chose them
        event("ignored", is_warning=True, **names, reason=reason)

    def _publish(self, request: Incoming, payload: bytes) -> None:
        if not self._mqtt.publish(RESPONSE.format(request.netid, request.action), payload):
            raise UnusableError("the broker does not take the answer")
        self._counts["exchanges" if request.action == KEY_EXCHANGE else "requests"] += 1
        milliseconds = (time.monotonic() - request.arrived) * 1000
        event(
            "answered",
            netid=request.netid,
            action=request.action,
            ms=round(milliseconds, 1),
            bytes=len(request.payload),
        )

    def _exchange(self, request: Incoming) -> None:
        """Answer a key exchange now, or let it wait for its turn; CryptoError if it is unusable."""
        suite = suite_of(request.payload)
        if self._authority:
            self._authority.verify(request.payload, request.netid, request.netid)
        if suite.prepare:
            self._enqueue(WaitingExchange(request, read_public_key(request.payload)))
            return
        its_keys = suite.responder(request.payload)
        response = self._response(request, its_keys.blocks)
        transcript = Transcript(request.netid, request.payload, response)
        cipher = its_keys.agree(transcript)
        self._publish(request, response)
        self._keys(request.netid).add(cipher)

    def _response(self, request: Incoming, blocks: bytes) -> bytes:
        """Return the payload of message 2."""
        if not self._identity:
            return blocks
        return self._identity.sign(blocks, request.netid, request.payload)

    def _keys(self, netid: str) -> Keys:
        """Return what is kept of a NetID, new if need be, which is now the most recently used."""
        keys = self._netids.setdefault(netid, Keys())
        self._netids.move_to_end(netid)
        if len(self._netids) > MAX_NETIDS:
            self._netids.popitem(last=False)
        return keys

    def _enqueue(self, exchange: WaitingExchange) -> None:
        """Let a key exchange wait in a short queue of its NetID, so that none delays the others."""
        netid = exchange.request.netid
        exchanges = self._waiting.get(netid, deque())
        if len(exchanges) < KEYS_PER_NETID and len(self._waiting) < MAX_WAITING:
            exchanges.append(exchange)
            self._waiting[netid] = exchanges
            self._give_tasks()
        else:
            self._dropped += 1

    def _give_tasks(self) -> None:
        """Let idle workers go on with key exchanges, one of each NetID in turn, or make ready."""
        while self._idle:
            if self._waiting and self._key_pairs:
                netid, exchanges = self._waiting.popitem(last=False)
                if len(exchanges) > 1:
                    self._waiting[netid] = exchanges
                self._begin(exchanges.popleft())
            elif len(self._key_pairs) + len(self._busy) < KEY_PAIR_STOCK:
                self._give_task(None, "make_key_pair")
            else:
                break

    def _give_task(self, keys: Keys | None, task: str, *arguments: Any) -> None:
        worker = self._idle.pop()
        worker.send(task, *arguments)
        self._busy[worker] = keys

    def _begin(self, exchange: WaitingExchange) -> None:
        request = exchange.request
        key_pair = self._key_pairs.popleft()
        response = self._response(request, key_pair.public_key)
        self._attempt(lambda request: self._publish(request, response), request)
        keys = self._keys(request.netid)
        keys.coming += 1
        self._give_task(keys, "derive", key_pair, exchange.peer_value)

    def _take_result(self, worker: Worker) -> None:
        key, key_pair = worker.receive()
        keys = self._busy.pop(worker)
        self._idle.append(worker)
        self._key_pairs.append(key_pair)
        self._give_tasks()
        if keys:
            keys.coming -= 1
            keys.add(LabCipher(key))
            parked, keys.parked = keys.parked, []
            for request in parked:
                self._attempt(self._answer, request)

    def _answer(self, request: Incoming) -> None:
        """Answer a request. CryptoError if it is unusable."""
        if request.action not in TRANSFORMATIONS:
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
        answer = TRANSFORMATIONS[request.action](text.decode()).encode()
        self._publish(request, key.seal(RESPONSE.format(*names), number, answer))
