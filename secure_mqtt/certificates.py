"""Certificates (RFC 5280): when they end."""

from __future__ import annotations

import time

from crypto import CERTIFICATE, from_der, from_pem

UTC_TIME = 0x17  # a tag in DER (X.690)


def has_expired(certificate: bytes) -> bool:
    """Tell whether the notAfter (RFC 5280, 4.1.2.5) of a certificate (PEM) has passed."""
    begin = certificate.index(b"-----BEGIN CERTIFICATE-----")  # a key may come first
    [tbs_certificate, *_] = from_der(from_pem(CERTIFICATE, certificate[begin:]))
    if isinstance(tbs_certificate[0], int):  # a serial number: of version 1, which is not said
        tbs_certificate = [None, *tbs_certificate]
    [_, _, _, _, [_, (tag, not_after)], *_] = tbs_certificate  # after version, …, issuer
    if tag == UTC_TIME:  # YYMMDDHHMMSSZ, of 1950 to 2049
        not_after = (b"19" if not_after >= b"50" else b"20") + not_after
    return bool(not_after.decode() < time.strftime("%Y%m%d%H%M%SZ", time.gmtime()))
