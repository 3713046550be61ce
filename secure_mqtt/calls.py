"""Calls: a message to a responder, and the answer to it."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Protocol, TypeVar

from crypto import MAX_KEY_FILE_SIZE, CryptoError
from secure_mqtt.actions import KEY_EXCHANGE, MAX_TEXT, REQUEST, RESPONSE
from secure_mqtt.connection import Connection
from secure_mqtt.errors import ProgramError, UnusableError
from secure_mqtt.exchange import Exchange
from secure_mqtt.faults import CONNACK, CONNECTING, SUBACK, silence, unusual
from secure_mqtt.log import PROGRAM, WAITING, log
from secure_mqtt.mailboxes import Message
from secure_mqtt.settings import Settings
from secure_mqtt.suites import LAB, SUITES

NOTICE_AFTER = 3.0  # seconds until a person at a terminal is told what is being waited for
EXCHANGE, ANSWER = "the key exchange", "the response"  # what is waited for, after the SUBACK
KEY_SENT, KEY_RECEIVED, REQUEST_SENT, ANSWER_RECEIVED = 1, 2, 3, 4  # the lab's numbers
CONTENTS = {
    KEY_SENT: "our public key",
    KEY_RECEIVED: "the responder's public key",
    REQUEST_SENT: "the text, encrypted",
    ANSWER_RECEIVED: "the answer, encrypted",
}
T = TypeVar("T")


def topics(settings: Settings) -> tuple[str, str]:
    """Return the topics of encrypted requests and their responses."""
    names = settings.netid, settings.action
    return REQUEST.format(*names), RESPONSE.format(*names)


def exchange_keys(mqtt: Connection, settings: Settings, exchange: Exchange) -> None:
    """Make the exchange with a responder. ProgramError: the connection has ended."""
    peer = call(mqtt, settings, KEY_EXCHANGE, exchange.request(), exchange.agree)
    log().info("the responder %s", peer)


def call(
    mqtt: Connection, settings: Settings, action: str, payload: bytes, read: Callable[[bytes], T]
) -> T:
    """Publish a request and return what the first answer that can be used means.

    :param action: as in the topics, KEY_EXCHANGE included
    :param read: turns a payload into the result; CryptoError if it can't be used
    :raises ProgramError: the connection has ended
    """
    ask(mqtt, settings, action, payload)
    # What a keeper of topics answers is as large as it must be, however short the question was.
    is_command = settings.command and action != KEY_EXCHANGE
    size = max(len(payload), MAX_TEXT) if is_command else len(payload)
    del payload  # it may be large
    topic = RESPONSE.format(settings.netid, action)
    while True:
        message = mqtt.next_message()
        if message.topic == topic:
            try:
                check_answer(message, most_of_answer(size))
                result = read(message.payload)
            except CryptoError as error:
                mqtt.ignored[str(error)] += 1
            else:
                number = KEY_RECEIVED if action == KEY_EXCHANGE else ANSWER_RECEIVED
                log_message(settings, number, len(message.payload))
                return result


def ask(mqtt: Connection, settings: Settings, action: str, payload: bytes) -> None:
    """Publish a request; what came before is no answer to it.

    :param action: as in the topics, KEY_EXCHANGE included
    :raises ProgramError: the connection has ended
    """
    is_exchange = action == KEY_EXCHANGE
    mqtt.stage = EXCHANGE if is_exchange else ANSWER
    mqtt.ignored.clear()
    mqtt.discard()
    log_message(settings, KEY_SENT if is_exchange else REQUEST_SENT, len(payload))
    mqtt.publish(REQUEST.format(settings.netid, action), payload)


def log_message(settings: Settings, number: int, size: int, content: str = "") -> None:
    """Tell a person of one of the four messages.

    :param size: of its payload, in bytes
    :param content: what it is, where that is not what its number tells
    """
    is_exchange = number in (KEY_SENT, KEY_RECEIVED)
    direction, topic = ("→", REQUEST) if number in (KEY_SENT, REQUEST_SENT) else ("←", RESPONSE)
    where = topic.format(settings.netid, KEY_EXCHANGE if is_exchange else settings.action)
    suite = SUITES[settings.suite]
    how = suite.name if is_exchange else suite.encryption
    content = content or CONTENTS[number]
    log().info("%d %s %s, %d bytes: %s (%s)", number, direction, where, size, content, how)


def check_answer(answer: Message, most: int) -> None:
    """Raise UnusableError for what is no answer, whatever it means.

    :param most: bytes that an answer may have
    """
    if answer.is_retained:
        raise UnusableError("retained from an earlier run")
    if len(answer.payload) > most:
        raise UnusableError("far too large for an answer")


def most_of_answer(size: int) -> int:
    """Return how many bytes the answer to a message may have. size: of that, in bytes.

    No action makes a text more than three times as long. A broker that sends far more wants us to
    be busy with it when the time is over.
    """
    return 4 * size + MAX_KEY_FILE_SIZE


class HasStage(Protocol):
    """What is waited for: a connection, or what outlasts it."""

    @property
    def stage(self) -> str:
        """What is being waited for."""


@contextlib.contextmanager
def notice(mqtt: HasStage) -> Iterator[None]:
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


def timed_out(mqtt: Connection, settings: Settings) -> ProgramError:
    """Return the error for a client whose time is over."""
    within = f"within {settings.timeout:g} s"
    if mqtt.stage in (CONNECTING, CONNACK, SUBACK):
        return silence(settings, mqtt.stage, f"no {mqtt.stage} came {within}")
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
    if is_exchange and settings.command:
        return ProgramError(
            f"no keeper answered the key exchange on {topic} {within}",
            f"start one ({PROGRAM} --respond --keep FILE), or check --host, --port and --identity;"
            " an access rule of the broker may also drop messages without a word",
        )
    if is_exchange:
        return unanswered(settings, f"{topic} {within}")
    problem = f"no response came on {topic} {within}"
    if mqtt.outbox.largest_taken > SUITES[settings.suite].sealed_size(MAX_TEXT):
        return ProgramError(
            f"{problem} to a message of {mqtt.outbox.largest_taken} bytes",
            "a responder of this program takes texts of at most 1 MiB (1048576 bytes): send parts",
        )
    return ProgramError(
        problem,
        "the responder may have ended or not know this action (see its log), the message may be"
        " too large for the broker, or an access rule may drop it",
    )


def unanswered(settings: Settings, where: str) -> ProgramError:
    """Return the error for a key exchange to which nothing came.

    :param where: on which topic, and within which time
    """
    others = (
        "" if settings.suite == LAB.name else ", or know other suites only: try without --suite"
    )
    return ProgramError(
        f"no responder answered the key exchange on {where}",
        f"start one ({PROGRAM} --respond), or check NETID, --host and --port;"
        " an access rule of the broker may also drop messages without a word, or the responder"
        f" demand an --identity{others}{unusual(settings.netid)}",
    )
