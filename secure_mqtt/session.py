"""Sessions: each line of standard input is a request."""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from collections.abc import Callable

from crypto import CryptoError
from secure_mqtt.actions import KEY_EXCHANGE, RESPONSE
from secure_mqtt.calls import ANSWER, EXCHANGE, check_answer, exchange_keys, timed_out, topics
from secure_mqtt.connection import Connection, Message, backoff
from secure_mqtt.errors import ProgramError
from secure_mqtt.exchange import Exchange
from secure_mqtt.log import log
from secure_mqtt.settings import Settings
from secure_mqtt.streams import check_size, checked_message, is_utf8, standard_input, write_output

CHUNK_SIZE = 2**16  # bytes, read from standard input at a time
WINDOW, WINDOW_BYTES = 64, 2**20  # requests sent, but not answered yet
# Seconds without an answer until all is tried again, then doubled. A peer on the course's own
# module has the one suite only, and needs long.
PATIENCE = {"x25519": 2.0, "dh4096": 15.0}
MAX_REQUESTS_PER_KEY = {"x25519": 10_000, "dh4096": 100}  # both ends remember them
IDLE_TIME = 30.0  # seconds after which a key is renewed: a responder may forget it


class Session:
    """Each line of standard input is a request; the answers are printed in their order."""

    def __init__(self, settings: Settings, new_exchange: Callable[[], Exchange]) -> None:
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
        self._exchange: Exchange | None = None
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
        while self._mqtt.inbox:
            self._take(self._mqtt.inbox.take())
        self._print()

    def _read(self) -> None:
        if not self._lines:
            if time.monotonic() - self._progress >= IDLE_TIME:
                self._exchange = None
            self._begin_to_wait()
        self._lines += self._input.read()

    def _fresh_exchange(self) -> Exchange | None:
        """Return the exchange, if its key may be used for another request."""
        age = time.monotonic() - self._exchanged
        requests = self.first + self._sent - self._base
        is_old = age >= (self._settings.rekey or float("inf")) or requests >= self._max_requests
        return None if is_old else self._exchange

    def _renew_key(self) -> Exchange:
        self._exchange = self._new_exchange()
        self._mqtt.patience_ends = time.monotonic() + self._patience
        exchange_keys(self._mqtt, self._settings, self._exchange)
        self._mqtt.stage = ANSWER
        self._base = self.first
        self._exchanged = self._tried = time.monotonic()
        return self._exchange

    def _send(self, exchange: Exchange) -> None:
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
