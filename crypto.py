"""Everything secret: keys, exchange, derivation, encryption, signatures.

Knows nothing of MQTT, prints nothing, and reads one file, the group. From the top: errors, the
course's four functions, ciphers, the suites' key pairs, signatures, the client's exchange, work in
the background, and how keys are written.

Diffie-Hellman in the course's group is computed here, by modular exponentiation: since cryptography
49 the library's own proves p prime at every load of a key, which takes seconds, and since 50 it is
deprecated. All else is the library's.

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
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn, Protocol, cast

# The course's group. Its p is a safe prime: there are no small subgroups to be led into.
GROUP_FILE = "dhparam4096.pem"
# SHA-256 of the DER in that file; a text tool may change its line ends, nothing may change this.
GROUP_SHA256 = "ec16cebd23c68f52dec6f8ccbf5567cf954a6efb000560251917f5634011912f"
SECRET_SIZE = 512  # bytes of p, hence of a public value and of the shared secret Z
# RFC 7919 wants 325 bits for 4096; 384 leave room, and Fernet's AES-128 is the weakest link.
EXPONENT_SIZE = 384 // 8  # bytes
MAX_KEY_FILE_SIZE = 64 * 1024  # bytes; ten certificates fit, and larger ones are refused unread

DH_KEY_AGREEMENT = bytes.fromhex("2a864886f70d010301")  # OID 1.2.840.113549.1.3.1 (PKCS #3)
X25519_PREFIX = bytes.fromhex("302a300506032b656e032100")  # of a SubjectPublicKeyInfo (RFC 8410)
X25519_INFO = b"secure-mqtt/1 x25519-aes256gcm\x00"
COUNTER_SIZE, TAG_SIZE = 8, 16  # bytes, around the ciphertext of AES-GCM
REQUEST_LABEL = b"secure-mqtt/1 key-exchange request"
RESPONSE_LABEL = b"secure-mqtt/1 key-exchange response"
PSS_SALT_SIZE, MIN_RSA_SIZE = 32, 2048  # bytes; bits
PUBLIC_KEY, PRIVATE_KEY, CERTIFICATE = b"PUBLIC KEY", b"PRIVATE KEY", b"CERTIFICATE"  # PEM labels
SIGNATURE = b"SECURE MQTT SIGNATURE"

INTEGER, BIT_STRING, OCTET_STRING, OBJECT_IDENTIFIER, SEQUENCE = 0x02, 0x03, 0x04, 0x06, 0x30
UTC_TIME = 0x17
PEM_BLOCK = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----([A-Za-z0-9+/=\s]*)-----END \1-----")
TOKEN = re.compile(rb"[A-Za-z0-9_-]+={0,2}")
CHAIN_PROBLEMS = {  # parts of what the library says, each with what it means
    "not valid at": "that has expired, or is not valid yet",
    "EKU": "for another purpose",
    "candidates exhausted": "from an unknown authority",
}


class CryptoError(ValueError):
    """The base of this module's errors. Their text holds no key and no plaintext."""


class KeyFileError(CryptoError):
    """A file of our own cannot be used: the group, a private key, a certificate."""


class PeerKeyError(CryptoError):
    """What a peer sent is no key exchange that can be accepted."""


class TokenError(CryptoError):
    """What a peer sent is no message encrypted with this key."""


class WorkerError(Exception):
    """A process of our own was ended."""


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
    return _FernetCipher(key).seal("", 0, to_bytes(plaintext))


def decrypt(token: str | bytes, key: bytes) -> bytes:
    """Return the plaintext of a Fernet token made with this key of 32 bytes.

    :raises TokenError: it is no such token
    """
    _, plaintext = _FernetCipher(key).open("", to_bytes(token))
    return plaintext


def to_bytes(text: str | bytes) -> bytes:
    """Return text as UTF-8, and bytes as they are."""
    return text.encode() if isinstance(text, str) else text


def digest(data: bytes) -> bytes:
    """Return the SHA-256 of some bytes."""
    import hashlib

    return hashlib.sha256(data).digest()


def token_size(plaintext_size: int) -> int:
    """Return the size in bytes of the Fernet token of a plaintext of a size in bytes.

    AES-GCM's messages are smaller.
    """
    ciphertext_size = plaintext_size - plaintext_size % 16 + 16  # AES-CBC pads to whole blocks
    return (1 + 8 + 16 + ciphertext_size + 32 + 2) // 3 * 4  # version, time, IV, …, HMAC: base64


# --- suites: key pairs for one exchange, and ciphers -------------------------------------------

if TYPE_CHECKING:  # the shape of a suite; it costs time to make such classes

    class KeyPair(Protocol):
        """An ephemeral key pair, for one exchange."""

        @property
        def public_key(self) -> bytes:
            """The public key to send: PEM, SubjectPublicKeyInfo."""

        def agree(self, transcript: Transcript, is_client: bool) -> Cipher:
            """Return the cipher for one end of an exchange.

            :raises PeerKeyError: the other end's key is unusable, or our own
            """

    class Cipher(Protocol):
        """What an exchange yields: encryption in both directions, between two ends."""

        def seal(self, topic: str, number: int, plaintext: bytes) -> bytes:
            """Return the encrypted message; a number must be used once only in each direction."""

        def open(self, topic: str, message: bytes) -> tuple[int | None, bytes]:
            """Return a message's number, if the suite knows such, and its plaintext.

            :raises TokenError: the other end has not sealed this for this topic
            """


class _FernetCipher:
    def __init__(self, key: bytes) -> None:
        from cryptography.fernet import Fernet

        self._key = key
        self._fernet = Fernet(base64.urlsafe_b64encode(key))

    def __reduce__(self) -> tuple[type[_FernetCipher], tuple[bytes]]:
        """Let a worker return it."""
        return _FernetCipher, (self._key,)

    def seal(self, topic: str, number: int, plaintext: bytes) -> bytes:
        return self._fernet.encrypt(plaintext)

    def open(self, topic: str, message: bytes) -> tuple[None, bytes]:
        from cryptography.fernet import InvalidToken

        if not _is_canonical(message):
            raise TokenError("not a Fernet token")
        try:
            return None, self._fernet.decrypt(message)
        except InvalidToken:
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


class _GcmCipher:
    def __init__(self, seal_key: bytes, open_key: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM

        self._seal, self._open = AESGCM(seal_key), AESGCM(open_key)

    def seal(self, topic: str, number: int, plaintext: bytes) -> bytes:
        counter = number.to_bytes(COUNTER_SIZE, "big")
        # Each direction has its own key, and each counter is used once: no nonce comes again.
        return counter + self._seal.encrypt(bytes(4) + counter, plaintext, topic.encode())

    def open(self, topic: str, message: bytes) -> tuple[int, bytes]:
        from cryptography.exceptions import InvalidTag

        if len(message) < COUNTER_SIZE + TAG_SIZE:
            raise TokenError("too short for a message")
        counter, ciphertext = message[:COUNTER_SIZE], memoryview(message)[COUNTER_SIZE:]
        try:
            plaintext = self._open.decrypt(bytes(4) + counter, ciphertext, topic.encode())
        except InvalidTag:
            raise TokenError("not encrypted with our key") from None
        return int.from_bytes(counter, "big"), plaintext


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
        exponent = (OCTET_STRING, to_der(self._exponent))
        return to_pem(PRIVATE_KEY, to_der([0, _algorithm(), exponent]))

    def agree(self, transcript: Transcript, is_client: bool) -> Cipher:
        """Return the cipher, Fernet's."""
        peer_value = read_public_key(transcript.peer_payload(is_client))
        if peer_value == self.public_value:
            raise PeerKeyError("our own key handed back")
        return _FernetCipher(self.derive(peer_value))

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
        """Return the cipher, AES-256-GCM with a key for each direction."""
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
        return _GcmCipher(*(keys if is_client else reversed(keys)))


SUITES: dict[str, Callable[[], KeyPair]] = {"dh4096": DhKeyPair, "x25519": X25519KeyPair}


def suite_of(payload: bytes) -> str:
    """Return the suite of the public key in a key-exchange payload.

    :raises PeerKeyError: it belongs to none
    """
    if public_key_der(payload)[:-32] == X25519_PREFIX:
        return "x25519"
    read_public_key(payload)
    return "dh4096"


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


# --- signatures --------------------------------------------------------------------------------


class Identity:
    """A private key and its certificates, to sign key exchanges with."""

    def __init__(self, pem: bytes) -> None:
        """Read them from PEM blocks, in either order. KeyFileError if they cannot be used."""
        from cryptography import x509
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        if b"ENCRYPTED" in pem:
            raise KeyFileError("is encrypted; decrypt its key: openssl pkey -in KEY -out NEW_KEY")
        try:
            self._chain = x509.load_pem_x509_certificates(pem)
            self._key: Any = load_pem_private_key(pem, None)
            self._scheme = _signature_scheme(self._key.public_key())
            is_pair = self._chain[0].public_key() == self._key.public_key()
            is_over = has_expired(pem)
        except _certificate_errors():
            raise KeyFileError(
                "does not hold a certificate and a private key that can sign"
            ) from None
        if not is_pair:
            raise KeyFileError("holds a private key, and first a certificate for another")
        if is_over:
            raise KeyFileError("has expired; renew it")

    @property
    def names(self) -> list[str]:
        """Its DNS names."""
        return _dns_names(self._chain[0])

    def sign(self, public_key: bytes, netid: str, request: bytes | None = None) -> bytes:
        """Return the payload of message 1 or, if that is given as request, of message 2."""
        from cryptography.hazmat.primitives.serialization import Encoding

        signature = self._key.sign(_signed_bytes(public_key, netid, request), *self._scheme)
        chain = [certificate.public_bytes(Encoding.PEM) for certificate in self._chain]
        return b"".join((public_key, *chain, to_pem(SIGNATURE, signature)))


class Authority:
    """Whose certificates a peer can prove itself with."""

    def __init__(self, pem: bytes) -> None:
        """Read the authorities' own certificates (PEM). KeyFileError if there is none."""
        from cryptography import x509
        from cryptography.x509.verification import PolicyBuilder, Store

        try:
            self._policy = PolicyBuilder().store(Store(x509.load_pem_x509_certificates(pem)))
        except _certificate_errors():
            raise KeyFileError("holds no certificate in PEM") from None

    def verify(self, payload: bytes, netid: str, name: str, request: bytes | None = None) -> None:
        """Check who has signed message 1 or, if that is given as request, message 2.

        :param payload: that message, whole
        :param name: the DNS name that the signer's certificate must have
        :raises PeerKeyError: it was not signed by that name's owner for this exchange
        """
        from cryptography import x509
        from cryptography.exceptions import InvalidSignature

        signed_bytes = _signed_bytes(payload, netid, request)  # checks its size, too
        try:
            (_, *labels), (_, *contents) = zip(*pem_blocks(payload), strict=True)
            if SIGNATURE not in labels:
                raise PeerKeyError("not signed")
            if labels != [CERTIFICATE] * (len(labels) - 1) + [SIGNATURE]:
                raise ValueError
            *chain, signature = contents
            with warnings.catch_warnings():  # of a serial number below 1, which is refused below
                warnings.simplefilter("ignore")
                leaf, *others = map(x509.load_der_x509_certificate, chain)
            self._check_certificate(leaf, others, name, is_client=request is None)
            key: Any = leaf.public_key()
            key.verify(signature, signed_bytes, *_signature_scheme(key))
        except InvalidSignature:
            raise PeerKeyError("its signature does not match") from None
        except PeerKeyError:
            raise
        except _certificate_errors():
            raise PeerKeyError(
                "its signature or certificate is malformed, or of another kind"
            ) from None

    def _check_certificate(self, leaf: Any, others: list[Any], name: str, is_client: bool) -> None:
        from cryptography import x509
        from cryptography.x509.verification import VerificationError

        names = _dns_names(leaf)
        if not names:
            raise ValueError("no DNS name")
        try:
            if is_client:
                self._policy.build_client_verifier().verify(leaf, others)
            else:
                self._policy.build_server_verifier(x509.DNSName(names[0])).verify(leaf, others)
        except VerificationError as error:
            # After that comes the subject of a certificate, which a stranger chose.
            reason = str(error).partition(" (encountered")[0]
            problems = [text for part, text in CHAIN_PROBLEMS.items() if part in reason]
            problem = (*problems, "that is not valid")[0]
            raise PeerKeyError(f"signed with a certificate {problem}") from None
        if name not in names:
            raise PeerKeyError(f"signed by {', '.join(names)!r}, expected {name!r}")


def _dns_names(certificate: Any) -> list[str]:
    from cryptography import x509

    try:
        kind = x509.SubjectAlternativeName
        extension = certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return []
    return [*extension.get_values_for_type(x509.DNSName)]


def _certificate_errors() -> tuple[type[Exception], ...]:
    """Return what the library raises for certificates and keys that it cannot take."""
    from cryptography import exceptions, x509

    return (
        ValueError,
        exceptions.UnsupportedAlgorithm,
        x509.DuplicateExtension,
        x509.InvalidVersion,
        x509.UnsupportedGeneralNameType,
    )


def _signed_bytes(payload: bytes, netid: str, request: bytes | None) -> bytes:
    fields = [REQUEST_LABEL, netid.encode(), public_key_der(payload)]
    if request is not None:
        fields = [RESPONSE_LABEL, *fields[1:], digest(request)]
    return b"".join(len(field).to_bytes(4, "big") + field for field in fields)


def _signature_scheme(key: Any) -> tuple[Any, ...]:
    """Return the arguments that sign() and verify() want after the data, for a public key."""
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
    from cryptography.hazmat.primitives.hashes import SHA256

    if isinstance(key, ed25519.Ed25519PublicKey):
        return ()
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in ("secp256r1", "secp384r1"):
        return (ec.ECDSA(SHA256()),)
    if isinstance(key, rsa.RSAPublicKey) and key.key_size >= MIN_RSA_SIZE:
        return padding.PSS(padding.MGF1(SHA256()), PSS_SALT_SIZE), SHA256()
    raise ValueError("a key of another kind")


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


# --- work in the background --------------------------------------------------------------------


class Worker:
    """An object in a child process, which computes while this one does other things.

    What the object does not return never leaves the child. Make it before any thread starts.
    It ends when this process does, or drops it.
    """

    def __init__(self, make: Callable[[], object]) -> None:
        """Start the child, which makes the object. Where no process can be had, a thread does."""
        ours, theirs = socket.socketpair()
        process = _fork()
        if process == 0:
            ours.close()
            _work_and_exit(make, theirs)
        if process is None:
            threading.Thread(target=_work, args=(make, theirs), daemon=True).start()
        else:
            theirs.close()
        self._channel = ours.makefile("rwb")
        self.fileno = ours.fileno  # for select(): an answer has come
        ours.close()  # the file remains

    def send(self, method: str, *arguments: Any) -> None:
        """Let the object do something. One thing at a time. WorkerError if the child was ended."""
        import pickle

        try:
            pickle.dump((method, arguments), self._channel)
            self._channel.flush()
        except OSError:
            raise WorkerError from None

    def receive(self) -> Any:
        """Wait for the result, or raise the error. WorkerError if the child was ended."""
        import pickle

        try:
            result, error = pickle.load(self._channel)  # noqa: S301 - it comes from our own child
        except (EOFError, OSError, pickle.UnpicklingError):  # nothing more, or a part
            raise WorkerError from None
        if error:
            raise error
        return result

    def __getattr__(self, method: str) -> Callable[..., Any]:
        """Return a function that does something and waits for the result."""

        def call(*arguments: Any) -> Any:
            self.send(method, *arguments)
            return self.receive()

        return call


def _fork() -> int | None:
    """Do as os.fork() does, or return None if that fails.

    The child never gets what stops its parent, which may still need it.
    """
    process = None
    with contextlib.suppress(AttributeError, OSError):  # Windows; a limit on processes
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            process = os.fork()
        finally:
            if process != 0:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return process


def _work_and_exit(make: Callable[[], object], channel: socket.socket) -> NoReturn:
    try:
        _work(make, channel)
    finally:
        os._exit(0)  # exit handlers, buffers and tracebacks are the parent's to deal with


def _work(make: Callable[[], object], channel: socket.socket) -> None:
    make = functools.cache(make)
    with contextlib.suppress(CryptoError, ImportError):  # it comes again when the parent asks
        make()
    with channel.makefile("rwb") as file:
        while _answer_once(make, file):
            pass


def _answer_once(make: Callable[[], object], file: io.BufferedRWPair) -> bool:
    """Do one thing for the parent, and keep nothing of it: a message may be large."""
    import pickle

    try:
        method, arguments = pickle.load(file)  # noqa: S301 - it comes from our own parent
    except EOFError:
        return False
    result = error = None
    try:
        result = getattr(make(), method)(*arguments)
    except (CryptoError, ImportError) as caught:
        error = caught
    pickle.dump((result, error), file)
    file.flush()
    return True


class Calculator:
    """What a Worker does for a responder, in the suite dh4096."""

    def __init__(self) -> None:
        load_ciphers("dh4096")

    def make_key_pair(self) -> tuple[None, DhKeyPair]:
        """Return a new key pair."""
        return None, DhKeyPair()

    def agree(self, key_pair: DhKeyPair, transcript: Transcript) -> tuple[Cipher, DhKeyPair]:
        """Return the cipher of an exchange, and a new key pair for the next one."""
        return key_pair.agree(transcript, is_client=False), DhKeyPair()


def start_exchange(*arguments: Any) -> Exchange:
    """Begin an Exchange in the background, with its arguments. Call it before any thread starts.

    :raises KeyFileError: the group's file is unusable
    """
    read_group()  # raises its error here and not in the child
    return cast("Exchange", Worker(functools.partial(Exchange, *arguments)))


# --- reading and writing keys ------------------------------------------------------------------


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
    try:
        match from_der(public_key_der(payload)):
            case [algorithm, (tag, bytes(bits))] if tag == BIT_STRING and bits[:1] == b"\x00":
                _check_algorithm(algorithm)
                value = from_der(bits[1:])
            case _:
                raise ValueError("not a SubjectPublicKeyInfo")
        if not isinstance(value, int) or not 2 <= value <= read_group().p - 2:
            raise ValueError("a public value out of range")
    except PeerKeyError:
        raise
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


def has_expired(certificate: bytes) -> bool:
    """Tell whether the notAfter (RFC 5280, 4.1.2.5) of a certificate (PEM) has passed."""
    begin = certificate.index(b"-----BEGIN CERTIFICATE-----")  # a key may come first
    [tbs_certificate, *_] = from_der(from_pem(CERTIFICATE, certificate[begin:]))
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
