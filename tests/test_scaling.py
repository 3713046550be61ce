"""Several keepers share a broker."""

from __future__ import annotations

from pathlib import Path

import sharing
from conftest import Mosquitto, ResponderProcess
from keeping import COURSE, private_pem

TOPIC = "sensors/kitchen"


def test_keepers_with_names_of_their_own_share_a_broker(
    own_broker: Mosquitto, tmp_path: Path
) -> None:
    """Each has a topic of the same name; members say whose they mean."""
    with sharing.club(tmp_path / "club", own_broker) as club:
        identity = tmp_path / "second.pem"
        identity.touch(0o600)
        identity.write_bytes(private_pem(COURSE.member("second")))
        proof = "--identity", str(identity), "--peer-ca", str(tmp_path / "club" / "ca.pem")
        where = "-p", str(own_broker.port), "--keep", str(tmp_path / "second.db")
        second = ResponderProcess(*where, *proof)
        try:
            second.wait_for("ready")
            members = {"responder": "bob", "second": "carol"}
            for keeper, member in members.items():
                club.do("alice", "--peer-name", keeper, "create", TOPIC, member)
            for keeper, member in members.items():
                listed = club.do("alice", "--peer-name", keeper, "topics").decode()
                assert listed == f"{TOPIC}\talice\talice {member}\n"
                other = f"{TOPIC}/{keeper}"
                club.do("alice", "--peer-name", keeper, "create", other, member)
                club.do("alice", "--peer-name", keeper, "publish", other, keeper)
                told = club.do(member, "--peer-name", keeper, "subscribe", other, "-C", "1")
                assert told.decode() == f"{keeper}\n"
        finally:
            second.stop()
