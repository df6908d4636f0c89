"""All tasks, in the order in which the rule met them.

It was designed on the first set, frozen, and run on the second and third. After those results it
got its second form, which was frozen and run on the fourth and fifth.
"""

from __future__ import annotations

from functools import partial

from benchmarks.experiments.without_tuning.task import Task
from benchmarks.experiments.without_tuning.tasks import (
    adding,
    control,
    digits,
    later,
    latest,
    newest,
    regression,
)
from benchmarks.experiments.without_tuning.tasks.characters import CHANCE, gpt, inject_, recurrent

CHANCE_OF_TEN = 2.3
"""Cross-entropy of a guess between ten classes, in nats."""
CHANCE_OF_SUMS = 0.21
"""Squared error of the mean of the sums."""
CHANCE_OF_IMAGES = 24.4
"""Code length of an image where only the frequencies of its pixels are known, in nats."""
CHANCE_OF_ENDS = 0.47
"""Cross-entropy of a guess that knows only how frequent the ends of words are, in nats."""
CHANCE_OF_EIGHT = 2.08
"""Cross-entropy of a guess between eight classes, in nats."""
CHANCE_OF_VIEWS = 4.16
"""Cross-entropy of a guess between 64 images, in nats."""
CHANCE_OF_COUNTS = 3.99
"""Deviance of a pixel where only the mean of each pixel is known."""

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
"""Tasks whose results were seen while the first form of the rule was made."""

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
"""Tasks held out from the first form of the rule."""

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
"""Tasks that were written after its first form was frozen."""

NEWEST = (
    Task(
        "residual",
        "Friedman's function with noise, 12 residual relu blocks without normalisation, "
        "SGD(0.15, momentum=0.9)",
        500,
        partial(newest.residual, 0.15),
        1.0,
        explosive=True,
    ),
    Task(
        "factors",
        "table of rank 5 with noise of Student's t(1.5), product of two matrices, SGD(0.5)",
        3000,
        partial(newest.factors, 0.5),
        1.1,
        explosive=True,
    ),
    Task(
        "autoencoder",
        "digits in black and white, variational autoencoder, SGD(0.01, momentum=0.9)",
        2000,
        partial(newest.autoencoder, 0.01),
        CHANCE_OF_IMAGES,
    ),
    Task(
        "words",
        "text without spaces, GRU of 32 units in both directions, Adagrad(0.1)",
        200,
        partial(newest.words, 0.1),
        CHANCE_OF_ENDS,
    ),
    Task(
        "largest",
        "sets of numbered symbols, transformer of 2 layers, 32 wide, Nesterov's SGD(0.08)",
        600,
        partial(newest.largest, 0.08),
        CHANCE_OF_EIGHT,
    ),
)
"""Tasks that were written after its second form was frozen, and calibrated without any rule."""

LATEST = (
    Task(
        "views",
        "digits that lack 40 % of their pixels, contrastive, 2 convolutions, "
        "SGD(0.02, momentum=0.9)",
        300,
        partial(latest.views, 0.02),
        CHANCE_OF_VIEWS,
    ),
    Task(
        "dilated",
        "characters, 4 gated dilated convolutions, 32 wide, Adamax(0.02)",
        200,
        partial(latest.dilated, 0.02),
        CHANCE,
    ),
    Task(
        "multiplicative",
        "characters, multiplicative RNN of 64 units, SGD(0.5, momentum=0.9)",
        200,
        partial(latest.multiplicative, 0.5),
        CHANCE,
        explosive=True,
    ),
    Task(
        "counts",
        "lower halves of digits from the upper ones, Poisson regression, 2 GELU layers, SGD(0.05)",
        1500,
        partial(latest.counts, 0.05),
        CHANCE_OF_COUNTS,
        explosive=True,
        score="deviance",
    ),
)
"""More tasks that were written after its second form was frozen, and calibrated likewise."""

SETS = {
    "design": DESIGN,
    "held out": HELD_OUT,
    "written last": LATER,
    "second round": NEWEST,
    "third round": LATEST,
}
UNSEEN = (*NEWEST, *LATEST)
"""Tasks that the rule in its present form had not seen."""
TASKS = {task.name: task for tasks in SETS.values() for task in tasks}
