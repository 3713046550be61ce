"""A member's notary: signs and verifies for it, in a child process.

The member's own process so need not load what certificates take, a third of the time of its start;
and the private key is in no process that talks to the network.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, cast

from crypto import CryptoError
from secure_mqtt.certificates import Validity
from secure_mqtt.errors import ProgramError
from secure_mqtt.exchange import Channel, Exchange, exchange_settings
from secure_mqtt.settings import Settings

if TYPE_CHECKING:
    from secure_mqtt.signatures import Authority, Identity
    from secure_mqtt.suites import Cipher


class Notary:
    """What is done in the child process."""

    def __init__(self, settings: Settings) -> None:
        """Read the files, and make the first exchange ready.

        :raises ProgramError: a file can't be used
        """
        self._settings = settings
        self._exchange = self._new_exchange()
        self._is_new = True

    def _new_exchange(self) -> Exchange:
        arguments = exchange_settings(self._settings)
        self._identity, self._authority = cast("tuple[Identity, Authority]", arguments[2:4])
        return Exchange(*arguments)

    def check(self) -> None:
        """Do nothing: who asks is told of what was wrong at the start."""

    def request(self) -> bytes:
        """Return message 1 of a new exchange, from files as they are now if they can be used."""
        if not self._is_new:
            with contextlib.suppress(ProgramError, CryptoError):
                self._exchange = self._new_exchange()
        self._is_new = False
        return self._exchange.request()

    def load(self) -> None:
        """Import what agree() needs, for which nobody has to wait then."""
        self._exchange.load()

    def agree(self, response: bytes) -> tuple[str, Cipher]:
        """Take message 2 of that exchange.

        :return: who has sent it, for a person, and the cipher that was agreed on
        :raises PeerKeyError: it is not acceptable
        """
        peer = self._exchange.agree(response)
        return peer, self._exchange.channel.cipher

    def sign_bytes(self, blocks: bytes, signed_bytes: bytes) -> bytes:
        """Do as Identity.sign_bytes() does."""
        return self._identity.sign_bytes(blocks, signed_bytes)

    def verify_bytes(
        self, bundle: bytes, signed_bytes: bytes, name: str, at: float | None
    ) -> Validity:
        """Do as Authority.verify_bytes() does, for a client."""
        return self._authority.verify_bytes(bundle, signed_bytes, name, at=at)


class RemoteExchange:
    """An exchange that the notary makes; like an Exchange."""

    def __init__(self, notary: Notary) -> None:
        """Take the notary, or a worker that is one."""
        self._notary = notary
        self.channel: Channel

    def request(self) -> bytes:
        """Do as Exchange.request() does."""
        return self._notary.request()

    def agree(self, response: bytes) -> str:
        """Do as Exchange.agree() does."""
        peer, cipher = self._notary.agree(response)
        self.channel = Channel(cipher)
        return peer


class RemoteAuthority:
    """An authority that the notary knows; like an Authority."""

    def __init__(self, notary: Notary) -> None:
        """Take the notary, or a worker that is one."""
        self._notary = notary

    def verify_bytes(
        self, bundle: bytes, signed_bytes: bytes, name: str, *, at: float | None = None
    ) -> Validity:
        """Do as Authority.verify_bytes() does, for a client."""
        return self._notary.verify_bytes(bundle, signed_bytes, name, at)


def as_authority(notary: Notary) -> Authority:
    """Return the authority that a notary knows."""
    remote: Any = RemoteAuthority(notary)
    return cast("Authority", remote)


def new_exchange(notary: Notary) -> Exchange:
    """Return an exchange that a notary makes, one at a time."""
    remote: Any = RemoteExchange(notary)
    return cast("Exchange", remote)
