"""Sessions: each line of standard input is a request."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import NamedTuple

from crypto import MAX_KEY_FILE_SIZE, CryptoError, TokenError
from secure_mqtt.actions import KEY_EXCHANGE, RESPONSE
from secure_mqtt.calls import (
    ANSWER,
    ANSWER_RECEIVED,
    EXCHANGE,
    KEY_RECEIVED,
    REQUEST_SENT,
    ask,
    check_answer,
    log_message,
    most_of_answer,
    timed_out,
    topics,
)
from secure_mqtt.connection import Connection
from secure_mqtt.errors import ProgramError, UnusableError
from secure_mqtt.exchange import Channel, Exchange
from secure_mqtt.faults import LARGE_MESSAGE
from secure_mqtt.lasting import Patience
from secure_mqtt.lines import InputLines, Window
from secure_mqtt.log import log
from secure_mqtt.mailboxes import Message
from secure_mqtt.settings import Settings
from secure_mqtt.streams import write_output
from secure_mqtt.suites import SUITES

IDLE_TIME = 30.0  # seconds after which a key is renewed: a responder may forget it
MAX_KEYS = 8  # of one exchange that are tried, since any may be the responder's
QUICK = 1.0  # seconds: who answers an exchange within them is not one of the slow responders


class Pace(NamedTuple):
    """What the suite means for a session."""

    window: int  # lines sent, but not answered yet
    max_requests: int  # under one key, since both ends remember them
    patience: float  # seconds without an answer until all is tried again, then doubled
    repeats_exchange: bool  # whether that holds for an exchange, too


NUMBERED = Pace(64, 10_000, 2.0, repeats_exchange=True)
# Nothing but their order tells which request an answer is for, and nothing at all which exchange.
# A peer on the course's own module has this suite only, and needs 10 s for an exchange.
IN_ORDER = Pace(1, 100, 15.0, repeats_exchange=False)


def pace_of(suite: str) -> Pace:
    """Return the pace in a suite, one of SUITES."""
    return NUMBERED if SUITES[suite].is_numbered else IN_ORDER


class SessionKey:
    """The key that lines are encrypted with: agreed on with a responder, and renewed when old.

    Nothing in an answer to an exchange need tell for which one it is. It may come late, for one
    that was made before the connection was lost, or be for another client of the NetID. So each
    that comes gives a key to try, until an answer to a line opens with one of them.
    """

    def __init__(
        self, new_exchange: Callable[[], Exchange], rekey: float, max_requests: int
    ) -> None:
        """Begin without a key.

        :param rekey: seconds after which it is old
        :param max_requests: so many lines make it old, too
        """
        self._new_exchange = new_exchange
        self._rekey = rekey
        self._max_requests = max_requests
        self._exchange: Exchange | None = None  # whose answer may be still to come
        self._answers: set[bytes] = set()  # to the exchange
        self._channels: list[Channel] = []  # newest last; one, as soon as that is known to be it
        self._asked = self._agreed = 0.0  # of time.monotonic()
        self.exchange_time = float("inf")  # seconds until the last exchange was answered

    @property
    def is_asked_for(self) -> bool:
        """Whether an exchange is under way."""
        return self._exchange is not None and not self._channels

    def forget(self) -> None:
        """Use neither the key nor the exchange any more."""
        self._exchange = None
        self._answers.clear()
        self._channels.clear()

    def ask(self) -> bytes:
        """Return message 1 of a new exchange."""
        self.forget()
        self._exchange = self._new_exchange()
        self._asked = time.monotonic()
        return self._exchange.request()

    def agree(self, response: bytes) -> str:
        """Take message 2.

        :return: who has sent it, for a person
        :raises CryptoError: it gives no key to try
        """
        if not self._exchange or response in self._answers or len(self._answers) == MAX_KEYS:
            raise UnusableError("a key that nobody waits for")
        peer = self._exchange.agree(response)
        self._answers.add(response)
        self._channels.append(self._exchange.channel)
        self._agreed = time.monotonic()
        self.exchange_time = self._agreed - self._asked
        return peer

    def is_fresh(self) -> bool:
        """Tell whether there is a key that may be used for another line."""
        is_old = time.monotonic() - self._agreed >= self._rekey
        return bool(self._channels) and not is_old and self._channels[-1].sent < self._max_requests

    def seal(self, topic: str, number: int, line: bytes) -> bytes:
        """Return the encrypted request for a line, of that number."""
        return self._channels[-1].seal(topic, line, number)

    def open(self, topic: str, message: bytes) -> tuple[int, bytes]:
        """Return an answer's text after the number of the line that it answers.

        :raises TokenError: it is no answer under a key of ours
        """
        if not self._channels:
            raise TokenError("not encrypted with our key")
        *others, channel = self._channels
        for other in others:
            with contextlib.suppress(TokenError):
                return self._settle(other, other.open(topic, message))
        return self._settle(channel, channel.open(topic, message))

    def _settle(self, channel: Channel, answer: tuple[int, bytes]) -> tuple[int, bytes]:
        """Return the answer, and use no other key than that which has opened it any more."""
        if self._exchange:
            self._exchange, self._channels = None, [channel]
        return answer


class Dialogue:
    """What is said over the connections, one after the other: keys, lines, and their answers."""

    def __init__(self, settings: Settings, new_exchange: Callable[[], Exchange]) -> None:
        """Begin to read standard input."""
        self._settings = settings
        self._pace = pace = pace_of(settings.suite)
        self._asking, self._answering = topics(settings)
        self._mqtt: Connection
        self._key = SessionKey(new_exchange, settings.rekey or float("inf"), pace.max_requests)
        self._input = InputLines()
        self.window = Window(pace.window)
        self.patience = Patience(pace.patience, settings.timeout)
        self.is_printing = False  # which lasts as long as the reader pleases

    @property
    def subscriptions(self) -> list[str]:
        """The topics to subscribe to."""
        return [RESPONSE.format(self._settings.netid, KEY_EXCHANGE), self._answering]

    @property
    def is_idle(self) -> bool:
        """Whether nothing is waited for."""
        return not self.window

    def timed_out(self) -> ProgramError:
        """Return the error for a session without answers."""
        return timed_out(self._mqtt, self._settings)

    def is_fatal(self, size: int) -> bool:
        """Tell whether a message of so many bytes may be what has ended the connection."""
        return self.window.sent == 1 and size >= LARGE_MESSAGE

    def run(self, mqtt: Connection) -> None:
        """Go on over a connection until all lines are answered.

        :raises TimeoutError: an answer did not come, and another connection may help
        :raises ProgramError: the connection has ended, or the first line can't be answered
        """
        self._mqtt = mqtt
        mqtt.stage = EXCHANGE
        while self.window or not self._input.has_ended:
            self._go_on()

    def check_input(self) -> None:
        """Raise ProgramError if standard input has ended before its time."""
        if self._input.fault:
            raise self._input.fault

    def interrupt(self) -> None:
        """Prepare for another connection, where all is said again that was not answered."""
        self._key.forget()
        self.window.send_alone()  # a line among them may be what has ended the connection
        self.window.send_again()

    def _go_on(self) -> None:
        """Send what can be sent, and take what comes."""
        window = self.window
        if window.has_more():
            if self._key.is_fresh():
                self._send()
            elif not window.sent and not self._key.is_asked_for:  # what is in flight comes first
                self._ask_for_key()
        self._mqtt.patience_ends = self.patience.ends() if self._tries_again() else float("inf")
        is_reading = window.has_room() and not self._input.has_ended
        if self._mqtt.wait(others=[self._input] if is_reading else []):
            self._read()
        while self._mqtt.inbox:
            self._take(self._mqtt.inbox.take())
        self._print()

    def _tries_again(self) -> bool:
        """Tell whether there is a time when all is to be tried again."""
        if not self._key.is_asked_for:
            return self.window.sent > 0
        is_on_its_way = len(self._mqtt.outbox) > 0  # so that no responder has it
        is_overdue = self._key.exchange_time < QUICK
        return self._pace.repeats_exchange or is_on_its_way or is_overdue

    def _read(self) -> None:
        if not self.window:
            if time.monotonic() - self.patience.began >= IDLE_TIME:
                self._key.forget()
            self.patience.begin()
        self.window.add(self._input.read())

    def _ask_for_key(self) -> None:
        ask(self._mqtt, self._settings, KEY_EXCHANGE, self._key.ask())
        self.patience.note_try()

    def _send(self) -> None:
        for number, line in self.window.send():
            message = self._key.seal(self._asking, number, line)
            self._mqtt.publish(self._asking, message)
            if self._settings.verbose:
                content = f"line {number}, encrypted"
                log_message(self._settings, REQUEST_SENT, len(message), content)

    def _take(self, message: Message) -> None:
        """Take what is a key, or an answer."""
        is_answer = message.topic == self._answering
        if not is_answer and message.topic != RESPONSE.format(self._settings.netid, KEY_EXCHANGE):
            return
        try:
            (self._take_answer if is_answer else self._take_key)(message)
        except CryptoError as error:
            if is_answer != self._key.is_asked_for:  # else nobody waits for such
                self._mqtt.ignored[str(error)] += 1

    def _take_key(self, message: Message) -> None:
        check_answer(message, MAX_KEY_FILE_SIZE)
        peer = self._key.agree(message.payload)
        log_message(self._settings, KEY_RECEIVED, len(message.payload))
        log().info("the responder %s", peer)
        self._mqtt.stage = ANSWER
        self.window.send_again()  # what went under an earlier key may have been in vain
        self._send()
        self.patience.note_try()

    def _take_answer(self, message: Message) -> None:
        check_answer(message, most_of_answer(self.window.sent_bytes))
        number, text = self._key.open(message.topic, message.payload)
        self.window.answer(number, text)
        if self._settings.verbose:
            content = f"the answer to line {number}, encrypted"
            log_message(self._settings, ANSWER_RECEIVED, len(message.payload), content)

    def _print(self) -> None:
        """Print the answers whose turn it is."""
        if texts := self.window.due_answers():
            self.is_printing = True
            write_output(b"".join(b"%b\n" % text for text in texts))
            self.window.finish(len(texts))
            self.is_printing = False
            self.patience.begin()
        self.window.check()
