"""Training split into the stages of a pipeline, clipped by one norm over all of them.

    torchrun --nproc-per-node 2 examples/pipeline.py [LOGS [STEPS]]

Runs on GPUs with nccl or on CPUs with gloo, on up to four ranks; with plain `python` in a single
process. Each rank has other parameters. `Ranks` tells the clipper that they belong together: one
collective of a few bytes returns the norm of the whole gradient to every rank. The embedding of the
letters is the input of the first stage and, transposed, the output of the last stage. Both hold a
copy with the whole gradient, which counts once.
"""

import os
import sys
from pydoc_data.topics import topics

import torch
from torch import Tensor, distributed, nn
from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

from gradclip import GradientClipper, Ranks

CONTEXT, WIDTH, BLOCKS, BATCH, MICROBATCHES = 16, 64, 4, 128, 4


class Block(nn.Module):
    """Two layers with a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.inner = nn.Linear(WIDTH, 4 * WIDTH)
        self.outer = nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the inputs plus the outputs of the layers."""
        return inputs + self.outer(self.inner(self.norm(inputs)).relu())


class Letters(nn.Module):
    """One stage of a model that predicts letters; its parameters are named as in the whole model.

    Args:
        stage: Index of the stage.
        stages: Number of stages.
    """

    def __init__(self, stage: int, stages: int) -> None:
        super().__init__()
        self.first, self.last = stage == 0, stage == stages - 1
        self.embed = nn.Embedding(128, WIDTH)
        nn.init.normal_(self.embed.weight, std=WIDTH**-0.5)
        self.context = nn.Linear(CONTEXT * WIDTH, WIDTH)
        self.blocks = nn.ModuleDict({str(index): Block() for index in range(BLOCKS)})
        self.norm = nn.LayerNorm(WIDTH)
        # Every stage first makes the whole model, so that all draw the same weights, and then keeps
        # only the layers that it computes.
        for index in range(BLOCKS):
            if index * stages // BLOCKS != stage:
                del self.blocks[str(index)]
        if not self.first:
            del self.context
        if not self.last:
            del self.norm
        if not (self.first or self.last):
            del self.embed

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the outputs of this stage; the first takes letters, the last returns logits."""
        if self.first:
            inputs = self.context(self.embed(inputs).flatten(1))
        for block in self.blocks.values():
            inputs = block(inputs)
        return self.norm(inputs) @ self.embed.weight.T if self.last else inputs


def start() -> torch.device:
    """Join the processes that torchrun started; return the device of this one."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)))
    if kind == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if kind == "cuda" else "gloo"
    if "RANK" in os.environ:
        distributed.init_process_group(backend)
    else:
        distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    return device


def main(logs: str = "runs/pipeline", steps: str = "80") -> None:
    """Train a model of the letters in Python's documentation."""
    device = start()
    torch.set_num_threads(1)  # the layers are too small for several threads
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    text = torch.tensor(list("\n".join(topics.values()).encode("ascii", "ignore")), device=device)

    torch.manual_seed(0)  # the same weights and batches on all ranks
    model = Letters(rank, ranks).to(device)
    stage = PipelineStage(model, rank, ranks, device)
    schedule = ScheduleGPipe(stage, MICROBATCHES, loss_fn=nn.functional.cross_entropy)
    ends = distributed.new_group([*{0, ranks - 1}])  # the ranks that hold the embedding
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    copies = Ranks(replicated="embed.weight")
    clipper = GradientClipper(optimizer, 1.0, model=model, ranks=copies, log=logs)

    for step in range(int(steps)):
        starts = torch.randint(len(text) - CONTEXT, (BATCH,)).to(device)
        letters = text[starts[:, None] + torch.arange(CONTEXT + 1, device=device)]
        optimizer.zero_grad()
        losses: list[Tensor] = []
        inputs = (letters[:, :-1],) if model.first else ()
        schedule.step(*inputs, target=letters[:, -1] if model.last else None, losses=losses)
        if model.first or model.last:  # sum the gradients of input and output
            distributed.all_reduce(model.embed.weight.grad, group=ends)
        optimizer.step()  # clips first
        if step % 10 == 0 and model.last:
            loss = torch.stack(losses).mean().item()
            before, after = clipper.last.norm.item(), clipper.last.clipped_norm.item()
            print(
                f"step {step:2}  loss {loss:.3f}  norm before {before:.4f}, after {after:.4f}",
                flush=True,
            )

    rate, norm = clipper.clip_rate(), clipper.last.norm.item()
    clipper.close()  # the first process writes
    if model.first or model.last:
        checksum = model.embed.weight.double().abs().sum().item()
        print(
            f"rank {rank} of {ranks}: {rate:.0%} of the steps were clipped, the last norm was "
            f"{norm}, the embedding's checksum is {checksum}",
            flush=True,
        )
    if rank == 0:
        print(f"Curves: tensorboard --logdir {logs}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:3])
