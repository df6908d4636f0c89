"""A training that goes on from its newest state, whenever it was killed."""

import os

import torch

from gradclip import GradientClipper, JsonlSink, TensorBoardSink
from gradclip.thresholds import Percentile

FLUSH_EVERY = 20
SAVE_EVERY = 37
BAD_EVERY = 53


class LoggedTraining:
    """A parameter under momentum, whose gradient depends on itself and on the step."""

    def __init__(self, *sinks):
        self.weight = torch.nn.Parameter(torch.ones(4))
        self.optimizer = torch.optim.SGD([self.weight], lr=0.05, momentum=0.9)
        rule = Percentile(50, window=50)
        self.clipper = GradientClipper(self.optimizer, rule, nonfinite="skip", log=[*sinks])

    def step(self):
        """Take a step; now and then one with a norm that is not finite."""
        step = self.clipper.steps
        noise = torch.randn(4, generator=torch.Generator().manual_seed(step))
        self.weight.grad = self.weight.detach() + noise
        if step % BAD_EVERY == BAD_EVERY - 1:
            self.weight.grad[0] = torch.nan
        self.optimizer.step()

    def step_up_to(self, last):
        """Take the steps before one."""
        while self.clipper.steps < last:
            self.step()

    def save(self, path):
        """Write the state, and only then put it in the place of the last one."""
        holders = {"optimizer": self.optimizer, "clipper": self.clipper}
        states = {name: holder.state_dict() for name, holder in holders.items()}
        beside = path.with_suffix(".new")
        torch.save({"weight": self.weight.detach(), **states}, beside)
        os.replace(beside, path)

    def load(self, path):
        """Go on from a state."""
        state = torch.load(path, weights_only=True)
        with torch.no_grad():
            self.weight.copy_(state["weight"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.clipper.load_state_dict(state["clipper"])


def sinks(folder, flush_every=FLUSH_EVERY):
    """Return the sinks of a life."""
    return [
        TensorBoardSink(folder / "events", flush_every=flush_every),
        JsonlSink(folder / "steps.jsonl", flush_every=flush_every),
    ]


def live(folder, last, taken):
    """Train up to a step, from the newest state if there is one; share how many were taken."""
    torch.set_num_threads(1)
    taken.value = 0
    life, state = LoggedTraining(*sinks(folder)), folder / "state.pt"
    if state.exists():
        life.load(state)
    while (steps := life.clipper.steps) < last:
        taken.value = steps
        if steps % SAVE_EVERY == 0:
            life.save(state)
        life.step()
    life.clipper.close()
