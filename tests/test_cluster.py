"""More than one machine: the broker is a cluster, whose nodes are killed one after the other."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import sharing
from conftest import ROOT, SAFETY, ResponderProcess, free_port, wait_until
from other_brokers import KINDS, PATH, Broker, erlang_names, is_installed, listens
from test_lines import resumes

pytestmark = [
    pytest.mark.brokers,
    pytest.mark.skipif(
        not is_installed(KINDS["RabbitMQ"]),
        reason="RabbitMQ is not installed: docs/brokers.md says how to",
    ),
]
TOPIC = "sensors/kitchen"
SIZE = 3  # nodes: RabbitMQ's table of client IDs needs a majority of them


def policy() -> list[str]:
    """Return the command that the page shows: by it, all nodes have a copy of each queue."""
    page = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    command = re.search(r"(?m)^rabbitmqctl .*$", page)
    assert command
    return shlex.split(command[0])


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[list[Broker]]:
    """A cluster of RabbitMQ."""
    folders = [tmp_path / str(number) for number in range(SIZE)]
    for folder in folders:
        folder.mkdir()
    with ExitStack() as stack:
        epmd = stack.enter_context(erlang_names())
        brokers = [Broker("RabbitMQ", folder, epmd) for folder in folders]
        discovery = "cluster_formation.peer_discovery_backend = classic_config\n" + "".join(
            f"cluster_formation.classic_config.nodes.{number} = {broker.env['RABBITMQ_NODENAME']}\n"
            for number, broker in enumerate(brokers, 1)
        )
        for broker in brokers:
            with (broker.folder / broker.kind.file).open("a") as file:
                file.write(discovery)
            broker.start()
            stack.callback(broker.kill)
        subprocess.run(policy(), env=brokers[0].env, check=True, timeout=SAFETY)
        yield brokers


@contextmanager
def balanced(folder: Path, nodes: list[Broker]) -> Iterator[int]:
    """Run NGINX in front of nodes; it takes the first one that is there. Yields its port."""
    port = free_port()
    first, *others = [f"server 127.0.0.1:{broker.port} max_fails=0" for broker in nodes]
    upstream = f"{first}; " + "".join(f"{other} backup; " for other in others)
    config = folder / f"nginx-{port}.conf"
    module = Path("/usr/lib/nginx/modules/ngx_stream_module.so")  # Debian's
    config.write_text(
        f"{f'load_module {module};' if module.exists() else ''}\n"
        f"daemon off; master_process off; pid {folder}/{port}.pid; error_log stderr;\n"
        f"events {{ }}\n"
        f"stream {{\n upstream nodes {{ {upstream} }}\n"
        f" server {{ listen 127.0.0.1:{port}; proxy_pass nodes; }}\n}}\n"
    )
    program = shutil.which("nginx", path=PATH)
    assert program
    with (folder / "nginx.log").open("ab") as log:
        process = subprocess.Popen([program, "-c", config, "-p", folder], stderr=log)
    try:
        wait_until(lambda: listens(port) or process.poll() is not None)
        yield port
    finally:
        process.kill()
        process.wait(SAFETY)


def test_a_session_loses_no_line_when_the_nodes_of_client_and_responder_are_killed(
    cluster: list[Broker], tmp_path: Path, start_responder: Callable[..., ResponderProcess]
) -> None:
    first, second, _ = cluster
    with (
        balanced(tmp_path, cluster) as clients,
        balanced(tmp_path, cluster[1:] + cluster[:1]) as responders,
    ):
        responder = start_responder("-p", str(responders))

        def interrupt() -> None:
            second.kill()
            responder.wait_for("ready", 2)
            second.start()
            first.kill()

        resumes(clients, "alice", "x25519", interrupt)


def test_a_topic_loses_no_line_when_the_nodes_of_all_who_use_it_are_killed(
    cluster: list[Broker], tmp_path: Path
) -> None:
    lines = [f"line {number}\n".encode() for number in range(3000)]
    with ExitStack() as stack:
        # The node of the publisher, of the subscriber and of the keeper.
        orders = [cluster[number:] + cluster[:number] for number in range(SIZE)]
        ports = [stack.enter_context(balanced(tmp_path, order)) for order in orders]
        alices, bobs, keepers = (["-p", str(port)] for port in ports)
        club = stack.enter_context(sharing.club(tmp_path / "club", cluster[0], *keepers))
        club.do("alice", "create", TOPIC, "bob", "--history", str(len(lines)))
        bob = club.subscribe("bob", TOPIC, *bobs)
        alice = club.start("alice", "--lines", "publish", TOPIC, "-", *alices)
        for number, killed in enumerate(cluster):
            alice.write(b"".join(lines[number::SIZE]))
            killed.restart()
        # She is there until all has come: what is published while keeper and subscriber are away,
        # she sends again when the keeper is back.
        assert bob.wait_for_lines(len(lines)) == [
            line for number in range(SIZE) for line in lines[number::SIZE]
        ]
        alice.end_input()
        assert alice.wait() == 0
        assert all("ing again" in note for note in alice.notes), alice.notes
