"""What a service manager is told, as sd_notify(3) of systemd has it."""

from __future__ import annotations

import contextlib
import os
import socket
import time


def notify(state: str) -> None:
    """Tell the service manager that started us, if it wants to know, of a change.

    It is never waited for: if nobody reads, the word is lost.

    :param state: such as READY=1
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return
    if address.startswith("@"):  # an abstract one
        address = "\0" + address[1:]
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.setblocking(False)
        sock.sendto(state.encode(), address)


def notify_reloading() -> None:
    """Tell it that the files are read again; READY=1 must follow, whatever comes of that."""
    microseconds = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    notify(f"RELOADING=1\nMONOTONIC_USEC={microseconds}")
