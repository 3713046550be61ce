"""Fuzz what judges signed key exchanges: python tests/fuzz_verifier.py -max_total_time=600

Guided by coverage, with atheris, as fuzz_readers.py is. The inputs are certificates that are good,
changed in their DER, and mostly issued anew by the authority that is trusted, as mutants.py has it.
"""

import contextlib
import sys
import warnings
from pathlib import Path
from random import Random

import atheris

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

with atheris.instrument_imports():
    import mutants

SEEDS = mutants.seeds()


def change(data: bytes, max_size: int, number: int) -> bytes:
    """Return an input for libFuzzer that is another one changed."""
    random = Random(number)
    if random.random() < 0.1:
        return bytes(atheris.Mutate(data, max_size))
    with contextlib.suppress(ValueError):  # what libFuzzer has changed may not be DER
        return mutants.mutant(data, random)[:max_size]
    return mutants.mutant(random.choice(SEEDS), random)


def judge(data: bytes) -> None:
    """Judge an input."""
    if data:
        mutants.judge(data)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    corpus = Path(sys.argv[0]).with_name(".fuzz-verifier-corpus")
    corpus.mkdir(exist_ok=True)
    for number, seed in enumerate(SEEDS):
        (corpus / str(number)).write_bytes(seed)
    options = "-max_len=20000", "-timeout=10", str(corpus)
    atheris.Setup([*sys.argv, *options], judge, custom_mutator=change)
    atheris.Fuzz()
