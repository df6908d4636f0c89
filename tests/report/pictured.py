"""Runs to draw, and what is found in their pictures."""

from __future__ import annotations

import math

import numpy as np

from gradclip.report import Run
from gradclip.report.run import LoggedParameterNorms

NAN, INF = math.nan, math.inf
OKABE_ITO = {"#0072b2", "#e69f00", "#d55e00", "#cc79a7"}
STEPS = 400


def run_of(norms, *, name="runs/a", threshold=NAN, skipped=(), first=0, parameters=None):
    norms = np.asarray(norms, dtype=np.float64)
    steps = np.arange(len(norms)) + first
    thresholds = np.broadcast_to(np.asarray(threshold, dtype=np.float64), norms.shape).copy()
    clipped = np.where(np.isfinite(norms), np.fmin(norms, thresholds), 0.0)
    left_out = np.isin(np.arange(len(norms)), skipped)
    return Run(name, steps, norms, clipped, thresholds, left_out, parameters)


def noise(count=STEPS, seed=0):
    return np.exp(0.2 * np.random.default_rng(seed).standard_normal(count))


def spiky():
    norms = noise()
    norms[[100, 101, 300]] *= [30, 100, 50]
    return norms


def parameters_of(norms, names, *, every=1, first=0):
    """Norms of parameters, of which each later one has a smaller share."""
    shares = np.sqrt(np.arange(len(names), 0, -1) / sum(range(len(names) + 1)))
    steps = np.arange(0, len(norms), every)
    return LoggedParameterNorms(
        tuple(names),
        np.repeat(steps + first, len(names)),
        np.tile(np.arange(len(names), dtype=np.int32), len(steps)),
        np.outer(np.asarray(norms, dtype=np.float64)[steps], shares).ravel(),
    )


def names_of(count):
    return [f"transformer.h.{n // 4}.attn.c_proj_{n % 4}.weight" for n in range(count)]


def exploding():
    norms = noise() * np.r_[np.ones(300), np.geomspace(1, 1e9, 100)]
    norms[380:] = NAN
    norms[20] = INF
    parameters = parameters_of(norms, ["embedding.weight", "rnn.weight", "head.weight"], every=5)
    return run_of(norms, threshold=1.5, skipped=[20, 380, 381], parameters=parameters)


def cramped():
    norms = spiky() * 1e13
    names = [f"encoder.layers.{n}.self_attention.projection.weight" for n in range(3)]
    return run_of(norms, threshold=1e13, parameters=parameters_of(norms, names))


PICTURES = {
    "quiet": lambda: [run_of(noise(), threshold=5.0)],
    "spiky": lambda: [run_of(spiky(), threshold=1.0)],
    "many parameters": lambda: [run_of(spiky(), parameters=parameters_of(spiky(), names_of(161)))],
    "exploding": lambda: [exploding()],
    "exploding beside quiet": lambda: [run_of(noise(), threshold=1.0), exploding()],
    "long names": lambda: [
        run_of(noise(seed=n), name=f"experiments/lr0.001_batch512_clip1.0_{'x' * 60}_{n}/logs/v0")
        for n in range(3)
    ],
    "one step": lambda: [run_of([3.0], threshold=2.0, parameters=parameters_of([3.0], ["a", "b"]))],
    "one step that is NaN": lambda: [run_of([NAN])],
    "NaN only": lambda: [run_of([NAN] * 9, parameters=parameters_of([NAN] * 9, ["a", "b"]))],
    "zeros": lambda: [run_of([0.0] * 9, parameters=parameters_of([0.0] * 9, ["a", "b"]))],
    "zeros among others": lambda: [run_of([0.0] * 9 + [1.0] + [0.0] * 9, threshold=0.0)],
    "every other one": lambda: [run_of(np.where(np.arange(60) % 2, NAN, 1.0), threshold=2.0)],
    "the ends of the range": lambda: [
        run_of(
            [1e-300, 5e-324, 1e300, 1.7e308, 1.0],
            threshold=1e305,
            parameters=parameters_of([1e-300, 5e-324, 1e300, 1.7e308, 1.0], ["a", "b"]),
        )
    ],
    "a threshold out of sight": lambda: [run_of(noise(), threshold=1e30)],
    "an infinite threshold": lambda: [run_of(noise(), threshold=INF)],
    "odd names": lambda: [
        run_of(
            noise(),
            name="$_^$\n\x1b[31m\udc80 中文 $\\frac{-->",
            parameters=parameters_of(noise(), ["$_$", "a\nb", "\x00<&>", "$"]),
        )
    ],
    "little room": lambda: [cramped(), cramped()],
    "late steps": lambda: [run_of(noise(), first=10**15)],
}


def curve(axes, label):
    """Return the steps and values of a curve by what its label begins with."""
    [line] = [each for each in axes.get_lines() if str(each.get_label()).startswith(label)]
    return line


def legend_texts(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]
