"""Options in a file: --config."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import broker_side
import pytest
from broker_side import BrokerSide
from conftest import Mosquitto, ResponderProcess, error_lines, run

import secure_mqtt_client as program
from secure_mqtt.config import MAX_CONFIG_SIZE
from secure_mqtt.errors import UsageError

Start = Callable[..., ResponderProcess]
REQUEST = ("alice", "reverse", "text")
ANSWER = b"txet\n"

certificates, broker_with_tls = broker_side.certificates, broker_side.running


def settings(*arguments: str) -> dict[str, object]:
    """Return what arguments mean, but for where they stood."""
    found = vars(program.settings_from([*arguments, *REQUEST]))
    return {name: value for name, value in found.items() if name not in ("config", "words", "id")}


# --- what a file may say -----------------------------------------------------------------------

# The file; the command line that says the same.
FILES: dict[str, tuple[bytes, list[str]]] = {
    "nothing": (b"", []),
    "comments and empty lines": (b"# -v\n\n \t\n  # host x\n#\n", []),
    "an option": (b"host broker.example.org\n", ["--host=broker.example.org"]),
    "no newline at the end": (b"port 5", ["--port=5"]),
    "dashes": (b"--host localhost\n-p 5\n", ["--host=localhost", "-p5"]),
    "short names": (b"h localhost\nW 3.5\nv\n", ["--host=localhost", "-W3.5", "-v"]),
    "options without a value": (b"tls\n--verbose\n", ["--tls", "--verbose"]),
    "equals signs": (b"host=localhost\n--port = 5\n", ["--host=localhost", "--port=5"]),
    "blanks and tabs around": (b" \thost\t  localhost \t\n", ["--host=localhost"]),
    "lines of Windows": (b"host localhost\r\nport 5\r\n", ["--host=localhost", "--port=5"]),
    "a byte order mark": (b"\xef\xbb\xbfport 5\n", ["--port=5"]),
    "a value with blanks": (b"-u Jo  Do\n", ["--username=Jo  Do"]),
    "a value with quotes": (b"username \"a\"'b'\\n\n", ["--username=\"a\"'b'\\n"]),
    "a value with a dash and a number sign": (b"-u -a #b\n", ["--username=-a #b"]),
    "a value that is not ASCII": ("username Jörg 漢字\n".encode(), ["--username=Jörg 漢字"]),
    "an option twice": (b"port 4\nport 5\n", ["--port=5"]),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_says_what_the_command_line_would(case: str, tmp_path: Path) -> None:
    content, arguments = FILES[case]
    (tmp_path / "file").write_bytes(content)
    assert settings(f"--config={tmp_path}/file") == settings(*arguments)


@pytest.mark.parametrize("where", [0, 1])
def test_the_command_line_wins_wherever_the_file_is_named(where: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("port 4\nhost file\n")
    arguments = ["-p5"]
    arguments.insert(where, f"--config={tmp_path}/file")
    assert settings(*arguments) == settings("-p5", "-hfile")


def test_of_two_files_the_later_one_wins(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("port 4\nhost one\n")
    (tmp_path / "two").write_text("port 5\n")
    files = f"--config={tmp_path}/one", "--config", f"{tmp_path}/two"
    assert settings(*files) == settings("-p5", "-hone")


def test_a_file_may_be_a_pipe() -> None:
    reader, writer = os.pipe()
    os.write(writer, b"port 5\n")
    os.close(writer)
    assert settings(f"--config=/dev/fd/{reader}") == settings("-p5")
    os.close(reader)


# --- what is wrong with it ---------------------------------------------------------------------

# The file; what is wrong, after its name and the word "line"; the hint.
WRONG: dict[str, tuple[bytes, str, str]] = {
    "an unknown option": (b"\n# text\ncolour red\n", "3: there is no option --colour", "--help "),
    "a misspelt option": (b"hots x\n", "1: there is no option --hots", "did you mean --host?"),
    "a value that is none": (b"port 5\nport x\n", "2: argument -p/--port: must be a number", ""),
    "an empty value": (b"host=\n", "1: argument -h/--host: must be a host's name", ""),
    "a missing value": (b"--host\n", "1: argument -h/--host: expected one argument", ""),
    "a value for none": (b"tls yes\n", "1: argument --tls: takes no value", ""),
    "a host with a port": (b"host a:5\n", "1: argument -h/--host: must be", "--port 5"),
    "another file": (b"config other\n", "1: --config must be on the command line", ""),
    "help": (b"-v\n--help\n", "2: --help must be on the command line", ""),
    "the version": (b"version\n", "1: --version must be on the command line", ""),
    "a NetID alone": (b"le0nh4rt uppercase text\n", "1: there is no option --le0nh4rt", ""),
    "two dashes": (b"--\n", "1: must be an option and its value, or a comment after #", ""),
    "no name": (b"= x\n", "1: must be an option and its value", ""),
    "what is not UTF-8": (b"port 5\nusername caf\xe9\n", "2: must be UTF-8 text", ""),
    "a zero byte": (b"cafile a\0b\n", "1: must be an option and its value", ""),
    "UTF-16": ("port 5\n".encode("utf-16"), "1: must be UTF-8 text", ""),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_error_names_the_file_and_the_line(case: str, tmp_path: Path) -> None:
    content, problem, hint = WRONG[case]
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(UsageError) as caught:
        program.settings_from([f"--config={tmp_path}/file", *REQUEST])
    assert str(caught.value).startswith(f"--config {tmp_path}/file line {problem}")
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("none", "cannot read --config none: No such file or directory"),
        (".", "cannot read --config .: Is a directory"),
        ("", "argument --config: must be a file's name"),
        ("/dev/zero", f"--config /dev/zero must be no larger than {MAX_CONFIG_SIZE} bytes"),
    ],
)
def test_a_file_that_cannot_be_read_is_wrong_usage(name: str, problem: str, tmp_path: Path) -> None:
    result = run("--config", name, *REQUEST, cwd=tmp_path)
    assert error_lines(result).startswith(f"secure_mqtt_client.py: error: {problem}")
    assert error_lines(result).endswith(program.USAGE + "\n")
    assert (result.stdout, result.returncode) == (b"", 2)


# --- what it is for ----------------------------------------------------------------------------


def test_client_and_responder_can_be_told_all_of_tls_and_signatures_by_files(
    broker_with_tls: BrokerSide, start_responder: Start, tmp_path: Path
) -> None:
    shutil.copytree(broker_with_tls.directory, tmp_path / "certs")
    for name in "responder", "alice":
        parts = [(tmp_path / f"certs/{name}.{end}").read_bytes() for end in ("crt", "key")]
        (tmp_path / f"certs/{name}.pem").write_bytes(b"".join(parts))
        (tmp_path / f"certs/{name}.pem").chmod(0o600)
    lines = "cafile {0}/ca.crt\ncert {0}/{1}.pem\nkey {0}/{1}.pem\nidentity {0}/{1}.pem\n"
    lines += f"peer-ca {{0}}/ca.crt\nport {broker_with_tls.tls}\n"
    (tmp_path / "responder.conf").write_text(lines.format(tmp_path / "certs", "responder"))
    (tmp_path / "alice.conf").write_text("# of alice\n" + lines.format("certs", "alice"))
    start_responder("--config", str(tmp_path / "responder.conf"))
    # Names are relative to where one is, as on the command line.
    result = run("--config", "alice.conf", *REQUEST, cwd=tmp_path)
    assert (error_lines(result), result.stdout, result.returncode) == ("", ANSWER, 0)
    (tmp_path / "elsewhere").mkdir()
    result = run("--config", "../alice.conf", *REQUEST, cwd=tmp_path / "elsewhere")
    assert "cannot read --cafile certs/ca.crt: " in error_lines(result)


# Notes each file that Python opens.
WATCH = """
import os, sys
log = os.open({log!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
def note(event, arguments):
    if event == "open":
        os.write(log, f"{{arguments[0]}}\\n".encode())
sys.addaudithook(note)
"""


@pytest.mark.usefixtures("responder")
@pytest.mark.parametrize("named", [[], ["--config", "named.conf"]], ids=["none", "one"])
def test_no_file_is_read_that_was_not_named(
    named: list[str], broker: Mosquitto, netid: str, tmp_path: Path
) -> None:
    home, hooks = tmp_path / "home", tmp_path / "hooks"
    for folder in home / ".config", hooks:
        folder.mkdir(parents=True)
    (home / "named.conf").write_text("verbose\n")
    (hooks / "sitecustomize.py").write_text(WATCH.format(log=str(tmp_path / "log")))
    env = {**os.environ, "PYTHONPATH": str(hooks), "HOME": str(home), "XDG_CONFIG_HOME": str(home)}
    arguments = [*named, "-p", str(broker.port), netid, "reverse", "text"]
    result = run(*arguments, cwd=home, env=env)
    assert result.stdout == ANSWER
    opened = {(home / line).resolve() for line in (tmp_path / "log").read_text().splitlines()}
    read = {path for path in opened if home in path.parents}
    assert read == {home / name for name in named[1:]}
    assert any(path.name == "dhparam4096.pem" for path in opened)
