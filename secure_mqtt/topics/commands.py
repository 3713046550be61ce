"""What a member tells the keeper to do: a question each, and what its answer means."""

from __future__ import annotations

from typing import Any

from crypto import CryptoError
from secure_mqtt.errors import ProgramError
from secure_mqtt.settings import Settings
from secure_mqtt.topics.requests import RefusedError, Shared, read_answer, write_request

MAX_WORDS = 200  # characters of the keeper's own words that are shown


def question(settings: Settings) -> bytes:
    """Return the request for create, admit, remove or topics."""
    command = settings.command
    if command == "topics":
        return write_request("list")
    history = [settings.history] if command == "create" else []
    return write_request(command, settings.topics[0], settings.members, *history)


def answer_of(settings: Settings, do: str, answer: bytes) -> Any:
    """Return what the keeper has answered, as read_answer() does.

    :param do: what it was asked to do
    :raises ProgramError: it has refused that, or its answer is none
    """
    try:
        return read_answer(do, answer)
    except RefusedError as error:
        raise refusal(settings, str(error)) from None
    except CryptoError as error:
        problem = f"the answer of {settings.peer_name!r} is none: {error}"
        raise ProgramError(problem, "it may be another program's, or a newer one's") from None


def refusal(settings: Settings, words: str, topic: str = "") -> ProgramError:
    """Return the error for what the keeper does not do. words: its own."""
    about = f" on {topic}" if topic else ""
    return ProgramError(
        f"{settings.peer_name!r} refuses{about}: {words[:MAX_WORDS]}", is_final=True
    )


def table(topics: list[Shared]) -> bytes:
    """Return topics as lines: name, owner and members, with tabs between these."""
    rows = ((each.topic, each.owner, " ".join(each.members)) for each in topics)
    return "".join("\t".join(row) + "\n" for row in rows).encode()
