"""Where a responder's work is done: messages are taken in, and answered in turn."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from crypto import MAX_KEY_FILE_SIZE, token_size
from secure_mqtt.actions import KEY_EXCHANGE, MAX_TEXT, NETID
from secure_mqtt.chores import Credentials
from secure_mqtt.exchanges import Exchanges
from secure_mqtt.keyring import Keyring
from secure_mqtt.labour import Labour
from secure_mqtt.mailboxes import Message
from secure_mqtt.replies import Replies
from secure_mqtt.reports import Reports
from secure_mqtt.requests import Requests
from secure_mqtt.settings import Settings
from secure_mqtt.turns import Incoming

if TYPE_CHECKING:  # else loaded where it is used: most responders keep no topics
    from secure_mqtt.topics.frontend import Frontend

MAX_REQUEST = token_size(MAX_TEXT)  # bytes; AES-GCM's messages are smaller


class Desk:
    """Answers messages, NetIDs in turn.

    What takes long is left to workers: powers, signatures, long texts. A NetID whose message needs
    a worker waits until one is idle.
    """

    def __init__(self, settings: Settings, reports: Reports) -> None:
        """Prepare to answer one NetID or, if none is given, all; before there are threads.

        :raises ProgramError: the keeper's file can't be used
        """
        self.keyring = Keyring()
        self.labour = Labour(self.keyring)
        self.replies = Replies(reports)
        self.exchanges = Exchanges(self.keyring, self.labour, self.replies)
        self._requests = Requests(self.keyring, self.labour, self.replies)
        self.topics = self._open_topics(settings) if settings.keep else None
        self._netid = settings.netid
        self._reports = reports

    def _open_topics(self, settings: Settings) -> Frontend:
        from secure_mqtt.topics.frontend import Frontend, KeeperProcess

        return Frontend(KeeperProcess(settings), self.keyring, self.labour, self.replies)

    def use(self, credentials: Credentials) -> None:
        """Sign and verify with these from now on."""
        self.exchanges.use(credentials)
        if self.topics:
            self.topics.use(credentials.authority)

    @property
    def is_ready(self) -> bool:
        """Whether all that may be asked can be done."""
        return not self.topics or self.topics.is_ready

    @property
    def is_busy(self) -> bool:
        """Whether there is anything to be finished."""
        return self.labour.is_busy or bool(self.topics and self.topics.is_busy)

    @property
    def processes(self) -> list[Any]:
        """What may have a result, for select()."""
        return [*self.labour.pool.workers, *([self.topics.process] if self.topics else [])]

    @property
    def counts(self) -> dict[str, int]:
        """How many there are of what it keeps."""
        return {"netids": len(self.keyring), **(self.topics.counts if self.topics else {})}

    def renew(self) -> None:
        """Let the keeper's process connect anew, too."""
        if self.topics:
            self.topics.renew()

    def end(self) -> None:
        """Let the keeper's process end."""
        if self.topics:
            self.topics.process.end()

    def receive(self, message: Message) -> None:
        """Take a message in, to be answered when it is its NetID's turn."""
        netid, action, suffix, *_ = (*message.topic.split("/", 2), "", "")
        incoming = Incoming(netid, action, message.payload, time.monotonic())
        self._reports.counts.last_message = incoming.arrived
        is_ours = NETID.fullmatch(netid) and self._netid in ("", netid)
        if not is_ours or suffix != "request" or message.is_retained:
            problem = "retained, or on a topic that was not subscribed to"
            self._reports.ignored(incoming, problem)
        elif action == KEY_EXCHANGE and len(message.payload) > MAX_KEY_FILE_SIZE:
            self._reports.ignored(incoming, "no valid public key: larger than 64 KiB")
        elif len(message.payload) > MAX_REQUEST:
            self._reports.ignored(incoming, "a text of more than 1 MiB")
        else:
            self.labour.turns.put(incoming)

    def work(self, end: float) -> bool:
        """Answer messages for a while.

        :param end: until when, of time.monotonic()
        :return: whether there is more to be done at once
        """
        turns = self.labour.turns
        while turns.has_next and time.monotonic() < end:
            self._handle(turns.take())
        self._employ()
        if self.topics:
            self.topics.go_on()
        return turns.has_next

    def take_result(self, process: Any) -> None:
        """Go on with what a process has done. WorkerError if it was ended.

        :raises ProgramError: the keeper can't go on
        """
        if self.topics and process is self.topics.process:
            self.topics.receive(self._reports)
        else:
            self.labour.pool.take_result(process)
        self._employ()

    def _handle(self, message: Incoming) -> None:
        is_exchange = message.action == KEY_EXCHANGE
        answer = self.exchanges.answer if is_exchange else self._requests.answer
        if self.topics and message.action == self.topics.action:
            answer = self.topics.answer
        self.replies.attempt(message, answer)

    def _employ(self) -> None:
        """Give idle workers what there is to do: for those who wait, then ahead."""
        while self.labour.pool.has_idle:
            if message := self.labour.take_waiting():
                self._handle(message)
            elif not self.labour.work_ahead(self._requests.derive):
                break
