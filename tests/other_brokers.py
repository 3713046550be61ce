"""Brokers of several kinds, as tests start them: on loopback, each in a folder of its own.

Their settings are those that docs/brokers.md shows, with other ports and folders.
"""

from __future__ import annotations

import os
import queue
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import NamedTuple

import paho.mqtt.client as paho
from conftest import ROOT, SAFETY, BrokerProcess, free_port, wait_until
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.reasoncodes import ReasonCode

PAGE = ROOT / "docs" / "brokers.md"
PORT, STORE = "1884", "/var/lib"  # in the settings on the page
INSTALLED = ROOT / ".brokers"  # what comes from PyPI and npm
# Debian's /usr/sbin/rabbitmq-server would change the user, who may not enter our folder.
PLACES = [INSTALLED / "bin", Path(sys.executable).parent, "/usr/lib/rabbitmq/bin", "/usr/sbin"]
PATH = os.pathsep.join(map(str, [*PLACES, os.environ["PATH"]]))
# One scheduler a node, as the machine has other things to do; its nodes talk on loopback only.
ERLANG = {
    "ERL_FLAGS": '+S 1:1 +SDcpu 1:1 +SDio 2 +A 1 -kernel inet_dist_use_interface "{127,0,0,1}"',
    "ERL_EPMD_ADDRESS": "127.0.0.1",
    "HOME": "{folder}/..",  # for the secret that the nodes of a cluster share
}


class Kind(NamedTuple):
    """A kind of broker. {folder}, {port}, {nodes} and {epmd} are one broker's own."""

    program: str
    file: str  # its settings
    arguments: Sequence[str]
    env: Mapping[str, str] = {}
    files: Mapping[str, str] = {}  # others that it needs
    needs: str = ""  # a file that shows that it is installed, if the program alone does not
    login: tuple[str, str] | None = None


KINDS = {
    "mosquitto": Kind("mosquitto", "mosquitto.conf", ["-c", "{folder}/mosquitto.conf"]),
    "RabbitMQ": Kind(
        "rabbitmq-server",
        "rabbitmq.conf",
        [],
        ERLANG
        | {
            "ERL_EPMD_PORT": "{epmd}",
            "RABBITMQ_NODENAME": "n{port}@localhost",
            "RABBITMQ_DIST_PORT": "{nodes}",
            "RABBITMQ_CONFIG_FILE": "{folder}/rabbitmq.conf",
            "RABBITMQ_ENABLED_PLUGINS_FILE": "{folder}/plugins",
            "RABBITMQ_MNESIA_BASE": "{folder}",
            "RABBITMQ_LOGS": "-",
            "RABBITMQ_ALLOW_INPUT": "1",  # so no shell stays in between
            "RABBITMQ_SERVER_START_ARGS": "-noinput",
        },
        {"plugins": "[rabbitmq_mqtt]."},
    ),
    "ejabberd": Kind(
        "erl",
        "ejabberd.yml",
        ["-noinput", "-mnesia", "dir", '"{folder}/mnesia"', "-s", "ejabberd"],
        ERLANG
        | {
            "EJABBERD_CONFIG_PATH": "{folder}/ejabberd.yml",
            "EJABBERD_LOG_PATH": "{folder}/ejabberd.log",
            "ERL_LIBS": "/usr/lib/x86_64-linux-gnu",
        },
        needs="/usr/sbin/ejabberdctl",
        login=("anybody@localhost", "any"),
    ),
    "NATS": Kind("nats-server", "nats.conf", ["-c", "{folder}/nats.conf"]),
    "aedes": Kind(
        "node",
        "aedes.mjs",
        ["{folder}/aedes.mjs"],
        needs=str(INSTALLED / "node_modules" / "aedes"),
    ),
    "amqtt": Kind("amqtt", "amqtt.yaml", ["-c", "{folder}/amqtt.yaml"]),
    "rumqttd": Kind("iotcore", "rumqttd.toml", ["--config", "{folder}/rumqttd.toml"]),
}


def settings_of(name: str) -> str:
    """Return the settings that the page shows for a kind of broker."""
    part = re.search(rf"(?ms)^### {name}$.*?^```\w+\n(.*?)^```$", PAGE.read_text(encoding="utf-8"))
    assert part, name
    return part[1]


def is_installed(kind: Kind) -> bool:
    """Tell whether a kind of broker can be started here."""
    return bool(shutil.which(kind.program, path=PATH)) and Path(kind.needs).exists()


class Broker(BrokerProcess):
    """A broker of some kind, on a port of its own."""

    def __init__(self, name: str, folder: Path, epmd: int = 0) -> None:
        """Write its settings.

        :param epmd: the port of Erlang's names, if it needs them
        """
        self.kind = KINDS[name]
        self.port = free_port()
        self.folder = folder
        self._values = {
            "{folder}": str(folder),
            "{port}": str(self.port),
            "{nodes}": str(free_port()),
            "{epmd}": str(epmd),
        }
        env = {key: self._filled(value) for key, value in self.kind.env.items()}
        self.env = os.environ | env | {"PATH": PATH}
        settings = settings_of(name).replace(PORT, str(self.port)).replace(STORE, str(folder))
        for file, content in {**self.kind.files, self.kind.file: settings}.items():
            (folder / file).write_text(content)
        (folder / "node_modules").symlink_to(INSTALLED / "node_modules")  # where node looks

    def _filled(self, text: str) -> str:
        for name, value in self._values.items():
            text = text.replace(name, value)
        return text

    def start(self) -> None:
        """Start it, and wait until it accepts an MQTT connection."""
        with (self.folder / "output.log").open("ab") as log:
            self.process = subprocess.Popen(
                [self.kind.program, *map(self._filled, self.kind.arguments)],
                env=self.env,
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            wait_until(lambda: listens(self.port) or self.process.poll() is not None)
            assert self.process.poll() is None, self.log()
            wait_for_broker(self.port, self.kind.login)
        except BaseException:
            self.kill()
            raise

    def log(self) -> str:
        """Return all that it has written."""
        return "".join(path.read_text(errors="replace") for path in self.folder.glob("*.log"))


def listens(port: int) -> bool:
    """Tell whether something listens on a port."""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port)):
        return True
    return False


def wait_for_broker(port: int, login: tuple[str, str] | None) -> None:
    """Wait until a broker accepts an MQTT connection; one may listen some time before."""
    answers: queue.Queue[ReasonCode] = queue.Queue()
    client = paho.Client(CallbackAPIVersion.VERSION2)
    client.on_connect = lambda _c, _u, _f, reason, _p: answers.put(reason)
    if login:
        client.username_pw_set(*login)
    client.connect_async("127.0.0.1", port)
    client.loop_start()  # which connects until it succeeds
    try:
        assert not answers.get(timeout=SAFETY).is_failure
    finally:
        client.disconnect()
        client.loop_stop()


@contextmanager
def erlang_names() -> Iterator[int]:
    """Run Erlang's port mapper, by which nodes find each other; yields its port."""
    program, port = shutil.which("epmd"), free_port()
    assert program
    env = os.environ | {"ERL_EPMD_ADDRESS": "127.0.0.1", "ERL_EPMD_PORT": str(port)}
    with subprocess.Popen([program], env=env, stdin=subprocess.DEVNULL) as process:
        try:
            wait_until(lambda: listens(port))
            yield port
        finally:
            process.kill()


@contextmanager
def running(name: str, folder: Path) -> Iterator[Broker]:
    """Run a broker until the end of the block."""
    needs_names = "ERL_EPMD_PORT" in KINDS[name].env
    with erlang_names() if needs_names else nullcontext(0) as epmd:
        broker = Broker(name, folder, epmd)
        broker.start()
        try:
            yield broker
        finally:
            broker.kill()
