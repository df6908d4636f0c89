"""Hazards of training loops, each run with a way to clip and judged by its gradients.

Before the hazard every way takes `STEPS` usual steps. A package that attaches to an optimizer is
attached; other functions are called right before a step, or in the closure.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.peers.scenes import COUNT, EVALUATIONS, STEPS, Repeating, Scene, flat
from benchmarks.peers.ways import Way

SPIKE = 5.0
SCALES = (2.0**16, 2.0**10)
"""Scales of a GradScaler before and after an overflow."""


def large_elements(way: Way) -> str:
    """Clip float32 gradients with elements of about 1e20."""
    return spike(Scene(way).warm_up(), 1e20 * COUNT**0.5)


def float16_overflow(way: Way) -> str:
    """Clip float16 gradients whose elements are in range and whose norm is not."""
    return spike(Scene(way, torch.float16).warm_up(), 4e5)


def one_nan(way: Way) -> str:
    """Set one element to NaN."""
    return not_finite(way, math.nan)


def one_inf(way: Way) -> str:
    """Set one element to infinity."""
    return not_finite(way, math.inf)


def tied(way: Way) -> str:
    """Give one parameter twice."""
    return spike(Scene(way, groups=((0, 0, 1, 2),)).warm_up(), SPIKE)


def in_closure(way: Way) -> str:
    """Step with a closure that is evaluated several times."""
    scene = Scene(way, make=Repeating)
    norm = SPIKE

    def closure() -> float:
        scene.write(norm)
        drawn.append(scene.before)
        return 0.0

    for step in range(STEPS + 1):
        drawn: list[Tensor] = []
        norm = SPIKE if step == STEPS else scene.usual()
        scene.step_with(closure)
    verdicts = []
    for before, given in zip(drawn, scene.optimizers[0].given, strict=True):
        scene.before = before
        verdicts.append(scene.judged(torch.cat(given)))
    wrong = [verdict for verdict in verdicts if verdict != "right"]
    return f"{wrong[0]} ({len(wrong)} of {len(verdicts)} evaluations)" if wrong else "right"


def fused_amp(way: Way) -> str:
    """Step with a fused optimizer and a GradScaler whose scale has fallen."""
    return with_scaler(way, unscale=False)


def fused_amp_unscaled(way: Way) -> str:
    """Step with a fused optimizer and a GradScaler after `unscale_`."""
    return with_scaler(way, unscale=True)


def under_autocast(way: Way) -> str:
    """Clip inside float16 autocast a norm whose square is out of float16's range."""
    scene = Scene(way).warm_up()
    scene.write(1e3)
    with torch.autocast("cpu", torch.float16):
        scene.step()
    return scene.judged()


def sparse_gradient(way: Way) -> str:
    """Clip dense gradients and a sparse one whose indices occur twice."""
    return spike(Scene(way, sparse=True).warm_up(), SPIKE)


def complex_gradients(way: Way) -> str:
    """Clip complex gradients."""
    return spike(Scene(way, torch.complex64).warm_up(), SPIKE)


def two_optimizers(way: Way) -> str:
    """Give the parameters of one model to two optimizers."""
    return spike(Scene(way, groups=((0,), (1, 2))).warm_up(), SPIKE)


def resumed(way: Way) -> str:
    """Load the state dict into a new instance, and clip the same spikes with both."""
    old, new = Scene(way).warm_up(), Scene(way)
    if old.clipping.state is not None:
        with io.BytesIO() as file:
            torch.save(old.clipping.state.state_dict(), file)
            file.seek(0)
            new.clipping.state.load_state_dict(torch.load(file, weights_only=True))
    left: list[list[float]] = []
    for scene in (old, new):
        scene.random.manual_seed(1)
        left.append([])
        for _ in range(EVALUATIONS):
            scene.write(SPIKE)
            scene.step()
            left[-1].append(flat(scene.gradients()).norm().item())
    for before, after in zip(*left, strict=True):
        if not math.isclose(before, after, rel_tol=1e-6):
            kept = "no state dict" if old.clipping.state is None else "state dict loaded"
            return f"{kept}: a spike is left at {after:.3g} instead of {before:.3g}"
    return "right" if old.clipping.state is not None else "right, nothing to keep"


HAZARDS: dict[str, tuple[Callable[[Way], str], str]] = {
    "elements of 1e20, float32": (large_elements, "clipped as any other spike"),
    "float16, norm above 65504": (float16_overflow, "clipped as any other spike"),
    "one NaN": (one_nan, "parameters stay finite, later spikes are clipped"),
    "one inf": (one_inf, "parameters stay finite, later spikes are clipped"),
    "tied parameters, given twice": (tied, "counted once, scaled once"),
    "closure, evaluated 3 times": (in_closure, "every evaluation is clipped"),
    "fused AMP": (fused_amp, "the true gradient is clipped, not the scaled one"),
    "fused AMP, unscale_ before": (fused_amp_unscaled, "the same"),
    "inside autocast, float16": (under_autocast, "clipped as outside"),
    "sparse, indices twice": (sparse_gradient, "by the norm of the sum"),
    "complex": (complex_gradients, "by the norm of the moduli"),
    "two optimizers": (two_optimizers, "one norm over the gradients of both"),
    "resume": (resumed, "the same decisions as without"),
}
"""The function of each hazard and the right result, by name."""


def outcome(way: Way, hazard: str) -> str:
    """Return the verdict on a way to clip in a hazard."""
    if not way.installed:
        return "not installed"
    run, _ = HAZARDS[hazard]
    try:
        with warnings.catch_warnings(), torch.enable_grad():
            warnings.simplefilter("ignore")
            return run(way)
    except Exception as error:  # noqa: BLE001  # any error is a result of the way
        return raised(error)


def raised(error: Exception) -> str:
    """Return the type of an error and the beginning of its message."""
    message = str(error).strip().split("\n")[0].split(". ")[0].rstrip(".").replace("|", "/")
    short = message if len(message) <= 100 else message[:100].rsplit(" ", 1)[0] + " ..."
    return f"raises {type(error).__name__}: {short}"


def spike(scene: Scene, norm: float) -> str:
    """Return the verdict on a step with gradients of some norm."""
    scene.write(norm)
    scene.step()
    return scene.judged()


def not_finite(way: Way, element: float) -> str:
    """Return the verdict on a step with one such element, by the parameters after it."""
    scene = Scene(way).warm_up()
    scene.move()
    scene.write(scene.usual())
    scene.gradients()[0].view(-1)[3] = element
    scene.step()
    after, weights = flat(scene.gradients()), flat(scene.parameters)
    lost, count = int((~weights.isfinite()).sum()), weights.numel()
    zeros = int((after == 0).sum())
    if lost:
        verdict = f"{lost} of {count} parameters not finite"
    elif not scene.moved().any() and not zeros:
        verdict = "right: no step"
    else:
        verdict = f"right: {zeros} of {count} gradients 0"
    for norm in (*(scene.usual() for _ in range(EVALUATIONS)), SPIKE):
        scene.restore()
        scene.write(norm)
        scene.step()
    later = scene.judged()
    return verdict if later == "right" else f"{verdict}; a later spike: {later}"


def with_scaler(way: Way, *, unscale: bool) -> str:
    """Return the verdict on a step of a fused optimizer, whose gradients are scaled."""
    scaler = torch.amp.GradScaler("cpu", init_scale=SCALES[0])
    scaler.scale(torch.ones(()))
    scene = Scene(way, scaler=scaler, make=lambda p, lr: torch.optim.SGD(p, lr=lr, fused=True))
    for _ in range(STEPS):
        scene.write(scene.usual())
        scene.step(unscale=unscale)
    # The scale after one or several overflows.
    scaler.update(SCALES[1])
    scene.move()
    scene.write(SPIKE)
    scene.step(unscale=unscale)
    return scene.judged(scene.moved())
