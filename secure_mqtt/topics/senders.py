"""Who is behind the sessions whose messages a subscriber gets."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, NamedTuple

from crypto import PeerKeyError
from secure_mqtt.topics.messages import (
    Epoch,
    HelloError,
    Sender,
    Stream,
    read_hello,
    session_of,
)

if TYPE_CHECKING:
    from secure_mqtt.signatures import Authority

MAX_SESSIONS = 64  # of a member in an epoch, unless the keeper names them
MAX_READERS = 20_000  # the least recently used is forgotten, and asked for again if need be
MAX_HELLOS = 1_000  # answers of the keeper that are remembered
MAX_ASKED = 16  # sessions that the keeper is asked for at a time
MAX_WANTED = 1_000  # sessions to ask for
# In place of a hello: it was not believed; or the keeper knew of none, but one may come yet.
REFUSED, UNKNOWN = b"", b"\0"


class Reader(NamedTuple):
    """What opens the messages of a session in an epoch, and tells whose they are."""

    stream: Stream
    sender: Sender


class Senders:
    """Whom the sessions on a topic belong to: learnt from hellos there, or from the keeper."""

    def __init__(self, topic: str, keeper: str, authority: Authority) -> None:
        """Know nobody yet.

        :param keeper: its name
        :param authority: who certifies members
        """
        self._topic, self._keeper, self._authority = topic, keeper, authority
        self._readers: OrderedDict[tuple[bytes, bytes, bool], Reader] = OrderedDict()
        self._counts: dict[bytes, Counter[str]] = {}  # of sessions, by the epoch's key and NetID
        self._hellos: OrderedDict[bytes, bytes] = OrderedDict()  # by session
        self._wanted: OrderedDict[bytes, bool] = OrderedDict()  # whether the keeper is being asked

    def find(self, epoch: Epoch, session: bytes, is_past: bool = False) -> Reader | None:
        """Return what opens the messages of a session, if it was introduced in this epoch.

        :param is_past: whether the keeper has kept the message: then its own time decides whether
            the sender is believed, see check_time(), and not the present
        """
        for kind in (False, True)[: 1 + is_past]:
            place = epoch.key, session, kind
            if reader := self._readers.get(place):
                self._readers.move_to_end(place)
                return reader
        return None

    def introduce(self, epoch: Epoch, hello: bytes) -> bytes:
        """Take a hello from the topic.

        :return: the session that it introduces in this epoch
        :raises PeerKeyError: it introduces nobody, or once too often
        """
        session = session_of(hello)
        if self.find(epoch, session):
            return session
        if self._hellos.get(session) == REFUSED:
            raise HelloError("a hello that was refused before")
        sender = self._read(session, hello, None)
        counts = self._counts.setdefault(epoch.key, Counter())
        if counts[sender.netid] >= MAX_SESSIONS:  # then the keeper has to confirm it
            raise HelloError(f"more than {MAX_SESSIONS} sessions of a member")
        counts[sender.netid] += 1
        for key in [*self._counts][:-2]:  # of epochs that are over
            del self._counts[key]
        self._add(epoch, session, sender, is_past=False)
        if self._hellos.get(session) == UNKNOWN:
            del self._hellos[session]
        return session

    def ask(self, epoch: Epoch, session: bytes, at: int | None = None) -> Reader | None:
        """Return what opens the messages of a session, as find() does, if the keeper names it.

        :param at: the time to verify its hello for, of a message that the keeper has kept
        :return: None: the keeper has to be asked first
        :raises PeerKeyError: it names nobody that has proved himself
        """
        hello = self._hellos.get(session)
        if hello is None:
            if len(self._wanted) >= MAX_WANTED and session not in self._wanted:
                raise HelloError("one of too many sessions that are not known")
            self._wanted.setdefault(session, False)
            return None
        if hello in (REFUSED, UNKNOWN):
            raise HelloError("of a session that nobody has introduced")
        sender = self._read(session, hello, at)
        return self._add(epoch, session, sender, at is not None)

    def _read(self, session: bytes, hello: bytes, at: int | None) -> Sender:
        try:
            return read_hello(hello, self._topic, self._keeper, self._authority, at)
        except PeerKeyError:
            if at is None:
                self._remember(session, REFUSED)
            raise

    def _add(self, epoch: Epoch, session: bytes, sender: Sender, is_past: bool) -> Reader:
        reader = Reader(Stream(epoch, session), sender)
        self._readers[epoch.key, session, is_past] = reader
        if len(self._readers) > MAX_READERS:
            self._readers.popitem(last=False)
        return reader

    def _remember(self, session: bytes, hello: bytes) -> None:
        self._hellos[session] = hello
        if len(self._hellos) > MAX_HELLOS:
            self._hellos.popitem(last=False)

    # --- what is asked of the keeper -----------------------------------------------------------

    def to_ask(self) -> list[bytes]:
        """Return sessions to ask the keeper for now."""
        count = MAX_ASKED - sum(self._wanted.values())
        sessions = [session for session, is_asked in self._wanted.items() if not is_asked][:count]
        self._wanted.update(dict.fromkeys(sessions, True))
        return sessions

    def learn(self, session: bytes, hello: bytes) -> None:
        """Take the keeper's answer; an empty one if there is no such session."""
        self._wanted.pop(session, None)
        self._remember(session, hello if session_of(hello) == session else UNKNOWN)

    def failed(self, session: bytes) -> None:
        """Note that the keeper does not answer."""
        if session in self._wanted:
            self._wanted[session] = False

    def are_wanted(self) -> bool:
        """Tell whether there are sessions to ask for now."""
        return sum(self._wanted.values()) < min(MAX_ASKED, len(self._wanted))

    def forget_refusals(self) -> None:
        """Give those a chance that were refused in an epoch that is over."""
        for session, hello in [*self._hellos.items()]:
            if hello in (REFUSED, UNKNOWN):
                del self._hellos[session]


def check_time(sender: Sender, time: int) -> None:
    """Raise HelloError if a sender's certificates were not valid at a time, in milliseconds."""
    if not sender.validity.begins <= time / 1000 <= sender.validity.ends:
        raise HelloError("signed with a certificate that was not valid then")
