"""Signed key exchanges: who signs, and whose signatures count.

Imported only when asked for, since x509 costs a request a third of its other imports.
"""

from __future__ import annotations

import time
import warnings
from collections import OrderedDict
from datetime import datetime, timezone
from typing import Any, NamedTuple

from cryptography import exceptions, x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID, PublicKeyAlgorithmOID
from cryptography.x509.verification import PolicyBuilder, Store, VerificationError

from crypto import CERTIFICATE, KeyFileError, PeerKeyError, digest, pem_blocks, to_pem
from secure_mqtt.certificates import (
    MAX_CERTIFICATE_SIZE,
    MAX_CHAIN,
    MAX_EXCHANGE_SIZE,
    Validity,
    has_expired,
    join_fields,
)
from secure_mqtt.suites import key_blocks, split_payload

SIGNATURE = b"SECURE MQTT SIGNATURE"  # a PEM label
REQUEST_LABEL = b"secure-mqtt/1 key-exchange request"
RESPONSE_LABEL = b"secure-mqtt/1 key-exchange response"
PSS_SALT_SIZE = 32  # bytes
MAX_SHOWN, MAX_SHOWN_SIZE = 3, 200  # names in an error, and characters of them
MAX_SIGNERS = 5_000  # whose certificates are not verified again: 3 KiB each
# Work with a key of RSA grows with the length of its numbers; public exponents are 65537 mostly.
RSA_SIZES, MAX_RSA_EXPONENT_SIZE = range(2048, 4096 + 1), 32  # bits
# Others are not even read: one of Diffie-Hellman takes the library seconds.
KEY_ALGORITHMS = (
    PublicKeyAlgorithmOID.ED25519,
    PublicKeyAlgorithmOID.EC_PUBLIC_KEY,
    PublicKeyAlgorithmOID.RSAES_PKCS1_v1_5,
)
TOO_MUCH = f"more than {MAX_CHAIN} certificates, or one of more than 8 KiB"
OTHER_PURPOSE = "for another purpose"
CHAIN_PROBLEMS = {  # parts of what the library says, each with what it means
    "not valid at": "that has expired, or is not valid yet",
    "EKU": OTHER_PURPOSE,
    "candidates exhausted": "from an unknown authority",
    "2.5.29.17: Certificate is missing": "without a name",  # the OID of subjectAltName
    "subjectAltName": "without a name",
}
# What the library raises for certificates and keys that it cannot take.
CERTIFICATE_ERRORS = (
    ValueError,
    exceptions.UnsupportedAlgorithm,
    x509.DuplicateExtension,
    x509.InvalidVersion,
    x509.UnsupportedGeneralNameType,
)


class Signer(NamedTuple):
    """Whom an authority has certified."""

    key: Any  # public
    names: list[str]  # DNS names
    validity: Validity


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
        if _is_too_much([each.public_bytes(Encoding.DER) for each in self._chain]):
            raise KeyFileError(f"holds {TOO_MUCH}, which no peer accepts")
        self._bundle = b"".join(each.public_bytes(Encoding.PEM) for each in self._chain)

    @property
    def names(self) -> list[str]:
        """Its DNS names."""
        return _dns_names(self._chain[0])

    def sign(self, blocks: bytes, netid: str, request: bytes | None = None) -> bytes:
        """Return the payload of message 1 or, if that is given as request, of message 2.

        :param blocks: what it begins with: our keys (PEM)
        """
        return self.sign_bytes(blocks, _signed_bytes(blocks, netid, request))

    def sign_bytes(self, blocks: bytes, signed_bytes: bytes) -> bytes:
        """Return PEM blocks, our certificates, and our signature over some bytes."""
        signature = self._key.sign(signed_bytes, *self._scheme)
        return b"".join((blocks, self._bundle, to_pem(SIGNATURE, signature)))


class Authority:
    """Whose certificates a peer can prove itself with.

    Its content is the file as it was read, to compare with another.
    """

    def __init__(self, pem: bytes) -> None:
        """Read the authorities' own certificates (PEM). KeyFileError if there is none."""
        self.content = pem
        self._signers: OrderedDict[bytes, Signer] = OrderedDict()  # newest use last
        try:
            self._anchors = x509.load_pem_x509_certificates(pem)
            self._policy = PolicyBuilder().store(Store(self._anchors))
        except CERTIFICATE_ERRORS:
            raise KeyFileError("holds no certificate in PEM") from None

    def verify(self, payload: bytes, netid: str, name: str, request: bytes | None = None) -> float:
        """Check who has signed message 1 or, if that is given as request, message 2.

        :param payload: that message, whole
        :param name: the DNS name that the signer's certificate must have
        :return: until when that holds, in seconds since 1970: the end of the first certificate that
            ends of those between the signer and our authority, its own included
        :raises PeerKeyError: it was not signed by that name's owner for this exchange
        """
        if len(payload) > MAX_EXCHANGE_SIZE:
            raise PeerKeyError("larger than any signed key exchange")
        signed_bytes = _signed_bytes(payload, netid, request)
        return self.verify_bytes(payload, signed_bytes, name, is_client=request is None).ends

    def verify_bytes(
        self,
        bundle: bytes,
        signed_bytes: bytes,
        name: str,
        is_client: bool = True,
        at: float | None = None,
    ) -> Validity:
        """Check who has signed some bytes.

        :param bundle: PEM blocks, certificates and signature, of a size that was checked
        :param name: the DNS name that the signer's certificate must have
        :param is_client: whether it must be for clients; else for responders
        :param at: when it must be valid, in seconds since 1970; None: now
        :return: when the certificates between the signer and our authority are valid
        :raises PeerKeyError: the bytes were not signed by that name's owner
        """
        try:
            with warnings.catch_warnings():  # of oddities that nobody here could do anything about
                warnings.simplefilter("ignore")
                return self._verify(bundle, signed_bytes, name, is_client, at)
        except exceptions.InvalidSignature:
            raise PeerKeyError("its signature does not match") from None
        except PeerKeyError:
            raise
        except Exception:  # the library does not say all that it raises for what a stranger sends
            raise PeerKeyError(
                "its signature or certificate is malformed, or of another kind"
            ) from None

    def _verify(
        self, bundle: bytes, signed_bytes: bytes, name: str, is_client: bool, at: float | None
    ) -> Validity:
        *chain, signature = _signature_blocks(bundle)
        place = digest(join_fields(*chain, bytes([is_client])))
        # Who was certified once stays so until a certificate ends: most of the time of a
        # verification is for those, and the same ones come with each new key of a session.
        signer = self._signers.get(place)
        if not signer or not signer.validity.holds_at(time.time() if at is None else at):
            signer = self._read_signer(chain, is_client, at)
        _check_name(signer.names, name)
        signer.key.verify(signature, signed_bytes, *_signature_scheme(signer.key))
        self._remember(place, signer)
        return signer.validity

    def _remember(self, place: bytes, signer: Signer) -> None:
        """Remember who has signed: certificates alone, which anyone may show, push nobody out."""
        self._signers[place] = signer
        self._signers.move_to_end(place)
        if len(self._signers) > MAX_SIGNERS:
            self._signers.popitem(last=False)

    def _read_signer(self, chain: list[bytes], is_client: bool, at: float | None) -> Signer:
        leaf, *others = _read_chain(chain)
        path = self._verified_path(leaf, others, is_client, at)
        _check_purpose(leaf, is_client)
        validity = Validity(
            max(certificate.not_valid_before_utc.timestamp() for certificate in path),
            min(certificate.not_valid_after_utc.timestamp() for certificate in path),
        )
        return Signer(leaf.public_key(), _dns_names(leaf), validity)

    def _verified_path(
        self, leaf: Any, others: list[Any], is_client: bool, at: float | None
    ) -> list[Any]:
        """Return the certificates from a leaf to an anchor, which are all valid then."""
        issuers = self._issuers_among(others)
        policy = self._policy
        if at is not None:
            policy = policy.time(datetime.fromtimestamp(at, timezone.utc))
        try:
            if is_client:
                return policy.build_client_verifier().verify(leaf, issuers).chain
            # The library wants a name. The leaf's own will do, since ours is compared later.
            [name, *_] = *_dns_names(leaf), "none"
            return policy.build_server_verifier(x509.DNSName(name)).verify(leaf, issuers)
        except VerificationError as error:
            # After that comes the subject of a certificate, which a stranger chose.
            reason = str(error).partition(" (encountered")[0]
            problems = [text for part, text in CHAIN_PROBLEMS.items() if part in reason]
            problem = (*problems, "that is not valid")[0]
            raise PeerKeyError(f"signed with a certificate {problem}") from None

    def _issuers_among(self, certificates: list[Any]) -> list[Any]:
        """Return those certificates that an anchor has issued, or another of them.

        The library tries each way through what it is given, from the leaf up. A stranger could make
        the ways many, of keys that take long. So it gets nothing of a stranger's, and no signature
        is verified with a key that no anchor vouches for.
        """
        trusted = [*self._anchors]
        while found := [
            certificate
            for certificate in certificates
            if certificate not in trusted and any(_issued(certificate, by) for by in trusted)
        ]:
            trusted += found
        return trusted[len(self._anchors) :]


def _issued(certificate: Any, issuer: Any) -> bool:
    try:
        certificate.verify_directly_issued_by(issuer)
    except (exceptions.InvalidSignature, TypeError, *CERTIFICATE_ERRORS):
        return False
    return True


def _is_too_much(chain: list[bytes]) -> bool:
    """Tell whether certificates (DER) are more, or larger, than one may sign with."""
    return len(chain) > MAX_CHAIN or max(map(len, chain)) > MAX_CERTIFICATE_SIZE


def _read_chain(chain: list[bytes]) -> list[Any]:
    """Return a peer's certificates.

    :raises PeerKeyError, ValueError: work with them takes too long, or they are malformed
    """
    if _is_too_much(chain):
        raise PeerKeyError(f"signed with {TOO_MUCH}")
    certificates = [*map(x509.load_der_x509_certificate, chain)]
    for certificate in certificates:
        if certificate.public_key_algorithm_oid not in KEY_ALGORITHMS:
            raise ValueError("a key of another kind")
        _check_key(certificate.public_key())
    return certificates


def _check_purpose(leaf: Any, is_client: bool) -> None:
    """Check that a certificate says that its key signs for a client's end, or a responder's.

    One that says nothing may be for anything else. anyExtendedKeyUsage does not do either: whoever
    demands a purpose may refuse it (RFC 5280, 4.2.1.12).
    """
    purpose = ExtendedKeyUsageOID.CLIENT_AUTH if is_client else ExtendedKeyUsageOID.SERVER_AUTH
    if purpose not in (_extension(leaf, x509.ExtendedKeyUsage) or ()):
        raise PeerKeyError(f"signed with a certificate {OTHER_PURPOSE}")
    usage = _extension(leaf, x509.KeyUsage)
    if usage and not usage.digital_signature:
        raise PeerKeyError("signed with a certificate for a key that is not for signatures")


def _check_name(names: list[str], name: str) -> None:
    if name not in names:
        shown = ", ".join(names[:MAX_SHOWN])[:MAX_SHOWN_SIZE]
        more = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
        raise PeerKeyError(f"signed by {shown!r}{more}, expected {name[:MAX_SHOWN_SIZE]!r}")


def _dns_names(certificate: Any) -> list[str]:
    names = _extension(certificate, x509.SubjectAlternativeName)
    return names.get_values_for_type(x509.DNSName) if names else []


def _extension(certificate: Any, kind: Any) -> Any:
    """Return a certificate's extension of a kind, or None."""
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def _signature_blocks(payload: bytes) -> list[bytes]:
    """Return the contents of the blocks after the keys: the certificates, then the signature.

    :raises PeerKeyError: there is no signature
    :raises ValueError: there are others
    """
    if SIGNATURE not in payload:
        raise PeerKeyError("not signed")
    _, proof = split_payload(payload)
    blocks = [*pem_blocks(proof)]
    labels = [label for label, _ in blocks]
    if labels != [*[CERTIFICATE] * (len(labels) - 1), SIGNATURE]:
        raise ValueError("blocks that do not belong there")
    return [content for _, content in blocks]


def _signed_bytes(payload: bytes, netid: str, request: bytes | None) -> bytes:
    keys = b"".join(content for _, content in key_blocks(payload))
    fields = [REQUEST_LABEL, netid.encode(), keys]
    if request is not None:
        fields = [RESPONSE_LABEL, *fields[1:], digest(request)]
    return join_fields(*fields)


def _signature_scheme(key: Any) -> tuple[Any, ...]:
    """Return the arguments that sign() and verify() want after the data, for a public key."""
    if isinstance(key, ed25519.Ed25519PublicKey):
        return ()
    if isinstance(key, ec.EllipticCurvePublicKey) and key.curve.name in ("secp256r1", "secp384r1"):
        return (ec.ECDSA(SHA256()),)
    if isinstance(key, rsa.RSAPublicKey):
        _check_key(key)
        return padding.PSS(padding.MGF1(SHA256()), PSS_SALT_SIZE), SHA256()
    raise ValueError("a key of another kind")


def _check_key(key: Any) -> None:
    if isinstance(key, rsa.RSAPublicKey):
        exponent = key.public_numbers().e
        if key.key_size not in RSA_SIZES or exponent.bit_length() > MAX_RSA_EXPONENT_SIZE:
            raise ValueError("a key of RSA that is too short, or takes too long")
