"""What answers to pip install (PEP 517): the program is run where it lies, and not installed."""

from __future__ import annotations

from typing import NoReturn

REFUSAL = (
    "secure_mqtt_client.py is run where it lies, and not installed; what it needs is installed by:"
    " python3 -m pip install -r requirements.txt"
)


def build_wheel(*arguments: object) -> NoReturn:
    """Refuse."""
    raise SystemExit(REFUSAL)


build_sdist = build_editable = build_wheel
