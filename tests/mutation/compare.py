"""Hold the mutants that no test catches against the list of those that are explained.

Run from the repository's root, once mutmut has run there.
"""

import subprocess
import sys
from pathlib import Path

EXPLAINED = Path(__file__).with_name("survivors.txt")
LEAST = 0.95
"""Share of the mutants that tests have to catch."""


def mutmut(*arguments: str) -> str:
    """Return what mutmut prints."""
    command = [sys.executable, "-m", "mutmut", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def survivor(mutant: str) -> str:
    """Return a mutant's name, and below it the lines that it changes."""
    shown = mutmut("show", mutant).splitlines()
    changes = [line for line in shown if line[:1] in {"-", "+"} and line[:3] not in {"---", "+++"}]
    return "\n".join([mutant, *(f"{line[0]} {line[1:].strip()}" for line in changes)])


def explained() -> set[str]:
    """Return the survivors of the list without their explanations."""
    blocks = EXPLAINED.read_text().strip().split("\n\n")[1:]  # the first says what it is
    return {block.partition("\n  ")[0] for block in blocks}


def main() -> int:
    """Print what differs, and how many mutants are caught; return 1 where that will not do."""
    lines = mutmut("results", "--all", "true").splitlines()
    statuses = dict(line.strip().rsplit(": ", 1) for line in lines)
    found = {survivor(mutant) for mutant, status in statuses.items() if status != "killed"}
    known = explained()
    for heading, survivors in (
        ("Not caught, and not explained", found - known),
        ("Explained, and caught or gone", known - found),
    ):
        for each in sorted(survivors):
            print(f"{heading}:\n{each}\n")
    caught = len(statuses) - len(found)
    print(f"{caught} of {len(statuses)} mutants are caught.")
    return int(found != known or caught < LEAST * len(statuses))


if __name__ == "__main__":
    sys.exit(main())
