"""The keeper's file: who may use it, and that it keeps what it was told to keep, and no more."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT, SAFETY

from secure_mqtt.topics import store as store_module
from secure_mqtt.topics.database import APPLICATION_ID, SIDE_FILES, Database, StoreError
from secure_mqtt.topics.store import Store, Topic

TABLES = "CREATE TABLE numbers (number INTEGER PRIMARY KEY, content BLOB)"
HEADER = f"import os, sys; sys.path.insert(0, {str(ROOT)!r})\n"
OPENED: list[Database] = []
is_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can do that")


@pytest.fixture
def path(tmp_path: Path) -> str:
    return str(tmp_path / "topics.db")


def refusal(path: str) -> str:
    """Return why a file can't be used, which is still what it was."""
    with pytest.raises(StoreError) as caught:
        Database(path, TABLES)
    return str(caught.value)


@pytest.fixture(autouse=True)
def opened() -> Iterator[list[Database]]:
    """Close all databases when the test ends."""
    OPENED.clear()
    yield OPENED
    for database in OPENED:
        database.close()


def open_database(path: str, tables: str = TABLES) -> Database:
    OPENED.append(Database(path, tables))
    return OPENED[-1]


def open_store(path: str) -> Store:
    store = Store(path)
    OPENED.append(store.database)
    return store


def child(code: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a process that runs some lines, with the file as sys.argv[1]."""
    command = [sys.executable, "-c", HEADER + code, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def line_of(process: subprocess.Popen[str]) -> str:
    """Return the next line that it writes."""
    assert process.stdout
    return process.stdout.readline().strip()


def end(process: subprocess.Popen[str]) -> str:
    """Kill a process; return what else it has written."""
    process.send_signal(signal.SIGKILL)
    rest, _ = process.communicate(timeout=SAFETY)
    return rest


# --- whether a file may be used ----------------------------------------------------------------


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_a_new_file_is_for_its_owner_alone_whatever_the_umask(path: str, mask: int) -> None:
    before = os.umask(mask)
    try:
        database = open_database(path, TABLES)
        with database.batch():
            database.execute("INSERT INTO numbers (number) VALUES (1)")
        files = [path, *(path + ending for ending in SIDE_FILES if os.path.exists(path + ending))]
        assert len(files) > 1
        assert {os.stat(file).st_mode & 0o777 for file in files} == {0o600}
    finally:
        os.umask(before)


def test_a_file_is_used_again(path: str) -> None:
    database = open_database(path, TABLES)
    with database.batch():
        database.execute("INSERT INTO numbers (number) VALUES (7)")
    database.close()
    assert open_database(path, TABLES).value("SELECT number FROM numbers") == 7


def test_a_file_with_nothing_in_it_is_taken(path: str) -> None:
    os.close(os.open(path, os.O_CREAT, 0o600))
    open_database(path, TABLES).execute("SELECT * FROM numbers")


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o620, 0o604, 0o602])
def test_a_file_that_others_can_use_is_refused(path: str, mode: int) -> None:
    open_database(path, TABLES).close()
    os.chmod(path, mode)
    assert "other users can read or write it; run chmod 600 on it" in refusal(path)


@pytest.mark.parametrize("ending", SIDE_FILES)
def test_a_side_file_that_another_may_have_written_is_refused(path: str, ending: str) -> None:
    open_database(path, TABLES).close()
    Path(path + ending).write_bytes(b"")
    os.chmod(path + ending, 0o666)
    assert "other users can read or write it" in refusal(path)


@is_root
@pytest.mark.parametrize("ending", ["", *SIDE_FILES])
def test_a_file_of_another_user_is_refused(path: str, ending: str) -> None:
    open_database(path, TABLES).close()
    os.close(os.open(path + ending, os.O_CREAT | os.O_RDWR, 0o600))
    os.chown(path + ending, 65534, 65534)
    assert "it belongs to another user" in refusal(path)


def test_a_folder_in_which_everybody_can_replace_files_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    assert "is where every user can replace it" in refusal(str(tmp_path / "topics.db"))
    tmp_path.chmod(0o1777)  # as /tmp is
    open_database(str(tmp_path / "topics.db"), TABLES).close()


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    fifo = str(tmp_path / "fifo")
    os.mkfifo(fifo, 0o600)
    assert "it is not a file" in refusal(fifo)
    assert "Is a directory" in refusal(str(tmp_path))
    assert "No such file or directory" in refusal(str(tmp_path / "no folder" / "topics.db"))
    Path(tmp_path / "text").touch(0o600)
    assert "Not a directory" in refusal(str(tmp_path / "text" / "topics.db"))


@pytest.mark.parametrize("content", [b"a shopping list\n" * 100, b"x", bytes(4096)])
def test_a_file_of_another_kind_is_refused_and_left_alone(path: str, content: bytes) -> None:
    Path(path).write_bytes(content)
    os.chmod(path, 0o600)
    assert "is no keeper's file" in refusal(path)
    assert Path(path).read_bytes() == content


@pytest.mark.parametrize("application", [0, 0x12345678])
def test_a_database_of_another_program_is_refused_and_left_alone(
    path: str, application: int
) -> None:
    with sqlite3.connect(path) as other:
        other.execute(TABLES)
        other.execute(f"PRAGMA application_id = {application}")
    other.close()
    os.chmod(path, 0o600)
    content = Path(path).read_bytes()
    assert "is no keeper's file" in refusal(path)
    assert Path(path).read_bytes() == content


def test_a_file_of_a_newer_version_is_refused_and_left_alone(path: str) -> None:
    open_database(path, TABLES).close()
    with sqlite3.connect(path) as newer:
        newer.execute("PRAGMA user_version = 2")
    newer.close()
    content = Path(path).read_bytes()
    assert "was written by a newer version of the program" in refusal(path)
    assert Path(path).read_bytes() == content


def test_a_file_is_marked_as_ours(path: str) -> None:
    open_database(path, TABLES).close()
    content = Path(path).read_bytes()
    assert int.from_bytes(content[68:72], "big") == APPLICATION_ID == int(b"SMQT".hex(), 16)
    assert int.from_bytes(content[60:64], "big") == 1


HOLD = """
import signal
from secure_mqtt.topics.store import Store
store = Store(sys.argv[1])
print("open", flush=True)
signal.pause()
"""


def test_two_keepers_cannot_use_a_file_at_the_same_time(path: str) -> None:
    holder = child(HOLD, path)
    assert line_of(holder) == "open"
    assert "is in use by another process" in refusal(path)
    end(holder)
    open_store(path)  # whoever was killed holds nothing any more
    assert "is in use by another process" in refusal(path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "none", str(folder)]
    if subprocess.run(command, capture_output=True).returncode:
        pytest.skip("only who may mount disks can have a small one")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_file_on_a_disk_that_is_read_only_is_refused(small_disk: Path) -> None:
    path = str(small_disk / "topics.db")
    open_database(path, TABLES).close()
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert "Read-only file system" in refusal(path)


# --- that it keeps what it was told to keep ----------------------------------------------------


def test_a_disk_that_is_full_loses_nothing_and_is_used_again(small_disk: Path) -> None:
    database = open_database(str(small_disk / "topics.db"), TABLES)
    kept = 0

    def fill() -> None:
        nonlocal kept
        while True:
            with database.batch():
                database.execute("INSERT INTO numbers (content) VALUES (?)", bytes(10_000))
            kept += 1

    with pytest.raises(StoreError, match="the disk is full"):
        fill()
    assert 10 < kept < 100
    assert database.value("SELECT count(*) FROM numbers") == kept
    database.close()
    database = open_database(str(small_disk / "topics.db"), TABLES)
    assert database.value("SELECT count(*) FROM numbers") == kept
    subprocess.run(["mount", "-o", "remount,size=4m", str(small_disk)], check=True)
    with database.batch():
        database.execute("INSERT INTO numbers (content) VALUES (?)", bytes(100_000))
    assert database.value("SELECT count(*) FROM numbers") == kept + 1


def test_a_batch_that_fails_changes_nothing(path: str) -> None:
    database = open_database(path, TABLES)

    def insert(then: Callable[[], object]) -> None:
        with database.batch():
            database.execute("INSERT INTO numbers (number) VALUES (1)")
            then()

    with pytest.raises(ZeroDivisionError):
        insert(lambda: 1 / 0)
    with pytest.raises(StoreError, match="UNIQUE"):
        insert(lambda: database.execute("INSERT INTO numbers (number) VALUES (1)"))
    assert database.value("SELECT count(*) FROM numbers") == 0
    with database.batch():
        database.execute("INSERT INTO numbers (number) VALUES (1)")
    assert database.value("SELECT count(*) FROM numbers") == 1


def test_what_is_committed_was_flushed_to_the_disk(path: str) -> None:
    database = open_database(path, TABLES)
    assert database.value("PRAGMA journal_mode") == "wal"
    assert database.value("PRAGMA synchronous") == 2  # FULL
    assert database.value("PRAGMA secure_delete") == 1


COUNT = """
from secure_mqtt.topics.database import Database
database = Database(sys.argv[1], "CREATE TABLE numbers (number INTEGER PRIMARY KEY, content BLOB)")
while True:
    with database.batch():
        for _ in range(3):
            database.execute("INSERT INTO numbers (content) VALUES (?)", os.urandom(5000))
    print(database.value("SELECT max(number) FROM numbers"), flush=True)
"""


def test_what_was_acknowledged_survives_a_kill_at_any_moment(path: str) -> None:
    acknowledged = 0
    for _ in range(5):
        process = child(COUNT, path)
        for _ in range(random.randint(1, 30)):
            acknowledged = int(line_of(process))
        rest = end(process).split("\n")[:-1]
        acknowledged = int(rest[-1]) if rest else acknowledged
        database = open_database(path, TABLES)
        count, newest = database.execute("SELECT count(*), max(number) FROM numbers").fetchone()
        assert count == newest >= acknowledged
        assert count % 3 == 0  # no batch is there in part
        database.close()


ROTATE = """
from secure_mqtt.topics.store import Store
store = Store(sys.argv[1])
topic = store.topics.find("t")
if not topic:
    with store.database.batch():
        topic = store.topics.create("t", "alice", {"alice"}, 0)
while True:
    with store.database.batch():
        assert store.epochs.begin(topic, 0, 100, 30)
    topic = store.topics.find("t")
    print(topic.epoch, store.epochs.find(topic, topic.epoch).key.hex(), flush=True)
"""


def test_an_epochs_number_never_comes_again_whenever_the_keeper_is_killed(path: str) -> None:
    keys: dict[int, str] = {}
    for _ in range(5):
        process = child(ROTATE, path)
        lines = [line_of(process) for _ in range(random.randint(1, 20))]
        for line in [*lines, *end(process).split("\n")[:-1]]:
            number, key = line.split()
            assert int(number) > max(keys, default=0)
            assert key not in keys.values()
            keys[int(number)] = key


def test_a_keeper_that_was_killed_when_it_made_its_file_can_make_it_again(path: str) -> None:
    for delay in range(6):
        process = child("print('go', flush=True)\n" + ROTATE, path)
        assert line_of(process) == "go"
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(delay / 40)
        end(process)
        store = open_store(path)
        assert store.topics.count() in (0, 1)
        store.database.close()


def steps(database: Database, do: Callable[[], object]) -> int:
    """Return how many steps SQLite takes to do something."""
    taken: list[None] = []
    database._connection.set_progress_handler(lambda: taken.append(None), 1)
    do()
    database._connection.set_progress_handler(None, 1)
    return len(taken)


def test_what_is_due_is_found_among_many_keys_as_among_few(path: str) -> None:
    store = open_store(path)
    topic = create(store)
    before = steps(store.database, store.epochs.next_due)
    with store.database.batch():
        for number in range(2, 1_000):
            store.database.execute(
                "INSERT INTO epochs (topic, epoch, key, started, expires) VALUES (?, ?, '', 0, 0)",
                *(topic.id, number),
            )
    assert steps(store.database, store.epochs.next_due) == before
    assert store.epochs.next_due() == 100


# --- and no more -------------------------------------------------------------------------------


def everything_on_disk(path: str) -> bytes:
    """Return the content of the file and of those beside it."""
    paths = [path, *(path + ending for ending in SIDE_FILES)]
    return b"".join(Path(each).read_bytes() for each in paths if os.path.exists(each))


def create(store: Store, name: str = "t", history: int = 0) -> Topic:
    with store.database.batch():
        topic = store.topics.create(name, "alice", {"alice"}, history)
        assert store.epochs.begin(topic, 0, 100, 30)
    found = store.topics.find(name)
    assert found
    return found


def key_of(store: Store, topic: Topic, number: int) -> bytes:
    epoch = store.epochs.find(topic, number)
    assert epoch
    return epoch.key


def test_a_key_is_gone_from_the_disk_when_it_has_expired(path: str) -> None:
    store = open_store(path)
    topic = create(store)
    old = key_of(store, topic, 1)
    with store.database.batch():
        assert store.epochs.begin(topic, 100, 100, 30)
    assert old in everything_on_disk(path)
    topic = store.topics.find("t") or topic
    with store.database.batch():
        store.epochs.close(topic, 1, 129)
    assert old in everything_on_disk(path)
    with store.database.batch():
        store.epochs.close(topic, 1, 130)
    assert old not in everything_on_disk(path)
    assert key_of(store, topic, 2) in everything_on_disk(path)


def test_a_removal_takes_the_old_key_from_the_disk_at_once(path: str) -> None:
    store = open_store(path)
    topic = create(store)
    old = key_of(store, topic, 1)
    with store.database.batch():
        assert store.epochs.begin(topic, 50, 100, 0)
    assert old not in everything_on_disk(path)


def test_a_key_stays_as_long_as_a_message_needs_it(path: str) -> None:
    store = open_store(path)
    topic = create(store, history=2)
    old = key_of(store, topic, 1)
    with store.database.batch():
        store.epochs.use(topic, 1, 1)
        assert store.messages.add(topic, b"the first message") == 1
    topic = store.topics.find("t") or topic
    with store.database.batch():
        assert store.epochs.begin(topic, 50, 100, 0)
    assert old in everything_on_disk(path)
    for number in 2, 3:
        topic = store.topics.find("t") or topic
        with store.database.batch():
            store.epochs.use(topic, 2, number)
            store.epochs.forget(topic, store.messages.add(topic, b"a later message"))
        assert (old in everything_on_disk(path)) == (number == 2)
    assert b"the first message" not in everything_on_disk(path)


def test_a_topic_that_is_deleted_is_gone_from_the_disk(path: str) -> None:
    store = open_store(path)
    topic, other = create(store, "secret/topic", 10), create(store, "other")
    key = key_of(store, topic, 1)
    with store.database.batch():
        store.messages.add(topic, b"what was published" * 1000)
        store.sessions.introduce(topic, bytes(16), "alice", b"her hello")
    content = everything_on_disk(path)
    secrets = [key, b"secret/topic", b"what was published", b"her hello"]
    assert all(secret in content for secret in secrets)
    with store.database.batch():
        store.topics.delete(topic)
    content = everything_on_disk(path)
    assert not any(secret in content for secret in secrets)
    assert key_of(store, other, 1) in content


def test_a_keeper_that_was_killed_after_it_deleted_a_key_leaves_none_on_the_disk(
    path: str,
) -> None:
    """SQLite's log has the key still, until the next start empties it."""
    store = open_store(path)
    topic = create(store)
    old = key_of(store, topic, 1)
    store.database.close()
    process = child(
        """
from secure_mqtt.topics.store import Store
store = Store(sys.argv[1])
store.database._forget_keys = lambda: os._exit(0)
with store.database.batch():
    store.epochs.begin(store.topics.find("t"), 50, 100, 0)
""",
        path,
    )
    process.communicate(timeout=SAFETY)
    assert process.returncode == 0
    store = open_store(path)
    found = store.topics.find("t")
    assert found
    assert found.epoch == 2
    assert old not in everything_on_disk(path)


# --- bounds ------------------------------------------------------------------------------------


def test_a_history_keeps_the_newest_messages_within_its_count(path: str) -> None:
    store = open_store(path)
    create(store, history=3)
    with store.database.batch():
        for number in range(1, 8):
            topic = store.topics.find("t")
            assert topic
            store.messages.add(topic, b"%d" % number)
    topic = store.topics.find("t")
    assert topic
    assert [*store.messages.after(topic, 0)] == [(5, b"5"), (6, b"6"), (7, b"7")]
    assert [*store.messages.after(topic, 6)] == [(7, b"7")]
    assert (topic.oldest, topic.newest, topic.bytes) == (5, 7, 3)


def test_a_history_keeps_the_newest_messages_within_64_mib(path: str) -> None:
    assert store_module.MAX_HISTORY_SIZE == 64 * 2**20
    store = open_store(path)
    create(store, history=100_000)
    size = 2**20
    for _ in range(66):
        topic = store.topics.find("t")
        assert topic
        with store.database.batch():
            store.messages.add(topic, bytes(size))
    topic = store.topics.find("t")
    assert topic
    assert (topic.oldest, topic.newest, topic.bytes) == (3, 66, 64 * size)
    assert len([*store.messages.after(topic, 0)]) == 64


def test_a_topic_that_comes_again_goes_on_above_the_epochs_that_it_had(path: str) -> None:
    store = open_store(path)
    topic = create(store)
    assert topic.epoch == 1
    with store.database.batch():
        for _ in range(4):
            topic = store.topics.find("t") or topic
            store.epochs.begin(topic, 0, 100, 30)
        store.topics.delete(store.topics.find("t") or topic)
    assert create(store).epoch == 6
    store.database.close()
    store = open_store(path)
    with store.database.batch():
        store.topics.delete(store.topics.find("t") or topic)
    assert create(store).epoch == 7
