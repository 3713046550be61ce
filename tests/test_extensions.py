"""Signed exchanges and the suite x25519 against known answers and a second author.

vectors/extensions.json was made with reference.py, which shares no code with the program.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import json
import os
from collections.abc import Callable
from typing import Any

import pytest
import reference
from conftest import VECTORS
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa, x25519
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID
from hostile import damaged
from hypothesis import example, given, settings
from hypothesis import strategies as st

import crypto
from crypto import (
    BIT_STRING,
    OBJECT_IDENTIFIER,
    OCTET_STRING,
    PRIVATE_KEY,
    PUBLIC_KEY,
    KeyFileError,
    PeerKeyError,
    from_der,
    from_pem,
    public_key_der,
    read_private_key,
    to_der,
    to_pem,
)
from secure_mqtt.certificates import UTC_TIME, ends, has_expired
from secure_mqtt.signatures import Authority, Identity
from secure_mqtt.suites import (
    SUITES,
    Cipher,
    LabCipher,
    Transcript,
    X25519Client,
    X25519Responder,
    suite_of,
)

settings.register_profile("suite", deadline=None)
settings.load_profile("suite")

FILE: dict[str, Any] = json.loads((VECTORS / "extensions.json").read_text(encoding="utf-8"))
EXCHANGES, IDENTITIES = FILE["exchanges"], FILE["identities"]
BAD_BUNDLES, BAD_MESSAGES = FILE["bad_bundles"], FILE["bad_messages"]
LOW_ORDER, BAD_KEYS = FILE["low_order_points"], FILE["bad_public_keys"]
X25519 = [name for name, exchange in EXCHANGES.items() if exchange["suite"] == "x25519"]
AUTHORITY = Authority(FILE["authority"].encode())
ANCHORS = [x509.load_pem_x509_certificate(FILE["authority"].encode())]
NETID, RESPONDER = "le0nh4rt", "responder"
TOPIC, ANSWER_TOPIC = f"{NETID}/uppercase/request", f"{NETID}/uppercase/response"
TEXT = "naïve café".encode()


# --- known answers -----------------------------------------------------------------------------


class X25519End:
    """Either end of an exchange in the suite x25519, which the program has as two classes."""

    def __init__(self, private_key: bytes = b"") -> None:
        self._private_key = private_key or os.urandom(32)
        self.public_key = X25519Client(self._private_key).blocks

    def agree(self, transcript: Transcript, is_client: bool) -> Cipher:
        if is_client:
            return X25519Client(self._private_key).agree(transcript)
        return X25519Responder(transcript.request, self._private_key).agree(transcript)


def known_cipher(exchange: dict[str, Any], side: str) -> Cipher:
    """Return what one side of an exchange in the file derives."""
    pem = exchange[f"{side}_private_key"].encode()
    if exchange["suite"] == "x25519":
        end = X25519End(from_pem(PRIVATE_KEY, pem)[-32:])
        return end.agree(transcript(exchange), side == "client")
    peers = exchange["payload2" if side == "client" else "payload1"].encode()
    return LabCipher(crypto.DhKeyPair(read_private_key(pem)).shared_key(peers))


def transcript(exchange: dict[str, Any]) -> Transcript:
    """Return an exchange in the file as both ends see it."""
    payloads = (exchange[name].encode() for name in ("payload1", "payload2"))
    return Transcript(exchange["netid"], *payloads)


def ciphers(name: str) -> dict[str, Cipher]:
    """Return what both ends of an exchange in the file derive, by the direction that each seals."""
    exchange = EXCHANGES[name]
    return {
        direction: known_cipher(exchange, side)
        for direction, side in (("request", "client"), ("response", "responder"))
    }


OPENED_BY = {"request": "response", "response": "request"}  # who seals the other direction


@pytest.mark.parametrize("name", X25519)
def test_both_ends_seal_and_open_the_messages_of_a_known_exchange(name: str) -> None:
    ends = ciphers(name)
    messages = EXCHANGES[name]["messages"]
    assert {message["direction"] for message in messages} == {"request", "response"}
    for message in messages:
        direction, topic, counter = (message[key] for key in ("direction", "topic", "counter"))
        text, sealed = message["plaintext"].encode(), bytes.fromhex(message["message"])
        assert ends[direction].seal(topic, counter, text) == sealed
        assert ends[OPENED_BY[direction]].open(topic, sealed) == (counter, text)


@pytest.mark.parametrize("name", sorted(EXCHANGES.keys() - X25519))
def test_both_ends_of_a_known_signed_exchange_in_the_labs_group_derive_its_key(name: str) -> None:
    key = bytes.fromhex(EXCHANGES[name]["key"])
    for cipher in ciphers(name).values():
        assert crypto.decrypt(cipher.seal(TOPIC, 0, TEXT), key) == TEXT
        assert cipher.open(TOPIC, crypto.encrypt(TEXT, key)) == (None, TEXT)


@pytest.mark.parametrize("name", EXCHANGES)
def test_the_suite_of_a_known_exchange_shows_in_both_of_its_keys(name: str) -> None:
    _, *payloads = transcript(EXCHANGES[name])
    assert [suite_of(payload).name for payload in payloads] == [EXCHANGES[name]["suite"]] * 2


@pytest.mark.parametrize("name", EXCHANGES)
def test_in_a_known_exchange_who_has_signed_is_verified_and_who_has_not_is_refused(
    name: str,
) -> None:
    netid, request, response = transcript(EXCHANGES[name])
    for side, payload, expected, answered in (
        ("client", request, netid, None),
        ("responder", response, RESPONDER, request),
    ):
        if EXCHANGES[name][f"{side}_identity"]:
            AUTHORITY.verify(payload, netid, expected, answered)
        else:
            with pytest.raises(PeerKeyError, match="not signed"):
                AUTHORITY.verify(payload, netid, expected, answered)


@pytest.mark.parametrize("name", [name for name in EXCHANGES if name.endswith("ed25519")])
def test_a_signature_that_leaves_nothing_to_chance_is_the_known_one(name: str) -> None:
    netid, request, response = transcript(EXCHANGES[name])
    for side, payload, answered in ("client", request, None), ("responder", response, request):
        signer = EXCHANGES[name][f"{side}_identity"] or ""
        if signer.endswith("ed25519"):
            public_key = to_pem(PUBLIC_KEY, public_key_der(payload))
            assert identity(signer).sign(public_key, netid, answered) == payload


# --- the second implementation -----------------------------------------------------------------


def identity(name: str) -> Identity:
    """Return an identity in the file, as signatures.py reads it."""
    return Identity("".join(IDENTITIES[name].values()).encode())


def reference_key(name: str) -> reference.SigningKey:
    """Return the private key of an identity in the file, for the second implementation."""
    key = load_pem_private_key(IDENTITIES[name]["private_key"].encode(), None)
    assert isinstance(key, reference.SigningKey)
    return key


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("name", IDENTITIES)
def test_each_implementation_verifies_what_the_other_signs(name: str, suite: str) -> None:
    is_client = name.startswith("client")
    request = SUITES[suite].client().blocks
    keys = request if is_client else SUITES[suite].responder(request).blocks
    contents = b"".join(content for _, content in reference.blocks(keys))
    chain, key = IDENTITIES[name]["chain"].encode(), reference_key(name)
    expected = NETID if is_client else RESPONDER
    answered = None if is_client else request
    ours = identity(name).sign(keys, NETID, answered)
    assert reference.verify_bundle(ours, NETID, expected, ANCHORS, answered) == contents
    theirs = reference.bundle_of(NETID, keys, key, chain, answered)
    AUTHORITY.verify(theirs, NETID, expected, answered)


def test_the_kinds_of_keys_that_sign_are_all_in_the_file() -> None:
    kinds = [
        getattr(getattr(key, "curve", None), "name", type(key).__name__)
        for key in map(reference_key, IDENTITIES)
    ]
    assert {"secp256r1", "secp384r1", "Ed25519PrivateKey", "RSAPrivateKey"} <= set(kinds)


def test_key_and_certificates_of_an_identity_may_come_in_either_order() -> None:
    for name, parts in IDENTITIES.items():
        public_key = X25519End().public_key
        pem = (parts["chain"] + parts["private_key"]).encode()
        bundle = Identity(pem).sign(public_key, NETID, b"any")
        assert bundle.count(b"CERTIFICATE") == 2 * parts["chain"].count("BEGIN")
        if name.startswith("responder"):
            AUTHORITY.verify(bundle, NETID, RESPONDER, b"any")


# --- identities and authorities that cannot be used --------------------------------------------


def private_pem(key: Any, password: bytes = b"") -> bytes:
    """Return a private key, encrypted if there is a password."""
    how = BestAvailableEncryption(password) if password else NoEncryption()
    result: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, how)
    return result


CHAIN = IDENTITIES["client_p256"]["chain"].encode()
OWN_KEY = IDENTITIES["client_p256"]["private_key"].encode()
# An elliptic curve that the library does not know: prime239v1 (X9.62).
ODD_CURVE = [
    (OBJECT_IDENTIFIER, bytes.fromhex("2a8648ce3d0201")),
    (OBJECT_IDENTIFIER, bytes.fromhex("2a8648ce3d030104")),
]
ODD_PUBLIC_KEY = [ODD_CURVE, (BIT_STRING, b"\0\4" + b"\1" * 60)]
ODD_EXPONENT = to_der([1, (OCTET_STRING, b"\1" * 30)])
ODD_PRIVATE_KEY = to_der([0, ODD_CURVE, (OCTET_STRING, ODD_EXPONENT)])
UNUSABLE: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", "does not hold a certificate and a private key"),
    "a key without a certificate": (lambda: OWN_KEY, "does not hold a certificate"),
    "a certificate without a key": (lambda: CHAIN, "does not hold a certificate and a private"),
    "an encrypted key": (
        lambda: CHAIN + private_pem(ec.generate_private_key(ec.SECP256R1()), b"secret"),
        "encrypted",
    ),
    "another's certificate": (
        lambda: OWN_KEY + IDENTITIES["client_ed25519"]["chain"].encode(),
        "a certificate for another",
    ),
    "the certificates in the wrong order": (
        lambda: OWN_KEY + FILE["authority"].encode() + CHAIN,
        "first a certificate for another",
    ),
    "a key that cannot sign": (
        lambda: CHAIN + private_pem(x25519.X25519PrivateKey.generate()),
        "private key that can sign",
    ),
    "a key on P-521": (
        lambda: CHAIN + private_pem(ec.generate_private_key(ec.SECP521R1())),
        "private key that can sign",
    ),
    "a key of RSA with 1024 bits": (
        lambda: CHAIN + private_pem(rsa.generate_private_key(65537, 1024)),
        "private key that can sign",
    ),
    "a key on a curve that nobody knows": (
        lambda: CHAIN + to_pem(PRIVATE_KEY, ODD_PRIVATE_KEY),
        "private key that can sign",
    ),
    "a certificate for a key on a curve that nobody knows": (
        lambda: OWN_KEY + reference.pem("CERTIFICATE", certificate(public_key=ODD_PUBLIC_KEY)),
        "does not hold a certificate",
    ),
    "a certificate of a version that does not exist": (
        lambda: OWN_KEY + reference.pem("CERTIFICATE", certificate(version=9)),
        "does not hold a certificate",
    ),
    "a broken certificate": (
        lambda: OWN_KEY + CHAIN.replace(b"\n", b"\nAAAA", 1),
        "does not hold a certificate",
    ),
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_an_identity_cannot_be(what: str) -> None:
    make, says = UNUSABLE[what]
    with pytest.raises(KeyFileError, match=says):
        Identity(make())


NO_AUTHORITIES: dict[str, Callable[[], bytes]] = {
    "nothing": lambda: b"",
    "text": lambda: b"text",
    "a private key": lambda: OWN_KEY,
    "half a certificate": lambda: CHAIN[:-40],
    "a broken certificate": lambda: CHAIN.replace(b"\n", b"\nAAAA", 1),
    "a certificate of a version that does not exist": lambda: reference.pem(
        "CERTIFICATE", certificate(version=9)
    ),
}


@pytest.mark.parametrize("what", NO_AUTHORITIES)
def test_an_authority_cannot_be(what: str) -> None:
    with pytest.raises(KeyFileError, match="holds no certificate in PEM"):
        Authority(NO_AUTHORITIES[what]())


# --- bundles that prove nothing ----------------------------------------------------------------

MALFORMED = "malformed, or of another kind|no valid public key|not signed"
SAYS = {  # what is wrong with a bundle, and what is said of it
    "unsigned": "^not signed$",
    "unknown authority": "from an unknown authority$",
    "expired": "has expired, or is not valid yet$",
    "usage": "for another purpose$|not for signatures$",
    "too much": "more than 3 certificates, or one of more than 8 KiB$|of another kind$",
    "name": "^signed by '.*', expected '.*'$|^signed with a certificate (without a name|that is not"
    " valid)$|malformed, or of another kind$",
    "key type": "malformed, or of another kind$",
    "signature": "^its signature does not match$",
    "malformed": MALFORMED + "|^its signature does not match$",
}


@pytest.mark.parametrize("name", BAD_BUNDLES)
def test_a_bundle_is_refused_for(name: str) -> None:
    bundle = BAD_BUNDLES[name]
    request = bundle["payload1"] and bundle["payload1"].encode()
    names = bundle["netid"], bundle["expected_name"]
    with pytest.raises(PeerKeyError, match=SAYS[bundle["why"]]):
        AUTHORITY.verify(bundle["payload"].encode(), *names, request)
    with pytest.raises(reference.REFUSED):
        reference.verify_bundle(bundle["payload"].encode(), *names, ANCHORS, request)


def test_the_same_bundle_is_refused_by_the_authority_of_others() -> None:
    others = Authority(FILE["other_authority"].encode())
    netid, request, response = transcript(EXCHANGES["x25519_both_p256"])
    AUTHORITY.verify(response, netid, RESPONDER, request)
    with pytest.raises(PeerKeyError, match="from an unknown authority"):
        others.verify(response, netid, RESPONDER, request)
    either = Authority((FILE["other_authority"] + FILE["authority"]).encode())
    either.verify(response, netid, RESPONDER, request)


def proves(payload: bytes, exchange: dict[str, Any], side: str) -> bool:
    """Tell whether a bundle is accepted in the place of one in the file."""
    netid, request, _ = transcript(exchange)
    try:
        if side == "client":
            AUTHORITY.verify(payload, netid, netid)
        else:
            AUTHORITY.verify(payload, netid, RESPONDER, request)
    except PeerKeyError:
        return False
    return True


@pytest.mark.parametrize(("side", "payload"), [("client", "payload1"), ("responder", "payload2")])
def test_no_changed_byte_of_a_bundle_changes_the_public_key_that_it_proves(
    side: str, payload: str
) -> None:
    """A changed byte of white space between two lines may be accepted: it says the same."""
    exchange = EXCHANGES["x25519_both_ed25519"]
    original: bytes = exchange[payload].encode()
    assert proves(original, exchange, side)
    accepted = []
    for place, byte in enumerate(original):
        for other in byte ^ 1, byte ^ 0x20, 0:
            changed = original[:place] + bytes([other]) + original[place + 1 :]
            if other != byte and proves(changed, exchange, side):
                accepted.append((changed, byte))
    for changed, byte in accepted:
        assert bytes([byte]).isspace()
        assert public_key_der(changed) == public_key_der(original)


# Certificates by hand, since no library would make them.

DNS, RFC822, X400, EDI, IP = 0x82, 0x81, 0xA3, 0xA5, 0x87  # GeneralName (RFC 5280, 4.2.1.6)
GENERALIZED_TIME = 0x18
SIGNER = ed25519.Ed25519PrivateKey.generate()
ALGORITHM = [(OBJECT_IDENTIFIER, bytes.fromhex("2b6570"))]  # Ed25519 (RFC 8410)


def names_extension(*names: tuple[int, bytes]) -> list[Any]:
    """Return a subjectAltName."""
    value = (OCTET_STRING, to_der([*names]))
    return [(OBJECT_IDENTIFIER, bytes.fromhex("551d11")), value]


NAMED = names_extension((DNS, NETID.encode()))


def certificate(
    *extensions: list[Any],
    version: int = 2,
    serial: object = 5,
    common_name: bytes = b"x",
    string_type: int = 0x0C,
    algorithm: list[Any] = ALGORITHM,
    public_key: list[Any] | None = None,
    not_before: tuple[int, bytes] = (UTC_TIME, b"250101000000Z"),
    not_after: tuple[int, bytes] = (UTC_TIME, b"491231235959Z"),
) -> bytes:
    """Return a certificate that its own key has signed (DER)."""
    attribute = [(OBJECT_IDENTIFIER, bytes.fromhex("550403")), (string_type, common_name)]
    name = [(0x31, to_der(attribute))]
    own_key = SIGNER.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    content = [
        *((0xA0, to_der(version)), serial, algorithm, name),
        *([not_before, not_after], name),
        *(public_key or from_der(own_key), (0xA3, to_der([*extensions]))),
    ]
    signature = b"\0" + SIGNER.sign(to_der(content))
    return to_der([content, algorithm, (BIT_STRING, signature)])


def bundle_of(certificate: bytes, request: bytes | None = None) -> bytes:
    """Return a bundle that is right but for its certificate (DER)."""
    der = public_key_der(X25519End().public_key)
    pem = reference.pem("CERTIFICATE", certificate)
    return reference.bundle(NETID, der, SIGNER, pem, request)


ODD_CERTIFICATES: dict[str, bytes] = {
    "nothing but what it needs": certificate(NAMED),
    "no extensions": certificate(),
    "the names twice": certificate(NAMED, NAMED),
    "version 2, which has no extensions": certificate(NAMED, version=1),
    "version 10, which does not exist": certificate(NAMED, version=9),
    "a negative version": certificate(NAMED, version=-1),
    "a negative serial number": certificate(NAMED, serial=-1),
    "serial number 0": certificate(NAMED, serial=0),
    "no serial number": certificate(NAMED, serial=(5, b"")),
    "parameters of an algorithm that has none": certificate(
        NAMED, algorithm=[*ALGORITHM, (5, b"")]
    ),
    "no names in the names": certificate(names_extension()),
    "an X.400 address": certificate(names_extension((DNS, NETID.encode()), (X400, b""))),
    "a name of EDI": certificate(names_extension((EDI, b""), (DNS, NETID.encode()))),
    "an IP address of three bytes": certificate(names_extension((IP, b"abc"))),
    "a wildcard": certificate(names_extension((DNS, b"*"))),
    "an empty name": certificate(names_extension((DNS, b""), (DNS, NETID.encode()))),
    "a name that is not ASCII": certificate(names_extension((DNS, b"\xff"))),
    "a name of control characters": certificate(names_extension((DNS, b"\x1b[2J\r\n"))),
    "a name of 10,000 characters": certificate(names_extension((DNS, b"a" * 10_000))),
    "an e-mail address": certificate(names_extension((RFC822, NETID.encode()))),
    "an extension that is no DER": certificate(
        [*NAMED[:1], (OCTET_STRING, b"\x30\x05abc")],
    ),
    "a subject that is not UTF-8": certificate(NAMED, common_name=b"\xff"),
    "a subject of bits": certificate(NAMED, common_name=b"\0x", string_type=BIT_STRING),
    "a subject of control characters": certificate(NAMED, common_name=b"\x1b[2J\nforged: line"),
    "a key on a curve that nobody knows": certificate(NAMED, public_key=ODD_PUBLIC_KEY),
    "a time that does not exist": certificate(NAMED, not_before=(UTC_TIME, b"259999999999Z")),
    "a time of another type": certificate(NAMED, not_before=(OCTET_STRING, b"")),
}


@pytest.mark.parametrize("is_client", [True, False], ids=["of a client", "of a responder"])
@pytest.mark.parametrize("what", ODD_CERTIFICATES)
def test_a_certificate_is_refused_in_printable_words_for(what: str, is_client: bool) -> None:
    """Whoever can publish can send one: it must neither end a program nor write to a terminal."""
    request = None if is_client else b"message 1"
    payload = bundle_of(ODD_CERTIFICATES[what], request)
    with pytest.raises(PeerKeyError) as refusal:
        AUTHORITY.verify(payload, NETID, NETID, request)
    assert str(refusal.value).isprintable()


@pytest.mark.parametrize("what", ODD_CERTIFICATES)
def test_an_intermediate_certificate_is_refused_or_not_needed_for(what: str) -> None:
    netid, request, response = transcript(EXCHANGES["x25519_both_p256"])
    odd = reference.pem("CERTIFICATE", ODD_CERTIFICATES[what])
    start = response.index(b"-----BEGIN SECURE")
    with contextlib.suppress(PeerKeyError):
        AUTHORITY.verify(response[:start] + odd + response[start:], netid, RESPONDER, request)


END_OF_2049 = datetime.datetime(2049, 12, 31, 23, 59, 59, tzinfo=datetime.timezone.utc)
ENDS = {  # notAfter, and what it means
    (UTC_TIME, b"491231235959Z"): END_OF_2049,
    (UTC_TIME, b"500101000000Z"): END_OF_2049.replace(1950, 1, 1, 0, 0, 0),
    (UTC_TIME, b"000229123456Z"): END_OF_2049.replace(2000, 2, 29, 12, 34, 56),
    (GENERALIZED_TIME, b"20500101000000Z"): END_OF_2049.replace(2050, 1, 1, 0, 0, 0),
    (GENERALIZED_TIME, b"99991231235959Z"): END_OF_2049.replace(9999),
}


@pytest.mark.parametrize("not_after", ENDS)
def test_the_end_of_a_certificate_is_read_as_the_standard_has_it(
    not_after: tuple[int, bytes],
) -> None:
    der = certificate(NAMED, not_after=not_after)
    pem = OWN_KEY + reference.pem("CERTIFICATE", der) + CHAIN
    assert ends(pem) == ENDS[not_after].timestamp()
    assert ends(pem) == x509.load_der_x509_certificate(der).not_valid_after_utc.timestamp()
    assert has_expired(pem) == (ENDS[not_after] < datetime.datetime.now(datetime.timezone.utc))


@pytest.mark.parametrize("content", [b"259999999999Z", b"00000101000000Z", b"4912312359", b""])
def test_a_certificate_with_an_end_that_does_not_exist_has_none(content: bytes) -> None:
    der = certificate(NAMED, not_after=(GENERALIZED_TIME, content))
    with pytest.raises(ValueError):  # noqa: PT011
        ends(reference.pem("CERTIFICATE", der))


def issued(key: ed25519.Ed25519PrivateKey, *extensions: x509.ExtensionType) -> bytes:
    """Return a certificate of the file's authority with some extensions (PEM)."""
    issuer = load_pem_private_key(FILE["authority_private_key"].encode(), None)
    assert isinstance(issuer, ec.EllipticCurvePrivateKey)
    now = datetime.datetime.now(datetime.timezone.utc)
    day = datetime.timedelta(days=1)
    identifier = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key())
    builder = x509.CertificateBuilder(
        *(ANCHORS[0].subject, x509.Name([]), key.public_key(), x509.random_serial_number()),
        *(now - day, now + day),
    )
    for extension in identifier, *extensions:
        critical = isinstance(extension, x509.SubjectAlternativeName)
        builder = builder.add_extension(extension, critical)
    return builder.sign(issuer, SHA256()).public_bytes(Encoding.PEM)


@pytest.mark.parametrize("is_client", [True, False], ids=["of a client", "of a responder"])
def test_any_of_the_names_in_a_certificate_proves_itself_and_no_other(is_client: bool) -> None:
    key = ed25519.Ed25519PrivateKey.generate()
    usage = x509.ExtendedKeyUsage(
        [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
    )
    names = [x509.DNSName(name) for name in ("first", "second", "*.third")]
    chain = issued(key, x509.SubjectAlternativeName(names), usage)
    der = public_key_der(X25519End().public_key)
    request = None if is_client else b"message 1"
    payload = reference.bundle(NETID, der, key, chain, request)
    for name in "first", "second":
        AUTHORITY.verify(payload, NETID, name, request)
    for name in "third", "a.third", "FIRST", "firs", "first.second", "":
        with pytest.raises(PeerKeyError, match="signed by 'first, second, "):
            AUTHORITY.verify(payload, NETID, name, request)


# --- keys and messages that are refused --------------------------------------------------------


@pytest.mark.parametrize("is_client", [True, False], ids=["as client", "as responder"])
@pytest.mark.parametrize("name", LOW_ORDER)
def test_no_key_is_derived_from_a_point_of_low_order(name: str, is_client: bool) -> None:
    ours, pem = X25519End(), LOW_ORDER[name].encode()
    assert suite_of(pem).name == "x25519"
    request, response = (ours.public_key, pem) if is_client else (pem, ours.public_key)
    with pytest.raises(PeerKeyError, match="of small order"):
        ours.agree(Transcript(NETID, request, response), is_client)


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("name", BAD_KEYS)
def test_a_public_key_of_no_suite_is_refused(name: str, suite: str) -> None:
    pem = BAD_KEYS[name].encode()
    with pytest.raises(PeerKeyError):
        suite_of(pem)
    ours = SUITES[suite].client()
    with pytest.raises(PeerKeyError, match="no valid public key"):
        ours.agree(Transcript(NETID, ours.blocks, pem))
    with pytest.raises(PeerKeyError, match="no valid public key"):
        SUITES[suite].responder(pem)


@pytest.mark.parametrize("suite", SUITES)
def test_keys_of_another_suite_and_our_own_are_refused(suite: str) -> None:
    ours = SUITES[suite].client()
    for name in SUITES.keys() - {suite}:
        response = SUITES[name].responder(SUITES[name].client().blocks).blocks
        with pytest.raises(PeerKeyError, match="no valid public key"):
            ours.agree(Transcript(NETID, ours.blocks, response))
    with pytest.raises(PeerKeyError, match=r"our own key handed back|its blocks are not"):
        ours.agree(Transcript(NETID, ours.blocks, ours.blocks))


@pytest.mark.parametrize("name", BAD_MESSAGES)
def test_a_message_is_refused_for(name: str) -> None:
    bad = BAD_MESSAGES[name]
    opener = ciphers(bad["exchange"])[OPENED_BY[bad["direction"]]]
    with pytest.raises(crypto.TokenError):
        opener.open(bad["topic"], bytes.fromhex(bad["message"]))


CLIENT, SERVER = (ciphers("x25519_unsigned")[direction] for direction in ("request", "response"))
numbers = st.integers(0, 2**64 - 1)


def test_every_changed_bit_of_a_sealed_message_is_refused() -> None:
    sealed = CLIENT.seal(TOPIC, 1, TEXT)
    assert SERVER.open(TOPIC, sealed) == (1, TEXT)
    for place in range(len(sealed)):
        for bit in range(8):
            changed = bytearray(sealed)
            changed[place] ^= 1 << bit
            with pytest.raises(crypto.TokenError):
                SERVER.open(TOPIC, bytes(changed))


@given(st.text(max_size=40), st.text(max_size=40), numbers, st.binary(max_size=100))
@example(TOPIC, TOPIC.replace("uppercase", "reverse"), 0, TEXT)
@example(TOPIC, ANSWER_TOPIC, 0, TEXT)
@example(TOPIC, TOPIC + "\0", 0, TEXT)
def test_a_message_opens_on_its_own_topic_only(
    topic: str, other: str, number: int, text: bytes
) -> None:
    sealed = CLIENT.seal(topic, number, text)
    assert SERVER.open(topic, sealed) == (number, text)
    if other != topic:
        with pytest.raises(crypto.TokenError):
            SERVER.open(other, sealed)


@given(numbers, numbers, st.binary(max_size=100))
def test_a_message_opens_under_its_own_counter_only(one: int, other: int, text: bytes) -> None:
    sealed = CLIENT.seal(TOPIC, one, text)
    if other != one:
        with pytest.raises(crypto.TokenError):
            SERVER.open(TOPIC, other.to_bytes(8, "big") + sealed[8:])


def test_no_message_opens_in_the_direction_in_which_it_was_sealed() -> None:
    for cipher in CLIENT, SERVER:
        with pytest.raises(crypto.TokenError):
            cipher.open(TOPIC, cipher.seal(TOPIC, 0, TEXT))


def test_two_exchanges_that_differ_in_anything_share_no_key() -> None:
    """NetID and both payloads, to the last newline, are bound into the keys."""
    ours, theirs = X25519End(), X25519End()
    request, response = ours.public_key, theirs.public_key
    client = ours.agree(Transcript(NETID, request, response), is_client=True)
    sealed = client.seal(TOPIC, 0, TEXT)
    same = theirs.agree(Transcript(NETID, request, response), is_client=False)
    assert same.open(TOPIC, sealed) == (0, TEXT)
    for other in (
        Transcript(NETID + "x", request, response),
        Transcript(NETID, request + b"\n", response),
        Transcript(NETID, request, response[:-1]),
        Transcript(NETID, request, response + CHAIN),
    ):
        with pytest.raises(crypto.TokenError):
            theirs.agree(other, is_client=False).open(TOPIC, sealed)


# --- anything at all ---------------------------------------------------------------------------


SIGNED = EXCHANGES["x25519_both_ed25519"]
LEAF = base64.b64decode("".join(IDENTITIES["client_p256"]["chain"].split("\n")[1:-2]))
payloads = (
    st.binary(max_size=300)
    | st.sampled_from([SIGNED["payload1"], SIGNED["payload2"]]).map(str.encode).flatmap(damaged)
    | damaged(LEAF).map(bundle_of)
    | damaged(ODD_CERTIFICATES["nothing but what it needs"]).map(bundle_of)
    | st.sampled_from([*BAD_KEYS.values(), *LOW_ORDER.values()]).map(str.encode).flatmap(damaged)
)


@given(payloads, st.none() | st.binary(max_size=20), st.text(max_size=20))
def test_any_bytes_prove_a_name_or_are_a_peer_key_error(
    payload: bytes, request: bytes | None, name: str
) -> None:
    with pytest.raises(PeerKeyError) as refusal:
        AUTHORITY.verify(payload, NETID, name + "x", request)
    assert str(refusal.value).isprintable()


@given(payloads)
def test_any_bytes_belong_to_a_suite_or_are_a_peer_key_error(payload: bytes) -> None:
    with contextlib.suppress(PeerKeyError):
        assert suite_of(payload).name in SUITES


@given(payloads, st.booleans())
def test_any_bytes_give_a_cipher_or_are_a_peer_key_error(payload: bytes, is_client: bool) -> None:
    ours = X25519End()
    request, response = (ours.public_key, payload) if is_client else (payload, ours.public_key)
    with contextlib.suppress(PeerKeyError):
        cipher = ours.agree(Transcript(NETID, request, response), is_client)
        assert len(cipher.seal(TOPIC, 0, TEXT)) == 8 + len(TEXT) + 16


@given(st.text(max_size=30), st.binary(max_size=100) | damaged(CLIENT.seal(TOPIC, 0, TEXT)))
def test_any_other_bytes_than_a_sealed_message_are_a_token_error(topic: str, data: bytes) -> None:
    if data != CLIENT.seal(TOPIC, 0, TEXT):
        with pytest.raises(crypto.TokenError):
            SERVER.open(topic, data)
