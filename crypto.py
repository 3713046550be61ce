"""The lab's cryptography: key exchange, derivation and encryption.

Stands by itself: with dhparam4096.pem beside it, and cryptography installed, it does what the
course's module does. From the top: the course's four functions, the key pair, encryption, the
group, keys in PEM and DER.

Diffie-Hellman in the course's group is computed here, by modular exponentiation: since cryptography
49 the library's own proves p prime at every load of a key, which takes seconds, and since 50 it is
deprecated. All else is the library's, and imported where it is used, since a request need not wait
for what its responder's key will be needed for.

Python's pow does not run in constant time. That is acceptable because a private exponent is used
for one exchange only: its timing tells an attacker nothing that could be used again. If gmpy2 is
installed, its constant-time powmod_sec does the work, four times faster.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import os
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

# The course's group. Its p is a safe prime: there are no small subgroups to be led into.
GROUP_FILE = "dhparam4096.pem"
# SHA-256 of the DER in that file; a text tool may change its line ends, nothing may change this.
GROUP_SHA256 = "ec16cebd23c68f52dec6f8ccbf5567cf954a6efb000560251917f5634011912f"
MAX_KEY_FILE_SIZE = 64 * 1024  # bytes; ten certificates fit, and larger ones are refused unread
MAX_PUBLIC_KEY_SIZE = 8192  # bytes of DER; the lab's have less than 1,100
DH_KEY_AGREEMENT = bytes.fromhex("2a864886f70d010301")  # OID 1.2.840.113549.1.3.1 (PKCS #3)
PUBLIC_KEY, PRIVATE_KEY, CERTIFICATE = b"PUBLIC KEY", b"PRIVATE KEY", b"CERTIFICATE"  # PEM labels
INTEGER, BIT_STRING, OCTET_STRING, OBJECT_IDENTIFIER, SEQUENCE = 0x02, 0x03, 0x04, 0x06, 0x30
PEM_BLOCK = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----([A-Za-z0-9+/=\s]*)-----END \1-----")

SECRET_SIZE = 512  # bytes of p, hence of a public value and of the shared secret Z
# RFC 7919 wants 325 bits for 4096; 384 leave room, and Fernet's AES-128 is the weakest link.
EXPONENT_SIZE = 384 // 8  # bytes
TOKEN = re.compile(rb"[A-Za-z0-9_-]+={0,2}")


class CryptoError(ValueError):
    """The base of the errors in keys and messages. Their text holds no key and no plaintext."""


class KeyFileError(CryptoError):
    """A file of our own cannot be used: the group, a private key, a certificate."""


class PeerKeyError(CryptoError):
    """What a peer sent is no key exchange that can be accepted."""


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
    return FernetCipher(key).seal(to_bytes(plaintext))


def decrypt(token: str | bytes, key: bytes) -> bytes:
    """Return the plaintext of a Fernet token made with this key of 32 bytes.

    :raises TokenError: it is no such token
    """
    return FernetCipher(key).open(to_bytes(token))


def to_bytes(text: str | bytes) -> bytes:
    """Return text as UTF-8, and bytes as they are."""
    return text.encode() if isinstance(text, str) else text


def digest(data: bytes) -> bytes:
    """Return the SHA-256 of some bytes."""
    import hashlib

    return hashlib.sha256(data).digest()


# --- Diffie-Hellman ----------------------------------------------------------------------------


class DhKeyPair:
    """A key pair for Diffie-Hellman in the course's group."""

    def __init__(self, exponent: int | None = None, public_value: int | None = None) -> None:
        """Make a key pair.

        :param exponent: a private exponent, 1 to p - 1; None: a new random one
        :param public_value: g ^ exponent mod p, if that is known already
        """
        self._exponent = exponent or int.from_bytes(os.urandom(EXPONENT_SIZE), "big")
        p, g = read_group()
        self.public_value = public_value or modular_power(g, self._exponent, p)

    @property
    def public_key(self) -> bytes:
        """The public key, without privateValueLength (PEM)."""
        return public_key_pem(self.public_value)

    @property
    def private_key(self) -> bytes:
        """The private key: PEM, PKCS #8, not encrypted."""
        return private_key_pem(self._exponent)

    def shared_key(self, peer_public_key: bytes) -> bytes:
        """Return the key, 32 bytes, shared with the owner of a public key (PEM)."""
        return self.derive(read_public_key(peer_public_key))

    def derive(self, peer_value: int) -> bytes:
        """Return the key, 32 bytes, for a public value that read_public_key has accepted."""
        secret = modular_power(peer_value, self._exponent, read_group().p)
        # Exactly 512 bytes, leading zeros kept. Salt and info are the lab's.
        return derive_key(secret.to_bytes(SECRET_SIZE, "big"), 32, salt=b"\x00", info=b"\x00")


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


# --- encryption --------------------------------------------------------------------------------


class FernetCipher:
    """Encryption with Fernet under one key, as its specification has it; times are not checked."""

    __slots__ = ("_fernet", "_refusal", "key")

    def __init__(self, key: bytes) -> None:
        """Take the key, 32 bytes: 16 authenticate (HMAC-SHA256), 16 encrypt (AES-128-CBC)."""
        from cryptography.fernet import Fernet, InvalidToken

        self.key = key
        self._fernet = Fernet(base64.urlsafe_b64encode(key))
        self._refusal = InvalidToken  # so that open() need not import it each time

    def seal(self, plaintext: bytes) -> bytes:
        """Return the token of a plaintext."""
        return self._fernet.encrypt(plaintext)

    def open(self, token: bytes) -> bytes:
        """Return the plaintext of a token. TokenError if it was not made with this key."""
        if not _is_canonical(token):
            raise TokenError("not a Fernet token")
        try:
            return self._fernet.decrypt(token)
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


def token_size(plaintext_size: int) -> int:
    """Return the size in bytes of the Fernet token of a plaintext of a size in bytes.

    AES-GCM's messages are smaller.
    """
    ciphertext_size = plaintext_size - plaintext_size % 16 + 16  # AES-CBC pads to whole blocks
    return (1 + 8 + 16 + ciphertext_size + 32 + 2) // 3 * 4  # version, time, IV, …, HMAC: base64


# --- keys --------------------------------------------------------------------------------------


class Group(NamedTuple):
    """A Diffie-Hellman group: the prime p and the generator g."""

    p: int
    g: int


@functools.cache
def read_group(param_file: str = GROUP_FILE) -> Group:
    """Read the lab's group from its file, as generate_keyset does."""
    path = os.path.join(os.path.dirname(os.path.realpath(__file__)), param_file)
    try:
        with open(path, "rb") as file:
            der = from_pem(b"DH PARAMETERS", file.read(MAX_KEY_FILE_SIZE))
    except OSError as error:
        raise KeyFileError(f"cannot read the group in {path}: {error.strerror}") from None
    except ValueError as error:
        raise KeyFileError(f"{path} does not hold the lab's group: {error}") from None
    if digest(der).hex() != GROUP_SHA256:
        raise KeyFileError(f"{path} does not hold the lab's group, but another")
    return Group(*from_der(der))


@functools.lru_cache(maxsize=1)  # several ask, one after the other: which suite, and whether known
def public_key_der(payload: bytes) -> bytes:
    """Return the SubjectPublicKeyInfo (DER) that a key-exchange payload begins with.

    :raises PeerKeyError: it begins with anything else, or is larger than MAX_KEY_FILE_SIZE
    """
    if len(payload) > MAX_KEY_FILE_SIZE:
        raise PeerKeyError("no valid public key: larger than 64 KiB")
    try:
        return from_pem(PUBLIC_KEY, payload)
    except ValueError as error:
        raise PeerKeyError(f"no valid public key: {error}") from None


def read_public_key(payload: bytes) -> int:
    """Return the public value, 2 to p - 2, in a key-exchange payload of dh4096.

    :raises PeerKeyError: there is none
    """
    return public_value(public_key_der(payload))


def public_value(der: bytes) -> int:
    """Do as read_public_key() does, for a SubjectPublicKeyInfo."""
    try:
        if len(der) > MAX_PUBLIC_KEY_SIZE:  # a responder would spend long on it
            raise ValueError("larger than any of the lab's")
        match from_der(der):
            case [algorithm, (tag, bytes(bits))] if tag == BIT_STRING and bits[:1] == b"\x00":
                _check_algorithm(algorithm)
                value = from_der(bits[1:])
            case _:
                raise ValueError("not a SubjectPublicKeyInfo")
        if not isinstance(value, int) or not 2 <= value <= read_group().p - 2:
            raise ValueError("a public value out of range")
    except ValueError as error:
        raise PeerKeyError(f"no valid public key: {error}") from None
    return value


def read_private_key(pem: bytes) -> int:
    """Return the exponent of a private key of our own (PEM, PKCS #8, not encrypted).

    :raises KeyFileError: it is anything else
    """
    try:
        match from_der(from_pem(PRIVATE_KEY, pem)):
            case [0, algorithm, (tag, bytes(octets))] if tag == OCTET_STRING:
                _check_algorithm(algorithm)
                exponent = from_der(octets)
            case _:
                raise ValueError("not PKCS #8")
        if not isinstance(exponent, int) or not 1 <= exponent < read_group().p:
            raise ValueError("an exponent out of range")
    except ValueError as error:
        raise KeyFileError(f"no valid private key: {error}") from None
    return exponent


def private_key_pem(exponent: int) -> bytes:
    """Return a private exponent as PEM: PKCS #8 (RFC 5208), not encrypted."""
    return to_pem(PRIVATE_KEY, to_der([0, _algorithm(), (OCTET_STRING, to_der(exponent))]))


def public_key_pem(value: int) -> bytes:
    """Return a public value as PEM, SubjectPublicKeyInfo (RFC 5280, 4.1)."""
    bits = (BIT_STRING, b"\x00" + to_der(value))  # after the number of unused bits
    return to_pem(PUBLIC_KEY, to_der([_algorithm(), bits]))


def _algorithm() -> list[Any]:
    return [(OBJECT_IDENTIFIER, DH_KEY_AGREEMENT), [*read_group()]]


def _check_algorithm(algorithm: Any) -> None:
    match algorithm:
        case [identifier, [int(p), int(g)] | [int(p), int(g), int()]]:  # with privateValueLength
            if identifier != (OBJECT_IDENTIFIER, DH_KEY_AGREEMENT):
                raise ValueError("a key of another type")
            if Group(p, g) != read_group():
                raise ValueError("a key of another group")
        case _:
            raise ValueError("a key of another type")


def to_pem(label: bytes, der: bytes) -> bytes:
    """Return DER as a PEM block (RFC 7468)."""
    text = base64.b64encode(der)
    lines = [text[start : start + 64] for start in range(0, len(text), 64)]
    return b"\n".join((b"-----BEGIN %b-----" % label, *lines, b"-----END %b-----\n" % label))


def from_pem(label: bytes, pem: bytes) -> bytes:
    """Return the content of the first PEM block; ValueError if it has another label."""
    for found, content in pem_blocks(pem):
        if found != label:
            raise ValueError(f"not a PEM block {label.decode()!r}")
        return content
    raise ValueError("not in PEM")


def pem_blocks(pem: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield label and content of each PEM block; ValueError if one is not in base64."""
    for block in PEM_BLOCK.finditer(pem):
        text = b"".join(block[2].split())
        content = base64.b64decode(text, validate=True)
        if base64.b64encode(content) != text:  # the last character has spare bits
            raise ValueError("not in PEM")
        yield block[1], content


# DER (X.690): int is an INTEGER, list a SEQUENCE, (tag, content) anything else. By hand, because
# cryptography's ASN.1 module with its OIDs adds half as much again to the imports of a request.


def to_der(value: Any) -> bytes:
    """Encode a value."""
    match value:
        case int():
            size = value.bit_length() // 8 + 1
            tag, content = INTEGER, value.to_bytes(size, "big", signed=True)
        case list():
            tag, content = SEQUENCE, b"".join(map(to_der, value))
        case _:
            tag, content = value
    if len(content) < 0x80:
        return bytes((tag, len(content))) + content
    size = (len(content).bit_length() + 7) // 8
    return bytes((tag, 0x80 | size)) + len(content).to_bytes(size, "big") + content


def from_der(der: bytes) -> Any:
    """Decode one value, strictly; ValueError if that is not possible."""
    with contextlib.suppress(ValueError, IndexError, RecursionError):
        [value] = _decode(der)
        if to_der(value) == der:  # there is one encoding only of each value
            return value
    raise ValueError("not in DER")


def _decode(data: bytes) -> list[Any]:
    values: list[Any] = []
    while data:
        tag, size, start = data[0], data[1], 2
        if size & 0x80:
            start += size & 0x7F
            size = int.from_bytes(data[2:start], "big")
        content, data = data[start : start + size], data[start + size :]
        if tag == SEQUENCE:
            values.append(_decode(content))
        else:
            values.append(
                int.from_bytes(content, "big", signed=True) if tag == INTEGER else (tag, content)
            )
    return values
