"""Clipping through time: the gradient of a recurrent state is clipped at every time step.

The gradient of an early state is multiplied by the recurrent matrix of every later step. If the
matrix stretches it, it explodes on the way. Clipping the gradient of the weights comes too late:
the early steps already dominate it. Clipping the gradient of the state stops the growth at every
step (Graves, "Generating sequences with recurrent neural networks", 2013).
"""

import torch
from torch import Tensor, nn

from gradclip import clip_backward, get_total_norm, through_time

STEPS, BATCH, HIDDEN = 100, 16, 64
MAX_NORM = 0.5


def recall(
    cell: nn.RNNCell, head: nn.Linear, inputs: Tensor, max_norm: float | None
) -> list[float]:
    """Train to recall the first input at the end; return the gradient norm of every state."""
    state, states = torch.zeros(BATCH, HIDDEN), []
    for values in inputs:
        state = cell(values, state)
        states.append(state)
        if max_norm is not None:
            state = clip_backward(state, max_norm)
    time_norms = through_time(states)
    loss = nn.functional.mse_loss(head(state), inputs[0].sign())
    cell.zero_grad()
    loss.backward()
    return time_norms.norms.tolist()


def main() -> None:
    """Print the norms with and without clipping through time."""
    torch.manual_seed(0)
    cell, head = nn.RNNCell(1, HIDDEN), nn.Linear(HIDDEN, 1)
    nn.init.orthogonal_(cell.weight_hh, gain=2.0)  # stretches the gradient
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
