"""Checks wheels before they are published: that their tags are true, and what is in them.

Prints all faults and fails if there are any. Libraries are read with LIEF and not loaded; trial.py
runs those that can run here.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import lief

from .platforms import PLATFORMS, Platform
from .wheels import LIBRARY_PATH, ROOT, digest, write_all

MOST_BYTES = 1_000_000
GLIBC, MACOS = (2, 17), [11, 0, 0]
"""The newest versions that a library may need, as its tag promises."""
MODULES = sorted((ROOT / LIBRARY_PATH).parent.glob("*.py"))
CALLED = frozenset(
    name for module in MODULES for name in re.findall(r"\bgradclip_\w+", module.read_text())
)
"""The functions that the engine calls; a library exports these and no others."""
DATA = [
    "gradclip/py.typed",
    *(str(file.relative_to(ROOT)) for file in sorted((ROOT / "gradclip/view/page").iterdir())),
]
"""The files of the package that are no modules."""
LINKERS_OWN = {"_mh_dylib_header", "__dso_handle"}
ARCHITECTURES = lief.Header.ARCHITECTURES
PROCESSORS = {"x86_64": ARCHITECTURES.X86_64, "aarch64": ARCHITECTURES.ARM64}
FORMATS = {"ELF": lief.ELF.Binary, "MachO": lief.MachO.Binary, "PE": lief.PE.Binary}

lief.logging.disable()


def faults_of_library(content: bytes, platform: Platform) -> Iterator[str]:
    """Yield what is wrong with the library of a platform."""
    binary = lief.parse(content)
    if not isinstance(binary, FORMATS[platform.format]):
        yield f"the library is no {platform.format} file"
        return
    general = binary.abstract
    if general.header.architecture != PROCESSORS[platform.processor]:
        yield f"the library is for {general.header.architecture}, not for {platform.processor}"
    prefix = "_" if platform.format == "MachO" else ""
    exported = map(_text, (function.name for function in general.exported_functions))
    names = {name.removeprefix(prefix) for name in exported}
    if names - LINKERS_OWN != CALLED:
        yield f"the library exports {sorted(names)}, and the engine calls {sorted(CALLED)}"
    for library in map(_text, general.libraries):
        if not library.startswith((*platform.needs, "@rpath/_native.so")):
            yield f"the library needs {library}, which not every such system has"
    if not general.has_nx:
        yield "the library asks for an executable stack or heap"
    if b"/tmp/" in content or str(ROOT).encode() in content:
        yield "the library names a folder in which it was built"
    if isinstance(binary, lief.ELF.Binary):
        yield from _elf_faults(binary)
    elif isinstance(binary, lief.MachO.Binary):
        yield from _macho_faults(binary)
    else:
        yield from _pe_faults(binary)


def _text(name: str | bytes) -> str:
    """Return a name, of which LIEF gives the bytes if they are no text."""
    return name if isinstance(name, str) else name.decode(errors="backslashreplace")


def _elf_faults(binary: lief.ELF.Binary) -> Iterator[str]:
    tags = lief.ELF.DynamicEntry.TAG
    for tag in (tags.RPATH, tags.RUNPATH, tags.TEXTREL):
        if binary.has(tag):
            yield f"the library has {tag.name}"
    for requirement in binary.symbols_version_requirement:
        for version in requirement.get_auxiliary_symbols():
            name = _text(version.name)
            kind, _, number = name.partition("_")
            if kind != "GLIBC" or tuple(map(int, number.split("."))) > GLIBC:
                yield f"the library needs {name} of {requirement.name}"


def _macho_faults(binary: lief.MachO.Binary) -> Iterator[str]:
    build = binary.build_version
    if build is None or build.minos > MACOS:
        yield "the library needs a newer macOS than its tag says"
    if [*binary.rpaths]:
        yield "the library has a run path"
    arm = binary.header.cpu_type == lief.MachO.Header.CPU_TYPE.ARM64
    if arm and not binary.has_code_signature:
        yield "the library is not signed, and macOS on arm64 loads none that are not"


def _pe_faults(binary: lief.PE.Binary) -> Iterator[str]:
    kinds = lief.PE.OptionalHeader.DLL_CHARACTERISTICS
    for kind in (kinds.DYNAMIC_BASE, kinds.HIGH_ENTROPY_VA):
        if not binary.optional_header.has(kind):
            yield f"the library lacks {kind.name}"


def faults_of_wheel(wheel: Path) -> Iterator[str]:
    """Yield what is wrong with a wheel."""
    name, version, tag = wheel.stem.split("-", 2)
    information = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(wheel) as archive:
        files = {entry: archive.read(entry) for entry in archive.namelist()}
    if wheel.stat().st_size > MOST_BYTES:
        yield f"{wheel.stat().st_size} bytes, and {MOST_BYTES} are the most"
    about = files[f"{information}/WHEEL"].decode()
    if re.findall(r"^Tag: (.*)$", about, re.MULTILINE) != [tag]:
        yield f"WHEEL has other tags than {tag}"
    if ("Root-Is-Purelib: true\n" in about) != tag.endswith("-any"):
        yield "WHEEL is wrong about a library in it"
    rows = [row.split(",") for row in files[f"{information}/RECORD"].decode().splitlines()]
    for entry, *expected in rows:
        content = files.get(entry, b"")
        if expected[0] and expected != [digest(content), str(len(content))]:
            yield f"{entry} differs from RECORD"
    if {entry for entry, *_ in rows} != {*files}:
        yield "RECORD names other files"
    for needed in (*DATA, f"{information}/licenses/LICENSE"):
        if needed not in files:
            yield f"{needed} is missing"
    for entry in files:
        if entry.endswith((".c", ".h", ".pyc")) or entry.split("/")[0] not in (name, information):
            yield f"{entry} does not belong into a wheel"
    libraries = {entry for entry in files if entry.endswith((".so", ".dll", ".dylib"))}
    [platform, *_] = [*(one for one in PLATFORMS if one.tag == tag.split("-")[2]), None]
    if libraries != ({LIBRARY_PATH} if platform else set()):
        yield f"it has the libraries {sorted(libraries)}"
    elif platform:
        yield from faults_of_library(files[LIBRARY_PATH], platform)


def faults_of_folder(folder: Path) -> Iterator[str]:
    """Yield what is wrong with the wheels of a release, and which of them are missing."""
    wheels = sorted(folder.glob("*.whl"))
    tags = {wheel.stem.split("-")[-1] for wheel in wheels}
    for missing in {"any", *(platform.tag for platform in PLATFORMS)} - tags:
        yield f"there is no wheel for {missing}"
    for wheel in wheels:
        yield from (f"{wheel.name}: {fault}" for fault in faults_of_wheel(wheel))


def faults_of_second_build(folder: Path) -> Iterator[str]:
    """Build everything again, from a copy in another place, and yield which bytes differ."""
    with tempfile.TemporaryDirectory() as place:
        copy, again = Path(place, "a copy"), Path(place, "dist")
        built = shutil.ignore_patterns("__pycache__", "*.so")
        # Contents alone, so that the copy has other times.
        package = (ROOT / "gradclip", copy / "gradclip")
        shutil.copytree(*package, ignore=built, copy_function=shutil.copyfile)
        for name in ("LICENSE", "README.md", "pyproject.toml", "setup.py"):
            shutil.copyfile(ROOT / name, copy / name)
        write_all(again, copy)
        for file in sorted(again.iterdir()):
            if file.read_bytes() != (folder / file.name).read_bytes():
                yield f"{file.name}: another build gives other bytes"


def main() -> None:
    """Check a folder."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "dist")
    parser.add_argument("--again", action="store_true", help="build again and compare the bytes")
    given = parser.parse_args()
    faults = [*faults_of_folder(given.folder)]
    if given.again:
        faults += faults_of_second_build(given.folder)
    print("\n".join(faults) or f"{len([*given.folder.iterdir()])} files, no fault")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
