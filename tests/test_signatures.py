"""Whose signatures count, and what a stranger's cost: Authority and Identity of signatures.py."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from itertools import pairwise
from random import Random
from typing import Any

import issuing
import mutants
import pytest
import reference
from conftest import wait_until
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa, x448, x25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from cryptography.x509.oid import ExtendedKeyUsageOID
from hypothesis import given, settings
from hypothesis import strategies as st
from issuing import ALICE, NETID, PURPOSES, Issuer, odd_rsa, p256, p384, pem, signed

from crypto import (
    BIT_STRING,
    CERTIFICATE,
    OBJECT_IDENTIFIER,
    OCTET_STRING,
    PUBLIC_KEY,
    KeyFileError,
    PeerKeyError,
    from_der,
    read_group,
    to_der,
    to_pem,
)
from secure_mqtt import signatures
from secure_mqtt.certificates import MAX_EXCHANGE_SIZE
from secure_mqtt.signatures import SIGNATURE, Authority, Identity

COURSE = Issuer(p256(), issuing.common_name("course CA"))
LOWER = Issuer(p256(), issuing.common_name("lower CA"))
LOWEST = Issuer(p256(), issuing.common_name("lowest CA"))
STRANGER = Issuer(p256(), issuing.common_name("stranger"))
ANCHOR = COURSE.certify(COURSE)
AUTHORITY = Authority(pem(ANCHOR))


def prove(payload: bytes, request: bytes | None = None) -> None:
    """Check that message 1 or, if that is given as request, message 2 proves the NetID."""
    AUTHORITY.verify(payload, NETID, NETID, request)


def refuse(payload: bytes, reason: str, request: bytes | None = None) -> None:
    """Check that it is refused for a reason, by the second implementation as well."""
    with pytest.raises(PeerKeyError, match=reason):
        prove(payload, request)
    with pytest.raises(reference.REFUSED):
        reference.verify_bundle(payload, NETID, NETID, [ANCHOR], request)


# --- how much a peer may present ---------------------------------------------------------------


def below(depth: int) -> bytes:
    """Return message 1 with a leaf and a number of certificates of authorities above it."""
    issuers = [COURSE, LOWER, LOWEST, Issuer(p256(), issuing.common_name("last CA"))][: depth + 1]
    key = p256()
    above = [one.certify(other) for one, other in pairwise(issuers)]
    return signed(key, issuers[-1].issue(key.public_key(), *ALICE), *reversed(above))


def of_size(size: int) -> bytes:
    """Return message 1 with a certificate of a number of bytes."""
    key, padding = p256(), size - 600
    while True:  # the size of a signature by ECDSA is not always the same
        unknown = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3"), bytes(padding))
        leaf = COURSE.issue(key.public_key(), *ALICE, unknown)
        missing = size - len(leaf.public_bytes(Encoding.DER))
        if not missing:
            return signed(key, leaf)
        padding += missing


def by_rsa(size: int, exponent_size: int) -> bytes:
    """Return message 1, signed by RSA."""
    key = odd_rsa(size, exponent_size)
    return signed(key, COURSE.issue(key.public_key(), *ALICE))


def below_issuer(issuers_key: Any) -> bytes:
    """Return message 1 with a leaf that an authority below ours has issued with a key."""
    issuer, key = Issuer(issuers_key, LOWER.name), p256()
    return signed(key, issuer.issue(key.public_key(), *ALICE), COURSE.certify(issuer))


WITHIN_BOUNDS: dict[str, Callable[[], bytes]] = {
    "three certificates": lambda: below(2),
    "a certificate of 8 KiB": lambda: of_size(8192),
    "RSA of 2048 bits": lambda: by_rsa(2048, 17),
    "RSA of 4096 bits with an exponent of 32": lambda: by_rsa(4096, 32),
    "an authority with RSA of 4096 bits": lambda: below_issuer(odd_rsa(4096, 32)),
    "an authority on P-521": lambda: below_issuer(ec.generate_private_key(ec.SECP521R1())),
}


@pytest.mark.parametrize("what", WITHIN_BOUNDS)
def test_a_peer_may_prove_itself_with(what: str) -> None:
    payload = WITHIN_BOUNDS[what]()
    prove(payload)
    reference.verify_bundle(payload, NETID, NETID, [ANCHOR])


def test_the_certificates_of_authorities_may_come_in_any_order_with_others_among_them() -> None:
    public_key, *chain, signature = below(2).split(b"-----BEGIN ")[1:]
    leaf, low, high = chain
    for others in (low, high), (high, low), (high, high, low), (low, high, leaf):
        payload = b"-----BEGIN ".join((b"", public_key, leaf, *others, signature))
        if len(others) == 2:
            prove(payload)
        else:
            refuse(payload, "more than 3")
    key, stranger = p256(), Issuer(p256(), COURSE.name)
    leaf_of_ours = COURSE.issue(key.public_key(), *ALICE)
    for odd in ANCHOR, stranger.certify(stranger), stranger.certify(LOWER), leaf_of_ours:
        prove(signed(key, leaf_of_ours, odd, odd))


OUT_OF_BOUNDS: dict[str, tuple[Callable[[], bytes], str]] = {
    "four certificates": (lambda: below(3), "^signed with more than 3 certificates, or one of"),
    "a certificate of 8193 bytes": (lambda: of_size(8193), "one of more than 8 KiB$"),
    "RSA of 2040 bits": (lambda: by_rsa(2040, 17), "of another kind$"),
    "RSA of 4104 bits": (lambda: by_rsa(4104, 17), "of another kind$"),
    "RSA with an exponent of 33 bits": (lambda: by_rsa(2048, 33), "of another kind$"),
    "an authority with RSA of 4104 bits": (
        lambda: below_issuer(odd_rsa(4104, 17)),
        "of another kind$",
    ),
    "an authority with RSA and an exponent of 33 bits": (
        lambda: below_issuer(odd_rsa(2048, 33)),
        "of another kind$",
    ),
}


@pytest.mark.parametrize("what", OUT_OF_BOUNDS)
def test_a_peer_may_not_prove_itself_with(what: str) -> None:
    make, reason = OUT_OF_BOUNDS[what]
    refuse(make(), reason)


def test_the_largest_signed_key_exchange_is_accepted_and_a_larger_one_is_not_looked_at() -> None:
    """Keys of the largest suite, three certificates of 8 KiB, RSA; with CRLF."""
    sizes = (PUBLIC_KEY, 1206), (PUBLIC_KEY, 44), *[(CERTIFICATE, 8192)] * 3, (SIGNATURE, 512)
    needed = sum(len(to_pem(label, bytes(size)).replace(b"\n", b"\r\n")) for label, size in sizes)
    payload = below(2)
    largest = payload + b"\n" * (MAX_EXCHANGE_SIZE - len(payload))
    assert needed <= len(largest)
    prove(largest)
    with pytest.raises(PeerKeyError, match=r"^larger than any signed key exchange$"):
        prove(largest + b"\n")


def identity(key: Any, *above: x509.Certificate) -> Identity:
    """Return what signs with a key that our authority has certified."""
    own_key = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return Identity(own_key + pem(COURSE.issue(key.public_key(), *ALICE), *above))


def test_one_signs_only_with_what_peers_accept() -> None:
    identity(p256(), ANCHOR, ANCHOR)
    with pytest.raises(KeyFileError, match=r"^holds more than 3 certificates, or one of more than"):
        identity(p256(), ANCHOR, ANCHOR, ANCHOR)
    with pytest.raises(KeyFileError, match="private key that can sign"):
        identity(odd_rsa(2048, 33))


# --- keys of other kinds -----------------------------------------------------------------------

DH = [(OBJECT_IDENTIFIER, bytes.fromhex("2a864886f70d010301")), [*read_group()]]
DH_KEY = to_der([DH, (BIT_STRING, b"\0" + to_der(5))])
RSA_PSS = [(OBJECT_IDENTIFIER, bytes.fromhex("2a864886f70d01010a"))]


def spki(public_key: Any) -> bytes:
    """Return a SubjectPublicKeyInfo (DER)."""
    result: bytes = public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return result


def certified(public_key: bytes, issuer: Issuer = COURSE) -> bytes:
    """Return message 1 with a certificate for any SubjectPublicKeyInfo (DER)."""
    key = p256()
    parts = from_der(issuer.issue(key.public_key(), *ALICE).public_bytes(Encoding.DER))
    parts[0][6] = from_der(public_key)
    leaf = mutants.issued_anew(to_der(parts), issuer)
    der = issuing.x25519_public_key()
    return reference.bundle(NETID, der, key, reference.pem("CERTIFICATE", leaf))


OTHER_KEYS: dict[str, Callable[[], bytes]] = {
    "X25519": lambda: spki(x25519.X25519PrivateKey.generate().public_key()),
    "X448": lambda: spki(x448.X448PrivateKey.generate().public_key()),
    "Ed448": lambda: spki(ed448.Ed448PrivateKey.generate().public_key()),
    "P-521": lambda: spki(ec.generate_private_key(ec.SECP521R1()).public_key()),
    "secp256k1": lambda: spki(ec.generate_private_key(ec.SECP256K1()).public_key()),
    "DSA": lambda: spki(dsa.generate_private_key(2048).public_key()),
    "Diffie-Hellman": lambda: DH_KEY,
    "RSA for PSS only": lambda: to_der(
        [RSA_PSS, from_der(spki(odd_rsa(2048, 17).public_key()))[1]]
    ),
    "no algorithm that there is": lambda: to_der(
        [[(OBJECT_IDENTIFIER, b"*")], (BIT_STRING, b"\0")]
    ),
    "Ed25519 of 31 bytes": lambda: spki(ed25519.Ed25519PrivateKey.generate().public_key())[:-1],
    "RSA with an even exponent": lambda: (
        spki(
            rsa.RSAPublicNumbers(3, odd_rsa(2048, 17).public_key().public_numbers().n).public_key()
        )[:-1]
        + b"\4"
    ),
}


@pytest.mark.parametrize("what", OTHER_KEYS)
def test_the_trusted_authority_can_certify_no_key_of(what: str) -> None:
    public_key = OTHER_KEYS[what]()
    if what.endswith("31 bytes"):
        public_key = to_der([from_der(public_key + b"\0")[0], (BIT_STRING, b"\0" + bytes(31))])
    refuse(certified(public_key), "^its signature or certificate is malformed, or of another kind$")


# --- what a certificate is for -----------------------------------------------------------------

CLIENT, RESPONDER = ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH
ANY, CODE = ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE, ExtendedKeyUsageOID.CODE_SIGNING
OTHER_PURPOSE = "^signed with a certificate for another purpose$"
NO_SIGNATURES = "^signed with a certificate for a key that is not for signatures$"
# extendedKeyUsage, keyUsage (None: the certificate has none), and what is said of it as a client's
# and as a responder's ("": it is accepted).
USAGES: dict[str, tuple[list[Any] | None, list[str] | None, str, str]] = {
    "clients": ([CLIENT], None, "", OTHER_PURPOSE),
    "responders": ([RESPONDER], None, OTHER_PURPOSE, ""),
    "both": ([CLIENT, RESPONDER], ["digital_signature"], "", ""),
    "clients and anything": ([ANY, CLIENT], ["digital_signature"], "", OTHER_PURPOSE),
    "anything": ([ANY], ["digital_signature"], OTHER_PURPOSE, OTHER_PURPOSE),
    "code": ([CODE], ["digital_signature"], OTHER_PURPOSE, OTHER_PURPOSE),
    "it does not say what": (None, ["digital_signature"], OTHER_PURPOSE, OTHER_PURPOSE),
    "neither it nor its key says what": (None, None, OTHER_PURPOSE, OTHER_PURPOSE),
    "clients, its key for more": ([CLIENT], ["digital_signature", "crl_sign"], "", OTHER_PURPOSE),
    "clients, its key for encryption": (
        [CLIENT],
        ["key_encipherment", "data_encipherment"],
        NO_SIGNATURES,
        OTHER_PURPOSE,
    ),
    "both, its key for contracts": (
        [CLIENT, RESPONDER],
        ["content_commitment"],
        NO_SIGNATURES,
        NO_SIGNATURES,
    ),
    "both, its key for nothing": ([CLIENT, RESPONDER], [], NO_SIGNATURES, NO_SIGNATURES),
}


@pytest.mark.parametrize("what", USAGES)
def test_a_certificate_proves_only_what_it_is_for(what: str) -> None:
    purposes, usages, *problems = USAGES[what]
    extensions: list[x509.ExtensionType] = [ALICE[0]]
    if purposes is not None:
        extensions.append(x509.ExtendedKeyUsage(purposes))
    if usages is not None:
        extensions.append(issuing.key_usage(*usages))
    key = p256()
    leaf = COURSE.issue(key.public_key(), *extensions)
    for request, problem in zip((None, b"message 1"), problems, strict=True):
        payload = signed(key, leaf, request=request)
        if problem:
            refuse(payload, problem, request)
        else:
            prove(payload, request)
            reference.verify_bundle(payload, NETID, NETID, [ANCHOR], request)


# --- whose it is -------------------------------------------------------------------------------

NAMES: dict[str, tuple[list[str], str]] = {
    "one": (["bob"], "signed by 'bob', expected 'le0nh4rt'"),
    "three": (["a", "b", "c"], "signed by 'a, b, c', expected 'le0nh4rt'"),
    "500": ([f"n{n}" for n in range(500)], "signed by 'n0, n1, n2' and 497 more, expected"),
    "a long one": (["x" * 5000], f"signed by '{'x' * 200}', expected 'le0nh4rt'"),
    "one that writes to a terminal": (["\x1b[2J\r\n"], r"signed by '\x1b[2J\r\n', expected"),
    "one in capitals": ([NETID.upper()], f"signed by '{NETID.upper()}', expected '{NETID}'"),
    "one with a dot": ([f"{NETID}."], f"signed by '{NETID}.', expected '{NETID}'"),
}


@pytest.mark.parametrize("which", NAMES)
def test_another_name_is_shown_in_words_that_are_short_and_printable(which: str) -> None:
    names, says = NAMES[which]
    key = p256()
    leaf = COURSE.issue(key.public_key(), issuing.named(*names), PURPOSES)
    with pytest.raises(PeerKeyError) as refusal:
        prove(signed(key, leaf))
    text = str(refusal.value)
    assert text.startswith(says)
    assert text.isprintable()
    assert len(text) < 300


def test_a_long_netid_is_shown_in_part() -> None:
    netid, key = "n" * 60_000, p256()
    payload = reference.bundle(
        netid, issuing.x25519_public_key(), key, pem(COURSE.issue(key.public_key(), *ALICE))
    )
    with pytest.raises(PeerKeyError, match=f"^signed by '{NETID}', expected 'n{{200}}'$"):
        AUTHORITY.verify(payload, netid, netid)


# --- how long it holds -------------------------------------------------------------------------


@pytest.mark.parametrize("request_", [None, b"message 1"], ids=["of a client", "of a responder"])
@pytest.mark.parametrize("first", ["the leaf", "the authority below", "the authority", "another"])
def test_what_is_proved_holds_until_the_first_certificate_ends_that_it_rests_on(
    first: str, request_: bytes | None
) -> None:
    """Not one that came along without need, which may even have ended."""
    early, late = issuing.NOW + issuing.HOUR, issuing.NOW + 2 * issuing.HOUR
    ends = {"the leaf": late, "the authority below": late, "the authority": late, first: early}
    anchor = COURSE.certify(COURSE, ends["the authority"])
    above = COURSE.certify(LOWER, ends["the authority below"])
    another = STRANGER.certify(LOWER, issuing.NOW - issuing.HOUR / 2)
    key = p256()
    leaf = LOWER.issue(key.public_key(), *ALICE, ends=ends["the leaf"])
    payload = signed(key, leaf, another, above, request=request_)
    end = Authority(pem(anchor)).verify(payload, NETID, NETID, request_)
    assert end == (late if first == "another" else early).timestamp()


def test_who_was_certified_once_proves_no_more_by_that_than_at_first() -> None:
    """Certificates that were verified are not verified again, as long as they are valid."""
    key, end = p256(), (datetime.now(timezone.utc) + timedelta(seconds=3)).replace(microsecond=0)
    purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])
    chain = [COURSE.issue(key.public_key(), issuing.named(NETID), purpose, ends=end)]
    payload = signed(key, *chain)
    for _ in range(2):
        prove(payload)
        refuse(payload.replace(b"SIGNATURE-----\nM", b"SIGNATURE-----\nN"), "malformed|not match")
        with pytest.raises(PeerKeyError, match="signed by 'le0nh4rt', expected 'bob'"):
            AUTHORITY.verify(payload, NETID, "bob")
        refuse(signed(key, *chain, request=b"message 1"), "another purpose", b"message 1")
    others = Authority(pem(STRANGER.certify(STRANGER)))
    with pytest.raises(PeerKeyError, match="unknown authority"):
        others.verify(payload, NETID, NETID)
    wait_until(lambda: time.time() >= end.timestamp() + 1)  # its last second counts
    refuse(payload, "has expired")


def test_an_authority_remembers_a_bounded_number_of_those_whom_it_has_certified(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(signatures, "MAX_SIGNERS", 20)
    key, authority = p256(), Authority(pem(ANCHOR))
    for _ in range(30):
        authority.verify(signed(key, COURSE.issue(key.public_key(), *ALICE)), NETID, NETID)
    assert len(authority._signers) == 20


def test_nobody_is_remembered_for_certificates_that_he_cannot_sign_with() -> None:
    key, authority = p256(), Authority(pem(ANCHOR))
    leaf = COURSE.issue(key.public_key(), *ALICE)
    with pytest.raises(PeerKeyError, match="its signature does not match"):
        authority.verify(signed(p256(), leaf), NETID, NETID)
    assert not authority._signers
    authority.verify(signed(key, leaf), NETID, NETID)
    assert len(authority._signers) == 1


def test_an_authority_knows_what_it_was_made_of() -> None:
    for content in pem(ANCHOR), pem(ANCHOR) + b"text", pem(ANCHOR, LOWER.certify(LOWER)):
        assert Authority(content).content == content


def test_an_authority_with_a_key_that_cannot_sign_has_issued_nothing() -> None:
    """It may stand in the file of those that are trusted, and go by the name of another."""
    parts = from_der(ANCHOR.public_bytes(Encoding.DER))
    parts[0][6] = from_der(OTHER_KEYS["X25519"]())
    odd = reference.pem("CERTIFICATE", mutants.issued_anew(to_der(parts), COURSE))
    Authority(odd + pem(ANCHOR)).verify(below(1), NETID, NETID)
    with pytest.raises(PeerKeyError, match="from an unknown authority"):
        Authority(odd).verify(below(1), NETID, NETID)


def test_no_certificate_makes_the_library_warn() -> None:
    """A warning would be lines on standard error, at somebody else's wish."""
    key = p256()
    parts = from_der(COURSE.issue(key.public_key(), *ALICE).public_bytes(Encoding.DER))
    [identifier, _], *others = from_der(parts[0][-1][1])  # of the authority's key
    numbered = to_der([(0x80, b"key"), (0xA1, to_der((0x82, b"name"))), (0x82, b"\0")])
    extensions = to_der([[identifier, (OCTET_STRING, numbered)], *others])
    parts[0][1], parts[0][-1] = 0, (0xA3, extensions)
    leaf = mutants.issued_anew(to_der(parts), COURSE)
    payload = reference.bundle(
        NETID, issuing.x25519_public_key(), key, reference.pem("CERTIFICATE", leaf)
    )
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        _ = x509.load_der_x509_certificate(leaf).extensions
        assert len(warned) == 2  # of both serial numbers
        warned.clear()
        with contextlib.suppress(PeerKeyError):
            prove(payload)
    assert not warned


# --- what a stranger's message costs -----------------------------------------------------------


def of_one_key(key: Any, count: int, name: x509.Name = STRANGER.name) -> bytes:
    """Return message 1 with certificates of one name and key, each of which could issue another."""
    issuer = Issuer(key, name)
    chain = [issuer.certify(issuer) for _ in range(count - 1)]
    return signed(key, issuer.issue(key.public_key(), *ALICE, subject=name), *chain)


def with_names(count: int) -> bytes:
    """Return message 1 with a certificate of many names."""
    key = p256()
    names = issuing.named(*(f"a{number}" for number in range(count)))
    return signed(key, STRANGER.issue(key.public_key(), names, ALICE[1]))


def in_many_blocks() -> bytes:
    """Return message 1 in as many PEM blocks as there is room for."""
    payload, block = below(0), b"-----BEGIN A-----AA==-----END A-----"
    return payload + block * ((MAX_EXCHANGE_SIZE - len(payload)) // len(block))


STRANGERS: dict[str, Callable[[], bytes]] = {
    "six certificates of RSA with an exponent of 3000 bits": lambda: of_one_key(
        odd_rsa(3072, 3000), 6
    ),
    "three certificates of RSA with an exponent of 3000 bits": lambda: of_one_key(
        odd_rsa(3072, 3000), 3
    ),
    "three certificates of the largest RSA": lambda: of_one_key(odd_rsa(4096, 32), 3),
    "three certificates on P-384": lambda: of_one_key(p384(), 3),
    "three certificates on P-384 in the authority's name": lambda: of_one_key(
        p384(), 3, COURSE.name
    ),
    "a key of Diffie-Hellman": lambda: certified(DH_KEY, STRANGER),
    "1,000 names": lambda: with_names(1000),
    "1,000 blocks": in_many_blocks,
}


def cost(payload: bytes) -> float:
    """Return what it takes to judge a message 1 for the first time, in seconds of the processor."""

    def once() -> float:
        authority = Authority(pem(ANCHOR))
        begin = time.process_time()
        with contextlib.suppress(PeerKeyError):
            authority.verify(payload, NETID, NETID)
        return time.process_time() - begin

    return min(once() for _ in range(5))


@pytest.mark.parametrize("what", STRANGERS)
def test_a_stranger_costs_little_more_than_who_is_certified_with(what: str) -> None:
    """Ten times at most. Who is certified costs a fifth of a millisecond."""
    payload = STRANGERS[what]()
    with pytest.raises(PeerKeyError):
        prove(payload)
    assert cost(payload) < 10 * cost(below(0))


# --- anything at all ---------------------------------------------------------------------------

SEEDS = mutants.seeds()


def test_what_mutants_are_made_of_is_accepted() -> None:
    for seed in SEEDS:
        payload, request = mutants.key_exchange(seed)
        mutants.AUTHORITY.verify(payload, NETID, NETID, request)


@settings(max_examples=500, deadline=None)
@given(st.sampled_from(SEEDS), st.integers(0, 2**64))
def test_a_certificate_changed_anywhere_proves_the_name_or_is_a_peer_key_error(
    seed: bytes, number: int
) -> None:
    mutants.judge(mutants.mutant(seed, Random(number)))
