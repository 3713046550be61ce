"""Where a responder's work is done: exchanges and requests are answered here, NetIDs in turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from heapq import heappop, heappush
from typing import Any

from crypto import MAX_KEY_FILE_SIZE, CryptoError, TokenError, token_size
from secure_mqtt.actions import KEY_EXCHANGE, NETID, REQUEST, RESPONSE, TRANSFORMATIONS
from secure_mqtt.chores import Answer, Credentials, Reply, answer_exchange, seal_answer
from secure_mqtt.connection import Message
from secure_mqtt.errors import UnusableError
from secure_mqtt.keyring import MAX_TEXT, Key, Keyring
from secure_mqtt.pool import Pool
from secure_mqtt.powers import Powers
from secure_mqtt.replays import Replays
from secure_mqtt.reports import NO_KEY, Reports
from secure_mqtt.suites import suite_of
from secure_mqtt.turns import Hold, Incoming, Turns
from secure_mqtt.workers import Worker, WorkerError

MAX_INLINE = 2**13  # bytes of a request that is answered here; a larger one would take too long


class Desk:
    """Answers messages.

    What takes long is left to workers: powers, signatures, long texts. A NetID whose message needs
    a worker waits until one is idle.
    """

    def __init__(self, netid: str, reports: Reports) -> None:
        """Prepare to answer one NetID or, if that is empty, all; before there are threads."""
        self.publish: Callable[[str, bytes], None]  # raises UnusableError
        self.keyring = Keyring()
        self.pool = Pool()
        self._credentials = Credentials()
        self._netid = netid
        self._reports = reports
        self._turns = Turns()
        self._powers = Powers(self.pool)
        # NetIDs that want a worker, as a heap: by rank, then in the order in which they came.
        self._waiting: list[tuple[int, int, str]] = []
        self._waited = 0  # NetIDs so far
        self._replays = Replays()

    @property
    def is_busy(self) -> bool:
        """Whether there is anything to be finished."""
        return self._turns.has_next or bool(self._waiting) or self.pool.is_busy

    def use(self, credentials: Credentials) -> None:
        """Sign and verify with these from now on.

        No key outlives the authorities under which it was agreed: one of them may have been
        replaced because a key was stolen.
        """
        if credentials.authority != self._credentials.authority:
            self.keyring.clear()
        self._credentials = credentials

    def receive(self, message: Message) -> None:
        """Take a message in, to be answered when it is its NetID's turn."""
        netid, action, suffix, *_ = (*message.topic.split("/", 2), "", "")
        incoming = Incoming(netid, action, message.payload, time.monotonic())
        is_ours = NETID.fullmatch(netid) and self._netid in ("", netid)
        if not is_ours or suffix != "request" or message.is_retained:
            problem = "retained, or on a topic that was not subscribed to"
            self._reports.ignored(incoming, problem)
        elif action == KEY_EXCHANGE and len(message.payload) > MAX_KEY_FILE_SIZE:
            self._reports.ignored(incoming, "no valid public key: larger than 64 KiB")
        elif len(message.payload) > token_size(MAX_TEXT):
            self._reports.ignored(incoming, "a text of more than 1 MiB")
        else:
            self._turns.put(incoming)

    def work(self, end: float) -> bool:
        """Answer messages for a while.

        :param end: until when, of time.monotonic()
        :return: whether there is more to be done at once
        """
        self._employ()
        while self._turns.has_next and time.monotonic() < end:
            self._handle(self._turns.take())
        self._reports.dropped(self._turns.take_dropped())
        return self._turns.has_next

    def take_result(self, worker: Worker) -> None:
        """Go on with what a worker has done. WorkerError if the worker was ended."""
        self.pool.take_result(worker)
        self._employ()

    def _handle(self, message: Incoming) -> None:
        is_exchange = message.action == KEY_EXCHANGE
        self._attempt(message, self._exchange if is_exchange else self._request)

    def _attempt(self, message: Incoming, action: Callable[..., None], *arguments: Any) -> None:
        """Do something for a message, and ignore it if that can't be done."""
        try:
            action(message, *arguments)
        except CryptoError as error:
            self._reports.ignored(message, str(error))
        except WorkerError:
            raise
        except Exception as error:  # no message ends the responder
            self._reports.ignored(message, f"it raised {type(error).__name__}")

    def _publish(self, message: Incoming, payload: bytes) -> None:
        self.publish(RESPONSE.format(message.netid, message.action), payload)
        self._reports.answered(message)

    # --- workers -------------------------------------------------------------------------------

    def _employ(self) -> None:
        """Give idle workers what there is to do: for those who wait, then ahead."""
        while self.pool.has_idle:
            if self._waiting:
                *_, netid = heappop(self._waiting)
                if self._turns.release(netid, Hold.WORKER):
                    self._handle(self._turns.take())
            elif self._powers.needs_key_pairs(0.5):
                self._powers.make_key_pairs()
            elif key := self._powers.next_unhurried():
                self._derive(key)
            elif self._powers.needs_key_pairs(1):
                self._powers.make_key_pairs()
            else:
                break

    def _wait_for_worker(self, message: Incoming) -> None:
        self._turns.hold(message.netid, Hold.WORKER, message)
        self._waited += 1
        heappush(self._waiting, (self._rank(message), self._waited, message.netid))

    def _rank(self, message: Incoming) -> int:
        """Return how much a message is to be kept waiting: 0 is what any honest client sends."""
        unused = self.keyring.unproven(message.netid)
        if message.action == KEY_EXCHANGE:
            return unused
        # A request may be for one of them. A long text takes as long as many powers.
        return max(0, unused - 1) + (len(message.payload) > MAX_INLINE)

    # --- exchanges -----------------------------------------------------------------------------

    def _exchange(self, message: Incoming) -> None:
        """Answer a key exchange, or let a worker do it. CryptoError if it is unusable."""
        netid, payload = message.netid, message.payload
        suite = suite_of(payload)
        if self._credentials.authority:
            self._replays.check(payload)
        key_pair = self._powers.take_key_pair() if suite.is_slow else None
        work = netid, payload, self._credentials, key_pair
        if any(self._credentials) or (suite.is_slow and not key_pair):
            if not self.pool.has_idle:
                self._wait_for_worker(message)
                return
            finish = partial(self._attempt, message, self._finish_exchange)
            self.pool.give(finish, "exchange", *work)
        else:
            self._finish_exchange(message, partial(answer_exchange, *work))

    def _finish_exchange(self, message: Incoming, result: Callable[[], Answer]) -> None:
        """Send the answer, and keep the key."""
        answer = result()
        if self._credentials.authority:
            self._replays.check(message.payload)
            self._replays.add(message.payload)
        self._publish(message, answer.response)
        key = Key(message.netid, answer.cipher, answer.coming, answer.expires)
        self.keyring.add(key)
        if answer.coming:
            self._powers.add(key)

    # --- requests ------------------------------------------------------------------------------

    def _request(self, message: Incoming) -> None:
        """Answer a request, or let a worker do it. CryptoError if it is unusable."""
        netid, action, payload = message.netid, message.action, message.payload
        if action not in TRANSFORMATIONS:
            raise UnusableError("unknown action")
        if len(payload) > MAX_INLINE:
            self._request_at_worker(message)
            return
        try:
            opened = self.keyring.open(netid, REQUEST.format(netid, action), payload)
        except TokenError:
            if not self._await_key(message):
                raise
            return
        answer = seal_answer(netid, action, opened.cipher, opened.number, opened.text)
        self.keyring.note_answer(opened.key, opened.number, answer)
        self._publish(message, answer)

    def _request_at_worker(self, message: Incoming) -> None:
        if self._await_key(message):
            return
        able = self.keyring.able(message.netid, len(message.payload))
        if not able:
            raise TokenError(NO_KEY)
        if not self.pool.has_idle:
            self._wait_for_worker(message)
            return
        self._turns.hold(message.netid, Hold.ANSWER)  # the numbers of its requests must rise
        keys, ciphers = zip(*able, strict=True)
        finish = partial(self._attempt, message, self._finish_request, keys)
        self.pool.give(finish, "answer", message.netid, message.action, message.payload, ciphers)

    def _finish_request(
        self, message: Incoming, keys: tuple[Key, ...], result: Callable[[], Reply]
    ) -> None:
        """Send what a worker has made, unless the request was here before."""
        self._turns.release(message.netid, Hold.ANSWER)
        reply = result()
        key = keys[reply.place]
        self.keyring.use(key, reply.number, message.payload)
        self.keyring.note_answer(key, reply.number, reply.message)
        self._publish(message, reply.message)

    def _await_key(self, message: Incoming) -> bool:
        """Let a request wait if it may be for a key that is to be derived; tell whether it does."""
        coming = [key for key in self.keyring.of(message.netid) if not key.cipher]
        to_derive = [key for key in coming if key.coming]
        if to_derive and not self.pool.has_idle:
            self._wait_for_worker(message)
        elif coming:
            self._turns.hold(message.netid, Hold.KEY, message)
            if to_derive:
                self._derive(to_derive[0])
        return bool(coming)

    def _derive(self, key: Key) -> None:
        self._powers.derive(key, partial(self._finish_derivation, key))

    def _finish_derivation(self, key: Key, result: Callable[[], Any]) -> None:
        try:
            key.cipher = result()
        except CryptoError:  # it was checked before: the worker lacks memory, or the like
            self.keyring.forget(key)
        self._turns.release(key.netid, Hold.KEY)
