"""What members ask a keeper, and what it answers: objects in JSON, read strictly.

Each field is checked here, on both sides, so that the others can take them as they are. Neither
side trusts the other with its memory: what is larger than any honest message is not even parsed.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

from crypto import CryptoError
from secure_mqtt.topics.messages import (
    KEY_SIZE,
    MAX_DATA_SIZE,
    MAX_EPOCH,
    MAX_HELLO_SIZE,
    OVERHEAD,
    SESSION_SIZE,
)
from secure_mqtt.topics.names import ACTION as ACTION
from secure_mqtt.topics.names import MAX_HISTORY, MAX_MEMBERS, MEMBER, is_topic

MAX_COUNTERS = 1_000  # in an answer: each member of a large topic asks for them
MAX_REQUEST_SIZE = 2**20  # bytes: 10,000 members have 670,000
MAX_ANSWER_SIZE = 2**21  # bytes: a message of 1 MiB has 1.4 million in base64
MAX_DIGITS = 20  # of a number: those of 64 bits
MAX_NUMBER = 2**63 - 1  # of messages, counters: what SQLite can keep
MAX_SECONDS = 1e9  # 30 years
MAX_PAYLOAD_SIZE = MAX_DATA_SIZE + OVERHEAD  # bytes
Check = Callable[[Any], Any]  # returns what a value means; ValueError if it means nothing


class RequestError(CryptoError):
    """A request or an answer is not as the protocol has it."""


class RefusedError(Exception):
    """The keeper does not do what was asked; the text says why, in the asker's words."""


# --- checks of single values -------------------------------------------------------------------


def text(is_valid: Callable[[str], object]) -> Check:
    """Return the check of a text."""

    def check(value: Any) -> str:
        if not isinstance(value, str) or not is_valid(value):
            raise ValueError
        return value

    return check


def integer(smallest: int, largest: int) -> Check:
    """Return the check of an integer."""

    def check(value: Any) -> int:
        if type(value) is not int or not smallest <= value <= largest:  # a bool is an int, too
            raise ValueError
        return value

    return check


def binary(smallest: int, largest: int) -> Check:
    """Return the check of bytes, in the only base64 that they have, of a size."""

    def check(value: Any) -> bytes:
        if not isinstance(value, str) or len(value) > (largest + 2) // 3 * 4:
            raise ValueError
        data = base64.b64decode(value, validate=True)
        if not smallest <= len(data) <= largest or to_base64(data) != value:
            raise ValueError
        return data

    return check


def seconds(value: Any) -> float:
    """Check a time span."""
    if type(value) not in (int, float) or not 0 <= value <= MAX_SECONDS:
        raise ValueError
    return float(value)


def boolean(value: Any) -> bool:
    """Check a truth value."""
    if not isinstance(value, bool):
        raise ValueError
    return value


def optional(check: Check) -> Check:
    """Return the check of what may be missing, or null."""
    return lambda value: None if value is None else check(value)


def array(check: Check) -> Check:
    """Return the check of an array."""

    def check_each(value: Any) -> list[Any]:
        if not isinstance(value, list):
            raise ValueError
        return [check(each) for each in value]

    return check_each


def mapping(key: Check, check: Check) -> Check:
    """Return the check of an object whose names are values, too."""

    def check_each(value: Any) -> dict[Any, Any]:
        if not isinstance(value, dict):
            raise ValueError
        return {key(name): check(each) for name, each in value.items()}

    return check_each


def record(fields: Mapping[str, Check], build: Callable[..., Any] = dict) -> Check:
    """Return the check of an object with certain fields. Others in it are none of ours.

    :param build: makes the result of the fields
    """

    def check(value: Any) -> Any:
        if not isinstance(value, dict):
            raise ValueError
        return build(**{name: each(value.get(name)) for name, each in fields.items()})

    return check


def members(value: Any) -> list[str]:
    """Check a list of NetIDs."""
    if not isinstance(value, list) or len(value) > MAX_MEMBERS:
        raise ValueError
    return [netid(each) for each in value]


def decimal(value: str) -> int:
    """Check an epoch that is written as the name of a field."""
    number = int(value) if value.isascii() and value.isdigit() and len(value) <= MAX_DIGITS else 0
    return int(epoch(number))


topic = text(is_topic)
netid = text(MEMBER.fullmatch)
epoch = integer(1, MAX_EPOCH)
number = integer(0, MAX_NUMBER)
history_count = integer(0, MAX_HISTORY)
key = binary(KEY_SIZE, KEY_SIZE)
session = binary(SESSION_SIZE, SESSION_SIZE)
hello = binary(1, MAX_HELLO_SIZE)
payload = binary(1, MAX_PAYLOAD_SIZE)


# --- what is asked and answered ----------------------------------------------------------------


class Previous(NamedTuple):
    """The epoch before the current one, while messages of it may still be under way."""

    epoch: int
    key: bytes
    expires: float  # seconds until it must no longer be used


class Joined(NamedTuple):
    """What a member may know of a topic."""

    epoch: int
    key: bytes
    renew: float  # seconds until it is time to ask again
    expires: float  # seconds until the key must no longer be used
    previous: Previous | None
    counters: dict[bytes, int]  # the highest that is kept, by session
    history: int  # how many messages are kept
    number: int  # of the newest one that is


class Kept(NamedTuple):
    """A message that a keeper has kept."""

    number: int
    payload: bytes


class Page(NamedTuple):
    """Some of the messages that a keeper has kept."""

    messages: list[Kept]  # oldest first
    keys: dict[int, bytes]  # of their epochs
    more: bool  # whether there are newer ones


class Shared(NamedTuple):
    """A topic as its members see it."""

    topic: str
    owner: str
    members: list[str]
    history: int


def only(**fields: Any) -> Any:
    """Return the value of a record's only field."""
    [value] = fields.values()
    return value


REQUESTS: dict[str, dict[str, Check]] = {
    "create": {"topic": topic, "members": members, "history": history_count},
    "admit": {"topic": topic, "members": members},
    "remove": {"topic": topic, "members": members},
    "delete": {"topic": topic},
    "list": {},
    "join": {"topic": topic, "hello": optional(hello)},
    "sender": {"topic": topic, "session": session},
    "history": {"topic": topic, "after": integer(-MAX_NUMBER, MAX_NUMBER)},
}
PREVIOUS = record({"epoch": epoch, "key": key, "expires": seconds}, Previous)
SHARED = record(
    {"topic": topic, "owner": netid, "members": members, "history": history_count}, Shared
)
ANSWERS: dict[str, Check] = {
    **dict.fromkeys(("create", "admit", "remove", "delete"), record({})),
    "list": record({"topics": array(SHARED)}, only),
    "join": record(
        {
            "epoch": epoch,
            "key": key,
            "renew": seconds,
            "expires": seconds,
            "previous": optional(PREVIOUS),
            "counters": mapping(session, number),
            "history": history_count,
            "number": number,
        },
        Joined,
    ),
    "sender": record({"hello": hello}, only),
    "history": record(
        {
            "messages": array(record({"number": number, "payload": payload}, Kept)),
            "keys": mapping(decimal, key),
            "more": boolean,
        },
        Page,
    ),
}


def write_request(do: str, *values: Any) -> bytes:
    """Return a request. values: of its fields, in their order in REQUESTS; None is left out."""
    fields = zip(REQUESTS[do], values, strict=True)
    return to_json({"do": do, **{name: each for name, each in fields if each is not None}})


class Ask(NamedTuple):
    """What a member asks the keeper of its topic."""

    do: str  # join, sender or history
    topic: str
    detail: Any = None  # the third field of the request

    def __bytes__(self) -> bytes:
        """Return the request."""
        return write_request(self.do, self.topic, self.detail)


def read_request(data: bytes) -> tuple[str, dict[str, Any]]:
    """Return what a member asks for, and the fields that belong to it.

    :raises RequestError: it is no request
    """
    value = _from_json(data, MAX_REQUEST_SIZE)
    do = value.pop("do", None)
    fields = REQUESTS.get(do) if isinstance(do, str) else None
    if fields is None or value.keys() - fields.keys():
        raise RequestError("not a request that a keeper knows")
    return do, {name: _checked(name, check, value.get(name)) for name, check in fields.items()}


def _checked(name: str, check: Check, value: Any) -> Any:
    try:
        return check(value)
    except ValueError:
        raise RequestError(f"its field {name!r} is not as it must be") from None


def read_answer(do: str, data: bytes) -> Any:
    """Return what a keeper answers: Joined, Page, …, as ANSWERS has it.

    :param do: what it was asked to do
    :raises RefusedError: it did not do that
    :raises RequestError: it is no answer
    """
    value = _from_json(data, MAX_ANSWER_SIZE)
    if isinstance(error := value.get("error"), str):
        raise RefusedError(error)
    try:
        return ANSWERS[do](value)
    except ValueError:
        raise RequestError("not an answer of a keeper") from None


def to_json(value: Mapping[str, Any]) -> bytes:
    """Return an object in JSON (RFC 8259), as UTF-8; bytes become base64."""
    return ENCODER.encode(value).encode()


def to_base64(data: bytes) -> str:
    """Return bytes in base64 (RFC 4648, 4)."""
    return base64.b64encode(data).decode()


def _from_json(data: bytes, largest: int) -> dict[str, Any]:
    if len(data) > largest:
        raise RequestError("too large")
    try:
        value = DECODER.decode(data.decode())
    except (ValueError, RecursionError):
        raise RequestError("not in JSON") from None
    if not isinstance(value, dict):
        raise RequestError("not an object in JSON")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):  # two readers could take different ones for the field's value
        raise ValueError
    return value


def _short_integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:  # the work grows with the square
        raise ValueError
    return int(digits)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(name)


ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), default=to_base64)
DECODER = json.JSONDecoder(
    object_pairs_hook=_unique, parse_int=_short_integer, parse_constant=_no_constant
)
