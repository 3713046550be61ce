"""What was probably meant, where the command line is wrong. Imported only then."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from difflib import get_close_matches

from secure_mqtt.errors import UsageError

WITH_DASH = "put -- before a MESSAGE that begins with a dash"
PASSWORD_OPTIONS = "-P", "--pw", "--password"  # of mosquitto's clients, or likely to be tried
SUGGESTIONS = 3  # names at most


def suggestion(word: str, names: Collection[str]) -> str:
    """Return a hint at the names that a word was probably meant to be; empty if there is none."""
    word = word.lower()
    begun = [name for name in names if len(word) > len("--") and name.startswith(word)]
    bare = {name.lstrip("-"): name for name in names}  # dashes make nothing alike
    meant = begun or [bare[name] for name in get_close_matches(word.lstrip("-"), bare, 1)]
    return f"did you mean {' or '.join(meant[:SUGGESTIONS])}?" if meant else ""


def unknown_option(argument: str, options: Collection[str]) -> UsageError:
    """Return the error for an argument that is no option. What follows its name may be secret."""
    name = argument.partition("=")[0] if argument.startswith("--") else argument[:2]
    hint = suggestion(name, options) or f"--help lists the options; {WITH_DASH}"
    if name in PASSWORD_OPTIONS:
        hint = "others can read a command line: give a password in a file, with --password-file"
    return UsageError(f"there is no option {name}", hint)


def dash_hint(problem: str, arguments: Sequence[str]) -> str:
    """Return a hint if one of the arguments may be a text that was taken for options.

    :param problem: what is wrong with them
    """
    at_fault = re.match(r"argument (-\w)?", problem)  # argparse names the option
    option = at_fault[1] if at_fault else "-[A-Za-z]"
    if not option:  # one that is no single letter
        return ""
    is_text = any(re.match(f"{option}[A-Za-z]", each) for each in arguments)
    is_last = len(arguments) > 2 and re.match(option, arguments[-1])
    return WITH_DASH if is_text or is_last else ""
