"""Says which optimizers a clipper can attach to, and why it refuses the others."""

from __future__ import annotations

import gc
import sys
import warnings
from typing import Any

from torch.optim import LBFGS, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..errors import ArgumentError, AttachError
from ..gradients.held import parameters_of
from ..ranks.ranks import Ranks
from .parent_steps import make_step_hooked
from .replaced import check_replaceable

WRAPPED_AS = ("optimizer", "base_optimizer")
"""The attributes in which wrappers hold the optimizer that they step."""
MAY_BE_WRAPPED_AS = ("optim", "_optimizer")
"""Attributes in which others hold an optimizer of a part of the parameters as well."""


def clippable(given: object, *, skips: bool, ranks: object = None) -> list[Optimizer]:
    """Return the optimizers to attach to, without their wrappers.

    Warns of an optimizer that clips by itself.

    Args:
        given: An optimizer, a wrapper of one, or several in a list or tuple.
        skips: Whether a policy skips steps.
        ranks: The clipper's option: a `Ranks`, or None.

    Raises:
        AttachError: An optimizer that cannot be clipped, for the reason that the message gives.
        ArgumentError: ``ranks`` is neither a `Ranks` nor None.
    """
    if not (ranks is None or isinstance(ranks, Ranks)):
        raise ArgumentError(f"ranks is {ranks!r}: give gradclip.Ranks(group), or None.")
    sharded = ranks is not None
    optimizers = [_checked(item, skips=skips, sharded=sharded) for item in listed(given) or [None]]
    for index, optimizer in enumerate(optimizers):
        if any(optimizer is other for other in optimizers[:index]):
            raise AttachError(
                f"The same {type(optimizer).__name__} was given twice: give each optimizer once."
            )
        _warn_of_own_clipping(optimizer)
    check_replaceable(optimizers)
    return optimizers


def listed(given: object) -> list[Any]:
    """Return one optimizer or several as a list."""
    return list(given) if isinstance(given, list | tuple) else [given]


def check_groups(optimizer: Optimizer) -> None:
    """Refuse parameter groups that cannot be clipped. Called at every step, as groups may change.

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


def _checked(given: object, *, skips: bool, sharded: bool) -> Optimizer:
    """Return the optimizer inside all wrappers, once nothing speaks against it."""
    _refuse_deepspeed(given)
    optimizer = _innermost(given)
    if not isinstance(optimizer, Optimizer):
        raise AttachError(_not_an_optimizer(optimizer))
    name = type(optimizer).__name__
    if "_optimizer_step_pre_hooks" not in vars(optimizer):
        raise AttachError(
            f"{name} has no step hooks, as happens to wrappers that skip Optimizer.__init__: give "
            "the optimizer that it wraps."
        )
    # As Optimizer.__init__ does, for a step or a class that was replaced since.
    make_step_hooked(type(optimizer))
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


def _innermost(given: Any) -> Any:
    """Follow wrappers to the optimizer that is stepped in the end."""
    inner = None if isinstance(given, LRScheduler) else _wrapped(given)
    return given if inner is None else _innermost(inner[1])


def _wrapped(given: object) -> tuple[str, Optimizer] | None:
    """Return the optimizer that an object wraps, after the name of its attribute."""
    for name in (*WRAPPED_AS, *MAY_BE_WRAPPED_AS):
        inner = getattr(given, name, None)
        if not isinstance(inner, Optimizer) or inner is given:
            continue
        if name in WRAPPED_AS or _has_same(given, inner):
            return name, inner
    return None


def _has_same(wrapper: Any, inner: Optimizer) -> bool:
    """Return whether two optimizers have the same parameters, here and on other ranks."""
    if _is_zero(wrapper):
        return False  # it shares the parameters out to ranks
    groups = getattr(wrapper, "param_groups", ())
    return {*map(id, parameters_of(groups))} == {*map(id, parameters_of(inner.param_groups))}


def _not_an_optimizer(given: object) -> str:
    if given is None:
        return "No optimizer was given: give a torch.optim.Optimizer."
    kind = f"the class {given.__name__}" if isinstance(given, type) else f"a {type(given).__name__}"
    inner = _wrapped(given)
    if inner is not None:
        return f"Found {kind}, which holds an optimizer: give its .{inner[0]}."
    return f"Found {kind}: give a torch.optim.Optimizer."


def _refuse_flat_shards(optimizer: Optimizer) -> None:
    if any(getattr(p, "_fsdp_flattened", False) for p in parameters_of(optimizer.param_groups)):
        raise AttachError(
            f"{type(optimizer).__name__} holds the flat parameters of FullyShardedDataParallel, of "
            "which a part is on each rank: give "
            "ranks=gradclip.Ranks(the wrapped module's process_group), with replicated='*' for "
            "ShardingStrategy.NO_SHARD."
        )


def _refuse_deepspeed(given: Any) -> None:
    """Refuse the optimizers of a DeepSpeed engine, known by type names: nothing is imported."""
    chain: list[Any] = []
    while given is not None and not any(given is link for link in chain):
        chain.append(given)
        wrapped = (getattr(given, name, None) for name in (*WRAPPED_AS, "engine"))
        given = next((inner for inner in wrapped if inner is not None), None)
    owner = next(filter(_is_of_deepspeed, chain), None)
    if owner is None and "deepspeed" in sys.modules:
        owner = next(filter(_is_of_deepspeed, _referrers(chain[-1])), None)
    if owner is not None:
        raise AttachError(
            f"Found a {type(owner).__name__} of DeepSpeed, whose engine keeps the gradients to "
            "itself, in flat parts and scaled, and steps them piece by piece, so that no hook sees "
            "the norm of the whole: set gradient_clipping in DeepSpeed's configuration, and read "
            "engine.get_global_grad_norm()."
        )


def _is_of_deepspeed(item: object) -> bool:
    """Return whether it is an engine of DeepSpeed or an optimizer of one, not a scheduler."""
    modules = [str(kind.__module__) for kind in type(item).__mro__]
    return any(
        module.startswith("deepspeed.runtime.") and module != "deepspeed.runtime.lr_schedules"
        for module in modules
    )


def _is_zero(item: object) -> bool:
    """Return whether it is torch's ZeroRedundancyOptimizer."""
    module = sys.modules.get("torch.distributed.optim.zero_redundancy_optimizer")
    return module is not None and isinstance(item, module.ZeroRedundancyOptimizer)


def _refuse_zero(optimizer: Optimizer) -> None:
    """Refuse a ZeroRedundancyOptimizer that steps inside backward, and the optimizer inside one."""
    if _is_zero(optimizer) and getattr(optimizer, "_overlap_with_ddp", False):
        raise AttachError(
            "ZeroRedundancyOptimizer has overlap_with_ddp=True and steps inside backward(), where "
            "no norm over all gradients is known: build it without."
        )
    if "torch.distributed.optim.zero_redundancy_optimizer" not in sys.modules:
        return  # a search of all objects takes long
    if any(owner.optim is optimizer for owner in filter(_is_zero, _referrers(optimizer))):
        raise AttachError(
            f"This {type(optimizer).__name__} is the inner one of a ZeroRedundancyOptimizer and "
            "has the parameters of this rank alone: give the ZeroRedundancyOptimizer, whose "
            "gradients are whole."
        )


def _referrers(item: object) -> list[Any]:
    """Return the objects that refer to an object, directly or as one of their attributes."""
    referrers = gc.get_referrers(item)
    namespaces = [referrer for referrer in referrers if type(referrer) is dict]
    return referrers + [owner for namespace in namespaces for owner in gc.get_referrers(namespace)]


def _warn_of_own_clipping(optimizer: Optimizer) -> None:
    options = [group.get("max_grad_norm") for group in optimizer.param_groups]
    options.append(getattr(optimizer, "max_grad_norm", None))
    own = next((value for value in options if isinstance(value, int | float) and value > 0), None)
    if own is not None:
        warnings.warn(
            f"{type(optimizer).__name__} clips by itself with max_grad_norm={own}, after "
            "gradclip and out of its sight: switch it off (0 or None, as the optimizer has it), "
            "or give max_norm=None to measure only.",
            UserWarning,
            stacklevel=5,
        )
