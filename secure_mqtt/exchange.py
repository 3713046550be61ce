"""The client's side of one key exchange, and the encryption under the key that it yields."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from crypto import TokenError, digest, read_group
from secure_mqtt.settings import Settings, peer_security
from secure_mqtt.suites import SUITES, Cipher, Transcript, key_blocks

if TYPE_CHECKING:
    from secure_mqtt.signatures import Authority, Identity


class Channel:
    """What goes on under one key: requests, numbered from 0, and the answers to them."""

    def __init__(self, cipher: Cipher) -> None:
        """Take the cipher of an exchange."""
        self.cipher = cipher
        self.sent = 0  # requests
        self._awaited: dict[int, int] = {}  # their names, by number, as long as they wait
        self._known: dict[bytes, str] = {}  # digests, each with what to say if it comes again

    def seal(self, topic: str, plaintext: bytes, name: int = 0) -> bytes:
        """Return the next encrypted request, for a topic; name: by which the caller knows it."""
        message = self.cipher.seal(topic, self.sent, plaintext)
        self._awaited[self.sent] = name
        self._known[digest(message)] = "our own message handed back"
        self.sent += 1
        return message

    def open(self, topic: str, message: bytes) -> tuple[int, bytes]:
        """Return an answer's plaintext after the name of the request that it answers.

        :raises TokenError: it answers no request that waits
        """
        message_digest = digest(message)
        if problem := self._known.get(message_digest):  # one key may serve both directions
            raise TokenError(problem)
        number, plaintext = self.cipher.open(topic, message)
        if number is None:  # then one request is sent at a time
            number = self.sent - 1
        if number not in self._awaited:
            raise TokenError("an answer to no request that waits")
        self._known[message_digest] = "an answer that was here before"
        return self._awaited.pop(number), plaintext


class Exchange:
    """One exchange as the client sees it."""

    def __init__(
        self,
        netid: str,
        suite: str,
        identity: Identity | None = None,
        authority: Authority | None = None,
        peer_name: str = "",
    ) -> None:
        """Make the keys. KeyFileError if the group's file is unusable.

        :param suite: one of SUITES
        :param identity: to sign with; None: nobody asks who we are
        :param authority: whose signature to demand of the peer; None: it may be anybody
        :param peer_name: the name that the peer must have proved then
        """
        self._netid = netid
        self._authority = authority
        self._peer_name = peer_name
        import cryptography  # noqa: F401 - here, and not later, it is told if that is missing

        self._suite = SUITES[suite]
        self._keys = self._suite.client()
        blocks = self._keys.blocks
        self._request = identity.sign(blocks, netid) if identity else blocks
        self.channel: Channel  # under the key that was agreed on last

    def load(self) -> None:
        """Import what agree() needs, for which nobody has to wait then."""
        self._suite.load()

    def request(self) -> bytes:
        """Return the payload of message 1."""
        return self._request

    def agree(self, response: bytes) -> str:
        """Take the payload of message 2.

        :return: who has sent it, for a person
        :raises PeerKeyError: it is not acceptable
        """
        if self._authority:
            self._authority.verify(response, self._netid, self._peer_name, self._request)
        transcript = Transcript(self._netid, self._request, response)
        self.channel = Channel(self._keys.agree(transcript))
        if self._authority:
            return f"has proved to be {self._peer_name!r}"
        keys = b"".join(content for _, content in key_blocks(response))
        return f"may be anybody, without --peer-ca; SHA-256 of its public key: {digest(keys).hex()}"

    def seal(self, topic: str, plaintext: bytes) -> bytes:
        """Do as Channel.seal() does."""
        return self.channel.seal(topic, plaintext)

    def open(self, topic: str, message: bytes) -> tuple[int, bytes]:
        """Do as Channel.open() does."""
        return self.channel.open(topic, message)


def exchange_settings(settings: Settings) -> tuple[Any, ...]:
    """Return the arguments of an Exchange. CryptoError or UsageError if a file is unusable."""
    read_group()  # raises its error before anything is computed
    return settings.netid, settings.suite, *peer_security(settings), settings.peer_name


def new_exchange(settings: Settings) -> Exchange:
    """Return an exchange, from files as they are now; raises as exchange_settings() does."""
    return Exchange(*exchange_settings(settings))
