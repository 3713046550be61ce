"""What a member can be: one who publishes, one who subscribes, or one who does both in a shell."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, cast

from secure_mqtt.settings import Settings
from secure_mqtt.topics.enquiries import Enquiries
from secure_mqtt.topics.member import Member
from secure_mqtt.topics.notary import Notary, as_authority, new_exchange

if TYPE_CHECKING:
    from secure_mqtt.signatures import Authority, Identity


def new_member(settings: Settings, notary: Notary) -> Member:
    """Return the member that does what the settings ask for.

    :param notary: one, or a worker that is one
    :raises ProgramError: a file can't be used, or the message can't be published
    """
    new = {"publish": new_publisher, "subscribe": new_subscriber, "shell": new_shell}
    enquiries = Enquiries(settings, partial(new_exchange, notary))
    signer: Any = notary
    return new[settings.command](
        settings, enquiries, cast("Identity", signer), as_authority(notary)
    )


# Each imports what it needs itself: nobody has to wait for the others'.


def new_publisher(
    settings: Settings, enquiries: Enquiries, identity: Identity, authority: Authority
) -> Member:
    """Return a member that publishes the message, or the lines."""
    from secure_mqtt.lines import InputLines
    from secure_mqtt.streams import read_input, tell_of_input
    from secure_mqtt.topics.messages import MAX_DATA_SIZE
    from secure_mqtt.topics.publication import Publication
    from secure_mqtt.topics.publisher import check_size
    from secure_mqtt.topics.publishing import PublishingMember

    publication = Publication(settings, identity, settings.topics[0])
    if settings.lines:
        tell_of_input("lines")
        lines = InputLines(check_size, check_line=lambda line: None)
        return PublishingMember(settings, enquiries, publication, lines)
    # Of an endless input, no more than shows that it is too large.
    message = settings.message
    publication.add(read_input(MAX_DATA_SIZE + 1) if message is None else message)
    return PublishingMember(settings, enquiries, publication)


def new_subscriber(
    settings: Settings, enquiries: Enquiries, identity: Identity, authority: Authority
) -> Member:
    """Return a member that subscribes to topics."""
    from secure_mqtt.topics.output import Notes
    from secure_mqtt.topics.subscribing import SubscribingMember
    from secure_mqtt.topics.subscription import Subscription

    notes = Notes()
    parts = [Subscription(settings, authority, topic, notes) for topic in settings.topics]
    return SubscribingMember(settings, enquiries, parts, notes)


def new_shell(
    settings: Settings, enquiries: Enquiries, identity: Identity, authority: Authority
) -> Member:
    """Return a member that does what it is told."""
    from secure_mqtt.topics.shell import Shell

    return Shell(settings, enquiries, identity, authority)
