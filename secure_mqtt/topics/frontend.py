"""The responder's process passes members' requests on to the keeper's, and their answers back."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections import deque
from functools import partial
from typing import Any, NamedTuple

from secure_mqtt.actions import REQUEST, RESPONSE
from secure_mqtt.errors import ProgramError, WorkerError
from secure_mqtt.keyring import Keyring, Opened
from secure_mqtt.labour import Labour
from secure_mqtt.replies import Replies
from secure_mqtt.reports import Reports
from secure_mqtt.settings import Settings
from secure_mqtt.suites import GcmCipher
from secure_mqtt.topics.backend import ANSWERS, COUNTS, FAILED, LOST, READY, run_backend
from secure_mqtt.topics.batches import MAX_BATCH
from secure_mqtt.topics.requests import ACTION
from secure_mqtt.turns import Hold, Incoming
from secure_mqtt.workers import fork, receive, send

MAX_BATCH_SIZE = 2**16  # bytes of requests that are passed on together; a single one may have more


class KeeperProcess:
    """The keeper's process: to be made before there are threads. It ends when this one does."""

    def __init__(self, settings: Settings) -> None:
        """Start it. ProgramError if the keeper's file can't be used."""
        self._socket, theirs = socket.socketpair()
        for end in self._socket, theirs:  # on macOS it is 8 KiB
            end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4 * MAX_BATCH_SIZE)
        self.fileno = self._socket.fileno  # for select(): it has said something
        process = fork()  # the last one: no other process keeps our end open
        if process == 0:
            self._socket.close()
            try:
                run_backend(settings, theirs)
            finally:
                os._exit(0)
        theirs.close()
        if process is None:
            raise ProgramError("no process for the keeper can be had", "the machine may be busy")
        self.receive()

    def ask(self, authority: bytes, requests: list[tuple[str, bytes]]) -> None:
        """Pass requests on; not before all others are answered.

        :param authority: who certifies members (PEM)
        :param requests: the NetIDs that ask, and what they ask for
        """
        passing = partial(self._pass, (authority, requests))
        if sum(len(request) for _, request in requests) <= MAX_BATCH_SIZE:
            passing()
        else:  # the process may be busy, and no more waits in between than that
            threading.Thread(target=passing, daemon=True).start()

    def _pass(self, value: object) -> None:
        with contextlib.suppress(OSError):  # receive() tells of its end
            send(self._socket, value)

    def receive(self) -> tuple[str, Any]:
        """Return what it says: one of the backend's words, and a value.

        :raises ProgramError: it can't go on
        :raises WorkerError: it was ended
        """
        try:
            what, value = receive(self._socket)
        except (EOFError, OSError):
            raise WorkerError from None
        if what == FAILED:
            raise value
        return what, value

    def end(self) -> None:
        """Let it finish what it does, and wait for its end."""
        self._socket.shutdown(socket.SHUT_WR)
        with contextlib.suppress(WorkerError):
            while True:
                self.receive()


class Question(NamedTuple):
    """A request that was opened."""

    message: Incoming
    opened: Opened


class Frontend:
    """Opens members' requests, passes them on in batches, and seals the answers.

    While the keeper's process has enough to do, NetIDs wait whose messages are for it.
    """

    action = ACTION

    def __init__(
        self, process: KeeperProcess, keyring: Keyring, labour: Labour, replies: Replies
    ) -> None:
        self.process = process
        self.is_ready = False  # whether it is subscribed to the topics whose messages are kept
        self.counts: dict[str, int] = {}
        self._authority = b""
        self._keyring, self._turns, self._replies = keyring, labour.turns, replies
        self._next: list[Question] = []  # to be passed on
        self._asked: deque[Question] = deque()  # that were
        self._waiting: deque[str] = deque()  # NetIDs

    @property
    def is_busy(self) -> bool:
        """Whether anybody waits for an answer."""
        return bool(self._next or self._asked or self._waiting)

    def use(self, authority: bytes) -> None:
        """Take it from now on that this authority (PEM) certifies members."""
        if not self._authority:
            self.process.ask(authority, [])  # it waits for that before it connects
        self._authority = authority

    def answer(self, message: Incoming) -> None:
        """Take a request, or let it wait. CryptoError if it is unusable."""
        if not self._has_room:
            self._turns.hold(message.netid, Hold.KEEPER, message)
            self._waiting.append(message.netid)
            return
        netid, topic = message.netid, REQUEST.format(message.netid, message.action)
        # Only of a signed exchange there is a key. What a key of the lab's group opens could be
        # our own answer that comes back, and is recorded for later.
        opened = self._keyring.open(netid, topic, message.payload, GcmCipher)
        self._next.append(Question(message, opened))

    @property
    def _has_room(self) -> bool:
        size = sum(len(each.message.payload) for each in self._next)
        return len(self._next) < MAX_BATCH and size < MAX_BATCH_SIZE

    def go_on(self) -> None:
        """Pass on what has gathered, when all before is answered; then there is room for more."""
        if self._asked or not self._next:
            return
        self._asked, self._next = deque(self._next), []
        requests = [(each.message.netid, each.opened.text) for each in self._asked]
        self.process.ask(self._authority, requests)
        released = [self._waiting.popleft() for _ in range(min(len(self._waiting), MAX_BATCH))]
        for netid in reversed(released):  # each goes in front of those before
            self._turns.release(netid, Hold.KEEPER)

    def receive(self, reports: Reports) -> None:
        """Take what the process says. ProgramError, WorkerError as of KeeperProcess."""
        what, value = self.process.receive()
        if what == ANSWERS:
            for answer in value:
                question = self._asked.popleft()
                self._replies.attempt(question.message, self._send, question.opened, answer)
            self.go_on()
        elif what == COUNTS:
            self.counts = value
        else:
            self.is_ready = what == READY
            if what == LOST:
                reports.disconnected(value)

    def _send(self, message: Incoming, opened: Opened, answer: bytes) -> None:
        """Send the answer to a request."""
        topic = RESPONSE.format(message.netid, message.action)
        self._replies.send(message, opened.cipher.seal(topic, opened.number or 0, answer))
