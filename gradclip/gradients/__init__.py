"""The gradients of one step: norms, thresholds, coefficients and scaling.

``held.py`` collects gradients, ``forms.py`` converts them for the engines, ``buckets.py`` sorts
them so that one engine call takes many, ``norms.py`` measures, ``norm_thresholds.py`` applies the
rule, ``coefficients.py`` has the formula, ``policies.py`` the options, and ``step.py`` combines
these for one step.

Called by: optimizers, functional, clipper, integrations.
Imports: errors, checks, engines, thresholds, scopes, ranks, records.
"""

__all__ = [
    "buckets",
    "coefficients",
    "forms",
    "held",
    "norm_thresholds",
    "norms",
    "policies",
    "step",
]
