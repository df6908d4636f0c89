"""The incidents of a logged run: episodes in plain words, with the parameters that led."""

import math
from dataclasses import replace

import numpy as np
import pytest

from gradclip import JsonlSink
from gradclip.report import read_runs
from gradclip.report.incidents import LEADING, MOST, incidents_of
from tests.support.curves import log_run
from tests.support.report import log_line
from tests.support.runs import norms_by_name, quiet, run_with

NAN, INF = math.nan, math.inf


def test_a_quiet_run_has_no_incident():
    assert incidents_of(run_with(quiet(500))) == ([], 0)


def test_incidents_come_in_the_order_of_the_steps_in_plain_words():
    norms, losses = quiet(1000), 2 + 0.1 * quiet(1000)
    norms[300], norms[700], losses[500] = 50, NAN, 9
    incidents, more = incidents_of(run_with(norms, losses=losses))
    assert [(each.kind, each.step) for each in incidents] == [
        ("spike", 300),
        ("loss", 500),
        ("nonfinite", 700),
    ]
    assert more == 0
    spike, loss, broken = (each.text for each in incidents)
    usual = np.median(norms[200:300])
    assert spike.startswith(f"The norm was 50 at step 300, {50 / usual:.3g} times the median of")
    assert loss == "The loss was 9 at step 500; the mean of those before it was 2.1."
    assert broken == "The norm was NaN at step 700."


def test_events_near_each_other_are_one_incident_at_its_highest_step():
    norms = quiet(1000)
    norms[[400, 405, 411]] = 20, 80, 30
    norms[[800, 801, 802]] = INF, NAN, NAN
    spikes, broken = incidents_of(run_with(norms))[0]
    assert (spikes.first_step, spikes.last_step, spikes.step) == (400, 411, 405)
    assert spikes.text.startswith("At 3 steps from 400 to 411 the norm was far above usual: 80 at")
    assert (broken.first_step, broken.last_step, broken.step) == (800, 802, 800)
    assert (
        broken.text == "The norm was not finite at 3 steps from 800 to 802: infinite at step 800."
    )


def leading(norms_of_parameters):
    """Return what the incident of a step names, of parameters a, b, and so on."""
    norms = quiet(300)
    norms[200] = NAN
    entries = [
        (200, name, norm) for name, norm in zip("abcdefg", norms_of_parameters, strict=False)
    ]
    [incident] = incidents_of(run_with(norms, parameters=norms_by_name(entries)))[0]
    return incident.parameters


def test_an_incident_names_the_parameters_that_are_not_finite():
    names = [name for name, _ in leading([1.0, NAN, 3.0, INF, 5.0])]
    assert names == ["b", "d"]
    assert len(leading([NAN] * 7)) == LEADING


@pytest.mark.parametrize(
    ("norms", "names"),
    [
        ([1.0, 9.0, 0.1], ["b"]),
        ([3.0, 1.0, 4.0], ["c", "a"]),
        ([1.0] * 7, ["a", "b", "c", "d", "e"]),
        ([1e300, 1e-300], ["a"]),
        ([0.0, 0.0], ["a"]),
    ],
)
def test_else_it_names_those_that_have_most_of_the_norm(norms, names):
    assert leading(norms) == tuple((name, norms["abcdefg".index(name)]) for name in names)


def test_steps_without_norms_of_parameters_name_none():
    norms = quiet(300)
    norms[200] = 90
    [incident] = incidents_of(run_with(norms, parameters=norms_by_name([(100, "a", 1.0)])))[0]
    assert incident.parameters == ()


def test_of_many_incidents_the_highest_are_kept():
    norms = quiet(6000)
    spikes = np.arange(200, 6000, 40)
    norms[spikes] = np.linspace(20, 90, len(spikes))
    norms[30] = NAN
    incidents, more = incidents_of(run_with(norms))
    assert len(incidents) == MOST
    assert more == len(spikes) + 1 - MOST
    assert [each.step for each in incidents] == [30, *spikes[more:]]


def test_what_the_clipper_said_is_kept(tmp_path):
    """In both formats; what no episode covers is an incident by itself."""
    norms = quiet(120).tolist()
    norms[60] = 90.0
    log_run([tmp_path / "a", JsonlSink(tmp_path / "a.jsonl")], *norms)
    for run in read_runs([tmp_path]):
        [incident] = incidents_of(run)[0]
        assert incident.step == 60
        assert incident.sentence.startswith("The norm was 90 at step 60, above ")
        assert "The norms before: " in incident.sentence
    run = replace(run_with(quiet(120)), sentences={7: "Clipping left gradients nearly 0."})
    [incident] = incidents_of(run)[0]
    assert (incident.kind, incident.step) == ("other", 7)
    assert incident.text == "Clipping left gradients nearly 0."


def test_a_resumed_run_replaces_sentences_with_their_steps(tmp_path):
    lines = [log_line(step, 1.0, incident=f"first {step}") for step in range(4)]
    lines += [log_line(2, 1.0, incident="second 2"), log_line(3, 1.0)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    [run] = read_runs([tmp_path / "a.jsonl"])
    assert run.sentences == {0: "first 0", 1: "first 1", 2: "second 2"}
