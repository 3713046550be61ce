"""SIGHUP: a responder reads its files again, connects anew, and loses nothing by it."""

from __future__ import annotations

import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import broker_side
import pytest
from broker_side import issue, set_password
from conftest import (
    PROGRAM,
    Mosquitto,
    Peer,
    ResponderProcess,
    is_running,
    processes_below,
    run,
    wait_until,
)
from cryptography import x509
from hostile import LabClient

import crypto

Start = Callable[..., ResponderProcess]
Connect = Callable[..., Peer]

certificates, own = broker_side.certificates, broker_side.own


def hang_up(responder: ResponderProcess) -> None:
    responder.process.send_signal(signal.SIGHUP)


def answers(port: int, *options: str) -> bool:
    result = run(f"-p{port}", *options, "alice", "reverse", "text")
    assert (result.stdout, result.stderr) == (b"txet\n", b"")
    return True


def test_requests_that_come_while_it_connects_anew_are_answered_once_and_in_order(
    own_broker: Mosquitto, start_responder: Start, peer: Connect
) -> None:
    responder = start_responder(f"-p{own_broker.port}")
    client = peer(own_broker.port, "alice/+/response")
    private, public = crypto.generate_keyset()
    client.publish("alice/key-exchange/request", public)
    key = crypto.create_shared_key(private, client.receive("alice/key-exchange/response"))
    sent = [f"request {number}" for number in range(1000)]
    for number, text in enumerate(sent):
        if number % 300 == 100:
            hang_up(responder)
        client.publish("alice/lowercase/request", crypto.encrypt(text, key))
    answered = [
        crypto.decrypt(client.receive("alice/lowercase/response"), key).decode() for _ in sent
    ]
    assert answered == sent
    responder.wait_for("ready", times=2)
    client.publish("alice/none/request", b"")  # an answer too many would have come before this
    responder.wait_for("unknown action")
    assert not [line for line in responder.lines if "ready" not in line][1:]


def test_a_session_of_numbered_requests_goes_on_while_it_connects_anew(
    own_broker: Mosquitto, start_responder: Start
) -> None:
    responder = start_responder("-v", f"-p{own_broker.port}")
    lines = "".join(f"Line {number}\n" for number in range(3000))
    command = [sys.executable, str(PROGRAM), f"-p{own_broker.port}", "--suite=x25519", "--lines"]
    with subprocess.Popen(
        [*command, "-W10", "alice", "lowercase", "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as session:
        assert session.stdin
        assert session.stdout
        responder.wait_for("event=ready")
        session.stdin.write(lines.encode())
        session.stdin.close()
        read = b""
        for times in 2, 3:
            hang_up(responder)
            read += b"".join(session.stdout.readline() for _ in range(500))
            responder.wait_for("event=ready", times=times)
        read += session.stdout.read()
    assert session.returncode == 0
    assert read.decode() == lines.lower()
    assert not responder.has_said("level=warning")


def identity_shown(client: LabClient) -> int:
    """Return the serial number of the certificate in message 2."""
    answer = client.ask("key-exchange", crypto.generate_keyset()[1])
    return x509.load_pem_x509_certificate(answer[answer.index(b"-----BEGIN CERT") :]).serial_number


def serial(directory: Path, name: str) -> int:
    return broker_side.load(directory, name).serial_number


def test_a_renewed_identity_is_used_and_a_broken_one_is_not(
    own_broker: Mosquitto, start_responder: Start, own: Path
) -> None:
    identity = own / "responder.pem"
    responder = start_responder("-v", f"-p{own_broker.port}", f"--identity={identity}")
    with LabClient(own_broker.port, "alice") as client:
        assert identity_shown(client) == serial(own, "responder")
        issue(own, "responder", names=("responder",))
        hang_up(responder)
        responder.wait_for("event=ready", times=2)
        assert identity_shown(client) == serial(own, "responder")
        identity.write_bytes(identity.read_bytes()[:-100])
        hang_up(responder)
        responder.wait_for(f'event=unchanged reason="--identity {identity} does not hold')
        assert identity_shown(client) == serial(own, "responder")
    assert responder.has_said("event=connected", times=2)
    assert not responder.has_said("event=disconnected")


def test_other_authorities_count_at_once_and_end_the_keys_of_the_old_ones(
    own_broker: Mosquitto, start_responder: Start, own: Path, certificates: Path, tmp_path: Path
) -> None:
    other = broker_side.made(tmp_path / "other", "alice")
    options = [f"--identity={own}/responder.pem", f"--peer-ca={own}/ca.crt"]
    responder = start_responder(f"-p{own_broker.port}", *options)
    suite = "--suite=x25519"
    assert answers(own_broker.port, suite, f"--identity={own}/alice.pem")
    shutil.copy(other / "ca.crt", own)
    hang_up(responder)
    responder.wait_for("ready", times=2)
    assert answers(own_broker.port, suite, f"--identity={other}/alice.pem")
    refused = run(
        f"-p{own_broker.port}", "-W1", f"--identity={own}/alice.pem", "alice", "reverse", "text"
    )
    assert refused.returncode == 1
    responder.wait_for("from an unknown authority")


@pytest.fixture
def tls_broker(start_broker: Callable[[str], Mosquitto], own: Path) -> Mosquitto:
    """A broker that logs the names in its clients' certificates."""
    return start_broker(
        f"cafile {own}/ca.crt\ncertfile {own}/localhost.crt\nkeyfile {own}/localhost.key\n"
        "require_certificate true\nuse_identity_as_username true",
    )


def test_a_renewed_certificate_for_tls_is_shown_to_the_broker_and_a_broken_one_is_not(
    tls_broker: Mosquitto, start_responder: Start, own: Path, tmp_path: Path
) -> None:
    log = tmp_path / f"mosquitto-{tls_broker.port}.log"
    files = [f"--cert={own}/responder.crt", f"--key={own}/responder.key", f"--cafile={own}/ca.crt"]
    responder = start_responder("-v", f"-p{tls_broker.port}", *files)
    issue(own, "responder", subject="renewed")
    hang_up(responder)
    responder.wait_for("event=ready", times=2)
    wait_until(lambda: "u'renewed'" in log.read_text())
    for spoil in (
        lambda: issue(own, "responder", issuer="bob"),  # the broker refuses it
        lambda: shutil.copy(own / "bob.key", own / "responder.key"),
        (own / "responder.crt").unlink,
    ):
        count = sum("event=unchanged" in line for line in responder.lines)
        spoil()
        hang_up(responder)
        responder.wait_for("event=unchanged", times=count + 1)
        client = [f"--cert={own}/alice.crt", f"--key={own}/alice.key", f"--cafile={own}/ca.crt"]
        assert answers(tls_broker.port, *client)
    assert responder.stop() == 0


def test_a_keeper_shows_its_renewed_certificate_on_both_connections(
    tls_broker: Mosquitto, start_responder: Start, own: Path, tmp_path: Path
) -> None:
    log = tmp_path / f"mosquitto-{tls_broker.port}.log"
    files = [f"--cert={own}/responder.crt", f"--key={own}/responder.key", f"--cafile={own}/ca.crt"]
    identity = [f"--identity={own}/responder.pem", f"--peer-ca={own}/ca.crt"]
    keep = f"--keep={tmp_path}/topics.db"
    responder = start_responder("-v", f"-p{tls_broker.port}", keep, *files, *identity)
    issue(own, "responder", subject="renewed", names=("responder",))
    hang_up(responder)
    wait_until(lambda: log.read_text().count("u'renewed'") == 2)
    assert re.search(r"as responder\w{8}-keep .*u'renewed'", log.read_text())
    (own / "responder.key").unlink()
    hang_up(responder)
    responder.wait_for("event=unchanged")
    assert responder.stop() == 0


def test_a_changed_password_is_read(
    start_broker: Callable[[str], Mosquitto], start_responder: Start, tmp_path: Path
) -> None:
    set_password(tmp_path, "me", "old")
    passwords = tmp_path / "passwords"
    passwords.chmod(0o644)
    broker = start_broker(f"password_file {passwords}\nallow_anonymous false")
    file = tmp_path / "password"
    file.write_text("old\n")
    responder = start_responder("-v", f"-p{broker.port}", "-ume", f"--password-file={file}")
    file.write_text("wrong\n")
    hang_up(responder)
    responder.wait_for('event=unchanged reason="the broker')
    set_password(tmp_path, "me", "new")
    file.write_text("new\n")
    broker.restart()
    responder.wait_for("event=ready", times=2)
    hang_up(responder)
    responder.wait_for("event=ready", times=3)
    assert responder.stop() == 0


def test_a_responder_with_an_id_of_its_own_throws_itself_off_and_goes_on(
    own_broker: Mosquitto, start_responder: Start
) -> None:
    responder = start_responder("-v", f"-p{own_broker.port}", "--id=one")
    hang_up(responder)
    responder.wait_for("event=ready", times=2)
    assert answers(own_broker.port)
    assert not responder.has_said("level=warning")


def test_while_its_broker_is_away_it_tries_at_once(
    own_broker: Mosquitto, start_responder: Start
) -> None:
    own_broker.kill()
    responder = start_responder("-v", f"-p{own_broker.port}", ready=False)
    for times in range(1, 6):  # so often that it would wait for 16 seconds and more
        responder.wait_for("event=disconnected", times=times)
        hang_up(responder)
    own_broker.start()
    hang_up(responder)
    responder.wait_for("event=ready", seconds=10)


def test_its_processes_outlast_the_signal(own_broker: Mosquitto, start_responder: Start) -> None:
    responder = start_responder("-v", f"-p{own_broker.port}")
    children = processes_below(responder.process.pid)
    for pid in [*children, responder.process.pid]:
        os.kill(pid, signal.SIGHUP)
    responder.wait_for("event=ready", times=2)
    assert answers(own_broker.port)
    assert all(map(is_running, children))


@pytest.mark.parametrize("is_ignored", [False, True], ids=["so", "under nohup"])
def test_it_ends_when_its_terminal_is_closed_unless_it_ignores_that(
    own_broker: Mosquitto, is_ignored: bool
) -> None:
    process, terminal = pty.fork()
    if process == 0:
        if is_ignored:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
        command = [sys.executable, str(PROGRAM), "--respond", f"-p{own_broker.port}"]
        os.execv(command[0], command)
    with open(terminal, "rb", buffering=0) as screen:
        output = b""
        while b"ready" not in output:
            output += screen.read(1000)
    if is_ignored:
        assert answers(own_broker.port)
        os.kill(process, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
