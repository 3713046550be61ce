"""Sessions of many lines: whatever happens, each answer is printed once, in its place."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import conftest
import pytest
from conftest import (
    PROGRAM,
    SAFETY,
    Mosquitto,
    Peer,
    ResponderProcess,
    Run,
    error_lines,
    free_port,
    processes_below,
    run,
    wait_until,
)
from endurance import endurance
from hostile import (
    LATENESS,
    PUBACK,
    PUBLISH,
    QOS_0,
    Link,
    Packet,
    PassOn,
    all_at_once,
    changed_program,
    impatient_program,
    in_thread,
    lab_responder,
    publish,
    relay,
)

import crypto
from secure_mqtt.session import MAX_KEYS, NUMBERED, pace_of
from secure_mqtt.suites import SUITES, Transcript, suite_of

Connect = Callable[..., Peer]
Responders = Callable[..., ResponderProcess]
Send = Callable[[bytes], object]

each_suite = pytest.mark.parametrize("suite", list(SUITES))


def numbered(count: int, width: int = 0) -> list[bytes]:
    """Return lines that are unlike each other."""
    return [f"line {number} ä🦊 ".ljust(width, "x").encode() for number in range(count)]


def joined(lines: list[bytes]) -> bytes:
    return b"".join(line + b"\n" for line in lines)


def upper(lines: list[bytes]) -> bytes:
    """Return what a session prints that asks for upper case."""
    return joined([line.decode().upper().encode() for line in lines])


def arguments(port: int, netid: str, *options: str) -> list[str]:
    return ["-p", str(port), *options, "--lines", netid, "uppercase", "-"]


def session(port: int, netid: str, text: bytes, *options: str) -> Run:
    """Run a session to its end."""
    return run(*arguments(port, netid, *options), stdin=text)


def succeeded(result: Run, output: bytes) -> bool:
    """Check the whole result of a session that was answered."""
    assert (error_lines(result), result.returncode) == ("", 0)
    # Compared by pieces: pytest would take minutes to show where megabytes differ.
    pairs = zip(result.stdout.splitlines(), output.splitlines(), strict=False)
    for number, (found, expected) in enumerate(pairs, 1):
        assert found[:200] == expected[:200], f"line {number}"
    assert len(result.stdout) == len(output)
    assert hash(result.stdout) == hash(output), "they differ after 200 bytes of a line"
    return True


def failed(result: Run, line: int, output: bytes, *words: str) -> bool:
    """Check the whole result of a session that failed at a line."""
    error, *hint = error_lines(result).splitlines()
    assert error.startswith(f"secure_mqtt_client.py: error: line {line}: "), error
    assert all(text.startswith("secure_mqtt_client.py: hint: ") for text in hint)
    assert len(hint) <= 1
    for word in words:
        assert word in error_lines(result)
    assert (result.stdout, result.returncode) == (output, 1)
    return True


class Live:
    """A session that is written to and read from while it runs."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, str(PROGRAM), *arguments]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)
        assert self.process.stdin
        assert self.process.stdout
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.feeders: list[threading.Thread] = []

    def write(self, text: bytes) -> None:
        """Write some text at once."""
        self.stdin.write(text)
        self.stdin.flush()

    def write_all(self, text: bytes) -> None:
        """Write a text and close standard input, while other things happen."""

        def feed() -> None:
            with self.stdin:
                self.stdin.write(text)

        self.feeders.append(in_thread(feed))

    def ask(self, line: str) -> None:
        """Write a line, and check the answer before anything else is written."""
        self.write(line.encode() + b"\n")
        assert self.stdout.readline().decode() == line.upper() + "\n"

    def finish(self) -> Run:
        """Wait for the end; the result has what was not read yet."""
        assert self.process.stderr
        output = b"" if self.stdout.closed else self.stdout.read()
        errors, status = self.process.stderr.read(), self.process.wait(SAFETY)
        return subprocess.CompletedProcess(self.process.args, status, output, errors)


@contextlib.contextmanager
def live(*arguments: str) -> Iterator[Live]:
    """Start a session, which does not outlive the context, nor its time."""
    started = Live(*arguments)
    safety_net = threading.Timer(SAFETY, started.process.kill)
    safety_net.start()
    try:
        yield started
    finally:
        safety_net.cancel()
        started.process.kill()
        started.process.wait(SAFETY)
        for feeder in started.feeders:
            feeder.join(SAFETY)
        for stream in (started.stdin, started.stdout, started.process.stderr):
            with contextlib.suppress(OSError):  # what was not taken can't be flushed any more
                assert stream
                stream.close()


@contextlib.contextmanager
def own_responder(
    peer: Peer, netid: str, answer: Callable[[bytes], bytes | None]
) -> Iterator[list[tuple[bytes, float]]]:
    """Answer lines with any bytes, or not at all; yields the lines and when they came."""
    came: list[tuple[bytes, float]] = []

    def serve() -> None:
        while True:
            topic, payload = peer.receive_any()
            action = topic.split("/")[1]
            if action == "end":
                return
            response = f"{netid}/{action}/response"
            if action == "key-exchange":
                keys = suite_of(payload).responder(payload)
                cipher = keys.agree(Transcript(netid, payload, keys.blocks))
                peer.publish(response, keys.blocks)
                continue
            number, text = cipher.open(topic, payload)
            came.append((text, time.monotonic()))
            if (answered := answer(text)) is not None:
                peer.publish(response, cipher.seal(response, number or 0, answered))

    thread = in_thread(serve)
    try:
        yield came
    finally:
        peer.publish(f"{netid}/end/request", b"")
        thread.join(SAFETY)


# --- what is printed ---------------------------------------------------------------------------

INPUTS: dict[str, bytes] = {
    "thousands of lines": joined(numbered(3000)),
    "nothing": b"",
    "an empty line": b"\n",
    "empty lines among others": b"\n\none\n\n\ntwo\n\n",
    "no newline at the end": b"one\ntwo",
    "a single character": b"x",
    "Windows lines": b"one\r\ntwo\r\n\r\nlast\r",
    "planes beyond the first": "🦊 𝒳\U0010ffff\n\U00010400\n".encode(),
    "what Python takes for the end of a line": "a\x0bb\x0c\x1c\x85\u2028c\u2029\0d\n".encode(),
    "a line of 300 KB": b"a\n" + b"long " * 60_000 + b"\nz\n",
    "characters across two reads": b"x" + "🦊".encode() * 50_000 + b"\n",
    "many long lines": joined([b"%d " % number * 20_000 for number in range(60)]),
    "lines longer than the window": joined([b"%d " % number * 200_000 for number in range(10, 14)]),
}


@each_suite
@pytest.mark.usefixtures("responder")
@pytest.mark.parametrize("name", INPUTS)
def test_each_line_is_answered_on_a_line_in_order(
    broker: Mosquitto, netid: str, suite: str, name: str
) -> None:
    text = INPUTS[name]
    lines = text.removesuffix(b"\n").split(b"\n") if text else []
    result = session(broker.port, netid, text, "--suite", suite)
    assert succeeded(result, upper(lines))


@each_suite
@pytest.mark.usefixtures("responder")
def test_an_answer_is_printed_before_the_next_line_is_written(
    broker: Mosquitto, netid: str, suite: str
) -> None:
    with live(*arguments(broker.port, netid, "--suite", suite)) as running:
        for number in range(50):
            running.ask(f"line {number}")
        running.stdin.close()
        assert succeeded(running.finish(), b"")


@each_suite
@pytest.mark.usefixtures("responder")
def test_a_line_in_parts_is_one_line(broker: Mosquitto, netid: str, suite: str) -> None:
    with live(*arguments(broker.port, netid, "--suite", suite)) as running:
        running.ask("first")  # now parts are read one by one
        for byte in "näher🦊".encode():
            running.write(bytes([byte]))
        running.write(b"\nlast")
        assert running.stdout.readline().decode() == "NÄHER🦊\n"
        running.stdin.close()
        assert succeeded(running.finish(), b"LAST\n")


@each_suite
@pytest.mark.usefixtures("responder")
def test_a_pause_longer_than_the_timeout_ends_nothing(
    broker: Mosquitto, netid: str, suite: str
) -> None:
    with live(*arguments(broker.port, netid, "--suite", suite, "-W", "2.5")) as running:
        running.ask("before")
        threading.Event().wait(4)  # the pause is what is tested
        running.ask("after")
        running.stdin.close()
        assert succeeded(running.finish(), b"")


@each_suite
@pytest.mark.usefixtures("responder")
def test_a_reader_that_pauses_longer_than_the_timeout_ends_nothing(
    broker: Mosquitto, netid: str, suite: str
) -> None:
    lines = numbered(2000, width=200)  # more than fits into a pipe
    with live(*arguments(broker.port, netid, "--suite", suite, "-W", "2.5")) as running:
        running.write_all(joined(lines))
        assert running.stdout.readline() == upper(lines[:1])
        threading.Event().wait(4)  # the pause is what is tested
        assert succeeded(running.finish(), upper(lines[1:]))


@each_suite
@pytest.mark.usefixtures("responder")
def test_each_message_of_a_session_is_told_of_if_asked(
    broker: Mosquitto, netid: str, suite: str
) -> None:
    result = session(broker.port, netid, b"one\nsecret\n", "-v", "--suite", suite)
    assert (result.stdout, result.returncode) == (b"ONE\nSECRET\n", 0)
    told = [line.partition(" ms: ")[2] for line in error_lines(result).splitlines()]
    encryption = SUITES[suite].encryption
    for direction, what, content in [
        ("1 →", "key-exchange/request", f"our public key ({suite})"),
        ("2 ←", "key-exchange/response", f"the responder's public key ({suite})"),
        ("3 →", "uppercase/request", f"line 1, encrypted ({encryption})"),
        ("3 →", "uppercase/request", f"line 2, encrypted ({encryption})"),
        ("4 ←", "uppercase/response", f"the answer to line 1, encrypted ({encryption})"),
        ("4 ←", "uppercase/response", f"the answer to line 2, encrypted ({encryption})"),
    ]:
        message = rf"{direction} {netid}/{what}, \d+ bytes: {re.escape(content)}"
        assert sum(bool(re.fullmatch(message, line)) for line in told) == 1, message
    assert "secret" not in error_lines(result).lower()


def test_a_local_session_needs_no_other_services(netid: str) -> None:
    pytest.importorskip("amqtt")
    lines = numbered(200)
    command = ["--local", "--lines", "--suite", "x25519", netid, "uppercase", "-"]
    assert succeeded(run(*command, stdin=joined(lines)), upper(lines))


def test_a_local_session_says_that_its_responder_has_ended(netid: str) -> None:
    pytest.importorskip("amqtt")
    command = ["--local", "-W", "4", "--lines", netid, "uppercase", "-"]
    with subprocess.Popen(
        [sys.executable, str(PROGRAM), *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        wait_until(lambda: processes_below(process.pid))
        os.kill(max(processes_below(process.pid)), signal.SIGKILL)
        answers, errors = process.communicate(b"text\n", timeout=SAFETY)
    assert (process.returncode, answers) == (1, b"")
    assert b"the responder of --local has ended" in errors
    assert b"Traceback" not in errors


# --- what cannot be answered -------------------------------------------------------------------


def test_a_line_without_end_ends_a_session_before_it_takes_all_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broker: Mosquitto, netid: str
) -> None:
    change = "streams.MAX_TOKEN_SIZE = 100_000\n"
    monkeypatch.setattr(conftest, "PROGRAM", changed_program(tmp_path, change))
    with subprocess.Popen(
        [sys.executable, str(conftest.PROGRAM), *arguments(broker.port, netid)],
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,  # else what nobody has read is written once more at the end
    ) as process:
        assert process.stdin
        assert process.stderr
        with contextlib.suppress(BrokenPipeError):
            while True:  # until nobody reads any more
                process.stdin.write(b"x" * 10_000)
        assert b"too many for MQTT" in process.stderr.read()
        assert process.wait(SAFETY) == 1


@each_suite
@pytest.mark.usefixtures("responder")
@pytest.mark.parametrize("wrong", [b"\xff", b"ab\xc3", b"\xed\xa0\x80"])
def test_a_line_that_is_no_utf8_ends_a_session_after_the_answers_before_it(
    broker: Mosquitto, netid: str, suite: str, wrong: bytes
) -> None:
    lines = numbered(300)
    text = joined([*lines, wrong, b"never sent"])
    result = session(broker.port, netid, text, "--suite", suite)
    assert failed(result, 301, upper(lines), "not UTF-8")


@pytest.mark.usefixtures("responder")
def test_a_line_that_is_no_utf8_ends_a_session_whose_input_goes_on(
    broker: Mosquitto, netid: str
) -> None:
    with live(*arguments(broker.port, netid)) as running:
        running.ask("first")
        running.write(b"\xff\n")
        assert failed(running.finish(), 2, b"", "not UTF-8")


@each_suite
@pytest.mark.usefixtures("responder")
def test_a_reader_that_has_gone_ends_a_session(broker: Mosquitto, netid: str, suite: str) -> None:
    with live(*arguments(broker.port, netid, "--suite", suite)) as running:
        running.write_all(joined(numbered(3000, width=200)))
        assert running.stdout.readline() == upper(numbered(1, width=200))
        running.stdout.close()
        result = running.finish()
    assert result.returncode == 1
    assert "cannot write to standard output: Broken pipe" in error_lines(result)
    assert "Traceback" not in error_lines(result)


@pytest.mark.usefixtures("responder")
@pytest.mark.parametrize(
    ("redirection", "words"),
    [
        (">&-", "cannot write to standard output: it is closed"),
        (">/dev/full", "cannot write to standard output: No space left on device"),
        ("<&-", "standard input: it is closed"),
        ("0>/dev/null", "standard input: Bad file descriptor"),
    ],
)
def test_streams_that_cannot_be_used_end_a_session(
    broker: Mosquitto, netid: str, redirection: str, words: str
) -> None:
    command = ["sh", "-c", f'exec "$@" {redirection}', "sh", sys.executable, str(PROGRAM)]
    command += arguments(broker.port, netid)
    result = subprocess.run(command, input=b"abc\n", capture_output=True, timeout=SAFETY)
    assert failed(result, 1, b"", words)


WRONG_ANSWERS = {"a newline": b"two\nlines", "only a newline": b"\n", "no UTF-8": b"\xc3("}


@each_suite
@pytest.mark.parametrize("name", WRONG_ANSWERS)
def test_a_response_that_is_not_one_line_of_text_ends_a_session(
    own_broker: Mosquitto, netid: str, peer: Connect, suite: str, name: str
) -> None:
    answers = {b"one": b"ONE", b"": b"", b"three": WRONG_ANSWERS[name], b"four": b"FOUR"}
    own = own_responder(peer(own_broker.port, f"{netid}/+/request"), netid, answers.get)
    with own:
        result = session(own_broker.port, netid, joined(list(answers)), "--suite", suite)
    assert failed(result, 3, b"ONE\n\n", "not one line of UTF-8 text")


def all_but(silent: bytes, line: bytes) -> bytes | None:
    """Answer every line but one."""
    return None if line == silent else line.upper()


@each_suite
def test_a_line_that_is_never_answered_ends_a_session_within_the_timeout(
    own_broker: Mosquitto, netid: str, peer: Connect, suite: str
) -> None:
    timeout = 8.0  # seconds: enough to try it twice
    responder = own_responder(
        peer(own_broker.port, f"{netid}/+/request"), netid, partial(all_but, b"three")
    )
    text = b"one\ntwo\nthree\nfour\n"
    with responder as came:
        result = session(own_broker.port, netid, text, "--suite", suite, "-W", str(timeout))
        ended = time.monotonic()
    assert failed(result, 3, b"ONE\nTWO\n", "no response", f"{netid}/uppercase/response")
    times = [when for line, when in came if line == b"three"]
    assert len(times) > 1, "it was not sent again"
    assert ended - times[0] < timeout + LATENESS


@pytest.mark.parametrize(
    ("suite", "size", "expected"),
    [
        ("x25519", 0, 64),
        ("x25519", 300_000, 3),
        ("x25519", 2_000_000, 1),
        ("mlkem768x25519", 0, 64),
        ("dh4096", 0, 1),
    ],
)
def test_no_more_is_on_its_way_than_the_window_allows(
    own_broker: Mosquitto, netid: str, peer: Connect, suite: str, size: int, expected: int
) -> None:
    text = joined(numbered(200 if not size else 5, width=size))
    silent = own_responder(peer(own_broker.port, f"{netid}/+/request"), netid, lambda line: None)
    with silent as came:
        result = session(own_broker.port, netid, text, "--suite", suite, "-W", "1.9")
        assert failed(result, 1, b"", "no response")
    assert len({line for line, _ in came}) == expected


@each_suite
def test_without_a_responder_a_session_says_so(
    own_broker: Mosquitto, netid: str, suite: str
) -> None:
    result = session(own_broker.port, netid, b"one\n", "--suite", suite, "-W", "4")
    assert failed(result, 1, b"", "no responder answered the key exchange", "4 s")


@each_suite
def test_what_a_session_waited_for_counts_when_its_time_ends_while_it_connects_again(
    own_broker: Mosquitto, netid: str, suite: str
) -> None:
    links: list[Link] = []

    def pass_on(link: Link, packet: Packet, send: Send) -> None:
        if link not in links:
            links.append(link)
        if link is links[0] and packet.kind != PUBACK:  # so no responder seems to have the request
            send(packet.raw)

    with relay(own_broker.port, pass_on) as port:
        result = session(port, netid, b"one\n", "--suite", suite, "-W", "8")
    # After half of that and a second it gives up, after two more at most it connects again.
    assert len(links) == 2, "it did not connect again"
    words = f"within 8 s; connecting to localhost port {port} again was under way"
    assert failed(result, 1, b"", "no responder answered the key exchange", words)


def test_a_broker_that_is_not_there_ends_a_session_at_once(netid: str) -> None:
    port = free_port()
    for option, words in (("127.0.0.1", "connection refused"), ("no.such.invalid", "cannot find")):
        result = session(port, netid, b"one\n", "-h", option, "-W", str(10 * SAFETY))
        assert failed(result, 1, b"", words)


@each_suite
def test_a_broker_that_hangs_ends_a_session_within_the_timeout(
    own_broker: Mosquitto, start_responder: Responders, netid: str, suite: str
) -> None:
    timeout = 4.0
    start_responder("-p", str(own_broker.port))
    options = ["--suite", suite, "-W", str(timeout)]
    with live(*arguments(own_broker.port, netid, *options)) as running:
        running.ask("one")
        own_broker.process.send_signal(signal.SIGSTOP)
        written = time.monotonic()
        running.write(b"two\nthree\n")
        result = running.finish()
        seconds = time.monotonic() - written
    own_broker.kill()
    assert failed(result, 2, b"", str(own_broker.port))
    assert seconds < timeout + LATENESS


@pytest.mark.usefixtures("responder")
@pytest.mark.parametrize("lines", [["one"], []])
def test_ctrl_c_ends_a_session_quietly(broker: Mosquitto, netid: str, lines: list[str]) -> None:
    with live("-v", *arguments(broker.port, netid)) as running:
        assert running.process.stderr
        while b"SUBACK for" not in running.process.stderr.readline():
            assert running.process.poll() is None
        for line in lines:
            running.ask(line)
        running.process.send_signal(signal.SIGINT)
        result = running.finish()
    assert (result.stdout, result.returncode) == (b"", 130)
    assert "Traceback" not in error_lines(result)


# --- a broker that does not take all ------------------------------------------------------------


@each_suite
def test_a_line_that_the_broker_does_not_take_is_named_after_the_answers_before_it(
    tmp_path: Path, start_responder: Responders, netid: str, suite: str
) -> None:
    mosquitto = Mosquitto(tmp_path, "max_packet_size 20000")
    lines = [*numbered(20), b"x" * 21_000, *numbered(50)]
    size = "21,024" if SUITES[suite].is_numbered else f"{crypto.token_size(21_000):,}"

    def attempt(netid: str) -> None:
        result = session(mosquitto.port, netid, joined(lines), "--suite", suite)
        words = f"a message of {size} bytes on its way", "max_packet_size"
        assert failed(result, 21, upper(lines[:20]), *words)

    try:
        start_responder("-p", str(mosquitto.port))
        all_at_once({str(number): partial(attempt, f"{netid}-{number}") for number in range(6)})
    finally:
        mosquitto.kill()


@each_suite
def test_a_large_line_outlasts_two_lost_connections(
    own_broker: Mosquitto, start_responder: Responders, netid: str, suite: str
) -> None:
    lines = [b"short", b"long " * 20_000, b"short again"]
    cuts: list[Packet] = []

    def pass_on(link: Link, packet: Packet, send: Send) -> None:
        if is_request(packet) and len(packet.payload) > 20_000 and len(cuts) < 2:
            cuts.append(packet)
            link.cut()
        else:
            send(packet.raw)

    start_responder("-p", str(own_broker.port))
    with relay(own_broker.port, pass_on) as port:
        result = session(port, netid, joined(lines), "--suite", suite)
    assert len(cuts) == 2
    assert succeeded(result, upper(lines))


# --- responders that take long for an exchange -------------------------------------------------

# An exchange takes so long that two of them take more than half the timeout, and three all of it.
SLOWNESS, TIMEOUT = 4.3, 12.0  # seconds


def test_two_sessions_wait_for_a_slow_responder_and_ask_it_once(
    own_broker: Mosquitto, netid: str
) -> None:
    lines = numbered(50)
    netids = [f"{netid}-1", f"{netid}-2"]

    def attempt(netid: str) -> None:
        result = session(own_broker.port, netid, joined(lines), "-W", str(TIMEOUT))
        assert succeeded(result, upper(lines))

    with lab_responder(own_broker.port, seconds=SLOWNESS) as came:
        all_at_once({each: partial(attempt, each) for each in netids})
    assert sorted(who for who, action in came if action == "key-exchange") == netids


def test_a_late_answer_to_an_exchange_is_not_taken_for_that_to_the_next(
    own_broker: Mosquitto, netid: str
) -> None:
    lines = numbered(50)
    links: list[Link] = []

    def pass_on(link: Link, packet: Packet, send: Send) -> None:
        if packet.kind == PUBACK and not links:  # the exchange is at the broker
            links.append(link)
            link.cut()
        else:
            send(packet.raw)

    with (
        lab_responder(own_broker.port, seconds=SLOWNESS) as came,
        relay(own_broker.port, pass_on) as port,
    ):
        result = session(port, netid, joined(lines), "-W", str(TIMEOUT))
    assert succeeded(result, upper(lines))
    # The second one was asked for before the first was answered, and both answers came.
    assert came[:2] == [(netid, "key-exchange")] * 2


def test_a_session_with_a_quick_responder_does_not_wait_long_for_one_of_its_keys(
    own_broker: Mosquitto, start_responder: Responders, netid: str
) -> None:
    lines = numbered(120)  # more than one key is used for
    done: list[Packet] = []
    start_responder("-p", str(own_broker.port))
    with relay(own_broker.port, drops(is_key, 2)(done)) as port:
        assert succeeded(session(port, netid, joined(lines), "-W", "8"), upper(lines))
    assert done


@each_suite
@pytest.mark.usefixtures("responder")
def test_sessions_that_share_a_netid_each_find_their_key(
    broker: Mosquitto, netid: str, suite: str
) -> None:
    lines = numbered(300)

    def attempt(name: str) -> None:
        # With less time than it takes to give a key up and to connect again.
        options = ["--suite", suite, "--id", name, "-W", "3"]
        assert succeeded(session(broker.port, netid, joined(lines), *options), upper(lines))

    names = [f"{netid}-{number}" for number in range(4)]
    all_at_once({name: partial(attempt, name) for name in names})


@each_suite
def test_a_flood_of_keys_makes_a_session_try_a_few(
    own_broker: Mosquitto, netid: str, peer: Connect, suite: str
) -> None:
    flooder = peer(own_broker.port, f"{netid}/+/request")
    with live(*arguments(own_broker.port, netid, "--suite", suite, "-W", "12")) as running:
        running.write(b"line\n")
        request = flooder.receive(f"{netid}/key-exchange/request")
        for _ in range(2 * MAX_KEYS):
            key = suite_of(request).responder(request).blocks
            flooder.publish(f"{netid}/key-exchange/response", key)
            flooder.publish(f"{netid}/key-exchange/response", key)  # which is not tried again
        tokens = [flooder.receive(f"{netid}/uppercase/request") for _ in range(MAX_KEYS)]
        assert len(set(tokens)) == MAX_KEYS
        flooder.receive(f"{netid}/key-exchange/request")  # it makes another exchange instead


# --- keys are renewed --------------------------------------------------------------------------


def answered(responder: ResponderProcess, netid: str, action: str) -> int:
    """Return how many messages a responder has answered, as it says."""
    text = f'answered netid="{netid}" action="{action}" '
    return sum(text in line for line in responder.lines)


@each_suite
def test_keys_are_renewed_in_time_while_answers_stay_in_order(
    broker: Mosquitto, responder: ResponderProcess, netid: str, suite: str
) -> None:
    lines = numbered(3000 if SUITES[suite].is_numbered else 500)
    options = ["--suite", suite, "--rekey", "0.1"]
    assert succeeded(session(broker.port, netid, joined(lines), *options), upper(lines))
    wait_until(lambda: answered(responder, netid, "uppercase") == len(lines))
    assert answered(responder, netid, "key-exchange") >= 3


@each_suite
def test_keys_are_renewed_when_the_next_line_comes_late(
    broker: Mosquitto, responder: ResponderProcess, netid: str, suite: str
) -> None:
    options = ["--suite", suite, "--rekey", "0.05"]
    with live(*arguments(broker.port, netid, *options)) as running:
        while answered(responder, netid, "key-exchange") < 5:
            running.ask("again")
        running.stdin.close()
        assert succeeded(running.finish(), b"")


@each_suite
def test_even_a_key_that_is_old_at_once_is_used(
    broker: Mosquitto, responder: ResponderProcess, netid: str, suite: str
) -> None:
    lines = numbered(20)
    options = ["--suite", suite, "--rekey", "0.000001", "-W", "20"]
    assert succeeded(session(broker.port, netid, joined(lines), *options), upper(lines))


@each_suite
def test_without_renewal_there_is_one_key_exchange(
    broker: Mosquitto, responder: ResponderProcess, netid: str, suite: str
) -> None:
    lines = numbered(pace_of(suite).max_requests)
    assert succeeded(session(broker.port, netid, joined(lines), "--suite", suite), upper(lines))
    wait_until(lambda: answered(responder, netid, "uppercase") == len(lines))
    assert answered(responder, netid, "key-exchange") == 1


@each_suite
def test_a_key_is_renewed_after_many_requests(
    broker: Mosquitto, responder: ResponderProcess, netid: str, suite: str
) -> None:
    lines = numbered(pace_of(suite).max_requests + NUMBERED.window)
    assert succeeded(session(broker.port, netid, joined(lines), "--suite", suite), upper(lines))
    wait_until(lambda: answered(responder, netid, "uppercase") == len(lines))
    assert answered(responder, netid, "key-exchange") == 2


# --- what is lost is sent again ----------------------------------------------------------------


def resumes(port: int, netid: str, suite: str, interrupt: Callable[[], object]) -> None:
    """Interrupt a session while it has lines to send; each must be answered once."""
    lines = numbered(3000, width=200)  # few fit into a pipe, so the program is never far ahead
    expected = upper(lines)
    with live(*arguments(port, netid, "--suite", suite, "-W", "12")) as running:
        running.write_all(joined(lines))
        begin = b"".join(running.stdout.readline() for _ in range(500))
        assert begin == expected[: len(begin)]
        interrupt()
        assert succeeded(running.finish(), expected[len(begin) :])


@pytest.fixture
def impatient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let responders connect again at once, else each case would wait a second or two."""
    monkeypatch.setattr(conftest, "PROGRAM", impatient_program(tmp_path))


@each_suite
@pytest.mark.usefixtures("impatient")
def test_a_session_goes_on_when_the_broker_was_restarted(
    own_broker: Mosquitto, start_responder: Responders, netid: str, suite: str
) -> None:
    start_responder("-p", str(own_broker.port))
    resumes(own_broker.port, netid, suite, own_broker.restart)


@each_suite
def test_a_session_goes_on_with_a_responder_that_has_lost_its_keys(
    own_broker: Mosquitto, start_responder: Responders, netid: str, suite: str
) -> None:
    first = start_responder("-p", str(own_broker.port))

    def replace() -> None:
        first.stop(signal.SIGKILL)
        start_responder("-p", str(own_broker.port))

    resumes(own_broker.port, netid, suite, replace)


@pytest.fixture
def prompt_broker(tmp_path: Path, start_responder: Responders) -> Iterator[Mosquitto]:
    """A broker with a responder, which does not delay the packets to a relay (40 ms each)."""
    mosquitto = Mosquitto(tmp_path, "set_tcp_nodelay true")
    start_responder("-p", str(mosquitto.port))
    yield mosquitto
    mosquitto.kill()


@each_suite
def test_a_session_goes_on_when_its_connection_was_cut(
    prompt_broker: Mosquitto, netid: str, suite: str
) -> None:
    links: list[Link] = []

    def pass_on(link: Link, packet: Packet, send: Send) -> None:
        links.append(link)
        send(packet.raw)

    with relay(prompt_broker.port, pass_on) as port:
        resumes(port, netid, suite, lambda: links[-1].cut())


def test_a_long_session_outlasts_restarts_of_the_broker() -> None:
    seen = endurance(lines=5000, restarts=2)
    assert (seen.answers, seen.restarts) == (5000, 2)
    assert seen.exchanges >= 3


# --- a broker that tampers ---------------------------------------------------------------------


def is_message(packet: Packet, action: str, suffix: str) -> bool:
    """Tell whether a packet is a message of the protocol."""
    return packet.kind == PUBLISH and packet.topic.split("/")[1:] == [action, suffix]


def is_response(packet: Packet) -> bool:
    return is_message(packet, "uppercase", "response")


def is_request(packet: Packet) -> bool:
    return is_message(packet, "uppercase", "request")


def is_key(packet: Packet) -> bool:
    return is_message(packet, "key-exchange", "response")


def copy(packet: Packet) -> bytes:
    """Return a message as a new one, of which nobody expects an acknowledgement."""
    return publish(packet.topic, packet.payload, QOS_0)


Which = Callable[[Packet], bool]
Tampering = Callable[[list[Packet]], PassOn]  # notes in the list which packets it has tampered with


def drops(which: Which, *numbers: int) -> Tampering:
    """Drop the messages of a kind that have these numbers."""

    def tampering(done: list[Packet]) -> PassOn:
        seen: list[Packet] = []

        def pass_on(link: Link, packet: Packet, send: Send) -> None:
            if which(packet):
                seen.append(packet)
            if which(packet) and len(seen) in numbers:
                done.append(packet)
            else:
                send(packet.raw)

        return pass_on

    return tampering


def doubles(which: Which, done: list[Packet]) -> PassOn:
    """Send each message of a kind twice."""

    def pass_on(link: Link, packet: Packet, send: Send) -> None:
        send(packet.raw)
        if which(packet):
            done.append(packet)
            send(copy(packet))

    return pass_on


def doubles_later(which: Which, done: list[Packet]) -> PassOn:
    """Send each message of a kind again before and after the next one."""

    def pass_on(link: Link, packet: Packet, send: Send) -> None:
        if not which(packet):
            send(packet.raw)
            return
        before = [copy(each) for each in done[-1:]]
        done.append(packet)
        send(b"".join([*before, packet.raw, *before]))

    return pass_on


def reorders(which: Which, rounds: int) -> Tampering:
    """Turn the order of four messages of a kind round, so many times."""

    def tampering(done: list[Packet]) -> PassOn:
        held: list[Packet] = []

        def pass_on(link: Link, packet: Packet, send: Send) -> None:
            if not which(packet) or len(done) == 4 * rounds:
                send(packet.raw)
                return
            held.append(packet)
            if len(held) == 4:
                send(b"".join(each.raw for each in reversed(held)))
                done.extend(held)
                held.clear()

        return pass_on

    return tampering


def replays(which: Which, done: list[Packet]) -> PassOn:
    """Send messages from before a renewal in front of each one after it."""
    current: list[Packet] = []
    old: list[Packet] = []

    def pass_on(link: Link, packet: Packet, send: Send) -> None:
        if is_key(packet):
            old[:] = current[-20:]
            current.clear()
        if which(packet):
            send(b"".join(map(copy, old)))
            done.extend(old)
            current.append(packet)
        send(packet.raw)

    return pass_on


def replays_a_key(done: list[Packet]) -> PassOn:
    """Answer the second key exchange with the key of the first one."""
    keys: list[Packet] = []

    def pass_on(link: Link, packet: Packet, send: Send) -> None:
        if is_key(packet):
            keys.append(packet)
        if is_key(packet) and len(keys) == 2:
            done.append(packet)
            send(copy(keys[0]))
        else:
            send(packet.raw)

    return pass_on


def reflects(done: list[Packet]) -> PassOn:
    """Hand the last requests back as responses, before each true one."""
    requests: list[Packet] = []

    def pass_on(link: Link, packet: Packet, send: Send) -> None:
        if is_request(packet):
            requests.append(packet)
        elif is_response(packet):
            done.append(packet)
            payloads = [request.payload for request in requests[-70:]]
            send(b"".join(publish(packet.topic, payload, QOS_0) for payload in payloads))
        send(packet.raw)

    return pass_on


TAMPERINGS: dict[str, Tampering] = {
    "drops responses": drops(is_response, 50, 150),
    "drops requests": drops(is_request, 50, 150),
    "drops the first key": drops(is_key, 1),
    "drops keys": drops(is_key, 2, 4),
    "doubles responses": partial(doubles, is_response),
    "doubles responses later": partial(doubles_later, is_response),
    "doubles requests": partial(doubles, is_request),
    "doubles requests later": partial(doubles_later, is_request),
    "doubles keys": partial(doubles, is_key),
    "reorders responses": reorders(is_response, rounds=50),
    "reorders requests": reorders(is_request, rounds=1),
    "replays responses": partial(replays, is_response),
    "replays requests": partial(replays, is_request),
    "replays a key": replays_a_key,
    "reflects requests": reflects,
}
# Of dh4096 one message is on its way at a time, and an exchange may take long.
WHERE_NUMBERED = {"reorders responses", "reorders requests", "drops the first key"}


@each_suite
def test_a_broker_that_tampers_puts_no_answer_in_a_wrong_place(
    prompt_broker: Mosquitto, netid: str, suite: str
) -> None:
    lines = numbered(400 if SUITES[suite].is_numbered else 200)

    def attack(name: str, number: int) -> None:
        done: list[Packet] = []
        with relay(prompt_broker.port, TAMPERINGS[name](done)) as port:
            options = ["--suite", suite, "--rekey", "0.05", "-W", "12"]
            result = session(port, f"{netid}-{number}", joined(lines), *options)
        assert done, "nothing was tampered with"
        assert succeeded(result, upper(lines))

    is_numbered = SUITES[suite].is_numbered
    names = [name for name in TAMPERINGS if is_numbered or name not in WHERE_NUMBERED]
    all_at_once({name: partial(attack, name, number) for number, name in enumerate(names)})
