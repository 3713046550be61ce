"""The command line: what may be in it, and what it means."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from typing import Any, NoReturn, TypeVar

from secure_mqtt.actions import ACTIONS, COMMANDS, NETID
from secure_mqtt.errors import UsageError
from secure_mqtt.log import PROGRAM
from secure_mqtt.settings import DEFAULT_PEER_NAME, Settings, client_id, read_password
from secure_mqtt.streams import is_utf8, write_output
from secure_mqtt.suites import SUITES
from secure_mqtt.topics.names import DNS_LABEL, MAX_HISTORY, MEMBER

DEFAULT_PORT = 1884  # the lab's
DEFAULT_TLS_PORT = 8883  # secure-mqtt, as registered with IANA
# A peer on the course's own module needs over 10 s on cryptography 49 and newer.
DEFAULT_TIMEOUT = 30.0  # seconds
MAX_TIMEOUT = 86_400.0  # seconds: far more overflows the clocks of the system
MIN_ROTATION, MAX_ROTATION = 1.0, 604_800.0  # seconds; the latter is a week
DEFAULT_ROTATION = 3600.0  # seconds
DNS_NAME = re.compile(rf"{DNS_LABEL}(\.{DNS_LABEL})*")
T = TypeVar("T")


class Parser(argparse.ArgumentParser):
    """A parser whose help is given, and which raises its errors."""

    def format_help(self) -> str:
        """Return the help, the same on all versions of Python."""
        return self.epilog or ""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError; a second line of the message is its hint."""
        # What follows may be a password: -vPsecret.
        message = re.sub(r"(?s)ignored explicit argument .*", "takes no value", message)
        message, _, hint = message.partition("\n")
        if message.startswith("argument -h/--host: expected"):
            hint = "--help prints the help, as does -h as the only argument"
        raise UsageError(message, hint)

    @property
    def options(self) -> list[str]:
        """The names of all options, with their dashes."""
        return [*self._option_string_actions]

    def _print_message(self, message: str, file: Any = None) -> None:
        write_output(message.encode())


def build_parser(help_text: str, version: str) -> Parser:
    """Return the parser of the command line that the help describes."""
    # With these two, argparse need not measure the terminal, which takes 3 ms.
    formatter = partial(argparse.HelpFormatter, width=80)
    parser = Parser(
        usage="", epilog=help_text, formatter_class=formatter, add_help=False, allow_abbrev=False
    )
    add = parser.add_argument
    add("words", nargs="*")
    time_span = f"a number of seconds above 0, at most {MAX_TIMEOUT:g}"
    seconds = checked(float, lambda value: 0 < value <= MAX_TIMEOUT, time_span)
    add("-W", "--timeout", type=seconds)
    add("--rekey", type=seconds)
    add("--rotate", type=between(float, MIN_ROTATION, MAX_ROTATION, "a number of seconds"))
    suites = " or ".join(SUITES)
    add("--suite", type=checked(str, SUITES.__contains__, suites))
    add("-h", "--host", type=host)
    add("-p", "--port", type=between(decimal, 1, 65535, "a number"))
    add("-i", "--id", type=checked(str, is_mqtt_string, "UTF-8 text of 1 to 65535 bytes"))
    for option in ("keep", "identity", "peer-ca", "cafile", "cert", "key", "password-file"):
        add(f"--{option}", type=checked(str, bool, "a file's name"))
    add("--peer-name", type=checked(str, DNS_NAME.fullmatch, "a DNS name"))
    add("-u", "--username", type=checked(str, is_mqtt_string, "UTF-8 text"))
    add("--status-topic", type=checked(str, is_topic, "a topic without + and #"))
    add("--history", type=between(decimal, 0, MAX_HISTORY, "a number"))
    add("-C", "--count", type=checked(decimal, lambda value: value > 0, "a number from 1 on"))
    for option in ("--respond", "--local", "--lines", "--json", "--tls", "--insecure"):
        add(option, action="store_true")
    add("--config", type=checked(str, bool, "a file's name"), action="append")
    add("-v", "--verbose", action="store_true")
    add("--help", action="help")
    add("--version", action="version", version=f"{PROGRAM} {version}")
    return parser


def checked(
    convert: Callable[[str], T], is_valid: Callable[[T], object], wanted: str
) -> Callable[[str], T]:
    """Return the type of an argument, for argparse."""

    def check(text: str) -> T:
        with contextlib.suppress(ValueError):
            if is_valid(value := convert(text)):
                return value
        raise argparse.ArgumentTypeError(f"must be {wanted}; not {text[:80]!r}")

    return check


def between(
    convert: Callable[[str], float], smallest: float, largest: float, what: str
) -> Callable[[str], float]:
    """Return the type of an argument that is a number in a range, for argparse."""
    wanted = f"{what} from {smallest:g} to {largest:g}"
    return checked(convert, lambda value: smallest <= value <= largest, wanted)


def host(text: str) -> str:
    """Return a host, for argparse, which makes an error of a port or a protocol with it."""
    name = checked(str, is_mqtt_string, "a host's name or address")(text)
    if match := re.fullmatch(r"(?:\w+://)?([^:/]+)(?::(\d+))?/?", name):
        if match[1] == name:
            return name
        port = f" --port {match[2]}" if match[2] else ", and the port with --port"
        hint = f"give the name alone: --host {match[1]}{port}"
        raise argparse.ArgumentTypeError(
            f"must be a host's name or address; not {name[:80]!r}\n{hint}"
        )
    return name  # an address of IPv6, or what nobody will find


def decimal(text: str) -> int:
    """Return the number that a text of digits stands for; int() would take more than that."""
    return int(text) if re.fullmatch("[0-9]{1,9}", text) else -1


def is_typed_utf8(text: str) -> bool:
    """Tell whether an argument was typed as UTF-8."""
    return is_utf8(os.fsencode(text))


def is_mqtt_string(text: str) -> bool:
    """Tell whether an argument can be a string in MQTT (3.1.1, 1.5.3), and is not empty."""
    return is_typed_utf8(text) and "\0" not in text and 1 <= len(os.fsencode(text)) <= 65535


def is_topic(text: str) -> bool:
    """Tell whether an argument can be a topic to publish on."""
    return is_mqtt_string(text) and not set("+#") & set(text)


def parse_settings(arguments: list[str], help_text: str, version: str) -> Settings:
    """Turn the command line into settings.

    :param help_text: what --help prints
    :param version: what --version prints, after the program's name
    :raises UsageError: something is wrong with it
    """
    if arguments == ["-h"]:  # a later edition of the course means --help by it
        arguments = ["--help"]
    words: list[str] = []
    try:
        settings, words = parse(build_parser(help_text, version), arguments)
        check_combination(settings, words)
        check_words(settings, words)
    except UsageError as error:
        if not error.hint and len(words) < 3 and "--respond" not in arguments:
            from secure_mqtt.hints import dash_hint

            error.hint = dash_hint(str(error), arguments)
        raise
    fill_in(settings)
    if settings.cafile or settings.cert:
        from secure_mqtt.tls import tls_context

        tls_context(settings)  # shows what is wrong with the files before anything else is done
    return settings


def parse(parser: Parser, arguments: list[str]) -> tuple[Settings, list[str]]:
    """Return what the options say, also those in files, and the arguments that are none."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    for text in arguments[:end]:
        if re.match(r"-[A-Za-z][^=]*\s", text):  # Python 3.13.0 would take such a MESSAGE apart
            raise UsageError("an argument that begins with a dash is an option; put -- before it")
    settings = parse_options(parser, arguments[:end])
    if settings.config:
        from secure_mqtt.config import read_config

        check = partial(parse_options, parser)
        files = [read_config(name, parser.options, check) for name in settings.config]
        # What comes later wins: the command line.
        settings = parse_options(parser, [*chain(*files), *arguments[:end]])
    return settings, settings.words + arguments[end + 1 :]


def parse_options(parser: Parser, arguments: list[str]) -> Settings:
    """Return what these options say, with the other arguments in words."""
    settings = Settings()
    _, unknown = parser.parse_known_intermixed_args(arguments, settings)
    if unknown:
        from secure_mqtt.hints import unknown_option

        raise unknown_option(unknown[0], parser.options)
    return settings


def check_combination(settings: Settings, words: Sequence[str]) -> None:
    """Refuse arguments that are right one by one, but not together."""
    if settings.respond:
        check_responder(settings, words)
    elif words[1:] and words[1] in COMMANDS:
        from secure_mqtt.topics.usage import check_command

        check_command(settings, words)
    else:
        check_request(settings, words)
    if settings.local and settings.uses_tls:
        raise UsageError("--local brings a plain broker of its own; leave the TLS options out")
    if settings.peer_name and not settings.peer_ca:
        raise UsageError("--peer-name needs --peer-ca: the authorities that certify such a name")
    if bool(settings.cert) != bool(settings.key):
        raise UsageError("--cert and --key go together: a certificate and its private key")
    if settings.insecure and settings.cafile:
        raise UsageError("--insecure trusts any broker, --cafile only some; leave one out")


def check_responder(settings: Settings, words: Sequence[str]) -> None:
    """Refuse what is for requests."""
    if len(words) > 1:
        raise UsageError("--respond takes no ACTION and no MESSAGE; to send a request, omit it")
    if settings.timeout:
        raise UsageError("--respond answers until it is stopped; --timeout is for a request")
    if settings.keep and not (settings.identity and settings.peer_ca):
        raise UsageError(
            "--keep needs --identity and --peer-ca: members and keeper prove who they are"
        )
    if settings.rotate and not settings.keep:
        raise UsageError("--rotate is for --keep: how often the keys of its topics are renewed")
    others = "suite", "lines", "rekey", "peer_name", "json", "count", "history"
    for option in settings.given(*others):
        raise UsageError(f"--respond answers requests as they come; {option} is for a request")


def check_request(settings: Settings, words: Sequence[str]) -> None:
    """Refuse what is for a responder, or for another request."""
    if len(words) < 3:
        raise UsageError("NETID, ACTION and MESSAGE are needed, or --respond to answer requests")
    if len(words) > 3:
        raise UsageError("there are more arguments than NETID, ACTION and MESSAGE; quote MESSAGE")
    for option in settings.given("status_topic", "keep", "rotate"):
        raise UsageError(f"{option} is for --respond")
    if settings.given("history", "json", "count"):
        raise UsageError("--history, --json and --count are for shared topics; leave them out")
    if settings.lines and words[2] != "-":
        raise UsageError("--lines sends the lines of standard input; give - as MESSAGE")
    if settings.rekey and not settings.lines:
        raise UsageError("--rekey is for --lines; a single request has a single key")
    if settings.local and (settings.host or settings.port):
        raise UsageError(
            "--local brings a broker of its own, and --host or --port names another; omit either"
        )
    if settings.local and settings.peer_ca:
        raise UsageError("--local brings a responder that signs nothing; leave --peer-ca out")


def check_words(settings: Settings, words: Sequence[str]) -> None:
    """Take NETID, ACTION and MESSAGE, or what a command has. UsageError if one is wrong."""
    settings.netid, action, message = (*words, "", "", "")[:3]
    netid = settings.netid
    if words and not NETID.fullmatch(netid):
        raise UsageError(
            "NETID must be one level of a topic: 1 to 64 characters without / + #, controls, and $"
            f" in front; not {netid[:80]!r}"
        )
    if (settings.identity or settings.peer_ca) and words and not MEMBER.fullmatch(netid):
        raise UsageError(
            "--identity and --peer-ca need a NETID that a certificate can name: 1 to 63 letters,"
            f" digits and inner hyphens; not {netid[:80]!r}"
        )
    if words[1:] and action in COMMANDS:
        from secure_mqtt.topics.usage import take_command

        take_command(settings, action, words[2:])
        return
    settings.action = action
    if words[1:] and action not in ACTIONS:
        from secure_mqtt.hints import suggestion

        problem = f"ACTION must be one of {', '.join(ACTIONS)}; not {action[:80]!r}"
        raise UsageError(problem, suggestion(action[:80], ACTIONS + COMMANDS))
    if not is_typed_utf8(message):
        raise UsageError("MESSAGE must be UTF-8 text")
    settings.message = None if message == "-" else os.fsencode(message)  # as typed, in any locale


def fill_in(settings: Settings) -> None:
    """Put the defaults where nothing was given, and read the login."""
    settings.is_patient = settings.is_patient and not settings.timeout
    settings.timeout = settings.timeout or DEFAULT_TIMEOUT
    settings.suite = settings.suite or ("mlkem768x25519" if settings.command else "dh4096")
    settings.rotate = settings.rotate or DEFAULT_ROTATION
    settings.host = settings.host or "localhost"
    settings.port = settings.port or (DEFAULT_TLS_PORT if settings.uses_tls else DEFAULT_PORT)
    settings.peer_name = settings.peer_name or DEFAULT_PEER_NAME
    settings.username = settings.username or os.environ.get("MQTT_USERNAME", "")
    settings.password = password(settings)
    settings.id = settings.id or client_id(settings)


def password(settings: Settings) -> bytes | None:
    """Return the password, which is not an option: other users see the command line."""
    environment = os.environ.get("MQTT_PASSWORD")
    if not settings.username and (settings.password_file or environment is not None):
        raise UsageError("--password-file or MQTT_PASSWORD needs --username or MQTT_USERNAME")
    if settings.username and not is_mqtt_string(settings.username):
        raise UsageError("MQTT_USERNAME must be UTF-8 text")
    if settings.password_file == "-":  # noqa: S105
        return ask_password(settings.username)
    if settings.password_file:
        return read_password(settings.password_file)
    return None if environment is None else os.fsencode(environment)


def ask_password(username: str) -> bytes:
    """Ask for a password at the terminal."""
    import getpass
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("error", getpass.GetPassWarning)
        try:
            return getpass.getpass(f"Password of {username}: ").encode()
        except (getpass.GetPassWarning, EOFError):
            raise UsageError("--password-file - needs a terminal to ask at") from None
