"""Members of shared topics, who certifies them, and a keeper whose clock the test moves."""

from __future__ import annotations

import functools
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import reference_topics
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from issuing import HOUR, NOW, PURPOSES, Issuer, common_name, key_usage, named, p256, pem

from secure_mqtt.signatures import Authority, Identity
from secure_mqtt.topics.keeper import Effects, Keeper
from secure_mqtt.topics.requests import Joined, Page, read_answer, write_request
from secure_mqtt.topics.store import Store

KEEPER = "responder"
TOPIC = "sensors/kitchen"
INTERVAL = 3600.0  # seconds between rotations


class Certified(NamedTuple):
    """Who has a certificate."""

    name: str
    key: ec.EllipticCurvePrivateKey
    chain: bytes  # PEM

    @property
    def identity(self) -> Identity:
        """What the program signs with."""
        form = Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()
        return Identity(self.key.private_bytes(*form) + self.chain)

    def session(
        self, topic: str, netid: str = "", keeper: str = KEEPER
    ) -> reference_topics.Session:
        """Return a session by the second implementation, in another's name if that is given."""
        return reference_topics.Session(topic, netid or self.name, keeper, self.key, self.chain)


class Certifier:
    """An authority, and who has a certificate of it."""

    def __init__(self) -> None:
        self._issuer = Issuer(p256(), common_name("CA"))
        public_key = self._issuer.key.public_key()
        extensions = (
            x509.BasicConstraints(ca=True, path_length=None),
            key_usage("key_cert_sign"),
            x509.SubjectKeyIdentifier.from_public_key(public_key),
        )
        years = NOW - 1000 * HOUR, NOW + 1000 * HOUR
        self.certificate = self._issuer.issue(
            public_key, *extensions, subject=self._issuer.name, begins=years[0], ends=years[1]
        )
        self.authority = Authority(pem(self.certificate))
        self.member = functools.cache(self._member)

    def _member(
        self,
        name: str,
        begins: datetime = NOW - HOUR,
        ends: datetime = NOW + 500 * HOUR,
        purposes: x509.ExtendedKeyUsage = PURPOSES,
        others: int = 0,
    ) -> Certified:
        """Return who has a certificate for a name, and for so many others."""
        key = p256()
        names = named(name, *(f"{number}-{'x' * 55}" for number in range(others)))
        certificate = self._issuer.issue(
            key.public_key(), names, purposes, begins=begins, ends=ends
        )
        return Certified(name, key, pem(certificate))


class Desk:
    """A keeper with a clock that only the test moves."""

    def __init__(
        self, path: Path, authority: Authority, interval: float = INTERVAL, now: float = 1e9
    ) -> None:
        self.now, self.path, self.interval, self.authority = now, path, interval, authority
        self.effects = Effects([], [])
        self.open()

    def open(self, interval: float = 0) -> None:
        """Open the file, perhaps once more."""
        self.interval = interval or self.interval
        self.store = Store(str(self.path))
        clock = lambda: self.now  # noqa: E731
        self.keeper = Keeper(self.store, self.authority, KEEPER, clock, self.interval)

    def close(self) -> None:
        self.store.database.close()

    def ask(self, netid: str, do: str, *values: Any) -> Any:
        """Return the keeper's answer, after its batch."""
        with self.keeper.batch() as effects:
            answer = self.keeper.answer(netid, write_request(do, *values))
        self.effects = Effects([*effects.subscriptions], [*effects.notices])
        return read_answer(do, answer)

    def join(self, netid: str, topic: str = TOPIC, hello: bytes | None = None) -> Joined:
        joined: Joined = self.ask(netid, "join", topic, hello)
        return joined

    def page(self, after: int = 0, netid: str = "alice", topic: str = TOPIC) -> Page:
        page: Page = self.ask(netid, "history", topic, after)
        return page

    def take(self, payload: bytes, topic: str = TOPIC) -> bool:
        with self.keeper.batch():
            return self.keeper.take(topic, payload)

    def rotate(self) -> Effects:
        with self.keeper.batch() as effects:
            self.keeper.rotate()
        return Effects([*effects.subscriptions], [*effects.notices])

    def catch_up(self) -> list[str]:
        with self.keeper.batch():
            return self.keeper.catch_up()
