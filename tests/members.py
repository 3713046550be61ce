"""Members of shared topics, and who certifies them."""

from __future__ import annotations

import functools
from datetime import datetime
from typing import NamedTuple

import reference_topics
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from issuing import HOUR, NOW, PURPOSES, Issuer, common_name, key_usage, named, p256, pem

from secure_mqtt.signatures import Authority, Identity

KEEPER = "responder"


class Certified(NamedTuple):
    """Who has a certificate."""

    name: str
    key: ec.EllipticCurvePrivateKey
    chain: bytes  # PEM

    @property
    def identity(self) -> Identity:
        """What the program signs with."""
        form = Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
        return Identity(self.key.private_bytes(*form) + self.chain)

    def session(
        self, topic: str, netid: str = "", keeper: str = KEEPER
    ) -> reference_topics.Session:
        """Return a session by the second implementation, in another's name if that is given."""
        return reference_topics.Session(topic, netid or self.name, keeper, self.key, self.chain)


class Certifier:
    """An authority, and who has a certificate of it."""

    def __init__(self) -> None:
        self._issuer = Issuer(p256(), common_name("CA"))
        public_key = self._issuer.key.public_key()
        extensions = (
            x509.BasicConstraints(ca=True, path_length=None),
            key_usage("key_cert_sign"),
            x509.SubjectKeyIdentifier.from_public_key(public_key),
        )
        years = NOW - 1000 * HOUR, NOW + 1000 * HOUR
        self.certificate = self._issuer.issue(
            public_key, *extensions, subject=self._issuer.name, begins=years[0], ends=years[1]
        )
        self.authority = Authority(pem(self.certificate))
        self.member = functools.cache(self._member)

    def _member(
        self,
        name: str,
        begins: datetime = NOW - HOUR,
        ends: datetime = NOW + 500 * HOUR,
        purposes: x509.ExtendedKeyUsage = PURPOSES,
        others: int = 0,
    ) -> Certified:
        """Return who has a certificate for a name, and for so many others."""
        key = p256()
        names = named(name, *(f"{number}-{'x' * 55}" for number in range(others)))
        certificate = self._issuer.issue(
            key.public_key(), names, purposes, begins=begins, ends=ends
        )
        return Certified(name, key, pem(certificate))
