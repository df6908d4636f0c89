"""The platforms that have a wheel of their own."""

from __future__ import annotations

from typing import NamedTuple


class Platform(NamedTuple):
    """One wheel: its tag, and how its library is made and tried.

    Attributes:
        tag: The platform tag of the wheel, which promises the oldest system that it runs on.
        target: The same for zig: processor, system, and the C library or its oldest version.
        needs: Libraries that the system brings, and all that the library may need.
        options: What only this linker is to be told.
    """

    tag: str
    target: str
    needs: tuple[str, ...]
    options: tuple[str, ...] = ()

    @property
    def processor(self) -> str:
        """Return "x86_64" or "aarch64"."""
        return self.target.partition("-")[0]

    @property
    def format(self) -> str:
        """Return the format of its libraries: "ELF", "MachO" or "PE"."""
        system = self.target.split("-")[1].partition(".")[0]
        return {"linux": "ELF", "macos": "MachO", "windows": "PE"}[system]


_GLIBC, _MUSL = ("libc.so.6", "libm.so.6"), ("libc.so",)
_MACOS, _WINDOWS = ("/usr/lib/libSystem.B.dylib",), ("KERNEL32.dll", "api-ms-win-crt-")
# Without it the name under which a library asks to be found is the path where it was built.
_NAMED = ("-Wl,-install_name,@rpath/_native.so",)

PLATFORMS = (
    Platform("manylinux_2_17_x86_64", "x86_64-linux-gnu.2.17", _GLIBC),
    Platform("manylinux_2_17_aarch64", "aarch64-linux-gnu.2.17", _GLIBC),
    Platform("musllinux_1_2_x86_64", "x86_64-linux-musl", _MUSL),
    Platform("musllinux_1_2_aarch64", "aarch64-linux-musl", _MUSL),
    Platform("macosx_11_0_x86_64", "x86_64-macos.11.0", _MACOS, _NAMED),
    Platform("macosx_11_0_arm64", "aarch64-macos.11.0", _MACOS, _NAMED),
    Platform("win_amd64", "x86_64-windows-gnu", _WINDOWS),
    Platform("win_arm64", "aarch64-windows-gnu", _WINDOWS),
)
