"""Numbers of the README that are constants of the package."""

import pytest
import torch

from gradclip.engines.layout import is_narrow
from gradclip.records import replays


@pytest.mark.parametrize(("rows", "elements", "narrow"), [(65, 63, 1), (64, 63, 0), (65, 64, 0)])
def test_more_than_64_rows_shorter_than_64_are_left_to_torch_operators(rows, elements, narrow):
    assert is_narrow(torch.zeros(rows, elements)) == bool(narrow)


@pytest.mark.parametrize("count", [1, 10, 11, 300, 9_999, 50_000])
def test_of_a_graph_as_many_records_are_kept_as_the_readme_says(count):
    ring = replays.ReplayedRecords(torch.zeros(count))
    assert ring.capacity >= min(10_000, 100_000 // count)
    assert ring._rows.numel() <= replays.MOST_NUMBERS
