"""What a responder is told while it runs: to stop, or to read its files again."""

from __future__ import annotations

import contextlib
import socket
import time

MAX_RENEWALS = 4096  # orders that are taken at a time; they all mean the same


class Orders:
    """Orders, which may be given in a signal handler; select() takes it, and wakes for each."""

    def __init__(self) -> None:
        self.is_stopped = False
        self.end = float("inf")  # when it is to be left as it is, of time.monotonic()
        self._taking, self._giving = socket.socketpair()
        self._taking.setblocking(False)
        self._giving.setblocking(False)
        self.fileno = self._taking.fileno

    def stop(self, seconds: float) -> None:
        """Order to stop, within some seconds."""
        self.is_stopped = True
        self.end = min(self.end, time.monotonic() + seconds)
        self._giving.close()  # wakes who waits for the other end, from now on always

    def renew(self) -> None:
        """Order to read the files again."""
        with contextlib.suppress(OSError):  # there is one for each byte it can hold, or it stops
            self._giving.send(b"r")

    def take_renewal(self) -> bool:
        """Tell whether that was ordered since this was asked before."""
        with contextlib.suppress(BlockingIOError):
            return bool(self._taking.recv(MAX_RENEWALS))
        return False
