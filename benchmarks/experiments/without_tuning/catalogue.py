"""All tasks: those the rule was designed on, those held out, and three written after it."""

from __future__ import annotations

from functools import partial

from benchmarks.experiments.without_tuning.task import Task
from benchmarks.experiments.without_tuning.tasks import adding, control, digits, later, regression
from benchmarks.experiments.without_tuning.tasks.characters import gpt, inject_, recurrent

CHANCE_OF_TEN = 2.3
"""Cross-entropy of a guess between ten classes, in nats."""
CHANCE_OF_SUMS = 0.21
"""Squared error of the mean of the sums."""

DESIGN = (
    recurrent("tanh", 0.1, explosive=False),
    recurrent("tanh", 2.0, explosive=True),
    recurrent("lstm", 1.0, explosive=False),
    recurrent("relu", 0.3, explosive=True),
    gpt("gpt", 0.003),
    gpt("gpt with spikes", 0.003, inject_, explosive=True),
    Task(
        "digits",
        "digits, 2 convolutions, SGD(0.02, momentum=0.9)",
        200,
        partial(digits.training, 0.02, 0.0),
        CHANCE_OF_TEN,
    ),
    Task(
        "heavy tails",
        "diabetes with noise of Student's t(1.3), tanh layer, SGD(0.02)",
        400,
        partial(regression.training, 0.02),
        1.0,
        explosive=True,
    ),
)
"""Tasks whose results were seen while the rule was made."""

HELD_OUT = (
    recurrent("relu", 0.03, explosive=False),
    recurrent("gru", 1.0, explosive=False),
    recurrent("gru", 6.0, explosive=True),
    recurrent("lstm", 10.0, explosive=True),
    gpt("gpt too fast", 0.03, explosive=True),
    Task(
        "wrong labels",
        "digits with 30 % of the labels random, 2 convolutions, SGD(0.02, momentum=0.9)",
        300,
        partial(digits.training, 0.02, 0.3),
        CHANCE_OF_TEN,
    ),
    Task(
        "adding",
        "sums of 2 of 30 numbers with noise, GRU of 32 units, Adam(0.005)",
        500,
        partial(adding.training, 0.005),
        CHANCE_OF_SUMS,
    ),
    Task(
        "pole",
        "pole on a cart, REINFORCE, tanh layer, Adam(0.03)",
        60,
        partial(control.training, 0.03),
        -25.0,
        score="- steps",
    ),
)
"""Tasks on which the rule ran once, when it was frozen."""

LATER = (
    Task(
        "deep tanh",
        "digits, 12 tanh layers without normalisation, SGD(0.03)",
        300,
        partial(later.deep, 0.03),
        CHANCE_OF_TEN,
    ),
    Task(
        "chaos",
        "Mackey-Glass series with noise, tanh RNN of 40 units, RMSprop(0.01)",
        240,
        partial(later.series, 0.01),
        0.06,
        explosive=True,
    ),
    Task(
        "rows",
        "digits row by row, GRU of 48 units, SGD(0.1, momentum=0.9)",
        200,
        partial(later.rows, 0.1),
        CHANCE_OF_TEN,
    ),
)
"""Tasks that were written after the rule was frozen."""

SETS = {"design": DESIGN, "held out": HELD_OUT, "written last": LATER}
TASKS = {task.name: task for tasks in SETS.values() for task in tasks}
