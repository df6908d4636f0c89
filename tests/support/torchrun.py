"""Scripts run on several processes, as their users run them."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

SINGLE_MACHINE = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


def torchrun(script: Path, *arguments: str, processes: int, cwd: Path) -> list[str]:
    """Return what each process printed: in one stream, lines of several may share a line."""
    printed = cwd / "printed"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    files = ["--redirects", "1", "--log-dir", printed]
    done = subprocess.run(
        [*launcher, "--nproc-per-node", str(processes), *files, __file__, script, *arguments],
        cwd=cwd,
        env={**os.environ, **SINGLE_MACHINE, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    files = [next(printed.rglob(f"{rank}/stdout.log")) for rank in range(processes)]
    return [file.read_text() for file in files]


def run_and_leave(script: str) -> None:
    """Run a script, and leave at once: gloo may still hold a tensor, and would abort the end."""
    runpy.run_path(script, run_name="__main__")
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    del sys.argv[0]
    # As for a script that is started itself. This file's folder would hide the package tensorboard.
    sys.path[0] = str(Path(sys.argv[0]).parent)
    run_and_leave(sys.argv[0])
