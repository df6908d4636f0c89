"""What the README shows is run."""

from __future__ import annotations

import re
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

import gradclip

README = (Path(__file__).parents[1] / "README.md").read_text()
SNIPPETS = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda code: code.split("\n")[0])
def test_the_snippets_run(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = nn.Sequential(OrderedDict(body=nn.Linear(3, 2), head=nn.Linear(2, 1)))
    names = {
        "gradclip": gradclip,
        "GradientClipper": gradclip.GradientClipper,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "data": [torch.ones(2, 3)] * 3,
        "loss": lambda model, batch: model(batch).sum(),
    }
    exec(snippet, names)
    if "clipper" in names:
        names["clipper"].close()


def test_the_first_snippet_clips_and_logs(tmp_path, monkeypatch):
    test_the_snippets_run(SNIPPETS[0], tmp_path, monkeypatch)
    assert list((tmp_path / "runs/a").iterdir())


def test_the_options_are_those_of_the_clipper():
    import inspect

    shown = set(re.findall(r"^    (\w+)=", SNIPPETS[1], flags=re.MULTILINE))
    assert shown <= set(inspect.signature(gradclip.GradientClipper).parameters)
