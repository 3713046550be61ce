"""What is published on a shared topic, and what its keeper is asked, as bytes.

vectors/topics.json has known answers; reference_topics.py is the second author.
"""

from __future__ import annotations

import contextlib
import json
import struct
from collections.abc import Callable
from datetime import datetime
from typing import Any

import pytest
import reference
import reference_topics
from conftest import VECTORS
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID
from hostile import damaged
from hypothesis import example, given, settings
from hypothesis import strategies as st
from issuing import HOUR, NOW, p256
from members import KEEPER, Certifier
from reference_topics import fields, seal_message

from crypto import CryptoError, KeyFileError, PeerKeyError
from secure_mqtt.signatures import Authority, Identity
from secure_mqtt.topics import messages, requests
from secure_mqtt.topics.messages import (
    HELLO,
    MAX_DATA_SIZE,
    MAX_HELLO_SIZE,
    MESSAGE,
    NOTICE,
    OVERHEAD,
    Epoch,
    MessageError,
    SessionKey,
    Stream,
    is_topic,
    read_head,
    read_hello,
    session_of,
)
from secure_mqtt.topics.requests import (
    RefusedError,
    RequestError,
    read_answer,
    read_request,
    to_base64,
    to_json,
    write_request,
)

settings.register_profile("suite", deadline=None)
settings.load_profile("suite")

FILE: list[dict[str, Any]] = json.loads((VECTORS / "topics.json").read_text(encoding="utf-8"))
KNOWN = pytest.mark.parametrize("known", FILE, ids=[known["netid"] for known in FILE])
MESSAGES = pytest.mark.parametrize(
    ("known", "message"),
    [(known, message) for known in FILE for message in known["messages"]],
    ids=[f"{known['netid']}-{m['counter']}" for known in FILE for m in known["messages"]],
)
COURSE, STRANGERS = Certifier(), Certifier()
ALICE, MALLORY = COURSE.member("alice"), COURSE.member("mallory")
TOPIC, NUMBER, KEY = "sensors/kitchen", 7, bytes(range(32))
EPOCH = Epoch(TOPIC, NUMBER, KEY)
SESSION = ALICE.session(TOPIC)
TIME, DATA = 1_800_000_000_000, b"21.5"
topics = st.text(min_size=1, max_size=100).filter(is_topic)
integers_64 = st.integers(0, 2**64 - 1)
times = st.integers(0, messages.END_OF_TIME - 1)


def open_message(epoch: Epoch, hello: bytes, payload: bytes) -> tuple[int, int, bytes]:
    """Open a message of a session as a subscriber does; return counter, time and data."""
    head = read_head(payload)
    stream = Stream(epoch, session_of(hello))
    content = stream.decrypt(payload)
    stream.verify(payload, content, messages.parse_hello(hello).key)
    return head.counter, content.time, content.data


# --- known answers -----------------------------------------------------------------------------


def known_session(known: dict[str, Any]) -> SessionKey:
    pem = known["identity_private_key"] + known["certificate"]
    names = known["topic"], known["netid"], known["keeper"]
    private_key = bytes.fromhex(known["session_private_key"])
    return SessionKey(Identity(pem.encode()), *names, _private_key=private_key)


def known_epoch(known: dict[str, Any]) -> Epoch:
    return Epoch(known["topic"], known["epoch"], bytes.fromhex(known["epoch_key"]))


@KNOWN
def test_a_known_hello_introduces_its_session(known: dict[str, Any]) -> None:
    hello = bytes.fromhex(known["hello"])
    authority = Authority(known["authority"].encode())
    sender = read_hello(hello, known["topic"], known["keeper"], authority)
    assert (sender.netid, session_of(hello).hex()) == (known["netid"], known["session"])
    assert sender.key == known_session(known).key.public_key()


@KNOWN
def test_a_known_hello_is_sealed_and_opened(known: dict[str, Any]) -> None:
    epoch, nonce = known_epoch(known), bytes.fromhex(known["hello_nonce"])
    hello, payload = (bytes.fromhex(known[name]) for name in ("hello", "hello_payload"))
    assert read_head(payload) == (HELLO, known["epoch"], b"", -1)
    assert epoch.open_hello(payload) == hello
    assert epoch.seal_hello(hello, _nonce=nonce) == payload


@MESSAGES
def test_a_known_message_is_sealed_and_opened(
    known: dict[str, Any], message: dict[str, Any]
) -> None:
    epoch, session = known_epoch(known), known_session(known)
    data, payload = (bytes.fromhex(message[name]) for name in ("data", "payload"))
    stream = Stream(epoch, bytes.fromhex(known["session"]))
    assert stream.seal(session.key, message["counter"], message["time"], data) == payload
    opened = open_message(epoch, bytes.fromhex(known["hello"]), payload)
    assert opened == (message["counter"], message["time"], data)


@KNOWN
def test_the_second_implementation_agrees_with_the_known_answers(known: dict[str, Any]) -> None:
    names = known["topic"], known["epoch"], bytes.fromhex(known["epoch_key"])
    hello, nonce = bytes.fromhex(known["hello"]), bytes.fromhex(known["hello_nonce"])
    anchors = [x509.load_pem_x509_certificate(known["authority"].encode())]
    by = reference_topics.read_hello(hello, known["topic"], known["keeper"], anchors)
    assert (by.netid, by.session.hex()) == (known["netid"], known["session"])
    assert reference_topics.seal_hello(*names, hello, nonce).hex() == known["hello_payload"]
    for message in known["messages"]:
        opened = reference_topics.open_message(*names, by, bytes.fromhex(message["payload"]))
        assert (opened.counter, opened.time) == (message["counter"], message["time"])
        assert opened.data.hex() == message["data"]


# --- both authors ------------------------------------------------------------------------------


@given(topics, st.integers(1, 2**32 - 1), st.binary(min_size=32, max_size=32))
def test_what_the_program_introduces_the_second_implementation_accepts(
    topic: str, number: int, key: bytes
) -> None:
    session = SessionKey(ALICE.identity, topic, "alice", KEEPER)
    payload = Epoch(topic, number, key).seal_hello(session.hello)
    hello = reference_topics.open_hello(topic, number, key, payload)
    by = reference_topics.read_hello(hello, topic, KEEPER, [COURSE.certificate])
    assert by == ("alice", session.key.public_key(), session.session)


@given(topics, integers_64, times, st.binary(max_size=300))
@example("t", 2**64 - 1, messages.END_OF_TIME - 1, b"")
def test_what_one_seals_the_other_opens(topic: str, counter: int, time: int, data: bytes) -> None:
    epoch = Epoch(topic, NUMBER, KEY)
    ours, theirs = SessionKey(ALICE.identity, topic, "alice", KEEPER), ALICE.session(topic)
    payload = Stream(epoch, ours.session).seal(ours.key, counter, time, data)
    by = reference_topics.read_hello(ours.hello, topic, KEEPER, [COURSE.certificate])
    opened = reference_topics.open_message(topic, NUMBER, KEY, by, payload)
    assert opened == (counter, time, data)
    assert len(payload) == len(data) + OVERHEAD == len(data) + 117
    payload = seal_message(topic, NUMBER, KEY, theirs, counter, time, data)
    assert open_message(epoch, theirs.hello, payload) == (counter, time, data)


# --- bad messages ------------------------------------------------------------------------------

PAYLOAD = seal_message(TOPIC, NUMBER, KEY, SESSION, 3, TIME, DATA)
HELLO_PAYLOAD = EPOCH.seal_hello(SESSION.hello)


MOVED: dict[str, Callable[[], bytes]] = {
    "another topic": lambda: seal_message("other", NUMBER, KEY, SESSION, 3, TIME, DATA),
    "another epoch's number": lambda: seal_message(TOPIC, 8, KEY, SESSION, 3, TIME, DATA),
    "another epoch's key": lambda: seal_message(TOPIC, NUMBER, bytes(32), SESSION, 3, TIME, DATA),
    "another session": lambda: seal_message(
        TOPIC, NUMBER, KEY, ALICE.session(TOPIC), 3, TIME, DATA
    ),
}


@pytest.mark.parametrize("case", MOVED)
def test_a_message_moved_from_elsewhere_does_not_open(case: str) -> None:
    """The broker copies what is sealed into a payload that begins as it should."""
    moved = PAYLOAD[:29] + MOVED[case]()[29:]
    with pytest.raises(MessageError, match="not encrypted with the topic's key"):
        open_message(EPOCH, SESSION.hello, moved)


def test_a_message_does_not_open_in_another_epoch_or_session_that_has_the_same_key() -> None:
    with pytest.raises(MessageError, match="not encrypted"):
        open_message(Epoch(TOPIC, 8, KEY), SESSION.hello, PAYLOAD)
    with pytest.raises(MessageError, match="not encrypted"):
        open_message(EPOCH, ALICE.session(TOPIC).hello, PAYLOAD)


def test_a_message_does_not_open_with_another_counter_than_its_own() -> None:
    other = seal_message(TOPIC, NUMBER, KEY, SESSION, 4, TIME, DATA)
    with pytest.raises(MessageError, match="not encrypted"):
        open_message(EPOCH, SESSION.hello, PAYLOAD[:29] + other[29:])


def test_no_message_opens_as_a_hello_and_no_hello_as_a_message() -> None:
    disguised = b"\x02" + PAYLOAD[1:]
    assert read_head(disguised).kind == HELLO
    with pytest.raises(MessageError, match="not encrypted"):
        EPOCH.open_hello(disguised)
    disguised = b"\x01" + HELLO_PAYLOAD[1:]
    with pytest.raises(MessageError, match="not encrypted"):
        Stream(EPOCH, read_head(disguised).session).decrypt(disguised)


def test_a_hello_of_another_epoch_or_topic_does_not_open() -> None:
    for other in Epoch("other", NUMBER, KEY), Epoch(TOPIC, 8, KEY), Epoch(TOPIC, 7, bytes(32)):
        with pytest.raises(MessageError, match="not encrypted"):
            other.open_hello(HELLO_PAYLOAD)


def test_a_member_cannot_write_in_anothers_session() -> None:
    mallory = MALLORY.session(TOPIC)
    forged = seal_message(TOPIC, NUMBER, KEY, mallory, 4, TIME, DATA, session=SESSION.session)
    with pytest.raises(MessageError, match="forged"):
        open_message(EPOCH, SESSION.hello, forged)


@pytest.mark.parametrize(
    ("epoch", "counter", "time", "data"),
    [
        (8, 3, TIME, DATA),
        (NUMBER, 4, TIME, DATA),
        (NUMBER, 3, TIME + 1, DATA),
        (NUMBER, 3, TIME, b"99.9"),
    ],
    ids=["epoch", "counter", "time", "data"],
)
@pytest.mark.parametrize("key", [KEY, bytes(32)], ids=["same key", "another key"])
def test_a_member_cannot_reuse_a_signature_for_anything_else(
    epoch: int, counter: int, time: int, data: bytes, key: bytes
) -> None:
    """A member can open what another has signed, and seal it anew with a key that it has."""
    cipher = reference_topics.message_cipher(TOPIC, KEY, SESSION.session)
    text = cipher.decrypt(bytes(4) + PAYLOAD[21:29], PAYLOAD[29:], TOPIC.encode() + PAYLOAD[:29])
    signature = text[8:72]
    head = b"\x01" + struct.pack(">I", epoch) + SESSION.session + struct.pack(">Q", counter)
    sealed = reference_topics.message_cipher(TOPIC, key, SESSION.session).encrypt(
        bytes(4) + head[21:], struct.pack(">Q", time) + signature + data, TOPIC.encode() + head
    )
    with pytest.raises(MessageError, match="forged"):
        open_message(Epoch(TOPIC, epoch, key), SESSION.hello, head + sealed)


def test_a_time_that_no_clock_shows_is_refused() -> None:
    for time in messages.END_OF_TIME, 2**64 - 1:
        payload = seal_message(TOPIC, NUMBER, KEY, SESSION, 3, time, DATA)
        with pytest.raises(MessageError, match="time that no clock shows"):
            open_message(EPOCH, SESSION.hello, payload)


def test_a_message_of_1_mib_is_taken_and_one_byte_more_is_not() -> None:
    largest = seal_message(TOPIC, NUMBER, KEY, SESSION, 3, TIME, bytes(MAX_DATA_SIZE))
    assert open_message(EPOCH, SESSION.hello, largest)[2] == bytes(2**20)
    with pytest.raises(MessageError, match="too large"):
        read_head(seal_message(TOPIC, NUMBER, KEY, SESSION, 3, TIME, bytes(MAX_DATA_SIZE + 1)))


SIZES = {
    "nothing": (b"", "not a message"),
    "no kind": (b"\x00" * 200, "not a message"),
    "an unknown kind": (b"\x04" * 200, "not a message"),
    "a kind only": (b"\x01", "too short"),
    "a message cut": (PAYLOAD[:116], "too short"),
    "a hello cut": (HELLO_PAYLOAD[:32], "too short"),
    "a hello too large": (b"\x02" + bytes(MAX_HELLO_SIZE + 33), "too large"),
    "a notice cut": (b"\x03\0\0\0", "too short"),
    "a notice and more": (b"\x03\0\0\0\x01\0", "too large"),
}


@pytest.mark.parametrize("case", SIZES)
def test_a_payload_of_a_wrong_size_is_refused(case: str) -> None:
    payload, words = SIZES[case]
    with pytest.raises(MessageError, match=words):
        read_head(payload)


def test_a_notice_names_an_epoch() -> None:
    for number in 1, 7, 2**32 - 1:
        assert messages.make_notice(number) == reference_topics.notice(number)
        assert read_head(reference_topics.notice(number)) == (NOTICE, number, b"", -1)


@given(st.one_of(damaged(PAYLOAD), damaged(HELLO_PAYLOAD), st.binary(max_size=200)))
def test_whatever_was_changed_is_refused_in_our_words(payload: bytes) -> None:
    try:
        head = read_head(payload)
        if head.kind == MESSAGE:
            assert open_message(EPOCH, SESSION.hello, payload) == (3, TIME, DATA)
        elif head.kind == HELLO:
            assert EPOCH.open_hello(payload) == SESSION.hello
    except MessageError:
        assert payload not in (PAYLOAD, HELLO_PAYLOAD)


# --- bad hellos --------------------------------------------------------------------------------

OTHER_PURPOSE = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])
EXPIRED = COURSE.member("alice", begins=NOW - 3 * HOUR, ends=NOW - HOUR)
FUTURE = COURSE.member("alice", begins=NOW + HOUR, ends=NOW + 2 * HOUR)


def with_blocks(*blocks: bytes) -> bytes:
    """Return a hello of alice's with other PEM blocks."""
    return fields(b"alice", b"".join(blocks))


def parts(hello: bytes) -> list[bytes]:
    """Return the PEM blocks of a hello: key, certificate, signature."""
    _, bundle = reference_topics.split(hello)
    return [reference.pem(*block) for block in reference.blocks(bundle)]


PUBLIC_KEY, CERTIFICATE, SIGNATURE = parts(SESSION.hello)
P256_KEY = reference.pem(
    "PUBLIC KEY", p256().public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
)
BAD_HELLOS: dict[str, tuple[bytes, str]] = {
    "of another topic": (ALICE.session("other").hello, "signature does not match"),
    "of another keeper": (ALICE.session(TOPIC, keeper="other").hello, "signature does not match"),
    "of another's name": (MALLORY.session(TOPIC, "alice").hello, "signed by 'mallory'"),
    "of a name that no certificate can have": (
        fields(b"a b", reference_topics.split(SESSION.hello)[1]),
        "not a hello",
    ),
    "of another authority": (
        STRANGERS.member("alice").session(TOPIC).hello,
        "from an unknown authority",
    ),
    "expired": (EXPIRED.session(TOPIC).hello, "has expired"),
    "not valid yet": (FUTURE.session(TOPIC).hello, "not valid yet"),
    "for responders": (
        COURSE.member("alice", purposes=OTHER_PURPOSE).session(TOPIC).hello,
        "for another purpose",
    ),
    "of another kind of key": (
        with_blocks(P256_KEY, CERTIFICATE, SIGNATURE),
        "not one of Ed25519",
    ),
    "of another key": (
        with_blocks(parts(MALLORY.session(TOPIC).hello)[0], CERTIFICATE, SIGNATURE),
        "signature does not match",
    ),
    "of two keys": (
        with_blocks(PUBLIC_KEY, PUBLIC_KEY, CERTIFICATE, SIGNATURE),
        "not one of Ed25519",
    ),
    "not signed": (with_blocks(PUBLIC_KEY, CERTIFICATE), "not signed"),
    "without certificate": (with_blocks(PUBLIC_KEY, SIGNATURE), "Ed25519"),
    "without key": (with_blocks(CERTIFICATE, SIGNATURE), "no valid public key"),
    "without bundle": (fields(b"alice"), "not a hello"),
    "with a third field": (SESSION.hello + fields(b"more"), "not a hello"),
    "cut": (SESSION.hello[:-1], "not a hello"),
    "nothing": (b"", "not a hello"),
    "of a length of its own": (b"\xff\xff\xff\xff" + SESSION.hello[4:], "not a hello"),
    "too large": (fields(b"alice", bytes(MAX_HELLO_SIZE)), "larger than any hello"),
}


@pytest.mark.parametrize("case", BAD_HELLOS)
def test_a_bad_hello_introduces_nobody(case: str) -> None:
    hello, words = BAD_HELLOS[case]
    with pytest.raises(PeerKeyError, match=words):
        read_hello(hello, TOPIC, KEEPER, COURSE.authority)


@given(st.one_of(damaged(SESSION.hello), st.binary(max_size=100)))
@settings(max_examples=300)
def test_a_changed_hello_introduces_alice_or_nobody(hello: bytes) -> None:
    try:
        sender = read_hello(hello, TOPIC, KEEPER, COURSE.authority)
    except PeerKeyError:
        return
    assert (sender.netid, sender.key) == ("alice", SESSION.key.public_key())


def milliseconds(moment: datetime) -> int:
    return int(moment.timestamp() * 1000)


def test_a_hello_is_verified_for_the_time_that_is_asked_for() -> None:
    hello = EXPIRED.session(TOPIC).hello
    for hours in 1, 2, 3:
        moment = milliseconds(NOW - hours * HOUR)
        sender = read_hello(hello, TOPIC, KEEPER, COURSE.authority, at=moment)
        assert sender.netid == "alice"
        begins, ends = ((NOW - hours * HOUR).timestamp() for hours in (3, 1))
        assert sender.validity == (begins, ends)
    for moment in (
        milliseconds(NOW - 3 * HOUR) - 1,
        milliseconds(NOW - HOUR) + 1000,  # a certificate knows no part of a second
        0,
        messages.END_OF_TIME - 1,
    ):
        with pytest.raises(PeerKeyError, match="has expired, or is not valid yet"):
            read_hello(hello, TOPIC, KEEPER, COURSE.authority, at=moment)


def test_an_identity_too_large_for_a_hello_is_refused_at_once() -> None:
    large = COURSE.member("alice", others=100)
    assert len(SessionKey(large.identity, TOPIC, "alice", KEEPER).hello) < MAX_HELLO_SIZE
    twice = large._replace(chain=large.chain * 2)
    with pytest.raises(KeyFileError, match="too large to publish with"):
        SessionKey(twice.identity, TOPIC, "alice", KEEPER)


# --- topics ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "topic",
    ["t", "a/b", "/", "a//b", "ünïcødé/✓", "x" * 512, "é" * 256, "a$", "request", "a/requests"],
)
def test_a_topic_that_can_be_shared(topic: str) -> None:
    assert is_topic(topic)


@pytest.mark.parametrize(
    "topic",
    [
        *("", "a/+", "#", "a/#", "$SYS/a", "$a", "a\0b", "a\nb", "a\x7fb", "a\x85b", "\ud800"),
        *("x" * 513, "é" * 257, "alice/uppercase/request", "alice/uppercase/response", "/request"),
    ],
    ids=repr,
)
def test_a_topic_that_cannot_be_shared(topic: str) -> None:
    assert not is_topic(topic)


# --- requests and answers ----------------------------------------------------------------------

SOME_HELLO, SOME_SESSION = b"hello", bytes(range(16))
HELLO_64, SESSION_64 = to_base64(SOME_HELLO), to_base64(SOME_SESSION)
GOOD_REQUESTS: dict[str, tuple[Any, ...]] = {
    '{"do":"create","topic":"t","members":["alice","b-1"],"history":100}': (
        *("create", "t", ["alice", "b-1"], 100),
    ),
    '{"do":"admit","topic":"t","members":["bob"]}': ("admit", "t", ["bob"]),
    '{"do":"remove","topic":"t","members":[]}': ("remove", "t", []),
    '{"do":"delete","topic":"ünïcødé/✓"}': ("delete", "ünïcødé/✓"),
    '{"do":"list"}': ("list",),
    '{"do":"join","topic":"t"}': ("join", "t", None),
    f'{{"do":"join","topic":"t","hello":"{HELLO_64}"}}': ("join", "t", SOME_HELLO),
    f'{{"do":"sender","topic":"t","session":"{SESSION_64}"}}': ("sender", "t", SOME_SESSION),
    '{"do":"history","topic":"t","after":-3}': ("history", "t", -3),
}


@pytest.mark.parametrize("text", GOOD_REQUESTS)
def test_a_request_is_written_and_read(text: str) -> None:
    do, *values = GOOD_REQUESTS[text]
    assert write_request(do, *values) == text.encode()
    found, fields = read_request(text.encode())
    assert (found, [*fields.values()]) == (do, values)


def test_a_request_may_have_its_fields_in_any_order_and_name_no_hello() -> None:
    assert read_request(b' {"topic": "\\u0074",\n "hello": null, "do": "join"} ') == (
        *("join", {"topic": "t", "hello": None}),
    )


BAD_REQUESTS = [
    b"",
    b"\xff",
    b"{}",
    b"[]",
    b"null",
    b'"list"',
    b'{"do": "list"',
    b'{"do": "list"} {}',
    b'{"do": "List"}',
    b'{"do": ["list"]}',
    b'{"do": null}',
    b'{"do": "list", "topic": "t"}',
    b'{"do": "list", "do": "list"}',
    b'{"do": "delete"}',
    b'{"do": "delete", "topic": 1}',
    b'{"do": "delete", "topic": "a/+"}',
    b'{"do": "delete", "topic": "\\ud800"}',
    b'{"do": "delete", "topic": "a/request"}',
    b'{"do": "admit", "topic": "t"}',
    b'{"do": "admit", "topic": "t", "members": "bob"}',
    b'{"do": "admit", "topic": "t", "members": {"bob": 1}}',
    b'{"do": "admit", "topic": "t", "members": [1]}',
    b'{"do": "admit", "topic": "t", "members": ["a/b"]}',
    b'{"do": "admit", "topic": "t", "members": ["-a"]}',
    b'{"do": "admit", "topic": "t", "members": [""]}',
    b'{"do": "admit", "topic": "t", "members": ["' + b"x" * 64 + b'"]}',
    b'{"do": "admit", "topic": "t", "members": ["\xc3\xa9"]}',
    to_json({"do": "admit", "topic": "t", "members": ["a"] * 10_001}),
    b'{"do": "create", "topic": "t", "members": [], "history": -1}',
    b'{"do": "create", "topic": "t", "members": [], "history": 100001}',
    b'{"do": "create", "topic": "t", "members": [], "history": 1.0}',
    b'{"do": "create", "topic": "t", "members": [], "history": true}',
    b'{"do": "create", "topic": "t", "members": [], "history": "1"}',
    b'{"do": "create", "topic": "t", "members": [], "history": 1e999}',
    b'{"do": "create", "topic": "t", "members": [], "history": NaN}',
    b'{"do": "create", "topic": "t", "members": [], "history": ' + b"1" * 10_000 + b"}",
    b'{"do": "create", "topic": "t", "members": []}',
    b'{"do": "join", "topic": "t", "hello": ""}',
    b'{"do": "join", "topic": "t", "hello": "YQ"}',
    b'{"do": "join", "topic": "t", "hello": "YR=="}',
    b'{"do": "join", "topic": "t", "hello": "Y Q=="}',
    b'{"do": "join", "topic": "t", "hello": "\xc3\xa9"}',
    to_json({"do": "join", "topic": "t", "hello": bytes(MAX_HELLO_SIZE + 1)}),
    to_json({"do": "sender", "topic": "t", "session": bytes(15)}),
    to_json({"do": "sender", "topic": "t", "session": bytes(17)}),
    b'{"do": "history", "topic": "t", "after": 9223372036854775808}',
    b'{"do": "history", "topic": "t", "after": null}',
    b"[" * 100_000,
    b'{"do": ' * 100_000,
    b'{"do": "list"' + b" " * requests.MAX_REQUEST_SIZE + b"}",
]


@pytest.mark.parametrize("data", BAD_REQUESTS, ids=lambda data: repr(data[:60]))
def test_a_request_that_is_none_is_refused(data: bytes) -> None:
    with pytest.raises(RequestError):
        read_request(data)


JOINED: dict[str, Any] = {
    "epoch": 2,
    "key": KEY,
    "renew": 1.5,
    "expires": 10,
    "previous": {"epoch": 1, "key": KEY, "expires": 0.5},
    "counters": {SESSION_64: 3},
    "history": 100,
    "number": 7,
}


def test_an_answer_to_join_is_read() -> None:
    joined = read_answer("join", to_json(JOINED))
    assert joined == (2, KEY, 1.5, 10.0, (1, KEY, 0.5), {SOME_SESSION: 3}, 100, 7)
    assert read_answer("join", to_json({**JOINED, "previous": None})).previous is None


def test_the_other_answers_are_read() -> None:
    kept = {"number": 1, "payload": PAYLOAD}
    page = {"messages": [kept], "keys": {"7": KEY}, "more": True}
    assert read_answer("history", to_json(page)) == ([(1, PAYLOAD)], {7: KEY}, True)
    assert read_answer("sender", to_json({"hello": SESSION.hello})) == SESSION.hello
    shared = {"topic": "t", "owner": "alice", "members": ["alice"], "history": 0}
    assert read_answer("list", to_json({"topics": [shared]})) == [("t", "alice", ["alice"], 0)]
    for do in "create", "admit", "remove", "delete":
        assert read_answer(do, b"{}") == {}


@pytest.mark.parametrize("do", requests.REQUESTS)
def test_an_error_in_an_answer_is_the_keepers_refusal(do: str) -> None:
    with pytest.raises(RefusedError, match="the words"):
        read_answer(do, b'{"error": "the words"}')


@pytest.mark.parametrize(
    "change",
    [
        {"epoch": 0},
        {"epoch": 2**32},
        {"epoch": "2"},
        {"key": bytes(31)},
        {"key": None},
        {"renew": -1},
        {"renew": True},
        {"expires": 1e10},
        {"expires": "10"},
        {"previous": []},
        {"previous": {"epoch": 1, "key": KEY}},
        {"counters": [3]},
        {"counters": {"short": 3}},
        {"counters": {SESSION_64: -1}},
        {"history": None},
        {"number": -1},
    ],
    ids=repr,
)
def test_an_answer_that_is_none_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        read_answer("join", to_json({**JOINED, **change}))


def test_an_answer_larger_than_any_is_refused_unread() -> None:
    with pytest.raises(RequestError, match="too large"):
        read_answer("create", b"{}" + b" " * requests.MAX_ANSWER_SIZE)


def test_the_largest_answer_to_history_can_be_read() -> None:
    largest = bytes(MAX_DATA_SIZE + OVERHEAD)
    page = {"messages": [{"number": 1, "payload": largest}], "keys": {"7": KEY}, "more": True}
    assert len(read_answer("history", to_json(page)).messages[0].payload) == len(largest)


@given(st.one_of(damaged(to_json(JOINED)), st.binary(max_size=100)))
def test_whatever_was_changed_in_json_raises_our_errors_only(data: bytes) -> None:
    for read in (
        read_request,
        *(lambda data, do=do: read_answer(do, data) for do in requests.ANSWERS),
    ):
        with contextlib.suppress(CryptoError, RefusedError):
            read(data)
