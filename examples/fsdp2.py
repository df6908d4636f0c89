"""Training sharded over processes by FSDP2, clipped by one norm over all of them.

    torchrun --nproc-per-node 2 examples/fsdp2.py [LOGS]

Runs on GPUs with nccl or on CPUs with gloo; with plain `python` in a single process. The clipper
needs no option: it finds gradients that are sharded over ranks. Each rank measures its shard, and
one collective of a few bytes returns the norm of the whole gradient to every rank.
"""

import os
import sys
from pydoc_data.topics import topics

import torch
from torch import Tensor, distributed, nn
from torch.distributed.fsdp import fully_shard

from gradclip import GradientClipper

CONTEXT, WIDTH, BATCH, STEPS = 16, 64, 128, 80


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


def main(logs: str = "runs/fsdp2") -> None:
    """Train a model of the letters in Python's documentation."""
    device = start()
    torch.set_num_threads(1)  # the layers are too small for several threads
    rank, ranks = distributed.get_rank(), distributed.get_world_size()
    text = torch.tensor(list("\n".join(topics.values()).encode("ascii", "ignore")), device=device)

    torch.manual_seed(0)  # the same weights and batches on all ranks
    model = nn.Sequential(
        nn.Embedding(128, 8),
        nn.Flatten(),
        nn.Linear(8 * CONTEXT, WIDTH),
        *[Block() for _ in range(3)],
        nn.Linear(WIDTH, 128),
    ).to(device)
    for layer in model:
        if isinstance(layer, Block):
            fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    clipper = GradientClipper(optimizer, 1.0, model=model, log=logs)  # the first process writes

    for step in range(STEPS):
        starts = torch.randint(len(text) - CONTEXT, (BATCH,))[rank::ranks].to(device)
        letters = text[starts[:, None] + torch.arange(CONTEXT + 1, device=device)]
        loss = nn.functional.cross_entropy(model(letters[:, :-1]), letters[:, -1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()  # clips first
        if step % 10 == 0:
            distributed.all_reduce(loss := loss.detach() / ranks)
            if rank == 0:
                before, after = clipper.last.norm.item(), clipper.last.clipped_norm.item()
                print(
                    f"step {step:2}  loss {loss:.3f}  norm before {before:.4f}, after {after:.4f}"
                )

    rate, norm = clipper.clip_rate(), clipper.last.norm.item()
    parameters = [parameter.full_tensor() for parameter in model.parameters()]
    checksum = sum(parameter.double().abs().sum().item() for parameter in parameters)
    clipper.close()
    print(
        f"rank {rank} of {ranks}: {rate:.0%} of the steps were clipped, the last norm was {norm}, "
        f"the parameters' checksum is {checksum}",
        flush=True,
    )
    if rank == 0:
        print(f"Curves: tensorboard --logdir {logs}")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:2])
