"""The shell: a member that does as it is told, command by command."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from secure_mqtt.errors import ProgramError, UsageError
from secure_mqtt.settings import Settings
from secure_mqtt.streams import is_typed, say_error
from secure_mqtt.topics.commands import refusal, table
from secure_mqtt.topics.enquiries import Enquiries
from secure_mqtt.topics.member import Part
from secure_mqtt.topics.order import Received
from secure_mqtt.topics.output import Notes, for_people, in_a_line
from secure_mqtt.topics.prompt import Pipe, Terminal, terminal_as_it_was
from secure_mqtt.topics.publication import Publication
from secure_mqtt.topics.requests import write_request
from secure_mqtt.topics.subscribing import SubscribingMember
from secure_mqtt.topics.subscription import Subscription
from secure_mqtt.topics.usage import HISTORY, check_number, checked_member, checked_topic

if TYPE_CHECKING:
    from secure_mqtt.signatures import Authority, Identity

HELP = b"""\
create TOPIC [MEMBER...]  make a topic, for you and the MEMBERs
admit TOPIC MEMBER...     let MEMBERs in
remove TOPIC MEMBER...    keep MEMBERs out
topics                    list your topics: name, owner, members
publish TOPIC TEXT...     send a message
subscribe TOPIC           show what others publish
unsubscribe TOPIC         show it no more, and forget the key
help                      print this
exit                      end, as at the end of the input
"""


class Command(NamedTuple):
    """What the keeper is to do."""

    do: str
    values: tuple[Any, ...]  # of the request's fields

    def __bytes__(self) -> bytes:
        """Return the request."""
        return write_request(self.do, *self.values)


def command_of(name: str, words: list[str]) -> Command:
    """Return what a command that was typed means. UsageError if a word is wrong."""
    check_number(name, words)
    values: list[Any] = []
    if words:
        values += [checked_topic(words[0]), [checked_member(word) for word in words[1:]]]
    if name == "create":
        values.append(HISTORY)
    return Command("list" if name == "topics" else name, tuple(values))


class Errand:
    """A command to the keeper, which is given again until it is answered: that does no harm."""

    def __init__(self, enquiries: Enquiries, command: Command) -> None:
        """Give the command."""
        self._enquiries = enquiries
        self.answer: Any = None
        self.refusal: str | None = None
        self.failed(command)

    def failed(self, command: Command) -> None:
        """Do as Asker.failed() does."""
        self._enquiries.ask(self, command)

    def answered(self, command: Command, answer: Any) -> None:
        """Do as Asker.answered() does."""
        self.answer = answer

    def refused(self, command: Command, words: str) -> None:
        """Do as Asker.refused() does."""
        self.refusal = words


Finished = Callable[[], bool]  # tells whether a command has; ProgramError: it has failed


class Shell(SubscribingMember):
    """Does what commands say, one after the other; meanwhile it shows messages."""

    def __init__(
        self, settings: Settings, enquiries: Enquiries, identity: Identity, authority: Authority
    ) -> None:
        """Begin to read commands."""
        super().__init__(settings, enquiries, [], Notes())
        self._identity, self._authority = identity, authority
        self._publications: dict[str, Publication] = {}
        self.is_terminal = self._output.is_terminal and is_typed()
        self._source: Terminal | Pipe = Terminal(self._output) if self.is_terminal else Pipe()
        self._format = in_a_line if self._output.is_terminal else for_people
        self._has_finished: Finished = always
        self._failures = 0

    @property
    def is_idle(self) -> bool:
        """Whether nothing is waited for."""
        return self._has_finished is always

    def surroundings(self) -> AbstractContextManager[None]:
        """Return what shall be around run()."""
        return terminal_as_it_was() if self.is_terminal else nullcontext()

    def check(self) -> None:
        """Raise ProgramError if something has failed, and nobody was there to see it."""
        if self._source.fault:
            raise self._source.fault
        if self._failures and not self.is_terminal:
            raise ProgramError(f"commands that failed: {self._failures}")

    def _is_done(self) -> bool:
        return self._source.has_ended and self.is_idle and not self._output

    def _go_on(self) -> None:
        super()._go_on()
        with self._attempt():
            if self._has_finished():
                self._has_finished = always
        # What was shown before must be on the screen when there is a prompt below it.
        while self.is_idle and not self._output and (line := self._source.ask()) is not None:
            with self._attempt():
                self._do(line)

    def _things(self) -> tuple[list[Any], list[Any]]:
        inputs, outputs = super()._things()
        # Commands that come while nobody reads what they print shall not pile up.
        is_reading = self.is_idle and not self._output and not self._source.has_ended
        return [*inputs, self._source] if is_reading else inputs, outputs

    def _handle(self, thing: Any) -> None:
        if thing is self._source:
            thing.read()
        else:
            super()._handle(thing)

    @contextmanager
    def _attempt(self) -> Iterator[None]:
        """Go on with a command in this block, or say why it fails; then it has ended."""
        try:
            yield
        except ProgramError as error:
            self._has_finished = always
            self._fail(error)

    def _fail(self, error: ProgramError) -> None:
        self._failures += 1
        with self._source.torn():
            say_error(error)

    def _show(self, message: Received) -> bool:
        with self._source.torn():
            return super()._show(message)

    def _say_notes(self) -> None:
        with self._source.torn():
            super()._say_notes()

    def _refuse(self, part: Part) -> None:
        self._forget(part)
        self._fail(refusal(self._settings, part.refusal, part.topic))

    def _forget(self, part: Part) -> None:
        self._parts.remove(part)
        self._enquiries.forget(part)
        parts: dict[str, Any] = self._subscribed if part.is_subscribed else self._publications
        del parts[part.topic]

    def _do(self, line: bytes) -> None:
        """Begin with a command. ProgramError if it is none, or its words are wrong."""
        name, _, rest = line.decode(errors="surrogateescape").strip().partition(" ")
        if not name:
            return
        if name not in COMMANDS:
            raise ProgramError(f"there is no command {name[:80]!r}", "help lists the commands")
        self._has_finished = COMMANDS[name](self, name, rest.lstrip(" "))

    def _order(self, name: str, rest: str) -> Finished:
        command = command_of(name, rest.split())
        return partial(self._has_answer, Errand(self._enquiries, command))

    def _has_answer(self, errand: Errand) -> bool:
        if errand.refusal is not None:
            raise refusal(self._settings, errand.refusal)
        if isinstance(errand.answer, list):
            self._output.put(table(errand.answer))
        return errand.answer is not None

    def _publish(self, name: str, rest: str) -> Finished:
        topic, _, text = rest.partition(" ")
        check_number(name, [topic, text] if topic and text else [])
        if topic not in self._publications:
            part = Publication(self._settings, self._identity, checked_topic(topic))
            self._publications[topic] = part
            self._parts.append(part)
        part = self._publications[topic]
        part.add(text.encode(errors="surrogateescape"))
        return lambda: part.is_done or part not in self._parts  # refused, and said so

    def _subscribe(self, name: str, rest: str) -> Finished:
        topic = only_topic(name, rest)
        if topic in self._subscribed:
            return always
        part = Subscription(self._settings, self._authority, topic, self._notes)
        self._subscribed[topic] = part
        self._parts.append(part)
        try:
            self._mqtt.subscribe(topic)
        except ProgramError as error:
            if error.is_final:  # else it is done on the next connection
                self._forget(part)
            raise
        return lambda: part.has_begun() or part not in self._parts  # refused, and said so

    def _unsubscribe(self, name: str, rest: str) -> Finished:
        topic = only_topic(name, rest)
        if topic not in self._subscribed:
            raise ProgramError(f"not subscribed to {topic[:80]!r}")
        self._mqtt.unsubscribe(topic)
        self._forget(self._subscribed[topic])
        return always

    def _help(self, name: str, rest: str) -> Finished:
        self._output.put(HELP)
        return always

    def _exit(self, name: str, rest: str) -> Finished:
        self._source.has_ended = True
        return always


def always() -> bool:
    """Tell that there is nothing to wait for."""
    return True


def only_topic(name: str, rest: str) -> str:
    """Return the topic that follows a command. UsageError if it is wrong, or not all."""
    words = rest.split()
    if len(words) != 1:
        raise UsageError(f"{name} takes: TOPIC")
    return checked_topic(words[0])


COMMANDS: dict[str, Callable[[Shell, str, str], Finished]] = {
    **dict.fromkeys(("create", "admit", "remove", "topics"), Shell._order),
    "publish": Shell._publish,
    "subscribe": Shell._subscribe,
    "unsubscribe": Shell._unsubscribe,
    "help": Shell._help,
    "exit": Shell._exit,
}
