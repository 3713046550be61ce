"""Where a responder's work is done: messages are taken in, and answered in turn."""

from __future__ import annotations

import time

from crypto import MAX_KEY_FILE_SIZE, token_size
from secure_mqtt.actions import KEY_EXCHANGE, MAX_TEXT, NETID
from secure_mqtt.exchanges import Exchanges
from secure_mqtt.keyring import Keyring
from secure_mqtt.labour import Labour
from secure_mqtt.mailboxes import Message
from secure_mqtt.replies import Replies
from secure_mqtt.reports import Reports
from secure_mqtt.requests import Requests
from secure_mqtt.turns import Incoming
from secure_mqtt.workers import Worker


class Desk:
    """Answers messages, NetIDs in turn.

    What takes long is left to workers: powers, signatures, long texts. A NetID whose message needs
    a worker waits until one is idle.
    """

    def __init__(self, netid: str, reports: Reports) -> None:
        """Prepare to answer one NetID or, if that is empty, all; before there are threads."""
        self.keyring = Keyring()
        self.labour = Labour(self.keyring)
        self.replies = Replies(reports)
        self.exchanges = Exchanges(self.keyring, self.labour, self.replies)
        self._requests = Requests(self.keyring, self.labour, self.replies)
        self._netid = netid
        self._reports = reports

    def receive(self, message: Message) -> None:
        """Take a message in, to be answered when it is its NetID's turn."""
        netid, action, suffix, *_ = (*message.topic.split("/", 2), "", "")
        incoming = Incoming(netid, action, message.payload, time.monotonic())
        is_ours = NETID.fullmatch(netid) and self._netid in ("", netid)
        if not is_ours or suffix != "request" or message.is_retained:
            problem = "retained, or on a topic that was not subscribed to"
            self._reports.ignored(incoming, problem)
        elif action == KEY_EXCHANGE and len(message.payload) > MAX_KEY_FILE_SIZE:
            self._reports.ignored(incoming, "no valid public key: larger than 64 KiB")
        elif len(message.payload) > token_size(MAX_TEXT):
            self._reports.ignored(incoming, "a text of more than 1 MiB")
        else:
            self.labour.turns.put(incoming)

    def work(self, end: float) -> bool:
        """Answer messages for a while.

        :param end: until when, of time.monotonic()
        :return: whether there is more to be done at once
        """
        turns = self.labour.turns
        self._employ()
        while turns.has_next and time.monotonic() < end:
            self._handle(turns.take())
        self._reports.dropped(turns.take_dropped())
        return turns.has_next

    def take_result(self, worker: Worker) -> None:
        """Go on with what a worker has done. WorkerError if the worker was ended."""
        self.labour.pool.take_result(worker)
        self._employ()

    def _handle(self, message: Incoming) -> None:
        is_exchange = message.action == KEY_EXCHANGE
        answer = self.exchanges.answer if is_exchange else self._requests.answer
        self.replies.attempt(message, answer)

    def _employ(self) -> None:
        """Give idle workers what there is to do: for those who wait, then ahead."""
        while self.labour.pool.has_idle:
            if message := self.labour.take_waiting():
                self._handle(message)
            elif not self.labour.work_ahead(self._requests.derive):
                break
