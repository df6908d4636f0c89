"""The share of each parameter in the total norm of a run: which parameters a reader sees first."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .run import LoggedParameterNorms, Run


def mean_shares(run: Run, logged: LoggedParameterNorms) -> NDArray[np.float64]:
    """Return each parameter's mean share of the total norm, raised if it broke steps.

    A parameter broke a step if its norm was not finite there. It gets up to 1 more: the fewer
    parameters share the blame, the more.
    """
    unique_steps, step_indices = np.unique(logged.steps, return_inverse=True)
    steps = len(unique_steps)
    totals = run.norms[np.searchsorted(run.steps, logged.steps)]
    broken = ~np.isfinite(logged.norms)
    broken_in_step = np.bincount(step_indices, weights=broken, minlength=steps)[step_indices]
    measurable = ~broken & np.isfinite(totals) & (totals > 0)
    shares = np.zeros(len(broken))
    # Logs round each norm by itself: a denormal part may exceed its total.
    parts = np.minimum(logged.norms[measurable], totals[measurable])
    shares[measurable] = parts / totals[measurable]
    names = len(logged.names)
    means = np.bincount(logged.name_indices, weights=shares, minlength=names) / steps
    blame = np.zeros(names)
    np.maximum.at(blame, logged.name_indices[broken], 1 / broken_in_step[broken])
    return means + blame
