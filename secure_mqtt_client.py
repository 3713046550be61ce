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
from secure_mqtt.log import PROGRAM, log, set_up_log
from secure_mqtt.streams import is_utf8, read_message, say, tell_of_input, write_output
from secure_mqtt.suites import SUITES, UnavailableError

if TYPE_CHECKING:  # else loaded where it is used: --help and usage errors need no network
    from secure_mqtt.connection import Connection
    from secure_mqtt.exchange import Exchange
    from secure_mqtt.settings import Settings

__version__ = "3.0.0"

HELP = """\
usage: secure_mqtt_client.py [options] NETID ACTION MESSAGE
       secure_mqtt_client.py [options] --lines NETID ACTION -
       secure_mqtt_client.py [options] --respond [NETID]

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

broker:
  -h, --host HOST        (lab) its name or address (default: localhost)
  -p, --port PORT        (lab) its TCP port (default: 1884, with TLS 8883)
  -i, --id ID            our MQTT client ID (default: NETID, as in the lab; with
                         --cert or --username NETID, a hyphen and 16 random
                         digits; for a responder a random one)
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
  0 the answer was printed whole; 1 it was not; 2 wrong usage; 130 Ctrl-C;
  a responder that SIGINT or SIGTERM stops ends with 0

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
        texts = [read_message(settings)]
        mqtt = Connection(settings)
        end = time.monotonic() + settings.timeout
        try:
            with notice(mqtt):
                answer = supervise(partial(request, mqtt, settings, exchange, texts), lambda: end)
        except TimeoutError:
            raise timed_out(mqtt, settings) from None
    write_output(answer + b"\n")


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
    from secure_mqtt.session import Session
    from secure_mqtt.workers import supervise

    SUITES[settings.suite].load()
    new_exchange = partial(Exchange, *exchange_settings(settings))
    tell_of_input("lines")
    with services(settings):
        session = Session(settings, new_exchange)
        try:
            supervise(session.run, session.end)
        except (ProgramError, TimeoutError) as error:
            fault = error if isinstance(error, ProgramError) else session.timed_out()
            raise ProgramError(f"line {session.first}: {fault}", fault.hint) from None


def run_responder(settings: "Settings") -> None:
    """Answer requests until SIGINT or SIGTERM."""
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: os._exit(0))  # before there is anything to finish
    begin_log(settings)
    from secure_mqtt.local import local_broker
    from secure_mqtt.responder import Responder
    from secure_mqtt.workers import supervise

    whom = settings.netid or "all NetIDs"
    responder = Responder(settings, lambda: say(f"ready: {settings.broker}, for {whom}"))
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: responder.stop())
    local = local_broker(settings)
    with local if settings.local else contextlib.nullcontext(), contextlib.suppress(TimeoutError):
        supervise(responder.run, responder.end)


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


def report(error: ProgramError) -> int:
    """Say what went wrong; the result is the exit status."""
    say(f"{PROGRAM}: error: {error}")
    if error.hint:
        say(f"{PROGRAM}: hint: {error.hint}")
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
        run = run_session if settings.lines else run_request
        (run_responder if settings.respond else run)(settings)
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
