"""A container engine for the tests: the one that is there, or one of their own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from conftest import SAFETY, wait_until

PACKAGES = ["debootstrap", "docker.io", "docker-compose", "iproute2"]
BASE, SUITE = "debian:bookworm-slim", "bookworm"  # the image that ours is built on
PATIENCE = 900.0  # seconds for what loads packages over the network
# What the slim image of Debian lacks, too.
SUPERFLUOUS = [
    *("usr/share/doc", "usr/share/info", "usr/share/locale", "usr/share/man"),
    *("var/cache/apt", "var/lib/apt/lists"),
]


class EngineError(Exception):
    """There is no engine, for the reason in the text."""


def run(*command: str | Path, seconds: float = PATIENCE, **options: object) -> str:
    """Run a command that must succeed; return its standard output."""
    result = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
        **options,  # type: ignore[call-overload]
    )
    assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
    return str(result.stdout)


def answers(*command: str) -> bool:
    """Tell whether a command is there and succeeds with a word on standard output."""
    if not shutil.which(command[0]):
        return False
    result = subprocess.run(command, capture_output=True, timeout=SAFETY)
    return not result.returncode and bool(result.stdout.strip())


def has_engine() -> bool:
    """Tell whether an engine answers."""
    return answers("docker", "info", "--format", "{{.ServerVersion}}")


def compose() -> list[str]:
    """Return the beginning of a command for compose: version 2 or, if there is none, 1."""
    for command in ["docker", "compose"], ["docker-compose"]:
        if answers(*command, "version"):
            return command
    raise EngineError("there is no docker compose")


@contextmanager
def engine() -> Iterator[list[str]]:
    """Provide an engine, named by DOCKER_HOST if it is not the usual one; the result is compose().

    :raises EngineError: that can't be done here
    """
    with ExitStack() as stack:
        if not has_engine():
            if os.geteuid() != 0 or not is_debian():
                raise EngineError("no container engine answers, and only root on Debian starts one")
            install()
            if not shutil.which("docker"):
                raise EngineError("Debian's docker.io brings no docker here")
            if not has_engine():  # which an installation may have started
                stack.enter_context(own_engine())
        yield compose()


def is_debian() -> bool:
    """Tell whether this is Debian itself: others' tools do not know its keys."""
    path = Path("/etc/os-release")
    return path.exists() and "ID=debian" in path.read_text().splitlines()


def install() -> None:
    """Install Debian's engine, unless it is there."""
    programs = ["debootstrap", "dockerd", "docker-compose", "ip"]
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    if not all(shutil.which(program, path=path) for program in programs):
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        run("apt-get", "update", "-qq", env=env)
        run("apt-get", "install", "-qq", "-y", "--no-install-recommends", *PACKAGES, env=env)


@contextmanager
def own_engine() -> Iterator[None]:
    """Run an engine that nobody else knows, with a base image made here: no registry is needed."""
    with tempfile.TemporaryDirectory(prefix="engine") as name, ExitStack() as stack:
        folder = Path(name)
        stack.callback(end_network)
        process = stack.enter_context(started(folder))
        before = os.environ.get("DOCKER_HOST")
        os.environ["DOCKER_HOST"] = f"unix://{folder}/socket"
        try:
            wait_until(lambda: has_engine() or process.poll() is not None)
            if process.poll() is not None:
                last = (folder / "log").read_text().splitlines()[-1]
                raise EngineError(f"no container engine answers, and none can be started: {last}")
            make_base(folder / "root")
            yield
        finally:
            os.environ.pop("DOCKER_HOST")
            if before:
                os.environ["DOCKER_HOST"] = before


@contextmanager
def started(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run dockerd, with all that it writes in a folder."""
    path = os.environ["PATH"] + ":/usr/sbin:/sbin"
    command = ["dockerd", "-H", f"unix://{folder}/socket"]
    for option in "data-root", "exec-root", "pidfile":
        command += [f"--{option}", f"{folder}/{option}"]
    with (folder / "log").open("wb") as log:
        env = {**os.environ, "PATH": path}
        process = subprocess.Popen(command, stdout=log, stderr=log, env=env)
    try:
        yield process
    finally:
        process.terminate()
        process.wait(SAFETY)


def end_network() -> None:
    """Remove the interface that an engine leaves behind."""
    if Path("/sys/class/net/docker0").exists():
        run("ip", "link", "delete", "docker0", seconds=SAFETY)


def make_base(root: Path) -> None:
    """Make the base image from Debian's packages, with the sources and authorities of here."""
    sources = Path("/etc/apt/sources.list.d/debian.sources")
    mirror = "http://deb.debian.org/debian"
    if sources.exists():
        [mirror, *_] = re.findall(r"(?m)^URIs: *(\S+)", sources.read_text())
    run("debootstrap", "--variant=minbase", SUITE, root, mirror)
    for name in SUPERFLUOUS:
        shutil.rmtree(root / name, ignore_errors=True)
    if sources.exists():
        shutil.copy(sources, root / "etc/apt/sources.list.d")
        (root / "etc/apt/sources.list").unlink(missing_ok=True)
    authorities = root / "usr/local/share/ca-certificates"
    authorities.mkdir(parents=True, exist_ok=True)
    for path in Path("/usr/local/share/ca-certificates").glob("*.crt"):
        shutil.copy(path, authorities)
    command = f"tar -C '{root}' -c . | docker import -c 'CMD [\"bash\"]' - {BASE}"
    run("bash", "-o", "pipefail", "-c", command)
    shutil.rmtree(root)


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._start = time.monotonic()

    def __call__(self) -> float:
        return time.monotonic() - self._start
