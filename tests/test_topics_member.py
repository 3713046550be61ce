"""What members publish, and what they show: each message once and in order, or it is missed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import reference_topics
from conftest import ROOT, SAFETY
from members import TOPIC, Certifier
from reference_topics import Session, seal_message
from topics_world import INTERVAL, Reader, World, Writer

from secure_mqtt.errors import ProgramError
from secure_mqtt.topics import publisher
from secure_mqtt.topics.messages import HELLO, MAX_DATA_SIZE, MESSAGE, make_notice, read_head
from secure_mqtt.topics.order import MAX_WAITING, MAX_WAITING_BYTES, Order, Received, Room

COURSE = Certifier()


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    """A topic whose messages are kept."""
    world = World(tmp_path / "topics.db", COURSE, history=1000)
    yield world
    world.close()


@pytest.fixture
def brief_world(tmp_path: Path) -> Iterator[World]:
    """A topic whose messages are not kept."""
    world = World(tmp_path / "topics.db", COURSE, history=0)
    yield world
    world.close()


def test_who_subscribes_gets_what_is_published(world: World) -> None:
    alice, bob = world.writer("alice"), world.reader("bob")
    world.flow()
    alice.write(b"one")
    alice.write(b"two")
    world.flow()
    assert alice.is_done
    time = int(world.now * 1000)
    assert bob.shown == [(TOPIC, "alice", time, b"one"), (TOPIC, "alice", time, b"two")]
    assert (bob.missed, bob.faults) == ([], {})


def test_who_comes_later_gets_the_earlier_messages_first_and_each_once(world: World) -> None:
    alice = world.writer("alice")
    for text in b"one", b"two":
        alice.write(text)
    world.flow()
    bob = world.reader("bob")
    alice.write(b"three")
    alice.reach_broker()
    bob.receive()
    assert bob.shown == []  # it waits for those before
    world.flow()
    assert bob.texts == [b"one", b"two", b"three"]
    assert (bob.missed, bob.faults) == ([], {})


@pytest.mark.parametrize(("earlier", "texts"), [(0, []), (1, [b"2"]), (9, [b"0", b"1", b"2"])])
def test_a_subscriber_gets_as_many_earlier_messages_as_it_wants(
    world: World, earlier: int, texts: list[bytes]
) -> None:
    alice = world.writer("alice")
    for number in range(3):
        alice.write(b"%d" % number)
    world.flow()
    bob = world.reader("bob", earlier)
    world.flow()
    alice.write(b"new")
    world.flow()
    assert bob.texts == [*texts, b"new"]
    assert (bob.missed, bob.faults) == ([], {})


def said(*numbers: int) -> list[bytes]:
    return [b"%d" % number for number in numbers]


def say(writer: Writer, *numbers: int) -> None:
    for text in said(*numbers):
        writer.write(text)


def current(world: World) -> tuple[str, int, bytes]:
    """Return the topic, and the number and key of its epoch."""
    joined = world.desk.join("alice")
    return TOPIC, joined.epoch, joined.key


# --- lost connections --------------------------------------------------------------------------


def test_what_a_subscriber_has_missed_comes_from_the_keeper(world: World) -> None:
    alice, bob = world.writer("alice"), world.reader("bob")
    say(alice, 0)
    world.flow()
    say(alice, 1, 2)
    while alice.reach_broker():
        pass
    bob.lose_connection()
    world.settle()
    assert bob.texts == said(0, 1, 2)
    assert (bob.missed, bob.faults) == ([], {})


def test_what_nobody_keeps_is_missed_and_said(brief_world: World) -> None:
    world = brief_world
    alice, bob = world.writer("alice"), world.reader("bob")
    say(alice, 0)
    world.flow()
    say(alice, 1, 2)
    while alice.reach_broker():
        pass
    bob.lose_connection()
    say(alice, 3)
    world.flow()
    assert bob.texts == said(0, 3)
    assert bob.missed == [("alice", 2)]
    assert {ask.do for ask in bob.asked} == {"join"}


@pytest.mark.parametrize("history", [0, 1000])
def test_what_the_broker_has_not_acknowledged_is_published_again_with_the_same_bytes(
    tmp_path: Path, history: int
) -> None:
    world = World(tmp_path / "topics.db", COURSE, history)
    alice, bob = world.writer("alice"), world.reader("bob")
    say(alice, 0)
    world.flow()
    say(alice, 1, 2, 3)
    lost = [payload for payload, _ in alice.under_way]
    alice.reach_broker()  # which does so, but its acknowledgement is lost
    alice.lose_connection()
    world.settle()
    assert alice.is_done
    assert bob.texts == said(0, 1, 2, 3)
    assert (bob.missed, bob.faults) == ([], {})
    again = world.published[-4:] if not history else world.published[-3:]
    assert read_head(again[0]).kind == HELLO
    assert again[1:] == lost if not history else lost[1:]  # the keeper has the first
    world.close()


def test_a_publisher_asks_before_it_publishes_on_after_a_lost_connection(world: World) -> None:
    alice = world.writer("alice")
    world.flow()
    alice.lose_connection()
    world.is_keeper_up = False
    say(alice, 0)
    world.flow()
    assert not alice.under_way
    world.is_keeper_up = True
    world.settle()
    assert alice.is_done


def test_what_the_keeper_lacks_is_published_again_even_if_the_broker_has_it(world: World) -> None:
    alice = world.writer("alice")
    say(alice, 0, 1)
    world.flow()
    say(alice, 2, 3)
    while alice.reach_broker() or alice.be_acknowledged():
        pass
    assert alice.is_done
    world.kill_keeper()  # before it has taken them
    world.settle()
    assert len(world.desk.page().messages) == 4
    bob = world.reader("bob")
    world.flow()
    assert bob.texts == said(0, 1, 2, 3)


# --- gaps --------------------------------------------------------------------------------------


def lose_one(writer: Writer, reader: Reader, number: int) -> None:
    """Publish something that does not reach a subscriber."""
    say(writer, number)
    while writer.reach_broker():
        pass
    reader.inbox.pop()


def test_a_message_that_was_held_back_from_a_subscriber_is_asked_for(world: World) -> None:
    alice, carol, bob = world.writer("alice"), world.writer("carol"), world.reader("bob")
    say(alice, 0)
    say(carol, 100)
    world.flow()
    world.wait(1)
    lose_one(alice, bob, 1)
    say(alice, 2, 3)
    say(carol, 101)
    while alice.reach_broker() or carol.reach_broker():
        pass
    while bob.receive():
        pass
    assert sorted(bob.texts) == said(0, 100, 101)  # carol's does not wait
    assert bob.asks[-1].do == "history"
    world.settle()
    assert sorted(bob.texts) == said(0, 1, 100, 101, 2, 3)
    assert [text for text in bob.texts if len(text) == 1] == said(0, 1, 2, 3)
    assert (bob.missed, bob.faults) == ([], {})


def test_a_message_that_the_keeper_lacks_too_is_asked_for_three_times_and_missed(
    world: World,
) -> None:
    alice, bob = world.writer("alice"), world.reader("bob")
    say(alice, 0)
    world.flow()
    world.wait(1)
    lose_one(alice, bob, 1)
    world.inbox.pop()
    lose_one(alice, bob, 2)
    world.inbox.pop()
    say(alice, 3)
    alice.reach_broker()
    world.inbox.pop()  # else it is plain that the keeper has not got those before it either
    begin, before = world.now, len(bob.asked)
    while not bob.missed and world.now < begin + 10:
        assert bob.texts == said(0)
        world.flow()
        world.wait(0.25)
    assert bob.missed == [("alice", 2)]
    assert bob.texts == said(0, 3)
    assert {ask.do for ask in bob.asked[before:]} == {"history"}
    assert [time - begin for time in bob.asked_at[before:]] == [0, 1, 3]


def test_what_is_missing_before_a_message_that_the_keeper_has_is_not_asked_for_again(
    world: World,
) -> None:
    alice, bob = world.writer("alice"), world.reader("bob")
    say(alice, 0)
    world.flow()
    world.wait(1)
    lose_one(alice, bob, 1)
    world.inbox.pop()
    say(alice, 2)
    alice.reach_broker()
    world.keep()
    world.flow()
    assert bob.texts == said(0, 2)
    assert bob.missed == [("alice", 1)]


def test_a_message_that_waits_for_a_keeper_that_is_away_is_shown_in_the_end(world: World) -> None:
    alice, bob = world.writer("alice"), world.reader("bob")
    say(alice, 0)
    world.flow()
    world.is_keeper_up = False
    lose_one(alice, bob, 1)
    say(alice, 2)
    for _ in range(29):
        world.flow()
        world.wait(1)
        assert bob.texts == said(0)
    world.flow()
    world.wait(1)
    assert bob.texts == said(0, 2)
    assert bob.missed == [("alice", 1)]


def reader_of_a_reversal(world: World) -> Reader:
    """Return who has subscribed to messages of which the last three came in reverse."""
    alice, bob = world.writer("alice"), world.reader("bob")
    say(alice, 0)
    world.flow()
    say(alice, 1, 2, 3)
    while alice.reach_broker():
        pass
    bob.inbox.reverse()
    world.flow()
    return bob


def test_messages_out_of_order_are_shown_in_order(world: World) -> None:
    bob = reader_of_a_reversal(world)
    assert bob.texts == said(0, 1, 2, 3)
    assert bob.missed == []


def test_messages_out_of_order_that_nobody_keeps_are_missed(brief_world: World) -> None:
    bob = reader_of_a_reversal(brief_world)
    assert bob.texts == said(0, 3)
    assert bob.missed == [("alice", 2)]


def test_the_first_message_of_a_session_that_was_published_before_is_no_gap(
    brief_world: World,
) -> None:
    alice = brief_world.writer("alice")
    say(alice, 0, 1)
    brief_world.flow()
    bob = brief_world.reader("bob")
    brief_world.flow()
    say(alice, 2)
    brief_world.flow()
    assert bob.texts == said(2)
    assert bob.missed == []


def test_the_first_messages_of_a_session_that_were_held_back_are_asked_for(world: World) -> None:
    bob = world.reader("bob")
    world.flow()
    alice = world.writer("alice")
    alice.be_answered()
    say(alice, 0)
    while alice.reach_broker():
        pass
    bob.inbox.clear()
    say(alice, 1)
    world.settle()
    assert bob.texts == said(0, 1)
    assert bob.missed == []


# --- what the broker does ----------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 2**20])
def test_what_waits_to_be_shown_has_bounds_in_number_and_size(size: int) -> None:
    order = Order(lambda: 0.0, Room())
    most = min(MAX_WAITING, MAX_WAITING_BYTES // size if size else MAX_WAITING)
    for counter in range(most):
        assert order.has_room()
        order.take(b"session", counter, Received(TOPIC, "alice", 0, bytes(size)))
    assert not order.has_room()
    order.shown()
    assert order.has_room()
    assert len(order.received) == most - 1


def test_what_is_replayed_is_not_shown_again_and_nobody_is_asked(world: World) -> None:
    alice, bob, carol = world.writer("alice"), world.reader("bob"), world.writer("carol")
    say(alice, 0, 1)
    say(carol, 7)
    world.flow()
    before, asked = len(bob.shown), len(bob.asked)
    for payload in world.published * 3:
        bob.take(payload)
        world.inbox.append(payload)
    world.flow()
    assert (len(bob.shown), len(bob.asked)) == (before, asked)
    assert (bob.missed, bob.faults) == ([], {})
    assert len(world.desk.page().messages) == 3


def test_what_was_shown_in_one_epoch_is_not_shown_in_the_next_one(world: World) -> None:
    alice, bob = world.writer("alice"), world.reader("bob")
    say(alice, 0, 1)
    world.flow()
    replayed = [*world.published]
    world.wait(INTERVAL)
    say(alice, 2)
    world.flow()
    for payload in replayed:
        bob.take(payload)
    assert bob.texts == said(0, 1, 2)
    world.wait(31)
    for payload in replayed:
        bob.take(payload)
    assert bob.texts == said(0, 1, 2)
    assert bob.faults == {"of an epoch that is over": len(replayed)}


@pytest.mark.parametrize("change", ["cut", "flipped", "another topic's", "another epoch's"])
def test_what_was_changed_is_refused_and_counted(world: World, change: str) -> None:
    alice, bob = world.writer("alice"), world.reader("bob")
    say(alice, 0)
    world.flow()
    say(alice, 1)
    [(payload, _)] = alice.under_way
    world.desk.ask("alice", "create", "other", [], 0)
    joined = world.desk.join("alice", "other")
    session = COURSE.member("alice").session("other")
    changed = {
        "cut": payload[:-1],
        "flipped": payload[:-1] + bytes([payload[-1] ^ 1]),
        "another topic's": seal_message("other", joined.epoch, joined.key, session, 0, 0, b"x"),
        "another epoch's": payload[:1] + b"\0\0\0\0" + payload[5:],
    }
    bob.take(changed[change])
    assert sum(bob.faults.values()) == 1
    world.flow()
    assert bob.texts == said(0, 1)
    assert {ask.do for ask in bob.asked} == {"join", "history"}


@pytest.mark.parametrize("payload", [make_notice(9), b"\x01\0\0\0\x09" + bytes(200)])
def test_a_flood_of_notices_or_unknown_epochs_has_the_keeper_asked_once_a_second(
    world: World, payload: bytes
) -> None:
    alice, bob = world.writer("alice"), world.reader("bob")
    world.flow()
    world.wait(1)
    before = len(bob.asked)
    for _ in range(50):
        for _ in range(20):
            bob.take(payload)
        world.flow()
        world.wait(0.1)
    assert 4 <= len(bob.asked) - before <= 6
    say(alice, 0)
    world.flow()
    assert bob.texts == said(0)
    world.settle()
    kept = 0 if read_head(payload).kind != MESSAGE else 1000
    assert bob.faults.get("of an epoch that the keeper does not know", 0) == kept


def test_what_is_held_back_has_bounds(world: World) -> None:
    bob = world.reader("bob")
    world.is_keeper_up = False
    world.flow()
    large = b"\x01\0\0\0\x01" + bytes(2**20)
    for _ in range(20):
        bob.take(large)
    assert bob.faults == {"too many at a time": 5}  # 16 MiB
    small = b"\x01\0\0\0\x01" + bytes(112)
    bob = world.reader("bob")
    for _ in range(10_100):
        bob.take(small)
    assert bob.faults == {"too many at a time": 100}


def test_an_answer_that_was_held_back_gives_no_key_that_has_expired(world: World) -> None:
    bob = world.reader("bob")
    world.desk.now += 2 * INTERVAL  # while the questions are on their way
    ask, joined = bob.asks.popleft(), world.desk.join("bob")
    world.desk.now += 2 * INTERVAL
    bob.subscriber.answered(ask, joined)
    assert bob.keys.number == 2
    assert bob.keys.current is None


# --- who publishes -----------------------------------------------------------------------------


def test_a_sender_whose_hello_was_lost_is_asked_for_once(world: World) -> None:
    alice, bob = world.writer("alice"), world.reader("bob")
    world.flow()
    say(alice, 0, 1)
    while alice.reach_broker():
        pass
    assert read_head(bob.inbox.popleft()).kind == HELLO
    world.flow()
    assert bob.texts == said(0, 1)
    assert [ask.do for ask in bob.asked].count("sender") == 1


def test_only_what_a_member_has_sealed_makes_a_subscriber_ask_for_its_sender(world: World) -> None:
    bob = world.reader("bob")
    world.flow()
    for number in range(100):
        session = number.to_bytes(16, "big")
        bob.take(b"\x01\0\0\0\x01" + session + bytes(8) + bytes(88))
    world.flow()
    assert {ask.do for ask in bob.asked} == {"join", "history"}
    assert bob.faults == {"not encrypted with the topic's key": 100}


def test_a_session_that_nobody_has_introduced_is_not_shown(world: World) -> None:
    bob = world.reader("bob")
    world.flow()
    unknown = COURSE.member("alice").session(TOPIC)
    for counter in range(3):
        bob.take(seal_message(*current(world), unknown, counter, 0, b"x"))
        world.flow()
    assert bob.shown == []
    assert bob.faults == {"of a session that nobody has introduced": 3}
    assert [ask.do for ask in bob.asked].count("sender") == 1


def test_a_hello_that_comes_after_the_keeper_knew_of_none_is_believed(world: World) -> None:
    bob = world.reader("bob")
    world.flow()
    carol = COURSE.member("carol").session(TOPIC)
    bob.take(seal_message(*current(world), carol, 0, 0, b"x"))
    world.flow()
    bob.take(hello_payload(world, carol))
    bob.take(seal_message(*current(world), carol, 1, 0, b"y"))
    world.settle()
    assert b"y" in bob.texts


def hello_payload(world: World, session: Session) -> bytes:
    return reference_topics.seal_hello(*current(world), session.hello, bytes(12))


def test_a_member_cannot_pose_as_another(world: World) -> None:
    alice, bob = world.writer("alice"), world.reader("bob")
    say(alice, 0)
    world.flow()
    topic = current(world)
    mallory = COURSE.member("carol").session(TOPIC)
    posing = COURSE.member("carol").session(TOPIC, "alice")
    bob.take(hello_payload(world, posing))
    bob.take(seal_message(*topic, posing, 0, 0, b"x"))
    bob.take(seal_message(*topic, mallory, 1, 0, b"x", session=alice.session))
    say(alice, 1)
    world.flow()
    assert bob.texts == said(0, 1)
    assert bob.faults == {
        "signed by 'carol', expected 'alice'": 1,
        "of a session that nobody has introduced": 1,
        "forged: its signature does not match": 1,
    }


def test_a_member_cannot_turn_its_counter_back(world: World) -> None:
    bob = world.reader("bob")
    world.flow()
    carol = COURSE.member("carol").session(TOPIC)
    bob.take(hello_payload(world, carol))
    for counter, text in (0, b"a"), (1, b"b"), (0, b"c"), (1, b"d"), (2, b"e"):
        bob.take(seal_message(*current(world), carol, counter, 0, text))
    assert bob.texts == [b"a", b"b", b"e"]


def test_hellos_of_more_than_64_sessions_are_believed_only_if_the_keeper_confirms_them(
    world: World,
) -> None:
    bob = world.reader("bob")
    world.flow()
    sessions = [COURSE.member("carol").session(TOPIC) for _ in range(66)]
    for session in sessions:
        bob.take(hello_payload(world, session))
    assert bob.faults == {"more than 64 sessions of a member": 2}
    world.desk.join("carol", hello=sessions[64].hello)
    for session in sessions[63:]:
        bob.take(seal_message(*current(world), session, 0, 0, session.session))
    world.flow()
    assert bob.texts == [session.session for session in sessions[63:65]]


def test_a_flood_of_the_same_hello_is_verified_once(world: World) -> None:
    bob = world.reader("bob")
    world.flow()
    good = COURSE.member("carol").session(TOPIC)
    bad = COURSE.member("carol").session(TOPIC, "alice")
    for session in good, bad:
        payload = hello_payload(world, session)
        for _ in range(100):
            bob.take(payload)
    assert bob.faults == {
        "signed by 'carol', expected 'alice'": 1,
        "a hello that was refused before": 99,
    }


def test_an_impossible_time_is_not_shown(world: World) -> None:
    bob = world.reader("bob")
    world.flow()
    carol = COURSE.member("carol").session(TOPIC)
    world.desk.join("carol", hello=carol.hello)
    bob.take(seal_message(*current(world), carol, 0, 2**64 - 1, b"x"))
    assert bob.faults == {"of a time that no clock shows": 1}


# --- epochs ------------------------------------------------------------------------------------


def test_publishing_goes_on_while_keys_are_replaced(world: World) -> None:
    alice, bob = world.writer("alice"), world.reader("bob")
    world.flow()
    for number in range(40):
        say(alice, number)
        world.flow()
        world.wait(INTERVAL / 7)
    world.flow()
    assert bob.texts == said(*range(40))
    assert (bob.missed, bob.faults) == ([], {})
    kinds = [(head.epoch, head.kind) for head in map(read_head, world.published)]
    assert {epoch for epoch, _ in kinds} >= set(range(1, 6))
    assert kinds == sorted(kinds, key=lambda each: (each[0], each[1] != HELLO))


def test_what_was_under_way_in_the_last_epoch_is_shown_for_30_s(world: World) -> None:
    alice, bob = world.writer("alice"), world.reader("bob")
    say(alice, 0)
    world.flow()
    world.wait(INTERVAL - 1)
    say(alice, 1, 2)
    first, second = (payload for payload, _ in alice.under_way)
    alice.under_way.clear()
    world.wait(1)
    bob.be_answered()
    assert bob.keys.number == 2
    world.wait(29)
    bob.take(first)
    assert bob.texts == said(0, 1)
    world.wait(1)
    bob.take(second)
    assert bob.texts == said(0, 1)
    assert bob.faults == {"of an epoch that is over": 1}


def test_what_is_late_in_its_epoch_is_not_overtaken_by_what_is_in_time_in_the_next(
    world: World,
) -> None:
    """It is too late for everyone, and whoever had what follows would take nothing from before."""
    alice, bob = world.writer("alice"), world.reader("bob")
    world.flow()
    say(alice, 0, 1)
    world.wait(INTERVAL)
    alice.be_answered()
    say(alice, 2)
    world.wait(INTERVAL)
    world.settle()
    assert bob.texts == [b"0", b"1", b"2"]
    assert not bob.missed


def test_a_message_of_an_epoch_that_a_subscriber_does_not_know_waits(world: World) -> None:
    alice, bob = world.writer("alice"), world.reader("bob")
    say(alice, 0)
    world.flow()
    world.desk.now += INTERVAL
    world.rotate()
    alice.go_on()
    alice.be_answered()
    say(alice, 1)
    while alice.reach_broker():
        pass
    while bob.receive():
        pass
    assert bob.texts == said(0)
    world.flow()
    assert bob.texts == said(0, 1)
    assert bob.faults == {}


def test_after_a_removal_the_others_go_on_and_lose_nothing(world: World) -> None:
    alice, bob, carol = world.writer("alice"), world.reader("bob"), world.reader("carol")
    say(alice, 0)
    world.flow()
    say(alice, 1, 2)  # in the epoch that ends now
    world.change_members("remove", "carol")
    bob.receive()
    world.wait(1)
    world.flow()
    world.settle()
    assert bob.texts == said(0, 1, 2)
    assert (bob.missed, carol.refusal[:8]) == ([], "there is")
    say(alice, 3)
    world.settle()
    assert bob.texts == said(0, 1, 2, 3)
    assert b"3" not in carol.texts


def test_who_was_removed_publishes_nothing_that_is_shown(world: World) -> None:
    bob, carol = world.reader("bob"), world.writer("carol")
    say(carol, 0)
    world.flow()
    world.change_members("remove", "carol")
    world.wait(1)
    bob.receive()
    world.flow()
    say(carol, 1)
    world.settle()
    assert bob.texts == said(0)
    assert carol.refusal


def test_past_its_end_a_key_is_used_by_nobody(world: World) -> None:
    alice, bob = world.writer("alice"), world.reader("bob")
    say(alice, 0)
    world.flow()
    world.kill_keeper()
    say(alice, 1)
    payload = alice.under_way[-1][0]
    alice.under_way.clear()
    for _ in range(200):
        world.wait(2 * INTERVAL / 100)
        world.flow()
    say(alice, 2)
    assert not alice.under_way
    bob.take(payload)
    assert bob.texts == said(0)
    world.settle()
    assert bob.texts == said(0, 1, 2)
    assert bob.missed == []


def test_an_idle_publisher_introduces_itself_in_a_later_epoch(world: World) -> None:
    alice, bob = world.writer("alice"), world.reader("bob")
    say(alice, 0)
    world.flow()
    for _ in range(5):
        world.wait(INTERVAL)
        world.flow()
    say(alice, 1)
    world.settle()
    assert bob.texts == said(0, 1)
    assert (bob.missed, bob.faults) == ([], {})


# --- the past ----------------------------------------------------------------------------------


def test_the_past_is_judged_by_its_own_time(world: World) -> None:
    """Whose certificate has ended since was a member then; whose begins later was not yet."""
    from issuing import HOUR, NOW

    was = COURSE.member("carol", begins=NOW - 3 * HOUR, ends=NOW - HOUR)
    session = was.session(TOPIC)
    topic = current(world)
    with world.desk.keeper.batch():
        [row] = world.desk.store.database.execute("SELECT * FROM topics").fetchall()
        found = world.desk.store.topics.find(TOPIC)
        assert found
        world.desk.store.sessions.introduce(found, session.session, "carol", session.hello)
    for counter, hours in enumerate((4, 2, 0)):
        time = int((NOW - hours * HOUR).timestamp() * 1000)
        assert world.desk.take(seal_message(*topic, session, counter, time, b"%d" % hours))
    bob = world.reader("bob")
    world.flow()
    assert bob.texts == [b"2"]
    assert sum(bob.faults.values()) == 2
    assert row


def test_a_long_past_is_read_page_by_page_through_many_epochs(world: World) -> None:
    writers = [world.writer(name) for name in ("alice", "bob", "carol")]
    for number in range(300):
        writers[number % 3].write(b"%03d" % number + bytes(1000))
        world.flow()
        if number % 50 == 49:
            world.wait(INTERVAL)
    bob = world.reader("bob")
    world.flow()
    assert [int(text[:3]) for text in bob.texts] == [*range(300)]
    assert (bob.missed, bob.faults) == ([], {})
    assert [ask.do for ask in bob.asked].count("history") > 4
    assert [ask.do for ask in bob.asked].count("sender") == 3


def test_a_gap_of_a_session_in_the_past_is_said(world: World) -> None:
    alice = world.writer("alice")
    for number in range(4):
        say(alice, number)
        while alice.reach_broker() or alice.be_answered():
            pass
        if number in (1, 2):
            world.inbox.clear()
        world.flow()
    bob = world.reader("bob")
    world.flow()
    assert bob.texts == said(0, 3)
    assert bob.missed == [("alice", 2)]


def test_what_has_been_shown_is_not_read_once_more(world: World) -> None:
    alice, bob = world.writer("alice"), world.reader("bob")
    say(alice, *range(10))
    world.flow()
    world.wait(INTERVAL)
    world.flow()
    before = len(bob.asked)
    bob.lose_connection()
    world.settle()
    pages = [ask.detail for ask in bob.asked[before:] if ask.do == "history"]
    assert pages == [10]


# --- bounds of a publisher ---------------------------------------------------------------------


def test_a_publisher_takes_no_more_than_the_broker_does(world: World) -> None:
    alice = world.writer("alice")
    world.flow()
    say(alice, *range(2000))
    assert len(alice.lines) == publisher.WINDOW == 1000
    world.flow()
    for _ in range(5):
        alice.write(bytes(2**19))
    assert len(alice.lines) == 1002


def test_a_message_of_more_than_1_mib_is_not_published(world: World) -> None:
    alice, bob = world.writer("alice"), world.reader("bob")
    world.flow()
    with pytest.raises(ProgramError, match="1048577 bytes is too large"):
        alice.write(bytes(MAX_DATA_SIZE + 1))
    alice.write(bytes(MAX_DATA_SIZE))
    world.flow()
    assert bob.texts == [bytes(2**20)]


def test_a_publisher_waits_for_a_keeper_that_is_far_behind_but_not_for_ever(world: World) -> None:
    alice = world.writer("alice")
    world.flow()
    world.is_keeper_up = False

    def write(count: int) -> None:
        for number in range(count):
            say(alice, number)
            while alice.reach_broker() or alice.be_acknowledged() or alice.be_answered():
                pass

    write(20_000)
    assert publisher.PACE <= len(world.published) < publisher.PACE + publisher.WINDOW
    world.wait(publisher.PACE_PATIENCE)  # it may be away
    write(20_000)
    taken = len(world.published)
    assert 18_000 < taken < 20_000
    world.wait(publisher.PATIENCE)
    while alice.reach_broker() or alice.be_acknowledged():
        pass
    assert len(world.published) > taken


def test_a_publisher_whose_keeper_does_not_answer_waits_and_does_not_spin(world: World) -> None:
    alice = world.writer("alice")
    world.flow()
    say(alice, 1)
    alice.reach_broker()
    for _ in range(5):
        world.wait(publisher.CHECK_INTERVAL)
        assert alice.is_asking
        assert alice.next_time() > world.now


def test_a_publisher_goes_on_when_the_keeper_has_caught_up(world: World) -> None:
    alice = world.writer("alice")
    world.flow()

    def write(count: int) -> None:
        for number in range(count):
            say(alice, number)
            while alice.reach_broker() or alice.be_acknowledged() or alice.be_answered():
                pass

    write(20_000)
    with world.desk.keeper.batch():
        for payload in world.inbox:
            world.desk.keeper.take(TOPIC, payload)
    world.inbox.clear()
    world.wait(1)
    world.flow()
    assert alice.is_done


# --- memory ------------------------------------------------------------------------------------

MEASURE = f"""
import resource, sys
from pathlib import Path
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from members import TOPIC, Certifier
from reference_topics import seal_hello, seal_message
from topics_world import World

def memory():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()

world = World(Path(sys.argv[1]), Certifier(), 0)
bob = world.reader("bob")
world.flow()
joined = world.desk.join("bob")
topic = TOPIC, joined.epoch, joined.key
payloads = []
for number in range(1000):
    session = world.certifier.member(f"m{{number}}").session(TOPIC)
    payloads.append(seal_hello(*topic, session.hello, bytes(12)))
    payloads.append(seal_message(*topic, session, 0, 0, b"21.5"))
before = memory()
for payload in payloads:
    bob.take(payload)
    bob.shown.clear()
print(memory() - before, bob.faults)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from /proc")
def test_a_subscriber_needs_at_most_10_mb_for_1_000_senders(tmp_path: Path) -> None:
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "topics.db")]
    result = subprocess.run(command, capture_output=True, text=True, timeout=2 * SAFETY)
    size, faults = result.stdout.split(maxsplit=1)
    assert (faults.strip(), result.stderr) == ("{}", "")
    assert int(size) < 10e6
