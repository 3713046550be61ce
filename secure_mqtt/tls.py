"""TLS with the broker, and why it failed."""

from __future__ import annotations

import contextlib
import re
import socket
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from secure_mqtt.certificates import has_expired
from secure_mqtt.errors import ProgramError, UsageError
from secure_mqtt.settings import Settings, read_file

if TYPE_CHECKING:  # loaded where it is used: --help and usage errors do not need it
    import ssl

PROBE_TIME = 1.0  # seconds to find out why TLS has failed


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


def describe(sock: Any) -> str:
    """Tell of a connection's TLS, for a person: its version, and the broker's certificate."""
    if not hasattr(sock, "getpeercert"):
        return "without TLS"
    version = sock.version().replace("v", " ")
    if not (certificate := sock.getpeercert()):  # which was not verified
        return f"with {version}, but the broker may be anybody: its certificate was not verified"
    names = ", ".join(repr(name) for _, name in certificate.get("subjectAltName", ()))
    issuer = dict(field for fields in certificate["issuer"] for field in fields)
    return (
        f"with {version}; the broker's certificate is for {names}, issued by"
        f" {issuer.get('commonName', 'an authority without a name')!r}, valid until"
        f" {certificate['notAfter']}"
    )


# Parts of what OpenSSL says, each with what it means and what to do.
TLS_PROBLEMS = {
    "unable to get|self.signed": (
        "its certificate comes from an unknown authority",
        "give the authority's certificate with --cafile",
    ),
    "certificate has expired": ("its certificate has expired", "it must be renewed there"),
    "not yet valid": ("its certificate is not valid yet", "check this machine's clock"),
    "mismatch": ("its certificate is for {names}, not for {host}", "check --host"),
    "verify failed": (
        "its certificate is not good ({reason})",
        "it must be for a server, and issued by the authority in --cafile",
    ),
    "alert certificate required": (
        "it wants a client certificate",
        "give one with --cert and --key",
    ),
}
# RFC 8446, 6.2, in OpenSSL's words: what a server says of a client's certificate.
CERTIFICATE_ALERTS = "alert (bad|unsupported|unknown ca|access denied|certificate)"


def tls_problem(settings: Settings) -> ProgramError | None:
    """Return the error if TLS with the broker fails: tries it, as paho does not pass alerts on."""
    try:
        reason, is_tls = handshake_failure(settings)
    except UsageError as error:  # a file has just become unusable
        return error
    if not reason:
        return None
    found = [words for pattern, words in TLS_PROBLEMS.items() if re.search(pattern, reason.lower())]
    problem, hint = found[0] if found else ending(reason, is_tls, bool(settings.cert))
    names = certified_names(settings) if "{names}" in problem else ""
    problem = problem.format(names=names, host=settings.host, reason=reason)
    return ProgramError(f"TLS failed with the broker on {settings.broker}: {problem}", hint)


def handshake_failure(settings: Settings) -> tuple[str, bool]:
    """Connect and try TLS.

    :return: why it fails, empty if it does not; and whether the broker speaks TLS at all
    :raises UsageError: a file cannot be used
    """
    context = tls_context(settings)
    begin = partial(
        context.wrap_socket, server_hostname=settings.host, do_handshake_on_connect=False
    )
    with (
        contextlib.suppress(OSError, ValueError),  # no connection, or a host that cannot be one
        socket.create_connection((settings.host, settings.port), PROBE_TIME) as plain,
        begin(plain) as tls,
    ):
        return shake_hands(tls)
    return "", False


def shake_hands(tls: ssl.SSLSocket) -> tuple[str, bool]:
    """Do as handshake_failure() does, on a connection."""
    try:
        tls.do_handshake()
        # With TLS 1.3 a server looks at our certificate when the handshake is over for us.
        return "" if tls.recv(1) else "closed", True
    except TimeoutError:
        return "", True
    except OSError as error:
        reason = re.sub(r"\[SSL.*?\] | \(_ssl.*\)", "", error.strerror or str(error))
        return reason, bool(tls.cipher())  # which the server has chosen


def ending(reason: str, is_tls: bool, has_certificate: bool) -> tuple[str, str]:
    """Return what it means that the broker ends the handshake for a reason, and what to do."""
    if not is_tls and " alert " not in reason:
        return "it does not speak TLS on this port", "check --port, or leave out the TLS options"
    if has_certificate and re.search(CERTIFICATE_ALERTS, reason):
        return (
            "it refuses our certificate ({reason})",
            "use a certificate that its authority has issued and that is valid now",
        )
    wish = "want a client certificate (--cert and --key)"
    if has_certificate:
        wish = "refuse our certificate"
    how = "({reason})" if " alert " in reason else "without a reason"
    return (
        f"it ends the connection {how}",
        f"it may {wish}, or speak other versions of TLS; its log says more",
    )


def certified_names(settings: Settings) -> str:
    """Return the names in the broker's certificate, for an error: asks the broker for it again."""
    import ssl

    from cryptography import x509

    with contextlib.suppress(Exception):  # whatever a stranger's certificate makes a parser raise
        pem = ssl.get_server_certificate((settings.host, settings.port), timeout=PROBE_TIME)
        certificate = x509.load_pem_x509_certificate(pem.encode())
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return ", ".join(repr(str(name.value)) for name in names)  # a stranger chose them
    return "another name"
