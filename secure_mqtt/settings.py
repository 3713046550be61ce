"""What the command line says, and the files that it names."""

from __future__ import annotations

import argparse
import copy
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from crypto import KeyFileError
from secure_mqtt.errors import UsageError

if TYPE_CHECKING:  # loaded where they are used: --help and usage errors need none of them
    from secure_mqtt.signatures import Authority, Identity

DEFAULT_PEER_NAME = "responder"  # in a responder's certificate
T = TypeVar("T")


class Settings(argparse.Namespace):
    """What the command line says; the attributes have the options' names.

    Empty or zero is what was not given and has no default.
    """

    netid = ""  # for a responder: every NetID
    action = ""
    command = ""  # one of COMMANDS, or none
    topics: Sequence[str] = ()
    members: Sequence[str] = ()  # to create a topic with, to admit or to remove
    history: int | None = None  # messages to be kept, or to be shown of these; None: all
    json = False
    count = 0  # messages until subscribe ends
    message: bytes | None = None  # UTF-8, if for a request; None: standard input
    timeout = 0.0  # seconds
    is_patient = False  # whether it goes on for ever, since no timeout was given
    suite = ""
    lines = False
    rekey = 0.0  # seconds
    respond = False
    status_topic = ""
    keep = ""  # the keeper's file
    rotate = 0.0  # seconds
    host = ""
    port = 0
    id = ""
    local = False
    identity = ""
    peer_ca = ""
    peer_name = ""
    cafile = ""
    tls = False
    insecure = False
    cert = ""
    key = ""
    username = ""
    password_file = ""
    password: bytes | None = None
    config: list[str] | None = None  # files' names
    verbose = False

    @property
    def uses_tls(self) -> bool:
        """Whether any option turns TLS on."""
        return bool(self.cafile or self.tls or self.insecure or self.cert)

    @property
    def lasts(self) -> bool:
        """Whether it waits for ever for broker and keeper, once they were there, and says so."""
        return self.is_patient or self.command == "shell"

    def given(self, *options: str) -> list[str]:
        """Return which of some options were given, with their dashes, before defaults are put in.

        :param options: the names of their attributes
        """
        names = (name for name in options if getattr(self, name) != getattr(Settings, name))
        return [f"--{name.replace('_', '-')}" for name in names]

    @property
    def broker(self) -> str:
        """The broker, for messages."""
        return f"{self.host} port {self.port}"


def peer_files(settings: Settings) -> tuple[bytes, bytes]:
    """Return the contents of --identity and --peer-ca, as they are now; empty if not given.

    :raises UsageError: a file cannot be used
    """
    peer_security(settings)
    files = ("--identity", settings.identity), ("--peer-ca", settings.peer_ca)
    identity, authority = (read_file(*file) if file[1] else b"" for file in files)
    return identity, authority


def peer_security(settings: Settings) -> tuple[Identity | None, Authority | None]:
    """Return what --identity and --peer-ca name, from the files as they are now.

    :raises UsageError: a file cannot be used
    """
    if not settings.identity and not settings.peer_ca:
        return None, None
    from secure_mqtt.signatures import Authority, Identity

    def read(option: str, name: str, kind: Callable[[bytes], T]) -> T | None:
        try:
            return kind(read_file(option, name)) if name else None
        except KeyFileError as error:
            raise UsageError(f"{option} {name} {error}") from None

    identity = read("--identity", settings.identity, Identity)
    if identity and not settings.respond and settings.netid not in identity.names:
        raise UsageError(
            f"--identity {settings.identity} is for {', '.join(identity.names)!r}, not for NETID"
            f" {settings.netid!r}"
        )
    return identity, read("--peer-ca", settings.peer_ca, Authority)


def read_file(option: str, name: str, max_size: int = -1) -> bytes:
    """Return the content of a file that an option names.

    :param max_size: in bytes; negative: any
    :raises UsageError: there is none, or it is larger
    """
    try:
        with open(name, "rb") as file:
            content = file.read(max_size + 1 if max_size >= 0 else -1)
    except OSError as error:
        raise UsageError(f"cannot read {option} {name}: {error.strerror}") from None
    if 0 <= max_size < len(content):
        raise UsageError(f"{option} {name} must be no larger than {max_size} bytes")
    return content


def client_id(settings: Settings) -> str:
    """Return the client ID for who was given none, after NetID and login are known.

    The lab wants the NetID. Where a broker knows its clients by other means, a part that nobody can
    guess lets several use a NetID at once, and none throw another off.
    """
    if settings.respond:
        return ""  # it takes one for each connection
    if settings.cert or settings.username or settings.command:
        return f"{settings.netid}-{os.urandom(8).hex()}"
    return settings.netid


def for_connection(settings: Settings) -> Settings:
    """Return a responder's settings for a new connection: a client ID, the password as it is now.

    :raises UsageError: the password can't be read
    """
    own = copy.copy(settings)
    # Since the NetID is the client's. Every broker takes 23 characters of these (3.1.1, 3.1.3.1).
    own.id = settings.id or f"responder{os.urandom(4).hex()}"
    if settings.password_file not in ("", "-"):
        own.password = read_password(settings.password_file)
    return own


def read_password(name: str) -> bytes:
    """Return the password in a file, without the end of its line. UsageError: it can't be read."""
    return read_file("--password-file", name).removesuffix(b"\n").removesuffix(b"\r")
