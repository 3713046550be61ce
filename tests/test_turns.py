"""Who is answered next, and which keys are kept: bounds, and who loses first."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crypto import TokenError, digest
from secure_mqtt import keyring as rules
from secure_mqtt import turns as queues
from secure_mqtt.actions import MAX_TEXT
from secure_mqtt.errors import UnusableError
from secure_mqtt.keyring import Key, Keyring
from secure_mqtt.suites import GcmCipher, LabCipher
from secure_mqtt.turns import Hold, Incoming, Turns

TOPIC = "a/reverse/request"


def message(netid: str, payload: bytes = b"") -> Incoming:
    return Incoming(netid, "reverse", payload, time.monotonic())


def taken(turns: Turns) -> Iterator[Incoming]:
    while turns.has_next:
        yield turns.take()


# --- turns -------------------------------------------------------------------------------------


def test_netids_take_turns() -> None:
    turns = Turns()
    for netid in "aaabbc":
        turns.put(message(netid))
    assert "".join(each.netid for each in taken(turns)) == "abcaba"


@given(st.lists(st.tuples(st.sampled_from("abc"), st.binary(max_size=4)), max_size=30))
def test_the_messages_of_a_netid_stay_in_order(sent: list[tuple[str, bytes]]) -> None:
    turns = Turns()
    for netid, payload in sent:
        turns.put(message(netid, payload))
    came = [(each.netid, each.payload) for each in taken(turns)]
    for netid in "abc":
        assert [each for each in came if each[0] == netid] == [
            each for each in sent if each[0] == netid
        ]
    assert (len(turns), turns.take_dropped()) == (0, 0)


def test_the_heaviest_loses_its_newest_messages_first() -> None:
    turns = Turns()
    turns.put(message("light", b"1"))
    count = 2 * queues.MAX_WEIGHT // 2**16
    for number in range(count):
        turns.put(message("heavy", number.to_bytes(2, "big") * 2**15))
        turns.put(message("light", b"2"))
    came = [*taken(turns)]
    assert sum(each.netid == "light" for each in came) == count + 1
    heavy = [each.payload for each in came if each.netid == "heavy"]
    assert heavy[0][:2] == b"\0\0"
    assert sum(each.weight for each in came) <= queues.MAX_WEIGHT
    assert turns.take_dropped() == count - len(heavy)
    assert turns.take_dropped() == 0


@given(st.lists(st.sampled_from(["put a", "put b", "take", "hold", "keep", "free a", "free b"])))
def test_nothing_is_lost_and_who_is_held_is_not_answered(steps: list[str]) -> None:
    turns = Turns()
    put = took = 0
    held = set()
    for step in steps:
        kind, _, netid = step.partition(" ")
        if kind == "put":
            turns.put(message(netid))
            put += 1
        elif kind == "free":
            turns.release(netid, Hold.WORKER)
            held.discard(netid)
        elif turns.has_next:
            one = turns.take()
            took += 1
            assert one.netid not in held
            if kind in ("hold", "keep"):
                turns.hold(one.netid, Hold.WORKER, one if kind == "keep" else None)
                took -= kind == "keep"
                held.add(one.netid)
    for netid in held:
        turns.release(netid, Hold.WORKER)
    assert len([*taken(turns)]) == put - took


def test_who_is_held_is_released_for_the_same_reason_only() -> None:
    turns = Turns()
    for _ in range(2):
        turns.put(message("a"))
    turns.hold("a", Hold.ANSWER, turns.take())
    assert not turns.release("a", Hold.KEY)
    assert not turns.has_next
    assert turns.release("a", Hold.ANSWER)
    assert len([*taken(turns)]) == 2


def test_a_held_netid_loses_messages_too_when_there_is_no_room() -> None:
    turns = Turns()
    turns.put(message("a"))
    turns.hold("a", Hold.WORKER, turns.take())
    for _ in range(40):
        turns.put(message("a", bytes(2**20)))
    assert turns.take_dropped() > 0
    assert turns.release("a", Hold.WORKER)
    assert sum(each.weight for each in taken(turns)) <= queues.MAX_WEIGHT


# --- keys --------------------------------------------------------------------------------------


class Clients:
    """Clients that each have a key in a keyring."""

    def __init__(self) -> None:
        self.keyring = Keyring()
        self._count = 0

    def add(self, netid: str = "a", expires: float = float("inf")) -> Key:
        self._count += 1
        secret = digest(self._count.to_bytes(4, "big"))  # both its halves differ from the others'
        key = Key(netid, LabCipher(secret), expires=expires)
        self.keyring.add(key)
        return key

    def use(self, key: Key) -> Key:
        assert key.cipher
        opened = self.keyring.open(key.netid, TOPIC, key.cipher.seal(TOPIC, 0, b"text"))
        assert opened.key is key
        return key

    def has(self, key: Key) -> bool:
        return key in self.keyring.of(key.netid)


@pytest.fixture
def clients() -> Clients:
    return Clients()


class Clock:
    """The time, as a test has it."""

    def __init__(self) -> None:
        self.now = time.monotonic()

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(rules, "time", clock)
    return clock


def sweep_all(keyring: Keyring) -> None:
    for _ in range(2 * rules.SWEEPS):
        keyring.sweep()


def test_a_used_key_survives_what_others_do_in_its_netid_and_elsewhere(clients: Clients) -> None:
    key = clients.use(clients.add("victim"))
    for _ in range(100):
        clients.add("victim")
    for number in range(rules.MAX_UNPROVEN + 100):
        clients.add(f"n{number}")
    clients.use(key)
    assert len(clients.keyring.of("victim")) <= rules.KEYS_PER_NETID + 1
    assert len(clients.keyring) <= rules.MAX_UNPROVEN + 1


def test_the_ninth_used_key_pushes_out_the_one_not_used_for_longest(clients: Clients) -> None:
    keys = [clients.use(clients.add()) for _ in range(rules.KEYS_PER_NETID)]
    clients.use(keys[0])
    clients.use(clients.add())
    assert [clients.has(key) for key in keys] == [True, False] + 6 * [True]


def test_used_keys_are_bounded(clients: Clients, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "MAX_PROVEN", 10)
    keys = [clients.use(clients.add(f"n{number}")) for number in range(11)]
    assert [clients.has(key) for key in keys] == [False] + 10 * [True]


def test_remembered_tokens_are_bounded_of_a_key_and_of_all(
    clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = clients.add("a"), clients.add("b")
    for _ in range(rules.MAX_TOKENS + 10):
        clients.use(first)
    assert len(first.tokens) == rules.MAX_TOKENS * rules.TOKEN_SIZE
    monkeypatch.setattr(rules, "MAX_TOKEN_BYTES", len(first.tokens))
    clients.use(second)
    assert (clients.has(first), clients.has(second)) == (False, True)
    for _ in range(rules.MAX_TOKENS):  # what was freed is free
        clients.use(second)
    assert clients.has(second)


def test_a_request_is_opened_once(clients: Clients) -> None:
    numbered = Key("b", GcmCipher(bytes(32), bytes(32)))
    clients.keyring.add(numbered)
    for key in clients.add("a"), numbered:
        assert key.cipher
        token = key.cipher.seal(TOPIC, 1, b"text")
        clients.keyring.open(key.netid, TOPIC, token)
        with pytest.raises(UnusableError, match="here before"):
            clients.keyring.open(key.netid, TOPIC, token)


def test_a_key_with_a_used_successor_goes_a_minute_after_its_last_use(
    clients: Clients, clock: Clock
) -> None:
    old = clients.use(clients.add())
    new = clients.add()
    clock.now += rules.LIFETIME + 1
    sweep_all(clients.keyring)
    assert clients.has(old)  # anyone could have made the new one
    clients.use(new)
    sweep_all(clients.keyring)
    assert (clients.has(old), clients.has(new)) == (False, True)
    clock.now += rules.MAX_LIFETIME + 1
    sweep_all(clients.keyring)
    assert len(clients.keyring) == 0


def test_a_key_does_not_outlive_its_certificate(clients: Clients, clock: Clock) -> None:
    key = clients.use(clients.add(expires=clock.now + 10))
    clock.now += 9
    clients.use(key)
    clock.now += 2
    assert key.cipher
    with pytest.raises(TokenError):
        clients.keyring.open("a", TOPIC, key.cipher.seal(TOPIC, 0, b"text"))
    sweep_all(clients.keyring)
    assert len(clients.keyring) == 0


def test_what_a_forgotten_key_has_opened_is_still_told_apart(clients: Clients) -> None:
    """A worker may come back with its result when the key is gone."""
    key = clients.add()
    clients.keyring.clear()
    clients.keyring.use(key, None, bytes(100))
    clients.keyring.note_answer(key, None, bytes(range(100)))
    assert len(clients.keyring) == 0
    other = clients.use(clients.add())  # and nothing counts that is not kept
    assert clients.has(other)
    assert clients.keyring._token_bytes == len(other.tokens)


def test_a_text_over_a_mebibyte_is_refused_before_it_is_opened(clients: Clients) -> None:
    key = clients.add()
    assert key.cipher
    size = key.cipher.sealed_size(MAX_TEXT)
    assert [*clients.keyring.able("a", size)]
    with pytest.raises(UnusableError, match="1 MiB"):
        [*clients.keyring.able("a", size + 1)]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 11), st.booleans()), max_size=60))
def test_the_books_are_right_whatever_happens(steps: list[tuple[str, int, bool]]) -> None:
    clients, keys = Clients(), list[Key]()
    for netid, place, is_used in steps:
        if place >= len(keys):
            keys.append(clients.add(netid))
        elif is_used and clients.has(keys[place]):
            clients.use(keys[place])
        else:
            clients.keyring.forget(keys[place])
    ring = clients.keyring
    kept = {key for netid in "ab" for key in ring.of(netid)}
    assert kept == {*ring._proven, *ring._unproven}
    assert ring._token_bytes == sum(len(key.tokens) for key in kept)
    for netid in "ab":
        proven = [key.is_proven for key in ring.of(netid)]
        assert proven.count(True) <= rules.KEYS_PER_NETID
        assert proven.count(False) <= rules.KEYS_PER_NETID
