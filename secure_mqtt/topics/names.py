"""Which names topics and their members can have."""

from __future__ import annotations

import re

ACTION = "topic"  # in the names of the exchange's topics
MAX_MEMBERS = 10_000  # of a topic
MAX_HISTORY = 100_000  # messages of a topic that are kept
# 1 to 63 letters, digits and inner hyphens (RFC 1034, 3.5; RFC 1123, 2.1).
DNS_LABEL = r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
MEMBER = re.compile(DNS_LABEL)  # a NetID that a certificate can name
TOPIC = re.compile(r"(?!\$)[^+#\x00-\x1f\x7f-\x9f\ud800-\udfff]+")
MAX_TOPIC_SIZE = 512  # bytes
RESERVED_ENDS = "/request", "/response"  # of the lab's topics


def is_topic(text: str) -> bool:
    """Tell whether a topic can be shared."""
    return (
        TOPIC.fullmatch(text) is not None
        and len(text.encode()) <= MAX_TOPIC_SIZE
        and not text.endswith(RESERVED_ENDS)
    )
