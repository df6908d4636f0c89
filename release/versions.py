"""Runs the suite on several versions of torch: `make versions`.

Each has an environment of its own, in which gradclip comes from its wheel and no compiler is found.
The table goes into docs/versions.md.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from subprocess import STDOUT

from .wheels import ROOT

VERSIONS = ("2.6.0", "2.9.1", "2.13.0", "2.14.1")
TOOLS = ("tensorboard", "hypothesis", "matplotlib", "pandas", "pytest", "rich", "selenium")
ENVIRONMENTS = ROOT / "build/versions"
PAGE = ROOT / "docs/versions.md"
HEAD = "| torch | Python | passed | skipped | failed |\n| --- | --- | --- | --- | --- |\n"
KINDS = ("passed", "skipped", "failed")
LEFT_OUT = ("integrations", "mutation", "docs", "benchmarks", "release")
"""Folders of tests that say nothing about torch, or need more than it."""


def environment(version: str) -> Path:
    """Return the interpreter of the environment with a version of torch; make one if missing."""
    folder = ENVIRONMENTS / version
    python = folder / "bin/python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        install = [python, "-m", "pip", "install", "--quiet"]
        subprocess.run([*install, f"torch=={version}", *TOOLS], check=True)
    return python


def row(version: str, wheels: Path, arguments: list[str]) -> str:
    """Run the suite on a version of torch, with its output beside the environment.

    Returns:
        A row of the table. A suite that crashed has no counts.
    """
    python = environment(version)
    install = [python, "-m", "pip", "install", "--quiet", "--force-reinstall", "--no-deps"]
    subprocess.run([*install, "--no-index", "--find-links", wheels, "gradclip"], check=True)
    with tempfile.TemporaryDirectory() as folder:
        # Away from the checkout, so that what is imported is what was installed.
        for name in ("tests", "benchmarks", "docs", "examples"):
            shutil.copytree(ROOT / name, Path(folder, name))
        for name in ("pyproject.toml", "README.md", "CHANGELOG.md"):
            shutil.copy(ROOT / name, folder)
        options = ["-q", "-p", "no:cacheprovider", "-m", "not slow and not interpreted", "tests"]
        options += [f"--ignore=tests/{name}" for name in LEFT_OUT]
        bare = {**os.environ, "PATH": str(python.parent)}
        command = [python, "-m", "pytest", *options, *arguments]
        with ENVIRONMENTS.joinpath(f"{version}.log").open("w+") as log:
            subprocess.run(command, cwd=folder, env=bare, stdout=log, stderr=STDOUT)
            log.seek(0)
            [*_, summary] = log.read().rstrip().split("\n")
    found = {kind: number for number, kind in re.findall(r"(\d+) (\w+)", summary)}
    counts = [found.get(kind, "0") for kind in KINDS] if "passed" in found else ["?"] * len(KINDS)
    asked = [python, "-c", "import platform; print(platform.python_version())"]
    spoken = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    return f"| {' | '.join((version, spoken, *counts))} |\n"


def main() -> None:
    """Run the suite and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("wheels", type=Path, nargs="?", default=ROOT / "dist")
    parser.add_argument("--versions", nargs="*", default=VERSIONS)
    parser.add_argument("--save", action="store_true", help=f"write the table into {PAGE.name}")
    given, arguments = parser.parse_known_args()
    rows = ""
    for version in given.versions:
        rows += row(version, given.wheels, arguments)
        print(rows.splitlines()[-1], flush=True)
    if given.save:
        table = re.compile(re.escape(HEAD) + r"(?:\|.*\n)*")
        PAGE.write_text(table.sub(lambda _: HEAD + rows, PAGE.read_text()))
    sys.exit(not all(line.rstrip().endswith(" 0 |") for line in rows.splitlines()))


if __name__ == "__main__":
    main()
