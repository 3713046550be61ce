"""What can go wrong, in the user's words."""

from crypto import CryptoError

# What to do about a missing package; the README has the same command.
INSTALL = (
    "in the program's folder, run: python3 -m venv .venv && .venv/bin/pip install -q -r"
    " requirements.txt amqtt; then start it by .venv/bin/python secure_mqtt_client.py"
)


class ProgramError(Exception):
    """What went wrong and, as a hint, what to do about it, both in the user's words."""

    def __init__(self, message: str, hint: str = "", is_final: bool = False) -> None:
        """Take the texts; is_final: what no further attempt to connect can change."""
        super().__init__(message)
        self.hint = hint
        self.is_final = is_final


class UsageError(ProgramError):
    """The command line is wrong."""


class WorkerError(Exception):
    """A process of our own was ended."""


class UnusableError(CryptoError):
    """A message from a peer cannot be used; the text says why."""
