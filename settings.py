"""What the command line says, what is wrong with it, and the files that it names."""

from __future__ import annotations

import argparse
import contextlib
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn, TypeVar

from keys import KeyFileError, has_expired

if TYPE_CHECKING:  # loaded where they are used: --help and usage errors need none of them
    import logging
    import ssl

    from signatures import Authority, Identity

PROGRAM = "secure_mqtt_client.py"

T = TypeVar("T")


@functools.cache
def log() -> logging.Logger:
    """Return the program's logger."""
    import logging

    return logging.getLogger(PROGRAM)


class ProgramError(Exception):
    """What went wrong and, as a hint, what to do about it, both in the user's words."""

    def __init__(self, message: str, hint: str = "", is_final: bool = False) -> None:
        """Take the texts; is_final: what no further attempt to connect can change."""
        super().__init__(message)
        self.hint = hint
        self.is_final = is_final


class UsageError(ProgramError):
    """The command line is wrong."""


class Settings(argparse.Namespace):
    """What the command line says; the attributes have the options' names.

    Empty or zero is what was not given and has no default.
    """

    netid = ""  # for a responder: every NetID
    action = ""
    message: bytes | None = None  # UTF-8; None: standard input
    timeout = 0.0  # seconds
    suite = ""
    lines = False
    rekey = 0.0  # seconds
    respond = False
    status_topic = ""
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
    verbose = False

    @property
    def uses_tls(self) -> bool:
        """Whether any option turns TLS on."""
        return bool(self.cafile or self.tls or self.insecure or self.cert)

    @property
    def broker(self) -> str:
        """The broker, for messages."""
        return f"{self.host} port {self.port}"


def tls_context(settings: Settings) -> ssl.SSLContext:
    """Return a context for TLS 1.2 or newer, from the files as they are now.

    :raises UsageError: a file cannot be used
    """
    import ssl

    def refuse_password() -> NoReturn:
        raise UsageError("--key is encrypted; decrypt it: openssl pkey -in KEY -out NEW_KEY")

    names = {"--cafile": settings.cafile, "--cert": settings.cert, "--key": settings.key}
    contents = {option: read_file(option, name) for option, name in names.items() if name}
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    if settings.insecure:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    else:
        try:
            context = ssl.create_default_context(cafile=settings.cafile or None)
        except ssl.SSLError:
            raise UsageError(f"--cafile {settings.cafile} holds no certificate in PEM") from None
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if settings.cert:
        try:
            context.load_cert_chain(settings.cert, settings.key, refuse_password)
        except ssl.SSLError as error:
            reason = "belong to each other" if "MISMATCH" in str(error) else "hold PEM"
            raise UsageError(f"--cert and --key do not {reason}") from None
        with contextlib.suppress(ValueError):  # not in DER: then the broker will tell
            if has_expired(contents["--cert"]):
                raise UsageError(f"--cert {settings.cert} has expired; renew it")
    return context


def peer_security(settings: Settings) -> tuple[Identity | None, Authority | None]:
    """Return what --identity and --peer-ca name, from the files as they are now.

    :raises UsageError: a file cannot be used
    """
    if not settings.identity and not settings.peer_ca:
        return None, None
    from signatures import Authority, Identity

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


def read_file(option: str, name: str) -> bytes:
    """Return the content of a file that an option names. UsageError if there is none."""
    try:
        with open(name, "rb") as file:
            return file.read()
    except OSError as error:
        raise UsageError(f"cannot read {option} {name}: {error.strerror}") from None
