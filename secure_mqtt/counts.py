"""What a responder counts, for whoever watches it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping

from secure_mqtt.suites import SUITES

# Why a message got no answer: how the reason begins in the log, and as what it is counted. A peer
# chooses other parts of some reasons, but never the beginning.
REFUSALS = {
    "no valid public key": "public_key",
    "not signed": "signature",
    "signed ": "signature",
    "its signature ": "signature",
    "larger than any signed key exchange": "signature",
    "the authorities have changed": "signature",
    "not encrypted": "unknown_key",
    "out of order, or here before": "replay",
    "a public key that was here before": "replay",
    "unknown action": "action",
    "a text of more than": "text",
    "not UTF-8 text": "text",
    "retained, or on a topic": "topic",
    "the broker does not take": "broker",
    "the answer has": "broker",
    "": "other",
}


def refusal(reason: str) -> str:
    """Return as what a reason for no answer is counted."""
    return next(kind for begin, kind in REFUSALS.items() if reason.startswith(begin))


class Counts:
    """How much of what there was since the start."""

    def __init__(self) -> None:
        self.dropped = 0  # messages
        self._exchanges = Counter(dict.fromkeys(SUITES, 0))  # that were answered, by suite
        self._requests = Counter(dict.fromkeys(SUITES, 0))
        self._refused = Counter(dict.fromkeys(REFUSALS.values(), 0))  # messages, by reason
        self.last_message = time.monotonic()  # when one came; at first, the start

    def answered(self, is_exchange: bool, suite: str) -> None:
        """Count an answer."""
        (self._exchanges if is_exchange else self._requests)[suite] += 1

    def refused(self, reason: str) -> None:
        """Count a message that gets no answer."""
        self._refused[refusal(reason)] += 1

    def sums(self) -> Mapping[str, int]:
        """Return the number of answers of each kind, and of messages without."""
        return {
            "exchanges": self._exchanges.total(),
            "requests": self._requests.total(),
            "failures": self._refused.total(),
        }

    def parts(self) -> Mapping[str, object]:
        """Return what the sums consist of, and the rest."""
        return {
            "exchanges_by_suite": self._exchanges,
            "requests_by_suite": self._requests,
            "refused": self._refused,
            "dropped": self.dropped,
            "idle_seconds": round(time.monotonic() - self.last_message),
        }
