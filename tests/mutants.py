"""Signed key exchanges whose certificates were changed in their DER, some issued anew after that.

What is changed has the right lengths, so that it gets further than the first of them. A certificate
that our authority signs again after it was changed gets further than its signature.
"""

from __future__ import annotations

import contextlib
import json
import time
import traceback
import warnings
from datetime import datetime, timezone
from pathlib import Path
from random import Random
from typing import Any

import reference
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, x448, x25519
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.verification import VerificationError
from issuing import ALICE, NETID, Issuer, common_name, key_usage, x25519_public_key

from crypto import BIT_STRING, OBJECT_IDENTIFIER, PeerKeyError, from_der, read_group, to_der
from secure_mqtt.signatures import Authority

VECTORS = Path(__file__).with_name("vectors") / "extensions.json"
FILE = json.loads(VECTORS.read_text(encoding="utf-8"))
ANCHOR = x509.load_pem_x509_certificate(FILE["authority"].encode())
AUTHORITY = Authority(FILE["authority"].encode())
# Keys that are the same in each run, for what a fuzzer has kept of the one before.
ISSUER = Issuer(load_pem_private_key(FILE["authority_private_key"].encode(), None), ANCHOR.subject)
LOWER = Issuer(ec.derive_private_key(2, ec.SECP256R1()), common_name("lower CA"))
KEYS: list[Any] = [
    ed25519.Ed25519PrivateKey.from_private_bytes(bytes(32)),
    ec.derive_private_key(3, ec.SECP256R1()),
    ec.derive_private_key(4, ec.SECP384R1()),
    load_pem_private_key(FILE["identities"]["client_rsa2048"]["private_key"].encode(), None),
]
PUBLIC_KEY = x25519_public_key()
BEGINS = datetime(2020, 1, 1, tzinfo=timezone.utc)
ENDS = datetime(2120, 1, 1, tzinfo=timezone.utc)
IS_MESSAGE_2, IS_ISSUED_ANEW = 4, 8  # bits of a mutant's first byte, above the number of its key


def seeds() -> list[bytes]:
    """Return what to begin from: a byte that says how to sign it, then a chain that is good."""
    below = LOWER.key.public_key()
    authority = ISSUER.issue(
        below,
        *(x509.BasicConstraints(ca=True, path_length=None), key_usage("key_cert_sign")),
        x509.SubjectKeyIdentifier.from_public_key(below),
        subject=LOWER.name,
        begins=BEGINS,
        ends=ENDS,
    )
    found = []
    for how in range(IS_MESSAGE_2 + IS_ISSUED_ANEW + len(KEYS)):
        public_key = KEYS[how % len(KEYS)].public_key()
        usage = key_usage("digital_signature")
        for issuer, above in (ISSUER, []), (LOWER, [authority]):
            leaf = issuer.issue(public_key, *ALICE, usage, begins=BEGINS, ends=ENDS)
            chain = [each.public_bytes(Encoding.DER) for each in (leaf, *above)]
            found.append(bytes([how]) + b"".join(chain))
    return found


# --- changes -----------------------------------------------------------------------------------


def spki(public_key: Any) -> Any:
    """Return a public key as a part of a certificate."""
    return from_der(public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo))


IDENTIFIERS = (  # of keys: Ed25519, RSA, RSA for PSS, EC, X448; of extensions (RFC 5280, 4.2)
    *("2b6570", "2a864886f70d010101", "2a864886f70d01010a", "2a8648ce3d0201", "2b656f"),
    *("551d0f", "551d11", "551d13", "551d1e", "551d1f", "551d20", "551d25", "551d37"),
    *("2b06010505070101", "2b06010401d679020402"),
)
DH = [(OBJECT_IDENTIFIER, bytes.fromhex("2a864886f70d010301")), [*read_group()]]
PARTS: list[Any] = [  # that a certificate may have where others are expected
    *(spki(key.public_key()) for key in KEYS),
    spki(x25519.X25519PrivateKey.generate().public_key()),
    spki(x448.X448PrivateKey.generate().public_key()),
    spki(ed448.Ed448PrivateKey.generate().public_key()),
    spki(ec.generate_private_key(ec.SECP521R1()).public_key()),
    spki(ec.generate_private_key(ec.SECP256K1()).public_key()),
    spki(dsa.generate_private_key(2048).public_key()),
    [DH, (BIT_STRING, b"\0" + to_der(5))],
    *((OBJECT_IDENTIFIER, bytes.fromhex(identifier)) for identifier in IDENTIFIERS),
    *((0x17, b"491231235959Z"), (0x18, b"99991231235959Z"), (0x18, b"00000101000000Z")),
    *((0x82, b"\xff"), (0x82, b"*"), (0x87, b"abc"), (0xA0, b""), (0xA3, b""), (0xA5, b"")),
    *((0x01, b"\xff"), (0x03, b""), (0x04, b""), (0x05, b""), (0x0C, b"\xff"), (0x1E, b"a")),
    *([], 0, 1, 3, -1, 2**32 + 1, 2**64),
]


def changed(value: Any, random: Random) -> Any:
    """Return a value, as from_der() gives it, with one place in it changed, mostly far inside."""
    if random.random() < 0.02:
        return random.choice(PARTS)
    if isinstance(value, list):
        return _changed_list([*value], random)
    if isinstance(value, int):
        return random.choice([value + 1, -value, value >> 8, random.getrandbits(70)])
    tag, content = value
    start = 1 if tag == BIT_STRING else 0  # which begins with the number of its unused bits
    with contextlib.suppress(ValueError):
        inner = from_der(content[start:])
        if random.random() < 0.95:
            return tag, content[:start] + to_der(changed(inner, random))
    if random.random() < 0.3:
        return random.choice(
            [part for part in PARTS if type(part) is tuple and part[0] == tag] or PARTS
        )
    return random.choice([tag] * 5 + [random.randrange(256)]), _changed_bytes(content, random)


def _changed_list(values: list[Any], random: Random) -> list[Any]:
    how = random.random()
    place = random.randrange(len(values) + 1)
    if not values or how < 0.03:
        values.insert(place, random.choice([*values, *PARTS]))
    elif how < 0.06:
        del values[place - 1]
    elif how < 0.1:
        values.insert(place, values.pop())
    else:
        [place] = random.choices(range(len(values)), [len(to_der(value)) for value in values])
        values[place] = changed(values[place], random)
    return values


def _changed_bytes(content: bytes, random: Random) -> bytes:
    start = random.randrange(len(content) + 1)
    end = min(len(content), start + random.randrange(4))
    return content[:start] + random.randbytes(random.randrange(4)) + content[end:]


def mutant(seed: bytes, random: Random) -> bytes:
    """Return a seed, or what was made of one, with up to four places changed."""
    chain = [from_der(certificate) for certificate in certificates(seed[1:])]
    for _ in range(random.choice([1, 1, 1, 2, 4])):
        place = random.randrange(len(chain))
        # Mostly in what is signed.
        whole = chain[place]
        if isinstance(whole, list) and whole and random.random() < 0.9:
            chain[place] = [changed(whole[0], random), *whole[1:]]
        else:
            chain[place] = changed(whole, random)
    how = random.randrange(256) if random.random() < 0.1 else seed[0]
    return bytes([how]) + b"".join(map(to_der, chain))


def certificates(data: bytes) -> list[bytes]:
    """Return the certificates that are joined there: ten at most, and what is left is the last."""
    found: list[bytes] = []
    while data and len(found) < 9:
        size, start = data[1] if len(data) > 1 else 0, 2
        if size & 0x80:
            start += size & 0x7F
            size = int.from_bytes(data[2:start], "big")
        found.append(data[: start + size])
        data = data[start + size :]
    return [*found, data] if data else found


# --- judgement ---------------------------------------------------------------------------------


def key_exchange(mutant: bytes) -> tuple[bytes, bytes | None]:
    """Return a mutant's message 1; or its message 2, and the message 1 that this answers."""
    how, chain = mutant[0], certificates(mutant[1:])
    if how & IS_ISSUED_ANEW:
        issuers = [*[LOWER] * (len(chain) - 1), ISSUER]
        chain = [issued_anew(der, issuer) for der, issuer in zip(chain, issuers, strict=False)]
    request = b"message 1" if how & IS_MESSAGE_2 else None
    pem = b"".join(reference.pem("CERTIFICATE", der) for der in chain)
    return reference.bundle(NETID, PUBLIC_KEY, KEYS[how % len(KEYS)], pem, request), request


def issued_anew(der: bytes, issuer: Issuer) -> bytes:
    """Return a certificate, signed by its issuer; what is none, as it is."""
    with contextlib.suppress(ValueError):
        match from_der(der):
            case [content, algorithm, _]:
                signature = issuer.key.sign(to_der(content), ec.ECDSA(SHA256()))
                return to_der([content, algorithm, (BIT_STRING, b"\0" + signature)])
    return der


# What may be behind a refusal, beside what the library's own code in Python raises. Anything else
# would be a mistake of ours.
REASONS = (
    *(ValueError, InvalidSignature, UnsupportedAlgorithm, VerificationError),
    *(x509.InvalidVersion, x509.DuplicateExtension, x509.UnsupportedGeneralNameType),
)
MAX_COST = 0.5  # seconds of the processor; a thousandth is usual


def is_librarys(error: BaseException) -> bool:
    """Tell whether an error was raised in the library's code."""
    [*_, (frame, _)] = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals["__name__"]).startswith("cryptography.")


def judge(mutant: bytes) -> None:
    """Verify a mutant's key exchange, and check that nothing comes of it but what may."""
    payload, request = key_exchange(mutant)
    refusal, end = None, 0.0
    begin = time.process_time()
    try:
        end = AUTHORITY.verify(payload, NETID, NETID, request)
    except PeerKeyError as error:
        refusal = error
    assert time.process_time() - begin < MAX_COST
    if refusal:
        assert str(refusal).isprintable()
        assert len(str(refusal)) < 600
        reason = refusal.__context__
        assert reason is None or isinstance(reason, REASONS) or is_librarys(reason), repr(reason)
    else:
        assert end > time.time()
        with warnings.catch_warnings():  # of oddities, such as a serial number below 0
            warnings.simplefilter("ignore")
            reference.verify_bundle(payload, NETID, NETID, [ANCHOR], request)
