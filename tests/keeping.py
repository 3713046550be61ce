"""Members at a real broker, in small steps, for a keeper in its process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import Peer
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from issuing import pem
from members import TOPIC, Certified, Certifier

from secure_mqtt.exchange import Exchange
from secure_mqtt.topics.messages import Epoch, SessionKey, Stream
from secure_mqtt.topics.requests import Joined, Page, read_answer, write_request

COURSE = Certifier()
Connect = Callable[..., Peer]


def private_pem(member: Certified) -> bytes:
    """Return the content of a file for --identity."""
    form = Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
    return member.key.private_bytes(*form) + member.chain


def keeper_options(folder: Path, port: int, certifier: Certifier = COURSE) -> list[str]:
    """Write the files of a keeper, and return the options with which it is started."""
    folder.mkdir(exist_ok=True)
    (folder / "identity.pem").write_bytes(private_pem(certifier.member("responder")))
    (folder / "identity.pem").chmod(0o600)
    (folder / "ca.pem").write_bytes(pem(certifier.certificate))
    return [
        *("-v", "-p", str(port), "--keep", str(folder / "topics.db")),
        *("--identity", str(folder / "identity.pem"), "--peer-ca", str(folder / "ca.pem")),
    ]


class Member:
    """A member, in an exchange with the keeper, with a session to publish in."""

    def __init__(
        self, peer: Peer, name: str, suite: str = "x25519", certifier: Certifier = COURSE
    ) -> None:
        self.peer, self.name = peer, name
        self._identity = certifier.member(name).identity
        self._authority = certifier.authority
        self._suite = suite
        self._asking, self._answering = f"{name}/topic/request", f"{name}/topic/response"
        self.exchange: Exchange
        self.session = SessionKey(self._identity, TOPIC, name, "responder")
        self._counter = 0

    def agree(self) -> Member:
        """Make an exchange."""
        who = self._identity, self._authority, "responder"
        self.exchange = Exchange(self.name, self._suite, *who)
        self.peer.publish(f"{self.name}/key-exchange/request", self.exchange.request())
        self.exchange.agree(self.peer.receive(f"{self.name}/key-exchange/response"))
        return self

    def send(self, do: str, *values: Any) -> None:
        """Send a request."""
        self.send_raw(write_request(do, *values))

    def send_raw(self, request: bytes) -> None:
        """Send any bytes as a request."""
        self.peer.publish(self._asking, self.exchange.seal(self._asking, request))

    def answer(self, do: str) -> Any:
        """Return what the keeper says to the request to do that."""
        payload = self.peer.receive(self._answering)
        return read_answer(do, self.exchange.open(self._answering, payload)[1])

    def ask(self, do: str, *values: Any) -> Any:
        """Send a request, and return the answer."""
        self.send(do, *values)
        return self.answer(do)

    def join(self, topic: str = TOPIC) -> Joined:
        """Join, so that messages of the session may be published."""
        joined: Joined = self.ask("join", topic, self.session.hello)
        return joined

    def page(self, after: int = 0) -> Page:
        """Return earlier messages."""
        page: Page = self.ask("history", TOPIC, after)
        return page

    def sealed(self, joined: Joined, data: bytes) -> bytes:
        """Return the next message, sealed."""
        stream = Stream(Epoch(TOPIC, joined.epoch, joined.key), self.session.session)
        payload = stream.seal(self.session.key, self._counter, 1_700_000_000_000, data)
        self._counter += 1
        return payload

    def publish(self, joined: Joined, data: bytes) -> bytes:
        """Publish the next message, and return its payload."""
        payload = self.sealed(joined, data)
        self.peer.publish(TOPIC, payload)
        return payload
