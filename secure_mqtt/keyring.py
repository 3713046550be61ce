"""What a responder keeps of its NetIDs: keys, and for how long."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator
from typing import NamedTuple

from crypto import TokenError
from secure_mqtt.actions import MAX_TEXT
from secure_mqtt.errors import UnusableError
from secure_mqtt.suites import LAB, Cipher, GcmCipher, LabResponder

KEYS_PER_NETID = 8  # so many clients can use a NetID at the same time
MAX_PROVEN = 80_000  # keys that have opened a request, of all NetIDs
MAX_UNPROVEN = 10_000  # keys that have not: anyone can make them, also in another's NetID
LIFETIME = 60.0  # seconds since its last use until a key is forgotten that has a successor
MAX_LIFETIME = 3600.0  # seconds since its last use until any key is forgotten
SWEEPS = 10  # calls of sweep() after which it has looked at all keys

# What is remembered of a token: 16 characters, 96 bits, of its HMAC, which no other token has.
TOKEN_END = slice(-20, -4)
TOKEN_SIZE = 16  # bytes
MAX_TOKENS = 200  # of a key: the requests until our client renews it, and the responses
MAX_TOKEN_BYTES = 2**25  # of all keys


class Key:
    """A key that some client of a NetID has."""

    __slots__ = (
        *("_number", "cipher", "coming", "expires", "is_proven", "netid"),
        *("suite", "tokens", "used"),
    )

    def __init__(
        self,
        netid: str,
        cipher: Cipher | None,
        coming: LabResponder | None = None,
        expires: float = float("inf"),
        suite: str = LAB.name,
    ) -> None:
        """Take what an exchange has yielded.

        :param coming: what the cipher can be derived from, if that is still to be done
        :param expires: when the certificate under which it was made ends, of time.time()
        :param suite: the name of the suite in which it was made
        """
        self.netid = netid
        self.cipher = cipher
        self.coming = coming
        self.expires = expires
        self.suite = suite
        self.used = time.monotonic()
        self.is_proven = False  # whether it has opened a request
        self.tokens = bytearray()  # what is remembered of those that came and went, in order
        self._number = -1  # of the last request, if the suite numbers them

    def remember(self, number: int | None, message: bytes) -> bool:
        """Tell whether a message that was opened or sealed is new, from now on no more.

        A request is opened once, and no response is. Else a broker that sends it again had another
        answer, which a client of the lab's protocol would take for that to its next request.
        """
        if number is not None:
            is_new = number > self._number
            self._number = max(number, self._number)
            return is_new
        end = message[TOKEN_END]
        is_new = end not in self.tokens
        if is_new:
            self.tokens += end
            if len(self.tokens) > MAX_TOKENS * TOKEN_SIZE:
                del self.tokens[:TOKEN_SIZE]
        return is_new


class Opened(NamedTuple):
    """A request that was opened."""

    key: Key
    cipher: Cipher
    number: int | None  # if the suite numbers requests
    text: bytes


class Keyring:
    """The keys of all NetIDs.

    One that has opened a request is never pushed out by one that has not.
    """

    def __init__(self) -> None:
        self._netids: dict[str, list[Key]] = {}  # newest first
        self._proven: OrderedDict[Key, None] = OrderedDict()  # least recently used first
        self._unproven: OrderedDict[Key, None] = OrderedDict()  # oldest first
        self._token_bytes = 0
        self._to_sweep: list[str] = []

    def __len__(self) -> int:
        """Return the number of NetIDs."""
        return len(self._netids)

    def of(self, netid: str) -> list[Key]:
        """Return the keys of a NetID, newest first."""
        return self._netids.get(netid, [])

    def unproven(self, netid: str) -> int:
        """Return how many keys of a NetID have opened no request."""
        return sum(not key.is_proven for key in self.of(netid))

    def add(self, key: Key) -> None:
        """Keep a new key."""
        keys = self._netids.setdefault(key.netid, [])
        keys.insert(0, key)
        self._unproven[key] = None
        self._limit([each for each in keys if not each.is_proven])
        if len(self._unproven) > MAX_UNPROVEN:
            self.forget(next(iter(self._unproven)))

    def open(
        self, netid: str, topic: str, message: bytes, kind: type[GcmCipher] | None = None
    ) -> Opened:
        """Open a request.

        :param kind: of the ciphers that may open it; None: any
        :raises TokenError: no key opens it
        :raises UnusableError: it was here before, or is too large
        """
        for key, cipher in self.able(netid, len(message)):
            if kind and not isinstance(cipher, kind):
                continue
            try:
                number, text = cipher.open(topic, message)
            except TokenError:
                continue
            self.use(key, number, message)
            return Opened(key, cipher, number, text)
        raise TokenError("not encrypted with a key of this NetID")

    def able(self, netid: str, size: int) -> Iterator[tuple[Key, Cipher]]:
        """Yield the keys and ciphers that may open a NetID's message, newest first.

        :param size: of the message, in bytes
        :raises UnusableError: it is too large for all of them
        """
        today = time.time()
        is_any, is_able = False, False
        for key in self.of(netid):
            if key.cipher and key.expires > today:
                is_any = True
                if size <= key.cipher.sealed_size(MAX_TEXT):
                    is_able = True
                    yield key, key.cipher
        if is_any and not is_able:
            raise UnusableError("a text of more than 1 MiB")

    def use(self, key: Key, number: int | None, message: bytes) -> None:
        """Note that a key has opened a request. UnusableError if the request was here before."""
        self._remember(key, number, message)
        key.used = time.monotonic()
        if key.is_proven:
            if key in self._proven:  # else it was forgotten meanwhile
                self._proven.move_to_end(key)
        elif key in self._unproven:
            del self._unproven[key]
            self._prove(key)

    def note_answer(self, key: Key, number: int | None, message: bytes) -> None:
        """Note how a request was answered, so that the answer is not taken for a request."""
        if number is None:  # else the directions have keys of their own
            self._remember(key, number, message)

    def _remember(self, key: Key, number: int | None, message: bytes) -> None:
        before = len(key.tokens)
        if not key.remember(number, message):
            raise UnusableError("out of order, or here before")
        if key in self._proven or key in self._unproven:  # else it was forgotten meanwhile
            self._token_bytes += len(key.tokens) - before
        if self._token_bytes > MAX_TOKEN_BYTES:  # to forget tokens, but not the key, were a replay
            self.forget(next(iter(self._proven)))

    def forget(self, key: Key) -> None:
        """Forget a key, if it is still kept."""
        keys = self._netids.get(key.netid, [])
        if key in keys:
            keys.remove(key)
            self._token_bytes -= len(key.tokens)
            if not keys:
                del self._netids[key.netid]
        self._proven.pop(key, None)
        self._unproven.pop(key, None)

    def clear(self) -> None:
        """Forget all keys."""
        for key in [*self._proven, *self._unproven]:
            self.forget(key)

    def sweep(self) -> None:
        """Forget keys whose time is over; to be called each second, it looks at a part of them."""
        if not self._to_sweep:
            self._to_sweep = [*self._netids]
        share = len(self._netids) // SWEEPS + 1
        part, self._to_sweep = self._to_sweep[:share], self._to_sweep[share:]
        for netid in part:
            for key in self._over(self.of(netid)):
                self.forget(key)

    def _over(self, keys: list[Key]) -> list[Key]:
        """Return those of a NetID's keys whose time is over."""
        now, today = time.monotonic(), time.time()
        over, has_successor = [], False
        for key in keys:
            lifetime = LIFETIME if has_successor else MAX_LIFETIME
            if now - key.used > lifetime or key.expires <= today:
                over.append(key)
            has_successor = has_successor or key.is_proven
        return over

    def _prove(self, key: Key) -> None:
        key.is_proven = True
        self._proven[key] = None
        proven = [each for each in self._netids[key.netid] if each.is_proven]
        self._limit(sorted(proven, key=lambda each: each.used, reverse=True))
        if len(self._proven) > MAX_PROVEN:
            self.forget(next(iter(self._proven)))

    def _limit(self, keys: list[Key]) -> None:
        for key in keys[KEYS_PER_NETID:]:
            self.forget(key)
