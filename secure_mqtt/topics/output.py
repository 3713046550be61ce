"""Showing messages: on standard output, whose reader may be slow, and what is missing as notes."""

from __future__ import annotations

import base64
import json
import os
import sys
import time
from collections import Counter

from secure_mqtt.errors import ProgramError
from secure_mqtt.log import log
from secure_mqtt.streams import is_utf8
from secure_mqtt.terminal import visible
from secure_mqtt.topics.order import Received

PORTION = 4096  # bytes that can be written to a pipe that select() calls writable (POSIX: PIPE_BUF)
MAX_PENDING = 2**16  # bytes that wait for the reader until no more messages are taken
NOTE_INTERVAL = 1.0  # seconds between notes of the same kind
MAX_NOTES = 20  # in that time


class Output:
    """Standard output, which is written to only when that does not have to wait."""

    def __init__(self) -> None:
        if sys.stdout is None:
            raise ProgramError("cannot write to standard output: it is closed", is_final=True)
        self.is_terminal = sys.stdout.isatty()
        self._pending = bytearray()

    def __len__(self) -> int:
        return len(self._pending)

    def fileno(self) -> int:
        """Return the descriptor, for select()."""
        return sys.stdout.fileno()

    def has_room(self) -> bool:
        """Tell whether more shall be put into it."""
        return len(self._pending) < MAX_PENDING

    def put_raw(self, data: bytes) -> None:
        """Do as put() does, for what the terminal shall obey."""
        self._pending += data

    def flush(self) -> None:
        """Write all, however long that takes."""
        while self._pending:
            self.write()

    def put(self, data: bytes) -> None:
        """Write something as soon as that can be done."""
        self._pending += self.shown(data)

    def shown(self, data: bytes) -> bytes:
        """Return something as it is written: on a terminal with its controls escaped."""
        if not self.is_terminal:
            return data
        return visible(data.decode(errors="backslashreplace")).encode()

    def write(self) -> None:
        """Write a part, when select() says so. ProgramError if that fails."""
        try:
            count = os.write(self.fileno(), self._pending[:PORTION])
        except OSError as error:
            problem = f"cannot write to standard output: {error.strerror}"
            raise ProgramError(problem, is_final=True) from None
        del self._pending[:count]


def for_people(message: Received) -> bytes:
    """Return a message after its topic and sender, and a newline."""
    return f"{message.topic} {message.sender}: ".encode() + message.data + b"\n"


def in_a_line(message: Received) -> bytes:
    """Do as for_people() does, with newlines escaped: else a sender could show more, as others'."""
    return for_people(message._replace(data=message.data.replace(b"\n", b"\\n")))


def plain(message: Received) -> bytes:
    """Return a message as it is, and a newline."""
    return message.data + b"\n"


def in_json(message: Received) -> bytes:
    """Return a message as an object in JSON, on a line."""
    data = message.data
    content = (
        {"text": data.decode()} if is_utf8(data) else {"base64": base64.b64encode(data).decode()}
    )
    fields = {"time": to_text(message.time), "topic": message.topic, "sender": message.sender}
    return json.dumps({**fields, **content}, ensure_ascii=False).encode() + b"\n"


def to_text(moment: int) -> str:
    """Return a time in UTC (RFC 3339). moment: in milliseconds since 1970."""
    seconds, milliseconds = divmod(moment, 1000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{milliseconds:03}Z"


class Notes:
    """What was missed, refused or dropped: said with its count, but never in a flood."""

    def __init__(self) -> None:
        self._missed: Counter[tuple[str, str]] = Counter()  # messages, by topic and sender
        self._refused: Counter[tuple[str, str]] = Counter()  # messages, by topic and reason
        self._dropped = 0
        self._due = 0.0  # of time.monotonic()

    def missed(self, topic: str, sender: str, count: int) -> None:
        """Note that messages of a member can't be shown any more."""
        self._missed[topic, sender] += count

    def refused(self, topic: str, reason: str, count: int) -> None:
        """Note that something on a topic was not what it should be."""
        self._refused[topic, reason] += count

    def dropped(self, count: int) -> None:
        """Note that there was no room for messages of any topic."""
        self._dropped += count

    def next_time(self) -> float:
        """Return when say() has to be called, of time.monotonic(); inf: there is nothing to say."""
        has_any = self._missed or self._refused or self._dropped
        return self._due if has_any else float("inf")

    def say(self) -> None:
        """Say it."""
        self._due = time.monotonic() + NOTE_INTERVAL
        lines = [
            f"missed {counted(count)} of {sender} on {topic}"
            for (topic, sender), count in self._missed.items()
        ]
        lines += [
            f"refused {counted(count)} on {topic}: {reason}"
            for (topic, reason), count in self._refused.items()
        ]
        if self._dropped:
            lines.append(f"dropped {counted(self._dropped)}: too many at a time")
        for line in lines[:MAX_NOTES]:
            log().warning(line)
        if len(lines) > MAX_NOTES:
            log().warning(f"and {len(lines) - MAX_NOTES} more notes like these")
        self._missed.clear()
        self._refused.clear()
        self._dropped = 0


def counted(count: int) -> str:
    """Return a number of messages in words."""
    return f"{count} message{'' if count == 1 else 's'}"
