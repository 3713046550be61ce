"""Prints what tests/brokers has found as a table, one row a kind of broker."""

from __future__ import annotations

import re
from collections import defaultdict

import pytest

# By kind of broker and what was tried, in the order of the tests.
found: dict[str, dict[str, str]] = defaultdict(dict)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    from test_brokers import LIMITS  # now that pytest has prepared its assertions

    case = re.search(r"_limit_that_is_known\[(\w+)-(.+)\]$", report.nodeid)
    if case and (report.when == "call" or not report.passed):
        cell = "**✗**" if case.groups() in LIMITS else "✓"
        outcomes = {"passed": cell, "skipped": "not installed"}
        found[case[1]][case[2]] = outcomes.get(report.outcome, "FAILED")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    columns = {check: None for row in found.values() for check in row}
    lines = [["broker", *columns], ["---", *("---" for _ in columns)]]
    lines += [[name, *(row.get(check, "") for check in columns)] for name, row in found.items()]
    for line in lines:
        terminalreporter.write_line(f"| {' | '.join(line)} |")
