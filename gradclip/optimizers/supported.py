"""Which optimizers a clipper can take hold of, and why it refuses the others."""

from __future__ import annotations

import gc
import sys
import warnings
from typing import Any
from weakref import WeakSet

import torch
from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..errors import ArgumentError, AttachError
from ..gradients.held import parameters_of
from ..ranks.ranks import Ranks

WRAPPED_AS = ("optimizer", "base_optimizer")
"""Attributes under which wrappers hold the optimizer that they step."""

attached: WeakSet[Optimizer] = WeakSet()
"""The optimizers that some clipper holds."""


def clippable(given: object, *, skips: bool, ranks: object = None) -> list[Optimizer]:
    """Return the optimizers whose steps are to be clipped, those inside wrappers included.

    Warns of an optimizer that clips by itself.

    Args:
        given: An optimizer, a wrapper of one, or several in a list or tuple.
        skips: Whether a policy leaves out steps.
        ranks: Where parameters live that are not here, or None.

    Raises:
        AttachError: One that can't be clipped, for the reason that the message gives.
        ArgumentError: ``ranks`` is something else.
    """
    if not (ranks is None or isinstance(ranks, Ranks)):
        raise ArgumentError(f"ranks is {ranks!r}: give gradclip.Ranks(group), or None.")
    sharded = ranks is not None
    found = listed(given) or [None]
    optimizers = [_checked(each, skips=skips, sharded=sharded) for each in found]
    for index, optimizer in enumerate(optimizers):
        if any(optimizer is other for other in optimizers[:index]):
            raise AttachError(
                f"The same {type(optimizer).__name__} was given twice: give each optimizer once."
            )
        _warn_of_own_clipping(optimizer)
    return optimizers


def listed(given: object) -> list[Any]:
    """Return what was given as one or several, as a list."""
    return list(given) if isinstance(given, list | tuple) else [given]


def check_groups(optimizer: Optimizer) -> None:
    """Refuse what a parameter group asks for and cannot get; cheap enough for every step.

    Raises:
        AttachError: A group whose step is differentiable.
    """
    for group in optimizer.param_groups:
        if group.get("differentiable"):
            raise AttachError(
                f"{type(optimizer).__name__} has differentiable=True: scaling gradients in place "
                "would falsify what is differentiated through the step. Build it without, or clip "
                "out of place in the loss."
            )


def refuse_within_backward(optimizer: Optimizer) -> None:
    """Refuse a step that is taken while gradients are still being computed.

    Raises:
        AttachError: The step runs inside ``backward()``.
    """
    if torch._C._current_graph_task_id() != -1:  # what torch.utils.checkpoint asks, too
        raise AttachError(
            f"{type(optimizer).__name__} steps inside backward(), where the other gradients are "
            "not there yet, so that no norm over all of them is known: step after backward(), or "
            "clip each gradient by itself with gradclip.clip_gradients_ in that hook."
        )


def _checked(given: object, *, skips: bool, sharded: bool) -> Optimizer:
    _refuse_deepspeed(given)
    optimizer = _innermost(given)
    if not isinstance(optimizer, Optimizer):
        raise AttachError(_not_an_optimizer(optimizer))
    name = type(optimizer).__name__
    if "_optimizer_step_pre_hooks" not in vars(optimizer):
        raise AttachError(
            f"{name} has no step hooks, as wrappers have not that skip Optimizer.__init__: give "
            "the optimizer that it wraps."
        )
    if not getattr(type(optimizer).step, "hooked", False):
        raise AttachError(
            f"{name}.step was replaced after the optimizer was built, and calls no hooks: replace "
            "it before."
        )
    if optimizer in attached:
        raise AttachError(
            f"Another GradientClipper is attached to this {name}: detach() or close() it first, "
            "or use the one that is there."
        )
    check_groups(optimizer)
    if not sharded:
        _refuse_flat_shards(optimizer)
    _refuse_zero(optimizer)
    if sharded and isinstance(optimizer, LBFGS):
        raise AttachError(
            "LBFGS evaluates its closure as often as its own part of the gradients asks for, so "
            "that ranks would wait for each other: choose another optimizer, or leave out ranks=."
        )
    if skips and isinstance(optimizer, LBFGS):
        raise AttachError(
            "LBFGS takes a step without gradients for a converged one, so a step of it cannot be "
            "skipped: choose another policy than 'skip'."
        )
    return optimizer


def _refuse_flat_shards(optimizer: Optimizer) -> None:
    if any(getattr(p, "_fsdp_flattened", False) for p in parameters_of(optimizer.param_groups)):
        raise AttachError(
            f"{type(optimizer).__name__} holds the flat parameters of FullyShardedDataParallel, of "
            "which a part is on each rank: give "
            "ranks=gradclip.Ranks(the wrapped module's process_group), with replicated='*' for "
            "ShardingStrategy.NO_SHARD."
        )


def _refuse_deepspeed(given: Any) -> None:
    """Refuse what a DeepSpeed engine steps, known by its type alone: nothing is imported."""
    chain: list[Any] = []
    while given is not None and not any(given is each for each in chain):
        chain.append(given)
        held = (getattr(given, name, None) for name in (*WRAPPED_AS, "engine"))
        given = next((each for each in held if each is not None), None)
    found = next(filter(_is_of_deepspeed, chain), None)
    if found is None and "deepspeed" in sys.modules:
        found = next(filter(_is_of_deepspeed, _holders_of(chain[-1])), None)
    if found is not None:
        raise AttachError(
            f"Found a {type(found).__name__} of DeepSpeed, whose engine keeps the gradients to "
            "itself, in flat parts and scaled, and steps them piece by piece, so that no hook sees "
            "the norm of the whole: set gradient_clipping in DeepSpeed's configuration, and read "
            "engine.get_global_grad_norm()."
        )


def _is_of_deepspeed(found: object) -> bool:
    """Tell whether it is an engine of DeepSpeed or an optimizer of one; its schedulers are not."""
    modules = [str(kind.__module__) for kind in type(found).__mro__]
    return any(
        module.startswith("deepspeed.runtime.") and module != "deepspeed.runtime.lr_schedules"
        for module in modules
    )


def _refuse_zero(optimizer: Optimizer) -> None:
    """Refuse what ZeroRedundancyOptimizer steps out of sight, or with a part of the gradients."""
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    if module is None:
        return
    kind = module.ZeroRedundancyOptimizer
    if isinstance(optimizer, kind) and getattr(optimizer, "_overlap_with_ddp", False):
        raise AttachError(
            "ZeroRedundancyOptimizer has overlap_with_ddp=True and steps inside backward(), where "
            "no norm over all gradients is known: build it without."
        )
    holders = _holders_of(optimizer)
    if any(isinstance(each, kind) and each.optim is optimizer for each in holders):
        raise AttachError(
            f"This {type(optimizer).__name__} is the inner one of a ZeroRedundancyOptimizer and "
            "has the parameters of this rank alone: give the ZeroRedundancyOptimizer, whose "
            "gradients are whole."
        )


def _holders_of(held: object) -> list[Any]:
    """Return what refers to an object, by itself or in its attributes."""
    found = gc.get_referrers(held)
    return found + [each for own in found if type(own) is dict for each in gc.get_referrers(own)]


def _innermost(given: Any) -> Any:
    """Follow wrappers to the optimizer that is stepped in the end."""
    inner = None if isinstance(given, LRScheduler) else _inner(given)
    return given if inner is None else _innermost(inner[1])


def _inner(given: object) -> tuple[str, Optimizer] | None:
    """Return the optimizer that an object holds, with the attribute's name."""
    for name in WRAPPED_AS:
        inner = getattr(given, name, None)
        if isinstance(inner, Optimizer) and inner is not given:
            return name, inner
    return None


def _warn_of_own_clipping(optimizer: Optimizer) -> None:
    limits = [group.get("max_grad_norm") for group in optimizer.param_groups]
    limits.append(getattr(optimizer, "max_grad_norm", None))
    own = next((limit for limit in limits if isinstance(limit, int | float) and limit > 0), None)
    if own is not None:
        warnings.warn(
            f"{type(optimizer).__name__} clips by itself with max_grad_norm={own}, after "
            "gradclip and out of its sight: switch it off (0 or None, as the optimizer has it), "
            "or give max_norm=None to measure only.",
            UserWarning,
            stacklevel=5,
        )


def _not_an_optimizer(found: object) -> str:
    if found is None:
        return "No optimizer was given: give a torch.optim.Optimizer."
    what = f"the class {found.__name__}" if isinstance(found, type) else f"a {type(found).__name__}"
    inner = _inner(found)
    if inner is not None:
        return f"Found {what}, which holds an optimizer: give its .{inner[0]}."
    return f"Found {what}: give a torch.optim.Optimizer."
