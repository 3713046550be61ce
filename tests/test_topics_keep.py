"""The keeper in its process, at a real broker."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import sqlite3
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import (
    SAFETY,
    Mosquitto,
    Peer,
    ResponderProcess,
    error_lines,
    is_running,
    processes_below,
    run,
    wait_until,
)
from hostile import DISCONNECT, QOS_0, connect, packet, publish
from issuing import pem
from keeping import COURSE, Member, keeper_options, private_pem
from members import TOPIC, Certifier

from secure_mqtt.mailboxes import MAX_MESSAGES
from secure_mqtt.topics.database import APPLICATION_ID, VERSION
from secure_mqtt.topics.messages import MAX_DATA_SIZE, NOTICE, make_notice
from secure_mqtt.topics.requests import MAX_REQUEST_SIZE, Joined, RefusedError

Start = Callable[..., ResponderProcess]
Connect = Callable[..., Peer]


class Site:
    """A broker with a keeper, and whoever talks to it."""

    def __init__(self, folder: Path, broker: Mosquitto, start: Start, connect: Connect) -> None:
        self.broker, self.folder = broker, folder
        self._start, self._connect = start, connect
        self.options = keeper_options(folder, broker.port)
        self.file = folder / "topics.db"
        self.keeper: ResponderProcess

    def start(self, *options: str) -> Site:
        """Start the keeper."""
        self.keeper = self._start(*self.options, *options, ready=False)
        self.keeper.wait_for("ready: ")
        return self

    def restart(self, *options: str) -> None:
        """Kill the keeper, and start it again."""
        self.kill()
        self.start(*options)

    def kill(self) -> None:
        """End all its processes, as a power cut does."""
        processes = processes_below(self.keeper.process.pid)
        self.keeper.stop(signal.SIGKILL)
        wait_until(lambda: not any(map(is_running, processes)))

    @property
    def process(self) -> int:
        """The process that has the file."""
        [found] = [
            pid
            for pid in processes_below(self.keeper.process.pid)
            if str(self.file) in map(os.path.realpath, Path(f"/proc/{pid}/fd").iterdir())
        ]
        return found

    def member(self, name: str, *topics: str, suite: str = "x25519") -> Member:
        """Return a member, subscribed to topics, that has made an exchange."""
        return self.stranger(name, *topics, suite=suite).agree()

    def again(self, member: Member) -> Member:
        """Let a member whose connection was lost connect again, and make an exchange."""
        return member.connect(self._connect(self.broker.port, f"{member.name}/+/response"))

    def stranger(
        self, name: str, *topics: str, suite: str = "x25519", certifier: Certifier = COURSE
    ) -> Member:
        """Return who has not made an exchange yet."""
        peer = self._connect(self.broker.port, f"{name}/+/response", *topics)
        return Member(peer, name, suite, certifier)


@pytest.fixture
def site(tmp_path: Path, own_broker: Mosquitto, start_responder: Start, peer: Connect) -> Site:
    """A broker, and all that a keeper needs."""
    return Site(tmp_path / "keeper", own_broker, start_responder, peer)


def has_kept(member: Member, payloads: list[bytes]) -> bool:
    """Tell whether these are the earlier messages."""
    return [message.payload for message in member.page().messages] == payloads


def publish_and_keep(site: Site, data: bytes) -> tuple[Member, Joined, bytes]:
    """Return alice, the answer to her when she joined her topic, and what the keeper has of her."""
    alice = site.member("alice")
    alice.ask("create", TOPIC, [], 100)
    joined = alice.join()
    payload = alice.publish(joined, data)
    wait_until(lambda: has_kept(alice, [payload]))
    return alice, joined, payload


def lab_request(site: Site, name: str, *options: str) -> str:
    """Send a request of the lab, signed, and return the answer."""
    identity = site.folder / f"{name}.pem"
    identity.write_bytes(private_pem(COURSE.member(name)))
    identity.chmod(0o600)
    security = f"--identity={identity}", f"--peer-ca={site.folder / 'ca.pem'}"
    result = run("-p", str(site.broker.port), *security, *options, name, "reverse", "Networking")
    assert error_lines(result) == ""
    return result.stdout.decode()


# --- what it does ------------------------------------------------------------------------------


@pytest.mark.parametrize("suite", ["x25519", "mlkem768x25519"])
def test_members_share_a_topic_by_its_keeper(site: Site, suite: str) -> None:
    site.start()
    alice, bob = site.member("alice", suite=suite), site.member("bob", suite=suite)
    assert alice.ask("create", TOPIC, ["bob"], 100) == {}
    joined = alice.join()
    assert bob.join().key == joined.key
    payloads = [alice.publish(joined, b"%d" % number) for number in range(3)]
    wait_until(lambda: has_kept(bob, payloads))


def test_a_message_right_after_the_topic_is_created_is_kept(site: Site) -> None:
    alice = site.start().member("alice")
    for number in range(20):
        topic = f"{TOPIC}/{number}"
        alice.renew_session(topic)
        alice.ask("create", topic, [], 1)
        payload = alice.publish(alice.join(topic), b"first", topic)
        wait_until(lambda topic=topic: alice.ask("history", topic, 0).messages)  # type: ignore[misc]
        [message] = alice.ask("history", topic, 0).messages
        assert message.payload == payload


def test_many_requests_of_one_exchange_are_answered_each(site: Site) -> None:
    alice = site.start().member("alice")
    alice.ask("create", TOPIC, [], 0)
    for _ in range(300):
        alice.send("join", TOPIC, None)
    assert len({alice.answer("join").key for _ in range(300)}) == 1


def test_a_keeper_answers_the_labs_requests_as_ever(site: Site) -> None:
    site.start()
    assert lab_request(site, "bob") == "gnikrowteN\n"
    assert lab_request(site, "bob", "--suite", "mlkem768x25519") == "gnikrowteN\n"


def test_what_is_asked_in_the_labs_suite_gets_no_answer(site: Site) -> None:
    site.start()
    eve = site.member("eve", suite="dh4096")
    eve.send("create", TOPIC, [], 0)
    site.keeper.wait_for('ignored netid="eve" action="topic"')
    assert site.member("alice").ask("create", TOPIC, [], 0) == {}


def test_a_responder_that_keeps_no_topics_answers_nothing_about_them(site: Site) -> None:
    keeper = site._start(*[each for each in site.options if each not in keep_options(site)])
    alice = site.member("alice")
    alice.send("create", TOPIC, [], 0)
    keeper.wait_for('reason="unknown action"')


def keep_options(site: Site) -> tuple[str, str]:
    """Return the options without which a responder keeps no topics."""
    return "--keep", str(site.file)


def test_a_request_that_comes_again_is_not_done_again(site: Site) -> None:
    alice = site.start().member("alice")
    asking = "alice/topic/request"
    recorded = alice.seal("create", TOPIC, ["bob"], 0)
    alice.peer.publish(asking, recorded)
    assert alice.answer("create") == {}
    assert alice.ask("delete", TOPIC) == {}
    alice.peer.publish(asking, recorded)
    site.keeper.wait_for("here before")
    with pytest.raises(RefusedError):
        alice.ask("join", TOPIC, None)


def test_the_largest_request_is_answered_and_no_larger_one(site: Site) -> None:
    alice = site.start().member("alice")
    alice.ask("create", TOPIC, [], 0)
    names = [f"m{number}-{'x' * 56}" for number in range(9_000)]
    assert alice.ask("admit", TOPIC, names) == {}
    alice.send_raw(b" " * (MAX_REQUEST_SIZE + 1))
    site.keeper.wait_for('ignored netid="alice" action="topic"')
    assert len(alice.ask("list")[0].members) == 9_001


def test_what_is_no_request_is_answered_by_words(site: Site) -> None:
    alice = site.start().member("alice")
    for request in (b"", b"\xff", b"[]", b'{"do": "dance"}', b'{"do": "join", "topic": "a/#"}'):
        alice.send_raw(request)
        with pytest.raises(RefusedError):
            alice.answer("join")


def test_only_members_messages_are_kept_and_the_others_counted(site: Site) -> None:
    alice = site.start().member("alice")
    alice.ask("create", TOPIC, [], 100)
    joined = alice.join()
    right = alice.publish(joined, b"right")
    forged = bytearray(alice.sealed(joined, b"forged"))
    forged[-1] ^= 1
    largest = alice.sealed(joined, bytes(MAX_DATA_SIZE))
    for payload in (bytes(forged), b"", b"garbage", right, largest + b"x", largest):
        alice.peer.publish(TOPIC, payload)
    wait_until(lambda: has_kept(alice, [right]) or alice.page(1).messages)
    assert [message.payload for message in alice.page().messages + alice.page(1).messages] == [
        right,
        largest,
    ]
    site.keeper.wait_for("event=unkept")


def test_status_counts_topics_members_and_messages(site: Site) -> None:
    site.start()
    alice = site.member("alice")
    alice.ask("create", TOPIC, ["bob", "carol"], 100)
    payload = alice.publish(alice.join(), b"text")
    wait_until(lambda: has_kept(alice, [payload]))
    site.restart("--status-topic", "status/keeper")
    watcher = site.stranger("watcher", "status/keeper").peer
    wait_until(lambda: counts(watcher) == (1, 3, 1))


def counts(watcher: Peer) -> tuple[int, ...]:
    """Return what the next status says of topics, members and messages."""
    status = json.loads(watcher.receive("status/keeper"))
    return tuple(status.get(name) for name in ("topics", "members", "messages"))


# --- renewal -----------------------------------------------------------------------------------


def test_keys_are_renewed_by_time_whether_anybody_asks_or_not(site: Site) -> None:
    site.start("--rotate", "1")
    alice = site.member("alice")
    for topic in TOPIC, "another":
        alice.ask("create", topic, [], 0)
    first = alice.join()
    assert first.renew <= 1
    assert first.expires <= 2
    wait_until(lambda: alice.ask("join", "another", None).epoch > 4)
    second = alice.ask("join", TOPIC, None)
    assert second.epoch >= 4
    assert second.key != first.key


def test_a_removal_begins_an_epoch_at_once(site: Site) -> None:
    site.start()
    alice, bob = site.member("alice"), site.member("bob", TOPIC)
    alice.ask("create", TOPIC, ["bob"], 0)
    assert bob.join().epoch == 1
    alice.ask("remove", TOPIC, ["bob"])
    assert bob.peer.receive(TOPIC) == make_notice(2)
    with pytest.raises(RefusedError):
        bob.ask("join", TOPIC, None)
    joined = alice.join()
    assert (joined.epoch, joined.previous) == (2, None)


def test_a_topic_that_is_deleted_is_not_kept_any_more_and_may_come_again(site: Site) -> None:
    alice = site.start().member("alice")
    alice.ask("create", TOPIC, [], 100)
    before = alice.join()
    alice.ask("delete", TOPIC)
    alice.publish(before, b"late")
    alice.ask("create", TOPIC, [], 100)
    joined = alice.join()
    assert joined.epoch > before.epoch
    payload = alice.publish(joined, b"new")
    wait_until(lambda: has_kept(alice, [payload]))


# --- what is lost, and what is not -------------------------------------------------------------


def test_what_was_acknowledged_outlasts_a_kill(site: Site) -> None:
    site.start()
    alice, joined, payload = publish_and_keep(site, b"text")
    seen = [joined]
    for number in range(5):
        name = f"m{number}"
        alice.ask("admit", TOPIC, [name])
        alice.ask("remove", TOPIC, [name])
        seen.append(alice.ask("join", TOPIC, None))
        site.restart()
        alice.agree()
        assert has_kept(alice, [payload])
        [topic] = alice.ask("list")
        assert topic.members == ["alice"]
    assert [joined.epoch for joined in seen] == sorted({joined.epoch for joined in seen})
    assert len({joined.key for joined in seen}) == len(seen)


def test_a_keeper_that_is_killed_while_it_keeps_has_what_came_first_and_its_counter(
    site: Site,
) -> None:
    site.start()
    alice = site.member("alice")
    alice.ask("create", TOPIC, [], 10_000)
    joined = alice.join()
    payloads = [alice.sealed(joined, b"%d" % number) for number in range(2_000)]
    os.kill(site.process, signal.SIGSTOP)  # so that all wait at the broker
    for payload in payloads:
        alice.peer.publish(TOPIC, payload)
    os.kill(site.process, signal.SIGCONT)
    wait_until(lambda: bool(alice.page(-1).messages))
    site.restart()
    alice.agree()
    kept = alice.ask("history", TOPIC, -10_000).messages
    assert [each.payload for each in kept] == payloads[: len(kept)]
    number = alice.join().number
    assert 0 < number <= len(payloads)
    assert alice.join().counters == {alice.session.session: number - 1}


def test_a_keeper_outlasts_its_broker(site: Site) -> None:
    site.start()
    alice, joined, payload = publish_and_keep(site, b"before")
    site.broker.restart()
    site.keeper.wait_for("event=keeping", times=2)
    site.keeper.wait_for("ready: ", times=2)
    alice = site.again(alice)
    rejoined = alice.join()
    assert rejoined.epoch > joined.epoch  # what was published meanwhile may be missing
    assert rejoined.counters == {alice.session.session: 0}
    after = alice.publish(rejoined, b"after")
    wait_until(lambda: has_kept(alice, [payload, after]))


def test_who_publishes_much_does_not_lock_others_out(site: Site) -> None:
    site.start()
    alice, bob = site.member("alice"), site.member("bob")
    alice.ask("create", TOPIC, ["bob"], 100_000)
    joined = bob.join()
    os.kill(site.process, signal.SIGSTOP)
    for number in range(3_000):
        bob.publish(joined, b"%d" % number)
    os.kill(site.process, signal.SIGCONT)
    assert alice.ask("remove", TOPIC, ["bob"]) == {}
    assert alice.join().number < 3_000  # the answer did not wait for all of them
    assert lab_request(site, "carol") == "gnikrowteN\n"


def test_a_keeper_that_had_no_room_for_messages_keeps_those_that_follow(site: Site) -> None:
    """Else the broker would wait for the acknowledgement of those, mosquitto for that of 20."""
    alice = site.start().member("alice")
    alice.ask("create", TOPIC, [], 100)
    joined = alice.join()
    os.kill(site.process, signal.SIGSTOP)  # so that all wait at the broker
    with socket.create_connection(("127.0.0.1", site.broker.port)) as flood:
        flood.sendall(connect("flood") + publish(TOPIC, b"", QOS_0) * 3 * MAX_MESSAGES)
        flood.sendall(publish(TOPIC, b"") + packet(DISCONNECT))
        while flood.recv(4096):  # until the broker has taken all
            pass
    for _ in range(30):
        alice.peer.publish(TOPIC, b"no message")
    os.kill(site.process, signal.SIGCONT)
    site.keeper.wait_for("too many at a time")
    payload = alice.publish(joined, b"text")
    wait_until(lambda: has_kept(alice, [payload]))


def test_a_keeper_takes_the_authority_that_has_replaced_another(site: Site) -> None:
    site.start()
    other = Certifier()
    alice = site.stranger("alice", certifier=other)
    (site.folder / "ca.pem").write_bytes(pem(COURSE.certificate) + pem(other.certificate))
    site.broker.restart()
    site.keeper.wait_for("ready: ", times=2)
    alice.expects(COURSE)
    alice = site.again(alice)
    alice.ask("create", TOPIC, [], 0)
    assert alice.join().epoch == 1


# --- its processes -----------------------------------------------------------------------------


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT])
def test_a_keeper_that_is_stopped_finishes_what_is_under_way(site: Site, how: int) -> None:
    site.start()
    alice = site.member("alice")
    for number in range(50):
        alice.send("create", f"{TOPIC}/{number}", [], 0)
    site.keeper.wait_for('answered netid="alice" action="topic"')
    processes = processes_below(site.keeper.process.pid)
    assert site.keeper.stop(how) == 0
    wait_until(lambda: not any(map(is_running, processes)))
    assert not Path(f"{site.file}-wal").exists()  # it was closed
    answering = "alice/topic/response"
    alice.peer.publish(answering, b"the end")
    answers = [*iter(lambda: alice.peer.receive(answering), b"the end")]
    site.start()
    assert len(alice.agree().ask("list")) == len(answers) > 0


def test_a_responder_whose_keeper_has_ended_ends_with_an_error(site: Site) -> None:
    site.start()
    os.kill(site.process, signal.SIGKILL)
    assert site.keeper.process.wait(SAFETY) == 1
    site.keeper.wait_for("error: a process of the responder was ended")


def test_a_keeper_whose_responder_was_killed_ends(site: Site) -> None:
    site.start()
    process = site.process
    os.kill(site.keeper.process.pid, signal.SIGKILL)
    wait_until(lambda: not is_running(process))


# --- the file ----------------------------------------------------------------------------------


def other_program(file: Path) -> None:
    database = sqlite3.connect(file)
    database.execute("CREATE TABLE others (thing)")
    database.commit()
    database.close()


def newer_version(file: Path) -> None:
    database = sqlite3.connect(file)
    database.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    database.execute(f"PRAGMA user_version = {VERSION + 1}")
    database.execute("CREATE TABLE topics (thing)")
    database.commit()
    database.close()


def readable_by_others(file: Path) -> None:
    file.touch()
    file.chmod(0o644)


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a directory": (Path.mkdir, "cannot be used: Is a directory"),
    "a text": (lambda file: file.write_text("text" * 999), "is no keeper's file"),
    "of another program": (other_program, "is no keeper's file"),
    "of a newer version": (newer_version, "was written by a newer version"),
    "readable by others": (readable_by_others, "other users can read or write it"),
    "a pipe": (os.mkfifo, "it is not a file"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_file_that_cannot_be_used_is_an_error_before_ready(site: Site, kind: str) -> None:
    make, problem = FILES[kind]
    make(site.file)
    if site.file.is_file() and kind != "readable by others":
        site.file.chmod(0o600)
    result = run("--respond", *site.options)
    assert result.returncode == 1
    assert f"error: the keeper's file {site.file} " in error_lines(result)
    assert problem in error_lines(result)
    assert "ready" not in error_lines(result)


def test_a_file_in_a_folder_that_does_not_exist_is_an_error(site: Site) -> None:
    result = run("--respond", *site.options, "--keep", str(site.folder / "none" / "topics.db"))
    assert result.returncode == 1
    assert "No such file or directory" in error_lines(result)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write it")
def test_a_file_that_may_not_be_written_is_an_error(site: Site) -> None:
    site.file.touch()
    site.file.chmod(0o400)
    result = run("--respond", *site.options)
    assert result.returncode == 1
    assert "Permission denied" in error_lines(result)


def test_a_file_that_another_keeper_uses_is_an_error(site: Site) -> None:
    site.start()
    result = run("--respond", *site.options)
    assert result.returncode == 1
    assert "is in use by another process" in error_lines(result)
    assert "hint: only one keeper can use it: stop the other" in error_lines(result)
    assert site.member("alice").ask("create", TOPIC, [], 0) == {}


def test_a_file_that_does_not_exist_is_made_for_us_alone(site: Site) -> None:
    site.start()
    for path in site.folder.glob("topics.db*"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


@pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="needs Linux")
def test_a_disk_that_is_full_takes_nothing_that_was_acknowledged(site: Site) -> None:
    site.start()
    alice, joined, payload = publish_and_keep(site, b"before")
    resource.prlimit(site.process, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
    with pytest.raises(RefusedError, match="can't write its file"):
        alice.ask("create", "another", [], 0)
    site.keeper.wait_for("event=failed")
    assert [topic.topic for topic in alice.ask("list")] == [TOPIC]  # what needs no room is done
    alice.publish(joined, b"lost")
    site.keeper.wait_for("event=disconnected")
    limit = resource.RLIM_INFINITY, resource.RLIM_INFINITY
    resource.prlimit(site.process, resource.RLIMIT_FSIZE, limit)
    site.keeper.wait_for("event=keeping", times=2)
    rejoined = alice.join()
    assert rejoined.epoch > joined.epoch  # so its sender learns that it is not kept ...
    assert rejoined.counters == {alice.session.session: 0}
    assert has_kept(alice, [payload])
    assert alice.ask("create", "another", [], 0) == {}


@pytest.fixture
def small_disk(site: Site) -> Iterator[Path]:
    """A disk of 1 MB that holds the keeper's file."""
    disk = site.folder / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m,mode=700", "tmpfs", disk]).returncode:
        pytest.skip("only root may mount a small disk")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


def test_a_keeper_goes_on_when_there_is_room_again(site: Site, small_disk: Path) -> None:
    filler = small_disk / "filler"
    site.start("--keep", str(small_disk / "topics.db"))
    alice = site.member("alice")
    alice.ask("create", TOPIC, [], 0)
    names = [f"m{number}-{'x' * 50}" for number in range(2_000)]
    with contextlib.suppress(OSError):
        filler.write_bytes(bytes(2**20))
    with pytest.raises(RefusedError, match="can't write its file"):
        alice.ask("admit", TOPIC, names)
    site.keeper.wait_for("cannot be written: the disk is full")
    assert [topic.members for topic in alice.ask("list")] == [["alice"]]
    filler.unlink()
    assert alice.ask("admit", TOPIC, names) == {}
    site.restart("--keep", str(small_disk / "topics.db"))
    [topic] = alice.agree().ask("list")
    assert len(topic.members) == 2_001


def test_notices_are_nothing_that_is_kept(site: Site) -> None:
    alice = site.start().member("alice")
    alice.ask("create", TOPIC, [], 100)
    joined = alice.join()
    for number in range(3):
        alice.peer.publish(TOPIC, make_notice(number + 5))
    payload = alice.publish(joined, b"text")
    wait_until(lambda: has_kept(alice, [payload]))
    assert payload[0] != NOTICE
    assert not site.keeper.has_said("event=unkept")
