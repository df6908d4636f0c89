"""Builds the library of the native engine where there is a C compiler; pyproject.toml has the rest.

The library is linked neither to Python nor to torch: one wheel serves every version of both.
"""

import os
from typing import Any

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ENGINES = "gradclip/engines/native/"
LIBRARY = Extension(
    "gradclip.engines.native._native",
    sources=[ENGINES + "_native.c"],
    depends=[
        ENGINES + f"_native_{part}.h" for part in ("elements", "kernels", "rows", "walk", "work")
    ],
    libraries=["m"],
    extra_compile_args=[
        *("-std=gnu11", "-O3", "-g0", "-fvisibility=hidden"),
        *("-fno-fast-math", "-ffp-contract=off"),  # NaN and infinity count, and all bits agree
    ],
    optional=True,
)


class BuildLibrary(build_ext):
    """Builds without Python's part in the name, and says so where it cannot build."""

    def get_ext_filename(self, fullname: str) -> str:
        """Return the path beside loading.py, which loads it."""
        return os.path.join(*fullname.split(".")) + ".so"

    def warn(self, message: str) -> None:
        """Say what the failure of the optional extension means."""
        super().warn(message)
        super().warn("gradclip goes without its native engine: torch operators serve the CPU")

    @property
    def built(self) -> bool:
        """Whether there is a library to be packed."""
        return os.path.exists(self.get_ext_fullpath(LIBRARY.name))


class PlatformWheel(bdist_wheel):
    """A wheel for every Python; for one platform if the library is in it, else for all."""

    def get_tag(self) -> tuple[str, str, str]:
        """Return the tags of interpreter, ABI and platform."""
        build: Any = self.get_finalized_command("build_ext")  # a BuildLibrary
        return "py3", "none", super().get_tag()[2] if build.built else "any"


if __name__ == "__main__":  # release/wheels.py compiles what is named here for other platforms
    setup(
        ext_modules=[LIBRARY],
        cmdclass={"build_ext": BuildLibrary, "bdist_wheel": PlatformWheel},
    )
