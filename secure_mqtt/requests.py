"""How a responder answers requests."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from crypto import CryptoError, TokenError
from secure_mqtt.actions import REQUEST, TRANSFORMATIONS
from secure_mqtt.chores import Reply, seal_answer
from secure_mqtt.errors import UnusableError
from secure_mqtt.keyring import Key, Keyring
from secure_mqtt.labour import MAX_INLINE, Labour
from secure_mqtt.replies import Replies
from secure_mqtt.reports import NO_KEY
from secure_mqtt.turns import Hold, Incoming


class Requests:
    """Answers requests here, or lets a worker do it if they are large."""

    def __init__(self, keyring: Keyring, labour: Labour, replies: Replies) -> None:
        self._keyring = keyring
        self._labour = labour
        self._replies = replies

    def answer(self, message: Incoming) -> None:
        """Answer a request, or let it wait. CryptoError if it is unusable."""
        netid, action, payload = message.netid, message.action, message.payload
        if action not in TRANSFORMATIONS:
            raise UnusableError("unknown action")
        if len(payload) > MAX_INLINE:
            self._answer_at_worker(message)
            return
        try:
            opened = self._keyring.open(netid, REQUEST.format(netid, action), payload)
        except TokenError:
            if not self._await_key(message):
                raise
            return
        answer = seal_answer(netid, action, opened.cipher, opened.number, opened.text)
        self._keyring.note_answer(opened.key, opened.number, answer)
        self._replies.send(message, answer)

    def derive(self, key: Key) -> None:
        """Let an idle worker derive a key."""
        self._labour.powers.derive(key, partial(self._finish_derivation, key))

    def _answer_at_worker(self, message: Incoming) -> None:
        if self._await_key(message):
            return
        able = [*self._keyring.able(message.netid, len(message.payload))]
        if not able:
            raise TokenError(NO_KEY)
        if not self._labour.pool.has_idle:
            self._labour.wait_for_worker(message)
            return
        self._labour.turns.hold(message.netid, Hold.ANSWER)  # the numbers of its requests must rise
        keys, ciphers = zip(*able, strict=True)
        then = partial(self._replies.attempt, message, self._finish, keys)
        work = message.netid, message.action, message.payload, ciphers
        self._labour.pool.give(then, "answer", *work)

    def _finish(
        self, message: Incoming, keys: tuple[Key, ...], result: Callable[[], Reply]
    ) -> None:
        """Send what a worker has made, unless the request was here before."""
        self._labour.turns.release(message.netid, Hold.ANSWER)
        reply = result()
        key = keys[reply.place]
        self._keyring.use(key, reply.number, message.payload)
        self._keyring.note_answer(key, reply.number, reply.message)
        self._replies.send(message, reply.message)

    def _await_key(self, message: Incoming) -> bool:
        """Let a request wait if it may be for a key that is to be derived; tell whether it does."""
        coming = [key for key in self._keyring.of(message.netid) if not key.cipher]
        to_derive = [key for key in coming if key.coming]
        if to_derive and not self._labour.pool.has_idle:
            self._labour.wait_for_worker(message)
        elif coming:
            self._labour.turns.hold(message.netid, Hold.KEY, message)
            if to_derive:
                self.derive(to_derive[0])
        return bool(coming)

    def _finish_derivation(self, key: Key, result: Callable[[], Any]) -> None:
        try:
            key.cipher = result()
        except CryptoError:  # it was checked before: the worker lacks memory, or the like
            self._keyring.forget(key)
        self._labour.turns.release(key.netid, Hold.KEY)
