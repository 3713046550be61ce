"""A responder's workers: who is idle, and who has whose result."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from secure_mqtt.chores import Chores
from secure_mqtt.errors import WorkerError
from secure_mqtt.workers import Worker

Then = Callable[[Callable[[], Any]], None]  # takes what returns the result, or raises the error


class Pool:
    """Workers that do Chores."""

    def __init__(self) -> None:
        """Start the workers; to be done before there are threads."""
        # More than processors, so that none is without work while this process is busy.
        self.workers = [Worker(Chores) for _ in range(2 + (os.cpu_count() or 1))]  # for select()
        self._idle = [*self.workers]
        self._busy: dict[Worker, Then] = {}

    @property
    def has_idle(self) -> bool:
        """Whether anyone can begin at once."""
        return bool(self._idle)

    @property
    def is_busy(self) -> bool:
        """Whether anyone is at work."""
        return bool(self._busy)

    def give(self, then: Then, chore: str, *arguments: Any) -> None:
        """Let an idle worker do a chore, a method of Chores.

        :param then: is called when it is done
        :raises WorkerError: the worker was ended
        """
        worker = self._idle.pop()
        self._busy[worker] = then
        worker.send(chore, *arguments)

    def take_result(self, worker: Worker) -> None:
        """Hand over a result that has come. WorkerError if the worker was ended."""
        then = self._busy.pop(worker, None)
        if then is None:  # an idle one has nothing to say but its end
            raise WorkerError
        self._idle.append(worker)
        then(worker.receive)
