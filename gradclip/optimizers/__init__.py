"""The hooks of a clipper on an optimizer, and everything they do around one step.

``supported.py`` says which optimizers can be clipped, ``advice.py`` which of them need care, and
``replaced.py`` when a clipper may take the place of another one. ``attachment.py`` holds the hooks,
with ``closures.py`` for the closure of a step and ``step_changes.py`` for changes of an optimizer
that last until the step ends; ``parent_steps.py`` finds optimizers whose step calls a parent's, and
``own_clipping.py`` those that clip before that call.
``joint.py`` collects the gradients of one step; ``several.py`` chooses among the gradients of
several optimizers, with ``clipped_already.py`` as its memory.
``grad_scaler.py`` reads a GradScaler, ``joint_scaling.py`` unscales several optimizers, and
``shared_overflow.py`` lets ranks skip a step together. ``micro_batches.py`` clips gradients before
they are accumulated, and ``in_backward.py`` at steps that are taken inside ``backward()``.
``weight_changes.py`` measures the parameters before and after a step, if a sink asks for it.

Where torch has no hook
    A step pre-hook is given the optimizer and the arguments of the step, a post-hook the same
    (pytorch/pytorch#89176). The rest of its situation a clipper finds by these means. Each is in
    one place, and a usual step of one optimizer needs none of them:

    * *Running functions* (``call_stack.py``). A subclass whose ``step`` calls ``super().step()``
      fires all hooks twice, and hooks are not called after a step that raised: whether a pre-hook
      belongs to a running step or to the next one shows on the call stack alone. Neither do hooks
      learn that ``GradScaler.step`` is the caller (pytorch/pytorch#67590 asks for a sign of it),
      nor that torch's distributed checkpoint is, which steps with gradients of 0 to make the
      optimizer's state.
    * *Arguments that are let go* (``GuardedArguments`` in ``step_changes.py``). A skipped step
      hides the gradients while the optimizer steps. If that step raises, no post-hook puts them
      back, and the caller who catches the error must find them. torch drops a step's arguments
      when the step is over, however it ends.
    * *References to an optimizer* (``_referrers`` in ``supported.py``), at attach alone and only
      if the library was imported. DeepSpeed and ZeroRedundancyOptimizer give out the plain
      optimizer that they step with a part of the gradients; it knows nothing of its owner.
    * *A class of its own for a GradScaler* (``shared_overflow.py``), only across ranks. GradScaler
      has no hooks, and an overflow on one rank makes that rank skip ``step`` while the others
      wait for it in a collective.

Called by: clipper, integrations.
Imports: errors, engines, thresholds, scopes, ranks, records, gradients.
"""

__all__ = [
    "advice",
    "attachment",
    "call_stack",
    "in_backward",
    "joint",
    "micro_batches",
    "replaced",
    "several",
    "step_changes",
    "supported",
    "weight_changes",
]
