"""What options of the other examples mean; the words of ``--clip``: python examples/rules.py.

A rule says how large a norm may be, a scope which gradients share one. The scopes here are those
that the rules were published with; any other pair works as well.
"""

from argparse import ArgumentTypeError
from typing import Any

from gradclip.thresholds import (
    Fixed,
    GrowthLimit,
    MeanDeviation,
    MedianDeviation,
    MovingAverage,
    Percentile,
    RelativeToWeights,
    Schedule,
    ZScore,
)


def warm_up(max_norm: float = 1.0) -> Schedule:
    """Return a threshold that rises to its full height in 100 steps."""
    return Schedule(lambda step: max_norm * (step + 1) / 100, cap=max_norm)


RULES = {  # the number after the word is the rule's first argument
    "warmup": (warm_up, "global"),
    "percentile": (Percentile, "global"),  # AutoClip
    "zscore": (ZScore, "global"),  # ZClip
    "mean": (MeanDeviation, "global"),
    "median": (MedianDeviation, "global"),
    "average": (MovingAverage, "parameter"),  # AdaGC
    "growth": (GrowthLimit, "parameter"),  # Fira
    "agc": (RelativeToWeights, "unit"),
}
CHOICES = f"a number, none, or a rule as in zscore or zscore:2.5; rules: {', '.join(RULES)}"


def clipping(text: str) -> dict[str, Any]:
    """Return what a `GradientClipper` is given for a value of ``--clip``.

    Raises:
        ArgumentTypeError: It is no such value; argparse shows why.
    """
    word, colon, number = text.partition(":")
    try:
        if word in RULES:
            rule, scope = RULES[word]
            return {"max_norm": rule(float(number)) if colon else rule(), "scope": scope}
        return {"max_norm": None if text == "none" else Fixed(float(text)), "scope": "global"}
    except ValueError as error:  # gradclip's ArgumentError is one
        reason = str(error).rstrip(".")
        raise ArgumentTypeError(f"{text!r}: {reason}. Give {CHOICES}.") from error


def positive(text: str) -> int:
    """Return the number of an option that counts something.

    Raises:
        ArgumentTypeError: It is no whole number above 0.
    """
    if not text.isdecimal() or int(text) == 0:
        raise ArgumentTypeError(f"{text!r}: give a whole number above 0.")
    return int(text)


if __name__ == "__main__":
    for word in ("1.0", "none", *RULES):
        print(
            f"--clip {word:10}  max_norm={{max_norm!r}}, scope={{scope!r}}".format(**clipping(word))
        )
