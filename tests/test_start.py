"""How it starts: on which Python and system, from which folder, and what stops it at once."""

from __future__ import annotations

import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import (
    PROGRAM,
    ROOT,
    SAFETY,
    Mosquitto,
    ResponderProcess,
    Run,
    copy_program,
    error_lines,
    run,
)

import secure_mqtt_client as program
from secure_mqtt.errors import INSTALL

OLDEST = 3, 10  # the oldest Python that will do


# --- Python and the system ---------------------------------------------------------------------


def other_pythons() -> Iterator[Path]:
    """Yield interpreters that pyenv has installed, of version 3.6 or newer."""
    for path in sorted(Path.home().glob(".pyenv/versions/3.*/bin/python")):
        if version(path) >= (3, 6):  # f-strings
            yield path


def version(python: Path) -> tuple[int, ...]:
    """Return the version in the path of an interpreter of pyenv."""
    return tuple(map(int, python.parent.parent.name.split(".")[:2]))


@pytest.mark.parametrize("python", [*other_pythons()], ids=lambda python: python.parent.parent.name)
def test_it_runs_on_a_python_that_is_new_enough_and_tells_any_other(python: Path) -> None:
    result = subprocess.run([python, PROGRAM, "--version"], capture_output=True, timeout=SAFETY)
    if version(python) >= OLDEST:
        assert (result.stderr, result.returncode) == (b"", 0)
        assert result.stdout.decode() == f"{PROGRAM.name} {program.__version__}\n"
    else:
        needs = "needs Python 3.10+ on Linux or macOS, not Python "
        assert error_lines(result).startswith(f"{PROGRAM.name}: error: {needs}3.")
        assert error_lines(result).count("\n") == 1
        assert (result.stdout, result.returncode) == (b"", 1)


def with_start(folder: Path, lines: str) -> dict[str, str]:
    """Return an environment in which each Python begins with these lines."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(lines)
    return {**os.environ, "PYTHONPATH": str(folder)}


def test_another_system_is_refused_with_its_name(tmp_path: Path) -> None:
    env = with_start(tmp_path, "import signal, sys\nsys.platform = 'win32'\n")
    result = run("--help", env=env)
    assert error_lines(result).endswith(f"{sys.version.split()[0]} on win32\n")
    assert "needs Python 3.10+ on Linux or macOS" in error_lines(result)
    assert (result.stdout, result.returncode) == (b"", 1)


def test_the_hint_at_a_missing_package_has_the_readmes_command() -> None:
    command = INSTALL.partition("run: ")[2].partition(";")[0]
    assert command.startswith("python3 -m venv .venv && .venv/bin/pip install ")
    assert f"{command} && .venv/bin/python {PROGRAM.name} " in (ROOT / "README.md").read_text()


# --- Ctrl-C in the first moments ---------------------------------------------------------------

# The end of a module that, when it is imported, says so, and goes on when it is told to.
SLOW = """
import os
os.write({said}, b"importing")
os.read({go_on}, 1)
"""
# What is imported when Ctrl-C comes, by a request or a responder, and how that ends.
MOMENTS: list[tuple[str, list[str], int]] = [
    ("crypto.py", ["x", "reverse", "text"], 130),
    ("secure_mqtt/command_line.py", ["x", "reverse", "text"], 130),
    ("secure_mqtt/hints.py", ["x", "rev", "text"], 130),
    ("secure_mqtt/session.py", ["--lines", "x", "reverse", "-"], 130),
    ("crypto.py", ["--respond"], 130),
    ("secure_mqtt/responder.py", ["--respond"], 0),
]


@pytest.mark.parametrize(("module", "arguments", "status"), MOMENTS)
def test_ctrl_c_while_a_module_is_imported_ends_it_without_a_word(
    module: str, arguments: list[str], status: int, tmp_path: Path
) -> None:
    copy_program(tmp_path)
    shutil.copy(ROOT / "dhparam4096.pem", tmp_path)
    (said, to_say), (to_go_on, go_on) = os.pipe(), os.pipe()
    with (tmp_path / module).open("a", encoding="utf-8") as file:
        file.write(SLOW.format(said=to_say, go_on=to_go_on))
    with subprocess.Popen(
        [sys.executable, str(tmp_path / PROGRAM.name), *arguments],
        pass_fds=[to_say, to_go_on],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert os.read(said, 9) == b"importing"
        process.send_signal(signal.SIGINT)
        os.write(go_on, b"!")
        output = process.communicate(timeout=SAFETY)
    for each in said, to_say, to_go_on, go_on:
        os.close(each)
    assert (output, process.returncode) == ((b"", b""), status)


# --- at a terminal -----------------------------------------------------------------------------


@pytest.mark.usefixtures("responder")
@pytest.mark.parametrize(
    ("options", "what"), [([], "MESSAGE"), (["--lines"], "lines")], ids=["one", "lines"]
)
def test_a_person_at_a_terminal_is_told_that_it_is_read(
    options: list[str], what: str, broker: Mosquitto, netid: str
) -> None:
    keyboard, terminal = pty.openpty()
    command = [
        sys.executable,
        str(PROGRAM),
        "-p",
        str(broker.port),
        *options,
        netid,
        "uppercase",
        "-",
    ]
    with subprocess.Popen(
        command, stdin=terminal, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr
        line = process.stderr.readline().decode()
        os.write(keyboard, b"text\n\4")
        output, error = process.communicate(timeout=SAFETY)
    os.close(keyboard)
    os.close(terminal)
    assert line == f"{PROGRAM.name}: reading {what} until the end of input (Ctrl-D)\n"
    assert (output.strip(), error, process.returncode) == (b"TEXT", b"", 0)


# --- from which folder -------------------------------------------------------------------------


def answered(result: Run) -> bool:
    """Check the whole result of a request for `abc` in reverse."""
    assert (error_lines(result), result.stdout, result.returncode) == ("", b"cba\n", 0)
    return True


Ask = Callable[..., bool]


@pytest.fixture
def ask(broker: Mosquitto, responder: ResponderProcess, netid: str) -> Ask:
    """Send a request by a program, to a responder that is there."""

    def ask(program: Path, *options: str, **how: object) -> bool:
        arguments = [*options, "-p", str(broker.port), netid, "reverse", "abc"]
        return answered(run(*arguments, program=program, **how))  # type: ignore[arg-type]

    return ask


def copy(folder: Path) -> Path:
    """Copy the program and the group to a folder; return the program there."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(ROOT / "dhparam4096.pem", folder)
    return copy_program(folder)


@pytest.mark.parametrize(
    "name", ["with a blank", "naïve 漢字 🦊", "-v", "--help", "a'b\"c$d;e", "new\nline"]
)
def test_its_folder_may_have_any_name(name: str, ask: Ask, tmp_path: Path) -> None:
    where = copy(tmp_path / name)
    assert ask(where)
    assert ask(Path(where.name), cwd=where.parent)
    in_c = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    assert ask(where, env={**os.environ, **in_c})


# Runs a command where a folder is read-only, even for root.
READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,bind,ro "$0" && exec "$@"'


def test_its_folder_may_be_read_only(
    broker: Mosquitto, responder: ResponderProcess, netid: str, tmp_path: Path
) -> None:
    where = copy(tmp_path / "folder")
    command: list[str | Path] = []
    if os.geteuid() == 0:
        command = ["unshare", "--mount", "sh", "-c", READ_ONLY, where.parent]
        can = subprocess.run([*command, "true"], capture_output=True, timeout=SAFETY)
        if can.returncode:
            pytest.skip("root cannot make a folder read-only here")
    else:
        where.parent.chmod(0o500)
        (where.parent / "secure_mqtt").chmod(0o500)
    before = set(where.parent.rglob("*"))
    command += [sys.executable, where, "-p", str(broker.port), netid, "reverse", "abc"]
    assert answered(subprocess.run(command, capture_output=True, timeout=SAFETY))
    assert set(where.parent.rglob("*")) == before
    (where.parent / "secure_mqtt").chmod(0o700)
    where.parent.chmod(0o700)


def test_it_writes_no_bytecode_if_python_is_told_so(ask: Ask, tmp_path: Path) -> None:
    where = copy(tmp_path / "folder")
    assert ask(where, env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"})
    assert not list(where.parent.rglob("__pycache__"))


def test_it_runs_without_assertions(
    own_broker: Mosquitto, start_responder: Callable[..., ResponderProcess], netid: str
) -> None:
    env = {**os.environ, "PYTHONOPTIMIZE": "2"}  # -OO: without docstrings, too
    responder = start_responder("-p", str(own_broker.port), env=env)
    for suite in "dh4096", "x25519":
        arguments = ["-p", str(own_broker.port), f"--suite={suite}", netid, "reverse", "abc"]
        assert answered(run(*arguments, env=env))
    bad = ["-p", str(own_broker.port), netid, "rev", "abc"]
    assert "did you mean reverse?" in error_lines(run(*bad, env=env))
    assert responder.stop() == 0


def test_a_symbolic_link_leads_to_it_from_anywhere(ask: Ask, tmp_path: Path) -> None:
    where = copy(tmp_path / "there")
    for folder in "one", "two":
        (tmp_path / folder).mkdir()
    (tmp_path / "one/link").symlink_to("../there/" + where.name)
    (tmp_path / "two/link.py").symlink_to(tmp_path / "one/link")
    (tmp_path / "folder").symlink_to("there")
    (tmp_path / "two/crypto.py").write_text("raise SystemExit('the wrong module')")
    assert ask(tmp_path / "one/link")
    assert ask(Path("link.py"), cwd=tmp_path / "two")
    assert ask(tmp_path / "folder" / where.name)


def test_two_versions_side_by_side_never_take_each_others_modules(
    broker: Mosquitto, responder: ResponderProcess, netid: str, tmp_path: Path
) -> None:
    places = [copy(tmp_path / name) for name in ("one", "two")]
    changes = {PROGRAM.name: program.__version__, "secure_mqtt/tls.py": "without TLS"}
    for place in places:
        for name, words in changes.items():
            text = (place.parent / name).read_text(encoding="utf-8")
            assert f'"{words}"' in text
            text = text.replace(f'"{words}"', f'"{words}, of {place.parent.name}"')
            (place.parent / name).write_text(text, encoding="utf-8")
    for place, other in (places, places[::-1]):
        mine = f", of {place.parent.name}\n"
        printed = run("--version", program=place, cwd=other.parent)
        assert printed.stdout.decode() == f"{PROGRAM.name} {program.__version__}{mine}"
        arguments = ["-v", "-p", str(broker.port), netid, "reverse", "abc"]
        result = run(*arguments, program=place, cwd=other.parent)
        assert result.stdout == b"cba\n"
        assert f"without TLS{mine}" in error_lines(result)
