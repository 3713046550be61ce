"""The suites: how two ends agree on keys, and how they encrypt with them.

A suite is a class for the keys of each side, and one for the cipher that the sides agree on. Which
one it is follows from the keys in message 1.
"""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

from crypto import (
    CERTIFICATE,
    MAX_KEY_FILE_SIZE,
    PUBLIC_KEY,
    CryptoError,
    DhKeyPair,
    FernetCipher,
    PeerKeyError,
    TokenError,
    derive_key,
    digest,
    pem_blocks,
    public_key_der,
    public_value,
    read_public_key,
    to_pem,
    token_size,
)
from secure_mqtt.fixed_base import make_key_pair

X25519_SIZE = 32  # bytes of a public key, a private key and the secret (RFC 7748, 5)
X25519_INFO = b"secure-mqtt/1 x25519-aes256gcm\x00"
SEED_SIZE = 64  # bytes of a private key for ML-KEM, d and z (FIPS 203, 7.1)
ENCAPSULATION_KEY_SIZE, CIPHERTEXT_SIZE = 1184, 1088  # bytes, of ML-KEM-768 (FIPS 203, table 3)
CIPHERTEXT = b"SECURE MQTT CIPHERTEXT"  # a PEM label
HYBRID_INFO = b"secure-mqtt/1 mlkem768x25519-aes256gcm\x00"
COUNTER_SIZE, TAG_SIZE = 8, 16  # bytes, around the ciphertext of AES-GCM


class UnavailableError(CryptoError):
    """The library at hand lacks what a suite needs."""


class Transcript(NamedTuple):
    """The key exchange as both ends see it."""

    netid: str
    request: bytes  # the payload of message 1, whole
    response: bytes  # the payload of message 2, whole


Block = tuple[bytes, bytes]  # of PEM: label and content
BEGIN_CERTIFICATE = b"-----BEGIN %b-----" % CERTIFICATE


def split_payload(payload: bytes) -> tuple[bytes, bytes]:
    """Return the parts of a key-exchange payload: the keys, and from the first certificate on."""
    keys, begin, rest = payload.partition(BEGIN_CERTIFICATE)
    return keys, begin + rest


@functools.lru_cache(maxsize=1)  # several ask, one after the other: signatures, and the keys' suite
def key_blocks(payload: bytes) -> tuple[Block, ...]:
    """Return the PEM blocks of a key-exchange payload that come before its certificates.

    :raises PeerKeyError: there is none, or the payload is larger than MAX_KEY_FILE_SIZE
    """
    if len(payload) > MAX_KEY_FILE_SIZE:
        raise PeerKeyError("no valid public key: larger than 64 KiB")
    keys, _ = split_payload(payload)
    try:
        blocks = tuple(pem_blocks(keys))
    except ValueError as error:
        raise PeerKeyError(f"no valid public key: {error}") from None
    if not blocks or blocks[0][0] != PUBLIC_KEY:
        raise PeerKeyError("no valid public key: not in PEM, or another block comes first")
    return blocks


def block_contents(payload: bytes, *labels: bytes) -> list[bytes]:
    """Do as key_blocks() does, for a payload that must have blocks with these labels there.

    :return: the contents
    :raises PeerKeyError: the blocks are others
    """
    blocks = key_blocks(payload)
    if [label for label, _ in blocks] != [*labels]:
        wanted = b", ".join(labels).decode()
        raise PeerKeyError(f"no valid public key: its blocks are not {wanted}")
    return [content for _, content in blocks]


class KeyType(NamedTuple):
    """A type of public keys of one size, each a SubjectPublicKeyInfo (DER) with the same start."""

    start: bytes
    size: int  # of the rest, the key itself, in bytes

    def fits(self, der: bytes) -> bool:
        """Tell whether that is a key of this type."""
        return len(der) == len(self.start) + self.size and der.startswith(self.start)

    def read(self, der: bytes) -> bytes:
        """Return the key itself. PeerKeyError if it is of another type."""
        if not self.fits(der):
            raise PeerKeyError("no valid public key: a key of another type")
        return der[-self.size :]

    def to_pem(self, key: bytes) -> bytes:
        """Return the key itself as a PEM block."""
        return to_pem(PUBLIC_KEY, self.start + key)


X25519_KEY = KeyType(bytes.fromhex("302a300506032b656e032100"), X25519_SIZE)  # RFC 8410
MLKEM768_KEY = KeyType(  # RFC 9935
    bytes.fromhex("308204b2300b0609608648016503040402038204a100"), ENCAPSULATION_KEY_SIZE
)


# --- ciphers -----------------------------------------------------------------------------------


class Cipher(Protocol):
    """Encryption between the two ends of an exchange. It can be pickled, for a worker."""

    def sealed_size(self, size: int) -> int:
        """Return the size of the message for a plaintext of this size, both in bytes."""

    def seal(self, topic: str, number: int, plaintext: bytes) -> bytes:
        """Return the encrypted message for a topic.

        :param number: of the request, or of the one that is answered; each comes once only in each
            direction
        """

    def open(self, topic: str, message: bytes) -> tuple[int | None, bytes]:
        """Return a message's number, if the suite knows such, and its plaintext.

        :raises TokenError: the other end has not sealed this for this topic
        """


class LabCipher:
    """The lab's: Fernet, with one key for both directions, and neither topic nor number."""

    __slots__ = ("_cipher",)

    def __init__(self, key: bytes) -> None:
        """Take the key, 32 bytes."""
        self._cipher = FernetCipher(key)

    def __reduce__(self) -> tuple[Any, ...]:
        """Tell pickle how to make it again."""
        return LabCipher, (self._cipher.key,)

    @staticmethod
    def sealed_size(size: int) -> int:
        """Do as Cipher.sealed_size() does."""
        return token_size(size)

    def seal(self, topic: str, number: int, plaintext: bytes) -> bytes:
        """Do as Cipher.seal() does."""
        return self._cipher.seal(plaintext)

    def open(self, topic: str, message: bytes) -> tuple[None, bytes]:
        """Do as Cipher.open() does."""
        return None, self._cipher.open(message)


class GcmCipher:
    """AES-256-GCM, bound to topic and number, with a key for each direction."""

    # The library's objects are made anew each time, in 1 µs: they hold 2 KiB each, and a responder
    # keeps many ciphers.
    __slots__ = ("_open_key", "_seal_key")

    def __init__(self, seal_key: bytes, open_key: bytes) -> None:
        """Take the keys, 32 bytes each."""
        self._seal_key, self._open_key = seal_key, open_key

    def __reduce__(self) -> tuple[Any, ...]:
        """Tell pickle how to make it again."""
        return GcmCipher, (self._seal_key, self._open_key)

    @staticmethod
    def sealed_size(size: int) -> int:
        """Do as Cipher.sealed_size() does."""
        return COUNTER_SIZE + size + TAG_SIZE

    def seal(self, topic: str, number: int, plaintext: bytes) -> bytes:
        """Do as Cipher.seal() does."""
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        counter = number.to_bytes(COUNTER_SIZE, "big")
        nonce = bytes(4) + counter
        # Each direction has its own key, and each counter is used once: no nonce comes again.
        return counter + AESGCM(self._seal_key).encrypt(nonce, plaintext, topic.encode())

    def open(self, topic: str, message: bytes) -> tuple[int, bytes]:
        """Do as Cipher.open() does."""
        from cryptography.exceptions import InvalidTag
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        if len(message) < COUNTER_SIZE + TAG_SIZE:
            raise TokenError("too short for a message")
        counter, ciphertext = message[:COUNTER_SIZE], memoryview(message)[COUNTER_SIZE:]
        try:
            cipher = AESGCM(self._open_key)
            plaintext = cipher.decrypt(bytes(4) + counter, ciphertext, topic.encode())
        except InvalidTag:
            raise TokenError("not encrypted with our key") from None
        return int.from_bytes(counter, "big"), plaintext


def gcm_cipher(secret: bytes, info: bytes, transcript: Transcript, is_client: bool) -> GcmCipher:
    """Return one end's cipher for a shared secret Z, bound to all of the exchange.

    :param info: names the suite
    """
    salt = digest(transcript.request) + digest(transcript.response)
    key = derive_key(secret, 64, salt, info + transcript.netid.encode())
    keys = key[:32], key[32:]  # of requests, of responses
    return GcmCipher(*(keys if is_client else reversed(keys)))


# --- each side's keys --------------------------------------------------------------------------


class Keys(Protocol):
    """The keys of one side for one exchange."""

    blocks: bytes  # PEM: what the side's message begins with

    def agree(self, transcript: Transcript) -> Cipher:
        """Return the side's cipher. PeerKeyError if the other end's keys are unusable, or ours."""


class LabClient:
    """A client's key pair in the lab's group."""

    def __init__(self) -> None:
        """Make a key pair."""
        self._key_pair = DhKeyPair()
        self.blocks = self._key_pair.public_key

    def agree(self, transcript: Transcript) -> Cipher:
        """Do as Keys.agree() does."""
        peer_value = read_public_key(transcript.response)
        if peer_value == self._key_pair.public_value:
            raise PeerKeyError("our own key handed back")
        return LabCipher(self._key_pair.derive(peer_value))


class LabResponder:
    """A responder's key pair in the lab's group, for a client's key. It can be pickled."""

    def __init__(self, request: bytes, key_pair: DhKeyPair | None = None) -> None:
        """Read the client's key.

        :param request: the payload of message 1
        :param key_pair: one that was made ahead for this exchange; None: it is made now
        :raises PeerKeyError: the client's key is unusable
        """
        self._peer_value = read_public_key(request)
        self._key_pair = key_pair or make_key_pair()
        self.blocks = self._key_pair.public_key

    def agree(self, transcript: Transcript) -> Cipher:
        """Do as Keys.agree() does."""
        return self.derive()

    def derive(self) -> LabCipher:
        """Return the cipher, which depends on nothing else in the exchange."""
        return LabCipher(self._key_pair.derive(self._peer_value))


class X25519KeyPair:
    """A key pair for X25519 (RFC 7748)."""

    def __init__(self, private_key: bytes = b"") -> None:
        """Make a key pair, from the 32 bytes of a private key if they are given."""
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

        self._private = X25519PrivateKey.from_private_bytes(private_key or os.urandom(X25519_SIZE))
        self._public = self._private.public_key().public_bytes_raw()

    @property
    def block(self) -> bytes:
        """The public key (PEM)."""
        return X25519_KEY.to_pem(self._public)

    def agree(self, der: bytes) -> bytes:
        """Return the secret shared with the owner of a public key, 32 bytes.

        :param der: the key, a SubjectPublicKeyInfo
        :raises PeerKeyError: it is no such key, our own, or of small order
        """
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey

        peer = X25519_KEY.read(der)
        if peer == self._public:
            raise PeerKeyError("our own key handed back")
        try:
            return self._private.exchange(X25519PublicKey.from_public_bytes(peer))
        except ValueError:  # Z is zero (RFC 7748, 6.1)
            raise PeerKeyError("no valid public key: of small order") from None


class X25519Client:
    """A client's keys in the suite x25519."""

    def __init__(self, private_key: bytes = b"") -> None:
        """Make a key pair, from the 32 bytes of a private key if they are given."""
        self._key_pair = X25519KeyPair(private_key)
        self.blocks = self._key_pair.block

    def agree(self, transcript: Transcript) -> Cipher:
        """Do as Keys.agree() does."""
        [key] = block_contents(transcript.response, PUBLIC_KEY)
        secret = self._key_pair.agree(key)
        return gcm_cipher(secret, X25519_INFO, transcript, is_client=True)


class X25519Responder:
    """A responder's keys in the suite x25519, for a client's key."""

    def __init__(self, request: bytes, private_key: bytes | None = None) -> None:
        """Agree on the secret.

        :param request: the payload of message 1
        :param private_key: 32 bytes; None: random ones
        :raises PeerKeyError: the client's key is unusable
        """
        [key] = block_contents(request, PUBLIC_KEY)
        key_pair = X25519KeyPair(private_key or b"")
        self._secret = key_pair.agree(key)
        self.blocks = key_pair.block

    def agree(self, transcript: Transcript) -> Cipher:
        """Do as Keys.agree() does."""
        return gcm_cipher(self._secret, X25519_INFO, transcript, is_client=False)


class MlKem768KeyPair:
    """A client's key pair for ML-KEM-768 (FIPS 203)."""

    def __init__(self, seed: bytes = b"") -> None:
        """Make a key pair, from the 64 bytes of a private key if they are given.

        :raises UnavailableError: the library has no ML-KEM
        """
        from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey

        with ml_kem_needed():
            self._private = MLKEM768PrivateKey.from_seed_bytes(seed or os.urandom(SEED_SIZE))

    @property
    def block(self) -> bytes:
        """The encapsulation key, which is the public one (PEM)."""
        return MLKEM768_KEY.to_pem(self._private.public_key().public_bytes_raw())

    def decapsulate(self, ciphertext: bytes) -> bytes:
        """Return the secret, 32 bytes, in a ciphertext: if that was changed, another (6.3).

        :raises PeerKeyError: it has another size
        """
        if len(ciphertext) != CIPHERTEXT_SIZE:
            raise PeerKeyError("no valid public key: a ciphertext of another size")
        return self._private.decapsulate(ciphertext)


def encapsulate(der: bytes) -> tuple[bytes, bytes]:
    """Return a new secret, 32 bytes, and the ciphertext that tells it to the owner of a key.

    :param der: the key for ML-KEM-768, a SubjectPublicKeyInfo
    :raises PeerKeyError: it is no such key, or fails the modulus check (FIPS 203, 7.2)
    :raises UnavailableError: the library has no ML-KEM
    """
    from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PublicKey

    key = MLKEM768_KEY.read(der)
    with ml_kem_needed():
        try:
            return MLKEM768PublicKey.from_public_bytes(key).encapsulate()
        except ValueError:  # its size is right
            raise PeerKeyError(
                "no valid public key: a number in it is not below the modulus"
            ) from None


@contextlib.contextmanager
def ml_kem_needed() -> Iterator[None]:
    """Turn the library's word that it has no ML-KEM into UnavailableError."""
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        yield
    except UnsupportedAlgorithm:
        raise UnavailableError(
            f"the suite {HYBRID.name} needs ML-KEM, which the cryptography package here lacks:"
            " OpenSSL 3.5 is the first to have it"
        ) from None


class HybridClient:
    """A client's keys in the suite mlkem768x25519: whoever wants the secret has to break both."""

    def __init__(self, seed: bytes = b"", private_key: bytes = b"") -> None:
        """Make both key pairs, from private keys if they are given.

        :param seed: for ML-KEM, 64 bytes
        :param private_key: for X25519, 32 bytes
        :raises UnavailableError: the library has no ML-KEM
        """
        self._ml_kem = MlKem768KeyPair(seed)
        self._x25519 = X25519KeyPair(private_key)
        self.blocks = self._ml_kem.block + self._x25519.block

    def agree(self, transcript: Transcript) -> Cipher:
        """Do as Keys.agree() does."""
        key, ciphertext = block_contents(transcript.response, PUBLIC_KEY, CIPHERTEXT)
        secret = self._ml_kem.decapsulate(ciphertext) + self._x25519.agree(key)
        return gcm_cipher(secret, HYBRID_INFO, transcript, is_client=True)


class HybridResponder:
    """A responder's keys in the suite mlkem768x25519, for a client's."""

    def __init__(self, request: bytes, private_key: bytes | None = None) -> None:
        """Agree on the secret.

        :param request: the payload of message 1
        :param private_key: for X25519, 32 bytes; None: random ones
        :raises PeerKeyError: the client's keys are unusable
        :raises UnavailableError: the library has no ML-KEM
        """
        encapsulation_key, key = block_contents(request, PUBLIC_KEY, PUBLIC_KEY)
        key_pair = X25519KeyPair(private_key or b"")
        shared = key_pair.agree(key)
        secret, ciphertext = encapsulate(encapsulation_key)
        self._secret = secret + shared
        self.blocks = key_pair.block + to_pem(CIPHERTEXT, ciphertext)

    def agree(self, transcript: Transcript) -> Cipher:
        """Do as Keys.agree() does."""
        return gcm_cipher(self._secret, HYBRID_INFO, transcript, is_client=False)


# --- the suites --------------------------------------------------------------------------------


class Suite(NamedTuple):
    """A suite: what it is called, and what its keys are."""

    name: str
    encryption: str  # for a person
    client: Callable[[], Keys]
    responder: Callable[..., Keys]  # takes the payload of message 1
    # Tells whether message 1 with this first key (DER) is of the suite.
    takes: Callable[[bytes], object]
    load: Callable[[], object]  # imports what it needs, so that nobody waits for it later
    sealed_size: Callable[[int], int]  # of the message for a plaintext of a size, both in bytes
    is_numbered: bool  # whether an answer tells which request it is for
    is_slow: bool = False  # to agree takes a responder long; it can be given a key pair made ahead


def load_lab() -> None:
    """Do as Suite.load() does."""
    import cryptography.fernet
    import cryptography.hazmat.primitives.kdf.hkdf  # noqa: F401


def load_x25519() -> None:
    """Do as Suite.load() does."""
    import cryptography.exceptions
    import cryptography.hazmat.primitives.asymmetric.x25519
    import cryptography.hazmat.primitives.ciphers.aead
    import cryptography.hazmat.primitives.kdf.hkdf  # noqa: F401


def load_hybrid() -> None:
    """Do as Suite.load() does. UnavailableError if the library has no ML-KEM."""
    load_x25519()
    MlKem768KeyPair()  # loads what it needs, too


LAB = Suite(
    name="dh4096",
    encryption="Fernet",
    client=LabClient,
    responder=LabResponder,
    takes=public_value,
    load=load_lab,
    sealed_size=LabCipher.sealed_size,
    is_numbered=False,
    is_slow=True,
)
X25519 = Suite(
    name="x25519",
    encryption="AES-256-GCM",
    client=X25519Client,
    responder=X25519Responder,
    takes=X25519_KEY.fits,
    load=load_x25519,
    sealed_size=GcmCipher.sealed_size,
    is_numbered=True,
)
HYBRID = Suite(
    name="mlkem768x25519",
    encryption="AES-256-GCM",
    client=HybridClient,
    responder=HybridResponder,
    takes=MLKEM768_KEY.fits,
    load=load_hybrid,
    sealed_size=GcmCipher.sealed_size,
    is_numbered=True,
)
SUITES = {suite.name: suite for suite in (LAB, X25519, HYBRID)}


def load_suites() -> None:
    """Import what the suites need that can be had here."""
    for suite in SUITES.values():
        with contextlib.suppress(UnavailableError):
            suite.load()


def suite_of(payload: bytes) -> Suite:
    """Return the suite that the first key of message 1 belongs to.

    :raises PeerKeyError: it is no key of any suite
    """
    der = public_key_der(payload)
    # The lab's is asked last: of what it does not take, it says what is wrong.
    return next(suite for suite in reversed(SUITES.values()) if suite.takes(der))
