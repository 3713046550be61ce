#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["paho-mqtt>=2.1,<3", "cryptography>=50,<51"]
# ///
"""Client and responder of the secure MQTT lab; HELP below tells how to run them.

From the top: the help, the lab's request with its four messages, the other roles, main. What they
stand on is in crypto.py, the lab's cryptography, and in secure_mqtt, which lists its modules.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

from crypto import CryptoError, read_group
from secure_mqtt.actions import KEY_EXCHANGE, RESPONSE
from secure_mqtt.calls import call, exchange_keys, timed_out, topics
from secure_mqtt.command_line import parse_settings
from secure_mqtt.connection import Connection
from secure_mqtt.errors import ProgramError, UsageError
from secure_mqtt.exchange import Exchange
from secure_mqtt.log import PROGRAM, WAITING, log, set_up_log
from secure_mqtt.settings import Settings, peer_security
from secure_mqtt.streams import is_utf8, read_message, say, write_output
from secure_mqtt.suites import SUITES, UnavailableError
from secure_mqtt.workers import Worker, WorkerError, supervise

__version__ = "3.0.0"

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
  --suite SUITE          dh4096, the lab's (default); x25519: faster, and each
                         message fits its place only; mlkem768x25519: like it,
                         and no recording falls to a quantum computer
  --lines                send each line of standard input as a request
  --rekey SECONDS        agree on new keys so often (with --lines)

responder:
  --respond              answer the requests of all NETIDs, or of one
  --status-topic TOPIC   publish there, retained, whether it runs, and counts

broker:
  -h, --host HOST        name or address (default: localhost)
  -p, --port PORT        TCP port (default: 1884, with TLS 8883)
  -i, --id ID            MQTT client ID (default: NETID, as the lab wants it;
                         with --cert or --username NETID, a hyphen and 16
                         random digits; for a responder a random one)
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
  --config FILE          read options from this file, too, one a line, without
                         quotes, # for comments; the command line wins
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

NOTICE_AFTER = 3.0  # seconds until a person at a terminal is told what is being waited for
STOP_SIGNALS = signal.SIGINT, signal.SIGTERM


# --- the lab's request -------------------------------------------------------------------------


def request(mqtt: Connection, settings: Settings, exchange: Exchange, texts: list[bytes]) -> bytes:
    """Send one request and return the answer, UTF-8 text.

    :param mqtt: a connection that was not used yet
    :param exchange: a fresh one
    :param texts: the message, UTF-8, which is taken out, so that nothing keeps it: it may be large
    :raises ProgramError: there is no answer to return
    """
    asking, answering = topics(settings)
    exchange.request()  # says before anybody hears of us if there can be none
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


def run_request(settings: Settings) -> None:
    """Send a request and print the response."""
    # A child computes while this process imports paho and connects. Before there are threads.
    exchange = Worker(partial(Exchange, *exchange_settings(settings)))
    with services(settings):
        texts = [read_message(settings)]
        mqtt = Connection(settings)
        end = time.monotonic() + settings.timeout
        try:
            with notice(mqtt):
                run = partial(request, mqtt, settings, cast("Exchange", exchange), texts)
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


def exchange_settings(settings: Settings) -> tuple[Any, ...]:
    """Return the arguments of an Exchange. CryptoError or UsageError if a file is unusable."""
    read_group()  # raises its error here, and not in a child
    return settings.netid, settings.suite, *peer_security(settings), settings.peer_name


def services(settings: Settings) -> contextlib.AbstractContextManager[None]:
    """Return what --local brings for a request."""
    if not settings.local:
        return contextlib.nullcontext()
    from secure_mqtt.local import local_services

    return local_services(settings)


# --- the other roles ---------------------------------------------------------------------------


def run_session(settings: Settings) -> None:
    """Send the lines of standard input and print the responses."""
    SUITES[settings.suite].load()
    new_exchange = partial(Exchange, *exchange_settings(settings))
    from secure_mqtt.session import Session

    with services(settings):
        session = Session(settings, new_exchange)
        try:
            supervise(session.run, session.end)
        except (ProgramError, TimeoutError) as error:
            fault = error if isinstance(error, ProgramError) else session.timed_out()
            raise ProgramError(f"line {session.first}: {fault}", fault.hint) from None


def run_responder(settings: Settings) -> None:
    """Answer requests until SIGINT or SIGTERM."""
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: sys.exit(0))  # before there is anything to finish
    from secure_mqtt.local import local_broker
    from secure_mqtt.responder import Responder

    whom = settings.netid or "all NetIDs"
    responder = Responder(settings, lambda: say(f"ready: {settings.broker}, for {whom}"))
    for number in STOP_SIGNALS:
        signal.signal(number, lambda *_: responder.stop())
    local = local_broker(settings)
    with local if settings.local else contextlib.nullcontext(), contextlib.suppress(TimeoutError):
        supervise(responder.run, responder.end)


# --- main --------------------------------------------------------------------------------------


def settings_from(arguments: list[str]) -> Settings:
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
    except UnavailableError as error:
        hint = "choose another --suite, or install a cryptography package with a newer OpenSSL"
        return report(UsageError(str(error), hint))
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
