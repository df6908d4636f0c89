"""Calls that the guides show within a sentence or a table can be made."""

import re

import pytest
import torch
from torch import nn

import gradclip
from gradclip import thresholds
from tests.support.docs import PROSE

GUIDES = ("choosing", "concepts", "migrating", "policies", "quickstart", "rules", "troubleshooting")
KINDS = ["GradientClipper", "Scope", *(name for name in thresholds.__all__ if name[0].isupper())]
CALL = re.compile(rf"`((?:{'|'.join(KINDS)})\([^`]*\))`")
CALLS = sorted(
    {
        call
        for guide in GUIDES
        for call in CALL.findall(" ".join(PROSE[f"docs/{guide}.md"].split()))
        if not re.search(r"\.\.\.|=[,)]", call)  # these leave something out
    }
)


def placeholders():
    """Return what the guides call by these names."""
    layers = [nn.Linear(3, 2), nn.Linear(2, 1)]
    first, second = (torch.optim.SGD(layer.parameters(), lr=0.1) for layer in layers)
    model = nn.Sequential(*layers)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizers = {"optimizer": optimizer, "first": first, "second": second}
    functions = {"f": lambda step: 1.0, "by_layer": lambda name, parameter: name.split(".")[0]}
    return {"c": 1.0, "function": functions["f"], "model": model, **functions, **optimizers}


def test_there_are_calls_of_clippers_scopes_and_rules():
    assert {"GradientClipper", "Scope", "ZScore"} <= {call.partition("(")[0] for call in CALLS}


@pytest.mark.parametrize("call", CALLS)
def test_an_inline_call_can_be_made(call):
    rules = {name: getattr(thresholds, name) for name in thresholds.__all__}
    public = {name: getattr(gradclip, name) for name in gradclip.__all__}
    eval(call, {**public, **rules, **placeholders()})
