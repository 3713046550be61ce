"""Batches: what a keeper does together, so that one wait for the disk does for all of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from crypto import CryptoError
from secure_mqtt.topics.database import StoreError
from secure_mqtt.topics.keeper import Keeper
from secure_mqtt.topics.requests import to_json

MAX_BATCH = 64  # requests, or messages
BATCH_TIME = 0.02  # seconds after which a batch takes nothing more in: others wait meanwhile
CANNOT_WRITE = to_json({"error": "the keeper can't write its file; ask its operator"})
CANNOT_DO = to_json({"error": "the keeper has failed; ask its operator to look at its log"})
T = TypeVar("T")


class Batches:
    """Does things for a keeper in batches, and gathers what they want to be done beside."""

    def __init__(self, keeper: Keeper) -> None:
        """Take the keeper, whose file is open."""
        self._keeper = keeper
        self._size = MAX_BATCH  # things that are put into the next batch
        self.failure: Exception | None = None  # why the last batch has come to nothing
        self.subscriptions: dict[str, bool] = {}  # topics to subscribe to, or no longer
        self.notices: dict[str, bytes] = {}  # topics, and the payloads to publish there

    def answer(self, requests: Sequence[tuple[str, bytes]]) -> list[bytes]:
        """Return the answers to the first of these requests, at least one.

        :param requests: the NetIDs that ask, and what they ask for
        """
        jobs = [partial(self._keeper.answer, *request) for request in requests[:MAX_BATCH]]
        return self._do(
            jobs, lambda error: CANNOT_WRITE if isinstance(error, StoreError) else CANNOT_DO
        )

    def keep(self, messages: Sequence[tuple[str, bytes]]) -> list[str]:
        """Keep the first of these messages, at least one; return what is wrong with each, or "".

        :param messages: the topics on which they were published, and the payloads
        :raises StoreError: nothing can be written
        """

        def failed(error: Exception) -> str:
            if isinstance(error, StoreError):
                raise error
            return f"it raised {type(error).__name__}"

        jobs = [partial(self._keep, *message) for message in messages[:MAX_BATCH]]
        return self._do(jobs, failed)

    def _keep(self, topic: str, payload: bytes) -> str:
        try:
            self._keeper.take(topic, payload)
        except CryptoError as error:
            return str(error)
        return ""

    def rotate(self) -> None:
        """Renew the keys for which it is time, or some of them; failure tells why that failed."""
        self._do([self._keeper.rotate], lambda error: None)

    def catch_up(self) -> list[str]:
        """Return the topics to subscribe to, when subscriptions begin anew.

        :raises StoreError: that can't be done
        """
        with self._keeper.batch():
            topics = self._keeper.catch_up()
        self.subscriptions.clear()
        return topics

    def _do(self, jobs: Sequence[Callable[[], T]], failed: Callable[[Exception], T]) -> list[T]:
        """Do the first of some jobs in a batch, at least one, and return their results.

        What fails is tried alone, so that it takes nothing else with it.

        :param failed: returns the result of a job that fails even so
        """
        end = time.monotonic() + BATCH_TIME
        some, results = jobs[: self._size], []
        try:
            with self._keeper.batch() as effects:
                for job in some:
                    results.append(job())
                    if time.monotonic() >= end:
                        break
        except Exception as error:  # nothing that a peer sends ends the keeper
            self.failure = error
            if len(some) > 1:
                self._size = 1
                return self._do(jobs, failed)
            return [failed(error)]
        self._size = min(2 * self._size, MAX_BATCH)
        self.failure = None
        self.subscriptions.update(effects.subscriptions)
        self.notices.update(effects.notices)
        return results
