"""What the documentation shows of other frameworks is run in them."""

from typing import Any

import pytest

import gradclip
from tests.support import trainings
from tests.support.docs import FRAMEWORKS, SNIPPETS

pytestmark = pytest.mark.filterwarnings("ignore")  # what the frameworks have to say is theirs

TRAINERS = {"lightning", "transformers", "accelerate"}


def snippet_names(framework: str) -> dict[str, Any]:
    """Return the names that a snippet takes for granted."""
    if framework == "lightning":
        from tests.support.lightning import regression

        return {"module": regression(), "loader": trainings.loader()}
    if framework == "transformers":
        from tests.support.transformers import NetOutputs, rows

        return {"model": NetOutputs(), "data": rows()}
    net = trainings.net_of()
    names = {"model": net, "optimizer": trainings.momentum(net), "data": trainings.loader()}
    return {**names, "loss": trainings.loss_of, "GradientClipper": gradclip.GradientClipper}


def of_trainers() -> list[Any]:
    """Return each snippet with the framework that it names and that trains."""
    found = [(match.group(), code) for code in SNIPPETS if (match := FRAMEWORKS.search(code))]
    assert {name for name, _ in found} >= TRAINERS
    return [
        pytest.param(*each, id=f"{each[0]}-{n}")
        for n, each in enumerate(found)
        if each[0] in TRAINERS
    ]


@pytest.mark.parametrize(("framework", "snippet"), of_trainers())
def test_the_snippet_runs(framework, snippet, tmp_path, monkeypatch):
    pytest.importorskip(framework, reason=f"there is no {framework}")
    monkeypatch.chdir(tmp_path)
    names = snippet_names(framework)
    exec(snippet, names)
    owner = names.get("callback")
    clippers = owner.clippers if hasattr(owner, "clippers") else [getattr(owner, "clipper", None)]
    for clipper in filter(None, [*clippers, names.get("clipper")]):
        clipper.close()
        assert clipper.steps > 0
