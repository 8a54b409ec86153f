"""Mixed precision: ``torch.autocast`` to float16, and a ``GradScaler``.

    optimizer = fastsgd.SGD(model.parameters(), lr=0.1, fused=True, max_grad_norm=1.0)

With ``fused=True`` the scaler hands its scale to the step (torch's own protocol), which unscales in
the same pass. ``max_grad_norm`` is the norm of the unscaled gradients, so no ``scaler.unscale_`` is
needed before clipping. The usual four calls (``unscale_``, clip, ``step``, ``update``) work as
well, with and without ``fused``.

The scaler begins so high that its first steps overflow. Each must be left out, by every variant
alike, and the momentum must start at the first step that counts.

Runs on a CUDA device where there is one. On the CPU weights and losses are compared with those of
``torch.optim.SGD`` (without ``fused``) bit by bit: scales are powers of two, so that unscaling
rounds nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from digits import batches, check, network
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import fastsgd

STEPS = 30
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

Make = Callable[..., torch.optim.Optimizer]


def train(make: Make, clip: bool) -> tuple[list[Tensor], nn.Module, torch.optim.Optimizer]:
    """Train with a scaler; ``clip`` before the step, or leave that to it."""
    model = network().to(DEVICE)
    optimizer = make(model.parameters())
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**20, growth_interval=20)
    losses, skipped = [], 0
    for images, labels in batches(STEPS):
        images, labels = images.to(DEVICE), labels.to(DEVICE)
        optimizer.zero_grad()
        with torch.autocast(DEVICE, dtype=torch.float16):
            loss = cross_entropy(model(images), labels)
        scaler.scale(loss).backward()
        if clip:
            scaler.unscale_(optimizer)
            fastsgd.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scale = scaler.get_scale()
        scaler.update()
        skipped += scaler.get_scale() < scale
        losses.append(loss.detach())
    name = f"{type(optimizer).__module__.partition('.')[0]}, fused={optimizer.defaults['fused']}"
    print(f"{name}: loss {losses[0]:.3f} to {losses[-1]:.3f}, {skipped} steps overflowed")
    return losses, model, optimizer


def main() -> None:
    """Train with torch's, with ours in its place, and with ours in one pass."""
    sgd = {"lr": 0.1, "momentum": 0.9}
    # Stock's default code for CUDA rounds otherwise, and float16 makes more of it with each step.
    within = 0 if DEVICE == "cpu" else 5e-2
    stock, stock_model, _ = train(partial(torch.optim.SGD, **sgd), clip=True)
    for fused in (False, True):
        by_hand = partial(fastsgd.SGD, **sgd, fused=fused)
        in_the_step = partial(by_hand, max_grad_norm=1.0)
        for where, make in (("by hand", by_hand), ("in the step", in_the_step)):
            ours, model, optimizer = train(make, clip=make is by_hand)
            check(f"losses, clipped {where}, fused={fused}", ours, stock, within)
            weights = model.parameters(), stock_model.parameters()
            check(f"weights, clipped {where}, fused={fused}", *weights, within)
        print(f"norm of the last gradients, unscaled: {optimizer.grad_norm:.3f}")


if __name__ == "__main__":
    main()
