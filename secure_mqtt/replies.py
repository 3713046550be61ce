"""What a responder says to a message: an answer, or nothing, with a line in its log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from crypto import CryptoError
from secure_mqtt.actions import RESPONSE
from secure_mqtt.errors import WorkerError
from secure_mqtt.reports import Reports
from secure_mqtt.turns import Incoming


class Replies:
    """Sends answers, and reports what is ignored."""

    def __init__(self, reports: Reports) -> None:
        self.publish: Callable[[str, bytes], None]  # raises UnusableError
        self._reports = reports

    def send(self, message: Incoming, payload: bytes) -> None:
        """Publish the answer to a message. UnusableError if that can't be done."""
        self.publish(RESPONSE.format(message.netid, message.action), payload)
        self._reports.answered(message)

    def attempt(self, message: Incoming, action: Callable[..., None], *arguments: Any) -> None:
        """Do something for a message, and ignore it if that can't be done.

        :raises WorkerError: a worker was ended
        """
        try:
            action(message, *arguments)
        except CryptoError as error:
            self._reports.ignored(message, str(error))
        except WorkerError:
            raise
        except Exception as error:  # no message ends the responder
            self._reports.ignored(message, f"it raised {type(error).__name__}")
