"""crypto.py: agreement with other implementations, and what it refuses."""

from __future__ import annotations

import base64
import datetime
import hashlib
import hmac
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import gmpy2
import pytest
from conftest import ROOT, SAFETY, VECTORS
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa, x25519
from cryptography.utils import CryptographyDeprecationWarning
from hypothesis import example, given, settings
from hypothesis import strategies as st

import crypto
from crypto import KeyFileError, PeerKeyError, read_group, read_private_key, read_public_key

settings.register_profile("suite", deadline=None)
settings.load_profile("suite")

VECTOR_FILE = VECTORS / "dh4096.json"
EXCHANGES: list[dict[str, str]] = json.loads(VECTOR_FILE.read_text())
GROUP = read_group()
P, G = GROUP
DH = bytes.fromhex("2a864886f70d010301")
KEY = bytes(range(32))
MESSAGE = b"Networking is the best!"
SIDES = {"client": "responder", "responder": "client"}


@pytest.fixture(autouse=True)
def safety_net() -> Iterator[None]:
    """End a test whose computation never ends."""
    signal.alarm(int(SAFETY))
    yield
    signal.alarm(0)


# An encoder of its own, since crypto's must not judge itself.


def tlv(tag: int, *contents: bytes) -> bytes:
    content = b"".join(contents)
    if len(content) < 0x80:
        return bytes((tag, len(content))) + content
    size = (len(content).bit_length() + 7) // 8
    return bytes((tag, 0x80 | size)) + len(content).to_bytes(size, "big") + content


def sequence(*contents: bytes) -> bytes:
    return tlv(0x30, *contents)


def integer(value: int) -> bytes:
    return tlv(2, value.to_bytes(value.bit_length() // 8 + 1, "big", signed=True))


def pem(der: bytes, label: str = "PUBLIC KEY") -> bytes:
    text = base64.encodebytes(der).decode()
    return f"-----BEGIN {label}-----\n{text}-----END {label}-----\n".encode()


def public_der(
    y: int = 4,
    *more_parameters: bytes,
    p: int = P,
    g: int = G,
    oid: bytes = DH,
    value: bytes | None = None,
    unused_bits: int = 0,
    more: bytes = b"",
) -> bytes:
    parameters = sequence(integer(p), integer(g), *more_parameters)
    bits = bytes([unused_bits]) + (integer(y) if value is None else value)
    return sequence(sequence(tlv(6, oid), parameters), tlv(3, bits), more)


def public_pem(y: int = 4, *more_parameters: bytes, **options: object) -> bytes:
    return pem(public_der(y, *more_parameters, **options))  # type: ignore[arg-type]


def indefinite(der: bytes) -> bytes:
    """Encode the outer SEQUENCE of a public key with an indefinite length, as BER may."""
    return b"\x30\x80" + der[4:] + b"\0\0"


def nested(depth: int) -> bytes:
    der = b""
    for _ in range(depth):
        der = sequence(der)
    return der


def hkdf(secret: bytes) -> bytes:
    """HKDF-SHA256 (RFC 5869) for 32 bytes, with the lab's salt and info of one zero byte."""
    extracted = hmac.digest(b"\0", secret, "sha256")
    return hmac.digest(extracted, b"\0" + b"\x01", "sha256")


def spki(key: object) -> bytes:
    encoding, form = serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    result: bytes = key.public_key().public_bytes(encoding, form)  # type: ignore[attr-defined]
    return result


def pkcs8(key: object) -> bytes:
    encoding, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
    result: bytes = key.private_bytes(  # type: ignore[attr-defined]
        encoding, form, serialization.NoEncryption()
    )
    return result


def certificate() -> bytes:
    key = ed25519.Ed25519PrivateKey.generate()
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "le0nh4rt")])
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = x509.CertificateBuilder(name, name, key.public_key(), 1, now, now)
    return builder.sign(key, None).public_bytes(serialization.Encoding.PEM)


def python(code: str, *arguments: str) -> str:
    """Run code in a process that has not imported anything; return what it printed."""
    command = [sys.executable, "-W", "error", "-c", code, *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SAFETY)
    assert (result.stderr, result.returncode) == ("", 0)
    return result.stdout


# --- the group ---------------------------------------------------------------------------------


def test_the_group_file_is_the_labs_to_the_byte() -> None:
    digest = hashlib.sha256((ROOT / "dhparam4096.pem").read_bytes()).hexdigest()
    assert digest == "c5792bd1bd7ef90e782eed93dbc43534f3cf2b2ba7879c553edde19332ff2e75"


def test_the_group_file_and_the_vectors_hold_the_same_p_and_g() -> None:
    for exchange in EXCHANGES:
        der = base64.b64decode("".join(exchange["client_public_key"].split("\n")[1:-2]))
        assert sequence(integer(P), integer(G)) in der
    assert G == 2


def test_p_is_a_safe_prime_of_4096_bits() -> None:
    assert P.bit_length() == 4096
    assert gmpy2.is_prime(P, 64)
    assert gmpy2.is_prime((P - 1) // 2, 64)


# --- agreement with others ---------------------------------------------------------------------


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("exchange", EXCHANGES, ids=lambda case: case["note"] or case["plaintext"])
def test_a_vector_gives_its_secret_and_its_key(exchange: dict[str, str], side: str) -> None:
    private, peer = exchange[f"{side}_private_key"], exchange[f"{SIDES[side]}_public_key"]
    assert crypto.create_shared_key(private, peer).hex() == exchange["shared_key"]
    exponent = read_private_key(private.encode())
    y = read_public_key(peer.encode())
    assert pow(y, exponent, P).to_bytes(512, "big").hex() == exchange["shared_secret"]
    own_value = read_public_key(exchange[f"{side}_public_key"].encode())
    assert own_value == pow(G, exponent, P)


@pytest.mark.parametrize("exchange", EXCHANGES, ids=lambda case: case["note"] or case["plaintext"])
def test_the_token_of_a_vector_decrypts(exchange: dict[str, str]) -> None:
    key = bytes.fromhex(exchange["shared_key"])
    assert crypto.decrypt(exchange["request_token"], key).decode() == exchange["plaintext"]


ALL_KEYS = """
import json, pathlib, sys
if sys.argv[1] == "pow":
    sys.modules["gmpy2"] = None
import crypto
for exchange in json.loads(pathlib.Path(sys.argv[2]).read_bytes()):
    for one, other in ("client", "responder"), ("responder", "client"):
        private, public = exchange[f"{one}_private_key"], exchange[f"{other}_public_key"]
        print(crypto.create_shared_key(private, public).hex())
private, public = crypto.generate_keyset()
token = crypto.encrypt("text", crypto.create_shared_key(private, public))
assert crypto.decrypt(token, crypto.create_shared_key(private, public)) == b"text"
assert (sys.modules.get("gmpy2") is None) == (sys.argv[1] == "pow")
"""


@pytest.mark.parametrize("arithmetic", ["gmpy2", "pow"])
def test_the_vectors_hold_without_a_warning_with(arithmetic: str) -> None:
    keys = [exchange["shared_key"] for exchange in EXCHANGES for _ in SIDES]
    assert python(ALL_KEYS, arithmetic, str(VECTOR_FILE)).split() == keys


def test_fresh_keys_agree_with_cryptographys_own_diffie_hellman() -> None:
    ours_private, ours_public = crypto.generate_keyset()
    with warnings.catch_warnings():  # it is deprecated, and takes seconds to prove p prime
        warnings.simplefilter("ignore", CryptographyDeprecationWarning)
        from cryptography.hazmat.primitives.asymmetric import dh

        parameters = dh.DHParameterNumbers(P, G).parameters()
        theirs = parameters.generate_private_key()
        peer = serialization.load_pem_public_key(ours_public)
        assert isinstance(peer, dh.DHPublicKey)
        key = hkdf(theirs.exchange(peer))
        theirs_private, theirs_public = pkcs8(theirs), spki(theirs)
    assert crypto.create_shared_key(ours_private, theirs_public) == key
    assert crypto.create_shared_key(theirs_private, ours_public) == key


def test_fresh_keys_agree_with_openssl_in_both_directions(tmp_path: Path) -> None:
    def openssl(*arguments: str) -> bytes:
        command = ["openssl", *arguments]
        return subprocess.run(
            command, cwd=tmp_path, check=True, capture_output=True, timeout=SAFETY
        ).stdout

    def derive(private: str, public: str) -> bytes:
        # Without leading zeros, unless told otherwise.
        return openssl("pkeyutl", "-derive", "-inkey", private, "-peerkey", public).rjust(
            512, b"\0"
        )

    theirs_private = openssl("genpkey", "-paramfile", str(ROOT / "dhparam4096.pem"))
    (tmp_path / "theirs").write_bytes(theirs_private)
    theirs_public = openssl("pkey", "-in", "theirs", "-pubout")
    (tmp_path / "theirs.pub").write_bytes(theirs_public)
    ours_private, ours_public = crypto.generate_keyset()
    (tmp_path / "ours").write_bytes(ours_private)
    (tmp_path / "ours.pub").write_bytes(ours_public)

    key = crypto.create_shared_key(ours_private, theirs_public)
    assert crypto.create_shared_key(theirs_private, ours_public) == key
    assert hkdf(derive("ours", "theirs.pub")) == hkdf(derive("theirs", "ours.pub")) == key
    assert openssl("pkey", "-in", "ours", "-pubout") == ours_public


def test_two_fresh_key_pairs_agree_and_differ() -> None:
    (private, public), (other_private, other_public) = (crypto.generate_keyset() for _ in range(2))
    assert public != other_public
    key = crypto.create_shared_key(private, other_public)
    assert crypto.create_shared_key(other_private, public) == key
    assert crypto.create_shared_key(private, public) != key


exponents = st.integers(1, 2**384 - 1)


@settings(max_examples=50)
@given(exponents, exponents)
def test_any_two_key_pairs_agree(one: int, other: int) -> None:
    ours, theirs = crypto.DhKeyPair(one), crypto.DhKeyPair(other)
    secret = pow(G, one * other, P).to_bytes(512, "big")
    assert ours.shared_key(theirs.public_key) == theirs.shared_key(ours.public_key) == hkdf(secret)


def test_a_private_exponent_has_384_random_bits() -> None:
    exponents = [read_private_key(crypto.generate_keyset()[0]) for _ in range(32)]
    assert max(exponent.bit_length() for exponent in exponents) in (382, 383, 384)
    assert len(set(exponents)) == 32


# --- public keys -------------------------------------------------------------------------------

OWN = crypto.DhKeyPair(3**201)  # its DER leaves spare bits in base64
OWN_PUBLIC = OWN.public_key
PADDING = b"-----BEGIN X-----\n"

ACCEPTED: dict[str, bytes] = {
    "as it is written": OWN_PUBLIC,
    "CRLF line ends": OWN_PUBLIC.replace(b"\n", b"\r\n"),
    "no newline at the end": OWN_PUBLIC.rstrip(),
    "text before and after": b"a comment\n" + OWN_PUBLIC + b"another\xff\n",
    "further PEM blocks": OWN_PUBLIC + pem(b"leaf", "CERTIFICATE") + pem(b"x", "SIGNATURE"),
    "privateValueLength": public_pem(OWN.public_value, integer(384)),
    "exactly 64 KiB": OWN_PUBLIC + b"\n" * (64 * 1024 - len(OWN_PUBLIC)),
}


@pytest.mark.parametrize("form", ACCEPTED)
def test_a_public_key_is_accepted_with(form: str) -> None:
    assert read_public_key(ACCEPTED[form]) == OWN.public_value


@pytest.mark.parametrize("y", [2, P - 2])
def test_a_public_value_at_the_end_of_its_range_is_accepted(y: int) -> None:
    assert read_public_key(public_pem(y)) == y


REFUSED: dict[str, Callable[[], bytes]] = {
    **{f"y = {name}": (lambda y=y: public_pem(y)) for name, y in {  # type: ignore[misc]
        "-p": -P, "-1": -1, "0": 0, "1": 1, "p - 1": P - 1, "p": P, "p + 1": P + 1, "p + 4": P + 4,
    }.items()},
    "another p": lambda: public_pem(p=P - 2),
    "another g": lambda: public_pem(g=5),
    "p and g negated": lambda: public_pem(p=-P, g=-G),
    "another algorithm": lambda: public_pem(oid=bytes.fromhex("2a8648ce3e0201")),
    "no parameters": lambda: pem(sequence(sequence(tlv(6, DH)), tlv(3, b"\0" + integer(4)))),
    "two privateValueLengths": lambda: public_pem(4, integer(384), integer(384)),
    "a privateValueLength of another type": lambda: public_pem(4, tlv(4, b"\1")),
    "RSA": lambda: spki(rsa.generate_private_key(65537, 2048)),
    "P-256": lambda: spki(ec.generate_private_key(ec.SECP256R1())),
    "X25519": lambda: spki(x25519.X25519PrivateKey.generate()),
    "Ed25519": lambda: spki(ed25519.Ed25519PrivateKey.generate()),
    "a certificate": certificate,
    "a certificate before the key": lambda: certificate() + OWN_PUBLIC,
    "a private key": lambda: OWN.private_key,
    "the group's file": lambda: (ROOT / "dhparam4096.pem").read_bytes(),
    "bytes after the key": lambda: pem(public_der() + b"\0"),
    "bytes at the end of the key": lambda: public_pem(more=b"\5\0"),
    "bytes after y": lambda: public_pem(value=integer(4) + b"\0"),
    "a missing byte": lambda: pem(public_der()[:-1]),
    "y missing": lambda: public_pem(value=b""),
    "y in a SEQUENCE": lambda: public_pem(value=sequence(integer(4))),
    "y in an OCTET STRING": lambda: public_pem(value=tlv(4, b"\4")),
    "y without content": lambda: public_pem(value=b"\2\0"),
    "bits left over": lambda: public_pem(unused_bits=4),
    "an empty BIT STRING": lambda: pem(public_der().removesuffix(b"\3\4\0\2\1\4") + b"\3\0"),
    "an OCTET STRING in place of the BIT STRING": lambda: pem(
        public_der().replace(b"\3\4\0\2\1\4", b"\4\4\0\2\1\4")
    ),
    "an indefinite length": lambda: pem(indefinite(public_der())),
    "a length longer than need be": lambda: public_pem(value=b"\2\x81\1\4"),
    "a length of 126 bytes": lambda: pem(b"\x30\xfe" + b"\xff" * 126),
    "a length that is cut off": lambda: pem(b"\x30\x82\1"),
    "y with a zero too many": lambda: public_pem(value=tlv(2, b"\0\4")),
    "p with a zero too many": lambda: pem(
        sequence(
            sequence(tlv(6, DH), sequence(tlv(2, b"\0\0" + P.to_bytes(512, "big")), integer(G))),
            tlv(3, b"\0" + integer(4)),
        )
    ),
    "DER": lambda: public_der(),
    "nothing": lambda: b"",
    "an empty block": lambda: pem(b""),
    "a zero byte": lambda: pem(b"\0"),
    "foreign characters in the base64": lambda: OWN_PUBLIC.replace(b"A", b"%", 1),
    "base64 that is cut off": lambda: pem(public_der())[:-28] + b"-----END PUBLIC KEY-----",
    "another label at the end": lambda: OWN_PUBLIC.replace(b"END PUBLIC", b"END PRIVATE"),
    "a line that is cut off": lambda: OWN_PUBLIC[:-2],
    "more than 64 KiB": lambda: OWN_PUBLIC.ljust(64 * 1024 + 1, b"\n"),
    "64 KiB of zeros": lambda: bytes(64 * 1024),
    "64 KiB of dashes": lambda: b"-" * 64 * 1024,
    "64 KiB of beginnings": lambda: PADDING * (64 * 1024 // len(PADDING)),
    "a label of 64 KiB": lambda: b"-----BEGIN " + b"A " * 32_000,
    "a block of 64 KiB without an end": lambda: b"-----BEGIN PUBLIC KEY-----" + b"A\n" * 32_000,
    "an INTEGER of 48 KB": lambda: pem(tlv(2, b"\1" * 48_000)),
    "24,000 empty values": lambda: pem(sequence(b"\5\0" * 24_000)),
    "24,000 empty values in a public key": lambda: public_pem(more=b"\5\0" * 23_000),
    "nesting without an end": lambda: pem(b"\x30\x80" * 24_000),
}  # fmt: skip


@pytest.mark.parametrize("form", REFUSED)
def test_a_public_key_is_refused_for(form: str) -> None:
    with pytest.raises(PeerKeyError) as refusal:
        read_public_key(REFUSED[form]())
    assert str(refusal.value)
    with pytest.raises(PeerKeyError):
        crypto.create_shared_key(OWN.private_key, REFUSED[form]())


def test_a_public_key_nested_to_any_depth_is_refused() -> None:
    for depth in [*range(0, 2_000, 7), 5_000, 11_000]:
        with pytest.raises(PeerKeyError):
            read_public_key(pem(nested(depth)))


OWN_DER = public_der(OWN.public_value)
bytes_of_one = st.integers(0, 255)


def secret_of(changed_pem: bytes) -> bytes | None:
    try:
        return OWN.shared_key(changed_pem)
    except PeerKeyError:
        return None


@settings(max_examples=200)
@given(st.integers(0, len(OWN_DER) - 1), bytes_of_one)
def test_any_changed_byte_of_a_public_key_is_refused_or_gives_another_secret(
    position: int, byte: int
) -> None:
    changed = bytearray(OWN_DER)
    changed[position] = byte
    is_same = bytes(changed) == OWN_DER
    assert (secret_of(pem(bytes(changed))) == OWN.shared_key(OWN_PUBLIC)) == is_same


TEXT = OWN_PUBLIC.rstrip()  # what follows the block is none of it
LAST_DIGIT = TEXT.index(b"=") - 1  # of the base64, and some of its bits mean nothing


@settings(max_examples=200)
@given(st.integers(0, len(TEXT) - 1), bytes_of_one)
@example(LAST_DIGIT, TEXT[LAST_DIGIT] + 1)
def test_any_changed_byte_of_a_public_keys_pem_is_refused_or_gives_another_secret(
    position: int, byte: int
) -> None:
    changed = bytearray(TEXT)
    changed[position] = byte
    is_same = bytes(changed).split() == TEXT.split()  # one white space is as good as another
    assert is_same or secret_of(bytes(changed)) != OWN.shared_key(OWN_PUBLIC)


ders = st.recursive(
    st.builds(tlv, bytes_of_one, st.binary(max_size=20))
    | st.sampled_from([tlv(6, DH), integer(P), integer(G), tlv(3, b"\0" + integer(4))]),
    lambda children: st.lists(children, max_size=4).map(lambda values: sequence(*values)),
)


@settings(max_examples=300)
@given(st.binary() | st.binary().map(pem) | ders.map(pem))
def test_reading_a_public_key_from_any_bytes_raises_only_its_error(data: bytes) -> None:
    try:
        y = read_public_key(data)
    except PeerKeyError:
        pass
    else:
        assert 2 <= y <= P - 2


# --- private keys ------------------------------------------------------------------------------


def private_pem(exponent: int = 5, *, version: int = 0, p: int = P, oid: bytes = DH) -> bytes:
    algorithm = sequence(tlv(6, oid), sequence(integer(p), integer(G)))
    return pem(sequence(integer(version), algorithm, tlv(4, integer(exponent))), "PRIVATE KEY")


def test_a_private_key_is_accepted_with_and_without_private_value_length() -> None:
    parameters = sequence(integer(P), integer(G), integer(384))
    der = sequence(integer(0), sequence(tlv(6, DH), parameters), tlv(4, integer(5)))
    for form in private_pem(5), pem(der, "PRIVATE KEY"):
        assert read_private_key(form) == 5


UNUSABLE: dict[str, bytes] = {
    "nothing": b"",
    "a public key": OWN_PUBLIC,
    "another group": private_pem(p=P - 2),
    "another type": private_pem(oid=bytes.fromhex("2a8648ce3e0201")),
    "another version": private_pem(version=1),
    "an exponent of 0": private_pem(0),
    "a negative exponent": private_pem(-1),
    "an exponent of p": private_pem(P),
    "no DER": pem(b"x", "PRIVATE KEY"),
    "deep nesting": pem(nested(700), "PRIVATE KEY"),
    "an encrypted key": pem(b"", "ENCRYPTED PRIVATE KEY"),
}


@pytest.mark.parametrize("form", UNUSABLE)
def test_a_private_key_is_refused_for(form: str) -> None:
    with pytest.raises(KeyFileError):
        crypto.create_shared_key(UNUSABLE[form], OWN_PUBLIC)


# --- the group's file --------------------------------------------------------------------------


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A copy of the module, which reads the group that lies beside it."""
    shutil.copy(ROOT / "crypto.py", tmp_path)
    monkeypatch.delitem(sys.modules, "crypto")
    monkeypatch.syspath_prepend(tmp_path)
    return importlib.import_module("crypto")


GROUP_FILES: dict[str, bytes | None] = {
    "missing": None,
    "empty": b"",
    "no PEM": b"\0\1\2",
    "another group": pem(sequence(integer(P - 2), integer(G)), "DH PARAMETERS"),
    "another generator": pem(sequence(integer(P), integer(5)), "DH PARAMETERS"),
    "a public key": OWN_PUBLIC,
    "deep nesting": pem(nested(700), "DH PARAMETERS"),
    "cut off": (ROOT / "dhparam4096.pem").read_bytes()[:400],
}


@pytest.mark.parametrize("content", GROUP_FILES)
def test_the_group_file_is_refused_when_it_is(
    content: str, tmp_path: Path, copied: ModuleType
) -> None:
    if (data := GROUP_FILES[content]) is not None:
        (tmp_path / "dhparam4096.pem").write_bytes(data)
    for call in (
        copied.generate_keyset,
        lambda: copied.create_shared_key(OWN.private_key, OWN_PUBLIC),
    ):
        with pytest.raises(copied.KeyFileError, match=r"dhparam4096\.pem"):
            call()


def test_the_group_file_may_be_a_folder_without_harm(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError):
        crypto.generate_keyset(str(tmp_path))


def test_the_group_file_is_found_beside_the_module_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, copied: ModuleType
) -> None:
    shutil.copy(ROOT / "dhparam4096.pem", tmp_path)
    monkeypatch.chdir("/")
    assert read_public_key(copied.generate_keyset()[1]) > 1


def test_the_group_file_may_have_other_line_ends(tmp_path: Path) -> None:
    text = (ROOT / "dhparam4096.pem").read_bytes().replace(b"\n", b"\r\n")
    (tmp_path / "group.pem").write_bytes(text)
    _, public = crypto.generate_keyset(str(tmp_path / "group.pem"))
    assert read_public_key(public) > 1


# --- tokens ------------------------------------------------------------------------------------


@given(st.binary(), st.binary(min_size=32, max_size=32))
def test_a_plaintext_survives_encryption(plaintext: bytes, key: bytes) -> None:
    token = crypto.encrypt(plaintext, key)
    assert crypto.decrypt(token, key) == crypto.decrypt(token.decode(), key) == plaintext


@given(st.text())
def test_a_text_is_encrypted_as_utf8(text: str) -> None:
    assert crypto.decrypt(crypto.encrypt(text, KEY), KEY) == text.encode()


# Of each length that base64 can leave at the end: 0, 1 and 2 bytes.
@pytest.mark.parametrize("size", [0, 16, 32])
def test_a_token_with_any_byte_changed_is_refused(size: int) -> None:
    token = crypto.encrypt(bytes(size), KEY)
    for position in range(len(token)):
        for byte in {*range(256)} - {token[position]}:
            with pytest.raises(crypto.TokenError):
                crypto.decrypt(token[:position] + bytes([byte]) + token[position + 1 :], KEY)


@given(st.binary())
@example(crypto.encrypt("", KEY)[:-1])
@example(crypto.encrypt("", KEY) + b"\n")
@example(b"\n" + crypto.encrypt("", KEY))
@example(crypto.encrypt("", KEY) + b"====")
@example(crypto.encrypt("", bytes(32)))
@example("\N{FULLWIDTH LATIN CAPITAL LETTER A}".encode())
def test_a_foreign_token_is_refused(data: bytes) -> None:
    with pytest.raises(crypto.TokenError):
        crypto.decrypt(data, KEY)
    with pytest.raises(crypto.TokenError):
        crypto.decrypt(base64.urlsafe_b64encode(data), KEY)


def test_the_size_of_a_token_is_known_beforehand() -> None:
    for size in [*range(100), 65_535, 2**20]:
        assert crypto.token_size(size) == len(crypto.encrypt(bytes(size), KEY))


def test_errors_hold_neither_key_nor_plaintext() -> None:
    with pytest.raises(crypto.TokenError) as refusal:
        crypto.decrypt(crypto.encrypt(MESSAGE, bytes(32)), KEY)
    assert MESSAGE.decode() not in str(refusal.value)
    assert refusal.value.__cause__ is None
