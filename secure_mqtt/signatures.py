"""Signed key exchanges: who signs, and whose signatures count.

Imported only when asked for, since x509 costs a request a third of its other imports.
"""

from __future__ import annotations

import warnings
from datetime import datetime, timezone
from typing import Any, NamedTuple

from cryptography import exceptions, x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from crypto import CERTIFICATE, KeyFileError, PeerKeyError, digest, pem_blocks, to_pem
from secure_mqtt.certificates import has_expired
from secure_mqtt.suites import key_blocks

SIGNATURE = b"SECURE MQTT SIGNATURE"  # a PEM label
REQUEST_LABEL = b"secure-mqtt/1 key-exchange request"
RESPONSE_LABEL = b"secure-mqtt/1 key-exchange response"
PSS_SALT_SIZE, MIN_RSA_SIZE = 32, 2048  # bytes; bits
CHAIN_PROBLEMS = {  # parts of what the library says, each with what it means
    "not valid at": "that has expired, or is not valid yet",
    "EKU": "for another purpose",
    "candidates exhausted": "from an unknown authority",
}
# What the library raises for certificates and keys that it cannot take.
CERTIFICATE_ERRORS = (
    ValueError,
    exceptions.UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


class Validity(NamedTuple):
    """When certificates are valid, in seconds since 1970, UTC."""

    begins: float
    ends: float


class Identity:
    """A private key and its certificates, to sign key exchanges with."""

    def __init__(self, pem: bytes) -> None:
        """Read them from PEM blocks, in either order. KeyFileError if they cannot be used."""
        if b"ENCRYPTED" in pem:
            raise KeyFileError("is encrypted; decrypt its key: openssl pkey -in KEY -out NEW_KEY")
        try:
            self._chain = x509.load_pem_x509_certificates(pem)
            self._key: Any = load_pem_private_key(pem, None)
            self._scheme = _signature_scheme(self._key.public_key())
            is_pair = self._chain[0].public_key() == self._key.public_key()
            is_over = has_expired(pem)
        except CERTIFICATE_ERRORS:
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

    def sign(self, blocks: bytes, netid: str, request: bytes | None = None) -> bytes:
        """Return the payload of message 1 or, if that is given as request, of message 2.

        :param blocks: what it begins with: our keys (PEM)
        """
        return self.bundle(blocks, _signed_bytes(blocks, netid, request))

    def bundle(self, blocks: bytes, signed_bytes: bytes) -> bytes:
        """Return keys (PEM), our certificates, and our signature over some bytes."""
        signature = self._key.sign(signed_bytes, *self._scheme)
        chain = [certificate.public_bytes(Encoding.PEM) for certificate in self._chain]
        return b"".join((blocks, *chain, to_pem(SIGNATURE, signature)))


class Authority:
    """Whose certificates a peer can prove itself with."""

    def __init__(self, pem: bytes) -> None:
        """Read the authorities' own certificates (PEM). KeyFileError if there is none."""
        try:
            self._policy = PolicyBuilder().store(Store(x509.load_pem_x509_certificates(pem)))
        except CERTIFICATE_ERRORS:
            raise KeyFileError("holds no certificate in PEM") from None

    def verify(self, payload: bytes, netid: str, name: str, request: bytes | None = None) -> None:
        """Check who has signed message 1 or, if that is given as request, message 2.

        :param payload: that message, whole
        :param name: the DNS name that the signer's certificate must have
        :raises PeerKeyError: it was not signed by that name's owner for this exchange
        """
        signed_bytes = _signed_bytes(payload, netid, request)  # checks its size, too
        self.verify_bundle(payload, signed_bytes, name, is_client=request is None)

    def verify_bundle(
        self,
        bundle: bytes,
        signed_bytes: bytes,
        name: str,
        is_client: bool = True,
        at: float | None = None,
    ) -> Validity:
        """Check who has signed some bytes.

        :param bundle: keys, certificates and signature (PEM), of a size that was checked
        :param name: the DNS name that the signer's certificate must have
        :param is_client: whether that must be for clients; else for servers
        :param at: the time to judge the certificates by, in seconds since 1970; None: now
        :return: when these certificates are valid
        :raises PeerKeyError: they were not signed by that name's owner
        """
        try:
            *chain, signature = _signature_blocks(bundle)
            with warnings.catch_warnings():  # of a serial number below 1, which is refused below
                warnings.simplefilter("ignore")
                leaf, *others = map(x509.load_der_x509_certificate, chain)
            path = self._check_certificate(leaf, others, name, is_client, at)
            key: Any = leaf.public_key()
            key.verify(signature, signed_bytes, *_signature_scheme(key))
        except exceptions.InvalidSignature:
            raise PeerKeyError("its signature does not match") from None
        except PeerKeyError:
            raise
        except CERTIFICATE_ERRORS:
            raise PeerKeyError(
                "its signature or certificate is malformed, or of another kind"
            ) from None
        return Validity(
            max(certificate.not_valid_before_utc.timestamp() for certificate in path),
            min(certificate.not_valid_after_utc.timestamp() for certificate in path),
        )

    def _check_certificate(
        self, leaf: Any, others: list[Any], name: str, is_client: bool, at: float | None
    ) -> list[Any]:
        """Return the certificates from a leaf to an authority's own."""
        names = _dns_names(leaf)
        if not names:
            raise ValueError("no DNS name")
        policy = self._policy
        if at is not None:
            policy = policy.time(datetime.fromtimestamp(at, timezone.utc))
        try:
            if is_client:
                path = policy.build_client_verifier().verify(leaf, others).chain
            else:
                path = policy.build_server_verifier(x509.DNSName(names[0])).verify(leaf, others)
        except VerificationError as error:
            # After that comes the subject of a certificate, which a stranger chose.
            reason = str(error).partition(" (encountered")[0]
            problems = [text for part, text in CHAIN_PROBLEMS.items() if part in reason]
            problem = (*problems, "that is not valid")[0]
            raise PeerKeyError(f"signed with a certificate {problem}") from None
        if name not in names:
            raise PeerKeyError(f"signed by {', '.join(names)!r}, expected {name!r}")
        return path


def _dns_names(certificate: Any) -> list[str]:
    try:
        kind = x509.SubjectAlternativeName
        extension = certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return []
    return [*extension.get_values_for_type(x509.DNSName)]


def _signature_blocks(payload: bytes) -> list[bytes]:
    """Return the contents of the blocks after the keys: the certificates, then the signature.

    :raises PeerKeyError: there is no signature
    :raises ValueError: there are others
    """
    blocks = [*pem_blocks(payload)]
    labels = [label for label, _ in blocks]
    if SIGNATURE not in labels:
        raise PeerKeyError("not signed")
    start = labels.index(CERTIFICATE)
    if labels[start:-1] != [CERTIFICATE] * (len(labels) - start - 1) or labels[-1] != SIGNATURE:
        raise ValueError("blocks that do not belong there")
    return [content for _, content in blocks[start:]]


def _signed_bytes(payload: bytes, netid: str, request: bytes | None) -> bytes:
    keys = b"".join(content for _, content in key_blocks(payload))
    fields = [REQUEST_LABEL, netid.encode(), keys]
    if request is not None:
        fields = [RESPONSE_LABEL, *fields[1:], digest(request)]
    return join_fields(*fields)


def join_fields(*fields: bytes) -> bytes:
    """Return fields joined, each after its length in 4 bytes, so that none can pass for another."""
    return b"".join(len(field).to_bytes(4, "big") + field for field in fields)


def _signature_scheme(key: Any) -> tuple[Any, ...]:
    """Return the arguments that sign() and verify() want after the data, for a public key."""
    if isinstance(key, ed25519.Ed25519PublicKey):
        return ()
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in ("secp256r1", "secp384r1"):
        return (ec.ECDSA(SHA256()),)
    if isinstance(key, rsa.RSAPublicKey) and key.key_size >= MIN_RSA_SIZE:
        return padding.PSS(padding.MGF1(SHA256()), PSS_SALT_SIZE), SHA256()
    raise ValueError("a key of another kind")
