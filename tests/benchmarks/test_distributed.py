from __future__ import annotations

import re
from typing import Any

import pytest

from benchmarks.cost import distributed


def row(ranks: int, parameters: int, ratio: float, collectives: int = 1) -> dict[str, Any]:
    return {
        "ranks": ranks,
        "parameters": parameters,
        "regime": "under",
        "us": {"torch": 1000.0, "function": 100.0, "hook": 120.0, "all_reduce": 50.0},
        "ratios": {"function": ratio, "hook": 0.12},
        "collectives": {"torch": 2, "function": collectives, "hook": 1},
    }


def cells_of(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if re.match(r"\| *\d", line)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.slow
def test_the_benchmark_runs_and_counts_one_collective_a_step(capsys, tmp_path):
    saved = tmp_path / "results" / "distributed.md"
    options = ["--ranks", "2", "--parameters", "8", "--rounds", "2", "--save", str(saved)]
    distributed.main(options)
    printed = capsys.readouterr().out
    assert printed == saved.read_text()
    rows = cells_of(printed)
    assert [cells[:3] for cells in rows] == [["2", "8", "under"], ["2", "8", "clipping"]]
    for cells in rows:
        assert len(cells) == 10
        assert all(float(cell) > 0 for cell in cells[3:])
        assert int(cells[6]) >= 1  # torch's
        assert cells[7:9] == ["1", "1"]
    assert "| collectives a step, all ranks in one group | 1 | 1 | True |" in printed
    assert re.search(r"^torch \S+, python .*, date \d{4}-\d\d-\d\d$", printed, re.M)


def test_figures_are_met_or_not():
    rows = [row(2, 48, 0.25), row(2, 48, 0.1), row(2, 300, 0.3, collectives=2), row(4, 48, 0.9)]
    lines = distributed.figures(rows)
    assert lines[2:] == [
        "| collectives a step, all ranks in one group | 1 | 2 | False |",
        "| function, 2 ranks, 48 parameters, of torch's time | 0.25 | 0.250 | True |",
        "| hook, 2 ranks, 48 parameters, of torch's time | 0.25 | 0.120 | True |",
        "| function, 2 ranks, 300 parameters, of torch's time | 0.2 | 0.300 | False |",
        "| hook, 2 ranks, 300 parameters, of torch's time | 0.2 | 0.120 | True |",
    ]


def test_odd_numbers_of_parameters_are_refused(capsys):
    with pytest.raises(SystemExit):
        distributed.main(["--parameters", "7"])
    assert "even" in capsys.readouterr().err
