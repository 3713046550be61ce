"""Everything secret: key pairs, exchange, derivation, encryption.

Knows nothing of MQTT and prints nothing. From the top: the course's four functions, ciphers, the
suites' key pairs, the client's exchange. keys.py knows which keys are accepted and how they are
written, signatures.py who has signed.

Diffie-Hellman in the course's group is computed here, by modular exponentiation: since cryptography
49 the library's own proves p prime at every load of a key, which takes seconds, and since 50 it is
deprecated. All else is the library's.

Python's pow does not run in constant time. That is acceptable because a private exponent is used
for one exchange only: its timing tells an attacker nothing that could be used again. If gmpy2 is
installed, its constant-time powmod_sec does the work, four times faster.
"""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from keys import (
    GROUP_FILE,
    PUBLIC_KEY,
    CryptoError,
    PeerKeyError,
    digest,
    private_key_pem,
    public_key_der,
    public_key_pem,
    public_value,
    read_group,
    read_private_key,
    read_public_key,
    to_pem,
)

if TYPE_CHECKING:
    from signatures import Authority, Identity

SECRET_SIZE = 512  # bytes of p, hence of a public value and of the shared secret Z
# RFC 7919 wants 325 bits for 4096; 384 leave room, and Fernet's AES-128 is the weakest link.
EXPONENT_SIZE = 384 // 8  # bytes

X25519_PREFIX = bytes.fromhex("302a300506032b656e032100")  # of a SubjectPublicKeyInfo (RFC 8410)
X25519_INFO = b"secure-mqtt/1 x25519-aes256gcm\x00"
COUNTER_SIZE, TAG_SIZE = 8, 16  # bytes, around the ciphertext of AES-GCM
TOKEN = re.compile(rb"[A-Za-z0-9_-]+={0,2}")


class TokenError(CryptoError):
    """What a peer sent is no message encrypted with this key."""


# --- the course module's four functions --------------------------------------------------------


def generate_keyset(param_file: str = GROUP_FILE) -> tuple[bytes, bytes]:
    """Make a key pair.

    :param param_file: the group, PEM "DH PARAMETERS"; a relative path starts beside this module
    :return: the private key (PEM, PKCS #8) and the public key (PEM, SubjectPublicKeyInfo)
    :raises KeyFileError: the file does not hold the lab's group
    """
    read_group(param_file)  # there is one only
    key_pair = DhKeyPair()
    return key_pair.private_key, key_pair.public_key


def create_shared_key(private_pem: str | bytes, peer_public_pem: str | bytes) -> bytes:
    """Return the key shared with a peer, 32 bytes.

    :param private_pem: our private key, as generate_keyset gives it
    :param peer_public_pem: the peer's public key; PEM blocks after it are ignored
    :raises KeyFileError: our key is unusable
    :raises PeerKeyError: the peer's key is unusable
    """
    key_pair = DhKeyPair(read_private_key(to_bytes(private_pem)))
    return key_pair.shared_key(to_bytes(peer_public_pem))


def encrypt(plaintext: str | bytes, key: bytes) -> bytes:
    """Return the Fernet token of a plaintext (text becomes UTF-8) under a key of 32 bytes."""
    return FernetCipher(key).seal("", 0, to_bytes(plaintext))


def decrypt(token: str | bytes, key: bytes) -> bytes:
    """Return the plaintext of a Fernet token made with this key of 32 bytes.

    :raises TokenError: it is no such token
    """
    _, plaintext = FernetCipher(key).open("", to_bytes(token))
    return plaintext


def to_bytes(text: str | bytes) -> bytes:
    """Return text as UTF-8, and bytes as they are."""
    return text.encode() if isinstance(text, str) else text


def token_size(plaintext_size: int) -> int:
    """Return the size in bytes of the Fernet token of a plaintext of a size in bytes.

    AES-GCM's messages are smaller.
    """
    ciphertext_size = plaintext_size - plaintext_size % 16 + 16  # AES-CBC pads to whole blocks
    return (1 + 8 + 16 + ciphertext_size + 32 + 2) // 3 * 4  # version, time, IV, …, HMAC: base64


# --- suites: key pairs for one exchange, and ciphers -------------------------------------------


# Both ciphers, and both key pairs, have the same methods: those are what a suite consists of.


class FernetCipher:
    """Encryption between two ends in the suite dh4096: one key for both directions."""

    def __init__(self, key: bytes) -> None:
        """Take the key, 32 bytes."""
        from cryptography.fernet import Fernet, InvalidToken

        self._fernet = Fernet(base64.urlsafe_b64encode(key))
        self._refusal = InvalidToken  # so that open() need not import it each time

    def seal(self, topic: str, number: int, plaintext: bytes) -> bytes:
        """Return the encrypted message; a number must be used once only in each direction."""
        return self._fernet.encrypt(plaintext)

    def open(self, topic: str, message: bytes) -> tuple[None, bytes]:
        """Return a message's number, if the suite knows such, and its plaintext.

        :raises TokenError: the other end has not sealed this for this topic
        """
        if not _is_canonical(message):
            raise TokenError("not a Fernet token")
        try:
            return None, self._fernet.decrypt(message)
        except self._refusal:
            raise TokenError("not encrypted with our key") from None


def _is_canonical(token: bytes) -> bool:
    """Tell whether a token is the only base64url text of its bytes.

    Python's decoder skips foreign characters and drops the last one's spare bits. If they were
    accepted, a broker could disguise a token that it hands back as a new one.
    """
    end = token[-4:]
    return (
        TOKEN.fullmatch(token) is not None
        and len(token) % 4 == 0
        and base64.urlsafe_b64encode(base64.urlsafe_b64decode(end)) == end
    )


class GcmCipher:
    """The same in the suite x25519: AES-256-GCM, bound to topic and number."""

    def __init__(self, seal_key: bytes, open_key: bytes) -> None:
        """Take a key, 32 bytes, for each direction."""
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._seal, self._open = AESGCM(seal_key), AESGCM(open_key)

    def seal(self, topic: str, number: int, plaintext: bytes) -> bytes:
        """Do as FernetCipher.seal() does."""
        counter = number.to_bytes(COUNTER_SIZE, "big")
        # Each direction has its own key, and each counter is used once: no nonce comes again.
        return counter + self._seal.encrypt(bytes(4) + counter, plaintext, topic.encode())

    def open(self, topic: str, message: bytes) -> tuple[int, bytes]:
        """Do as FernetCipher.open() does."""
        from cryptography.exceptions import InvalidTag

        if len(message) < COUNTER_SIZE + TAG_SIZE:
            raise TokenError("too short for a message")
        counter, ciphertext = message[:COUNTER_SIZE], memoryview(message)[COUNTER_SIZE:]
        try:
            plaintext = self._open.decrypt(bytes(4) + counter, ciphertext, topic.encode())
        except InvalidTag:
            raise TokenError("not encrypted with our key") from None
        return int.from_bytes(counter, "big"), plaintext


Cipher = FernetCipher | GcmCipher


class Transcript(NamedTuple):
    """The key exchange as both ends see it."""

    netid: str
    request: bytes  # the payload of message 1, whole
    response: bytes  # the payload of message 2, whole

    def peer_payload(self, is_client: bool) -> bytes:
        """Return what one end got from the other."""
        return self.response if is_client else self.request


class DhKeyPair:
    """The suite dh4096: Diffie-Hellman in the course's group."""

    def __init__(self, exponent: int | None = None) -> None:
        """Make a key pair, from a private exponent if one is given."""
        self._exponent = exponent or int.from_bytes(os.urandom(EXPONENT_SIZE), "big")
        p, g = read_group()
        self.public_value = modular_power(g, self._exponent, p)

    @property
    def public_key(self) -> bytes:
        """The public key, without privateValueLength (PEM)."""
        return public_key_pem(self.public_value)

    @property
    def private_key(self) -> bytes:
        """The private key: PEM, PKCS #8, not encrypted."""
        return private_key_pem(self._exponent)

    def agree(self, transcript: Transcript, is_client: bool) -> Cipher:
        """Return the cipher for one end of an exchange.

        :raises PeerKeyError: the other end's key is unusable, or our own
        """
        peer_value = read_public_key(transcript.peer_payload(is_client))
        if peer_value == self.public_value:
            raise PeerKeyError("our own key handed back")
        return FernetCipher(self.derive(peer_value))

    def shared_key(self, peer_public_key: bytes) -> bytes:
        """Return the key, 32 bytes, shared with the owner of a public key (PEM)."""
        return self.derive(read_public_key(peer_public_key))

    def derive(self, peer_value: int) -> bytes:
        """Return the key, 32 bytes, for a public value that read_public_key has accepted."""
        secret = modular_power(peer_value, self._exponent, read_group().p)
        # Exactly 512 bytes, leading zeros kept. Salt and info are the lab's.
        return derive_key(secret.to_bytes(SECRET_SIZE, "big"), 32, salt=b"\x00", info=b"\x00")


class X25519KeyPair:
    """The suite x25519 (RFC 7748), with AES-256-GCM."""

    def __init__(self, private_key: bytes = b"") -> None:
        """Make a key pair, from the 32 bytes of a private key if they are given."""
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

        self._private = X25519PrivateKey.from_private_bytes(private_key or os.urandom(32))
        public_bytes = self._private.public_key().public_bytes_raw()
        self.public_key = to_pem(PUBLIC_KEY, X25519_PREFIX + public_bytes)

    def agree(self, transcript: Transcript, is_client: bool) -> Cipher:
        """Do as DhKeyPair.agree() does."""
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

        der = public_key_der(transcript.peer_payload(is_client))
        if der[:-32] != X25519_PREFIX:
            raise PeerKeyError("no valid public key: a key of another type")
        peer_bytes = der[-32:]
        if peer_bytes == self._private.public_key().public_bytes_raw():
            raise PeerKeyError("our own key handed back")
        try:
            secret = self._private.exchange(X25519PublicKey.from_public_bytes(peer_bytes))
        except ValueError:  # Z is zero (RFC 7748, 6.1)
            raise PeerKeyError("no valid public key: of small order") from None
        salt = digest(transcript.request) + digest(transcript.response)
        key = derive_key(secret, 64, salt, X25519_INFO + transcript.netid.encode())
        keys = key[:32], key[32:]  # of requests, of responses
        return GcmCipher(*(keys if is_client else reversed(keys)))


KeyPair = DhKeyPair | X25519KeyPair
SUITES: dict[str, Callable[[], KeyPair]] = {"dh4096": DhKeyPair, "x25519": X25519KeyPair}


def peer_value(payload: bytes) -> int | None:
    """Return the public value in a key-exchange payload of dh4096, or None for one of x25519.

    :raises PeerKeyError: its key belongs to no suite
    """
    der = public_key_der(payload)
    return None if der[:-32] == X25519_PREFIX else public_value(der)


def load_ciphers(suite: str) -> None:
    """Import what derivation and encryption need, so that nobody waits for it later."""
    import cryptography.hazmat.primitives.kdf.hkdf

    if suite == "dh4096":
        import cryptography.fernet
    else:
        import cryptography.hazmat.primitives.ciphers.aead  # noqa: F401


def modular_power(base: int, exponent: int, modulus: int) -> int:
    """Return base ^ exponent mod modulus, for an exponent from 1 and an odd modulus."""
    try:
        from gmpy2 import powmod_sec
    except ImportError:
        return pow(base, exponent, modulus)
    return int(powmod_sec(base, exponent, modulus))


def derive_key(secret: bytes, size: int, salt: bytes, info: bytes) -> bytes:
    """Return a key of a size in bytes, by HKDF-SHA256 (RFC 5869)."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(SHA256(), size, salt, info).derive(secret)


# --- the client's side of an exchange ----------------------------------------------------------


class Exchange:
    """One exchange as the client sees it, with the encryption under the key that it yields."""

    def __init__(
        self,
        netid: str,
        suite: str,
        identity: Identity | None = None,
        authority: Authority | None = None,
        peer_name: str = "",
    ) -> None:
        """Make a key pair. KeyFileError if the group's file is unusable.

        :param suite: one of SUITES
        :param identity: to sign with; None: nobody asks who we are
        :param authority: whose signature to demand of the peer; None: it may be anybody
        :param peer_name: the name that the peer must have proved then
        """
        self._netid = netid
        self._authority = authority
        self._peer_name = peer_name
        self._key_pair = SUITES[suite]()
        load_ciphers(suite)
        public_key = self._key_pair.public_key
        self._request = identity.sign(public_key, netid) if identity else public_key
        self._cipher: Cipher
        self._sent = 0
        self._awaited: set[int] = set()
        self._known: dict[bytes, str] = {}  # digests, each with what to say if it comes again

    def request(self) -> bytes:
        """Return the payload of message 1."""
        return self._request

    def agree(self, response: bytes) -> None:
        """Take the payload of message 2. PeerKeyError if it is not acceptable."""
        if self._authority:
            self._authority.verify(response, self._netid, self._peer_name, self._request)
        transcript = Transcript(self._netid, self._request, response)
        self._cipher = self._key_pair.agree(transcript, is_client=True)

    def seal(self, topic: str, plaintext: bytes) -> bytes:
        """Return the next encrypted request, for a topic; they are numbered from 0."""
        message = self._cipher.seal(topic, self._sent, plaintext)
        self._awaited.add(self._sent)
        self._known[digest(message)] = "our own message handed back"
        self._sent += 1
        return message

    def open(self, topic: str, message: bytes) -> tuple[int, bytes]:
        """Return an answer's plaintext after the number of the request that it answers.

        :raises TokenError: it answers no request that waits
        """
        message_digest = digest(message)
        if problem := self._known.get(message_digest):  # one key may serve both directions
            raise TokenError(problem)
        number, plaintext = self._cipher.open(topic, message)
        if number is None:  # then one request is sent at a time
            number = self._sent - 1
        if number not in self._awaited:
            raise TokenError("an answer to no request that waits")
        self._awaited.remove(number)
        self._known[message_digest] = "an answer that was here before"
        return number, plaintext
