"""What is allowed, but unwise: warnings at the start."""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Iterator

from secure_mqtt.errors import UsageError
from secure_mqtt.settings import Settings, read_file

NOTICE_TIME = 14 * 86_400  # seconds before a certificate ends


def cautions(settings: Settings) -> Iterator[str]:
    """Yield what is unwise in the settings, and in the files that they name."""
    if settings.insecure:
        yield "--insecure: anyone between here and the broker can pose as it"
    secret = {"--key": settings.key, "--password-file": settings.password_file}
    signing = {"--identity": settings.identity}
    # A pipe, for one, is not read before it is needed: it can be read but once.
    for option, name in {**secret, **signing}.items():
        if os.path.isfile(name) and os.stat(name).st_mode & stat.S_IROTH:
            yield f"{option} {name} can be read by all users of this machine; run: chmod 600 {name}"
    for option, name in {"--cert": settings.cert, **signing}.items():
        end = end_of(option, name) if os.path.isfile(name) else 0
        if time.time() < end < time.time() + NOTICE_TIME:
            date = time.strftime("%Y-%m-%d", time.gmtime(end))
            yield f"{option} {name} ends on {date}; renew it"


def end_of(option: str, name: str) -> float:
    """Return when a certificate ends, in seconds since 1970; 0 if that can't be told."""
    from secure_mqtt.certificates import ends  # imports datetime, which a lab's request can spare

    with contextlib.suppress(ValueError, UsageError):  # then whoever needs it says so
        return ends(read_file(option, name))
    return 0
