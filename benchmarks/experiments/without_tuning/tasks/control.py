"""A policy gradient that balances a pole on a cart.

The dynamics are those of Barto, Sutton and Anderson (1983); the learning rule is REINFORCE,
Williams (1992), with the mean return of the batch as baseline.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli
from torch.optim import Adam

from benchmarks.experiments.without_tuning.task import Training, seeded

EPISODES, LONGEST, EVALUATED = 16, 200, 64
DISCOUNT = 0.98


def moved(state: Tensor, right: Tensor) -> Tensor:
    """Return the states 0.02 s after pushes of 10 N to the right or to the left."""
    x, speed, angle, turn = state.unbind(1)
    force = 20.0 * right - 10.0
    sine, cosine = angle.sin(), angle.cos()
    inner = (force + 0.05 * turn.square() * sine) / 1.1
    spin = (9.8 * sine - cosine * inner) / (0.5 * (4 / 3 - 0.1 * cosine.square() / 1.1))
    push = inner - 0.05 * spin * cosine / 1.1
    return torch.stack(
        (x + 0.02 * speed, speed + 0.02 * push, angle + 0.02 * turn, turn + 0.02 * spin), 1
    )


@torch.no_grad()
def played(
    policy: nn.Module, episodes: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Return states, pushes and whether the pole stood, each of shape (time, episodes, ...)."""
    state = torch.rand(episodes, 4, generator=generator) * 0.1 - 0.05
    standing = torch.ones(episodes, dtype=torch.bool)
    states, pushes, stood = [], [], []
    for _ in range(LONGEST):
        chance = policy(state).squeeze(1).sigmoid()
        right = (torch.rand(episodes, generator=generator) < chance).float()
        states.append(state)
        pushes.append(right)
        stood.append(standing)
        state = moved(state, right)
        standing = standing & (state[:, 0].abs() < 2.4) & (state[:, 2].abs() < 12 * math.pi / 180)
        if not standing.any():
            break
    return torch.stack(states), torch.stack(pushes), torch.stack(stood)


def training(rate: float, steps: int, seed: int) -> Training:
    """Return a training by Adam of a network that gives the chance of a push to the right."""
    generator = torch.Generator().manual_seed(seed)
    policy = seeded(lambda: nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 1)), seed)

    def loss(step: int) -> Tensor:
        states, pushes, stood = played(policy, EPISODES, generator)
        returns = torch.zeros_like(pushes)
        after = torch.zeros(EPISODES)
        for time in range(len(stood) - 1, -1, -1):
            after = stood[time] + DISCOUNT * after * stood[time]
            returns[time] = after
        advantages = returns - returns[stood].mean()
        chances: Tensor = Bernoulli(logits=policy(states).squeeze(2)).log_prob(pushes)
        return -(chances * advantages)[stood].mean()

    def score() -> float:
        judge = torch.Generator().manual_seed(seed)
        stood = played(policy, EVALUATED, judge)[2]
        return -float(stood.float().sum(0).mean())

    return Training(policy, Adam(policy.parameters(), lr=rate), loss, score)
