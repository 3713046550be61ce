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

GROUP = crypto.read_group()
KEY = bytes(range(crypto.KEY_SIZE))


def read(data: bytes) -> None:
    """Give the same bytes to each reader, raw and wrapped so that they get further."""
    with contextlib.suppress(crypto.PeerKeyError):
        crypto.read_public_key(data, GROUP)
    with contextlib.suppress(crypto.PeerKeyError):
        crypto.read_public_key(crypto.to_pem(b"PUBLIC KEY", data), GROUP)
    with contextlib.suppress(crypto.TokenError):
        crypto.decrypt(data, KEY)
    with contextlib.suppress(ValueError):
        value = crypto.from_der(data)
        assert crypto.to_der(value) == data


def seeds(folder: Path) -> None:
    """Write valid inputs to begin from."""
    public_key = crypto.KeyPair(GROUP).public_key
    examples = public_key, crypto.from_pem(b"PUBLIC KEY", public_key), crypto.encrypt(b"text", KEY)
    for number, example in enumerate(examples):
        (folder / str(number)).write_bytes(example)


if __name__ == "__main__":
    corpus = Path(sys.argv[0]).with_name(".fuzz-corpus")
    corpus.mkdir(exist_ok=True)
    seeds(corpus)
    atheris.Setup([*sys.argv, "-max_len=66000", str(corpus)], read)
    atheris.Fuzz()
