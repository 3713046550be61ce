"""The lines of a session: read from standard input, sent, and answered in their order."""

from __future__ import annotations

import socket
import threading
from collections import deque
from collections.abc import Callable, Iterator

from secure_mqtt.errors import ProgramError
from secure_mqtt.streams import check_size, check_text, is_utf8, standard_input

CHUNK_SIZE = 2**16  # bytes, read from standard input at a time
WINDOW_BYTES = 2**20  # of the lines sent, but not answered yet; one alone may have more


class InputLines:
    """The lines of standard input, also for select(), which does not take files everywhere."""

    def __init__(
        self,
        check_size: Callable[[int], None] = check_size,
        check_line: Callable[[bytes], None] = check_text,
    ) -> None:
        """Begin to read.

        :param check_size: raises ProgramError for a line of too many bytes
        :param check_line: likewise for a whole line that can't be sent
        """
        self._check_size, self._check_line = check_size, check_line
        self._socket, copy = socket.socketpair()
        self.fileno = self._socket.fileno
        self._rest = bytearray()  # a line of which more is to come
        self.has_ended = False
        self.fault: ProgramError | None = None  # why it has, if not by itself
        threading.Thread(target=self._copy, args=[copy], daemon=True).start()

    def _copy(self, copy: socket.socket) -> None:
        with copy:
            try:
                while data := standard_input().read1(CHUNK_SIZE):
                    copy.sendall(data)
            except ProgramError as error:
                self.fault = error
            except OSError as error:
                self.fault = ProgramError(f"cannot read standard input: {error.strerror}")

    def read(self) -> list[bytes]:
        """Return the lines that have come, up to the first that can't be sent."""
        data = self._socket.recv(CHUNK_SIZE)
        self.has_ended = not data
        first, *others = data.split(b"\n")
        self._rest += first
        if self.has_ended and self._rest:  # the last line may lack its end
            others = [b""]
        lines = []
        try:
            for start in others:
                self._check_size(len(self._rest))
                self._check_line(bytes(self._rest))
                lines.append(bytes(self._rest))
                self._rest = bytearray(start)
            self._check_size(len(self._rest))  # whose end may never come
        except ProgramError as error:
            self.fault, self.has_ended = error, True
        return lines


class Window:
    """The lines that were read, but not answered, and the answers that came before their turn."""

    def __init__(self, size: int) -> None:
        """Begin with line 1; size: of how many lines may be on their way."""
        self._size = size
        self._lines: deque[bytes] = deque()
        self.first = 1  # the number of the first of them
        self.sent = self.sent_bytes = 0  # of them
        self._alone_until = 1  # the number of the first line that need not go alone
        self._answers: dict[int, bytes] = {}  # by line number

    def __len__(self) -> int:
        return len(self._lines)

    def has_room(self) -> bool:
        """Tell whether more lines shall be read."""
        return len(self._lines) < self._size

    def has_more(self) -> bool:
        """Tell whether there are lines that were not sent."""
        return self.sent < len(self._lines)

    def add(self, lines: list[bytes]) -> None:
        """Take lines that were read."""
        self._lines += lines

    def send(self) -> Iterator[tuple[int, bytes]]:
        """Yield the lines that may be sent now, as sent, each after its number."""
        size = 1 if self.first < self._alone_until else self._size
        while self.sent < min(size, len(self._lines)):
            line = self._lines[self.sent]
            if self.sent and self.sent_bytes + len(line) > WINDOW_BYTES:
                break
            self.sent += 1
            self.sent_bytes += len(line)
            yield self.first + self.sent - 1, line

    def send_alone(self) -> None:
        """From now on let one line at a time go, until all are answered that went already."""
        self._alone_until = max(self._alone_until, self.first + self.sent)

    def send_again(self) -> None:
        """Begin again with the first line that has no answer."""
        self.sent = self.sent_bytes = 0
        self._answers.clear()

    def answer(self, number: int, text: bytes) -> None:
        """Keep the answer to a line until its turn comes."""
        self._answers[number] = text

    def due_answers(self) -> list[bytes]:
        """Return the answers whose turn it is, up to the first that is not one line."""
        texts: list[bytes] = []
        while is_line(text := self._answers.get(self.first + len(texts), b"\n")):
            texts.append(text)
        return texts

    def finish(self, count: int) -> None:
        """Forget so many lines, whose answers were printed."""
        for _ in range(count):
            del self._answers[self.first]
            self.sent_bytes -= len(self._lines.popleft())
            self.sent -= 1
            self.first += 1

    def check(self) -> None:
        """Raise ProgramError if the first line has an answer that can't be printed."""
        if self.first in self._answers:
            raise ProgramError("the response is not one line of UTF-8 text", is_final=True)


def is_line(text: bytes) -> bool:
    """Tell whether bytes are one line of UTF-8 text, without its end."""
    return is_utf8(text) and b"\n" not in text
