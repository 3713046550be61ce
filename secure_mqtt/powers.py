"""Powers in the lab's group, which take long: made ahead, or when somebody waits for them."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from typing import Any

from crypto import CryptoError, DhKeyPair
from secure_mqtt.keyring import Key
from secure_mqtt.pool import Pool

STOCK = 32  # key pairs made ahead, so that this many clients can come at once
AT_A_TIME = 4  # key pairs in a chore
MAX_UNHURRIED = 1_000  # keys that are derived when nothing else is to do; older ones only on demand


class Powers:
    """Key pairs for exchanges to come, and the keys of those that were."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._key_pairs: deque[DhKeyPair] = deque()
        self._ordered = 0  # key pairs that are being made
        self._unhurried: deque[Key] = deque(maxlen=MAX_UNHURRIED)  # newest last

    @property
    def has_key_pair(self) -> bool:
        """Whether there is a key pair that no exchange has used."""
        return bool(self._key_pairs)

    def take_key_pair(self) -> DhKeyPair | None:
        """Return a key pair that no exchange has used, if there is one."""
        return self._key_pairs.popleft() if self._key_pairs else None

    def add(self, key: Key) -> None:
        """Derive a key when there is time."""
        self._unhurried.append(key)

    def derive(self, key: Key, then: Callable[[Callable[[], Any]], None]) -> None:
        """Let an idle worker derive a key.

        :param then: takes what returns its cipher
        """
        coming, key.coming = key.coming, None
        self._pool.give(then, "derive", coming)

    def next_unhurried(self) -> Key | None:
        """Return the newest key that nobody has begun to derive, if there is one."""
        while self._unhurried:
            key = self._unhurried.pop()
            if key.coming:
                return key
        return None

    def needs_key_pairs(self, share: float) -> bool:
        """Tell whether less than a share of the stock is there or under way."""
        return len(self._key_pairs) + self._ordered < share * STOCK

    def make_key_pairs(self) -> None:
        """Let an idle worker make some."""
        self._ordered += AT_A_TIME
        self._pool.give(self._take_key_pairs, "make_key_pairs", AT_A_TIME)

    def _take_key_pairs(self, result: Callable[[], Any]) -> None:
        self._ordered -= AT_A_TIME
        with contextlib.suppress(CryptoError):  # the worker lacks memory, or the like
            self._key_pairs += result()
