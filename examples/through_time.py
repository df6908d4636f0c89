"""Clip through time: limit the gradient of a recurrent network's state at every time step.

The loss reaches an early state through the matrices of all steps between them, and where these
stretch it, the gradient explodes on its way. Clipping the weights' gradient comes after that, when
the early steps drown out all others; clipping the state's gradient stops it at every step (Graves,
"Generating sequences with recurrent neural networks", 2013).
"""

import torch
from torch import Tensor, nn

from gradclip import clip_backward, get_total_norm, through_time

STEPS, BATCH, HIDDEN = 100, 16, 64
MAX_NORM = 0.5


def recall(
    cell: nn.RNNCell, head: nn.Linear, inputs: Tensor, max_norm: float | None
) -> list[float]:
    """Go backward from recalling the first input at the end; return the states' gradient norms."""
    state, states = torch.zeros(BATCH, HIDDEN), []
    for values in inputs:
        state = cell(values, state)
        states.append(state)
        if max_norm is not None:
            state = clip_backward(state, max_norm)
    watched = through_time(states)
    loss = nn.functional.mse_loss(head(state), inputs[0].sign())
    cell.zero_grad()
    loss.backward()
    return watched.norms.tolist()


def main() -> None:
    """Print the norms with and without clipping through time."""
    torch.manual_seed(0)
    cell, head = nn.RNNCell(1, HIDDEN), nn.Linear(HIDDEN, 1)
    nn.init.orthogonal_(cell.weight_hh, gain=2.0)  # stretches what flows back
    inputs = torch.randn(STEPS, BATCH, 1)

    columns, totals = [], []
    for max_norm in (None, MAX_NORM):
        columns.append(recall(cell, head, inputs, max_norm))
        totals.append(get_total_norm(weight.grad for weight in cell.parameters()).item())

    print(f"gradient norm of {'without':>12} {f'max_norm={MAX_NORM}':>14}")
    for step in range(STEPS - 1, -1, -11):
        print(f"state at step {step:2} {columns[0][step]:12.3g} {columns[1][step]:14.3g}")
    print(f"all weights      {totals[0]:12.3g} {totals[1]:14.3g}")


if __name__ == "__main__":
    main()
