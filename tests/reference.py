"""The signed key exchange, x25519 and mlkem768x25519, a second time, from the bytes on the wire.

Shares no code with the client. Only curves, ML-KEM, RSA, AES-GCM and X.509 are `cryptography`'s;
PEM, lengths, HKDF and nonces are spelled out here, so that the vectors made with this file say
what the protocol says. Whatever it refuses, it refuses by raising one of REFUSED.
"""

import hashlib
import hmac
import re
import struct
from base64 import b64decode, b64encode
from datetime import datetime

from cryptography import x509
from cryptography.exceptions import InvalidSignature, InvalidTag, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, mlkem, padding, rsa, x25519
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

SigningKey = ed25519.Ed25519PrivateKey | ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
REFUSED = (
    *(ValueError, InvalidSignature, InvalidTag),
    *(VerificationError, UnsupportedAlgorithm, x509.ExtensionNotFound),
)
BLOCK = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----\n([^-]*)-----END \1-----\n?")
SIGNATURE, CIPHERTEXT = "SECURE MQTT SIGNATURE", "SECURE MQTT CIPHERTEXT"
CURVES = ("secp256r1", "secp384r1")  # P-256, P-384
KEY_KINDS = ("1.3.101.112", "1.2.840.10045.2.1", "1.2.840.113549.1.1.1")  # Ed25519, EC, RSA
PSS = padding.PSS(padding.MGF1(SHA256()), salt_length=32)
X25519_PREFIX = bytes.fromhex("302a300506032b656e032100")  # RFC 8410; the 32-byte point follows
MLKEM_PREFIX = bytes.fromhex("308204b2300b0609608648016503040402038204a100")  # RFC 9935; 1,184


def pem(label: str, content: bytes) -> bytes:
    """Return one PEM block: 64 columns, LF."""
    lines = re.findall(".{1,64}", b64encode(content).decode())
    return "\n".join([f"-----BEGIN {label}-----", *lines, f"-----END {label}-----", ""]).encode()


def blocks(payload: bytes) -> list[tuple[str, bytes]]:
    """Return label and content of every block; only the last LF may be missing."""
    found = [(block[1].decode(), b64decode(block[2])) for block in BLOCK.finditer(payload)]
    if not found or b"".join(pem(*block) for block in found) not in (payload, payload + b"\n"):
        raise ValueError("more or less than PEM")
    return found


def public_der(payload: bytes) -> bytes:
    """Return the SubjectPublicKeyInfo of a payload, signed or not: its first block."""
    first = BLOCK.match(payload)
    [(label, der)] = blocks(first[0] if first else b"")
    if label != "PUBLIC KEY":
        raise ValueError("no public key")
    return der


def key_blocks(payload: bytes) -> list[tuple[str, bytes]]:
    """Return the blocks before the first certificate, which must be those of some suite."""
    found = blocks(payload)
    labels = [label for label, _ in found]
    found = found[: labels.index("CERTIFICATE") if "CERTIFICATE" in labels else None]
    is_hybrid = len(found) == 2 and (
        (found[0][1].startswith(MLKEM_PREFIX) and labels[1] == "PUBLIC KEY")
        or (found[0][1].startswith(X25519_PREFIX) and labels[1] == CIPHERTEXT)
    )
    if labels[0] != "PUBLIC KEY" or not (is_hybrid or len(found) == 1):
        raise ValueError("not the keys of a suite")
    return found


def signed_bytes(netid: str, keys: bytes, payload1: bytes | None = None) -> bytes:
    """Return what is signed of message 1, or of the message 2 that answers `payload1`."""
    what = b"request" if payload1 is None else b"response"
    fields = [b"secure-mqtt/1 key-exchange " + what, netid.encode(), keys]
    if payload1 is not None:
        fields.append(hashlib.sha256(payload1).digest())
    return b"".join(struct.pack(">I", len(field)) + field for field in fields)


def sign(key: SigningKey, data: bytes) -> bytes:
    """Sign as this kind of key does."""
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return key.sign(data)
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return key.sign(data, ec.ECDSA(SHA256()))
    return key.sign(data, PSS, SHA256())


def verify(key: object, signature: bytes, data: bytes) -> None:
    """Verify as this kind of key does."""
    if isinstance(key, ed25519.Ed25519PublicKey):
        key.verify(signature, data)
    elif isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in CURVES:
        key.verify(signature, data, ec.ECDSA(SHA256()))
    elif isinstance(key, rsa.RSAPublicKey):
        key.verify(signature, data, PSS, SHA256())
    else:
        raise ValueError("no key for signatures")


def bundle(
    netid: str, der: bytes, key: SigningKey, chain: bytes, payload1: bytes | None = None
) -> bytes:
    """Return the signed payload of message 1, or of message 2; `chain` is PEM, leaf first."""
    return bundle_of(netid, pem("PUBLIC KEY", der), key, chain, payload1)


def bundle_of(
    netid: str, keys: bytes, key: SigningKey, chain: bytes, payload1: bytes | None = None
) -> bytes:
    """Do as bundle() does, with all that comes before the certificates, in PEM."""
    contents = b"".join(content for _, content in blocks(keys))
    return keys + chain + pem(SIGNATURE, sign(key, signed_bytes(netid, contents, payload1)))


def read_bundle(payload: bytes) -> tuple[bytes, list[x509.Certificate], bytes]:
    """Return a signed payload's keys (DER, joined), certificates and signature."""
    keys = key_blocks(payload)
    der = b"".join(content for _, content in keys)
    *certificates, (last, signature) = blocks(payload)[len(keys) :]
    labels = {label for label, _ in certificates}
    if (labels, last) != ({"CERTIFICATE"}, SIGNATURE):
        raise ValueError("unsigned, or other blocks than it should have")
    if len(certificates) > 3 or any(len(content) > 8192 for _, content in certificates):
        raise ValueError("too much to look at")
    chain = [x509.load_der_x509_certificate(content) for _, content in certificates]
    for certificate in chain:
        check_key(certificate)
    return der, chain, signature


def check_key(certificate: x509.Certificate) -> None:
    """Check that work with a certificate's key takes little time."""
    if certificate.public_key_algorithm_oid.dotted_string not in KEY_KINDS:
        raise ValueError("a key of another kind")
    key = certificate.public_key()
    if isinstance(key, rsa.RSAPublicKey) and not (
        2048 <= key.key_size <= 4096 and key.public_numbers().e < 2**32
    ):
        raise ValueError("RSA of another size")


def verify_bundle(
    payload: bytes,
    netid: str,
    name: str,
    anchors: list[x509.Certificate],
    payload1: bytes | None = None,
    now: datetime | None = None,
) -> bytes:
    """Return the keys (DER, joined) of a signed message 1, or of a message 2 with `payload1`."""
    der, chain, signature = read_bundle(payload)
    policy = PolicyBuilder().store(Store(anchors))
    policy = policy if now is None else policy.time(now)
    if payload1 is None:
        policy.build_client_verifier().verify(chain[0], chain[1:])
    else:
        policy.build_server_verifier(x509.DNSName(name)).verify(chain[0], chain[1:])
    check_purpose(chain[0], "1.3.6.1.5.5.7.3.2" if payload1 is None else "1.3.6.1.5.5.7.3.1")
    names = chain[0].extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    if name not in names.get_values_for_type(x509.DNSName):
        raise ValueError("another's certificate")
    verify(chain[0].public_key(), signature, signed_bytes(netid, der, payload1))
    return der


def check_purpose(leaf: x509.Certificate, purpose: str) -> None:
    """Check that a certificate is for clientAuth or serverAuth, and its key for signatures."""
    purposes = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    if purpose not in [each.dotted_string for each in purposes]:
        raise ValueError("for another purpose")
    for extension in leaf.extensions:
        if isinstance(extension.value, x509.KeyUsage) and not extension.value.digital_signature:
            raise ValueError("not for signatures")


def x25519_secret(private: x25519.X25519PrivateKey, peer_der: bytes) -> bytes:
    """Return Z; all-zero is refused."""
    if len(peer_der) != 44 or not peer_der.startswith(X25519_PREFIX):
        raise ValueError("no X25519 key")
    z = private.exchange(x25519.X25519PublicKey.from_public_bytes(peer_der[12:]))
    if not any(z):
        raise ValueError("a point of small order")
    return z


class X25519Keys:
    """Either end's keys in the suite x25519."""

    suite = "x25519"

    def __init__(self, private: bytes | None = None) -> None:
        """Take a private key, or make one."""
        make = x25519.X25519PrivateKey
        self.private = make.generate() if private is None else make.from_private_bytes(private)

    def block(self) -> bytes:
        """Return the public key."""
        return pem("PUBLIC KEY", X25519_PREFIX + self.private.public_key().public_bytes_raw())

    def ask(self) -> bytes:
        """Return the blocks of message 1."""
        return self.block()

    def answer(self, payload1: bytes) -> tuple[bytes, bytes]:
        """Return the blocks of message 2, and Z."""
        return self.block(), self.agree(payload1)

    def agree(self, payload: bytes) -> bytes:
        """Return Z, for the other end's message."""
        [(_, der)] = key_blocks(payload)
        return x25519_secret(self.private, der)


class HybridKeys(X25519Keys):
    """Either end's keys in the suite mlkem768x25519."""

    suite = "mlkem768x25519"

    def __init__(self, seed: bytes | None = None, private: bytes | None = None) -> None:
        """Take private keys, or make them."""
        super().__init__(private)
        make = mlkem.MLKEM768PrivateKey
        self.decapsulation = make.generate() if seed is None else make.from_seed_bytes(seed)

    def ask(self) -> bytes:
        """Return the blocks of message 1."""
        raw = self.decapsulation.public_key().public_bytes_raw()
        return pem("PUBLIC KEY", MLKEM_PREFIX + raw) + self.block()

    def answer(self, payload1: bytes) -> tuple[bytes, bytes]:
        """Return the blocks of message 2, and Z."""
        (_, first), (_, second) = key_blocks(payload1)
        if len(first) != 22 + 1184 or not first.startswith(MLKEM_PREFIX):
            raise ValueError("no key for ML-KEM-768")
        secret, ciphertext = mlkem.MLKEM768PublicKey.from_public_bytes(first[22:]).encapsulate()
        head = self.block() + pem(CIPHERTEXT, ciphertext)
        return head, secret + x25519_secret(self.private, second)

    def agree(self, payload: bytes) -> bytes:
        """Return Z, for message 2."""
        (_, der), (label, ciphertext) = key_blocks(payload)
        if label != CIPHERTEXT or len(ciphertext) != 1088:
            raise ValueError("no ciphertext of ML-KEM-768")
        return self.decapsulation.decapsulate(ciphertext) + x25519_secret(self.private, der)


def message_keys(
    suite: str, z: bytes, netid: str, payload1: bytes, payload2: bytes
) -> tuple[bytes, bytes]:
    """Return the key of requests and the key of responses: HKDF-SHA256 (RFC 5869) by hand."""
    salt = hashlib.sha256(payload1).digest() + hashlib.sha256(payload2).digest()
    info = b"secure-mqtt/1 " + suite.encode() + b"-aes256gcm" + b"\x00" + netid.encode()
    extracted = hmac.digest(salt, z, "sha256")
    first = hmac.digest(extracted, info + b"\x01", "sha256")
    return first, hmac.digest(extracted, first + info + b"\x02", "sha256")


def seal(key: bytes, topic: str, counter: int, plaintext: bytes) -> bytes:
    """Return a message for a topic."""
    head = struct.pack(">Q", counter)
    return head + AESGCM(key).encrypt(bytes(4) + head, plaintext, topic.encode())


def unseal(key: bytes, topic: str, message: bytes) -> tuple[int, bytes]:
    """Return counter and plaintext; whether that counter may come now is the session's to say."""
    if len(message) < 24:  # counter and tag
        raise ValueError("too short")
    text = AESGCM(key).decrypt(bytes(4) + message[:8], message[8:], topic.encode())
    return int.from_bytes(message[:8], "big"), text
