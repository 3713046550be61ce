"""The suite mlkem768x25519: known answers, the second implementation, and what is refused.

vectors/mlkem768x25519.json has private keys of ML-KEM as seeds of 64 bytes (FIPS 203, 7.1). What an
encapsulation draws at random can't be given, so a responder is shown by the secret that it led to.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import reference
from conftest import ROOT, VECTORS, Mosquitto, ResponderProcess, error_lines, run
from cryptography.hazmat.primitives.asymmetric import mlkem
from hostile import (
    ANSWER,
    MESSAGE,
    PUBLISH,
    Conversation,
    Link,
    Packet,
    RawClient,
    Wire,
    all_at_once,
    attacked,
    changed_program,
    check,
    damaged,
    hostile_broker,
    listening,
    patiently,
    publish,
    relay,
)
from hypothesis import given
from hypothesis import strategies as st
from peers import KEYS, GcmClient, GcmResponder

import crypto
from crypto import MAX_KEY_FILE_SIZE, PUBLIC_KEY, PeerKeyError, TokenError, from_pem, to_pem
from secure_mqtt.suites import (
    CIPHERTEXT,
    HYBRID,
    HYBRID_INFO,
    MLKEM768_KEY,
    SUITES,
    X25519_KEY,
    Cipher,
    HybridClient,
    HybridResponder,
    Transcript,
    X25519Client,
    X25519Responder,
    gcm_cipher,
    suite_of,
)

Start = Callable[..., ResponderProcess]
KNOWN: list[dict[str, str]] = json.loads((VECTORS / "mlkem768x25519.json").read_text("utf-8"))
LOW_ORDER: dict[str, str] = json.loads((VECTORS / "extensions.json").read_text("utf-8"))[
    "low_order_points"
]
NETID = "le0nh4rt"
TOPIC, ANSWER_TOPIC = f"{NETID}/uppercase/request", f"{NETID}/uppercase/response"
TEXT = "naïve café".encode()
SUITE = "--suite=mlkem768x25519"
OTHER_SUITES = [name for name in SUITES if name != HYBRID.name]
known_answers = pytest.mark.parametrize("known", KNOWN, ids=[known["netid"] for known in KNOWN])


# --- known answers -----------------------------------------------------------------------------


def known_bytes(known: Mapping[str, str], *names: str) -> list[bytes]:
    return [bytes.fromhex(known[name]) for name in names]


def known_transcript(known: Mapping[str, str]) -> Transcript:
    return Transcript(known["netid"], known["message_1"].encode(), known["message_2"].encode())


def known_client(known: Mapping[str, str]) -> HybridClient:
    return HybridClient(*known_bytes(known, "client_mlkem768_seed", "client_x25519_private_key"))


def is_known_session(client: Cipher, responder: Cipher, known: Mapping[str, str]) -> bool:
    """Check that two ends seal and open the known messages."""
    netid, action = known["netid"], known["action"]
    for sealer, opener, message, text, direction in (
        (client, responder, "message_3", "text", "request"),
        (responder, client, "message_4", "answer", "response"),
    ):
        topic = f"{netid}/{action}/{direction}"
        [sealed], plaintext = known_bytes(known, message), known[text].encode()
        assert sealer.seal(topic, 0, plaintext) == sealed
        assert opener.open(topic, sealed) == (0, plaintext)
    return True


@known_answers
def test_both_ends_seal_and_open_the_messages_of_a_known_exchange(known: dict[str, str]) -> None:
    client, transcript = known_client(known), known_transcript(known)
    assert client.blocks == transcript.request
    [secret] = known_bytes(known, "shared_secret")
    responder = gcm_cipher(secret, HYBRID_INFO, transcript, is_client=False)
    assert is_known_session(client.agree(transcript), responder, known)


@known_answers
def test_a_responder_agrees_with_a_known_client(known: dict[str, str]) -> None:
    client, [private_key] = known_client(known), known_bytes(known, "responder_x25519_private_key")
    responder = HybridResponder(client.blocks, private_key)
    [x25519_block, ciphertext] = reference.blocks(responder.blocks)
    assert x25519_block == reference.blocks(known["message_2"].encode())[0]
    assert [ciphertext[0], len(ciphertext[1])] == ["SECURE MQTT CIPHERTEXT", 1088]
    transcript = Transcript(NETID, client.blocks, responder.blocks)
    sealed = client.agree(transcript).seal(TOPIC, 0, TEXT)
    assert responder.agree(transcript).open(TOPIC, sealed) == (0, TEXT)


@known_answers
def test_the_second_implementation_derives_the_known_secret_and_keys(known: dict[str, str]) -> None:
    netid, *messages = known_transcript(known)
    own = reference.HybridKeys(
        *known_bytes(known, "client_mlkem768_seed", "client_x25519_private_key")
    )
    assert own.ask() == messages[0]
    secret = own.agree(messages[1])
    assert [secret] == known_bytes(known, "shared_secret")
    keys = reference.message_keys(own.suite, secret, netid, *messages)
    assert [b"".join(keys)] == known_bytes(known, "keys")
    [private_key] = known_bytes(known, "responder_x25519_private_key")
    other = reference.X25519Keys(private_key)
    (_, (_, key)) = reference.key_blocks(messages[0])
    assert reference.x25519_secret(other.private, key) == secret[32:]


def test_the_messages_are_as_small_as_the_page_on_suites_says() -> None:
    page = (ROOT / "docs" / "suites.md").read_text(encoding="utf-8")
    [row] = re.findall(r"\| bytes of message 1; of message 2 \|(.*)\|", page)
    for cell, (name, suite) in zip(row.split("|"), SUITES.items(), strict=True):
        request = suite.client().blocks
        sizes = len(request), len(suite.responder(request).blocks)
        if suite.is_numbered:  # of the lab's keys, one in some hundred is a little shorter
            assert cell.strip() == "; ".join(f"{size:,}" for size in sizes), name


def test_no_keys_are_used_twice() -> None:
    blocks = [block for _ in range(8) for block in reference.blocks(HybridClient().blocks)]
    request = HybridClient().blocks
    blocks += [
        block for _ in range(8) for block in reference.blocks(HybridResponder(request).blocks)
    ]
    assert len({*blocks}) == len(blocks) == 32


# --- the second implementation -----------------------------------------------------------------


@pytest.mark.parametrize("is_client", [True, False], ids=["as client", "as responder"])
@pytest.mark.parametrize("suite", KEYS)
def test_each_implementation_opens_what_the_other_seals(suite: str, is_client: bool) -> None:
    theirs = KEYS[suite]()
    if is_client:
        ours = SUITES[suite].client()
        request = ours.blocks
        response, secret = theirs.answer(request)
    else:
        request = theirs.ask()
        ours = SUITES[suite].responder(request)
        response = ours.blocks
        secret = theirs.agree(response)
    cipher = ours.agree(Transcript(NETID, request, response))
    keys = reference.message_keys(suite, secret, NETID, request, response)
    seal_key, open_key = keys if is_client else reversed(keys)
    for number in 0, 1, 255, 256, 2**32, 2**63, 2**64 - 1:
        sealed = cipher.seal(TOPIC, number, TEXT)
        assert reference.unseal(seal_key, TOPIC, sealed) == (number, TEXT)
        answer = reference.seal(open_key, ANSWER_TOPIC, number, TEXT)
        assert cipher.open(ANSWER_TOPIC, answer) == (number, TEXT)


# --- what is refused ---------------------------------------------------------------------------


class Parts(NamedTuple):
    """What a right message 1 or 2 is made of, in PEM."""

    first: bytes
    second: bytes

    @staticmethod
    def of(blocks: bytes) -> Parts:
        """Take the two blocks of a message apart."""
        return Parts(*(reference.pem(*block) for block in reference.blocks(blocks)))

    @property
    def contents(self) -> tuple[bytes, bytes]:
        """The contents of both."""
        first, second = reference.blocks(self.first + self.second)
        return first[1], second[1]


def key_of_size(key_type: Any, size: int) -> bytes:
    """Return a key with an algorithm's name, but of another size, in right DER."""
    [algorithm, (tag, bits)] = crypto.from_der(key_type.start + bytes(key_type.size))
    der = crypto.to_der([algorithm, (tag, b"\0" + bytes(size))])
    assert len(bits) != 1 + size
    return to_pem(PUBLIC_KEY, der)


def with_coefficient(content: bytes, place: int, value: int) -> bytes:
    """Return an ML-KEM key with one of its 768 numbers of 12 bits changed (FIPS 203, 4.2.1)."""
    start, end = len(MLKEM768_KEY.start), len(content) - 32  # a seed follows
    numbers = int.from_bytes(content[start:end], "little")
    numbers &= ~(0xFFF << 12 * place)
    numbers |= value << 12 * place
    changed = numbers.to_bytes(end - start, "little")
    return to_pem(PUBLIC_KEY, content[:start] + changed + content[end:])


Q = 3329  # ML-KEM's modulus
ML_KEM_1024 = to_pem(
    PUBLIC_KEY,
    bytes.fromhex("30820632300b060960864801650304040303820621 00")
    + mlkem.MLKEM1024PrivateKey.generate().public_key().public_bytes_raw(),
)
ANY_BLOCK = to_pem(b"SOMETHING ELSE", b"any")
OTHER_BLOCKS = "its blocks are not PUBLIC KEY"
OTHER_TYPE, SMALL_ORDER = "a key of another type", "of small order"


def filled(head: bytes, size: int) -> bytes:
    """Return a message with as many blocks after its own as a size in bytes allows."""
    block = to_pem(PUBLIC_KEY, b"")
    count = (size - len(head)) // len(block)
    return (head + count * block).ljust(size)


Wrong = Mapping[str, tuple[Callable[[Parts], bytes], str]]
WRONG_REQUESTS: Wrong = {
    "nothing": (lambda m: b"", "not in PEM"),
    "the X25519 key is missing": (lambda m: m.first, OTHER_BLOCKS),
    "the ML-KEM key comes twice": (lambda m: 2 * m.first + m.second, OTHER_BLOCKS),
    "the ML-KEM key comes twice, and nothing else": (lambda m: 2 * m.first, OTHER_TYPE),
    "the X25519 key comes twice": (lambda m: m.first + 2 * m.second, OTHER_BLOCKS),
    "the X25519 key comes twice, and nothing else": (lambda m: 2 * m.second, OTHER_BLOCKS),
    "both come twice": (lambda m: 2 * (m.first + m.second), OTHER_BLOCKS),
    "they are swapped": (lambda m: m.second + m.first, OTHER_BLOCKS),
    "the X25519 key has another label": (
        lambda m: m.first + m.second.replace(PUBLIC_KEY, CIPHERTEXT),
        OTHER_BLOCKS,
    ),
    "the ML-KEM key has another label": (
        lambda m: m.first.replace(PUBLIC_KEY, CIPHERTEXT) + m.second,
        "not a PEM block",
    ),
    "a block before them": (lambda m: ANY_BLOCK + m.first + m.second, "not a PEM block"),
    "a block between them": (lambda m: m.first + ANY_BLOCK + m.second, OTHER_BLOCKS),
    "a block after them": (lambda m: m.first + m.second + ANY_BLOCK, OTHER_BLOCKS),
    "a ciphertext after them": (
        lambda m: m.first + m.second + to_pem(CIPHERTEXT, bytes(1088)),
        OTHER_BLOCKS,
    ),
    "a signature without a certificate": (
        lambda m: m.first + m.second + to_pem(b"SECURE MQTT SIGNATURE", bytes(64)),
        OTHER_BLOCKS,
    ),
    "the ML-KEM key lacks a byte": (
        lambda m: key_of_size(MLKEM768_KEY, 1183) + m.second,
        OTHER_TYPE,
    ),
    "the ML-KEM key has a byte more": (
        lambda m: key_of_size(MLKEM768_KEY, 1185) + m.second,
        OTHER_TYPE,
    ),
    "the ML-KEM key is empty": (lambda m: key_of_size(MLKEM768_KEY, 0) + m.second, OTHER_TYPE),
    "the ML-KEM key has the size of ML-KEM-512": (
        lambda m: key_of_size(MLKEM768_KEY, 800) + m.second,
        OTHER_TYPE,
    ),
    "a byte after the ML-KEM key": (
        lambda m: to_pem(PUBLIC_KEY, m.contents[0] + b"\0") + m.second,
        "not in DER",
    ),
    "it is a key for ML-KEM-1024": (lambda m: ML_KEM_1024 + m.second, OTHER_TYPE),
    "a raw ML-KEM key": (
        lambda m: to_pem(PUBLIC_KEY, m.contents[0][22:]) + m.second,
        "no valid public key",
    ),
    "the X25519 key lacks a byte": (lambda m: m.first + key_of_size(X25519_KEY, 31), OTHER_TYPE),
    "the X25519 key has a byte more": (lambda m: m.first + key_of_size(X25519_KEY, 33), OTHER_TYPE),
    "the lab's key in the place of the X25519 key": (
        lambda m: m.first + crypto.DhKeyPair(2).public_key,
        OTHER_TYPE,
    ),
    "the first number is the modulus": (
        lambda m: with_coefficient(m.contents[0], 0, Q) + m.second,
        "not below the modulus",
    ),
    "the last number is as large as 12 bits can be": (
        lambda m: with_coefficient(m.contents[0], 767, 0xFFF) + m.second,
        "not below the modulus",
    ),
    "the X25519 key is of small order": (
        lambda m: m.first + LOW_ORDER["order_8"].encode(),
        SMALL_ORDER,
    ),
    "64 KiB of blocks": (lambda m: filled(m.first + m.second, MAX_KEY_FILE_SIZE), OTHER_BLOCKS),
    "a byte more": (
        lambda m: filled(m.first + m.second, MAX_KEY_FILE_SIZE + 1),
        "larger than 64 KiB",
    ),
}  # fmt: skip


class Reply(NamedTuple):
    """A right message 2, and what it answers."""

    key: bytes  # X25519, in PEM
    ciphertext: bytes  # in PEM
    asked: Parts  # message 1

    @property
    def raw(self) -> bytes:
        """The ciphertext itself."""
        return reference.blocks(self.key + self.ciphertext)[1][1]


WRONG_RESPONSES: Mapping[str, tuple[Callable[[Reply], bytes], str]] = {
    "nothing": (lambda r: b"", "not in PEM"),
    "the X25519 key is missing": (lambda r: r.ciphertext, "another block comes first"),
    "the ciphertext is missing": (lambda r: r.key, OTHER_BLOCKS),
    "the X25519 key comes twice": (lambda r: 2 * r.key + r.ciphertext, OTHER_BLOCKS),
    "the X25519 key comes twice, and nothing else": (lambda r: 2 * r.key, OTHER_BLOCKS),
    "the ciphertext comes twice": (lambda r: r.key + 2 * r.ciphertext, OTHER_BLOCKS),
    "they are swapped": (lambda r: r.ciphertext + r.key, "another block comes first"),
    "a block between them": (lambda r: r.key + ANY_BLOCK + r.ciphertext, OTHER_BLOCKS),
    "a block after them": (lambda r: r.key + r.ciphertext + ANY_BLOCK, OTHER_BLOCKS),
    "the ciphertext has another label": (
        lambda r: r.key + r.ciphertext.replace(CIPHERTEXT, PUBLIC_KEY),
        OTHER_BLOCKS,
    ),
    **{
        f"the ciphertext has {size} bytes": (
            lambda r, size=size: r.key + to_pem(CIPHERTEXT, (2 * r.raw)[:size]),  # type: ignore[misc]
            "a ciphertext of another size",
        )
        for size in (0, 768, 1087, 1089, 1568, 2176)  # 768 and 1568: ML-KEM-512, ML-KEM-1024
    },
    "the X25519 key lacks a byte": (
        lambda r: key_of_size(X25519_KEY, 31) + r.ciphertext,
        OTHER_TYPE,
    ),
    "the X25519 key has a byte more": (
        lambda r: key_of_size(X25519_KEY, 33) + r.ciphertext,
        OTHER_TYPE,
    ),
    "the X25519 key is of small order": (
        lambda r: LOW_ORDER["order_8"].encode() + r.ciphertext,
        SMALL_ORDER,
    ),
    "the client's X25519 key is handed back": (
        lambda r: r.asked.second + r.ciphertext,
        "our own key handed back",
    ),
    "the client's ML-KEM key is handed back": (lambda r: r.asked.first + r.ciphertext, OTHER_TYPE),
    "both are handed back": (lambda r: r.asked.first + r.asked.second, OTHER_BLOCKS),
    "both are handed back, swapped": (lambda r: r.asked.second + r.asked.first, OTHER_BLOCKS),
    "both are handed back, with the ciphertext": (
        lambda r: r.asked.first + r.asked.second + r.ciphertext,
        OTHER_BLOCKS,
    ),
    "the lab's key in the place of the X25519 key": (
        lambda r: crypto.DhKeyPair(2).public_key + r.ciphertext,
        OTHER_TYPE,
    ),
    "64 KiB of blocks": (lambda r: filled(r.key + r.ciphertext, MAX_KEY_FILE_SIZE), OTHER_BLOCKS),
    "a byte more": (
        lambda r: filled(r.key + r.ciphertext, MAX_KEY_FILE_SIZE + 1),
        "larger than 64 KiB",
    ),
}  # fmt: skip


def refused(payload: bytes) -> None:
    """Read message 1 as a responder does."""
    suite_of(payload).responder(payload)


@pytest.mark.parametrize("what", WRONG_REQUESTS)
def test_a_message_1_is_refused_if(what: str) -> None:
    change, says = WRONG_REQUESTS[what]
    right = HybridClient().blocks
    assert suite_of(right) is HYBRID
    with pytest.raises(PeerKeyError, match=says):
        refused(change(Parts.of(right)))


@pytest.mark.parametrize("what", WRONG_RESPONSES)
def test_a_message_2_is_refused_if(what: str) -> None:
    change, says = WRONG_RESPONSES[what]
    client = HybridClient()
    right = HybridResponder(client.blocks).blocks
    client.agree(Transcript(NETID, client.blocks, right))
    wrong = change(Reply(*Parts.of(right), Parts.of(client.blocks)))
    with pytest.raises(PeerKeyError, match=says):
        client.agree(Transcript(NETID, client.blocks, wrong))


@pytest.mark.parametrize("name", LOW_ORDER)
def test_no_key_is_derived_from_a_point_of_low_order(name: str) -> None:
    client, point = HybridClient(), LOW_ORDER[name].encode()
    asked = Parts.of(client.blocks)
    ciphertext = Parts.of(HybridResponder(client.blocks).blocks).second
    with pytest.raises(PeerKeyError, match=SMALL_ORDER):
        HybridResponder(asked.first + point)
    with pytest.raises(PeerKeyError, match=SMALL_ORDER):
        client.agree(Transcript(NETID, client.blocks, point + ciphertext))


def test_every_number_of_an_ml_kem_key_is_below_the_modulus() -> None:
    key, x25519_key = Parts.of(HybridClient().blocks)
    [(_, content)] = reference.blocks(key)
    for place in range(768):
        HybridResponder(with_coefficient(content, place, Q - 1) + x25519_key)
        with pytest.raises(PeerKeyError, match="not below the modulus"):
            HybridResponder(with_coefficient(content, place, Q) + x25519_key)


def test_with_any_bit_of_the_ciphertext_changed_no_message_opens() -> None:
    client = HybridClient()
    responder = HybridResponder(client.blocks)
    key, ciphertext = Parts.of(responder.blocks)
    [(_, content)] = reference.blocks(ciphertext)
    for place in range(8 * len(content)):
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        transcript = Transcript(NETID, client.blocks, key + to_pem(CIPHERTEXT, bytes(changed)))
        # The same transcript, as if it were not bound into the keys: the secret alone must differ.
        sealed = responder.agree(transcript).seal(ANSWER_TOPIC, 0, TEXT)
        with pytest.raises(TokenError):
            client.agree(transcript).open(ANSWER_TOPIC, sealed)


def test_the_keys_of_two_exchanges_do_not_mix() -> None:
    client = HybridClient()
    ends = [HybridResponder(client.blocks) for _ in range(2)]
    (key, _), (_, ciphertext) = (Parts.of(end.blocks) for end in ends)
    transcript = Transcript(NETID, client.blocks, key + ciphertext)
    cipher = client.agree(transcript)
    for end in ends:
        with pytest.raises(TokenError):
            cipher.open(ANSWER_TOPIC, end.agree(transcript).seal(ANSWER_TOPIC, 0, TEXT))


@pytest.mark.parametrize("broken", ["ML-KEM", "X25519"])
def test_who_has_broken_one_of_the_two_opens_nothing(broken: str) -> None:
    """Broken means here that the private key is known."""
    seed, private_key = os.urandom(64), os.urandom(32)
    client = HybridClient(seed, private_key)
    responder = HybridResponder(client.blocks)
    transcript = Transcript(NETID, client.blocks, responder.blocks)
    sealed = responder.agree(transcript).seal(ANSWER_TOPIC, 0, TEXT)
    assert client.agree(transcript).open(ANSWER_TOPIC, sealed) == (0, TEXT)
    guessed = {"ML-KEM": (seed, os.urandom(32)), "X25519": (os.urandom(64), private_key)}[broken]
    with pytest.raises(TokenError):
        HybridClient(*guessed).agree(transcript).open(ANSWER_TOPIC, sealed)


def test_x25519_and_its_part_of_the_hybrid_share_no_keys() -> None:
    """Whoever passes one for the other gets other keys: the suite's name is bound into them."""
    private_key = os.urandom(32)
    theirs = X25519Client().blocks
    transcript = Transcript(NETID, theirs, X25519Client(private_key).blocks)
    secret = reference.X25519Keys(private_key).agree(theirs)
    sealed = gcm_cipher(secret, HYBRID_INFO, transcript, is_client=True).seal(TOPIC, 0, TEXT)
    with pytest.raises(TokenError):
        X25519Responder(theirs, private_key).agree(transcript).open(TOPIC, sealed)


def test_after_a_key_of_the_lab_another_is_ignored() -> None:
    hybrid = Parts.of(HybridClient().blocks)
    request = crypto.DhKeyPair(2).public_key + hybrid.first + hybrid.second
    assert suite_of(request).name == "dh4096"
    refused(request)


REQUEST = HybridClient().blocks
any_blocks = st.lists(
    st.tuples(
        st.sampled_from([b"PUBLIC KEY", b"SECURE MQTT CIPHERTEXT", b"CERTIFICATE"]),
        st.sampled_from([from_pem(PUBLIC_KEY, REQUEST), bytes(1088), X25519_KEY.start + bytes(32)])
        | st.binary(max_size=40),
    ),
    max_size=4,
).map(lambda blocks: b"".join(to_pem(*block) for block in blocks))


payloads = any_blocks | damaged(REQUEST) | damaged(HybridResponder(REQUEST).blocks)


@given(payloads)
def test_any_bytes_give_a_client_its_cipher_or_are_a_peer_key_error(payload: bytes) -> None:
    client = HybridClient()
    with contextlib.suppress(PeerKeyError):
        cipher = client.agree(Transcript(NETID, client.blocks, payload))
        assert len(cipher.seal(TOPIC, 0, TEXT)) == 8 + len(TEXT) + 16


@given(payloads)
def test_any_bytes_give_a_responder_its_cipher_or_are_a_peer_key_error(payload: bytes) -> None:
    with contextlib.suppress(PeerKeyError):
        responder = HybridResponder(payload)
        cipher = responder.agree(Transcript(NETID, payload, responder.blocks))
        assert len(cipher.seal(TOPIC, 0, TEXT)) == 8 + len(TEXT) + 16


# --- at a broker -------------------------------------------------------------------------------

NO_KEY = "no valid key came on alice/key-exchange/response"
UNKNOWN = "not encrypted with a key of this NetID"


def test_a_responder_answers_no_wrong_message_1_and_says_why(
    broker: Mosquitto, responder: ResponderProcess, netid: str
) -> None:
    right = Parts.of(HybridClient().blocks)
    with RawClient(broker.port, netid, f"{netid}x/+/response") as mallory:
        for number, (change, says) in enumerate(WRONG_REQUESTS.values()):
            mallory.publish(f"{netid}-{number}/key-exchange/request", change(right))
            ignored = f'event=ignored netid="{netid}-{number}"'
            responder.wait_for(ignored)
            assert says in next(line for line in responder.lines if ignored in line)
    with GcmClient(broker.port, netid, HYBRID.name) as client:
        assert client.exchange().is_served(0)


def give_wrong(names: Iterable[str], responder: GcmResponder, c: Conversation) -> Conversation:
    """Answer the key exchange with some wrong messages 2."""
    reply = Reply(*Parts.of(responder.blocks(c)), Parts.of(c.client_key))
    for name in names:
        c.give_key(WRONG_RESPONSES[name][0](reply))
    return c


def test_a_client_takes_no_wrong_message_2_and_says_why() -> None:
    def case(name: str, says: str) -> None:
        def attempt(timeout: float) -> None:
            script = {"exchange": lambda c: give_wrong([name], GcmResponder(HYBRID.name), c)}
            with hostile_broker(script) as (port, conversations):
                check(attacked(port, SUITE, timeout=timeout), f"{NO_KEY}…only: …{says}")
            assert not conversations[0].token, "the message was sent"

        patiently(attempt)

    all_at_once({name: partial(case, name, says) for name, (_, says) in WRONG_RESPONSES.items()})


def test_the_right_message_2_is_taken_even_after_all_wrong_ones() -> None:
    def exchange(c: Conversation) -> None:
        responder.give_key(give_wrong(WRONG_RESPONSES, responder, c))

    responder = GcmResponder(HYBRID.name)
    with hostile_broker(responder.script(exchange=exchange)) as (port, _):
        check(attacked(port, SUITE, timeout=20), ANSWER)


def with_changed_bit(response: bytes) -> bytes:
    """Return a message 2 with one bit of its ciphertext changed."""
    key, (label, content) = reference.blocks(response)
    return reference.pem(*key) + reference.pem(label, bytes([content[0] ^ 1]) + content[1:])


def test_with_a_changed_ciphertext_no_answer_is_printed_and_the_error_says_what_came() -> None:
    def attempt(timeout: float) -> None:
        def exchange(c: Conversation) -> None:
            responder.give_key(c, with_changed_bit(responder.blocks(c)))

        def request(c: Conversation) -> None:
            with pytest.raises(reference.REFUSED):
                responder.text(c)
            c.respond(reference.seal(responder.keys[1], c.topics[1], 0, ANSWER.encode()))

        responder = GcmResponder(HYBRID.name)
        script = responder.script(exchange=exchange, request=request)
        with hostile_broker(script) as (port, _):
            says = "no response for us came on alice/uppercase/response"
            says += "…not encrypted with our key (1)"
            check(attacked(port, SUITE, timeout=timeout), says)

    patiently(attempt)


def is_publication(packet: Packet, netid: str, direction: str) -> bool:
    topic = f"{netid}/key-exchange/{direction}"
    return packet.kind == PUBLISH and packet.topic == topic


def test_a_responder_does_not_answer_a_client_that_was_given_a_changed_ciphertext(
    broker: Mosquitto, responder: ResponderProcess, netid: str
) -> None:
    def change(link: Link, packet: Packet, send: Callable[[bytes], object]) -> None:
        if is_publication(packet, netid, "response"):
            changed = with_changed_bit(packet.payload)
            send(publish(packet.topic, changed, packet.flags, packet.mid))
        else:
            send(packet.raw)

    def attempt(timeout: float) -> None:
        says = f"no response came on {netid}/uppercase/response"
        check(attacked(port, SUITE, netid=netid, timeout=timeout), says)

    with relay(broker.port, change) as port:
        patiently(attempt)
    assert responder.has_said(f'ignored netid="{netid}" action="uppercase" reason="{UNKNOWN}"')


# --- no downgrade ------------------------------------------------------------------------------


def test_a_client_whose_ml_kem_key_was_stripped_on_the_way_takes_no_answer(
    broker: Mosquitto, responder: ResponderProcess, netid: str
) -> None:
    """The responder answers in the suite x25519, as it was asked."""

    def strip(link: Link, packet: Packet, send: Callable[[bytes], object]) -> None:
        if is_publication(packet, netid, "request"):
            rest = Parts.of(packet.payload).second
            send(publish(packet.topic, rest, packet.flags, packet.mid))
        else:
            send(packet.raw)

    def attempt(timeout: float) -> None:
        says = f"no valid key came on {netid}/key-exchange/response…{OTHER_BLOCKS}"
        check(attacked(port, SUITE, netid=netid, timeout=timeout), says)

    with relay(broker.port, strip) as port:
        patiently(attempt)
    assert responder.has_said(f'answered netid="{netid}" action="key-exchange"')
    assert not responder.has_said(f'netid="{netid}" action="uppercase"')


@contextlib.contextmanager
def older_responder(port: int, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a responder of the version before, which does not know the suite."""
    program = changed_program(folder, f"del suites.SUITES[{HYBRID.name!r}]\n")
    command = [sys.executable, str(program), "-p", str(port), "--respond"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as responder:
        try:
            assert responder.stderr
            assert responder.stderr.readline().startswith("ready")
            yield responder
        finally:
            responder.kill()


def test_who_asks_an_older_responder_hears_that_it_may_know_other_suites_only(
    own_broker: Mosquitto, tmp_path: Path
) -> None:
    def attempt(timeout: float) -> None:
        says = "no responder answered the key exchange…or know other suites only"
        check(attacked(own_broker.port, SUITE, timeout=timeout), says)

    with older_responder(own_broker.port, tmp_path) as responder:
        patiently(attempt)
        assert responder.stderr
        assert OTHER_TYPE in responder.stderr.readline()
        for suite in OTHER_SUITES:
            check(attacked(own_broker.port, f"--suite={suite}", timeout=20), ANSWER)


@pytest.mark.parametrize(("suite", "is_said"), [("dh4096", False), ("x25519", True)])
def test_of_the_labs_suite_it_is_not_said_that_a_responder_may_not_know_it(
    suite: str, is_said: bool, own_broker: Mosquitto
) -> None:
    def attempt(timeout: float) -> None:
        result = attacked(own_broker.port, f"--suite={suite}", timeout=timeout)
        check(result, "no responder answered the key exchange")
        assert ("know other suites only" in error_lines(result)) == is_said

    patiently(attempt)


# --- without ML-KEM ----------------------------------------------------------------------------

LACKS = "needs ML-KEM, which the cryptography package here lacks: OpenSSL 3.5"


@pytest.fixture
def old_openssl(tmp_path: Path) -> dict[str, str]:
    """An environment in which the library knows of no OpenSSL 3.5, and so has no ML-KEM."""
    (tmp_path / "sitecustomize.py").write_text(
        "from cryptography.hazmat.bindings._rust import openssl\n"
        "assert openssl.CRYPTOGRAPHY_OPENSSL_350_OR_GREATER\n"
        "openssl.CRYPTOGRAPHY_OPENSSL_350_OR_GREATER = False\n"
    )
    return {**os.environ, "PYTHONPATH": str(tmp_path)}


@pytest.mark.parametrize("words", [["uppercase", MESSAGE], ["--lines", "uppercase", "-"]])
def test_without_ml_kem_the_suite_is_refused_before_there_is_a_connection(
    words: list[str], old_openssl: dict[str, str]
) -> None:
    connections: list[Wire] = []
    with listening(connections.append) as port:
        arguments = ["-p", str(port), SUITE, "alice", *words]
        result = run(*arguments, stdin=b"text\n", env=old_openssl)
    assert (result.returncode, result.stdout) == (2, b"")
    error, hint, usage, *_ = error_lines(result).splitlines()
    assert LACKS in error
    assert "newer OpenSSL" in hint
    assert usage.startswith("usage: ")
    assert not connections


def test_without_ml_kem_a_responder_ignores_who_asks_for_the_suite_and_answers_others(
    own_broker: Mosquitto, start_responder: Start, old_openssl: dict[str, str]
) -> None:
    port = own_broker.port
    responder = start_responder("-p", str(port), env=old_openssl)

    def attempt(timeout: float) -> None:
        says = "no responder answered the key exchange…know other suites only"
        check(attacked(port, SUITE, timeout=timeout), says)

    patiently(attempt)
    assert LACKS in responder.lines[-1]
    assert 'event=ignored netid="alice" action="key-exchange"' in responder.lines[-1]
    for suite in OTHER_SUITES:
        check(attacked(port, f"--suite={suite}", timeout=20), ANSWER)


@pytest.mark.usefixtures("responder")
@pytest.mark.parametrize("suite", OTHER_SUITES)
def test_without_ml_kem_a_request_in_another_suite_is_answered(
    suite: str, broker: Mosquitto, netid: str, old_openssl: dict[str, str]
) -> None:
    result = run(
        *("-p", str(broker.port), f"--suite={suite}", netid, "uppercase", MESSAGE), env=old_openssl
    )
    check(result, ANSWER)
