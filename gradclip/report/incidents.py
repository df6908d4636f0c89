"""The incidents of a run: episodes of norms and losses that stand out, in plain words."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from .losses import LossSpike, loss_spikes_of
from .run import Run
from .summary import spikes_of

KINDS = ("nonfinite", "spike", "loss", "other")
MOST = 100
"""Incidents that are listed, of a run that has more."""
NEAR = 10
"""Logged steps between two events that belong to one incident, at most."""
LEADING = 5
"""Parameters that an incident names, at most."""
CARRIED = 0.9
"""Share of the squares of all norms that the named parameters have together."""


@dataclass(frozen=True)
class Incident:
    """An episode of steps that stand out for the same reason."""

    kind: str
    """What stands out: "nonfinite" or "spike" for norms, "loss" for losses, "other" for what the
    clipper alone has seen, such as gradients that clipping left nearly 0."""
    first_step: int
    last_step: int
    step: int
    """The step to look at: the highest, or the first that is not finite."""
    text: str
    sentence: str | None
    """What the clipper said of the step when it was taken, if that was logged."""
    parameters: tuple[tuple[str, float], ...]
    """Names and gradient norms of the parameters that led at the step; empty if unknown."""


class _Event(NamedTuple):
    row: int
    """Place of the step in the run."""
    step: int
    value: float
    usual: float
    height: float
    """How far it stands out, to compare events of one kind."""


def incidents_of(run: Run) -> tuple[list[Incident], int]:
    """Return the incidents of a run in the order of its steps, and how many more it has.

    Of more than a hundred the highest are kept, those that are not finite first.
    """
    found = [
        (episode[0].height, kind, episode, words)
        for kind, events, words in _kinds(run)
        for episode in _episodes(events)
    ]
    found.sort(key=lambda entry: entry[0], reverse=True)
    incidents = [_incident(run, *entry[1:]) for entry in found[:MOST]]
    incidents += [*_other_incidents(run, incidents)][: MOST - len(incidents)]
    incidents.sort(key=lambda incident: (incident.first_step, KINDS.index(incident.kind)))
    return incidents, max(len(found) - MOST, 0)


_Words = Callable[[Sequence[_Event]], str]


def _kinds(run: Run) -> Iterator[tuple[str, list[_Event], _Words]]:
    broken = [
        _Event(int(row), int(run.steps[row]), float(run.norms[row]), np.nan, np.inf)
        for row in np.flatnonzero(~run.finite)
    ]
    yield "nonfinite", broken, _words_for_nonfinite
    spikes = spikes_of(run)
    rows = np.searchsorted(run.steps, [spike.step for spike in spikes])
    yield (
        "spike",
        [
            _Event(int(row), spike.step, spike.norm, spike.usual, spike.norm / spike.usual)
            for row, spike in zip(rows, spikes, strict=True)
        ],
        _words_for_spikes,
    )
    losses = loss_spikes_of(run)
    rows = np.searchsorted(run.steps, [spike.step for spike in losses])
    yield (
        "loss",
        [
            _Event(int(row), spike.step, spike.loss, spike.usual, _excess(spike))
            for row, spike in zip(rows, losses, strict=True)
        ],
        _words_for_losses,
    )


def _excess(spike: LossSpike) -> float:
    """Return how far a loss spikes, in the scale of the heights of norms."""
    return 1 + (spike.loss - spike.usual) / (abs(spike.usual) or 1.0)


def _episodes(events: Sequence[_Event]) -> Iterator[list[_Event]]:
    """Yield events near each other together, the highest first, otherwise in their order."""
    begin = 0
    for index, event in enumerate(events):
        is_last = index + 1 == len(events) or events[index + 1].row - event.row > NEAR
        if is_last:
            episode = [*events[begin : index + 1]]
            highest = max(range(len(episode)), key=lambda place: episode[place].height)
            yield [episode[highest], *episode[:highest], *episode[highest + 1 :]]
            begin = index + 1


def _incident(run: Run, kind: str, episode: list[_Event], words: _Words) -> Incident:
    steps = [event.step for event in episode]
    step = episode[0].step
    said, leading = run.sentences.get(step), leading_parameters(run, step)
    return Incident(kind, min(steps), max(steps), step, words(episode), said, leading)


def _other_incidents(run: Run, known: Sequence[Incident]) -> Iterator[Incident]:
    """Yield what the clipper said of steps that no known incident covers."""
    covered = np.zeros(len(run), dtype=bool)
    for incident in known:
        covered[
            slice(*np.searchsorted(run.steps, [incident.first_step, incident.last_step + 1]))
        ] = True
    for step, said in sorted(run.sentences.items()):
        if not covered[np.searchsorted(run.steps, step)]:
            yield Incident("other", step, step, step, said, None, leading_parameters(run, step))


def leading_parameters(run: Run, step: int) -> tuple[tuple[str, float], ...]:
    """Return the parameters that led at a step, the largest norms first, five at most.

    Those that are not finite if there are any, else as few as have most of the norm together.
    """
    logged = run.parameter_norms
    if logged is None:
        return ()
    part = slice(*np.searchsorted(logged.steps, [step, step + 1]))
    names, norms = logged.name_indices[part], logged.norms[part]
    leading = np.flatnonzero(~np.isfinite(norms))
    if not len(leading):
        leading = np.argsort(-norms, kind="stable")
        scale = norms.max(initial=0) or 1.0  # squares of large norms overflow
        squares = np.cumsum((norms[leading] / scale) ** 2)
        leading = leading[: np.searchsorted(squares, CARRIED * squares[-1:].sum()) + 1]
    return tuple((logged.names[names[index]], float(norms[index])) for index in leading[:LEADING])


def _span(episode: Sequence[_Event]) -> tuple[str, int]:
    steps = [event.step for event in episode]
    return f"{min(steps):,} to {max(steps):,}", len(steps)


def _words_for_nonfinite(episode: Sequence[_Event]) -> str:
    if len(episode) == 1:
        return f"The norm was {_name(episode[0].value)} at step {episode[0].step:,}."
    first, (span, count) = episode[0], _span(episode)
    return (
        f"The norm was not finite at {count:,} steps from {span}: {_name(first.value)} at step "
        f"{first.step:,}."
    )


def _words_for_spikes(episode: Sequence[_Event]) -> str:
    highest = episode[0]
    height = (
        f"{_number(highest.value)} at step {highest.step:,}, {highest.height:.3g} times the median "
        f"of those before it ({_number(highest.usual)})."
    )
    return _words_for_height("norm", height, episode)


def _words_for_losses(episode: Sequence[_Event]) -> str:
    highest = episode[0]
    height = (
        f"{_number(highest.value)} at step {highest.step:,}; the mean of those before it was "
        f"{_number(highest.usual)}."
    )
    return _words_for_height("loss", height, episode)


def _words_for_height(quantity: str, height: str, episode: Sequence[_Event]) -> str:
    if len(episode) == 1:
        return f"The {quantity} was {height}"
    span, count = _span(episode)
    return f"At {count:,} steps from {span} the {quantity} was far above usual: {height}"


def _name(value: float) -> str:
    """Name a norm that is not finite."""
    return "NaN" if math.isnan(value) else "infinite"


def _number(value: float) -> str:
    """Return a number with four digits, as sentences about single steps have it."""
    return f"{value:.4g}"
