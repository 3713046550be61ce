"""Work in the background: in processes, and in a thread with a deadline."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from crypto import CryptoError
from secure_mqtt.errors import ProgramError, WorkerError

CHECK_INTERVAL = 1.0  # seconds between looks at a deadline, which may have moved
LENGTH_SIZE = 8  # bytes of the size that precedes what is sent to a worker or comes from it
T = TypeVar("T")


class WorkError(CryptoError):
    """Work has failed for another reason than bad input. The text is the class of the error."""


class Worker:
    """An object in a child process, which computes while this one does other things.

    What the object does not return never leaves the child. Make it before any thread starts.
    It ends when this process does, or drops it.
    """

    def __init__(self, make: Callable[[], object]) -> None:
        """Start the child, which makes the object. Where no process can be had, a thread does."""
        self._socket, theirs = socket.socketpair()
        self.fileno = self._socket.fileno  # for select(): an answer has come
        process = fork()
        if process == 0:
            self._socket.close()
            _work_and_exit(make, theirs)
        if process is None:
            threading.Thread(target=_work, args=(make, theirs), daemon=True).start()
        else:
            theirs.close()

    def __del__(self) -> None:
        """Let the child end."""
        self._socket.close()

    def send(self, method: str, *arguments: Any) -> None:
        """Let the object do something. One thing at a time. WorkerError if the child was ended."""
        self._order(method, arguments, has_result=True)

    def tell(self, method: str) -> None:
        """Let the object do something that has no result. WorkerError as in send()."""
        self._order(method, (), has_result=False)

    def _order(self, method: str, arguments: tuple[Any, ...], has_result: bool) -> None:
        try:
            send(self._socket, (method, arguments, has_result))
        except OSError:
            raise WorkerError from None

    def receive(self) -> Any:
        """Wait for the result, or raise the error. WorkerError if the child was ended."""
        try:
            result, error = receive(self._socket)
        except (EOFError, OSError):
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


def send(channel: socket.socket, value: object) -> None:
    """Send a value to a process of ours. OSError if it has ended."""
    import pickle

    data = pickle.dumps(value)
    channel.sendall(len(data).to_bytes(LENGTH_SIZE, "big") + data)


def receive(channel: socket.socket) -> Any:
    """Return what a process of ours has sent. EOFError or OSError if it has ended.

    No buffer outlasts it: it may be a key, or large.
    """
    import pickle

    size = int.from_bytes(_read(channel, LENGTH_SIZE), "big")
    return pickle.loads(_read(channel, size))  # noqa: S301 - both ends are ours


def _read(channel: socket.socket, size: int) -> bytearray:
    data = bytearray(size)
    rest = memoryview(data)
    while rest:
        count = channel.recv_into(rest)
        if not count:
            raise EOFError
        rest = rest[count:]
    return data


def fork() -> int | None:
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
    with contextlib.suppress(Exception):  # it comes again when the parent asks
        make()
    with channel, contextlib.suppress(EOFError, OSError):
        while True:
            _answer_once(make, channel)


def _answer_once(make: Callable[[], object], channel: socket.socket) -> None:
    """Do one thing for the parent, and keep nothing of it: a message may be large."""
    method, arguments, has_result = receive(channel)
    result = error = None
    try:
        result = getattr(make(), method)(*arguments)
    except (CryptoError, ProgramError, ImportError) as caught:
        error = caught
    except Exception as caught:
        error = WorkError(type(caught).__name__)
    if has_result:
        send(channel, (result, error))


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
