"""The lab's names: topics, NetIDs and the six actions, with what a responder does for each."""

from __future__ import annotations

import re
from collections.abc import Callable

# The topics: {NetID}/{action}/request and …/response.
REQUEST, RESPONSE = "{}/{}/request", "{}/{}/response"
KEY_EXCHANGE = "key-exchange"  # the exchange's action
MAX_TEXT = 2**20  # bytes of a text that our responder transforms
# One level of a topic. Brokers may close the connection at a control character (3.1.1, 1.5.3), and
# a $ in front hides it from the responder's wildcard (4.7.2).
NETID = re.compile(r"(?!\$)[^/+#\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,64}")


def shuffle(text: str) -> str:
    """Return the characters in random order."""
    import random  # here, since --help need not wait for it

    return "".join(random.sample(text, len(text)))


def drop_and_double(text: str) -> str:
    """Return the characters, each of them dropped, kept or doubled at random."""
    import random

    return "".join(character * random.randint(0, 2) for character in text)


TRANSFORMATIONS: dict[str, Callable[[str], str]] = {
    "uppercase": str.upper,
    "lowercase": str.lower,
    "title-case": str.title,
    "reverse": lambda text: text[::-1],
    "shuffle": shuffle,
    "random": drop_and_double,
}
ACTIONS = tuple(TRANSFORMATIONS)
# What a member of shared topics can do; no actions, and so none of their names either.
COMMANDS = ("create", "admit", "remove", "topics", "publish", "subscribe", "shell")
