"""Signed exchanges and the suites as the program uses them: what works, what attackers get.

The attackers are the hostile broker, who may hold certificates of his own, and other clients of a
real broker. What they send is made by reference.py, which shares no code with the program.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import hostile
import issuing
import pytest
import reference
from broker_side import issue, load, made
from conftest import VECTORS, Mosquitto, Peer, ResponderProcess, error_lines, run, wait_until
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import x25519
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from hostile import (
    ANSWER,
    MESSAGE,
    PUBLISH,
    Conversation,
    LabClient,
    Link,
    Packet,
    RawClient,
    Script,
    all_at_once,
    attacked,
    check,
    hostile_broker,
    patiently,
    relay,
)
from issuing import PURPOSES, Issuer
from peers import KEYS, GcmClient, GcmResponder, responder_of
from test_extensions import ODD_CERTIFICATES

import crypto
from secure_mqtt import suites

Start = Callable[..., ResponderProcess]
Connect = Callable[..., Peer]
SUITES = list(suites.SUITES)
LOW_ORDER: dict[str, str] = json.loads((VECTORS / "extensions.json").read_text("utf-8"))[
    "low_order_points"
]
NO_KEY = "no valid key came on {}/key-exchange/response"
# For cases that run at the same time; a client signs only for a NetID that its certificate names.
ENCRYPTS = issuing.key_usage("key_encipherment")
NETIDS = {suite: [f"{suite}-{number}" for number in range(32)] for suite in SUITES}
SIGNATURE = b"-----BEGIN SECURE MQTT SIGNATURE-----"


# --- certificates ------------------------------------------------------------------------------


class Signer(NamedTuple):
    """Who signs by the second implementation."""

    key: reference.SigningKey
    chain: bytes

    def sign(self, netid: str, public_key: bytes, request: bytes | None = None) -> bytes:
        """Return message 1 or, if that is given as request, message 2."""
        return reference.bundle_of(netid, public_key, self.key, self.chain, request)


class Certificates:
    """A directory of identities that one authority certifies, some of them for no good."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.trust = f"--peer-ca={directory}/ca.crt"

    def identity(self, name: str) -> str:
        """Return the option to sign as this name."""
        pem = self.directory / f"{name}.pem"
        if not pem.exists():
            parts = [self.directory / f"{name}.{end}" for end in ("key", "crt")]
            pem.write_bytes(b"".join(part.read_bytes() for part in parts))
        return f"--identity={pem}"

    def signer(self, name: str) -> Signer:
        """Return who signs as this name."""
        key = load_pem_private_key((self.directory / f"{name}.key").read_bytes(), None)
        assert isinstance(key, reference.SigningKey)
        return Signer(key, (self.directory / f"{name}.crt").read_bytes())

    def issued(self, name: str, *extensions: x509.ExtensionType, public_key: Any = None) -> Signer:
        """Return who signs with a certificate for this name with some extensions.

        :param public_key: what it certifies; None: the one that belongs to the signer's key
        """
        issuer = Issuer(self.signer("ca").key, load(self.directory, "ca").subject)
        key = issuing.p256()
        leaf = issuer.issue(public_key or key.public_key(), issuing.named(name), *extensions)
        return Signer(key, issuing.pem(leaf))


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """The authority that all trust, and whom it certifies."""
    directory = made(
        tmp_path_factory.mktemp("course") / "certs", "localhost", "responder", "alice", "mallory"
    )
    names, day = ("responder", "alice"), timedelta(days=1)
    issue(directory, "expired", names=names, begins=-2 * day, ends=-day)
    issue(directory, "future", names=names, begins=day, ends=2 * day)
    issue(directory, "twin", names=names)
    issue(directory, "impostor", names=("mallory",))
    issue(directory, "couple", names=("alice", "bob"))
    issue(directory, "crowd", names=tuple(netid for netids in NETIDS.values() for netid in netids))
    return Certificates(directory)


@pytest.fixture(scope="module")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    """An authority that nobody trusts, which certifies the same names."""
    return Certificates(made(tmp_path_factory.mktemp("strangers") / "certs", "responder", "alice"))


@pytest.fixture(scope="module")
def signing_port(
    certificates: Certificates, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[int]:
    """The port of a broker with a responder that signs."""
    broker = Mosquitto(tmp_path_factory.mktemp("signing"))
    identity = certificates.identity("responder")
    responder = ResponderProcess("-p", str(broker.port), identity)
    try:
        responder.wait_for("ready")
        yield broker.port
    finally:
        responder.stop()
        broker.kill()


def with_chain(payload: bytes, chain: bytes) -> bytes:
    """Return a signed key exchange with other certificates."""
    return own_blocks(payload) + chain + payload[payload.index(SIGNATURE) :]


def own_blocks(payload: bytes) -> bytes:
    """Return a key exchange without what proves who has sent it."""
    return payload.partition(b"-----BEGIN CERTIFICATE")[0]


# --- keys by the second implementation ---------------------------------------------------------


def new_key() -> tuple[x25519.X25519PrivateKey, bytes]:
    """Return a private key, and the public one as PEM."""
    private = x25519.X25519PrivateKey.generate()
    form = PublicFormat.SubjectPublicKeyInfo
    return private, reference.pem(
        "PUBLIC KEY", private.public_key().public_bytes(Encoding.DER, form)
    )


def new_blocks(suite: str) -> bytes:
    """Return what an unsigned message 1 of a suite is."""
    return KEYS[suite]().ask() if suite in KEYS else crypto.DhKeyPair().public_key


def answering_blocks(suite: str, message_1: bytes) -> bytes:
    """Return what an unsigned message 2 of a suite is."""
    return KEYS[suite]().answer(message_1)[0] if suite in KEYS else crypto.DhKeyPair().public_key


def broken(script: Script, says: str, *options: str) -> None:
    """Run a client at a broker that follows a script, and check what it says."""

    def attempt(timeout: float) -> None:
        with hostile_broker(script) as (port, _):
            check(attacked(port, *options, timeout=timeout), says)

    if says == ANSWER:
        attempt(20)
    else:
        patiently(attempt)


# --- what works --------------------------------------------------------------------------------


class Security(NamedTuple):
    """Who signs, and who demands it of the other."""

    client_signs: bool = False
    responder_signs: bool = False
    client_demands: bool = False
    responder_demands: bool = False


SECURITIES = {
    "nobody signs": Security(),
    "only the client signs": Security(client_signs=True),
    "only the client signs, and has to": Security(client_signs=True, responder_demands=True),
    "only the responder signs": Security(responder_signs=True),
    "only the responder signs, and has to": Security(responder_signs=True, client_demands=True),
    "both sign": Security(client_signs=True, responder_signs=True),
    "both sign, and have to": Security(True, True, True, True),
}


def options(certificates: Certificates, name: str, signs: bool, demands: bool) -> list[str]:
    """Return the options of one side."""
    identity = [certificates.identity(name)] if signs else []
    return identity + ([certificates.trust] if demands else [])


@pytest.mark.parametrize("who", SECURITIES)
def test_a_request_is_answered_in_each_suite_if(
    who: str, own_broker: Mosquitto, certificates: Certificates, start_responder: Start
) -> None:
    security = SECURITIES[who]
    port = own_broker.port
    responders = security.responder_signs, security.responder_demands
    start_responder("-p", str(port), *options(certificates, "responder", *responders))
    clients = security.client_signs, security.client_demands
    for suite in SUITES:
        own = options(certificates, "alice", *clients)
        check(attacked(port, f"--suite={suite}", *own, timeout=20), ANSWER)


def test_without_a_suite_it_is_the_labs_and_it_is_answered_in_kind(
    broker: Mosquitto, responder: ResponderProcess, netid: str, peer: Connect
) -> None:
    listener = peer(broker.port, f"{netid}/key-exchange/+")
    labels = {"dh4096": 1, "x25519": 1, "mlkem768x25519": 2}  # of blocks, in each direction
    options = [([], "dh4096"), *(([f"--suite={suite}"], suite) for suite in SUITES)]
    for option, suite in options:
        check(attacked(broker.port, *option, netid=netid, timeout=20), ANSWER)
        request = listener.receive(f"{netid}/key-exchange/request")
        response = listener.receive(f"{netid}/key-exchange/response")
        assert suites.suite_of(request).name == suite
        assert [len(reference.blocks(each)) for each in (request, response)] == [labels[suite]] * 2


def test_a_responder_may_prove_another_name(
    own_broker: Mosquitto, certificates: Certificates, start_responder: Start
) -> None:
    port = own_broker.port
    start_responder("-p", str(port), certificates.identity("impostor"))
    ask = partial(attacked, port, certificates.trust)
    check(ask("--peer-name=mallory", timeout=20), ANSWER)
    says = f"{NO_KEY.format('alice')}…signed by 'mallory', expected 'responder' (1)"
    patiently(lambda timeout: check(ask(timeout=timeout), says))


def answer_as_the_lab(lab: Peer, netid: str) -> bytes:
    """Answer one client with the course's four functions; return its message 1."""
    private, public = crypto.generate_keyset()
    request = lab.receive(f"{netid}/key-exchange/request")
    lab.publish(f"{netid}/key-exchange/response", public)
    key = crypto.create_shared_key(private, request)
    text = crypto.decrypt(lab.receive(f"{netid}/uppercase/request"), key).decode()
    lab.publish(f"{netid}/uppercase/response", crypto.encrypt(text.upper(), key))
    return request


def test_a_client_that_signs_works_with_a_responder_of_the_lab(
    own_broker: Mosquitto, certificates: Certificates, peer: Connect
) -> None:
    lab = peer(own_broker.port, "alice/+/request")
    with ThreadPoolExecutor() as pool:
        identity = certificates.identity("alice")
        result = pool.submit(attacked, own_broker.port, identity, timeout=20)
        request = answer_as_the_lab(lab, "alice")
        check(result.result(), ANSWER)
    der = reference.verify_bundle(request, "alice", "alice", [load(certificates.directory, "ca")])
    assert der == reference.public_der(request)


def test_a_client_of_the_lab_works_with_a_responder_that_signs(
    signing_port: int, certificates: Certificates, netid: str, peer: Connect
) -> None:
    lab = peer(signing_port, f"{netid}/+/response")
    private, public = crypto.generate_keyset()
    lab.publish(f"{netid}/key-exchange/request", public)
    response = lab.receive(f"{netid}/key-exchange/response")
    anchors = [load(certificates.directory, "ca")]
    assert reference.verify_bundle(response, netid, "responder", anchors, public)
    key = crypto.create_shared_key(private, response)
    lab.publish(f"{netid}/uppercase/request", crypto.encrypt(MESSAGE, key))
    answer = lab.receive(f"{netid}/uppercase/response")
    assert crypto.decrypt(answer, key).decode() == ANSWER


# --- what is said and loaded -------------------------------------------------------------------


@pytest.mark.parametrize("suite", SUITES)
def test_verbose_names_the_key_of_a_peer_that_proves_nothing(suite: str) -> None:
    responder = responder_of(suite)
    with hostile_broker(responder.script()) as (port, conversations):
        result = attacked(port, "-v", f"--suite={suite}", timeout=20)
        blocks = responder.blocks(conversations[0])
    keys = b"".join(content for _, content in reference.key_blocks(blocks))
    fingerprint = hashlib.sha256(keys).hexdigest()
    says = f"may be anybody, without --peer-ca; SHA-256 of its public key: {fingerprint}\n"
    assert (result.returncode, result.stdout) == (0, ANSWER.encode() + b"\n")
    assert says in error_lines(result)
    assert "proved" not in error_lines(result)


@pytest.mark.parametrize("suite", SUITES)
def test_verbose_says_whom_the_peer_has_proved_to_be(
    suite: str, signing_port: int, certificates: Certificates, netid: str
) -> None:
    arguments = "-v", f"--suite={suite}", certificates.trust
    result = attacked(signing_port, *arguments, netid=netid, timeout=20)
    assert (result.returncode, result.stdout) == (0, ANSWER.encode() + b"\n")
    assert "the responder has proved to be 'responder'\n" in error_lines(result)
    assert "anybody" not in error_lines(result)


# x509 costs a request half as much again as all its other imports.
IMPORTS = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1"}
X509 = re.compile(r"import time:.*\| +cryptography\.x509$", re.MULTILINE)


@pytest.mark.parametrize("suite", SUITES)
@pytest.mark.parametrize("option", ["", "identity", "trust"])
def test_a_client_loads_what_certificates_need_only_if_there_are_some(
    option: str, suite: str, signing_port: int, certificates: Certificates
) -> None:
    given = {"": [], "identity": [certificates.identity("alice")], "trust": [certificates.trust]}
    where = ["-p", str(signing_port), f"--suite={suite}", *given[option]]
    result = run(*where, "alice", "uppercase", MESSAGE, env=IMPORTS)
    assert result.stdout == ANSWER.encode() + b"\n"
    assert "cryptography" in error_lines(result)
    assert bool(X509.search(error_lines(result))) == bool(option)


def test_a_responder_loads_what_certificates_need_only_if_there_are_some(
    own_broker: Mosquitto, certificates: Certificates, start_responder: Start
) -> None:
    port = own_broker.port
    for option in "", certificates.identity("responder"), certificates.trust:
        given = ["-p", str(port), *([option] if option else [])]
        responder = start_responder(*given, env=IMPORTS)
        own = ["--suite=x25519", certificates.identity("alice")]
        check(attacked(port, *own, timeout=20), ANSWER)
        assert responder.stop() == 0
        assert bool(X509.search("\n".join(responder.lines))) == bool(option)


# --- wrong usage -------------------------------------------------------------------------------

REQUEST = ["alice", "uppercase", MESSAGE]
NO_NAME = "--identity and --peer-ca need a NETID that a certificate can name"
NO_IDENTITY = "does not hold a certificate and a private key that can sign"
WRONG_USAGE: dict[str, tuple[list[str], str]] = {
    "a NETID with a letter that no name has": (
        ["--identity={alice.pem}", "naïve", *REQUEST[1:]],
        NO_NAME,
    ),
    "a NETID that begins with a hyphen": (
        ["--peer-ca={ca.crt}", "uppercase", MESSAGE, "--", "-alice"],
        "ACTION must be",
    ),
    "a NETID that ends with a hyphen": (["--peer-ca={ca.crt}", "alice-", *REQUEST[1:]], NO_NAME),
    "a NETID of two labels": (["--peer-ca={ca.crt}", "alice.b", *REQUEST[1:]], NO_NAME),
    "a NETID with an underscore": (["--identity={alice.pem}", "a_b", *REQUEST[1:]], NO_NAME),
    "a NETID with a newline": (["--identity={alice.pem}", "alice\n", *REQUEST[1:]], "NETID must"),
    "a NETID of 64 letters": (["--identity={alice.pem}", "a" * 64, *REQUEST[1:]], NO_NAME),
    "a responder's NETID that no certificate can name": (
        ["--peer-ca={ca.crt}", "--respond", "a_b"],
        NO_NAME,
    ),
    "an encrypted key": (["--identity={encrypted.pem}", *REQUEST], "is encrypted; decrypt its key"),
    "an expired certificate": (["--identity={expired.pem}", *REQUEST], "has expired; renew it"),
    "a key only": (["--identity={alice.key}", *REQUEST], NO_IDENTITY),
    "a certificate only": (["--identity={alice.crt}", *REQUEST], NO_IDENTITY),
    "neither": (["--identity={text}", *REQUEST], NO_IDENTITY),
    "another's certificate": (["--identity={mixed.pem}", *REQUEST], "a certificate for another"),
    "no identity file": (["--identity={none}", *REQUEST], "cannot read --identity"),
    "a directory as identity": (["--identity={.}", *REQUEST], "cannot read --identity"),
    "an empty name of the identity file": (["--identity=", *REQUEST], "must be a file's name"),
    "no authority file": (["--peer-ca={none}", *REQUEST], "cannot read --peer-ca"),
    "an authority without a certificate": (
        ["--peer-ca={ca.key}", *REQUEST],
        "holds no certificate in PEM",
    ),
    "a responder's encrypted key": (["--identity={encrypted.pem}", "--respond"], "encrypted"),
    "no identity file of a responder": (["--identity={none}", "--respond"], "cannot read"),
    "a responder's authority without a certificate": (
        ["--peer-ca={ca.key}", "--respond"],
        "holds no certificate in PEM",
    ),
    "a session's encrypted key": (
        ["--identity={encrypted.pem}", "--lines", "alice", "uppercase", "-"],
        "encrypted",
    ),
    "a peer's name that nobody certifies": (
        ["--peer-name=lab", *REQUEST],
        "--peer-name needs --peer-ca",
    ),
    "a peer's name that no certificate can have": (
        ["--peer-ca={ca.crt}", "--peer-name=a_b", *REQUEST],
        "must be a DNS name",
    ),
    "an identity for another NETID": (
        ["--identity={mallory.pem}", *REQUEST],
        "is for 'mallory', not for NETID 'alice'",
    ),
    "a peer's name for a responder": (
        ["--peer-ca={ca.crt}", "--peer-name=alice", "--respond"],
        "--peer-name is for a request",
    ),
    "an authority for --local": (["--peer-ca={ca.crt}", "--local", *REQUEST], "leave --peer-ca"),
    "a suite that does not exist": (["--suite=x448", *REQUEST], "must be dh4096 or x25519"),
    "no suite's name": (["--suite=", *REQUEST], "must be dh4096 or x25519"),
    "a suite for a responder": (["--suite=x25519", "--respond"], "--suite is for a request"),
    "the default suite for a responder": (["--suite=dh4096", "--respond"], "--suite is for"),
    "--lines for a responder": (["--lines", "--respond"], "--lines is for a request"),
    "--lines with a message": (["--lines", *REQUEST], "give - as MESSAGE"),
    "--rekey without --lines": (["--rekey=5", *REQUEST], "--rekey is for --lines"),
    "--rekey for a responder": (["--rekey=5", "--respond"], "--rekey is for a request"),
    "--rekey of 0 seconds": (["--lines", "--rekey=0", *REQUEST[:2], "-"], "seconds above 0"),
}  # fmt: skip


@pytest.fixture(scope="module")
def files(certificates: Certificates, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files that the table above names."""
    folder = tmp_path_factory.mktemp("files")
    alice = certificates.signer("alice")
    password = BestAvailableEncryption(b"secret")
    encrypted = alice.key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, password)
    own_key = (certificates.directory / "alice.key").read_bytes()
    (folder / "text").write_text("no PEM")
    (folder / "encrypted.pem").write_bytes(encrypted + alice.chain)
    (folder / "mixed.pem").write_bytes(own_key + certificates.signer("mallory").chain)
    for name in "alice", "expired", "mallory":
        certificates.identity(name)
    course = ["ca.crt", "ca.key", "alice.crt", "alice.key"]
    course += ["alice.pem", "expired.pem", "mallory.pem"]
    return {
        **{name: str(folder / name) for name in ("text", "encrypted.pem", "mixed.pem", "none")},
        **{name: str(certificates.directory / name) for name in course},
        ".": str(folder),
    }


@pytest.mark.parametrize("what", WRONG_USAGE)
def test_before_it_connects_the_program_refuses(what: str, files: dict[str, str]) -> None:
    arguments, says = WRONG_USAGE[what]
    for name, path in files.items():
        arguments = [argument.replace(f"{{{name}}}", path) for argument in arguments]
    connections: list[hostile.Wire] = []
    with hostile.listening(connections.append) as port:
        where = [] if "--local" in arguments else ["-p", str(port)]
        result = run(*where, *arguments, stdin=b"")
    assert (result.returncode, result.stdout) == (2, b"")
    assert says in error_lines(result)
    assert "usage: secure_mqtt_client.py" in error_lines(result)
    assert "Traceback" not in error_lines(result)
    assert not connections


# --- a wrong message 2 -------------------------------------------------------------------------


class Forger(NamedTuple):
    """What the forger of a message 2 has."""

    certificates: Certificates
    strangers: Certificates
    public_key: bytes  # her own
    message_1: bytes

    def signed(self, name: str, netid: str = "alice", request: bytes | None = b"") -> bytes:
        """Return it, signed as this name."""
        request = self.message_1 if request == b"" else request
        return self.certificates.signer(name).sign(netid, self.public_key, request)

    def issued(self, *extensions: x509.ExtensionType) -> bytes:
        """Return it with a certificate of the trusted authority with some extensions."""
        signer = self.certificates.issued("responder", *extensions)
        return signer.sign("alice", self.public_key, self.message_1)

    def odd(self, what: str) -> bytes:
        """Return it with a certificate that no authority would issue."""
        chain = reference.pem("CERTIFICATE", ODD_CERTIFICATES[what])
        key = self.certificates.signer("responder").key
        return Signer(key, chain).sign("alice", self.public_key, self.message_1)


MISMATCH = "its signature does not match"
MALFORMED = "its signature or certificate is malformed, or of another kind"
WRONG_ANSWERS: Mapping[str, tuple[Callable[[Forger], bytes], str]] = {
    "it is not signed": (lambda f: f.public_key, "not signed"),
    "its signature is left out": (
        lambda f: f.signed("responder").partition(SIGNATURE)[0],
        "not signed",
    ),
    "its certificate is left out": (
        lambda f: with_chain(f.signed("responder"), b""),
        MALFORMED,
    ),
    "nobody knows the authority": (
        lambda f: f.strangers.signer("responder").sign("alice", f.public_key, f.message_1),
        "signed with a certificate from an unknown authority",
    ),
    "the certificate has expired": (
        lambda f: f.signed("expired"),
        "signed with a certificate that has expired, or is not valid yet",
    ),
    "the certificate is not valid yet": (
        lambda f: f.signed("future"),
        "signed with a certificate that has expired, or is not valid yet",
    ),
    "it proves another name": (
        lambda f: f.signed("impostor"),
        "signed by 'mallory', expected 'responder'",
    ),
    "it proves the name of a broker's host": (
        lambda f: f.signed("localhost"),
        "signed by 'localhost', expected 'responder'",
    ),
    "the certificate is for clients": (
        lambda f: f.signed("mallory"),
        "signed with a certificate for another purpose",
    ),
    "the certificate says nothing of its purpose": (
        lambda f: f.issued(),
        "signed with a certificate for another purpose",
    ),
    "the certificate's key is for encryption": (
        lambda f: f.issued(PURPOSES, ENCRYPTS),
        "signed with a certificate for a key that is not for signatures",
    ),
    "it is the client's own message 1": (
        lambda f: f.message_1,
        "signed with a certificate for another purpose",
    ),
    "it is for another NetID": (lambda f: f.signed("responder", netid="bob"), MISMATCH),
    "it answers another message 1": (
        lambda f: f.signed("responder", request=new_key()[1]),
        MISMATCH,
    ),
    "it answers message 1 without its signature": (
        lambda f: f.signed("responder", request=own_blocks(f.message_1)),
        MISMATCH,
    ),
    "it is signed like a message 1": (lambda f: f.signed("responder", request=None), MISMATCH),
    "another key of this name has signed": (
        lambda f: with_chain(f.signed("responder"), f.certificates.signer("twin").chain),
        MISMATCH,
    ),
    "the public key is not the one that was signed": (
        lambda f: new_key()[1] + f.signed("responder").removeprefix(f.public_key),
        MISMATCH,
    ),
    "there is text in the signature": (
        lambda f: f.signed("responder").replace(SIGNATURE, SIGNATURE + b"\nAAAA="),
        MALFORMED,
    ),
    "the certificate has names twice": (lambda f: f.odd("the names twice"), MALFORMED),
    "the certificate has a version that does not exist": (
        lambda f: f.odd("version 10, which does not exist"),
        MALFORMED,
    ),
    "the certificate's serial number is below 0": (
        lambda f: f.odd("a negative serial number"),
        "signed with a certificate",
    ),
    "the certificate writes to the terminal": (
        lambda f: f.odd("a subject of control characters"),
        "signed with a certificate",
    ),
}  # fmt: skip


def forgeries(
    names: list[str],
    c: Conversation,
    own_key: bytes,
    certificates: Certificates,
    strangers: Certificates,
) -> Conversation:
    """Answer the key exchange with some of them."""
    forger = Forger(certificates, strangers, own_key, c.client_key)
    for name in names:
        c.give_key(WRONG_ANSWERS[name][0](forger))
    return c


@pytest.mark.parametrize("suite", SUITES)
def test_who_demands_a_signature_takes_no_message_2_if(
    suite: str, certificates: Certificates, strangers: Certificates
) -> None:
    demands = certificates.identity("alice"), certificates.trust, f"--suite={suite}"

    def case(name: str, says: str) -> None:
        def exchange(c: Conversation) -> None:
            own_key = answering_blocks(suite, c.client_key)
            forgeries([name], c, own_key, certificates, strangers)

        broken({"exchange": exchange}, f"{NO_KEY.format('alice')}…only: {says}", *demands)

    all_at_once({name: partial(case, name, says) for name, (_, says) in WRONG_ANSWERS.items()})


@pytest.mark.parametrize("suite", SUITES)
def test_the_right_message_2_is_taken_even_after_all_wrong_ones(
    suite: str, certificates: Certificates, strangers: Certificates
) -> None:
    responder = responder_of(suite)
    signer = certificates.signer("responder")

    def exchange(c: Conversation) -> None:
        forgeries([*WRONG_ANSWERS], c, responder.blocks(c), certificates, strangers)
        responder.give_key(c, signer.sign("alice", responder.blocks(c), c.client_key))

    demands = certificates.identity("alice"), certificates.trust, f"--suite={suite}"
    broken(responder.script(exchange=exchange), ANSWER, *demands)


# --- a broker in the middle --------------------------------------------------------------------


class Middle(NamedTuple):
    """A broker between a client and a responder that signs, who has certificates of his own."""

    conversation: Conversation
    suite: str
    mallory: LabClient  # asks the responder in the client's name
    stranger: LabClient  # asks it in another name
    certificates: Certificates

    @property
    def message_1(self) -> bytes:
        """What the client has sent."""
        return self.conversation.client_key

    @property
    def netid(self) -> str:
        """Who has sent it."""
        return self.conversation.packet.topic.partition("/")[0]

    def own_key(self, step: int = 0) -> bytes:
        """Return keys of his own to ask with, of the client's suite or of one after it."""
        return new_blocks(SUITES[(SUITES.index(self.suite) + step) % len(SUITES)])

    def own_answer(self) -> bytes:
        """Return keys of his own that answer the client's."""
        return answering_blocks(self.suite, self.message_1)

    def ask(self, payload: bytes) -> bytes:
        """Return the responder's answer to a message 1."""
        return self.mallory.ask("key-exchange", payload)

    def passed_on(self) -> bytes:
        """Return the responder's answer to the client's message 1."""
        return self.ask(self.message_1)

    def signed(self, name: str) -> bytes:
        """Return a public key of his own, signed by himself."""
        signer = self.certificates.signer(name)
        return signer.sign(self.netid, self.own_answer(), self.message_1)

    def without_key(self, payload: bytes) -> bytes:
        """Return what proves who has sent a message."""
        return payload.removeprefix(own_blocks(payload))


IN_THE_MIDDLE: Mapping[str, tuple[Callable[[Middle], bytes], str]] = {
    "gives a public key of his own": (lambda m: m.own_answer(), "not signed"),
    "strips the signature": (lambda m: own_blocks(m.passed_on()), "not signed"),
    "puts his own public key into the signed message": (
        lambda m: m.own_answer() + m.without_key(m.passed_on()),
        MISMATCH,
    ),
    "puts his own certificate into the signed message": (
        lambda m: with_chain(m.passed_on(), m.certificates.signer("impostor").chain),
        "signed by 'mallory', expected 'responder'",
    ),
    "signs as himself": (
        lambda m: m.signed("impostor"),
        "signed by 'mallory', expected 'responder'",
    ),
    "signs as a client": (lambda m: m.signed("mallory"), "a certificate for another purpose"),
    "asks with a public key of his own": (lambda m: m.ask(m.own_key()), MISMATCH),
    "strips the client's signature": (lambda m: m.ask(own_blocks(m.message_1)), MISMATCH),
    "signs in the client's place": (
        lambda m: m.ask(
            m.certificates.signer("impostor").sign(m.netid, own_blocks(m.message_1))
        ),
        MISMATCH,
    ),
    "changes nothing but the end of a line": (
        lambda m: m.ask(m.message_1.replace(b"\n", b"\r\n", 1)),
        MISMATCH,
    ),
    "asks in another's name": (
        lambda m: m.stranger.ask("key-exchange", m.message_1),
        MISMATCH,
    ),
    "asks in another suite": (lambda m: m.ask(m.own_key(1)), MISMATCH),
    "asks in a third suite": (lambda m: m.ask(m.own_key(2)), MISMATCH),
    "presents the signature of a key of another suite": (
        lambda m: m.own_answer() + m.without_key(m.ask(m.own_key(1))),
        MISMATCH,
    ),
    "hands message 1 back": (lambda m: m.message_1, "expected 'responder'"),
}  # fmt: skip


def pem_blocks(payload: bytes) -> list[bytes]:
    """Return the blocks of a key exchange, each as PEM."""
    return [reference.pem(*block) for block in reference.blocks(payload)]


def exchanged(payload: bytes, place: int, other: bytes) -> bytes:
    """Return a key exchange with one of its blocks taken from another."""
    blocks = pem_blocks(payload)
    blocks[place] = pem_blocks(other)[place]
    return b"".join(blocks)


# Where there is more than one key in a message, all are signed.
IN_THE_MIDDLE_OF_TWO_KEYS: Mapping[str, tuple[Callable[[Middle], bytes], str]] = {
    "puts an X25519 key of his own beside the signed ciphertext": (
        lambda m: exchanged(m.passed_on(), 0, m.own_answer()),
        MISMATCH,
    ),
    "puts a ciphertext of his own beside the signed X25519 key": (
        lambda m: exchanged(m.passed_on(), 1, m.own_answer()),
        MISMATCH,
    ),
    "takes the X25519 key from the answer to another exchange": (
        lambda m: exchanged(m.passed_on(), 0, m.ask(m.own_key())),
        MISMATCH,
    ),
    "takes the ciphertext from the answer to another exchange": (
        lambda m: exchanged(m.passed_on(), 1, m.ask(m.own_key())),
        MISMATCH,
    ),
    "takes the ciphertext from another answer to the same": (
        lambda m: exchanged(m.passed_on(), 1, m.passed_on()),
        MISMATCH,
    ),
    "leaves the ciphertext out": (
        lambda m: b"".join(pem_blocks(m.passed_on())[:1] + pem_blocks(m.passed_on())[2:]),
        MISMATCH,
    ),
    "puts the ciphertext behind the certificate": (
        lambda m: b"".join(pem_blocks(m.passed_on())[place] for place in (0, 2, 1, 3)),
        MALFORMED,
    ),
    "puts an ML-KEM key of his own into the request": (
        lambda m: m.ask(exchanged(m.message_1, 0, m.own_key())),
        MISMATCH,
    ),
    "puts an X25519 key of his own into the request": (
        lambda m: m.ask(exchanged(m.message_1, 1, m.own_key())),
        MISMATCH,
    ),
    "strips the ML-KEM key": (
        lambda m: m.ask(b"".join(pem_blocks(m.message_1)[1:])),
        MISMATCH,
    ),
}  # fmt: skip


@pytest.mark.parametrize("suite", SUITES)
def test_who_demands_a_signature_finds_out_a_broker_who(
    suite: str, signing_port: int, certificates: Certificates
) -> None:
    demands = certificates.identity("crowd"), certificates.trust, f"--suite={suite}"
    attacks = {**IN_THE_MIDDLE}
    if len(reference.blocks(new_blocks(suite))) == 2:
        attacks |= IN_THE_MIDDLE_OF_TWO_KEYS

    def case(number: int, attack: Callable[[Middle], bytes], says: str) -> None:
        netid = NETIDS[suite][number]

        def attempt(timeout: float) -> None:
            def exchange(c: Conversation) -> None:
                c.give_key(attack(Middle(c, suite, mallory, stranger, certificates)))

            with (
                LabClient(signing_port, netid) as mallory,
                LabClient(signing_port, f"x-{netid}") as stranger,
                hostile_broker({"exchange": exchange}) as (port, conversations),
            ):
                result = attacked(port, *demands, netid=netid, timeout=timeout)
            check(result, f"{NO_KEY.format(netid)}…only: …{says} (1)")
            assert not conversations[0].token, "the message was sent"

        patiently(attempt)

    rows = enumerate(attacks.items())
    all_at_once({name: partial(case, number, *row) for number, (name, row) in rows})


@pytest.mark.parametrize("suite", SUITES)
def test_a_broker_in_the_middle_who_passes_all_on_is_not_noticed(
    suite: str, signing_port: int, certificates: Certificates
) -> None:
    netid = NETIDS[suite][-1]
    with LabClient(signing_port, netid) as mallory:
        script: Script = {
            "exchange": lambda c: c.give_key(mallory.ask("key-exchange", c.client_key)),
            "request": lambda c: c.respond(mallory.ask("uppercase", c.token)),
        }
        demands = certificates.identity("crowd"), certificates.trust, f"--suite={suite}"
        with hostile_broker(script) as (port, _):
            check(attacked(port, *demands, netid=netid, timeout=20), ANSWER)


@pytest.mark.parametrize("suite", SUITES)
def test_a_recorded_session_is_found_out_at_its_message_2(
    suite: str, signing_port: int, certificates: Certificates, netid: str
) -> None:
    recorded: list[bytes] = []

    def exchange(c: Conversation) -> None:
        if not recorded:
            recorded.append(mallory.ask("key-exchange", c.client_key))
        c.give_key(recorded[0])

    with LabClient(signing_port, netid) as mallory:
        script: Script = {
            "exchange": exchange,
            "request": lambda c: c.respond(mallory.ask("uppercase", c.token)),
        }
        demands = certificates.trust, f"--suite={suite}"
        with hostile_broker(script) as (port, _):
            ask = partial(attacked, port, *demands, netid=netid)
            check(ask(timeout=20), ANSWER)
            says = f"{NO_KEY.format(netid)}…only: {MISMATCH} (1)"
            patiently(lambda timeout: check(ask(timeout=timeout), says))


# --- a wrong message 1 -------------------------------------------------------------------------


class Requester(NamedTuple):
    """What the forger of a message 1 has."""

    certificates: Certificates
    strangers: Certificates
    public_key: bytes

    def signed(self, name: str, netid: str = "alice", request: bytes | None = None) -> bytes:
        """Return it, signed as this name."""
        return self.certificates.signer(name).sign(netid, self.public_key, request)

    def odd(self, what: str) -> bytes:
        """Return it with a certificate that no authority would issue."""
        chain = reference.pem("CERTIFICATE", ODD_CERTIFICATES[what])
        key = self.certificates.signer("alice").key
        return Signer(key, chain).sign("alice", self.public_key)

    def self_issued(self, key: reference.SigningKey, count: int) -> bytes:
        """Return it with certificates of one key, each of which could have issued any other."""
        issuer = Issuer(key, issuing.common_name("mallory"))
        chain = [issuer.certify(issuer)] * (count - 1)
        leaf = issuer.issue(key.public_key(), issuing.named("alice"), PURPOSES, subject=issuer.name)
        return Signer(key, issuing.pem(leaf, *chain)).sign("alice", self.public_key)


# NetID, message 1, and the reason for which the responder ignores it.
WRONG_REQUESTS: Mapping[str, tuple[str, Callable[[Requester], bytes], str]] = {
    "unsigned": ("alice", lambda r: r.public_key, "not signed"),
    "unsigned, of the lab": ("alice", lambda r: crypto.DhKeyPair().public_key, "not signed"),
    "stripped": ("alice", lambda r: r.signed("alice").partition(SIGNATURE)[0], "not signed"),
    "by a stranger": (
        "alice",
        lambda r: r.strangers.signer("alice").sign("alice", r.public_key),
        "signed with a certificate from an unknown authority",
    ),
    "expired": ("alice", lambda r: r.signed("expired"), "that has expired, or is not valid yet"),
    "not valid yet": ("alice", lambda r: r.signed("future"), "expired, or is not valid yet"),
    "by another client": (
        "alice",
        lambda r: r.signed("mallory"),
        "signed by 'mallory', expected 'alice'",
    ),
    "by the responder": (
        "alice",
        lambda r: r.signed("responder"),
        "signed by 'responder', expected 'alice'",
    ),
    "a true one for another NetID": (
        "bob",
        lambda r: r.signed("alice", netid="bob"),
        "signed by 'alice', expected 'bob'",
    ),
    "for the NetID in capitals": (
        "Alice",
        lambda r: r.signed("alice", netid="Alice"),
        "signed by 'alice', expected 'Alice'",
    ),
    "for a NetID that no certificate can name": (
        "a_b",
        lambda r: r.signed("alice", netid="a_b"),
        "signed by 'alice', expected 'a_b'",
    ),
    "replayed under another NetID of the same person": (
        "alice",
        lambda r: r.signed("couple", netid="bob"),
        MISMATCH,
    ),
    "with a broker's certificate": (
        "localhost",
        lambda r: r.signed("localhost", netid="localhost"),
        "signed with a certificate for another purpose",
    ),
    "with a certificate that says nothing of its purpose": (
        "alice",
        lambda r: r.certificates.issued("alice").sign("alice", r.public_key),
        "signed with a certificate for another purpose",
    ),
    "with a key for encryption": (
        "alice",
        lambda r: r.certificates.issued("alice", PURPOSES, ENCRYPTS).sign("alice", r.public_key),
        "signed with a certificate for a key that is not for signatures",
    ),
    "a message 2": ("responder", lambda r: r.signed("responder", "responder", b"any"), MISMATCH),
    "with another public key": (
        "alice",
        lambda r: new_key()[1] + r.signed("alice").removeprefix(r.public_key),
        MISMATCH,
    ),
    "with another certificate": (
        "alice",
        lambda r: with_chain(r.signed("alice"), r.certificates.signer("twin").chain),
        MISMATCH,
    ),
    "with a key of no suite": (
        "alice",
        lambda r: r.certificates.signer("alice").sign(
            "alice", reference.pem("PUBLIC KEY", b"no key")
        ),
        "no valid public key",
    ),
    "with a point of low order": (
        "alice",
        lambda r: r.certificates.signer("alice").sign("alice", LOW_ORDER["0"].encode()),
        "no valid public key: of small order",
    ),
    "with a certificate of names twice": (
        "alice",
        lambda r: r.odd("the names twice"),
        "signed with a certificate that is not valid",
    ),
    "with a certificate of version 10": (
        "alice",
        lambda r: r.odd("version 10, which does not exist"),
        MALFORMED,
    ),
    "with a certificate that writes to the log": (
        "alice",
        lambda r: r.odd("a subject of control characters"),
        "signed with a certificate",
    ),
    "with a certificate whose subject is no text": (
        "alice",
        lambda r: r.odd("a subject of bits"),
        MALFORMED,
    ),
    "with a serial number below 0": (
        "alice",
        lambda r: r.odd("a negative serial number"),
        "signed with a certificate",
    ),
    "with a key that cannot sign, which the authority has certified": (
        "alice",
        lambda r: r.certificates.issued(
            "alice", PURPOSES, public_key=x25519.X25519PrivateKey.generate().public_key()
        ).sign("alice", r.public_key),
        MALFORMED,
    ),
    "with six certificates of a key that takes long": (
        "alice",
        lambda r: r.self_issued(issuing.odd_rsa(3072, 3000), 6),
        "signed with more than 3 certificates, or one of more than 8 KiB",
    ),
    "with three certificates of a key that takes long": (
        "alice",
        lambda r: r.self_issued(issuing.p384(), 3),
        "signed with a certificate from an unknown authority",
    ),
}  # fmt: skip


def test_a_responder_that_demands_a_signature_answers_no_wrong_message_1_and_says_why(
    own_broker: Mosquitto,
    certificates: Certificates,
    strangers: Certificates,
    start_responder: Start,
    peer: Connect,
) -> None:
    responder = start_responder("-p", str(own_broker.port), certificates.trust)
    clients = peer(own_broker.port, "+/key-exchange/response")
    requester = Requester(certificates, strangers, new_key()[1])
    for number, (netid, forge, reason) in enumerate(WRONG_REQUESTS.values(), 1):
        clients.publish(f"{netid}/key-exchange/request", forge(requester))
        responder.wait_for("event=ignored", times=number)
        assert f'level=warning event=ignored netid="{netid}"' in responder.lines[-1]
        assert reason in responder.lines[-1]
    clients.publish("alice/key-exchange/request", requester.signed("alice"))
    assert suites.suite_of(clients.receive("alice/key-exchange/response")).name == "x25519"
    assert responder.stop() == 0
    assert len(responder.lines) == 1 + len(WRONG_REQUESTS)  # the first says that it is ready


# What a forger makes of a message 1 with two keys that alice has signed.
WRONG_PAIRS: Mapping[str, tuple[Callable[[bytes, bytes], bytes], str]] = {
    "with the ML-KEM key of another exchange": (lambda m, other: exchanged(m, 0, other), MISMATCH),
    "with the X25519 key of another exchange": (lambda m, other: exchanged(m, 1, other), MISMATCH),
    "with both keys of another exchange": (
        lambda m, other: exchanged(exchanged(m, 0, other), 1, other),
        MISMATCH,
    ),
    "without the ML-KEM key": (lambda m, other: b"".join(pem_blocks(m)[1:]), MISMATCH),
    "without the X25519 key": (
        lambda m, other: b"".join(pem_blocks(m)[:1] + pem_blocks(m)[2:]),
        MISMATCH,
    ),
    "with a third key": (lambda m, other: pem_blocks(other)[0] + m, MISMATCH),
    "with the keys swapped": (
        lambda m, other: b"".join(pem_blocks(m)[place] for place in (1, 0, 2, 3)),
        MISMATCH,
    ),
    "with the X25519 key behind the certificate": (
        lambda m, other: b"".join(pem_blocks(m)[place] for place in (0, 2, 1, 3)),
        MALFORMED,
    ),
}  # fmt: skip


def test_a_responder_that_demands_a_signature_wants_it_for_both_keys(
    own_broker: Mosquitto, certificates: Certificates, start_responder: Start
) -> None:
    responder = start_responder("-p", str(own_broker.port), certificates.trust)
    sign = certificates.signer("alice").sign
    with GcmClient(own_broker.port, "alice", "mlkem768x25519", sign) as alice:
        other = sign("alice", new_blocks("mlkem768x25519"))
        for number, (forge, reason) in enumerate(WRONG_PAIRS.values(), 1):
            alice.send(forge(alice.message_1, other), "key-exchange")
            responder.wait_for("event=ignored", times=number)
            assert reason in responder.lines[-1]
        assert alice.exchange().is_served(0)


def test_two_keys_that_are_signed_but_wrong_are_refused(
    own_broker: Mosquitto, certificates: Certificates, start_responder: Start
) -> None:
    """Whoever holds a certificate can sign anything."""
    responder = start_responder("-p", str(own_broker.port), certificates.trust)
    sign = certificates.signer("alice").sign
    kem, x25519_key = pem_blocks(new_blocks("mlkem768x25519"))
    with GcmClient(own_broker.port, "alice", "mlkem768x25519", sign) as alice:
        for number, blocks in enumerate(
            (kem, 2 * kem + x25519_key, kem + 2 * x25519_key, x25519_key + kem), 1
        ):
            alice.send(sign("alice", blocks), "key-exchange")
            responder.wait_for("event=ignored", times=number)
            assert "its blocks are not PUBLIC KEY" in responder.lines[-1]
        alice.send(sign("alice", kem + LOW_ORDER["0"].encode()), "key-exchange")
        responder.wait_for("small order")
        assert alice.exchange().is_served(0)


def test_a_key_of_mlkem_behind_the_certificate_of_x25519_is_ignored_or_refused(
    own_broker: Mosquitto, certificates: Certificates, start_responder: Start
) -> None:
    """Who demands no signature ignores all from the certificate on; who does wants no more."""
    kem, _ = pem_blocks(new_blocks("mlkem768x25519"))
    signer = certificates.signer("alice")

    def sign(netid: str, blocks: bytes) -> bytes:
        [*before, signature] = pem_blocks(signer.sign(netid, blocks))
        return b"".join([*before, kem, signature])

    with GcmClient(own_broker.port, "alice", "x25519", sign) as alice:
        lenient = start_responder("-p", str(own_broker.port))
        assert alice.exchange().is_served(0)
        assert lenient.stop() == 0
        strict = start_responder("-p", str(own_broker.port), certificates.trust)
        alice.send(alice.message_1, "key-exchange")
        strict.wait_for(MALFORMED)


def test_a_responder_for_one_netid_wants_its_certificate_too(
    own_broker: Mosquitto, certificates: Certificates, start_responder: Start
) -> None:
    port = own_broker.port
    responder = start_responder("-p", str(port), certificates.trust, "alice")
    check(attacked(port, certificates.identity("alice"), timeout=20), ANSWER)

    with RawClient(port, "mallory", "alice/key-exchange/response") as mallory:
        signer = certificates.signer("mallory")
        mallory.publish("alice/key-exchange/request", signer.sign("alice", new_key()[1]))
        responder.wait_for("signed by 'mallory', expected 'alice'")
        signer = certificates.signer("alice")
        message_1 = signer.sign("alice", new_key()[1])
        mallory.publish("alice/key-exchange/request", message_1)
        assert suites.suite_of(mallory.next_message().payload).name == "x25519"


def test_who_replays_a_signed_message_1_gets_no_answer(
    own_broker: Mosquitto, certificates: Certificates, start_responder: Start
) -> None:
    port = own_broker.port
    own = certificates.trust, certificates.identity("responder")
    responder = start_responder("-p", str(port), *own)
    with GcmClient(port, "alice", sign=certificates.signer("alice").sign) as alice:
        alice.exchange()
        assert alice.is_served(0)
        alice.publish("alice/key-exchange/request", alice.message_1)
        responder.wait_for("a public key that was here before")
        alice.send(alice.seal(0))
        responder.wait_for(REPEATED)
        assert alice.is_served(1)


# --- the suite x25519: what the client accepts --------------------------------------------------

FALSE_RESPONSES: Mapping[
    str, tuple[Callable[[GcmResponder, Conversation], bytes | list[bytes]], str]
] = {
    "the client's own request": (lambda r, c: c.token, "our own message handed back"),
    "the answer under the key of requests": (
        lambda r, c: r.answer(c, with_request_key=True),
        "not encrypted with our key",
    ),
    "the answer for another action": (
        lambda r, c: r.answer(c, topic="alice/reverse/response"),
        "not encrypted with our key",
    ),
    "the answer for another NetID": (
        lambda r, c: r.answer(c, topic="bob/uppercase/response"),
        "not encrypted with our key",
    ),
    "the answer for the topic of requests": (
        lambda r, c: r.answer(c, topic="alice/uppercase/request"),
        "not encrypted with our key",
    ),
    "the answer with another counter in front": (
        lambda r, c: [bytes(7) + bytes([n]) + r.answer(c)[8:] for n in range(1, 11)],
        "not encrypted with our key (10)",
    ),
    "the answer with the last counter in front": (
        lambda r, c: b"\xff" * 8 + r.answer(c)[8:],
        "not encrypted with our key",
    ),
    "the answer without its counter": (
        lambda r, c: r.answer(c)[8:],
        "not encrypted with our key",
    ),
    "an answer to the next request": (
        lambda r, c: r.answer(c, number=1),
        "an answer to no request that waits",
    ),
    "an answer to the last request that there can be": (
        lambda r, c: r.answer(c, number=2**64 - 1),
        "an answer to no request that waits",
    ),
    "the right answer with each of its bits flipped in turn": (
        lambda r, c: [
            bytes([*right[:place], right[place] ^ 1 << bit, *right[place + 1 :]])
            for right in [r.answer(c)]
            for place in range(len(right))
            for bit in range(8)
        ],
        f"not encrypted with our key ({8 * (8 + len(ANSWER) + 16)})",
    ),
    "each beginning of the right answer": (
        lambda r, c: [r.answer(c)[:size] for size in range(8 + len(ANSWER) + 16)],
        "too short for a message (24)",
    ),
    "the right answer and something more": (
        lambda r, c: [r.answer(c) + b"\0", r.answer(c) * 2],
        "not encrypted with our key (2)",
    ),
    "a token of the lab": (
        lambda r, c: crypto.encrypt(ANSWER, bytes(32)),
        "not encrypted with our key",
    ),
    "the answer, not encrypted": (lambda r, c: ANSWER.encode(), "too short for a message"),
    "nothing": (lambda r, c: b"", "too short for a message"),
}  # fmt: skip


def false_script(name: str, is_right_at_last: bool) -> Script:
    """Return a script that gives what the table says, and then the right answer or none."""
    responder = GcmResponder()

    def request(c: Conversation) -> None:
        payloads = FALSE_RESPONSES[name][0](responder, c)
        for payload in payloads if isinstance(payloads, list) else [payloads]:
            c.respond(payload)
        if is_right_at_last:
            responder.respond(c)

    return responder.script(request=request)


def test_with_x25519_no_false_response_is_printed() -> None:
    all_at_once(
        {
            name: partial(broken, false_script(name, False), says, "--suite=x25519")
            for name, (_, says) in FALSE_RESPONSES.items()
        }
    )


def test_with_x25519_the_right_answer_is_printed_even_after_any_false_one() -> None:
    all_at_once(
        {
            name: partial(broken, false_script(name, True), ANSWER, "--suite=x25519")
            for name in FALSE_RESPONSES
        }
    )


def test_with_x25519_a_request_or_response_that_is_dropped_leaves_an_error() -> None:
    script = GcmResponder().script(request=lambda c: c)
    broken(script, "no response came on alice/uppercase/response", "--suite=x25519")


def test_with_x25519_a_recorded_session_is_no_answer() -> None:
    recorded: list[bytes] = []

    def exchange(c: Conversation) -> None:
        responder.give_key(c, recorded[0] if recorded else b"")

    def request(c: Conversation) -> None:
        if len(recorded) < 2:
            recorded.extend([responder.blocks(c), responder.answer(c)])
        c.respond(recorded[1])

    responder = GcmResponder()
    with hostile_broker(responder.script(exchange=exchange, request=request)) as (port, _):
        ask = partial(attacked, port, "--suite=x25519")
        check(ask(timeout=20), ANSWER)
        says = "no response for us came…not encrypted with our key (1)"
        patiently(lambda timeout: check(ask(timeout=timeout), says))


def give_low_order_points(c: Conversation) -> Conversation:
    """Answer the key exchange with each of them."""
    for pem in LOW_ORDER.values():
        c.give_key(pem.encode())
    return c


def test_a_client_takes_no_point_of_low_order_for_a_key() -> None:
    says = f"{NO_KEY.format('alice')}…only: no valid public key: of small order ({len(LOW_ORDER)})"
    broken({"exchange": give_low_order_points}, says, "--suite=x25519")
    responder = GcmResponder()

    def exchange(c: Conversation) -> None:
        responder.give_key(give_low_order_points(c))

    broken(responder.script(exchange=exchange), ANSWER, "--suite=x25519")


@pytest.mark.parametrize(("suite", "other"), [*itertools.permutations(SUITES, 2)])
def test_a_client_takes_no_key_of_another_suite(suite: str, other: str) -> None:
    answer = answering_blocks(other, new_blocks(other))
    wanted = {
        "dh4096": "a key of another type",
        "x25519": "a key of another type" if other == "dh4096" else "its blocks are not PUBLIC KEY",
        "mlkem768x25519": "its blocks are not PUBLIC KEY, SECURE MQTT CIPHERTEXT",
    }
    says = f"{NO_KEY.format('alice')}…only: no valid public key: {wanted[suite]} (1)"
    broken({"exchange": lambda c: c.give_key(answer)}, says, f"--suite={suite}")


def test_a_client_does_not_take_its_own_key_for_the_peers() -> None:
    says = f"{NO_KEY.format('alice')}…only: our own key handed back (1)"
    broken({"exchange": lambda c: c.give_key(c.client_key)}, says, "--suite=x25519")


def test_answers_in_any_order_and_twice_are_printed_once_in_the_order_of_the_lines() -> None:
    """They come backwards, each twice, with a request handed back before each."""
    lines = [f"line {number}" for number in range(20)]
    responder = GcmResponder()
    requests: list[tuple[bytes, bytes]] = []  # each with its answer

    def request(c: Conversation) -> None:
        requests.append((c.token, responder.answer(c, text=responder.text(c).upper())))
        if len(requests) == len(lines):
            for token, answer in reversed(requests):
                c.respond(token).respond(answer).respond(answer)

    with hostile_broker(responder.script(request=request)) as (port, conversations):
        where = ["-h", "127.0.0.1", "-p", str(port), "--suite=x25519", "--lines"]
        stdin = "".join(f"{line}\n" for line in lines).encode()
        result = run(*where, "alice", "uppercase", "-", stdin=stdin)
    assert (error_lines(result), result.stdout) == ("", stdin.upper())
    assert len(conversations) == 1


# --- the suite x25519: what the responder answers -----------------------------------------------

UNKNOWN, REPEATED = "not encrypted with a key of this NetID", "out of order"
# After request 5 and its answer: what is sent instead of request 6, and why it is ignored.
FALSE_REQUESTS: Mapping[str, tuple[Callable[[GcmClient, bytes, bytes], object], str]] = {
    "request 5 again": (lambda c, sent, answer: c.send(sent), REPEATED),
    "an earlier request late": (lambda c, sent, answer: c.send(c.seal(4)), REPEATED),
    "the first request late": (lambda c, sent, answer: c.send(c.seal(0)), REPEATED),
    "another text under the same counter": (
        lambda c, sent, answer: c.send(c.seal(5, "Retreat")),
        REPEATED,
    ),
    "request 6 for another action": (
        lambda c, sent, answer: c.send(c.seal(6), "reverse"),
        UNKNOWN,
    ),
    "request 5 for another action": (lambda c, sent, answer: c.send(sent, "reverse"), UNKNOWN),
    "request 5 with counter 6 in front": (
        lambda c, sent, answer: c.send(bytes([*bytes(7), 6]) + sent[8:]),
        UNKNOWN,
    ),
    "request 5 with the last counter in front": (
        lambda c, sent, answer: c.send(b"\xff" * 8 + sent[8:]),
        UNKNOWN,
    ),
    "the answer": (lambda c, sent, answer: c.send(answer), UNKNOWN),
    "the answer with counter 6 in front": (
        lambda c, sent, answer: c.send(bytes([*bytes(7), 6]) + answer[8:]),
        UNKNOWN,
    ),
    "request 6 for the topic of responses": (
        lambda c, sent, answer: c.send(c.seal(6, topic="uppercase/response")),
        UNKNOWN,
    ),
    "request 6 under the key of responses": (
        lambda c, sent, answer: c.send(
            reference.seal(c.keys[1], f"{c.netid}/uppercase/request", 6, b"text")
        ),
        UNKNOWN,
    ),
    "request 6 with a bit flipped": (
        lambda c, sent, answer: c.send(c.seal(6)[:-1] + bytes([c.seal(6)[-1] ^ 1])),
        UNKNOWN,
    ),
    "23 bytes of request 6": (lambda c, sent, answer: c.send(c.seal(6)[:23]), UNKNOWN),
    "nothing": (lambda c, sent, answer: c.send(b""), UNKNOWN),
    "a token of the lab": (
        lambda c, sent, answer: c.send(crypto.encrypt(MESSAGE, bytes(32))),
        UNKNOWN,
    ),
    "request 6 that is not UTF-8": (
        lambda c, sent, answer: c.send(
            reference.seal(c.keys[0], f"{c.netid}/uppercase/request", 6, b"\xff")
        ),
        "not UTF-8 text",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FALSE_REQUESTS)
def test_with_x25519_a_responder_does_not_answer(
    name: str, broker: Mosquitto, responder: ResponderProcess, netid: str
) -> None:
    attack, reason = FALSE_REQUESTS[name]
    with GcmClient(broker.port, netid) as client:
        client.exchange()
        sent = client.seal(5)
        answer = client.ask("uppercase", sent)
        attack(client, sent, answer)
        wait_until(lambda: any(is_ignored(line, netid, reason) for line in responder.lines))
        assert client.is_served(7)


def is_ignored(line: str, netid: str, reason: str) -> bool:
    """Tell whether a line of a responder's log says that it ignores a message for a reason."""
    return f'event=ignored netid="{netid}"' in line and reason in line.partition(" reason=")[2]


def test_with_x25519_the_counter_does_not_begin_again_after_its_end(
    broker: Mosquitto, responder: ResponderProcess, netid: str
) -> None:
    last = 2**64 - 1
    with GcmClient(broker.port, netid) as client:
        client.exchange()
        assert client.is_served(0)
        assert client.is_served(last)
        for number in 0, 1, last - 1, last:
            client.send(client.seal(number))
        wait_until(lambda: sum(is_ignored(line, netid, REPEATED) for line in responder.lines) == 4)
        assert client.exchange().is_served(0)


def test_with_x25519_a_request_is_not_answered_under_another_netid(
    broker: Mosquitto, responder: ResponderProcess, netid: str
) -> None:
    with (
        GcmClient(broker.port, netid) as client,
        GcmClient(broker.port, f"{netid}-b") as other,
    ):
        client.exchange()
        other.exchange()
        other.send(client.seal(0))
        wait_until(lambda: any(is_ignored(line, other.netid, UNKNOWN) for line in responder.lines))
        assert other.is_served(0)
        assert client.is_served(0)


def test_a_responder_takes_no_point_of_low_order_for_a_key(
    broker: Mosquitto, responder: ResponderProcess, netid: str
) -> None:
    with GcmClient(broker.port, netid) as client:
        for pem in LOW_ORDER.values():
            client.send(pem.encode(), "key-exchange")
        reason = "no valid public key: of small order"
        wait_until(
            lambda: (
                sum(is_ignored(line, netid, reason) for line in responder.lines) == len(LOW_ORDER)
            )
        )
        assert client.exchange().is_served(0)


def test_requests_that_a_broker_swaps_are_answered_in_the_end(
    own_broker: Mosquitto, start_responder: Start
) -> None:
    """The responder refuses the one that comes too late, and the client sends it again."""
    responder = start_responder("-p", str(own_broker.port))
    held: list[Packet] = []

    def swap(link: Link, packet: Packet, send: Callable[[bytes], object]) -> None:
        is_request = packet.kind == PUBLISH and packet.topic == "alice/uppercase/request"
        if is_request and not held:
            held.append(packet)
            return
        send(packet.raw)
        if is_request and len(held) == 1:
            held.append(packet)
            send(held[0].raw)

    with relay(own_broker.port, swap) as port:
        where = ["-h", "127.0.0.1", "-p", str(port), "--suite=x25519", "--lines"]
        result = run(*where, "alice", "uppercase", "-", stdin=b"one\ntwo\nthree\n")
    assert (error_lines(result), result.stdout) == ("", b"ONE\nTWO\nTHREE\n")
    assert responder.has_said(REPEATED)


@pytest.mark.parametrize("direction", ["request", "response"])
def test_a_message_of_a_session_that_a_broker_drops_is_sent_again(
    direction: str, own_broker: Mosquitto, start_responder: Start
) -> None:
    start_responder("-p", str(own_broker.port))
    dropped: list[Packet] = []

    def drop(link: Link, packet: Packet, send: Callable[[bytes], object]) -> None:
        topic = f"alice/uppercase/{direction}"
        if packet.kind == PUBLISH and packet.topic == topic and not dropped:
            dropped.append(packet)
        else:
            send(packet.raw)

    with relay(own_broker.port, drop) as port:
        where = ["-h", "127.0.0.1", "-p", str(port), "--suite=x25519", "--lines"]
        result = run(*where, "alice", "uppercase", "-", stdin=b"one\ntwo\nthree\n")
    assert (error_lines(result), result.stdout) == ("", b"ONE\nTWO\nTHREE\n")
    assert dropped
