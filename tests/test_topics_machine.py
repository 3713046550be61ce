"""Whatever happens, each message is shown once and in order, or it is said to be missed."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from members import Certifier
from topics_world import INTERVAL, Reader, World, Writer

from secure_mqtt.topics.order import PATIENCE

COURSE = Certifier()


class Topic(RuleBasedStateMachine):
    """A topic of alice, who publishes, bob, who reads, and carol, who comes and goes."""

    history = 10_000

    @initialize()
    def found(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self.world = World(Path(self._folder.name) / "topics.db", COURSE, self.history)
        self.alice: Writer = self.world.writer("alice")
        self.bob: Reader = self.world.reader("bob")
        self.carol: Writer | None = None
        self.is_member = True
        self.has_lost = False  # the reader, something that was on its way
        self.is_kept_late = False  # or may be
        self.world.flow()

    @rule(count=st.integers(1, 4))
    def publish(self, count: int) -> None:
        for _ in range(count):
            self.alice.write(b"a%d" % len(self.alice.lines))

    @precondition(lambda self: self.is_member)
    @rule()
    def carol_publishes(self) -> None:
        self.carol = self.carol or self.world.writer("carol")
        self.carol.write(b"c%d" % len(self.carol.lines))

    @rule()
    def all_arrives(self) -> None:
        self.world.flow()

    @rule()
    def some_arrives(self) -> None:
        self.alice.be_answered()
        self.alice.reach_broker()
        self.bob.receive()

    @rule(seconds=st.sampled_from([1.0, 5.0, INTERVAL]))
    def time_passes(self, seconds: float) -> None:
        self.is_kept_late |= self.has_lost and seconds > PATIENCE
        self.world.wait(seconds)

    @rule()
    def publisher_is_cut_off(self) -> None:
        self.alice.lose_connection()

    @rule()
    def subscriber_is_cut_off(self) -> None:
        self.has_lost = True
        self.bob.lose_connection()

    @precondition(lambda self: self.bob.inbox)
    @rule()
    def broker_drops_one(self) -> None:
        self.has_lost = True
        self.bob.inbox.popleft()

    @precondition(lambda self: self.world.published)
    @rule(data=st.data())
    def broker_replays_one(self, data: st.DataObject) -> None:
        self.bob.inbox.append(data.draw(st.sampled_from(self.world.published)))

    @rule()
    def keeper_is_killed(self) -> None:
        if self.world.is_keeper_up:
            self.is_kept_late = True
            self.world.kill_keeper()

    @rule()
    def keeper_starts(self) -> None:
        self.world.start_keeper()

    @precondition(lambda self: self.world.is_keeper_up)
    @rule()
    def carol_is_removed_or_admitted(self) -> None:
        self.is_kept_late |= self.is_member
        self.world.change_members("remove" if self.is_member else "admit", "carol")
        self.is_member = not self.is_member
        self.carol = None

    def teardown(self) -> None:
        """Let all come to rest, and look at what was shown."""
        if not hasattr(self, "world"):
            return
        try:
            self.world.settle()
            self.alice.write(b"last")  # what is missing before it is noticed
            self.world.settle()
            self.check()
        finally:
            self.world.close()
            self._folder.cleanup()

    def check(self) -> None:
        lines, shown = self.alice.lines, [m.data for m in self.bob.shown if m.sender == "alice"]
        missed = sum(count for name, count in self.bob.missed if name == "alice")
        assert shown == [line for line in lines if line in {*shown}]  # each once, in order
        assert shown[-1] == lines[-1]
        # A reader gives up what it has lost if the keeper does not have it in time: it was away, or
        # a removal has closed the epoch, so that publishers send it again when they next ask.
        may_miss = not self.history or (self.has_lost and self.is_kept_late)
        # Of what is not kept, a reader begins with the first message that it gets.
        first = lines.index(shown[0]) if may_miss else 0
        assert len(shown) + missed == len(lines) - first
        assert self.alice.is_done
        assert may_miss or not missed


class UnkeptTopic(Topic):
    """The same, where nothing is kept."""

    history = 0


@pytest.mark.parametrize("kind", [Topic, UnkeptTopic])
def test_each_message_is_shown_once_and_in_order_or_said_to_be_missed(
    kind: type[Topic],
) -> None:
    slow = [HealthCheck.too_slow, HealthCheck.data_too_large]
    run_state_machine_as_test(
        kind,
        settings=settings(
            max_examples=25, stateful_step_count=30, deadline=None, suppress_health_check=slow
        ),
    )
