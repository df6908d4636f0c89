"""Builds the sdist and a wheel for every platform, on Linux alone: `make wheels`.

The library of the native engine is linked neither to Python nor to torch, so every wheel is the
pure one with one file more. zig compiles that file: it brings the headers and the libraries of all
platforms. The same sources and tools give the same bytes, whatever the machine, folder and hour.
"""

from __future__ import annotations

import argparse
import base64
import gzip
import hashlib
import io
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path

from setup import LIBRARY

from .platforms import PLATFORMS, Platform

ROOT = Path(__file__).resolve().parents[1]
LIBRARY_PATH = LIBRARY.name.replace(".", "/") + ".so"
"""Its place in a wheel, on every platform: loading.py asks for this name."""
TIME = (1980, 1, 1, 0, 0, 0)
"""Of every file in a wheel: the first that a zip archive can hold."""


def zig(target: str, *arguments: str | os.PathLike[str], folder: Path = ROOT) -> None:
    """Run zig's C compiler for a target, in a folder."""
    command = [sys.executable, "-m", "ziglang", "cc", "-target", target]
    subprocess.run([*command, *arguments], check=True, cwd=folder)


def compiled(platform: Platform, root: Path = ROOT) -> bytes:
    """Return the library of a platform, from the sources and options that setup.py names."""
    flags = [*LIBRARY.extra_compile_args, "-Wall", "-Werror", "-s", "-shared", "-fPIC"]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, Path(LIBRARY_PATH).name)
        libraries = [f"-l{name}" for name in LIBRARY.libraries]
        files = (*LIBRARY.sources, "-o", library, *libraries)
        zig(platform.target, *flags, *platform.options, *files, folder=root)
        return library.read_bytes()


def built(folder: Path, root: Path) -> tuple[Path, dict[str, bytes]]:
    """Build both into an empty folder; return the sdist's path and the pure wheel's files."""
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir"]
    no_compiler = {**os.environ, "CC": "false"}
    done = subprocess.run([*build, folder, root], env=no_compiler, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stdout + done.stderr)
    [wheel], [sdist] = folder.glob("*.whl"), folder.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        return sdist, {name: archive.read(name) for name in archive.namelist()}


def write_sdist(source: Path, target: Path) -> None:
    """Write a source archive again, without times, owners and the order of a folder."""
    packed = io.BytesIO()
    with (
        tarfile.open(source) as old,
        tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as new,
    ):
        for member in sorted(old.getmembers(), key=lambda member: member.name):
            plain = tarfile.TarInfo(member.name)
            plain.type, plain.size = member.type, member.size
            plain.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
            new.addfile(plain, old.extractfile(member))
    target.write_bytes(gzip.compress(packed.getvalue(), mtime=0))


def digest(content: bytes) -> str:
    """Return a hash as RECORD states it."""
    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest())
    return "sha256=" + digest.rstrip(b"=").decode()


def write_wheel(folder: Path, files: Mapping[str, bytes], platform: str = "any") -> Path:
    """Write a wheel for every Python.

    Args:
        folder: Where to write it.
        files: What is in it; its WHEEL and RECORD are made anew.
        platform: The platform tag.

    Returns:
        The path of the wheel.
    """
    [information] = {name.partition("/")[0] for name in files if ".dist-info/" in name}
    tag, record = f"py3-none-{platform}", f"{information}/RECORD"
    pure = f"Root-Is-Purelib: {str(platform == 'any').lower()}"
    lines = ("Wheel-Version: 1.0", "Generator: gradclip", pure, f"Tag: {tag}")
    contents = {**files, f"{information}/WHEEL": ("\n".join(lines) + "\n").encode()}
    contents.pop(record, None)
    rows = [f"{name},{digest(contents[name])},{len(contents[name])}" for name in sorted(contents)]
    contents[record] = ("\n".join([*rows, f"{record},,"]) + "\n").encode()
    wheel = folder / f"{information.removesuffix('.dist-info')}-{tag}.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name in sorted(contents, key=lambda name: (name.startswith(information), name)):
            entry = zipfile.ZipInfo(name, TIME)
            entry.create_system, entry.external_attr = 3, 0o100644 << 16  # as on Unix
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, contents[name])
    return wheel


def write_all(folder: Path, root: Path = ROOT) -> None:
    """Write the sdist, the pure wheel and a wheel for each platform."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as place:
        sdist, files = built(Path(place), root)
        write_sdist(sdist, folder / sdist.name)
    write_wheel(folder, files)
    for platform in PLATFORMS:
        with_library = {**files, LIBRARY_PATH: compiled(platform, root)}
        wheel = write_wheel(folder, with_library, platform.tag)
        print(f"{wheel.name}: {wheel.stat().st_size // 1024} KiB", flush=True)


def main() -> None:
    """Write them into an empty folder."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "dist")
    write_all(parser.parse_args().folder)


if __name__ == "__main__":
    main()
