"""Where a shell's commands come from: a terminal, with a prompt and line editing, or a pipe."""

from __future__ import annotations

import contextlib
import shutil
import socket
import sys
import threading
from collections import deque
from collections.abc import Iterator
from types import ModuleType

from secure_mqtt.errors import ProgramError
from secure_mqtt.lines import InputLines
from secure_mqtt.topics.output import Output
from secure_mqtt.topics.publisher import check_size

PROMPT = "> "


class Pipe:
    """Commands from a pipe, one a line."""

    def __init__(self) -> None:
        self._input = InputLines(check_size, check_line=lambda line: None)
        self._lines: deque[bytes] = deque()
        self.has_ended = False
        self.fileno = self._input.fileno

    @property
    def fault(self) -> ProgramError | None:
        """Why there are no more, if not by themselves."""
        return self._input.fault

    def ask(self) -> bytes | None:
        """Return the next command; None: select() tells when to read() and ask again."""
        if self._lines and not self.has_ended:
            return self._lines.popleft()
        self.has_ended = self.has_ended or self._input.has_ended
        return None

    def read(self) -> None:
        """Take what has come."""
        self._lines.extend(self._input.read())

    @contextlib.contextmanager
    def torn(self) -> Iterator[None]:
        """Write something else in this block; nothing is in its way."""
        yield


class Terminal:
    """Commands that somebody types, with line editing where Python has it (readline)."""

    def __init__(self, output: Output) -> None:
        """Begin. output: the same terminal."""
        sys.stdin.reconfigure(errors="surrogateescape")  # type: ignore[union-attr]
        editor()
        self._output = output
        self.has_ended = False
        self.fault: ProgramError | None = None
        self._socket, self._theirs = socket.socketpair()
        self.fileno = self._socket.fileno
        self._is_wanted = threading.Event()
        self._is_asked = self._is_typing = False
        self._line: bytes | None = None
        threading.Thread(target=self._type, daemon=True).start()

    def ask(self) -> bytes | None:
        """Do as Pipe.ask() does; let a command be typed if there is none."""
        line, self._line = self._line, None
        if line is None and not self._is_asked:
            self._is_wanted.set()
        self._is_asked = line is None
        return line

    def read(self) -> None:
        """Take what was typed."""
        self.has_ended = self.has_ended or not self._socket.recv(1)

    def _type(self) -> None:
        with self._theirs, contextlib.suppress(EOFError):
            while self._is_wanted.wait():
                self._is_wanted.clear()
                self._is_typing = True
                line = input(PROMPT)
                self._is_typing = False
                self._line = line.encode(errors="surrogateescape")
                self._theirs.send(b"x")

    @contextlib.contextmanager
    def torn(self) -> Iterator[None]:
        """Write something else in this block, where somebody may be typing; then show that again.

        What was written before must be on the screen by then.
        """
        if not self._is_typing:
            yield
            return
        rows = (len(PROMPT) + len(typed())) // shutil.get_terminal_size().columns
        up = f"\x1b[{rows}A" if rows else ""
        self._output.put_raw(f"{up}\r\x1b[J".encode())
        self._output.flush()
        yield
        self._output.put_raw((PROMPT + typed()).encode())
        self._output.flush()


def editor() -> ModuleType | None:
    """Return the module for line editing, if Python has it."""
    with contextlib.suppress(ImportError):
        import readline

        return readline
    return None


def typed() -> str:
    """Return what is being typed."""
    readline = editor()
    return readline.get_line_buffer() if readline else ""


@contextlib.contextmanager
def terminal_as_it_was() -> Iterator[None]:
    """Leave the terminal as it is now: line editing changes it, and may be interrupted."""
    import termios

    attributes = termios.tcgetattr(sys.stdin)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, attributes)
