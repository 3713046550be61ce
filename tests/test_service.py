"""A responder as a service: what it tells the service manager, and the units in deploy/."""

from __future__ import annotations

import contextlib
import os
import re
import select
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import conftest
import pytest
from broker_side import made, started
from conftest import PROGRAM, ROOT, SAFETY, Mosquitto, ResponderProcess, run
from hostile import changed_program

import secure_mqtt_client as program

Start = Callable[..., ResponderProcess]


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    """A service manager's socket."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.settimeout(SAFETY)
        sock.bind(str(tmp_path / "notify"))
        yield sock


def environment(address: str | bytes) -> dict[bytes, bytes]:
    return {**os.environb, b"NOTIFY_SOCKET": os.fsencode(address)}


def said(manager: socket.socket) -> str:
    """Return the next word that is not the one that comes each second."""
    end = time.monotonic() + SAFETY
    while (word := manager.recv(1000).decode()) == "WATCHDOG=1":
        assert time.monotonic() < end, "it says nothing else"
    return word


def test_it_says_when_it_is_ready_reads_its_files_again_and_stops(
    own_broker: Mosquitto, start_responder: Start, manager: socket.socket
) -> None:
    env = environment(manager.getsockname())
    responder = start_responder(f"-p{own_broker.port}", env=env)
    assert said(manager) == "READY=1"
    responder.process.send_signal(signal.SIGHUP)
    assert re.fullmatch(r"RELOADING=1\nMONOTONIC_USEC=\d+", said(manager))
    assert said(manager) == "READY=1"
    assert responder.stop() == 0
    assert said(manager) == "STOPPING=1"


def test_it_is_ready_only_with_a_broker_and_again_when_it_can_read_no_file(
    own_broker: Mosquitto, start_responder: Start, manager: socket.socket, tmp_path: Path
) -> None:
    own_broker.kill()
    password = tmp_path / "password"
    password.write_text("secret")
    options = [f"-p{own_broker.port}", "-ume", f"--password-file={password}"]
    responder = start_responder(*options, env=environment(manager.getsockname()), ready=False)
    responder.wait_for("disconnected")
    assert manager.recv(1000) == b"WATCHDOG=1"
    own_broker.start()
    assert said(manager) == "READY=1"
    password.unlink()
    responder.process.send_signal(signal.SIGHUP)
    assert said(manager).startswith("RELOADING=1")
    assert said(manager) == "READY=1"
    responder.wait_for("event=unchanged")


def test_the_watchdog_is_fed_by_the_loop_that_answers(
    own_broker: Mosquitto,
    start_responder: Start,
    manager: socket.socket,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its main thread, and its processes, go on when an action never ends."""
    lines = "import threading\nfrom secure_mqtt import actions\n"
    lines += "actions.TRANSFORMATIONS['shuffle'] = lambda text: threading.Event().wait()\n"
    monkeypatch.setattr(conftest, "PROGRAM", changed_program(tmp_path, lines))
    start_responder(f"-p{own_broker.port}", env=environment(manager.getsockname()))
    assert said(manager) == "READY=1"
    for _ in range(3):
        assert manager.recv(1000) == b"WATCHDOG=1"
    result = run(f"-p{own_broker.port}", "-W1", "alice", "shuffle", "text", program=PROGRAM)
    assert result.returncode == 1
    assert is_silent(manager)


def is_silent(manager: socket.socket) -> bool:
    """Take what was said; tell whether nothing more is for three times its interval."""
    for _ in range(10):
        if not select.select([manager], [], [], 3.0)[0]:
            return True
        manager.recv(1000)
    return False


@pytest.mark.parametrize("is_full", [True, False], ids=["full", "gone"])
def test_a_socket_that_nobody_reads_is_not_waited_for(
    own_broker: Mosquitto, start_responder: Start, manager: socket.socket, is_full: bool
) -> None:
    address = manager.getsockname()
    if not is_full:
        manager.close()
    else:
        fill(address)
    responder = start_responder(f"-p{own_broker.port}", env=environment(address))
    assert run(f"-p{own_broker.port}", "alice", "reverse", "text").stdout == b"txet\n"
    assert responder.stop() == 0
    assert len(responder.lines) == 1


def fill(address: str) -> None:
    """Send until there is no more room."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                sock.sendto(b"X=1", address)


def test_an_abstract_socket_is_found(own_broker: Mosquitto, start_responder: Start) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.settimeout(SAFETY)
        manager.bind("")  # the system chooses a name, which begins with NUL
        name = manager.getsockname()
        start_responder(f"-p{own_broker.port}", env=environment(b"@" + name[1:]))
        assert said(manager) == "READY=1"


# --- health ------------------------------------------------------------------------------------


def config(folder: Path, name: str, certificates: Path, port: int) -> str:
    """Copy a file of options, for a broker of here; return the option that names it."""
    text = (ROOT / "deploy" / name).read_text().replace("/etc/secure-mqtt", str(certificates))
    (folder / name).write_text(text.replace("mqtt.example.edu", f"localhost\nport = {port}"))
    return f"--config={folder / name}"


def test_the_health_check_tells_whether_the_responder_answers_and_disturbs_nobody(
    start_responder: Start, tmp_path: Path
) -> None:
    certificates = made(tmp_path / "certificates", "localhost", "responder", "health")
    with started(certificates) as broker:
        responder = start_responder(config(tmp_path, "responder.conf", certificates, broker.tls))
        check = config(tmp_path, "health.conf", certificates, broker.proxy)
        for _ in range(2):
            result = run(check, "health", "uppercase", "ok")
            assert (result.returncode, result.stdout, result.stderr) == (0, b"OK\n", b"")
        assert len(responder.lines) == 1
        responder.process.send_signal(signal.SIGSTOP)
        result = run(check, "-W1", "health", "uppercase", "ok")
        responder.process.send_signal(signal.SIGCONT)
        assert (result.returncode, result.stdout) == (1, b"")
        assert b"no responder answered" in result.stderr


# --- units -------------------------------------------------------------------------------------


UNITS = sorted((ROOT / "deploy").glob("*.service"))
MAX_EXPOSURE = 2.0


@pytest.fixture
def unit(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A unit as it is installed, with the program where it is here."""
    if not shutil.which("systemd-analyze"):
        pytest.skip("there is no systemd-analyze")
    text = request.param.read_text()
    for installed, here in (
        ("/opt/secure-mqtt-client/.venv/bin/python", shutil.which("python3")),
        ("/opt/secure-mqtt-client/secure_mqtt_client.py", PROGRAM),
    ):
        assert installed in text
        text = text.replace(installed, str(here))
    path: Path = tmp_path / request.param.name
    path.write_text(text)
    return path


def analyze(*arguments: str | Path) -> str:
    result = subprocess.run(
        ["systemd-analyze", *arguments], capture_output=True, text=True, timeout=SAFETY
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout + result.stderr


def test_a_unit_starts_a_responder_that_signs_and_demands_it(tmp_path: Path) -> None:
    names = made(tmp_path / "certificates", "responder")
    for path in UNITS:
        [command] = re.findall(r"(?m)^ExecStart=(.*)$", path.read_text().replace("\\\n", " "))
        interpreter, script, *arguments = command.split()
        assert (Path(interpreter).name, Path(script).name) == ("python", PROGRAM.name)
        assert ("--keep" in arguments) == ("keeper" in path.name)
        config = ROOT / "deploy" / Path(arguments.pop()).name
        copy = tmp_path / config.name
        copy.write_text(config.read_text().replace("/etc/secure-mqtt", str(names)))
        settings = program.settings_from([*arguments, str(copy)])
        assert settings.respond
        assert settings.status_topic.startswith("status/")  # as broker/acl has it
        assert settings.cert == str(names / "responder.crt")
        assert settings.identity == str(names / "responder.pem")
        assert settings.peer_ca == settings.cafile == str(names / "ca.crt")


def test_the_keeper_is_confined_as_the_responder_is() -> None:
    keeper, responder = ({*path.read_text().splitlines()} for path in UNITS)
    own = {line.partition("=")[0] for line in keeper - responder if line[:1] not in "# "}
    assert own == {"Description", "Conflicts", "StateDirectory", "StateDirectoryMode"}


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name, indirect=True)
def test_systemd_finds_nothing_wrong_with_a_unit(unit: Path) -> None:
    assert analyze("verify", "--man=no", "--recursive-errors=no", unit) == ""


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name, indirect=True)
def test_a_unit_exposes_little(unit: Path) -> None:
    limit = f"--threshold={MAX_EXPOSURE * 10:.0f}"
    said = analyze("security", "--offline=yes", limit, unit)
    [exposure] = re.findall(r"Overall exposure level for \S+: ([\d.]+)", said)
    assert float(exposure) <= MAX_EXPOSURE
