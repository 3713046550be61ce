"""Why there is no connection to the broker, or none any more, in the user's words."""

from __future__ import annotations

import socket
from collections.abc import Sequence

from secure_mqtt.errors import ProgramError
from secure_mqtt.settings import Settings
from secure_mqtt.tls import tls_problem

# What is being waited for, from the start to the first subscription.
CONNECTING, CONNACK, SUBACK = "TCP connection", "CONNACK", "SUBACK"
# Bytes. A broker ends the connection of who sends more than it takes; the least that one takes,
# unless it is told otherwise, is 8092 (Moquette).
LARGE_MESSAGE = 8000
# Characters of a NETID for which the topics of some brokers have no room: RabbitMQ's are words of
# AMQP 0-9-1, which "." separates and "*" stands for; NATS admits no blank, and before 2.10 no ".".
UNUSUAL = " .*"


def refusal(settings: Settings, reason: str) -> ProgramError:
    """Return the error for a CONNACK that says no, for a reason."""
    is_login = reason in ("bad user name or password", "not authorized")
    hints = {
        "unsupported protocol version": "use a broker that speaks MQTT 3.1.1",
        "client identifier not valid": "choose another with --id",
        "server unavailable": "try again later",
    }
    hint = hints.get(reason, "ask whoever runs it, or check --host and --port")
    return ProgramError(
        f"the broker on {settings.broker} refuses the connection: {reason}",
        login_hint(settings) if is_login else hint,
        is_final=is_login,
    )


def login_hint(settings: Settings) -> str:
    """Return what to do when a broker does not admit us, which depends on what we have shown."""
    login = "--username and --password-file"
    if settings.password is not None:
        return f"the password may be wrong, or the user unknown: check {login}"
    if settings.username:
        return f"no password was given: check {login}"
    if settings.cert:
        return f"it may want {login}, or not admit the name in --cert"
    return f"it may want {login}, or --cert and --key"


def refused_topics(settings: Settings, topics: Sequence[str]) -> ProgramError:
    """Return the error for a SUBACK that says no to some topics."""
    return ProgramError(
        f"the broker on {settings.broker} refuses the subscription to {' and '.join(topics)}",
        f"its access rules may not allow this NETID{unusual(settings.netid)}",
        is_final=True,
    )


def unusual(netid: str) -> str:
    """Return what to add to a hint if some brokers do not pass a NETID on, or nothing."""
    if not set(UNUSUAL) & set(netid):
        return ""
    return "; some brokers do not pass on a NETID with a blank, . or *: try another"


def explain(error: Exception, stage: str, settings: Settings, size: int = 0) -> ProgramError:
    """Return the error for the end of a connection, which depends on how far it got.

    :param error: what paho or the system has raised
    :param stage: what was being waited for
    :param size: of the largest message on its way to the broker, in bytes; 0: none was
    """
    if isinstance(error, ProgramError):
        return error
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if stage not in (CONNECTING, CONNACK):
        return loss(settings, stage, size, reason)
    if settings.uses_tls and (problem := tls_problem(settings)):
        return problem
    if stage == CONNACK:
        return silence(settings, stage, f"no CONNACK came ({reason})")
    if isinstance(error, socket.gaierror | UnicodeError):
        return ProgramError(
            f"cannot find the host {settings.host!r}: {reason}",
            "check --host, and that this machine is online",
        )
    if isinstance(error, ConnectionRefusedError):
        return ProgramError(
            f"connection refused: nothing listens on {settings.broker}",
            f"start a broker there (mosquitto -p {settings.port}), or check --host and --port",
        )
    return silence(settings, stage, reason)


def loss(settings: Settings, stage: str, size: int, reason: str) -> ProgramError:
    """Return the error for a connection that had been accepted; the rest as in explain()."""
    problem = f"the connection to {settings.broker} was lost while waiting for {stage}"
    hint = f"another client may have the client ID {settings.id!r}; choose one with --id"
    if size >= LARGE_MESSAGE:
        problem += f", with a message of {size:,} bytes on its way"
        hint = f"the broker may take no packet as large as that (max_packet_size); else, {hint}"
    return ProgramError(f"{problem}: {reason}", hint)


def silence(settings: Settings, stage: str, reason: str) -> ProgramError:
    """Return the error for a broker that does not say what it should.

    :param stage: what was being waited for
    """
    if stage == CONNECTING:
        return ProgramError(
            f"cannot connect to {settings.broker}: {reason}",
            "check --host and --port, and whether a firewall is in between",
        )
    if stage == CONNACK:
        tls = "" if settings.uses_tls else ", and a TLS port needs --cafile or --tls"
        return ProgramError(
            f"no MQTT broker answers on {settings.broker}: {reason}",
            f"check --port; the broker must speak MQTT 3.1.1{tls}",
        )
    return ProgramError(
        f"the broker on {settings.broker} does not go on: {reason}",
        "try again, or look at the broker's log",
    )
