"""The page's answers: they keep every extreme, count every norm, and agree with numpy."""

import json
import math
import sys
from dataclasses import replace
from subprocess import run as run_process

import numpy as np
import pytest

from gradclip import ArgumentError
from gradclip.report import Run
from gradclip.report.run import LoggedScalar
from gradclip.view.arrays import packed
from gradclip.view.distribution import distribution_of
from gradclip.view.run_view import RunView
from tests.support.packed import unpacked
from tests.support.runs import norms_by_name, run_with

NAN, INF = math.nan, math.inf
RANDOM = np.random.default_rng(0)


def noisy(count):
    return np.exp(RANDOM.standard_normal(count))


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (np.arange(5, 500, 5), None),
        (np.array([7]), None),
        (np.array([1, 2, 4]), "i4"),
        (np.array([1, 2, 2**40]), "f8"),
        (np.array([], dtype=np.int64), "i4"),
        (np.array([], dtype=np.float64), "f4"),
        (np.array([0.5, NAN, INF, -0.0]), "f4"),
        (np.array([0.1, NAN]), "f8"),
        (np.array([1e300]), "f8"),
        (np.array([[True, False], [False, False]]), "u1"),
    ],
)
def test_arrays_are_packed_without_loss(values, kind):
    found = json.loads(json.dumps(packed(values), allow_nan=False))
    assert found.get("type") == kind
    assert np.array_equal(unpacked(found), values.ravel(), equal_nan=values.dtype.kind == "f")


@pytest.mark.parametrize("count", [1, 2, 999, 1000, 1001, 20_000])
def test_the_whole_range_has_the_extremes_of_each_bucket(count):
    norms = noisy(count)
    norms[RANDOM.integers(0, count, count // 50)] = NAN
    norms[:1] = 4e7
    series = RunView(run_with(norms, threshold=1.0)).series(0, count, 1000)
    size, column = series["size"], series["columns"]["norm"]
    begins = np.arange(0, count, size)
    assert len(begins) <= 1000
    assert unpacked(series["steps"]).tolist() == begins.tolist()
    assert series["end"] == count - 1
    for name, ufunc in (("low", np.fmin), ("high", np.fmax)):
        expected = ufunc.reduceat(norms, begins)
        assert np.array_equal(unpacked(column.get(name, column["low"])), expected, equal_nan=True)
    assert ("high" in column) == (size > 1)
    broken = np.add.reduceat(~np.isfinite(norms), begins, dtype=int)
    assert unpacked(series["counts"].get("nonfinite", packed(0 * begins))).tolist() == [*broken]


def test_buckets_stay_while_a_range_moves_and_reach_beyond_it():
    """A range shows the buckets of its surroundings, cut at the same steps."""
    view = RunView(run_with(noisy(10_000)))
    starts = unpacked(view.series(0, 9999, 625)["steps"])
    assert (starts == np.arange(0, 10_000, 16)).all()
    part = view.series(1000, 5999, 320)
    assert part["size"] == 16
    assert {*unpacked(part["steps"])} <= {*starts}
    assert unpacked(part["steps"])[[0, 1]].tolist() == [976, 992]
    assert part["end"] == 6015


def test_steps_that_were_not_logged_are_no_entries():
    """Buckets count entries: a run of every tenth step has tenfold steps."""
    view = RunView(run_with(noisy(100), steps=10 * np.arange(100)))
    series = view.series(200, 400, 1000)
    assert (series["size"], series["end"]) == (1, 410)
    assert unpacked(series["steps"]).tolist() == [*range(190, 411, 10)]
    assert unpacked(view.series(205, 205, 10)["steps"]).tolist() == [200, 210]


def test_columns_and_counts_that_are_empty_are_absent():
    series = RunView(run_with([1.0, 2.0], losses=np.array([NAN, INF]))).series(0, 1, 10)
    assert {*series["columns"]} == {"norm", "clipped_norm", "clip_rate"}
    assert {*series["counts"]} == {"loss_nonfinite"}


def test_a_run_of_norms_alone_has_no_clip_rate():
    norms = noisy(3)
    empty = np.full(3, NAN)
    run = Run("run", np.arange(3), norms, empty, empty, np.zeros(3, dtype=bool))
    assert {*RunView(run).series(0, 2, 10)["columns"]} == {"norm"}


@pytest.mark.parametrize(
    "norms",
    [
        [1.0],
        [1.0, 10.0, 100.0, 9.99, 0.1],
        [0.0, 0.0, 3.0, NAN, INF],
        [5e-324, 1e-300, 1e-5],
        [1.7e308, 1.0],
        [math.nextafter(1.0, 0), math.nextafter(1.0, 2), 1.005],
        noisy(5000),
    ],
)
def test_the_share_of_each_threshold_is_that_of_numpy(norms):
    found = distribution_of(run_with(norms))
    norms, above = np.asarray(norms), unpacked(found["above"])
    finite = norms[np.isfinite(norms)]
    assert (found["finite"], found["zeros"]) == (len(finite), (norms == 0).sum())
    for index in [*range(0, len(above), 7), len(above) - 1]:
        decade, digits = divmod(index, 900)
        threshold = float(f"{100 + digits}e{found['decade'] + decade - 2}")
        assert above[index] == (finite > threshold).sum()
    assert above[-1] == 0


def test_a_run_without_a_norm_above_0_has_no_distribution():
    assert distribution_of(run_with([0.0, NAN])) is None


def test_parameters_come_by_their_share_with_the_largest_value_of_each_bucket():
    entries = [
        (step, name, norm)
        for step in range(10)
        for name, norm in (("a.weight", 1.0), ("b.Weight", 2.0 + step), ("b.bias", 0.5))
    ]
    view = RunView(run_with(np.full(10, 20.0), parameters=norms_by_name(entries)))
    assert view.overview["quantities"] == ["parameter_norms"]
    found = view.parameters("parameter_norms", 0, 9, 5)
    assert found["names"] == ["b.Weight", "a.weight", "b.bias"]
    assert (found["matching"], found["end"]) == (3, 9)
    assert unpacked(found["steps"]).tolist() == [0, 2, 4, 6, 8]
    high = unpacked(found["high"]).reshape(3, 5)
    assert high.tolist() == [[3.0, 5.0, 7.0, 9.0, 11.0], [1.0] * 5, [0.5] * 5]
    assert not unpacked(found["nonfinite"]).any()
    some = view.parameters("parameter_norms", 3, 4, 5, search="WEIGHT", most=1)
    assert (some["names"], some["matching"]) == (["b.Weight"], 2)
    assert unpacked(some["high"]).tolist() == [5.0, 6.0]
    assert view.parameters("parameter_norms", 50, 60, 5)["end"] is None


def test_a_parameter_that_is_not_finite_is_marked():
    run = run_with(
        [1.0, NAN], parameters=norms_by_name([(0, "a", 1.0), (1, "b", NAN), (1, "a", 2.0)])
    )
    found = RunView(run).parameters("parameter_norms", 0, 1, 10)
    assert found["names"] == ["b", "a"]
    assert unpacked(found["nonfinite"]).tolist() == [0, 1, 0, 0]
    assert np.array_equal(unpacked(found["high"]), [NAN, NAN, 1.0, 2.0], equal_nan=True)


def test_weights_and_their_updates_come_the_largest_first():
    weights = norms_by_name([(0, "a", 1.0), (0, "b", 2.0), (5, "a", 9.0)])
    ratios = norms_by_name([(0, "a", 0.01), (0, "b", NAN)])
    run = replace(run_with([1.0] * 6), weight_norms=weights, update_ratios=ratios)
    view = RunView(run)
    assert view.overview["quantities"] == ["weight_norms", "update_ratios"]
    found = view.parameters("weight_norms", 0, 5, 2)
    assert found["names"] == ["a", "b"]
    assert np.array_equal(unpacked(found["high"]), [1.0, 9.0, 2.0, NAN], equal_nan=True)
    assert view.parameters("update_ratios", 0, 5, 2)["names"] == ["a", "b"]


def test_another_scalar_comes_in_buckets():
    """It has steps of its own."""
    scalar = LoggedScalar(np.array([0, 10, 20]), np.array([3.0, 1.0, 2.0]))
    view = RunView(replace(run_with([1.0] * 30), scalars={"train/loss": scalar}))
    assert view.overview["scalars"] == ["train/loss"]
    found = view.scalar("train/loss", 0, 29, 2)
    assert unpacked(found["steps"]).tolist() == [0, 20]
    assert unpacked(found["columns"]["value"]["low"]).tolist() == [1.0, 2.0]
    assert unpacked(found["columns"]["value"]["high"]).tolist() == [3.0, 2.0]
    with pytest.raises(ArgumentError, match=r"has no scalar 'lr': ask for one of \['train/loss'\]"):
        view.scalar("lr", 0, 1, 10)


def test_what_cannot_be_asked_is_refused():
    view = RunView(run_with([1.0]))
    with pytest.raises(ArgumentError, match="has no 'weight_norms' of parameters"):
        view.parameters("weight_norms", 0, 1, 10)
    with pytest.raises(ArgumentError, match="buckets is 0"):
        view.series(0, 1, 0)


def test_answers_are_strict_json():
    parameters = norms_by_name([(1, "a", NAN), (1, "b", 2.0)])
    view = RunView(run_with([1.0, NAN, INF], parameters=parameters, losses=np.array([1, 2, INF])))
    for answer in (view.listed, view.overview, view.series(0, 9, 9)):
        json.dumps(answer, allow_nan=False)
    [incident] = view.overview["incidents"]
    assert incident["parameters"] == [["a", None]]


def test_the_answers_need_no_torch():
    """They are given in TensorBoard's process."""
    code = "import sys, gradclip.view; sys.exit('torch' in sys.modules)"
    assert run_process([sys.executable, "-c", code], check=False).returncode == 0
