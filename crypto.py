"""Everything secret in the lab's protocol: keys, exchange, derivation, encryption.

Knows nothing of MQTT, prints nothing, and reads one file, the group.

Diffie-Hellman is computed here, by modular exponentiation: since cryptography 49 the library's own
proves p prime at every load of a key, which takes seconds, and since 50 it is deprecated. Key
derivation and encryption are the library's.

Python's pow does not run in constant time. That is acceptable because a private exponent is used
for one exchange only: its timing tells an attacker nothing that could be used again. If gmpy2 is
installed, its constant-time powmod_sec does the work, four times faster.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import os
import re
import socket
import time
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

if TYPE_CHECKING:  # else loaded where it is used, in a process of its own
    from cryptography.fernet import Fernet

# The course's group. Its p is a safe prime: there are no small subgroups to be led into.
GROUP_FILE = "dhparam4096.pem"
# SHA-256 of the DER in that file; a text tool may change its line ends, nothing may change this.
GROUP_SHA256 = "ec16cebd23c68f52dec6f8ccbf5567cf954a6efb000560251917f5634011912f"
SECRET_SIZE = 512  # bytes of p, hence of a public value and of the shared secret Z
# RFC 7919 wants 325 bits for 4096; 384 leave room, and Fernet's AES-128 is the weakest link.
EXPONENT_SIZE = 384 // 8  # bytes
KEY_SIZE = 32  # bytes: Fernet's signing key and encryption key, 16 each
MAX_KEY_FILE_SIZE = 64 * 1024  # bytes; ten certificates fit, and larger ones are refused unread

DH_KEY_AGREEMENT = bytes.fromhex("2a864886f70d010301")  # OID 1.2.840.113549.1.3.1 (PKCS #3)
INTEGER, BIT_STRING, OCTET_STRING, OBJECT_IDENTIFIER, SEQUENCE = 0x02, 0x03, 0x04, 0x06, 0x30
UTC_TIME = 0x17
PEM_BLOCK = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----([A-Za-z0-9+/=\s]*)-----END \1-----")
TOKEN = re.compile(rb"[A-Za-z0-9_-]+={0,2}")


class CryptoError(ValueError):
    """The base of this module's errors. Their text holds no key and no plaintext."""


class KeyFileError(CryptoError):
    """The group's file or a private key of our own cannot be used."""


class PeerKeyError(CryptoError):
    """What a peer sent is no public key in the lab's group."""


class TokenError(CryptoError):
    """What a peer sent is no Fernet token made with this key."""


# --- the course module's four functions --------------------------------------------------------


def generate_keyset(param_file: str = GROUP_FILE) -> tuple[bytes, bytes]:
    """Make a key pair.

    :param param_file: the group, PEM "DH PARAMETERS"; a relative path starts beside this module
    :return: the private key (PEM, PKCS #8) and the public key (PEM, SubjectPublicKeyInfo)
    :raises KeyFileError: the file does not hold the lab's group
    """
    key_pair = KeyPair(read_group(param_file))
    return key_pair.private_key, key_pair.public_key


def create_shared_key(private_pem: str | bytes, peer_public_pem: str | bytes) -> bytes:
    """Return the key shared with a peer, 32 bytes.

    :param private_pem: our private key, as generate_keyset gives it
    :param peer_public_pem: the peer's public key; PEM blocks after it are ignored
    :raises KeyFileError: our key is unusable
    :raises PeerKeyError: the peer's key is unusable
    """
    group = read_group()
    exponent = read_private_key(to_bytes(private_pem), group)
    return KeyPair(group, exponent).agree(to_bytes(peer_public_pem))


def encrypt(plaintext: str | bytes, key: bytes) -> bytes:
    """Return the Fernet token of a plaintext (text becomes UTF-8) under a key of 32 bytes."""
    return _fernet(key).encrypt(to_bytes(plaintext))


def decrypt(token: str | bytes, key: bytes) -> bytes:
    """Return the plaintext of a Fernet token made with this key of 32 bytes.

    :raises TokenError: it is no such token
    """
    from cryptography.fernet import InvalidToken

    if not _is_canonical(token := to_bytes(token)):
        raise TokenError("not a Fernet token")
    try:
        return _fernet(key).decrypt(token)
    except InvalidToken:
        raise TokenError("not encrypted with our key") from None


def _fernet(key: bytes) -> Fernet:
    from cryptography.fernet import Fernet

    return Fernet(base64.urlsafe_b64encode(key))


def load_ciphers() -> None:
    """Import what encryption and key derivation need, so that nobody waits for it later."""
    import cryptography.fernet
    import cryptography.hazmat.primitives.kdf.hkdf  # noqa: F401


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


def to_bytes(text: str | bytes) -> bytes:
    """Return text as UTF-8, and bytes as they are."""
    return text.encode() if isinstance(text, str) else text


def digest(data: bytes | bytearray) -> bytes:
    """Return the SHA-256 of some bytes, to recognise them by."""
    import hashlib

    return hashlib.sha256(data).digest()


def token_size(plaintext_size: int) -> int:
    """Return the size in bytes of the Fernet token of a plaintext of a size in bytes."""
    ciphertext_size = plaintext_size - plaintext_size % 16 + 16  # AES-CBC pads to whole blocks
    return (1 + 8 + 16 + ciphertext_size + 32 + 2) // 3 * 4  # version, time, IV, …, HMAC: base64


# --- one side of an exchange -------------------------------------------------------------------


class Group(NamedTuple):
    """A Diffie-Hellman group: the prime p and the generator g."""

    p: int
    g: int


class KeyPair:
    """An ephemeral Diffie-Hellman key pair, for one exchange."""

    def __init__(self, group: Group, exponent: int | None = None) -> None:
        """Make a key pair, from a private exponent if one is given."""
        random = int.from_bytes(os.urandom(EXPONENT_SIZE), "big")
        self._group = group
        self._exponent = random if exponent is None else exponent
        self.public_value = modular_power(group.g, self._exponent, group.p)

    @property
    def public_key(self) -> bytes:
        """The public key to send: PEM, SubjectPublicKeyInfo, without privateValueLength."""
        return public_key_pem(self._group, self.public_value)

    @property
    def private_key(self) -> bytes:
        """The private key: PEM, PKCS #8, not encrypted."""
        exponent = (OCTET_STRING, to_der(self._exponent))
        return to_pem(b"PRIVATE KEY", to_der([0, _algorithm(self._group), exponent]))

    def agree(self, peer_public_key: bytes) -> bytes:
        """Return the key, 32 bytes, shared with the owner of a public key (PEM).

        :raises PeerKeyError: the peer's key is unusable
        """
        return self.derive(read_public_key(peer_public_key, self._group))

    def derive(self, peer_value: int) -> bytes:
        """Return the same for a public value that read_public_key has accepted."""
        return derive_key(self.shared_secret(peer_value))

    def shared_secret(self, peer_value: int) -> int:
        """Return Z for such a value."""
        return modular_power(peer_value, self._exponent, self._group.p)


class Exchange:
    """The client's side of one exchange, with the encryption under the key that it yields."""

    def __init__(self) -> None:
        """Make a key pair. KeyFileError if the group's file is unusable."""
        self._key_pair = KeyPair(read_group())
        self._key = b""

    def public_key(self) -> bytes:
        """Return the public key to send (PEM)."""
        return self._key_pair.public_key

    def agree(self, peer_public_key: bytes) -> None:
        """Take the peer's public key (PEM). PeerKeyError if it is unusable, or our own."""
        peer_value = read_public_key(peer_public_key, read_group())
        if peer_value == self._key_pair.public_value:
            raise PeerKeyError("no valid public key: our own")
        self._key = self._key_pair.derive(peer_value)

    def encrypt(self, plaintext: bytes) -> bytes:
        """Return the token of a plaintext."""
        return encrypt(plaintext, self._key)

    def decrypt(self, token: bytes) -> bytes:
        """Return the plaintext of a token. TokenError if it was not made with the key."""
        return decrypt(token, self._key)


class _BackgroundExchange(Exchange):
    """An Exchange in a child process, which computes while this one imports and connects.

    Neither the private exponent nor the key leaves the child. It is sent a method's name with its
    arguments, and answers with the result or the error. It ends when this process does.
    """

    def __init__(self) -> None:
        read_group()  # raises its error here and not in the child
        ours, theirs = socket.socketpair()
        if os.fork() == 0:
            ours.close()
            _answer_parent(theirs.makefile("rwb"))
        theirs.close()
        self._channel = ours.makefile("rwb")
        ours.close()  # the file remains

    def public_key(self) -> bytes:
        return self._ask("public_key")

    def agree(self, peer_public_key: bytes) -> None:
        self._ask("agree", peer_public_key)

    def encrypt(self, plaintext: bytes) -> bytes:
        return self._ask("encrypt", plaintext)

    def decrypt(self, token: bytes) -> bytes:
        return self._ask("decrypt", token)

    def _ask(self, method: str, *arguments: bytes) -> bytes:
        import pickle

        pickle.dump((method, *arguments), self._channel)
        self._channel.flush()
        answer: bytes | Exception = pickle.load(self._channel)  # noqa: S301 - it comes from our own child
        if isinstance(answer, Exception):
            raise answer
        return answer


def _answer_parent(channel: io.BufferedRWPair) -> NoReturn:
    try:
        exchange = Exchange()
        with contextlib.suppress(ImportError):  # it comes again when the parent waits
            load_ciphers()
        while True:
            _answer_once(exchange, channel)
    finally:
        os._exit(0)  # exit handlers, buffers and tracebacks are the parent's to deal with


def _answer_once(exchange: Exchange, channel: io.BufferedRWPair) -> None:
    """Do one thing for the parent, and keep nothing of it: a message may be large."""
    import pickle

    method, *arguments = pickle.load(channel)  # noqa: S301 - it comes from our own parent
    try:
        answer = getattr(exchange, method)(*arguments)
    except (CryptoError, ImportError) as error:
        answer = error
    pickle.dump(answer, channel)
    channel.flush()


def start_exchange() -> Exchange:
    """Begin an exchange, in the background where the system can. Call it before any thread starts.

    :raises KeyFileError: the group's file is unusable
    """
    try:
        return _BackgroundExchange()
    except (AttributeError, OSError):  # Windows has no fork; a limit on processes was reached
        return Exchange()


def modular_power(base: int, exponent: int, modulus: int) -> int:
    """Return base ^ exponent mod modulus, for an exponent from 1 and an odd modulus."""
    try:
        from gmpy2 import powmod_sec
    except ImportError:
        return pow(base, exponent, modulus)
    return int(powmod_sec(base, exponent, modulus))


def derive_key(secret: int) -> bytes:
    """Return the key, 32 bytes, for a shared secret Z, with the lab's salt and info.

    Z is hashed as exactly 512 bytes, leading zeros kept.
    """
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    hkdf = HKDF(SHA256(), KEY_SIZE, salt=b"\x00", info=b"\x00")
    return hkdf.derive(secret.to_bytes(SECRET_SIZE, "big"))


# --- reading and writing keys ------------------------------------------------------------------


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
    p, g = from_der(der)
    return Group(p, g)


def read_public_key(pem: bytes, group: Group) -> int:
    """Return the public value, 2 to p - 2, of a peer's public key (PEM, SubjectPublicKeyInfo).

    :raises PeerKeyError: it is anything else, or larger than MAX_KEY_FILE_SIZE
    """
    if len(pem) > MAX_KEY_FILE_SIZE:
        raise PeerKeyError("no valid public key: larger than 64 KiB")
    try:
        match from_der(from_pem(b"PUBLIC KEY", pem)):
            case [algorithm, (tag, bytes(bits))] if tag == BIT_STRING and bits[:1] == b"\x00":
                _check_algorithm(algorithm, group)
                value = from_der(bits[1:])
            case _:
                raise ValueError("not a SubjectPublicKeyInfo")
        if not isinstance(value, int) or not 2 <= value <= group.p - 2:
            raise ValueError("a public value out of range")
    except ValueError as error:
        raise PeerKeyError(f"no valid public key: {error}") from None
    return value


def read_private_key(pem: bytes, group: Group) -> int:
    """Return the exponent of a private key of our own (PEM, PKCS #8, not encrypted).

    :raises KeyFileError: it is anything else
    """
    try:
        match from_der(from_pem(b"PRIVATE KEY", pem)):
            case [0, algorithm, (tag, bytes(octets))] if tag == OCTET_STRING:
                _check_algorithm(algorithm, group)
                exponent = from_der(octets)
            case _:
                raise ValueError("not PKCS #8")
        if not isinstance(exponent, int) or not 1 <= exponent < group.p:
            raise ValueError("an exponent out of range")
    except ValueError as error:
        raise KeyFileError(f"no valid private key: {error}") from None
    return exponent


def public_key_pem(group: Group, value: int) -> bytes:
    """Return a public value as PEM, SubjectPublicKeyInfo (RFC 5280, 4.1)."""
    bits = (BIT_STRING, b"\x00" + to_der(value))  # after the number of unused bits
    return to_pem(b"PUBLIC KEY", to_der([_algorithm(group), bits]))


def _algorithm(group: Group) -> list[Any]:
    return [(OBJECT_IDENTIFIER, DH_KEY_AGREEMENT), [*group]]


def _check_algorithm(algorithm: Any, group: Group) -> None:
    match algorithm:
        case [identifier, [int(p), int(g)] | [int(p), int(g), int()]]:  # with privateValueLength
            if identifier != (OBJECT_IDENTIFIER, DH_KEY_AGREEMENT):
                raise ValueError("a key of another type")
            if Group(p, g) != group:
                raise ValueError("a key of another group")
        case _:
            raise ValueError("a key of another type")


def has_expired(certificate: bytes) -> bool:
    """Tell whether the notAfter (RFC 5280, 4.1.2.5) of a certificate (PEM) has passed."""
    begin = certificate.index(b"-----BEGIN CERTIFICATE-----")  # a key may come first
    [tbs_certificate, *_] = from_der(from_pem(b"CERTIFICATE", certificate[begin:]))
    [_, _, _, _, [_, (tag, not_after)], *_] = tbs_certificate  # after version, …, issuer
    if tag == UTC_TIME:  # YYMMDDHHMMSSZ, of 1950 to 2049
        not_after = (b"19" if not_after >= b"50" else b"20") + not_after
    return bool(not_after.decode() < time.strftime("%Y%m%d%H%M%SZ", time.gmtime()))


def to_pem(label: bytes, der: bytes) -> bytes:
    """Return DER as a PEM block (RFC 7468)."""
    text = base64.b64encode(der)
    lines = [text[start : start + 64] for start in range(0, len(text), 64)]
    return b"\n".join((b"-----BEGIN %b-----" % label, *lines, b"-----END %b-----\n" % label))


def from_pem(label: bytes, pem: bytes) -> bytes:
    """Return the content of the first PEM block; ValueError if it has another label."""
    block = PEM_BLOCK.search(pem)
    if block is None:
        raise ValueError("not in PEM")
    if block[1] != label:
        raise ValueError(f"not a PEM block {label.decode()!r}")
    text = b"".join(block[2].split())
    content = base64.b64decode(text, validate=True)
    if base64.b64encode(content) != text:  # the last character has spare bits
        raise ValueError("not in PEM")
    return content


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
