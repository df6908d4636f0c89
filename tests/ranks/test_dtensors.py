"""Gradients that are DTensors, spread in any way, against the whole gradients of one process."""

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gradclip import GradientClipper
from gradclip.thresholds import RelativeToWeights
from tests.support import dtensors
from tests.support.dtensors import INF, SCOPES, SHAPES, orders_and_dtypes
from tests.support.processes import on_ranks
from tests.support.reference import norm_of, parameter_with

DIMENSIONS = {"one": 1, "plain": 0, "two": 2, "a": 1, "b": 1}
DTYPES = ("float32", "bfloat16", "float64", "float16")
SIZES = (3, 1, 7, 2, 5, 4, 6, 0)


class Given(NamedTuple):
    """How a parameter is spread, in words."""

    shape: tuple[int, ...]
    mesh: str
    words: str
    dtype: str = "float32"
    has_gradient: bool = True
    scale: float = 1.0


class SpreadModel(NamedTuple):
    """A model and how it is clipped."""

    parameters: list[Given]
    scope: str
    order: float
    limit: float = dtensors.LIMIT
    seed: int = 0

    def full_gradients(self) -> dict[str, Tensor]:
        """Return the whole gradients; 0 where there is none."""
        generator = torch.Generator().manual_seed(self.seed)
        full = {}
        for index, each in enumerate(self.parameters):
            gradient = torch.randn(each.shape, generator=generator, dtype=torch.float64)
            scale = each.scale if each.has_gradient else 0.0
            full[f"p{index}"] = (gradient * scale).to(getattr(torch, each.dtype))
        return full


def clip_spread(model: SpreadModel) -> Any:
    """Clip a model; see `clip_named`."""
    named = {}
    for (name, full), each in zip(model.full_gradients().items(), model.parameters, strict=True):
        if each.mesh == "plain":
            named[name] = parameter_with(full)
        else:
            named[name] = dtensors.spread_parameter(full, each.mesh, each.words)
        if not each.has_gradient:
            named[name].grad = None
    return dtensors.clip_named(named, model.limit, scope=model.scope, norm_type=model.order)


def check_spread(pool: Any, model: SpreadModel, collectives: int | None = None) -> None:
    present = [f"p{index}" for index, each in enumerate(model.parameters) if each.has_gradient]
    dtensors.check_clipped(
        pool.run(clip_spread, model),
        model.full_gradients(),
        model.scope,
        model.order,
        limit=model.limit,
        collectives=collectives,
        slack=8 if collectives is None else 0,
        part=lambda clipped, _: {name: clipped[name] for name in present},
    )


# Layouts


def four_parameters(mesh: str, words: str, *options: Any, dtype: str = "float32") -> SpreadModel:
    """Return a model whose parameters are all spread like this, or each by its part of a list."""
    meshes, layouts = (each.split(", ") * (4 if "," not in each else 1) for each in (mesh, words))
    spread = zip(SHAPES.values(), meshes, layouts, strict=True)
    return SpreadModel([Given(*each, dtype) for each in spread], *options)


PENDING = "P, 0, R, 1"


@pytest.mark.parametrize("scope", SCOPES)
@orders_and_dtypes
@pytest.mark.parametrize("words", ["0", "1", "R", pytest.param(PENDING, id="pending sums")])
def test_one_mesh(ranks, scope, order, dtype, words):
    """Shards and replicas have the norms of the whole, in one collective, and summands too."""
    model = four_parameters("one", words, scope, order, dtype=dtype)
    check_spread(ranks, model, None if "P" in words else 1)


# Experts have a mesh of their own, with replicas.
ON_TWO_DIMENSIONS = [("two", words, 1) for words in ("0 0", "0 1", "1 0", "R 0", "0 R", "R R")]
ON_TWO_DIMENSIONS.append(("one, two, a, b", "0, R 1, 0, 1", 3))


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("order", [2.0, INF])
@pytest.mark.parametrize(("mesh", "words", "collectives"), ON_TWO_DIMENSIONS)
@pytest.mark.slow
def test_meshes_of_two_dimensions(four_ranks, mesh, words, collectives, scope, order):
    """One collective serves both dimensions of a mesh of all ranks, and one each other group."""
    check_spread(four_ranks, four_parameters(mesh, words, scope, order), collectives)


# Any model


@st.composite
def parameters(draw: Any, meshes: tuple[str, ...]) -> Given:
    shape = tuple(draw(st.lists(st.sampled_from(SIZES), max_size=3)))
    mesh = draw(st.sampled_from(meshes))
    words = st.sampled_from([*map(str, range(len(shape))), "R", "P"])
    return Given(
        shape,
        mesh,
        " ".join(draw(words) for _ in range(DIMENSIONS[mesh])),
        draw(st.sampled_from(DTYPES)),
        draw(st.sampled_from([True, True, True, False])),
        draw(st.sampled_from([1.0, 1e-3, 1e3])),
    )


def models(*meshes: str) -> st.SearchStrategy[SpreadModel]:
    return st.builds(
        SpreadModel,
        st.lists(parameters(meshes), min_size=1, max_size=5),
        st.sampled_from(SCOPES),
        st.sampled_from([2.0, 1.0, 3.0, INF]),
        st.sampled_from([0.7, 1e-2, 1e6]),
        st.integers(0, 2**16),
    )


# The ranks find their groups in another order, and add up in another.
SMALL = {"dtype": "float64", "scale": 1e-3}
ORDERED = [Given((6,), "plain", "", **SMALL), Given((6,), "b", "P"), Given((), "one", "R", **SMALL)]
IN_ANOTHER_ORDER = SpreadModel(ORDERED, "global", 1.0, limit=0.01, seed=2)
# Once a rank has failed the others wait for it in vain, so that nothing is shrunk.
FOUND_AS_IT_IS = (Phase.explicit, Phase.generate)


@settings(max_examples=40, phases=FOUND_AS_IT_IS)
@given(model=models("one", "one", "plain"))
def test_models_on_one_mesh(two_ranks, model):
    """Any model is clipped by its whole gradients."""
    check_spread(two_ranks, model)


@settings(max_examples=60, phases=FOUND_AS_IT_IS)
@given(model=models(*DIMENSIONS))
@example(model=IN_ANOTHER_ORDER)
@pytest.mark.slow
def test_models_on_several_meshes(four_ranks, model):
    """Any model is clipped by its whole gradients."""
    check_spread(four_ranks, model)


# Weights, and meshes of some ranks


@pytest.mark.parametrize("scope", ["parameter", "unit"])
@on_ranks("ranks")
def test_weights_without_gradients(scope):
    """The norm of a weight is that of the whole, also where all but rank 0 have no gradient."""
    whole = torch.arange(1.0, 13.0).reshape(4, 3)
    weight = nn.Parameter(dtensors.spread(whole, "one", "0"))
    optimizer = dtensors.Still([("weight", weight)])
    clipper = GradientClipper(optimizer, RelativeToWeights(0.5), scope=scope)
    if dtensors.mesh_of("one").get_local_rank() == 0:
        weight.grad = dtensors.spread(torch.ones(4, 3), "one", "0")
    clipper.step()
    rows = whole if scope == "unit" else [whole]
    assert clipper.last.thresholds.tolist() == pytest.approx([norm_of([r]) / 2 for r in rows])


@pytest.mark.slow
@pytest.mark.parametrize(("order", "norm"), [(2.0, 14**0.5), (INF, 3.0)])
@on_ranks("four_ranks")
def test_a_mesh_of_some_ranks(order, norm):
    """A mesh of two dimensions that is not the world takes one collective, in a group made once."""
    from torch.distributed.device_mesh import init_device_mesh

    dimensions = ("stages", "replicas", "shards")
    mesh = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=dimensions)[dimensions[1:]]
    named = {"weight": dtensors.spread_parameter(torch.arange(4.0), mesh, "R 0")}
    dtensors.clip_named(named, None, norm_type=order)
    norms, _, calls = dtensors.clip_named(named, None, norm_type=order)
    assert norms == {"global": pytest.approx(norm)}
    assert calls == ["sum"]
