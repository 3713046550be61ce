"""deploy/compose.yaml, brought up for real. It takes minutes, so it runs by -m containers only."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import containers
import pytest
from conftest import ROOT, SAFETY, copy_program, free_port, wait_until
from containers import Clock

pytestmark = [pytest.mark.containers, pytest.mark.xdist_group("containers")]

MAX_IMAGE = 260_000_000  # bytes
REQUESTS = 1000
SERVICES = ("broker", "proxy", "responder")


class Deployment:
    """The services, by way of compose."""

    def __init__(self, command: list[str], checkout: Path) -> None:
        file = checkout / "deploy/compose.yaml"
        project = f"test{os.getpid()}"
        self._command = [*command, "--project-name", project, "--file", str(file)]
        self.env = {**os.environ, "PROXY_PORT": str(free_port())}

    def compose(self, *arguments: str) -> str:
        """Run compose, which must succeed; return its standard output."""
        return containers.run(*self._command, *arguments, env=self.env)

    def attempt(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run compose, which may fail."""
        return subprocess.run(
            [*self._command, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=containers.PATIENCE,
            env=self.env,
        )

    def client(self, *words: str) -> str:
        """Run the program in a container of its own; return its standard output."""
        return self.attempt("run", "--rm", "-T", "client", *words).stdout

    def ask(self, *options: str) -> str:
        """Send a request; return the answer, empty if none came."""
        return self.client(*options, "alice", "uppercase", "hello")

    def session(self) -> subprocess.Popen[str]:
        """Begin a session in a container of its own."""
        words = ["-W", "15", "--suite", "x25519", "--lines", "alice", "uppercase", "-"]
        return subprocess.Popen(
            [*self._command, "run", "--rm", "-T", "client", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=self.env,
        )

    def container(self, service: str) -> str:
        """Return the ID of a service's container."""
        return self.compose("ps", "-q", service).strip()

    def inspect(self, service: str, what: str) -> str:
        """Return what the engine tells of a service's container."""
        return containers.run("docker", "inspect", "-f", what, self.container(service)).strip()

    def inside(self, service: str, *command: str) -> str:
        """Run a command in a service's container."""
        return containers.run("docker", "exec", self.container(service), *command)

    def certificates(self, *arguments: str) -> str:
        """Make certificates."""
        return self.compose("run", "--rm", "-T", "certificates", *arguments)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the image is made of, with modes as strict as some have them."""
    folder = tmp_path_factory.mktemp("checkout")
    copy_program(folder)
    for name in "dhparam4096.pem", "requirements.txt":
        shutil.copy(ROOT / name, folder)
    for name in "broker", "deploy":
        shutil.copytree(ROOT / name, folder / name)
    for path in [*folder.rglob("*"), folder]:
        path.chmod(path.stat().st_mode & 0o500)
    return folder


@pytest.fixture(scope="module")
def deployment(checkout: Path, report: Callable[[str], None]) -> Iterator[Deployment]:
    """All of it, up; also when the port was taken at first."""
    clock = Clock()
    try:
        with containers.engine() as command:
            deployment = Deployment(command, checkout)
            report(f"an engine and a base image after {clock():.0f} s")
            try:
                deployment.compose("build", "certificates")
                report(f"the image after {clock():.0f} s")
                up_where_the_port_was_taken(deployment)
                report(f"up after {clock():.0f} s")
                yield deployment
            finally:
                deployment.compose("--profile", "client", "down", "-v", "--remove-orphans")
    except containers.EngineError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def report(pytestconfig: pytest.Config) -> Callable[[str], None]:
    """Tell a person what took how long."""
    capture = pytestconfig.pluginmanager.getplugin("capturemanager")

    def say(text: str) -> None:
        with capture.global_and_fixture_disabled():
            print(f"\n{Path(__file__).name}: {text}", flush=True)

    return say


def up_where_the_port_was_taken(deployment: Deployment) -> None:
    port = deployment.env["PROXY_PORT"]
    with socket.create_server(("127.0.0.1", int(port))):
        failed = deployment.attempt("up", "-d")
    assert failed.returncode
    assert port in failed.stderr
    assert "in use" in failed.stderr
    deployment.compose("up", "-d")


def test_a_request_is_answered_soon_after_all_were_stopped(
    deployment: Deployment, report: Callable[[str], None]
) -> None:
    assert deployment.ask() == "HELLO\n"
    deployment.compose("stop")
    clock = Clock()
    deployment.compose("up", "-d")
    assert deployment.ask() == "HELLO\n"
    report(f"from up to the first answer: {clock():.1f} s")
    assert clock() < SAFETY


@pytest.mark.usefixtures("deployment")
def test_the_image_is_small(report: Callable[[str], None]) -> None:
    size = containers.run("docker", "image", "inspect", "-f", "{{.Size}}", "secure-mqtt-client")
    report(f"the image has {int(size) / 1e6:.0f} MB")
    assert int(size) < MAX_IMAGE


def test_each_service_sees_its_own_keys_only(deployment: Deployment) -> None:
    keys = {
        service: set(deployment.inside(service, "ls", "/etc/secure-mqtt").split())
        for service in SERVICES
    }
    own = {f"{name}.{end}" for name in ("responder", "health") for end in ("crt", "key", "pem")}
    assert keys == {
        "broker": {"ca.crt", "broker.internal.crt", "broker.internal.key"},
        "proxy": set(),
        "responder": {"ca.crt", *own},
    }
    for service in SERVICES:
        assert deployment.inside(service, "find", "/keys", "-type", "f") == ""


@pytest.mark.parametrize("service", SERVICES)
def test_a_service_can_do_nothing_that_it_need_not(deployment: Deployment, service: str) -> None:
    status = deployment.inside(service, "cat", "/proc/1/status")
    values = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert set(values["Uid"].split()) == {"1884"}
    assert {int(values[name], 16) for name in ("CapPrm", "CapEff", "CapBnd")} == {0}
    assert values["NoNewPrivs"].strip() == "1"
    assert deployment.inspect(service, "{{.HostConfig.ReadonlyRootfs}}") == "true"


def test_a_second_up_changes_nothing(deployment: Deployment) -> None:
    def state() -> list[str]:
        what = "{{.Id}} {{.State.Pid}}"
        shown = [deployment.inspect(service, what) for service in SERVICES]
        return [*shown, deployment.inside("responder", "cat", "/etc/secure-mqtt/responder.crt")]

    before = state()
    deployment.compose("up", "-d")
    assert state() == before


@pytest.mark.parametrize("service", SERVICES)
def test_after_a_service_was_killed_requests_are_answered_again(
    deployment: Deployment, service: str, report: Callable[[str], None]
) -> None:
    assert deployment.ask() == "HELLO\n"
    os.kill(int(deployment.inspect(service, "{{.State.Pid}}")), signal.SIGKILL)
    clock = Clock()
    wait_until(lambda: deployment.ask("-W", "3") == "HELLO\n")
    report(f"{service} killed: an answer after {clock():.1f} s")


def test_what_was_published_outlasts_the_keepers_end(deployment: Deployment) -> None:
    topic = "shared/news"
    assert deployment.compose("run", "--rm", "-T", "client", "alice", "create", topic) == ""
    assert deployment.compose("run", "--rm", "-T", "client", "alice", "publish", topic, "one") == ""
    os.kill(int(deployment.inspect("responder", "{{.State.Pid}}")), signal.SIGKILL)
    wait_until(lambda: deployment.client("-W", "5", "-C1", "alice", "subscribe", topic) == "one\n")


def test_all_certificates_are_renewed_while_requests_go_on(
    deployment: Deployment, report: Callable[[str], None]
) -> None:
    serials = shown(deployment)
    with deployment.session() as session:
        assert session.stdin
        assert session.stdout
        count = 0
        renewal = threading.Thread(target=renew, args=(deployment,))
        while count < REQUESTS or renewal.is_alive():
            if count == REQUESTS // 10:
                renewal.start()
            session.stdin.write(f"request {count}\n")
            session.stdin.flush()
            assert session.stdout.readline() == f"REQUEST {count}\n"
            count += 1
        session.stdin.close()
    assert session.returncode == 0
    report(f"all certificates renewed during {count} requests, none lost")
    assert not serials & shown(deployment)
    log = deployment.compose("logs", "--no-color", "responder")
    assert "event=unchanged" not in log
    assert deployment.ask() == "HELLO\n"


def renew(deployment: Deployment) -> None:
    """Renew all, and have them used."""
    deployment.certificates("--renew", "alice")
    times = deployment.compose("logs", "--no-color", "responder").count("event=ready")
    deployment.compose("kill", "-s", "HUP", "broker", "responder")
    wait_until(
        lambda: deployment.compose("logs", "--no-color", "responder").count("event=ready") > times
    )


def shown(deployment: Deployment) -> set[str]:
    """Return the certificates that the services have."""
    paths = {"broker": "broker.internal", "responder": "responder"}
    return {
        deployment.inside(service, "cat", f"/etc/secure-mqtt/{name}.crt")
        for service, name in paths.items()
    }


def test_a_certificate_that_ends_soon_is_renewed_by_the_next_up(deployment: Deployment) -> None:
    deployment.compose(
        *("run", "--rm", "-T", "--entrypoint", "openssl", "certificates"),
        *("req", "-x509", "-new", "-key", "/keys/authority/health.key", "-subj", "/CN=health"),
        *("-days", "1", "-out", "/keys/authority/health.crt"),
    )
    before = deployment.inside("responder", "cat", "/etc/secure-mqtt/health.crt")
    deployment.compose("up", "-d")
    wait_until(
        lambda: deployment.inside("responder", "cat", "/etc/secure-mqtt/health.crt") != before
    )
    checks = "{{json .State.Health}}"
    last = json.loads(deployment.inspect("responder", checks))["Log"][-1]["End"]
    wait_until(
        lambda: json.loads(deployment.inspect("responder", checks))["Log"][-1]["End"] != last
    )
    health = json.loads(deployment.inspect("responder", checks))
    assert health["Status"] == "healthy"
    assert health["Log"][-1]["Output"] == "OK\n"
