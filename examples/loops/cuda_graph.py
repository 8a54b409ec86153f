"""A whole iteration in a CUDA graph: forward, backward and step are captured, and replayed.

    optimizer = fastsgd.AdamW(model.parameters(), lr=torch.tensor(1e-3, device="cuda"))
    ...
    with torch.cuda.graph(graph):
        loss = loss_fn(model(images), labels)
        loss.backward()
        optimizer.step()

No ``capturable=True`` is needed, as counts of steps live on the device; torch's AdamW needs it. The
first step makes the states, so it has to come before the capture. A learning rate that is a tensor
on the device may be changed between replays; a number is captured as it is. ``max_grad_norm``,
``skip_nonfinite``, ``ema_decay`` (as a number) and ``clear_grads="zero"`` can be captured too.

Weights are compared with those of ``torch.optim.AdamW`` in a plain loop, up to rounding. Without a
CUDA device, or without kernels for it, a sentence says so.
"""

from __future__ import annotations

import torch
from digits import batches, check, network
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fastsgd

WARM_UP, STEPS = 3, 100


def rate(step: int) -> float:
    """Return the learning rate of a step."""
    return 1e-3 * (1 - step / STEPS)


def data() -> list[tuple[Tensor, Tensor]]:
    """Return all batches, on the device."""
    return [(images.cuda(), labels.cuda()) for images, labels in batches(STEPS)]


def captured() -> nn.Module:
    """Train by replaying a graph."""
    model = network().cuda()
    lr = torch.tensor(0.0, device="cuda")
    optimizer = fastsgd.AdamW(model.parameters(), lr=lr)
    (images, labels), *_ = batches_here = data()
    images, labels = images.clone(), labels.clone()  # where each batch is copied to

    def iteration() -> Tensor:
        loss = cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        return loss

    def take(step: int) -> None:
        images.copy_(batches_here[step][0])
        labels.copy_(batches_here[step][1])
        lr.fill_(rate(step))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for step in range(WARM_UP):
            take(step)
            optimizer.zero_grad()
            iteration()
    torch.cuda.current_stream().wait_stream(side)

    optimizer.zero_grad()  # to None, so that the graph has gradients of its own
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = iteration()
    for step in range(WARM_UP, STEPS):
        take(step)
        graph.replay()
    print(f"loss {loss.item():.3f} after {STEPS} steps, {STEPS - WARM_UP} of them replays")
    return model


def plain() -> nn.Module:
    """Train with torch's optimizer, one call after the other."""
    model = network().cuda()
    optimizer = torch.optim.AdamW(model.parameters())
    for step, (images, labels) in enumerate(data()):
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.zero_grad()
        cross_entropy(model(images), labels).backward()
        optimizer.step()
    return model


def main() -> None:
    """Train both ways, and compare."""
    if not fastsgd.cuda_available():
        print("Nothing to capture: torch finds no CUDA device here, or fastsgd has no kernels.")
        return
    check("weights", captured().parameters(), plain().parameters(), within=1e-3)


if __name__ == "__main__":
    main()
