"""Models that hypothesis makes, spread over ranks in any way, against the whole gradients."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradclip import GradientClipper
from tests.ranks.test_modules import oracle
from tests.ranks.test_spread import SCOPES
from tests.support.dtensors import INF, mesh_of

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


class Case(NamedTuple):
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


def cases(*meshes: str) -> st.SearchStrategy[Case]:
    return st.builds(
        Case,
        st.lists(parameters(meshes), min_size=1, max_size=5),
        st.sampled_from(SCOPES),
        st.sampled_from([2.0, 1.0, 3.0, INF]),
        st.sampled_from([0.7, 1e-2, 1e6]),
        st.integers(0, 2**16),
    )


def spread_as(each: Given, full: Tensor, *, is_gradient: bool) -> Tensor:
    """Spread a tensor that every rank has; of a pending sum each has a part that is its own."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

    if each.mesh == "plain":
        return full.clone()
    mesh = mesh_of(each.mesh)
    fits = [Shard(int(word)) if word.isdecimal() else Replicate() for word in each.words]
    local, given = distribute_tensor(full, mesh, fits).to_local(), [*fits]
    for dimension, word in enumerate(each.words if is_gradient else ()):
        if word == "P":
            given[dimension] = Partial()
            count, place = mesh.size(dimension), mesh.get_local_rank(dimension)
            local = local * (2 if place == 0 else -1 if place == count - 1 else 0)
    return DTensor.from_local(
        local, mesh, given, run_check=False, shape=full.shape, stride=full.stride()
    )


class Still(torch.optim.Optimizer):
    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})

    def step(self) -> None:
        """Leave the parameters as they are; torch cannot add every pending sum to them."""


def clip(case: Case) -> Any:
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
    gradients = {name: parameter.grad for name, parameter in named.items()}
    clipped = {
        name: None if gradient is None else getattr(gradient, "full_tensor", lambda g=gradient: g)()
        for name, gradient in gradients.items()
    }
    return dict(zip(clipper.labels, clipper.last.norms.tolist(), strict=True)), clipped


def check(pool: Any, case: Case) -> None:
    full = case.full_gradients()
    norms, expected = oracle(full, case.scope, case.order, case.limit)
    found = pool.run(clip, case)
    for own, clipped in found:
        assert repr(own) == repr(found[0][0])  # the same bits on all ranks
        assert own == pytest.approx(norms or {"global": 0.0}, rel=1e-6, abs=0)
        for each, (name, gradient) in zip(case.parameters, clipped.items(), strict=True):
            assert (gradient is not None) == each.has_gradient
            if gradient is not None:
                facts = torch.finfo(gradient.dtype)
                most = max(expected[name].abs().flatten().tolist(), default=0.0)
                torch.testing.assert_close(
                    gradient.double(),
                    expected[name],
                    rtol=2 * facts.eps,
                    atol=8 * facts.eps * (most + facts.smallest_normal),
                )


# The ranks find their groups in another order, and add up in another.
IN_ANOTHER_ORDER = Case(
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
def test_any_model_on_one_mesh_is_clipped_by_its_whole_gradients(two_ranks, case):
    check(two_ranks, case)


@settings(max_examples=60, phases=FOUND_AS_IT_IS)
@given(case=cases(*DIMENSIONS))
@example(case=IN_ANOTHER_ORDER)
@pytest.mark.slow
def test_any_model_on_several_meshes_is_clipped_by_its_whole_gradients(four_ranks, case):
    check(four_ranks, case)
