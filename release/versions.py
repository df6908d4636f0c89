"""Runs the suite on several versions of torch: `make versions`.

Each has an environment of its own, in which gradclip comes from its wheel and no compiler is found.
The table goes into docs/versions.md.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from .wheels import ROOT

VERSIONS = ("2.6.0", "2.9.1", "2.13.0", "2.14.1")
TOOLS = ("tensorboard", "hypothesis", "matplotlib", "pandas", "pytest", "rich", "selenium")
ENVIRONMENTS = ROOT / "build/versions"
PAGE = ROOT / "docs/versions.md"
HEAD = (
    "| torch | Python | passed | skipped | failed | commit | day |\n"
    "| --- | --- | --- | --- | --- | --- | --- |\n"
)
TABLE = re.compile(re.escape(HEAD) + r"((?:\|.*\n)*)")
LEFT_OUT = ("integrations", "mutation", "docs", "benchmarks", "release")
"""Folders of tests that say nothing about torch, or need more than it."""
HANGS = ("-o", "faulthandler_timeout=900", "-o", "faulthandler_exit_on_timeout=true")
"""A test that hangs ends the run, with its traceback in the log."""


class Counts(NamedTuple):
    """How many tests passed, were skipped, and failed or met an error; "?" if the suite crashed."""

    passed: str
    skipped: str
    failed: str


def environment(version: str) -> Path:
    """Return the interpreter of the environment with a version of torch; make one if missing."""
    folder = ENVIRONMENTS / version
    python, complete = folder / "bin/python", folder / ".complete"
    if not complete.exists():
        venv = [sys.executable, "-m", "venv", "--clear", "--without-pip"]
        subprocess.run([*venv, folder], check=True)
        install(python, f"torch=={version}", *TOOLS)
        complete.touch()  # last, so that an interrupted install is begun again
    return python


def install(python: Path, *arguments: str | Path) -> None:
    """Install packages for an interpreter, which needs no pip of its own."""
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*pip, *arguments], check=True)


def counts(summary: str) -> Counts:
    """Read the last line of pytest's output."""
    found = {kind: int(number) for number, kind in re.findall(r"(\d+) ([a-z]+)", summary)}
    if "passed" not in found:
        return Counts("?", "?", "?")
    failed = sum(found.get(kind, 0) for kind in ("failed", "error", "errors"))
    return Counts(str(found["passed"]), str(found.get("skipped", 0)), str(failed))


def run_suite(python: Path, arguments: list[str], log: Path) -> bool:
    """Run the suite away from the checkout, so that what is imported is what was installed.

    Args:
        python: The interpreter.
        arguments: More for pytest.
        log: Where its output goes.

    Returns:
        Whether all tests passed, or were skipped for a reason that the suite allows.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name in ("tests", "benchmarks", "docs", "examples"):
            shutil.copytree(ROOT / name, Path(folder, name))
        for name in ("pyproject.toml", "README.md", "CHANGELOG.md"):
            shutil.copy(ROOT / name, folder)
        options = ["-q", "-p", "no:cacheprovider", "-m", "not slow and not interpreted", "tests"]
        options += [f"--ignore=tests/{name}" for name in LEFT_OUT]
        command = [str(python), "-m", "pytest", *options, *HANGS, *arguments]
        bare = {**os.environ, "PATH": str(python.parent), "CI": "true"}
        with log.open("w") as output:
            done = subprocess.run(
                command, cwd=folder, env=bare, stdout=output, stderr=subprocess.STDOUT
            )
    return done.returncode == 0


def printed(*command: str) -> str:
    """Return what a command prints."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def with_rows(page: str, rows: dict[str, str]) -> str:
    """Return a page with these rows, by version, in its table; other versions keep theirs."""

    def merged(table: re.Match[str]) -> str:
        present = {line.split()[1]: line for line in table[1].splitlines(keepends=True)}
        numbers = sorted({**present, **rows}, key=lambda version: [*map(int, version.split("."))])
        return HEAD + "".join({**present, **rows}[version] for version in numbers)

    return TABLE.sub(merged, page)


def main() -> None:
    """Run the suite on each version and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheels", type=Path, nargs="?", default=ROOT / "dist")
    parser.add_argument("--versions", nargs="*", default=VERSIONS)
    parser.add_argument("--save", action="store_true", help=f"write the table into {PAGE.name}")
    given, arguments = parser.parse_known_args()
    failed = []
    day = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    commit = printed("git", "log", "-1", "--format=%h", "--", "gradclip", "tests")
    for version in given.versions:
        python, log = environment(version), ENVIRONMENTS / f"{version}.log"
        offline = ("--no-index", "--find-links", given.wheels)
        install(python, "--force-reinstall", "--no-deps", *offline, "gradclip")
        if not run_suite(python, arguments, log):
            failed.append(version)
        [*_, summary] = log.read_text().rstrip().split("\n")
        spoken = printed(str(python), "-c", "import platform; print(platform.python_version())")
        line = f"| {' | '.join((version, spoken, *counts(summary), commit, day))} |\n"
        print(line, end="", flush=True)
        if given.save:
            PAGE.write_text(with_rows(PAGE.read_text(), {version: line}))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; see {ENVIRONMENTS}/VERSION.log")


if __name__ == "__main__":
    main()
