"""Names of parameters without the parts that wrappers of modules add to them.

``torch.compile``, parallel modules and activation checkpoints hold the module that they wrap as a
submodule, whose name then stands in the names of all its parameters. A training may be wrapped
another way when it resumes, and ranks may be wrapped in different ways: labels, patterns, states
and logs have the names of the plain model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from itertools import accumulate

from torch import nn

WRAPPED_AS = {
    "_orig_mod",  # torch.compile
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
    "_forward_module",  # Lightning Fabric
}
"""Names that wrappers alone give to the module that they wrap."""
MODULE = "module"
"""The name that parallel modules give it, which may be that of any other submodule as well."""


def model_names(model: nn.Module) -> dict[int, str]:
    """Return the plain name of each parameter of a model, by id."""
    inside = {
        f"{path}.{MODULE}".lstrip(".")
        for path, module in model.named_modules()
        if MODULE in module._modules and _is_parallel(type(module))
    }
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return dict(zip(names, _distinct(names.values(), inside), strict=True))


def given_names(names: Sequence[str]) -> list[str]:
    """Return plain names for those that a user has given to optimizers.

    A parallel module around the whole model shows in all of them alone.
    """
    plain = _distinct(names)
    while plain and all(name.startswith(f"{MODULE}.") for name in plain):
        plain = [name.removeprefix(f"{MODULE}.") for name in plain]
    return plain


def plain_name(name: str, inside: Collection[str] = ()) -> str:
    """Return a name without the names of wrapped modules.

    Args:
        name: The name of a parameter, or a pattern of such names.
        inside: Paths of other modules that are wrapped.
    """
    parts = name.split(".")
    paths = accumulate(parts, "{}.{}".format)
    kept = zip(parts, paths, strict=True)
    return ".".join(part for part, path in kept if part not in WRAPPED_AS and path not in inside)


def are_same(labels: Sequence[str], others: Sequence[str]) -> bool:
    """Return whether labels are the same but for names of wrappers, which they once had in them."""
    return [*map(_bare, labels)] == [*map(_bare, others)]


def _bare(label: str) -> list[str]:
    return [part for part in label.split(".") if part not in WRAPPED_AS and part != MODULE]


def _distinct(names: Iterable[str], inside: Collection[str] = ()) -> list[str]:
    """Return plain names, but the given ones where several of them have the same plain one."""
    pairs = [(name, plain_name(name, inside)) for name in names]
    counts = Counter(plain for _, plain in {*pairs})
    return [plain if counts[plain] == 1 else name for name, plain in pairs]


def _is_parallel(kind: type) -> bool:
    """Return whether a class of modules wraps the module that it holds under `MODULE`.

    As torch's DistributedDataParallel and AveragedModel do, and others of the same kind.
    """
    names = [base.__name__ for base in kind.__mro__]
    return any(name.endswith("DataParallel") or name == "AveragedModel" for name in names)
