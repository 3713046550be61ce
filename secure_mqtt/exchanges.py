"""How a responder answers key exchanges."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from secure_mqtt.chores import Answer, Credentials, answer_exchange
from secure_mqtt.errors import UnusableError
from secure_mqtt.keyring import Key, Keyring
from secure_mqtt.labour import Labour
from secure_mqtt.replays import Replays
from secure_mqtt.replies import Replies
from secure_mqtt.suites import suite_of
from secure_mqtt.turns import Incoming


class Exchanges:
    """Answers key exchanges here, or lets a worker do it if signatures or powers take long."""

    def __init__(self, keyring: Keyring, labour: Labour, replies: Replies) -> None:
        self._credentials = Credentials()
        self._replays = Replays()
        self._keyring = keyring
        self._labour = labour
        self._replies = replies

    def use(self, credentials: Credentials) -> None:
        """Sign and verify with these from now on.

        No key outlives the authorities under which it was agreed: one of them may have been
        replaced because a key was stolen.
        """
        if credentials.authority != self._credentials.authority:
            self._keyring.clear()
        self._credentials = credentials

    def answer(self, message: Incoming) -> None:
        """Answer message 1, or let it wait. CryptoError if it is unusable."""
        suite = suite_of(message.payload)
        if self._credentials.authority:
            self._replays.check(message.payload)
        pool, powers = self._labour.pool, self._labour.powers
        takes_long = any(self._credentials) or (suite.is_slow and not powers.has_key_pair)
        if takes_long and not pool.has_idle:
            self._labour.wait_for_worker(message)
            return
        key_pair = powers.take_key_pair() if suite.is_slow else None
        work = message.netid, message.payload, self._credentials, key_pair
        finish = partial(self._finish, self._credentials)
        if takes_long:
            pool.give(partial(self._replies.attempt, message, finish), "exchange", *work)
        else:
            finish(message, partial(answer_exchange, *work))

    def _finish(
        self, credentials: Credentials, message: Incoming, result: Callable[[], Answer]
    ) -> None:
        """Send the answer, and keep the key."""
        answer = result()
        if credentials.authority != self._credentials.authority:
            raise UnusableError("the authorities have changed meanwhile")
        if credentials.authority:
            self._replays.add(self._replays.check(message.payload))
        self._replies.send(message, answer.response)
        key = Key(message.netid, answer.cipher, answer.coming, answer.expires)
        self._keyring.add(key)
        if answer.coming:
            self._labour.powers.add(key)
