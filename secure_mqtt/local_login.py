"""A plugin for the broker of --local: it admits only who knows the login of this run."""

from __future__ import annotations

import hmac
from dataclasses import dataclass

from amqtt.plugins.base import BaseAuthPlugin
from amqtt.session import Session


class LoginPlugin(BaseAuthPlugin):  # type: ignore[misc] # amqtt has no type information
    """Lets in who gives the password."""

    @dataclass
    class Config:
        """What amqtt hands over from its configuration."""

        password: str

    async def authenticate(self, *, session: Session) -> bool:
        """Tell whether a client is admitted."""
        return hmac.compare_digest(session.password or "", self.config.password)
