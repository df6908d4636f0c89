"""Measured numbers of README and docs/ are those of benchmarks/results/."""

import re

import pytest

from tests.support.docs import PAGES, ROOT

RESULTS = ROOT / "benchmarks/results"
ROUNDED = 0.0051
"""The pages show two decimals."""
SETS = {
    "six small tensors": "small",
    "6 small tensors": "small",
    "LSTM, 1.3M": "lstm",
    "ResNet-50": "resnet50",
    "GPT-2 124M": "gpt2",
}
WAYS = {
    "function": ("gradclip's function", "`gradclip.clip_grad_norm_`"),
    "hook": ("a whole hooked step, record included", "a whole step with `GradientClipper`"),
    "operators": ("the function without the C engine",) * 2,
}
ARMS = {
    '`"auto"`': "auto",
    "the line of `gradclip report` after one run": "advised",
    "the line that `gradclip report` advises after one run": "advised",
    "nothing": "none",
    "zclip's ZClip, with its cap of 1": "zclip ZClip",
    "smartclip's AutoClip": "smartclip AutoClip",
    "autoclip's QuantileClip": "autoclip QuantileClip",
}


def tables_in(text: str) -> list[list[list[str]]]:
    """Return the rows of each table, the header first, without the line below it."""
    blocks = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    rows = [[[c.strip() for c in line[1:-1].split("|")] for line in b.splitlines()] for b in blocks]
    return [[table[0], *table[2:]] for table in rows]


def table_with(text: str, *header: str) -> list[list[str]]:
    """Return the rows of the only table whose header has these cells, the header first."""
    [table] = [table for table in tables_in(text) if {*header} <= {*table[0]}]
    return table


@pytest.mark.parametrize(
    ("page", "small"), [("README.md", "six small tensors"), ("docs/cost.md", "6 small tensors")]
)
def test_ratios_to_torch(page, small):
    header, *measured = table_with((RESULTS / "cost.md").read_text(), "set", "regime")
    ratios = {tuple(row[:3]): dict(zip(header, row, strict=True)) for row in measured}
    (_, *sets), *rows = table_with(PAGES[page], small, "GPT-2 124M")
    ways = {name: way for way, names in WAYS.items() for name in names}
    assert {ways[row[0]] for row in rows} == {*WAYS}
    for way, *cells in rows:
        for name, cell in zip(sets, cells, strict=True):
            for regime, shown in zip(("under", "clipping"), cell.split(" / "), strict=True):
                assert shown == ratios[SETS[name], "float32", regime][ways[way]]


def test_times_with_a_log():
    _, *measured = table_with((RESULTS / "cost.md").read_text(), "us", "ratio")
    _, *shown = table_with(PAGES["docs/cost.md"], "us", "of torch's time")
    assert [row[1:] for row in shown] == [row[1:] for row in measured]


def test_ratios_to_torch_on_ranks():
    _, *measured = table_with((RESULTS / "distributed.md").read_text(), "ranks", "regime")
    ratios = {tuple(row[:3]): [float(cell) for cell in row[4:6]] for row in measured}
    _, *rows = table_with(PAGES["docs/cost.md"], "ranks", "parameters")
    assert {(*row[:2], regime) for row in rows for regime in ("under", "clipping")} == {*ratios}
    for ranks, parameters, *cells, _ in rows:
        for index, regime in enumerate(("under", "clipping")):
            shown = [float(cell.split(" / ")[index]) for cell in cells]
            assert shown == pytest.approx(ratios[ranks, parameters, regime], abs=ROUNDED)


@pytest.mark.parametrize("page", ["docs/choosing.md", "docs/experiments.md"])
def test_trainings_near_the_best_threshold(page):
    _, *measured = table_with((RESULTS / "without_tuning.md").read_text(), "failed of all")
    counts = {row[0]: row[1:-1] for row in measured}
    _, *rows = table_with(PAGES[page], "clipped by", "failed of all")
    assert len(rows) > 3
    for way, *shown in rows:
        assert shown == counts[ARMS.get(way, way.strip("`"))]
