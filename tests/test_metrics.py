"""The status of a responder as metrics: deploy/mqtt-exporter.yaml, and the exporter itself."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, Mosquitto, Peer, ResponderProcess, free_port, run, wait_until
from keeping import keeper_options

Start = Callable[..., ResponderProcess]
Connect = Callable[..., Peer]
CONFIG = ROOT / "deploy/mqtt-exporter.yaml"
TOPIC = "status/responder"
EXPORTER = "prometheus-mqtt-exporter"


def names(status: dict[str, object], above: str = "") -> set[str]:
    """Return the names of all values, as the exporter wants them."""
    found = set()
    for name, value in status.items():
        deeper = names(value, f"{above}{name}.") if isinstance(value, dict) else {above + name}
        found |= deeper
    return found


def test_all_that_the_status_tells_is_a_metric(
    own_broker: Mosquitto, start_responder: Start, peer: Connect, tmp_path: Path
) -> None:
    watcher = peer(own_broker.port, TOPIC)
    options = keeper_options(tmp_path / "keeper", own_broker.port)
    responder = start_responder(*options, f"--status-topic={TOPIC}")
    status: dict[str, object] = {}

    def is_whole() -> bool:
        status.update(json.loads(watcher.receive(TOPIC)))
        responder.process.send_signal(signal.SIGHUP)  # it counts topics later
        return "topics" in status

    wait_until(is_whole)
    shown = set(re.findall(r"(?m)^ *mqtt_name: (\S+)$", CONFIG.read_text()))
    sums = {"exchanges", "requests", "failures"}  # of others
    assert shown == names(status) - sums


def exporter_config(folder: Path, port: int) -> Path:
    """Write the configuration for a broker without TLS."""
    text = CONFIG.read_text().replace("ssl://mqtt.example.edu:8883", f"tcp://127.0.0.1:{port}")
    path = folder / "exporter.yaml"
    path.write_text(re.sub(r"(?m)^  (ca_cert|client_cert|client_key): .*\n", "", text))
    return path


def metrics(port: int) -> dict[str, float]:
    """Return what the exporter shows."""
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
        lines = answer.read().decode().splitlines()
    found = (re.match(r"(secure_mqtt_\w+)\{(.*?)\} (\S+)", line) for line in lines)
    return {f"{each[1]} {each[2]}": float(each[3]) for each in found if each}


@pytest.mark.skipif(not shutil.which(EXPORTER), reason=f"there is no {EXPORTER}")
def test_debians_exporter_shows_what_was_counted_and_when_a_responder_is_gone(
    own_broker: Mosquitto, start_responder: Start, peer: Connect, tmp_path: Path
) -> None:
    responder = start_responder(f"-p{own_broker.port}", f"--status-topic={TOPIC}")
    port, label = free_port(), f'sensor="responder",topic="{TOPIC}"'
    of_suite = f'sensor="responder",suite="x25519",topic="{TOPIC}"'
    config = exporter_config(tmp_path, own_broker.port)
    options = ["-config", str(config), "-listen-address", "127.0.0.1", "-listen-port", str(port)]
    with (tmp_path / "log").open("wb") as log:
        exporter = subprocess.Popen([EXPORTER, *options], stdout=log, stderr=log)
    try:
        wait_until(lambda: b"Listening on" in (tmp_path / "log").read_bytes())
        wait_until(lambda: metrics(port).get(f"secure_mqtt_online {label}") == 1)
        for _ in range(2):
            arguments = [f"-p{own_broker.port}", "--suite=x25519", "alice", "reverse", "text"]
            assert run(*arguments).stdout == b"txet\n"
        responder.process.send_signal(signal.SIGHUP)  # hence it publishes its status again
        wait_until(lambda: metrics(port).get(f"secure_mqtt_requests_total {of_suite}") == 2)
        assert metrics(port)[f"secure_mqtt_exchanges_total {of_suite}"] == 2
        responder.process.kill()
        wait_until(lambda: metrics(port).get(f"secure_mqtt_online {label}") == 0)
    finally:
        exporter.terminate()
        exporter.wait(60)
