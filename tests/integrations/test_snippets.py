"""What the README shows of other frameworks is run in them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import gradclip
from tests.support.readme import FRAMEWORKS, SNIPPETS

pytestmark = pytest.mark.filterwarnings("ignore")  # what the frameworks have to say is theirs


def of_lightning() -> dict[str, Any]:
    pl = pytest.importorskip("lightning.pytorch", reason="there is no Lightning")

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 1)

        def training_step(self, batch: Any) -> Any:
            return self.layer(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    return {"module": Module(), "loader": DataLoader(torch.ones(8, 2), 2)}


def of_transformers() -> dict[str, Any]:
    transformers = pytest.importorskip("transformers", reason="there is no transformers")
    config = transformers.GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=11, n_positions=8)
    letters = torch.arange(8) % 11
    return {
        "model": transformers.GPT2LMHeadModel(config),
        "data": [{"input_ids": letters, "labels": letters}] * 8,
    }


def of_accelerate() -> dict[str, Any]:
    pytest.importorskip("accelerate", reason="there is no accelerate")
    model = nn.Linear(2, 1)
    return {
        "GradientClipper": gradclip.GradientClipper,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "data": DataLoader(torch.ones(8, 2), 2),
        "loss": lambda model, batch: model(batch).square().mean(),
    }


MADE = {"lightning": of_lightning, "transformers": of_transformers, "accelerate": of_accelerate}


@pytest.mark.parametrize("framework", MADE)
def test_the_snippet_runs(framework, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = {match.group(): code for code in SNIPPETS if (match := FRAMEWORKS.search(code))}
    names = MADE[framework]()
    exec(found[framework], names)
    clippers = names["callback"].clippers if "callback" in names else [names.get("clipper")]
    for clipper in filter(None, clippers):
        clipper.close()
        assert clipper.steps > 0
