"""What the project says in two places is the same in both."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PROGRAM, ROOT, SAFETY, copy_program

import secure_mqtt_client as program
from secure_mqtt.keyring import MAX_TOKENS
from secure_mqtt.not_installed import REFUSAL
from secure_mqtt.session import IN_ORDER


def text_of(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def requirements(text: str) -> list[str]:
    """Return the requirements in a file, without comments and white space."""
    lines = [line.partition("#")[0].replace(" ", "").strip() for line in text.splitlines()]
    return sorted(filter(None, lines))


def metadata(name: str) -> object:
    """Return a value of the program's inline metadata (PEP 723), whose syntax is TOML's."""
    block = re.search(r"(?m)^# /// script\n((?:#.*\n)+?)# ///$", text_of(PROGRAM.name))
    assert block
    toml = re.sub(r"(?m)^# ?", "", block[1])
    value = re.search(rf"(?ms)^{name} = (\[.*?\]|.*?)$", toml)
    assert value
    return ast.literal_eval(value[1])


def test_the_inline_metadata_names_the_requirements() -> None:
    dependencies = metadata("dependencies")
    assert isinstance(dependencies, list)
    assert requirements("\n".join(dependencies)) == requirements(text_of("requirements.txt"))


def test_the_oldest_python_is_the_one_that_the_tools_check_for() -> None:
    oldest = metadata("requires-python")
    assert isinstance(oldest, str)
    assert f'python_version = "{oldest.removeprefix(">=")}"' in text_of("pyproject.toml")


def test_the_responder_remembers_what_a_session_does_under_one_key() -> None:
    assert IN_ORDER.max_requests * 2 == MAX_TOKENS


PIP: dict[str, list[str]] = {
    "install": ["install", "."],
    "without isolation": ["install", "--no-build-isolation", "."],
    "editable": ["install", "--editable", "."],
    "a wheel": ["wheel", "."],
}


@pytest.mark.parametrize("case", PIP)
def test_pip_says_that_there_is_nothing_to_install(case: str, tmp_path: Path) -> None:
    """Also where there is no network."""
    copy_program(tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    subprocess.run([sys.executable, "-m", "venv", tmp_path / ".venv"], check=True, timeout=SAFETY)
    env = {**os.environ, "PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    command = [str(tmp_path / ".venv/bin/python"), "-m", "pip", *PIP[case]]
    result = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=SAFETY
    )
    assert result.returncode == 1
    assert REFUSAL in " ".join((result.stdout + result.stderr).split())
    assert "Traceback" not in result.stderr
    assert not any(tmp_path.rglob("*.whl"))


def test_the_version_is_the_newest_in_the_changelog() -> None:
    newest = re.search(r"(?m)^## \[?v?(\d[\w.]*)", text_of("CHANGELOG.md"))
    assert newest
    assert newest[1] == program.__version__
