"""Standard input, output and error."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING, cast

from crypto import token_size
from secure_mqtt.errors import ProgramError
from secure_mqtt.log import PROGRAM
from secure_mqtt.settings import Settings
from secure_mqtt.terminal import visible

if TYPE_CHECKING:
    import io

MAX_TOKEN_SIZE = 268_435_455 - 1024  # bytes: MQTT 3.1.1, 2.2.3, less room for the topic


def is_utf8(text: bytes) -> bool:
    """Tell whether bytes are UTF-8."""
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True


def read_message(settings: Settings) -> bytes:
    """Return the message, from standard input if the command line says so."""
    message = settings.message
    if message is None:
        message = read_input()
        check_size(len(message))
        check_text(message)
    return message


def read_input(most: int = -1) -> bytes:
    """Return what is on standard input as MESSAGE.

    :param most: bytes that are read at most; negative: all
    """
    tell_of_input("MESSAGE")
    try:
        return standard_input().read(most)
    except OSError as error:
        raise ProgramError(f"cannot read standard input: {error.strerror}") from None


def tell_of_input(what: str) -> None:
    """Tell a person at a terminal that it is waited for, and how to end it."""
    if is_typed():
        say(f"{PROGRAM}: reading {what} until the end of input (Ctrl-D)")


def is_typed() -> bool:
    """Tell whether standard input is a terminal."""
    return sys.stdin is not None and sys.stdin.isatty()


def standard_input() -> io.BufferedReader:
    """Return standard input. ProgramError if there is none."""
    if sys.stdin is None:
        raise ProgramError("cannot read MESSAGE from standard input: it is closed")
    return cast("io.BufferedReader", sys.stdin.buffer)


def check_text(message: bytes) -> None:
    """Raise ProgramError for a message that is no text."""
    if not is_utf8(message):
        raise ProgramError("MESSAGE on standard input is not UTF-8 text")


def check_size(size: int) -> None:
    """Raise ProgramError for a message of so many bytes if that is too large."""
    if token_size(size) > MAX_TOKEN_SIZE:
        raise ProgramError(f"MESSAGE has {size} bytes, too many for MQTT", "send parts of it")


def write_output(data: bytes) -> None:
    """Write to standard output, whole and at once: as it is, but for controls on a terminal."""
    if sys.stdout is None:
        raise ProgramError("cannot write to standard output: it is closed", is_final=True)
    try:
        if sys.stdout.isatty():
            data = visible(data.decode(errors="backslashreplace")).encode()
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
    except OSError as error:
        # Python would try to write the rest again at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        problem = f"cannot write to standard output: {error.strerror}"
        raise ProgramError(problem, is_final=True) from None


def say(text: str) -> None:
    """Write lines to standard error, if there is one; a peer may have chosen parts of them."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(visible(text), file=sys.stderr, flush=True)


def say_error(error: ProgramError) -> None:
    """Say what went wrong, and what to do about it."""
    say(f"{PROGRAM}: error: {error}")
    if error.hint:
        say(f"{PROGRAM}: hint: {error.hint}")
