"""Options of the other examples, among them the rules of ``--clip``: python examples/rules.py.

A rule limits a norm; a scope decides which gradients share one. Each rule here has the scope it was
published with. Any other pair works as well.
"""

from argparse import ArgumentTypeError
from typing import Any

from gradclip.thresholds import (
    Auto,
    Fixed,
    GrowthLimit,
    MeanDeviation,
    MedianDeviation,
    MovingAverage,
    Percentile,
    Quantile,
    RelativeToWeights,
    Schedule,
    ZScore,
)


def warm_up(max_norm: float = 1.0) -> Schedule:
    """Return a threshold that rises to its full height in 100 steps."""
    return Schedule(lambda step: max_norm * (step + 1) / 100, cap=max_norm)


RULES = {  # a number after the name is the first argument of the rule
    "warmup": (warm_up, "global"),
    "percentile": (Percentile, "global"),  # AutoClip
    "quantile": (Quantile, "global"),
    "auto": (Auto, "global"),
    "zscore": (ZScore, "global"),  # ZClip
    "mean": (MeanDeviation, "global"),
    "median": (MedianDeviation, "global"),
    "average": (MovingAverage, "parameter"),  # AdaGC
    "growth": (GrowthLimit, "parameter"),  # Fira
    "agc": (RelativeToWeights, "unit"),
}
CHOICES = f"a number, none, or a rule as in zscore or zscore:2.5; rules: {', '.join(RULES)}"


def clipping(text: str) -> dict[str, Any]:
    """Return the arguments of a `GradientClipper` for a value of ``--clip``.

    Raises:
        ArgumentTypeError: The value is invalid; argparse prints why.
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
    """Return the value of an option that is a count.

    Raises:
        ArgumentTypeError: The value is not a whole number above 0.
    """
    if not text.isdecimal() or int(text) == 0:
        raise ArgumentTypeError(f"{text!r}: give a whole number above 0.")
    return int(text)


if __name__ == "__main__":
    for word in ("1.0", "none", *RULES):
        print(
            f"--clip {word:10}  max_norm={{max_norm!r}}, scope={{scope!r}}".format(**clipping(word))
        )
