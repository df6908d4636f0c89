"""Clipping without a hook: one call clips or measures.

``torch_names.py`` has torch's names and signatures, ``units.py`` adaptive gradient clipping,
``backward.py`` the gradient on its way through time. ``operators.py`` makes one operator of each
for ``torch.compile``.

Called by: nobody inside the package.
Imports: errors, checks, engines, thresholds, scopes, ranks, gradients.
"""

__all__ = ["backward", "torch_names", "units"]
