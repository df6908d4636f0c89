"""A TensorBoard server, started on a directory and asked over HTTP."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

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


@contextmanager
def tensorboard(directory: Path, messages: Path, *options: str) -> Iterator[Server]:
    """Start TensorBoard on a free port of the loopback interface."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(directory)]
    command += ["--host", "127.0.0.1", "--port", "0", *options]
    with messages.open("w") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream, start_new_session=True)
    try:

        def address() -> str | None:
            assert process.poll() is None, messages.read_text()
            found = re.search(r"http://127\.0\.0\.1:\d+/", messages.read_text())
            return found[0] if found else None

        yield Server(eventually(address))
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # its data server is in the same group
        process.wait(timeout=30)
