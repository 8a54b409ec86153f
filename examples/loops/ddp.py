"""``DistributedDataParallel``: replicas, each with an optimizer that steps on the same gradients.

    torchrun --standalone --nproc-per-node 2 examples/loops/ddp.py

    optimizer = fastsgd.SGD(model.parameters(), lr=0.1, momentum=0.9)

Gradients are averaged in ``backward()``, before the step sees them. So ``max_grad_norm`` clips by
the norm of the averaged gradients, the same in each process, without a message between them.
``ZeroRedundancyOptimizer``, which divides the states among the processes, takes the class:

    ZeroRedundancyOptimizer(model.parameters(), optimizer_class=fastsgd.SGD, lr=0.1)

There each optimizer sees its own parameters alone, so ``max_grad_norm`` and ``skip_nonfinite``,
which ask for all gradients, are not for it: clip by ``fastsgd.clip_grad_norm_`` before the step.

Losses and weights are compared with ``torch.optim.SGD``'s bit by bit, and the processes' with each
other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from digits import batches, check, network, say
from torch import Tensor, nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import fastsgd

STEPS = 60
OPTIONS = {"lr": 0.1, "momentum": 0.9}


def train(
    make: Callable[..., torch.optim.Optimizer], clip: bool = False, **options: Any
) -> tuple[list[Tensor], nn.Module]:
    """Train on this process's share of each batch; return losses and the network."""
    model = DistributedDataParallel(network())
    optimizer = make(model.parameters(), **OPTIONS, **options)
    losses = []
    for images, labels in batches(STEPS, size=64):
        share = slice(dist.get_rank(), None, dist.get_world_size())
        loss = cross_entropy(model(images[share]), labels[share])
        optimizer.zero_grad()
        loss.backward()
        if clip:
            fastsgd.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
    return losses, model


def compare(what: str, ours: tuple[list[Tensor], nn.Module], stock: Any) -> None:
    """Compare two trainings."""
    check(f"losses, {what}", ours[0], stock[0])
    check(f"weights, {what}", ours[1].parameters(), stock[1].parameters())


def main() -> None:
    """Train in each way with both, and compare."""
    ours, stock = train(fastsgd.SGD), train(torch.optim.SGD)
    say(f"loss {ours[0][0]:.3f} at first, {ours[0][-1]:.3f} after {STEPS} steps")
    compare("replicas", ours, stock)
    weights = nn.utils.parameters_to_vector(ours[1].parameters()).detach()
    first = weights.clone()
    dist.broadcast(first, src=0)
    check("weights of each process and the first", [weights], [first])
    split = train(ZeroRedundancyOptimizer, optimizer_class=fastsgd.SGD)
    compare("states divided", split, stock)
    ours, stock = train(fastsgd.SGD, max_grad_norm=1.0), train(torch.optim.SGD, clip=True)
    compare("clipped in the step", ours, stock)


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    dist.destroy_process_group()
