"""The start: what a request loads, and that what it loads later works as ever."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT, SAFETY, Mosquitto, error_lines, run

LOAD = "from secure_mqtt.connection import load_paho; load_paho(); "


def python(code: str, **environment: str) -> list[str]:
    """Return the words that a fresh Python prints, which finds the program's modules."""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=SAFETY,
    )
    assert (result.stderr, result.returncode) == ("", 0)
    return result.stdout.split()


def request_with(broker: Mosquitto, netid: str, *options: str, **env: str) -> set[str]:
    """Return the modules that a request loads, which must succeed."""
    env = {**os.environ, "PYTHONPROFILEIMPORTTIME": "1", **env}
    result = run("-p", str(broker.port), *options, netid, "reverse", "abc", env=env)
    assert (result.stdout, result.returncode) == (b"cba\n", 0), error_lines(result)
    return {line.rpartition("|")[2].strip() for line in error_lines(result).splitlines()}


@pytest.mark.usefixtures("responder")
@pytest.mark.parametrize("proxy", ["", "socks://127.0.0.1:9", "http://127.0.0.1:9"])
def test_a_request_loads_nothing_for_proxies_whatever_the_environment_says(
    proxy: str, broker: Mosquitto, netid: str, tmp_path: Path
) -> None:
    """Without PySocks, paho goes through no proxy."""
    (tmp_path / "socks.py").write_text("raise ImportError")
    names = {f"{kind}_proxy": proxy for kind in ("mqtt", "http", "all") if proxy}
    modules = request_with(broker, netid, PYTHONPATH=str(tmp_path), **names)
    assert "paho.mqtt.client" in modules
    assert not {"urllib.request", "urllib.error", "http.client"} & modules


def test_what_asks_for_the_postponed_module_gets_the_real_one() -> None:
    code = (
        f"{LOAD}import paho.mqtt.client as paho, sys; print('urllib.request' in sys.modules);"
        "print(paho.urllib.request.getproxies()['mqtt']); import urllib.request;"
        "print(paho.urllib.request is sys.modules['urllib.request'] is urllib.request);"
        "print(type(urllib.request).__name__)"
    )
    proxy = "socks://127.0.0.1:9"
    assert python(code, mqtt_proxy=proxy) == ["False", proxy, "True", "module"]


def test_it_can_be_imported_in_each_way_after_paho() -> None:
    for statement in (
        "import urllib.request",
        "import urllib.request as it; it.Request",
        "from urllib import request; request.Request",
        "from urllib.request import Request",
        "import importlib; importlib.import_module('urllib.request').Request",
    ):
        code = f"{LOAD}{statement}; import sys; print(sys.modules['urllib.request'].__spec__.name)"
        assert python(code) == ["urllib.request"]


def test_a_module_that_is_there_already_stays() -> None:
    code = f"import urllib.request as it; {LOAD}import urllib; print(urllib.request is it)"
    assert python(code) == ["True"]


def test_a_module_that_is_used_while_it_is_postponed_is_loaded_once() -> None:
    code = (
        "from secure_mqtt.postponed import postponed; import sys\n"
        "with postponed('urllib.request'):\n"
        "    import urllib.request; urllib.request.Request; it = sys.modules['urllib.request']\n"
        "print(it is sys.modules['urllib.request'] is urllib.request, it.__spec__.name)"
    )
    assert python(code) == ["True", "urllib.request"]


def relay(server: socket.socket, port: int, asked: list[bytes]) -> None:
    """Be a SOCKS proxy, version 5 (RFC 1928), for one connection, to a port of this machine."""
    client = server.accept()[0]
    with client, socket.create_connection(("127.0.0.1", port)) as broker:
        greeting = client.recv(2)
        client.recv(greeting[1])
        client.sendall(b"\x05\x00")  # no authentication
        asked.append(client.recv(262))
        client.sendall(b"\x05\x00\x00\x01\x7f\x00\x00\x01\x00\x00")
        back = threading.Thread(target=copy, args=(broker, client), daemon=True)
        back.start()
        copy(client, broker)
        back.join(SAFETY)


def copy(source: socket.socket, target: socket.socket) -> None:
    """Pass on what comes until there is no more."""
    try:
        while data := source.recv(65_536):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)
    except OSError:  # one end has closed it
        return


@pytest.mark.usefixtures("responder")
def test_with_pysocks_a_request_goes_through_the_proxy_of_the_environment(
    broker: Mosquitto, netid: str
) -> None:
    pytest.importorskip("socks")
    asked: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(SAFETY)
        thread = threading.Thread(target=relay, args=(server, broker.port, asked), daemon=True)
        thread.start()
        proxy = f"socks://127.0.0.1:{server.getsockname()[1]}"
        modules = request_with(broker, netid, "-h", "broker.example", mqtt_proxy=proxy)
        thread.join(SAFETY)
    assert {"socks", "urllib.error"} <= modules  # which urllib.request imports
    assert asked
    assert asked[0].endswith(broker.port.to_bytes(2, "big"))


def test_a_child_computes_while_the_request_loads_paho(tmp_path: Path) -> None:
    """The parent loads none of the library: what a child has loaded does not count for it."""
    report = tmp_path / "loaded"
    code = (
        "import os, sys, secure_mqtt_client as program\n"
        f"sys.argv[1:] = ['-p', '1', 'x', 'reverse', 'abc']\nstatus = program.main()\n"
        f"open({str(report)!r}, 'w').write(' '.join(sys.modules))\nos._exit(0)"
    )
    subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=SAFETY, check=True
    )
    modules = set(report.read_text().split())
    assert "paho.mqtt.client" in modules
    assert "cryptography" not in modules
