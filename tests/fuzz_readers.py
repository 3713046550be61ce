"""Fuzz what reads a peer's bytes: python tests/fuzz_readers.py -max_total_time=600

Guided by coverage, with atheris (python -m pip install atheris; it needs Clang's libFuzzer, which
its wheels for Linux bring along). Only the declared errors may come out.
"""

import contextlib
import sys
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

with atheris.instrument_imports():
    import crypto
    from crypto import PeerKeyError, from_der, from_pem, to_der, to_pem
    from secure_mqtt.suites import SUITES, HybridClient, Transcript, X25519Client, suite_of

KEY = bytes(range(32))
CLIENTS = HybridClient(), X25519Client()


def read(data: bytes) -> None:
    """Give the same bytes to each reader, raw and wrapped so that they get further."""
    for payload in data, to_pem(b"PUBLIC KEY", data):
        with contextlib.suppress(PeerKeyError):
            suite_of(payload)
        for client in CLIENTS:
            with contextlib.suppress(PeerKeyError):
                client.agree(Transcript("netid", client.blocks, payload))
        for suite in (suite for suite in SUITES.values() if not suite.is_slow):
            with contextlib.suppress(PeerKeyError):
                suite.responder(payload)
    with contextlib.suppress(crypto.TokenError):
        crypto.decrypt(data, KEY)
    with contextlib.suppress(ValueError):
        value = from_der(data)
        assert to_der(value) == data


def seeds(folder: Path) -> None:
    """Write valid inputs to begin from."""
    public_keys = [suite.client().blocks for suite in SUITES.values()]
    ders = [from_pem(b"PUBLIC KEY", key) for key in public_keys]
    answers = [suite_of(client.blocks).responder(client.blocks).blocks for client in CLIENTS]
    examples = *public_keys, *ders, *answers, crypto.encrypt(b"text", KEY)
    for number, example in enumerate(examples):
        (folder / str(number)).write_bytes(example)


if __name__ == "__main__":
    corpus = Path(sys.argv[0]).with_name(".fuzz-corpus")
    corpus.mkdir(exist_ok=True)
    seeds(corpus)
    atheris.Setup([*sys.argv, "-max_len=66000", str(corpus)], read)
    atheris.Fuzz()
