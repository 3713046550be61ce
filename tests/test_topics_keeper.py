"""The keeper: whom it answers what, and which messages it keeps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import reference_topics
from conftest import ROOT, SAFETY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from issuing import HOUR, NOW
from members import INTERVAL, TOPIC, Certifier, Desk
from reference_topics import Session, seal_message

from crypto import CryptoError
from secure_mqtt.topics import keeper as keeper_module
from secure_mqtt.topics.keeper import NO_TOPIC
from secure_mqtt.topics.messages import MAX_DATA_SIZE, MessageError, make_notice
from secure_mqtt.topics.requests import (
    Joined,
    RefusedError,
    to_json,
    write_request,
)

settings.register_profile("suite", deadline=None)
settings.load_profile("suite")

COURSE, STRANGERS = Certifier(), Certifier()
ALICE, BOB = COURSE.member("alice"), COURSE.member("bob")
T = TOPIC
TIME = 1_800_000_000_000  # milliseconds, of messages


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    desk = Desk(tmp_path / "topics.db", COURSE.authority)
    yield desk
    desk.close()


@pytest.fixture
def kept(desk: Desk) -> Desk:
    """A keeper with a topic of alice and bob that keeps 100 messages."""
    desk.ask("alice", "create", T, ["bob"], 100)
    return desk


def refusal(desk: Desk, netid: str, do: str, *values: Any) -> str:
    """Return why the keeper does not do something."""
    with pytest.raises(RefusedError) as caught:
        desk.ask(netid, do, *values)
    return str(caught.value)


# --- who is a member ---------------------------------------------------------------------------


def test_who_creates_a_topic_owns_it_and_is_a_member(desk: Desk) -> None:
    assert desk.ask("alice", "create", T, ["carol", "bob", "bob"], 5) == {}
    for netid in "alice", "bob", "carol":
        assert desk.ask(netid, "list") == [(T, "alice", ["alice", "bob", "carol"], 5)]
    assert desk.ask("dave", "list") == []


def test_a_name_is_taken_once(desk: Desk) -> None:
    desk.ask("alice", "create", T, ["bob"], 5)
    assert refusal(desk, "dave", "create", T, [], 5) == "this name is taken"
    assert refusal(desk, "alice", "create", T, [], 5) == "this name is taken"
    assert refusal(desk, "alice", "create", T, ["bob"], 6) == "this name is taken"


def test_who_asks_the_same_again_since_an_answer_was_lost_is_told_that_it_was_done(
    desk: Desk,
) -> None:
    for _ in range(2):
        desk.ask("alice", "create", T, ["bob"], 5)
    assert desk.join("alice").epoch == 1
    for _ in range(2):
        desk.ask("alice", "admit", T, ["carol"])
    for _ in range(2):
        desk.ask("alice", "remove", T, ["carol"])
    assert desk.join("alice").epoch == 2


def test_the_owner_admits_and_removes(kept: Desk) -> None:
    kept.ask("alice", "admit", T, ["carol", "dave", "carol"])
    kept.join("dave")
    kept.ask("alice", "remove", T, ["bob", "carol", "nobody"])
    assert kept.ask("dave", "list")[0].members == ["alice", "dave"]
    for netid in "bob", "carol":
        assert refusal(kept, netid, "join", T, None) == NO_TOPIC


def test_only_the_owner_admits_removes_and_deletes(kept: Desk) -> None:
    for do, *values in ("admit", ["carol"]), ("remove", ["alice"]), ("delete",):
        assert refusal(kept, "bob", do, T, *values) == "only its owner alice may do that"
    assert kept.ask("bob", "list")[0].members == ["alice", "bob"]


def test_the_owner_cannot_be_removed(kept: Desk) -> None:
    assert refusal(kept, "alice", "remove", T, ["bob", "alice"]) == "its owner can't be removed"
    assert kept.ask("bob", "list")[0].members == ["alice", "bob"]


REQUESTS_FOR_TOPICS = [
    ("admit", ["carol"]),
    ("remove", ["bob"]),
    ("delete",),
    ("join", None),
    ("join", b"hello"),
    ("sender", bytes(16)),
    ("history", 0),
]


@pytest.mark.parametrize("request_", REQUESTS_FOR_TOPICS, ids=str)
def test_a_stranger_cannot_tell_whether_a_topic_exists(
    kept: Desk, request_: tuple[Any, ...]
) -> None:
    do, *values = request_
    answers = set()
    for topic in T, "no/such/topic":
        with kept.keeper.batch():
            answers.add(kept.keeper.answer("mallory", write_request(do, topic, *values)))
    assert answers == {to_json({"error": NO_TOPIC})}


def test_a_deleted_topic_is_gone_and_its_name_free(kept: Desk) -> None:
    kept.ask("alice", "delete", T)
    assert kept.effects == ([(T, False)], [(T, make_notice(2))])
    assert refusal(kept, "alice", "join", T, None) == NO_TOPIC
    kept.ask("bob", "create", T, [], 0)
    assert kept.join("bob").epoch == 2  # above those that it had


# --- bounds ------------------------------------------------------------------------------------


def test_there_are_10_000_topics_and_100_of_an_owner(desk: Desk) -> None:
    with desk.keeper.batch():
        for number in range(10_000):
            request = write_request("create", f"t/{number}", [], 0)
            assert desk.keeper.answer(f"owner{number // 100}", request) == b"{}"
    assert (
        refusal(desk, "owner0", "create", "more", [], 0)
        == "there are 10000 topics, the most that may be"
    )
    desk.ask("owner0", "delete", "t/0")
    assert (
        refusal(desk, "owner1", "create", "more", [], 0)
        == "you have 100 topics, the most that may be"
    )
    desk.ask("owner0", "create", "more", [], 0)
    assert (
        refusal(desk, "owner0", "create", "yet more", [], 0)
        == "there are 10000 topics, the most that may be"
    )


def test_a_topic_has_10_000_members(desk: Desk) -> None:
    others = [f"m{number}" for number in range(9_999)]
    desk.ask("alice", "create", T, others, 0)
    assert len(desk.ask("m9998", "list")[0].members) == 10_000
    full = "a topic can have 10000 members"
    assert refusal(desk, "alice", "admit", T, ["one-more"]) == full
    desk.ask("alice", "admit", T, ["m5"])
    desk.ask("alice", "remove", T, ["m7"])
    desk.ask("alice", "admit", T, ["one-more"])
    assert refusal(desk, "bob", "create", "other", [*others, "one-more"], 0) == full


def test_a_member_has_64_sessions_in_an_epoch(kept: Desk) -> None:
    sessions = [ALICE.session(T) for _ in range(65)]
    for session in sessions[:64]:
        kept.join("alice", hello=session.hello)
    assert "you have 64 sessions on it" in refusal(kept, "alice", "join", T, sessions[64].hello)
    kept.join("alice", hello=sessions[0].hello)  # it is one of them
    kept.join("bob", hello=BOB.session(T).hello)
    kept.join("alice")  # who only reads
    kept.now += INTERVAL
    kept.join("alice", hello=sessions[64].hello)


def test_a_list_that_is_too_long_says_so_and_begins_with_ones_own(desk: Desk) -> None:
    """Others can make somebody a member of as much as they like."""
    crowd = [f"{'x' * 50}{number}" for number in range(9_900)]
    for number in range(3):
        desk.ask("mallory", "create", f"a{number}", ["alice", *crowd], 0)
    desk.ask("alice", "create", "own", [], 0)
    with desk.keeper.batch():
        answer = desk.keeper.answer("alice", write_request("list"))
    assert len(answer) < 2**20
    value = json.loads(answer)
    assert [shared["topic"] for shared in value["topics"]] == ["own", "a0"]
    assert value["more"] is True


# --- keys --------------------------------------------------------------------------------------


def test_members_get_the_same_key(kept: Desk) -> None:
    joined = kept.join("alice")
    assert joined == (1, joined.key, INTERVAL, 2 * INTERVAL, None, {}, 100, 0)
    assert kept.join("bob") == joined


def test_times_are_seconds_left(kept: Desk) -> None:
    kept.now += 100
    joined = kept.join("alice")
    assert (joined.renew, joined.expires) == (INTERVAL - 100, 2 * INTERVAL - 100)


def test_keys_are_replaced_in_time_and_the_last_one_closes_after_30_s(kept: Desk) -> None:
    first = kept.join("alice")
    assert kept.keeper.next_rotation() == kept.now + INTERVAL
    kept.now += INTERVAL - 1
    assert kept.rotate() == ([], [])
    assert kept.join("alice").epoch == 1
    kept.now += 1
    assert kept.rotate() == ([], [])  # members ask by themselves, not all at the same time
    second = kept.join("alice")
    assert (second.epoch, second.previous) == (2, (1, first.key, 30))
    assert second.key != first.key
    kept.now += 29.5
    assert kept.keeper.next_rotation() == kept.now + 0.5
    assert kept.join("alice").previous == (1, first.key, 0.5)
    kept.now += 0.5
    assert kept.join("alice").previous is None
    kept.rotate()
    assert kept.keeper.next_rotation() == kept.now - 30 + INTERVAL


def test_a_key_is_replaced_for_who_asks_before_the_keeper_has_noticed(kept: Desk) -> None:
    kept.now += INTERVAL
    joined = kept.join("alice")
    assert (joined.epoch, joined.renew) == (2, INTERVAL)
    assert joined.previous


def test_with_a_short_interval_the_last_key_closes_when_it_expires(tmp_path: Path) -> None:
    desk = Desk(tmp_path / "topics.db", COURSE.authority, interval=5)
    desk.ask("alice", "create", T, [], 0)
    desk.now += 6
    previous = desk.join("alice").previous
    assert previous
    assert (previous.epoch, previous.expires) == (1, 4)
    desk.now += 5
    previous = desk.join("alice").previous
    assert previous
    assert (previous.epoch, previous.expires) == (2, 5)
    desk.close()


def test_a_removal_replaces_the_key_at_once_and_tells_the_others(kept: Desk) -> None:
    first = kept.join("alice")
    kept.ask("alice", "remove", T, ["bob"])
    assert kept.effects == ([], [(T, make_notice(2))])
    second = kept.join("alice")
    assert (second.epoch, second.previous) == (2, None)
    assert second.key != first.key


def test_a_removal_closes_the_epoch_before_the_last_one_too(kept: Desk) -> None:
    kept.now += INTERVAL
    kept.rotate()
    kept.ask("alice", "remove", T, ["bob"])
    joined = kept.join("alice")
    assert (joined.epoch, joined.previous) == (3, None)


def test_who_is_removed_gets_no_later_key(kept: Desk) -> None:
    kept.ask("alice", "remove", T, ["bob"])
    for do, *values in ("join", None), ("history", 0), ("sender", bytes(16)):
        assert refusal(kept, "bob", do, T, *values) == NO_TOPIC


def test_many_topics_are_renewed_a_hundred_at_a_time(desk: Desk) -> None:
    with desk.keeper.batch():
        for number in range(250):
            request = write_request("create", f"t/{number}", [], 0)
            assert desk.keeper.answer(f"owner{number // 100}", request) == b"{}"
    desk.now += INTERVAL
    for _ in range(3):
        assert desk.keeper.next_rotation() <= desk.now
        desk.rotate()
    assert desk.keeper.next_rotation() == desk.now + 30
    query = "SELECT count(*) FROM topics WHERE epoch = 2"
    assert desk.store.database.value(query) == 250


def test_used_up_epochs_end_a_topic_and_harm_no_other(desk: Desk) -> None:
    desk.ask("alice", "create", T, ["bob"], 0)
    desk.ask("alice", "create", "other", ["bob"], 0)
    with desk.keeper.batch():
        for table in "topics", "epochs":
            desk.store.database.execute(
                f"UPDATE {table} SET epoch = ? WHERE {'id' if table == 'topics' else 'topic'} = 1",
                2**32 - 1,
            )
    assert desk.join("alice").epoch == 2**32 - 1
    assert "its epochs are used up" in refusal(desk, "alice", "remove", T, ["bob"])
    assert desk.ask("bob", "list")[0].members == ["alice", "bob"]
    desk.now += INTERVAL
    desk.rotate()
    assert "its epochs are used up" in refusal(desk, "alice", "join", T, None)
    assert desk.join("alice", "other").epoch == 2
    assert desk.keeper.next_rotation() > desk.now
    desk.ask("alice", "delete", T)


# --- sessions ----------------------------------------------------------------------------------


def test_a_session_is_introduced_to_all_members(kept: Desk) -> None:
    session = ALICE.session(T)
    assert "nobody has introduced" in refusal(kept, "bob", "sender", T, session.session)
    kept.join("alice", hello=session.hello)
    assert kept.ask("bob", "sender", T, session.session) == session.hello


EXPIRED = COURSE.member("alice", begins=NOW - 3 * HOUR, ends=NOW - HOUR)


@pytest.mark.parametrize(
    ("session", "words"),
    [
        (ALICE.session("other"), "its signature does not match"),
        (ALICE.session(T, keeper="other"), "its signature does not match"),
        (BOB.session(T, "alice"), "signed by 'bob', expected 'alice'"),
        (BOB.session(T), "introduces another member"),
        (STRANGERS.member("alice").session(T), "from an unknown authority"),
        (EXPIRED.session(T), "has expired"),
    ],
    ids=["topic", "keeper", "name", "another's", "authority", "expired"],
)
def test_a_hello_that_does_not_introduce_the_asker_is_refused(
    kept: Desk, session: Session, words: str
) -> None:
    assert words in refusal(kept, "alice", "join", T, session.hello)
    assert "nobody has introduced" in refusal(kept, "bob", "sender", T, session.session)


def test_a_hello_is_verified_anew_in_each_epoch(kept: Desk) -> None:
    session = ALICE.session(T)
    kept.join("alice", hello=session.hello)
    kept.keeper.authority = STRANGERS.authority
    kept.join("alice", hello=session.hello)
    kept.now += INTERVAL
    assert "unknown authority" in refusal(kept, "alice", "join", T, session.hello)


# --- messages ----------------------------------------------------------------------------------


class Voice:
    """A member's session, by the second implementation, with the keys that the keeper gave it."""

    def __init__(self, desk: Desk, member: Any = ALICE, topic: str = T) -> None:
        self.desk, self.topic, self.member = desk, topic, member
        self.session = member.session(topic)
        self.joined = self.join()

    def join(self) -> Joined:
        self.joined = self.desk.join(self.member.name, self.topic, self.session.hello)
        return self.joined

    def payload(self, counter: int, data: bytes = b"21.5", **changes: Any) -> bytes:
        values = {"epoch": self.joined.epoch, "key": self.joined.key, "by": self.session}
        return seal_message(
            self.topic, **{**values, **changes}, counter=counter, time=TIME, data=data
        )

    def say(self, counter: int, data: bytes = b"21.5", **changes: Any) -> bool:
        """Publish a message; return whether the keeper keeps it."""
        return self.desk.take(self.payload(counter, data, **changes), self.topic)


def test_what_is_published_is_kept_unchanged_and_in_order(kept: Desk) -> None:
    alice, bob = Voice(kept), Voice(kept, BOB)
    payloads = [alice.payload(0), bob.payload(0), alice.payload(1)]
    assert all(kept.take(payload) for payload in payloads)
    page = kept.page()
    assert page.messages == [*enumerate(payloads, start=1)]
    assert page == (page.messages, {1: alice.joined.key}, False)
    assert kept.join("bob").number == 3


def test_the_history_begins_after_a_number_or_with_the_last(kept: Desk) -> None:
    alice = Voice(kept)
    for counter in range(5):
        alice.say(counter)
    for after, numbers in (
        *((0, [1, 2, 3, 4, 5]), (3, [4, 5]), (5, []), (99, [])),
        *((-2, [4, 5]), (-5, [1, 2, 3, 4, 5]), (-99, [1, 2, 3, 4, 5])),
    ):
        assert [message.number for message in kept.page(after).messages] == numbers


def test_an_answer_has_64_kib_of_messages_or_one(kept: Desk) -> None:
    alice = Voice(kept)
    for counter in range(4):
        alice.say(counter, bytes(30_000))
    alice.say(4, bytes(MAX_DATA_SIZE))
    alice.say(5)
    pages = [kept.page(0), kept.page(2), kept.page(4), kept.page(5)]
    numbers = [[message.number for message in page.messages] for page in pages]
    assert numbers == [[1, 2], [3, 4], [5], [6]]
    assert [page.more for page in pages] == [True, True, True, False]


def test_the_history_names_the_keys_of_its_epochs(kept: Desk) -> None:
    alice = Voice(kept)
    keys = {}
    for counter in range(3):
        alice.join()
        keys[counter + 1] = alice.joined.key
        assert alice.say(counter)
        kept.now += INTERVAL
    assert kept.page().keys == keys
    assert kept.page(1).keys == {2: keys[2], 3: keys[3]}


def test_a_history_that_is_full_loses_its_oldest_and_their_keys(desk: Desk) -> None:
    desk.ask("alice", "create", T, [], 2)
    alice = Voice(desk)
    for counter in range(4):
        alice.join()
        alice.say(counter)
        desk.now += INTERVAL
    page = desk.page()
    assert [message.number for message in page.messages] == [3, 4]
    assert set(page.keys) == {3, 4}
    desk.rotate()
    desk.now += 30
    desk.rotate()
    epochs = desk.store.database.execute("SELECT epoch FROM epochs ORDER BY epoch").fetchall()
    assert epochs == [(3,), (4,), (5,)]
    assert desk.ask("alice", "sender", T, alice.session.session) == alice.session.hello


def test_a_session_is_forgotten_when_nothing_of_it_is_kept(desk: Desk) -> None:
    desk.ask("alice", "create", T, ["bob"], 1)
    alice, bob = Voice(desk), Voice(desk, BOB)
    alice.say(0)
    for _ in range(2):
        desk.now += INTERVAL
        desk.rotate()
    assert desk.ask("alice", "sender", T, alice.session.session) == alice.session.hello
    assert "nobody has" in refusal(desk, "alice", "sender", T, bob.session.session)
    bob.join()
    bob.say(0)
    desk.now += INTERVAL
    desk.rotate()
    assert "nobody has" in refusal(desk, "alice", "sender", T, alice.session.session)


def test_nothing_is_kept_of_a_topic_without_history(desk: Desk) -> None:
    desk.ask("alice", "create", T, [], 0)
    assert desk.effects == ([], [])
    assert not Voice(desk).say(0)
    assert desk.page() == ([], {}, False)
    assert not desk.take(seal_message("x", 1, bytes(32), ALICE.session("x"), 0, TIME, b""), "x")


def test_what_came_before_is_not_kept_again(kept: Desk) -> None:
    alice = Voice(kept)
    assert [alice.say(counter) for counter in (0, 0, 3, 2, 3, 4)] == [
        *(True, False, True, False, False, True)
    ]
    assert len(kept.page().messages) == 3


def test_hellos_and_notices_are_not_kept(kept: Desk) -> None:
    alice = Voice(kept)
    hello = reference_topics.seal_hello(T, 1, alice.joined.key, alice.session.hello, bytes(12))
    assert not kept.take(hello)
    assert not kept.take(reference_topics.notice(1))


def test_what_no_member_has_published_is_not_kept(kept: Desk) -> None:
    alice, bob = Voice(kept), Voice(kept, BOB)
    payload = alice.payload(0)
    bad = {
        "forged": bob.payload(0, session=alice.session.session),
        "another key": alice.payload(0, key=bytes(32)),
        "another epoch": alice.payload(0, epoch=2),
        "no session": alice.payload(0, by=ALICE.session(T)),
        "changed": payload[:-1] + bytes([payload[-1] ^ 1]),
        "cut": payload[:-1],
        "too large": alice.payload(0, bytes(MAX_DATA_SIZE + 1)),
        "a counter beyond all": alice.payload(2**63),
        "nothing": b"",
    }
    for each in bad.values():
        with pytest.raises(CryptoError):
            kept.take(each)
    assert kept.page().messages == []
    assert kept.take(payload)


def test_messages_of_another_topic_are_not_kept(kept: Desk) -> None:
    kept.ask("alice", "create", "other", [], 100)
    other = Voice(kept, topic="other")
    with pytest.raises(MessageError):
        kept.take(other.payload(0), T)
    assert kept.take(other.payload(0), "other")


def test_messages_are_kept_in_the_current_epoch_and_30_s_in_the_last(kept: Desk) -> None:
    alice = Voice(kept)
    first = alice.joined
    kept.now += INTERVAL
    alice.join()
    assert alice.say(0, epoch=1, key=first.key)
    assert alice.say(1)
    kept.now += 30
    with pytest.raises(MessageError, match="no longer"):
        alice.say(2, epoch=1, key=first.key)
    assert alice.say(2)


def test_messages_are_not_kept_in_an_epoch_that_a_removal_has_closed(kept: Desk) -> None:
    bob, alice = Voice(kept, BOB), Voice(kept)
    kept.ask("alice", "remove", T, ["bob"])
    for voice in alice, bob:
        with pytest.raises(MessageError):
            voice.say(0)
    alice.join()
    assert alice.say(0)
    with pytest.raises(MessageError):  # even if another member has told bob the new key
        bob.say(0, epoch=2, key=alice.joined.key)


def test_a_session_has_to_be_introduced_in_each_epoch(kept: Desk) -> None:
    alice = Voice(kept)
    kept.now += INTERVAL
    joined = kept.join("alice")
    with pytest.raises(MessageError, match="session"):
        alice.say(0, epoch=2, key=joined.key)
    alice.join()
    assert alice.say(0)


def test_counters_tell_how_far_each_session_is_kept_in_the_last_two_epochs(kept: Desk) -> None:
    alice, bob = Voice(kept), Voice(kept, BOB)
    assert alice.join().counters == {}
    alice.say(3)
    bob.say(0)
    both = {alice.session.session: 3, bob.session.session: 0}
    assert kept.join("bob").counters == both
    kept.now += INTERVAL
    assert kept.join("bob").counters == both
    bob.join()
    kept.now += INTERVAL
    assert kept.join("bob").counters == {bob.session.session: 0}
    assert alice.join().counters == both


def test_who_asks_learns_its_own_counter_however_many_there_are(kept: Desk) -> None:
    alice = Voice(kept)
    alice.say(7)
    with kept.keeper.batch():
        for number in range(1_100):
            kept.store.database.execute(
                "INSERT INTO sessions VALUES (1, ?, 'bob', '', 1, 5, ?)",
                *(number.to_bytes(16, "big"), 10 + number),
            )
    counters = alice.join().counters
    assert len(counters) == 1_001
    assert counters[alice.session.session] == 7
    assert len(kept.join("bob").counters) == 1_000


# --- starting again ----------------------------------------------------------------------------


def test_a_keeper_that_starts_again_knows_all_that_it_knew(kept: Desk) -> None:
    alice = Voice(kept)
    alice.say(0)
    before = kept.join("bob"), kept.page(), kept.ask("bob", "list")
    kept.close()
    kept.open()
    assert (kept.join("bob"), kept.page(), kept.ask("bob", "list")) == before
    assert alice.say(1)


def test_a_keeper_that_was_away_for_too_long_has_lost_the_key(kept: Desk) -> None:
    first = kept.join("alice")
    kept.close()
    kept.now += 2 * INTERVAL
    kept.open()
    assert kept.rotate().notices == [(T, make_notice(2))]
    second = kept.join("alice")
    assert (second.epoch, second.previous) == (2, None)
    assert second.key != first.key


def test_a_keeper_whose_clock_was_turned_back_begins_a_new_epoch(kept: Desk) -> None:
    kept.close()
    kept.now -= 100_000
    kept.open()
    kept.rotate()
    joined = kept.join("alice")
    assert (joined.epoch, joined.renew, joined.previous) == (2, INTERVAL, None)


def test_another_interval_holds_for_the_epochs_that_there_are(kept: Desk) -> None:
    kept.now += 10
    kept.close()
    kept.open(interval=60)
    joined = kept.join("alice")
    assert (joined.epoch, joined.renew, joined.expires) == (1, 50, 110)
    kept.close()
    kept.open(interval=5)
    kept.rotate()
    assert kept.join("alice").epoch == 2


def test_a_keeper_that_was_not_listening_has_publishers_ask_how_far_it_got(desk: Desk) -> None:
    desk.ask("alice", "create", T, ["bob"], 100)
    assert desk.effects.subscriptions == [(T, True)]
    for topic in "idle", "unkept":
        desk.ask("alice", "create", topic, [], 100 if topic == "idle" else 0)
    alice, unkept = Voice(desk), Voice(desk, topic="unkept")
    alice.say(0)
    desk.close()
    desk.open()
    assert desk.catch_up() == [T, "idle"]
    with pytest.raises(MessageError):  # or it would have a gap for ever
        alice.say(5)
    assert desk.rotate().notices == [(T, make_notice(2))]
    assert alice.join().counters == {alice.session.session: 0}
    assert [alice.say(counter) for counter in (1, 2)] == [True, True]
    assert unkept.join().epoch == desk.join("alice", "idle").epoch == 1


def test_a_batch_that_fails_leaves_no_trace(kept: Desk) -> None:
    alice = Voice(kept)

    def attempt() -> None:
        with kept.keeper.batch():
            assert kept.keeper.take(T, alice.payload(0))
            kept.keeper.answer("alice", write_request("remove", T, ["bob"]))
            kept.keeper.answer("alice", write_request("create", "other", [], 1))
            raise ConnectionError

    with pytest.raises(ConnectionError):
        attempt()
    assert kept.join("bob").number == 0
    assert kept.effects == ([], [])
    assert alice.say(0)
    assert [shared.topic for shared in kept.ask("alice", "list")] == [T]


# --- whatever comes ----------------------------------------------------------------------------

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([T, "bob", "join"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)
fields = st.sampled_from(["do", "topic", "members", "history", "hello", "session", "after"])
requests = st.dictionaries(fields, values).map(lambda value: json.dumps(value).encode())


@given(st.sampled_from(["alice", "bob", "mallory"]), st.one_of(requests, st.binary()))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_is_asked_is_answered_in_json(kept: Desk, netid: str, request: bytes) -> None:
    with kept.keeper.batch():
        answer = json.loads(kept.keeper.answer(netid, request))
    assert "error" in answer
    assert kept.ask("bob", "list")[0].members == ["alice", "bob"]


MEASURE = f"""
import os, resource, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from members import INTERVAL, KEEPER, TOPIC, Certifier, Desk
from secure_mqtt.topics.keeper import Keeper
from secure_mqtt.topics.requests import write_request
from secure_mqtt.topics.store import Store

def memory():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

now = 1e9
keeper = Keeper(Store(sys.argv[1]), Certifier().authority, KEEPER, lambda: now, 3600.0)
before = memory()
for owner in range(100):
    with keeper.batch():
        for number in range(100):
            members = [f"m{{owner}}x{{number}}x{{each}}" for each in range(10)]
            create = write_request("create", f"topics/{{owner}}/{{number}}", members, 100)
            assert keeper.answer(f"owner{{owner}}", create) == b"{{}}"
now += 3600
while keeper.next_rotation() <= now:
    with keeper.batch():
        keeper.rotate()
for number in range(1000):
    with keeper.batch():
        answer = keeper.answer("m7x7x7", write_request("join", "topics/7/7", None))
        assert b"error" not in answer
print(memory() - before)
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory is read from /proc")
def test_10_000_topics_of_10_members_take_at_most_20_mb(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "topics.db")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=2 * SAFETY)
    assert result.stderr == ""
    assert int(result.stdout) < 20e6


def test_the_bounds_are_those_that_are_documented() -> None:
    assert keeper_module.MAX_TOPICS == 10_000
    assert keeper_module.MAX_TOPICS_OF_OWNER == 100
    assert keeper_module.MAX_SESSIONS == 64
