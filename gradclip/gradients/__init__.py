"""Between the axes: the gradients of one step, measured, decided on and scaled.

``held.py`` collects gradients, ``buckets.py`` sorts them so that one engine call takes many,
``norms.py`` measures, ``norm_thresholds.py`` asks the rule, ``coefficients.py`` is the formula,
``policies.py`` the options, and ``step.py`` binds these together for one step.

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
