"""What a member asks the keeper: many questions at a time, under keys that are renewed."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from itertools import count
from typing import Any, NamedTuple, Protocol

from crypto import MAX_KEY_FILE_SIZE, CryptoError
from secure_mqtt.actions import KEY_EXCHANGE, REQUEST, RESPONSE
from secure_mqtt.calls import (
    ANSWER,
    ANSWER_RECEIVED,
    EXCHANGE,
    KEY_RECEIVED,
    KEY_SENT,
    REQUEST_SENT,
    check_answer,
    log_message,
    topics,
)
from secure_mqtt.connection import Connection
from secure_mqtt.exchange import Exchange
from secure_mqtt.log import log
from secure_mqtt.mailboxes import Message
from secure_mqtt.session import IDLE_TIME, NUMBERED, SessionKey
from secure_mqtt.settings import Settings
from secure_mqtt.topics.keys import NEVER
from secure_mqtt.topics.requests import (
    MAX_ANSWER_SIZE,
    RefusedError,
    RequestError,
    read_answer,
)

MAX_PATIENCE = 30.0  # seconds without an answer until all is asked again
MESSAGES = "messages"  # what is waited for when the keeper has answered
MAX_SENT = 64  # questions on their way


class Question(Protocol):
    """What the keeper is asked, or told to do."""

    @property
    def do(self) -> str:
        """What it has to do, as in the request."""

    def __bytes__(self) -> bytes:
        """Return the request."""


class Asker(Protocol):
    """Who wants to know something of the keeper; each question is one of his own."""

    def answered(self, ask: Any, answer: Any, /) -> None:
        """Take the answer, as read_answer() returns it."""

    def refused(self, ask: Any, words: str, /) -> None:
        """Note that the keeper does not do that; words: its own."""

    def failed(self, ask: Any, /) -> None:
        """Note that no answer will come."""


class Enquiry(NamedTuple):
    """A question, and whose it is."""

    asker: Asker
    ask: Question


class Enquiries:
    """Asks the keeper, over one connection after the other."""

    def __init__(self, settings: Settings, new_exchange: Callable[[], Exchange]) -> None:
        """Begin without a key."""
        self._settings = settings
        self._key = SessionKey(new_exchange, settings.rekey or NEVER, NUMBERED.max_requests)
        self._waiting: deque[Enquiry] = deque()
        self._sent: dict[int, Enquiry] = {}  # by number
        self._numbers = count()
        self._moved = 0.0  # of time.monotonic(), when there was an answer, or something was asked
        self._patience = NUMBERED.patience
        self.has_answered = False  # the keeper, ever

    @property
    def subscriptions(self) -> list[str]:
        """The topics on which the answers come."""
        return [RESPONSE.format(self._settings.netid, KEY_EXCHANGE), topics(self._settings)[1]]

    @property
    def is_idle(self) -> bool:
        """Whether no answer is waited for."""
        return not (self._waiting or self._sent)

    def ask(self, asker: Asker, ask: Question) -> None:
        """Ask something; the answer is the asker's."""
        now = time.monotonic()
        if self.is_idle:
            if now - self._moved >= IDLE_TIME:
                self._key.forget()
            self._moved = now
        self._waiting.append(Enquiry(asker, ask))

    def forget(self, asker: object) -> None:
        """Tell an asker no more."""
        self._waiting = deque(each for each in self._waiting if each.asker is not asker)
        self._sent = {name: each for name, each in self._sent.items() if each.asker is not asker}

    def interrupt(self) -> None:
        """Tell all who have asked that there will be no answer, and begin again without a key."""
        enquiries = [*self._sent.values(), *self._waiting]
        self._sent.clear()
        self._waiting.clear()
        self._key.forget()
        for asker, ask in enquiries:
            asker.failed(ask)

    def next_time(self) -> float:
        """Return when go_on() has to be called again, if nothing comes before."""
        return NEVER if self.is_idle else self._moved + self._patience

    def go_on(self, mqtt: Connection) -> None:
        """Send what can be sent."""
        if time.monotonic() >= self.next_time():
            is_first = self._patience == NUMBERED.patience and self._settings.lasts
            tell = log().warning if is_first else log().info
            tell("no answer from %r: asking again", self._settings.peer_name)
            self._patience = min(2 * self._patience, MAX_PATIENCE)
            self.interrupt()
        if self._waiting:
            if self._key.is_fresh():
                self._send(mqtt)
            elif not self._sent and not self._key.is_asked_for:
                self._ask_for_key(mqtt)

    def _ask_for_key(self, mqtt: Connection) -> None:
        if not self.has_answered:
            mqtt.stage = EXCHANGE
        self._moved = time.monotonic()
        payload = self._key.ask()
        log_message(self._settings, KEY_SENT, len(payload))
        mqtt.publish(REQUEST.format(self._settings.netid, KEY_EXCHANGE), payload)

    def _send(self, mqtt: Connection) -> None:
        topic = topics(self._settings)[0]
        while self._waiting and len(self._sent) < MAX_SENT:
            number, enquiry = next(self._numbers), self._waiting.popleft()
            message = self._key.seal(topic, number, bytes(enquiry.ask))
            self._sent[number] = enquiry
            mqtt.publish(topic, message)
            content = f"a question ({enquiry.ask.do}), encrypted"
            log_message(self._settings, REQUEST_SENT, len(message), content)

    def take(self, mqtt: Connection, message: Message) -> None:
        """Take what may be an answer."""
        if message.topic not in self.subscriptions:
            return
        is_answer = message.topic == topics(self._settings)[1]
        try:
            check_answer(message, MAX_KEY_FILE_SIZE + (MAX_ANSWER_SIZE if is_answer else 0))
            (self._take_answer if is_answer else self._take_key)(mqtt, message.payload)
        except CryptoError as error:
            if is_answer != self._key.is_asked_for:  # else nobody waits for such
                mqtt.ignored[str(error)] += 1

    def _take_key(self, mqtt: Connection, payload: bytes) -> None:
        peer = self._key.agree(payload)
        log_message(self._settings, KEY_RECEIVED, len(payload))
        log().info("the responder %s", peer)
        if not self.has_answered:
            mqtt.stage = ANSWER
        # What went under an earlier key of this exchange may have been in vain.
        self._waiting.extendleft(reversed(self._sent.values()))
        self._sent.clear()
        self._send(mqtt)

    def _take_answer(self, mqtt: Connection, payload: bytes) -> None:
        number, text = self._key.open(topics(self._settings)[1], payload)
        if number not in self._sent:
            return
        enquiry = self._sent.pop(number)
        mqtt.stage = MESSAGES
        content = f"the answer to a question ({enquiry.ask.do}), encrypted"
        log_message(self._settings, ANSWER_RECEIVED, len(payload), content)
        self._moved, self._patience, self.has_answered = time.monotonic(), NUMBERED.patience, True
        self._tell(enquiry, text)

    def _tell(self, enquiry: Enquiry, text: bytes) -> None:
        asker, ask = enquiry
        try:
            answer = read_answer(ask.do, text)
        except RefusedError as error:
            asker.refused(ask, str(error))
        except RequestError:
            asker.failed(ask)
            raise
        else:
            asker.answered(ask, answer)
