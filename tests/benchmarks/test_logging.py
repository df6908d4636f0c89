from __future__ import annotations

import pytest

from benchmarks.cost import logging


@pytest.mark.slow
def test_the_benchmark_runs_and_prints_every_log(capsys):
    logging.main(["--seconds", "0.01"])
    printed = capsys.readouterr().out
    for name in ("no log", "default", "5 largest", "all, JSON", "by hand, all"):
        assert name in printed
    for limit in logging.LIMITS.values():
        assert str(limit) in printed
