"""What is published on a shared topic, a second time, from the bytes on the wire.

Shares no code with the program, as reference.py does not; see there for what that means.
"""

import hashlib
import hmac
import struct
from datetime import datetime
from typing import NamedTuple

import reference
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.x509.verification import PolicyBuilder, Store

ED25519_PREFIX = bytes.fromhex("302a300506032b6570032100")  # RFC 8410; 32 bytes follow


def fields(*parts: bytes) -> bytes:
    return b"".join(struct.pack(">I", len(part)) + part for part in parts)


def split(data: bytes) -> list[bytes]:
    """Return the parts that fields() has joined."""
    parts = []
    while data:
        (size,) = struct.unpack(">I", data[:4])
        part, data = data[4 : 4 + size], data[4 + size :]
        if len(part) != size:
            raise ValueError("cut")
        parts.append(part)
    return parts


def hkdf(key: bytes, info: bytes) -> bytes:
    """HKDF-SHA256 (RFC 5869) without salt, for 32 bytes."""
    extracted = hmac.digest(bytes(32), key, "sha256")
    return hmac.digest(extracted, info + b"\x01", "sha256")


# --- hellos ------------------------------------------------------------------------------------


def hello_bytes(keeper: str, topic: str, netid: str, der: bytes) -> bytes:
    names = (name.encode() for name in (keeper, topic, netid))
    return fields(b"secure-mqtt/1 topic hello", *names, der)


class Session:
    """A session of a publisher."""

    def __init__(
        self,
        topic: str,
        netid: str,
        keeper: str,
        identity: reference.SigningKey,
        chain: bytes,
        private_key: bytes | None = None,
    ) -> None:
        generate = ed25519.Ed25519PrivateKey.generate
        load = ed25519.Ed25519PrivateKey.from_private_bytes
        self.key = load(private_key) if private_key else generate()
        der = ED25519_PREFIX + self.key.public_key().public_bytes_raw()
        signature = reference.sign(identity, hello_bytes(keeper, topic, netid, der))
        signed = reference.pem(reference.SIGNATURE, signature)
        self.hello = fields(netid.encode(), reference.pem("PUBLIC KEY", der) + chain + signed)
        self.session = hashlib.sha256(self.hello).digest()[:16]


class Introduced(NamedTuple):
    netid: str
    key: ed25519.Ed25519PublicKey
    session: bytes


def read_hello(
    hello: bytes,
    topic: str,
    keeper: str,
    anchors: list[x509.Certificate],
    now: datetime | None = None,
) -> Introduced:
    """Return who introduces a session; REFUSED if that is nobody."""
    name, bundle = split(hello)
    netid = name.decode("ascii")
    der, (leaf, *others), signature = reference.read_bundle(bundle)
    policy = PolicyBuilder().store(Store(anchors))
    policy = policy if now is None else policy.time(now)
    policy.build_client_verifier().verify(leaf, others)
    names = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    if netid not in names.get_values_for_type(x509.DNSName):
        raise ValueError("another's certificate")
    reference.verify(leaf.public_key(), signature, hello_bytes(keeper, topic, netid, der))
    if der[:12] != ED25519_PREFIX:
        raise ValueError("no Ed25519 key")
    key = ed25519.Ed25519PublicKey.from_public_bytes(der[12:])
    return Introduced(netid, key, hashlib.sha256(hello).digest()[:16])


def seal_hello(topic: str, epoch: int, key: bytes, hello: bytes, nonce: bytes) -> bytes:
    head = b"\x02" + struct.pack(">I", epoch) + nonce
    derived = hkdf(key, fields(b"secure-mqtt/1 topic hello", topic.encode()))
    return head + AESGCM(derived).encrypt(nonce, hello, topic.encode() + head)


def open_hello(topic: str, epoch: int, key: bytes, payload: bytes) -> bytes:
    head, sealed = payload[:17], payload[17:]
    if head[:5] != b"\x02" + struct.pack(">I", epoch) or len(sealed) < 16:
        raise ValueError("no hello of this epoch")
    derived = hkdf(key, fields(b"secure-mqtt/1 topic hello", topic.encode()))
    return AESGCM(derived).decrypt(head[5:], sealed, topic.encode() + head)


# --- messages ----------------------------------------------------------------------------------


def message_cipher(topic: str, key: bytes, session: bytes) -> AESGCM:
    return AESGCM(hkdf(key, fields(b"secure-mqtt/1 topic message", topic.encode(), session)))


def message_bytes(topic: str, head: bytes, key: bytes, time: bytes, data: bytes) -> bytes:
    fingerprint = hashlib.sha256(key).digest()
    return fields(b"secure-mqtt/1 topic message", topic.encode(), head, fingerprint, time, data)


def seal_message(
    topic: str,
    epoch: int,
    key: bytes,
    by: Session,
    counter: int,
    time: int,
    data: bytes,
    session: bytes | None = None,
) -> bytes:
    """Return a message; session: another's, to be forged."""
    session = by.session if session is None else session
    head = b"\x01" + struct.pack(">I", epoch) + session + struct.pack(">Q", counter)
    moment = struct.pack(">Q", time)
    text = moment + by.key.sign(message_bytes(topic, head, key, moment, data)) + data
    cipher = message_cipher(topic, key, session)
    return head + cipher.encrypt(bytes(4) + head[21:], text, topic.encode() + head)


class Opened(NamedTuple):
    counter: int
    time: int
    data: bytes


def open_message(topic: str, epoch: int, key: bytes, by: Introduced, payload: bytes) -> Opened:
    """Return what is in a message of a session; REFUSED if another has written it."""
    head, sealed = payload[:29], payload[29:]
    if head[:21] != b"\x01" + struct.pack(">I", epoch) + by.session or len(sealed) < 88:
        raise ValueError("no message of this session in this epoch")
    cipher = message_cipher(topic, key, by.session)
    text = cipher.decrypt(bytes(4) + head[21:], sealed, topic.encode() + head)
    time, signature, data = text[:8], text[8:72], text[72:]
    by.key.verify(signature, message_bytes(topic, head, key, time, data))
    (counter,), (milliseconds,) = struct.unpack(">Q", head[21:]), struct.unpack(">Q", time)
    return Opened(counter, milliseconds, data)


def notice(epoch: int) -> bytes:
    return b"\x03" + struct.pack(">I", epoch)
