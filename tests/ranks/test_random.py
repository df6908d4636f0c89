"""Models that hypothesis makes, spread over ranks in any way, against the whole gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradclip import GradientClipper
from tests.support.dtensors import INF, SCOPES, mesh_of, oracle, placements_of, spread

DIMENSIONS = {"one": 1, "plain": 0, "two": 2, "a": 1, "b": 1}
DTYPES = ("float32", "bfloat16", "float64", "float16")
SIZES = (3, 1, 7, 2, 5, 4, 6, 0)


class Given(NamedTuple):
    """How a parameter is spread, in words."""

    shape: tuple[int, ...]
    mesh: str
    words: tuple[str, ...]
    dtype: str
    has_gradient: bool
    scale: float


class RandomModel(NamedTuple):
    """A model and how it is clipped."""

    parameters: list[Given]
    scope: str
    order: float
    limit: float
    seed: int

    def full_gradients(self) -> dict[str, Tensor]:
        """Return the whole gradients; 0 where there is none."""
        generator = torch.Generator().manual_seed(self.seed)
        full = {}
        for index, each in enumerate(self.parameters):
            gradient = torch.randn(each.shape, generator=generator, dtype=torch.float64)
            scale = each.scale if each.has_gradient else 0.0
            full[f"p{index}"] = (gradient * scale).to(getattr(torch, each.dtype))
        return full


@st.composite
def parameters(draw: Any, meshes: tuple[str, ...]) -> Given:
    shape = tuple(draw(st.lists(st.sampled_from(SIZES), max_size=3)))
    mesh = draw(st.sampled_from(meshes))
    words = st.sampled_from([*map(str, range(len(shape))), "R", "P"])
    return Given(
        shape,
        mesh,
        tuple(draw(words) for _ in range(DIMENSIONS[mesh])),
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from([True, True, True, False])),
        draw(st.sampled_from([1.0, 1e-3, 1e3])),
    )


def cases(*meshes: str) -> st.SearchStrategy[RandomModel]:
    return st.builds(
        RandomModel,
        st.lists(parameters(meshes), min_size=1, max_size=5),
        st.sampled_from(SCOPES),
        st.sampled_from([2.0, 1.0, 3.0, INF]),
        st.sampled_from([0.7, 1e-2, 1e6]),
        st.integers(0, 2**16),
    )


def spread_as(each: Given, full: Tensor, *, is_gradient: bool) -> Tensor:
    """Spread a tensor that every rank has; a parameter has no pending sum."""
    if each.mesh == "plain":
        return full.clone()
    words = " ".join(each.words)
    words = words if is_gradient else words.replace("P", "R")
    return spread(full, mesh_of(each.mesh), placements_of(words))


class Still(torch.optim.Optimizer):
    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self) -> None:
        """Leave the parameters as they are; torch cannot add every pending sum to them."""


def clip(case: RandomModel) -> Any:
    """Clip a model; return norms by label, and the whole gradients afterwards."""
    named = {}
    for (name, full), each in zip(case.full_gradients().items(), case.parameters, strict=True):
        named[name] = nn.Parameter(spread_as(each, torch.zeros_like(full), is_gradient=False))
        if each.has_gradient:
            named[name].grad = spread_as(each, full, is_gradient=True)
    optimizer = Still([*named.items()])
    options = {"scope": case.scope, "norm_type": case.order}
    with GradientClipper(optimizer, case.limit, **options) as clipper:
        optimizer.step()
    gradients = [parameter.grad for parameter in named.values()]
    clipped = [g if g is None else getattr(g, "full_tensor", g.clone)() for g in gradients]
    norms = dict(zip(clipper.labels, clipper.last.norms.tolist(), strict=True))
    return norms, dict(zip(named, clipped, strict=True))


def check_model(pool: Any, case: RandomModel) -> None:
    needed, expected = oracle(case.full_gradients(), case.scope, case.order, case.limit)
    results = pool.run(clip, case)
    for norms, clipped in results:
        assert repr(norms) == repr(results[0][0])  # the same bits on all ranks
        assert norms == pytest.approx(needed or {"global": 0.0}, rel=1e-6, abs=0)
        for each, (name, gradient) in zip(case.parameters, clipped.items(), strict=True):
            assert (gradient is not None) == each.has_gradient
            if gradient is not None:
                facts = torch.finfo(gradient.dtype)
                most = max(expected[name].abs().flatten().tolist(), default=0.0)
                atol = 8 * facts.eps * (most + facts.smallest_normal)
                torch.testing.assert_close(
                    gradient.double(), expected[name], rtol=2 * facts.eps, atol=atol
                )


# The ranks find their groups in another order, and add up in another.
IN_ANOTHER_ORDER = RandomModel(
    [
        Given((6,), "plain", (), "float64", True, 1e-3),
        Given((6,), "b", ("P",), "float32", True, 1.0),
        Given((), "one", ("R",), "float64", True, 1e-3),
    ],
    scope="global",
    order=1.0,
    limit=0.01,
    seed=2,
)
# Once a rank has failed the others wait for it in vain, so that nothing is shrunk.
FOUND_AS_IT_IS = (Phase.explicit, Phase.generate)


@settings(max_examples=40, phases=FOUND_AS_IT_IS)
@given(case=cases("one", "one", "plain"))
def test_models_on_one_mesh(two_ranks, case):
    """Any model is clipped by its whole gradients."""
    check_model(two_ranks, case)


@settings(max_examples=60, phases=FOUND_AS_IT_IS)
@given(case=cases(*DIMENSIONS))
@example(case=IN_ANOTHER_ORDER)
@pytest.mark.slow
def test_models_on_several_meshes(four_ranks, case):
    """Any model is clipped by its whole gradients."""
    check_model(four_ranks, case)
