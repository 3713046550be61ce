"""Certificates (RFC 5280): how many and how large, when they end, and what is signed with them."""

from __future__ import annotations

import time
from datetime import datetime, timezone
from typing import NamedTuple

from crypto import CERTIFICATE, from_der, from_pem

MAX_CHAIN = 3  # certificates that a peer proves itself with: its own, and two of authorities
MAX_CERTIFICATE_SIZE = 8192  # bytes of DER; most have less than 2,000
# Bytes of a key exchange. What is signed needs no more than 36,578, in PEM with CRLF: 33,966 for
# such a chain, 1,830 for keys of ML-KEM-768 and X25519, 782 for a signature by RSA of 4096 bits.
MAX_EXCHANGE_SIZE = 40 * 1024
UTC_TIME = 0x17  # a tag in DER (X.690)


class Validity(NamedTuple):
    """When all certificates are valid, from a signer's to an authority's own."""

    begins: float  # in seconds since 1970
    ends: float

    def holds_at(self, moment: float) -> bool:
        """Tell whether they are valid at a time, in seconds since 1970."""
        return self.begins <= moment <= self.ends


def join_fields(*fields: bytes) -> bytes:
    """Return fields joined, each after its length in 4 bytes, so that none can pass for another."""
    return b"".join(len(field).to_bytes(4, "big") + field for field in fields)


def ends(certificate: bytes) -> float:
    """Return when a certificate ends, in seconds since 1970: its notAfter (RFC 5280, 4.1.2.5).

    :param certificate: PEM; the first one counts, and a key may come before it
    :raises ValueError: there is none, or it is not in DER
    """
    begin = certificate.index(b"-----BEGIN CERTIFICATE-----")
    [tbs_certificate, *_] = from_der(from_pem(CERTIFICATE, certificate[begin:]))
    if isinstance(tbs_certificate[0], int):  # a serial number: of version 1, which is not said
        tbs_certificate = [None, *tbs_certificate]
    [_, _, _, _, [_, (tag, not_after)], *_] = tbs_certificate  # after version, …, issuer
    if tag == UTC_TIME:  # YYMMDDHHMMSSZ, of 1950 to 2049
        not_after = (b"19" if not_after >= b"50" else b"20") + not_after
    month, day, hour, minute, second = (int(not_after[at : at + 2]) for at in range(4, 14, 2))
    moment = datetime(int(not_after[:4]), month, day, hour, minute, second, tzinfo=timezone.utc)
    return moment.timestamp()


def has_expired(certificate: bytes) -> bool:
    """Tell whether a certificate (PEM) has ended."""
    return ends(certificate) < time.time()
