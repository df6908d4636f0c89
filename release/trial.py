"""Runs the library of every wheel that can run on Linux x86_64: `make trials`.

The driver of the C code's tests calls the shipped file, loaded as ctypes would load it. QEMU
emulates aarch64, Wine Windows; musl comes from Debian's package. All must compute the same bits as
the library of this machine, and use the same instruction sets. macOS and Windows on arm64 cannot be
run so: check.py reads their headers.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from .platforms import PLATFORMS, Platform
from .wheels import LIBRARY_PATH, ROOT, zig

DRIVER = ROOT / "tests/internals/engines/native_driver.c"
OPTIONS = ("-std=gnu11", "-O2", "-ffp-contract=off", "-DSHIPPED", "-dynamic")
LONGEST = "9000"
"""Elements: emulated processors are slow."""
HERE = "manylinux_2_17_x86_64"
RUNNERS: dict[str, tuple[str, ...]] = {
    HERE: (),
    "manylinux_2_17_aarch64": ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu"),
    "musllinux_1_2_x86_64": (),
    "musllinux_1_2_aarch64": ("qemu-aarch64", "-L", os.environ.get("MUSL_AARCH64", "/nowhere")),
    "win_amd64": ("wine",),
}
"""What runs a program of a platform. MUSL_AARCH64 is a folder with /lib/ld-musl-aarch64.so.1."""


def output(platform: Platform, wheel: Path, *options: str | Path) -> list[str]:
    """Return the lines that the driver prints when it runs the library of a wheel."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(wheel) as archive:
            library = archive.extract(LIBRARY_PATH, folder)
        program = Path(folder, "driver.exe")
        zig(platform.target, *OPTIONS, DRIVER, "-o", program, "-lm", "-lpthread")
        command = [*RUNNERS[platform.tag], program, LONGEST, library, *options]
        silent = {**os.environ, "WINEDEBUG": "-all"}
        done = subprocess.run(command, capture_output=True, text=True, env=silent, timeout=600)
    if done.returncode:
        raise SystemExit(f"{platform.tag}: {done.stdout}{done.stderr}")
    return done.stdout.split("\n")


def main() -> None:
    """Try the wheels of a folder."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "dist")
    parser.add_argument("--threads-of", type=Path, help="libiomp5md.dll, as torch for Windows has")
    given = parser.parse_args()
    tried = [platform for platform in PLATFORMS if platform.tag in RUNNERS]
    if "MUSL_AARCH64" not in os.environ:
        tried = [platform for platform in tried if platform.tag != "musllinux_1_2_aarch64"]
    outputs = {}
    for platform in tried:
        [wheel] = given.folder.glob(f"*-{platform.tag}.whl")
        windows = platform.tag == "win_amd64" and given.threads_of
        outputs[platform] = output(platform, wheel, *([given.threads_of] if windows else []))
        print(platform.tag, *outputs[platform][-3:-1], flush=True)
    [needed] = (lines for platform, lines in outputs.items() if platform.tag == HERE)
    wrong = [
        platform.tag
        for platform, lines in outputs.items()
        if lines != (needed if platform.processor == "x86_64" else [*needed[:2], *needed[-2:]])
    ]
    sys.exit(f"other bits or instruction sets: {wrong}" if wrong else None)


if __name__ == "__main__":
    main()
