"""What --local brings: a broker and, for a request, a responder."""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
from collections.abc import Iterator
from typing import Any

from secure_mqtt.connection import LOOP_INTERVAL
from secure_mqtt.errors import INSTALL, ProgramError
from secure_mqtt.log import log
from secure_mqtt.responder import DRAINING_TIME, Responder
from secure_mqtt.settings import Settings


@contextlib.contextmanager
def local_broker(settings: Settings) -> Iterator[None]:
    """Run an MQTT broker in a thread, where the settings say.

    Port 0 stands for a free one, which is put into the settings. If they have a password, the
    broker admits only who knows it: others use this machine, too.
    """
    import asyncio
    import logging

    try:
        from amqtt.broker import Broker as AmqttBroker
        from amqtt.errors import AMQTTError, BrokerError
    except ImportError:
        raise ProgramError("--local needs the package amqtt", INSTALL) from None
    logging.getLogger("amqtt").setLevel(logging.CRITICAL + 1)  # what matters is said here
    settings.port = settings.port or free_port(settings.host)
    listener = {"type": "tcp", "bind": f"{settings.host}:{settings.port}"}
    config = {"listeners": {"default": listener}, "plugins": plugins(settings)}
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    async def start() -> Any:
        broker = AmqttBroker(config)
        await broker.start()
        return broker

    try:
        broker = asyncio.run_coroutine_threadsafe(start(), loop).result()
    except (AMQTTError, BrokerError) as error:
        raise ProgramError(
            f"the local broker cannot listen on {settings.broker}: {error}", "choose another port"
        ) from None
    try:
        yield
    finally:
        asyncio.run_coroutine_threadsafe(broker.shutdown(), loop).result()
        loop.call_soon_threadsafe(loop.stop)
        thread.join(LOOP_INTERVAL)


def free_port(host: str) -> int:
    """Return a TCP port of a host that, for a moment, nobody else takes."""
    with socket.create_server((host, 0)) as server:
        return int(server.getsockname()[1])


def plugins(settings: Settings) -> dict[str, dict[str, Any]]:
    """Return what decides whom the broker admits, as amqtt wants it."""
    if settings.password is None:
        return {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}}
    return {"secure_mqtt.local_login.LoginPlugin": {"password": settings.password.decode()}}


@contextlib.contextmanager
def local_services(settings: Settings) -> Iterator[None]:
    """Run a broker and a responder for a request, and put into the settings how to reach them."""
    settings.host, settings.port = "127.0.0.1", 0
    settings.username, settings.password = "local", secrets.token_hex().encode()
    ready = threading.Event()
    its_settings = Settings(
        netid=settings.netid,
        host=settings.host,
        username=settings.username,
        password=settings.password,
        timeout=settings.timeout,
    )
    responder = Responder(its_settings, on_ready=ready.set)

    def run() -> None:
        try:
            responder.run()
        except ProgramError as error:
            log().warning("the responder of --local has ended: %s", error)
        ready.set()

    with local_broker(settings):
        its_settings.port = settings.port
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            ready.wait(settings.timeout)
            yield
        finally:
            responder.stop()
            thread.join(DRAINING_TIME)
