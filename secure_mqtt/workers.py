"""Work in the background: in processes, and in a thread with a deadline."""

from __future__ import annotations

import contextlib
import functools
import io
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from crypto import CryptoError

CHECK_INTERVAL = 1.0  # seconds between looks at a deadline, which may have moved
T = TypeVar("T")


class WorkerError(Exception):
    """A process of our own was ended."""


class Worker:
    """An object in a child process, which computes while this one does other things.

    What the object does not return never leaves the child. Make it before any thread starts.
    It ends when this process does, or drops it.
    """

    def __init__(self, make: Callable[[], object]) -> None:
        """Start the child, which makes the object. Where no process can be had, a thread does."""
        ours, theirs = socket.socketpair()
        process = _fork()
        if process == 0:
            ours.close()
            _work_and_exit(make, theirs)
        if process is None:
            threading.Thread(target=_work, args=(make, theirs), daemon=True).start()
        else:
            theirs.close()
        self._channel = ours.makefile("rwb")
        self.fileno = ours.fileno  # for select(): an answer has come
        ours.close()  # the file remains

    def send(self, method: str, *arguments: Any) -> None:
        """Let the object do something. One thing at a time. WorkerError if the child was ended."""
        import pickle

        try:
            pickle.dump((method, arguments), self._channel)
            self._channel.flush()
        except OSError:
            raise WorkerError from None

    def receive(self) -> Any:
        """Wait for the result, or raise the error. WorkerError if the child was ended."""
        import pickle

        try:
            result, error = pickle.load(self._channel)  # noqa: S301 - it comes from our own child
        except (EOFError, OSError, pickle.UnpicklingError):  # nothing more, or a part
            raise WorkerError from None
        if error:
            raise error
        return result

    def __getattr__(self, method: str) -> Callable[..., Any]:
        """Return a function that does something and waits for the result."""

        def call(*arguments: Any) -> Any:
            self.send(method, *arguments)
            return self.receive()

        return call


def _fork() -> int | None:
    """Do as os.fork() does, or return None if that fails.

    The child never gets what stops its parent, which may still need it.
    """
    process = None
    with contextlib.suppress(AttributeError, OSError):  # Windows; a limit on processes
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            process = os.fork()
        finally:
            if process != 0:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    return process


def _work_and_exit(make: Callable[[], object], channel: socket.socket) -> NoReturn:
    try:
        _work(make, channel)
    finally:
        os._exit(0)  # exit handlers, buffers and tracebacks are the parent's to deal with


def _work(make: Callable[[], object], channel: socket.socket) -> None:
    make = functools.cache(make)
    with contextlib.suppress(CryptoError, ImportError):  # it comes again when the parent asks
        make()
    with channel.makefile("rwb") as file, contextlib.suppress(EOFError):
        while True:
            _answer_once(make, file)


def _answer_once(make: Callable[[], object], file: io.BufferedRWPair) -> None:
    """Do one thing for the parent, and keep nothing of it: a message may be large."""
    import pickle

    method, arguments = pickle.load(file)  # noqa: S301 - it comes from our own parent
    result = error = None
    try:
        result = getattr(make(), method)(*arguments)
    except (CryptoError, ImportError) as caught:
        error = caught
    pickle.dump((result, error), file)
    file.flush()


def supervise(run: Callable[[], T], end: Callable[[], float]) -> T:
    """Return the result of a function, which a thread runs: a look-up in DNS, for one, has no end.

    :param end: tells until when to wait for it, of time.monotonic(); this may move
    :raises TimeoutError: that has come
    """
    results: list[T] = []
    errors: list[BaseException] = []
    finished = threading.Event()

    def run_and_tell() -> None:
        try:
            results.append(run())
        except BaseException as error:
            errors.append(error)
        finished.set()

    threading.Thread(target=run_and_tell, daemon=True).start()
    while not finished.wait(max(0, min(end() - time.monotonic(), CHECK_INTERVAL))):
        if time.monotonic() >= end():
            raise TimeoutError
    if errors:
        raise errors[0]
    return results[0]
