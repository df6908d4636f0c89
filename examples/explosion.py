"""Why gradients explode: the norm of a recurrent state's gradient on its way back through time.

    python examples/explosion.py [--out explosion.png] [--steps 60]

The gradient of an early state is the gradient of the last state multiplied by the Jacobian of every
step between them. With h = tanh(W h + U x) the Jacobian of one step is diag(1 - h^2) W. Gradients
grow if the spectral radius of W is above 1 and shrink if it is below, until tanh saturates
(Pascanu, Mikolov and Bengio, "On the difficulty of training recurrent neural networks", 2013). The
picture shows the norms that `gradclip.through_time` measures beside the product of the Jacobians,
and the effect of clipping: it limits the gradient of the weights and leaves the cause.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gradclip import clip_backward, clip_grad_norm_, through_time

RADII = {0.9: "#0072B2", 1.0: "#009E73", 1.1: "#E69F00", 1.3: "#D55E00"}  # Okabe and Ito's palette
HIDDEN, INPUTS, BATCH = 64, 4, 8
MAX_NORM = 1.0


@dataclass
class Passage:
    """Norms of one forward and backward pass."""

    measured: list[float]
    """Gradient norms of the states, in the order of time."""
    theory: list[float]
    """The same norms by the product of the Jacobians."""
    weights: float
    """Gradient norm of all weights."""
    clipped: float
    """Gradient norm of all weights after clipping."""


def pass_through(radius: float, steps: int, *, through: bool = False) -> Passage:
    """Run a network whose recurrent matrix has a given spectral radius, forward and backward.

    Args:
        radius: The spectral radius.
        steps: Number of time steps.
        through: Whether to clip the gradient of the state at every step.
    """
    torch.manual_seed(0)
    cell = nn.RNNCell(INPUTS, HIDDEN, dtype=torch.float64)
    with torch.no_grad():
        recurrent = torch.randn(HIDDEN, HIDDEN, dtype=torch.float64)
        cell.weight_hh.copy_(recurrent / torch.linalg.eigvals(recurrent).abs().max() * radius)
        cell.bias_hh.zero_()
        cell.bias_ih.zero_()
    inputs = torch.randn(steps, BATCH, INPUTS, dtype=torch.float64) * 1e-6  # tanh stays linear
    state, states = torch.zeros(BATCH, HIDDEN, dtype=torch.float64), []
    for values in inputs:
        state = cell(values, state)
        if through:
            state = clip_backward(state, MAX_NORM)
        states.append(state)
    time_norms = through_time(states)
    last = torch.randn_like(state)
    (state * last / last.norm()).sum().backward()
    theory = product_of_jacobians(cell.weight_hh, states, last / last.norm())
    weights = clip_grad_norm_(cell.parameters(), MAX_NORM).item()
    return Passage(time_norms.norms.tolist(), theory, weights, min(weights, MAX_NORM))


@torch.no_grad()
def product_of_jacobians(recurrent: Tensor, states: list[Tensor], last: Tensor) -> list[float]:
    """Return the norms of the last gradient times the Jacobian of one step after another."""
    norms, gradient = [last.norm().item()], last
    for state in states[:0:-1]:
        gradient = gradient * (1 - state**2) @ recurrent
        norms.append(gradient.norm().item())
    return norms[::-1]


def draw(passages: dict[float, Passage], through: Passage, path: str) -> None:
    """Draw the measured growth beside the theory, and the effect of clipping."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), dpi=80, layout="constrained")
    FigureCanvasAgg(figure)
    growth, clipping = figure.subplots(1, 2, sharey=True)
    for radius, passage in passages.items():
        back = range(len(passage.measured))
        growth.plot(back, passage.measured[::-1], color=RADII[radius], linewidth=3, alpha=0.5)
        growth.plot(back, passage.theory[::-1], color=RADII[radius], linewidth=1.2, linestyle="--")
        growth.text(
            back[-1] + 1, passage.measured[0], f"{radius:g}", color=RADII[radius], va="center"
        )
    growth.plot([], [], color="0.5", linewidth=3, alpha=0.5, label="measured by through_time()")
    growth.plot(
        [], [], color="0.2", linewidth=1.2, linestyle="--", label="product of the Jacobians"
    )
    growth.set_title("The state's gradient, by the spectral radius of W", loc="left")
    growth.set_ylabel("norm of the gradient of the state")
    worst = passages[max(passages)]
    lines = {
        f"clip_grad_norm_({MAX_NORM:g}): as without clipping,\n"
        f"the weights' gradient goes from {worst.weights:.0e} to {worst.clipped:g}": (
            worst.measured,
            "#D55E00",
        ),
        f"clip_backward(state, {MAX_NORM:g}) at every step": (through.measured, "#0072B2"),
    }
    for label, (norms, color) in lines.items():
        clipping.plot(norms[::-1], color=color, linewidth=2, label=label)
    clipping.set_title(f"What clipping changes, at {max(passages):g}", loc="left")
    for axes in (growth, clipping):
        axes.set_yscale("log")
        axes.set_xlabel("time steps back from the loss")
        axes.grid(visible=True, color="0.92")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper left", frameon=False)
    low, high = growth.get_ylim()
    growth.set_ylim(low, high**1.6)  # room for the legends
    figure.savefig(path)


def main() -> None:
    """Measure, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="explosion.png")
    parser.add_argument("--steps", type=int, default=60)
    options = parser.parse_args()
    passages = {radius: pass_through(radius, options.steps) for radius in RADII}
    through = pass_through(max(RADII), options.steps, through=True)
    print("spectral  growth of the state's gradient   growth a step      gradient of the weights")
    print("radius    measured      by Jacobians       in the first half  before        clipped")
    for radius, passage in passages.items():
        half = options.steps // 2
        rate = (passage.measured[half] / passage.measured[-1]) ** (1 / (options.steps - 1 - half))
        print(
            f"{radius:<9g} {passage.measured[0]:<13.4g} {passage.theory[0]:<18.4g} {rate:<18.3f} "
            f"{passage.weights:<13.4g} {passage.clipped:.4g}"
        )
    print(
        f"clipped through time, at {max(RADII):g}: the state's gradient is at most "
        f"{max(through.measured):.4g}, that of the weights {through.weights:.4g}"
    )
    draw(passages, through, options.out)
    print(f"Picture: {options.out}")


if __name__ == "__main__":
    main()
