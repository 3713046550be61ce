"""What a member can be: one who publishes, or one who subscribes."""

from __future__ import annotations

from functools import partial
from typing import cast

from secure_mqtt.exchange import Exchange, exchange_settings
from secure_mqtt.lines import InputLines
from secure_mqtt.settings import Settings
from secure_mqtt.signatures import Authority, Identity
from secure_mqtt.streams import read_input, tell_of_input
from secure_mqtt.suites import SUITES
from secure_mqtt.topics.enquiries import Enquiries
from secure_mqtt.topics.member import Member, PublishingMember, SubscribingMember
from secure_mqtt.topics.messages import MAX_DATA_SIZE
from secure_mqtt.topics.output import Notes
from secure_mqtt.topics.parts import Publication, Subscription
from secure_mqtt.topics.publisher import check_size


def new_member(settings: Settings) -> Member:
    """Return the member that does what the settings ask for.

    :raises ProgramError: a file can't be used, or the message can't be published
    """
    SUITES[settings.suite].load()
    arguments = exchange_settings(settings)
    identity, authority = cast("tuple[Identity, Authority]", arguments[2:4])
    enquiries = Enquiries(settings, partial(Exchange, *arguments))
    if settings.command == "publish":
        return new_publisher(settings, enquiries, identity)
    notes = Notes()
    parts = [Subscription(settings, authority, topic, notes) for topic in settings.topics]
    return SubscribingMember(settings, enquiries, parts, notes)


def new_publisher(settings: Settings, enquiries: Enquiries, identity: Identity) -> Member:
    """Return a member that publishes the message, or the lines."""
    publication = Publication(settings, identity, settings.topics[0])
    if settings.lines:
        tell_of_input("lines")
        lines = InputLines(check_size, check_line=lambda line: None)
        return PublishingMember(settings, enquiries, publication, lines)
    # Of an endless input, no more than shows that it is too large.
    message = settings.message
    publication.add(read_input(MAX_DATA_SIZE + 1) if message is None else message)
    return PublishingMember(settings, enquiries, publication)
