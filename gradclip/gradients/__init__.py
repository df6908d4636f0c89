"""The gradients of one step: norms, thresholds, coefficients and scaling.

``held.py`` collects gradients, ``forms.py`` converts them for the engines, ``buckets.py`` sorts
them so that one engine call takes many, ``norms.py`` measures, ``norm_thresholds.py`` applies the
rule, ``coefficients.py`` has the formula, ``policies.py`` the options. ``step.py`` combines these
for one step, and ``host_step.py`` does the same in numbers for the usual step: plain gradients on
the CPU that share one norm. ``row_step.py`` does it in one pass for thresholds that follow from the
weights. ``parts.py`` puts together a step whose norms are measured one after the other, inside
``backward()``. ``differentiable.py`` serves gradients that carry a graph,
``without_values.py`` meta and fake ones. ``foreign_context.py`` has what a user's own rule may know
of a step.

Called by: optimizers, functional, clipper, integrations.
Imports: errors, checks, engines, thresholds, scopes, ranks, records.
"""

__all__ = [
    "buckets",
    "coefficients",
    "differentiable",
    "foreign_context",
    "forms",
    "held",
    "host_step",
    "norm_thresholds",
    "norms",
    "parts",
    "policies",
    "row_step",
    "step",
    "without_values",
]
