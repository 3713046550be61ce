#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["paho-mqtt>=2.1,<3", "cryptography>=50,<51"]
# ///
"""Client and responder of the secure MQTT lab; HELP below tells how to run them.

From the top: the help, the lab's request with its four messages, the other roles, main. What they
stand on is in crypto.py, the lab's cryptography, and in secure_mqtt, which lists its modules.
"""

import os
import sys

# Before anything is imported that takes time, or that an older Python cannot even read.
if __name__ == "__main__":  # Ctrl-C causes no traceback, before main() or in an import within it
    sys.excepthook = lambda kind, error, trace: (
        os._exit(130) if kind is KeyboardInterrupt else sys.__excepthook__(kind, error, trace)
    )
    sys.unraisablehook = lambda it: sys.excepthook(it.exc_type, it.exc_value, it.exc_traceback)  # type: ignore[arg-type]
if sys.version_info < (3, 10) or sys.platform not in ("linux", "darwin"):
    where = f"Python {sys.version.split()[0]} on {sys.platform}"
    sys.exit(f"secure_mqtt_client.py: error: needs Python 3.10+ on Linux or macOS, not {where}")

import contextlib
import signal
import time
from functools import partial
from typing import TYPE_CHECKING, cast

from crypto import CryptoError
from secure_mqtt.command_line import parse_settings
from secure_mqtt.errors import INSTALL, ProgramError, UsageError, WorkerError
from secure_mqtt.log import log, set_up_log
from secure_mqtt.streams import (
    is_utf8,
    read_message,
    say,
    say_error,
    tell_of_input,
    write_output,
)
from secure_mqtt.suites import SUITES, UnavailableError
from secure_mqtt.terminal import is_at_terminal

if TYPE_CHECKING:  # else loaded where it is used: --help and usage errors need no network
    from collections.abc import Callable

    from secure_mqtt.connection import Connection
    from secure_mqtt.exchange import Exchange
    from secure_mqtt.responder import Responder
    from secure_mqtt.settings import Settings

__version__ = "3.0.0"

HELP = """\
usage: secure_mqtt_client.py [options] NETID ACTION MESSAGE
       secure_mqtt_client.py [options] --lines NETID ACTION -
       secure_mqtt_client.py [options] --respond [NETID]
       secure_mqtt_client.py [options] NETID create TOPIC [MEMBER...]
       secure_mqtt_client.py [options] NETID admit|remove TOPIC MEMBER...
       secure_mqtt_client.py [options] NETID publish TOPIC MESSAGE
       secure_mqtt_client.py [options] --lines NETID publish TOPIC -
       secure_mqtt_client.py [options] NETID subscribe TOPIC...
       secure_mqtt_client.py [options] NETID topics|shell

Send a text over MQTT to a responder that transforms it, and print the answer.
The text is encrypted from end to end: no broker that reads along learns it.
(lab) marks what is in the course's lab; all else is an addition to it.

request:
  NETID                  (lab) who asks: a name of 1 to 64 characters, which the
                         topics of the messages begin with
  ACTION                 (lab) uppercase, lowercase, title-case, reverse,
                         shuffle or random (drops and doubles characters)
  MESSAGE                (lab) the text; other users of this machine can read it
                         here, so - takes standard input instead, to its end
  --lines                with - as MESSAGE: each line is a request of its own,
                         and gets its answer on a line
  --rekey SECONDS        with --lines: agree on a new key so often
  --suite SUITE          how to agree on a key, and encrypt: dh4096, the lab's
                         (default); x25519, faster, and an answer is accepted
                         for its own request only; mlkem768x25519, the same,
                         and what is recorded today withstands a later quantum
                         computer
  -W, --timeout SECONDS  end with an error after so long without the answer, or
                         with --lines without a further one (default: 30)

responder:
  --respond              answer requests, of every NETID or of the one given
  --status-topic TOPIC   publish there whether it runs, and what it has done
  --keep FILE            keep shared topics, too: who is a member, their keys,
                         and messages, all in FILE, which is made if it is not
                         there; needs --identity and --peer-ca
  --rotate SECONDS       with --keep: renew the key of each topic so often
                         (default: 3600)

topics that many share; a responder with --keep hands their keys to members:
(needs --identity and --peer-ca; --suite is mlkem768x25519 (default) or x25519)
  create TOPIC           make one, for NETID and the MEMBERs, who are NetIDs
  admit, remove          let MEMBERs in, or keep them out; for its owner only
  topics                 list those that NETID is a member of: name, owner and
                         members, with tabs between these
  publish TOPIC          send MESSAGE, any bytes, to all members; with --lines
                         each line as soon as it is read, as long as there are
                         any; -W is the time without progress (default with
                         --lines: for ever)
  subscribe TOPIC        print what members publish, the earlier messages first,
                         until SIGINT or SIGTERM; -W is the time without any
                         (default: for ever)
  shell                  do all this by commands from standard input
  --history COUNT        for create: how many messages are kept for who comes
                         later (default: 100; 0: none); for subscribe: how many
                         of those to print (default: all)
  --json                 for subscribe: print each message as an object in JSON,
                         with its time, topic and sender
  -C, --count COUNT      for subscribe: end after so many messages

broker:
  -h, --host HOST        (lab) its name or address (default: localhost)
  -p, --port PORT        (lab) its TCP port (default: 1884, with TLS 8883)
  -i, --id ID            our MQTT client ID (default: NETID, as in the lab; with
                         --cert or --username, and for topics, NETID, a hyphen
                         and 16 random digits; for a responder a random one)
  -u, --username NAME    log in under this name (default: MQTT_USERNAME in the
                         environment)
  --password-file FILE   take the password from FILE, or with - ask for it at
                         the terminal (default: MQTT_PASSWORD in the
                         environment)
  --local                run a broker for this command only, and for a request a
                         responder, too (needs the package amqtt)

security of the texts, from end to end, against the broker itself:
  --identity FILE        prove who we are: sign with the private key in FILE,
                         which also holds its certificates (PEM, not encrypted)
  --peer-ca FILE         accept only who proves its name by a certificate of an
                         authority in FILE (PEM): the responder, or for a
                         responder the NETID that asks
  --peer-name NAME       with --peer-ca: the responder's name in its certificate
                         (default: responder)

security of the connection to the broker, by TLS:
  --cafile FILE          use TLS, and trust the authorities in FILE (PEM)
  --tls                  use TLS, and trust the authorities of the system
  --insecure             use TLS, and trust anybody who says to be the broker
  --cert FILE            use TLS, and show the certificate in FILE (PEM), with
                         intermediate ones after it; needs --key
  --key FILE             the private key of --cert (PEM, not encrypted)

other:
  --config FILE          take options from FILE as well: one a line, as above,
                         values without quotes, # in front of comments; what is
                         given on the command line wins
  -v, --verbose          (lab) say on standard error what happens, but neither
                         keys nor texts
  --help                 print this help, as does -h alone
  --version              print the version

exit status:
  0 the answer was printed whole, or what was asked for was done; 1 it was not;
  2 wrong usage; 130 Ctrl-C; responder and subscribe end with 0 when SIGINT or
  SIGTERM stops them

It needs Python 3.10 or newer, on Linux or macOS.

examples:
  secure_mqtt_client.py --local le0nh4rt uppercase "Networking is the best!"
  secure_mqtt_client.py --respond
  secure_mqtt_client.py -v le0nh4rt reverse "Networking is the best!"
  secure_mqtt_client.py le0nh4rt uppercase - < message.txt
"""
USAGE = HELP.partition("\n\n")[0]

STOP_SIGNALS = signal.SIGINT, signal.SIGTERM


# --- the lab's request -------------------------------------------------------------------------


def request(
    mqtt: "Connection", settings: "Settings", exchange: "Exchange", texts: list[bytes]
) -> bytes:
    """Send one request and return the answer, UTF-8 text.

    :param mqtt: a connection that was not used yet
    :param exchange: a fresh one
    :param texts: the message, UTF-8, which is taken out, so that nothing keeps it: it may be large
    :raises ProgramError: there is no answer to return
    """
    from secure_mqtt.actions import KEY_EXCHANGE, RESPONSE
    from secure_mqtt.calls import call, exchange_keys, topics

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


def run_request(settings: "Settings") -> None:
    """Send a request and print the response."""
    write_output(answer_to(settings, read_message) + b"\n")


def answer_to(settings: "Settings", read_text: "Callable[[Settings], bytes]") -> bytes:
    """Send a request and return the response.

    :param read_text: returns what to send
    :raises ProgramError: there is no response
    """
    from secure_mqtt.exchange import new_exchange
    from secure_mqtt.workers import Worker, supervise

    # A child reads the files and computes while this process imports what the rest needs, and
    # connects. Before there are threads.
    worker = Worker(partial(new_exchange, settings))
    exchange = cast("Exchange", worker)
    begin_log(settings)
    from secure_mqtt.calls import notice, timed_out
    from secure_mqtt.connection import Connection, load_paho

    load_paho()
    exchange.request()  # says before anybody hears of us if there can be none
    worker.tell("load")
    with services(settings):
        texts = [read_text(settings)]
        mqtt = Connection(settings)
        end = time.monotonic() + settings.timeout
        try:
            with notice(mqtt):
                return supervise(partial(request, mqtt, settings, exchange, texts), lambda: end)
        except TimeoutError:
            raise timed_out(mqtt, settings) from None


def services(settings: "Settings") -> contextlib.AbstractContextManager[None]:
    """Return what --local brings for a request."""
    if not settings.local:
        return contextlib.nullcontext()
    from secure_mqtt.local import local_services

    return local_services(settings)


# --- the other roles ---------------------------------------------------------------------------


def run_session(settings: "Settings") -> None:
    """Send the lines of standard input and print the responses."""
    begin_log(settings)
    from secure_mqtt.exchange import Exchange, exchange_settings
    from secure_mqtt.lasting import Session
    from secure_mqtt.session import Dialogue
    from secure_mqtt.workers import supervise

    SUITES[settings.suite].load()
    new_exchange = partial(Exchange, *exchange_settings(settings))
    tell_of_input("lines")
    with services(settings):
        dialogue = Dialogue(settings, new_exchange)
        session = Session(settings, dialogue)
        try:
            supervise(session.run, session.end)
            dialogue.check_input()
        except (ProgramError, TimeoutError) as error:
            fault = error if isinstance(error, ProgramError) else session.timed_out()
            raise ProgramError(f"line {dialogue.window.first}: {fault}", fault.hint) from None


def run_responder(settings: "Settings") -> None:
    """Answer requests until SIGINT or SIGTERM."""
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: os._exit(0))  # before there is anything to finish
    # Nohup lets it be ignored; else it is, until there are files to be read again.
    ignores_hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN) == signal.SIG_IGN
    begin_log(settings)
    from secure_mqtt.local import local_broker
    from secure_mqtt.responder import Responder
    from secure_mqtt.workers import supervise

    whom = settings.netid or "all NetIDs"
    responder = Responder(settings, lambda: say(f"ready: {settings.broker}, for {whom}"))
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: responder.stop())
    if not ignores_hangup:
        heed_hangup(responder)
    local = local_broker(settings)
    with local if settings.local else contextlib.nullcontext(), contextlib.suppress(TimeoutError):
        supervise(responder.run, responder.end)


def heed_hangup(responder: "Responder") -> None:
    """Let SIGHUP make a responder read its files again or, if its terminal is closed, stop it."""
    was_at_terminal = is_at_terminal()

    def renew_or_stop(*_: object) -> None:
        """Do what SIGHUP is for, now."""
        if was_at_terminal and not is_at_terminal():
            responder.stop()
        else:
            responder.renew()

    signal.signal(signal.SIGHUP, renew_or_stop)


def run_member(settings: "Settings") -> None:
    """Publish on topics, or subscribe to them."""
    from secure_mqtt.topics.notary import Notary
    from secure_mqtt.workers import Worker, supervise

    worker = Worker(partial(Notary, settings))  # before there are threads, as for a request
    begin_log(settings)
    from secure_mqtt.connection import load_paho

    load_paho()
    from secure_mqtt.calls import notice
    from secure_mqtt.lasting import Session
    from secure_mqtt.topics.roles import new_member

    notary = cast("Notary", worker)
    member = new_member(settings, notary)
    notary.check()  # says before anybody hears of us if a file can't be used
    session = Session(settings, member)
    is_brief = not settings.lines and settings.command != "shell"  # where people wait for something
    for number in STOP_SIGNALS if settings.command == "subscribe" else ():
        signal.signal(number, lambda *_: member.stop())
    try:
        with member.surroundings(), notice(session) if is_brief else contextlib.nullcontext():
            supervise(session.run, lambda: min(session.end(), member.stops_at))
        member.check()
    except TimeoutError:
        if not member.is_stopped:
            raise session.timed_out() from None


def run_command(settings: "Settings") -> None:
    """Let a keeper of topics do something, and print what it lists."""
    answer = answer_to(settings, question_of)
    from secure_mqtt.topics.commands import shown

    output = shown(settings, answer)
    if output:
        write_output(output)


def question_of(settings: "Settings") -> bytes:
    """Return the request to the keeper."""
    from secure_mqtt.topics.commands import question

    return question(settings)


# --- main --------------------------------------------------------------------------------------


def begin_log(settings: "Settings") -> None:
    """Write the log from now on, and in it first what is allowed, but unwise."""
    from secure_mqtt.cautions import cautions

    set_up_log(settings)
    for caution in cautions(settings):
        log().warning(caution)


def settings_from(arguments: list[str]) -> "Settings":
    """Return what these arguments mean. UsageError if they are wrong."""
    return parse_settings(arguments, HELP, __version__)


def role_of(settings: "Settings") -> "Callable[[Settings], None]":
    """Return the function that does what the settings ask for."""
    if settings.respond:
        return run_responder
    if settings.command in ("publish", "subscribe", "shell"):
        return run_member
    if settings.command:
        return run_command
    return run_session if settings.lines else run_request


def report(error: ProgramError) -> int:
    """Say what went wrong; the result is the exit status."""
    say_error(error)
    if isinstance(error, UsageError):
        say(USAGE)
        return 2
    return 1


def main(argv: list[str] | None = None) -> int:
    """Run the program with these arguments, by default the command line's.

    :return: the exit status
    """
    try:
        settings = settings_from(sys.argv[1:] if argv is None else argv)
        role_of(settings)(settings)
    except ProgramError as error:
        return report(error)
    except ImportError as error:
        return report(ProgramError(f"a package is missing: {error}", INSTALL))
    except WorkerError:
        return report(ProgramError("a process of the program was ended", "try again"))
    except UnavailableError as error:
        hint = "choose another --suite, or install a cryptography package with a newer OpenSSL"
        return report(UsageError(str(error), hint))
    except (CryptoError, OSError) as error:
        return report(ProgramError(str(error)))
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except SystemExit:  # argparse after --help or --version
        pass
    return 0


if __name__ == "__main__":
    exit_status = main()
    # All is written, closed and ended. Taking the modules apart would cost each request 15 ms more.
    os._exit(exit_status)
