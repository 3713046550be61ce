"""What takes a responder long, so that its workers do it: each function is one piece of work."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from crypto import DhKeyPair, TokenError
from secure_mqtt.actions import REQUEST, RESPONSE, TRANSFORMATIONS
from secure_mqtt.errors import UnusableError
from secure_mqtt.fixed_base import make_key_pair
from secure_mqtt.streams import is_utf8
from secure_mqtt.suites import Cipher, LabResponder, Transcript, load_suites, suite_of

if TYPE_CHECKING:
    from secure_mqtt.signatures import Authority, Identity


class Credentials(NamedTuple):
    """What a responder signs with, and whose signatures it demands: the content of two files."""

    identity: bytes = b""  # PEM; empty: nothing is signed
    authority: bytes = b""  # PEM; empty: nobody need sign


class Answer(NamedTuple):
    """What a responder's side of an exchange has yielded."""

    response: bytes  # the payload of message 2
    cipher: Cipher | None
    coming: LabResponder | None  # what the cipher can be derived from, which takes long
    expires: float  # of time.time(), when the client's certificate ends


class Reply(NamedTuple):
    """The answer to a request."""

    place: int  # of the cipher that has opened the request
    number: int | None  # the request's, if the suite numbers them
    message: bytes


@functools.lru_cache(maxsize=1)
def read_identity(pem: bytes) -> Identity:
    """Return the identity in a file's content, which is read once."""
    from secure_mqtt.signatures import Identity

    return Identity(pem)


@functools.lru_cache(maxsize=1)
def read_authority(pem: bytes) -> Authority:
    """Return the authority in a file's content, which is read once."""
    from secure_mqtt.signatures import Authority

    return Authority(pem)


class Chores:
    """The chores, as a Worker wants them: methods of one object."""

    def __init__(self) -> None:
        load_suites()

    def make_key_pairs(self, count: int) -> list[DhKeyPair]:
        """Return new key pairs in the lab's group."""
        return [make_key_pair() for _ in range(count)]

    def derive(self, coming: LabResponder) -> Cipher:
        """Return the cipher of an exchange in the lab's group."""
        return coming.derive()

    def exchange(
        self, netid: str, payload: bytes, credentials: Credentials, key_pair: DhKeyPair | None
    ) -> Answer:
        """Do as answer_exchange() does."""
        return answer_exchange(netid, payload, credentials, key_pair)

    def answer(self, netid: str, action: str, payload: bytes, ciphers: Sequence[Cipher]) -> Reply:
        """Answer a request that one of these ciphers opens.

        :raises CryptoError: it can't be answered
        """
        for place, cipher in enumerate(ciphers):
            try:
                number, text = cipher.open(REQUEST.format(netid, action), payload)
            except TokenError:
                continue
            return Reply(place, number, seal_answer(netid, action, cipher, number, text))
        raise TokenError("not encrypted with a key of this NetID")


def answer_exchange(
    netid: str, payload: bytes, credentials: Credentials, key_pair: DhKeyPair | None = None
) -> Answer:
    """Make the responder's side of an exchange.

    :param payload: message 1, whole
    :param key_pair: one that no exchange has used yet, for the lab's group; None: it is made now
    :raises PeerKeyError: the client's key, or its signature, is unusable
    """
    suite = suite_of(payload)
    expires = float("inf")
    if credentials.authority:
        expires = read_authority(credentials.authority).verify(payload, netid, netid)
    keys = suite.responder(payload, key_pair) if suite.is_slow else suite.responder(payload)
    response = keys.blocks
    if credentials.identity:
        response = read_identity(credentials.identity).sign(response, netid, payload)
    if isinstance(keys, LabResponder):
        return Answer(response, None, keys, expires)
    cipher = keys.agree(Transcript(netid, payload, response))
    return Answer(response, cipher, None, expires)


def seal_answer(netid: str, action: str, cipher: Cipher, number: int | None, text: bytes) -> bytes:
    """Return the message that answers a request.

    :param text: the request's
    :raises UnusableError: it is not UTF-8
    """
    if not is_utf8(text):
        raise UnusableError("not UTF-8 text")
    answer = TRANSFORMATIONS[action](text.decode()).encode()
    return cipher.seal(RESPONSE.format(netid, action), number or 0, answer)
