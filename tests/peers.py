"""Peers in each suite, those with AES-GCM by the second implementation: responders, and a client.

What they send is made by reference.py, which shares no code with the program.
"""

from __future__ import annotations

from collections.abc import Callable

import reference
from hostile import ANSWER, MESSAGE, Conversation, LabClient, Script, Step

KEYS = {keys.suite: keys for keys in (reference.X25519Keys, reference.HybridKeys)}


class GcmResponder:
    """The hostile broker's responder in such a suite, honest by default."""

    def __init__(self, suite: str = "x25519") -> None:
        self._own = KEYS[suite]()
        self._request = self._blocks = self._secret = b""
        self.keys = b"", b""

    def script(self, **steps: Step) -> Script:
        """Return a script for the hostile broker."""
        return {"exchange": self.give_key, "request": self.respond, **steps}

    def blocks(self, c: Conversation) -> bytes:
        """Return its keys for the client's message 1; the same for the same."""
        if c.client_key != self._request:
            self._request = c.client_key
            self._blocks, self._secret = self._own.answer(c.client_key)
        return self._blocks

    def give_key(self, c: Conversation, payload: bytes = b"") -> Conversation:
        """Answer the key exchange."""
        blocks = self.blocks(c)
        payload = payload or blocks
        netid = c.packet.topic.partition("/")[0]
        self.keys = reference.message_keys(
            self._own.suite, self._secret, netid, c.client_key, payload
        )
        return c.give_key(payload)

    def respond(self, c: Conversation) -> Conversation:
        """Respond to the request."""
        return c.respond(self.answer(c))

    def answer(
        self,
        c: Conversation,
        number: int | None = None,
        topic: str = "",
        text: str = ANSWER,
        with_request_key: bool = False,
    ) -> bytes:
        """Return an answer, by default the right one to the last request."""
        sent, _ = reference.unseal(self.keys[0], c.packet.topic, c.token)
        key = self.keys[0 if with_request_key else 1]
        number = sent if number is None else number
        return reference.seal(key, topic or c.topics[1], number, text.encode())

    def text(self, c: Conversation) -> str:
        """Return the text of the last request."""
        return reference.unseal(self.keys[0], c.packet.topic, c.token)[1].decode()


class LabResponder:
    """The hostile broker's own responder, in the same words."""

    def script(self, **steps: Step) -> Script:
        """Return a script for the hostile broker."""
        return steps

    def blocks(self, c: Conversation) -> bytes:
        """Return its key."""
        return c.key_pair.public_key

    def give_key(self, c: Conversation, payload: bytes = b"") -> Conversation:
        """Answer the key exchange."""
        return c.give_key(payload or None)


def responder_of(suite: str) -> GcmResponder | LabResponder:
    """Return an honest responder in a suite."""
    return GcmResponder(suite) if suite in KEYS else LabResponder()


class GcmClient(LabClient):
    """A client in such a suite at a real broker, in small steps."""

    def __init__(
        self,
        port: int,
        netid: str,
        suite: str = "x25519",
        sign: Callable[[str, bytes], bytes] = lambda netid, blocks: blocks,
    ) -> None:
        super().__init__(port, netid)
        self.netid = netid
        self._own = KEYS[suite]()
        self.message_1 = sign(netid, self._own.ask())
        self.keys = b"", b""

    def __enter__(self) -> GcmClient:
        return self

    def exchange(self) -> GcmClient:
        """Agree upon keys."""
        response = self.ask("key-exchange", self.message_1)
        secret = self._own.agree(response)
        self.keys = reference.message_keys(
            self._own.suite, secret, self.netid, self.message_1, response
        )
        return self

    def seal(self, number: int, text: str = MESSAGE, topic: str = "uppercase/request") -> bytes:
        """Return an encrypted request."""
        return reference.seal(self.keys[0], f"{self.netid}/{topic}", number, text.encode())

    def send(self, payload: bytes, action: str = "uppercase") -> None:
        """Publish any bytes as a request."""
        self.publish(f"{self.netid}/{action}/request", payload)

    def is_served(self, number: int, text: str = MESSAGE) -> bool:
        """Check that a request is answered by the next message that comes."""
        answer = self.ask("uppercase", self.seal(number, text))
        opened = reference.unseal(self.keys[1], f"{self.netid}/uppercase/response", answer)
        return opened == (number, text.upper().encode())
