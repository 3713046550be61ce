"""What lasts longer than a connection to the broker, which is made again when it was lost."""

from __future__ import annotations

import time
from typing import Protocol

from secure_mqtt.calls import timed_out
from secure_mqtt.connection import LAST_DELAY, Connection, backoff
from secure_mqtt.errors import ProgramError
from secure_mqtt.faults import CONNACK, CONNECTING, SUBACK
from secure_mqtt.log import log
from secure_mqtt.settings import Settings

MAX_LOSSES = 3  # of a connection, each with the same large message on its way


class Patience:
    """How long to wait: until all is tried again, and until it is given up."""

    def __init__(self, seconds: float, timeout: float) -> None:
        """Begin to wait; at most for half the timeout, before all is tried again."""
        self._first_seconds = min(seconds, timeout / 2)
        self._timeout = timeout
        self.begin()

    def begin(self) -> None:
        """Count the time from now on: an answer has come, or the first of some lines."""
        self.began = self._tried = time.monotonic()
        self._seconds = self._first_seconds
        self.restart()
        self.losses = 0  # of the connection, with a large line on its way

    def restart(self) -> None:
        """Begin with short delays: the connection was good."""
        self._delays = backoff()

    def note_try(self) -> None:
        """Count the time until it is tried again from now on."""
        self._tried = time.monotonic()

    def delay(self) -> float:
        """Return the seconds to wait before another connection, on which patience is longer."""
        self._seconds *= 2
        return next(self._delays)

    def ends(self) -> float:
        """Return when all is to be tried again, of time.monotonic()."""
        return self._tried + self._seconds

    def gives_up(self) -> float:
        """Return when it is to be given up, of time.monotonic()."""
        return self.began + self._timeout


class Dialogue(Protocol):
    """What is said over the connections, one after the other."""

    patience: Patience
    is_printing: bool  # which lasts as long as the reader pleases

    @property
    def subscriptions(self) -> list[str]:
        """The topics to subscribe to."""

    @property
    def is_idle(self) -> bool:
        """Whether nothing is waited for."""

    def timed_out(self) -> ProgramError:
        """Return the error for one whose time is over while it is connected."""

    def is_fatal(self, size: int) -> bool:
        """Tell whether a message of so many bytes may be what has ended the connection."""

    def run(self, mqtt: Connection) -> None:
        """Go on over a connection to the end.

        :raises TimeoutError: what was waited for did not come, and another connection may help
        :raises ProgramError: the connection has ended, or all must
        """

    def interrupt(self) -> None:
        """Prepare for another connection."""


class Session:
    """A dialogue that outlasts its connection to the broker, which is made again when it was lost.

    If it is patient, that holds for the first connection, too.
    """

    def __init__(self, settings: Settings, dialogue: Dialogue) -> None:
        """Take what is to be said."""
        self._settings = settings
        self._dialogue = dialogue
        self._mqtt = Connection(settings)
        self._has_connected = settings.is_patient
        self._setback: ProgramError | None = None  # why it is not connected any more
        self._has_told = False  # of that
        self._connected_at = float("inf")  # of time.monotonic()

    @property
    def stage(self) -> str:
        """What is being waited for, for a person."""
        return self._mqtt.stage

    def end(self) -> float:
        """Return when it is to be given up; never while there is nothing to wait for."""
        dialogue = self._dialogue
        is_connected = self._mqtt.stage not in (CONNECTING, CONNACK, SUBACK)
        is_idle = dialogue.is_printing or (is_connected and dialogue.is_idle)
        return float("inf") if is_idle else dialogue.patience.gives_up()

    def timed_out(self) -> ProgramError:
        """Return the error for that."""
        return self._setback or self._silence()

    def _silence(self) -> ProgramError:
        if self._mqtt.stage in (CONNECTING, CONNACK, SUBACK):
            return timed_out(self._mqtt, self._settings)
        return self._dialogue.timed_out()

    def run(self) -> None:
        """Say all that is to be said. ProgramError if that can't be done."""
        while reason := self._try():
            self._tell(reason)
            if self._dialogue.is_idle:  # else it has waited longer
                self._dialogue.patience.began = time.monotonic()
            self._dialogue.interrupt()
            self._mqtt = Connection(self._settings)
            time.sleep(self._dialogue.patience.delay())

    def _tell(self, reason: Exception) -> None:
        """Log why it is not connected; where nobody else would say so, once an outage aloud."""
        tell = log().warning if self._settings.lasts and not self._has_told else log().info
        tell("connecting again: %s", reason)
        self._has_told = True
        if time.monotonic() - self._connected_at >= LAST_DELAY:
            self._dialogue.patience.restart()

    def _try(self) -> Exception | None:
        """Do it over one connection. The result is why another one is needed, if so."""
        try:
            with self._mqtt:
                self._connect()
                self._dialogue.run(self._mqtt)
        except TimeoutError as error:
            self._setback = self._stall()
            return error
        except ProgramError as error:
            self._accept_loss(error)
            return error
        return None

    def _connect(self) -> None:
        mqtt = self._mqtt
        mqtt.patience_ends = time.monotonic() + self._settings.timeout
        try:
            mqtt.connect()
            mqtt.subscribe(*self._dialogue.subscriptions)
        except TimeoutError:  # who goes on for ever shall not wait for ever for this
            raise self._silence() from None
        mqtt.patience_ends = float("inf")
        self._has_connected, self._has_told = True, False
        self._connected_at = time.monotonic()
        self._setback = None

    def _stall(self) -> ProgramError:
        """Return what to say if the time is over before it is connected again."""
        fault = self._silence()
        again = f"connecting to {self._settings.broker} again was under way"
        return ProgramError(f"{fault}; {again}", fault.hint)

    def _accept_loss(self, error: ProgramError) -> None:
        """Take the end of the connection, or raise its error if another one can't help."""
        patience = self._dialogue.patience
        if self._dialogue.is_fatal(self._mqtt.outbox.largest):
            patience.losses += 1
        if error.is_final or not self._has_connected or patience.losses == MAX_LOSSES:
            raise error
        self._setback = error
