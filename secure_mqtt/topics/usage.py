"""The commands of members on the command line: what is wrong with it, and what it means."""

from __future__ import annotations

import os
from collections.abc import Sequence

from secure_mqtt.errors import UsageError
from secure_mqtt.settings import Settings
from secure_mqtt.topics.names import ACTION, MAX_MEMBERS, MAX_TOPIC_SIZE, MEMBER, is_topic

HISTORY = 100  # messages of a new topic that are kept, unless another number is given
SUITES = "x25519", "mlkem768x25519"  # that a keeper answers in
# What follows each command's name, how many words there may be, and how many must.
WORDS: dict[str, tuple[str, int, int]] = {
    "create": ("TOPIC [MEMBER...]", 1, MAX_MEMBERS),
    "admit": ("TOPIC MEMBER...", 2, MAX_MEMBERS),
    "remove": ("TOPIC MEMBER...", 2, MAX_MEMBERS),
    "topics": ("nothing more", 0, 0),
    "publish": ("TOPIC MESSAGE; quote MESSAGE", 2, 2),
    "subscribe": ("TOPIC...", 1, MAX_MEMBERS),
    "shell": ("nothing more", 0, 0),
}
# Which commands an option is for.
OPTIONS = {
    "history": ("create", "subscribe"),
    "json": ("subscribe",),
    "count": ("subscribe",),
    "lines": ("publish",),
    "status_topic": (),
    "keep": (),
    "rotate": (),
    "local": (),
}


def check_command(settings: Settings, words: Sequence[str]) -> None:
    """Refuse options and numbers of words that don't fit a command."""
    command = words[1]
    others = (option for option, commands in OPTIONS.items() if command not in commands)
    for option in settings.given(*others):
        raise UsageError(f"{option} is not for {command}; leave it out")
    if settings.suite and settings.suite not in SUITES:
        raise UsageError(f"--suite {settings.suite} is not for topics; {' and '.join(SUITES)} are")
    if not (settings.identity and settings.peer_ca):
        hint = "a keeper of topics answers only who proves its name, and proves its own"
        raise UsageError(f"{command} needs --identity and --peer-ca", hint)
    if settings.rekey and not settings.lines:
        raise UsageError("--rekey is for --lines; leave it out")
    check_number(command, words[2:])
    if settings.lines and words[3] != "-":
        raise UsageError("--lines publishes the lines of standard input; give - as MESSAGE")


def check_number(command: str, words: Sequence[str]) -> None:
    """Refuse a command that too few or too many words follow."""
    wanted, least, most = WORDS[command]
    if not least <= len(words) <= most:
        raise UsageError(f"{command} takes: {wanted}")


def take_command(settings: Settings, command: str, words: Sequence[str]) -> None:
    """Take a command, and the words that follow it. UsageError if one is wrong."""
    settings.action, settings.command = ACTION, command
    if command == "publish":
        *words, message = words
        settings.message = None if message == "-" else os.fsencode(message)
    topics = words if command == "subscribe" else words[:1]
    settings.topics = [*dict.fromkeys(checked_topic(as_utf8(topic)) for topic in topics)]
    settings.members = [checked_member(name) for name in words[1:] if command != "subscribe"]
    if command == "create" and settings.history is None:
        settings.history = HISTORY
    settings.is_patient = settings.lines or command == "subscribe"


def as_utf8(argument: str) -> str:
    """Return an argument as typed, in any locale; what is not UTF-8 becomes surrogates."""
    return os.fsencode(argument).decode(errors="surrogateescape")


def checked_topic(topic: str) -> str:
    """Return a topic. UsageError if it can't be shared."""
    if not is_topic(topic):
        raise UsageError(
            f"TOPIC must be UTF-8 text of 1 to {MAX_TOPIC_SIZE} bytes without + # and controls, $"
            f" in front, /request and /response at the end; not {topic[:80]!r}"
        )
    return topic


def checked_member(name: str) -> str:
    """Return a member's NetID. UsageError if no certificate can name it."""
    if not MEMBER.fullmatch(name):
        raise UsageError(
            "MEMBER must be a NetID that a certificate can name: 1 to 63 letters, digits and inner"
            f" hyphens; not {name[:80]!r}"
        )
    return name
