"""What writes and checks wheels: the same bytes each time, and no fault goes through."""

import io
import os
import re
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest

lief = pytest.importorskip("lief", reason="there is no LIEF")

from release import check, trial, wheels  # noqa: E402 - after the skip
from release.platforms import PLATFORMS  # noqa: E402

FILES = {
    "gradclip/__init__.py": b"",
    **dict.fromkeys(check.DATA, b""),
    "gradclip-1.0.dist-info/METADATA": b"Name: gradclip\n",
    "gradclip-1.0.dist-info/licenses/LICENSE": b"MIT",
    "gradclip-1.0.dist-info/RECORD": b"of another wheel",
}
LINUX = PLATFORMS[0]


@pytest.fixture(scope="module")
def library() -> bytes:
    """A library for Linux on x86_64."""
    return wheels.compiled(LINUX)


def faults(wheel: Path) -> str:
    return "\n".join(check.faults_of_wheel(wheel))


def repacked(wheel: Path, name: str, content: bytes | None) -> Path:
    """Change a file of a wheel behind the back of RECORD; None removes it."""
    with zipfile.ZipFile(wheel) as archive:
        files = {entry: archive.read(entry) for entry in archive.namelist()}
    files.pop(name, None)
    with zipfile.ZipFile(wheel, "w") as archive:
        for entry, data in files.items() if content is None else {**files, name: content}.items():
            archive.writestr(entry, data)
    return wheel


def test_a_wheel_depends_on_its_files_alone(tmp_path):
    """Neither their order nor the time and folder in which it is written change a byte."""
    (tmp_path / "other").mkdir()
    one = wheels.write_wheel(tmp_path, FILES)
    other = wheels.write_wheel(tmp_path / "other", dict(reversed(FILES.items())))
    assert one.name == "gradclip-1.0-py3-none-any.whl"
    assert one.read_bytes() == other.read_bytes()
    assert faults(one) == ""


def test_an_sdist_depends_on_its_files_alone(tmp_path):
    for hour, names in enumerate((["a", "b"], ["b", "a"])):
        with tarfile.open(tmp_path / f"{hour}.tar.gz", "w:gz") as archive:
            for name in names:
                member = tarfile.TarInfo(name)
                member.size, member.mtime, member.uid = 1, hour, hour
                archive.addfile(member, io.BytesIO(name.encode()))
        wheels.write_sdist(tmp_path / f"{hour}.tar.gz", tmp_path / f"{hour}.out")
    assert (tmp_path / "0.out").read_bytes() == (tmp_path / "1.out").read_bytes()


@pytest.mark.parametrize(
    ("name", "content", "fault"),
    [
        ("gradclip/__init__.py", b"other", "__init__.py differs from RECORD"),
        ("gradclip/added.py", b"", "RECORD names other files"),
        ("gradclip/py.typed", None, "py.typed is missing"),
        ("gradclip/view/page/page.css", None, "page.css is missing"),
        ("gradclip-1.0.dist-info/licenses/LICENSE", None, "LICENSE is missing"),
        ("gradclip/engines/native/_native.c", b"", "_native.c does not belong"),
        ("tests/test_all.py", b"", "tests/test_all.py does not belong"),
        (wheels.LIBRARY_PATH, b"", "it has the libraries"),
        ("gradclip-1.0.dist-info/WHEEL", b"Tag: py3-none-win32\n", "WHEEL has other tags"),
        (
            *("gradclip-1.0.dist-info/WHEEL", b"Tag: py3-none-any\nTag: py3-none-win32\n"),
            "WHEEL has other tags",
        ),
        ("gradclip-1.0.dist-info/WHEEL", b"Tag: py3-none-any\n", "wrong about a library"),
    ],
)
def test_a_fault_of_a_wheel_is_found(tmp_path, name, content, fault):
    wheel = repacked(wheels.write_wheel(tmp_path, FILES), name, content)
    assert fault in faults(wheel)


def test_a_wheel_that_is_large_or_lacks_its_library_is_found(tmp_path):
    large = {**FILES, "gradclip/large.py": os.urandom(check.MOST_BYTES)}
    assert "are the most" in faults(wheels.write_wheel(tmp_path, large))
    assert "it has the libraries []" in faults(wheels.write_wheel(tmp_path, FILES, LINUX.tag))
    assert "no wheel for win_arm64" in "\n".join(check.faults_of_folder(tmp_path))


def test_a_library_has_no_fault_for_its_own_platform_alone(library):
    by_platform = {one.tag: [*check.faults_of_library(library, one)] for one in PLATFORMS}
    assert [tag for tag, found in by_platform.items() if not found] == [LINUX.tag]
    assert [*check.faults_of_library(b"text", LINUX)] == ["the library is no ELF file"]


def test_a_run_path_is_found():
    faulty = wheels.compiled(LINUX._replace(options=("-Wl,-rpath,/opt/lib",)))
    assert [*check.faults_of_library(faulty, LINUX)] == ["the library has RUNPATH"]


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        (struct.pack("<2I", 0x6474E551, 6), struct.pack("<2I", 0x6474E551, 7), "executable stack"),
        (b"\0libm.so.6\0", b"\0libq.so.6\0", "needs libq.so.6"),
        (b"\0GLIBC_2.17\0", b"\0GLIBC_2.99\0", "needs GLIBC_2.99"),
        (b"\0gradclip_clamp\0", b"\0gradclip_other\0", "exports .*the engine calls"),
    ],
)
def test_a_changed_library_is_found(library, old, new, fault):
    assert library.count(old) == 1
    found = "\n".join(check.faults_of_library(library.replace(old, new), LINUX))
    assert re.search(fault, found)


def test_the_trial_knows_the_platforms_of_the_release():
    assert {*trial.RUNNERS} <= {platform.tag for platform in PLATFORMS}
