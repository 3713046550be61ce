"""What a keeper writes down: topics and their members, keys, and what was published.

Each class is about some of the tables. None of them decides anything: whoever calls them has
checked what is asked, and puts it into a batch of the database. Times are seconds since 1970.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from itertools import chain
from typing import NamedTuple

from secure_mqtt.topics.database import Database
from secure_mqtt.topics.messages import KEY_SIZE, MAX_EPOCH
from secure_mqtt.topics.requests import MAX_COUNTERS, Kept, Shared

MAX_HISTORY_SIZE = 2**26  # bytes of the messages of a topic that are kept
MAX_DUE = 100  # topics whose epochs are replaced at a time: others wait meanwhile
TABLES = """
CREATE TABLE floor (epoch INTEGER NOT NULL);  -- the highest of all topics that were deleted
INSERT INTO floor VALUES (0);
CREATE TABLE topics (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL UNIQUE,
    owner TEXT NOT NULL,
    history INTEGER NOT NULL,  -- how many messages are kept at most
    epoch INTEGER NOT NULL,  -- the current one
    oldest INTEGER NOT NULL DEFAULT 1,  -- numbers of the messages that are kept
    newest INTEGER NOT NULL DEFAULT 0,
    bytes INTEGER NOT NULL DEFAULT 0  -- of these messages
);
CREATE INDEX topics_owner ON topics (owner);
CREATE TABLE members (
    topic INTEGER NOT NULL REFERENCES topics ON DELETE CASCADE,
    netid TEXT NOT NULL,
    PRIMARY KEY (topic, netid)
) WITHOUT ROWID;
CREATE INDEX members_netid ON members (netid);
CREATE TABLE epochs (
    topic INTEGER NOT NULL REFERENCES topics ON DELETE CASCADE,
    epoch INTEGER NOT NULL,
    key BLOB NOT NULL,
    started REAL NOT NULL,
    expires REAL NOT NULL,  -- when nobody may use the key any more, but for the history
    due REAL,  -- when it is replaced, or expires, NULL when it has
    newest INTEGER NOT NULL DEFAULT 0,  -- number of the newest message in it
    PRIMARY KEY (topic, epoch)
) WITHOUT ROWID;
CREATE INDEX epochs_due ON epochs (due) WHERE due IS NOT NULL;
CREATE INDEX epochs_newest ON epochs (topic, newest) WHERE due IS NULL;
CREATE TABLE sessions (
    topic INTEGER NOT NULL REFERENCES topics ON DELETE CASCADE,
    session BLOB NOT NULL,
    netid TEXT NOT NULL,
    hello BLOB NOT NULL,
    epoch INTEGER NOT NULL,  -- the newest in which it was introduced
    counter INTEGER NOT NULL DEFAULT -1,  -- the highest that was kept
    newest INTEGER NOT NULL DEFAULT 0,  -- number of the newest message of it
    PRIMARY KEY (topic, session)
);
CREATE INDEX sessions_epoch ON sessions (topic, epoch, netid);
CREATE INDEX sessions_newest ON sessions (topic, newest);
CREATE INDEX sessions_kept ON sessions (topic, epoch, newest) WHERE newest > 0;
CREATE TABLE messages (
    topic INTEGER NOT NULL REFERENCES topics ON DELETE CASCADE,
    number INTEGER NOT NULL,
    payload BLOB NOT NULL,
    PRIMARY KEY (topic, number)
)
"""


class Topic(NamedTuple):
    """A topic as it is written down."""

    id: int
    name: str
    owner: str
    history: int
    epoch: int
    oldest: int
    newest: int
    bytes: int


class KeptEpoch(NamedTuple):
    """An epoch as it is written down."""

    number: int
    key: bytes
    started: float
    expires: float


class Topics:
    """Which topics there are, and who is a member of which."""

    def __init__(self, database: Database) -> None:
        """Take the database, in which the tables are."""
        self._database = database

    def find(self, name: str) -> Topic | None:
        """Return a topic."""
        row = self._database.execute("SELECT * FROM topics WHERE name = ?", name).fetchone()
        return row and Topic(*row)

    def count(self, owner: str = "") -> int:
        """Return how many topics there are, or how many of one owner."""
        if owner:
            count = self._database.value("SELECT count(*) FROM topics WHERE owner = ?", owner)
        else:
            count = self._database.value("SELECT count(*) FROM topics")
        return int(count)

    def create(self, name: str, owner: str, members: set[str], history: int) -> Topic:
        """Write down a new topic, and return it. It has no key yet."""
        number = self._database.execute(
            "INSERT INTO topics (name, owner, history, epoch) SELECT ?, ?, ?, epoch FROM floor",
            *(name, owner, history),
        ).lastrowid
        query = "SELECT * FROM topics WHERE id = ?"
        topic = Topic(*self._database.execute(query, number).fetchone())
        self.admit(topic, members)
        return topic

    def delete(self, topic: Topic) -> None:
        """Delete a topic, with all that belongs to it.

        Should it come again, its epochs go on above those that it has had: else a member that was
        away meanwhile could take one for another.
        """
        self._database.execute("UPDATE floor SET epoch = max(epoch, ?)", topic.epoch)
        self._database.execute("DELETE FROM topics WHERE id = ?", topic.id)
        self._database.has_deleted_keys = True

    def members(self, topic: Topic) -> list[str]:
        """Return a topic's members in the order of their names."""
        rows = self._database.execute(
            "SELECT netid FROM members WHERE topic = ? ORDER BY netid", topic.id
        )
        return [netid for (netid,) in rows]

    def is_member(self, topic: Topic, netid: str) -> bool:
        """Tell whether a NetID is a member."""
        query = "SELECT 1 FROM members WHERE topic = ? AND netid = ?"
        return self._database.value(query, topic.id, netid) is not None

    def admit(self, topic: Topic, netids: set[str]) -> None:
        """Let NetIDs be members."""
        for netid in netids:
            self._database.execute("INSERT OR IGNORE INTO members VALUES (?, ?)", topic.id, netid)

    def remove(self, topic: Topic, netids: set[str]) -> bool:
        """Let NetIDs be members no more; tell whether one of them was."""
        statement = "DELETE FROM members WHERE topic = ? AND netid = ?"
        counts = [self._database.execute(statement, topic.id, each).rowcount for each in netids]
        return any(counts)

    def of(self, netid: str) -> Iterator[Shared]:
        """Yield the topics of a member, its own first, by name."""
        rows = self._database.execute(
            "SELECT topics.* FROM members JOIN topics ON id = topic WHERE netid = ?"
            " ORDER BY owner != netid, name",
            netid,
        )
        for topic in (Topic(*row) for row in rows):
            yield Shared(topic.name, topic.owner, self.members(topic), topic.history)

    def with_history(self) -> list[str]:
        """Return the topics whose messages are kept."""
        rows = self._database.execute("SELECT name FROM topics WHERE history > 0 ORDER BY id")
        return [name for (name,) in rows]


class Epochs:
    """Which keys a topic has, and until when."""

    def __init__(self, database: Database) -> None:
        """Take the database, in which the tables are."""
        self._database = database

    def find(self, topic: Topic, number: int) -> KeptEpoch | None:
        """Return an epoch whose key is still there."""
        row = self._database.execute(
            "SELECT epoch, key, started, expires FROM epochs WHERE topic = ? AND epoch = ?",
            *(topic.id, number),
        ).fetchone()
        return row and KeptEpoch(*row)

    def last_two(self, topic: Topic) -> list[KeptEpoch]:
        """Return a topic's current epoch and, if its key is still there, the one before."""
        rows = self._database.execute(
            "SELECT epoch, key, started, expires FROM epochs WHERE topic = ? AND epoch >= ?"
            " ORDER BY epoch DESC",
            *(topic.id, topic.epoch - 1),
        )
        return [KeptEpoch(*row) for row in rows]

    def begin(self, topic: Topic, now: float, interval: float, closing_time: float) -> bool:
        """Begin a topic's next epoch, with a new random key.

        :param interval: seconds until it is to be replaced
        :param closing_time: seconds for which the one before may still be read
        :return: whether there is one: their numbers can be used up
        """
        if topic.epoch == MAX_EPOCH:
            return False
        end = now + closing_time
        self._database.execute(
            "UPDATE epochs SET expires = min(expires, ?), due = min(expires, ?)"
            " WHERE topic = ? AND epoch = ?",
            *(end, end, topic.id, topic.epoch),
        )
        number = topic.epoch + 1  # the topic counts them, whatever becomes of their keys
        self._database.execute("UPDATE topics SET epoch = ? WHERE id = ?", number, topic.id)
        self._database.execute(
            "INSERT INTO epochs (topic, epoch, key, started, expires, due)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            *(topic.id, number, os.urandom(KEY_SIZE), now, now + 2 * interval, now + interval),
        )
        self.close(topic, number - 1, now)
        return True

    def close(self, topic: Topic, number: int, now: float) -> None:
        """Forget the keys up to an epoch that have expired, but for those of kept messages."""
        self._database.execute(
            "UPDATE epochs SET due = NULL WHERE topic = ? AND due IS NOT NULL"
            " AND (epoch < ? OR epoch = ? AND due <= ?)",
            *(topic.id, number, number, now),
        )
        self.forget(topic, topic.oldest)

    def forget(self, topic: Topic, oldest: int) -> None:
        """Forget the keys that have expired, and are of messages before a number only."""
        count = self._database.execute(
            "DELETE FROM epochs WHERE topic = ? AND due IS NULL AND newest < ?", topic.id, oldest
        ).rowcount
        self._database.has_deleted_keys |= count > 0

    def use(self, topic: Topic, number: int, message: int) -> None:
        """Note that the message of a number is in an epoch."""
        self._database.execute(
            "UPDATE epochs SET newest = ? WHERE topic = ? AND epoch = ?", message, topic.id, number
        )

    def due(self, now: float) -> list[tuple[Topic, int]]:
        """Return some of the topics with an epoch that has to be replaced, or closed, and which."""
        rows = self._database.execute(
            "SELECT topics.*, epochs.epoch FROM epochs JOIN topics ON id = topic"
            " WHERE due <= ? ORDER BY due LIMIT ?",
            *(now, MAX_DUE),
        )
        return [(Topic(*row[:-1]), row[-1]) for row in rows]

    def next_due(self) -> float:
        """Return when the next epoch has to be replaced, or closed."""
        # Said once more, NOT NULL lets SQLite use the index: it is asked for at each turn.
        due = self._database.value("SELECT min(due) FROM epochs WHERE due IS NOT NULL")
        return float("inf") if due is None else float(due)

    def reschedule(self, now: float, interval: float) -> None:
        """Adapt all epochs to an interval, and to a clock that may have been turned back."""
        self._database.execute(
            "UPDATE epochs SET due = started + ?, expires = started + ? WHERE due IS NOT NULL"
            " AND epoch = (SELECT topics.epoch FROM topics WHERE id = topic)",
            *(interval, 2 * interval),
        )
        self._database.execute(
            "UPDATE epochs SET due = ?, expires = ? WHERE due IS NOT NULL AND started > ?",
            *(now, now, now),
        )

    def expire_used(self, now: float) -> None:
        """Let the keys expire that sessions may publish with on topics whose messages are kept."""
        self._database.execute(
            "UPDATE epochs SET due = ?, expires = ? WHERE due IS NOT NULL AND topic IN"
            " (SELECT id FROM topics WHERE history > 0 AND EXISTS (SELECT 1 FROM sessions"
            " WHERE sessions.topic = id AND sessions.epoch >= topics.epoch - 1))",
            *(now, now),
        )


class Sessions:
    """Who has been introduced as whose session, and how far its messages are kept."""

    def __init__(self, database: Database) -> None:
        """Take the database, in which the tables are."""
        self._database = database

    def introduce(self, topic: Topic, session: bytes, netid: str, hello: bytes) -> None:
        """Write down who publishes as a session in the current epoch."""
        self._database.execute(
            "INSERT INTO sessions (topic, session, netid, hello, epoch) VALUES (?, ?, ?, ?, ?)"
            " ON CONFLICT DO UPDATE SET epoch = excluded.epoch",
            *(topic.id, session, netid, hello, topic.epoch),
        )

    def progress(self, topic: Topic, session: bytes) -> tuple[int, int]:
        """Return the newest epoch in which a session was introduced, 0 for none, and its counter.

        That is the highest of its messages that were kept, -1 for none.
        """
        query = "SELECT epoch, counter FROM sessions WHERE topic = ? AND session = ?"
        row = self._database.execute(query, topic.id, session).fetchone()
        return row or (0, -1)

    def hello(self, topic: Topic, session: bytes) -> bytes | None:
        """Return the hello that has introduced a session."""
        query = "SELECT hello FROM sessions WHERE topic = ? AND session = ?"
        hello: bytes | None = self._database.value(query, topic.id, session)
        return hello

    def count(self, topic: Topic, netid: str) -> int:
        """Return how many sessions a member has in the current epoch."""
        query = "SELECT count(*) FROM sessions WHERE topic = ? AND epoch = ? AND netid = ?"
        return int(self._database.value(query, topic.id, topic.epoch, netid))

    def advance(self, topic: Topic, session: bytes, counter: int, message: int) -> None:
        """Note which message of a session is the newest one that is kept."""
        self._database.execute(
            "UPDATE sessions SET counter = ?, newest = ? WHERE topic = ? AND session = ?",
            *(counter, message, topic.id, session),
        )

    def counters(self, topic: Topic) -> dict[bytes, int]:
        """Return the highest counters that are kept, of the sessions in the last two epochs.

        If there are too many for an answer, those with the newest messages.
        """
        query = (
            "SELECT newest, session, counter FROM sessions"
            " WHERE topic = ? AND epoch = ? AND newest > 0 ORDER BY newest DESC LIMIT ?"
        )
        epochs = topic.epoch, topic.epoch - 1  # one after the other: so each is in order already
        rows = [self._database.execute(query, topic.id, each, MAX_COUNTERS) for each in epochs]
        newest = sorted(chain(*rows), reverse=True)[:MAX_COUNTERS]
        return {session: counter for _, session, counter in newest}

    def forget(self, topic: Topic) -> None:
        """Forget the sessions of earlier epochs that have no message left."""
        self._database.execute(
            "DELETE FROM sessions WHERE topic = ? AND epoch < ? AND newest < ?",
            *(topic.id, topic.epoch - 1, topic.oldest),
        )


class Messages:
    """The messages that are kept of a topic: the newest, within its bounds."""

    def __init__(self, database: Database) -> None:
        """Take the database, in which the tables are."""
        self._database = database

    def add(self, topic: Topic, payload: bytes) -> int:
        """Keep one more message; return the number of the oldest that there is room for."""
        number = topic.newest + 1
        self._database.execute("INSERT INTO messages VALUES (?, ?, ?)", topic.id, number, payload)
        oldest, size = topic.oldest, topic.bytes + len(payload)
        while number - oldest >= topic.history or size > MAX_HISTORY_SIZE:
            size -= self._drop(topic, oldest)
            oldest += 1
        self._database.execute(
            "UPDATE topics SET oldest = ?, newest = ?, bytes = ? WHERE id = ?",
            *(oldest, number, size, topic.id),
        )
        return oldest

    def _drop(self, topic: Topic, number: int) -> int:
        """Forget a message; return its size in bytes."""
        place = topic.id, number
        query = "SELECT length(payload) FROM messages WHERE topic = ? AND number = ?"
        size = int(self._database.value(query, *place))
        self._database.execute("DELETE FROM messages WHERE topic = ? AND number = ?", *place)
        return size

    def after(self, topic: Topic, number: int) -> Iterator[Kept]:
        """Yield the messages after a number, oldest first."""
        rows = self._database.execute(
            "SELECT number, payload FROM messages WHERE topic = ? AND number > ? ORDER BY number",
            *(topic.id, number),
        )
        return (Kept(*row) for row in rows)


class Store:
    """All that a keeper writes down, in one file."""

    def __init__(self, path: str) -> None:
        """Open the file, or make it. StoreError if it can't be used."""
        self.database = Database(path, TABLES)
        self.topics = Topics(self.database)
        self.epochs = Epochs(self.database)
        self.sessions = Sessions(self.database)
        self.messages = Messages(self.database)

    def counts(self) -> dict[str, int]:
        """Return how many topics, members and kept messages there are."""
        value = self.database.value
        return {
            "topics": self.topics.count(),
            "members": int(value("SELECT count(*) FROM members")),
            "messages": int(value("SELECT coalesce(sum(newest - oldest + 1), 0) FROM topics")),
        }
