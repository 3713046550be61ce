"""The keeper: decides who is a member of a topic, and hands its keys to members only.

It knows nothing of MQTT. What it is asked comes from a NetID that has proved itself; what it wants
to be done beside an answer, it notes as effects.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from crypto import PeerKeyError
from secure_mqtt.signatures import Authority
from secure_mqtt.topics.messages import (
    MAX_EPOCH,
    MESSAGE,
    Epoch,
    Head,
    MessageError,
    Stream,
    make_notice,
    parse_hello,
    read_head,
    read_hello,
    session_of,
)
from secure_mqtt.topics.requests import (
    MAX_MEMBERS,
    MAX_NUMBER,
    RefusedError,
    RequestError,
    read_request,
    to_base64,
    to_json,
)
from secure_mqtt.topics.store import KeptEpoch, Store, Topic

MAX_TOPICS, MAX_TOPICS_OF_OWNER = 10_000, 100
MAX_SESSIONS = 64  # of a member in an epoch
CLOSING_TIME = 30.0  # seconds for which what was under way in the last epoch may still be read
MAX_PAGE_SIZE = 2**16  # bytes of messages in an answer, if there is more than one
MAX_LIST_SIZE = 2**20  # bytes of names in an answer, about
MAX_READERS = 1_000  # sessions whose keys are remembered
# The same whether there is such a topic or not: who is no member shall not learn that.
NO_TOPIC = "there is no such topic, or you are not a member of it"
Answer = dict[str, Any]


class Effects(NamedTuple):
    """What a batch wants to be done beside its answers, in this order, when it has ended."""

    subscriptions: list[tuple[str, bool]]  # topics to subscribe to (True), or no longer
    notices: list[tuple[str, bytes]]  # topics, and the payloads to publish there


class Rotation:
    """When a topic's epochs begin and end, and who has to be told at once."""

    def __init__(
        self, store: Store, clock: Callable[[], float], interval: float, effects: Effects
    ) -> None:
        """Take over the epochs that are written down, as Keeper does."""
        self._store, self._clock, self.interval = store, clock, interval
        self._effects = effects
        with store.database.batch():
            store.epochs.reschedule(clock(), interval)

    def begin(self, topic: Topic, closing_time: float = CLOSING_TIME) -> Topic:
        """Begin a topic's next epoch.

        :param closing_time: seconds for which the one before may still be read
        :return: the topic as it is now
        :raises RefusedError: no number for it is left
        """
        if not self._store.epochs.begin(topic, self._clock(), self.interval, closing_time):
            raise RefusedError("its epochs are used up; create another topic")
        topic = topic._replace(epoch=topic.epoch + 1)
        self._store.sessions.forget(topic)
        if topic.epoch > 1 and not self.open(topic, topic.epoch - 1):
            self._effects.notices.append((topic.name, make_notice(topic.epoch)))
        return topic

    def go_on(self) -> None:
        """Begin and end the epochs for which it is time, or some of them if they are many."""
        now = self._clock()
        for topic, number in self._store.epochs.due(now):
            if number == topic.epoch:
                with contextlib.suppress(RefusedError):
                    self.begin(topic)
            self._store.epochs.close(topic, number, now)

    def current(self, topic: Topic) -> Topic:
        """Begin a topic's next epoch, if it is time; return the topic as it is now."""
        epoch = self._store.epochs.find(topic, topic.epoch)
        if epoch and self._clock() < min(epoch.started + self.interval, epoch.expires):
            return topic
        return self.begin(topic)

    def keys(self, topic: Topic) -> dict[str, Any]:
        """Return the part about a topic's keys of the answer to who joins it."""
        now = self._clock()
        epoch, *others = self._store.epochs.last_two(topic)
        previous = [
            {"epoch": other.number, "key": other.key, "expires": other.expires - now}
            for other in others
            if now < other.expires
        ]
        return {
            "epoch": epoch.number,
            "key": epoch.key,
            "renew": max(epoch.started + self.interval - now, 0),
            "expires": max(epoch.expires - now, 0),
            "previous": previous[0] if previous else None,
        }

    def open(self, topic: Topic, number: int) -> KeptEpoch | None:
        """Return an epoch of a topic if messages of it may be published still, or be under way."""
        if topic.epoch - number not in (0, 1):
            return None
        epoch = self._store.epochs.find(topic, number)
        return epoch if epoch and self._clock() < epoch.expires else None


class Archive:
    """The messages that are kept for those who ask later."""

    def __init__(self, store: Store, rotation: Rotation) -> None:
        """Take what is written down."""
        self._store, self._rotation = store, rotation
        self._readers: OrderedDict[tuple[bytes, bytes], tuple[Stream, Ed25519PublicKey]]
        self._readers = OrderedDict()  # by the epoch's key and the session, the newest last

    def take(self, name: str, payload: bytes) -> bool:
        """Keep what was published on a topic, if it is a message that was not here before.

        :return: whether it was kept
        :raises CryptoError: no member has published it for now
        """
        head = read_head(payload)
        topic = self._store.topics.find(name)
        if head.kind != MESSAGE or not topic or not topic.history:
            return False
        epoch = self._rotation.open(topic, head.epoch)
        introduced, counter = self._store.sessions.progress(topic, head.session)
        if not epoch or introduced < head.epoch or head.counter > MAX_NUMBER:
            raise MessageError("of an epoch or a session that is not, or no longer, in use")
        if head.counter <= counter:
            return False
        stream, key = self._reader(topic, epoch, head.session)
        stream.verify(payload, stream.decrypt(payload), key)
        self._keep(topic, head, payload)
        return True

    def _reader(
        self, topic: Topic, epoch: KeptEpoch, session: bytes
    ) -> tuple[Stream, Ed25519PublicKey]:
        """Return what opens the messages of a session that was introduced in an epoch."""
        place = epoch.key, session
        if place not in self._readers:
            hello = self._store.sessions.hello(topic, session) or b""
            stream = Stream(Epoch(topic.name, epoch.number, epoch.key), session)
            self._readers[place] = stream, parse_hello(hello).key
            if len(self._readers) > MAX_READERS:
                self._readers.popitem(last=False)
        self._readers.move_to_end(place)
        return self._readers[place]

    def _keep(self, topic: Topic, head: Head, payload: bytes) -> None:
        number = topic.newest + 1
        self._store.sessions.advance(topic, head.session, head.counter, number)
        self._store.epochs.use(topic, head.epoch, number)
        oldest = self._store.messages.add(topic, payload)
        if oldest > topic.oldest:
            self._store.epochs.forget(topic, oldest)

    def page(self, topic: Topic, after: int) -> dict[str, Any]:
        """Return what is kept after a number, or so many messages if it is below 0, or a part."""
        start = after if after >= 0 else max(topic.newest + after, 0)
        messages: list[dict[str, Any]] = []
        size, has_more = 0, False
        for message in self._store.messages.after(topic, start):
            size += len(message.payload)
            if messages and size > MAX_PAGE_SIZE:
                has_more = True
                break
            messages.append(message._asdict())
        epochs = {read_head(message["payload"]).epoch for message in messages}
        found = {number: self._store.epochs.find(topic, number) for number in epochs}
        keys = {str(number): epoch.key for number, epoch in found.items() if epoch}
        return {"messages": messages, "keys": keys, "more": has_more}


class Keeper:
    """Answers members, and keeps messages for them. All of it happens in batches."""

    def __init__(
        self,
        store: Store,
        authority: Authority,
        name: str,
        clock: Callable[[], float],
        interval: float,
    ) -> None:
        """Open the books.

        :param authority: who certifies members; it may be replaced at any time
        :param name: the keeper's own, which members expect
        :param clock: tells the seconds since 1970; it is never turned back
        :param interval: seconds until a topic's key is replaced
        """
        self._store, self._clock = store, clock
        self.authority, self._name = authority, name
        self._effects = Effects([], [])
        self._rotation = Rotation(store, clock, interval, self._effects)
        self._archive = Archive(store, self._rotation)
        self.take = self._archive.take

    @contextlib.contextmanager
    def batch(self) -> Iterator[Effects]:
        """Do some things together: all that changes is on the disk when this has ended.

        Not before may an answer leave, or the receipt of a message be acknowledged.

        :return: what is to be done then, before the next batch
        :raises StoreError: nothing has changed
        """
        self._effects.subscriptions.clear()
        self._effects.notices.clear()
        with self._store.database.batch():
            yield self._effects

    def rotate(self) -> None:
        """Renew the keys for which it is time, or some of them if they are many; in a batch."""
        self._rotation.go_on()

    def next_rotation(self) -> float:
        """Return when rotate() has to be called, of the clock; inf: not as things are."""
        return self._store.epochs.next_due()

    def catch_up(self) -> list[str]:
        """Return the topics to subscribe to, since their messages are kept; in a batch.

        To be called whenever subscriptions begin anew. What was published on these topics
        meanwhile is lost to us. So their epochs end, in which sessions may have published: then
        these ask how far we have got, and send again what is missing.
        """
        self._store.epochs.expire_used(self._clock())
        return self._store.topics.with_history()

    def answer(self, netid: str, request: bytes) -> bytes:
        """Return the answer to a member's request, in a batch; both in JSON.

        :param netid: in whose exchange it came, which both sides have signed
        """
        try:
            do, fields = read_request(request)
            answer = ACTIONS[do](self, netid, **fields)
        except (RequestError, RefusedError) as error:
            answer = {"error": str(error)}
        return to_json(answer)

    # --- members -------------------------------------------------------------------------------

    def _topic(self, netid: str, name: str) -> Topic:
        """Return a topic to one of its members."""
        topic = self._store.topics.find(name)
        if topic and self._store.topics.is_member(topic, netid):
            return topic
        raise RefusedError(NO_TOPIC)

    def _own_topic(self, netid: str, name: str) -> Topic:
        """Return a topic to its owner."""
        topic = self._topic(netid, name)
        if topic.owner != netid:
            raise RefusedError(f"only its owner {topic.owner} may do that")
        return topic

    def _create(self, netid: str, topic: str, members: list[str], history: int) -> Answer:
        topics, everybody = self._store.topics, {netid, *members}
        if found := topics.find(topic):
            # Who asks once more, since the answer was lost, shall not be told of a failure.
            is_same = (found.owner, found.history) == (netid, history)
            if is_same and topics.members(found) == sorted(everybody):
                return {}
            raise RefusedError("this name is taken")
        if topics.count() >= MAX_TOPICS:
            raise RefusedError(f"there are {MAX_TOPICS} topics, the most that may be")
        if topics.count(netid) >= MAX_TOPICS_OF_OWNER:
            raise RefusedError(f"you have {MAX_TOPICS_OF_OWNER} topics, the most that may be")
        check_number_of(everybody)
        self._rotation.begin(topics.create(topic, netid, everybody, history))
        if history:
            self._effects.subscriptions.append((topic, True))
        return {}

    def _admit(self, netid: str, topic: str, members: list[str]) -> Answer:
        found = self._own_topic(netid, topic)
        check_number_of({*members, *self._store.topics.members(found)})
        self._store.topics.admit(found, {*members})
        return {}

    def _remove(self, netid: str, topic: str, members: list[str]) -> Answer:
        found = self._own_topic(netid, topic)
        if netid in members:
            raise RefusedError("its owner can't be removed")
        if self._store.topics.remove(found, {*members}):
            self._rotation.begin(found, closing_time=0)
        return {}

    def _delete(self, netid: str, topic: str) -> Answer:
        found = self._own_topic(netid, topic)
        self._store.topics.delete(found)
        if found.history:
            self._effects.subscriptions.append((topic, False))
        # Members ask at once then, and learn that it is gone.
        self._effects.notices.append((topic, make_notice(min(found.epoch + 1, MAX_EPOCH))))
        return {}

    def _list(self, netid: str) -> Answer:
        topics: list[dict[str, Any]] = []
        size = 0
        for shared in self._store.topics.of(netid):
            size += len(to_json(shared._asdict()))
            if topics and size > MAX_LIST_SIZE:
                return {"topics": topics, "more": True}
            topics.append(shared._asdict())
        return {"topics": topics}

    # --- keys and messages ---------------------------------------------------------------------

    def _join(self, netid: str, topic: str, hello: bytes | None) -> Answer:
        found = self._rotation.current(self._topic(netid, topic))
        counters = self._store.sessions.counters(found) if found.history else {}
        if hello is not None:
            self._introduce(found, netid, hello)
            session = session_of(hello)
            _, counter = self._store.sessions.progress(found, session)
            if counter >= 0:  # there may be too many to name all, but the asker needs its own
                counters[session] = counter
        return {
            **self._rotation.keys(found),
            "counters": {to_base64(session): counter for session, counter in counters.items()},
            "history": found.history,
            "number": found.newest,
        }

    def _introduce(self, topic: Topic, netid: str, hello: bytes) -> None:
        """Take note of a session of a member, or refuse it."""
        session = session_of(hello)
        introduced, _ = self._store.sessions.progress(topic, session)
        if introduced == topic.epoch:
            return
        if self._store.sessions.count(topic, netid) >= MAX_SESSIONS:
            raise RefusedError(
                f"you have {MAX_SESSIONS} sessions on it, the most until its key is renewed"
            )
        try:
            sender = read_hello(hello, topic.name, self._name, self.authority)
        except PeerKeyError as error:
            raise RefusedError(f"your hello can't be accepted: {error}") from None
        if sender.netid != netid:
            raise RefusedError("your hello introduces another member")
        self._store.sessions.introduce(topic, session, netid, hello)

    def _sender(self, netid: str, topic: str, session: bytes) -> Answer:
        hello = self._store.sessions.hello(self._topic(netid, topic), session)
        if hello is None:
            raise RefusedError("nobody has introduced this session")
        return {"hello": hello}

    def _history(self, netid: str, topic: str, after: int) -> Answer:
        return self._archive.page(self._topic(netid, topic), after)


ACTIONS: dict[str, Callable[..., Answer]] = {
    "create": Keeper._create,
    "admit": Keeper._admit,
    "remove": Keeper._remove,
    "delete": Keeper._delete,
    "list": Keeper._list,
    "join": Keeper._join,
    "sender": Keeper._sender,
    "history": Keeper._history,
}


def check_number_of(members: set[str]) -> None:
    """Raise RefusedError if these are too many for a topic."""
    if len(members) > MAX_MEMBERS:
        raise RefusedError(f"a topic can have {MAX_MEMBERS} members")
