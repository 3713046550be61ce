"""The command line: what is refused before anything happens, and what is read from it."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import broker_side
import pytest
from conftest import (
    PROGRAM,
    SAFETY,
    Mosquitto,
    ResponderProcess,
    Run,
    copy_program,
    error_lines,
    run,
)

import secure_mqtt_client as program
from secure_mqtt.actions import ACTIONS
from secure_mqtt.command_line import build_parser
from secure_mqtt.errors import UsageError

certificates = broker_side.certificates
REQUEST = ("le0nh4rt", "uppercase", "text")


class Listener:
    """A server that takes connections, and tells whether one came."""

    def __init__(self, server: socket.socket) -> None:
        self.port: int = server.getsockname()[1]
        self._server = server
        server.setblocking(False)

    def has_been_called(self) -> bool:
        with contextlib.suppress(BlockingIOError):
            self._server.accept()[0].close()
            return True
        return False


@pytest.fixture
def listener() -> Iterator[Listener]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield Listener(server)


def python_path(folder: Path, *blocked: str) -> dict[str, str]:
    """Return an environment in which packages can't be imported, as if they were missing."""
    for name in blocked:
        error = f'ModuleNotFoundError("No module named {name!r}", name={name!r})'
        (folder / f"{name}.py").write_text(f"raise {error}\n")
    return {**os.environ, "PYTHONPATH": str(folder)}


# --- wrong usage -------------------------------------------------------------------------------

WRONG: dict[str, tuple[list[str | bytes], str]] = {
    "no arguments": ([], "NETID, ACTION and MESSAGE are needed, or --respond"),
    "a NetID only": (["x"], "MESSAGE"),
    "no message": (["x", "uppercase"], "MESSAGE"),
    "too many arguments": ([*REQUEST, "more"], "more"),
    "an unknown option": ([*REQUEST, "--colour"], "--colour"),
    "an unknown short option": ([*REQUEST, "-x"], "-x"),
    "an abbreviated option": ([*REQUEST, "--verb"], "--verb"),
    "an option without its argument": ([*REQUEST, "--port"], "--port"),
    "a flag with an argument": ([*REQUEST, "--verbose=yes"], "--verbose"),
    "an unknown action": (["x", "upper", "text"], "random"),
    "an action in capitals": (["x", "UPPERCASE", "text"], "uppercase"),
    "the topic of the exchange as action": (["x", "key-exchange", "text"], "ACTION"),
    "an empty action": (["x", "", "text"], "ACTION"),
    "an empty NetID": (["", "uppercase", "text"], "NETID"),
    "a NetID of two levels": (["a/b", "uppercase", "text"], "NETID"),
    "a NetID with +": (["a+", "uppercase", "text"], "NETID"),
    "a NetID that is #": (["#", "uppercase", "text"], "NETID"),
    "a NetID with $ first, which + does not match": (["$x", "uppercase", "text"], "NETID"),
    "a NetID of 65 characters": (["x" * 65, "uppercase", "text"], "64"),
    "a NetID with a control character": (["a\nb", "uppercase", "text"], "NETID"),
    "a NetID that is not UTF-8": ([b"\xff", "uppercase", "text"], "NETID"),
    "an action that is not UTF-8": (["x", b"\xff", "text"], "ACTION"),
    "a message that is not UTF-8": (["x", "uppercase", b"caf\xe9"], "MESSAGE"),
    "port 0": ([*REQUEST, "-p", "0"], "65535"),
    "port 65536": ([*REQUEST, "-p", "65536"], "65535"),
    "port -1": ([*REQUEST, "-p", "-1"], "65535"),
    "port abc": ([*REQUEST, "--port=abc"], "'abc'"),
    "an empty port": ([*REQUEST, "--port="], "--port"),
    "an empty host": ([*REQUEST, "--host", ""], "--host"),
    "a host that is not UTF-8": ([*REQUEST, "--host", b"\xff"], "--host"),
    "timeout 0": ([*REQUEST, "-W", "0"], "above 0"),
    "timeout -1": ([*REQUEST, "-W", "-1"], "above 0"),
    "timeout nan": ([*REQUEST, "-W", "nan"], "above 0"),
    "timeout inf": ([*REQUEST, "-W", "inf"], "at most"),
    "timeout abc": ([*REQUEST, "-W", "abc"], "'abc'"),
    "an empty timeout": ([*REQUEST, "--timeout="], "--timeout"),
    "an empty client ID": ([*REQUEST, "--id", ""], "--id"),
    "a client ID of 64 KiB": ([*REQUEST, "--id", "x" * 65536], "65535"),
    "a client ID that is not UTF-8": ([*REQUEST, "--id", b"\xff"], "--id"),
    "respond with a request": (["--respond", *REQUEST], "--respond"),
    "respond with an action": (["--respond", "x", "uppercase"], "--respond"),
    "respond with a timeout": (["--respond", "--timeout", "3"], "--timeout"),
    "respond to a NetID of two levels": (["--respond", "a/b"], "NETID"),
    "keep without respond": ([*REQUEST, "--keep", "f"], "--keep is for --respond"),
    "keep without an identity": (["--respond", "--keep", "f", "--peer-ca", "f"], "--identity"),
    "keep without an authority": (["--respond", "--keep", "f", "--identity", "f"], "--peer-ca"),
    "keep without a file's name": (["--respond", "--keep="], "--keep"),
    "rotate without respond": ([*REQUEST, "--rotate", "60"], "--rotate is for --respond"),
    "rotate without keep": (["--respond", "--rotate", "60"], "--rotate is for --keep"),
    "rotate 0": (["--respond", "--rotate", "0"], "from 1 to 604800"),
    "rotate after eight days": (["--respond", "--rotate", "691200"], "from 1 to 604800"),
    "rotate nan": (["--respond", "--rotate", "nan"], "from 1 to 604800"),
    "local with a host": (["--local", "-h", "localhost", *REQUEST], "--host"),
    "local with a port": (["--local", "-p", "1884", *REQUEST], "--port"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_usage_is_explained_before_any_connection(case: str, listener: Listener) -> None:
    arguments, words = WRONG[case]
    if "--local" not in arguments:
        arguments = ["--host=127.0.0.1", f"--port={listener.port}", *arguments]
    result = run(*arguments)
    message, _ = wrong_usage(result)
    assert words in message
    assert not listener.has_been_called()


def wrong_usage(result: Run) -> tuple[str, str]:
    """Check the whole result of a wrong command line; return the error and the hint, if any."""
    message, *hint = error_lines(result).removesuffix(program.USAGE + "\n").splitlines()
    assert message.startswith("secure_mqtt_client.py: error: ")
    assert all(line.startswith("secure_mqtt_client.py: hint: ") for line in hint)
    assert len(hint) <= 1
    assert error_lines(result).endswith("\n" + program.USAGE + "\n")
    assert (result.stdout, result.returncode) == (b"", 2)
    return tuple(line.partition(": ")[2].partition(": ")[2] for line in (message, *hint, ""))[:2]  # type: ignore[return-value]


DASH = "put -- before a MESSAGE that begins with a dash"
# The arguments; the error, or words of it; the hint.
HINTS: dict[str, tuple[list[str], str, str]] = {
    "a message like an option and its value": (["x", "reverse", "-hello"], "are needed", DASH),
    "a message like an option": (["x", "reverse", "-v"], "are needed", DASH),
    "a message like an option with a wrong value": (["x", "reverse", "-pass"], "--port", DASH),
    "a message like two options": (["x", "reverse", "-vtext"], "", DASH),
    "a message like an unknown option": (["x", "reverse", "-x"], "there is no option -x", DASH),
    "a message like a long one": (["x", "reverse", "--x"], "there is no option --x", DASH),
    "a part of an option": ([*REQUEST, "--verb"], "option --verb", "did you mean --verbose?"),
    "a part of two options": (
        [*REQUEST, "--peer=x"],
        "there is no option --peer",
        "did you mean --peer-ca or --peer-name?",
    ),
    "a misspelt option": ([*REQUEST, "--hots=x"], "option --hots", "did you mean --host?"),
    "an option in capitals": ([*REQUEST, "--TLS"], "option --TLS", "did you mean --tls?"),
    "a password": (
        [*REQUEST, "--password=secret"],
        "there is no option --password",
        "others can read a command line: give a password in a file, with --password-file",
    ),
    "mosquitto's option for it": (
        [*REQUEST, "-P", "secret"],
        "there is no option -P",
        "others can read a command line: give a password in a file, with --password-file",
    ),
    "a part of an action": (["x", "upper", "t"], "ACTION", "did you mean uppercase?"),
    "an action in capitals": (["x", "REVERSE", "t"], "ACTION", "did you mean reverse?"),
    "a misspelt action": (["x", "titlecase", "t"], "ACTION", "did you mean title-case?"),
    "a user's name before a whole request": (["-ualice", *REQUEST, "--rekey=5"], "--rekey", ""),
    "a user's name for a responder": (["-ualice", "--respond", "x", "y"], "--respond", ""),
    "what is no action at all": (["x", "encrypt", "t"], "ACTION", ""),
    "a host with a port": (
        [*REQUEST, "-h", "localhost:1884"],
        "argument -h/--host: must be a host's name or address; not 'localhost:1884'",
        "give the name alone: --host localhost --port 1884",
    ),
    "a URL": (
        [*REQUEST, "--host=mqtt://localhost"],
        "argument -h/--host: must be a host's name or address; not 'mqtt://localhost'",
        "give the name alone: --host localhost, and the port with --port",
    ),
    "a URL with a port": (
        [*REQUEST, "--host=mqtts://broker.example.org:8883/"],
        "'mqtts://broker.example.org:8883/'",
        "give the name alone: --host broker.example.org --port 8883",
    ),
    "h for help, not alone": (
        ["-v", "-h"],
        "argument -h/--host: expected one argument",
        "--help prints the help, as does -h as the only argument",
    ),
}


@pytest.mark.parametrize("case", HINTS)
def test_wrong_usage_comes_with_a_hint_at_what_was_meant(case: str) -> None:
    arguments, words, expected = HINTS[case]
    message, hint = wrong_usage(run(*arguments))
    assert words in message
    assert hint.endswith(expected) if expected else not hint
    assert "secret" not in message + hint


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "::1", "fe80::1%eth0", "a-b.example"])
def test_a_name_or_an_address_is_a_host(host: str) -> None:
    assert program.settings_from(["-h", host, *REQUEST]).host == host


@pytest.mark.parametrize("netid", ["a\0b", "\ud800"])
def test_a_netid_that_no_shell_can_pass_is_refused(
    netid: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert program.main([netid, "uppercase", "text"]) == 2
    assert "NETID" in capsys.readouterr().err


@pytest.mark.parametrize("variable", ["LANG", "LC_ALL"])
@pytest.mark.parametrize("locale", ["C", "POSIX"])
def test_wrong_usage_is_explained_in_any_locale(variable: str, locale: str) -> None:
    env = {"PATH": os.environ["PATH"], variable: locale, "PYTHONUTF8": "0"}
    result = run("naïve/漢字".encode(), "uppercase", "text", env=env)
    assert result.returncode == 2
    assert "NETID" in error_lines(result)
    assert "Traceback" not in error_lines(result)


# --- help and version --------------------------------------------------------------------------


def printed(*arguments: str) -> str:
    result = run(*arguments)
    assert (error_lines(result), result.returncode) == ("", 0)
    assert isinstance(result.stdout, bytes)
    return result.stdout.decode()


def test_help_names_every_option_and_argument() -> None:
    text = printed("--help")
    options = [name for each in build_parser("", "")._actions for name in each.option_strings]
    for name in "NETID", "ACTION", "MESSAGE", *options, *ACTIONS:
        assert re.search(rf"(?<![\w-]){name}(?![\w-])", text)


def test_help_fits_80_columns_of_ascii() -> None:
    text = printed("--help")
    assert max(map(len, text.splitlines())) <= 80
    assert text.isascii()


def test_help_marks_what_is_the_labs_and_nothing_else() -> None:
    entries = re.findall(r"(?m)^  (\S+)(?:, --\S+)?(?: [A-Z]+)? {2,}(\(lab\))?", printed("--help"))
    assert len(entries) > 20
    labs = ["NETID", "ACTION", "MESSAGE", "-h", "-p", "-v"]
    assert [name for name, mark in entries if mark] == labs


def test_help_ends_with_examples_that_work(
    own_broker: Mosquitto, start_responder: Callable[..., ResponderProcess], tmp_path: Path
) -> None:
    name, *examples = printed("--help").rpartition("\n\n")[2].splitlines()
    assert (name, len(examples)) == ("examples:", 4)
    (tmp_path / "message.txt").write_text("one\ntwo\n")
    answers: list[bytes] = []
    for example in map(str.strip, examples):
        assert example.startswith(f"{PROGRAM.name} ")
        port = "" if "--local" in example else f"-p {own_broker.port} "
        arguments = port + example.partition(" ")[2]
        if "--respond" in example:
            start_responder(*shlex.split(arguments.replace("--respond", "")))
            continue
        command = f"{shlex.join([sys.executable, str(PROGRAM)])} {arguments}"
        result = subprocess.run(
            command, shell=True, cwd=tmp_path, capture_output=True, timeout=SAFETY
        )
        assert result.returncode == 0, result.stderr
        assert ("4 ← " in result.stderr.decode()) == (" -v " in example)
        answers.append(result.stdout)
    assert answers == [
        b"NETWORKING IS THE BEST!\n",
        b"!tseb eht si gnikrowteN\n",
        b"ONE\nTWO\n\n",
    ]


def test_h_alone_prints_the_help_as_a_later_course_has_it() -> None:
    assert printed("-h") == printed("--help") == printed(*REQUEST, "--help")


def test_the_version_is_printed() -> None:
    assert printed("--version") == f"{PROGRAM.name} {program.__version__}\n"


def test_help_that_cannot_be_printed_is_an_error() -> None:
    with open("/dev/full", "wb") as full:
        result = run("--help", stdout=full)
    assert "cannot write to standard output" in error_lines(result)
    assert result.returncode == 1


def imported(*arguments: str) -> set[str]:
    """Return the modules that a run imports."""
    command = [sys.executable, "-X", "importtime", str(PROGRAM), *arguments]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=SAFETY).stderr
    return {line.rpartition("|")[2].strip() for line in lines.splitlines()}


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["x", "upper", "text"], []])
def test_help_and_wrong_usage_import_nothing_heavy(arguments: list[str]) -> None:
    modules = imported(*arguments)
    assert "argparse" in modules
    heavy = {"paho", "cryptography", "asyncio", "amqtt", "logging", "multiprocessing", "ssl"}
    assert not heavy & modules
    assert not {"socket", "threading", "pickle", "random", "datetime"} & modules  # a few ms in all


def test_difflib_is_imported_only_to_say_what_was_meant() -> None:
    assert "difflib" in imported("x", "upper", "text")
    assert not {"difflib", "secure_mqtt.hints"} & imported("--help")


# --- what is read ------------------------------------------------------------------------------

SAME = [
    ["-p", "5", "-v", "x", "reverse", "text"],
    ["x", "-p", "5", "reverse", "-v", "text"],
    ["x", "reverse", "text", "-vp5"],
    ["--verbose", "x", "reverse", "--port=5", "text"],
    ["-p", "4", "-v", "x", "reverse", "text", "-p", "5"],
    ["-v", "-p", "5", "--", "x", "reverse", "text"],
]


@pytest.mark.parametrize("arguments", SAME, ids=" ".join)
def test_options_may_stand_anywhere(arguments: list[str]) -> None:
    one, other = (vars(program.settings_from(each)) for each in (arguments, SAME[0]))
    for settings in one, other:
        settings.pop("words", None)  # as they stood; what they mean is in the others
    assert one == other
    assert (other["netid"], other["action"], other["message"]) == ("x", "reverse", b"text")


MESSAGES: dict[str, tuple[list[str], bytes]] = {
    "an option's name after --": (["x", "reverse", "--", "--help"], b"--help"),
    "a dash and a letter after --": (["x", "reverse", "--", "-x"], b"-x"),
    "-- before all arguments": (["--", "x", "reverse", "-x"], b"-x"),
    "-- before the action": (["x", "--", "reverse", "-x"], b"-x"),
    "-- after --": (["x", "reverse", "--", "--"], b"--"),
    "options, then --": (["-p", "5", "x", "reverse", "-v", "--", "-v"], b"-v"),
    "a negative number": (["x", "reverse", "-5"], b"-5"),
    "a negative fraction": (["x", "reverse", "-5.5"], b"-5.5"),
    "a dash and a space": (["x", "reverse", "- text"], b"- text"),
    "a text that begins with a known option": (["x", "reverse", "--", "-v text"], b"-v text"),
    "nothing": (["x", "reverse", ""], b""),
    "a space": (["x", "reverse", " "], b" "),
    "an @, which argparse may read files for": (["x", "reverse", "@file"], b"@file"),
}


@pytest.mark.parametrize("case", MESSAGES)
def test_the_message_may_be(case: str) -> None:
    arguments, message = MESSAGES[case]
    assert program.settings_from(arguments).message == message


def test_a_text_is_not_taken_apart_as_an_option() -> None:
    with contextlib.suppress(UsageError):
        assert program.settings_from(["x", "reverse", "-v text"]).message == b"-v text"


def test_the_defaults_are_the_labs() -> None:
    settings = program.settings_from([*REQUEST])
    assert (settings.host, settings.port, settings.id) == ("localhost", 1884, "le0nh4rt")
    assert (settings.username, settings.password) == ("", None)
    assert not settings.uses_tls
    assert settings.timeout == 30
    assert not settings.local
    assert not settings.respond


def test_a_dash_alone_means_standard_input_even_after_two() -> None:
    for arguments in ["x", "reverse", "-"], ["x", "reverse", "--", "-"]:
        assert program.settings_from(arguments).message is None


@pytest.mark.parametrize("options", [[], ["--cafile=ca.crt"], ["--tls"], ["--identity=x"]])
def test_the_client_id_is_the_netid_as_the_lab_wants_it(
    options: list[str], certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(certificates)
    assert program.settings_from([*options, *REQUEST]).id == "le0nh4rt"


@pytest.mark.parametrize(
    ("options", "username"),
    [(["--cert=alice.crt", "--key=alice.key"], ""), (["-ualice"], ""), ([], "alice")],
    ids=["a certificate", "a user name", "a user name in the environment"],
)
def test_where_a_broker_knows_its_clients_nobody_can_guess_a_client_id(
    options: list[str], username: str, certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(certificates)
    monkeypatch.setenv("MQTT_USERNAME", username)
    ids = {program.settings_from([*options, *REQUEST]).id for _ in range(20)}
    assert len(ids) == 20
    assert all(re.fullmatch("le0nh4rt-[0-9a-f]{16}", each) for each in ids)
    assert program.settings_from([*options, "--id=me", *REQUEST]).id == "me"


def test_a_responder_has_a_client_id_of_its_own() -> None:
    one, other = (program.settings_from(["--respond", "x"]).id for _ in range(2))
    assert len({one, other, "x"}) == 3
    assert program.settings_from(["--respond", "--id", "me"]).id == "me"


# --- where it is started, and with what --------------------------------------------------------


@pytest.mark.usefixtures("responder")
def test_it_works_from_another_folder_and_through_a_symbolic_link(
    broker: Mosquitto, netid: str, tmp_path: Path
) -> None:
    (tmp_path / "crypto.py").write_text("raise SystemExit('the wrong module')")
    (tmp_path / "link").symlink_to(PROGRAM)
    result = run(
        "-p", str(broker.port), netid, "reverse", "abc", program=tmp_path / "link", cwd=tmp_path
    )
    assert (error_lines(result), result.stdout, result.returncode) == ("", b"cba\n", 0)


FOREIGN_GROUP = subprocess.run(
    ["openssl", "genpkey", "-genparam", "-algorithm", "DH", "-pkeyopt", "group:modp_2048"],
    capture_output=True,
    check=True,
).stdout


@pytest.mark.parametrize("arguments", [REQUEST, ("--respond",)], ids=["request", "responder"])
@pytest.mark.parametrize("content", [None, b"", FOREIGN_GROUP], ids=["missing", "empty", "foreign"])
def test_an_unusable_group_file_is_explained_before_any_connection(
    content: bytes | None, arguments: tuple[str, ...], listener: Listener, tmp_path: Path
) -> None:
    copy_program(tmp_path)
    if content is not None:
        (tmp_path / "dhparam4096.pem").write_bytes(content)
    result = run("-p", str(listener.port), *arguments, program=tmp_path / PROGRAM.name)
    assert "dhparam4096.pem" in error_lines(result)
    assert "Traceback" not in error_lines(result)
    assert (result.stdout, result.returncode) == (b"", 1)
    assert not listener.has_been_called()


@pytest.mark.usefixtures("responder")
@pytest.mark.parametrize(
    ("package", "arguments"),
    [
        ("amqtt", ["--local", *REQUEST]),
        ("amqtt", ["--local", "--respond"]),
        ("paho", REQUEST),
        ("paho", ["--respond"]),
        ("cryptography", REQUEST),
    ],
)
def test_a_missing_package_is_named_with_its_cure(
    package: str, arguments: list[str], broker: Mosquitto, tmp_path: Path
) -> None:
    at_broker = [] if "--local" in arguments else ["-p", str(broker.port)]
    result = run(*at_broker, *arguments, env=python_path(tmp_path, package))
    assert package in error_lines(result)
    assert "pip install" in error_lines(result)
    assert "Traceback" not in error_lines(result)
    assert (result.stdout, result.returncode) == (b"", 1)


@pytest.mark.usefixtures("responder")
def test_it_causes_no_warning(broker: Mosquitto, netid: str) -> None:
    env = {**os.environ, "PYTHONWARNINGS": "error", "PYTHONDEVMODE": "1"}
    result = run("-p", str(broker.port), netid, "reverse", "abc", env=env)
    assert (error_lines(result), result.stdout, result.returncode) == ("", b"cba\n", 0)
