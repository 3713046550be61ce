"""The file that --config names: options, one a line."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

from secure_mqtt.errors import UsageError
from secure_mqtt.settings import read_file

MAX_CONFIG_SIZE = 65_536  # bytes; a line for each option is far less
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # some editors begin UTF-8 with it
# As on the command line, but the dashes may be left out, and nothing is quoted.
LINE = re.compile(r"(?:--?)?([A-Za-z][\w-]*)(?:[ \t]*(=|[ \t])[ \t]*(.*))?")
NOT_FOR_FILES = "--config", "--help", "--version"  # a file that names another might never end


def read_config(
    name: str, known: Collection[str], check: Callable[[list[str]], object]
) -> list[str]:
    """Return the options in a file, as arguments of a command line.

    :param known: all options, with their dashes
    :param check: raises UsageError for arguments that are wrong
    :raises UsageError: the file cannot be read, or a line of it is wrong, which is named
    """
    lines = read_file("--config", name, MAX_CONFIG_SIZE).removeprefix(BYTE_ORDER_MARK).split(b"\n")
    options = []

    def read(number: int, line: bytes) -> None:
        try:
            if option := option_of(line, known):
                check([option])
                options.append(option)
        except UsageError as error:
            raise UsageError(f"--config {name} line {number}: {error}", error.hint) from None

    for number, line in enumerate(lines, 1):
        read(number, line)
    return options


def option_of(line: bytes, known: Collection[str]) -> str:
    """Return the option in a line, as an argument; empty if there is none."""
    try:
        text = line.decode().strip(" \t\r")
    except UnicodeDecodeError:
        raise UsageError("must be UTF-8 text") from None
    if not text or text.startswith("#"):
        return ""
    match = LINE.fullmatch(text)
    if not match or "\0" in text:
        raise UsageError("must be an option and its value, or a comment after #")
    name, separator, value = match.groups()
    option = f"-{name}" if len(name) == 1 else f"--{name}"
    if option in NOT_FOR_FILES:
        raise UsageError(f"{option} must be on the command line")
    if option not in known:
        from secure_mqtt.hints import unknown_option

        raise unknown_option(option, known)
    return f"{option}={value}" if separator else option
