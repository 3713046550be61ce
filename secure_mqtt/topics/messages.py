"""What is published on a topic: hellos, messages and notices, as bytes.

Of the topic's members each has the same key, of an epoch. It keeps everybody else out, and derived
from it are the keys that encrypt. Who of the members has written a message is proved by a
signature inside: each process that publishes has a key pair for that, its session's, and a hello
introduces it: the session's public key, signed with the member's certificate.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING, NamedTuple

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from crypto import PUBLIC_KEY, KeyFileError, PeerKeyError, TokenError, derive_key, digest, to_pem
from secure_mqtt.signatures import Validity, join_fields
from secure_mqtt.suites import TAG_SIZE, key_blocks

if TYPE_CHECKING:
    from secure_mqtt.signatures import Authority, Identity

MESSAGE, HELLO, NOTICE = 1, 2, 3  # the first byte of a payload
HELLO_LABEL = b"secure-mqtt/1 topic hello"
MESSAGE_LABEL = b"secure-mqtt/1 topic message"
ED25519_PREFIX = bytes.fromhex("302a300506032b6570032100")  # of a SubjectPublicKeyInfo (RFC 8410)
KEY_SIZE, SIGNATURE_SIZE = 32, 64  # bytes, of Ed25519 (RFC 8032, 5.1) and, the first, of an epoch
SESSION_SIZE, EPOCH_SIZE, COUNTER_SIZE, TIME_SIZE = 16, 4, 8, 8  # bytes
NONCE_SIZE = 12  # bytes (SP 800-38D, 5.2.1.1)
NOTICE_SIZE = 1 + EPOCH_SIZE
HELLO_HEAD = NOTICE_SIZE + NONCE_SIZE
MESSAGE_HEAD = NOTICE_SIZE + SESSION_SIZE + COUNTER_SIZE
# Bytes that a message has beside its data.
OVERHEAD = MESSAGE_HEAD + TIME_SIZE + SIGNATURE_SIZE + TAG_SIZE
MAX_DATA_SIZE = 2**20  # bytes
MAX_HELLO_SIZE = 2**14  # bytes: a leaf and two intermediates of RSA 4096 have half as many
MAX_EPOCH = 2**32 - 1
END_OF_TIME = 253_402_300_800_000  # milliseconds since 1970: the year 10000, which no clock shows
# The largest and the smallest payload of each kind.
SIZES = {
    MESSAGE: (OVERHEAD, OVERHEAD + MAX_DATA_SIZE),
    HELLO: (HELLO_HEAD + TAG_SIZE, HELLO_HEAD + TAG_SIZE + MAX_HELLO_SIZE),
    NOTICE: (NOTICE_SIZE, NOTICE_SIZE),
}
# One that a certificate can name: 1 to 63 letters, digits and inner hyphens (RFC 1123, 2.1).
MEMBER = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")
TOPIC = re.compile(r"(?!\$)[^+#\x00-\x1f\x7f-\x9f\ud800-\udfff]+")
MAX_TOPIC_SIZE = 512  # bytes
RESERVED_ENDS = "/request", "/response"  # of the lab's topics


class MessageError(TokenError):
    """What came on a topic is no message, hello or notice for its members."""


class HelloError(PeerKeyError):
    """A hello does not introduce who it says it does."""


def is_topic(text: str) -> bool:
    """Tell whether a topic can be shared."""
    return (
        TOPIC.fullmatch(text) is not None
        and len(text.encode()) <= MAX_TOPIC_SIZE
        and not text.endswith(RESERVED_ENDS)
    )


class Head(NamedTuple):
    """What a payload says without a key."""

    kind: int  # MESSAGE, HELLO or NOTICE
    epoch: int
    session: bytes = b""  # the last two of a message only
    counter: int = -1


def read_head(payload: bytes) -> Head:
    """Return what a payload says of itself. MessageError if its kind or size is none of ours."""
    kind = payload[0] if payload else 0
    if kind not in SIZES:
        raise MessageError("not a message of a shared topic")
    smallest, largest = SIZES[kind]
    if not smallest <= len(payload) <= largest:
        raise MessageError("too short" if len(payload) < smallest else "too large")
    epoch = int.from_bytes(payload[1:NOTICE_SIZE], "big")
    if kind != MESSAGE:
        return Head(kind, epoch)
    end = NOTICE_SIZE + SESSION_SIZE
    counter = int.from_bytes(payload[end:MESSAGE_HEAD], "big")
    return Head(kind, epoch, payload[NOTICE_SIZE:end], counter)


def make_notice(epoch: int) -> bytes:
    """Return the notice that an epoch has begun."""
    return bytes([NOTICE]) + epoch.to_bytes(EPOCH_SIZE, "big")


# --- epochs ------------------------------------------------------------------------------------


class Epoch:
    """A topic's key for some time, and the encryption of hellos with it."""

    __slots__ = ("_hellos", "fingerprint", "key", "number", "topic")

    def __init__(self, topic: str, number: int, key: bytes) -> None:
        """Take the key, 32 bytes. number: from 1, at most MAX_EPOCH."""
        self.topic, self.number, self.key = topic.encode(), number, key
        self.fingerprint = digest(key)
        self._hellos = AESGCM(derive_key(key, KEY_SIZE, b"", join_fields(HELLO_LABEL, self.topic)))

    def head(self, kind: int) -> bytes:
        """Return what payloads of a kind begin with."""
        return bytes([kind]) + self.number.to_bytes(EPOCH_SIZE, "big")

    def seal_hello(self, hello: bytes, *, _nonce: bytes = b"") -> bytes:
        """Return the payload that carries a hello."""
        nonce = _nonce or os.urandom(NONCE_SIZE)  # few are sealed with a key: none comes twice
        head = self.head(HELLO) + nonce
        return head + self._hellos.encrypt(nonce, hello, self.topic + head)

    def open_hello(self, payload: bytes) -> bytes:
        """Return the hello in a payload that read_head() has accepted, not verified yet.

        :raises MessageError: it was not made with this key for this topic
        """
        nonce = payload[NOTICE_SIZE:HELLO_HEAD]
        head = self.head(HELLO) + nonce
        try:
            return self._hellos.decrypt(nonce, payload[HELLO_HEAD:], self.topic + head)
        except InvalidTag:
            raise MessageError("not encrypted with the topic's key") from None


class Content(NamedTuple):
    """What is in a message: what its sender says, and proves by the signature."""

    time: int  # milliseconds since 1970, UTC
    signature: bytes
    data: bytes


class Stream:
    """The messages of one session in one epoch: their encryption, and what is signed of them."""

    __slots__ = ("_cipher", "_head", "_middle", "_start", "_topic")

    def __init__(self, epoch: Epoch, session: bytes) -> None:
        """Derive the key. session: SESSION_SIZE bytes."""
        info = join_fields(MESSAGE_LABEL, epoch.topic, session)
        self._cipher = AESGCM(derive_key(epoch.key, KEY_SIZE, b"", info))
        self._topic = epoch.topic
        self._head = epoch.head(MESSAGE) + session
        # Of what is signed, the parts between which each message's own come.
        self._start = join_fields(MESSAGE_LABEL, epoch.topic) + MESSAGE_HEAD.to_bytes(4, "big")
        self._middle = join_fields(epoch.fingerprint)

    def seal(self, key: Ed25519PrivateKey, counter: int, time: int, data: bytes) -> bytes:
        """Return the payload of a message, with the session's key.

        A counter comes with one time and data only: for these the payload is always the same, but
        others would be encrypted with the same nonce.
        """
        head = self._head + counter.to_bytes(COUNTER_SIZE, "big")
        moment = time.to_bytes(TIME_SIZE, "big")
        plaintext = b"".join((moment, key.sign(self._signed_bytes(head, moment, data)), data))
        return head + self._cipher.encrypt(_nonce_of(head), plaintext, self._topic + head)

    def decrypt(self, payload: bytes) -> Content:
        """Return what is in a message of this stream that read_head() has accepted.

        Whoever wrote it had the topic's key; who that was, verify() tells.

        :raises MessageError: it was not made with the topic's key
        """
        head = self._head + payload[MESSAGE_HEAD - COUNTER_SIZE : MESSAGE_HEAD]
        ciphertext = memoryview(payload)[MESSAGE_HEAD:]
        try:
            plaintext = self._cipher.decrypt(_nonce_of(head), ciphertext, self._topic + head)
        except InvalidTag:
            raise MessageError("not encrypted with the topic's key") from None
        time = int.from_bytes(plaintext[:TIME_SIZE], "big")
        if time >= END_OF_TIME:
            raise MessageError("of a time that no clock shows")
        end = TIME_SIZE + SIGNATURE_SIZE
        return Content(time, plaintext[TIME_SIZE:end], plaintext[end:])

    def verify(self, payload: bytes, content: Content, key: Ed25519PublicKey) -> None:
        """Check that the owner of a session's key has written what decrypt() found in a payload.

        :raises MessageError: another has
        """
        moment = content.time.to_bytes(TIME_SIZE, "big")
        signed_bytes = self._signed_bytes(payload[:MESSAGE_HEAD], moment, content.data)
        try:
            key.verify(content.signature, signed_bytes)
        except InvalidSignature:
            raise MessageError("forged: its signature does not match") from None

    def _signed_bytes(self, head: bytes, time: bytes, data: bytes) -> bytes:
        return b"".join((self._start, head, self._middle, join_fields(time, data)))


def _nonce_of(head: bytes) -> bytes:
    return bytes(NONCE_SIZE - COUNTER_SIZE) + head[-COUNTER_SIZE:]


# --- sessions ----------------------------------------------------------------------------------


class SessionKey:
    """The key pair with which one process publishes on one topic. It is never written down."""

    def __init__(
        self, identity: Identity, topic: str, netid: str, keeper: str, *, _private_key: bytes = b""
    ) -> None:
        """Make a key pair, and introduce it.

        :param identity: the member's
        :param netid: the member's name, which its certificate has
        :param keeper: the name of the topic's keeper
        :raises KeyFileError: the identity is too large
        """
        self.key = Ed25519PrivateKey.from_private_bytes(_private_key or os.urandom(KEY_SIZE))
        public_key = ED25519_PREFIX + self.key.public_key().public_bytes_raw()
        signed_bytes = _hello_bytes(keeper, topic, netid, public_key)
        bundle = identity.sign_bytes(to_pem(PUBLIC_KEY, public_key), signed_bytes)
        self.hello = join_fields(netid.encode(), bundle)
        if len(self.hello) > MAX_HELLO_SIZE:
            raise KeyFileError("holds certificates that are too large to publish with")
        self.session = session_of(self.hello)


class Introduction(NamedTuple):
    """What a hello says."""

    netid: str
    key: Ed25519PublicKey
    bundle: bytes  # PEM: the key, the member's certificates, its signature


class Sender(NamedTuple):
    """Who has introduced a session."""

    netid: str
    key: Ed25519PublicKey
    validity: Validity  # of the certificates that vouch for it


def session_of(hello: bytes) -> bytes:
    """Return the SESSION that a hello introduces."""
    return digest(hello)[:SESSION_SIZE]


def read_hello(
    hello: bytes, topic: str, keeper: str, authority: Authority, at: int | None = None
) -> Sender:
    """Return whom a hello introduces.

    :param topic: that it must be for
    :param keeper: the name of the topic's keeper
    :param authority: who certifies members
    :param at: the time to verify it for, in milliseconds since 1970; None: now
    :raises PeerKeyError: nobody
    """
    netid, key, bundle = parse_hello(hello)
    signed_bytes = _hello_bytes(keeper, topic, netid, ED25519_PREFIX + key.public_bytes_raw())
    seconds = None if at is None else at / 1000
    return Sender(netid, key, authority.verify_bytes(bundle, signed_bytes, netid, at=seconds))


def parse_hello(hello: bytes) -> Introduction:
    """Return what a hello says, which nobody has verified. PeerKeyError if it is none."""
    if len(hello) > MAX_HELLO_SIZE:
        raise HelloError("larger than any hello")
    end = 4 + int.from_bytes(hello[:4], "big")
    name, bundle = hello[4:end], hello[end + 4 :]
    netid = name.decode("ascii", "replace")
    if join_fields(name, bundle) != hello or not MEMBER.fullmatch(netid):
        raise HelloError("not a hello")
    [(_, public_key), *others] = key_blocks(bundle)
    if others or public_key[:-KEY_SIZE] != ED25519_PREFIX:
        raise HelloError("its key is not one of Ed25519")
    return Introduction(netid, Ed25519PublicKey.from_public_bytes(public_key[-KEY_SIZE:]), bundle)


def _hello_bytes(keeper: str, topic: str, netid: str, public_key: bytes) -> bytes:
    names = (name.encode() for name in (keeper, topic, netid))
    return join_fields(HELLO_LABEL, *names, public_key)
