"""The snippets of README and docs/ run, and show options that exist."""

import inspect
import re
from collections import OrderedDict
from contextlib import contextmanager, nullcontext

import pytest
from torch import distributed, nn, ones, optim

import gradclip
from gradclip.cli.demo.training import one_thread
from tests.support.docs import CODE, FRAMEWORKS, PAGES, SNIPPETS

PLAIN = [code for code in SNIPPETS if not FRAMEWORKS.search(code)]


@contextmanager
def alone_in_a_group():
    store = distributed.HashStore()
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        distributed.destroy_process_group()


@contextmanager
def started_by_torchrun():
    """As the only process; the snippet makes the group."""
    variables = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        try:
            yield
        finally:
            distributed.destroy_process_group()


# torch itself, when torch.compile() imports inductor:
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
@pytest.mark.parametrize("snippet", PLAIN, ids=lambda code: code.split("\n")[0])
@one_thread()
def test_the_snippets_run(snippet, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setattr("webbrowser.open", lambda address: True)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = nn.Sequential(OrderedDict(body=nn.Linear(3, 2), head=nn.Linear(2, 1)))
    stage = nn.ModuleDict({"embed": nn.Embedding(3, 2)})
    across_ranks = "ranks=" in snippet
    names = {
        "stage": stage,
        "gradclip": gradclip,
        "GradientClipper": gradclip.GradientClipper,
        "model": model,
        "optimizer": optim.SGD((stage if across_ranks else model).parameters(), lr=0.1),
        "data": [ones(2, 3)] * 3,
        "loss": lambda model, batch: model(batch).sum(),
    }
    starts = "init_process_group()" in snippet
    place = started_by_torchrun if starts else alone_in_a_group if across_ranks else nullcontext
    with place():
        exec(snippet, names)
        if "clipper" in names:
            names["clipper"].close()
    if snippet == PLAIN[0]:
        assert list((tmp_path / "runs/a").iterdir())


def test_the_options_are_those_of_the_clipper():
    [options, *_] = CODE.findall(PAGES["docs/rules.md"])
    shown = set(re.findall(r"^    (\w+)=", options, flags=re.MULTILINE))
    assert shown <= set(inspect.signature(gradclip.GradientClipper).parameters)
