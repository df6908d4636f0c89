"""A TensorBoard server, started on a directory and asked over HTTP."""

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

CHECKOUT = Path(__file__).parents[2]
WAIT = 90.0
_direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def eventually(ask: Callable[[], Any]) -> Any:
    """Return the first answer that is not empty."""
    end = time.monotonic() + WAIT
    while time.monotonic() < end:
        with suppress(urllib.error.URLError):
            if answer := ask():
                return answer
        time.sleep(0.1)
    raise TimeoutError(f"no answer in {WAIT} s")


class Server:
    """A TensorBoard that runs."""

    def __init__(self, address: str) -> None:
        self.address = address

    def ask(self, path: str, **query: str) -> Any:
        """Return what it answers, read as JSON."""
        url = f"{self.address}{path}?{urllib.parse.urlencode(query)}"
        with _direct.open(url, timeout=10) as got:
            return json.load(got)


def installed_in(folder: Path) -> dict[str, str]:
    """Return an environment in which this very checkout is installed, with its entry points."""
    project = (CHECKOUT / "pyproject.toml").read_text()
    [plugins] = re.findall(r"^\[project.entry-points.(\w+)\]\n((?:.+\n)+)", project, re.M)
    info = folder / "gradclip-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: gradclip\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[{}]\n{}".format(*plugins).replace('"', ""))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (folder, CHECKOUT)))}


@contextmanager
def tensorboard(directory: Path | None, messages: Path, *options: str) -> Iterator[Server]:
    """Start TensorBoard on a free port of the loopback interface."""
    command = [sys.executable, "-m", "tensorboard.main", "--host", "127.0.0.1", "--port", "0"]
    command += [*options] if directory is None else ["--logdir", str(directory), *options]
    folder = tempfile.TemporaryDirectory()
    environment = installed_in(Path(folder.name))
    with messages.open("w") as stream:
        process = subprocess.Popen(
            command, stdout=stream, stderr=stream, start_new_session=True, env=environment
        )
    try:

        def address() -> str | None:
            assert process.poll() is None, messages.read_text()
            found = re.search(r"http://127\.0\.0\.1:\d+/\S*", messages.read_text())
            return found[0] if found else None

        yield Server(eventually(address))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its data server is in the same group
        process.wait(timeout=30)
        folder.cleanup()
