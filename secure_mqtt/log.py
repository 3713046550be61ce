"""The log on standard error: for a person, or from a responder for programs."""

from __future__ import annotations

import functools
import sys
import time
from typing import TYPE_CHECKING, Any

from secure_mqtt.terminal import visible

if TYPE_CHECKING:  # loaded where it is used: --help and usage errors do not need it
    import logging

    from secure_mqtt.settings import Settings

PROGRAM = "secure_mqtt_client.py"
WAITING = 21  # log level, just above INFO: what a person at a terminal is told unasked
STARTED = time.monotonic()


@functools.cache
def log() -> logging.Logger:
    """Return the program's logger."""
    import logging

    return logging.getLogger(PROGRAM)


def event(name: str, is_warning: bool = False, **values: Any) -> None:
    """Log what happened to a responder, in logfmt: a word, then each value after its key.

    Texts are in double quotes, escaped as in JSON, since a peer may have chosen them; numbers
    stand as they are.
    """
    import json
    import logging

    level = logging.WARNING if is_warning else logging.INFO
    if log().isEnabledFor(level):
        pairs = (f"{key}={json.dumps(value)}" for key, value in values.items())
        log().log(level, "event=%s", " ".join((name, *pairs)))


def milliseconds() -> float:
    """Return the time since the start."""
    return (time.monotonic() - STARTED) * 1000


def set_up_log(settings: Settings) -> None:
    """Begin to write the log; to be done once."""
    import logging

    handler = logging.StreamHandler()
    handler.setFormatter(programs_format() if settings.respond else persons_format())
    log().addHandler(handler)
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    log().setLevel(
        logging.INFO if settings.verbose else WAITING if is_terminal else logging.WARNING
    )


def programs_format() -> logging.Formatter:
    """Return the format of a responder's log: logfmt, with the time in UTC."""
    import json
    import logging

    class Formatter(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            if not record.msg.startswith("event="):  # what is said in a sentence, not by event()
                record.msg, record.args = "event=note text=%s", (json.dumps(record.getMessage()),)
            return super().format(record)

    logging.addLevelName(logging.INFO, "info")
    logging.addLevelName(logging.WARNING, "warning")
    line = "time=%(asctime)s.%(msecs)03dZ level=%(levelname)s %(message)s"
    formatter = Formatter(line, "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    return formatter


def persons_format() -> logging.Formatter:
    """Return the format for a person: progress begins with the time since the start."""
    import logging

    arrows = {} if can_show("→←") else str.maketrans({"→": "->", "←": "<-"})

    class Formatter(logging.Formatter):
        def format(self, record: logging.LogRecord) -> str:
            begin = f"{milliseconds():.0f} ms: " if record.levelno == logging.INFO else ""
            return visible(f"{PROGRAM}: {begin}{record.getMessage()}").translate(arrows)

    return Formatter()


def can_show(text: str) -> bool:
    """Tell whether the encoding of standard error has a text's characters."""
    try:
        text.encode(getattr(sys.stderr, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        return False
    return True
