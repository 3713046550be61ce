#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["paho-mqtt>=2.1,<3", "cryptography>=50,<51"]
# ///
"""Client and responder of the secure MQTT lab; HELP below tells how to run them.

From the top: the client, sessions of many lines, the command line, main. Beside it: responder.py is
the other role, mqtt.py the connection to the broker, crypto.py the secrets, settings.py what the
command line says, background.py child processes.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

import crypto
from background import Worker, WorkerError, supervise
from keys import MAX_KEY_FILE_SIZE, CryptoError, digest, public_key_der, read_group
from mqtt import (
    ACTIONS,
    CONNACK,
    CONNECTING,
    KEY_EXCHANGE,
    NETID,
    REQUEST,
    RESPONSE,
    SUBACK,
    Connection,
    Message,
    UnusableError,
    backoff,
    is_utf8,
    random_id,
)
from settings import (
    PROGRAM,
    ProgramError,
    Settings,
    UsageError,
    log,
    peer_security,
    read_file,
    tls_context,
)

if TYPE_CHECKING:
    import io

__version__ = "2.0.0"

HELP = """\
usage: secure_mqtt_client.py [options] NETID ACTION MESSAGE
       secure_mqtt_client.py [options] --lines NETID ACTION -
       secure_mqtt_client.py [options] --respond [NETID]

Send one MQTT request that not even the broker can read, and print the answer;
or one for each line; or answer such requests.

request:
  NETID                  who asks: one level of the topic, at most 64 characters
  ACTION                 uppercase, lowercase, title-case, reverse, shuffle or
                         random (drops and doubles characters)
  MESSAGE                the text; - reads standard input, whole
  -W, --timeout SECONDS  give up after so long in all, or without a next answer
                         to --lines (default: 30)
  --suite SUITE          dh4096, the lab's (default), or x25519: faster, and
                         each message fits its place only
  --lines                send each line of standard input as a request
  --rekey SECONDS        agree on new keys so often (with --lines)

responder:
  --respond              answer the requests of all NETIDs, or of one
  --status-topic TOPIC   publish there, retained, whether it runs, and counts

broker:
  -h, --host HOST        name or address (default: localhost)
  -p, --port PORT        TCP port (default: 1884, with TLS 8883)
  -i, --id ID            MQTT client ID (default: NETID, as the lab wants it;
                         for a responder a random one)
  --local                run a broker for this command, and for a request a
                         responder, too (needs the package amqtt)

security from end to end:
  --identity FILE        sign with the private key in this file, and send its
                         certificates with it (PEM, not encrypted)
  --peer-ca FILE         accept only a peer that these authorities certify
                         (PEM); a responder expects the NETID as its name
  --peer-name NAME       the responder's name (default: responder)

security of the connection (each of the first five turns TLS on):
  --cafile FILE          trust the authorities in this file (PEM)
  --tls                  trust the authorities that the system trusts
  --insecure             trust any broker: no protection from an active attacker
  --cert FILE            our certificate, and intermediate ones (PEM)
  --key FILE             its private key (PEM, not encrypted)
  -u, --username NAME    (default: MQTT_USERNAME in the environment)
  --password-file FILE   holds the password, - asks for it (default:
                         MQTT_PASSWORD in the environment)

other:
  -v, --verbose          say on stderr what happens; never a key or a text
  --help                 print this help, as does -h alone
  --version              print the version

exit status:
  0 the response was printed, 1 it was not, 2 wrong usage, 130 Ctrl-C;
  a responder that SIGINT or SIGTERM stops exits with 0

examples:
  secure_mqtt_client.py --local le0nh4rt uppercase "Networking is the best!"
  secure_mqtt_client.py -h broker.example.org le0nh4rt reverse - < message.txt
  secure_mqtt_client.py --respond
"""
USAGE = HELP.partition("\n\n")[0]

DEFAULT_PORT = 1884  # the lab's
DEFAULT_TLS_PORT = 8883  # secure-mqtt, as registered with IANA
# A peer on the course's own module needs over 10 s on cryptography 49 and newer.
DEFAULT_TIMEOUT = 30.0  # seconds
MAX_TIMEOUT = 86_400.0  # seconds: far more overflows the clocks of the system
NOTICE_AFTER = 3.0  # seconds until a person at a terminal is told what is being waited for
DNS_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"  # RFC 1034, 3.5; RFC 1123, 2.1
DNS_NAME = re.compile(rf"{DNS_LABEL}(\.{DNS_LABEL})*")
MAX_TOKEN_SIZE = 268_435_455 - 1024  # bytes: MQTT 3.1.1, 2.2.3, less room for the topic

# A session of many lines.
CHUNK_SIZE = 2**16  # bytes, read from standard input at a time
WINDOW, WINDOW_BYTES = 64, 2**20  # requests sent, but not answered yet
# Seconds without an answer until all is tried again, then doubled. A peer on the course's own
# module has the one suite only, and needs long.
PATIENCE = {"x25519": 2.0, "dh4096": 15.0}
MAX_REQUESTS_PER_KEY = {"x25519": 10_000, "dh4096": 100}  # both ends remember them
IDLE_TIME = 30.0  # seconds after which a key is renewed: a responder may forget it

STOP_SIGNALS = signal.SIGINT, signal.SIGTERM

EXCHANGE, ANSWER = "the key exchange", "the response"  # what is waited for, after the SUBACK
WAITING = 21  # log level, just above INFO: what a person at a terminal is told unasked
T = TypeVar("T")


# --- the client --------------------------------------------------------------------------------


def request(
    mqtt: Connection, settings: Settings, exchange: crypto.Exchange, texts: list[bytes]
) -> bytes:
    """Send one request and return the answer, UTF-8 text.

    :param mqtt: a connection that was not used yet
    :param exchange: a fresh one
    :param texts: the message, UTF-8, which is taken out, so that nothing keeps it: it may be large
    :raises ProgramError: there is no answer to return
    """
    asking, answering = topics(settings)
    with mqtt:
        mqtt.connect()
        mqtt.subscribe(RESPONSE.format(settings.netid, KEY_EXCHANGE), answering)
        exchange_keys(mqtt, settings, exchange)
        read = partial(exchange.open, answering)
        seal = partial(exchange.seal, asking)
        _, answer = call(mqtt, settings, settings.action, seal(texts.pop()), read)
    if not is_utf8(answer):
        raise ProgramError("the response is not UTF-8 text", "the responder breaks the protocol")
    return answer


def topics(settings: Settings) -> tuple[str, str]:
    """Return the topics of encrypted requests and their responses."""
    names = settings.netid, settings.action
    return REQUEST.format(*names), RESPONSE.format(*names)


def exchange_keys(mqtt: Connection, settings: Settings, exchange: crypto.Exchange) -> None:
    """Make the exchange with a responder. ProgramError: the connection has ended."""

    def agree(response: bytes) -> bytes:
        exchange.agree(response)
        return response

    response = call(mqtt, settings, KEY_EXCHANGE, exchange.request(), agree)
    if settings.peer_ca:
        log().info("the peer has proved to be %r", settings.peer_name)
    else:
        fingerprint = digest(public_key_der(response)).hex()
        log().info("the peer is not authenticated; SHA-256 of its public key: %s", fingerprint)


def call(
    mqtt: Connection, settings: Settings, action: str, payload: bytes, read: Callable[[bytes], T]
) -> T:
    """Publish a request and return what the first answer that can be used means.

    :param action: as in the topics, KEY_EXCHANGE included
    :param read: turns a payload into the result; CryptoError if it can't be used
    :raises ProgramError: the connection has ended
    """
    mqtt.stage = EXCHANGE if action == KEY_EXCHANGE else ANSWER
    topic = RESPONSE.format(settings.netid, action)
    mqtt.ignored.clear()
    mqtt.discard()  # what came before the request is no answer to it
    mqtt.publish(REQUEST.format(settings.netid, action), payload)
    log().info("sent %d bytes for %s", len(payload), mqtt.stage)
    size = len(payload)
    del payload  # it may be large
    while True:
        while not mqtt.messages:
            mqtt.wait()
        message = mqtt.messages.popleft()
        if message.topic == topic:
            try:
                check_answer(message, size)
                result = read(message.payload)
            except CryptoError as error:
                mqtt.ignored[str(error)] += 1
            else:
                log().info("received %d bytes for %s", len(message.payload), mqtt.stage)
                return result


def check_answer(answer: Message, size: int) -> None:
    """Raise UnusableError for what is no answer, whatever it means.

    :param size: of our own message, in bytes
    """
    if answer.is_retained:
        raise UnusableError("retained from an earlier run")
    # No action makes a text more than three times as long. A broker that sends far more wants us to
    # be busy with it when the time is over.
    if len(answer.payload) > 4 * size + MAX_KEY_FILE_SIZE:
        raise UnusableError("far too large for an answer")


def timed_out(mqtt: Connection, settings: Settings) -> ProgramError:
    """Return the error for a client whose time is over."""
    within = f"within {settings.timeout:g} s"
    if mqtt.stage in (CONNECTING, CONNACK, SUBACK):
        return mqtt.silence(f"no {mqtt.stage} came {within}")
    is_exchange = mqtt.stage == EXCHANGE
    topic = RESPONSE.format(settings.netid, KEY_EXCHANGE if is_exchange else settings.action)
    faults = ", ".join(f"{fault} ({count})" for fault, count in mqtt.ignored.most_common())
    wanted = "valid key" if is_exchange else "response for us"
    if faults:
        return ProgramError(
            f"no {wanted} came on {topic} {within}, only: {faults}",
            "check --peer-ca and --peer-name; someone may be tampering with the messages"
            if is_exchange and settings.peer_ca
            else "another client may be using this NETID, or someone tampers with the messages",
        )
    if is_exchange:
        return ProgramError(
            f"no responder answered the key exchange on {topic} {within}",
            f"start one ({PROGRAM} --respond), or check NETID, --host and --port;"
            " an access rule of the broker may also drop messages without a word, or the responder"
            " demand an --identity",
        )
    return ProgramError(
        f"no response came on {topic} {within}",
        "the responder may have ended or not know this action (see its log), the message may be"
        " too large for the broker, or an access rule may drop it",
    )


# --- sessions of many lines --------------------------------------------------------------------


class Session:
    """Each line of standard input is a request; the answers are printed in their order."""

    def __init__(self, settings: Settings, new_exchange: Callable[[], crypto.Exchange]) -> None:
        """Begin to read standard input."""
        self._settings = settings
        self._new_exchange = new_exchange
        # Nothing but their order tells which request a response of dh4096 is for.
        self._window = WINDOW if settings.suite == "x25519" else 1
        self._max_requests = MAX_REQUESTS_PER_KEY[settings.suite]
        self._mqtt = Connection(settings)
        self._is_connected = self._has_connected = False  # now; ever
        self._is_printing = False  # which lasts as long as the reader pleases
        self._setback: ProgramError | None = None  # why it is not connected any more
        self._begin_to_wait()
        self._exchange: crypto.Exchange | None = None
        self._exchanged = 0.0  # of time.monotonic()
        self._base = 1  # the number of the line that was the exchange's first request
        self._input = InputLines()
        self._lines: deque[bytes] = deque()  # read, but not answered
        self.first = 1  # the number of the first of them
        self._sent = self._sent_bytes = 0  # of them
        self._answers: dict[int, bytes] = {}  # by line number: those that came before their turn

    def end(self) -> float:
        """Return when it is to be given up; never while there is nothing to wait for."""
        is_idle = self._is_printing or (self._is_connected and not self._lines)
        return float("inf") if is_idle else self._progress + self._settings.timeout

    def timed_out(self) -> ProgramError:
        """Return the error for that."""
        return self._setback or timed_out(self._mqtt, self._settings)

    def run(self) -> None:
        """Answer all lines. ProgramError: the line with the number in first can't be answered."""
        while True:
            try:
                with self._mqtt:
                    self._connect()
                    while self._lines or not self._input.has_ended:
                        self._go_on()
                break
            except TimeoutError as error:
                self._setback = self._stall()
                self._prepare_again(error)
            except ProgramError as error:
                if error.is_final or not self._has_connected:
                    raise
                self._setback = error
                self._prepare_again(error)
        if self._input.fault:
            raise self._input.fault

    def _stall(self) -> ProgramError:
        """Return what to say if the time is over before it is connected again."""
        fault = timed_out(self._mqtt, self._settings)
        again = f"connecting to {self._settings.broker} again was under way"
        return ProgramError(f"{fault}; {again}", fault.hint)

    def _connect(self) -> None:
        self._mqtt.connect()
        _, topic = topics(self._settings)
        self._mqtt.subscribe(RESPONSE.format(self._settings.netid, KEY_EXCHANGE), topic)
        self._mqtt.stage = EXCHANGE
        self._is_connected = self._has_connected = True
        self._setback = None

    def _prepare_again(self, reason: Exception) -> None:
        """Prepare another connection, on which all is sent again that was not answered."""
        log().info("connecting again: %s", reason)
        if not self._lines:
            self._progress = time.monotonic()
        self._is_connected, self._exchange = False, None
        self._sent = self._sent_bytes = 0
        self._answers.clear()
        time.sleep(next(self._delays))
        self._patience *= 2
        self._mqtt = Connection(self._settings)

    def _begin_to_wait(self) -> None:
        """Count the time from now on: an answer has come, or the first of some lines."""
        self._progress = self._tried = time.monotonic()
        self._patience = min(PATIENCE[self._settings.suite], self._settings.timeout / 2)
        self._delays = backoff()

    def _go_on(self) -> None:
        """Send what can be sent, and take what comes."""
        exchange = self._fresh_exchange()
        if not exchange and self._lines and not self._sent:  # what is in flight finishes first
            exchange = self._renew_key()
        if exchange:
            self._send(exchange)
        self._mqtt.patience_ends = self._tried + self._patience if self._sent else float("inf")
        has_room = len(self._lines) < self._window and not self._input.has_ended
        if self._mqtt.wait(others=[self._input] if has_room else []):
            self._read()
        while self._mqtt.messages:
            self._take(self._mqtt.messages.popleft())
        self._print()

    def _read(self) -> None:
        if not self._lines:
            if time.monotonic() - self._progress >= IDLE_TIME:
                self._exchange = None
            self._begin_to_wait()
        self._lines += self._input.read()

    def _fresh_exchange(self) -> crypto.Exchange | None:
        """Return the exchange, if its key may be used for another request."""
        age = time.monotonic() - self._exchanged
        requests = self.first + self._sent - self._base
        is_old = age >= (self._settings.rekey or float("inf")) or requests >= self._max_requests
        return None if is_old else self._exchange

    def _renew_key(self) -> crypto.Exchange:
        self._exchange = self._new_exchange()
        self._mqtt.patience_ends = time.monotonic() + self._patience
        exchange_keys(self._mqtt, self._settings, self._exchange)
        self._mqtt.stage = ANSWER
        self._base = self.first
        self._exchanged = self._tried = time.monotonic()
        return self._exchange

    def _send(self, exchange: crypto.Exchange) -> None:
        topic, _ = topics(self._settings)
        while self._sent < min(self._window, len(self._lines)):
            line = self._lines[self._sent]
            if self._sent and self._sent_bytes + len(line) > WINDOW_BYTES:
                break
            self._mqtt.publish(topic, exchange.seal(topic, line))
            self._sent += 1
            self._sent_bytes += len(line)

    def _take(self, message: Message) -> None:
        """Keep an answer until its turn comes."""
        _, topic = topics(self._settings)
        if not self._exchange or message.topic != topic:
            return
        try:
            check_answer(message, self._sent_bytes)
            number, text = self._exchange.open(topic, message.payload)
        except CryptoError as error:
            self._mqtt.ignored[str(error)] += 1
        else:
            self._answers[self._base + number] = text

    def _print(self) -> None:
        """Print the answers whose turn it is."""
        texts: list[bytes] = []
        while is_line(text := self._answers.get(self.first + len(texts), b"\n")):
            texts.append(text)
        if texts:
            self._is_printing = True
            write_output(b"".join(b"%b\n" % text for text in texts))
            for _ in texts:
                del self._answers[self.first]
                self._sent_bytes -= len(self._lines.popleft())
                self._sent -= 1
                self.first += 1
            self._is_printing = False
            self._begin_to_wait()
        if self.first in self._answers:
            raise ProgramError("the response is not one line of UTF-8 text", is_final=True)


def is_line(text: bytes) -> bool:
    """Tell whether bytes are one line of UTF-8 text, without its end."""
    return is_utf8(text) and b"\n" not in text


class InputLines:
    """The lines of standard input, also for select(), which does not take files everywhere."""

    def __init__(self) -> None:
        """Begin to read."""
        self._socket, copy = socket.socketpair()
        self.fileno = self._socket.fileno
        self._rest = bytearray()  # a line of which more is to come
        self.has_ended = False
        self.fault: ProgramError | None = None  # why it has, if not by itself
        threading.Thread(target=self._copy, args=[copy], daemon=True).start()

    def _copy(self, copy: socket.socket) -> None:
        with copy:
            try:
                while data := standard_input().read1(CHUNK_SIZE):
                    copy.sendall(data)
            except ProgramError as error:
                self.fault = error
            except OSError as error:
                self.fault = ProgramError(f"cannot read standard input: {error.strerror}")

    def read(self) -> list[bytes]:
        """Return the lines that have come, up to the first that can't be sent."""
        data = self._socket.recv(CHUNK_SIZE)
        self.has_ended = not data
        first, *others = data.split(b"\n")
        self._rest += first
        if self.has_ended and self._rest:  # the last line may lack its end
            others = [b""]
        lines = []
        try:
            for start in others:
                lines.append(checked_message(bytes(self._rest)))
                self._rest = bytearray(start)
            check_size(len(self._rest))  # whose end may never come
        except ProgramError as error:
            self.fault, self.has_ended = error, True
        return lines


# --- command line ------------------------------------------------------------------------------


class Parser(argparse.ArgumentParser):
    """A parser that knows HELP, and leaves it to main() to print and exit."""

    def format_help(self) -> str:
        """Return the help, the same on all versions of Python."""
        return HELP

    def error(self, message: str) -> NoReturn:
        """Raise UsageError. The value of an unknown option may be a password: it is not shown."""
        raise UsageError(re.sub(r"(--[\w-]+=| -[A-Za-z](?=[^/ ])).*", r"\1...", message))

    def _print_message(self, message: str, file: Any = None) -> None:
        write_output(message.encode())


def build_parser() -> Parser:
    """Return the parser of the command line that HELP describes."""
    # With these two, argparse need not measure the terminal, which takes 3 ms.
    formatter = partial(argparse.HelpFormatter, width=80)
    parser = Parser(usage="", formatter_class=formatter, add_help=False, allow_abbrev=False)
    add = parser.add_argument
    add("words", nargs="*")
    time_span = f"a number of seconds above 0, at most {MAX_TIMEOUT:g}"
    seconds = checked(float, lambda value: 0 < value <= MAX_TIMEOUT, time_span)
    add("-W", "--timeout", type=seconds)
    add("--rekey", type=seconds)
    suites = " or ".join(crypto.SUITES)
    add("--suite", type=checked(str, crypto.SUITES.__contains__, suites))
    add("-h", "--host", type=checked(str, is_mqtt_string, "a host's name or address"))
    port_range = "a number from 1 to 65535"
    add("-p", "--port", type=checked(decimal, lambda value: 1 <= value <= 65535, port_range))
    add("-i", "--id", type=checked(str, is_mqtt_string, "UTF-8 text of 1 to 65535 bytes"))
    for option in ("identity", "peer-ca", "cafile", "cert", "key", "password-file"):
        add(f"--{option}", type=checked(str, bool, "a file's name"))
    add("--peer-name", type=checked(str, DNS_NAME.fullmatch, "a DNS name"))
    add("-u", "--username", type=checked(str, is_mqtt_string, "UTF-8 text"))
    add("--status-topic", type=checked(str, is_topic, "a topic without + and #"))
    for option in ("--respond", "--local", "--lines", "--tls", "--insecure"):
        add(option, action="store_true")
    add("-v", "--verbose", action="store_true")
    add("--help", action="help")
    add("--version", action="version", version=f"{PROGRAM} {__version__}")
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


def parse_settings(arguments: list[str]) -> Settings:
    """Turn the command line into settings.

    :raises UsageError: something is wrong with it
    """
    settings = Settings()
    if arguments == ["-h"]:  # a later edition of the course means --help by it
        arguments = ["--help"]
    end = arguments.index("--") if "--" in arguments else len(arguments)
    for text in arguments[:end]:
        if re.match(r"-[A-Za-z][^=]*\s", text):  # Python 3.13.0 would take such a MESSAGE apart
            raise UsageError("an argument that begins with a dash is an option; put -- before it")
    build_parser().parse_intermixed_args(arguments[:end], settings)
    words = settings.words + arguments[end + 1 :]
    check_combination(settings, words)
    check_words(settings, words)
    fill_in(settings)
    if settings.cafile or settings.cert:
        tls_context(settings)  # shows what is wrong with the files before anything else is done
    return settings


def check_combination(settings: Settings, words: Sequence[str]) -> None:
    """Refuse arguments that are right one by one, but not together."""
    if settings.respond:
        check_responder(settings, words)
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
    for option in ("suite", "lines", "rekey", "peer_name"):
        if getattr(settings, option):
            name = option.replace("_", "-")
            raise UsageError(f"--respond answers requests as they come; --{name} is for a request")


def check_request(settings: Settings, words: Sequence[str]) -> None:
    """Refuse what is for a responder, or for another request."""
    if len(words) < 3:
        raise UsageError("NETID, ACTION and MESSAGE are needed, or --respond to answer requests")
    if len(words) > 3:
        raise UsageError("there are more arguments than NETID, ACTION and MESSAGE; quote MESSAGE")
    if settings.status_topic:
        raise UsageError("--status-topic is for --respond")
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
    """Take NETID, ACTION and MESSAGE. UsageError if one is wrong."""
    settings.netid, settings.action, message = (*words, "", "", "")[:3]
    netid, action = settings.netid, settings.action
    if words and not NETID.fullmatch(netid):
        raise UsageError(
            "NETID must be one level of a topic: 1 to 64 characters without / + #, controls, and $"
            f" in front; not {netid[:80]!r}"
        )
    if (settings.identity or settings.peer_ca) and words and not re.fullmatch(DNS_LABEL, netid):
        raise UsageError(
            "--identity and --peer-ca need a NETID that a certificate can name: 1 to 63 letters,"
            f" digits and inner hyphens; not {netid[:80]!r}"
        )
    if words[1:] and action not in ACTIONS:
        raise UsageError(f"ACTION must be one of {', '.join(ACTIONS)}; not {action[:80]!r}")
    if not is_typed_utf8(message):
        raise UsageError("MESSAGE must be UTF-8 text")
    settings.message = None if message == "-" else os.fsencode(message)  # as typed, in any locale


def fill_in(settings: Settings) -> None:
    """Put the defaults where nothing was given, and read the login."""
    settings.timeout = settings.timeout or DEFAULT_TIMEOUT
    settings.suite = settings.suite or "dh4096"
    settings.host = settings.host or "localhost"
    settings.port = settings.port or (DEFAULT_TLS_PORT if settings.uses_tls else DEFAULT_PORT)
    settings.id = settings.id or (random_id() if settings.respond else settings.netid)
    settings.peer_name = settings.peer_name or "responder"
    settings.username = settings.username or os.environ.get("MQTT_USERNAME", "")
    settings.password = password(settings)


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
        content = read_file("--password-file", settings.password_file)
        return content.removesuffix(b"\n").removesuffix(b"\r")
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


# --- main --------------------------------------------------------------------------------------


def read_message(settings: Settings) -> bytes:
    """Return the message, from standard input if the command line says so."""
    if settings.message is not None:
        return settings.message
    try:
        message = standard_input().read()
    except OSError as error:
        raise ProgramError(f"cannot read standard input: {error.strerror}") from None
    return checked_message(message)


def standard_input() -> io.BufferedReader:
    """Return standard input. ProgramError if there is none."""
    if sys.stdin is None:
        raise ProgramError("cannot read MESSAGE from standard input: it is closed")
    return cast("io.BufferedReader", sys.stdin.buffer)


def checked_message(text: bytes) -> bytes:
    """Return a message, or raise ProgramError if it can't be sent."""
    check_size(len(text))
    if not is_utf8(text):
        raise ProgramError("MESSAGE on standard input is not UTF-8 text")
    return text


def check_size(size: int) -> None:
    """Raise ProgramError for a message of so many bytes if that is too large."""
    if crypto.token_size(size) > MAX_TOKEN_SIZE:
        raise ProgramError(f"MESSAGE has {size} bytes, too many for MQTT", "send parts of it")


def write_output(data: bytes) -> None:
    """Write to standard output, whole and at once."""
    if sys.stdout is None:
        raise ProgramError("cannot write to standard output: it is closed", is_final=True)
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except OSError as error:
        # Python would try to write the rest again at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        problem = f"cannot write to standard output: {error.strerror}"
        raise ProgramError(problem, is_final=True) from None


def say(text: str) -> None:
    """Write a line to standard error, if there is one."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(text, file=sys.stderr, flush=True)


def report(error: ProgramError) -> int:
    """Say what went wrong; the result is the exit status."""
    say(f"{PROGRAM}: error: {error}")
    if error.hint:
        say(f"{PROGRAM}: hint: {error.hint}")
    if isinstance(error, UsageError):
        say(USAGE)
        return 2
    return 1


def set_up_log(settings: Settings) -> None:
    """Send the log to standard error: for a person, or from a responder for programs."""
    import logging

    line = f"{PROGRAM}: %(message)s"
    if settings.respond:
        line = "time=%(asctime)s.%(msecs)03dZ level=%(levelname)s event=%(message)s"
    formatter = logging.Formatter(line, "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler = logging.StreamHandler()
    handler.setFormatter(formatter)
    log().addHandler(handler)
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    log().setLevel(
        logging.INFO if settings.verbose else WAITING if is_terminal else logging.WARNING
    )


def run_request(settings: Settings) -> None:
    """Send a request and print the response."""
    # A child computes while this process imports paho and connects. Before there are threads.
    exchange = Worker(partial(crypto.Exchange, *exchange_settings(settings)))
    with services(settings):
        texts = [read_message(settings)]
        mqtt = Connection(settings)
        end = time.monotonic() + settings.timeout
        try:
            with notice(mqtt):
                run = partial(request, mqtt, settings, cast("crypto.Exchange", exchange), texts)
                answer = supervise(run, lambda: end)
        except TimeoutError:
            raise timed_out(mqtt, settings) from None
    write_output(answer + b"\n")


@contextlib.contextmanager
def notice(mqtt: Connection) -> Iterator[None]:
    """Tell a person at a terminal what is being waited for, if it takes long."""
    timer = threading.Timer(
        NOTICE_AFTER, lambda: log().log(WAITING, "waiting for %s ...", mqtt.stage)
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def run_session(settings: Settings) -> None:
    """Send the lines of standard input and print the responses."""
    new_exchange = partial(crypto.Exchange, *exchange_settings(settings))
    with services(settings):
        session = Session(settings, new_exchange)
        try:
            supervise(session.run, session.end)
        except (ProgramError, TimeoutError) as error:
            fault = error if isinstance(error, ProgramError) else session.timed_out()
            raise ProgramError(f"line {session.first}: {fault}", fault.hint) from None


def exchange_settings(settings: Settings) -> tuple[Any, ...]:
    """Return the arguments of an Exchange. CryptoError or UsageError if a file is unusable."""
    read_group()  # raises its error here, and not in a child
    return settings.netid, settings.suite, *peer_security(settings), settings.peer_name


def services(settings: Settings) -> contextlib.AbstractContextManager[None]:
    """Return what --local brings for a request."""
    if not settings.local:
        return contextlib.nullcontext()
    from responder import local_services

    return local_services(settings)


def run_responder(settings: Settings) -> None:
    """Answer requests until SIGINT or SIGTERM."""
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: sys.exit(0))  # before there is anything to finish
    from responder import Responder, local_broker

    whom = settings.netid or "all NetIDs"
    responder = Responder(settings, lambda: say(f"ready: {settings.broker}, for {whom}"))
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: responder.stop())
    local = local_broker(settings)
    with local if settings.local else contextlib.nullcontext(), contextlib.suppress(TimeoutError):
        supervise(responder.run, responder.end)


def main(argv: list[str] | None = None) -> int:
    """Run the program with these arguments, by default the command line's.

    :return: the exit status
    """
    try:
        settings = parse_settings(sys.argv[1:] if argv is None else argv)
        set_up_log(settings)
        if settings.insecure:
            log().warning("--insecure: anyone between here and the broker can pose as it")
        run = run_session if settings.lines else run_request
        (run_responder if settings.respond else run)(settings)
    except ProgramError as error:
        return report(error)
    except ImportError as error:
        hint = "install what is needed: python3 -m pip install -r requirements.txt"
        return report(ProgramError(f"a package is missing: {error}", hint))
    except WorkerError:
        return report(ProgramError("a process of the program was ended", "try again"))
    except (CryptoError, OSError) as error:
        return report(ProgramError(str(error)))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except SystemExit:  # argparse after --help or --version, or a responder that was just started
        pass
    return 0


if __name__ == "__main__":
    exit_status = main()
    # All is written, closed and ended. Taking the modules apart would cost each request 15 ms more.
    os._exit(exit_status)
