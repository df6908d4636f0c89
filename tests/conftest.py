"""Settings that every test shares, and the rule that no test is skipped unnoticed."""

import os
import re
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from hypothesis import settings

import gradclip

pytest_plugins = [
    f"tests.support.{name}"
    for name in ("browser", "clippers", "device", "engines", "forks", "older_torch", "report")
]  # fixtures, and what is skipped with an older torch


for _name in gradclip.__all__:  # tests replace functions in every module that has imported them
    getattr(gradclip, _name)

ALLOWED_SKIPS = Path(__file__).with_name("allowed_skips.txt")

settings.register_profile("gradclip", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("gradclip")

_skips: dict[str, list[str]] = defaultdict(list)
"""Skipped tests by the reason they give."""


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a CUDA device at once: it is thousands of tests."""
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        skip = pytest.mark.skip(reason="there is no CUDA device")
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(skip)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and isinstance(report.longrepr, tuple):
        _skips[report.longrepr[2].removeprefix("Skipped: ")].append(report.nodeid)


def _unexplained() -> list[str]:
    """Return the reasons that are not allowed, each with the tests that were skipped for it."""
    lines = ALLOWED_SKIPS.read_text().splitlines()
    allowed = "|".join(f"(?:{line})" for line in lines if line and not line.startswith("#"))
    return [f"{why}: {', '.join(t)}" for why, t in _skips.items() if not re.fullmatch(allowed, why)]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show one line for each reason to skip: a machine without a GPU skips thousands of tests."""
    for reason, tests in _skips.items():
        terminalreporter.write_line(f"{len(tests)} skipped: {reason}")
    for skips in _unexplained():
        terminalreporter.write_line(f"skipped for a reason not in {ALLOWED_SKIPS.name}: {skips}")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """In CI a test that is skipped for a reason nobody has written down is a failure."""
    if os.environ.get("CI") and _unexplained() and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
