"""Certificates of many kinds, and key exchanges signed with them, for what has to judge them."""

from __future__ import annotations

import math
import secrets
from datetime import datetime, timedelta, timezone
from typing import Any, NamedTuple

import reference
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa, x25519
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

NETID = "le0nh4rt"
PURPOSES = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH])
NOW = datetime.now(timezone.utc).replace(microsecond=0)  # a certificate knows no smaller part
HOUR = timedelta(hours=1)


def x25519_public_key() -> bytes:
    """Return a new one (DER): what there is to sign."""
    public_key = x25519.X25519PrivateKey.generate().public_key()
    return public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def p256() -> ec.EllipticCurvePrivateKey:
    """Return a new key on P-256."""
    return ec.generate_private_key(ec.SECP256R1())


def p384() -> ec.EllipticCurvePrivateKey:
    """Return a new key on P-384, which takes seven times as long to verify with."""
    return ec.generate_private_key(ec.SECP384R1())


def odd_rsa(size: int, exponent_size: int) -> rsa.RSAPrivateKey:
    """Return a key with a public exponent of a number of bits, as no library makes them."""
    factors = rsa.generate_private_key(65537, size).private_numbers()
    p, q = factors.p, factors.q
    order = math.lcm(p - 1, q - 1)
    e = 1
    while math.gcd(e, order) != 1 or e == 1:
        e = secrets.randbits(exponent_size) | 1 << exponent_size - 1 | 1
    d = pow(e, -1, order)
    numbers = rsa.RSAPrivateNumbers(
        *(p, q, d, d % (p - 1), d % (q - 1), pow(q, -1, p)), rsa.RSAPublicNumbers(e, p * q)
    )
    return numbers.private_key(unsafe_skip_rsa_key_validation=True)


def named(*names: str) -> x509.SubjectAlternativeName:
    """Return the extension with DNS names."""
    return x509.SubjectAlternativeName([x509.DNSName(name) for name in names])


def key_usage(*usages: str) -> x509.KeyUsage:
    """Return the extension that says what a key may be used for (RFC 5280, 4.2.1.3)."""
    kinds = (
        *("digital_signature", "content_commitment", "key_encipherment", "data_encipherment"),
        *("key_agreement", "key_cert_sign", "crl_sign", "encipher_only", "decipher_only"),
    )
    return x509.KeyUsage(**{kind: kind in usages for kind in kinds})


ALICE = named(NETID), PURPOSES  # a leaf's extensions


class Issuer(NamedTuple):
    """Who issues certificates: a private key, and the name that it goes by."""

    key: Any
    name: x509.Name

    def issue(
        self,
        public_key: Any,
        *extensions: x509.ExtensionType,
        subject: x509.Name | None = None,
        begins: datetime = NOW - HOUR,
        ends: datetime = NOW + HOUR,
    ) -> x509.Certificate:
        """Return a certificate for a public key."""
        subject = subject or common_name("leaf")
        builder = x509.CertificateBuilder(
            *(self.name, subject, public_key, x509.random_serial_number(), begins, ends)
        )
        own_key = self.key.public_key()
        identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(own_key)
        for extension in identifier, *extensions:
            is_critical = isinstance(extension, x509.BasicConstraints | x509.KeyUsage)
            builder = builder.add_extension(extension, is_critical)
        has_no_hash = isinstance(self.key, ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey)
        return builder.sign(self.key, None if has_no_hash else SHA256())

    def certify(self, other: Issuer, ends: datetime = NOW + HOUR) -> x509.Certificate:
        """Return the certificate of an issuer, which may be this one."""
        public_key = other.key.public_key()
        extensions = (
            x509.BasicConstraints(ca=True, path_length=None),
            key_usage("key_cert_sign", "crl_sign"),
            x509.SubjectKeyIdentifier.from_public_key(public_key),
        )
        return self.issue(public_key, *extensions, subject=other.name, ends=ends)


def common_name(text: str) -> x509.Name:
    """Return a name of one part."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def pem(*certificates: x509.Certificate) -> bytes:
    """Return certificates as PEM."""
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)


def signed(
    key: reference.SigningKey, *chain: x509.Certificate, request: bytes | None = None
) -> bytes:
    """Return message 1 or, if that is given as request, message 2, as this key signs it."""
    return reference.bundle(NETID, x25519_public_key(), key, pem(*chain), request)
